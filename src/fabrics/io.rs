//! I/O queues: raw commands become typed, checked ones (NVM Command Set Specification 1.1, section 3).
//!
//! Nothing here takes a lock, allocates or touches a shared reference count while a command is good: the queue holds
//! its namespace table and asks two atomic numbers whether table and controller are still those it knows.

use std::mem::size_of;
use std::sync::Arc;

use nvme_spec::fabrics::FabricsCommandType;
use nvme_spec::nvm::{DatasetManagementRange, IoCdw12, dsm};
use nvme_spec::{Nsid, NvmOpcode, Status, SubmissionQueueEntry};
use zerocopy::FromBytes;

use super::beat::Beat;
use super::command::{CommandError, at, check_flags};
use super::controller::Controller;
use super::exchange::{Begin, CloseReason, Completion, IoCommand, IoKind};
use super::export::{Export, Grant};
use super::options::TRANSFER_BYTES_MAX;
use super::sgl::{self, DataLocation};
use super::subsystem::{NamespaceTable, Subsystem};
use crate::units::{BlockCount, BlockSize, ByteLen, ByteOffset, Lba};

/// One I/O queue.
pub(super) struct IoQueue {
    controller: Arc<Controller>,
    subsystem: Arc<Subsystem>,
    table: Arc<NamespaceTable>,
    generation: u64,
    epoch: u32,
    in_capsule_bytes: u32,
    qid: u16,
    disconnected: bool,
    beat: Arc<Beat>,
}

impl IoQueue {
    /// A queue that [`Controller::join`]ed in `epoch`.
    pub(super) fn new(
        controller: Arc<Controller>,
        qid: u16,
        epoch: u32,
        beat: Arc<Beat>,
        in_capsule_bytes: u32,
    ) -> Self {
        let subsystem = Arc::clone(&controller.subsystem);
        // The generation first: a table that is newer than its number is fetched once more, an older one never kept.
        let generation = subsystem.generation();
        let table = subsystem.table();
        Self {
            controller,
            subsystem,
            table,
            generation,
            epoch,
            in_capsule_bytes,
            qid,
            disconnected: false,
            beat,
        }
    }

    pub(super) fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    pub(super) fn qid(&self) -> u16 {
        self.qid
    }

    /// Why the queue has to end, if it has to.
    pub(super) fn ended(&self) -> Option<CloseReason> {
        if self.disconnected {
            return Some(CloseReason::Disconnected);
        }
        if self.controller.is_current(self.epoch) {
            return None;
        }
        Some(self.controller.ended().unwrap_or(CloseReason::Reset))
    }

    /// The queue is drained and gone.
    pub(super) fn leave(self) {
        self.controller.leave(self.qid);
    }

    /// Takes a read or a write that is good; all else, of which nothing is noted, is for [`IoQueue::begin`].
    #[inline(always)]
    pub(super) fn begin_transfer(&mut self, sqe: &SubmissionQueueEntry) -> Option<IoCommand> {
        let is_write = match NvmOpcode(sqe.opcode) {
            NvmOpcode::READ => false,
            NvmOpcode::WRITE => true,
            _ => return None,
        };
        check_flags(sqe).ok()?;
        if !self.controller.is_current(self.epoch) || self.disconnected {
            return None;
        }
        let in_capsule_bytes = self.in_capsule_bytes;
        if self.subsystem.generation() != self.generation {
            self.refresh();
        }
        let export = self.table.get(sqe.nsid()).filter(|export| export.is_live())?;
        if is_write && export.read_only {
            return None;
        }
        let kind = if is_write { IoKind::Write } else { IoKind::Read };
        let command = transfer(export, sqe, kind, in_capsule_bytes).ok()?;
        self.beat.command();
        if is_write {
            self.beat.write(command.len.0)
        } else {
            self.beat.read(command.len.0)
        }
        Some(command)
    }

    /// Takes a command.
    #[inline]
    pub(super) fn begin(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        self.beat.command();
        check_flags(sqe)?;
        if !self.controller.is_current(self.epoch) || self.disconnected {
            return Err(CommandError::retryable(Status::ABORTED_SQ_DELETION));
        }
        match NvmOpcode(sqe.opcode) {
            NvmOpcode::READ => self.read(sqe),
            NvmOpcode::WRITE => self.write(sqe),
            NvmOpcode::FLUSH => self.flush(sqe),
            NvmOpcode::WRITE_ZEROES => self.write_zeroes(sqe),
            NvmOpcode::DATASET_MANAGEMENT => self.dataset_management(sqe),
            NvmOpcode::FABRICS => self.fabrics(sqe),
            _ => Err(CommandError::opcode()),
        }
    }

