//! FIEMAP (`Documentation/filesystems/fiemap.rst`): the filesystem's answer to where a file lies.
//!
//! The answer comes in pages of records; the next page begins where the last record ended, until a record carries
//! LAST. [`parse_page`] is a plain function over the bytes of one page and never panics.
//!
//! ```text
//!   Records     one page at a time: a map of a million extents is looked at without ever being held
//!   read        all records of a file
//!   read_split  the same by several threads, each a stretch of the file: for the moment in which a file is pinned
//! ```

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use bitflags::bitflags;

use super::error::{ExtentError, MapFault};
use super::stretches::{Stretch, in_stretches};
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
pub(super) const PAGE_RECORDS: u32 = 4096;
const PAGE_WORDS: usize = HEADER_LEN / 8 + PAGE_RECORDS as usize * RECORD_LEN / 8;

/// How many times a living file's map is read again because it changed under the reading.
const READ_ATTEMPTS: usize = 3;

/// Reads all records of `file`, in file order, after its dirty pages were written. `path` is for messages.
pub(super) fn read(file: impl AsFd, path: &Path) -> Result<Vec<RawExtent>, ExtentError> {
    patiently(|| {
        let mut records = Records::of(file.as_fd(), path);
        let all = records.by_ref().collect();
        records.end().map(|()| all)
    })
}

/// The records of the first page, and whether they are all.
pub(super) fn read_first(file: impl AsFd, path: &Path) -> Result<(Vec<RawExtent>, bool), ExtentError> {
    let mut records = Records::of(file.as_fd(), path);
    let first = records.by_ref().take(PAGE_RECORDS as usize).collect();
    let are_all = records.are_all_read();
    records.end().map(|()| (first, are_all))
}

/// As [`read`], for a file of `size` bytes, by as many threads as there are processors, within reason, when it has more
/// records than fit a page. Every stretch is read after the file's dirty pages were written.
pub(super) fn read_split(file: impl AsFd, path: &Path, size: ByteLen) -> Result<Vec<RawExtent>, ExtentError> {
    let file = file.as_fd();
    let (first, are_all) = read_first(file, path)?;
    if are_all {
        return Ok(first);
    }
    let parts = patiently(|| {
        in_stretches(file, path, size, usize::MAX, &|stretch| {
            let mut records = Records::within(file, path, stretch);
            let part: Vec<_> = records.by_ref().filter_map(|record| stretch.clip(record)).collect();
            records.end().map(|()| part)
        })
    })?;
    Ok(parts.concat())
}

/// Tries again when records overlap across two pages: the file changed in between. An unpinned file may.
pub(super) fn patiently<T>(mut read: impl FnMut() -> Result<T, ExtentError>) -> Result<T, ExtentError> {
    let mut attempt = 1;
    loop {
        match read() {
            Err(ExtentError::Map { fault: MapFault::OverlapInFile { .. }, .. })
                if attempt < READ_ATTEMPTS =>
            {
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// The records of a file, read a page at a time. It ends at the last record or at the first failure: ask for the
/// [`end`](Self::end) before relying on what it gave.
pub(super) struct Records<'f> {
    file: BorrowedFd<'f>,
    path: &'f Path,
    page: Vec<[u64; PAGE_WORDS]>,
    /// What was read, with the last record of the page before in front, if there was one.
    records: Vec<RawExtent>,
    /// Of `records`, what comes next.
    next: usize,
    /// What to ask for next; `None` when all is read.
    ask: Option<Stretch>,
    failed: Option<ExtentError>,
}

thread_local! {
    /// The page that the last reader on this thread was done with. It need not be made anew, and be filled with zeros, for each of a
    /// thousand small files.
    static PAGE: Cell<Vec<[u64; PAGE_WORDS]>> = const { Cell::new(Vec::new()) };
}

impl Drop for Records<'_> {
    fn drop(&mut self) {
        PAGE.set(std::mem::take(&mut self.page));
    }
}

impl<'f> Records<'f> {
    /// Those of a whole file. Its dirty pages are written first.
    pub(super) fn of(file: BorrowedFd<'f>, path: &'f Path) -> Self {
        Self::within(file, path, Stretch::WHOLE)
    }

    /// Those of a stretch. The first and the last may begin before it and end behind it.
    pub(super) fn within(file: BorrowedFd<'f>, path: &'f Path, stretch: Stretch) -> Self {
        let mut page = PAGE.take();
        if page.is_empty() {
            page = vec![[0_u64; PAGE_WORDS]; 1];
        }
        Self { file, path, page, records: Vec::new(), next: 0, ask: Some(stretch), failed: None }
    }

    /// Whether there is nothing left to read.
    fn are_all_read(&self) -> bool {
        self.ask.is_none() && self.next >= self.records.len()
    }

    /// Why it ended before its time, if it did.
    pub(super) fn end(mut self) -> Result<(), ExtentError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Reads the page that begins at `ask.start`.
    fn read_page(&mut self, ask: Stretch) -> Result<(), ExtentError> {
        const FIEMAP_FLAG_SYNC: u32 = 1;
        let Some(page) = self.page.first_mut() else { return Ok(()) };
        // One SYNC is enough: the first page's covers the whole file.
        let flags = if ask.start == 0 { FIEMAP_FLAG_SYNC } else { 0 };
        write_header(page, ask, flags);
        sys::fiemap(self.file, page)
            .map_err(|source| ExtentError::io("read the extent map of", self.path, source))?;
        let kept = self.records.len().saturating_sub(1);
        self.records.drain(..kept);
        self.next = self.records.len();
        let end = parse_page(zerocopy::IntoBytes::as_bytes(page), ask.start, &mut self.records)
            .map_err(|fault| ExtentError::Map { path: self.path.to_path_buf(), fault })?;
        self.ask = match end {
            PageEnd::Continue { next } if next < ask.end => Some(Stretch { start: next, ..ask }),
            PageEnd::Continue { .. } | PageEnd::Last => None,
        };
        Ok(())
    }
}

impl Iterator for Records<'_> {
    type Item = RawExtent;

    fn next(&mut self) -> Option<RawExtent> {
        if self.next >= self.records.len() {
            let ask = self.ask.take()?;
            if let Err(error) = self.read_page(ask) {
                self.failed = Some(error);
                return None;
            }
        }
        let record = self.records.get(self.next).copied();
        self.next += 1;
        record
    }
}

fn write_header(page: &mut [u64; PAGE_WORDS], ask: Stretch, flags: u32) {
    let mut third = [0; 8];
    third[..4].copy_from_slice(&flags.to_ne_bytes());
    let mut fourth = [0; 8];
    fourth[..4].copy_from_slice(&PAGE_RECORDS.to_ne_bytes());
    // fm_start, fm_length, fm_flags and fm_mapped_extents, fm_extent_count and fm_reserved.
    let len = ask.end.saturating_sub(ask.start);
    let header = [ask.start, len, u64::from_ne_bytes(third), u64::from_ne_bytes(fourth)];
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
