//! Connect, and the whole sequence by which Linux takes a controller into use.

use super::super::*;
use super::harness::*;
use nvme_spec::Status;

#[test]
fn the_sequence_of_a_linux_host() {
    let target = target();
    let mut admin = Queue::new(&target);
    assert_eq!(admin.session.in_capsule_len_max(), 8192);
    let connected = admin.connect(&Connect::admin());
    assert_eq!(connected, Completion::with_dw0(1));
    assert_eq!(admin.session.sqhd(), 1);

    let cap = admin.property_get(0x00, true);
    assert!(cap & 0xFFFF >= 127, "MQES");
    assert_eq!(cap >> 48 & 0xF, 0, "MPSMIN");
    assert_eq!(admin.property_get(0x08, false), 0x0002_0000);
    assert_eq!(admin.property_get(0x68, false), 0x001E_001E);
    assert_eq!(admin.set_cc(ENABLE & !1), Completion::SUCCESS);
    assert_eq!(admin.csts(), 0);
    assert_eq!(admin.set_cc(ENABLE), Completion::SUCCESS);
    assert_eq!(admin.csts(), 1);
    assert_eq!(admin.property_get(0x14, false), ENABLE);

    let controller = admin.data(identify(0x01, 0));
    assert_eq!(controller[78..80], 1u16.to_le_bytes(), "CNTLID");
    assert_eq!(admin.data(identify(0x06, 0)), vec![0; 4096]);
    admin.data(log(0x05, 4096, 0, false));
    admin.data(log(0x02, 512, 0, false));
    let events = admin.respond(command(0x09, 0, 0, [0x0B, 0x100, 0]));
    assert_eq!(events, Completion::SUCCESS);
    assert_eq!(admin.begin(command(0x0C, 0, 0, [0; 3])), Begin::Park);
    let granted = admin.respond(command(0x09, 0, 0, [0x07, 0x0003_0003, 0]));
    assert_eq!(granted, Completion::with_dw0(0x0003_0003));

    let mut queues: Vec<_> = (1..=4).map(|qid| io_queue(&target, 1, qid)).collect();
    assert!(queues.iter().all(|queue| queue.session.is_io() && queue.session.sq_size() == 128));
    assert!(queues[0].session.in_capsule_len_max() >= 16384);
    let list = admin.data(identify(0x02, 0));
    assert_eq!(list[..12], [1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    for nsid in [1, 3] {
        admin.data(identify(0x03, nsid));
        admin.data(identify(0x08, nsid));
        admin.data(identify(0x00, nsid));
        admin.data(identify(0x05, nsid));
    }
    assert!(matches!(queues[3].begin(io(2, 1, 0, 8)), Begin::Io(_)));
    assert_eq!(admin.respond(command(0x18, 0, 0, [0; 3])), Completion::SUCCESS);

    queues.iter_mut().for_each(|queue| queue.session.closed());
    assert_eq!(admin.set_cc(ENABLE | 1 << 14), Completion::SUCCESS);
    assert_eq!(admin.csts() >> 2 & 3, 2, "SHST");
    admin.session.closed();
    assert_eq!(target.controllers(), vec![]);
    let stats = target.stats();
    assert_eq!((stats.admin_connects, stats.io_connects, stats.command_errors), (1, 4, 0));
}

#[test]
fn the_controllers_identify_data_never_changes_unnoticed() {
    let target = Target::new(TargetOptions { firmware: "1.0".to_owned(), ..TargetOptions::default() });
    target.publish(vec![subsystem(vec![namespace(1)])], ports()).unwrap();
    let (mut admin, _) = ready(&target);
    insta::assert_snapshot!("identify_controller", set_bytes(&admin.data(identify(0x01, 0))));
    insta::assert_snapshot!("identify_namespace", set_bytes(&admin.data(identify(0x00, 1))));
    insta::assert_snapshot!("descriptors", set_bytes(&admin.data(identify(0x03, 1))));
    insta::assert_snapshot!("independent", set_bytes(&admin.data(identify(0x08, 1))));
    let (mut discovery, _) = ready_as(&target, &Connect::discovery());
    insta::assert_snapshot!("identify_discovery", set_bytes(&discovery.data(identify(0x01, 0))));
}

/// The lines of 16 bytes that are not all zero.
fn set_bytes(data: &[u8]) -> String {
    let lines = data.chunks(16).enumerate().filter(|(_, line)| line.iter().any(|&byte| byte != 0));
    lines
        .map(|(index, line)| {
            let hex: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{:4} {}\n", index * 16, hex.join(" "))
        })
        .collect()
}

/// The status and DW0 of a Connect that has to fail.
fn refused(target: &std::sync::Arc<Target>, connect: &Connect) -> (Status, bool, u32) {
    let mut queue = Queue::new(target);
    let completion = queue.connect(connect);
    assert_eq!(queue.close_reason(), Some(CloseReason::ConnectFailed));
    assert_eq!(queue.close_reason(), None, "told once");
    (completion.status.code(), completion.status.dnr(), completion.dw0)
}

#[test]
fn each_bad_parameter_is_named_by_its_place() {
    let target = target();
    let good = Connect::admin();
    let invalid = |dw0| (Status::CONNECT_INVALID_PARAMETERS, true, dw0);
    let with = |change: fn(&mut Connect)| {
        let mut connect = good.clone();
        change(&mut connect);
        refused(&target, &connect)
    };
    assert_eq!(with(|it| it.subnqn = "nqn.2026-11.com.example:other".to_owned()), invalid(0x1_0000 | 256));
    assert_eq!(with(|it| it.hostid = [0; 16]), invalid(0x1_0000));
    assert_eq!(with(|it| it.cntlid = 1), invalid(0x1_0000 | 16));
    assert_eq!(with(|it| it.cntlid = 0xFFFE), invalid(0x1_0000 | 16));
    assert_eq!(with(|it| it.sqsize_z = 0), invalid(44));
    assert_eq!(with(|it| it.sqsize_z = 1024), invalid(44));
    assert_eq!(with(|it| it.recfmt = 1), (Status::CONNECT_INCOMPATIBLE_FORMAT, true, 0));
    assert_eq!(target.stats().connects_rejected, 7);
    assert_eq!(target.controllers(), vec![]);
}

#[test]
fn unterminated_names_and_short_data_are_refused() {
    let target = target();
    let connect = Connect::admin();
    let mut data = connect.data();
    data.hostnqn = [b'x'; 256];
    let mut queue = Queue::new(&target);
    let begin = queue.send(connect.command(), zerocopy::IntoBytes::as_bytes(&data));
    let status = Status::CONNECT_INVALID_PARAMETERS.with_dnr();
    assert_eq!(begin, Begin::RespondThenClose(Completion { dw0: 0x1_0000 | 512, dw1: 0, status }));

    let mut queue = Queue::new(&target);
    let mut sqe = connect.command();
    sqe.dptr.length.set(1023);
    assert!(matches!(queue.begin(sqe), Begin::RespondThenClose(completion)
        if completion.status.code() == Status::DATA_SGL_LENGTH_INVALID));
}

#[test]
fn a_stranger_can_do_nothing_but_connect() {
    let target = target();
    for sqe in [io(2, 1, 0, 1), identify(1, 0), property(4, 0, 1, 0), command(0xFF, 0, 0, [0; 3])] {
        let mut queue = Queue::new(&target);
        assert!(matches!(queue.begin(sqe), Begin::RespondThenClose(completion)
            if completion.status.code() == Status::COMMAND_SEQUENCE_ERROR));
        assert!(
            matches!(queue.begin(Connect::admin().command()), Begin::Respond(completion)
            if !completion.status.is_success()),
            "the connection is over"
        );
    }
}

#[test]
fn hosts_that_are_not_listed_are_refused_at_every_queue() {
    let target = Target::new(TargetOptions::default());
    let hosts = only(&["nqn.2026-11.com.example:friend"]);
    target.publish(vec![SubsystemSpec { hosts, ..subsystem(vec![namespace(1)]) }], ports()).unwrap();
    assert_eq!(refused(&target, &Connect::admin()), (Status::CONNECT_INVALID_HOST, true, 0));
    assert_eq!(refused(&target, &Connect::io(1, 1)), (Status::CONNECT_INVALID_HOST, true, 0));
    assert_eq!(target.stats().hosts_refused, 2);
    let friend = Connect { hostnqn: "nqn.2026-11.com.example:friend".to_owned(), ..Connect::admin() };
    let (_admin, cntlid) = ready_as(&target, &friend);
    let io = Connect { hostnqn: friend.hostnqn, ..Connect::io(cntlid, 1) };
    assert_eq!(Queue::new(&target).connect(&io).status, Status::SUCCESS);
}

#[test]
fn io_queues_belong_to_their_host_controller_and_port() {
    let target = target();
    let (mut admin, cntlid) = ready(&target);
    let good = Connect::io(cntlid, 1);
    let invalid = |dw0| (Status::CONNECT_INVALID_PARAMETERS, true, dw0);
    let sequence = (Status::COMMAND_SEQUENCE_ERROR, true, 0);
    let other_host = Connect { hostnqn: "nqn.2026-11.com.example:thief".to_owned(), ..good.clone() };
    assert_eq!(refused(&target, &other_host), (Status::CONNECT_INVALID_HOST, true, 0));
    assert_eq!(refused(&target, &Connect { hostid: [6; 16], ..good.clone() }), invalid(0x1_0000));
    assert_eq!(refused(&target, &Connect { cntlid: 77, ..good.clone() }), invalid(0x1_0000 | 16));
    assert_eq!(refused(&target, &Connect { qid: 65, ..good.clone() }), invalid(42));
    admin.respond(command(0x09, 0, 0, [0x07, 0, 0]));
    assert_eq!(refused(&target, &Connect { qid: 2, ..good.clone() }), invalid(42));
    assert_eq!(refused(&target, &Connect { subnqn: DISCOVERY_NQN.to_owned(), ..good.clone() }), invalid(42));
    let mut elsewhere = Queue::on_port(&target, 3);
    assert_eq!(elsewhere.connect(&good).dw0, 0x1_0000 | 16);
    let mut queue = io_queue(&target, cntlid, 1);
    assert_eq!(refused(&target, &good), sequence, "queue 1 exists");
    queue.session.closed();
    io_queue(&target, cntlid, 1);
}

#[test]
fn io_queues_wait_for_ready() {
    let target = target();
    let mut admin = Queue::new(&target);
    let cntlid = u16::try_from(admin.connect(&Connect::admin()).dw0).unwrap();
    let sequence = (Status::COMMAND_SEQUENCE_ERROR, true, 0);
    assert_eq!(refused(&target, &Connect::io(cntlid, 1)), sequence);
    assert_eq!(admin.status(identify(1, 0)), (Status::COMMAND_SEQUENCE_ERROR, true));
    admin.set_cc(ENABLE);
    io_queue(&target, cntlid, 1);
}

#[test]
fn discovery_only_ports_serve_nothing_else() {
    let target = target();
    let mut queue = Queue::on_port(&target, 2);
    assert_eq!(queue.connect(&Connect::admin()).dw0, 0x1_0000 | 256);
    let mut queue = Queue::on_port(&target, 2);
    assert_eq!(queue.connect(&Connect::discovery()).status, Status::SUCCESS);
}

#[test]
fn a_host_may_do_without_submission_queue_flow_control() {
    let target = target();
    let mut admin = Queue::new(&target);
    admin.connect(&Connect { cattr: 4, ..Connect::admin() });
    assert!(admin.session.is_flow_control_disabled());
    assert_eq!(admin.session.sqhd(), 0xFFFF);
    let mut admin = Queue::new(&target);
    admin.connect(&Connect { sqsize_z: 2, ..Connect::admin() });
    let heads: Vec<_> = (0..4)
        .map(|_| {
            admin.csts();
            admin.session.sqhd()
        })
        .collect();
    assert_eq!(heads, [2, 0, 1, 2]);
}

#[test]
fn cntlids_go_round_and_run_out() {
    let options =
        TargetOptions { controllers_max: 3, controllers_per_host_max: 2, ..TargetOptions::default() };
    let target = Target::new(options);
    target.publish(vec![subsystem(vec![namespace(1)])], ports()).unwrap();
    let (first, one) = ready(&target);
    let (_second, two) = ready(&target);
    assert_eq!((one, two), (1, 2));
    let busy = (Status::CONNECT_CONTROLLER_BUSY, false, 0);
    assert_eq!(refused(&target, &Connect::admin()), busy, "this host has its share");
    let other = Connect { hostnqn: "nqn.2026-11.com.example:b".to_owned(), ..Connect::admin() };
    let (_third, three) = ready_as(&target, &other);
    assert_eq!(three, 3);
    let more = Connect { hostnqn: "nqn.2026-11.com.example:c".to_owned(), ..Connect::admin() };
    assert_eq!(refused(&target, &more), busy, "the subsystem is full");
    drop(first);
    let (_fourth, four) = ready(&target);
    assert_eq!(four, 4, "an identifier that was just free is not used at once");
}

#[test]
fn a_flood_of_connects_leaves_nothing_behind() {
    let target = target();
    for _ in 0..10_000 {
        let mut queue = Queue::new(&target);
        queue.connect(&Connect::admin());
    }
    assert_eq!(target.controllers(), vec![]);
    let (_admin, cntlid) = ready(&target);
    assert_eq!(cntlid, 10_001);
}
