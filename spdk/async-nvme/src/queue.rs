//! An I/O queue pair, on the core that uses it.
//!
//! ```text
//!   submit(op) --> ops table --> pieces --> slots --> ring        (memory only)
//!   ring()                                    one doorbell for all of them
//!   poll()  <-- done <-- last piece of op <-- slots <-- completions        one doorbell for all of them
//! ```
//!
//! Every operation taken by `submit` comes back from `poll` once. Its buffer comes back with it, and never before
//! the device has completed all its commands, or has been made unable to write: by a controller reset that the
//! controller confirmed, or by being cut off from memory. All tables are made when the queue is opened. What a reset
//! means for the operations under way is in [`crate::reset`], how a queue sleeps in [`crate::idle`].

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use hugepage_alloc::{BufferPool, DmaBuf};
use nvme_spec::command::{psdt, sgl_sub_type, sgl_type};
use nvme_spec::{CompletionQueueEntry, SglDescriptor, Status, SubmissionQueueEntry};
use zerocopy::IntoBytes;

use crate::access::DmaMapping;
use crate::clock::Moment;
use crate::error::IoError;
use crate::link::{Link, Shared, state, wish};
use crate::op::{COPY_RANGE_LEN, DATASET_RANGE_LEN, Done, Limits, Op, OpKind, copy_range, deallocate_range};
use crate::prp;
use crate::requeue::{Journal, Requeue, changes};
use crate::ring::Rings;
use crate::slots::Slots;

/// Why an operation was not taken. It is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedWhy {
    /// As many operations as the depth are open: poll, then try again.
    Full,
    /// The queue pair is not there yet, or not again since a reset: poll, then try again.
    NotReady,
    /// The device is gone or has failed for good, or would not create the queue.
    Gone,
    /// The operation can never be executed here.
    Invalid(&'static str),
}

/// An operation that was not taken.
#[derive(Debug)]
pub struct Refused {
    /// The operation.
    pub op: Op,
    /// Why.
    pub why: RefusedWhy,
}

/// What a queue pair has done. Plain counts, of this queue alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Operations taken.
    pub submitted: u64,
    /// Operations given back.
    pub completed: u64,
    /// Commands given to the device.
    pub commands: u64,
    /// Submission doorbells rung.
    pub doorbells: u64,
    /// Calls of `poll`.
    pub polls: u64,
    /// Calls of `poll` that found no completion.
    pub idle_polls: u64,
    /// Commands that were late.
    pub timeouts: u64,
    /// Completions that no command of ours explains.
    pub violations: u64,
    /// Resets lived through.
    pub resets: u64,
    /// Operations given to the device anew after a reset.
    pub requeued: u64,
}

#[derive(Debug)]
pub(crate) struct OpEntry {
    pub(crate) token: u64,
    pub(crate) kind: OpKind,
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
    /// Blocks not yet given to the device; 0 when they need not be.
    pub(crate) left: u64,
    /// Bytes of the buffer already described.
    pub(crate) done_len: usize,
    iova: u64,
    pub(crate) buf: Option<DmaBuf>,
    /// Commands open.
    pub(crate) open: u16,
    /// Whether any command of it was given to the device, since the last reset and before it.
    pub(crate) started: bool,
    pub(crate) started_before: bool,
    pub(crate) error: Option<Status>,
    dw0: u32,
    /// Its number among all submitted, and where the journal stood then.
    pub(crate) number: u64,
    pub(crate) position: u64,
}

/// An I/O queue pair of one namespace. Stays on the thread that opened it.
#[derive(Debug)]
pub struct IoQueue {
    pub(crate) link: Arc<Link>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) rings: Rings,
    pub(crate) slots: Slots,
    pub(crate) ops: Box<[Option<OpEntry>]>,
    pub(crate) ops_free: Vec<u16>,
    /// Operations with pieces not yet given to the device, in the order of submission.
    pub(crate) waiting: VecDeque<u16>,
    /// Operations that ended otherwise than by completions.
    pub(crate) ready: VecDeque<Done>,
    limits: Limits,
    pool: BufferPool,
    buffers: Vec<DmaMapping>,
    /// The device has the queue pair, and what it says is believed.
    pub(crate) life: Life,
    pub(crate) requeue: Requeue,
    /// Only where it is needed: see [`crate::requeue`].
    pub(crate) journal: Option<Journal>,
    pub(crate) attached: bool,
    io_timeout: Duration,
    abort_grace: Duration,
    pub(crate) watch_at: Moment,
    pub(crate) stats: QueueStats,
}

