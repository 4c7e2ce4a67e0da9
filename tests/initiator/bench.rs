//! The workload engine: what it counts, and that its verification finds what is wrong.

use crate::scripted_target::{BLOCK_LEN, Behaviour, Fault, ScriptedTarget};
use crate::{NSID, options};
use fastice::initiator::bench::verify::{BlockFault, check_block};
use fastice::initiator::bench::{BenchOptions, BenchReport, Limit, Pattern, Verify, run};
use fastice::initiator::error::ErrorKind;
use fastice::units::{ByteLen, ByteOffset, Lba};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn workload(target: &ScriptedTarget) -> BenchOptions {
    BenchOptions {
        depth: 8,
        limit: Limit::Bytes(ByteLen(4 << 20)),
        seed: 42,
        ..BenchOptions::new(options(target), NSID)
    }
}

fn run_quietly(options: &BenchOptions) -> BenchReport {
    run(options, &AtomicBool::new(false), |_| {}).expect("a run")
}

#[test]
fn a_byte_limit_is_met_exactly_by_all_queues_together() {
    let target = ScriptedTarget::start(Behaviour::default());
    for pattern in [Pattern::Random, Pattern::Sequential] {
        let report = run_quietly(&BenchOptions { queues: 3, read_percent: 70, pattern, ..workload(&target) });
        assert_eq!(report.reads.commands + report.writes.commands, 1024);
        assert_eq!(report.reads.bytes + report.writes.bytes, 4 << 20);
        assert!(
            report.reads.commands > report.writes.commands && report.writes.commands > 200,
            "about 70 percent"
        );
        let latency = &report.reads.latency;
        assert!(latency.min_ns > 0 && latency.min_ns <= latency.p50_ns && latency.p50_ns <= latency.max_ns);
        assert!(report.is_clean());
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["reads"]["latency"]["p99_ns"].is_u64() && json["pattern"].is_string());
    }
}

#[test]
fn sequential_writes_cover_the_span_and_nothing_else() {
    let target = ScriptedTarget::start(Behaviour::default());
    let report = run_quietly(&BenchOptions {
        pattern: Pattern::Sequential,
        read_percent: 0,
        queues: 2,
        start: ByteOffset(64 << 10),
        span: Some(ByteLen(1 << 20)),
        limit: Limit::Bytes(ByteLen(1 << 20)),
        verify: Verify::AfterWrites,
        flush_interval: 10,
        ..workload(&target)
    });
    assert!(report.is_clean() && report.verify.blocks_checked == 2048, "{report:?}");
    assert!(report.flushes >= 20, "{} flushes", report.flushes);
    for (lba, block) in (0u64..).zip(target.media().chunks(BLOCK_LEN)) {
        let expected = if (128..128 + 2048).contains(&lba) { Ok(()) } else { Err(BlockFault::Foreign) };
        assert_eq!(check_block(block, 42, Lba(lba)).map(drop), expected, "block {lba}");
    }
}

#[test]
fn verifying_mixed_runs_are_clean_in_every_transport_variant() {
    let variants = [
        Behaviour::default(),
        Behaviour { success_flag: true, ..Behaviour::default() },
        Behaviour { in_capsule_len: 0, maxh2cdata: 4096, c2h_len_max: 1000, ..Behaviour::default() },
    ];
    for (behaviour, unit_len) in variants.into_iter().zip([4096, 65_536, 16_384]) {
        let target = ScriptedTarget::start(behaviour);
        let mut workload = BenchOptions {
            queues: 2,
            read_percent: 50,
            unit_len,
            verify: Verify::OnRead,
            limit: Limit::Bytes(ByteLen(16 << 20)),
            ..workload(&target)
        };
        workload.connect.header_digest = true;
        workload.connect.data_digest = unit_len == 16_384;
        let report = run_quietly(&workload);
        assert!(report.is_clean(), "{report:?}");
        assert!(report.verify.blocks_checked > 1000, "{}", report.verify.blocks_checked);
    }
}

