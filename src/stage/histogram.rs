//! A log-linear histogram of nanoseconds: fixed memory, one writer, any readers.
//!
//! ```text
//!   ns / 32:   0 1 2 3 | 4 5 6 7 | 8-9 10-11 12-13 14-15 | 16-19 ...   four buckets an octave, up to 34 s
//! ```
//!
//! A bucket is at most a quarter as wide as it is high, so a quantile is right to 25 % or 32 ns. The writer adds with plain loads and
//! stores, no locked instruction. What a reader sees is of about this moment; each bucket is right by itself, and the
//! count is the sum of the buckets that were read.

use std::sync::atomic::{AtomicU64, Ordering};

/// Nanoseconds to the unit of the smallest bucket, as a shift.
const UNIT_SHIFT: u32 = 5;
/// Buckets of an octave, as a shift.
const SUB_SHIFT: u32 = 2;
/// Buckets of an octave.
const SUBS: usize = 1 << SUB_SHIFT;
/// Octaves above the first four buckets.
const OCTAVES: usize = 28;
/// How many buckets there are. The last one has all that is longer.
pub const BUCKETS: usize = SUBS * (OCTAVES + 1);

/// Where so many nanoseconds are counted.
#[inline]
fn bucket_of(ns: u64) -> usize {
    let units = ns >> UNIT_SHIFT;
    // Octaves above the first, which has one bucket a unit like the second: so both need no shift.
    let octave = (units | SUBS as u64).ilog2() - SUB_SHIFT;
    let bucket = octave as usize * SUBS + (units >> octave) as usize;
    bucket.min(BUCKETS - 1)
}

/// The first number of nanoseconds that does not belong to a bucket any more, nor to one before it.
#[must_use]
pub const fn bucket_end_ns(bucket: usize) -> u64 {
    let next = bucket + 1;
    let units = if next < SUBS { next as u64 } else { ((SUBS + next % SUBS) as u64) << (next / SUBS - 1) };
    units << UNIT_SHIFT
}

/// The histogram.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum_ns: AtomicU64::new(0) }
    }
}

/// Single-writer addition.
#[inline]
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

impl Histogram {
    /// Counts `count` times of `ns` each. One thread only may.
    #[inline]
    pub fn record(&self, ns: u64, count: u64) {
        add(&self.buckets[bucket_of(ns)], count);
        add(&self.sum_ns, ns.wrapping_mul(count));
    }

    /// Adds what another one counted.
    pub(super) fn absorb(&self, other: &Self) {
        for (mine, theirs) in self.buckets.iter().zip(&other.buckets) {
            add(mine, theirs.load(Ordering::Relaxed));
        }
        add(&self.sum_ns, other.sum_ns.load(Ordering::Relaxed));
    }

    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let buckets = std::array::from_fn(|at| self.buckets[at].load(Ordering::Relaxed));
        Counts { buckets, sum_ns: self.sum_ns.load(Ordering::Relaxed) }
    }
}

/// What a histogram counted, or several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    buckets: [u64; BUCKETS],
    sum_ns: u64,
}

impl Default for Counts {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], sum_ns: 0 }
    }
}

impl Counts {
    /// The counts of these buckets and their sum.
    #[must_use]
    pub const fn new(buckets: [u64; BUCKETS], sum_ns: u64) -> Self {
        Self { buckets, sum_ns }
    }

    /// The buckets, the shortest times first.
    #[must_use]
    pub const fn buckets(&self) -> &[u64; BUCKETS] {
        &self.buckets
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// The sum of all times, in nanoseconds.
    #[must_use]
    pub const fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// Adds what others counted.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine = mine.wrapping_add(*theirs);
        }
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
    }

    /// What was counted since an earlier look at the same histogram. Where that had counted more, it was another one: then all.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        if self.buckets.iter().zip(&earlier.buckets).any(|(now, before)| now < before) {
            return self.clone();
        }
        let buckets = std::array::from_fn(|at| self.buckets[at] - earlier.buckets[at]);
        Self { buckets, sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns) }
    }

    /// The time that this part of them did not reach, in nanoseconds: the end of its bucket. `None` when there are none.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a count, rounded"
    )]
    pub fn quantile_ns(&self, part: f64) -> Option<u64> {
        let count = self.count();
        let rank = ((count as f64 * part).ceil() as u64).clamp(1, count.max(1));
        let mut below = 0_u64;
        let found = self.buckets.iter().position(|bucket| {
            below = below.wrapping_add(*bucket);
            below >= rank
        });
        found.map(bucket_end_ns)
    }

    /// How many took less than the end of this bucket.
    #[must_use]
    pub fn within(&self, bucket: usize) -> u64 {
        self.buckets.iter().take(bucket + 1).fold(0, |sum, count| sum.wrapping_add(*count))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_touch_and_none_is_wider_than_a_quarter() {
        let mut begins = 0;
        for bucket in 0..BUCKETS {
            let ends = bucket_end_ns(bucket);
            assert!(ends > begins);
            assert_eq!((bucket_of(begins), bucket_of(ends - 1)), (bucket, bucket));
            assert!(ends - begins <= 32.max(begins / 4), "{bucket}: {begins} to {ends}");
            begins = ends;
        }
        assert_eq!(begins, 1 << 35, "34 s");
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn nothing_has_no_quantile() {
        assert_eq!(Histogram::default().counts().quantile_ns(0.5), None);
    }

    #[test]
    fn a_histogram_that_began_anew_is_not_compared_with_the_old_one() {
        let (old, new) = (Histogram::default(), Histogram::default());
        old.record(100, 5);
        new.record(100, 2);
        assert_eq!(new.counts().since(&old.counts()), new.counts());
    }

    proptest! {
        #[test]
        fn quantiles_are_right_to_a_quarter(times in proptest::collection::vec(0_u64..1 << 35, 1..200), part in 0.0..=1.0_f64) {
            let histogram = Histogram::default();
            times.iter().for_each(|ns| histogram.record(*ns, 1));
            let counts = histogram.counts();
            prop_assert_eq!(counts.count(), times.len() as u64);
            prop_assert_eq!(counts.sum_ns(), times.iter().sum::<u64>());
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let rank = (1..times.len()).find(|rank| *rank as f64 >= times.len() as f64 * part).unwrap_or(times.len());
            let (exact, told) = (sorted[rank - 1], counts.quantile_ns(part).expect("there are some"));
            prop_assert!(told > exact && told - exact <= 32.max(exact / 4), "{} for {}", told, exact);
        }

        #[test]
        fn what_came_since_is_what_was_added(
            before in proptest::collection::vec((any::<u32>(), 1_u64..9), 0..40),
            after in proptest::collection::vec((any::<u32>(), 1_u64..9), 0..40),
        ) {
            let (all, late) = (Histogram::default(), Histogram::default());
            before.iter().for_each(|(ns, count)| all.record(u64::from(*ns), *count));
            let then = all.counts();
            after.iter().for_each(|(ns, count)| {
                all.record(u64::from(*ns), *count);
                late.record(u64::from(*ns), *count);
            });
            prop_assert_eq!(all.counts().since(&then), late.counts());
            let mut sum = then;
            sum.add(&late.counts());
            prop_assert_eq!(&sum, &all.counts());
            let absorbed = Histogram::default();
            absorbed.absorb(&all);
            prop_assert_eq!(absorbed.counts(), sum.clone());
            prop_assert_eq!(sum.within(BUCKETS - 1), sum.count());
        }
    }
}
