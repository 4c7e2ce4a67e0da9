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

use hugepage_alloc::{BUFFER_LEN_MAX, BufferPool, DmaBuf};
use nvme_spec::{CompletionQueueEntry, Status};

use crate::access::DmaMapping;
use crate::clock::Moment;
use crate::data::{Lists, Pointer, point, point_special};
use crate::error::IoError;
use crate::kind::{Kind, Plain};
use crate::limits::{DATASET_RANGE_LEN, Limits};
use crate::link::{Link, Shared, state, wish};
use crate::op::{Done, Op, OpKind};
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

/// A place for an operation. Written and cleared in place: it is never moved on the I/O path.
///
/// Two cache lines, and a completion needs the first one only. The order of the fields is kept for a second reason:
/// neighbours here are no neighbours in [`Op`], or they would be copied in pairs, with a load that waits for two stores
/// to leave the store buffer.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct OpEntry {
    pub(crate) token: u64,
    pub(crate) buf: Option<DmaBuf>,
    /// Blocks not yet given to the device; 0 when they need not be.
    pub(crate) left: u64,
    pub(crate) plain: Plain,
    dw0: u32,
    pub(crate) error: Option<Status>,
    /// Commands open.
    pub(crate) open: u16,
    /// Whether there is an operation.
    pub(crate) taken: bool,
    /// Whether any command of it was given to the device, since the last reset and before it.
    pub(crate) started: bool,
    pub(crate) started_before: bool,
    /// The device's address of the buffer.
    iova: u64,
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
    /// Its number among all submitted, and where the journal stood then.
    pub(crate) number: u64,
    pub(crate) position: u64,
}

const _: () = assert!(size_of::<OpEntry>() == 128);

impl OpEntry {
    const FREE: Self = Self {
        token: 0,
        buf: None,
        left: 0,
        plain: Plain { kind: Kind::Flush, cdw12: 0 },
        dw0: 0,
        error: None,
        open: 0,
        taken: false,
        started: false,
        started_before: false,
        iova: 0,
        lba: 0,
        blocks: 0,
        number: 0,
        position: 0,
    };

    /// Gives the place back, and the operation with its result.
    #[inline]
    pub(crate) fn end(&mut self, result: Result<u32, IoError>) -> Done {
        self.taken = false;
        Done { token: self.token, result, buf: self.buf.take() }
    }

    /// The result of an operation whose commands are all complete.
    #[inline]
    pub(crate) fn result(&self) -> Result<u32, IoError> {
        match self.error {
            None => Ok(self.dw0),
            Some(status) => Err(IoError::Status(status)),
        }
    }
}

