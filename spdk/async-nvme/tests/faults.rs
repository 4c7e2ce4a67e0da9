//! Goal: a broken device never loses or doubles a completion, never gets a buffer reused under it, and never stops the
//! driver past its deadlines. Method: one fault a test, and what exactly becomes of it. `Rig::collect` checks on every
//! buffer that comes back that the model may no longer touch it.

mod common;

use async_nvme::{Clock, Error, IoError, OpKind, Options, State};
use common::{Rig, bytes, op};
use nvme_model::{
    CommandMatch, ControllerOptions, Fault, FaultAction, NamespaceOptions, RegisterFaults, Subsystem,
};
use nvme_spec::{AdminOpcode, NvmOpcode, Status};

const LIMIT_MS: u64 = 60_000;
const RESET: IoError = IoError::Reset { reached_device: true };

/// Four reads, the third of which is struck; returns their results by token.
fn four_reads(rig: &mut Rig, action: FaultAction) -> Vec<Result<u32, IoError>> {
    let mut queue = rig.queue(8);
    rig.model.add_fault(Fault { skip: 2, ..Fault::once(CommandMatch::any_io(), action) });
    for token in 0..4 {
        queue.submit(op(token, OpKind::Read, token, 1, rig.pool.alloc(512))).unwrap();
    }
    let mut done = rig.collect(&mut queue, 4, LIMIT_MS);
    done.sort_by_key(|done| done.token);
    assert!(done.iter().all(|done| done.buf.is_some()), "every buffer comes back");
    assert_eq!(queue.outstanding(), 0);
    // And the queue works (again).
    rig.until(State::Ready, LIMIT_MS);
    while !queue.is_ready() {
        rig.turn();
        queue.poll(rig.clock.now(), 8, &mut Vec::with_capacity(8));
    }
    let read = rig.pool.alloc(512).unwrap();
    assert_eq!(rig.run(&mut queue, op(9, OpKind::Read, 0, 1, Some(read.clone()))), Ok(0));
    assert_eq!(bytes(&read), vec![0; 512], "nobody else writes into the buffer");
    done.into_iter().map(|done| done.result).collect()
}

#[test]
fn late_and_reordered_completions_are_completions() {
    for action in [FaultAction::Delay { steps: 1000 }, FaultAction::Reorder] {
        let mut rig = Rig::ready();
        assert_eq!(four_reads(&mut rig, action), [Ok(0); 4], "{action:?}");
    }
}

#[test]
fn a_status_is_passed_on() {
    let mut rig = Rig::ready();
    let status = Status::UNRECOVERED_READ_ERROR.with_dnr();
    let results = four_reads(&mut rig, FaultAction::Status(status));
    assert_eq!(results, [Ok(0), Ok(0), Err(IoError::Status(status)), Ok(0)]);
}

#[test]
fn a_lost_completion_is_aborted_in_time() {
    let mut rig = Rig::ready();
    let results = four_reads(&mut rig, FaultAction::Drop);
    let aborted = Err(IoError::Status(Status::COMMAND_ABORT_REQUESTED));
    assert_eq!(results, [Ok(0), Ok(0), aborted, Ok(0)]);
    assert!(rig.clock.now().0 < 40_000_000_000, "30 s and a bit");
    assert_eq!(rig.controller.state(), State::Ready, "without a reset");
}

#[test]
fn what_cannot_be_aborted_is_reset() {
    let mut rig = Rig::ready();
    let refused = FaultAction::Status(Status::INTERNAL_ERROR);
    rig.model.add_fault(Fault::always(CommandMatch::admin(AdminOpcode::ABORT.0), refused));
    let results = four_reads(&mut rig, FaultAction::Drop);
    assert_eq!(results, [Ok(0), Ok(0), Err(RESET), Ok(0)]);
    assert!(rig.clock.now().0 < 50_000_000_000);
}

#[test]
fn nonsense_completions_reset_the_controller() {
    let actions = [
        FaultAction::DuplicateCid,
        FaultAction::UnknownCid,
        FaultAction::TornPhaseFirst,
        // The queue's identifier is among what comes late.
        FaultAction::TornResultLast,
        FaultAction::BadSqHead,
        FaultAction::Fatal,
    ];
    for action in actions {
        let mut rig = Rig::ready();
        let results = four_reads(&mut rig, action);
        for (token, result) in results.iter().enumerate() {
            assert!(matches!(result, Ok(0) | Err(RESET)), "{action:?}: {token}: {result:?}");
        }
        assert!(
            results[..2].iter().all(Result::is_ok) || action == FaultAction::Fatal,
            "{action:?}: {results:?}"
        );
        let reset = std::iter::from_fn(|| rig.controller.take_event())
            .any(|event| matches!(event, async_nvme::Event::Resetting(_)));
        assert!(reset, "{action:?}");
    }
}

