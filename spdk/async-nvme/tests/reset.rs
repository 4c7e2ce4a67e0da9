//! Goal: what a reset does not end is exactly what is safe to do twice, and a controller that was over can be driven again.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nvme::{
    Access as _, Arm, Clock, Controller, Done, Error, Event, IoError, OpKind, Options, RawCommand, Requeue,
    State, SystemClock, block_on, quiesce,
};
use common::{Rig, bytes, op};
use nvme_model::{
    CommandMatch, ControllerOptions, Fault, FaultAction, NamespaceOptions, RegisterFaults, Subsystem,
};
use nvme_spec::NvmOpcode;
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};

const WRITE: OpKind = OpKind::Write { fua: false };
const LIMIT_MS: u64 = 120_000;
const REACHED: Result<u32, IoError> = Err(IoError::Reset { reached_device: true });

fn rig(requeue: Requeue) -> Rig {
    let subsystem = Subsystem::new("REQUEUE");
    subsystem.add_namespace(NamespaceOptions::memory(1, 9, 1024)).unwrap();
    let (io_timeout, abort_grace) = (Duration::from_secs(2), Duration::from_secs(1));
    let driver = Options { requeue, io_timeout, abort_grace, ..Options::default() };
    let mut rig = Rig::over(&subsystem, ControllerOptions::default(), driver);
    rig.start().unwrap();
    rig
}

fn every_kind(rig: &Rig) -> Vec<(OpKind, Option<hugepage_alloc::DmaBuf>)> {
    let raw = RawCommand { opcode: NvmOpcode::READ.0, cdw10_15: [0; 6] };
    vec![
        (OpKind::Read, rig.pool.alloc(512)),
        (OpKind::Compare, Some(rig.filled(512, 0))),
        (OpKind::Verify, None),
        (OpKind::Flush, None),
        (WRITE, Some(rig.filled(512, 7))),
        (OpKind::WriteZeroes { deallocate: false, fua: false }, None),
        (OpKind::Deallocate, None),
        (OpKind::Copy { to: 500, fua: false }, None),
        (OpKind::Raw(raw), rig.pool.alloc(512)),
    ]
}

fn ready_again(rig: &mut Rig, queue: &mut async_nvme::IoQueue) {
    for _ in 0..LIMIT_MS {
        if queue.is_ready() {
            return;
        }
        rig.turn();
        assert_eq!(queue.poll(rig.clock.now(), 1, &mut Vec::with_capacity(1)), 0);
    }
    panic!("{:?}: {:?}, {:?}", rig.controller.state(), rig.controller.failure(), queue.stats());
}

fn by_token(mut done: Vec<Done>) -> Vec<Result<u32, IoError>> {
    done.sort_by_key(|done| done.token);
    done.into_iter().map(|done| done.result).collect()
}

#[test]
fn a_reset_ends_what_the_policy_does_not_keep() {
    for (policy, kept) in [(Requeue::Nothing, 0), (Requeue::Harmless, 4), (Requeue::Idempotent, 7)] {
        let mut rig = rig(policy);
        let mut queue = rig.queue(16);
        rig.model.add_fault(Fault { times: 9, ..Fault::always(CommandMatch::any_io(), FaultAction::Drop) });
        for (token, (kind, buf)) in (0..).zip(every_kind(&rig)) {
            queue.submit(op(token, kind, token * 8, 1, buf)).unwrap();
        }
        queue.ring();
        rig.turn();
        rig.controller.reset();
        let results = by_token(rig.collect(&mut queue, 9, LIMIT_MS));
        for (token, result) in results.iter().enumerate() {
            let expected = if token < kept { Ok(0) } else { REACHED };
            assert_eq!(*result, expected, "{policy:?}: {token}");
        }
        assert_eq!(queue.stats().requeued, kept as u64);
        // All of them once, and those that were kept once more.
        assert_eq!(queue.stats().commands, 9 + kept as u64);
    }
}

