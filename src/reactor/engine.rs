//! From a validated I/O command to device operations and back.
//!
//! ```text
//!   IoCommand + DmaBuf                         IoDone
//!        |                                       ^
//!        v     one flight or job a command       |
//!   [ lookup in the frozen map ] -> segments -> [ count down, first error wins ]
//!        |  every segment checked                ^
//!        v                                       |
//!   BlockQueue::submit (one per segment) -> BlockQueue::poll      or, of a device that does all at once, BlockQueue::execute
//! ```
//!
//! A command that crosses extents becomes several operations over slices of one buffer and completes once. When a
//! device queue is full the job remembers how far it came and goes on after the next completions. Nothing here
//! allocates once [`IoEngine::reserve`] and [`IoEngine::open`] have run.
//!
//! Not here: parsing and validating commands (`fabrics`), moving data to and from the host (`tcp`).

mod batches;
mod flight;
mod job;

use std::collections::VecDeque;
use std::sync::Arc;

use hugepage_alloc::{BufferPool, DmaBuf};
use nvme_spec::Status;

use self::batches::Batches;
pub use self::batches::Timing;
use self::flight::{Flight, Fresh, Whose, failed, whose};
use super::places::Places;
use super::slab::{Key, Slab};
use crate::block::{BlockDevice, BlockDone, BlockError, BlockErrorKind, BlockQueue};
use crate::extent::LookupCursor;
use crate::fabrics::{Export, ExportSlot, IoCommand};
use crate::probes;
use crate::ring::Ring;
use crate::stage::{Stamp, Stamps};
use crate::units::ByteLen;

/// Operations one core keeps in flight on one device.
pub(super) const DEVICE_QUEUE_DEPTH: usize = 1024;
/// Completions taken from one device in one turn, so that no device starves the sockets. What is done at once is not among
/// them: of that there is as much as sockets brought.
const POLL_BUDGET: usize = 256;
/// So many lookups in small maps take less time than a look at the clock.
const LOOKUPS_FREE: usize = 2;
/// So many completions are dealt with in less time than a look at the clock is worth.
const HANDLED_FREE: usize = 4;

/// The end of a command, for the connection that brought it.
#[derive(Debug)]
pub struct IoDone {
    /// The connection.
    pub owner: Key,
    /// The connection's own number for the command.
    pub request: u32,
    /// How it ended.
    pub status: Status,
    /// The buffer that was handed in, or another as in [`BlockDone`].
    pub buf: Option<DmaBuf>,
    /// For [`IoEngine::stamps`].
    pub timing: Timing,
}

impl IoDone {
    /// A place for one.
    fn vacant() -> Self {
        Self {
            owner: Key::from_bits(0),
            request: 0,
            status: Status::SUCCESS,
            buf: None,
            timing: Timing::NONE,
        }
    }
}

/// What a core knows of an export.
struct CoreExport {
    export: Arc<Export>,
    queue: usize,
    cursor: LookupCursor,
    in_flight: u32,
    goes_with_ring: bool,
    is_immediate: bool,
    /// What reads may have for a buffer.
    lends: Option<DmaBuf>,
}

/// A device queue and how many exports of this core use it.
struct DeviceQueue {
    device: Arc<dyn BlockDevice>,
    queue: Box<dyn BlockQueue>,
    users: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Segments are still to be submitted.
    Transfer,
    /// All segments are out; a flush is to follow when they are done.
    Transferred,
    /// A flush is to be submitted.
    FlushDue,
    /// Nothing more will be submitted.
    Ending,
}

/// A command under way that takes several operations, or waits for room.
struct Job {
    owner: Key,
    request: u32,
    command: IoCommand,
    /// The command's. An operation for all of it takes it along.
    buf: Option<DmaBuf>,
    /// Next byte of the namespace to submit, and where the current range ends.
    next: u64,
    end: u64,
    /// Dataset Management only: the next range of the buffer.
    next_range: u16,
    pending: u32,
    status: Status,
    stage: Stage,
    batch: u32,
}

/// Why a submission stopped before the end of the range.
enum Stopped {
    QueueFull,
    Failed(Status),
}

