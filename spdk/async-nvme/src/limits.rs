//! How operations are checked, and cut into commands that the controller takes.
//!
//! ```text
//!   Op --- Kind ---> Shape of the kind, worked out when the queue is opened
//!                      refusal   why no such operation can be given to this namespace, if so
//!                      head      the first eight bytes of its commands, but for the identifier
//!                      most      blocks of one command
//! ```
//!
//! On the I/O path there are no divisions here and no tables but this one.

use hugepage_alloc::DmaBuf;
use nvme_spec::NvmOpcode;
use nvme_spec::identify::oncs;
use nvme_spec::nvm::{CopyCdw12, CopySourceRange, DatasetManagementRange, dsm};
use zerocopy::FromBytes;

use crate::data::Pointer;
use crate::info::{ControllerInfo, NLB_MAX, NamespaceInfo};
use crate::kind::{Kind, last_words};
use crate::op::{Op, OpKind, RawCommand};

/// Bytes of a range of Dataset Management, and of a source range of Copy.
pub(crate) const DATASET_RANGE_LEN: usize = size_of::<DatasetManagementRange>();
pub(crate) const COPY_RANGE_LEN: usize = size_of::<CopySourceRange>();

/// What all operations of a kind have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    refusal: Option<&'static str>,
    /// OPC and NSID where they lie in the first eight bytes of a command.
    head: u64,
    /// Most blocks of a command.
    most: u64,
    boundary: Boundary,
}

/// Multiples of a number of blocks that no command should cross.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boundary {
    None,
    /// Of a power of two: less one.
    Mask(u64),
    /// Of anything else.
    Every(u64),
}

impl Boundary {
    const fn every(blocks: u64) -> Self {
        match blocks {
            0 => Self::None,
            _ if blocks.is_power_of_two() => Self::Mask(blocks - 1),
            _ => Self::Every(blocks),
        }
    }

    /// Blocks from `lba` to the next one.
    #[inline]
    const fn distance(self, lba: u64) -> u64 {
        match self {
            Self::None => u64::MAX,
            Self::Mask(mask) => mask - (lba & mask) + 1,
            Self::Every(blocks) => blocks - lba % blocks,
        }
    }
}

/// What the commands of a namespace may be, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) block_shift: u8,
    pub(crate) sgl: bool,
    sgl_any_address: bool,
    /// The controller's memory page in bytes.
    pub(crate) page: usize,
    blocks: u64,
    pub(crate) transfer_len: usize,
    shapes: [Shape; Kind::ALL.len()],
    /// Blocks of a range of a Dataset Management, of all its ranges, and the ranges.
    deallocate_blocks: u64,
    dataset_blocks: u64,
    dataset_ranges: usize,
    /// Blocks of a source range of a Copy.
    copy_range_blocks: u64,
}

impl Limits {
    /// `list_len` bytes are there for the list of a command.
    pub(crate) fn new(
        controller: &ControllerInfo,
        namespace: &NamespaceInfo,
        page: usize,
        list_len: usize,
    ) -> Self {
        let or_none = |limit: u64, none: u64| if limit == 0 { none } else { limit };
        let range = or_none(u64::from(controller.deallocate_blocks_max), u64::from(u32::MAX));
        let dataset_blocks = or_none(controller.dataset_blocks_max, u64::MAX);
        Self {
            block_shift: namespace.block_shift,
            sgl: controller.sgl,
            sgl_any_address: controller.sgl_any_address,
            page,
            blocks: namespace.blocks,
            transfer_len: controller.transfer_len_max as usize,
            shapes: Kind::ALL.map(|kind| Shape::new(kind, controller, namespace, list_len)),
            deallocate_blocks: range.min(dataset_blocks),
            dataset_blocks,
            dataset_ranges: match controller.dataset_ranges_max {
                0 => dsm::RANGES_MAX,
                most => usize::from(most),
            },
            copy_range_blocks: u64::from(namespace.copy_range_blocks_max.max(1)),
        }
    }

    #[inline]
    const fn shape(&self, kind: Kind) -> &Shape {
        &self.shapes[kind as usize]
    }

