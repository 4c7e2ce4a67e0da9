//! Connections that are hostile as a whole: floods, silence, hosts that never read, noise. Others are served meanwhile.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fastice::initiator::bench::{self, BenchOptions, BenchReport, Limit, Pattern, Verify};
use fastice::initiator::raw::{RawConnection, RawEvent};
use fastice::tcp::pdu::{Digests, PduHeader};
use fastice::units::{ByteLen, ByteOffset};
use nvme_spec::{NvmOpcode, Status};
use zerocopy::FromBytes as _;

use crate::rude::{
    HOST, HOST_ID, NOISE_NQN, RudeHost, WRITABLE, answer_to, capsule, completion_of, connect_data,
    expect_no_leak, expect_service, expect_status, flush, h2c_data, introduced, pdu_of, r2t_of, rude_target,
    tcp_stats, transfer, try_connect, write_in_capsule,
};
use crate::support::{NQN, TestTarget, eventually, options};

/// Numbers without order, but the same in every run (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Verified load of a polite host on the upper half of the namespace, until told to stop.
fn polite_load(target: &TestTarget, stop: &AtomicBool) -> BenchReport {
    let options = BenchOptions {
        pattern: Pattern::Random,
        read_percent: 50,
        unit_len: 8192,
        depth: 8,
        queues: 2,
        limit: Limit::Duration(Duration::from_secs(60)),
        start: ByteOffset(8 << 20),
        span: Some(ByteLen(8 << 20)),
        verify: Verify::OnRead,
        ..BenchOptions::new(options(target), WRITABLE)
    };
    bench::run(&options, stop, &mut |_: &bench::BenchProgress| {}).expect("the polite host is served")
}

/// Runs `hostile` while a polite host works, whose data must stay right.
fn beside_a_polite_host(target: &TestTarget, hostile: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        let load = scope.spawn(|| polite_load(target, &stop));
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(hostile));
        stop.store(true, Ordering::Relaxed);
        let report = load.join().expect("the polite host ends");
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        report
    });
    assert_eq!(report.verify.faults, 0, "{:?}", report.verify);
    assert!(report.reads.commands > 0 && report.writes.commands > 0, "the polite host got nothing done");
}

#[test]
fn a_flood_of_silent_connections_is_freed_by_time_and_others_are_served() {
    let target = rude_target();
    let begun = Instant::now();
    let flood: Vec<TcpStream> =
        (0..600).map(|_| TcpStream::connect(target.address()).expect("accepted")).collect();
    // Some introduce themselves and then say nothing more.
    let mut halfway: Vec<RawConnection> =
        (0..50).map(|_| introduced(target.address(), Digests::NONE)).collect();
    eventually("all are adopted", || tcp_stats(&target).connections >= 650);
    expect_service(&target);
    assert!(begun.elapsed() < Duration::from_secs(9), "the machine is too slow for this test");
    std::thread::sleep(Duration::from_secs(10).saturating_sub(begun.elapsed()));
    eventually("time has freed them", || tcp_stats(&target).handshake_timeouts == 650);
    assert_eq!(halfway[0].read_pdu(Duration::from_secs(1)).expect("an end"), RawEvent::Closed);
    expect_no_leak(&target);
    drop(flood);
}

#[test]
fn connections_that_come_and_go_leave_nothing() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let queue = capsule(Digests::NONE, &flush(WRITABLE, 1), &[]);
    let mut dice = Dice(4);
    for round in 0..300 {
        let Ok(mut raw) = RawConnection::connect(target.address()) else { continue };
        match round % 3 {
            0 => {}
            1 => drop(raw.send(&queue[..dice.below(queue.len())])),
            _ => drop(raw.send(&[1, 0, 128, 0, 128, 0])),
        }
    }
    drop(host);
    expect_no_leak(&target);
}

#[test]
fn a_host_that_never_reads_keeps_nothing_from_the_others() {
    let target = rude_target();
    let hosts: Vec<RudeHost> = (0..2).map(|_| RudeHost::connect(target.address())).collect();
    // On every core: reads of 1 MiB each, far more than the pool and the socket hold, and nobody takes them.
    let mut queues = Vec::new();
    for (host, qid) in hosts.iter().zip([1, 1]).chain(hosts.iter().zip([2, 2])) {
        let mut queue = host.queue(qid, 128, Digests::NONE);
        for cid in 0..100 {
            let read = transfer(NvmOpcode::READ, WRITABLE, cid, 0, 256);
            queue.send_capsule(&read, &[]).expect("sent");
        }
        queues.push(queue);
    }
    beside_a_polite_host(&target, || std::thread::sleep(Duration::from_secs(2)));
    expect_service(&target);
    // Who reads late gets all of it.
    let mut late = queues.remove(0);
    let mut done = 0;
    while done < 100 {
        let pdu = pdu_of(&mut late);
        done += usize::from(crate::rude::completion_in(&pdu).is_some());
    }
    drop((late, queues, hosts));
    expect_no_leak(&target);
}

