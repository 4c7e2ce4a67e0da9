//! Commands of a host that keeps many in flight are gathered: its socket is left alone for a moment, responses come together, and
//! nothing is lost by it.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use fastice::initiator::raw::RawConnection;
use fastice::tcp::pdu::{Digests, PduHeader};
use nvme_spec::{Nsid, NvmOpcode, Status};

use crate::rude::{
    RudeHost, WRITABLE, capsule, completion_in, completion_of, expect_closed, expect_service, flush, pdu_of,
    tcp_stats, transfer, write_in_capsule,
};
use crate::support::{TestTarget, memory_config};

/// Of the queues.
const ENTRIES: u16 = 128;

/// Sends so many commands at once, and waits until all are answered.
fn burst(queue: &mut RawConnection, commands: u16) {
    let bytes: Vec<u8> =
        (0..commands).flat_map(|cid| capsule(Digests::NONE, &flush(Nsid(1), cid), &[])).collect();
    queue.send(&bytes).expect("sent");
    let answered: BTreeSet<u16> = (0..commands)
        .map(|_| {
            let (cid, status, _) = completion_of(queue);
            assert_eq!(status, Status::SUCCESS);
            cid
        })
        .collect();
    assert!(answered.into_iter().eq(0..commands), "each is answered, once");
}

/// How often the socket was left alone, of a host whose bursts are so large, one after the other and again.
fn gathers(keys: &str, bursts: &[u16]) -> u64 {
    let target = TestTarget::start(&format!("{keys}\n{}", memory_config()));
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 128, Digests::NONE);
    for _ in 0..20 {
        for &commands in bursts {
            burst(&mut queue, commands);
            // A core that finds the next one at once has nobody to wait for.
            thread::sleep(Duration::from_millis(1));
        }
    }
    tcp_stats(&target).gathers
}

#[test]
fn a_host_that_had_twice_as_many_in_flight_is_given_time() {
    // The kernel may cut a burst in two, and then it is none: not each time.
    assert!(gathers("poll = \"always\"", &[48, 16]) > 0);
    assert!(gathers("gather_us = 150", &[48, 16]) > 0, "also where cores sleep");
}

#[test]
fn no_other_host_is_and_nobody_where_it_is_switched_off() {
    assert_eq!(gathers("poll = \"always\"\ngather_us = 0", &[48, 16]), 0);
    assert_eq!(gathers("poll = \"always\"", &[7, 1, 3]), 0, "few at a time");
}

/// What a burst of reads, with a flush and a write among them, is answered with: in each place the CID, and whether it is data.
/// Each read has its data once and then its response, each other command its response, and SQHD never goes back.
fn answers_to_reads(queue: &mut RawConnection, digests: Digests, reads: u16) -> Vec<(u16, bool)> {
    answers_to_reads_from(queue, digests, 0, reads)
}

/// The same, with CIDs from this one on.
fn answers_to_reads_from(
    queue: &mut RawConnection,
    digests: Digests,
    first: u16,
    reads: u16,
) -> Vec<(u16, bool)> {
    let mut bytes = Vec::new();
    let end = first + reads;
    for cid in first..end {
        bytes.extend(capsule(digests, &transfer(NvmOpcode::READ, WRITABLE, cid, u64::from(cid), 1), &[]));
        if cid == first + reads / 3 {
            bytes.extend(capsule(digests, &flush(WRITABLE, end), &[]));
            let write = write_in_capsule(WRITABLE, end + 1, 4096, 4096);
            bytes.extend(capsule(digests, &write, &[0xA5; 4096]));
        }
    }
    queue.send(&bytes).expect("sent");
    let (mut answers, mut head) = (Vec::new(), None);
    let mut data: BTreeSet<u16> = BTreeSet::new();
    let mut answered: BTreeSet<u16> = BTreeSet::new();
    while answered.len() < usize::from(reads) + 2 {
        let pdu = pdu_of(queue);
        match pdu.header {
            PduHeader::C2hData(header) => {
                assert!(pdu.data.len() == 4096 && pdu.data_digest_good);
                assert!(
                    (first..end).contains(&header.cccid) && data.insert(header.cccid),
                    "data twice, or of no read"
                );
                answers.push((header.cccid, true));
            }
            PduHeader::CapsuleResp(cqe) => {
                let (cid, status, _) = completion_in(&pdu).expect("a response");
                assert_eq!(status, Status::SUCCESS);
                assert!(answered.insert(cid), "{cid} is answered twice");
                assert!(cid >= end || data.contains(&cid), "{cid} is answered before its data is there");
                let new = u16::from_le_bytes([cqe[8], cqe[9]]);
                let before = head.replace(new).unwrap_or(new);
                assert!((new + ENTRIES - before) % ENTRIES < ENTRIES / 2, "SQHD goes back: {before}, {new}");
                answers.push((cid, false));
            }
            other => panic!("{other:?}"),
        }
    }
    answers
}

