//! Over sockets, as hosts do it.

use std::io::{Read as _, Write as _};
use std::thread::JoinHandle;
use std::time::Duration;

use fastice::initiator::command;
use fastice::initiator::raw::{RawConnection, RawEvent, RawPdu};
use fastice::tcp::digest::Digest;
use fastice::tcp::pdu::{self, Digests, HEADER_MAX, IcReq, PduHeader, PduType};
use nvme_spec::fabrics::{ConnectData, cattr};
use nvme_spec::{Nsid, NvmOpcode, Qid, SglDescriptor, SubmissionQueueEntry};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};

use super::joining::IC_LEN;
use super::*;

/// A responder, with nobody behind it, and what becomes of it.
fn responder(sleeps: bool) -> (SocketAddr, JoinHandle<Result<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    (address, thread::spawn(move || answer(&listener, admin, Together::One, sleeps)))
}

/// An I/O queue at it with such digests, as one of a host without flow control or with it.
fn queue_with(address: SocketAddr, digests: Digests, cattr: u8) -> RawConnection {
    let mut queue = RawConnection::connect(address).unwrap();
    assert_eq!(queue.initialize(digests).unwrap().digests, digests);
    let connect = command::connect(Qid(1), 32, cattr, 0);
    let data = ConnectData { cntlid: 7.into(), ..ConnectData::new_zeroed() };
    send(&mut queue, connect, data.as_bytes());
    match read(&mut queue).header {
        PduHeader::CapsuleResp(cqe) => assert_eq!(cqe[..2], 7_u16.to_le_bytes(), "the controller's number"),
        other => panic!("{other:?}"),
    }
    queue
}

fn queue(address: SocketAddr) -> RawConnection {
    queue_with(address, Digests::NONE, cattr::DISABLE_SQ_FLOW_CONTROL)
}

fn send(queue: &mut RawConnection, sqe: SubmissionQueueEntry, data: &[u8]) {
    let bytes = <[u8; 64]>::read_from_bytes(sqe.as_bytes()).unwrap();
    queue.send_capsule(&bytes, data).unwrap();
}

fn read(queue: &mut RawConnection) -> RawPdu {
    match queue.read_pdu(Duration::from_secs(10)).unwrap() {
        RawEvent::Pdu(pdu) => pdu,
        other => panic!("{other:?}"),
    }
}

fn read_command(cid: u16, len: u32) -> SubmissionQueueEntry {
    let sqe = command::command(NvmOpcode::READ.0, Nsid(1));
    SubmissionQueueEntry { cid: cid.into(), dptr: SglDescriptor::transport(len), ..sqe }
}

/// The data of a read comes, and fits.
fn data_of(queue: &mut RawConnection, cid: u16, len: usize) {
    let digests = queue.digests();
    let pdu = read(queue);
    let PduHeader::C2hData(told) = pdu.header else { panic!("{pdu:?}") };
    assert_eq!((told.cccid, pdu.data.len(), told.last), (cid, len, true), "{digests:?}");
    assert!(pdu.data_digest_good && pdu.plan.ddgst == digests.data, "{digests:?}");
}

/// It answers a read.
fn is_served(queue: &mut RawConnection, cid: u16) {
    send(queue, read_command(cid, 4096), &[]);
    data_of(queue, cid, 4096);
}

#[test]
fn a_host_that_asks_for_digests_gets_them_and_they_fit() {
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        let digests = Digests { header, data };
        let mut queue = queue_with(responder(true).0, digests, cattr::DISABLE_SQ_FLOW_CONTROL);
        // Of two lengths at once.
        let reads = [(1, 4096), (2, 512), (3, 4096)];
        reads.iter().for_each(|(cid, len)| send(&mut queue, read_command(*cid, *len), &[]));
        reads.iter().for_each(|(cid, len)| data_of(&mut queue, *cid, *len as usize));
        let sqe = command::command(NvmOpcode::WRITE.0, Nsid(1));
        let dptr = SglDescriptor::transport(4096);
        send(&mut queue, SubmissionQueueEntry { cid: 9.into(), dptr, ..sqe }, &[]);
        let PduHeader::R2t(r2t) = read(&mut queue).header else { panic!("no R2T") };
        assert_eq!((r2t.cccid, r2t.len), (9, 4096));
        let told =
            pdu::DataPdu { cccid: 9, ttag: r2t.ttag, data_len: 4096, last: true, ..Default::default() };
        let mut h2c_data = [0; HEADER_MAX];
        let len = pdu::h2c_data(&mut h2c_data, digests, 0, &told);
        let trailer: &[u8] = if data { &[0; Digest::LEN] } else { &[] };
        queue.send(&[&h2c_data[..len], &[3; 4096], trailer].concat()).unwrap();
        let PduHeader::CapsuleResp(cqe) = read(&mut queue).header else { panic!("no response") };
        assert_eq!(cqe[12..14], 9_u16.to_le_bytes());
    }
}

