//! The least that anyone must do who wants a file's map: fsync, and one FIEMAP with SYNC, page by page. Nothing is kept.

#![expect(unsafe_code, reason = "FIEMAP has no safe wrapper")]

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rustix::ioctl::{self, Updater};

/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: ioctl::Opcode = 0xC020_660B;
const FIEMAP_FLAG_SYNC: u64 = 1;
/// As many records a call as ours reads.
const PAGE_RECORDS: usize = 4096;
const HEADER_WORDS: usize = 4;
const RECORD_WORDS: usize = 7;

type Page = [u64; HEADER_WORDS + PAGE_RECORDS * RECORD_WORDS];

/// Opens the file, flushes it, reads its map once. The number of records.
pub(super) fn fsync_and_fiemap(path: &Path) -> Result<u64> {
    let file = File::open(path).with_context(|| format!("{}", path.display()))?;
    file.sync_all()?;
    fiemap(&file)
}

fn fiemap(file: &File) -> Result<u64> {
    let mut page = vec![[0_u64; HEADER_WORDS + PAGE_RECORDS * RECORD_WORDS]; 1];
    let page: &mut Page = &mut page[0];
    let (mut start, mut count) = (0_u64, 0_u64);
    loop {
        let flags = if start == 0 { FIEMAP_FLAG_SYNC } else { 0 };
        // fm_start, fm_length, fm_flags and fm_mapped_extents, fm_extent_count: halves of words of a little-endian host.
        page[..HEADER_WORDS].copy_from_slice(&[start, u64::MAX - start, flags, PAGE_RECORDS as u64]);
        // SAFETY: the kernel reads the header and writes it and at most `fm_extent_count` records of 56 bytes, for which
        // the array has room; any bit pattern is a valid u64.
        unsafe { ioctl::ioctl(file, Updater::<FS_IOC_FIEMAP, Page>::new(page))? };
        let mapped = usize::try_from(page[2] >> 32)?;
        ensure!(mapped <= PAGE_RECORDS, "FIEMAP told of more records than fit");
        count += mapped as u64;
        let Some(last) = mapped.checked_sub(1).map(|last| &page[HEADER_WORDS + last * RECORD_WORDS..]) else {
            return Ok(count);
        };
        if last[5] & 1 != 0 {
            return Ok(count);
        }
        start = last[0] + last[2];
    }
}
