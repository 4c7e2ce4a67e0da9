//! Fuzzing the driver through a controller that misbehaves: the body of a fuzz target as a plain function.
//!
//! Here's how it works:
//! 1. The first bytes choose a controller; then each pair of bytes is an action: submit, step, let time pass, break
//!    something, mend it, remove the device, drop the queue.
//! 2. After each action everything that came back is booked: each operation must come back once, and no buffer may
//!    come back while the model may still touch it.
//! 3. At the end the faults stop and time passes: everything must have come back by the deadlines.
//!
//! It panics when the driver broke a promise.

use std::sync::Arc;
use std::time::Duration;

use async_nvme::{
    Clock, Controller, Done, IoError, IoQueue, ManualClock, Op, OpKind, Options, RefusedWhy, State,
};
use hugepage_alloc::{BufferPool, PoolOptions};

use crate::fault::{CommandMatch, Fault, FaultAction, RandomFaults, RegisterFaults};
use crate::{ControllerOptions, Model, NamespaceOptions, Subsystem};

const BLOCKS: u64 = 512;
const DEPTH: u16 = 8;
/// Turns of 100 ms after which everything must have ended, whatever went wrong: ten minutes of the driver's time.
const TURNS_MAX: u32 = 6000;

struct Rig {
    model: Arc<Model>,
    clock: Arc<ManualClock>,
    controller: Controller,
    queue: Option<IoQueue>,
    pool: BufferPool,
    block_len: u32,
    /// Which operations are open, by token.
    open: Vec<bool>,
    done: Vec<Done>,
}

/// Plays `data` as a sequence of actions against the driver.
///
/// # Panics
/// When the driver loses or doubles an operation, gives a buffer back too early, or is not done by its deadlines.
pub fn fuzz_model_actions(data: &[u8]) {
    let Some((&[shape, seed], actions)) = data.split_first_chunk::<2>() else { return };
    let Some(mut rig) = Rig::new(shape) else { return };
    rig.turn(40);
    for pair in actions.as_chunks::<2>().0.iter().take(512) {
        rig.act(pair[0], pair[1], seed);
        rig.turn(1);
    }
    rig.finish();
}

impl Rig {
    fn new(shape: u8) -> Option<Self> {
        let subsystem = Subsystem::new("FUZZ");
        let shift = if shape & 1 == 0 { 9 } else { 12 };
        subsystem.add_namespace(NamespaceOptions::memory(1, shift, BLOCKS)).ok()?;
        let model = subsystem.controller(ControllerOptions {
            mdts: 1 + (shape >> 1 & 3),
            sgl: shape & 8 != 0,
            dstrd: shape >> 4 & 3,
            timeout_500ms: 2,
            ..ControllerOptions::default()
        });
        let clock = Arc::new(ManualClock::default());
        let driver_clock: Arc<dyn Clock> = clock.clone();
        let mut controller = Controller::new(model.clone(), Options::default(), driver_clock).ok()?;
        let pool = BufferPool::new(&PoolOptions { bytes: 4 << 20, prefer_huge: false, lock: false }).ok()?;
        controller.start();
        let done = Vec::with_capacity(usize::from(DEPTH));
        Some(Self {
            model,
            clock,
            controller,
            queue: None,
            pool,
            block_len: 1 << shift,
            open: Vec::new(),
            done,
        })
    }

    /// Everybody gets to work `count` times.
    fn turn(&mut self, count: u32) {
        for _ in 0..count {
            self.model.step();
            self.controller.poll();
            self.clock.advance(Duration::from_millis(1));
            self.collect();
        }
    }

    fn collect(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        queue.poll(self.clock.now(), usize::from(DEPTH), &mut self.done);
        queue.ring();
        for done in self.done.drain(..) {
            let place = usize::try_from(done.token).ok().and_then(|token| self.open.get_mut(token));
            assert!(
                place.is_some_and(std::mem::take),
                "operation {} came back twice or was never given",
                done.token
            );
            if let Some(buf) = &done.buf {
                assert_ne!(done.result, Err(IoError::Stranded), "a stranded buffer was given back");
                assert!(!self.model.may_touch(buf), "buffer of operation {} came back too early", done.token);
            }
        }
    }

