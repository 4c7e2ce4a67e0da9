//! Commands that one device operation does, which nearly all are: no more is kept of them than who is to hear of their end.
//!
//! ```text
//!   start -> Fresh -> launch -+- one operation for all of it --> Flight --> the device --> IoDone
//!                             +- the same, a device that does it at once ----------------> IoDone
//!                             '- several, a flush, no room ----> Job
//! ```
//!
//! The buffer travels with the operation, so that a flight is half a cache line where a [`Job`] is three.
//!
//! What is moved here is moved where it lies, from list to list, and built in place: a value that is built in pieces and copied as a whole
//! right after makes the processor wait until all pieces have left its store buffer, some 20 cycles each time: no load is answered from
//! two stores.

use hugepage_alloc::DmaBuf;
use nvme_spec::Status;

use super::batches::Timing;
use super::{CoreExport, IoDone, IoEngine, Job};
use crate::block::{BlockDone, BlockError, BlockOp, BlockOpKind, OpToken};
use crate::extent::LookupHint;
use crate::fabrics::{ExportSlot, IoCommand, IoKind, of_block_error};
use crate::probes;
use crate::reactor::slab::Key;
use crate::units::{ByteLen, ByteOffset};

/// In the token of an operation: that its key is one of a job.
const OF_JOB: u64 = 1 << 63;

/// The token of all operations that their device does at once, for tracers: no key has it.
const AT_ONCE: OpToken = OpToken(u64::MAX);

/// A command that was begun in this turn.
pub(super) struct Fresh {
    pub(super) owner: Key,
    pub(super) request: u32,
    pub(super) command: IoCommand,
    /// Of its first byte in its export's map, if that was asked. Else it may be that of an earlier command.
    pub(super) hint: LookupHint,
    pub(super) buf: Option<DmaBuf>,
}

impl Fresh {
    /// A place for one.
    pub(super) fn vacant() -> Self {
        let (slot, kind, start, len) = (ExportSlot(u32::MAX), IoKind::Flush, ByteOffset(0), ByteLen(0));
        let command = IoCommand { slot, kind, start, len, fua: false };
        Self { owner: Key::from_bits(0), request: 0, command, hint: LookupHint::NONE, buf: None }
    }
}

/// A command on its device.
pub(super) struct Flight {
    owner: Key,
    request: u32,
    slot: ExportSlot,
    batch: u32,
}

/// Whose an operation is.
pub(super) enum Whose {
    Flight(Key),
    Job(Key),
}

/// The token of an operation of a job.
pub(super) const fn of_job(key: Key) -> OpToken {
    OpToken(key.to_bits() | OF_JOB)
}

/// Whose token it is.
pub(super) const fn whose(token: OpToken) -> Whose {
    let key = Key::from_bits(token.0);
    if token.0 & OF_JOB == 0 { Whose::Flight(key) } else { Whose::Job(key) }
}

impl IoEngine {
    /// Looks a command up that was begun in this turn, and submits it. Its buffer is taken along.
    pub(super) fn launch_one(&mut self, batch: u32, fresh: &mut Fresh) {
        let Self { exports, queues, flights, .. } = self;
        let IoCommand { slot, len, kind: command_kind, .. } = fresh.command;
        // An export with a command in flight is not closed.
        let Some(Some(held)) = exports.get_mut(slot.0 as usize) else {
            return self.refuse(batch, fresh, Status::INTERNAL_ERROR);
        };
        let Some(Some(device)) = queues.get_mut(held.queue) else {
            return self.refuse(batch, fresh, Status::INTERNAL_ERROR);
        };
        if let Some(status) = held.export.refusal(command_kind.is_write()) {
            // The fence fell before it came to the device.
            return self.refuse(batch, fresh, status);
        }
        let Some((kind, offset)) = held.in_one(fresh) else { return self.begin_job(batch, fresh) };
        if held.is_immediate {
            let mut op = BlockOp { token: AT_ONCE, kind, offset, len, buf: fresh.buf.take() };
            probes::device_submit(AT_ONCE.0, offset.0, len.0, kind.is_write());
            let result = device.queue.execute(&mut op);
            return self.end_now(batch, fresh, &mut op.buf, result);
        }
        let Fresh { owner, request, .. } = *fresh;
        let Ok(key) = flights.insert(Flight { owner, request, slot, batch }) else {
            return self.refuse(batch, fresh, Status::COMMAND_INTERRUPTED);
        };
        let token = OpToken(key.to_bits());
        if let Err(op) = device.queue.submit(BlockOp { token, kind, offset, len, buf: fresh.buf.take() }) {
            // It waits for room, as a job.
            flights.free(key);
            fresh.buf = op.buf;
            return self.begin_job(batch, fresh);
        }
        probes::device_submit(token.0, offset.0, len.0, command_kind.is_write());
    }