/// The I/O side of one core: its exports, its device queues, its jobs.
pub struct IoEngine {
    ring: Ring,
    pool: BufferPool,
    exports: Vec<Option<CoreExport>>,
    queues: Vec<Option<DeviceQueue>>,
    /// Commands on their devices with one operation.
    flights: Slab<Flight>,
    /// All others that are launched.
    jobs: Slab<Job>,
    /// Commands that the connections of this core may have in flight.
    reserved: usize,
    /// Begun in this turn, and not looked up yet.
    fresh: Places<Fresh>,
    stalled: VecDeque<Key>,
    done: Places<IoDone>,
    batches: Batches,
    /// The batch of those that are fresh, and whether a lookup of one of them may take longer than a look at the clock.
    batch: Option<u32>,
    looks_up: bool,
    harvest: Vec<BlockDone>,
    armed: bool,
    /// When this turn began, or devices were told last.
    now: Stamp,
    /// Completions that this turn dealt with before any command was begun.
    handled: usize,
}

impl IoEngine {
    /// An engine without exports.
    #[must_use]
    pub fn new(ring: Ring, pool: BufferPool) -> Self {
        Self {
            ring,
            pool,
            exports: Vec::new(),
            queues: Vec::new(),
            flights: Slab::default(),
            jobs: Slab::default(),
            reserved: 0,
            fresh: Places::default(),
            stalled: VecDeque::new(),
            done: Places::default(),
            batches: Batches::new(),
            batch: None,
            looks_up: false,
            harvest: Vec::with_capacity(POLL_BUDGET),
            armed: false,
            now: Stamp::now(),
            handled: 0,
        }
    }

    /// The ring has just had its turn: it began to submit at `submitted`, and now it is `now`.
    pub(super) fn turned(&mut self, submitted: Stamp, now: Stamp) {
        self.batches.submitted(submitted);
        self.now = now;
    }

    /// So many completions were dealt with in this turn; from here on, commands are begun.
    pub(super) const fn handled(&mut self, completions: usize) {
        self.handled = completions;
    }

    /// When a command that has just ended passed its stages. Its arrival nobody knows here: it is that of its beginning.
    #[must_use]
    pub fn stamps(&self, timing: Timing) -> Stamps {
        self.batches.stamps(timing, self.now)
    }

    /// When this turn began, or devices were told last: what has ended is found complete at this moment.
    #[must_use]
    #[inline]
    pub const fn now(&self) -> Stamp {
        self.now
    }

    /// Makes room for the commands of one more connection, which has `commands` in flight at the most. To be given
    /// back by [`IoEngine::unreserve`] when the connection ends.
    pub fn reserve(&mut self, commands: usize) {
        self.reserved += commands;
        self.flights.reserve(self.reserved);
        self.jobs.reserve(self.reserved);
        self.fresh.reserve(self.reserved);
        self.stalled.reserve(self.reserved.saturating_sub(self.stalled.len()));
        self.done.reserve(self.reserved);
    }

    /// A connection that reserved room has ended, and has nothing in flight.
    pub fn unreserve(&mut self, commands: usize) {
        self.reserved = self.reserved.saturating_sub(commands);
    }

    /// Opens an export on this core; exports of one device share its queue.
    ///
    /// # Errors
    /// When the device gives this core no queue.
    pub fn open(&mut self, export: Arc<Export>) -> Result<(), BlockError> {
        let slot = export.slot.0 as usize;
        if self.exports.len() <= slot {
            self.exports.resize_with(slot + 1, || None);
        }
        if let Some(held) = &self.exports[slot] {
            // Never another's blocks under a number that hosts may hold.
            let is_it = Arc::ptr_eq(&held.export, &export);
            return if is_it { Ok(()) } else { Err(BlockError::new(BlockErrorKind::Internal)) };
        }
        let queue = match self.queue_of(&export.device) {
            Some(index) => index,
            None => self.open_queue(&export.device)?,
        };
        let Some(device_queue) = &mut self.queues[queue] else {
            return Err(BlockError::new(BlockErrorKind::Internal));
        };
        device_queue.users += 1;
        let device = &device_queue.queue;
        self.exports[slot] = Some(CoreExport {
            export,
            queue,
            cursor: LookupCursor::default(),
            in_flight: 0,
            goes_with_ring: device.goes_with_ring(),
            is_immediate: device.is_immediate(),
            lends: device.lends(),
        });
        Ok(())
    }

    fn queue_of(&self, device: &Arc<dyn BlockDevice>) -> Option<usize> {
        self.queues
            .iter()
            .position(|held| held.as_ref().is_some_and(|held| Arc::ptr_eq(&held.device, device)))
    }

    fn open_queue(&mut self, device: &Arc<dyn BlockDevice>) -> Result<usize, BlockError> {
        let queue = device.open_queue(&self.ring, &self.pool, DEVICE_QUEUE_DEPTH)?;
        let held = Some(DeviceQueue { device: Arc::clone(device), queue, users: 0 });
        if let Some(index) = self.queues.iter().position(Option::is_none) {
            self.queues[index] = held;
            return Ok(index);
        }
        self.queues.push(held);
        Ok(self.queues.len() - 1)
    }