/// What a target whose host has so many reads in flight says to garbage behind them: whole PDUs, the data of each read before its
/// response, and a TermReq.
#[test]
fn garbage_behind_many_reads_cuts_no_answer_and_leaves_none_behind_the_end() {
    let target = TestTarget::start(&memory_config());
    let host = RudeHost::connect(target.address());
    for qid in 1..=8 {
        let mut queue = host.queue(qid, ENTRIES, Digests::NONE);
        answers_to_reads(&mut queue, Digests::NONE, 48);
        let mut bytes: Vec<u8> = (0..48)
            .flat_map(|cid| capsule(Digests::NONE, &transfer(NvmOpcode::READ, WRITABLE, cid, 0, 1), &[]))
            .collect();
        bytes.extend([0xFF; 128]);
        queue.send(&bytes).expect("sent");
        let mut data = BTreeSet::new();
        loop {
            let pdu = pdu_of(&mut queue);
            match pdu.header {
                PduHeader::C2hData(header) => assert!(pdu.data.len() == 4096 && data.insert(header.cccid)),
                PduHeader::CapsuleResp(_) => {
                    let (cid, status, _) = completion_in(&pdu).expect("a response");
                    assert_eq!(status, Status::SUCCESS);
                    assert!(data.contains(&cid), "{cid} is answered before its data is there");
                }
                PduHeader::TermReq(_) => break,
                other => panic!("{other:?}"),
            }
        }
        expect_closed(&mut queue);
    }
    expect_service(&target);
}

/// The most data that came in a row before a response.
fn most_in_a_row(answers: &[(u16, bool)]) -> usize {
    answers.split(|(_, is_data)| !is_data).map(<[_]>::len).max().unwrap_or(0)
}

#[test]
fn responses_of_many_reads_follow_the_data_of_several_and_no_more_than_half() {
    let both = Digests { header: true, data: true };
    for (keys, digests) in [("", Digests::NONE), ("gather_us = 0", Digests::NONE), ("gather_us = 0", both)] {
        let target = TestTarget::start(&format!("poll = \"always\"\n{keys}\n{}", memory_config()));
        let host = RudeHost::connect(target.address());
        let mut queue = host.queue(1, ENTRIES, digests);
        let mut in_a_row = || most_in_a_row(&answers_to_reads(&mut queue, digests, 48));
        assert_eq!(in_a_row(), 1, "nothing is known of the host");
        let bursts: Vec<usize> = (0..20).map(|_| in_a_row()).collect();
        assert!(bursts.iter().any(|data| *data >= 8), "{bursts:?}");
        // The kernel may cut a burst in two: then there is less in a row, not more. Where it is tried, also all, until it is known what
        // the host has outstanding: after 512 commands.
        let tried = if keys.is_empty() { 11 } else { 0 };
        assert!(bursts.iter().skip(tried).all(|data| *data <= 25), "{bursts:?}");
        let mut queue = host.queue(2, ENTRIES, digests);
        let few = answers_to_reads(&mut queue, digests, 5);
        assert_eq!(most_in_a_row(&few), 1, "few are answered one by one");
    }
}

#[test]
fn half_of_what_a_host_has_outstanding_is_answered_together_though_less_comes_together() {
    let target = TestTarget::start(&format!("poll = \"always\"\ngather_us = 0\n{}", memory_config()));
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, ENTRIES, Digests::NONE);
    // 56 CIDs, of which 14 come at a time.
    let parts: Vec<usize> = [0, 14, 28, 42]
        .into_iter()
        .cycle()
        .take(60)
        .map(|first| most_in_a_row(&answers_to_reads_from(&mut queue, Digests::NONE, first, 12)))
        .collect();
    let (unknown, known) = parts.split_at(512 / 14);
    assert!(unknown.iter().all(|data| *data <= 7), "half of what comes together: {parts:?}");
    assert!(known.contains(&12), "all of that, for it is less than half of what is outstanding: {parts:?}");
}
