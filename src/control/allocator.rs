//! How the allocator of the C library deals with large pieces of memory, such as receive buffers of busy connections.
//!
//! They are mappings of their own, which are no memory before they are used, and are the kernel's again as soon as they are given
//! back. glibc does so by itself only at first: once such a piece was freed, it keeps others of that size in its heaps, where they
//! stay resident.
#![expect(unsafe_code, reason = "one call of the C library")]

/// From this size on a piece is large.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: libc::c_int = 128 * 1024;

/// To be called once, before large pieces come and go. Does nothing with another C library.
pub(super) fn give_large_pieces_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers, locks what it changes, and touches no memory of ours.
    let taken = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) };
    #[cfg(target_env = "gnu")]
    if taken == 0 {
        tracing::debug!("the allocator keeps large pieces of memory: idle connections may stay large");
    }
}
