//! A part of a BAR in memory: single accesses of 32 and 64 bits, in order with ordinary memory.
//!
//! A device sees a write to a register only after everything written to memory before it (a queue entry, then the
//! doorbell), and memory is read only after a register that was read before it. On `x86_64` uncached accesses keep
//! that order by themselves and only the compiler is held back; on `aarch64` a barrier for the outer shareable
//! domain, where devices are, is needed.
#![expect(unsafe_code, reason = "maps registers and reaches them by volatile accesses")]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{self, MapFlags, ProtFlags};

use super::kernel::Window;
use super::sigbus::Guard;

/// A mapped part of a device file.
#[derive(Debug)]
pub(super) struct Mmio {
    /// Before the mapping, for it must end first.
    guard: Guard,
    mapping: Mapping,
}

/// The mapping alone, undone on drop.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value and is reached only by volatile accesses, which the device orders; any
// thread may make them.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody has its address any more.
        let result = unsafe { mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "unmapping a BAR failed: {result:?}");
    }
}

impl Mmio {
    /// Maps `len` bytes of `file` from `offset`, shared, to read and write.
    pub(super) fn map(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, offset)? };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Mapping { base, len };
        // SAFETY: the mapping was just made, nothing refers into it, and it is dropped after the guard.
        let guard = unsafe { Guard::new(base.as_ptr().expose_provenance(), len)? };
        Ok(Self { guard, mapping })
    }

    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let size = size_of::<T>();
        let inside = offset.is_multiple_of(size) && offset.checked_add(size)? <= self.mapping.len;
        inside.then(|| self.mapping.base.as_ptr().wrapping_add(offset).cast())
    }
}

impl Window for Mmio {
    fn read32(&self, offset: usize) -> u32 {
        let Some(register) = self.at::<u32>(offset) else { return u32::MAX };
        // SAFETY: aligned and inside the mapping (checked by `at`), which lives as long as `self`.
        let value = unsafe { register.read_volatile() };
        after_read();
        if self.guard.is_gone() { u32::MAX } else { value }
    }

    fn write32(&self, offset: usize, value: u32) {
        let Some(register) = self.at::<u32>(offset) else { return };
        before_write();
        // SAFETY: as in `read32`.
        unsafe { register.write_volatile(value) };
    }

    fn read64(&self, offset: usize) -> u64 {
        let Some(register) = self.at::<u64>(offset) else { return u64::MAX };
        // SAFETY: as in `read32`.
        let value = unsafe { register.read_volatile() };
        after_read();
        if self.guard.is_gone() { u64::MAX } else { value }
    }

    fn write64(&self, offset: usize, value: u64) {
        let Some(register) = self.at::<u64>(offset) else { return };
        before_write();
        // SAFETY: as in `read32`.
        unsafe { register.write_volatile(value) };
    }

    fn is_gone(&self) -> bool {
        self.guard.is_gone()
    }
}

#[cfg(target_arch = "x86_64")]
fn before_write() {
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

#[cfg(target_arch = "x86_64")]
fn after_read() {
    std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
}

#[cfg(target_arch = "aarch64")]
fn before_write() {
    // SAFETY: a barrier changes neither registers nor memory; as it may touch memory, so far as the compiler
    // knows, it is one for the compiler too.
    unsafe { std::arch::asm!("dmb oshst", options(nostack, preserves_flags)) };
}

#[cfg(target_arch = "aarch64")]
fn after_read() {
    // SAFETY: as above.
    unsafe { std::arch::asm!("dmb oshld", options(nostack, preserves_flags)) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn file(len: u64) -> std::os::fd::OwnedFd {
        let file = memfd_create("bar", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        file
    }

    #[test]
    fn registers_are_read_as_they_were_written() {
        let file = file(8192);
        let bar = Mmio::map(file.as_fd(), 4096, 4096).unwrap();
        bar.write32(0, 0x1122_3344);
        bar.write64(8, 0x5566_7788_99AA_BBCC);
        assert_eq!((bar.read32(0), bar.read64(8)), (0x1122_3344, 0x5566_7788_99AA_BBCC));
        assert_eq!(bar.read32(12), 0x5566_7788, "the upper half");
        let mut bytes = [0; 4];
        rustix::io::pread(&file, &mut bytes, 4096).unwrap();
        assert_eq!(bytes, [0x44, 0x33, 0x22, 0x11], "the offset in the file holds");
    }

    #[test]
    fn what_is_outside_or_not_aligned_reads_as_ones_and_is_not_written() {
        let file = file(4096);
        let bar = Mmio::map(file.as_fd(), 0, 4096).unwrap();
        for offset in [4096, 4093, 2, usize::MAX] {
            bar.write32(offset, 0);
            assert_eq!(bar.read32(offset), u32::MAX);
        }
        for offset in [4092, 4, 4096] {
            bar.write64(offset, u64::MAX);
            assert_eq!(bar.read64(offset), u64::MAX);
        }
        assert_eq!(bar.read32(4092), 0, "nothing was written");
    }

    #[test]
    fn a_bar_that_goes_away_reads_as_ones_and_nobody_dies() {
        let (file, other) = (file(8192), file(4096));
        let bar = Mmio::map(file.as_fd(), 0, 8192).unwrap();
        let another = Mmio::map(other.as_fd(), 0, 4096).unwrap();
        bar.write32(0, 7);
        another.write32(0, 9);
        ftruncate(&file, 0).unwrap();
        bar.write32(4096, 1);
        assert!(bar.is_gone());
        assert_eq!((bar.read32(0), bar.read64(0), bar.read32(4096)), (u32::MAX, u64::MAX, u32::MAX));
        assert!(!another.is_gone());
        assert_eq!(another.read32(0), 9);
    }

    #[test]
    fn a_place_is_guarded_anew_when_it_is_used_again() {
        for _ in 0..600 {
            let file = file(4096);
            let bar = Mmio::map(file.as_fd(), 0, 4096).unwrap();
            assert!(!bar.is_gone());
            ftruncate(&file, 0).unwrap();
            assert_eq!(bar.read32(0), u32::MAX);
        }
    }
}