#[test]
fn a_host_that_never_sends_what_it_announced_keeps_nothing_from_the_others() {
    let target = rude_target();
    let hosts: Vec<RudeHost> = (0..2).map(|_| RudeHost::connect(target.address())).collect();
    let mut queues = Vec::new();
    for (host, qid) in hosts.iter().zip([1, 1]).chain(hosts.iter().zip([2, 2])) {
        let mut queue = host.queue(qid, 128, Digests::NONE);
        for cid in 0..100 {
            queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, cid, 0, 256), &[]).expect("sent");
        }
        queues.push(queue);
    }
    beside_a_polite_host(&target, || std::thread::sleep(Duration::from_secs(2)));
    drop((queues, hosts));
    expect_no_leak(&target);
}

#[test]
fn data_behind_a_capsule_without_a_buffer_still_arrives() {
    // 8 MiB of buffers and writes of 1 MiB: those with an R2T hold all this connection may have, and their data comes
    // behind capsules that find no buffer.
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 128, Digests::NONE);
    let mut asked = Vec::new();
    for cid in 0..6 {
        queue
            .send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, cid, 256 * u64::from(cid), 256), &[])
            .expect("sent");
    }
    while let RawEvent::Pdu(pdu) = queue.read_pdu(Duration::from_millis(500)).expect("good PDUs") {
        let PduHeader::R2t(r2t) = pdu.header else { panic!("{pdu:?}") };
        asked.push(r2t);
    }
    assert!((1..6).contains(&asked.len()), "{} R2Ts: the pool is not the limit any more", asked.len());
    let mut bytes = Vec::new();
    for cid in 50..100u16 {
        let lba = 2048 + 4 * u64::from(cid);
        bytes.extend_from_slice(&capsule(
            Digests::NONE,
            &write_in_capsule(WRITABLE, cid, lba, 16384),
            &[cid as u8; 16384],
        ));
    }
    for r2t in &asked {
        bytes.extend_from_slice(&h2c_data(Digests::NONE, &answer_to(r2t), &vec![r2t.cccid as u8; 1 << 20]));
    }
    queue.send(&bytes).expect("sent");
    let mut done = 0;
    while done < 56 {
        let pdu = pdu_of(&mut queue);
        match (pdu.header, crate::rude::completion_in(&pdu)) {
            (_, Some((cid, status, _))) => {
                assert_eq!(status, Status::SUCCESS, "command {cid}");
                done += 1;
            }
            (PduHeader::R2t(r2t), None) => {
                let data = vec![r2t.cccid as u8; 1 << 20];
                queue.send(&h2c_data(Digests::NONE, &answer_to(&r2t), &data)).expect("sent");
            }
            (other, None) => panic!("{other:?}"),
        }
    }
    for cid in 50..100u16 {
        let data = crate::rude::read(&mut queue, WRITABLE, 2048 + 4 * u64::from(cid), 4);
        assert!(data == vec![cid as u8; 16384], "capsule {cid}");
    }
    for cid in 0..6u16 {
        let data = crate::rude::read(&mut queue, WRITABLE, 256 * u64::from(cid), 256);
        assert!(data == vec![cid as u8; 1 << 20], "write {cid}");
    }
    drop((queue, host));
    expect_no_leak(&target);
}

#[test]
fn answers_that_find_no_room_arrive_whole_however_busy_their_host_is_meanwhile() {
    const BLOCKS: u16 = 64;
    const READS: u16 = 48;
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 256, Digests::NONE);
    for lba in 0..BLOCKS {
        let data = [lba as u8 ^ 0x5A; 4096];
        expect_status(&mut queue, &write_in_capsule(WRITABLE, lba, lba.into(), 4096), &data, Status::SUCCESS);
    }
    let written: Vec<u8> = (0..BLOCKS).flat_map(|lba| [lba as u8 ^ 0x5A; 4096]).collect();
    // 12 MiB, more than sockets hold: nothing of it is read yet, and single commands keep the core at this socket.
    for cid in 0..READS {
        queue.send_capsule(&transfer(NvmOpcode::READ, WRITABLE, cid, 0, BLOCKS), &[]).expect("sent");
    }
    let flushes = READS..READS + 100;
    for cid in flushes.clone() {
        queue.send_capsule(&flush(WRITABLE, cid), &[]).expect("sent");
        std::thread::sleep(Duration::from_micros(100));
    }
    // Now and then too little for all that waits, which is cut wherever the socket happens to be full.
    let (mut read, mut ended) = (0, std::collections::HashSet::new());
    while ended.len() < usize::from(flushes.end) {
        let pdu = pdu_of(&mut queue);
        match pdu.header {
            PduHeader::C2hData(header) => {
                assert_eq!((header.data_offset, pdu.data == written), (0, true), "read {}", header.cccid);
                read += 1;
            }
            PduHeader::CapsuleResp(cqe) => {
                let cqe = nvme_spec::CompletionQueueEntry::read_from_bytes(&cqe).expect("16 bytes");
                assert!(ended.insert(cqe.cid.get()), "{} ended twice", cqe.cid.get());
            }
            other => panic!("{other:?}"),
        }
        if read % 8 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert_eq!(read, READS);
    drop((queue, host));
    expect_no_leak(&target);
}