/// How far the queue's own side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Not yet seen that the device has the queue pair, or has it again.
    New,
    Live,
    /// Nothing the device says is believed until the reset.
    Poisoned,
}

/// What a queue pair takes over from its ticket.
#[derive(Debug)]
pub(crate) struct QueueSettings {
    pub(crate) limits: Limits,
    pub(crate) io_timeout: Duration,
    pub(crate) abort_grace: Duration,
    pub(crate) requeue: Requeue,
}

impl IoQueue {
    pub(crate) fn new(
        settings: QueueSettings,
        shared: Arc<Shared>,
        link: Arc<Link>,
        rings: Rings,
        pool: &BufferPool,
        buffers: Vec<DmaMapping>,
    ) -> Self {
        let depth = rings.layout.entries - 1;
        let count = usize::from(depth);
        let mut ops = Vec::with_capacity(count);
        ops.resize_with(count, || None);
        let QueueSettings { limits, io_timeout, abort_grace, requeue } = settings;
        Self {
            link,
            shared,
            rings,
            slots: Slots::new(depth),
            ops: ops.into_boxed_slice(),
            ops_free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(count),
            ready: VecDeque::with_capacity(count),
            limits,
            pool: pool.clone(),
            buffers,
            life: Life::New,
            requeue,
            journal: (requeue == Requeue::Idempotent).then(|| Journal::new(depth)),
            attached: false,
            io_timeout,
            abort_grace,
            watch_at: Moment::default(),
            stats: QueueStats::default(),
        }
    }

