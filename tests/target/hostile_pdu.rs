//! PDUs that break the protocol: each is answered as the specification says, counted, and ends only its own connection.

use std::time::Duration;

use fastice::initiator::raw::RawConnection;
use fastice::tcp::pdu::{self, DataPdu, Digests, FatalErrorStatus as Fes, HEADER_MAX, IcReq};
use nvme_spec::{NvmOpcode, Status};

use crate::rude::{
    HOST, HOST_ID, RudeHost, WRITABLE, answer_to, capsule, completion_of, connect_data, expect_closed,
    expect_no_leak, expect_service, expect_status, expect_term, flush, h2c_data, introduced, r2t_of, read,
    rude_target, tcp_stats, transfer, try_connect, write_in_capsule,
};
use crate::support::{NQN, eventually};

const HEADER: Digests = Digests { header: true, data: false };
const DATA: Digests = Digests { header: false, data: true };
const BOTH: Digests = Digests { header: true, data: true };

/// A header of any type, with zeros behind.
fn raw_pdu(pdu_type: u8, flags: u8, hlen: u8, pdo: u8, plen: u32) -> Vec<u8> {
    let mut bytes = vec![pdu_type, flags, hlen, pdo];
    bytes.extend_from_slice(&plen.to_le_bytes());
    bytes.resize(usize::from(hlen).max(24), 0);
    bytes
}

fn ic_req(change: impl FnOnce(&mut [u8; HEADER_MAX])) -> Vec<u8> {
    let mut bytes = [0; HEADER_MAX];
    let len = pdu::ic_req(&mut bytes, &IcReq { hpda: 0, digests: Digests::NONE, maxr2t_z: 0 });
    change(&mut bytes);
    bytes[..len].to_vec()
}

#[test]
fn what_may_not_come_first_ends_the_connection() {
    let target = rude_target();
    let sqe = flush(WRITABLE, 1);
    let cases: Vec<(&str, Vec<u8>, Fes, u32)> = vec![
        ("a capsule", capsule(Digests::NONE, &sqe, &[]), Fes::PDU_SEQUENCE_ERROR, 0),
        ("H2CData", raw_pdu(6, 4, 24, 24, 28), Fes::PDU_SEQUENCE_ERROR, 0),
        ("a version", ic_req(|bytes| bytes[8] = 1), Fes::UNSUPPORTED_PARAMETER, 8),
        ("an alignment", ic_req(|bytes| bytes[10] = 32), Fes::INVALID_PDU_HEADER_FIELD, 10),
        ("a digest", ic_req(|bytes| bytes[11] = 4), Fes::INVALID_PDU_HEADER_FIELD, 11),
        ("HLEN", ic_req(|bytes| bytes[2] = 127), Fes::INVALID_PDU_HEADER_FIELD, 2),
        ("PLEN", ic_req(|bytes| bytes[4] = 127), Fes::INVALID_PDU_HEADER_FIELD, 4),
        ("FLAGS", ic_req(|bytes| bytes[1] = 1), Fes::INVALID_PDU_HEADER_FIELD, 1),
        ("a type", raw_pdu(0x0A, 0, 24, 0, 24), Fes::INVALID_PDU_HEADER_FIELD, 0),
        ("all ones", vec![0xFF; 128], Fes::INVALID_PDU_HEADER_FIELD, 0),
    ];
    check_terms(&target, &cases, |address| RawConnection::connect(address).expect("a connection"));
    expect_no_leak(&target);
}