#[test]
fn what_was_never_given_to_the_device_is_kept_whatever_it_is() {
    let mut rig = rig(Requeue::Harmless);
    let mut queue = rig.queue(2);
    rig.model.add_fault(Fault { times: 2, ..Fault::always(CommandMatch::any_io(), FaultAction::Drop) });
    // Two pieces fill both slots; the write waits.
    queue.submit(op(0, OpKind::Read, 0, 1024, rig.pool.alloc(1024 * 512))).unwrap();
    let data = rig.filled(512, 9);
    queue.submit(op(1, WRITE, 5, 1, Some(data))).unwrap();
    queue.ring();
    rig.turn();
    rig.controller.reset();
    assert_eq!(by_token(rig.collect(&mut queue, 2, LIMIT_MS)), [Ok(0), Ok(0)]);
    let read = rig.pool.alloc(512).unwrap();
    assert_eq!(rig.run(&mut queue, op(2, OpKind::Read, 5, 1, Some(read.clone()))), Ok(0));
    assert_eq!(bytes(&read), [9; 512]);
}

#[test]
fn a_write_that_was_overwritten_and_acknowledged_is_not_repeated() {
    // Which later operation, and whether it is one that the open write must not follow.
    let raw = RawCommand { opcode: NvmOpcode::WRITE.0, cdw10_15: [900, 0, 0, 0, 0, 0] };
    let cases = [
        (WRITE, 10, true),
        (WRITE, 11, true),
        (WRITE, 12, false),
        (OpKind::Deallocate, 10, true),
        (OpKind::Copy { to: 11, fua: false }, 100, true),
        (OpKind::Copy { to: 100, fua: false }, 10, false),
        (OpKind::Read, 10, false),
        (OpKind::Raw(raw), 900, true),
    ];
    for (kind, lba, conflicts) in cases {
        let mut rig = rig(Requeue::Idempotent);
        let mut queue = rig.queue(4);
        // An older write to the same blocks does not matter.
        let buf = rig.filled(1024, 1);
        assert_eq!(rig.run(&mut queue, op(0, WRITE, 10, 2, Some(buf))), Ok(0));
        rig.model.add_fault(Fault::once(CommandMatch::any_io(), FaultAction::Drop));
        let first = rig.filled(1024, 2);
        queue.submit(op(1, WRITE, 10, 2, Some(first))).unwrap();
        queue.ring();
        rig.turn();
        let later = rig.filled(512, 3);
        assert_eq!(rig.run(&mut queue, op(2, kind, lba, 1, Some(later))), Ok(0));
        rig.controller.reset();
        let done = rig.collect(&mut queue, 1, LIMIT_MS).remove(0);
        assert_eq!(done.result, if conflicts { REACHED } else { Ok(0) }, "{kind:?} at {lba}");
        if (kind, conflicts) == (WRITE, true) {
            ready_again(&mut rig, &mut queue);
            let read = rig.pool.alloc(512).unwrap();
            assert_eq!(rig.run(&mut queue, op(3, OpKind::Read, lba, 1, Some(read.clone()))), Ok(0));
            assert_eq!(bytes(&read), [3; 512], "what was acknowledged stands");
        }
    }
}

#[test]
fn nothing_is_given_anew_twice() {
    let mut rig = rig(Requeue::Idempotent);
    let mut queue = rig.queue(4);
    // It brings the controller down each time.
    rig.model.add_fault(Fault::always(CommandMatch::io(NvmOpcode::VERIFY.0), FaultAction::Fatal));
    queue.submit(op(1, OpKind::Verify, 0, 1, None)).unwrap();
    let done = rig.collect(&mut queue, 1, LIMIT_MS).remove(0);
    assert_eq!(done.result, REACHED);
    assert_eq!(queue.stats().commands, 2);
    rig.until(State::Ready, LIMIT_MS);
}

