//! Goal: shadow doorbells and interrupts spare work, and never lose any of it. The model looks at nothing while it sleeps,
//! so that a doorbell or a wake-up that is missing shows as a test that does not end.

mod common;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nvme::{
    Arm, Clock, Controller, Error, IoQueue, Moment, OpKind, Options, State, SystemClock, block_on,
};
use common::{Rig, bytes, op};
use nvme_model::{
    CommandMatch, ControllerOptions, Fault, FaultAction, NamespaceOptions, RegisterFaults, Subsystem,
};
use nvme_spec::AdminOpcode;
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};

const WRITE: OpKind = OpKind::Write { fua: false };

fn shadowed(dstrd: u8) -> Rig {
    let options = ControllerOptions { shadow_doorbells: true, dstrd, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 1024), options);
    rig.start().unwrap();
    rig
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    wait(fd, Some(Duration::ZERO))
}

/// Whether it became readable in time.
fn wait(fd: BorrowedFd<'_>, limit: Option<Duration>) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let limit = limit.map(|limit| limit.try_into().unwrap());
    poll(&mut fds, limit.as_ref()).unwrap() > 0
}

#[test]
fn a_busy_controller_needs_few_doorbells() {
    let mut rig = shadowed(0);
    let mut queue = rig.queue(64);
    let mut done = Vec::with_capacity(64);
    let mut submitted = 0u64;
    // Never empty: the controller always finds more by itself.
    while submitted < 2000 {
        while queue.outstanding() < 32 {
            queue.submit(op(submitted, OpKind::Verify, submitted % 1024, 1, None)).unwrap();
            submitted += 1;
            queue.ring();
        }
        rig.model.step();
        queue.poll(rig.clock.now(), 16, &mut done);
        done.clear();
    }
    let left = queue.outstanding();
    assert_eq!(rig.collect(&mut queue, left, 1000).len(), left);
    assert!(
        queue.stats().doorbells < 200,
        "{} doorbells for {submitted} operations",
        queue.stats().doorbells
    );
}

#[test]
fn shadow_doorbells_live_through_resets() {
    for dstrd in [0, 2] {
        let mut rig = shadowed(dstrd);
        let mut queue = rig.queue(3);
        let mut other = rig.queue(5);
        for round in 0..4u64 {
            for token in 0..50 {
                let buf = rig.filled(512, u8::try_from(token + round).unwrap());
                assert_eq!(rig.run(&mut queue, op(token, WRITE, token, 1, Some(buf))), Ok(0));
                assert_eq!(rig.run(&mut other, op(token, OpKind::Flush, 0, 0, None)), Ok(0));
            }
            if round == 2 {
                // From now on the controller does not grant them any more, and registers it is.
                let refused = FaultAction::Status(nvme_spec::Status::INTERNAL_ERROR);
                let matches = CommandMatch::admin(AdminOpcode::DOORBELL_BUFFER_CONFIG.0);
                rig.model.add_fault(Fault::always(matches, refused));
            }
            rig.controller.reset();
            rig.turn();
            rig.until(State::Ready, 60_000);
            let mut none = Vec::with_capacity(1);
            while !queue.is_ready() || !other.is_ready() {
                rig.turn();
                queue.poll(rig.clock.now(), 1, &mut none);
                other.poll(rig.clock.now(), 1, &mut none);
            }
        }
        let doorbells = other.stats().doorbells;
        assert_eq!(rig.run(&mut other, op(0, OpKind::Flush, 0, 0, None)), Ok(0));
        assert_eq!(other.stats().doorbells, doorbells + 1);
    }
}

#[test]
fn a_queue_pair_takes_nothing_over_from_the_one_before() {
    let mut rig = shadowed(0);
    for _ in 0..5 {
        // The same identifier each time, with the values of the former one in the shadow page.
        let mut queue = rig.queue(6);
        for token in 0..9 {
            assert_eq!(rig.run(&mut queue, op(token, OpKind::Flush, 0, 0, None)), Ok(0));
        }
        drop(queue);
        (0..20).for_each(|_| rig.turn());
    }
}

