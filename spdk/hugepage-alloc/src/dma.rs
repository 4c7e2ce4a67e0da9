//! A region that a device shares: kept mapped by counting, reached by copies that are checked against its length.
#![expect(unsafe_code, reason = "copies bytes that a device may be writing")]

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use crate::mapping::Mapping;
use crate::shared::{copy_racy, zero_racy};
use crate::{AllocError, Backing, PeerFileError, Region, RegionOptions};

/// A [`Region`] with several owners: a pool, the device it is mapped for, and whoever drives it. It stays mapped
/// until the last one lets go, so a device's mapping that keeps a clone can never point at memory given back.
///
/// The other side may write at any time. Bytes are copied in and out, words are read and written whole (volatile);
/// no reference into the memory is ever made. A range that leaves the region is refused, not a panic: a software
/// device checks with it the addresses that a driver names.
#[derive(Clone, Debug)]
pub struct DmaRegion {
    region: Arc<Region>,
}

// SAFETY: through a `DmaRegion` the memory is reached only by volatile words and by copies that are atomic byte by
// byte (see `shared`), so any thread may do so at any time; the mapping itself is undone once, by the last owner.
unsafe impl Send for DmaRegion {}
// SAFETY: as above.
unsafe impl Sync for DmaRegion {}

impl From<Region> for DmaRegion {
    fn from(region: Region) -> Self {
        #[expect(clippy::arc_with_non_send_sync, reason = "Send and Sync are vouched for by the wrapper")]
        let region = Arc::new(region);
        Self { region }
    }
}

impl DmaRegion {
    /// Maps at least `bytes` of zeroed memory, as [`Region::map`] does.
    ///
    /// # Errors
    /// When not even ordinary pages can be mapped.
    pub fn map(bytes: usize, prefer_huge: bool, lock: bool) -> Result<Self, AllocError> {
        Ok(Region::map(bytes, prefer_huge, lock)?.into())
    }

    /// Maps at least `bytes` of zeroed memory, as [`Region::with_options`] does.
    ///
    /// # Errors
    /// As there.
    pub fn with_options(bytes: usize, options: &RegionOptions) -> Result<Self, AllocError> {
        Ok(Region::with_options(bytes, options)?.into())
    }

    /// Maps `len` bytes from `offset` of a file in memory that another process made and shares: the device's end of
    /// [`DmaRegion::file`]. Both are multiples of the file's pages.
    ///
    /// The other process is not trusted: a file that could still be cut off (SIGBUS), whose size does not reach, or
    /// whose huge pages are not there is refused. What it can still do is punch holes into it later, see
    /// [`Region::file`].
    ///
    /// # Errors
    /// When the file is no memfd with `F_SEAL_SHRINK`, the range is not in it, or it cannot be mapped.
    pub fn from_file(file: OwnedFd, offset: u64, len: usize, writable: bool) -> Result<Self, PeerFileError> {
        let mapping = Mapping::of_peer_file(file, offset, len, writable)?;
        mapping.keep_private();
        Ok(Region::of_peer(mapping).into())
    }

