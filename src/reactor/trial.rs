//! Which of two ways of serving a connection does more commands: both are tried in turn for a moment, the better one is kept for longer.
//!
//! ```text
//!   | with | out | out | with | with | out | out | with |  the better one . . . . . . . . | with | out | ...
//!     5 ms                                                1 s
//! ```
//!
//! A slice in which something else had the processor tells nothing, so it is the middle one of four neighbours' ratios that counts, half
//! of it, and half what was known before. A host that has nothing to do for a while is not tried: its pauses would be counted.
//!
//! What it does not do: know what the two ways are.

use std::time::{Duration, Instant};

/// How long one way is tried at a time.
const SLICE: Duration = Duration::from_millis(5);
/// A slice that took longer had a pause.
const SLICE_MAX: Duration = Duration::from_millis(10);
/// Which slices are with it. Each way is first in as many pairs.
const SLICES: [bool; 8] = [true, false, false, true, true, false, false, true];
const PAIRS: usize = SLICES.len() / 2;
/// How long the better one is kept.
const KEPT: Duration = Duration::from_secs(1);
/// It must do so much more to be begun: what makes no difference is not done.
const GAIN_MIN: f64 = 0.02;

/// What is known of the two ways.
#[derive(Debug)]
pub(super) struct Trial {
    /// The slice; beyond the last one while the better way is kept.
    at: usize,
    begun: Instant,
    ends: Instant,
    /// Commands in this slice.
    commands: u64,
    /// Commands a second in each slice.
    rates: [f64; SLICES.len()],
    /// By how much more is done with it; none before it was tried.
    gain: Option<f64>,
    is_kept: bool,
}

impl Trial {
    /// One that begins now.
    pub(super) fn new(now: Instant) -> Self {
        let rates = [0.0; SLICES.len()];
        Self { at: 0, begun: now, ends: now + SLICE, commands: 0, rates, gain: None, is_kept: false }
    }

    /// Whether the connection is to be served with it for now.
    #[inline]
    pub(super) fn is_with(&self) -> bool {
        SLICES.get(self.at).copied().unwrap_or(self.is_kept)
    }

    /// So many commands are done.
    #[inline]
    pub(super) fn answered(&mut self, commands: u64, now: Instant) {
        self.commands = self.commands.saturating_add(commands);
        if now >= self.ends {
            self.next(now);
        }
    }

    fn next(&mut self, now: Instant) {
        let took = now.duration_since(self.begun);
        match self.rates.get_mut(self.at) {
            // It was kept long enough.
            None => self.at = 0,
            Some(_) if took > SLICE_MAX => self.at = 0,
            Some(rate) => {
                *rate = self.commands as f64 / took.as_secs_f64();
                self.at += 1;
                if self.at == SLICES.len() {
                    self.decide();
                }
            }
        }
        let lasts = if self.at == SLICES.len() { KEPT } else { SLICE };
        (self.begun, self.ends, self.commands) = (now, now + lasts, 0);
    }

    fn decide(&mut self) {
        let mut gains = [0.0; PAIRS];
        for (gain, (pair, ways)) in
            gains.iter_mut().zip(self.rates.as_chunks::<2>().0.iter().zip(SLICES.as_chunks::<2>().0))
        {
            let [first, second] = *pair;
            let (with, without) = if ways[0] { (first, second) } else { (second, first) };
            *gain = with / without - 1.0;
        }
        gains.sort_unstable_by(f64::total_cmp);
        let middle = f64::midpoint(gains[PAIRS / 2 - 1], gains[PAIRS / 2]);
        let gain = self.gain.map_or(middle, |before| f64::midpoint(before, middle));
        self.gain = Some(gain);
        // Not given up for what may be chance, nor begun.
        self.is_kept = gain >= if self.is_kept { 0.0 } else { GAIN_MIN };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a host does in a millisecond, by whether it is with it, and by the number of the millisecond.
    fn kept_after(seconds: u64, rate: impl Fn(bool, u64) -> u64) -> (bool, Trial) {
        let mut now = Instant::now();
        let mut trial = Trial::new(now);
        for ms in 0..seconds * 1000 {
            now += Duration::from_millis(1);
            trial.answered(rate(trial.is_with(), ms), now);
        }
        (trial.is_kept, trial)
    }

    #[test]
    fn the_better_way_is_kept_and_no_difference_is_no_reason() {
        assert!(kept_after(1, |with, _| if with { 1050 } else { 1000 }).0);
        assert!(!kept_after(1, |with, _| if with { 950 } else { 1000 }).0);
        assert!(!kept_after(1, |_, _| 1000).0);
        assert!(!kept_after(1, |with, _| if with { 1010 } else { 1000 }).0, "too little");
    }

    #[test]
    fn while_it_is_tried_both_ways_have_their_share_and_then_one_has_all() {
        let mut now = Instant::now();
        let (begun, mut trial) = (now, Trial::new(now));
        let mut with = [0, 0];
        while now < begun + KEPT {
            let is_tried = usize::from(now >= begun + SLICE * 8);
            with[is_tried] += u32::from(trial.is_with());
            now += Duration::from_millis(1);
            trial.answered(if trial.is_with() { 11 } else { 10 }, now);
        }
        assert_eq!(with, [20, 960]);
    }

    #[test]
    fn one_slice_that_went_wrong_decides_nothing() {
        for wrong in 0..8 {
            let slice = |ms: u64| if ms / 5 == wrong { 1 } else { 1000 };
            assert!(kept_after(1, |with, ms| slice(ms) * if with { 11 } else { 10 }).0, "{wrong}");
            assert!(!kept_after(1, |with, ms| slice(ms) * if with { 10 } else { 11 }).0, "{wrong}");
        }
    }

    #[test]
    fn a_host_that_changes_is_seen_to() {
        let early = |ms: u64| ms < 3000;
        let rate = |with: bool, ms: u64| if with == early(ms) { 1100 } else { 1000 };
        assert!(kept_after(3, rate).0);
        assert!(!kept_after(8, rate).0);
    }

    #[test]
    fn pauses_of_a_host_are_no_slices() {
        let mut now = Instant::now();
        let mut trial = Trial::new(now);
        for _ in 0..100 {
            // More with it, but each time with a pause.
            now += SLICE_MAX + Duration::from_millis(1);
            trial.answered(if trial.is_with() { 100 } else { 1 }, now);
        }
        assert_eq!((trial.gain, trial.is_kept), (None, false));
        let (_, after) = kept_after(1, |_, _| 0);
        assert!(!after.is_kept, "of nothing done nothing is known");
    }
}
