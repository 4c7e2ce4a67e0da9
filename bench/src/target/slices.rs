//! What a frozen map costs, of which the whole is too little for targets that take turns: one target serves both with the map and
//! without, and one connection asks for the one and for the other in turn.
//!
//! ```text
//!   one process, one core, one connection    | map | none | none | map | map | none | ...     slices of 25 ms
//! ```
//!
//! So both sides have the same process, memory and sockets, and whatever happens to the machine for more than a moment happens to both.
//! A round of targets that take turns differs by several per cent from its neighbour, a lookup by less than one.

use std::time::Duration;

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;

use super::cases::Case;
use super::light::{LightHost, Run};
use super::peers::{Peer, Side};
use super::round::{Round, WARM_UP};
use super::whole::{WITH_NSID, WITHOUT_NSID};
use crate::clock::Stopwatch;
use crate::profiles::windows::Begun;

/// What one side gets at a time.
const SLICE: Duration = Duration::from_millis(25);

/// How a row is made.
pub(super) const METHOD: &str = "; one target serves both sides, with the map and without, and one connection asks for them in turn, \
                                 25 ms at a time";

/// The slices of one side.
#[derive(Debug)]
struct Sum {
    count: u64,
    time: Duration,
    latencies_ns: Histogram<u64>,
}

/// A round of both: ours, and what has no map. Each is busy for `time`.
pub(super) fn round(case: &Case, time: Duration) -> Result<(Round, Round)> {
    let target = Side::Ours.start(case)?;
    let mut host =
        LightHost::join(target.address(), case.work, case.connections, case.depth, &case.space()?)?;
    in_turn(&mut host, WARM_UP.min(time))?;
    let (had, watch) = (target.processor_time()?, Stopwatch::start());
    let (ours, theirs) = in_turn(&mut host, time)?;
    let target_ns = target.processor_time()?.saturating_sub(had).as_nanos() as f64;
    let share = watch.cpu_ns().min(target_ns) / watch.wall_ns();
    Ok((ours.round(share)?, theirs.round(share)?))
}

/// Both sides in turn, each for so long in all.
fn in_turn(host: &mut LightHost, time: Duration) -> Result<(Sum, Sum)> {
    let (slice, count) = slices(time);
    let (mut ours, mut theirs) = (Sum::new()?, Sum::new()?);
    for number in 0..count {
        // Ours, theirs, theirs, ours: each is first as often as last.
        for is_ours in [number % 2 == 0, number % 2 == 1] {
            let (nsid, side, sum) = if is_ours {
                (WITH_NSID, Side::Ours, &mut ours)
            } else {
                (WITHOUT_NSID, Side::Peer(&Peer::Unpinned), &mut theirs)
            };
            host.ask_for(nsid.0)?;
            let begun = Begun::now();
            let run = host.measure(slice)?;
            begun.end(side.name(), run.iops, None)?;
            sum.add(&run)?;
        }
    }
    Ok((ours, theirs))
}

/// How long a slice is, and how many each side gets.
fn slices(time: Duration) -> (Duration, usize) {
    let count = usize::try_from(time.as_millis() / SLICE.as_millis()).unwrap_or(1).max(1);
    (time.min(SLICE), count)
}

impl Sum {
    fn new() -> Result<Self> {
        Ok(Self { count: 0, time: Duration::ZERO, latencies_ns: Run::no_latencies()? })
    }

    fn add(&mut self, run: &Run) -> Result<()> {
        self.count += run.count;
        self.time += run.time;
        Ok(self.latencies_ns.add(&run.latencies_ns)?)
    }

    fn round(&self, processor_share: f64) -> Result<Round> {
        ensure!(self.count > 0, "no command was answered");
        let us = |part| self.latencies_ns.value_at_quantile(part) as f64 / 1e3;
        Ok(Round {
            iops: self.count as f64 / self.time.as_secs_f64(),
            p50_us: us(0.5),
            p99_us: us(0.99),
            // The account of the core is brought up to date less often than the side changes.
            cpu_us: None,
            processor_share,
            least_share: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::whole::{OnNull, Whole};
    use super::super::work::{Kind, Work};
    use super::*;
    use crate::server::both_ends;
    use crate::target::places::Space;

    #[test]
    fn slices_fill_a_round_and_are_no_longer_than_it() {
        assert_eq!(slices(Duration::from_millis(500)), (SLICE, 20));
        assert_eq!(slices(Duration::from_millis(3)), (Duration::from_millis(3), 1));
    }

    #[test]
    fn both_sides_are_answered_by_one_target() {
        let on = OnNull::make(Some(OnNull::EXTENTS)).unwrap();
        let space = Space::whole(on.len.get());
        let whole = Whole::start_on_null(on, both_ends().unwrap().1[0]).unwrap();
        let mut host = LightHost::join(whole.address, Work::small(Kind::Read), 1, 4, &space).unwrap();
        let (ours, theirs) = in_turn(&mut host, Duration::from_millis(60)).unwrap();
        for sum in [&ours, &theirs] {
            assert!(sum.count > 0 && sum.time >= Duration::from_millis(50), "{sum:?}");
            assert_eq!(sum.latencies_ns.len(), sum.count);
            let round = sum.round(1.0).unwrap();
            assert!(round.p50_us > 0.0 && round.p99_us >= round.p50_us, "{round:?}");
        }
        host.ask_for(WITHOUT_NSID.0 + 1).unwrap();
        assert!(host.measure(Duration::from_millis(5)).is_err(), "there is no other namespace");
        drop(host);
        whole.stop().unwrap();
    }
}
