//! Operations, and how each is cut into commands that the controller takes.

use hugepage_alloc::DmaBuf;
use nvme_spec::identify::oncs;
use nvme_spec::nvm::{CopyCdw12, CopySourceRange, DatasetManagementRange, IoCdw12, dsm};
use nvme_spec::{NvmOpcode, SubmissionQueueEntry};
use zerocopy::FromBytes;

use crate::error::IoError;
use crate::info::{ControllerInfo, NLB_MAX, NamespaceInfo};

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Fill the buffer from the namespace.
    Read,
    /// Write the buffer to the namespace; with `fua` it is durable when complete.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Succeed when the namespace holds what the buffer holds.
    Compare,
    /// Have the controller read a range without moving it.
    Verify,
    /// Make durable what was complete before.
    Flush,
    /// Make a range read as zeros.
    WriteZeroes {
        /// Whether the blocks may be given up.
        deallocate: bool,
        /// Force unit access.
        fua: bool,
    },
    /// Tell that the contents of a range are no longer needed.
    Deallocate,
    /// Have the controller copy the range to other blocks of the namespace, which do not overlap it.
    Copy {
        /// The first of the other blocks.
        to: u64,
        /// Force unit access.
        fua: bool,
    },
    /// Dataset Management for several ranges at once. The buffer holds them, 1 to 256, as
    /// [`DatasetManagementRange`]s; `lba` and `blocks` are not looked at. Never split: what is more than the
    /// controller takes in one command is refused.
    DatasetManagement {
        /// What it says of them: bits of [`nvme_spec::nvm::dsm`].
        attributes: u32,
    },
    /// A command as it is. Never split; its buffer, if any, is all of its data.
    Raw(RawCommand),
}

impl OpKind {
    /// Whether the buffer of the operation is the data of its commands.
    pub(crate) const fn moves_data(self) -> bool {
        matches!(
            self,
            Self::Read | Self::Write { .. } | Self::Compare | Self::DatasetManagement { .. } | Self::Raw(_)
        )
    }
}

/// Fields of a raw command. Identifier, namespace and data pointer are filled in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawCommand {
    /// OPC.
    pub opcode: u8,
    /// CDW10 to CDW15.
    pub cdw10_15: [u32; 6],
}

/// One operation.
#[derive(Debug)]
pub struct Op {
    /// Comes back in [`Done`].
    pub token: u64,
    /// What to do.
    pub kind: OpKind,
    /// The first block. Flush and raw commands do not look at it.
    pub lba: u64,
    /// How many blocks, above 0. Flush and raw commands do not look at it.
    pub blocks: u64,
    /// For Read, Write and Compare exactly `blocks` long; for raw commands of at most the largest transfer. At an
    /// address that is a multiple of 4, or at any where the controller takes SGLs at any
    /// ([`ControllerInfo::sgl_any_address`]). Other operations do not use it, but give it back.
    pub buf: Option<DmaBuf>,
}

/// One operation's end.
#[derive(Debug)]
pub struct Done {
    /// From [`Op`].
    pub token: u64,
    /// DW0 of the (last) completion, or how it failed.
    pub result: Result<u32, IoError>,
    /// The buffer; absent after [`IoError::Stranded`].
    pub buf: Option<DmaBuf>,
}

/// Bytes of a range of Dataset Management, and of a source range of Copy.
pub(crate) const DATASET_RANGE_LEN: usize = size_of::<DatasetManagementRange>();
pub(crate) const COPY_RANGE_LEN: usize = size_of::<CopySourceRange>();

/// What the commands of a namespace may be, in blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) nsid: u32,
    pub(crate) block_shift: u8,
    blocks: u64,
    transfer_blocks: u64,
    pub(crate) transfer_len: usize,
    write_zeroes_blocks: u64,
    verify_blocks: u64,
    deallocate_blocks: u64,
    /// Blocks of all ranges of a Dataset Management, and the ranges.
    dataset_blocks: u64,
    dataset_ranges: usize,
    /// Blocks of a source range of a Copy, and its ranges. No ranges when it cannot be used.
    copy_range_blocks: u64,
    copy_ranges: u64,
    copy_blocks: u64,
    noiob: u64,
    oncs: u16,
    read_only: bool,
    pub(crate) sgl: bool,
    sgl_any_address: bool,
    /// The controller's memory page in bytes.
    pub(crate) page: usize,
}

