//! How the allocator of the C library deals with large pieces of memory, such as receive buffers of busy connections.
//!
//! They are mappings of their own, which are no memory before they are used, and are the kernel's again as soon as they are given
//! back. glibc does so by itself only at first: once such a piece was freed, it keeps others of that size in its heaps, where they
//! stay resident.
//!
//! Small pieces lie in heaps, of which glibc gives back the end only. Where one that lasts came to lie behind many that were freed, all
//! of those stay resident: of a thousand connections that were busy, 13 KiB each, in one of three runs. So when connections became idle
//! or ended, and no more do, whole free pages are given back wherever they are.
#![expect(unsafe_code, reason = "two calls of the C library")]

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

/// Gives pages that are free back to the kernel, wherever in the heaps they are. Takes milliseconds, in which nobody else gets memory of a
/// heap that it is at. Does nothing with another C library.
pub(super) fn give_free_pages_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number, locks each heap that it is at, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// When connections have given memory back, and no others are about to.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// How often memory was given back, by the last look, and before the last time that it was told.
    seen: u64,
    told: u64,
}

impl Settled {
    /// So often was memory given back until now. Whether it was since the last time that this told so, and not since the last look.
    pub(super) const fn is_due(&mut self, given_back: u64) -> bool {
        let is_due = given_back == self.seen && given_back != self.told;
        self.seen = given_back;
        if is_due {
            self.told = given_back;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_due_once_when_no_more_is_given_back() {
        let mut settled = Settled::default();
        let due = [0, 0, 3, 5, 5, 5, 6, 7, 7, 7].map(|given_back| settled.is_due(given_back));
        assert_eq!(due, [false, false, false, false, true, false, false, false, true, false]);
    }
}