    /// Takes the ranges of a Dataset Management command.
    pub(super) fn finish(&mut self, sqe: &SubmissionQueueEntry, data: &[u8]) -> Result<Begin, CommandError> {
        if NvmOpcode(sqe.opcode) != NvmOpcode::DATASET_MANAGEMENT {
            return Err(CommandError::sequence());
        }
        let ranges = range_count(sqe);
        let export = self.writable(sqe)?;
        if data.len() < usize::from(ranges) * size_of::<DatasetManagementRange>() {
            return Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
        }
        for range in raw_ranges(data, ranges) {
            extent_of(export, range.slba.get(), u64::from(range.length.get()))?;
        }
        if sqe.cdw11.get() & dsm::AD == 0 || !export.device.info().deallocate {
            // The other attributes are hints, and so is deallocation where the device cannot do it.
            return Ok(Begin::Respond(Completion::SUCCESS));
        }
        let kind = IoKind::DatasetManagement { ranges };
        Ok(Begin::Io(IoCommand {
            slot: export.slot,
            kind,
            start: ByteOffset(0),
            len: ByteLen(0),
            fua: false,
        }))
    }

    #[inline]
    fn read(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        let in_capsule_bytes = self.in_capsule_bytes;
        let command = transfer(self.export(sqe.nsid(), false)?, sqe, IoKind::Read, in_capsule_bytes)?;
        self.beat.read(command.len.0);
        Ok(Begin::Io(command))
    }

    #[inline]
    fn write(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        let in_capsule_bytes = self.in_capsule_bytes;
        let command = transfer(self.writable(sqe)?, sqe, IoKind::Write, in_capsule_bytes)?;
        self.beat.write(command.len.0);
        Ok(Begin::Io(command))
    }

    fn flush(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        // VWC says that the broadcast identifier is not supported, so it is looked up, and refused, like any other.
        let slot = self.export(sqe.nsid(), false)?.slot;
        let (start, len) = (ByteOffset(0), ByteLen(0));
        Ok(Begin::Io(IoCommand { slot, kind: IoKind::Flush, start, len, fua: false }))
    }

    fn write_zeroes(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        let export = self.writable(sqe)?;
        let info = export.device.info();
        if !info.write_zeroes {
            return Err(CommandError::opcode());
        }
        let cdw12 = IoCdw12::from_bits(sqe.cdw12.get());
        let (start, len) = extent_of(export, sqe.cdw10_11(), u64::from(cdw12.nlb_z()) + 1)?;
        let kind = IoKind::WriteZeroes { deallocate: cdw12.deac() && info.deallocate };
        Ok(Begin::Io(IoCommand { slot: export.slot, kind, start, len, fua: cdw12.fua() }))
    }

    fn dataset_management(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        let in_capsule_bytes = self.in_capsule_bytes;
        self.writable(sqe)?;
        let len = sgl::locate(sqe, in_capsule_bytes)?.len();
        let needed = u32::from(range_count(sqe)) * 16;
        // Linux always sends room for 256 ranges, however many it names.
        if len < needed || len as usize > dsm::RANGES_MAX * size_of::<DatasetManagementRange>() {
            return Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
        }
        Ok(Begin::NeedData { len })
    }

    #[cold]
    fn fabrics(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        match FabricsCommandType(sgl::fctype(sqe)) {
            FabricsCommandType::DISCONNECT => {
                let recfmt = sqe.cdw10.get() & 0xFFFF;
                if recfmt != 0 {
                    return Err(CommandError::at(Status::CONNECT_INCOMPATIBLE_FORMAT, at::CDW10));
                }
                self.disconnected = true;
                Ok(Begin::RespondThenClose(Completion::SUCCESS))
            }
            FabricsCommandType::CONNECT => Err(CommandError::sequence()),
            _ => Err(CommandError::field(at::FCTYPE)),
        }
    }

