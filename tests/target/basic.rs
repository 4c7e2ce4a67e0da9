//! The target against our own host over real sockets: connecting, reading, writing, and what surrounds them.

use fastice::initiator::bench::{self, BenchOptions, Limit, Pattern, Verify};
use fastice::initiator::controller::{ConnectOptions, Controller, Host};
use fastice::initiator::discovery::discover;
use fastice::units::{BlockCount, ByteLen, Lba};
use nvme_spec::Nsid;

use crate::support::{NQN, TestTarget, connect, eventually, memory_config, memory_target, options};

#[test]
fn what_is_written_is_read() {
    let target = memory_target();
    let controller = connect(&target);
    let namespace = controller.namespace(Nsid(1)).expect("namespace 1");
    assert_eq!(namespace.blocks(), BlockCount(64 << 8));
    for (lba, len) in [(0, 4096), (5, 8192), (100, 16 * 1024), (300, 20 * 1024), (1000, 1 << 20)] {
        let data: Vec<u8> = (0..len).map(|byte| (byte * 7 + lba * 13 + byte / 4096) as u8).collect();
        namespace.write(Lba(lba as u64), &data, lba == 5).expect("write");
        let mut back = vec![0; len];
        namespace.read(Lba(lba as u64), &mut back).expect("read");
        assert!(data == back, "{len} bytes at block {lba}");
    }
    namespace.flush().expect("flush");
    namespace.write_zeroes(Lba(1000), BlockCount(16)).expect("write zeroes");
    let mut zeroed = vec![1; 4096 * 16];
    namespace.read(Lba(1000), &mut zeroed).expect("read");
    assert!(zeroed.iter().all(|&byte| byte == 0));
    controller.shutdown().expect("shutdown");
}

#[test]
fn verified_load_is_clean_in_every_digest_and_alignment() {
    let target = memory_target();
    for (header_digest, data_digest, hpda, flow) in
        [(false, false, 0, true), (true, false, 3, false), (false, true, 0, false), (true, true, 31, true)]
    {
        let connect = ConnectOptions {
            header_digest,
            data_digest,
            hpda,
            disable_sq_flow_control: flow,
            ..options(&target)
        };
        let options = BenchOptions {
            pattern: Pattern::Random,
            read_percent: 50,
            unit_len: if data_digest { 32 * 1024 } else { 4096 },
            depth: 16,
            queues: 2,
            limit: Limit::Bytes(ByteLen(24 << 20)),
            verify: Verify::OnRead,
            flush_interval: 50,
            ..BenchOptions::new(connect, Nsid(1))
        };
        let stop = std::sync::atomic::AtomicBool::new(false);
        let report =
            bench::run(&options, &stop, &mut |_: &bench::BenchProgress| {}).expect("the run ends well");
        let verify = &report.verify;
        assert_eq!(verify.faults, 0, "{verify:?}");
        assert!(report.writes.commands > 0 && report.reads.commands > 0);
    }
    let (_, tcp) = target.running.stats();
    assert_eq!((tcp.protocol_errors, tcp.data_digest_errors), (0, 0));
}

#[test]
fn the_discovery_log_names_the_subsystem() {
    let target = memory_target();
    let entries = discover(target.address(), &Host::random()).expect("discovery");
    assert!(entries.iter().any(|entry| entry.subsystem_nqn == NQN), "{entries:?}");
}

#[test]
fn two_hosts_see_each_others_writes() {
    let target = memory_target();
    let (one, other) = (connect(&target), connect(&target));
    let data = vec![0xA5; 4096];
    one.namespace(Nsid(1)).expect("namespace").write(Lba(7), &data, true).expect("write");
    let mut back = vec![0; 4096];
    other.namespace(Nsid(1)).expect("namespace").read(Lba(7), &mut back).expect("read");
    assert_eq!(data, back);
}

#[test]
fn a_stopped_target_leaves_no_connection_and_says_so() {
    let target = memory_target();
    let controller = connect(&target);
    target.running.stop(std::time::Duration::from_secs(5)).expect("an orderly end");
    let namespace = controller.namespace(Nsid(1));
    assert!(namespace.is_err() || namespace.expect("checked").flush().is_err());
    assert!(
        Controller::connect(&ConnectOptions::new(
            "127.0.0.1:1".parse().expect("an address"),
            NQN,
            Host::random()
        ))
        .is_err()
    );
}

#[test]
fn the_null_device_reads_as_zeros_whatever_was_written_and_however_long() {
    let target = TestTarget::start(&memory_config().replace("memory = \"64MiB\"", "null = \"64MiB\""));
    for digest in [false, true] {
        let options = ConnectOptions { header_digest: digest, data_digest: digest, ..options(&target) };
        let controller = Controller::connect(&options).expect("the host connects");
        let namespace = controller.namespace(Nsid(1)).expect("namespace 1");
        // Lent, exchanged, and longer than the pool's zeroes.
        for len in [4096, 8192, 12 << 10, 64 << 10, 512 << 10] {
            namespace.write(Lba(3), &vec![0x5A; len], false).expect("a write");
            for _ in 0..20 {
                let mut data = vec![0xA5; len];
                namespace.read(Lba(3), &mut data).expect("a read");
                assert!(data.iter().all(|byte| *byte == 0), "{len} bytes, digests {digest}");
            }
        }
        controller.shutdown().expect("shutdown");
    }
    eventually("nobody has a buffer of the pool", || {
        target.running.cores().iter().all(|core| core.buffer_bytes == 0)
    });
}