#[test]
fn what_was_late_is_not_given_anew() {
    let mut rig = rig(Requeue::Idempotent);
    let mut queue = rig.queue(4);
    let refused = FaultAction::Status(nvme_spec::Status::INTERNAL_ERROR);
    rig.model.add_fault(Fault::always(CommandMatch::admin(nvme_spec::AdminOpcode::ABORT.0), refused));
    rig.model.add_fault(Fault::once(CommandMatch::any_io(), FaultAction::Drop));
    queue.submit(op(1, OpKind::Read, 0, 1, rig.pool.alloc(512))).unwrap();
    queue.submit(op(2, OpKind::Read, 0, 1, rig.pool.alloc(512))).unwrap();
    let results = by_token(rig.collect(&mut queue, 2, LIMIT_MS));
    assert_eq!(results, [REACHED, Ok(0)]);
}

#[test]
fn completions_written_before_the_reset_are_results() {
    let mut rig = rig(Requeue::Nothing);
    let mut queue = rig.queue(4);
    rig.model.add_fault(Fault { skip: 2, ..Fault::once(CommandMatch::any_io(), FaultAction::Drop) });
    for token in 0..3 {
        queue.submit(op(token, WRITE, token, 1, Some(rig.filled(512, 4)))).unwrap();
    }
    queue.ring();
    rig.model.step();
    // Nobody has polled yet.
    rig.controller.reset();
    assert_eq!(by_token(rig.collect(&mut queue, 3, LIMIT_MS)), [Ok(0), Ok(0), REACHED]);
}

#[test]
fn what_was_kept_fails_when_the_device_does_not_come_back() {
    let mut rig = rig(Requeue::Idempotent);
    let mut queue = rig.queue(4);
    rig.model.add_fault(Fault::always(CommandMatch::any_io(), FaultAction::Drop));
    queue.submit(op(1, OpKind::Read, 0, 1, rig.pool.alloc(512))).unwrap();
    queue.ring();
    rig.turn();
    rig.controller.reset();
    let mut done = Vec::with_capacity(1);
    while queue.stats().resets == 0 {
        rig.turn();
        queue.poll(rig.clock.now(), 1, &mut done);
    }
    assert!(done.is_empty() && queue.outstanding() == 1, "it waits for the device");
    rig.model.vanish();
    let done = rig.collect(&mut queue, 1, 1000).remove(0);
    assert_eq!(done.result, Err(IoError::Gone));
    assert!(done.buf.is_some());
}

#[test]
fn a_device_that_reads_as_zeros_is_gone_at_the_next_look() {
    let mut rig = rig(Requeue::Idempotent);
    let mut queue = rig.queue(4);
    rig.model.set_register_faults(RegisterFaults { reads_zeros: true, ..RegisterFaults::default() });
    rig.until(State::Removed, 200);
    assert!(matches!(rig.controller.failure(), Some(Error::Gone { .. })));
    assert!(matches!(rig.controller.restart(), Err(Error::Gone { .. })), "it is still gone");
    rig.model.set_register_faults(RegisterFaults::default());
    rig.controller.restart().unwrap();
    rig.until(State::Ready, LIMIT_MS);
    assert!(queue.is_gone());
    queue = rig.queue(4);
    let read = rig.pool.alloc(512);
    assert_eq!(rig.run(&mut queue, op(1, OpKind::Read, 3, 1, read)), Ok(0));
}

#[test]
fn a_reset_behind_the_drivers_back_is_noticed_at_the_next_look() {
    let mut rig = rig(Requeue::Idempotent);
    let mut queue = rig.queue(4);
    let data = rig.filled(512, 0x42);
    assert_eq!(rig.run(&mut queue, op(1, WRITE, 3, 1, Some(data))), Ok(0));
    while rig.controller.take_event().is_some() {}
    rig.model.function_reset().unwrap();
    let read = rig.pool.alloc(512).unwrap();
    queue.submit(op(2, OpKind::Read, 3, 1, Some(read.clone()))).unwrap();
    queue.ring();
    let event = (0..200).find_map(|_| {
        rig.turn();
        rig.controller.take_event()
    });
    assert!(matches!(event, Some(Event::Resetting(Error::Disabled { .. }))), "{event:?}");
    // Far below the time-out of a command.
    let done = rig.collect(&mut queue, 1, 2000).remove(0);
    assert_eq!(done.result, Ok(0));
    assert_eq!(bytes(&read), [0x42; 512]);
}