    /// Whether the device has the queue pair, so that operations are taken.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.link.state() == state::LIVE && self.life != Life::Poisoned
    }

    /// Whether it will never be ready (again).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self.link.state(), state::GONE | state::STRANDED | state::REFUSED)
    }

    /// The status with which the controller refused to create the queue pair, if it did.
    #[must_use]
    pub fn refused_with(&self) -> Option<Status> {
        (self.link.state() == state::REFUSED).then(|| self.link.refused_with())
    }

    /// Operations taken and not yet given back.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.ops.len() - self.ops_free.len() + self.ready.len()
    }

    /// The most operations at a time.
    #[must_use]
    pub const fn depth(&self) -> usize {
        self.ops.len()
    }

    /// What the queue has done.
    #[must_use]
    pub const fn stats(&self) -> QueueStats {
        self.stats
    }

    /// Takes an operation over. The device learns of it with the next [`IoQueue::ring`].
    ///
    /// # Errors
    /// Gives the operation back, with the reason.
    pub fn submit(&mut self, op: Op) -> Result<(), Refused> {
        match self.link.state() {
            state::LIVE if self.life == Life::Live => {}
            state::LIVE if self.life == Life::New => self.begin_life(),
            state::GONE | state::STRANDED | state::REFUSED => {
                return Err(Refused { op, why: RefusedWhy::Gone });
            }
            _ => return Err(Refused { op, why: RefusedWhy::NotReady }),
        }
        if let Some(why) = self.limits.refusal(&op) {
            return Err(Refused { op, why: RefusedWhy::Invalid(why) });
        }
        let Some(iova) = self.iova_of(&op) else {
            return Err(Refused { op, why: RefusedWhy::Invalid("the buffer is of another pool") });
        };
        if self.outstanding() >= self.ops.len() {
            return Err(Refused { op, why: RefusedWhy::Full });
        }
        let Some(index) = self.ops_free.pop() else {
            return Err(Refused { op, why: RefusedWhy::Full });
        };
        let blocks = match (op.kind, &op.buf) {
            (OpKind::Flush | OpKind::Raw(_), _) => 1,
            (OpKind::DatasetManagement { .. }, Some(ranges)) => (ranges.len() / DATASET_RANGE_LEN) as u64,
            _ => op.blocks,
        };
        let Some(entry) = self.ops.get_mut(usize::from(index)) else {
            return Err(Refused { op, why: RefusedWhy::Full });
        };
        *entry = Some(OpEntry {
            token: op.token,
            kind: op.kind,
            lba: op.lba,
            blocks,
            left: blocks,
            done_len: 0,
            iova,
            buf: op.buf,
            open: 0,
            started: false,
            started_before: false,
            error: None,
            dw0: 0,
            number: self.stats.submitted,
            position: self.journal.as_ref().map_or(0, Journal::position),
        });
        self.stats.submitted += 1;
        self.waiting.push_back(index);
        self.pump();
        Ok(())
    }

    /// The device's address of the operation's data; 0 when it moves none.
    fn iova_of(&self, op: &Op) -> Option<u64> {
        let Some(buf) = op.buf.as_ref().filter(|_| op.kind.moves_data()) else { return Some(0) };
        if !buf.is_of(&self.pool) {
            return None;
        }
        let mapping = self.buffers.get(usize::from(buf.region_index()))?;
        mapping.iova(buf.region_offset()).map(|iova| iova.0)
    }

    /// Tells the device of what was submitted: at most one doorbell.
    pub fn ring(&mut self) {
        if self.rings.ring_submissions(&*self.shared.access) {
            self.stats.doorbells += 1;
        }
    }

    /// Gives waiting pieces to the ring while there are slots.
    fn pump(&mut self) {
        while let Some(&index) = self.waiting.front() {
            if !self.slots.has_free() {
                return;
            }
            let more = self.issue(index);
            if !more {
                self.waiting.pop_front();
            }
        }
    }

    /// Puts one piece of an operation into the ring; whether there are more.
    fn issue(&mut self, index: u16) -> bool {
        let Some(Some(op)) = self.ops.get_mut(usize::from(index)) else { return false };
        let Some((slot, cid)) = self.slots.open(index) else { return true };
        let begun = op.blocks - op.left;
        let lba = op.lba + begun;
        let blocks = self.limits.piece(op.kind, lba, op.left);
        let mut sqe = self.limits.command(op.kind, lba, blocks, begun);
        sqe.cid.set(cid);
        let Some(dptr) =
            data_pointer(&self.rings, &self.link.mapping, &self.limits, op, slot, (lba, blocks), &mut sqe)
        else {
            // Not reached while the layout is right. Without addresses nothing may go to the device.
            self.life = Life::Poisoned;
            self.shared.ask_reset(wish::VIOLATION);
            return false;
        };
        sqe.dptr = dptr;
        op.left -= blocks;
        op.open += 1;
        op.started = true;
        self.rings.push(sqe);
        self.stats.commands += 1;
        op.left > 0
    }

    /// Moves at most `budget` ended operations to `done`, and never more than `done` has spare capacity for: it is
    /// never made larger. Returns how many. Gives the device what waits for slots, and watches for late commands.
    pub fn poll(&mut self, now: Moment, budget: usize, done: &mut Vec<Done>) -> usize {
        self.stats.polls += 1;
        let budget = budget.min(done.capacity() - done.len());
        let before = done.len();
        let live = match self.link.state() {
            state::LIVE if self.life == Life::Live => true,
            state::LIVE if self.life == Life::New => {
                self.begin_life();
                true
            }
            state::LIVE => false,
            other => {
                self.leave(other);
                false
            }
        };
        while done.len() - before < budget {
            let Some(ended) = self.ready.pop_front() else { break };
            done.push(ended);
        }
        if live {
            self.harvest(budget - (done.len() - before), done);
            self.pump();
            self.ring();
            if now >= self.watch_at {
                self.watch(now);
            }
        }
        let moved = done.len() - before;
        self.stats.completed += moved as u64;
        self.stats.idle_polls += u64::from(moved == 0);
        moved
    }

    /// Takes completions until `budget` of them.
    fn harvest(&mut self, budget: usize, done: &mut Vec<Done>) {
        for _ in 0..budget {
            let Some(cqe) = self.rings.pop() else { break };
            match self.complete(&cqe) {
                Ok(Some(ended)) => done.push(ended),
                Ok(None) => {}
                Err(()) => {
                    self.stats.violations += 1;
                    self.life = Life::Poisoned;
                    self.shared.ask_reset(wish::VIOLATION);
                    return;
                }
            }
        }
        self.rings.ring_completions(&*self.shared.access);
    }

    /// Books one completion. Ends the operation when it was the last one; Err when no command of ours explains it.
    pub(crate) fn complete(&mut self, cqe: &CompletionQueueEntry) -> Result<Option<Done>, ()> {
        if !self.rings.is_plausible(cqe) {
            return Err(());
        }
        let index = self.slots.close(cqe.cid.get()).ok_or(())?;
        let place = self.ops.get_mut(usize::from(index)).ok_or(())?;
        let op = place.as_mut().ok_or(())?;
        op.open -= 1;
        op.dw0 = cqe.dw0.get();
        let status = cqe.status();
        if !status.is_success() {
            op.error = op.error.or(Some(status));
            // What was not begun need not be.
            if op.left > 0 {
                op.left = 0;
                self.waiting.retain(|&waiting| waiting != index);
            }
        }
        if op.open > 0 || op.left > 0 {
            return Ok(None);
        }
        if let Some(journal) = &mut self.journal {
            journal.note(changes(op.kind, op.lba, op.blocks));
        }
        self.ops_free.push(index);
        Ok(place.take().map(|op| {
            let result = op.error.map_or(Ok(op.dw0), |status| Err(IoError::Status(status)));
            Done { token: op.token, result, buf: op.buf }
        }))
    }

    /// Looks for late commands: has them aborted, then the controller reset.
    #[cold]
    fn watch(&mut self, now: Moment) {
        self.watch_at = now.after((self.io_timeout / 8).min(self.abort_grace));
        for (cid, slot) in self.slots.open_mut() {
            match slot.deadline {
                // Measured from here: nobody may have polled, or looked at the clock, for a long time before.
                None => slot.deadline = Some(now.after(self.io_timeout)),
                Some(deadline) if now < deadline => {}
                Some(_) if slot.aborting => self.shared.ask_reset(wish::TIMEOUT),
                Some(_) => {
                    if self.shared.ask_abort(&self.link, cid) {
                        slot.aborting = true;
                        slot.deadline = Some(now.after(self.abort_grace));
                        self.stats.timeouts += 1;
                    }
                }
            }
        }
    }
}