    /// Why an operation cannot be given to this namespace; `None` when it can.
    #[inline]
    pub(crate) fn refusal(&self, kind: Kind, op: &Op) -> Option<&'static str> {
        let why = self.shape(kind).refusal;
        if why.is_some() {
            return why;
        }
        if !kind.is_plain() {
            return self.special_refusal(op);
        }
        if op.blocks == 0 || !self.holds(op.lba, op.blocks) {
            return Some("the range is empty or leaves the namespace");
        }
        if kind.moves_blocks() {
            let Some(buf) = &op.buf else { return Some("the operation has no buffer") };
            let len = buf.len() as u64;
            if len >> self.block_shift != op.blocks || len & ((1 << self.block_shift) - 1) != 0 {
                return Some("the buffer is not as long as the range");
            }
            if !self.takes_address(buf) {
                return Some("the address of the buffer is no multiple of 4");
            }
        }
        None
    }

    #[cold]
    fn special_refusal(&self, op: &Op) -> Option<&'static str> {
        match op.kind {
            OpKind::Flush => None,
            OpKind::Raw(command) => self.raw_refusal(command, op.buf.as_ref()),
            OpKind::DatasetManagement { .. } => self.ranges_refusal(op.buf.as_ref()),
            _ if op.blocks == 0 || !self.holds(op.lba, op.blocks) => {
                Some("the range is empty or leaves the namespace")
            }
            OpKind::Copy { to, .. } => self.copy_refusal(op, to),
            _ => None,
        }
    }

    #[inline]
    const fn holds(&self, lba: u64, blocks: u64) -> bool {
        lba <= self.blocks && blocks <= self.blocks - lba
    }

    /// PRPs are of dwords (Base section 4.3.1); SGLs of bytes, where the controller says so.
    #[inline]
    fn takes_address(&self, buf: &DmaBuf) -> bool {
        buf.as_ptr().addr().is_multiple_of(4) || self.sgl_any_address
    }

    fn copy_refusal(&self, op: &Op, to: u64) -> Option<&'static str> {
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
    #[inline]
    pub(crate) fn piece(&self, kind: Kind, lba: u64, left: u64) -> u64 {
        let shape = self.shape(kind);
        left.min(shape.most).min(shape.boundary.distance(lba))
    }

    /// The ranges of a piece of a Copy: first block and blocks of each.
    pub(crate) fn copy_parts(&self, lba: u64, blocks: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let step = self.copy_range_blocks;
        (0..blocks.div_ceil(step)).map(move |index| (lba + index * step, (blocks - index * step).min(step)))
    }

    /// The command for a piece of a plain operation, as eight words.
    #[inline]
    pub(crate) fn command(
        &self,
        kind: Kind,
        cid: u16,
        (lba, blocks): (u64, u64),
        cdw12: u32,
        data: Pointer,
    ) -> [u64; 8] {
        let head = self.shape(kind).head | u64::from(cid) << 16 | data.head;
        // Not above 65536, by `piece`.
        let nlb_z = blocks.wrapping_sub(1) & 0xFFFF;
        let [dptr_low, dptr_high] = data.dptr;
        [head, 0, 0, dptr_low, dptr_high, lba, u64::from(cdw12) | nlb_z, 0]
    }

    /// The command for a piece of any other operation; `begun` blocks of the operation are before it.
    pub(crate) fn special_command(
        &self,
        kind: OpKind,
        cid: u16,
        blocks: u64,
        begun: u64,
        data: Pointer,
    ) -> [u64; 8] {
        let head = self.shape(kind.kind()).head | u64::from(cid) << 16 | data.head;
        let mut words = [head, 0, 0, data.dptr[0], data.dptr[1], 0, 0, 0];
        match kind {
            OpKind::Deallocate => words[5] = u64::from(dsm::AD) << 32,
            OpKind::DatasetManagement { attributes } => {
                let ranges_z = blocks.saturating_sub(1) & u64::from(dsm::NR_MASK);
                words[5] = ranges_z | u64::from(attributes) << 32;
            }
            OpKind::Copy { to, fua } => {
                let ranges_z = blocks.div_ceil(self.copy_range_blocks).saturating_sub(1);
                let ranges_z = u8::try_from(ranges_z).unwrap_or(u8::MAX);
                words[5] = to + begun;
                words[6] = CopyCdw12::new().with_nr_z(ranges_z).with_fua(fua).into_bits().into();
            }
            OpKind::Raw(raw) => {
                words[0] |= u64::from(raw.opcode);
                [words[5], words[6], words[7]] = last_words(&raw);
            }
            _ => {}
        }
        words
    }
}