impl Limits {
    /// `list_len` bytes are there for the list of a command.
    pub(crate) fn new(
        controller: &ControllerInfo,
        namespace: &NamespaceInfo,
        page: usize,
        list_len: usize,
    ) -> Self {
        let shift = namespace.block_shift;
        let blocks_of = |bytes: u64| if bytes == 0 { NLB_MAX } else { (bytes >> shift).clamp(1, NLB_MAX) };
        let or_none = |limit: u64, none: u64| if limit == 0 { none } else { limit };
        let range = or_none(u64::from(controller.deallocate_blocks_max), u64::from(u32::MAX));
        let ranges_blocks = or_none(controller.dataset_blocks_max, u64::MAX);
        let copy_ranges = if controller.copies_by_format_0 && namespace.copy_blocks_max > 0 {
            u64::from(namespace.copy_ranges_max).min((list_len / COPY_RANGE_LEN) as u64)
        } else {
            0
        };
        Self {
            nsid: namespace.nsid,
            block_shift: shift,
            blocks: namespace.blocks,
            transfer_blocks: blocks_of(u64::from(controller.transfer_len_max)),
            transfer_len: controller.transfer_len_max as usize,
            write_zeroes_blocks: blocks_of(controller.write_zeroes_len_max),
            verify_blocks: blocks_of(controller.verify_len_max),
            deallocate_blocks: range.min(ranges_blocks),
            dataset_blocks: ranges_blocks,
            dataset_ranges: match controller.dataset_ranges_max {
                0 => dsm::RANGES_MAX,
                most => usize::from(most),
            },
            copy_range_blocks: u64::from(namespace.copy_range_blocks_max),
            copy_ranges: if namespace.copy_range_blocks_max == 0 { 0 } else { copy_ranges },
            copy_blocks: u64::from(namespace.copy_blocks_max),
            noiob: match namespace.noiob {
                0 => u64::from(controller.boundary_len) >> shift,
                blocks => u64::from(blocks),
            },
            oncs: controller.oncs,
            read_only: namespace.read_only,
            sgl: controller.sgl,
            sgl_any_address: controller.sgl_any_address,
            page,
        }
    }