#[test]
fn verification_finds_lost_misplaced_and_torn_writes() {
    for fault in [Fault::LostWrite, Fault::MisplacedWrite, Fault::TornWrite] {
        for passes in [1, 2] {
            // The last pass over 16 units writes each once more; the fault hits the last pass.
            let fault_at = (passes - 1) * 16 + 5;
            let target = ScriptedTarget::start(Behaviour { fault, fault_at, ..Behaviour::default() });
            let report = run_quietly(&BenchOptions {
                pattern: Pattern::Sequential,
                read_percent: 0,
                depth: 1,
                span: Some(ByteLen(16 << 12)),
                limit: Limit::Bytes(ByteLen(u64::from(passes) * (16 << 12))),
                verify: Verify::AfterWrites,
                ..workload(&target)
            });
            assert!(
                !report.is_clean() && report.verify.faults >= 1,
                "{fault:?} in pass {passes}: {report:?}"
            );
            let told = report.verify.first_faults.join("; ");
            match (fault, passes) {
                (Fault::LostWrite | Fault::TornWrite, 2) => assert!(told.contains("stale"), "{told}"),
                (Fault::MisplacedWrite, _) => assert!(told.contains("block"), "{told}"),
                _ => assert!(told.contains("not a block of this run"), "{told}"),
            }
        }
    }
}

#[test]
fn a_failed_command_is_counted_and_the_run_goes_on() {
    let fault = Fault::Status(nvme_spec::Status::UNRECOVERED_READ_ERROR);
    let target = ScriptedTarget::start(Behaviour { fault, fault_at: 100, ..Behaviour::default() });
    let report = run_quietly(&workload(&target));
    assert_eq!((report.errors, report.reads.commands), (1, 1023));
    assert!(report.first_error.unwrap().contains("Unrecovered Read Error"));
}

#[test]
fn a_broken_connection_ends_the_run_or_is_mended() {
    let behaviour = Behaviour { fault: Fault::Close, fault_at: 700, ..Behaviour::default() };
    let target = ScriptedTarget::start(behaviour);
    let error = run(&workload(&target), &AtomicBool::new(false), |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);

    let target = ScriptedTarget::start(behaviour);
    let report = run_quietly(&BenchOptions {
        read_percent: 30,
        verify: Verify::OnRead,
        reconnect: Some(Duration::from_secs(5)),
        ..workload(&target)
    });
    assert_eq!(report.reconnects, 1);
    assert!(report.is_clean() && report.verify.blocks_checked > 500, "{report:?}");
}

#[test]
fn a_run_ends_by_time_or_when_told_to() {
    let target = ScriptedTarget::start(Behaviour::default());
    let timed = BenchOptions { limit: Limit::Duration(Duration::from_millis(300)), ..workload(&target) };
    let report = run_quietly(&timed);
    assert!(report.elapsed_s >= 0.3 && report.elapsed_s < 2.0, "{}", report.elapsed_s);
    let stop = AtomicBool::new(false);
    let started = Instant::now();
    let endless = BenchOptions { limit: Limit::Duration(Duration::from_secs(60)), ..timed };
    let mut calls = 0;
    run(&endless, &stop, |progress| {
        calls += 1;
        assert!(progress.reads > 0);
        stop.store(true, Ordering::Relaxed);
    })
    .unwrap();
    assert!(calls >= 1 && started.elapsed() < Duration::from_secs(10));
}

#[test]
fn impossible_workloads_are_refused() {
    let target = ScriptedTarget::start(Behaviour { mdts: 1, io_queues: 2, ..Behaviour::default() });
    let good = BenchOptions { limit: Limit::Bytes(ByteLen(4096)), ..workload(&target) };
    run_quietly(&good);
    let bad = [
        BenchOptions { unit_len: 1000, ..good.clone() },
        BenchOptions { unit_len: 16_384, ..good.clone() },
        BenchOptions { unit_len: 0, ..good.clone() },
        BenchOptions { read_percent: 101, ..good.clone() },
        BenchOptions { queues: 3, ..good.clone() },
        BenchOptions { queues: 0, ..good.clone() },
        BenchOptions { depth: 0, ..good.clone() },
        BenchOptions { start: ByteOffset(8192 * 512), ..good.clone() },
        BenchOptions { span: Some(ByteLen(8193 * 512)), ..good.clone() },
        BenchOptions { verify: Verify::AfterWrites, ..good.clone() },
    ];
    for options in bad {
        let error = run(&options, &AtomicBool::new(false), |_| {}).expect_err("an impossible workload");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
}
