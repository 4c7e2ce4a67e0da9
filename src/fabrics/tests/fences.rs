//! What hosts see of a fence, by the policy of the namespace.

use std::sync::Arc;

use super::super::*;
use super::harness::*;
use nvme_spec::{Cid, Status, SubmissionQueueEntry};

const NAMESPACE_CHANGED: u32 = 0x0004_0002;
const ANA_CHANGED: u32 = 0x000C_0302;
const OPTIMIZED: u8 = 1;
const INACCESSIBLE: u8 = 3;

fn with(nsid: u32, on_fence: FencePolicy) -> NamespaceSpec {
    NamespaceSpec { on_fence, ..namespace(nsid) }
}

fn serving(namespaces: Vec<NamespaceSpec>) -> Arc<Target> {
    let target = Target::new(TargetOptions::default());
    target.publish(vec![subsystem(namespaces)], ports()).unwrap();
    target
}

/// Namespace 1 by ANA, 2 by Namespace Not Ready.
fn ana_and_not() -> Arc<Target> {
    serving(vec![with(1, FencePolicy::Ana), with(2, FencePolicy::NotReady)])
}

fn export(target: &Target, nsid: u32) -> Arc<Export> {
    target.exports().into_iter().find(|export| export.nsid.0 == nsid).unwrap()
}

fn set_feature(id: u32, value: u32) -> SubmissionQueueEntry {
    command(0x09, 0, 0, [id, value, 0])
}

/// Get Log Page of the ANA log with these log specific bits.
fn ana_log(len: u32, offset: u32, specific: u32) -> SubmissionQueueEntry {
    let mut sqe = log(0x0C, len, offset, false);
    sqe.cdw10.set(sqe.cdw10.get() | specific << 8);
    sqe
}

