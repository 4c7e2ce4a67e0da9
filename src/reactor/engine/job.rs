//! A command on its way to the device: its segments, its flush, its ranges.

use hugepage_alloc::DmaBuf;
use nvme_spec::Status;
use nvme_spec::nvm::DatasetManagementRange;
use zerocopy::{FromZeros, IntoBytes};

use super::flight::of_job;
use super::{CoreExport, Job, Stage, Stopped};
use crate::block::{BlockOp, BlockOpKind, BlockQueue};
use crate::fabrics::{FenceReason, IoCommand, IoKind, of_lookup_error};
use crate::probes;
use crate::reactor::slab::Key;
use crate::units::{ByteLen, ByteOffset};

impl Job {
    /// A command of which nothing is submitted yet.
    #[inline]
    pub(super) fn new(owner: Key, request: u32, command: IoCommand, buf: Option<DmaBuf>, batch: u32) -> Self {
        let (next, end) = match command.kind {
            IoKind::Read | IoKind::Write | IoKind::WriteZeroes { .. } => {
                (command.start.0, command.start.0.saturating_add(command.len.0))
            }
            IoKind::Flush | IoKind::DatasetManagement { .. } => (0, 0),
        };
        let stage = if matches!(command.kind, IoKind::Flush) { Stage::FlushDue } else { Stage::Transfer };
        let status = Status::SUCCESS;
        Self { owner, request, command, buf, next, end, next_range: 0, pending: 0, status, stage, batch }
    }

    pub(super) fn fail(&mut self, status: Status) {
        if self.status.is_success() {
            self.status = status;
        }
    }

    /// Whether durability needs a flush after the segments: a write has FUA in each operation, the others do not.
    fn wants_flush(&self) -> bool {
        self.command.fua && matches!(self.command.kind, IoKind::WriteZeroes { .. })
    }

    pub(super) fn submit(
        &mut self,
        key: Key,
        held: &mut CoreExport,
        queue: &mut dyn BlockQueue,
    ) -> Result<(), Stopped> {
        if !self.status.is_success() {
            return Ok(());
        }
        match self.stage {
            Stage::Transfer => {}
            Stage::FlushDue => return self.submit_flush(key, queue),
            Stage::Transferred | Stage::Ending => return Ok(()),
        }
        loop {
            self.submit_range(key, held, queue)?;
            if !self.load_range(held)? {
                break;
            }
        }
        self.stage = if self.wants_flush() { Stage::Transferred } else { Stage::Ending };
        Ok(())
    }

    fn submit_flush(&mut self, key: Key, queue: &mut dyn BlockQueue) -> Result<(), Stopped> {
        let op = BlockOp {
            token: of_job(key),
            kind: BlockOpKind::Flush,
            offset: ByteOffset(0),
            len: ByteLen(0),
            buf: None,
        };
        queue.submit(op).map_err(|_| Stopped::QueueFull)?;
        self.pending += 1;
        self.stage = Stage::Ending;
        Ok(())
    }

    /// Takes the next range of a Dataset Management; false when there is none.
    fn load_range(&mut self, held: &CoreExport) -> Result<bool, Stopped> {
        let IoKind::DatasetManagement { ranges } = self.command.kind else { return Ok(false) };
        if self.next_range >= ranges {
            return Ok(false);
        }
        let Some(buf) = &self.buf else { return Err(Stopped::Failed(Status::INTERNAL_ERROR)) };
        let mut range = DatasetManagementRange::new_zeroed();
        let at = usize::from(self.next_range) * size_of::<DatasetManagementRange>();
        buf.read_into(at, range.as_mut_bytes());
        self.next_range += 1;
        // The session checked the ranges; what is computed here is checked again by the lookup.
        let block_bytes = u64::from(held.export.block_size.bytes());
        let out_of_range = Stopped::Failed(Status::LBA_OUT_OF_RANGE.with_dnr());
        let start = range.slba.get().checked_mul(block_bytes);
        let len = u64::from(range.length.get()).checked_mul(block_bytes);
        let Some((start, len)) = start.zip(len) else { return Err(out_of_range) };
        let Some(end) = start.checked_add(len).filter(|&end| end <= held.export.len.0) else {
            return Err(out_of_range);
        };
        (self.next, self.end) = (start, end);
        Ok(true)
    }