#[test]
fn what_a_user_left_that_is_gone_is_never_executed_once_the_controller_is_quiet() {
    for enabled in [true, false] {
        let mut rig = rig(Requeue::Nothing);
        let mut queue = rig.queue(4);
        let (matches, action) =
            (CommandMatch::io(NvmOpcode::WRITE.0), FaultAction::Delay { steps: 1_000_000_000 });
        rig.model.add_fault(Fault { matches, action, skip: 0, times: 1 });
        let data = rig.filled(512, 0x42);
        queue.submit(op(1, WRITE, 3, 1, Some(data.clone()))).unwrap();
        queue.ring();
        rig.turn();
        assert!(rig.model.may_touch(&data), "the controller has it");
        if !enabled {
            rig.model.function_reset().unwrap();
        }
        let thread = rig.model.spawn().unwrap();
        quiesce(&*rig.model).unwrap();
        assert!(!rig.model.may_touch(&data));
        drop(thread);
        let done = rig.collect(&mut queue, 1, LIMIT_MS).remove(0);
        assert_eq!(done.result, REACHED);
        ready_again(&mut rig, &mut queue);
        let read = rig.pool.alloc(512).unwrap();
        assert_eq!(rig.run(&mut queue, op(2, OpKind::Read, 3, 1, Some(read.clone()))), Ok(0));
        assert_eq!(bytes(&read), [0; 512]);
    }
}

#[test]
fn a_controller_that_does_not_stop_or_is_gone_is_told() {
    let subsystem = Subsystem::new("STUCK");
    let options = ControllerOptions { timeout_500ms: 1, ..ControllerOptions::default() };
    let mut rig = Rig::over(&subsystem, options, Options::default());
    rig.start().unwrap();
    let stuck =
        RegisterFaults { never_disabled: true, function_reset_fails: true, ..RegisterFaults::default() };
    rig.model.set_register_faults(stuck);
    let thread = rig.model.spawn().unwrap();
    assert!(matches!(quiesce(&*rig.model), Err(Error::Late { .. })));
    rig.model.set_register_faults(RegisterFaults { never_disabled: true, ..RegisterFaults::default() });
    quiesce(&*rig.model).expect("from outside");
    drop(thread);
    for zeros in [true, false] {
        rig.model.set_register_faults(RegisterFaults { reads_zeros: zeros, ..RegisterFaults::default() });
        if !zeros {
            rig.model.vanish();
        }
        assert!(matches!(quiesce(&*rig.model), Err(Error::Gone { .. })));
    }
}

#[test]
fn a_device_that_is_back_is_driven_again_by_the_same_controller() {
    let mut rig = rig(Requeue::Idempotent);
    let mut queue = rig.queue(4);
    assert!(rig.controller.restart().is_err(), "it is not over");
    let data = rig.filled(512, 0x42);
    assert_eq!(rig.run(&mut queue, op(1, WRITE, 3, 1, Some(data))), Ok(0));
    for round in 0..5 {
        rig.model.vanish();
        rig.until(State::Removed, 1000);
        assert!(matches!(rig.controller.restart(), Err(Error::Gone { .. })), "it is still gone");
        // While it was away a namespace appeared.
        rig.subsystem.add_namespace(NamespaceOptions::memory(2 + round, 12, 8)).unwrap();
        rig.model.plug_in();
        rig.controller.restart().unwrap();
        rig.until(State::Ready, LIMIT_MS);
        assert_eq!(rig.controller.namespaces().len(), 2 + round as usize);
        assert!(rig.controller.failure().is_none());
        assert!(queue.is_gone(), "queue pairs of before do not come back");
        queue = rig.queue(4);
        let read = rig.pool.alloc(512).unwrap();
        assert_eq!(rig.run(&mut queue, op(2, OpKind::Read, 3, 1, Some(read.clone()))), Ok(0));
        assert_eq!(bytes(&read), [0x42; 512]);
    }
}

