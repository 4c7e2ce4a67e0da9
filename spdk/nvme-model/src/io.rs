//! I/O commands of the NVM Command Set (NVM section 3).

use nvme_spec::identify::oncs;
use nvme_spec::nvm::{DatasetManagementRange, IoCdw12, dsm};
use nvme_spec::{Nsid, NvmOpcode, Status, SubmissionQueueEntry};
use zerocopy::FromBytes;

use crate::controller::Controller;
use crate::namespace::Namespace;
use crate::work::Outcome;

/// Zeros are written in pieces of this many bytes.
const ZERO_PIECE: usize = 64 << 10;

impl Controller {
    pub(crate) fn execute_io(&mut self, sqe: &SubmissionQueueEntry) -> Outcome {
        self.try_io(sqe).into()
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
            _ => return Err(Status::INVALID_OPCODE.with_dnr()),
        };
        if self.options.oncs & needed != needed {
            return Err(Status::INVALID_OPCODE.with_dnr());
        }
        let namespace = self.shared.namespace(sqe.nsid.get()).ok_or(Status::INVALID_NAMESPACE.with_dnr())?;
        let writes =
            matches!(opcode, NvmOpcode::WRITE | NvmOpcode::WRITE_ZEROES | NvmOpcode::DATASET_MANAGEMENT);
        if writes && namespace.options.read_only {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.with_dnr());
        }
        if opcode == NvmOpcode::DATASET_MANAGEMENT {
            return self.dataset_management(&namespace, sqe);
        }
        let cdw12 = IoCdw12::from_bits(sqe.cdw12.get());
        let (lba, blocks) = (sqe.cdw10_11(), u64::from(cdw12.nlb_z()) + 1);
        if !namespace.holds(lba, blocks) {
            return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
        }
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
        let segments = self.iommu.segments(sqe, len, self.page(), self.options.sgl)?;
        self.data.resize(len, 0);
        ns.read(lba, &mut self.data).map_err(|_| Status::UNRECOVERED_READ_ERROR)?;
        self.iommu.scatter(&segments, &self.data)
    }

    /// Fetches the command's data into `self.data`.
    fn fetch_data(&mut self, sqe: &SubmissionQueueEntry, len: usize) -> Result<(), Status> {
        let segments = self.iommu.segments(sqe, len, self.page(), self.options.sgl)?;
        self.data.resize(len, 0);
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
        let cached = self.options.volatile_write_cache && !self.features.write_cache_off;
        if fua || !cached { ns.flush().map_err(|_| Status::WRITE_FAULT) } else { Ok(()) }
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
        let mut stored = vec![0; len];
        ns.read(lba, &mut stored).map_err(|_| Status::UNRECOVERED_READ_ERROR)?;
        if stored == self.data { Ok(()) } else { Err(Status::COMPARE_FAILURE.with_dnr()) }
    }

    fn verify(&mut self, ns: &Namespace, lba: u64, blocks: u64) -> Result<(), Status> {
        let len = usize::try_from(ns.bytes(blocks)).map_err(|_| Status::INVALID_FIELD)?;
        self.data.resize(len, 0);
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
        let mut ranges = Vec::with_capacity(count);
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
        }
        // Deallocated blocks read as zeros: DLFEAT says so.
        ranges.into_iter().try_for_each(|(lba, blocks)| zero(ns, lba, blocks))
    }
}

fn zero(ns: &Namespace, mut lba: u64, mut blocks: u64) -> Result<(), Status> {
    let piece_blocks = (ZERO_PIECE >> ns.options.block_shift).max(1) as u64;
    let zeros = vec![0; ZERO_PIECE.max(1 << ns.options.block_shift)];
    while blocks > 0 {
        let part = blocks.min(piece_blocks);
        let len = usize::try_from(ns.bytes(part)).map_err(|_| Status::INTERNAL_ERROR)?;
        ns.write(lba, &zeros[..len]).map_err(|_| Status::WRITE_FAULT)?;
        lba += part;
        blocks -= part;
    }
    Ok(())
}
