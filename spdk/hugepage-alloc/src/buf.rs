//! A counted slice of a pool buffer.
#![expect(unsafe_code, reason = "copies bytes to and from memory that devices write")]

use std::fmt;
use std::ptr;

use crate::pool::PoolHandle;
use crate::{BUFFER_LEN_MAX, BufferPool, pool::Slot};

/// A slice of a pool buffer. Cloning and slicing bump a plain count; the buffer returns to its pool when the last
/// slice is dropped. Stays on one thread.
///
/// A new buffer holds whatever its last user left there. Whoever shows a buffer's bytes to a peer must have filled
/// all of them.
///
/// Overlapping slices may exist; the bytes are always copied, never borrowed, so that is no aliasing.
pub struct DmaBuf {
    pool: PoolHandle,
    /// First byte of the slice, inside a region that `pool` keeps mapped.
    ptr: *mut u8,
    len: u32,
    slot: Slot,
}

impl DmaBuf {
    /// Takes over one count of `slot`.
    pub(crate) const fn new(pool: PoolHandle, ptr: *mut u8, len: u32, slot: Slot) -> Self {
        Self { pool, ptr, len, slot }
    }

    /// The length of the slice in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether the slice has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether nobody else holds the buffer or a part of it: no clone and no other slice lives.
    #[must_use]
    pub fn is_sole(&self) -> bool {
        self.pool.is_sole(self.slot)
    }

    /// The `len` bytes from `offset` as a slice of their own.
    ///
    /// # Panics
    /// When the range does not lie inside this slice: an error of the programmer. For lengths that a peer or a
    /// device names, use [`DmaBuf::try_slice`].
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Self {
        match self.try_slice(offset, len) {
            Some(slice) => slice,
            None => panic!("slice of {len} bytes at {offset} leaves a buffer of {} bytes", self.len),
        }
    }

    /// The `len` bytes from `offset` as a slice of their own, or `None` when they do not lie inside this slice.
    #[must_use]
    #[inline]
    pub fn try_slice(&self, offset: usize, len: usize) -> Option<Self> {
        if offset > self.len() || len > self.len() - offset {
            return None;
        }
        let len = u32::try_from(len).ok()?;
        let pool = self.pool.clone();
        pool.retain(self.slot);
        Some(Self { pool, ptr: self.ptr.wrapping_add(offset), len, slot: self.slot })
    }

    /// The first byte, for system calls and devices. Valid while this slice or a clone of it lives.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The index of the pool's region this slice lies in, in the order of [`BufferPool::regions`].
    #[must_use]
    pub fn region_index(&self) -> u16 {
        self.pool.region_of(self.slot)
    }

    /// The position of the first byte in its region. The slice does not cross a multiple of 2 MiB in it.
    #[must_use]
    pub fn region_offset(&self) -> usize {
        self.pool.offset_of(self.slot, self.ptr)
    }

    /// The index of the 2 MiB page this slice lies in, counted through all regions of the pool in their order.
    #[must_use]
    pub const fn page_index(&self) -> usize {
        self.slot.page()
    }

    /// The position of the first byte in that page. A slice that is not empty ends in the same page.
    #[must_use]
    pub fn page_offset(&self) -> usize {
        // Regions lie at multiples of 2 MiB.
        self.ptr.addr() % BUFFER_LEN_MAX
    }

    /// Whether the buffer came from `pool`.
    #[must_use]
    #[inline]
    pub fn is_of(&self, pool: &BufferPool) -> bool {
        self.pool.is_same(pool.handle())
    }

    /// Whether both are slices of one buffer, or clones.
    #[must_use]
    #[inline]
    pub fn is_of_same_buffer(&self, other: &Self) -> bool {
        self.slot == other.slot && self.pool.is_same(&other.pool)
    }

    /// Copies `source` to position `at` of the slice.
    ///
    /// # Panics
    /// When it does not fit: an error of the programmer.
    pub fn write_from(&self, at: usize, source: &[u8]) {
        self.check(at, source.len());
        // SAFETY: the target range lies in the slice (checked), whose region is mapped while `self` lives; `source`
        // is Rust memory and so never pool memory.
        unsafe { ptr::copy_nonoverlapping(source.as_ptr(), self.ptr.add(at), source.len()) };
    }

    /// Copies the bytes from position `at` into all of `target`.
    ///
    /// # Panics
    /// When the slice ends before `target` does: an error of the programmer.
    pub fn read_into(&self, at: usize, target: &mut [u8]) {
        self.check(at, target.len());
        // SAFETY: the source range lies in the slice (checked), whose region is mapped while `self` lives; `target`
        // is Rust memory and so never pool memory.
        unsafe { ptr::copy_nonoverlapping(self.ptr.add(at), target.as_mut_ptr(), target.len()) };
    }

    /// Copies `len` bytes from position `other_at` of `other` to position `at` of this slice. The two may overlap.
    ///
    /// # Panics
    /// When either range does not lie inside its slice: an error of the programmer.
    pub fn copy_from(&self, at: usize, other: &Self, other_at: usize, len: usize) {
        self.check(at, len);
        other.check(other_at, len);
        // SAFETY: both ranges lie in their slices (checked), whose regions are mapped while the slices live;
        // `copy` allows overlap.
        unsafe { ptr::copy(other.ptr.add(other_at), self.ptr.add(at), len) };
    }

    /// Fills the slice with zeros.
    pub fn zero(&self) {
        // SAFETY: the slice's own bytes, in a region that is mapped while `self` lives.
        unsafe { ptr::write_bytes(self.ptr, 0, self.len()) };
    }

    #[track_caller]
    fn check(&self, at: usize, len: usize) {
        assert!(
            at <= self.len() && len <= self.len() - at,
            "{len} bytes at {at} leave a buffer of {} bytes",
            self.len
        );
    }
}

impl Clone for DmaBuf {
    fn clone(&self) -> Self {
        let pool = self.pool.clone();
        pool.retain(self.slot);
        Self { pool, ptr: self.ptr, len: self.len, slot: self.slot }
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        self.pool.release(self.slot);
    }
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBuf").field("ptr", &self.ptr).field("len", &self.len).finish_non_exhaustive()
    }
}