#[test]
fn a_controller_that_was_shut_down_or_failed_is_started_anew() {
    let mut rig = rig(Requeue::Nothing);
    rig.controller.begin_shutdown();
    rig.until(State::Stopped, LIMIT_MS);
    assert!(rig.controller.queue_ticket(1, 4).is_err());
    rig.controller.restart().unwrap();
    rig.until(State::Ready, LIMIT_MS);
    let faults = RegisterFaults { never_ready: true, ..Default::default() };
    rig.model.set_register_faults(faults);
    rig.controller.reset();
    rig.until(State::Failed, LIMIT_MS);
    rig.model.clear_faults();
    rig.controller.restart().unwrap();
    rig.until(State::Ready, LIMIT_MS);
    let mut queue = rig.queue(4);
    assert_eq!(rig.run(&mut queue, op(1, OpKind::Flush, 0, 0, None)), Ok(0));
}

#[test]
fn a_ticket_of_a_controller_that_is_over_opens_nothing() {
    let mut rig = rig(Requeue::Nothing);
    let ticket = rig.controller.queue_ticket(1, 4).unwrap();
    rig.model.vanish();
    rig.until(State::Removed, 1000);
    assert!(matches!(ticket.open(&rig.pool), Err(Error::NotReady { .. })));
}

#[test]
fn a_reset_at_any_moment_costs_nothing_for_ever() {
    let mut rig = rig(Requeue::Nothing);
    let mut queue = rig.queue(4);
    for turns in 0..300 {
        // Half way through the start, the creation of the queue pair, a rescan: whatever is under way.
        rig.controller.reset();
        for _ in 0..turns % 40 {
            rig.turn();
            queue.poll(rig.clock.now(), 1, &mut Vec::with_capacity(1));
        }
        if turns % 7 == 0 {
            rig.subsystem.add_namespace(NamespaceOptions::memory(2, 9, 8 + turns)).unwrap();
        }
    }
    ready_again(&mut rig, &mut queue);
    rig.until(State::Ready, LIMIT_MS);
    let keep_alive = async_nvme::AdminCommand { opcode: 0x18, ..async_nvme::AdminCommand::default() };
    let free = std::iter::from_fn(|| rig.controller.submit_admin(&keep_alive).ok()).count();
    assert!(free >= 15, "{free} admin commands are left");
}

/// Writes and reads back, 800 times and until it lived through ten resets, however little processor time whoever
/// resets is given beside it.
fn work_through_resets(ticket: async_nvme::QueueTicket, clock: &dyn Clock) {
    let pool = common::pool();
    let mut queue = ticket.open(&pool).unwrap();
    let mut done = Vec::with_capacity(4);
    for round in 0.. {
        if round >= 800 && queue.stats().resets >= 10 {
            break;
        }
        let byte = u8::try_from(round % 251).unwrap();
        let buf = pool.alloc(512).unwrap();
        buf.write_from(0, &[byte; 512]);
        for kind in [WRITE, OpKind::Read] {
            loop {
                if let Err(refused) = queue.submit(op(round, kind, round % 64, 1, Some(buf.clone()))) {
                    assert_eq!(refused.why, async_nvme::RefusedWhy::NotReady);
                    queue.poll(clock.now(), 4, &mut done);
                    std::thread::yield_now();
                    continue;
                }
                queue.ring();
                while queue.poll(clock.now(), 4, &mut done) == 0 {
                    if let Arm::Sleep { .. } = queue.arm().unwrap() {
                        let eventfd = queue.interrupt().unwrap();
                        let limit = Duration::from_secs(20).try_into().unwrap();
                        let woken = poll(&mut [PollFd::new(&eventfd, PollFlags::IN)], Some(&limit)).unwrap();
                        assert_eq!(woken, 1, "neither its completion nor the reset woke it");
                    }
                }
                match done.remove(0).result {
                    Ok(_) => break,
                    Err(error) => assert!(matches!(error, IoError::Reset { .. }), "{error}"),
                }
            }
            if kind == WRITE {
                buf.zero();
            }
        }
        assert_eq!(bytes(&buf), [byte; 512]);
    }
}

