//! Time stamps of eight bytes, comparable between all processes of a machine, and with what tracers and the kernel's log say.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// One moment in both forms: the clock is the same, but an [`Instant`] does not tell its number.
static ANCHOR: LazyLock<Anchor> = LazyLock::new(Anchor::find);

struct Anchor {
    stamp: Stamp,
    instant: Instant,
}

impl Anchor {
    /// So many nanoseconds may lie between the two: more is an interruption.
    const APART_NS: u64 = 10_000;
    const TRIES: usize = 100;

    fn find() -> Self {
        let look = || {
            let stamp = Stamp::now();
            let instant = Instant::now();
            (Stamp::now().ns_since(stamp), Self { stamp, instant })
        };
        let mut best = look();
        for _ in 0..Self::TRIES {
            if best.0 <= Self::APART_NS {
                break;
            }
            let next = look();
            if next.0 < best.0 {
                best = next;
            }
        }
        best.1
    }
}

/// A moment of the monotonic clock (`clock_gettime(2)`, `CLOCK_MONOTONIC`), in nanoseconds.
/// The default is a moment before all others: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

impl Stamp {
    /// None: a moment before all others.
    pub const NONE: Self = Self(0);

    /// This moment. Some 30 ns: for batches, not for each command.
    #[must_use]
    #[inline]
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        // The clock counts up from the start of the machine: 580 years fit; and no moment is none.
        let ns =
            now.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.cast_unsigned());
        Self(ns | 1)
    }

    /// The same moment for those who wait, or some nanoseconds later.
    #[must_use]
    #[inline]
    pub fn instant(self) -> Instant {
        let Anchor { stamp, instant } = *ANCHOR;
        // What is older than the first call is as old.
        instant + Duration::from_nanos(self.ns_since(stamp))
    }

    /// A stamp of so many nanoseconds.
    #[must_use]
    pub const fn from_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds of the monotonic clock.
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

    /// So much later.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX)))
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
    use super::*;

    #[test]
    fn stamps_follow_the_clock_and_are_never_none() {
        // Sets the anchor, before which there is no instant.
        let anchored = Stamp::now().instant();
        let first = Stamp::now();
        let begun = Instant::now();
        assert!(first <= Stamp::now() && !first.is_none() && Stamp::default().is_none());
        assert!(anchored <= first.instant());
        let off = begun.saturating_duration_since(first.instant());
        assert!(off < Duration::from_millis(100), "{off:?}");
        let later = first.after(Duration::from_secs(3));
        assert_eq!(later, Stamp::from_ns(first.ns() + 3_000_000_000));
        assert_eq!(first.after(Duration::MAX), Stamp::from_ns(u64::MAX));
        assert_eq!(later.instant() - first.instant(), Duration::from_secs(3));
        assert_eq!((later.ns_since(first), first.ns_since(later)), (3_000_000_000, 0));
        assert_eq!((first.max(later), later.max(first)), (later, later));
    }
}