    /// A command was done by its device at once.
    #[inline]
    fn end_now(
        &mut self,
        batch: u32,
        done: &Fresh,
        buf: &mut Option<DmaBuf>,
        result: Result<(), BlockError>,
    ) {
        probes::device_done(AT_ONCE.0, result.is_err());
        let Fresh { owner, request, command, .. } = done;
        let status = result.map_or_else(|error| failed(*request, &error), |()| Status::SUCCESS);
        let timing = self.leave(command.slot, batch);
        self.end(*owner, *request, status, buf, timing);
    }

    /// A command that takes more than one operation, or has to wait.
    #[inline(never)]
    fn begin_job(&mut self, batch: u32, fresh: &mut Fresh) {
        let Fresh { owner, request, command, .. } = *fresh;
        match self.jobs.insert(Job::new(owner, request, command, fresh.buf.take(), batch)) {
            Ok(key) => self.advance(key),
            Err(job) => {
                fresh.buf = job.buf;
                self.refuse(batch, fresh, Status::COMMAND_INTERRUPTED);
            }
        }
    }

    /// Ends a command that never came to its device.
    #[cold]
    fn refuse(&mut self, batch: u32, fresh: &mut Fresh, status: Status) {
        self.leave(fresh.command.slot, batch);
        self.end(fresh.owner, fresh.request, status, &mut fresh.buf, Timing::NONE);
    }

    /// The operation of a flight ended.
    #[inline]
    pub(super) fn land(&mut self, key: Key, mut done: BlockDone) {
        let Some(&Flight { owner, request, slot, batch }) = self.flights.get(key) else { return };
        self.flights.free(key);
        let status = match done.result {
            Ok(()) => Status::SUCCESS,
            Err(error) => failed(request, &error),
        };
        let timing = self.leave(slot, batch);
        self.end(owner, request, status, &mut done.buf, timing);
    }

    /// A command has ended, with this buffer, which is taken.
    #[inline]
    pub(super) fn end(
        &mut self,
        owner: Key,
        request: u32,
        status: Status,
        buf: &mut Option<DmaBuf>,
        timing: Timing,
    ) {
        let Some(done) = self.done.next(IoDone::vacant) else {
            self.more_done();
            return self.end(owner, request, status, buf, timing);
        };
        (done.owner, done.request, done.status, done.timing) = (owner, request, status, timing);
        done.buf = buf.take();
    }

    /// Connections reserve room for each command they may have: a shortage, not a habit.
    #[cold]
    fn more_done(&mut self) {
        self.done.reserve(self.done.len() + 1);
    }

    /// A command of an export and of a batch ends: how it was given to its device.
    #[inline]
    pub(super) fn leave(&mut self, slot: ExportSlot, batch: u32) -> Timing {
        let mut goes_with_ring = false;
        if let Some(Some(held)) = self.exports.get_mut(slot.0 as usize) {
            held.in_flight -= 1;
            goes_with_ring = held.goes_with_ring;
        }
        self.batches.leave(batch);
        Timing::new(batch, goes_with_ring)
    }
}

/// What a host is told of a device's error.
#[cold]
pub(super) fn failed(request: u32, error: &BlockError) -> Status {
    tracing::warn!(request, %error, "device operation failed");
    of_block_error(error.kind)
}

impl CoreExport {
    /// Where on the device all of a command's data is, when one operation does for it; none for all that a [`Job`] has to look into,
    /// lookups that fail among it.
    #[inline]
    fn in_one(&mut self, fresh: &Fresh) -> Option<(BlockOpKind, ByteOffset)> {
        let IoCommand { kind, start, len, fua, .. } = fresh.command;
        let kind = match kind {
            IoKind::Read => BlockOpKind::Read,
            IoKind::Write => BlockOpKind::Write { fua },
            IoKind::WriteZeroes { .. } | IoKind::Flush | IoKind::DatasetManagement { .. } => return None,
        };
        if fresh.buf.as_ref().is_none_or(|buf| buf.len() as u64 != len.0) {
            return None;
        }
        let Some(map) = &self.export.map else { return Some((kind, start)) };
        let segment = map.segment(&mut self.cursor, fresh.hint, start, len)?;
        // The frozen map has the last word on every segment, whatever the lookup and its cache said.
        map.check(&segment).ok()?;
        let is_all = segment.len == len && map.served_offset(segment.file_offset) == Some(start);
        is_all.then_some((kind, segment.device_offset))
    }
}
