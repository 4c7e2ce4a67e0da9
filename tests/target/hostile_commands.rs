//! Commands that are wrong in well-formed PDUs: each gets its status, and the connection goes on.

use fastice::initiator::command::{self, command};
use fastice::initiator::raw::RawConnection;
use fastice::tcp::pdu::{Digests, FatalErrorStatus as Fes, PduHeader};
use fastice::units::Lba;
use nvme_spec::register::Property;
use nvme_spec::{AdminOpcode, Nsid, NvmOpcode, Qid, SglDescriptor, Status, SubmissionQueueEntry};
use zerocopy::IntoBytes;

use crate::rude::{
    HOST, HOST_ID, READ_ONLY, RudeHost, WRITABLE, answer_to, capsule, completion_in, completion_of,
    connect_data, expect_closed, expect_no_leak, expect_service, expect_status, expect_term, flush, h2c_data,
    introduced, pdu_of, r2t_of, read, rude_target, tcp_stats, transfer, try_connect, with, write_in_capsule,
};
use crate::support::{NQN, TestTarget, eventually};

/// Blocks of each namespace.
const BLOCKS: u64 = (16 << 20) / 4096;

fn io(opcode: NvmOpcode, lba: u64, nlb_z: u16) -> SubmissionQueueEntry {
    command::io(opcode, WRITABLE, Lba(lba), nlb_z, false)
}

fn wrong_ranges() -> Vec<(&'static str, [u8; 64], Status)> {
    let data = |blocks: u32| SglDescriptor::transport(blocks * 4096);
    let (read, write, zeroes) = (NvmOpcode::READ, NvmOpcode::WRITE, NvmOpcode::WRITE_ZEROES);
    let out = Status::LBA_OUT_OF_RANGE;
    vec![
        ("read behind the end", with(&io(read, BLOCKS, 0), 1, data(1)), out),
        ("read across the end", with(&io(read, BLOCKS - 1, 1), 1, data(2)), out),
        ("read at the last number", with(&io(read, u64::MAX, 0), 1, data(1)), out),
        ("read that wraps", with(&io(read, u64::MAX - 1, 7), 1, data(8)), out),
        ("read at 2^52", with(&io(read, 1 << 52, 0), 1, data(1)), out),
        ("write behind the end", with(&io(write, BLOCKS, 0), 1, data(1)), out),
        ("write across the end", with(&io(write, BLOCKS - 1, 1), 1, data(2)), out),
        ("zeroes across the end", with(&io(zeroes, BLOCKS - 1, 1), 1, data(0)), out),
        ("more than MDTS", with(&io(read, 0, 256), 1, data(257)), Status::INVALID_FIELD),
    ]
}

fn wrong_descriptors() -> Vec<(&'static str, [u8; 64], Status)> {
    let (read, write) = (io(NvmOpcode::READ, 0, 0), io(NvmOpcode::WRITE, 0, 0));
    let sgl = |kind: u8, sub: u8| SglDescriptor::of(kind, sub, 0, 4096);
    let (length, kind) = (Status::DATA_SGL_LENGTH_INVALID, Status::SGL_TYPE_INVALID);
    let mut prp = with(&read, 1, SglDescriptor::transport(4096));
    prp[1] = 0;
    let mut fused = with(&read, 1, SglDescriptor::transport(4096));
    fused[1] |= 1;
    vec![
        ("read into less", with(&read, 1, SglDescriptor::transport(4092)), length),
        ("read into more", with(&read, 1, SglDescriptor::transport(8192)), length),
        ("read into nothing", with(&read, 1, SglDescriptor::transport(0)), length),
        ("read into 4 GiB", with(&read, 1, SglDescriptor::transport(u32::MAX)), length),
        ("read into the capsule", with(&read, 1, SglDescriptor::in_capsule(0, 4096)), kind),
        ("write of less", with(&write, 1, SglDescriptor::transport(512)), length),
        ("write from a capsule without data", with(&write, 1, SglDescriptor::in_capsule(0, 4096)), length),
        (
            "write from beyond",
            with(&write, 1, SglDescriptor::in_capsule(1 << 20, 4096)),
            Status::SGL_OFFSET_INVALID,
        ),
        (
            "write from 2^40",
            with(&write, 1, SglDescriptor::in_capsule(1 << 40, 4096)),
            Status::SGL_OFFSET_INVALID,
        ),
        ("write across the capsule", with(&write, 1, SglDescriptor::in_capsule(16000, 4096)), length),
        ("a keyed descriptor", with(&write, 1, sgl(4, 0)), kind),
        ("a segment", with(&write, 1, sgl(2, 0)), kind),
        ("an address", with(&read, 1, sgl(0, 0)), kind),
        ("all ones", with(&read, 1, sgl(15, 15)), kind),
        ("a PRP", prp, Status::INVALID_FIELD),
        ("a fused command", fused, Status::INVALID_FIELD),
    ]
}

