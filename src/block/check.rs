//! What every queue checks before an operation reaches its device.

use hugepage_alloc::DmaBuf;

use super::{BlockErrorKind, BlockOp, BlockOpKind, DeviceInfo, OpenError};
use crate::units::{BlockSize, ByteLen};

/// Whether the device may be asked to do `op`. Works on peers' numbers: no sum may wrap.
pub(super) fn check(info: &DeviceInfo, op: &BlockOp) -> Result<(), BlockErrorKind> {
    if op.kind == BlockOpKind::Flush {
        return Ok(());
    }
    if info.read_only && op.kind.is_write() {
        return Err(BlockErrorKind::ReadOnly);
    }
    let block_size = info.logical_block_size;
    if op.len.get() == 0 || block_size.blocks_in(op.len).is_none() || !block_size.is_aligned(op.offset) {
        return Err(BlockErrorKind::InvalidRequest);
    }
    if matches!(op.kind, BlockOpKind::Read | BlockOpKind::Write { .. }) {
        let buf_len = op.buf.as_ref().map_or(0, DmaBuf::len);
        if u64::try_from(buf_len) != Ok(op.len.get()) || op.len > info.transfer_len_max {
            return Err(BlockErrorKind::InvalidRequest);
        }
    }
    match op.offset.checked_add(op.len.get()) {
        Some(end) if end.get() <= info.len.get() => Ok(()),
        _ => Err(BlockErrorKind::OutOfRange),
    }
}

/// Whether a device may have this size.
pub(super) fn check_size(len: ByteLen, block_size: BlockSize) -> Result<(), OpenError> {
    if len.get() == 0 || block_size.blocks_in(len).is_none() {
        return Err(OpenError::BadSize { bytes: len.get(), block_size: block_size.bytes() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::OpToken;
    use crate::units::ByteOffset;

    fn info(read_only: bool) -> DeviceInfo {
        DeviceInfo {
            name: "test".to_owned(),
            dev: None,
            logical_block_size: BlockSize::B4096,
            physical_block_bytes: 4096,
            len: ByteLen(1 << 20),
            volatile_write_cache: false,
            write_zeroes: true,
            deallocate: true,
            transfer_len_max: ByteLen(1 << 20),
            read_only,
        }
    }

    fn verdict(kind: BlockOpKind, offset: u64, len: u64) -> Result<(), BlockErrorKind> {
        let op =
            BlockOp { token: OpToken(0), kind, offset: ByteOffset(offset), len: ByteLen(len), buf: None };
        check(&info(false), &op)
    }

    #[test]
    fn ranges_are_checked_without_wrapping() {
        let kind = BlockOpKind::Deallocate;
        assert_eq!(verdict(kind, 0, 1 << 20), Ok(()));
        assert_eq!(verdict(kind, (1 << 20) - 4096, 4096), Ok(()));
        assert_eq!(verdict(kind, 1 << 20, 4096), Err(BlockErrorKind::OutOfRange));
        assert_eq!(verdict(kind, 4096, 1 << 20), Err(BlockErrorKind::OutOfRange));
        assert_eq!(verdict(kind, u64::MAX - 4095, 4096), Err(BlockErrorKind::OutOfRange));
        assert_eq!(verdict(kind, 4096, u64::MAX - 4095), Err(BlockErrorKind::OutOfRange));
    }

    #[test]
    fn misaligned_and_empty_operations_are_refused() {
        let kind = BlockOpKind::WriteZeroes { deallocate: false, fua: false };
        for (offset, len) in [(512, 4096), (0, 512), (0, 0), (1, 4095)] {
            assert_eq!(verdict(kind, offset, len), Err(BlockErrorKind::InvalidRequest), "{offset}+{len}");
        }
        assert_eq!(verdict(BlockOpKind::Read, 0, 4096), Err(BlockErrorKind::InvalidRequest), "no buffer");
        assert_eq!(verdict(BlockOpKind::Flush, 7, 13), Ok(()), "a flush has no range");
    }

    #[test]
    fn a_read_only_device_refuses_all_that_changes_it() {
        let op =
            |kind| BlockOp { token: OpToken(0), kind, offset: ByteOffset(0), len: ByteLen(4096), buf: None };
        for kind in [
            BlockOpKind::Write { fua: false },
            BlockOpKind::WriteZeroes { deallocate: true, fua: true },
            BlockOpKind::Deallocate,
        ] {
            assert_eq!(check(&info(true), &op(kind)), Err(BlockErrorKind::ReadOnly), "{kind:?}");
        }
        assert_eq!(check(&info(true), &op(BlockOpKind::Flush)), Ok(()));
    }
}