#[test]
fn slow_hosts_are_served_slowly_and_others_are_not() {
    let target = rude_target();
    let address = target.address();
    beside_a_polite_host(&target, || {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut raw = introduced(address, Digests::NONE);
                    let data = connect_data(0xFFFF, NQN, HOST, HOST_ID);
                    assert_eq!(try_connect(&mut raw, 0, 32, &data).0, Status::SUCCESS);
                    let sqe = crate::rude::with(
                        &fastice::initiator::command::property_get(nvme_spec::register::Property::CAP, true),
                        9,
                        nvme_spec::SglDescriptor::default(),
                    );
                    let bytes = capsule(Digests::NONE, &sqe, &[]);
                    raw.send_slowly(&bytes, 1, Duration::from_millis(15)).expect("sent");
                    assert_eq!(completion_of(&mut raw).1, Status::SUCCESS);
                });
            }
        });
    });
    expect_no_leak(&target);
}

/// Bytes that are PDUs more or less: most are good but for a flipped bit, some are noise.
fn noise(dice: &mut Dice, digests: Digests) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..1 + dice.below(12) {
        let cid = dice.below(64) as u16;
        let lba = dice.below(4096) as u64;
        let blocks = 1 + dice.below(4) as u16;
        let mut pdu = match dice.below(6) {
            0 => capsule(digests, &transfer(NvmOpcode::READ, WRITABLE, cid, lba, blocks), &[]),
            1 => capsule(digests, &transfer(NvmOpcode::WRITE, WRITABLE, cid, lba, blocks), &[]),
            2 => capsule(digests, &write_in_capsule(WRITABLE, cid, lba, 4096), &[0xA5; 4096]),
            3 => capsule(digests, &flush(WRITABLE, cid), &[]),
            4 => (0..dice.below(200)).map(|_| dice.next() as u8).collect(),
            _ => {
                let header = fastice::tcp::pdu::DataPdu {
                    cccid: cid,
                    ttag: dice.below(64) as u16,
                    data_offset: 0,
                    data_len: 4096 * u32::from(blocks),
                    last: true,
                    success: false,
                };
                h2c_data(digests, &header, &vec![0x5A; 4096 * usize::from(blocks)])
            }
        };
        if dice.below(4) == 0 && !pdu.is_empty() {
            let at = dice.below(pdu.len().min(96));
            pdu[at] ^= 1 << dice.below(8);
        }
        bytes.extend_from_slice(&pdu);
    }
    bytes
}

#[test]
fn noise_on_many_queues_does_not_reach_the_polite_host() {
    let target = rude_target();
    beside_a_polite_host(&target, || {
        let mut dice = Dice(20_261_122);
        let mut host = RudeHost::connect_to(target.address(), NOISE_NQN);
        for round in 0..400u16 {
            let digests = Digests { header: dice.below(3) == 0, data: dice.below(3) == 0 };
            let qid = 1 + round % 60;
            let mut raw = introduced(target.address(), digests);
            let data = connect_data(host.cntlid, NOISE_NQN, HOST, HOST_ID);
            if round % 3 > 0 && try_connect(&mut raw, qid, 64, &data).0 != Status::SUCCESS {
                // That queue has not gone yet, or a bit of noise has shut the controller down.
                host = RudeHost::connect_to(target.address(), NOISE_NQN);
                continue;
            }
            for _ in 0..1 + dice.below(3) {
                if raw.send(&noise(&mut dice, digests)).is_err() {
                    break;
                }
            }
            // What comes back must be PDUs, whatever they say.
            while let RawEvent::Pdu(_) = raw.read_pdu(Duration::from_millis(2)).expect("good PDUs") {}
        }
    });
    let (_, tcp) = target.running.stats();
    assert!(tcp.protocol_errors > 50 && tcp.header_digest_errors > 0, "{tcp:?}");
    expect_no_leak(&target);
}

#[test]
fn r2t_data_of_a_lost_connection_is_not_written() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, Digests::NONE);
    queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, 1, 10, 16), &[]).expect("sent");
    let r2t = r2t_of(&mut queue);
    let bytes = h2c_data(Digests::NONE, &answer_to(&r2t), &[0xDE; 65536]);
    queue.send(&bytes[..bytes.len() - 1]).expect("sent");
    drop(queue);
    eventually("it is gone", || {
        let stats = tcp_stats(&target);
        stats.connections == stats.connections_ended + 1
    });
    let mut queue = host.queue(1, 16, Digests::NONE);
    assert!(crate::rude::read(&mut queue, WRITABLE, 10, 16).iter().all(|&byte| byte == 0));
    drop((queue, host));
    expect_no_leak(&target);
}