impl Shape {
    fn new(kind: Kind, controller: &ControllerInfo, namespace: &NamespaceInfo, list_len: usize) -> Self {
        let shift = namespace.block_shift;
        let blocks_of = |bytes: u64| if bytes == 0 { NLB_MAX } else { (bytes >> shift).clamp(1, NLB_MAX) };
        let transfer = blocks_of(u64::from(controller.transfer_len_max));
        let (opcode, needed, most) = match kind {
            Kind::Read => (NvmOpcode::READ, 0, transfer),
            Kind::Write => (NvmOpcode::WRITE, 0, transfer),
            Kind::Compare => (NvmOpcode::COMPARE, oncs::COMPARE, transfer),
            Kind::Verify => (NvmOpcode::VERIFY, oncs::VERIFY, blocks_of(controller.verify_len_max)),
            Kind::WriteZeroes => {
                (NvmOpcode::WRITE_ZEROES, oncs::WRITE_ZEROES, blocks_of(controller.write_zeroes_len_max))
            }
            Kind::Flush => (NvmOpcode::FLUSH, 0, 1),
            Kind::Deallocate => {
                let limits = [u64::from(controller.deallocate_blocks_max), controller.dataset_blocks_max];
                let most = limits.into_iter().filter(|&limit| limit > 0).min();
                let most = most.unwrap_or(u64::MAX).min(u64::from(u32::MAX));
                (NvmOpcode::DATASET_MANAGEMENT, oncs::DATASET_MANAGEMENT, most)
            }
            Kind::Copy => (NvmOpcode::COPY, oncs::COPY, copy_blocks(controller, namespace, list_len)),
            // Never split.
            Kind::DatasetManagement => (NvmOpcode::DATASET_MANAGEMENT, oncs::DATASET_MANAGEMENT, u64::MAX),
            // Its opcode comes with each.
            Kind::Raw => (NvmOpcode(0), 0, 1),
        };
        let changes = matches!(
            kind,
            Kind::Write | Kind::WriteZeroes | Kind::Deallocate | Kind::DatasetManagement | Kind::Copy
        );
        let refusal = if controller.oncs & needed != needed {
            Some("the controller does not offer this command")
        } else if changes && namespace.read_only {
            Some("the namespace is write protected")
        } else if most == 0 {
            Some("the controller takes no copy descriptors of format 0h, or names no limits for them")
        } else {
            None
        };
        let boundary = match kind {
            Kind::Read | Kind::Write if namespace.noiob > 0 => u64::from(namespace.noiob),
            Kind::Read | Kind::Write => u64::from(controller.boundary_len) >> shift,
            _ => 0,
        };
        let head = u64::from(opcode.0) | u64::from(namespace.nsid) << 32;
        Self { refusal, head, most, boundary: Boundary::every(boundary) }
    }
}