fn wrong_commands() -> Vec<(&'static str, [u8; 64], Status)> {
    let none = SglDescriptor::transport(0);
    let data = SglDescriptor::transport(4096);
    let at = |nsid: u32| command::io(NvmOpcode::READ, Nsid(nsid), Lba(0), 0, false);
    let to = |opcode: NvmOpcode| command::io(opcode, READ_ONLY, Lba(0), 0, false);
    let missing = Status::INVALID_NAMESPACE;
    let protected = Status::NAMESPACE_WRITE_PROTECTED;
    let connect = command::connect(Qid(3), 16, 0, 0);
    vec![
        ("namespace 0", with(&at(0), 1, data), missing),
        ("namespace 3", with(&at(3), 1, data), missing),
        ("namespace FFFFFFFEh", with(&at(0xFFFF_FFFE), 1, data), missing),
        ("all namespaces", with(&at(u32::MAX), 1, data), missing),
        ("flush of a missing one", flush(Nsid(9), 1), missing),
        ("write to a read-only one", with(&to(NvmOpcode::WRITE), 1, data), protected),
        ("zeroes to a read-only one", with(&to(NvmOpcode::WRITE_ZEROES), 1, none), protected),
        ("an unknown opcode", with(&command(0x2C, WRITABLE), 1, none), Status::INVALID_OPCODE),
        ("a vendor's opcode", with(&command(0xC1, WRITABLE), 1, none), Status::INVALID_OPCODE),
        ("a bidirectional opcode", with(&command(0xFF, WRITABLE), 1, data), Status::INVALID_OPCODE),
        (
            "Connect again",
            with(&connect, 1, SglDescriptor::in_capsule(0, 1024)),
            Status::COMMAND_SEQUENCE_ERROR,
        ),
        (
            "a property on an I/O queue",
            with(&command::property_get(Property::CAP, true), 1, SglDescriptor::default()),
            Status::INVALID_FIELD,
        ),
    ]
}

#[test]
fn wrong_commands_get_their_status_and_the_queue_goes_on() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, Digests::NONE);
    let before = target.running.stats().0.command_errors;
    let cases = [wrong_ranges(), wrong_descriptors(), wrong_commands()].concat();
    for (what, sqe, status) in &cases {
        println!("{what}");
        expect_status(&mut queue, sqe, &[], *status);
    }
    // Some are found by the session, some by the transport.
    let (fabrics, tcp) = target.running.stats();
    assert_eq!(fabrics.command_errors + fabrics.transport_errors - before, cases.len() as u64);
    assert_eq!((tcp.protocol_errors, tcp.term_reqs_sent), (0, 0));
    // Data that comes with a command that fails, or that wants none, has to pass.
    expect_status(&mut queue, &flush(WRITABLE, 1), &[0xCC; 16384], Status::SUCCESS);
    expect_status(
        &mut queue,
        &write_in_capsule(READ_ONLY, 2, 0, 8192),
        &[0xCC; 8192],
        Status::NAMESPACE_WRITE_PROTECTED,
    );
    expect_status(
        &mut queue,
        &write_in_capsule(WRITABLE, 2, BLOCKS, 4096),
        &[0xCC; 12288],
        Status::LBA_OUT_OF_RANGE,
    );
    assert!(read(&mut queue, READ_ONLY, 0, 4).iter().all(|&byte| byte == 0));
    drop((queue, host));
    expect_no_leak(&target);
}