    fn act(&mut self, action: u8, detail: u8, seed: u8) {
        match action % 16 {
            0..=6 => self.submit(detail),
            7 => self.turn(u32::from(detail)),
            8 => self.clock.advance(Duration::from_secs(u64::from(detail))),
            9 | 10 => self.model.add_fault(Fault {
                matches: if action & 16 == 0 { CommandMatch::any_io() } else { CommandMatch::default() },
                action: fault(detail),
                skip: u32::from(detail >> 6),
                times: 1,
            }),
            11 => self.model.set_random_faults(Some(RandomFaults {
                seed: u64::from(seed) << 8 | u64::from(detail),
                per_mille: u16::from(detail) * 2,
                matches: CommandMatch::default(),
                actions: (0..10).map(fault).collect(),
            })),
            12 => self.model.clear_faults(),
            13 => self.model.set_register_faults(RegisterFaults {
                never_ready: detail & 1 != 0,
                never_disabled: detail & 2 != 0,
                fatal_on_enable: detail & 4 != 0,
                never_shut_down: detail & 8 != 0,
                function_reset_fails: detail & 16 != 0,
                revoke_fails: detail & 32 != 0,
                interrupts_lost: detail & 64 != 0,
                event_idx_wrong: detail & 128 != 0,
            }),
            14 if detail < 32 => self.model.vanish(),
            14 if detail < 96 => self.model.fail(),
            14 => self.controller.reset(),
            _ => self.reopen(detail),
        }
    }

    fn reopen(&mut self, detail: u8) {
        if detail & 1 == 0 && self.queue.take().is_some() {
            // What was open is given up with its queue.
            self.open.fill(false);
        }
        if self.queue.is_none() {
            let ticket = self.controller.queue_ticket(1, DEPTH);
            self.queue = ticket.and_then(|ticket| ticket.open(&self.pool)).ok();
        }
    }

    fn submit(&mut self, detail: u8) {
        self.reopen(1);
        let Some(queue) = &mut self.queue else { return };
        let blocks = 1 + u64::from(detail >> 3);
        let kind = match detail & 7 {
            0..=2 => OpKind::Read,
            3 => OpKind::Write { fua: detail & 8 != 0 },
            4 => OpKind::Flush,
            5 => OpKind::WriteZeroes { deallocate: true, fua: false },
            6 => OpKind::Deallocate,
            _ => OpKind::Compare,
        };
        let Ok(len) = u32::try_from(blocks * u64::from(self.block_len)) else { return };
        let moves = matches!(kind, OpKind::Read | OpKind::Write { .. } | OpKind::Compare);
        let buf = if moves { self.pool.alloc(len) } else { None };
        if moves && buf.is_none() {
            return;
        }
        let token = self.open.len() as u64;
        let op = Op { token, kind, lba: u64::from(detail) % (BLOCKS - blocks), blocks, buf };
        match queue.submit(op) {
            Ok(()) => self.open.push(true),
            Err(refused) => {
                assert!(!matches!(refused.why, RefusedWhy::Invalid(_)), "refused: {:?}", refused.why);
            }
        }
        queue.ring();
    }

    fn finish(mut self) {
        self.model.clear_faults();
        for _ in 0..TURNS_MAX {
            if !self.open.contains(&true)
                && (self.controller.state() == State::Ready || self.controller.is_over())
            {
                return;
            }
            self.clock.advance(Duration::from_millis(100));
            self.turn(1);
        }
        panic!(
            "after ten minutes {} operations are open and the controller is {:?}",
            self.open.iter().filter(|open| **open).count(),
            self.controller.state()
        );
    }
}

fn fault(number: u8) -> FaultAction {
    match number % 11 {
        0 => FaultAction::Delay { steps: 3 + u32::from(number >> 2) },
        1 => FaultAction::Drop,
        2 => FaultAction::Status(nvme_spec::Status::INTERNAL_ERROR),
        3 => FaultAction::DuplicateCid,
        4 => FaultAction::UnknownCid,
        5 => FaultAction::TornPhaseFirst,
        6 => FaultAction::TornResultLast,
        7 => FaultAction::Reorder,
        8 => FaultAction::BadSqHead,
        9 => FaultAction::Fatal,
        _ => FaultAction::Vanish,
    }
}