/// Most blocks of a Copy, by the blocks of its ranges, their number, and the memory for them; 0 when it cannot be used.
fn copy_blocks(controller: &ControllerInfo, namespace: &NamespaceInfo, list_len: usize) -> u64 {
    if !controller.copies_by_format_0 {
        return 0;
    }
    let ranges = u64::from(namespace.copy_ranges_max).min((list_len / COPY_RANGE_LEN) as u64);
    u64::from(namespace.copy_blocks_max).min(ranges * u64::from(namespace.copy_range_blocks_max))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prp;
    use nvme_spec::SubmissionQueueEntry;
    use nvme_spec::command::psdt;
    use nvme_spec::nvm::IoCdw12;
    use proptest::prelude::*;
    use zerocopy::transmute;

    fn limits(noiob: u16, transfer_len_max: u32) -> Limits {
        let controller = ControllerInfo {
            oncs: 0xFFFF,
            transfer_len_max,
            write_zeroes_len_max: 8192,
            copies_by_format_0: true,
            ..Default::default()
        };
        let namespace = NamespaceInfo {
            nsid: 0x0102_0304,
            blocks: 1 << 40,
            block_shift: 9,
            noiob,
            copy_blocks_max: 100,
            copy_ranges_max: 4,
            copy_range_blocks_max: 16,
            ..Default::default()
        };
        Limits::new(&controller, &namespace, 4096, 4096)
    }

    fn entry(words: [u64; 8]) -> SubmissionQueueEntry {
        transmute!(words.map(u64::to_le))
    }

    #[test]
    fn a_plain_command_has_its_fields_where_the_specification_has_them() {
        let limits = limits(0, 65536);
        let cdw12 = IoCdw12::new().with_fua(true).into_bits();
        let data = Pointer { head: 1 << 14, dptr: [0x1000, 0x2000] };
        let sqe = entry(limits.command(Kind::Write, 0x5678, (0x1_2345_6789_ABCD, 65536), cdw12, data));
        let expected = SubmissionQueueEntry {
            opcode: NvmOpcode::WRITE.0,
            flags: psdt::SGL << 6,
            cid: 0x5678.into(),
            dptr: prp::pointers(0x1000, 0x2000),
            nsid: 0x0102_0304.into(),
            cdw10: 0x6789_ABCD.into(),
            cdw11: 0x1_2345.into(),
            cdw12: IoCdw12::new().with_nlb_z(0xFFFF).with_fua(true).into_bits().into(),
            ..Default::default()
        };
        assert_eq!(sqe, expected);
    }

    #[test]
    fn so_has_any_other() {
        let limits = limits(0, 65536);
        let command =
            |kind, blocks, begun| entry(limits.special_command(kind, 1, blocks, begun, Pointer::default()));
        let sqe = command(OpKind::Flush, 7, 0);
        let flush = SubmissionQueueEntry { cid: 1.into(), nsid: 0x0102_0304.into(), ..Default::default() };
        assert_eq!(sqe, flush);
        let sqe = command(OpKind::Deallocate, 7, 0);
        assert_eq!((sqe.cdw10.get(), sqe.cdw11.get(), sqe.cdw12.get()), (0, dsm::AD, 0));
        let sqe = command(OpKind::DatasetManagement { attributes: 5 }, 256, 0);
        assert_eq!((sqe.opcode, sqe.cdw10.get(), sqe.cdw11.get()), (0x09, 255, 5));
        let sqe = command(OpKind::Copy { to: 0x1_0000_0000, fua: true }, 33, 16);
        assert_eq!((sqe.opcode, sqe.cdw10_11()), (NvmOpcode::COPY.0, 0x1_0000_0010));
        assert_eq!(CopyCdw12::from_bits(sqe.cdw12.get()), CopyCdw12::new().with_nr_z(2).with_fua(true));
        let sqe = command(OpKind::Raw(RawCommand { opcode: 0x81, cdw10_15: [10, 11, 12, 13, 14, 15] }), 1, 0);
        assert_eq!((sqe.opcode, sqe.cid.get(), sqe.nsid.get()), (0x81, 1, 0x0102_0304));
        let dwords = [sqe.cdw10, sqe.cdw11, sqe.cdw12, sqe.cdw13, sqe.cdw14, sqe.cdw15];
        assert_eq!(dwords.map(|dword| dword.get()), [10, 11, 12, 13, 14, 15]);
    }

    proptest! {
        #[test]
        fn pieces_cover_the_range_and_cross_no_boundary(
            lba in 0u64..1 << 40,
            blocks in 1u64..5000,
            noiob in prop_oneof![Just(0u16), Just(1), Just(8), Just(256), 2u16..1000],
            transfer_len in 512u32..300_000,
        ) {
            let limits = limits(noiob, transfer_len);
            let (mut at, mut left) = (lba, blocks);
            while left > 0 {
                let piece = limits.piece(Kind::Read, at, left);
                prop_assert!(piece > 0 && piece <= left);
                prop_assert!(piece << 9 <= u64::from(transfer_len));
                if let Some(noiob) = std::num::NonZeroU64::new(noiob.into()) {
                    prop_assert_eq!(at / noiob, (at + piece - 1) / noiob);
                }
                (at, left) = (at + piece, left - piece);
            }
            prop_assert_eq!(limits.piece(Kind::WriteZeroes, lba, 100), 16, "its own limit, no boundary");
            prop_assert_eq!(limits.piece(Kind::Copy, lba, 1000), 64, "four ranges of 16");
        }
    }
}