#[test]
fn resets_from_another_thread_lose_and_double_nothing() {
    for shadow_doorbells in [false, true] {
        let subsystem = Subsystem::new("RESETS");
        subsystem.add_namespace(NamespaceOptions::memory(1, 9, 64)).unwrap();
        let model =
            subsystem.controller(ControllerOptions { shadow_doorbells, ..ControllerOptions::default() });
        let _running = model.spawn().unwrap();
        let clock = Arc::new(SystemClock::default());
        let options = Options { requeue: Requeue::Idempotent, interrupts: true, ..Options::default() };
        let mut controller = Controller::new(model, options, clock.clone()).unwrap();
        block_on(controller.ready(), || ()).unwrap();
        let ticket = controller.queue_ticket(1, 4).unwrap().with_interrupt().unwrap();
        let worker = std::thread::spawn(move || work_through_resets(ticket, &*clock));
        let begun = Instant::now();
        let mut next = Duration::ZERO;
        // Not for ever: on a busy machine they would leave no time for anything else.
        let mut left = 60;
        while !worker.is_finished() {
            assert!(
                begun.elapsed() < Duration::from_secs(120),
                "the worker does not get through, or sees no resets"
            );
            if controller.poll() == State::Ready && left > 0 && begun.elapsed() > next {
                left -= 1;
                controller.reset();
                next = begun.elapsed() + Duration::from_millis(2);
            }
            assert!(!controller.is_over(), "{:?}", controller.failure());
            std::thread::yield_now();
        }
        worker.join().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: with one write to a block at a time, resets at any moment leave what the writes left.
    #[test]
    fn resets_under_load_lose_and_double_nothing(
        seed in any::<u64>(), steps in proptest::collection::vec((0..64u64, 1..9u64, any::<u8>(), 0..5u8), 1..80),
    ) {
        let mut rig = rig(Requeue::Idempotent);
        let mut queue = rig.queue(4);
        rig.model.set_random_faults(Some(nvme_model::RandomFaults {
            seed,
            per_mille: 200,
            matches: CommandMatch::any_io(),
            actions: vec![FaultAction::Drop, FaultAction::Fatal, FaultAction::DuplicateCid, FaultAction::Reorder],
        }));
        let mut array = [0u8; 80];
        for (lba, blocks, byte, what) in steps {
            if what == 4 {
                rig.controller.reset();
            }
            // Settle the count of resets in a row.
            ready_again(&mut rig, &mut queue);
            rig.clock.advance(Duration::from_secs(61));
            let buf = rig.filled(usize::try_from(blocks * 512).unwrap(), byte);
            let range = usize::try_from(lba).unwrap()..usize::try_from(lba + blocks).unwrap();
            let kind = if what < 2 { WRITE } else { OpKind::Read };
            queue.submit(op(0, kind, lba, blocks, Some(buf.clone()))).unwrap();
            let result = rig.collect(&mut queue, 1, LIMIT_MS).remove(0).result;
            match (kind, result) {
                (OpKind::Read, Ok(_)) => {
                    let blocks = bytes(&buf);
                    for (block, expected) in blocks.chunks(512).zip(&array[range]) {
                        prop_assert!(block.iter().all(|byte| byte == expected));
                    }
                }
                // What came to nothing may have been executed or not; it is done again.
                (OpKind::Write { .. }, Ok(_)) => array[range].fill(byte),
                (OpKind::Write { .. }, Err(_)) => {
                    rig.model.set_random_faults(None);
                    ready_again(&mut rig, &mut queue);
                    prop_assert_eq!(rig.run(&mut queue, op(0, WRITE, lba, blocks, Some(buf))), Ok(0));
                    array[range].fill(byte);
                }
                _ => {}
            }
        }
    }
}