#[test]
fn what_may_not_come_later_ends_the_connection() {
    let target = rude_target();
    let invalid = Fes::INVALID_PDU_HEADER_FIELD;
    let mut cases: Vec<(&str, Vec<u8>, Fes, u32)> = vec![
        ("ICReq again", ic_req(|_| ()), Fes::PDU_SEQUENCE_ERROR, 0),
        ("HLEN", raw_pdu(4, 0, 64, 0, 72), invalid, 2),
        ("HLEN 0", raw_pdu(4, 0, 0, 0, 72), invalid, 2),
        ("PLEN below the header", raw_pdu(4, 0, 72, 72, 71), invalid, 4),
        ("PLEN huge", raw_pdu(4, 0, 72, 72, u32::MAX), invalid, 4),
        ("PLEN 0", raw_pdu(4, 0, 72, 72, 0), invalid, 4),
        ("more in the capsule than fits", raw_pdu(4, 0, 72, 72, 72 + 8193), invalid, 4),
        ("a digest that was not agreed on", raw_pdu(4, 1, 72, 0, 76), invalid, 1),
        ("a data digest that was not agreed on", raw_pdu(4, 2, 72, 72, 80), invalid, 1),
        ("a reserved flag", raw_pdu(4, 0x80, 72, 0, 72), invalid, 1),
        ("SUCCESS from a host", raw_pdu(6, 12, 24, 24, 28), invalid, 1),
        ("PDO in the header", raw_pdu(4, 0, 72, 68, 80), invalid, 3),
        ("PDO not aligned", raw_pdu(4, 0, 72, 73, 80), invalid, 3),
        ("H2CData without data", raw_pdu(6, 4, 24, 24, 24), invalid, 4),
        ("H2CData beyond MAXH2CDATA", raw_pdu(6, 4, 24, 24, 24 + (1 << 20) + 4), Fes::LIMIT_EXCEEDED, 0),
        ("a type", raw_pdu(0x0B, 0, 24, 0, 24), invalid, 0),
    ];
    for pdu_type in [1, 3, 5, 7, 9] {
        cases.push(("a PDU for hosts", raw_pdu(pdu_type, 0, 24, 0, 24), invalid, 0));
    }
    let mut datal = raw_pdu(6, 4, 24, 24, 28);
    datal[16] = 8;
    cases.push(("DATAL against PLEN", datal, invalid, 16));
    let mut unaligned = raw_pdu(6, 4, 24, 24, 28);
    (unaligned[12], unaligned[16]) = (2, 4);
    cases.push(("DATAO not aligned", unaligned, invalid, 12));
    let mut overflow = raw_pdu(6, 4, 24, 24, 32);
    overflow[12..16].copy_from_slice(&0xFFFF_FFFCu32.to_le_bytes());
    overflow[16] = 8;
    cases.push(("DATAO beyond 32 bits", overflow, Fes::DATA_TRANSFER_OUT_OF_RANGE, 0xFFFF_FFFC));
    let mut stray = raw_pdu(6, 4, 24, 24, 28);
    stray[16] = 4;
    cases.push(("H2CData that nobody asked for", stray, invalid, 10));
    check_terms(&target, &cases, |address| introduced(address, Digests::NONE));
    expect_no_leak(&target);
}

/// Each case on a connection of its own: the TermReq, the end, the counters.
fn check_terms(
    target: &crate::support::TestTarget,
    cases: &[(&str, Vec<u8>, Fes, u32)],
    connect: impl Fn(std::net::SocketAddr) -> RawConnection,
) {
    for (what, bytes, fes, fei) in cases {
        let before = tcp_stats(target);
        let mut raw = connect(target.address());
        // What follows the offence must not keep the TermReq from arriving.
        let mut bytes = bytes.clone();
        bytes.resize(bytes.len() + 40_000, 0xEE);
        raw.send(&bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
        println!("{what}");
        expect_term(&mut raw, *fes, *fei);
        let after = tcp_stats(target);
        assert_eq!(after.protocol_errors, before.protocol_errors + 1, "{what}");
        assert_eq!(after.term_reqs_sent, before.term_reqs_sent + 1, "{what}");
    }
    expect_service(target);
}

#[test]
fn a_wrong_header_digest_ends_the_connection() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, HEADER);
    expect_status(&mut queue, &flush(WRITABLE, 1), &[], Status::SUCCESS);
    let mut bytes = capsule(HEADER, &flush(WRITABLE, 2), &[]);
    bytes[75] ^= 0x10;
    let received = u32::from_le_bytes([bytes[72], bytes[73], bytes[74], bytes[75]]);
    queue.send(&bytes).expect("sent");
    expect_term(&mut queue, Fes::HEADER_DIGEST_ERROR, received);
    assert_eq!(tcp_stats(&target).header_digest_errors, 1);
    drop((queue, host));
    expect_no_leak(&target);
}