#[test]
fn a_wrong_event_index_ends_by_the_deadlines() {
    let mut rig = shadowed(0);
    let mut queue = rig.queue(32);
    rig.model.set_register_faults(RegisterFaults { event_idx_wrong: true, ..RegisterFaults::default() });
    let mut done = Vec::with_capacity(32);
    for token in 0..200 {
        // The first doorbell after a reset is always rung; later ones may be held back for too long.
        while queue.submit(op(token, OpKind::Flush, 0, 0, None)).is_err() {
            rig.turn();
            queue.poll(rig.clock.now(), 32, &mut done);
            if queue.is_gone() {
                break;
            }
        }
        queue.ring();
        for _ in 0..3 {
            rig.turn();
            queue.poll(rig.clock.now(), 32, &mut done);
        }
        done.clear();
    }
    for _ in 0..200_000 {
        if queue.outstanding() == 0 {
            return;
        }
        rig.turn();
        done.clear();
        queue.poll(rig.clock.now(), 32, &mut done);
    }
    panic!("{} operations are open after 200 s", queue.outstanding());
}

#[test]
fn a_completion_between_the_last_poll_and_sleep_is_not_missed() {
    let mut rig = Rig::ready();
    let ticket = rig.controller.queue_ticket(1, 8).unwrap().with_interrupt().unwrap();
    let mut queue = rig.opened(ticket);
    let mut done = Vec::with_capacity(8);
    assert_eq!(queue.arm().unwrap(), Arm::Sleep { until: None }, "nothing is open");
    // After the look: it rings.
    queue.submit(op(1, OpKind::Flush, 0, 0, None)).unwrap();
    assert_eq!(queue.arm().unwrap(), Arm::Busy, "the doorbell is not rung");
    queue.ring();
    assert_eq!(queue.poll(rig.clock.now(), 8, &mut done), 0);
    let Arm::Sleep { until: Some(until) } = queue.arm().unwrap() else { panic!("there is nothing yet") };
    assert!(until > rig.clock.now(), "commands that are late are looked for");
    assert!(!is_readable(queue.interrupt().unwrap()));
    rig.model.step();
    assert!(is_readable(queue.interrupt().unwrap()));
    queue.disarm();
    assert!(!is_readable(queue.interrupt().unwrap()));
    assert_eq!(queue.poll(rig.clock.now(), 8, &mut done), 1);
    // Between the last poll and the look: Busy.
    queue.submit(op(2, OpKind::Flush, 0, 0, None)).unwrap();
    queue.ring();
    assert_eq!(queue.poll(rig.clock.now(), 8, &mut done), 0);
    rig.model.step();
    assert_eq!(queue.arm().unwrap(), Arm::Busy);
    assert_eq!(queue.poll(rig.clock.now(), 8, &mut done), 1);
    // While it polls, nothing rings.
    queue.disarm();
    queue.submit(op(3, OpKind::Flush, 0, 0, None)).unwrap();
    queue.ring();
    rig.model.step();
    assert!(!is_readable(queue.interrupt().unwrap()));
    assert_eq!(queue.poll(rig.clock.now(), 8, &mut done), 1);
}

#[test]
fn a_sleeping_queue_is_woken_by_a_reset_and_by_the_end() {
    let mut rig = Rig::ready();
    let ticket = rig.controller.queue_ticket(1, 8).unwrap().with_interrupt().unwrap();
    let mut queue = rig.opened(ticket);
    let mut done = Vec::with_capacity(8);
    rig.model.add_fault(Fault::always(CommandMatch::any_io(), FaultAction::Drop));
    for end in [false, true] {
        queue.submit(op(1, OpKind::Flush, 0, 0, None)).unwrap();
        queue.ring();
        rig.turn();
        queue.poll(rig.clock.now(), 8, &mut done);
        assert!(matches!(queue.arm().unwrap(), Arm::Sleep { .. }));
        if end {
            rig.model.vanish();
        } else {
            rig.controller.reset();
        }
        (0..200).for_each(|_| rig.turn());
        assert!(is_readable(queue.interrupt().unwrap()), "end: {end}");
        assert_eq!(queue.arm().unwrap(), Arm::Busy);
        assert_eq!(queue.poll(rig.clock.now(), 8, &mut done), 1);
        assert!(done.pop().unwrap().result.is_err());
        if !end {
            // Not yet created anew: that rings too.
            assert!(matches!(queue.arm().unwrap(), Arm::Sleep { until: None }));
            (0..200).for_each(|_| rig.turn());
            assert!(is_readable(queue.interrupt().unwrap()));
            assert_eq!(queue.poll(rig.clock.now(), 8, &mut done), 0);
        }
    }
}

