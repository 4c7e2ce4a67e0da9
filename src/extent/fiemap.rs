//! FIEMAP (`Documentation/filesystems/fiemap.rst`): the filesystem's answer to where a file lies.
//!
//! The answer comes in pages of records; the next page begins where the last record ended, until a record carries
//! LAST. [`parse_page`] is a plain function over the bytes of one page and never panics.

use std::os::fd::AsFd;
use std::path::Path;

use bitflags::bitflags;

use super::error::{ExtentError, MapFault};
use super::sys;
use crate::units::{ByteLen, ByteOffset};

bitflags! {
    /// `FIEMAP_EXTENT_*` (`linux/fiemap.h`). Bits outside the named ones are kept, to be refused.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FiemapFlags: u32 {
        /// The last record of the file.
        const LAST = 0x0001;
        /// The place is not known.
        const UNKNOWN = 0x0002;
        /// Not allocated yet: the data is in the page cache only.
        const DELALLOC = 0x0004;
        /// What lies on the device is not the plain data (compressed, for instance).
        const ENCODED = 0x0008;
        /// What lies on the device is encrypted.
        const DATA_ENCRYPTED = 0x0080;
        /// The extent does not begin or end on a block.
        const NOT_ALIGNED = 0x0100;
        /// The data lies in the inode.
        const DATA_INLINE = 0x0200;
        /// The block also holds the tails of other files.
        const DATA_TAIL = 0x0400;
        /// Allocated, and reads as zeros whatever lies there.
        const UNWRITTEN = 0x0800;
        /// Put together from single blocks by a filesystem without extents. Harmless.
        const MERGED = 0x1000;
        /// Other files, or other parts of this one, use the same blocks.
        const SHARED = 0x2000;
        const _ = !0;
    }
}

impl FiemapFlags {
    /// The flags that say nothing against serving the extent.
    pub const HARMLESS: Self = Self::LAST.union(Self::MERGED);
}

/// One record of FIEMAP, as the filesystem told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawExtent {
    /// Where it begins in the file.
    pub file_offset: ByteOffset,
    /// Where it begins on the FILESYSTEM'S device: the partition start is not added.
    pub device_offset: ByteOffset,
    /// Its length, never zero; `file_offset + len` and `device_offset + len` fit 64 bits.
    pub len: ByteLen,
    /// What the filesystem says of it.
    pub flags: FiemapFlags,
}

impl RawExtent {
    /// Where it ends in the file.
    #[must_use]
    pub const fn file_end(&self) -> u64 {
        self.file_offset.0 + self.len.0
    }
}

const HEADER_LEN: usize = 32;
const RECORD_LEN: usize = 56;
/// Records a page: 229 kB, well past the point where a larger page is any faster.
const PAGE_RECORDS: u32 = 4096;
const PAGE_WORDS: usize = HEADER_LEN / 8 + PAGE_RECORDS as usize * RECORD_LEN / 8;

/// How many times a living file's map is read again because it changed under the reading.
const READ_ATTEMPTS: usize = 3;

/// Reads all records of `file`, in file order, after its dirty pages were written. `path` is for messages.
pub(super) fn read(file: impl AsFd, path: &Path) -> Result<Vec<RawExtent>, ExtentError> {
    let mut attempt = 1;
    loop {
        match read_once(&file, path) {
            // Records that overlap across two pages: the file changed in between. An unpinned file may.
            Err(ExtentError::Map { fault: MapFault::OverlapInFile { .. }, .. })
                if attempt < READ_ATTEMPTS =>
            {
                attempt += 1;
            }
            result => return result,
        }
    }
}

fn read_once(file: impl AsFd, path: &Path) -> Result<Vec<RawExtent>, ExtentError> {
    const FIEMAP_FLAG_SYNC: u32 = 1;
    let mut page = vec![[0_u64; PAGE_WORDS]; 1];
    let Some(page) = page.first_mut() else { return Ok(Vec::new()) };
    let mut records = Vec::new();
    let mut start = 0_u64;
    loop {
        // One SYNC is enough: the first page's covers the whole file.
        let flags = if start == 0 { FIEMAP_FLAG_SYNC } else { 0 };
        write_header(page, start, flags);
        sys::fiemap(file.as_fd(), page)
            .map_err(|source| ExtentError::io("read the extent map of", path, source))?;
        let last = parse_page(zerocopy::IntoBytes::as_bytes(page), start, &mut records)
            .map_err(|fault| ExtentError::Map { path: path.to_path_buf(), fault })?;
        match last {
            PageEnd::Last => return Ok(records),
            PageEnd::Continue { next } => start = next,
        }
    }
}

fn write_header(page: &mut [u64; PAGE_WORDS], start: u64, flags: u32) {
    let mut third = [0; 8];
    third[..4].copy_from_slice(&flags.to_ne_bytes());
    let mut fourth = [0; 8];
    fourth[..4].copy_from_slice(&PAGE_RECORDS.to_ne_bytes());
    // fm_start, fm_length, fm_flags and fm_mapped_extents, fm_extent_count and fm_reserved.
    let header = [start, u64::MAX - start, u64::from_ne_bytes(third), u64::from_ne_bytes(fourth)];
    page[..header.len()].copy_from_slice(&header);
}