#[test]
fn reads_that_fail_send_no_data_and_others_only_their_own() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, Digests::NONE);
    // Secrets go through every buffer class that the reads below use.
    for blocks in [1u16, 4, 16, 64, 256] {
        let secret = vec![0x5E; usize::from(blocks) * 4096];
        queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, 1, 0, blocks), &[]).expect("sent");
        let r2t = r2t_of(&mut queue);
        queue.send(&h2c_data(Digests::NONE, &answer_to(&r2t), &secret)).expect("sent");
        assert_eq!(completion_of(&mut queue).1, Status::SUCCESS);
    }
    for (what, sqe, status) in [wrong_ranges(), wrong_descriptors(), wrong_commands()].concat() {
        if sqe[0] != NvmOpcode::READ.0 {
            continue;
        }
        queue.send_capsule(&sqe, &[]).expect("sent");
        // The first and only thing that comes is the completion.
        let pdu = pdu_of(&mut queue);
        assert_eq!(completion_in(&pdu).map(|done| done.1), Some(status), "{what}: {pdu:?}");
    }
    for blocks in [1u16, 3, 4, 5, 16, 17, 64, 255] {
        let data = read(&mut queue, WRITABLE, 1024, blocks);
        assert!(data.len() == usize::from(blocks) * 4096 && data.iter().all(|&byte| byte == 0));
    }
    // Answers of the admin queue that are shorter than what was asked for carry nothing else either.
    let mut host = host;
    for len in [4096u32, 8192, 65536] {
        let log =
            with(&command::get_log_page(1, Nsid(u32::MAX), 0, len, true), 5, SglDescriptor::transport(len));
        host.admin.send_capsule(&log, &[]).expect("sent");
        loop {
            let pdu = pdu_of(&mut host.admin);
            if completion_in(&pdu).is_some() {
                break;
            }
            assert!(
                !pdu.data.windows(16).any(|window| window == [0x5E; 16]),
                "stale bytes of another command"
            );
        }
    }
    drop((queue, host));
    expect_no_leak(&target);
}

#[test]
fn a_cid_in_use_is_a_conflict_and_harms_nobody() {
    let target = rude_target();
    let mut host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 16, Digests::NONE);
    queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, 7, 0, 1), &[]).expect("sent");
    let r2t = r2t_of(&mut queue);
    let mut head = 2;
    // The same CID for a read, for a write with its data, and for itself.
    for sqe in [
        transfer(NvmOpcode::READ, WRITABLE, 7, 0, 1),
        write_in_capsule(WRITABLE, 7, 1, 4096),
        transfer(NvmOpcode::WRITE, WRITABLE, 7, 0, 1),
    ] {
        queue.send_capsule(&sqe, &[0xBA; 4096]).expect("sent");
        let pdu = pdu_of(&mut queue);
        assert_eq!(completion_in(&pdu).map(|done| (done.0, done.1)), Some((7, Status::COMMAND_ID_CONFLICT)));
        // Connect took the first entry, the write the second; a refused command takes one too.
        head += 1;
        let PduHeader::CapsuleResp(cqe) = pdu.header else { panic!("{pdu:?}") };
        assert_eq!(u16::from_le_bytes([cqe[8], cqe[9]]), head, "SQHD");
    }
    queue.send(&h2c_data(Digests::NONE, &answer_to(&r2t), &[0x60; 4096])).expect("sent");
    let (cid, status, _) = completion_of(&mut queue);
    assert_eq!((cid, status), (7, Status::SUCCESS));
    assert!(read(&mut queue, WRITABLE, 0, 1) == [0x60; 4096]);
    assert!(read(&mut queue, WRITABLE, 1, 1) == [0; 4096]);
    // A parked Asynchronous Event Request keeps its CID.
    let event = with(&command(AdminOpcode::ASYNC_EVENT_REQUEST.0, Nsid(0)), 30, SglDescriptor::default());
    host.admin.send_capsule(&event, &[]).expect("sent");
    expect_status(&mut host.admin, &event, &[], Status::COMMAND_ID_CONFLICT);
    assert_eq!(tcp_stats(&target).duplicate_cids, 4);
    drop((queue, host));
    expect_no_leak(&target);
}