#[test]
fn a_wrong_data_digest_fails_its_command_only_and_writes_nothing() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    for (round, digests) in [DATA, BOTH].into_iter().enumerate() {
        let mut queue = host.queue(1 + round as u16, 16, digests);
        let good = vec![0x11; 8192];
        expect_status(&mut queue, &write_in_capsule(WRITABLE, 1, 40, 8192), &good, Status::SUCCESS);
        let mut bytes = capsule(digests, &write_in_capsule(WRITABLE, 2, 40, 8192), &[0x22; 8192]);
        *bytes.last_mut().expect("a digest") ^= 1;
        queue.send(&bytes).expect("sent");
        let (cid, status, _) = completion_of(&mut queue);
        assert_eq!((cid, status), (2, Status::TRANSIENT_TRANSPORT_ERROR));
        queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, 3, 40, 8), &[]).expect("sent");
        let r2t = r2t_of(&mut queue);
        // Two PDUs, the first of them spoilt: the whole command fails, at its end.
        let half = DataPdu { data_len: 16384, last: false, ..answer_to(&r2t) };
        let rest = DataPdu { data_offset: 16384, last: true, ..half };
        let mut bytes = h2c_data(digests, &half, &[0x33; 16384]);
        let at = bytes.len() - 100;
        bytes[at] ^= 0x80;
        bytes.extend_from_slice(&h2c_data(digests, &rest, &[0x33; 16384]));
        queue.send(&bytes).expect("sent");
        let (cid, status, _) = completion_of(&mut queue);
        assert_eq!((cid, status), (3, Status::TRANSIENT_TRANSPORT_ERROR));
        assert!(read(&mut queue, WRITABLE, 40, 2) == good, "spoilt data was written");
    }
    assert_eq!(tcp_stats(&target).data_digest_errors, 4);
    assert_eq!(tcp_stats(&target).protocol_errors, 0);
    drop(host);
    expect_no_leak(&target);
}

#[test]
fn data_that_does_not_fit_its_r2t_ends_the_connection() {
    let target = rude_target();
    let invalid = Fes::INVALID_PDU_HEADER_FIELD;
    let range = Fes::DATA_TRANSFER_OUT_OF_RANGE;
    type Change = fn(&mut DataPdu);
    let cases: [(&str, Change, Fes, u32); 8] = [
        ("another TTAG", |data| data.ttag = data.ttag.wrapping_add(1), invalid, 10),
        ("a TTAG of nobody", |data| data.ttag = 0xFFFF, invalid, 10),
        ("another CID", |data| data.cccid ^= 0x100, invalid, 8),
        ("the wrong start", |data| (data.data_offset, data.data_len) = (4096, 4096), range, 4096),
        ("beyond the end", |data| data.data_len = 16384 + 4, range, 0),
        ("LAST too early", |data| data.data_len = 4096, invalid, 1),
        ("no LAST at the end", |data| data.last = false, invalid, 1),
        ("a start beyond the end", |data| data.data_offset = 0x8000_0000, range, 0x8000_0000),
    ];
    for (what, change, fes, fei) in cases {
        println!("{what}");
        let host = RudeHost::connect(target.address());
        let mut queue = host.queue(1, 16, Digests::NONE);
        queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, 9, 0, 4), &[]).expect("sent");
        let mut data = answer_to(&r2t_of(&mut queue));
        change(&mut data);
        let bytes = h2c_data(Digests::NONE, &data, &vec![0x44; data.data_len as usize]);
        queue.send(&bytes).expect("sent");
        expect_term(&mut queue, fes, fei);
    }
    // The same data twice.
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, Digests::NONE);
    queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, 9, 0, 1), &[]).expect("sent");
    let bytes = h2c_data(Digests::NONE, &answer_to(&r2t_of(&mut queue)), &[0; 4096]);
    queue.send(&[bytes.clone(), bytes].concat()).expect("sent");
    let first = completion_or_term(&mut queue);
    assert!(first, "data that came twice was taken");
    drop((queue, host));
    expect_no_leak(&target);
}