    /// Why an operation cannot be given to this namespace; `None` when it can.
    pub(crate) fn refusal(&self, op: &Op) -> Option<&'static str> {
        let needed = match op.kind {
            OpKind::Flush => return None,
            OpKind::Raw(command) => return self.raw_refusal(command, op.buf.as_ref()),
            OpKind::Read | OpKind::Write { .. } => 0,
            OpKind::Compare => oncs::COMPARE,
            OpKind::Verify => oncs::VERIFY,
            OpKind::WriteZeroes { .. } => oncs::WRITE_ZEROES,
            OpKind::Deallocate | OpKind::DatasetManagement { .. } => oncs::DATASET_MANAGEMENT,
            OpKind::Copy { .. } => oncs::COPY,
        };
        if self.oncs & needed != needed {
            return Some("the controller does not offer this command");
        }
        let reads = matches!(op.kind, OpKind::Read | OpKind::Compare | OpKind::Verify);
        if !reads && self.read_only {
            return Some("the namespace is write protected");
        }
        if matches!(op.kind, OpKind::DatasetManagement { .. }) {
            return self.ranges_refusal(op.buf.as_ref());
        }
        if op.blocks == 0 || !self.holds(op.lba, op.blocks) {
            return Some("the range is empty or leaves the namespace");
        }
        if let OpKind::Copy { to, .. } = op.kind {
            return self.copy_refusal(op, to);
        }
        if matches!(op.kind, OpKind::Read | OpKind::Write { .. } | OpKind::Compare) {
            let Some(buf) = &op.buf else { return Some("the operation has no buffer") };
            if buf.len() as u64 >> self.block_shift != op.blocks || buf.len() % (1 << self.block_shift) != 0 {
                return Some("the buffer is not as long as the range");
            }
            if !self.takes_address(buf) {
                return Some("the address of the buffer is no multiple of 4");
            }
        }
        None
    }

    const fn holds(&self, lba: u64, blocks: u64) -> bool {
        lba <= self.blocks && blocks <= self.blocks - lba
    }

    /// PRPs are of dwords (Base section 4.3.1); SGLs of bytes, where the controller says so.
    fn takes_address(&self, buf: &DmaBuf) -> bool {
        self.sgl_any_address || buf.as_ptr().addr().is_multiple_of(4)
    }

    fn copy_refusal(&self, op: &Op, to: u64) -> Option<&'static str> {
        if self.copy_ranges == 0 {
            return Some(
                "the controller takes no copy descriptors of format 0h, or names no limits for them",
            );
        }
        if !self.holds(to, op.blocks) {
            return Some("the range that is copied to leaves the namespace");
        }
        // Pieces are executed in any order.
        (to < op.lba + op.blocks && op.lba < to + op.blocks)
            .then_some("the ranges that are copied from and to overlap")
    }

    fn ranges_refusal(&self, buf: Option<&DmaBuf>) -> Option<&'static str> {
        let Some(buf) = buf else { return Some("the operation has no buffer with its ranges") };
        let count = buf.len() / DATASET_RANGE_LEN;
        if count == 0 || !buf.len().is_multiple_of(DATASET_RANGE_LEN) || count > self.dataset_ranges {
            return Some("the buffer holds no ranges, a part of one, or more than the controller takes");
        }
        if !self.takes_address(buf) {
            return Some("the address of the buffer is no multiple of 4");
        }
        let mut all: u64 = 0;
        for index in 0..count {
            let mut bytes = [0; DATASET_RANGE_LEN];
            buf.read_into(index * DATASET_RANGE_LEN, &mut bytes);
            let Ok(range) = DatasetManagementRange::read_from_bytes(&bytes) else { continue };
            let (lba, blocks) = (range.slba.get(), u64::from(range.length.get()));
            if !self.holds(lba, blocks) {
                return Some("a range leaves the namespace");
            }
            if blocks > self.deallocate_blocks {
                return Some("a range is longer than the controller takes");
            }
            all = all.saturating_add(blocks);
        }
        (all > self.dataset_blocks).then_some("the ranges are together longer than the controller takes")
    }

    fn raw_refusal(&self, command: RawCommand, buf: Option<&DmaBuf>) -> Option<&'static str> {
        let moves = command.opcode & 0b11 != 0;
        match buf {
            None if moves => Some("a raw command that moves data has no buffer"),
            Some(buf) if buf.len() > self.transfer_len => {
                Some("a raw command has more data than fits a transfer")
            }
            Some(buf) if buf.is_empty() || !self.takes_address(buf) => {
                Some("the buffer of a raw command is empty, or its address no multiple of 4")
            }
            _ => None,
        }
    }

    /// How many of the `left` blocks from `lba` the next command may have.
    pub(crate) fn piece(&self, kind: OpKind, lba: u64, left: u64) -> u64 {
        let most = match kind {
            OpKind::Read | OpKind::Write { .. } if self.noiob > 0 => {
                self.transfer_blocks.min(self.noiob - lba % self.noiob)
            }
            OpKind::Read | OpKind::Write { .. } | OpKind::Compare => self.transfer_blocks,
            OpKind::Verify => self.verify_blocks,
            OpKind::WriteZeroes { .. } => self.write_zeroes_blocks,
            OpKind::Deallocate => self.deallocate_blocks,
            OpKind::Copy { .. } => self.copy_blocks.min(self.copy_ranges * self.copy_range_blocks),
            OpKind::Flush | OpKind::Raw(_) | OpKind::DatasetManagement { .. } => left,
        };
        left.min(most)
    }

    /// The ranges of a piece of a Copy: first block and blocks of each.
    pub(crate) fn copy_parts(&self, lba: u64, blocks: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let step = self.copy_range_blocks.max(1);
        (0..blocks.div_ceil(step)).map(move |index| (lba + index * step, (blocks - index * step).min(step)))
    }

    /// The command for a piece, without identifier and data pointer; `begun` blocks of the operation are before it.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "halves of the address; the count was limited by `piece`"
    )]
    pub(crate) fn command(&self, kind: OpKind, lba: u64, blocks: u64, begun: u64) -> SubmissionQueueEntry {
        let nlb = IoCdw12::new().with_nlb_z(blocks.wrapping_sub(1) as u16);
        let (opcode, cdw12) = match kind {
            OpKind::Read => (NvmOpcode::READ, nlb),
            OpKind::Write { fua } => (NvmOpcode::WRITE, nlb.with_fua(fua)),
            OpKind::Compare => (NvmOpcode::COMPARE, nlb),
            OpKind::Verify => (NvmOpcode::VERIFY, nlb),
            OpKind::WriteZeroes { deallocate, fua } => {
                (NvmOpcode::WRITE_ZEROES, nlb.with_fua(fua).with_deac(deallocate))
            }
            OpKind::Deallocate | OpKind::DatasetManagement { .. } => {
                (NvmOpcode::DATASET_MANAGEMENT, IoCdw12::new())
            }
            OpKind::Copy { fua, .. } => {
                let ranges_z = blocks.div_ceil(self.copy_range_blocks.max(1)).saturating_sub(1);
                let cdw12 = CopyCdw12::new().with_nr_z(ranges_z as u8).with_fua(fua);
                (NvmOpcode::COPY, IoCdw12::from_bits(cdw12.into_bits()))
            }
            OpKind::Flush => (NvmOpcode::FLUSH, IoCdw12::new()),
            OpKind::Raw(raw) => return self.raw(raw),
        };
        let mut sqe = SubmissionQueueEntry {
            opcode: opcode.0,
            nsid: self.nsid.into(),
            cdw12: cdw12.into_bits().into(),
            ..Default::default()
        };
        match kind {
            OpKind::Flush => {}
            OpKind::Deallocate => sqe.cdw11 = dsm::AD.into(),
            OpKind::DatasetManagement { attributes } => {
                sqe.cdw10 = (blocks.saturating_sub(1) as u32).into();
                sqe.cdw11 = attributes.into();
            }
            _ => {
                let first = if let OpKind::Copy { to, .. } = kind { to + begun } else { lba };
                sqe.cdw10 = (first as u32).into();
                sqe.cdw11 = ((first >> 32) as u32).into();
            }
        }
        sqe
    }

    fn raw(&self, raw: RawCommand) -> SubmissionQueueEntry {
        let [cdw10, cdw11, cdw12, cdw13, cdw14, cdw15] = raw.cdw10_15.map(Into::into);
        let nsid = self.nsid.into();
        SubmissionQueueEntry {
            opcode: raw.opcode,
            nsid,
            cdw10,
            cdw11,
            cdw12,
            cdw13,
            cdw14,
            cdw15,
            ..Default::default()
        }
    }
}

/// A source range of a Copy.
pub(crate) fn copy_range((lba, blocks): (u64, u64)) -> CopySourceRange {
    let nlb_z = u16::try_from(blocks.saturating_sub(1)).unwrap_or(u16::MAX);
    CopySourceRange { slba: lba.into(), nlb_z: nlb_z.into(), ..Default::default() }
}

/// The one range of a Deallocate.
pub(crate) fn deallocate_range(lba: u64, blocks: u64) -> DatasetManagementRange {
    DatasetManagementRange {
        context_attributes: 0.into(),
        length: u32::try_from(blocks).unwrap_or(u32::MAX).into(),
        slba: lba.into(),
    }
}