#[test]
fn lost_interrupts_are_found_by_the_deadlines() {
    let mut rig = Rig::ready();
    let ticket = rig.controller.queue_ticket(1, 8).unwrap().with_interrupt().unwrap();
    let mut queue = rig.opened(ticket);
    rig.model.set_register_faults(RegisterFaults { interrupts_lost: true, ..RegisterFaults::default() });
    let mut done = Vec::with_capacity(8);
    queue.submit(op(1, OpKind::Flush, 0, 0, None)).unwrap();
    queue.ring();
    queue.poll(rig.clock.now(), 8, &mut done);
    let Arm::Sleep { until: Some(until) } = queue.arm().unwrap() else { panic!("open") };
    rig.model.step();
    assert!(!is_readable(queue.interrupt().unwrap()));
    assert!(until < Moment(30_000_000_000));
    assert_eq!(queue.poll(until, 8, &mut done), 1, "whoever polls when told finds it");
}

#[test]
fn without_vectors_only_idle_queues_sleep() {
    let options = ControllerOptions { vectors: 0, ..ControllerOptions::default() };
    let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 64), options);
    rig.start().unwrap();
    let ticket = rig.controller.queue_ticket(1, 8).unwrap().with_interrupt().unwrap();
    let mut queue = rig.opened(ticket);
    assert_eq!(queue.arm().unwrap(), Arm::Sleep { until: None });
    queue.submit(op(1, OpKind::Flush, 0, 0, None)).unwrap();
    queue.ring();
    assert_eq!(queue.arm().unwrap(), Arm::Busy, "nobody would wake it");
    assert_eq!(rig.collect(&mut queue, 1, 100).len(), 1);
    // And one that was opened without an eventfd has none.
    let mut polled = rig.queue(8);
    assert!(polled.interrupt().is_none());
    assert_eq!(polled.arm().unwrap(), Arm::Busy);
}

#[test]
fn a_sleeping_controller_is_woken_by_what_it_has_to_do() {
    let subsystem = Subsystem::new("SLEEP");
    subsystem.add_namespace(NamespaceOptions::memory(1, 9, 64)).unwrap();
    let driver = Options { interrupts: true, ..Options::default() };
    let mut rig = Rig::over(&subsystem, ControllerOptions::default(), driver);
    rig.start().unwrap();
    (0..50).for_each(|_| rig.turn());
    while rig.controller.take_event().is_some() {}
    let asleep = |controller: &mut Controller| match controller.arm().unwrap() {
        Arm::Sleep { until: Some(until) } => until,
        other => panic!("{other:?}"),
    };
    let until = asleep(&mut rig.controller);
    assert!(until <= rig.clock.now().after(Duration::from_millis(100)), "CSTS is looked at");
    let readable = |controller: &Controller| is_readable(controller.interrupt().unwrap());
    assert!(!readable(&rig.controller));
    // A completion of the admin queue: an asynchronous event.
    rig.model.raise_event(0x0002_0101);
    rig.model.step();
    assert!(readable(&rig.controller));
    (0..20).for_each(|_| rig.turn());
    assert!(rig.controller.take_event().is_some());
    // A queue pair that is opened, and one that is dropped.
    asleep(&mut rig.controller);
    let queue = rig.controller.queue_ticket(1, 8).unwrap().open(&rig.pool).unwrap();
    assert!(readable(&rig.controller));
    assert_eq!(rig.controller.arm().unwrap(), Arm::Busy);
    (0..20).for_each(|_| rig.turn());
    assert!(queue.is_ready());
    asleep(&mut rig.controller);
    drop(queue);
    assert!(readable(&rig.controller));
    (0..20).for_each(|_| rig.turn());
    asleep(&mut rig.controller);
    rig.controller.disarm();
    assert!(!readable(&rig.controller));
}