fn number<const N: usize>(page: &[u8], at: usize) -> u64 {
    page[at..at + N].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// The status that a host gets for an I/O command.
fn told(queue: &mut Queue, sqe: SubmissionQueueEntry) -> (Status, bool, u8) {
    let status = queue.respond(sqe).status;
    let told = queue.session.told(status);
    (told.code(), told.dnr(), told.crd())
}

fn event(cid: u16, dw0: u32) -> Vec<SessionEvent> {
    vec![SessionEvent::Complete { cid: Cid(cid), completion: Completion::with_dw0(dw0) }]
}

fn park(admin: &mut Queue) -> u16 {
    assert_eq!(admin.begin(command(0x0C, 0, 0, [0; 3])), Begin::Park);
    admin.cid()
}

#[test]
fn ana_is_shown_by_controllers_whose_subsystem_asks_for_it() {
    let target = ana_and_not();
    let (mut admin, _) = ready(&target);
    let controller = admin.data(identify(1, 0));
    assert_eq!(controller[76] & 0b1000, 0b1000, "CMIC");
    assert_eq!(number::<4>(&controller, 92), 0x900, "OAES");
    assert_eq!(controller[342..344], [10, 0b100_0101], "ANATT, ANACAP");
    assert_eq!(number::<4>(&controller, 344), 1024, "ANAGRPMAX");
    assert_eq!(number::<4>(&controller, 348), 1024, "NANAGRPID");
    assert_eq!(number::<4>(&controller, 540), 1024, "MNAN, not 0 and at most NN");
    for nsid in [1, 2] {
        assert_eq!(number::<4>(&admin.data(identify(0, nsid)), 92), u64::from(nsid), "ANAGRPID");
        assert_eq!(number::<4>(&admin.data(identify(8, nsid)), 4), u64::from(nsid), "ANAGRPID");
    }
    assert_eq!(admin.data(log(0, 1024, 0, false))[0x0C * 4], 1, "among the supported pages");
    assert_eq!(admin.respond(set_feature(0x0B, 0x900)), Completion::SUCCESS);
}

#[test]
fn without_ana_nothing_of_it_is_there() {
    let target = serving(vec![with(1, FencePolicy::NotReady), with(2, FencePolicy::WriteProtect)]);
    let (mut admin, _) = ready(&target);
    let (mut discovery, _) = ready_as(&target, &Connect::discovery());
    let controller = admin.data(identify(1, 0));
    assert_eq!(controller[76] & 0b1000, 0);
    assert_eq!(controller[342..352], [0; 10]);
    assert_eq!(admin.data(identify(0, 1))[92..96], [0; 4]);
    assert_eq!(admin.data(identify(8, 1))[4..8], [0; 4]);
    for queue in [&mut admin, &mut discovery] {
        assert_eq!(queue.status(ana_log(48, 0, 0)), (Status::INVALID_LOG_PAGE, true));
        assert_eq!(queue.status(set_feature(0x0B, 0x800)), (Status::INVALID_FIELD, true));
    }
}

#[test]
fn a_discovery_controller_shows_no_ana_whatever_is_served() {
    let target = ana_and_not();
    let (mut discovery, _) = ready_as(&target, &Connect::discovery());
    assert_eq!(discovery.data(identify(1, 0))[76] & 0b1000, 0);
    assert_eq!(discovery.status(ana_log(48, 0, 0)), (Status::INVALID_LOG_PAGE, true));
    assert_eq!(discovery.status(set_feature(0x0B, 0x800)), (Status::INVALID_FIELD, true));
}

#[test]
fn the_ana_log_has_a_group_for_each_namespace() {
    let target = ana_and_not();
    let (mut admin, _) = ready(&target);
    let page = admin.data(ana_log(4096, 0, 0));
    assert_eq!(number::<2>(&page, 8), 2, "groups");
    let first = number::<8>(&page, 0);
    for (at, nsid) in [(16, 1), (52, 2)] {
        let (group, namespaces) = (number::<4>(&page, at), number::<4>(&page, at + 4));
        assert_eq!((group, namespaces, page[at + 16]), (nsid, 1, OPTIMIZED));
        assert_eq!(number::<4>(&page, at + 32), nsid, "NSID");
    }
    assert_eq!(page[88..], [0; 4008]);

    target.fence(&export(&target, 1), FenceReason::MapInDoubt);
    target.fence(&export(&target, 2), FenceReason::MapInDoubt);
    let fenced = admin.data(ana_log(88, 0, 0));
    assert_eq!(number::<8>(&fenced, 0), first + 1, "one of them changed its state");
    assert_eq!((fenced[32], fenced[68]), (INACCESSIBLE, OPTIMIZED));
    assert_eq!(number::<8>(&fenced, 24), first + 1);
    assert_eq!(fenced[60..68], page[60..68], "the other group has not changed");
    assert_eq!(admin.data(identify(0, 1))[16..24], [0; 8], "NUSE is not to be known");
    assert_ne!(admin.data(identify(0, 2))[16..24], [0; 8]);
    target.fence(&export(&target, 1), FenceReason::DeviceFailed);
    assert_eq!(admin.data(ana_log(88, 0, 0)), fenced, "a second reason changes nothing");

    let groups = admin.data(ana_log(84, 0, 1));
    assert_eq!((groups[32], number::<4>(&groups, 20), number::<4>(&groups, 48)), (INACCESSIBLE, 0, 2));
    assert_eq!(number::<4>(&groups, 52), 0, "RGO: no namespaces");

    target.unfence(&export(&target, 1), FenceReason::MapInDoubt);
    assert_eq!(admin.data(ana_log(88, 0, 0)), fenced, "the device is still lost");
    target.unfence(&export(&target, 1), FenceReason::DeviceFailed);
    let open = admin.data(ana_log(88, 0, 0));
    assert_eq!((number::<8>(&open, 0), open[32]), (first + 2, OPTIMIZED));
}

#[test]
fn the_ana_log_is_read_in_parts_and_not_beyond_its_end() {
    let target = ana_and_not();
    let (mut admin, _) = ready(&target);
    let whole = admin.data(ana_log(88, 0, 0));
    assert_eq!(admin.data(ana_log(16, 52, 0)), whole[52..68]);
    assert_eq!(admin.data(ana_log(16, 84, 0)), [&whole[84..], &[0; 12]].concat());
    let end = 16 + NSID_MAX * 36;
    for (offset, what) in [(88, "behind the groups"), (end - 16, "at the end"), (end, "the very end")] {
        assert_eq!(admin.data(ana_log(16, offset, 0)), [0; 16], "{what}");
    }
    for bad in [ana_log(16, end + 4, 0), ana_log(16, 2, 0), ana_log(16, u32::MAX - 3, 0), ana_log(16, 0, 2)] {
        assert_eq!(admin.status(bad), (Status::INVALID_FIELD, true));
    }
    assert_eq!(admin.status(ana_log(TRANSFER_BYTES_MAX + 4, 0, 0)), (Status::INVALID_FIELD, true));
    let mut far = ana_log(16, 0, 0);
    far.cdw13.set(1);
    assert_eq!(admin.status(far), (Status::INVALID_FIELD, true));
    assert_eq!(admin.status(command(0x02, 0, 8, [3 << 16 | 0x0C, 0, 0])).0, Status::DATA_SGL_LENGTH_INVALID);
}

#[test]
fn a_full_subsystem_fits_into_one_log_page() {
    let living = device();
    let all = (1..=NSID_MAX)
        .map(|nsid| NamespaceSpec { on_fence: FencePolicy::Ana, ..namespace_on(nsid, Arc::clone(&living)) });
    let target = serving(all.collect());
    let (mut admin, _) = ready(&target);
    let len = 16 + NSID_MAX * 36;
    let page = admin.data(ana_log(len, 0, 0));
    assert_eq!(number::<2>(&page, 8), u64::from(NSID_MAX));
    assert_eq!(number::<4>(&page, len as usize - 4), u64::from(NSID_MAX));
}

#[test]
fn a_host_that_has_looked_at_its_paths_is_told_of_a_path() {
    let target = ana_and_not();
    let (mut admin, cntlid) = ready(&target);
    let mut queue = io_queue(&target, cntlid, 1);
    let fenced = export(&target, 1);
    target.fence(&fenced, FenceReason::MapInDoubt);
    target.fence(&export(&target, 2), FenceReason::MapInDoubt);
    let (read, write, flush) = (io(2, 1, 0, 1), io(1, 1, 0, 1), command(0, 1, 0, [0; 3]));
    for sqe in [read, write, flush] {
        assert_eq!(told(&mut queue, sqe), (Status::NAMESPACE_NOT_READY, false, 0), "it knows of no ANA");
    }
    // A part of the page that is refused is no look at it.
    assert_eq!(admin.status(ana_log(16, 2, 0)), (Status::INVALID_FIELD, true));
    assert_eq!(told(&mut queue, read).0, Status::NAMESPACE_NOT_READY);
    admin.data(ana_log(88, 0, 0));
    for sqe in [read, write, flush] {
        assert_eq!(told(&mut queue, sqe), (Status::ANA_INACCESSIBLE, false, 0));
    }
    assert_eq!(told(&mut queue, io(2, 2, 0, 1)).0, Status::NAMESPACE_NOT_READY, "by its own policy");
    target.unfence(&fenced, FenceReason::MapInDoubt);
    assert!(matches!(queue.begin(read), Begin::Io(_)));
    target.publish(vec![subsystem(vec![])], ports()).unwrap();
    assert_eq!(told(&mut queue, read), (Status::INVALID_NAMESPACE, true, 0), "no path, and no namespace");
}

#[test]
fn a_reset_host_has_to_look_again() {
    let target = ana_and_not();
    let (mut admin, cntlid) = ready(&target);
    admin.data(ana_log(88, 0, 0));
    admin.set_cc(ENABLE & !1);
    admin.set_cc(ENABLE);
    assert_eq!(admin.csts(), 1);
    let mut queue = io_queue(&target, cntlid, 1);
    target.fence(&export(&target, 1), FenceReason::MapInDoubt);
    assert_eq!(told(&mut queue, io(2, 1, 0, 1)).0, Status::NAMESPACE_NOT_READY);
    admin.data(ana_log(84, 0, 1));
    assert_eq!(told(&mut queue, io(2, 1, 0, 1)).0, Status::ANA_INACCESSIBLE, "the groups alone are a look");
}

#[test]
fn a_fence_by_ana_is_told_by_its_own_event() {
    let target = ana_and_not();
    let (mut admin, _) = ready(&target);
    admin.respond(set_feature(0x0B, 0x900));
    let cid = park(&mut admin);
    let by_ana = export(&target, 1);
    target.fence(&by_ana, FenceReason::MapInDoubt);
    assert_eq!(admin.events(), event(cid, ANA_CHANGED));
    let cid = park(&mut admin);
    target.unfence(&by_ana, FenceReason::MapInDoubt);
    assert_eq!(admin.events(), vec![], "not before the page is read");
    let mut retained = ana_log(88, 0, 0);
    retained.cdw10.set(retained.cdw10.get() | 1 << 15);
    admin.data(retained);
    target.fence(&by_ana, FenceReason::MapInDoubt);
    assert_eq!(admin.events(), vec![], "RAE keeps it back");
    admin.data(ana_log(88, 0, 0));
    target.unfence(&by_ana, FenceReason::MapInDoubt);
    assert_eq!(admin.events(), event(cid, ANA_CHANGED));
    assert_eq!(admin.data(log(4, 4096, 0, false)), vec![0; 4096], "no namespace is another one");

    let cid = park(&mut admin);
    target.fence(&export(&target, 2), FenceReason::MapInDoubt);
    assert_eq!(admin.events(), event(cid, NAMESPACE_CHANGED), "by the other policy");
}

#[test]
fn an_event_that_is_masked_is_not_told() {
    let target = ana_and_not();
    let (mut admin, _) = ready(&target);
    admin.respond(set_feature(0x0B, 0x100));
    let cid = park(&mut admin);
    target.fence(&export(&target, 1), FenceReason::MapInDoubt);
    assert_eq!(admin.events(), vec![]);
    admin.respond(set_feature(0x0B, 0x800));
    target.unfence(&export(&target, 1), FenceReason::MapInDoubt);
    assert_eq!(admin.events(), event(cid, ANA_CHANGED));
}

#[test]
fn a_controller_that_was_there_before_ana_goes_on_without() {
    let living = device();
    let spec = |on_fence| NamespaceSpec { on_fence, ..namespace_on(1, Arc::clone(&living)) };
    let target = serving(vec![spec(FencePolicy::NotReady)]);
    let (mut before, cntlid) = ready(&target);
    let mut queue = io_queue(&target, cntlid, 1);
    before.respond(set_feature(0x0B, 0x100));
    let slot = export(&target, 1).slot;
    target.publish(vec![subsystem(vec![spec(FencePolicy::Ana)])], ports()).unwrap();
    assert_ne!(export(&target, 1).slot, slot, "another policy is another namespace");
    let cid = park(&mut before);
    assert_eq!(before.events(), event(cid, NAMESPACE_CHANGED));
    before.data(log(4, 4096, 0, false));

    assert_eq!(before.data(identify(1, 0))[76] & 0b1000, 0);
    assert_eq!(before.status(ana_log(52, 0, 0)), (Status::INVALID_LOG_PAGE, true));
    let cid = park(&mut before);
    target.fence(&export(&target, 1), FenceReason::MapInDoubt);
    assert_eq!(before.events(), event(cid, NAMESPACE_CHANGED));
    assert_eq!(told(&mut queue, io(2, 1, 0, 1)).0, Status::NAMESPACE_NOT_READY);
    assert_eq!(before.data(identify(8, 1))[14], 0, "NRDY");

    let (mut after, _) = ready(&target);
    assert_eq!(after.data(ana_log(52, 0, 0))[32], INACCESSIBLE);
    assert_eq!(after.data(identify(8, 1))[14], 1, "a host has to look, to find it inaccessible");
}

#[test]
fn a_namespace_that_is_pinned_anew_is_accessible_again() {
    let target = serving(vec![with(1, FencePolicy::Ana)]);
    let (mut admin, _) = ready(&target);
    admin.respond(set_feature(0x0B, 0x900));
    target.fence(&export(&target, 1), FenceReason::MapInDoubt);
    let before = admin.data(ana_log(52, 0, 0));
    park(&mut admin);
    admin.events();
    admin.data(ana_log(52, 0, 0));
    // A device of its own makes it another export.
    target.publish(vec![subsystem(vec![with(1, FencePolicy::Ana)])], ports()).unwrap();
    let (first, second) = (park(&mut admin), park(&mut admin));
    let told = [event(first, NAMESPACE_CHANGED), event(second, ANA_CHANGED)].concat();
    assert_eq!(admin.events(), told);
    let after = admin.data(ana_log(52, 0, 0));
    assert_eq!((before[32], after[32]), (INACCESSIBLE, OPTIMIZED));
    assert!(number::<8>(&after, 0) > number::<8>(&before, 0));
    assert_eq!(number::<8>(&after, 24), number::<8>(&after, 0), "its group has changed just now");

    target.publish(vec![subsystem(vec![with(2, FencePolicy::Ana)])], ports()).unwrap();
    admin.data(log(4, 4096, 0, false));
    let cid = park(&mut admin);
    target.publish(vec![subsystem(vec![with(3, FencePolicy::Ana)])], ports()).unwrap();
    assert_eq!(admin.events(), event(cid, NAMESPACE_CHANGED), "what comes and goes is no change of state");
}

#[test]
fn a_write_protected_namespace_refuses_writes_at_once_and_reads_for_now() {
    let target = serving(vec![with(1, FencePolicy::WriteProtect), with(2, FencePolicy::WriteProtect)]);
    let (mut admin, cntlid) = ready(&target);
    let mut queue = io_queue(&target, cntlid, 1);
    admin.respond(set_feature(0x0B, 0x100));
    let protected =
        |admin: &mut Queue| [(0, 99), (8, 8)].map(|(cns, nsattr)| admin.data(identify(cns, 1))[nsattr]);
    assert_eq!(protected(&mut admin), [0, 0]);
    let cid = park(&mut admin);
    target.fence(&export(&target, 1), FenceReason::MapInDoubt);
    assert_eq!(admin.events(), event(cid, NAMESPACE_CHANGED));
    admin.data(log(4, 4096, 0, false));
    assert_eq!(protected(&mut admin), [1, 1], "NSATTR");
    assert_eq!(admin.data(identify(8, 1))[14], 1, "NRDY: hosts look at what is ready only");
    for write in [io(1, 1, 0, 1), io(8, 1, 0, 1), command(0x09, 1, 16, [0, 4, 0])] {
        assert_eq!(told(&mut queue, write), (Status::NAMESPACE_WRITE_PROTECTED, true, 0));
    }
    for other in [io(2, 1, 0, 1), command(0, 1, 0, [0; 3])] {
        assert_eq!(told(&mut queue, other), (Status::NAMESPACE_NOT_READY, false, 0));
    }
    assert!(matches!(queue.begin(io(1, 2, 0, 1)), Begin::Io(_)), "others go on");

    let cid = park(&mut admin);
    target.unfence(&export(&target, 1), FenceReason::MapInDoubt);
    assert_eq!(admin.events(), event(cid, NAMESPACE_CHANGED));
    assert_eq!(protected(&mut admin), [0, 0]);
    assert!(matches!(queue.begin(io(1, 1, 0, 1)), Begin::Io(_)));
}

#[test]
fn hosts_cannot_set_write_protection_themselves() {
    let target = serving(vec![with(1, FencePolicy::WriteProtect)]);
    let (mut admin, _) = ready(&target);
    assert_eq!(admin.data(identify(1, 0))[531], 0, "NWPC");
    let feature = |opcode| command(opcode, 1, 0, [0x84, 1, 0]);
    for opcode in [0x09, 0x0A] {
        assert_eq!(admin.status(feature(opcode)), (Status::INVALID_FIELD, true));
    }
}