#[test]
fn several_queues_are_answered_at_once_each_as_it_has_agreed() {
    for sleeps in [false, true] {
        let (address, _) = responder(sleeps);
        let sealed = Digests { header: true, data: true };
        let mut queues = [
            queue_with(address, sealed, cattr::DISABLE_SQ_FLOW_CONTROL),
            queue(address),
            queue_with(address, Digests::NONE, 0),
            queue(address),
        ];
        for round in 0..20 {
            // All of them are asked before one is heard, and the last is heard first.
            for (number, queue) in (0..).zip(&mut queues) {
                [0, 1].iter().for_each(|more| send(queue, read_command(round + number + more, 512), &[]));
            }
            for (number, queue) in (0..4).zip(&mut queues).rev() {
                for more in [0, 1] {
                    data_of(queue, round + number + more, 512);
                    if number == 2 {
                        let PduHeader::CapsuleResp(cqe) = read(queue).header else { panic!("no response") };
                        assert_eq!(cqe[12..14], (round + number + more).to_le_bytes());
                    }
                }
            }
        }
    }
}

#[test]
fn more_queues_than_one_look_finds_are_all_answered() {
    let (address, _) = responder(false);
    let mut queues: Vec<_> = (0..300).map(|_| queue(address)).collect();
    (0..).zip(&mut queues).for_each(|(cid, queue)| send(queue, read_command(cid, 512), &[]));
    (0..).zip(&mut queues).for_each(|(cid, queue)| data_of(queue, cid, 512));
}

#[test]
fn queues_that_end_are_dropped_and_others_go_on() {
    for sleeps in [false, true] {
        let (address, answers) = responder(sleeps);
        let mut queues: Vec<_> = (0..5).map(|_| queue(address)).collect();
        queues.iter_mut().for_each(|queue| is_served(queue, 1));
        // Two at once, of which one has not read its answer: that is a reset.
        send(&mut queues[1], read_command(2, 4096), &[]);
        queues.remove(3);
        queues.remove(1);
        (2..30).for_each(|cid| queues.iter_mut().for_each(|queue| is_served(queue, cid)));
        // Down to one, then none, and up again.
        queues.truncate(1);
        (30..40).for_each(|cid| is_served(&mut queues[0], cid));
        queues.push(queue(address));
        (40..50).for_each(|cid| queues.iter_mut().for_each(|queue| is_served(queue, cid)));
        queues.clear();
        is_served(&mut queue(address), 1);
        assert!(!answers.is_finished());
    }
}

#[test]
fn half_a_capsule_holds_up_nobody_else_and_is_answered_when_it_is_whole() {
    for sleeps in [false, true] {
        let (address, _) = responder(sleeps);
        let mut queues: Vec<_> = (0..3).map(|_| queue(address)).collect();
        let mut capsule = [0; HEADER_MAX];
        let sqe = <[u8; 64]>::read_from_bytes(read_command(77, 4096).as_bytes()).unwrap();
        let len = pdu::capsule_cmd(&mut capsule, Digests::NONE, 0, &sqe, 0);
        let (first, rest) = capsule[..len].split_at(len / 2);
        let mut stalled = queues.remove(1);
        // One that is whole before it.
        stalled.send(&[&capsule[..len], first].concat()).unwrap();
        data_of(&mut stalled, 77, 4096);
        (1..30).for_each(|cid| queues.iter_mut().for_each(|queue| is_served(queue, cid)));
        let early = stalled.read_pdu(Duration::from_millis(20)).unwrap();
        assert!(matches!(early, RawEvent::Silence), "{early:?}");
        stalled.send(rest).unwrap();
        data_of(&mut stalled, 77, 4096);
    }
}

#[test]
fn a_host_that_takes_its_time_to_join_keeps_nobody_waiting() {
    let (address, _) = responder(false);
    let mut first = queue(address);
    let mut late = TcpStream::connect(address).unwrap();
    let mut header = [0; HEADER_MAX];
    let len = pdu::ic_req(&mut header, &IcReq::default());
    late.write_all(&header[..10]).unwrap();
    let mut second = queue(address);
    for cid in 1..10 {
        is_served(&mut first, cid);
        is_served(&mut second, cid);
    }
    late.write_all(&header[10..len]).unwrap();
    let mut ic_resp = [0; IC_LEN];
    late.read_exact(&mut ic_resp).unwrap();
    assert_eq!(PduType(ic_resp[0]), PduType::IC_RESP);
}

#[test]
fn a_host_that_leaves_while_it_joins_is_no_end_for_others() {
    let (address, answers) = responder(false);
    let mut early = TcpStream::connect(address).unwrap();
    early.write_all(&[0; 10]).unwrap();
    drop(early);
    is_served(&mut queue(address), 1);
    assert!(!answers.is_finished());
}

#[test]
fn what_no_host_says_ends_it_with_the_reason() {
    for sleeps in [false, true] {
        let (address, answers) = responder(sleeps);
        let mut queues = [queue(address), queue(address)];
        is_served(&mut queues[0], 1);
        queues[1].send(&[0xFF; 128]).unwrap();
        let why = answers.join().unwrap().unwrap_err();
        assert!(why.to_string().contains("a PDU that no host sends"), "{why:#}");
    }
}
