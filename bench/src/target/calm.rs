//! Which attempts may be compared: those of one state of the machine, in which nobody else had the processors.
//!
//! ```text
//!   look | one side | look | other side | look      an attempt; a look: round trip between the processors, speed of loopback
//! ```
//!
//! On machines that are shared the two processors are moved about, and the round trip of a cache line between them tells where they
//! are: two threads of *one core* (some 35 ns), on two cores that are *near* each other (below 300 ns), or *far* (some 500 ns).
//! Far, everything that crosses them moves by a third; on one core each is slower by half, which no account of processor time shows.
//! So an attempt counts when all its round trips are of one state, and both sides and the host had their processors for nearly all of
//! the time. Of all attempts those of the most frequent state are taken, or all where no state lasted.
//!
//! Where the machine is slower as a whole for a moment, an attempt does not count either: when TCP on loopback was much slower at one
//! look than it was at the best look so far.
//!
//! What does not count is tried again, as long as there is time to spare: all measurements of a run share it, so that a machine
//! that is never calm makes the run longer by that much and no more.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::round_trip::round_trip_ns;
use super::speed::loopback_mib_s;

/// Stands in the method of rows whose rounds were of no one state.
pub const DISTURBED: &str =
    "of which fewer than half were undisturbed and in one state, all used all the same";

/// Up to here they are threads of one core, which shares its nearest caches.
const ONE_CORE_MAX_NS: f64 = 50.0;
/// Up to here the processors are near.
const NEAR_MAX_NS: f64 = 300.0;
/// Least part of a processor that who polls must have had.
const SHARE_MIN: f64 = 0.95;
/// Least part of the best speed so far.
const SPEED_MIN: f64 = 0.7;
/// Attempts for each that is wanted, at most.
const TRIES: usize = 3;

/// What the run knows of the machine.
#[derive(Debug)]
pub(super) struct Calm {
    /// The best speed of loopback so far.
    best_mib_s: f64,
    /// All round trips so far, in nanoseconds.
    pub(super) trips_ns: Vec<f64>,
    /// What is left for attempts beyond those that are wanted.
    spare: Duration,
}

/// The machine at one moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    trip_ns: f64,
    mib_s: f64,
}

/// The looks of an attempt. One is taken before it and one after it; [`Looks::take`] takes one between.
#[derive(Debug, Default)]
pub(super) struct Looks(Vec<Look>);

impl Looks {
    /// One more.
    pub(super) fn take(&mut self) -> Result<()> {
        self.0.push(Look { trip_ns: round_trip_ns()?, mib_s: loopback_mib_s()? });
        Ok(())
    }

    /// In which state all were, none where they were not.
    fn state(&self) -> Option<State> {
        let mut states = self.0.iter().map(|look| State::of(look.trip_ns));
        let first = states.next()?;
        states.all(|state| state == first).then_some(first)
    }
}

/// How far the processors are from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Near,
    Far,
    OneCore,
}

impl State {
    /// Those that are preferred first.
    const ALL: [Self; 3] = [Self::Near, Self::Far, Self::OneCore];

    fn of(trip_ns: f64) -> Self {
        match trip_ns {
            ..=ONE_CORE_MAX_NS => Self::OneCore,
            ..=NEAR_MAX_NS => Self::Near,
            _ => Self::Far,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Near => "processors near",
            Self::Far => "processors far",
            Self::OneCore => "processors on one core",
        }
    }
}

/// What attempts gave, and in which state each was; none where it was disturbed.
#[derive(Debug)]
pub(super) struct Collected<T> {
    wanted: usize,
    attempts: Vec<(T, Option<State>)>,
}

impl Calm {
    /// At the beginning of a run.
    pub(super) const fn new(spare: Duration) -> Self {
        Self { best_mib_s: 0.0, trips_ns: Vec::new(), spare }
    }

    /// Tries until `wanted` attempts of one state are there, or it is not worth more. An attempt is given its number, and tells with
    /// its result which part of their processors who polls had.
    pub(super) fn collect<T>(
        &mut self,
        wanted: usize,
        mut attempt: impl FnMut(usize, &mut Looks) -> Result<(T, f64)>,
    ) -> Result<Collected<T>> {
        let mut collected = Collected { wanted, attempts: Vec::new() };
        for number in 0..wanted * TRIES {
            if collected.most() >= wanted || (number >= wanted && self.spare.is_zero()) {
                break;
            }
            let begun = Instant::now();
            let mut looks = Looks::default();
            looks.take()?;
            let (result, share) = attempt(number, &mut looks)?;
            looks.take()?;
            let state = if self.is_undisturbed(&looks, share) { looks.state() } else { None };
            collected.attempts.push((result, state));
            if number >= wanted {
                self.spare = self.spare.saturating_sub(begun.elapsed());
            }
        }
        Ok(collected)
    }

