//! Reloads: what stays, what goes, and who hears of it.

use super::super::*;
use super::harness::*;
use crate::units::{BlockSize, ByteLen};
use nvme_spec::{Nsid, Status};

#[test]
fn what_did_not_change_keeps_its_export_and_slot() {
    let target = Target::new(TargetOptions::default());
    let (a, b) = (namespace(1), namespace(2));
    let first = target.publish(vec![subsystem(vec![a.clone(), b.clone()])], ports()).unwrap();
    assert_eq!((first.added.len(), first.removed.len(), first.kept.len()), (2, 0, 0));
    let second = target.publish(vec![subsystem(vec![a.clone(), namespace(3)])], ports()).unwrap();
    assert_eq!((second.added.len(), second.removed.len(), second.kept.len()), (1, 1, 1));
    assert!(std::sync::Arc::ptr_eq(&second.kept[0], &first.added[0]));
    assert_eq!(second.removed[0].nsid, Nsid(2));
    assert_eq!(second.removed[0].grant(), Grant::Removed);
    assert_eq!(second.added[0].slot, ExportSlot(2));
    let third = target.publish(vec![subsystem(vec![a, b])], ports()).unwrap();
    assert_eq!(third.added[0].slot, ExportSlot(3), "a slot is never used again");
    assert_eq!(third.added[0].nguid, first.added[1].nguid, "names are stable");
}

#[test]
fn a_dropped_plan_leaves_its_slots_unused() {
    let target = target();
    let taken: Vec<_> = target.exports().iter().map(|export| export.slot).collect();
    let plan = |nsid| target.prepare(vec![subsystem(vec![namespace(nsid)])], ports()).unwrap();
    let dropped = plan(7).changes.added[0].slot;
    // Some core may have opened namespace 7 in it before another core could not.
    let next = plan(8).changes.added[0].slot;
    assert!(next != dropped && !taken.contains(&next), "{next:?} after {dropped:?}");
}

#[test]
fn a_queue_sees_the_new_table_at_its_next_command() {
    let target = Target::new(TargetOptions::default());
    let a = namespace(1);
    target.publish(vec![subsystem(vec![a.clone()])], ports()).unwrap();
    let (_admin, cntlid) = ready(&target);
    let mut queue = io_queue(&target, cntlid, 1);
    let slot = |begin| match begin {
        Begin::Io(command) => command.slot,
        other => panic!("{other:?}"),
    };
    assert_eq!(slot(queue.begin(io(1, 1, 0, 1))), ExportSlot(0));
    let read_only = NamespaceSpec { read_only: true, ..a.clone() };
    target.publish(vec![subsystem(vec![read_only, namespace(2)])], ports()).unwrap();
    assert_eq!(queue.status(io(1, 1, 0, 1)), (Status::NAMESPACE_WRITE_PROTECTED, true));
    assert_eq!(slot(queue.begin(io(2, 1, 0, 1))), ExportSlot(1));
    assert_eq!(slot(queue.begin(io(1, 2, 0, 1))), ExportSlot(2));
}

#[test]
fn hosts_taken_off_the_list_lose_their_controllers() {
    let target = Target::new(TargetOptions::default());
    let a = namespace(1);
    let spec = |hosts| vec![SubsystemSpec { hosts, ..subsystem(vec![a.clone()]) }];
    target.publish(spec(only(&[HOST, "nqn.2026-11.com.example:b"])), ports()).unwrap();
    let (mut admin, cntlid) = ready(&target);
    let mut io = io_queue(&target, cntlid, 1);
    let other = Connect { hostnqn: "nqn.2026-11.com.example:b".to_owned(), ..Connect::admin() };
    let (mut stays, _) = ready_as(&target, &other);
    target.publish(spec(only(&["nqn.2026-11.com.example:b"])), ports()).unwrap();
    assert_eq!(admin.close_reason(), Some(CloseReason::HostRevoked));
    assert_eq!(io.close_reason(), Some(CloseReason::HostRevoked));
    assert_eq!(io.status(super::harness::io(2, 1, 0, 1)), (Status::ABORTED_SQ_DELETION, false));
    assert_eq!(stays.close_reason(), None);
    assert_eq!(target.stats().controllers_revoked, 1);
    assert_eq!(Queue::new(&target).connect(&Connect::admin()).status.code(), Status::CONNECT_INVALID_HOST);
}

#[test]
fn between_two_lists_only_hosts_of_both_are_let_in() {
    let (ab, bc) = (only(&["a", "b"]), only(&["b", "c"]));
    assert_eq!(ab.and(&bc), only(&["b"]));
    assert_eq!(HostPolicy::Any.and(&ab), ab);
    assert_eq!(ab.and(&HostPolicy::Any), ab);
    assert_eq!(HostPolicy::Any.and(&HostPolicy::Any), HostPolicy::Any);
}

