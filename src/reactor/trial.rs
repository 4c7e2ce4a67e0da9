//! Which of two ways of serving a connection is the better one: both are tried in turn for a moment, and one is kept for longer.
//! There are two such questions; while one is tried, the other stays as it was answered.
//!
//! ```text
//!   | with | out | out | with | with | out | out | with |  the same of the other . . |  the better ones . . . | with | out | ...
//!     5 ms                                                 40 ms                        1 s
//! ```
//!
//! More commands a second are better. So are larger batches, for each costs both sides a system call, and who has a certain number of
//! commands in flight has them answered no later when as many are done: twice as large ones are worth a twentieth of the rate.
//!
//! A slice in which something else had the processor tells nothing, so it is the middle one of four neighbours' ratios that counts, half
//! of it, and half what was known before. A host that has nothing to do for a while is not tried: its pauses would be counted.
//!
//! What it does not do: know what the ways are.

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
/// It must be better by so much to be begun: what makes no difference is not done.
const GAIN_MIN: f32 = 0.02;
/// What batches of twice the size are worth, in parts of the rate.
const OF_LARGER_BATCHES: f32 = 0.05;

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    First,
    Second,
}

/// The slices of all questions.
const ALL: usize = 2 * SLICES.len();

/// What is known of one.
#[derive(Clone, Copy, Debug, Default)]
struct Answer {
    /// By how much it is better with it, in parts of the rate; none before it was tried.
    gain: Option<f32>,
    is_kept: bool,
}

/// A slice.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Commands a second.
    rate: f32,
    /// Commands that were answered together.
    batch: f32,
}

/// What is known of the ways.
#[derive(Debug)]
pub(super) struct Trial {
    /// The slice, of the first question and then of the second; beyond the last one while the better ways are kept.
    at: usize,
    begun: Instant,
    ends: Instant,
    /// Commands in this slice, and how often some were answered.
    commands: u64,
    batches: u64,
    /// What was seen in each slice of the question.
    seen: [Seen; SLICES.len()],
    answers: [Answer; 2],
}

impl Trial {
    /// One that begins now.
    pub(super) fn new(now: Instant) -> Self {
        let seen = [Seen::default(); SLICES.len()];
        let (begun, ends) = (now, now + SLICE);
        Self { at: 0, begun, ends, commands: 0, batches: 0, seen, answers: [Answer::default(); 2] }
    }

    /// Whether the connection is to be served with it for now.
    #[inline]
    pub(super) fn is_with(&self, question: Question) -> bool {
        let before = match question {
            Question::First => 0,
            Question::Second => SLICES.len(),
        };
        let slice = self.at.checked_sub(before).and_then(|at| SLICES.get(at));
        slice.copied().unwrap_or(self.answers[question as usize].is_kept)
    }

    /// So many commands are answered together.
    #[inline]
    pub(super) fn answered(&mut self, commands: u64, now: Instant) {
        self.commands = self.commands.saturating_add(commands);
        self.batches = self.batches.saturating_add(1);
        if now >= self.ends {
            self.next(now);
        }
    }

    fn next(&mut self, now: Instant) {
        let took = now.duration_since(self.begun);
        let (question, slice) = (self.at / SLICES.len(), self.at % SLICES.len());
        if question >= self.answers.len() {
            // They were kept long enough.
            self.at = 0;
        } else if took > SLICE_MAX || self.commands == 0 {
            // Of one in which nothing was done, or there was a pause, no part of anything can be told.
            self.at = question * SLICES.len();
        } else {
            let commands = self.commands as f32;
            self.seen[slice] =
                Seen { rate: commands / took.as_secs_f32(), batch: commands / self.batches as f32 };
            self.at += 1;
            if slice == SLICES.len() - 1 {
                self.decide(question);
            }
        }
        let lasts = if self.at == ALL { KEPT } else { SLICE };
        (self.begun, self.ends) = (now, now + lasts);
        (self.commands, self.batches) = (0, 0);
    }

