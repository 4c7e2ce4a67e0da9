//! Fuzzing the driver through a controller that misbehaves: the body of a fuzz target as a plain function.
//!
//! Here's how it works:
//! 1. The first two bytes choose a controller and how it is driven; then each pair of bytes is an action: submit, step,
//!    let time pass, break something, mend it, remove the device, put it back, drop the queue, sleep.
//! 2. After each action everything that came back is booked: each operation must come back once, and no buffer may
//!    come back while the model may still touch it.
//! 3. A queue pair that sleeps must be woken by what comes, or by the moment that it named.
//! 4. At the end the faults stop and time passes: everything must have come back by the deadlines.
//!
//! It panics when the driver broke a promise.

use std::sync::Arc;
use std::time::Duration;

use async_nvme::{
    Arm, Clock, Controller, Done, IoError, IoQueue, ManualClock, Op, OpKind, Options, RefusedWhy, Requeue,
    State,
};
use hugepage_alloc::{BufferPool, DmaBuf, PoolOptions};
use nvme_spec::AdminOpcode;
use nvme_spec::nvm::{DatasetManagementRange, dsm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zerocopy::IntoBytes;

use crate::fault::{CommandMatch, Fault, FaultAction, RandomFaults, RegisterFaults};
use crate::{ControllerOptions, Model, NamespaceOptions, Subsystem};

const BLOCKS: u64 = 512;
const DEPTH: u16 = 8;
/// Turns of 100 ms after which everything must have ended, whatever went wrong: ten minutes of the driver's time.
const TURNS_MAX: u32 = 6000;

struct Rig {
    subsystem: Subsystem,
    model: Arc<Model>,
    clock: Arc<ManualClock>,
    controller: Controller,
    queue: Option<IoQueue>,
    pool: BufferPool,
    block_len: u32,
    /// Queue pairs are opened with an eventfd.
    interrupts: bool,
    /// Interrupts may have been lost.
    interrupts_lost: bool,
    /// What the device says of itself may be nonsense.
    nonsense: bool,
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
    let Some(mut rig) = Rig::new(shape, seed) else { return };
    rig.turn(40);
    for pair in actions.as_chunks::<2>().0.iter().take(512) {
        rig.act(pair[0], pair[1], seed);
        rig.turn(1);
    }
    rig.finish();
}

impl Rig {
    fn new(shape: u8, seed: u8) -> Option<Self> {
        let subsystem = Subsystem::new("FUZZ");
        let shift = if shape & 1 == 0 { 9 } else { 12 };
        subsystem.add_namespace(NamespaceOptions::memory(1, shift, BLOCKS)).ok()?;
        let model = subsystem.controller(ControllerOptions {
            mdts: 1 + (shape >> 1 & 3),
            sgl: shape & 8 != 0,
            dstrd: shape >> 4 & 3,
            shadow_doorbells: shape & 64 != 0,
            timeout_500ms: 2,
            crwmt_500ms: 2,
            ..ControllerOptions::default()
        });
        let clock = Arc::new(ManualClock::default());
        let driver_clock: Arc<dyn Clock> = clock.clone();
        let interrupts = shape & 128 != 0;
        let requeue = match seed % 3 {
            0 => Requeue::Nothing,
            1 => Requeue::Harmless,
            _ => Requeue::Idempotent,
        };
        let options = Options { requeue, interrupts, ..Options::default() };
        let mut controller = Controller::new(model.clone(), options, driver_clock).ok()?;
        let pool = BufferPool::new(&PoolOptions { bytes: 4 << 20, prefer_huge: false, lock: false }).ok()?;
        controller.start();
        let done = Vec::with_capacity(usize::from(DEPTH));
        Some(Self {
            subsystem,
            model,
            clock,
            controller,
            queue: None,
            pool,
            block_len: 1 << shift,
            interrupts,
            interrupts_lost: false,
            nonsense: false,
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
        self.book();
    }

    fn book(&mut self) {
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
        if action >= 128 {
            return self.act_more(action, detail);
        }
        match action % 16 {
            0..=6 => self.submit(detail),
            7 => self.turn(u32::from(detail)),
            8 => self.clock.advance(Duration::from_secs(u64::from(detail))),
            9 | 10 => {
                self.nonsense |= fault(detail) == FaultAction::Garbage;
                self.model.add_fault(Fault {
                    matches: if action & 16 == 0 { CommandMatch::any_io() } else { CommandMatch::default() },
                    action: fault(detail),
                    skip: u32::from(detail >> 6),
                    times: 1,
                });
            }
            11 => {
                self.nonsense |= detail & 1 != 0;
                let kinds = if detail & 1 == 0 { 10 } else { FAULTS };
                self.model.set_random_faults(Some(RandomFaults {
                    seed: u64::from(seed) << 8 | u64::from(detail),
                    per_mille: u16::from(detail) * 2,
                    matches: CommandMatch::default(),
                    actions: (0..kinds).map(fault).collect(),
                }));
            }
            12 => self.model.clear_faults(),
            13 => self.break_registers(detail),
            14 if detail < 32 => self.model.vanish(),
            14 if detail < 96 => self.model.fail(),
            14 => self.controller.reset(),
            _ => self.reopen(detail),
        }
    }

    fn act_more(&mut self, action: u8, detail: u8) {
        match action % 8 {
            0 => {
                let half = BLOCKS / 2;
                let kind = OpKind::Copy { to: half + u64::from(detail % 190), fua: detail & 1 != 0 };
                self.give(kind, u64::from(detail >> 1), u64::from(detail >> 2) + 1, None);
            }
            1 => self.give_ranges(detail),
            2 => {
                self.model.plug_in();
                let _ = self.controller.restart();
            }
            3 => self.sleep(detail),
            4 => {
                self.nonsense = true;
                let log = detail & 8 != 0;
                let opcode = if log { AdminOpcode::GET_LOG_PAGE } else { AdminOpcode::IDENTIFY };
                let fault = Fault::once(CommandMatch::admin(opcode.0), FaultAction::Garbage);
                self.model.add_fault(Fault { skip: u32::from(detail & 7), ..fault });
            }
            5 if detail & 1 == 0 => {
                let _ = self.subsystem.add_namespace(NamespaceOptions::memory(2, 9, 8));
            }
            5 => _ = self.subsystem.remove_namespace(2),
            6 => self.controller.begin_shutdown(),
            _ => self.model.raise_event(u32::from(detail & 1) | 0x0002_0100),
        }
    }

    fn break_registers(&mut self, detail: u8) {
        self.interrupts_lost |= detail & 64 != 0;
        self.model.set_register_faults(RegisterFaults {
            never_ready: detail & 1 != 0,
            never_disabled: detail & 2 != 0,
            fatal_on_enable: detail & 4 != 0,
            never_shut_down: detail & 8 != 0,
            function_reset_fails: detail & 16 != 0,
            revoke_fails: detail & 32 != 0,
            interrupts_lost: detail & 64 != 0,
            event_idx_wrong: detail & 128 != 0,
            reads_zeros: detail % 64 == 63,
        });
    }

    /// Sleeps as a core would; whatever came must have woken it.
    fn sleep(&mut self, detail: u8) {
        let Some(queue) = &mut self.queue else { return };
        if let Ok(Arm::Sleep { until }) = queue.arm() {
            let mut woken = false;
            for _ in 0..detail {
                self.model.step();
                self.controller.poll();
                self.clock.advance(Duration::from_millis(1));
                woken = is_readable(queue) || until.is_some_and(|until| self.clock.now() >= until);
                if woken {
                    break;
                }
            }
            let came = queue.poll(self.clock.now(), usize::from(DEPTH), &mut self.done);
            assert!(came == 0 || woken || self.interrupts_lost, "{came} operations ended and woke nobody");
            queue.ring();
        }
        if detail & 1 != 0 {
            queue.disarm();
        }
        self.book();
    }

    fn reopen(&mut self, detail: u8) {
        if detail & 1 == 0 && self.queue.take().is_some() {
            // What was open is given up with its queue.
            self.open.fill(false);
        }
        if self.queue.is_none() {
            let ticket = self.controller.queue_ticket(1, DEPTH);
            let ticket =
                ticket.and_then(|ticket| if self.interrupts { ticket.with_interrupt() } else { Ok(ticket) });
            self.queue = ticket.and_then(|ticket| ticket.open(&self.pool)).ok();
        }
    }

    fn submit(&mut self, detail: u8) {
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
        self.give(kind, u64::from(detail) % (BLOCKS - blocks), blocks, buf);
    }

    fn give_ranges(&mut self, detail: u8) {
        let count = 1 + u32::from(detail & 15);
        let Some(buf) = self.pool.alloc(count * 16) else { return };
        for index in 0..count {
            let range = DatasetManagementRange {
                slba: u64::from(index * 16 + u32::from(detail)).into(),
                length: (index % 7).into(),
                ..Default::default()
            };
            buf.write_from(index as usize * 16, range.as_bytes());
        }
        self.give(OpKind::DatasetManagement { attributes: dsm::AD }, 0, 0, Some(buf));
    }

    fn give(&mut self, kind: OpKind, lba: u64, blocks: u64, buf: Option<DmaBuf>) {
        self.reopen(1);
        let Some(queue) = &mut self.queue else { return };
        let token = self.open.len() as u64;
        let op = Op { token, kind, lba, blocks, buf };
        match queue.submit(op) {
            Ok(()) => self.open.push(true),
            Err(refused) => {
                let invalid = matches!(refused.why, RefusedWhy::Invalid(_));
                assert!(!invalid || self.nonsense, "refused: {:?}", refused.why);
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

fn is_readable(queue: &IoQueue) -> bool {
    let Some(eventfd) = queue.interrupt() else { return false };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&eventfd, PollFlags::IN)], Some(&now)).is_ok_and(|count| count > 0)
}

/// How many kinds of faults there are.
const FAULTS: u8 = 12;

fn fault(number: u8) -> FaultAction {
    match number % FAULTS {
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
        10 => FaultAction::Vanish,
        _ => FaultAction::Garbage,
    }
}
