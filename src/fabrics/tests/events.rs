//! Asynchronous events: told once, when wanted, and again after the log page was read.

use super::super::*;
use super::harness::*;
use nvme_spec::{Cid, Status};

const AER: [u32; 3] = [0; 3];
const NAMESPACE_CHANGED: u32 = 0x0004_0002;
const DISCOVERY_CHANGED: u32 = 0x0070_F002;

fn aer() -> nvme_spec::SubmissionQueueEntry {
    command(0x0C, 0, 0, AER)
}

fn told(cid: u16, dw0: u32) -> Vec<SessionEvent> {
    vec![SessionEvent::Complete { cid: Cid(cid), completion: Completion::with_dw0(dw0) }]
}

fn serve(target: &Target, nsids: &[u32]) {
    let living = target.exports();
    let namespaces = nsids.iter().map(|&nsid| {
        let device = living.iter().find(|it| it.nsid.0 == nsid).map_or_else(device, |it| it.device.clone());
        namespace_on(nsid, device)
    });
    target.publish(vec![subsystem(namespaces.collect())], ports()).unwrap();
}

#[test]
fn a_changed_namespace_is_told_once_until_the_list_is_read() {
    let target = Target::new(TargetOptions::default());
    serve(&target, &[1]);
    let (mut admin, _) = ready(&target);
    admin.respond(command(0x09, 0, 0, [0x0B, 0x100, 0]));
    assert_eq!(admin.begin(aer()), Begin::Park);
    let first = admin.cid();
    admin.begin(aer());
    assert_eq!(admin.events(), vec![]);

    let wakes = admin.wakes.count();
    serve(&target, &[1, 2]);
    assert!(admin.wakes.count() > wakes);
    assert_eq!(admin.events(), told(first, NAMESPACE_CHANGED));
    serve(&target, &[1, 2, 3]);
    assert_eq!(admin.events(), vec![], "the list will show it");
    let list = admin.data(log(4, 4096, 0, true));
    assert_eq!(list[..12], [2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    serve(&target, &[1, 2]);
    assert_eq!(admin.events(), vec![], "RAE keeps the event back");
    admin.data(log(4, 4096, 0, false));
    assert_eq!(admin.data(log(4, 4096, 0, false)), vec![0; 4096], "reading empties the list");
    serve(&target, &[1]);
    assert_eq!(admin.events().len(), 1);
    assert_eq!(target.stats().events_sent, 2);
}

#[test]
fn a_fence_and_its_end_are_told() {
    let target = Target::new(TargetOptions::default());
    serve(&target, &[1, 2]);
    let (mut admin, _) = ready(&target);
    admin.respond(command(0x09, 0, 0, [0x0B, 0x100, 0]));
    let export = target.exports()[1].clone();
    let changes: [&dyn Fn(FenceReason); 2] =
        [&|reason| target.fence(&export, reason), &|reason| target.unfence(&export, reason)];
    for change in changes {
        admin.begin(aer());
        change(FenceReason::DeviceFailed);
        assert_eq!(admin.events(), told(admin.cid(), NAMESPACE_CHANGED));
        let list = admin.data(log(4, 4096, 0, false));
        assert_eq!(list[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        change(FenceReason::DeviceFailed);
        assert_eq!(admin.events(), vec![], "no change");
    }
}

#[test]
fn an_event_waits_for_a_request_and_unwanted_ones_are_dropped() {
    let target = Target::new(TargetOptions::default());
    serve(&target, &[1]);
    let (mut admin, _) = ready(&target);
    serve(&target, &[1, 2]);
    assert_eq!(admin.events(), vec![]);
    admin.respond(command(0x09, 0, 0, [0x0B, 0x100, 0]));
    admin.begin(aer());
    assert_eq!(admin.events(), vec![], "nobody wanted that one");
    serve(&target, &[1]);
    assert_eq!(admin.events().len(), 1);
    admin.data(log(4, 4096, 0, false));
    serve(&target, &[1, 2]);
    assert_eq!(admin.events(), vec![], "no request is parked");
    let wakes = admin.wakes.count();
    admin.begin(aer());
    assert!(admin.wakes.count() > wakes);
    assert_eq!(admin.events(), told(admin.cid(), NAMESPACE_CHANGED));
}

#[test]
fn requests_are_limited_aborted_and_ended_by_reset() {
    let target = target();
    let (mut admin, _) = ready(&target);
    let cids: Vec<_> = (0..4)
        .map(|_| {
            assert_eq!(admin.begin(aer()), Begin::Park);
            admin.cid()
        })
        .collect();
    assert_eq!(admin.status(aer()), (Status::ASYNC_EVENT_LIMIT_EXCEEDED, true));
    let abort = |sqid: u32, cid: u16| command(0x08, 0, 0, [u32::from(cid) << 16 | sqid, 0, 0]);
    assert_eq!(admin.respond(abort(0, cids[1])), Completion::SUCCESS);
    let ended =
        |cid: u16, status| SessionEvent::Complete { cid: Cid(cid), completion: Completion::of(status) };
    assert_eq!(admin.events(), [ended(cids[1], Status::COMMAND_ABORT_REQUESTED)]);
    assert_eq!(admin.respond(abort(0, cids[1])), Completion::with_dw0(1), "gone already");
    assert_eq!(admin.respond(abort(1, cids[0])), Completion::with_dw0(1), "not on that queue");
    admin.set_cc(ENABLE & !1);
    let rest = [cids[0], cids[2], cids[3]].map(|cid| ended(cid, Status::ABORTED_SQ_DELETION));
    assert_eq!(admin.events(), rest);
    assert_eq!(target.stats().aborts, 3);
}

#[test]
fn discovery_tells_only_the_hosts_whose_view_changed() {
    let target = target();
    let friend = Connect { hostnqn: "nqn.2026-11.com.example:friend".to_owned(), ..Connect::discovery() };
    let mut queues = [Connect::discovery(), friend].map(|connect| {
        let (mut queue, _) = ready_as(&target, &connect);
        queue.respond(command(0x09, 0, 0, [0x0B, 1 << 31, 0]));
        queue.begin(aer());
        queue
    });
    let spec = |hosts| {
        let living = target.exports()[0].device.clone();
        vec![SubsystemSpec { hosts, ..subsystem(vec![namespace_on(1, living)]) }]
    };
    target.publish(spec(only(&["nqn.2026-11.com.example:friend"])), ports()).unwrap();
    assert_eq!(queues[0].events().len(), 1);
    assert_eq!(queues[1].events(), vec![]);
    let header = queues[0].data(log(0x70, 20, 0, false));
    assert_eq!(header[..8], 3u64.to_le_bytes(), "GENCTR");
    assert_eq!(header[8..16], 1u64.to_le_bytes(), "only the discovery service itself");
    assert_eq!(queues[1].data(log(0x70, 16, 0, false))[8..16], 2u64.to_le_bytes());
    target.publish(spec(HostPolicy::Any), ports()[..1].to_vec()).unwrap();
    queues[0].begin(aer());
    assert_eq!(queues[0].events(), told(queues[0].cid(), DISCOVERY_CHANGED));
    assert_eq!(queues[1].events().len(), 1, "a port is gone for everybody");
}