/// An I/O queue pair of one namespace. Stays on the thread that opened it.
#[derive(Debug)]
pub struct IoQueue {
    pub(crate) link: Arc<Link>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) rings: Rings,
    pub(crate) slots: Slots,
    pub(crate) ops: Box<[OpEntry]>,
    /// What operations are that are not plain, by the index of their place.
    specials: Box<[OpKind]>,
    pub(crate) ops_free: Vec<u16>,
    /// Operations with pieces not yet given to the device, in the order of submission.
    pub(crate) waiting: VecDeque<u16>,
    /// Operations that ended otherwise than by completions.
    pub(crate) ready: VecDeque<Done>,
    limits: Limits,
    pool: BufferPool,
    /// The device's address of each 2 MiB page of the pool.
    pages: Box<[u64]>,
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
        buffers: &[DmaMapping],
    ) -> Self {
        let depth = rings.layout.entries - 1;
        let count = usize::from(depth);
        let mut ops = Vec::with_capacity(count);
        ops.resize_with(count, || OpEntry::FREE);
        let QueueSettings { limits, io_timeout, abort_grace, requeue } = settings;
        Self {
            link,
            shared,
            rings,
            slots: Slots::new(depth),
            ops: ops.into_boxed_slice(),
            specials: vec![OpKind::Flush; count].into_boxed_slice(),
            ops_free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(count),
            ready: VecDeque::with_capacity(count),
            limits,
            pool: pool.clone(),
            pages: buffers.iter().flat_map(page_addresses).collect(),
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
    #[inline]
    pub fn submit(&mut self, op: Op) -> Result<(), Refused> {
        if (self.life != Life::Live || self.link.state() != state::LIVE)
            && let Some(why) = self.not_live()
        {
            return Err(Refused { op, why });
        }
        let kind = op.kind.kind();
        if let Some(why) = self.limits.refusal(kind, &op) {
            return Err(Refused { op, why: RefusedWhy::Invalid(why) });
        }
        let Some(iova) = self.iova_of(kind, &op) else {
            return Err(Refused { op, why: RefusedWhy::Invalid("the buffer is of another pool") });
        };
        // Those that wait to be given back still count.
        if self.ready.len() >= self.ops_free.len() {
            return Err(Refused { op, why: RefusedWhy::Full });
        }
        let Some(index) = self.ops_free.pop() else {
            return Err(Refused { op, why: RefusedWhy::Full });
        };
        let Some(entry) = self.ops.get_mut(usize::from(index)) else {
            return Err(Refused { op, why: RefusedWhy::Full });
        };
        entry.blocks = match kind {
            Kind::Flush | Kind::Raw => 1,
            Kind::DatasetManagement => {
                op.buf.as_ref().map_or(0, |buf| (buf.len() / DATASET_RANGE_LEN) as u64)
            }
            _ => op.blocks,
        };
        entry.left = entry.blocks;
        (entry.taken, entry.started, entry.started_before) = (true, false, false);
        (entry.open, entry.error, entry.dw0) = (0, None, 0);
        (entry.token, entry.lba, entry.iova) = (op.token, op.lba, iova);
        entry.plain = Plain::of(kind, &op.kind);
        entry.buf = op.buf;
        entry.number = self.stats.submitted;
        entry.position = self.journal.as_ref().map_or(0, Journal::position);
        if !kind.is_plain()
            && let Some(special) = self.specials.get_mut(usize::from(index))
        {
            *special = op.kind;
        }
        self.stats.submitted += 1;
        // In the order of submission: at once only when none waits.
        if !self.waiting.is_empty() || !self.slots.has_free() || self.issue(index) {
            self.waiting.push_back(index);
            self.pump();
        }
        Ok(())
    }

    /// Why nothing can be submitted, unless it can after all.
    #[cold]
    fn not_live(&mut self) -> Option<RefusedWhy> {
        match self.link.state() {
            state::LIVE if self.life == Life::New => {
                self.begin_life();
                None
            }
            state::GONE | state::STRANDED | state::REFUSED => Some(RefusedWhy::Gone),
            _ => Some(RefusedWhy::NotReady),
        }
    }

    /// The device's address of the operation's data; 0 when it moves none.
    #[inline]
    fn iova_of(&self, kind: Kind, op: &Op) -> Option<u64> {
        let Some(buf) = op.buf.as_ref().filter(|_| kind.moves_data()) else { return Some(0) };
        if !buf.is_of(&self.pool) {
            return None;
        }
        // No buffer leaves its page, and the pool has those of when the queue was opened.
        self.pages.get(buf.page_index()).map(|page| page + buf.page_offset() as u64)
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
    #[inline]
    fn issue(&mut self, index: u16) -> bool {
        let Some(op) = self.ops.get_mut(usize::from(index)) else { return false };
        let Some((slot, cid)) = self.slots.open(index) else { return true };
        let (kind, limits) = (op.plain.kind, &self.limits);
        let begun = op.blocks - op.left;
        let lba = op.lba + begun;
        let blocks = limits.piece(kind, lba, op.left);
        let lists = Lists { rings: &self.rings, mapping: &self.link.mapping, slot };
        let (begun_len, len) = (begun << limits.block_shift, blocks << limits.block_shift);
        let data = if kind.moves_blocks() {
            point(limits, op.iova + begun_len, len, &lists)
        } else if kind.is_plain() {
            Some(Pointer::default())
        } else {
            let buffer = (op.iova, op.buf.as_ref().map_or(0, DmaBuf::len) as u64);
            point_special(limits, kind, (lba, blocks), buffer, &lists)
        };
        let Some(data) = data else {
            // Not reached while the layout is right. Without addresses nothing may go to the device.
            self.life = Life::Poisoned;
            self.shared.ask_reset(wish::VIOLATION);
            return false;
        };
        op.left -= blocks;
        op.open += 1;
        op.started = true;
        if kind.is_plain() {
            self.rings.push(limits.command(kind, cid, (lba, blocks), op.plain.cdw12, data));
        } else {
            let special = self.specials.get(usize::from(index)).copied().unwrap_or(OpKind::Flush);
            self.rings.push(limits.special_command(special, cid, blocks, begun, data));
        }
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
                Ok(Some(index)) => {
                    let Some(op) = self.ops.get_mut(usize::from(index)) else { break };
                    // Made where it belongs: `push` would make it elsewhere first, and copy it.
                    done.resize_with(done.len() + 1, || op.end(op.result()));
                }
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

    /// Books one completion: the operation to be ended when it was its last one, whose place counts as free already.
    /// Err when no command of ours explains it.
    #[inline]
    pub(crate) fn complete(&mut self, cqe: &CompletionQueueEntry) -> Result<Option<u16>, ()> {
        if !self.rings.is_plausible(cqe) {
            return Err(());
        }
        let index = self.slots.close(cqe.cid.get()).ok_or(())?;
        let op = self.ops.get_mut(usize::from(index)).filter(|op| op.taken).ok_or(())?;
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
            let special = self.specials.get(usize::from(index)).copied().unwrap_or(OpKind::Flush);
            journal.note(changes(op.plain.op_kind(special), op.lba, op.blocks));
        }
        self.ops_free.push(index);
        Ok(Some(index))
    }

    /// Looks for late commands: has them aborted, then the controller reset.
    #[cold]
    fn watch(&mut self, now: Moment) {
        self.watch_at = now.after((self.io_timeout / 8).min(self.abort_grace));
        for (cid, slot) in self.slots.open_mut() {
            match slot.deadline() {
                // Measured from here: nobody may have polled, or looked at the clock, for a long time before.
                None => slot.set_deadline(now.after(self.io_timeout)),
                Some(deadline) if now < deadline => {}
                Some(_) if slot.aborting => self.shared.ask_reset(wish::TIMEOUT),
                Some(_) => {
                    if self.shared.ask_abort(&self.link, cid) {
                        slot.aborting = true;
                        slot.set_deadline(now.after(self.abort_grace));
                        self.stats.timeouts += 1;
                    }
                }
            }
        }
    }
}

/// The device's address of each 2 MiB of a mapping.
fn page_addresses(mapping: &DmaMapping) -> impl Iterator<Item = u64> {
    let offsets = (0..mapping.region().len()).step_by(BUFFER_LEN_MAX);
    offsets.filter_map(|at| mapping.iova(at)).map(|iova| iova.0)
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
        for op in self.ops.iter_mut().filter(|op| op.taken && op.started) {
            mem::forget(op.buf.take());
        }
    }
}
