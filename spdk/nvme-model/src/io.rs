//! I/O commands of the NVM Command Set (NVM section 3).

use std::sync::Arc;

use nvme_spec::identify::oncs;
use nvme_spec::nvm::{CopyCdw12, CopySourceRange, DatasetManagementRange, IoCdw12, dsm};
use nvme_spec::{Nsid, NvmOpcode, Status, SubmissionQueueEntry};
use zerocopy::FromBytes;

use crate::controller::Controller;
use crate::disk::{Task, Work};
use crate::namespace::Namespace;
use crate::store::Bounce;
use crate::work::Outcome;

/// Command specific 83h and 87h (NVM section 3.3.2): Command Size Limit Exceeded, Overlapping I/O Range.
const COMMAND_SIZE_LIMIT_EXCEEDED: Status = Status::new(1, 0x83);
const OVERLAPPING_IO_RANGE: Status = Status::new(1, 0x87);
/// Zeros are written in pieces of this many bytes.
const ZERO_PIECE: usize = 64 << 10;

impl Controller {
    pub(crate) fn execute_io(&mut self, sqe: &SubmissionQueueEntry) -> Outcome {
        self.try_io(sqe).into()
    }

    /// Sends a command to the disk when it is one that waits for it, or executes it. `None` for the former.
    pub(crate) fn begin_io(&mut self, sqid: u16, sqe: &SubmissionQueueEntry) -> Option<Outcome> {
        let opcode = NvmOpcode(sqe.opcode);
        let waits = matches!(opcode, NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::FLUSH);
        let namespace = self.shared.namespace(sqe.nsid.get()).filter(|namespace| namespace.is_file());
        match namespace.filter(|_| waits && sqe.fuse() == 0) {
            Some(namespace) => self.send_to_disk(sqid, sqe, namespace).err().map(Outcome::from),
            None => Some(self.execute_io(sqe)),
        }
    }

    fn send_to_disk(
        &mut self,
        sqid: u16,
        sqe: &SubmissionQueueEntry,
        namespace: Arc<Namespace>,
    ) -> Result<(), Status> {
        let opcode = NvmOpcode(sqe.opcode);
        let cdw12 = IoCdw12::from_bits(sqe.cdw12.get());
        let (lba, blocks) = (sqe.cdw10_11(), u64::from(cdw12.nlb_z()) + 1);
        let (mut len, mut work) = (0, Work::Flush);
        if opcode != NvmOpcode::FLUSH {
            if opcode == NvmOpcode::WRITE && namespace.options.read_only {
                return Err(Status::NAMESPACE_WRITE_PROTECTED.with_dnr());
            }
            if !namespace.holds(lba, blocks) {
                return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
            }
            self.counts.add(opcode, namespace.bytes(blocks));
            len = self.transfer_len(&namespace, blocks)?;
            let durable = cdw12.fua() || !self.is_cached();
            work = if opcode == NvmOpcode::READ { Work::Read } else { Work::Write(durable) };
        }
        // Also for a read: what is wrong with its pointers is said before the disk is asked.
        let segments = match work {
            Work::Flush => Vec::new(),
            _ => self.iommu.segments(sqe, len, self.page(), self.sgl_granularity())?,
        };
        let Some(disk) = &mut self.disk else { return Err(Status::INTERNAL_ERROR) };
        let mut data = disk.memory(len);
        if let Work::Write(_) = work {
            self.iommu.gather(&segments, &mut data)?;
        }
        disk.send(Task { sqid, sqe: *sqe, namespace, work, lba, data });
        Ok(())
    }

    /// Whether a completed write may be lost on power failure.
    const fn is_cached(&self) -> bool {
        self.options.volatile_write_cache && !self.features.write_cache_off
    }