/// How a page of records ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageEnd {
    /// There are no more records.
    Last,
    /// More records follow from file offset `next`.
    Continue {
        /// Where the next page begins.
        next: u64,
    },
}

/// Appends the records of one answer, `struct fiemap` and what follows it, to `records`. `start` is where the page was
/// asked to begin.
///
/// # Errors
/// When the answer is cut short, or its records have no length, overflow, overlap or go backwards.
pub(super) fn parse_page(page: &[u8], start: u64, records: &mut Vec<RawExtent>) -> Result<PageEnd, MapFault> {
    let cut = |expected| MapFault::Truncated { expected, got: page.len() };
    let mapped = u32_at(page, 20).ok_or(cut(HEADER_LEN))? as usize;
    let end = mapped.saturating_mul(RECORD_LEN).saturating_add(HEADER_LEN);
    let body = page.get(HEADER_LEN..end).ok_or(cut(end))?;
    let mut covered = records.last().map_or(0, RawExtent::file_end);
    for record in body.chunks_exact(RECORD_LEN) {
        let extent = parse_record(record).ok_or(cut(end))?;
        let at = extent.file_offset;
        if extent.len.get() == 0 {
            return Err(MapFault::NoProgress { file_offset: at });
        }
        if at.get() < covered {
            return Err(MapFault::OverlapInFile { file_offset: at });
        }
        let fits = extent.device_offset.checked_add(extent.len.get()).is_some();
        covered = at
            .get()
            .checked_add(extent.len.get())
            .filter(|_| fits)
            .ok_or(MapFault::Overflow { file_offset: at })?;
        records.push(extent);
        if extent.flags.contains(FiemapFlags::LAST) {
            return Ok(PageEnd::Last);
        }
    }
    if mapped == 0 {
        return Ok(PageEnd::Last);
    }
    if covered <= start {
        return Err(MapFault::NoProgress { file_offset: ByteOffset(start) });
    }
    Ok(PageEnd::Continue { next: covered })
}

/// `struct fiemap_extent`: logical, physical, length, 16 reserved bytes, flags, 12 reserved bytes.
fn parse_record(record: &[u8]) -> Option<RawExtent> {
    Some(RawExtent {
        file_offset: ByteOffset(u64_at(record, 0)?),
        device_offset: ByteOffset(u64_at(record, 8)?),
        len: ByteLen(u64_at(record, 16)?),
        flags: FiemapFlags::from_bits_retain(u32_at(record, 40)?),
    })
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn page(records: &[(u64, u64, u64, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LEN];
        let mapped = u32::try_from(records.len()).unwrap();
        bytes[20..24].copy_from_slice(&mapped.to_ne_bytes());
        for (logical, physical, len, flags) in records {
            for word in [*logical, *physical, *len, 0, 0] {
                bytes.extend_from_slice(&word.to_ne_bytes());
            }
            bytes.extend_from_slice(&flags.to_ne_bytes());
            bytes.extend_from_slice(&[0; 12]);
        }
        bytes
    }

    #[test]
    fn a_page_without_the_last_record_continues_behind_its_end() {
        let mut records = Vec::new();
        let bytes = page(&[(0, 4096, 4096, 0), (8192, 40960, 4096, 0x800)]);
        assert_eq!(parse_page(&bytes, 0, &mut records), Ok(PageEnd::Continue { next: 12288 }));
        let bytes = page(&[(12288, 8192, 4096, 1)]);
        assert_eq!(parse_page(&bytes, 12288, &mut records), Ok(PageEnd::Last));
        assert_eq!(records.len(), 3);
        assert_eq!(records[1].flags, FiemapFlags::UNWRITTEN);
    }

    #[test]
    fn no_records_are_the_end() {
        assert_eq!(parse_page(&page(&[]), 0, &mut Vec::new()), Ok(PageEnd::Last));
    }

    #[test]
    fn answers_that_are_no_map_are_refused() {
        type Case<'a> = (&'a [(u64, u64, u64, u32)], MapFault);
        let cases: [Case<'_>; 4] = [
            (&[(0, 0, 0, 1)], MapFault::NoProgress { file_offset: ByteOffset(0) }),
            (
                &[(0, 0, 8192, 0), (4096, 0, 4096, 1)],
                MapFault::OverlapInFile { file_offset: ByteOffset(4096) },
            ),
            (&[(u64::MAX, 0, 2, 1)], MapFault::Overflow { file_offset: ByteOffset(u64::MAX) }),
            (&[(0, u64::MAX, 2, 1)], MapFault::Overflow { file_offset: ByteOffset(0) }),
        ];
        for (records, fault) in cases {
            assert_eq!(parse_page(&page(records), 0, &mut Vec::new()), Err(fault));
        }
    }

    #[test]
    fn an_answer_cut_anywhere_is_refused() {
        let bytes = page(&[(0, 4096, 4096, 0), (4096, 40960, 4096, 1)]);
        for len in 0..bytes.len() {
            let result = parse_page(&bytes[..len], 0, &mut Vec::new());
            assert!(matches!(result, Err(MapFault::Truncated { .. })), "{len}: {result:?}");
        }
    }
}
