//! How the allocator of the C library deals with large pieces of memory, such as receive buffers of busy connections.
//!
//! They are mappings of their own, which are no memory before they are used, and are the kernel's again as soon as they are given
//! back. glibc does so by itself only at first: once such a piece was freed, it keeps others of that size in its heaps, where they
//! stay resident.
//!
//! Small pieces lie in heaps, of which glibc gives back the end only. Where one that lasts came to lie behind many that were freed, all
//! of those stay resident: of a thousand connections that were busy, 13 KiB each, in one of three runs. So when connections became idle
//! or ended, free pages are given back wherever in the heaps they are, all but the end of each heap.
//!
//! Who needs the same heap meanwhile waits, and pages that go away cost all cores a flush of their TLBs: so it is done once no more
//! connections change, and not often. Commands under way take nothing from a heap.
#![expect(unsafe_code, reason = "two calls of the C library")]

use std::time::{Duration, Instant};

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

/// Gives pages that are free back to the kernel. Does nothing with another C library.
pub(super) fn give_free_pages_back() {
    #[cfg(target_env = "gnu")]
    {
        let begun = Instant::now();
        // SAFETY: malloc_trim takes a number, locks each heap that it is at, and touches only what is free.
        let given = unsafe { libc::malloc_trim(0) };
        tracing::debug!(given, us = begun.elapsed().as_micros(), "free memory is the kernel's again");
    }
}

/// Not more often than this, whatever connections do.
const PAUSE: Duration = Duration::from_secs(5);
/// Where connections change without end, it is done all the same after so long.
const PATIENCE: Duration = Duration::from_secs(30);

/// When connections have given memory back, and no others are about to.
#[derive(Debug)]
pub(super) struct Settled {
    /// How often memory was given back, by the last look, and when this last told so.
    seen: u64,
    told: u64,
    told_at: Instant,
}

impl Settled {
    pub(super) const fn new(now: Instant) -> Self {
        Self { seen: 0, told: 0, told_at: now }
    }

    /// So often was memory given back until now. Whether it was since the last time that this told so, and not since the last look.
    pub(super) fn is_due(&mut self, given_back: u64, now: Instant) -> bool {
        let since = now.duration_since(self.told_at);
        let is_settled = given_back == self.seen && since >= PAUSE;
        let is_due = given_back != self.told && (is_settled || since >= PATIENCE);
        self.seen = given_back;
        if is_due {
            (self.told, self.told_at) = (given_back, now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is told of looks so many seconds after the start.
    fn told(looks: &[(u64, u64)]) -> Vec<u64> {
        let begun = Instant::now();
        let mut settled = Settled::new(begun);
        let is_due = |&(second, given_back): &(u64, u64)| {
            settled.is_due(given_back, begun + Duration::from_secs(second)).then_some(second)
        };
        looks.iter().filter_map(is_due).collect()
    }

    #[test]
    fn it_is_due_once_when_no_more_is_given_back() {
        assert_eq!(
            told(&[(6, 0), (7, 0), (8, 3), (9, 5), (10, 5), (11, 5), (20, 6), (21, 6), (22, 6)]),
            [10, 21]
        );
    }

    #[test]
    fn it_is_not_due_often() {
        assert_eq!(
            told(&[(1, 3), (2, 3), (4, 3), (5, 3), (6, 4), (7, 4), (9, 4), (10, 4), (11, 4)]),
            [5, 10]
        );
    }

    #[test]
    fn it_is_due_at_last_where_more_is_given_back_all_the_time() {
        let looks: Vec<_> = (1..=70).map(|second| (second, second)).collect();
        assert_eq!(told(&looks), [30, 60]);
    }
}
