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
//! the time. Of all attempts those between two whole cores are taken, which is what a host has that a target is made for, near or far,
//! whichever is more frequent; where these are too few, those of the most frequent state, or all where no state lasted. Looks are judged by the
//! best that is known in the end, so that the first attempts of a run are no better off.
//!
//! Where the machine is slower as a whole for a moment, an attempt does not count either: when TCP on loopback was much slower at one
//! look than it was at the best look so far.
//!
//! An attempt waits a little for whole cores, and what does not count is tried again, as long as there is time to spare: all
//! measurements of a run share it, as much for the one as for the other, so that a machine that is never calm makes the run longer by that
//! much and no more.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::neighbours::{best_rates, copy_rates, whole};
use super::round_trip::round_trip_ns;
use super::speed::loopback_mib_s;
use crate::ending::Ending;

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
    /// What is left for attempts beyond those that are wanted.
    spare: Duration,
    /// What is left for waiting: as much, so that neither takes the other's.
    spare_waits: Duration,
    /// How long an attempt waits for whole cores, at most.
    wait_max: Duration,
    /// Asked before each attempt.
    ending: Ending,
}

/// The machine at one moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    trip_ns: f64,
    /// What each processor copied, see [`copy_rates`].
    rates: [f64; 2],
    mib_s: f64,
}

/// The looks of an attempt. One is taken before it and one after it; [`Looks::take`] takes one between.
#[derive(Debug, Default)]
pub(super) struct Looks(Vec<Look>);

impl Looks {
    /// One more.
    pub(super) fn take(&mut self) -> Result<()> {
        self.0.push(Look { trip_ns: round_trip_ns()?, rates: copy_rates()?, mib_s: loopback_mib_s()? });
        Ok(())
    }

