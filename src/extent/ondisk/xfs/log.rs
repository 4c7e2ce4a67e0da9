//! The XFS log: whether the filesystem was unmounted in order (`xlog_check_unmount_rec`, `fs/xfs/xfs_log_recover.c`; record and
//! operation headers of `xfs_log_format.h`).
//!
//! ```text
//!   log (a ring)     ... | header | operations ... | header | one operation: unmount |   older records ...
//!                                                    ^ the record with the highest LSN
//! ```
//!
//! What is in the log and nowhere else is not on the device yet: a file that was cut, and another that was given its blocks, would
//! be so only after the next mount. A log that ends in an unmount record has nothing of the kind. The ring is read from end to
//! end, since that needs no guess where it begins.
//!
//! What it does not do: replay anything, look at checksums (a record that was torn ends in no unmount operation), read a log on a
//! device of its own.

use super::super::bytes::{be32, be64, byte, uuid};
use super::super::{OnDiskError, ReadAt, read_vec};

/// `BBSIZE`: what the log counts in.
const BASIC_BLOCK_LEN: usize = 512;
/// `XLOG_HEADER_MAGIC_NUM`. No other block begins so: theirs begin with the number of their cycle.
const RECORD_MAGIC: u32 = 0xFEED_BABE;
/// `XLOG_MAX_LOG_BYTES`.
const LOG_LEN_MAX: u64 = 1 << 31;
/// `XLOG_HEADER_CYCLE_SIZE`: what one header block is for.
const HEADER_SIZE_MAX: u32 = 32 << 10;
/// `XLOG_UNMOUNT_TRANS` of `oh_flags`.
const FLAG_UNMOUNT: u8 = 0x20;
const OP_FLAGS_AT: usize = 9;
/// Read at a time: a whole number of basic blocks, and no more than blocks of the extent tree may have.
const PIECE_LEN: u64 = 64 << 10;

/// Where the log is, in bytes from where the filesystem begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Log {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// `sb_uuid`, which all of its records have.
    pub(super) uuid: [u8; 16],
}

/// The last record.
#[derive(Clone, Copy, Debug)]
struct Last {
    lsn: u64,
    /// Basic blocks from where the log begins to its operations.
    operations_at: u64,
    operations: u32,
}

impl Log {
    /// Refuses a log that does not end in an unmount record.
    pub(super) fn refuse_unclean(self, device: &mut dyn ReadAt) -> Result<(), OnDiskError> {
        if self.len == 0 || self.len > LOG_LEN_MAX || !self.len.is_multiple_of(BASIC_BLOCK_LEN as u64) {
            return Err(OnDiskError::Damaged { what: "place of the log", offset: 0 });
        }
        let last = self.last_record(device)?.ok_or(OnDiskError::Unclean)?;
        let blocks = self.len / BASIC_BLOCK_LEN as u64;
        let at = last.operations_at % blocks * BASIC_BLOCK_LEN as u64;
        let operations = read_vec(device, self.offset + at, BASIC_BLOCK_LEN)?;
        let is_unmount = last.operations == 1 && byte(&operations, OP_FLAGS_AT) & FLAG_UNMOUNT != 0;
        if is_unmount { Ok(()) } else { Err(OnDiskError::Unclean) }
    }

    fn last_record(self, device: &mut dyn ReadAt) -> Result<Option<Last>, OnDiskError> {
        let mut last: Option<Last> = None;
        let mut at = 0;
        while at < self.len {
            // At most 64 KiB.
            let len = usize::try_from(PIECE_LEN.min(self.len - at)).unwrap_or(BASIC_BLOCK_LEN);
            let piece = read_vec(device, self.offset + at, len)?;
            let first = at / BASIC_BLOCK_LEN as u64;
            for (number, block) in (first..).zip(piece.chunks_exact(BASIC_BLOCK_LEN)) {
                let found = self.record(block, number);
                last = last.into_iter().chain(found).max_by_key(|record| record.lsn);
            }
            at += len as u64;
        }
        Ok(last)
    }