    /// The namespace of an identifier, open to commands.
    #[inline]
    fn export(&mut self, nsid: Nsid, is_write: bool) -> Result<&Export, CommandError> {
        if self.subsystem.generation() != self.generation {
            self.refresh();
        }
        match self.table.get(nsid) {
            Some(export) if export.is_live() => Ok(export),
            _ => Err(self.refusal(nsid, is_write)),
        }
    }

    #[inline]
    fn writable(&mut self, sqe: &SubmissionQueueEntry) -> Result<&Export, CommandError> {
        let export = self.export(sqe.nsid(), true)?;
        if export.read_only { Err(write_protected()) } else { Ok(export) }
    }

    #[cold]
    fn refresh(&mut self) {
        self.generation = self.subsystem.generation();
        self.table = self.subsystem.table();
    }

    /// Why a namespace takes no commands.
    #[cold]
    fn refusal(&self, nsid: Nsid, is_write: bool) -> CommandError {
        // An export that was replaced under this very command has a successor: then trying again is right.
        let now = self.subsystem.table();
        let exports = self.table.get(nsid).into_iter().chain(now.get(nsid));
        for export in exports {
            if export.grant() != Grant::Removed {
                // `None`: it is open again by now.
                let status = export.refusal(is_write).unwrap_or(Status::NAMESPACE_NOT_READY);
                return CommandError::retryable(status);
            }
        }
        CommandError::at(Status::INVALID_NAMESPACE, at::NSID)
    }
}

#[cold]
fn write_protected() -> CommandError {
    CommandError::at(Status::NAMESPACE_WRITE_PROTECTED, at::NSID)
}

/// A Read or Write with all its checks.
#[inline(always)]
fn transfer(
    export: &Export,
    sqe: &SubmissionQueueEntry,
    kind: IoKind,
    in_capsule_bytes: u32,
) -> Result<IoCommand, CommandError> {
    let cdw12 = IoCdw12::from_bits(sqe.cdw12.get());
    let (start, len) = extent_of(export, sqe.cdw10_11(), u64::from(cdw12.nlb_z()) + 1)?;
    if len.0 > u64::from(TRANSFER_BYTES_MAX) {
        return Err(CommandError::field(at::CDW12));
    }
    let location: DataLocation = sgl::locate(sqe, in_capsule_bytes)?;
    if u64::from(location.len()) != len.0 {
        return Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
    }
    Ok(IoCommand { slot: export.slot, kind, start, len, fua: cdw12.fua() })
}

/// The bytes of a block range, when the namespace holds it.
#[inline(always)]
fn extent_of(export: &Export, slba: u64, blocks: u64) -> Result<(ByteOffset, ByteLen), CommandError> {
    const OUT_OF_RANGE: CommandError = CommandError::at(Status::LBA_OUT_OF_RANGE, at::CDW10);
    let start = export.block_size.offset_of(Lba(slba)).ok_or(OUT_OF_RANGE)?;
    let len = export.block_size.len_of(BlockCount(blocks)).ok_or(OUT_OF_RANGE)?;
    let end = start.0.checked_add(len.0).ok_or(OUT_OF_RANGE)?;
    if end > export.len.0 { Err(OUT_OF_RANGE) } else { Ok((start, len)) }
}

/// NR of a Dataset Management command as a count: 1 to 256.
fn range_count(sqe: &SubmissionQueueEntry) -> u16 {
    let [nr_z, ..] = sqe.cdw10.get().to_le_bytes();
    u16::from(nr_z) + 1
}

fn raw_ranges(data: &[u8], ranges: u16) -> impl Iterator<Item = DatasetManagementRange> {
    data.chunks_exact(size_of::<DatasetManagementRange>())
        .take(usize::from(ranges))
        .filter_map(|range| DatasetManagementRange::read_from_bytes(range).ok())
}

/// The ranges of a Dataset Management command, for [`IoKind::DatasetManagement`]: where in the namespace, and how long.
/// Empty ranges, and ranges that no namespace can have, are left out.
pub fn dsm_ranges(
    data: &[u8],
    ranges: u16,
    block_size: BlockSize,
) -> impl Iterator<Item = (ByteOffset, ByteLen)> {
    raw_ranges(data, ranges).filter(|range| range.length.get() != 0).filter_map(move |range| {
        let start = block_size.offset_of(Lba(range.slba.get()))?;
        Some((start, block_size.len_of(BlockCount(u64::from(range.length.get())))?))
    })
}