    /// Submits the rest of the current range.
    fn submit_range(
        &mut self,
        key: Key,
        held: &mut CoreExport,
        queue: &mut dyn BlockQueue,
    ) -> Result<(), Stopped> {
        if self.next >= self.end {
            return Ok(());
        }
        let (start, len) = (ByteOffset(self.next), ByteLen(self.end - self.next));
        let Some(map) = &held.export.map else {
            return self.submit_segment(key, start, start, len, queue);
        };
        let failed = |error| {
            tracing::error!(nsid = %held.export.nsid, %error, "a lookup left the frozen map; export fenced");
            held.export.fence(FenceReason::MapInDoubt);
            Stopped::Failed(of_lookup_error(&error))
        };
        for segment in map.segments(&mut held.cursor, start, len).map_err(failed)? {
            // The frozen map has the last word on every segment, whatever the lookup and its cache said.
            map.check(&segment).map_err(failed)?;
            let disagrees = crate::extent::LookupError::Disagrees { segment };
            let served = map.served_offset(segment.file_offset).ok_or(disagrees).map_err(failed)?;
            self.submit_segment(key, served, segment.device_offset, segment.len, queue)?;
        }
        if self.next == self.end {
            return Ok(());
        }
        // Segments that end early would pass a buffer of somebody's old bytes off as what was read.
        tracing::error!(nsid = %held.export.nsid, "a lookup covered only a part of its range");
        Err(Stopped::Failed(Status::INTERNAL_ERROR.with_dnr()))
    }

    fn submit_segment(
        &mut self,
        key: Key,
        from: ByteOffset,
        device_offset: ByteOffset,
        len: ByteLen,
        queue: &mut dyn BlockQueue,
    ) -> Result<(), Stopped> {
        if from.0 != self.next || len.0 > self.end - self.next {
            return Err(Stopped::Failed(Status::INTERNAL_ERROR));
        }
        let kind = match self.command.kind {
            IoKind::Read => BlockOpKind::Read,
            IoKind::Write => BlockOpKind::Write { fua: self.command.fua },
            IoKind::WriteZeroes { deallocate } => BlockOpKind::WriteZeroes { deallocate, fua: false },
            IoKind::DatasetManagement { .. } => BlockOpKind::Deallocate,
            IoKind::Flush => BlockOpKind::Flush,
        };
        let buf = match kind {
            // The device has it until the operation ends: a count less.
            BlockOpKind::Read | BlockOpKind::Write { .. } if self.is_whole(from, len) => self.buf.take(),
            BlockOpKind::Read | BlockOpKind::Write { .. } => Some(self.slice_for(from, len)?),
            _ => None,
        };
        let op = BlockOp { token: of_job(key), kind, offset: device_offset, len, buf };
        if let Err(op) = queue.submit(op) {
            self.take_back(op.buf);
            return Err(Stopped::QueueFull);
        }
        probes::device_submit(of_job(key).0, device_offset.0, len.0, self.command.kind.is_write());
        self.pending += 1;
        self.next += len.0;
        Ok(())
    }

    /// Whether a segment is all that the buffer is for.
    fn is_whole(&self, from: ByteOffset, len: ByteLen) -> bool {
        from == self.command.start && self.buf.as_ref().is_some_and(|buf| buf.len() as u64 == len.0)
    }

    /// The buffer of an operation is no longer the device's: if it was that of the command, it is again.
    pub(super) fn take_back(&mut self, buf: Option<DmaBuf>) {
        if self.buf.is_none() {
            self.buf = buf;
        }
    }

    /// The part of the command's buffer that belongs to a segment.
    fn slice_for(&self, from: ByteOffset, len: ByteLen) -> Result<DmaBuf, Stopped> {
        let at = from.0.checked_sub(self.command.start.0).and_then(|at| usize::try_from(at).ok());
        let len = usize::try_from(len.0).ok();
        let slice = at.zip(len).and_then(|(at, len)| self.buf.as_ref()?.try_slice(at, len));
        slice.ok_or(Stopped::Failed(Status::INTERNAL_ERROR))
    }
}
