//! Which attempts may be compared: those of one state of the machine, in which nobody else had the processors.
//!
//! ```text
//!   look | one side | look | other side | look      an attempt
//!
//!   a look: round trip between the processors, what each does alone (neighbours.rs), speed of loopback
//! ```
//!
//! On machines that are shared the two processors are moved about, and the round trip of a cache line between them tells where they
//! are: two threads of *one core* (some 35 ns), on two cores that are *near* each other (below 300 ns), or *far* (some 500 ns).
//! Far, everything that crosses them moves by a third; on one core each is slower by half, which no account of processor time shows.
//! Nor does it show whether each is a *whole* core or shares one with somebody else ([`super::neighbours`]), which comes to as much.
//! So an attempt counts when all its looks found one state, and both sides and the host had their processors for nearly all of
//! the time. Of all attempts those between two whole cores are taken, which is what a host has that a target is made for; where these
//! are too few, those of the most frequent state, or all where no state lasted.
//!
//! Where the machine is slower as a whole for a moment, an attempt does not count either: when TCP on loopback was much slower at one
//! look than it was at the best look so far.
//!
//! An attempt waits a little for whole cores, and what does not count is tried again, as long as there is time to spare: all
//! measurements of a run share it, so that a machine that is never calm makes the run longer by that much and no more.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::neighbours::whole_cores;
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
/// How long an attempt waits for whole cores, at most.
const WAIT_MAX: Duration = Duration::from_secs(4);
/// Between two looks of one that waits.
const WAIT_STEP: Duration = Duration::from_millis(50);
/// So many looks that found whole cores, one after the other, are the beginning of such a time and not a moment of it.
const WAIT_LOOKS: usize = 3;

/// What the run knows of the machine.
#[derive(Debug)]
pub(super) struct Calm {
    /// The best speed of loopback so far.
    best_mib_s: f64,
    /// All round trips so far, in nanoseconds.
    pub(super) trips_ns: Vec<f64>,
    /// What is left for attempts beyond those that are wanted, and for waiting.
    spare: Duration,
    /// How long an attempt waits for whole cores, at most.
    wait_max: Duration,
}

/// The machine at one moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    trip_ns: f64,
    whole: [bool; 2],
    mib_s: f64,
}

/// The looks of an attempt. One is taken before it and one after it; [`Looks::take`] takes one between.
#[derive(Debug, Default)]
pub(super) struct Looks(Vec<Look>);

impl Looks {
    /// One more.
    pub(super) fn take(&mut self) -> Result<()> {
        self.0.push(Look { trip_ns: round_trip_ns()?, whole: whole_cores()?, mib_s: loopback_mib_s()? });
        Ok(())
    }

    /// In which state all were, none where they were not.
    fn state(&self) -> Option<State> {
        let mut states = self.0.iter().map(State::of);
        let first = states.next()?;
        states.all(|state| state == first).then_some(first)
    }
}

/// What two processors are to each other, and what each is by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Cores of their own.
    Apart {
        is_near: bool,
        /// Whether the first, and the last, is a core that nobody else has a part of.
        whole: [bool; 2],
    },
    /// Threads of one.
    OneCore,
}

impl State {
    fn of(look: &Look) -> Self {
        let whole = look.whole;
        match look.trip_ns {
            ..=ONE_CORE_MAX_NS => Self::OneCore,
            ..=NEAR_MAX_NS => Self::Apart { is_near: true, whole },
            _ => Self::Apart { is_near: false, whole },
        }
    }

    /// Those that are preferred first.
    fn all() -> impl Iterator<Item = Self> {
        let apart = [[true; 2], [false; 2], [true, false], [false, true]]
            .into_iter()
            .flat_map(|whole| [true, false].map(|is_near| Self::Apart { is_near, whole }));
        apart.chain([Self::OneCore])
    }

    /// Whether each processor is a whole core.
    fn is_whole(self) -> bool {
        matches!(self, Self::Apart { whole: [true, true], .. })
    }