/// Runs operations one after another and sleeps while each is open.
fn sleeper(
    queue: &mut IoQueue,
    pool: &hugepage_alloc::BufferPool,
    clock: &dyn Clock,
    count: u64,
) -> Result<u64, Error> {
    let mut done = Vec::with_capacity(8);
    let mut sleeps = 0;
    for token in 0..count {
        let buf = pool.alloc(512).unwrap();
        buf.write_from(0, &token.to_le_bytes());
        for kind in [WRITE, OpKind::Read] {
            let mut next = op(token, kind, token % 64, 1, Some(buf.clone()));
            while let Err(refused) = queue.submit(next) {
                next = refused.op;
                std::thread::yield_now();
            }
            queue.ring();
            while queue.poll(clock.now(), 8, &mut done) == 0 {
                if let Arm::Sleep { .. } = queue.arm()? {
                    // Far less than the time-out: whatever is lost fails the test.
                    assert!(wait(queue.interrupt().unwrap(), Some(Duration::from_secs(20))), "never woken");
                    sleeps += 1;
                }
                if token % 3 == 0 {
                    queue.disarm();
                }
            }
            assert_eq!(done.pop().unwrap().result, Ok(0));
        }
        let mut back = [0; 8];
        back.copy_from_slice(&bytes(&buf)[..8]);
        assert_eq!(u64::from_le_bytes(back), token);
    }
    Ok(sleeps)
}

#[test]
fn threads_that_sleep_on_each_other_miss_nothing() {
    for shadow_doorbells in [false, true] {
        let subsystem = Subsystem::new("THREADS2");
        subsystem.add_namespace(NamespaceOptions::memory(1, 9, 64)).unwrap();
        let options = ControllerOptions { shadow_doorbells, ..ControllerOptions::default() };
        let model = subsystem.controller(options);
        let _running = model.spawn().unwrap();
        let clock = Arc::new(SystemClock::default());
        let driver = Options { interrupts: true, ..Options::default() };
        let mut controller = Controller::new(model, driver, clock.clone()).unwrap();
        block_on(controller.ready(), || ()).unwrap();
        let ticket = controller.queue_ticket(1, 4).unwrap().with_interrupt().unwrap();
        let worker = std::thread::spawn(move || {
            let pool = common::pool();
            let mut queue = ticket.open(&pool).unwrap();
            sleeper(&mut queue, &pool, &*clock, 2000).unwrap()
        });
        // This thread sleeps too, and wakes for the queue pair, its end, and CSTS.
        let begun = Instant::now();
        while !worker.is_finished() {
            assert!(begun.elapsed() < Duration::from_secs(120));
            controller.poll();
            while controller.take_event().is_some() {}
            if let Arm::Sleep { .. } = controller.arm().unwrap() {
                wait(controller.interrupt().unwrap(), Some(Duration::from_millis(20)));
            }
        }
        assert!(worker.join().unwrap() > 0, "it slept");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: however submissions, doorbells, steps and polls fall, with any depth, nothing is forgotten.
    #[test]
    fn no_order_of_events_loses_a_doorbell(
        depth in 1..9u16, burst in 1..5u16, actions in proptest::collection::vec(0..8u8, 1..300),
    ) {
        let options = ControllerOptions { shadow_doorbells: true, burst, ..ControllerOptions::default() };
        let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 1024), options);
        rig.start().unwrap();
        let mut queue = rig.queue(depth);
        let mut done = Vec::with_capacity(8);
        let (mut taken, mut back) = (0u64, 0usize);
        for action in actions {
            match action {
                0..=2 => taken += u64::from(queue.submit(op(taken, OpKind::Verify, taken % 1024, 1, None)).is_ok()),
                3 => queue.ring(),
                4 | 5 => _ = rig.model.step(),
                6 => back += queue.poll(rig.clock.now(), 1, &mut done),
                _ => back += queue.poll(rig.clock.now(), 8, &mut done),
            }
            done.clear();
        }
        let left = usize::try_from(taken).unwrap() - back;
        prop_assert_eq!(queue.outstanding(), left);
        // Far below the time-out: nothing needs to be mended.
        prop_assert_eq!(rig.collect(&mut queue, left, 1000).len(), left);
        prop_assert_eq!(queue.stats().violations, 0);
    }
}