    /// The length in bytes: a multiple of 2 MiB, or for a region [from a file](DmaRegion::from_file) of 4096.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.region.len()
    }

    /// The first byte, for mapping the region for a device.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// The kind of pages behind it.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.region.backing()
    }

    /// Why the pages are not of a better kind, and what to do about it.
    #[must_use]
    pub fn notice(&self) -> Option<&str> {
        self.region.notice()
    }

    /// The file through which another process maps the region, see [`Region::file`].
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.region.file()
    }

    /// The NUMA node that the first page came from; `None` when the kernel cannot tell.
    #[must_use]
    pub fn node(&self) -> Option<u32> {
        self.region.node()
    }

    /// Whether the region may be written to. Only one [from a file](DmaRegion::from_file) may not be.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.region.is_writable()
    }

    /// Whether both are the same memory.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.region, &other.region)
    }

    /// Copies the bytes from position `at` into all of `target`. Returns false, and copies nothing, when the range
    /// leaves the region.
    #[must_use]
    pub fn read(&self, at: usize, target: &mut [u8]) -> bool {
        let Some(from) = self.range(at, target.len()) else { return false };
        // SAFETY: the source range lies in the mapping (checked), `target` is Rust memory and so does not overlap.
        unsafe { copy_racy(from, target.as_mut_ptr(), target.len()) };
        true
    }

    /// Copies `source` to position `at`. Returns false, and copies nothing, when the range leaves the region.
    #[must_use]
    pub fn write(&self, at: usize, source: &[u8]) -> bool {
        let Some(to) = self.writable_range(at, source.len()) else { return false };
        // SAFETY: the target range lies in the mapping (checked), `source` is Rust memory and so does not overlap.
        unsafe { copy_racy(source.as_ptr(), to, source.len()) };
        true
    }

    /// Zeroes `len` bytes from position `at`. Returns false, and writes nothing, when the range leaves the region or
    /// it may not be written to.
    #[must_use]
    pub fn zero(&self, at: usize, len: usize) -> bool {
        let Some(to) = self.writable_range(at, len) else { return false };
        // SAFETY: the range lies in the mapping (checked).
        unsafe { zero_racy(to, len) };
        true
    }

    /// Reads the aligned word at `at`; what is read after it is at least as new (Acquire). `None` when it leaves
    /// the region or is not aligned.
    #[must_use]
    pub fn load_u64(&self, at: usize) -> Option<u64> {
        let from = self.aligned(at, 8)?;
        // SAFETY: eight aligned bytes in the mapping (checked); volatile, for a device may be writing them.
        let word = unsafe { from.cast::<u64>().read_volatile() };
        fence(Ordering::Acquire);
        Some(word)
    }

    /// Reads the aligned half word at `at`, like [`DmaRegion::load_u64`].
    #[must_use]
    pub fn load_u32(&self, at: usize) -> Option<u32> {
        let from = self.aligned(at, 4)?;
        // SAFETY: four aligned bytes in the mapping (checked); volatile, for a device may be writing them.
        let word = unsafe { from.cast::<u32>().read_volatile() };
        fence(Ordering::Acquire);
        Some(word)
    }

    /// Writes aligned words from position `at`, in their order, after everything written before (Release). Returns
    /// false, and writes nothing, when they leave the region or are not aligned.
    #[must_use]
    pub fn store_u64s<const N: usize>(&self, at: usize, words: [u64; N]) -> bool {
        if !at.is_multiple_of(8) {
            return false;
        }
        let Some(to) = self.writable_range(at, N * 8) else { return false };
        fence(Ordering::Release);
        for (index, word) in words.into_iter().enumerate() {
            // SAFETY: the range lies in the mapping and is aligned (both checked); volatile, for a device may be
            // reading it.
            unsafe { to.cast::<u64>().add(index).write_volatile(word) };
        }
        true
    }

    /// Writes the aligned half word at `at`, like [`DmaRegion::store_u64s`].
    #[must_use]
    pub fn store_u32(&self, at: usize, word: u32) -> bool {
        if !at.is_multiple_of(4) {
            return false;
        }
        let Some(to) = self.writable_range(at, 4) else { return false };
        fence(Ordering::Release);
        // SAFETY: four aligned bytes in the mapping (checked); volatile, for a device may be reading them.
        unsafe { to.cast::<u32>().write_volatile(word) };
        true
    }

    /// Exchanges the aligned half word at `at` for `word` in one step, and returns what was there. `None`, and nothing
    /// is written, when it leaves the region, is not aligned or may not be written.
    #[must_use]
    pub fn swap_u32(&self, at: usize, word: u32) -> Option<u32> {
        let to = self.writable_range(at, 4).filter(|_| at.is_multiple_of(4))?;
        // SAFETY: four aligned bytes in the mapping (checked). The reference lives for this one access, is to an atomic,
        // which others may write at any time, and is the only way to have the exchange made.
        Some(unsafe { AtomicU32::from_ptr(to.cast()) }.swap(word, Ordering::AcqRel))
    }

    fn aligned(&self, at: usize, len: usize) -> Option<*mut u8> {
        if !at.is_multiple_of(len) {
            return None;
        }
        self.range(at, len)
    }

    fn writable_range(&self, at: usize, len: usize) -> Option<*mut u8> {
        if self.region.is_writable() { self.range(at, len) } else { None }
    }

    fn range(&self, at: usize, len: usize) -> Option<*mut u8> {
        let room = self.region.len().checked_sub(at)?;
        (len <= room).then(|| self.region.as_ptr().wrapping_add(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leaves_the_region_is_refused_and_writes_nothing() {
        let region = DmaRegion::map(1, false, false).unwrap();
        let len = region.len();
        assert!(region.write(len - 4, &[1, 2, 3, 4]));
        assert!(!region.write(len - 3, &[9; 4]));
        assert!(!region.write(usize::MAX, &[9]));
        let mut four = [0; 4];
        assert!(region.read(len - 4, &mut four));
        assert_eq!(four, [1, 2, 3, 4]);
        assert!(!region.read(len + 1, &mut []));
        assert!(region.read(len, &mut []));
        assert!(!region.zero(len - 1, 2));
        assert_eq!(region.load_u64(len), None);
        assert_eq!(region.load_u64(4), None, "not aligned");
        assert!(!region.store_u64s(len - 8, [0; 2]));
        assert!(!region.store_u32(2, 0));
    }

    #[test]
    fn words_and_bytes_are_the_same_memory() {
        let region = DmaRegion::map(1, false, false).unwrap();
        let other = region.clone();
        assert!(region.store_u64s(64, [u64::from_le_bytes(*b"abcdefgh"), 7]));
        let mut bytes = [0; 8];
        assert!(other.read(64, &mut bytes));
        assert_eq!(&bytes, b"abcdefgh");
        assert_eq!(other.load_u64(72), Some(7));
        assert!(other.store_u32(72, 9));
        assert_eq!(region.load_u32(72), Some(9));
        assert_eq!(other.swap_u32(72, 11), Some(9));
        assert_eq!(region.load_u32(72), Some(11));
        assert_eq!(region.swap_u32(74, 1), None, "not aligned");
        assert_eq!(region.swap_u32(region.len(), 1), None);
        assert!(region.is_same(&other));
    }
}