#[test]
fn operations_that_never_reached_the_device_say_so() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(4);
    rig.model.add_fault(Fault::always(CommandMatch::any_io(), FaultAction::Drop));
    // 1024 blocks are two commands of 512; one of two operations fills all four slots.
    for token in 0..4 {
        let buf = rig.pool.alloc(1024 * 512);
        queue.submit(op(token, OpKind::Read, 0, 1024, buf)).unwrap();
    }
    queue.ring();
    rig.turn();
    rig.model.fail();
    let mut done = rig.collect(&mut queue, 4, LIMIT_MS);
    done.sort_by_key(|done| done.token);
    let reached: Vec<_> = done.iter().map(|done| done.result).collect();
    let unreached = Err(IoError::Reset { reached_device: false });
    assert_eq!(reached, [Err(RESET), Err(RESET), unreached, unreached]);
}

#[test]
fn removal_ends_everything_at_once() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(8);
    rig.model.add_fault(Fault { skip: 1, ..Fault::once(CommandMatch::any_io(), FaultAction::Vanish) });
    for token in 0..4 {
        queue.submit(op(token, OpKind::Read, 0, 1, rig.pool.alloc(512))).unwrap();
    }
    let done = rig.collect(&mut queue, 4, 1000);
    assert!(done.iter().all(|done| done.buf.is_some() && matches!(done.result, Ok(0) | Err(IoError::Gone))));
    assert_eq!(rig.controller.state(), State::Removed);
    assert!(matches!(rig.controller.failure(), Some(Error::Gone { .. })));
    assert!(queue.is_gone());
}

#[test]
fn a_device_that_cannot_be_stopped_keeps_its_buffers() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(8);
    rig.model.add_fault(Fault::always(CommandMatch::io(NvmOpcode::READ.0), FaultAction::Drop));
    rig.model.set_register_faults(RegisterFaults {
        never_disabled: true,
        function_reset_fails: true,
        revoke_fails: true,
        ..RegisterFaults::default()
    });
    let free = rig.pool.bytes_free();
    queue.submit(op(1, OpKind::Read, 0, 1, rig.pool.alloc(512))).unwrap();
    queue.ring();
    rig.turn();
    rig.controller.reset();
    let done = rig.collect(&mut queue, 1, LIMIT_MS).remove(0);
    assert_eq!(done.result, Err(IoError::Stranded));
    assert!(done.buf.is_none());
    drop((done, queue));
    assert_eq!(rig.controller.state(), State::Failed);
    assert_eq!(rig.pool.bytes_free(), free - 4096, "the buffer is never handed out again");
}

#[test]
fn a_device_that_does_not_stop_is_reset_from_outside_or_cut_off() {
    for (function_reset_fails, end) in [(false, State::Ready), (true, State::Failed)] {
        let mut rig = Rig::ready();
        let mut queue = rig.queue(8);
        rig.model.add_fault(Fault::once(CommandMatch::any_io(), FaultAction::Drop));
        let stuck =
            RegisterFaults { never_disabled: true, function_reset_fails, ..RegisterFaults::default() };
        rig.model.set_register_faults(stuck);
        queue.submit(op(1, OpKind::Read, 0, 1, rig.pool.alloc(512))).unwrap();
        queue.ring();
        rig.turn();
        rig.controller.reset();
        // CAP.TO is 10 s; until then nothing comes back.
        for _ in 0..9_000 {
            rig.turn();
        }
        let mut early = Vec::with_capacity(1);
        assert_eq!(queue.poll(rig.clock.now(), 1, &mut early), 0, "the device may still write");
        rig.until(end, LIMIT_MS);
        let mut done = Vec::with_capacity(1);
        assert_eq!(queue.poll(rig.clock.now(), 1, &mut done), 1);
        assert!(done[0].buf.is_some());
        assert_eq!(done[0].result, Err(if function_reset_fails { IoError::Gone } else { RESET }));
    }
}

#[test]
fn a_controller_that_does_not_start_is_given_up_by_its_deadlines() {
    let cases = [
        RegisterFaults { never_ready: true, ..RegisterFaults::default() },
        RegisterFaults { fatal_on_enable: true, ..RegisterFaults::default() },
    ];
    for faults in cases {
        let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 8), ControllerOptions::default());
        rig.model.set_register_faults(faults);
        let error = rig.start().unwrap_err();
        assert!(matches!(error, Error::Late { limit_ms: 10_000, .. } | Error::Fatal { .. }), "{error}");
        assert!(rig.clock.now().0 < 60_000_000_000, "four tries of at most 10 s");
        // What is mended can be driven by a new controller.
        rig.model.clear_faults();
        let mut again = Rig::over(&rig.subsystem, ControllerOptions::default(), Options::default());
        again.start().unwrap();
    }
}

