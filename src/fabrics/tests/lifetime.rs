//! How controllers end: silence, reset, shutdown, lost connections, a target that stops.

use std::time::Duration;

use super::super::*;
use super::harness::*;
use nvme_spec::Status;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_silent_host_loses_its_controller_and_a_busy_one_does_not() {
    let target = target();
    let (mut admin, cntlid) = ready(&target);
    let mut io = io_queue(&target, cntlid, 1);
    let start = admin.now;
    assert_eq!(admin.session.next_deadline(), Some(start + 5 * SECOND));
    admin.now = start + 5 * SECOND;
    assert_eq!(admin.events(), vec![], "commands came since the start");
    io.begin(super::harness::io(2, 1, 0, 1));
    admin.now = start + 10 * SECOND;
    assert_eq!(admin.events(), vec![], "I/O is a sign of life");
    admin.now = start + 15 * SECOND - Duration::from_millis(1);
    assert_eq!(admin.events(), vec![]);
    admin.now = start + 15 * SECOND;
    let wakes = io.wakes.count();
    assert_eq!(admin.close_reason(), Some(CloseReason::KeepAliveExpired));
    assert!(io.wakes.count() > wakes, "the I/O queue's core hears of it");
    assert_eq!(io.close_reason(), Some(CloseReason::KeepAliveExpired));
    assert_eq!(io.status(super::harness::io(2, 1, 0, 1)), (Status::ABORTED_SQ_DELETION, false));
    assert_eq!(target.stats().keep_alive_expired, 1);
    admin.session.closed();
    assert_eq!(target.controllers().len(), 1, "its I/O queue drains");
    io.session.closed();
    assert_eq!(target.controllers(), vec![]);
}

#[test]
fn keep_alive_is_the_least_that_keeps_a_controller() {
    let target = target();
    let (mut admin, _) = ready(&target);
    let start = admin.now;
    for seconds in 1..60 {
        admin.now = start + seconds * SECOND;
        if seconds % 4 == 0 {
            assert_eq!(admin.respond(command(0x18, 0, 0, [0; 3])), Completion::SUCCESS);
        }
        assert_eq!(admin.events(), vec![], "{seconds}");
    }
    admin.respond(command(0x09, 0, 0, [0x0F, 0, 0]));
    assert_eq!(admin.session.next_deadline(), None, "turned off");
}

#[test]
fn controllers_nobody_enables_and_idle_discovery_end() {
    let target = target();
    let mut admin = Queue::new(&target);
    admin.connect(&Connect { kato_ms: 0, ..Connect::admin() });
    let start = admin.now;
    admin.now = start + 119 * SECOND;
    assert_eq!(admin.events(), vec![]);
    admin.now = start + 120 * SECOND;
    assert_eq!(admin.close_reason(), Some(CloseReason::Idle));

    let (mut discovery, _) = ready_as(&target, &Connect { kato_ms: 0, ..Connect::discovery() });
    let start = discovery.now;
    discovery.now = start + 120 * SECOND;
    assert_eq!(discovery.events(), vec![]);
    discovery.now = start + 240 * SECOND;
    assert_eq!(discovery.close_reason(), Some(CloseReason::Idle));
    assert_eq!(target.stats().idle_expired, 2);
    let (io_controller, _) = ready_as(&target, &Connect { kato_ms: 0, ..Connect::admin() });
    assert_eq!(io_controller.session.next_deadline(), None);
}

#[test]
fn reset_ends_io_queues_and_is_complete_when_they_are_drained() {
    let target = target();
    let (mut admin, cntlid) = ready(&target);
    let mut io = io_queue(&target, cntlid, 1);
    admin.set_cc(ENABLE & !1);
    assert_eq!(admin.csts(), 1, "I/O may still be in flight");
    assert_eq!(io.close_reason(), Some(CloseReason::Reset));
    assert_eq!(io.status(super::harness::io(1, 1, 0, 1)), (Status::ABORTED_SQ_DELETION, false));
    admin.set_cc(ENABLE);
    assert_eq!(admin.csts(), 0, "not ready before the past is over");
    let wakes = admin.wakes.count();
    io.session.closed();
    assert!(admin.wakes.count() > wakes);
    assert_eq!(admin.csts(), 1);
    let mut io = io_queue(&target, cntlid, 1);
    assert!(matches!(io.begin(super::harness::io(1, 1, 0, 1)), Begin::Io(_)));
}

#[test]
fn shutdown_is_complete_when_io_queues_are_drained() {
    let target = target();
    let (mut admin, cntlid) = ready(&target);
    let mut io = io_queue(&target, cntlid, 1);
    admin.set_cc(ENABLE | 1 << 14);
    assert_eq!(admin.csts() >> 2, 1);
    assert_eq!(admin.status(identify(1, 0)), (Status::COMMAND_SEQUENCE_ERROR, true));
    assert_eq!(io.close_reason(), Some(CloseReason::Reset));
    io.session.closed();
    assert_eq!(admin.csts() >> 2, 2);
    admin.now += 120 * SECOND;
    assert_eq!(admin.close_reason(), Some(CloseReason::Idle), "the host does not go by itself");
}

#[test]
fn a_lost_admin_queue_takes_its_io_queues_along() {
    let target = target();
    let (admin, cntlid) = ready(&target);
    let mut io = io_queue(&target, cntlid, 1);
    drop(admin);
    assert_eq!(io.close_reason(), Some(CloseReason::AdminQueueGone));
    let mut late = Queue::new(&target);
    assert_eq!(late.connect(&Connect::io(cntlid, 2)).status.code(), Status::COMMAND_SEQUENCE_ERROR);

    // The host comes back while the lost queue still has writes in flight.
    let mut again = Queue::new(&target);
    again.connect(&Connect::admin());
    again.set_cc(ENABLE);
    assert_eq!(again.csts(), 0);
    let mut stranger = Queue::new(&target);
    let other =
        Connect { hostnqn: "nqn.2026-11.com.example:b".to_owned(), hostid: [9; 16], ..Connect::admin() };
    stranger.connect(&other);
    stranger.set_cc(ENABLE);
    assert_eq!(stranger.csts(), 1, "other hosts need not wait");
    io.session.closed();
    assert_eq!(again.csts(), 1);
}

#[test]
fn a_target_that_stops_ends_every_session_and_takes_no_more() {
    let target = target();
    let (mut admin, cntlid) = ready(&target);
    let mut io = io_queue(&target, cntlid, 1);
    let mut fresh = Queue::new(&target);
    let (mut discovery, _) = ready_as(&target, &Connect::discovery());
    target.shut_down();
    for queue in [&mut admin, &mut io, &mut fresh, &mut discovery] {
        assert_eq!(queue.close_reason(), Some(CloseReason::TargetShutDown));
    }
    let refused = Queue::new(&target).connect(&Connect::admin());
    assert_eq!(refused.status, Status::CONNECT_CONTROLLER_BUSY, "the host may come again");
}

#[test]
fn sessions_name_themselves() {
    let target = target();
    let (admin, cntlid) = ready(&target);
    let io = io_queue(&target, cntlid, 7);
    assert_eq!(Queue::new(&target).session.controller_label(), "10.0.0.9:40000 (not connected)");
    assert_eq!(admin.session.controller_label(), format!("{HOST} cntlid 1 qid 0"));
    assert_eq!(io.session.controller_label(), format!("{HOST} cntlid 1 qid 7"));
    assert_eq!(io.session.names(), Some((HOST, NQN)));
}