    fn try_io(&mut self, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        if sqe.fuse() != 0 {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let opcode = NvmOpcode(sqe.opcode);
        if opcode == NvmOpcode::FLUSH {
            return self.flush(sqe.nsid());
        }
        let needed = match opcode {
            NvmOpcode::READ | NvmOpcode::WRITE => 0,
            NvmOpcode::COMPARE => oncs::COMPARE,
            NvmOpcode::WRITE_ZEROES => oncs::WRITE_ZEROES,
            NvmOpcode::VERIFY => oncs::VERIFY,
            NvmOpcode::DATASET_MANAGEMENT => oncs::DATASET_MANAGEMENT,
            NvmOpcode::COPY => oncs::COPY,
            _ => return Err(Status::INVALID_OPCODE.with_dnr()),
        };
        if self.options.oncs & needed != needed {
            return Err(Status::INVALID_OPCODE.with_dnr());
        }
        let namespace = self.shared.namespace(sqe.nsid.get()).ok_or(Status::INVALID_NAMESPACE.with_dnr())?;
        let reads = matches!(opcode, NvmOpcode::READ | NvmOpcode::COMPARE | NvmOpcode::VERIFY);
        if !reads && namespace.options.read_only {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.with_dnr());
        }
        if opcode == NvmOpcode::DATASET_MANAGEMENT {
            return self.dataset_management(&namespace, sqe);
        }
        if opcode == NvmOpcode::COPY {
            return self.copy(&namespace, sqe);
        }
        let cdw12 = IoCdw12::from_bits(sqe.cdw12.get());
        let (lba, blocks) = (sqe.cdw10_11(), u64::from(cdw12.nlb_z()) + 1);
        if !namespace.holds(lba, blocks) {
            return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
        }
        self.counts.add(opcode, namespace.bytes(blocks));
        match opcode {
            NvmOpcode::READ => self.read(&namespace, sqe, lba, blocks),
            NvmOpcode::WRITE => self.write(&namespace, sqe, lba, blocks, cdw12.fua()),
            NvmOpcode::COMPARE => self.compare(&namespace, sqe, lba, blocks),
            NvmOpcode::WRITE_ZEROES => self.write_zeroes(&namespace, lba, blocks, cdw12.fua()),
            _ => self.verify(&namespace, lba, blocks),
        }
    }

    fn flush(&self, nsid: Nsid) -> Result<(), Status> {
        let nsids = if nsid == Nsid::ALL { self.shared.nsids() } else { vec![nsid.0] };
        for nsid in nsids {
            let namespace = self.shared.namespace(nsid).ok_or(Status::INVALID_NAMESPACE.with_dnr())?;
            namespace.flush().map_err(|_| Status::WRITE_FAULT)?;
        }
        Ok(())
    }