#[test]
fn a_controller_that_asks_for_hours_is_not_waited_for() {
    let options = ControllerOptions { crwmt_500ms: u16::MAX, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 8), options);
    rig.model.set_register_faults(RegisterFaults { never_ready: true, ..RegisterFaults::default() });
    let error = rig.start().unwrap_err();
    assert!(matches!(error, Error::Late { limit_ms: 300_000, .. }), "{error}");
}

#[test]
fn a_silent_or_refusing_admin_queue_is_given_up() {
    for opcode in [AdminOpcode::IDENTIFY, AdminOpcode::SET_FEATURES] {
        for action in [FaultAction::Drop, FaultAction::UnknownCid, FaultAction::DuplicateCid] {
            let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 8), ControllerOptions::default());
            rig.model.add_fault(Fault::always(CommandMatch::admin(opcode.0), action));
            let error = rig.start().unwrap_err();
            assert!(matches!(error, Error::Timeout { .. } | Error::Violation { .. }), "{error}");
            assert!(rig.clock.now().0 < 60_000_000_000);
        }
    }
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 8), ControllerOptions::default());
    let refused = FaultAction::Status(Status::INVALID_FIELD);
    rig.model.add_fault(Fault::always(CommandMatch::admin(AdminOpcode::IDENTIFY.0), refused));
    assert!(matches!(rig.start().unwrap_err(), Error::Status { command: "Identify Controller", .. }));
}

#[test]
fn a_single_fault_at_start_is_survived() {
    let actions =
        [FaultAction::Drop, FaultAction::UnknownCid, FaultAction::Fatal, FaultAction::TornPhaseFirst];
    for action in actions {
        let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 8), ControllerOptions::default());
        rig.model.add_fault(Fault::once(CommandMatch::admin(AdminOpcode::IDENTIFY.0), action));
        rig.start().unwrap();
        assert_eq!(rig.controller.namespaces().len(), 1, "{action:?}");
    }
}

#[test]
fn a_queue_that_is_refused_says_why() {
    let mut rig = Rig::ready();
    let refused = FaultAction::Status(Status::INVALID_QUEUE_SIZE);
    rig.model.add_fault(Fault::once(CommandMatch::admin(AdminOpcode::CREATE_IO_SQ.0), refused));
    let queue = rig.controller.queue_ticket(1, 8).unwrap().open(&rig.pool).unwrap();
    (0..50).for_each(|_| rig.turn());
    assert!(queue.is_gone());
    assert_eq!(queue.refused_with(), Some(Status::INVALID_QUEUE_SIZE));
    drop(queue);
    (0..50).for_each(|_| rig.turn());
    assert!(rig.queue(8).is_ready(), "the half that was made is gone");
}

#[test]
fn a_queue_dropped_under_io_keeps_the_buffers_from_reuse() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(8);
    rig.model.add_fault(Fault::always(CommandMatch::any_io(), FaultAction::Drop));
    let free = rig.pool.bytes_free();
    queue.submit(op(1, OpKind::Read, 0, 1, rig.pool.alloc(512))).unwrap();
    queue.ring();
    rig.turn();
    drop(queue);
    assert_eq!(rig.pool.bytes_free(), free - 4096);
    (0..50).for_each(|_| rig.turn());
    rig.model.clear_faults();
    let mut next = rig.queue(8);
    assert_eq!(rig.run(&mut next, op(2, OpKind::Flush, 0, 0, None)), Ok(0));
}

#[test]
fn a_removed_device_can_be_driven_again_when_it_is_back() {
    let mut rig = Rig::ready();
    rig.model.vanish();
    rig.until(State::Removed, 1000);
    rig.model.plug_in();
    let mut controller =
        async_nvme::Controller::new(rig.model.clone(), Options::default(), rig.clock.clone()).unwrap();
    std::mem::swap(&mut rig.controller, &mut controller);
    rig.start().unwrap();
    let mut queue = rig.queue(4);
    assert_eq!(rig.run(&mut queue, op(1, OpKind::Flush, 0, 0, None)), Ok(0));
}

#[test]
fn a_device_that_is_not_there_is_told_at_once() {
    let subsystem = Subsystem::new("NONE");
    let model = subsystem.controller(ControllerOptions::default());
    model.vanish();
    let clock = std::sync::Arc::new(async_nvme::ManualClock::default());
    let error = async_nvme::Controller::new(model, Options::default(), clock).unwrap_err();
    assert!(matches!(error, Error::Gone { .. }));
}