    /// The record whose header basic block `number` of the log is.
    fn record(self, block: &[u8], number: u64) -> Option<Last> {
        let lsn = be64(block, 16);
        // The LSN is the cycle, and where in the log it was written.
        let is_here = lsn == u64::from(be32(block, 4)) << 32 | number;
        if be32(block, 0) != RECORD_MAGIC || !is_here || uuid(block, 304) != self.uuid {
            return None;
        }
        let is_v2 = be32(block, 8) & 2 != 0;
        let headers = if is_v2 { be32(block, 320).div_ceil(HEADER_SIZE_MAX).max(1) } else { 1 };
        Some(Last { lsn, operations_at: number + u64::from(headers), operations: be32(block, 40) })
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    const UUID: [u8; 16] = [7; 16];
    const BLOCKS: usize = 300;

    struct Memory(Vec<u8>);

    impl ReadAt for Memory {
        fn read_at(&mut self, offset: u64, target: &mut [u8]) -> io::Result<()> {
            let at = usize::try_from(offset).unwrap();
            target.copy_from_slice(self.0.get(at..at + target.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    /// Records: cycle, basic block, operations, flags of the first one, header blocks.
    fn log(records: &[(u32, u32, u32, u8, u32)]) -> Memory {
        let mut bytes = vec![0; BLOCKS * BASIC_BLOCK_LEN];
        for (cycle, number, operations, flags, headers) in records {
            let at = usize::try_from(*number).unwrap() * BASIC_BLOCK_LEN;
            let mut put = |offset: usize, word: u32| {
                bytes[at + offset..at + offset + 4].copy_from_slice(&word.to_be_bytes());
            };
            for (offset, word) in [(0, RECORD_MAGIC), (4, *cycle), (8, 2), (16, *cycle), (20, *number)] {
                put(offset, word);
            }
            put(40, *operations);
            put(320, headers * HEADER_SIZE_MAX);
            bytes[at + 304..at + 320].copy_from_slice(&UUID);
            let data = (usize::try_from(number + headers).unwrap() % BLOCKS) * BASIC_BLOCK_LEN;
            bytes[data + OP_FLAGS_AT] = *flags;
        }
        Memory(bytes)
    }

    fn judge(records: &[(u32, u32, u32, u8, u32)]) -> Result<(), OnDiskError> {
        let len = (BLOCKS * BASIC_BLOCK_LEN) as u64;
        Log { offset: 0, len, uuid: UUID }.refuse_unclean(&mut log(records))
    }

    #[test]
    fn only_a_log_that_ends_in_an_unmount_record_is_clean() {
        let unmount = |cycle, number| (cycle, number, 1, FLAG_UNMOUNT, 1);
        let write = |cycle, number| (cycle, number, 5, 0, 1);
        judge(&[unmount(1, 0)]).unwrap();
        judge(&[write(1, 0), write(1, 100), unmount(1, 200)]).unwrap();
        // Wrapped: the later cycle is in front; the operations of a record at the end are at the beginning.
        judge(&[unmount(3, 10), write(2, 100), write(2, 250)]).unwrap();
        judge(&[write(2, 100), (2, 299, 1, FLAG_UNMOUNT, 1)]).unwrap();
        judge(&[(4, 50, 1, FLAG_UNMOUNT, 8)]).unwrap();
        for dirty in [
            &[write(1, 0)][..],
            &[unmount(1, 0), write(1, 100)],
            &[write(3, 10), unmount(2, 100)],
            &[(1, 0, 2, FLAG_UNMOUNT, 1)],
            &[],
        ] {
            assert!(matches!(judge(dirty), Err(OnDiskError::Unclean)), "{dirty:?}");
        }
    }

    #[test]
    fn records_of_another_filesystem_or_another_place_are_none() {
        let len = (BLOCKS * BASIC_BLOCK_LEN) as u64;
        let mut device = log(&[(1, 0, 1, FLAG_UNMOUNT, 1), (9, 100, 5, 0, 1)]);
        device.0[100 * BASIC_BLOCK_LEN + 304] ^= 1;
        let log = Log { offset: 0, len, uuid: UUID };
        log.refuse_unclean(&mut device).unwrap();
        device.0[100 * BASIC_BLOCK_LEN + 304] ^= 1;
        assert!(log.refuse_unclean(&mut device).is_err());
        device.0[100 * BASIC_BLOCK_LEN + 20] ^= 1;
        log.refuse_unclean(&mut device).unwrap();
        for len in [0, 511, LOG_LEN_MAX + 512] {
            assert!(matches!(
                Log { len, ..log }.refuse_unclean(&mut device),
                Err(OnDiskError::Damaged { .. })
            ));
        }
    }
}