    /// The length in bytes, when MDTS allows it.
    fn transfer_len(&self, namespace: &Namespace, blocks: u64) -> Result<usize, Status> {
        let bytes = namespace.bytes(blocks);
        if self.options.mdts != 0 && bytes > 4096 << self.options.mdts {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        usize::try_from(bytes).map_err(|_| Status::INVALID_FIELD.with_dnr())
    }

    fn read(
        &mut self,
        ns: &Namespace,
        sqe: &SubmissionQueueEntry,
        lba: u64,
        blocks: u64,
    ) -> Result<(), Status> {
        let len = self.transfer_len(ns, blocks)?;
        let segments = self.iommu.segments(sqe, len, self.page(), self.sgl_granularity())?;
        self.data.resize(len);
        ns.read(lba, &mut self.data).map_err(|_| Status::UNRECOVERED_READ_ERROR)?;
        self.iommu.scatter(&segments, &self.data)
    }

    /// Fetches the command's data into `self.data`.
    fn fetch_data(&mut self, sqe: &SubmissionQueueEntry, len: usize) -> Result<(), Status> {
        let segments = self.iommu.segments(sqe, len, self.page(), self.sgl_granularity())?;
        self.data.resize(len);
        self.iommu.gather(&segments, &mut self.data)
    }

    fn write(
        &mut self,
        ns: &Namespace,
        sqe: &SubmissionQueueEntry,
        lba: u64,
        blocks: u64,
        fua: bool,
    ) -> Result<(), Status> {
        let len = self.transfer_len(ns, blocks)?;
        self.fetch_data(sqe, len)?;
        ns.write(lba, &self.data).map_err(|_| Status::WRITE_FAULT)?;
        self.settle(ns, fua)
    }

    /// Makes a write durable where it must be.
    fn settle(&self, ns: &Namespace, fua: bool) -> Result<(), Status> {
        if fua || !self.is_cached() { ns.flush().map_err(|_| Status::WRITE_FAULT) } else { Ok(()) }
    }

    fn compare(
        &mut self,
        ns: &Namespace,
        sqe: &SubmissionQueueEntry,
        lba: u64,
        blocks: u64,
    ) -> Result<(), Status> {
        let len = self.transfer_len(ns, blocks)?;
        self.fetch_data(sqe, len)?;
        let mut stored = Bounce::of(len);
        ns.read(lba, &mut stored).map_err(|_| Status::UNRECOVERED_READ_ERROR)?;
        if *stored == *self.data { Ok(()) } else { Err(Status::COMPARE_FAILURE.with_dnr()) }
    }

    fn verify(&mut self, ns: &Namespace, lba: u64, blocks: u64) -> Result<(), Status> {
        if self.options.vsl != 0 && ns.bytes(blocks) > 4096 << self.options.vsl {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let len = usize::try_from(ns.bytes(blocks)).map_err(|_| Status::INVALID_FIELD)?;
        self.data.resize(len);
        ns.read(lba, &mut self.data).map_err(|_| Status::UNRECOVERED_READ_ERROR)
    }

    fn write_zeroes(&self, ns: &Namespace, lba: u64, blocks: u64, fua: bool) -> Result<(), Status> {
        if self.options.wzsl != 0 && ns.bytes(blocks) > 4096 << self.options.wzsl {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        zero(ns, lba, blocks)?;
        self.settle(ns, fua)
    }

    fn dataset_management(&mut self, ns: &Namespace, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        let count = (sqe.cdw10.get() & dsm::NR_MASK) as usize + 1;
        self.fetch_data(sqe, count * 16)?;
        if sqe.cdw11.get() & dsm::AD == 0 {
            return Ok(());
        }
        if self.options.dmrl != 0 && count > usize::from(self.options.dmrl) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let mut ranges = Vec::with_capacity(count);
        let mut all = 0;
        for bytes in self.data.chunks_exact(16) {
            let range = DatasetManagementRange::read_from_bytes(bytes).map_err(|_| Status::INTERNAL_ERROR)?;
            let (lba, blocks) = (range.slba.get(), range.length.get());
            if !ns.holds(lba, u64::from(blocks)) {
                return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
            }
            if self.options.dmrsl != 0 && blocks > self.options.dmrsl {
                return Err(Status::INVALID_FIELD.with_dnr());
            }
            ranges.push((lba, u64::from(blocks)));
            all += u64::from(blocks);
        }
        if self.options.dmsl != 0 && all > self.options.dmsl {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        // Deallocated blocks read as zeros: DLFEAT says so.
        ranges.into_iter().try_for_each(|(lba, blocks)| zero(ns, lba, blocks))
    }
}

impl Controller {
    /// Copies by descriptor format 0h: all sources are read before anything is written.
    fn copy(&mut self, ns: &Namespace, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        let cdw12 = CopyCdw12::from_bits(sqe.cdw12.get());
        if cdw12.format() != 0 {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let (range_max, all_max, ranges_z) = ns.options.copy_limits;
        if cdw12.nr_z() > ranges_z {
            return Err(COMMAND_SIZE_LIMIT_EXCEEDED.with_dnr());
        }
        self.fetch_data(sqe, (usize::from(cdw12.nr_z()) + 1) * size_of::<CopySourceRange>())?;
        let mut sources = Vec::new();
        let mut all = 0;
        for bytes in self.data.chunks_exact(size_of::<CopySourceRange>()) {
            let range = CopySourceRange::read_from_bytes(bytes).map_err(|_| Status::INTERNAL_ERROR)?;
            let (lba, blocks) = (range.slba.get(), u64::from(range.nlb_z.get()) + 1);
            if !ns.holds(lba, blocks) {
                return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
            }
            if blocks > u64::from(range_max) {
                return Err(COMMAND_SIZE_LIMIT_EXCEEDED.with_dnr());
            }
            sources.push((lba, blocks));
            all += blocks;
        }
        if all > u64::from(all_max) {
            return Err(COMMAND_SIZE_LIMIT_EXCEEDED.with_dnr());
        }
        let to = sqe.cdw10_11();
        if !ns.holds(to, all) {
            return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
        }
        if sources.iter().any(|&(lba, blocks)| lba < to + all && to < lba + blocks) {
            return Err(OVERLAPPING_IO_RANGE.with_dnr());
        }
        let bytes = |blocks| usize::try_from(ns.bytes(blocks)).map_err(|_| Status::INTERNAL_ERROR);
        self.data.resize(bytes(all)?);
        let mut at = 0;
        for (lba, blocks) in sources {
            let end = at + bytes(blocks)?;
            let part = self.data.get_mut(at..end).ok_or(Status::INTERNAL_ERROR)?;
            ns.read(lba, part).map_err(|_| Status::UNRECOVERED_READ_ERROR)?;
            at = end;
        }
        ns.write(to, &self.data).map_err(|_| Status::WRITE_FAULT)?;
        self.settle(ns, cdw12.fua())
    }
}

fn zero(ns: &Namespace, mut lba: u64, mut blocks: u64) -> Result<(), Status> {
    let piece_blocks = (ZERO_PIECE >> ns.options.block_shift).max(1) as u64;
    let zeros = Bounce::of(ZERO_PIECE.max(1 << ns.options.block_shift));
    while blocks > 0 {
        let part = blocks.min(piece_blocks);
        let len = usize::try_from(ns.bytes(part)).map_err(|_| Status::INTERNAL_ERROR)?;
        ns.write(lba, zeros.get(..len).ok_or(Status::INTERNAL_ERROR)?).map_err(|_| Status::WRITE_FAULT)?;
        lba += part;
        blocks -= part;
    }
    Ok(())
}
