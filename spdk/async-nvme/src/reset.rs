//! What becomes of the operations of a queue pair when the device lost it, or is gone.
//!
//! By then the device can write no more (see [`crate::link`]), so what it had completed before is still told apart from
//! what it had not.

use std::mem;

use crate::error::IoError;
use crate::link::state;
use crate::queue::{IoQueue, Life, OpEntry};
use crate::requeue::{Effect, Requeue};

impl IoQueue {
    /// The device has the queue pair: how it is told of doorbells from now on.
    #[cold]
    pub(crate) fn begin_life(&mut self) {
        self.rings.set_shadow(self.shared.shadow_of(&self.link));
        self.life = Life::Live;
    }

    /// What to do in states other than LIVE.
    #[cold]
    pub(crate) fn leave(&mut self, now_in: u8) {
        match now_in {
            state::LOST => {
                self.take_last_completions();
                self.end_or_requeue();
                self.rings.restart();
                self.life = Life::New;
                self.stats.resets += 1;
                self.shared.advance_by_queue(&self.link, state::LOST, state::WANTED);
            }
            state::GONE | state::REFUSED => {
                self.take_last_completions();
                self.fail_all(|_| IoError::Gone, false);
            }
            state::STRANDED => {
                self.fail_all(|op| if op.started { IoError::Stranded } else { IoError::Gone }, true);
            }
            _ => {}
        }
    }

    /// Completions that were written before the device was stopped, unless it was not to be believed.
    fn take_last_completions(&mut self) {
        if self.life != Life::Live {
            return;
        }
        for _ in 0..self.rings.layout.entries {
            let Some(cqe) = self.rings.pop() else { break };
            match self.complete(&cqe) {
                Ok(None) => {}
                Ok(Some(index)) => {
                    let op = self.ops.get_mut(usize::from(index));
                    self.ready.extend(op.map(|op| op.end(op.result())));
                }
                Err(()) => {
                    self.stats.violations += 1;
                    break;
                }
            }
        }
        self.life = Life::Poisoned;
    }

    /// Keeps what is given to the device anew, in the order in which it was submitted, and ends the rest.
    fn end_or_requeue(&mut self) {
        self.waiting.clear();
        for (_, slot) in self.slots.open_mut().filter(|(_, slot)| slot.aborting) {
            if let Some(op) = self.ops.get_mut(usize::from(slot.op)) {
                // It was late: not again.
                op.started_before = true;
            }
        }
        for (number, op) in (0u16..).zip(&mut self.ops).filter(|(_, op)| op.taken) {
            let journal = self.journal.as_ref();
            let overlaps =
                |op: &OpEntry| journal.is_none_or(|journal| journal.overlaps(op.position, op.lba, op.blocks));
            if may_requeue(self.requeue, op, overlaps) {
                self.stats.requeued += u64::from(op.started);
                op.begin_again();
                self.waiting.push_back(number);
            } else {
                let reset = IoError::Reset { reached_device: op.started || op.started_before };
                let error = op.error.map_or(reset, IoError::Status);
                self.ready.push_back(op.end(Err(error)));
                self.ops_free.push(number);
            }
        }
        self.slots.close_all();
        let ops = &self.ops;
        let number = |&index: &u16| ops.get(usize::from(index)).map(|op| op.number);
        self.waiting.make_contiguous().sort_unstable_by_key(number);
    }

    /// Ends all operations. `keep` leaves their buffers to the device for ever.
    fn fail_all(&mut self, error: impl Fn(&OpEntry) -> IoError, keep: bool) {
        for (index, op) in (0..).zip(&mut self.ops).filter(|(_, op)| op.taken) {
            if keep && op.started {
                mem::forget(op.buf.take());
            }
            let error = error(op);
            self.ready.push_back(op.end(Err(error)));
            self.ops_free.push(index);
        }
        self.waiting.clear();
        self.slots.close_all();
    }
}

impl OpEntry {
    /// As it was when it was submitted.
    const fn begin_again(&mut self) {
        self.left = self.blocks;
        self.open = 0;
        self.started_before |= self.started;
        self.started = false;
    }
}

/// See [`crate::requeue`] for why.
fn may_requeue(policy: Requeue, op: &OpEntry, overlaps: impl Fn(&OpEntry) -> bool) -> bool {
    let given_twice = op.started && op.started_before;
    if policy == Requeue::Nothing || op.error.is_some() || given_twice {
        return false;
    }
    match Effect::of(op.plain.kind) {
        _ if !op.started && !op.started_before => true,
        Effect::Nothing => true,
        Effect::Sets => policy == Requeue::Idempotent && !overlaps(op),
        Effect::Unknown => false,
    }
}