#[test]
fn a_register_may_have_the_cid_of_an_event_request_that_the_host_has_forgotten() {
    let target = rude_target();
    let mut host = RudeHost::connect(target.address());
    let event = with(&command(AdminOpcode::ASYNC_EVENT_REQUEST.0, Nsid(0)), 30, SglDescriptor::default());
    host.admin.send_capsule(&event, &[]).expect("sent");
    let cc = with(&command::property_get(Property::CC, false), 30, SglDescriptor::default());
    expect_status(&mut host.admin, &cc, &[], Status::SUCCESS);
    // It is parked again, and anything but a register is a conflict still.
    host.admin.send_capsule(&event, &[]).expect("sent");
    let identify = with(&command(AdminOpcode::IDENTIFY.0, Nsid(0)), 30, SglDescriptor::transport(4096));
    expect_status(&mut host.admin, &identify, &[], Status::COMMAND_ID_CONFLICT);
    expect_status(&mut host.admin, &cc, &[], Status::SUCCESS);
    assert_eq!(tcp_stats(&target).duplicate_cids, 1);
    // A reset ends it, and the next command may be here before that is told.
    host.admin.send_capsule(&event, &[]).expect("sent");
    let reset = with(&command::property_set(Property::CC, 0), 31, SglDescriptor::default());
    host.admin.send_capsule(&reset, &[]).expect("sent");
    host.admin.send_capsule(&cc, &[]).expect("sent");
    let (mut completed, mut cids) = (0, Vec::new());
    while !(cids.contains(&30) && cids.contains(&31)) {
        let (cid, status, _) = completion_of(&mut host.admin);
        assert!(
            status == Status::SUCCESS || (cid, status) == (30, Status::ABORTED_SQ_DELETION),
            "{cid} {status:?}"
        );
        completed += 1;
        if status == Status::SUCCESS {
            cids.push(cid);
        }
    }
    assert!(completed <= 3, "each at most once");
    drop(host);
    expect_no_leak(&target);
}