#[test]
fn a_subsystem_that_goes_takes_its_controllers_along() {
    let target = target();
    let (mut admin, cntlid) = ready(&target);
    let mut io = io_queue(&target, cntlid, 1);
    let gone = target.publish(vec![], ports()).unwrap().removed;
    assert_eq!(gone.len(), 2);
    assert_eq!(admin.close_reason(), Some(CloseReason::SubsystemRemoved));
    assert_eq!(io.close_reason(), Some(CloseReason::SubsystemRemoved));
    assert_eq!(Queue::new(&target).connect(&Connect::admin()).dw0, 0x1_0000 | 256);
    assert!(target.exports().is_empty());
}

#[test]
fn a_plan_changes_nothing_and_goes_stale() {
    let target = target();
    let plan = target.prepare(vec![], vec![]).unwrap();
    assert_eq!(plan.changes.removed.len(), 2);
    assert_eq!(target.exports().len(), 2);
    let other = target.prepare(vec![], ports()).unwrap();
    target.commit(other).unwrap();
    assert_eq!(target.commit(plan).unwrap_err(), TargetError::StalePlan);
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let target = target();
    let check = |spec: SubsystemSpec| target.prepare(vec![spec], ports()).unwrap_err();
    let of = |namespaces| subsystem(namespaces);
    assert!(matches!(check(SubsystemSpec { nqn: DISCOVERY_NQN.into(), ..of(vec![]) }), TargetError::Nqn(_)));
    assert!(matches!(check(SubsystemSpec { nqn: "x".repeat(224), ..of(vec![]) }), TargetError::Nqn(_)));
    assert!(matches!(check(SubsystemSpec { serial: String::new(), ..of(vec![]) }), TargetError::Text(_)));
    assert!(matches!(check(SubsystemSpec { model: "\u{e9}".into(), ..of(vec![]) }), TargetError::Text(_)));
    let changed = check(SubsystemSpec { serial: "other".into(), ..of(vec![]) });
    assert_eq!(changed, TargetError::IdentityChanged(NQN.into()));
    for nsid in [0, 1025] {
        assert!(matches!(check(of(vec![namespace(nsid)])), TargetError::Nsid { .. }));
    }
    assert!(matches!(check(of(vec![namespace(1), namespace(1)])), TargetError::Nsid { nsid: 1, .. }));
    for (len, block_size) in [(0, 512), (513, 512), (LEN + 512, 512), (LEN - 512, 4096)] {
        let block_size = BlockSize::new(block_size).unwrap();
        let bad = NamespaceSpec { len: ByteLen(len), block_size, ..namespace(1) };
        assert!(matches!(check(of(vec![bad])), TargetError::Geometry { nsid: 1, .. }), "{len}");
    }
    let twice = vec![ports()[0].clone(), ports()[0].clone()];
    assert_eq!(target.prepare(vec![], twice).unwrap_err(), TargetError::DuplicatePort(1));
    let twice = vec![subsystem(vec![]), subsystem(vec![])];
    assert_eq!(target.prepare(twice, vec![]).unwrap_err(), TargetError::DuplicateSubsystem(NQN.into()));
    assert_eq!(target.exports().len(), 2, "nothing of that came to pass");
}

#[test]
fn the_discovery_log_lists_what_the_host_may_reach() {
    let target = target();
    let mut queue = Queue::on_port(&target, 2);
    queue.connect(&Connect::discovery());
    queue.set_cc(1);
    assert_eq!(queue.csts(), 1);
    assert_eq!(queue.data(identify(1, 0))[111], 2, "CNTRLTYPE");
    assert_eq!(queue.status(identify(0, 1)), (Status::INVALID_FIELD, true));
    assert_eq!(queue.status(command(0x08, 0, 0, [0; 3])), (Status::INVALID_OPCODE, true));
    assert_eq!(queue.status(log(2, 512, 0, false)), (Status::INVALID_LOG_PAGE, true));
    let header = queue.data(log(0x70, 20, 0, false));
    assert_eq!(header, [&2u64.to_le_bytes()[..], &2u64.to_le_bytes(), &[0; 4]].concat());
    let entries = queue.data(log(0x70, 2048, 1024, false));
    let text = |entry: &[u8], at: usize, len: usize| {
        String::from_utf8(entry[at..at + len].to_vec()).unwrap().trim_end_matches(['\0', ' ']).to_owned()
    };
    for (entry, subtype, eflags, portid, service, nqn) in
        [(&entries[..1024], 3, 3, 2, "8009", DISCOVERY_NQN), (&entries[1024..], 2, 0, 1, "4420", NQN)]
    {
        assert_eq!(entry[..4], [3, 1, subtype, 4]);
        assert_eq!(entry[4..12], [portid, 0, 0xFF, 0xFF, 32, 0, eflags, 0]);
        assert_eq!(text(entry, 32, 32), service);
        assert_eq!(text(entry, 256, 256), nqn);
        assert_eq!(text(entry, 512, 256), "10.0.0.1");
    }
    assert_eq!(entries[32..64], *b"8009                            ");
}