/// Reads until the TermReq for a TTAG that is not asked for any more; a completion may come before.
fn completion_or_term(queue: &mut RawConnection) -> bool {
    use fastice::tcp::pdu::{PduHeader, TermReq};
    loop {
        match crate::rude::pdu_of(queue).header {
            PduHeader::CapsuleResp(_) => {}
            PduHeader::TermReq(TermReq { fes, fei }) => {
                return (fes, fei) == (Fes::INVALID_PDU_HEADER_FIELD, 10);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_guessed_ttag_is_no_answer_to_an_r2t() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    // In-capsule data has no TTAG, a command without data has none, a free place has none.
    for ttag in 0..4 {
        let mut queue = host.queue(1, 4, Digests::NONE);
        let data = DataPdu { cccid: 1, ttag, data_offset: 0, data_len: 4096, last: true, success: false };
        queue.send(&capsule(Digests::NONE, &flush(WRITABLE, 1), &[])).expect("sent");
        queue.send(&h2c_data(Digests::NONE, &data, &[0; 4096])).expect("sent");
        assert!(completion_or_term(&mut queue));
        drop(queue);
        eventually("the queue is free again", || tcp_stats(&target).connections_ended > u64::from(ttag));
    }
    drop(host);
    expect_no_leak(&target);
}

#[test]
fn a_host_that_terminates_is_let_go() {
    let target = rude_target();
    for (round, host_ends) in
        [RudeHost::connect(target.address()), RudeHost::connect(target.address())].into_iter().enumerate()
    {
        let mut queue = host_ends.queue(1, 16, Digests::NONE);
        let mut out = [0; pdu::TERM_REQ_MAX];
        let term = pdu::TermReq { fes: Fes::PDU_SEQUENCE_ERROR, fei: 0 };
        let len = pdu::h2c_term_req(&mut out, term, &[1, 2, 3]);
        if round == 1 {
            // A malformed one ends the connection too, and is not answered.
            out[4] = 200;
        }
        queue.send(&out[..len]).expect("sent");
        expect_closed(&mut queue);
    }
    let stats = tcp_stats(&target);
    assert_eq!((stats.term_reqs_received, stats.protocol_errors, stats.term_reqs_sent), (1, 1, 0));
    expect_no_leak(&target);
}

#[test]
fn pdus_may_come_in_any_pieces() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    for digests in [Digests::NONE, BOTH] {
        let mut queue = introduced(target.address(), digests);
        let connect = connect_data(host.cntlid, NQN, HOST, HOST_ID);
        assert_eq!(try_connect(&mut queue, 1, 128, &connect).0, Status::SUCCESS);
        // A byte at a time.
        let data: Vec<u8> = (0..4096u32).map(|at| (at * 31) as u8).collect();
        let bytes = capsule(digests, &write_in_capsule(WRITABLE, 5, 3, 4096), &data);
        queue.send_slowly(&bytes, 1, Duration::ZERO).expect("sent");
        assert_eq!(completion_of(&mut queue).1, Status::SUCCESS);
        assert!(read(&mut queue, WRITABLE, 3, 1) == data);
        // Data of an R2T in many PDUs, cut at odd places.
        queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, 6, 4, 8), &[]).expect("sent");
        let r2t = r2t_of(&mut queue);
        let whole: Vec<u8> = (0..8 * 4096u32).map(|at| (at / 3) as u8).collect();
        let mut bytes = Vec::new();
        for (index, piece) in whole.chunks(1000).enumerate() {
            let offset = 1000 * index as u32;
            let last = offset as usize + piece.len() == whole.len();
            let data_len = piece.len() as u32;
            let header = DataPdu { data_offset: offset, data_len, last, ..answer_to(&r2t) };
            bytes.extend_from_slice(&h2c_data(digests, &header, piece));
        }
        queue.send_slowly(&bytes, 333, Duration::ZERO).expect("sent");
        assert_eq!(completion_of(&mut queue).1, Status::SUCCESS);
        assert!(read(&mut queue, WRITABLE, 4, 8) == whole);
        // A whole queue in one segment.
        let many: Vec<u8> = (0..127).flat_map(|cid| capsule(digests, &flush(WRITABLE, cid), &[])).collect();
        queue.send(&many).expect("sent");
        let mut cids: Vec<u16> = (0..127).map(|_| completion_of(&mut queue).0).collect();
        cids.sort_unstable();
        assert!(cids.into_iter().eq(0..127));
        drop(queue);
        eventually("the queue is free again", || {
            let stats = tcp_stats(&target);
            stats.connections == stats.connections_ended + 1
        });
    }
    drop(host);
    expect_no_leak(&target);
}

#[test]
fn half_a_pdu_is_no_pdu() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let old = vec![0x77; 16384];
    let mut queue = host.queue(1, 16, Digests::NONE);
    expect_status(&mut queue, &write_in_capsule(WRITABLE, 1, 8, 16384), &old, Status::SUCCESS);
    let bytes = capsule(Digests::NONE, &write_in_capsule(WRITABLE, 2, 8, 16384), &[0x88; 16384]);
    let mut cuts = vec![1, 7, 8, 71, 72, 73, 5000, bytes.len() - 1];
    for (qid, cut) in (2..).zip(cuts.drain(..)) {
        let mut torn = host.queue(qid, 16, Digests::NONE);
        torn.send(&bytes[..cut]).expect("sent");
        if qid % 2 == 0 {
            torn.half_close().expect("half closed");
            expect_closed(&mut torn);
        }
    }
    eventually("all are gone", || {
        let stats = tcp_stats(&target);
        stats.connections == stats.connections_ended + 2
    });
    assert!(read(&mut queue, WRITABLE, 8, 4) == old, "half a write was carried out");
    drop((queue, host));
    expect_no_leak(&target);
}