/// Describes the data of the next piece of `op`, with the list of its slot, and moves on in the buffer.
fn data_pointer(
    rings: &Rings,
    mapping: &DmaMapping,
    limits: &Limits,
    op: &mut OpEntry,
    slot: u16,
    (lba, blocks): (u64, u64),
    sqe: &mut SubmissionQueueEntry,
) -> Option<SglDescriptor> {
    let list_at = rings.layout.list_at(slot);
    let list_iova = mapping.iova(list_at)?.0;
    let len = match (op.kind, &op.buf) {
        (OpKind::Deallocate, _) => {
            let range = deallocate_range(lba, blocks);
            return rings.region().write(list_at, range.as_bytes()).then(|| prp::pointers(list_iova, 0));
        }
        (OpKind::Copy { .. }, _) => {
            for (at, part) in (list_at..).step_by(COPY_RANGE_LEN).zip(limits.copy_parts(lba, blocks)) {
                if !rings.region().write(at, copy_range(part).as_bytes()) {
                    return None;
                }
            }
            return Some(prp::pointers(list_iova, 0));
        }
        (OpKind::Read | OpKind::Write { .. } | OpKind::Compare, _) => {
            usize::try_from(blocks << limits.block_shift).ok()?
        }
        (OpKind::Raw(_) | OpKind::DatasetManagement { .. }, Some(buf)) => buf.len(),
        _ => return Some(SglDescriptor::default()),
    };
    let iova = op.iova + op.done_len as u64;
    op.done_len += len;
    if limits.sgl && (len > 2 * limits.page || iova & 3 != 0) {
        sqe.flags = psdt::SGL << 6;
        return Some(SglDescriptor::of(
            sgl_type::DATA_BLOCK,
            sgl_sub_type::ADDRESS,
            iova,
            u32::try_from(len).ok()?,
        ));
    }
    prp::prp(iova, len, limits.page, (rings.region(), list_at, list_iova, rings.layout.list_len()))
}

impl Drop for IoQueue {
    /// The device deletes the queues when the controller is polled next. Buffers of operations still open are never
    /// used again, for the device may be writing to them.
    fn drop(&mut self) {
        self.disarm();
        let was = self.shared.close_link(&self.link);
        if matches!(was, state::WANTED | state::LOST | state::GONE | state::REFUSED) {
            return;
        }
        for op in self.ops.iter_mut().flatten().filter(|op| op.started) {
            mem::forget(op.buf.take());
        }
    }
}
