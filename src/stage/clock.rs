//! Time stamps of eight bytes, comparable between the cores of a process.

use std::sync::LazyLock;
use std::time::Instant;

/// What stamps count from.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A moment of the monotonic clock (`clock_gettime(2)`, `CLOCK_MONOTONIC`), in nanoseconds since the process looked at it first.
/// The default is a moment before all others: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

impl Stamp {
    /// None: a moment before all others.
    pub const NONE: Self = Self(0);

    /// This moment. Some 30 ns: for batches, not for each command.
    #[must_use]
    pub fn now() -> Self {
        Self::of(Instant::now())
    }

    /// The stamp of a moment.
    #[must_use]
    #[inline]
    pub fn of(at: Instant) -> Self {
        let since = at.saturating_duration_since(*EPOCH);
        // 580 years fit; and no moment is none.
        Self(since.as_secs().wrapping_mul(1_000_000_000).wrapping_add(u64::from(since.subsec_nanos())) | 1)
    }

    /// A stamp of so many nanoseconds.
    #[must_use]
    pub const fn from_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since the epoch of the process.
    #[must_use]
    pub const fn ns(self) -> u64 {
        self.0
    }

    /// Nanoseconds since an earlier stamp; 0 when it is later.
    #[must_use]
    #[inline]
    pub const fn ns_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Whether it is none.
    #[must_use]
    #[inline]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn stamps_follow_the_clock_and_are_never_none() {
        let (first, begun) = (Stamp::now(), Instant::now());
        let later = Stamp::of(begun + Duration::from_secs(3));
        assert!(later.ns_since(Stamp::of(begun)).abs_diff(3_000_000_000) <= 1);
        assert!(first <= Stamp::now() && !first.is_none() && Stamp::default().is_none());
        assert!(!Stamp::of(*EPOCH).is_none());
        assert_eq!(first.ns_since(later), 0);
        assert_eq!((first.max(later), later.max(first)), (later, later));
    }
}
