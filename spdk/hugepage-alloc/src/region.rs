//! One mapping of memory: where it came from, and why not from better.
#![expect(unsafe_code, reason = "maps and unmaps memory")]

use std::ffi::c_void;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};

use crate::{AllocError, BUFFER_LEN_MAX};

/// The most one region holds: a registered io_uring buffer ends at 1 GiB (kernel, `io_uring/rsrc.c`).
pub(crate) const REGION_LEN_MAX: usize = 1 << 30;

/// What kind of pages stand behind a mapping, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backing {
    /// 2 MiB pages of hugetlbfs: never swapped, never moved, one TLB entry for 2 MiB.
    HugePages2M,
    /// Ordinary pages, locked into memory; transparent huge pages when the kernel feels like it.
    OrdinaryLocked,
    /// Ordinary pages that may be swapped out: the limit on locked memory is too low.
    OrdinaryUnlocked,
}

impl std::fmt::Display for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HugePages2M => "2 MiB huge pages",
            Self::OrdinaryLocked => "ordinary pages, locked",
            Self::OrdinaryUnlocked => "ordinary pages, not locked",
        })
    }
}

/// One mapping, unmapped on drop. Its length is a multiple of 2 MiB, and so is its address.
///
/// The pages are touched by the thread that maps them, so that they lie on that thread's NUMA node. They are kept
/// out of core dumps (they hold the hosts' data) and out of forked children (which would turn pages under DMA into
/// copies).
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    backing: Backing,
    notice: Option<String>,
}

impl Region {
    /// Maps at least `bytes`, rounded up to 2 MiB, of zeroed memory.
    ///
    /// # Errors
    /// When not even ordinary pages can be mapped; whatever is better and missing is told by [`Region::notice`].
    pub fn map(bytes: usize, prefer_huge: bool, lock: bool) -> Result<Self, AllocError> {
        if bytes == 0 || bytes > 1 << 40 {
            return Err(AllocError::BadSize { bytes });
        }
        let len = bytes.next_multiple_of(BUFFER_LEN_MAX);
        let mut notice = None;
        if prefer_huge {
            match map_huge(len) {
                Ok(base) => {
                    return Ok(Self { base, len, backing: Backing::HugePages2M, notice: None }.advised());
                }
                Err(errno) => {
                    notice = Some(format!(
                        "no 2 MiB huge pages for {len} bytes ({errno}): ordinary pages are used; reserve {} more \
                         with `sysctl vm.nr_hugepages`",
                        len / BUFFER_LEN_MAX
                    ));
                }
            }
        }
        let base = map_ordinary(len)?;
        let mut region = Self { base, len, backing: Backing::OrdinaryUnlocked, notice }.advised();
        if lock {
            region.lock();
        }
        Ok(region)
    }

    /// The first byte. Raw, because a device may write here at any time.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The length in bytes, a multiple of 2 MiB.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// The kind of pages that was got.
    #[must_use]
    pub const fn backing(&self) -> Backing {
        self.backing
    }

    /// Why it is not a better kind, and what to do about it; `None` when nothing better was asked for.
    #[must_use]
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// Keeps the pages out of core dumps and forked children. Both are best effort: neither changes what works.
    fn advised(self) -> Self {
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: the range is the mapping that `self` owns; neither advice changes its contents.
            let _ = unsafe { mm::madvise(self.base.as_ptr().cast(), self.len, advice) };
        }
        self
    }

    fn lock(&mut self) {
        // SAFETY: the range is the mapping that `self` owns; locking does not change its contents.
        match unsafe { mm::mlock(self.base.as_ptr().cast(), self.len) } {
            Ok(()) => self.backing = Backing::OrdinaryLocked,
            Err(errno) => {
                let why = format!(
                    "{} bytes could not be locked into memory ({errno}): raise RLIMIT_MEMLOCK (systemd: \
                     LimitMEMLOCK=infinity)",
                    self.len
                );
                self.notice = Some(match self.notice.take() {
                    Some(before) => format!("{before}; {why}"),
                    None => why,
                });
            }
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        unmap(self.base.as_ptr(), self.len);
    }
}

/// Maps huge pages and makes the kernel supply every one of them now. Without the second step a cgroup limit would
/// show as SIGBUS on first touch.
fn map_huge(len: usize) -> Result<NonNull<u8>, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
    let base = map_anonymous(len, flags)?;
    // SAFETY: the range was just mapped by us, and nobody else knows it.
    match unsafe { mm::madvise(base.as_ptr().cast(), len, Advice::LinuxPopulateWrite) } {
        // EINVAL: a kernel before 5.14, which cannot say; the reservation made by mmap holds there.
        Ok(()) | Err(Errno::INVAL) => Ok(base),
        Err(errno) => {
            unmap(base.as_ptr(), len);
            Err(errno)
        }
    }
}

/// Refuses `bytes` of ordinary pages that the host does not have. Touching them would wake the OOM killer, which
/// ends whatever process it finds the largest. A host that does not tell (no `/proc`) is taken at its word by mmap.
pub(crate) fn refuse_without_room(bytes: usize) -> Result<(), AllocError> {
    match std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(available) {
        Some(available) if bytes > available => Err(AllocError::NoRoom { bytes, available }),
        _ => Ok(()),
    }
}

/// `MemAvailable` of `/proc/meminfo`, in bytes (kernel, `Documentation/filesystems/proc.rst`).
fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Maps ordinary pages at a multiple of 2 MiB, by mapping more and giving back both ends.
fn map_ordinary(len: usize) -> Result<NonNull<u8>, AllocError> {
    refuse_without_room(len)?;
    let mapped = len + BUFFER_LEN_MAX;
    let whole = map_anonymous(mapped, MapFlags::PRIVATE)
        .map_err(|source| AllocError::Map { bytes: len, source })?
        .as_ptr();
    let head = whole.align_offset(BUFFER_LEN_MAX);
    let base = whole.wrapping_add(head);
    unmap(whole, head);
    unmap(base.wrapping_add(len), mapped - head - len);
    // SAFETY: the range is what is left of the mapping made above, and nobody else knows it.
    unsafe {
        let _ = mm::madvise(base.cast(), len, Advice::LinuxHugepage);
        match mm::madvise(base.cast(), len, Advice::LinuxPopulateWrite) {
            Ok(()) | Err(Errno::INVAL) => {}
            Err(source) => {
                unmap(base, len);
                return Err(AllocError::Map { bytes: len, source });
            }
        }
    }
    NonNull::new(base).ok_or(AllocError::Map { bytes: len, source: Errno::NOMEM })
}

fn map_anonymous(len: usize, flags: MapFlags) -> Result<NonNull<u8>, Errno> {
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let base =
        unsafe { mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)? };
    NonNull::new(base.cast()).ok_or(Errno::NOMEM)
}

fn unmap(base: *mut u8, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: callers pass (the rest of) a mapping they own and give up.
    let result = unsafe { mm::munmap(base.cast::<c_void>(), len) };
    debug_assert!(result.is_ok(), "unmapping memory of ours failed: {result:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let text = "MemTotal:       24682416 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(available(text), Some(1 << 20));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn more_than_the_host_has_is_refused_before_a_page_is_touched() {
        assert!(
            matches!(Region::map(1 << 40, false, false), Err(AllocError::NoRoom { bytes, .. }) if bytes == 1 << 40)
        );
    }
}