    /// In which state all were, by the best rates of both processors; none where they were not.
    fn state(&self, best: [f64; 2]) -> Option<State> {
        let mut states = self.0.iter().map(|look| State::of(look, best));
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
    fn of(look: &Look, best: [f64; 2]) -> Self {
        let whole = whole(look.rates, best);
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

/// What attempts gave, and the looks of each; none where it was disturbed.
#[derive(Debug)]
pub(super) struct Collected<T> {
    wanted: usize,
    attempts: Vec<(T, Option<Looks>)>,
    /// By which the looks are judged.
    best_rates: [f64; 2],
}

impl Calm {
    /// At the beginning of a run.
    pub(super) fn new(spare: Duration, ending: Ending) -> Self {
        let trips_ns = Vec::new();
        Self { best_mib_s: 0.0, trips_ns, spare, spare_waits: spare, wait_max: WAIT_MAX, ending }
    }

    /// Tries until `wanted` attempts of one state are there, or it is not worth more. An attempt is given its number, and tells with
    /// its result which part of their processors who polls had.
    pub(super) fn collect<T>(
        &mut self,
        wanted: usize,
        mut attempt: impl FnMut(usize, &mut Looks) -> Result<(T, f64)>,
    ) -> Result<Collected<T>> {
        let mut collected = Collected { wanted, attempts: Vec::new(), best_rates: best_rates() };
        for number in 0..wanted * TRIES {
            if collected.most() >= wanted || (number >= wanted && self.spare.is_zero()) {
                break;
            }
            self.ending.look()?;
            self.wait()?;
            let begun = Instant::now();
            let mut looks = Looks::default();
            looks.take()?;
            let attempted = attempt(number, &mut looks);
            // Of what went wrong after that, it is the cause.
            self.ending.look()?;
            let (result, share) = attempted?;
            looks.take()?;
            let is_undisturbed = self.is_undisturbed(&looks, share);
            collected.attempts.push((result, is_undisturbed.then_some(looks)));
            collected.best_rates = best_rates();
            if number >= wanted {
                self.spare = self.spare.saturating_sub(begun.elapsed());
            }
        }
        Ok(collected)
    }

    /// Until the cores are whole, or it is not worth more.
    fn wait(&mut self) -> Result<()> {
        let (begun, most) = (Instant::now(), self.wait_max.min(self.spare_waits));
        let mut found = 0;
        while begun.elapsed() < most && found < WAIT_LOOKS {
            found = if whole(copy_rates()?, best_rates()) == [true; 2] { found + 1 } else { 0 };
            if found < WAIT_LOOKS {
                std::thread::sleep(WAIT_STEP.min(most));
            }
        }
        // What every attempt takes is no wait.
        let waited = begun.elapsed().saturating_sub(WAIT_STEP * 3);
        self.spare_waits = self.spare_waits.saturating_sub(waited);
        Ok(())
    }

    fn is_undisturbed(&mut self, looks: &Looks, share: f64) -> bool {
        self.trips_ns.extend(looks.0.iter().map(|look| look.trip_ns));
        self.best_mib_s = looks.0.iter().map(|look| look.mib_s).fold(self.best_mib_s, f64::max);
        share >= SHARE_MIN && looks.0.iter().all(|look| look.mib_s >= self.best_mib_s * SPEED_MIN)
    }
}

impl<T> Collected<T> {
    fn state(&self, looks: Option<&Looks>) -> Option<State> {
        looks?.state(self.best_rates)
    }

    fn count(&self, of: State) -> usize {
        self.attempts.iter().filter(|(_, looks)| self.state(looks.as_ref()) == Some(of)).count()
    }

    fn most(&self) -> usize {
        State::all().map(|state| self.count(state)).max().unwrap_or_default()
    }

    /// Of which state attempts are taken; none where less than half of what was wanted is of one.
    fn taken(&self) -> Option<State> {
        let is_enough = |state: &State| self.count(*state) * 2 >= self.wanted.max(1);
        let most = |wanted: fn(State) -> bool| {
            let states = State::all().filter(|state| wanted(*state)).filter(is_enough);
            // Of as many of several, those that are preferred.
            states.reduce(|one, other| if self.count(other) > self.count(one) { other } else { one })
        };
        most(State::is_whole).or_else(|| most(|_| true))
    }

    /// Those that count, and what they are. Where less than half of what was wanted is of one state, all count: sides take turns, and
    /// a median of many tells more than one that was calm.
    pub(super) fn best(self) -> (Vec<T>, String) {
        let all = self.attempts.len();
        let Some(state) = self.taken() else {
            let words = format!("{all} rounds, {DISTURBED}");
            return (self.attempts.into_iter().map(|(result, _)| result).collect(), words);
        };
        let best_rates = self.best_rates;
        let is_of_it =
            |looks: &Option<Looks>| looks.as_ref().and_then(|looks| looks.state(best_rates)) == Some(state);
        let of_it = self.attempts.into_iter().filter(|(_, looks)| is_of_it(looks));
        let best: Vec<_> = of_it.map(|(result, _)| result).collect();
        let words = format!("{} rounds, {}; {} left out", best.len(), state.words(), all - best.len());
        (best, words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rates of whole cores, and of such as somebody else has the other half of.
    const BEST: [f64; 2] = [80.0, 60.0];

    fn looks(trips_ns: &[f64], mib_s: f64) -> Looks {
        Looks(trips_ns.iter().map(|&trip_ns| Look { trip_ns, rates: BEST, mib_s }).collect())
    }

    /// Two looks that found the processors near, or far, and each with its whole core or without.
    fn found(is_near: bool, whole: [bool; 2]) -> Option<Looks> {
        let mut looks = looks(&[if is_near { 80.0 } else { 500.0 }; 2], 1.0);
        for look in &mut looks.0 {
            let halves = look.rates.iter_mut().zip(whole).filter(|(_, whole)| !whole);
            halves.for_each(|(rate, _)| *rate /= 2.0);
        }
        Some(looks)
    }

    fn apart(is_near: bool, whole: [bool; 2]) -> Option<State> {
        Some(State::Apart { is_near, whole })
    }

    #[test]
    fn a_state_is_that_of_all_looks() {
        assert_eq!(looks(&[80.0, 90.0, 120.0], 1.0).state(BEST), apart(true, [true; 2]));
        assert_eq!(looks(&[500.0, 600.0], 1.0).state(BEST), apart(false, [true; 2]));
        assert_eq!(looks(&[80.0, 600.0], 1.0).state(BEST), None);
        assert_eq!(looks(&[35.0, 36.0], 1.0).state(BEST), Some(State::OneCore));
        assert_eq!(looks(&[35.0, 67.0], 1.0).state(BEST), None);
        assert_eq!(looks(&[], 1.0).state(BEST), None);
        let mut changed = looks(&[80.0, 80.0], 1.0);
        changed.0[1].rates = [80.0, 30.0];
        assert_eq!(changed.state(BEST), None, "somebody came in between");
        changed.0[0].rates = [78.0, 31.0];
        assert_eq!(changed.state(BEST), apart(true, [true, false]));
        assert_eq!(changed.state([160.0, 60.0]), apart(true, [false; 2]), "by what is known later");
    }

    #[test]
    fn slow_moments_and_shared_processors_do_not_count() {
        let mut calm = Calm::new(Duration::ZERO, Ending::default());
        assert!(calm.is_undisturbed(&looks(&[80.0], 1000.0), 1.0));
        assert!(!calm.is_undisturbed(&looks(&[80.0], 1000.0), 0.9), "somebody else had a processor");
        assert!(!calm.is_undisturbed(&looks(&[80.0], 600.0), 1.0), "all is slower");
        assert!(!calm.is_undisturbed(&looks(&[80.0], 600.0), 1.0), "and goes on to be");
    }

    #[test]
    fn whole_cores_are_taken_then_the_most_frequent_state_and_all_where_none_lasted() {
        let of = |wanted, attempts| Collected { wanted, attempts, best_rates: BEST };
        let (near, far) = (|| found(true, [true; 2]), || found(false, [true; 2]));
        let (half, shared) = (|| found(true, [false, true]), || found(true, [false; 2]));
        let (best, words) = of(4, vec![(1, half()), (2, near()), (3, None), (4, half())]).best();
        let taken = "2 rounds, processors near, the first sharing a core with somebody else; 2 left out";
        assert_eq!((best, words.as_str()), (vec![1, 4], taken));
        let few = vec![(1, half()), (2, near()), (3, half()), (4, half()), (5, near())];
        let (best, words) = of(4, few).best();
        let taken = "2 rounds, processors near, whole cores; 3 left out";
        assert_eq!((best, words.as_str()), (vec![2, 5], taken));
        let (best, _) = of(4, vec![(1, near()), (2, near()), (3, far()), (4, far()), (5, far())]).best();
        assert_eq!(best, [3, 4, 5], "of whole ones the more frequent");
        assert_eq!(of(2, vec![(1, shared()), (2, None)]).best().0, [1]);
        assert_eq!(of(2, vec![(1, None), (2, None)]).best().0, [1, 2]);
        let (best, words) = of(5, vec![(1, far()), (2, None), (3, near()), (4, far())]).best();
        assert_eq!(best, [1, 2, 3, 4]);
        assert_eq!(words, format!("4 rounds, {DISTURBED}"));
    }

    #[test]
    fn a_wait_ends_and_takes_nothing_of_what_attempts_have() {
        let wait_max = Duration::from_millis(60);
        let mut calm = Calm { wait_max, ..Calm::new(Duration::from_secs(3600), Ending::default()) };
        let begun = Instant::now();
        calm.wait().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30), "it has an end wherever cores are not whole");
        assert_eq!(calm.spare, Duration::from_secs(3600));
        calm.spare_waits = Duration::ZERO;
        calm.wait().unwrap();
        assert_eq!(calm.spare_waits, Duration::ZERO);
    }

    #[test]
    fn without_time_to_spare_nothing_is_tried_again() {
        let mut tried = 0;
        let attempt = |_, _: &mut Looks| {
            tried += 1;
            Ok(((), 0.0))
        };
        Calm::new(Duration::ZERO, Ending::default()).collect(2, attempt).unwrap();
        assert_eq!(tried, 2);
        let mut calm =
            Calm { wait_max: Duration::ZERO, ..Calm::new(Duration::from_secs(3600), Ending::default()) };
        let collected = calm.collect(2, |_, _| Ok(((), 0.0))).unwrap();
        assert_eq!(collected.attempts.len(), 2 * TRIES, "there is an end all the same");
        assert!(calm.spare < Duration::from_secs(3600));
    }

    #[test]
    fn who_is_told_to_end_tries_nothing_more() {
        let attempt = |_, _: &mut Looks| -> Result<((), f64)> { panic!("tried") };
        let ended = Calm::new(Duration::ZERO, Ending::told()).collect(2, attempt).map(drop);
        assert!(ended.is_err_and(|error| error.is::<crate::ending::Told>()));
    }
}