#[test]
fn more_commands_than_entries_end_the_queue() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    for (qid, entries) in [(1, 2u16), (2, 40), (3, 1024)] {
        let mut queue = host.queue(qid, entries, Digests::NONE);
        // Writes that wait for their data keep their entries.
        for cid in 0..entries {
            queue.send_capsule(&transfer(NvmOpcode::WRITE, WRITABLE, cid, 0, 1), &[]).expect("sent");
        }
        for _ in 0..entries.min(64) {
            assert!(matches!(pdu_of(&mut queue).header, PduHeader::R2t(_)));
        }
        queue.send_capsule(&flush(WRITABLE, entries), &[]).expect("sent");
        loop {
            let pdu = queue.read_pdu(crate::rude::PATIENCE).expect("good PDUs");
            match pdu {
                fastice::initiator::raw::RawEvent::Pdu(pdu) if matches!(pdu.header, PduHeader::R2t(_)) => {}
                fastice::initiator::raw::RawEvent::Pdu(pdu) => {
                    let PduHeader::TermReq(term) = pdu.header else { panic!("{pdu:?}") };
                    assert_eq!(term.fes, Fes::PDU_SEQUENCE_ERROR);
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        expect_closed(&mut queue);
    }
    drop(host);
    expect_no_leak(&target);
}

/// A Connect on a new connection: its status and DW0; the target closes after a refusal.
fn connecting(
    target: &TestTarget,
    qid: u16,
    entries: u16,
    data: &nvme_spec::fabrics::ConnectData,
) -> (Status, u32) {
    let mut raw = introduced(target.address(), Digests::NONE);
    let (status, dw0) = try_connect(&mut raw, qid, entries, data);
    if status != Status::SUCCESS {
        expect_closed(&mut raw);
    }
    (status, dw0)
}

#[test]
fn connects_that_are_wrong_are_refused_with_the_parameter() {
    let target = rude_target();
    let mut host = RudeHost::connect_disabled(target.address());
    let own = connect_data(host.cntlid, NQN, HOST, HOST_ID);
    let invalid = Status::CONNECT_INVALID_PARAMETERS;
    let early = connecting(&target, 1, 16, &own);
    assert_eq!(early.0, Status::COMMAND_SEQUENCE_ERROR, "an I/O queue before CC.EN");
    host.enable();
    let dynamic = connect_data(0xFFFF, NQN, HOST, HOST_ID);
    assert_eq!(connecting(&target, 0, 1, &dynamic), (invalid, 44), "a queue of one entry");
    assert_eq!(connecting(&target, 0, 1026, &dynamic), (invalid, 44), "a queue beyond CAP.MQES");
    assert_eq!(connecting(&target, 1, 1, &own), (invalid, 44), "an I/O queue of one entry");
    assert_eq!(connecting(&target, 1, u16::MAX, &own), (invalid, 44), "an I/O queue beyond CAP.MQES");
    assert_eq!(connecting(&target, 9999, 16, &own), (invalid, 42), "a queue beyond the number");
    let data = |offset: u32| (invalid, 1 << 16 | offset);
    let missing = connect_data(host.cntlid ^ 0x55, NQN, HOST, HOST_ID);
    assert_eq!(connecting(&target, 1, 16, &missing), data(16), "a controller that is not there");
    assert_eq!(connecting(&target, 0, 16, &own), data(16), "an admin queue of a chosen controller");
    let unknown = connect_data(0xFFFF, "nqn.2026-11.io.fastice:nowhere", HOST, HOST_ID);
    assert_eq!(connecting(&target, 0, 16, &unknown), data(256), "an unknown subsystem");
    let mut unnamed = dynamic;
    unnamed.hostnqn = [b'x'; 256];
    assert_eq!(connecting(&target, 0, 16, &unnamed), data(512), "a host without a name");
    let nameless = connect_data(0xFFFF, NQN, HOST, [0; 16]);
    assert_eq!(connecting(&target, 0, 16, &nameless), data(0), "a host without an identifier");
    let other = connect_data(host.cntlid, NQN, "nqn.2026-11.io.fastice:other", HOST_ID);
    assert_eq!(
        connecting(&target, 1, 16, &other).0,
        Status::CONNECT_INVALID_HOST,
        "another host's controller"
    );
    let other = connect_data(host.cntlid, NQN, HOST, [8; 16]);
    assert_eq!(connecting(&target, 1, 16, &other), data(0), "another host identifier");
    let queue = host.queue(1, 16, Digests::NONE);
    assert_eq!(connecting(&target, 1, 16, &own).0, Status::COMMAND_SEQUENCE_ERROR, "a queue that is there");
    let (stats, tcp) = target.running.stats();
    assert_eq!((stats.connects_rejected, stats.hosts_refused), (13, 1));
    assert_eq!(tcp.protocol_errors, 0);
    drop((queue, host));
    expect_no_leak(&target);
}

#[test]
fn nothing_but_connect_comes_first() {
    let target = rude_target();
    let identify = with(&command(AdminOpcode::IDENTIFY.0, Nsid(0)), 3, SglDescriptor::transport(4096));
    let long = with(&command::connect(Qid(0), 32, 0, 0), 3, SglDescriptor::in_capsule(0, 4096));
    let short = with(&command::connect(Qid(0), 32, 0, 0), 3, SglDescriptor::in_capsule(0, 1020));
    let cases = [
        (flush(WRITABLE, 3), Status::COMMAND_SEQUENCE_ERROR),
        (identify, Status::COMMAND_SEQUENCE_ERROR),
        (transfer(NvmOpcode::READ, WRITABLE, 3, 0, 1), Status::COMMAND_SEQUENCE_ERROR),
        (long, Status::DATA_SGL_LENGTH_INVALID),
        (short, Status::DATA_SGL_LENGTH_INVALID),
    ];
    for (sqe, status) in cases {
        let mut raw = introduced(target.address(), Digests::NONE);
        expect_status(&mut raw, &sqe, &[0x99; 4096], status);
        expect_closed(&mut raw);
    }
    // Connect by R2T works as well, and what comes behind it in the same segment is not lost.
    let mut raw = introduced(target.address(), Digests::NONE);
    let sqe = with(&command::connect(Qid(0), 32, 0, 0), 3, SglDescriptor::transport(1024));
    raw.send_capsule(&sqe, &[]).expect("sent");
    let r2t = r2t_of(&mut raw);
    let data = connect_data(0xFFFF, NQN, HOST, HOST_ID);
    let get = with(&command::property_get(Property::CSTS, false), 4, SglDescriptor::default());
    let both =
        [h2c_data(Digests::NONE, &answer_to(&r2t), data.as_bytes()), capsule(Digests::NONE, &get, &[])]
            .concat();
    raw.send(&both).expect("sent");
    assert_eq!(completion_of(&mut raw).1, Status::SUCCESS);
    assert_eq!(completion_of(&mut raw).0, 4);
    drop(raw);
    expect_no_leak(&target);
}

#[test]
fn an_admin_queue_takes_its_own_commands_only_and_only_when_enabled() {
    let target = rude_target();
    let mut host = RudeHost::connect_disabled(target.address());
    let identify = with(&command(AdminOpcode::IDENTIFY.0, Nsid(0)), 3, SglDescriptor::transport(4096));
    expect_status(&mut host.admin, &identify, &[], Status::COMMAND_SEQUENCE_ERROR);
    host.enable();
    for opcode in [0x03, 0x7E, 0xC0, 0xFF] {
        let sqe = with(&command(opcode, Nsid(0)), 9, SglDescriptor::transport(0));
        expect_status(&mut host.admin, &sqe, &[], Status::INVALID_OPCODE);
    }
    // Nothing of one queue's end is the other's: the admin queue breaks the protocol, the I/O queue goes with it.
    let mut queue = host.queue(1, 16, Digests::NONE);
    host.admin.send(&[0xFF; 24]).expect("sent");
    expect_term(&mut host.admin, Fes::INVALID_PDU_HEADER_FIELD, 0);
    expect_closed(&mut queue);
    expect_no_leak(&target);
}

#[test]
fn a_host_that_is_not_on_the_list_gets_nothing() {
    let target = TestTarget::start(&format!(
        r#"
        buffer_memory = "8MiB"
        [[listener]]
        address = "127.0.0.1:0"
        [[subsystem]]
        nqn = "{NQN}"
        hosts = ["{HOST}"]
        [[subsystem.namespace]]
        nsid = 1
        memory = "16MiB"
        "#
    ));
    let stranger = connect_data(0xFFFF, NQN, "nqn.2026-11.io.fastice:stranger", [9; 16]);
    assert_eq!(connecting(&target, 0, 32, &stranger).0, Status::CONNECT_INVALID_HOST);
    let host = RudeHost::connect(target.address());
    let joining = connect_data(host.cntlid, NQN, "nqn.2026-11.io.fastice:stranger", [9; 16]);
    assert_eq!(connecting(&target, 1, 32, &joining).0, Status::CONNECT_INVALID_HOST);
    assert_eq!(target.running.stats().0.hosts_refused, 2);
    let mut queue: RawConnection = host.queue(1, 16, Digests::NONE);
    expect_status(&mut queue, &flush(WRITABLE, 1), &[], Status::SUCCESS);
    drop((queue, host));
    eventually("all connections have ended", || {
        let stats = tcp_stats(&target);
        stats.connections == stats.connections_ended
    });
}

#[test]
fn a_wrong_host_does_not_disturb_the_right_one() {
    let target = rude_target();
    let host = RudeHost::connect(target.address());
    let mut queue = host.queue(1, 64, Digests::NONE);
    for round in 0..20u8 {
        expect_status(&mut queue, &write_in_capsule(WRITABLE, 1, 77, 4096), &[round; 4096], Status::SUCCESS);
        let mut rude = introduced(target.address(), Digests::NONE);
        rude.send(&vec![round.wrapping_mul(37); 1000]).expect("sent");
        assert!(read(&mut queue, WRITABLE, 77, 1) == [round; 4096]);
    }
    expect_service(&target);
    drop((queue, host));
    expect_no_leak(&target);
}
