//! Memory that nothing can write any more, which a frozen map lies in.

#![expect(unsafe_code, reason = "mmap has no safe wrapper")]

use std::io;
#[cfg(test)]
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::slice;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes in a memfd that nothing can write any more, mapped read-only.
#[derive(Debug)]
pub(in crate::extent) struct SealedMemory {
    start: NonNull<u8>,
    len: usize,
    /// Mapped again when the content is moved, and kept so that the seals can be looked at.
    file: OwnedFd,
}

// SAFETY: the memory is never written after construction, by anyone: the memfd carries F_SEAL_WRITE, and the mapping
// is PROT_READ. Sharing or moving a pointer to constant memory is sound.
unsafe impl Send for SealedMemory {}
// SAFETY: as above.
unsafe impl Sync for SealedMemory {}

/// What a huge page of the processors that fastice is made for holds.
const HUGE_PAGE_LEN: usize = 2 << 20;

/// Seals a file for good. The kernel refuses with EBUSY while anybody holds a page of it (`memfd_wait_for_pins` in `mm/memfd.c`,
/// which waits for 150 ms): reclaim, for one, takes pages for a moment, and lets them go.
fn add_seals(file: &OwnedFd) -> io::Result<()> {
    const ATTEMPTS: u32 = 40;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let mut result = rustix::fs::fcntl_add_seals(file, seals);
    for _ in 1..ATTEMPTS {
        if result != Err(rustix::io::Errno::BUSY) {
            break;
        }
        result = rustix::fs::fcntl_add_seals(file, seals);
    }
    Ok(result?)
}

impl SealedMemory {
    /// Copies `parts`, one behind the other, into sealed memory.
    pub(in crate::extent) fn seal(parts: &[&[u8]]) -> io::Result<Self> {
        let file = rustix::fs::memfd_create("fastice-map", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                let written = rustix::io::write(&file, rest)?;
                rest = rest.get(written..).unwrap_or_default();
            }
        }
        let len = parts.iter().map(|part| part.len()).sum();
        add_seals(&file)?;
        // SAFETY: a new mapping at an address the kernel chooses touches no memory of ours. The file has exactly
        // `len` bytes and, sealed against shrinking, keeps them, so no access can fault.
        let start =
            unsafe { rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, &file, 0)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut memory = Self { start, len, file };
        if len >= HUGE_PAGE_LEN {
            memory.move_to_boundary();
        }
        Ok(memory)
    }

    /// Maps the content where huge pages can be, for [`collapse`](Self::collapse).
    fn move_to_boundary(&mut self) {
        let room = self.len + HUGE_PAGE_LEN;
        // SAFETY: a new mapping at an address the kernel chooses, which nobody knows yet.
        let Ok(start) = (unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), MapFlags::PRIVATE)
        }) else {
            return;
        };
        let skip = start.addr().next_multiple_of(HUGE_PAGE_LEN) - start.addr();
        let aligned = start.wrapping_byte_add(skip);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: `aligned..aligned + len` lies within the mapping that was just made, which this one takes the place of. Its
        // file is sealed against shrinking, as above.
        let mapped = unsafe { rustix::mm::mmap(aligned, self.len, ProtFlags::READ, flags, &self.file, 0) };
        let Some(aligned) = mapped.ok().and_then(|mapped| NonNull::new(mapped.cast::<u8>())) else {
            // SAFETY: the whole room is ours, whatever is mapped there.
            let _ = unsafe { rustix::mm::munmap(start, room) };
            return;
        };
        let pages_len = self.len.next_multiple_of(rustix::param::page_size());
        // SAFETY: what is around the new mapping: parts of the room, which nobody uses. Both begin and end on pages.
        unsafe {
            let _ = (skip > 0).then(|| rustix::mm::munmap(start, skip));
            let behind = room.next_multiple_of(rustix::param::page_size()) - skip - pages_len;
            let end = start.wrapping_byte_add(skip + pages_len);
            let _ = (behind > 0).then(|| rustix::mm::munmap(end, behind));
        }
        // The old mapping goes, and nobody has borrowed from it.
        let old = std::mem::replace(&mut self.start, aligned);
        // SAFETY: it was made in `seal` with this length, and no borrow of it is there, as `self` is borrowed mutably.
        let _ = unsafe { rustix::mm::munmap(old.as_ptr().cast(), self.len) };
    }

    /// Has the kernel put the content into huge pages, as far as it fills them, if it can (`MADV_COLLAPSE`, Linux 6.1). A map of a
    /// million extents then takes a dozen entries of the processor's cache of addresses, where there are a thousand or two. It
    /// takes some 30 ms for that, in which the content can be read all the same.
    pub(in crate::extent) fn collapse(&self) {
        if self.len >= HUGE_PAGE_LEN {
            // SAFETY: the mapping is ours while `self` is borrowed, and its content stays what it is, wherever the kernel keeps
            // it; if it cannot, all stays as it was.
            let _ = unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_COLLAPSE) };
        }
    }

    /// The sealed bytes, page aligned.
    pub(in crate::extent) fn bytes(&self) -> &[u8] {
        // SAFETY: `start..start + len` is one live read-only mapping until drop, and the seals make its content
        // constant, as a shared slice demands.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The sealed file, for tests that try to break the seal.
    #[cfg(test)]
    pub(in crate::extent) fn file(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.file.as_fd()
    }
}

impl Drop for SealedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `seal` with this length, and no borrow of it outlives self. A failure
        // would leak memory, nothing more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