    fn decide(&mut self, question: usize) {
        let mut gains = [0.0; PAIRS];
        for (gain, (pair, ways)) in
            gains.iter_mut().zip(self.seen.as_chunks::<2>().0.iter().zip(SLICES.as_chunks::<2>().0))
        {
            let [first, second] = *pair;
            let (with, without) = if ways[0] { (first, second) } else { (second, first) };
            let of_batches = OF_LARGER_BATCHES * (with.batch / without.batch).log2();
            *gain = with.rate / without.rate - 1.0 + of_batches;
        }
        gains.sort_unstable_by(f32::total_cmp);
        let middle = f32::midpoint(gains[PAIRS / 2 - 1], gains[PAIRS / 2]);
        let answer = &mut self.answers[question];
        let gain = answer.gain.map_or(middle, |before| f32::midpoint(before, middle));
        answer.gain = Some(gain);
        // Not given up for what may be chance, nor begun.
        answer.is_kept = gain >= if answer.is_kept { 0.0 } else { GAIN_MIN };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a host does in a millisecond, by whether it is with it, and by the number of the millisecond; in so many batches.
    fn kept_with(seconds: u64, batches: impl Fn(bool) -> u64, rate: impl Fn(bool, u64) -> u64) -> Trial {
        let mut now = Instant::now();
        let mut trial = Trial::new(now);
        for ms in 0..seconds * 1000 {
            now += Duration::from_millis(1);
            let with = trial.is_with(Question::First);
            let (count, commands) = (batches(with), rate(with, ms));
            (1..count).for_each(|_| trial.answered(commands / count, now));
            trial.answered(commands - commands / count * (count - 1), now);
        }
        trial
    }

    /// The same, as many at a time with it and without.
    fn kept_after(seconds: u64, rate: impl Fn(bool, u64) -> u64) -> (bool, Trial) {
        let mut now = Instant::now();
        let mut trial = Trial::new(now);
        for ms in 0..seconds * 1000 {
            now += Duration::from_millis(1);
            (0..rate(trial.is_with(Question::First), ms)).for_each(|_| trial.answered(1, now));
        }
        (trial.answers[0].is_kept, trial)
    }

    #[test]
    fn larger_batches_are_worth_a_little_of_the_rate() {
        let half = |with: bool| if with { 10 } else { 20 };
        let as_many = |_: bool| 20;
        for (with, kept) in [(1000, true), (975, true), (965, false), (900, false)] {
            let trial = kept_with(1, half, |is_with, _| if is_with { with } else { 1000 });
            assert_eq!(trial.answers[0].is_kept, kept, "{with}: {trial:?}");
        }
        assert!(!kept_with(1, as_many, |_, _| 1000).answers[0].is_kept, "no difference");
        assert!(
            !kept_with(1, |with| if with { 20 } else { 10 }, |_, _| 1000).answers[0].is_kept,
            "smaller ones"
        );
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
            with[is_tried] += u32::from(trial.is_with(Question::First));
            now += Duration::from_millis(1);
            (0..if trial.is_with(Question::First) { 11 } else { 10 }).for_each(|_| trial.answered(1, now));
        }
        assert_eq!(with, [20, 960]);
    }

    #[test]
    fn each_question_has_its_own_answer_and_is_tried_while_the_other_has_none() {
        for (first, second) in [(1100, 1000), (1000, 1100), (1100, 1100), (1000, 1000)] {
            let mut now = Instant::now();
            let mut trial = Trial::new(now);
            for at in 0..ALL {
                let ways = [Question::First, Question::Second].map(|question| trial.is_with(question));
                let [slices_of_first, slices_of_second] = [at < SLICES.len(), at >= SLICES.len()];
                assert_eq!(ways[0], if slices_of_first { SLICES[at] } else { first > 1000 }, "{at}");
                assert_eq!(ways[1], slices_of_second && SLICES[at - SLICES.len()], "{at}");
                now += SLICE;
                let commands = [(ways[0], first), (ways[1], second)];
                let rate: u64 =
                    commands.map(|(is_with, rate)| if is_with { rate } else { 1000 }).iter().sum();
                trial.answered(rate, now);
            }
            let ways = [Question::First, Question::Second].map(|question| trial.is_with(question));
            assert_eq!(ways, [first > 1000, second > 1000], "{trial:?}");
        }
    }

    #[test]
    fn one_slice_that_went_wrong_decides_nothing() {
        for wrong in 0..SLICES.len() {
            for (with, without, kept) in [(1100, 1000, true), (1000, 1100, false)] {
                let mut now = Instant::now();
                let mut trial = Trial::new(now);
                for (at, is_with) in SLICES.into_iter().enumerate() {
                    now += SLICE;
                    let commands = if at == wrong {
                        1
                    } else if is_with {
                        with
                    } else {
                        without
                    };
                    trial.answered(commands, now);
                }
                assert_eq!(trial.answers[0].is_kept, kept, "{wrong}: {trial:?}");
            }
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
            (0..if trial.is_with(Question::First) { 100 } else { 1 }).for_each(|_| trial.answered(1, now));
        }
        assert_eq!((trial.answers[0].gain, trial.answers[0].is_kept), (None, false));
        let (_, after) = kept_after(1, |_, _| 0);
        assert!(!after.answers[0].is_kept, "of nothing done nothing is known");
    }

    #[test]
    fn sends_that_answer_no_command_are_no_work_and_spoil_nothing_for_ever() {
        let mut now = Instant::now();
        let mut trial = Trial::new(now);
        for _ in 0..100 {
            now += SLICE;
            trial.answered(0, now);
        }
        assert_eq!(trial.answers[0].gain, None);
        for _ in 0..SLICES.len() {
            now += SLICE;
            trial.answered(if trial.is_with(Question::First) { 1100 } else { 1000 }, now);
        }
        assert!(trial.answers[0].is_kept, "{trial:?}");
    }
}
