//! Operations, and how each is cut into commands that the controller takes.

use hugepage_alloc::DmaBuf;
use nvme_spec::identify::oncs;
use nvme_spec::nvm::{DatasetManagementRange, IoCdw12, dsm};
use nvme_spec::{NvmOpcode, SubmissionQueueEntry};

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
    /// A command as it is. Never split; its buffer, if any, is all of its data.
    Raw(RawCommand),
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
    /// For Read, Write and Compare exactly `blocks` long, at an address that is a multiple of 4; for raw commands
    /// of at most the largest transfer. Others do not use it, but give it back.
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
    noiob: u64,
    oncs: u16,
    read_only: bool,
    pub(crate) sgl: bool,
    /// The controller's memory page in bytes.
    pub(crate) page: usize,
}

impl Limits {
    pub(crate) fn new(controller: &ControllerInfo, namespace: &NamespaceInfo, page: usize) -> Self {
        let shift = namespace.block_shift;
        let blocks_of = |bytes: u64| if bytes == 0 { NLB_MAX } else { (bytes >> shift).clamp(1, NLB_MAX) };
        let range = u64::from(controller.deallocate_blocks_max);
        Self {
            nsid: namespace.nsid,
            block_shift: shift,
            blocks: namespace.blocks,
            transfer_blocks: blocks_of(u64::from(controller.transfer_len_max)),
            transfer_len: controller.transfer_len_max as usize,
            write_zeroes_blocks: blocks_of(controller.write_zeroes_len_max),
            verify_blocks: blocks_of(controller.verify_len_max),
            deallocate_blocks: if range == 0 { u64::from(u32::MAX) } else { range },
            noiob: u64::from(namespace.noiob),
            oncs: controller.oncs,
            read_only: namespace.read_only,
            sgl: controller.sgl,
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
            OpKind::Deallocate => oncs::DATASET_MANAGEMENT,
        };
        if self.oncs & needed != needed {
            return Some("the controller does not offer this command");
        }
        let writes =
            matches!(op.kind, OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::Deallocate);
        if writes && self.read_only {
            return Some("the namespace is write protected");
        }
        if op.blocks == 0 || op.lba > self.blocks || op.blocks > self.blocks - op.lba {
            return Some("the range is empty or leaves the namespace");
        }
        if matches!(op.kind, OpKind::Read | OpKind::Write { .. } | OpKind::Compare) {
            let Some(buf) = &op.buf else { return Some("the operation has no buffer") };
            if buf.len() as u64 >> self.block_shift != op.blocks || buf.len() % (1 << self.block_shift) != 0 {
                return Some("the buffer is not as long as the range");
            }
            if buf.as_ptr().addr() % 4 != 0 {
                return Some("the address of the buffer is no multiple of 4");
            }
        }
        None
    }

    fn raw_refusal(&self, command: RawCommand, buf: Option<&DmaBuf>) -> Option<&'static str> {
        let moves = command.opcode & 0b11 != 0;
        match buf {
            None if moves => Some("a raw command that moves data has no buffer"),
            Some(buf) if buf.len() > self.transfer_len => {
                Some("a raw command has more data than fits a transfer")
            }
            Some(buf) if buf.is_empty() || buf.as_ptr().addr() % 4 != 0 => {
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
            OpKind::Flush | OpKind::Raw(_) => left,
        };
        left.min(most)
    }

    /// The command for a piece, without identifier and data pointer.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "halves of the address; the count was limited by `piece`"
    )]
    pub(crate) fn command(&self, kind: OpKind, lba: u64, blocks: u64) -> SubmissionQueueEntry {
        let nlb = IoCdw12::new().with_nlb_z(blocks.wrapping_sub(1) as u16);
        let (opcode, cdw12) = match kind {
            OpKind::Read => (NvmOpcode::READ, nlb),
            OpKind::Write { fua } => (NvmOpcode::WRITE, nlb.with_fua(fua)),
            OpKind::Compare => (NvmOpcode::COMPARE, nlb),
            OpKind::Verify => (NvmOpcode::VERIFY, nlb),
            OpKind::WriteZeroes { deallocate, fua } => {
                (NvmOpcode::WRITE_ZEROES, nlb.with_fua(fua).with_deac(deallocate))
            }
            OpKind::Deallocate => (NvmOpcode::DATASET_MANAGEMENT, IoCdw12::new()),
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
            _ => {
                sqe.cdw10 = (lba as u32).into();
                sqe.cdw11 = ((lba >> 32) as u32).into();
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

/// The one range of a Deallocate.
pub(crate) fn deallocate_range(lba: u64, blocks: u64) -> DatasetManagementRange {
    DatasetManagementRange {
        context_attributes: 0.into(),
        length: u32::try_from(blocks).unwrap_or(u32::MAX).into(),
        slba: lba.into(),
    }
}
