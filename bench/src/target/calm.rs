//! Which rounds may be compared: those of one state of the machine, in which nobody else had the processors.
//!
//! ```text
//!   look | one side | look | other side | look       a pair; a look: round trip between the processors, speed of loopback
//! ```
//!
//! On machines that are shared the round trip of a cache line between two processors has two states, *near* and *far*, some
//! hundred nanoseconds apart, and everything that crosses them moves by a third when it changes. So a pair counts when all its
//! round trips are of one state, and both sides and the host had their processors for nearly all of the time. Of all pairs those
//! of the more frequent state are taken.
//!
//! There are moments of another kind, in which all is slower by half, and no account of time shows it. So a pair in which TCP on
//! loopback was much slower at one look than it was at the best look so far does not count either.

use anyhow::Result;

use super::Round;
use super::round_trip::round_trip_ns;
use super::speed::loopback_mib_s;

/// Up to here the processors are near.
const NEAR_MAX_NS: f64 = 300.0;
/// Least part of a processor that who polls must have had.
const SHARE_MIN: f64 = 0.95;
/// Least part of the best speed so far.
const SPEED_MIN: f64 = 0.7;
/// Pairs that are tried for each that is wanted.
const TRIES: usize = 3;

/// Pairs of rounds, ours and the peer's, and what they are worth.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    near: Vec<[Round; 2]>,
    far: Vec<[Round; 2]>,
    disturbed: Vec<[Round; 2]>,
    /// All round trips, in nanoseconds.
    pub(super) trips_ns: Vec<f64>,
}

/// The machine at one moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    trip_ns: f64,
    mib_s: f64,
}

impl Look {
    fn take() -> Result<Self> {
        Ok(Self { trip_ns: round_trip_ns()?, mib_s: loopback_mib_s()? })
    }
}

impl Pairs {
    /// Tries pairs until there are `wanted` of one state, or it is not worth more. `run` gives ours and the peer's; the flag
    /// tells whether ours is first.
    /// `best_mib_s` is the best speed of loopback so far, which goes from one collection to the next.
    pub(super) fn collect(
        wanted: usize,
        best_mib_s: &mut f64,
        mut run: impl FnMut(Turn) -> Result<Round>,
    ) -> Result<Self> {
        let mut pairs = Self::default();
        for number in 0..wanted * TRIES {
            if pairs.near.len().max(pairs.far.len()) >= wanted {
                break;
            }
            pairs.one(number % 2 == 1, best_mib_s, &mut run)?;
        }
        Ok(pairs)
    }

    fn one(
        &mut self,
        ours_first: bool,
        best_mib_s: &mut f64,
        run: &mut impl FnMut(Turn) -> Result<Round>,
    ) -> Result<()> {
        let order = if ours_first { [Turn::Ours, Turn::Peer] } else { [Turn::Peer, Turn::Ours] };
        let before = Look::take()?;
        let first = run(order[0])?;
        let between = Look::take()?;
        let second = run(order[1])?;
        let looks = [before, between, Look::take()?];
        self.trips_ns.extend(looks.map(|look| look.trip_ns));
        *best_mib_s = looks.iter().map(|look| look.mib_s).fold(*best_mib_s, f64::max);
        let is_fast = looks.iter().all(|look| look.mib_s >= *best_mib_s * SPEED_MIN);
        let pair = if ours_first { [first, second] } else { [second, first] };
        let had_all = pair.iter().all(|round| round.processor_share >= SHARE_MIN);
        let near = looks.iter().filter(|look| look.trip_ns <= NEAR_MAX_NS).count();
        match (had_all && is_fast, near) {
            (true, 3) => self.near.push(pair),
            (true, 0) => self.far.push(pair),
            _ => self.disturbed.push(pair),
        }
        Ok(())
    }

    /// Those that count, and what they are: those that are left over only where there are no others.
    pub(super) fn best(&self) -> (&[[Round; 2]], String) {
        let [near, far, left] = [self.near.len(), self.far.len(), self.disturbed.len()];
        if near == 0 && far == 0 {
            return (&self.disturbed, format!("no pair undisturbed in one state, {left} used all the same"));
        }
        let (pairs, state) = if near >= far { (&self.near, "near") } else { (&self.far, "far") };
        (
            pairs,
            format!(
                "{} pairs, processors {state}; {} left out",
                pairs.len(),
                near + far + left - pairs.len()
            ),
        )
    }
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// fastice.
    Ours,
    /// The peer.
    Peer,
}