    fn words(self) -> String {
        let Self::Apart { is_near, whole } = self else { return "processors on one core".to_owned() };
        let cores = match whole {
            [true, true] => "whole cores",
            [false, false] => "both sharing a core with somebody else",
            [true, false] => "the last sharing a core with somebody else",
            [false, true] => "the first sharing a core with somebody else",
        };
        format!("processors {}, {cores}", if is_near { "near" } else { "far" })
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
        Self { best_mib_s: 0.0, trips_ns: Vec::new(), spare, wait_max: WAIT_MAX }
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
            self.wait()?;
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

    /// Until the cores are whole, or it is not worth more.
    fn wait(&mut self) -> Result<()> {
        let begun = Instant::now();
        let most = self.wait_max.min(self.spare);
        let mut found = 0;
        while begun.elapsed() < most && found < WAIT_LOOKS {
            found = if whole_cores()? == [true; 2] { found + 1 } else { 0 };
            if found < WAIT_LOOKS {
                std::thread::sleep(WAIT_STEP.min(most));
            }
        }
        self.spare = self.spare.saturating_sub(begun.elapsed());
        Ok(())
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
        State::all().map(|state| self.count(state)).max().unwrap_or_default()
    }

    /// Of which state attempts are taken; none where less than half of what was wanted is of one.
    fn taken(&self) -> Option<State> {
        let is_enough = |state: &State| self.count(*state) * 2 >= self.wanted.max(1);
        let whole = State::all().filter(|state| state.is_whole()).find(is_enough);
        let most = self.most();
        whole.or_else(|| State::all().find(|state| self.count(*state) == most).filter(is_enough))
    }

    /// Those that count, and what they are. Where less than half of what was wanted is of one state, all count: sides take turns, and
    /// a median of many tells more than one that was calm.
    pub(super) fn best(self) -> (Vec<T>, String) {
        let all = self.attempts.len();
        let Some(state) = self.taken() else {
            let words = format!("{all} rounds, {DISTURBED}");
            return (self.attempts.into_iter().map(|(result, _)| result).collect(), words);
        };
        let of_it = self.attempts.into_iter().filter(|(_, other)| *other == Some(state));
        let best: Vec<_> = of_it.map(|(result, _)| result).collect();
        let words = format!("{} rounds, {}; {} left out", best.len(), state.words(), all - best.len());
        (best, words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(trips_ns: &[f64], mib_s: f64) -> Looks {
        Looks(trips_ns.iter().map(|&trip_ns| Look { trip_ns, whole: [true; 2], mib_s }).collect())
    }

    fn apart(is_near: bool, whole: [bool; 2]) -> Option<State> {
        Some(State::Apart { is_near, whole })
    }

    #[test]
    fn a_state_is_that_of_all_looks() {
        assert_eq!(looks(&[80.0, 90.0, 120.0], 1.0).state(), apart(true, [true; 2]));
        assert_eq!(looks(&[500.0, 600.0], 1.0).state(), apart(false, [true; 2]));
        assert_eq!(looks(&[80.0, 600.0], 1.0).state(), None);
        assert_eq!(looks(&[35.0, 36.0], 1.0).state(), Some(State::OneCore));
        assert_eq!(looks(&[35.0, 67.0], 1.0).state(), None);
        assert_eq!(looks(&[], 1.0).state(), None);
        let mut changed = looks(&[80.0, 80.0], 1.0);
        changed.0[1].whole = [true, false];
        assert_eq!(changed.state(), None, "somebody came in between");
        changed.0[0].whole = [true, false];
        assert_eq!(changed.state(), apart(true, [true, false]));
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
    fn whole_cores_are_taken_then_the_most_frequent_state_and_all_where_none_lasted() {
        let of = |wanted, attempts| Collected { wanted, attempts };
        let (near, far) = (apart(true, [true; 2]), apart(false, [true; 2]));
        let (half, shared) = (apart(true, [false, true]), apart(true, [false; 2]));
        let (best, words) = of(4, vec![(1, half), (2, near), (3, None), (4, half)]).best();
        let taken = "2 rounds, processors near, the first sharing a core with somebody else; 2 left out";
        assert_eq!((best, words.as_str()), (vec![1, 4], taken));
        let (best, words) = of(4, vec![(1, half), (2, near), (3, half), (4, half), (5, near)]).best();
        assert_eq!(
            (best, words.as_str()),
            (vec![2, 5], "2 rounds, processors near, whole cores; 3 left out")
        );
        assert_eq!(of(2, vec![(1, shared), (2, None)]).best().0, [1]);
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
        let mut calm = Calm { wait_max: Duration::ZERO, ..Calm::new(Duration::from_secs(3600)) };
        let collected = calm.collect(2, |_, _| Ok(((), 0.0))).unwrap();
        assert_eq!(collected.attempts.len(), 2 * TRIES, "there is an end all the same");
        assert!(calm.spare < Duration::from_secs(3600));
    }
}
