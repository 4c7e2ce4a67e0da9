//! Memory that several cores copy from and to at the same time.
#![expect(unsafe_code, reason = "copies bytes that other threads may be writing")]

use crate::region::{REGION_LEN_MAX, refuse_without_room};
use crate::{AllocError, Backing, DmaBuf, Region};

/// Memory shared by all threads, read and written only by copying between it and a [`DmaBuf`].
///
/// Copies that overlap in time and place are allowed, as on a disk: which bytes win is left open, byte by byte.
/// They are no data race, for they are not made by Rust loads and stores: on `x86_64` by a `rep movsb` in an asm
/// block (as if every byte were a relaxed atomic), elsewhere by relaxed atomic words.
#[derive(Debug)]
pub struct SharedMemory {
    /// All but the last are `REGION_LEN_MAX` long.
    regions: Vec<Region>,
    len: usize,
}

// SAFETY: the memory is reached only by `copy_in`, `copy_out` and `zero`, whose accesses to it are atomic byte by
// byte (see above); `Region` is owned, and unmapped once.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `len` bytes of zeroed memory; of huge pages when they are preferred and there are any.
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub fn new(len: usize, prefer_huge: bool) -> Result<Self, AllocError> {
        if len == 0 {
            return Err(AllocError::BadSize { bytes: len });
        }
        if !prefer_huge {
            // All of it, before the first part is touched.
            refuse_without_room(len)?;
        }
        let mut regions = Vec::with_capacity(len.div_ceil(REGION_LEN_MAX));
        let mut left = len;
        while left > 0 {
            let part = left.min(REGION_LEN_MAX);
            regions.push(Region::map(part, prefer_huge, false)?);
            left -= part;
        }
        Ok(Self { regions, len })
    }

    /// The length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "shared memory is never empty")]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// The worst backing of its parts.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.regions.iter().map(Region::backing).max().unwrap_or(Backing::OrdinaryUnlocked)
    }

    /// Copies all of `buf` to position `at`. Returns false, and copies nothing, when it does not fit.
    #[must_use]
    pub fn copy_in(&self, at: usize, buf: &DmaBuf) -> bool {
        self.each_part(at, buf.len(), |memory, done, len| {
            // SAFETY: `each_part` yields ranges of the mapping; `buf` is alive and `done + len <= buf.len()`. The
            // two never overlap: a buffer lies in a pool's mapping.
            unsafe { copy_racy(buf.as_ptr().add(done), memory, len) };
        })
    }

    /// Fills all of `buf` from position `at`. Returns false, and copies nothing, when it does not fit.
    #[must_use]
    pub fn copy_out(&self, at: usize, buf: &DmaBuf) -> bool {
        self.each_part(at, buf.len(), |memory, done, len| {
            // SAFETY: as in `copy_in`, the other way round.
            unsafe { copy_racy(memory, buf.as_ptr().add(done), len) };
        })
    }

    /// Zeroes `len` bytes from position `at`. Returns false, and writes nothing, when that does not fit.
    #[must_use]
    pub fn zero(&self, at: usize, len: usize) -> bool {
        self.each_part(at, len, |memory, _, len| {
            // SAFETY: `each_part` yields ranges of the mapping.
            unsafe { zero_racy(memory, len) };
        })
    }

    /// Calls `f(address, bytes before it, length)` for each region that `len` bytes from `at` cross.
    fn each_part(&self, at: usize, len: usize, mut f: impl FnMut(*mut u8, usize, usize)) -> bool {
        if at > self.len || len > self.len - at {
            return false;
        }
        let mut done = 0;
        while done < len {
            let position = at + done;
            let Some(region) = self.regions.get(position / REGION_LEN_MAX) else { return false };
            let offset = position % REGION_LEN_MAX;
            let part = (len - done).min(REGION_LEN_MAX - offset);
            f(region.as_ptr().wrapping_add(offset), done, part);
            done += part;
        }
        true
    }
}

/// Copies `len` bytes; either side may be written by another thread meanwhile.
///
/// # Safety
/// Both ranges are mapped, and do not overlap.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn copy_racy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both ranges; the instruction touches nothing else, and the direction flag is
    // clear at function entry (System V ABI).
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Writes `len` zeros; other threads may read or write there meanwhile.
///
/// # Safety
/// The range is mapped.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn zero_racy(to: *mut u8, len: usize) {
    // SAFETY: as in `copy_racy`.
    unsafe {
        std::arch::asm!(
            "rep stosb",
            inout("rcx") len => _, inout("rdi") to => _, in("al") 0u8,
            options(nostack, preserves_flags)
        );
    }
}

/// Copies `len` bytes; either side may be written by another thread meanwhile.
///
/// # Safety
/// Both ranges are mapped, and do not overlap.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn copy_racy(from: *const u8, to: *mut u8, len: usize) {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
    let mut at = 0;
    while at < len {
        // SAFETY: within the ranges the caller vouches for; words only where both addresses are aligned.
        unsafe {
            let (source, target) = (from.add(at), to.add(at));
            if len - at >= 8 && (source.addr() | target.addr()) & 7 == 0 {
                let word = AtomicU64::from_ptr(source.cast_mut().cast()).load(Relaxed);
                AtomicU64::from_ptr(target.cast()).store(word, Relaxed);
                at += 8;
            } else {
                let byte = AtomicU8::from_ptr(source.cast_mut()).load(Relaxed);
                AtomicU8::from_ptr(target).store(byte, Relaxed);
                at += 1;
            }
        }
    }
}

/// Writes `len` zeros; other threads may read or write there meanwhile.
///
/// # Safety
/// The range is mapped.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn zero_racy(to: *mut u8, len: usize) {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
    let mut at = 0;
    while at < len {
        // SAFETY: within the range the caller vouches for; words only where the address is aligned.
        unsafe {
            let target = to.add(at);
            if len - at >= 8 && target.addr() & 7 == 0 {
                AtomicU64::from_ptr(target.cast()).store(0, Relaxed);
                at += 8;
            } else {
                AtomicU8::from_ptr(target).store(0, Relaxed);
                at += 1;
            }
        }
    }
}