    /// Forgets an export. Refused (false) while commands of it are in flight.
    pub fn close(&mut self, slot: ExportSlot) -> bool {
        let Some(entry) = self.exports.get_mut(slot.0 as usize) else { return true };
        let Some(held) = entry else { return true };
        if held.in_flight > 0 {
            return false;
        }
        let queue = held.queue;
        *entry = None;
        if let Some(Some(device_queue)) = self.queues.get_mut(queue) {
            device_queue.users -= 1;
            if device_queue.users == 0 {
                self.queues[queue] = None;
            }
        }
        true
    }

    /// Commands of an export that this core has in flight.
    #[must_use]
    pub fn in_flight(&self, slot: ExportSlot) -> u32 {
        self.exports.get(slot.0 as usize).and_then(Option::as_ref).map_or(0, |held| held.in_flight)
    }

    /// Whether commands are in flight of an export whose map is in doubt.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.exports.iter().flatten().any(|held| held.in_flight > 0 && held.export.is_in_doubt())
    }

    /// Looks up and submits the commands that were begun since the last time. What the lookups of one turn need of their maps
    /// is fetched all at once by then: in a map of many extents each would wait for memory by itself.
    pub fn launch(&mut self) {
        let Some(batch) = self.batch.take() else { return };
        let takes_long = std::mem::take(&mut self.looks_up) || self.fresh.len() > LOOKUPS_FREE;
        let parsed = if takes_long { Stamp::now() } else { Stamp::NONE };
        self.batches.parsed(batch, parsed, self.fresh.len());
        if self.done.is_empty() {
            self.batches.collected();
        }
        // Launching begins none.
        let mut fresh = std::mem::take(&mut self.fresh);
        for command in fresh.as_mut_slice() {
            self.launch_one(batch, command);
            debug_assert!(command.buf.is_none(), "it went along");
        }
        self.fresh = fresh.emptied();
    }

    /// A buffer for a read of so many bytes that takes none from the pool: its device [lends](BlockQueue::lends) it.
    #[must_use]
    #[inline(always)]
    pub fn lend(&self, slot: ExportSlot, len: ByteLen) -> Option<DmaBuf> {
        let lends = self.exports.get(slot.0 as usize)?.as_ref()?.lends.as_ref()?;
        lends.try_slice(0, usize::try_from(len.0).ok()?)
    }

    /// Begins a command, which goes to its device with the next [`IoEngine::launch`]. Its end, also an immediate one, arrives by
    /// [`Connection::on_io`](super::Connection::on_io).
    ///
    /// `buf` holds the data of a write (or the ranges of a Dataset Management), or takes that of a read; its
    /// length is the command's. The fence is looked at when it is launched: data of a write may have travelled while it fell.
    #[inline(always)]
    pub fn start(&mut self, owner: Key, request: u32, command: IoCommand, buf: Option<DmaBuf>) {
        let Some(Some(held)) = self.exports.get_mut(command.slot.0 as usize) else {
            let status = Status::INVALID_NAMESPACE.with_dnr();
            return self.end(owner, request, status, &mut { buf }, Timing::NONE);
        };
        let Some(fresh) = self.fresh.next(Fresh::vacant) else {
            // Connections reserve room for each command they may have, so this is a shortage, not a habit.
            let status = Status::COMMAND_INTERRUPTED;
            return self.end(owner, request, status, &mut { buf }, Timing::NONE);
        };
        (fresh.owner, fresh.request, fresh.command, fresh.buf) = (owner, request, command, buf);
        held.in_flight += 1;
        if let Some(map) = held.export.map.as_ref().filter(|_| command.len.0 > 0) {
            fresh.hint = map.prefetch(command.start);
            self.looks_up |= map.is_large();
        }
        if self.batch.is_none() {
            self.begin_batch();
        }
    }

    #[inline(never)]
    fn begin_batch(&mut self) {
        let begun = if self.handled <= HANDLED_FREE { self.now } else { Stamp::now() };
        self.batch = Some(self.batches.open(begun));
    }

    /// Submits as much of a job as the device takes, and ends it when nothing is left and nothing is out.
    fn advance(&mut self, key: Key) {
        let Self { jobs, exports, queues, stalled, .. } = self;
        let Some(job) = jobs.get_mut(key) else { return };
        let Some(Some(held)) = exports.get_mut(job.command.slot.0 as usize) else { return };
        let Some(Some(device)) = queues.get_mut(held.queue) else { return };
        if let Some(status) = held.export.refusal(job.command.kind.is_write()) {
            // The fence fell while the job waited for room on the device, or between its transfers and its flush.
            job.fail(status);
        }
        match job.submit(key, held, device.queue.as_mut()) {
            Ok(()) => {}
            Err(Stopped::QueueFull) => stalled.push_back(key),
            Err(Stopped::Failed(status)) => job.fail(status),
        }
        self.settle(key);
    }

    /// Ends the job if it has come to its end.
    fn settle(&mut self, key: Key) {
        let Some(job) = self.jobs.get_mut(key) else { return };
        if job.pending > 0 {
            return;
        }
        if job.status.is_success() {
            match job.stage {
                Stage::Transfer | Stage::FlushDue => return,
                Stage::Transferred => {
                    job.stage = Stage::FlushDue;
                    return self.advance(key);
                }
                Stage::Ending => {}
            }
        }
        let (owner, request, status, mut buf) = (job.owner, job.request, job.status, job.buf.take());
        let (slot, batch) = (job.command.slot, job.batch);
        // Not taken out: what is left of it is of no use, and not worth a copy.
        self.jobs.free(key);
        let timing = self.leave(slot, batch);
        self.end(owner, request, status, &mut buf, timing);
    }

    /// Launches what is left, rings the doorbells, takes completions, and goes on with what had to wait. Returns how much was done.
    pub fn poll(&mut self) -> usize {
        self.launch();
        let mut work = 0;
        for index in 0..self.queues.len() {
            let Some(Some(device)) = self.queues.get_mut(index) else { continue };
            device.queue.commit();
        }
        if self.batches.are_untold() {
            self.now = Stamp::now();
            self.batches.rung(self.now);
        }
        for index in 0..self.queues.len() {
            let Some(Some(device)) = self.queues.get_mut(index) else { continue };
            work += device.queue.poll(POLL_BUDGET, &mut self.harvest);
            while let Some(done) = self.harvest.pop() {
                self.complete(done);
            }
        }
        if work > 0 {
            for _ in 0..self.stalled.len() {
                let Some(key) = self.stalled.pop_front() else { break };
                if let Some(job) = self.jobs.get_mut(key) {
                    job.batch = self.batches.again(job.batch);
                }
                self.advance(key);
            }
        }
        work
    }

    #[inline]
    fn complete(&mut self, done: BlockDone) {
        probes::device_done(done.token.0, done.result.is_err());
        match whose(done.token) {
            Whose::Flight(key) => self.land(key, done),
            Whose::Job(key) => self.complete_job(key, done),
        }
    }

    #[inline(never)]
    fn complete_job(&mut self, key: Key, done: BlockDone) {
        let Some(job) = self.jobs.get_mut(key) else { return };
        job.pending = job.pending.saturating_sub(1);
        job.take_back(done.buf);
        if let Err(error) = done.result {
            job.fail(failed(job.request, &error));
        }
        self.settle(key);
    }

    /// Whether commands have ended.
    #[inline]
    #[must_use]
    pub const fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// The commands that have ended. To be given back by [`IoEngine::give_back`], so that nothing is allocated.
    #[inline]
    #[must_use]
    pub(super) fn take_done(&mut self) -> Places<IoDone> {
        std::mem::take(&mut self.done)
    }

    /// What `take_done` gave, dealt with. Buffers that were left in it are dropped.
    #[inline]
    pub(super) fn give_back(&mut self, mut done: Places<IoDone>) {
        for left in done.as_mut_slice() {
            left.buf = None;
        }
        let mut meanwhile = std::mem::replace(&mut self.done, done.emptied());
        // Nothing ends meanwhile, but if it does it is not lost.
        for IoDone { owner, request, status, buf, timing } in meanwhile.as_mut_slice() {
            self.end(*owner, *request, *status, buf, *timing);
        }
    }

    /// Gets ready for the core to sleep on its ring. False when something is ready, or has to be polled for.
    pub fn arm(&mut self) -> bool {
        self.armed = true;
        let may_sleep = self.done.is_empty()
            && self.fresh.is_empty()
            && self.queues.iter_mut().flatten().all(|held| held.queue.outstanding() == 0 || held.queue.arm());
        if !may_sleep {
            self.disarm();
        }
        may_sleep
    }

    /// The core is awake, and polls again.
    pub fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.queues.iter_mut().flatten().for_each(|held| held.queue.disarm());
        }
    }

    /// Commands in flight over all exports.
    #[must_use]
    pub fn jobs(&self) -> usize {
        self.fresh.len() + self.flights.len() + self.jobs.len()
    }
}

#[cfg(test)]
mod tests;