    fn is_undisturbed(&mut self, looks: &Looks, share: f64) -> bool {
        self.trips_ns.extend(looks.0.iter().map(|look| look.trip_ns));
        self.best_mib_s = looks.0.iter().map(|look| look.mib_s).fold(self.best_mib_s, f64::max);
        share >= SHARE_MIN && looks.0.iter().all(|look| look.mib_s >= self.best_mib_s * SPEED_MIN)
    }
}

impl<T> Collected<T> {
    fn count(&self, of: State) -> usize {
        self.attempts.iter().filter(|(_, state)| *state == Some(of)).count()
    }

    fn most(&self) -> usize {
        State::ALL.map(|state| self.count(state)).into_iter().max().unwrap_or_default()
    }

    /// Those that count, and what they are. Where less than half of what was wanted is of one state, all count: sides take turns, and
    /// a median of many tells more than one that was calm.
    pub(super) fn best(self) -> (Vec<T>, String) {
        let all = self.attempts.len();
        if self.most() * 2 < self.wanted {
            let words = format!("{all} rounds, {DISTURBED}");
            return (self.attempts.into_iter().map(|(result, _)| result).collect(), words);
        }
        let most = self.most();
        let state = State::ALL.into_iter().find(|state| self.count(*state) == most).unwrap_or(State::Near);
        let of_it = self.attempts.into_iter().filter(|(_, other)| *other == Some(state));
        let best: Vec<_> = of_it.map(|(result, _)| result).collect();
        let words = format!("{} rounds, {}; {} left out", best.len(), state.word(), all - best.len());
        (best, words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(trips_ns: &[f64], mib_s: f64) -> Looks {
        Looks(trips_ns.iter().map(|&trip_ns| Look { trip_ns, mib_s }).collect())
    }

    #[test]
    fn a_state_is_that_of_all_looks() {
        assert_eq!(looks(&[80.0, 90.0, 120.0], 1.0).state(), Some(State::Near));
        assert_eq!(looks(&[500.0, 600.0], 1.0).state(), Some(State::Far));
        assert_eq!(looks(&[80.0, 600.0], 1.0).state(), None);
        assert_eq!(looks(&[35.0, 36.0], 1.0).state(), Some(State::OneCore));
        assert_eq!(looks(&[35.0, 67.0], 1.0).state(), None);
        assert_eq!(looks(&[], 1.0).state(), None);
    }

    #[test]
    fn slow_moments_and_shared_processors_do_not_count() {
        let mut calm = Calm::new(Duration::ZERO);
        assert!(calm.is_undisturbed(&looks(&[80.0], 1000.0), 1.0));
        assert!(!calm.is_undisturbed(&looks(&[80.0], 1000.0), 0.9), "somebody else had a processor");
        assert!(!calm.is_undisturbed(&looks(&[80.0], 600.0), 1.0), "all is slower");
        assert!(!calm.is_undisturbed(&looks(&[80.0], 600.0), 1.0), "and goes on to be");
    }

    #[test]
    fn the_more_frequent_state_is_taken_and_all_where_none_lasted() {
        let of = |wanted, attempts| Collected { wanted, attempts };
        let (near, far) = (Some(State::Near), Some(State::Far));
        let (best, words) = of(4, vec![(1, far), (2, near), (3, None), (4, far)]).best();
        assert_eq!((best, words.as_str()), (vec![1, 4], "2 rounds, processors far; 2 left out"));
        assert_eq!(of(2, vec![(1, None), (2, None)]).best().0, [1, 2]);
        let (best, words) = of(5, vec![(1, far), (2, None), (3, near), (4, far)]).best();
        assert_eq!(best, [1, 2, 3, 4]);
        assert_eq!(words, format!("4 rounds, {DISTURBED}"));
    }

    #[test]
    fn without_time_to_spare_nothing_is_tried_again() {
        let mut tried = 0;
        let attempt = |_, _: &mut Looks| {
            tried += 1;
            Ok(((), 0.0))
        };
        Calm::new(Duration::ZERO).collect(2, attempt).unwrap();
        assert_eq!(tried, 2);
        let mut calm = Calm::new(Duration::from_secs(3600));
        let collected = calm.collect(2, |_, _| Ok(((), 0.0))).unwrap();
        assert_eq!(collected.attempts.len(), 2 * TRIES, "there is an end all the same");
        assert!(calm.spare < Duration::from_secs(3600));
    }
}
