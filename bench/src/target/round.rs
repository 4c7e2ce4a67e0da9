//! One round of one side: a target, a host that keeps it busy for a while, and what that took.

use std::time::Duration;

use anyhow::Result;

use super::cases::Case;
use super::light::LightHost;
use super::peers::{Side, Target};
use super::perf::Perf;
use crate::clock::Stopwatch;
use crate::profiles::windows::Begun;

/// Of a warming up, which is not counted; no longer than a round.
pub(super) const WARM_UP: Duration = Duration::from_millis(100);

/// What a round gave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    /// Commands a second.
    pub(super) iops: f64,
    /// Microseconds that half of the commands did not exceed.
    pub(super) p50_us: f64,
    /// The same of 99 of 100.
    pub(super) p99_us: f64,
    /// Microseconds of processor that the target was busy for a command; none where it does not tell.
    pub(super) cpu_us: Option<f64>,
    /// The part of the time for which target and host had their processors: the lesser of both.
    pub(super) processor_share: f64,
    /// The connection with the fewest commands: its part of the mean. None where the host does not tell.
    pub(super) least_share: Option<f64>,
}

impl Round {
    /// The part of the time for which the target's core had work.
    pub(super) fn busy_share(&self) -> Option<f64> {
        self.cpu_us.map(|cpu_us| cpu_us * self.iops / 1e6)
    }
}

/// A round with a target of its own.
pub(super) fn round(case: &Case, side: &Side<'_>, by: Option<&Perf>, time: Duration) -> Result<Round> {
    let mut target = side.start(case)?;
    match by {
        None => by_light_host(case, side, &mut target, time),
        Some(perf) => by_perf(case, (side, perf), &mut target, time),
    }
}

/// With a target that is there, and connections of its own.
pub(super) fn by_light_host(
    case: &Case,
    side: &Side<'_>,
    target: &mut Target,
    time: Duration,
) -> Result<Round> {
    let mut host = side.host(target, case)?;
    host.measure(WARM_UP.min(time))?;
    let begun = Begun::now();
    let round = measured(&mut host, target, time)?;
    begun.end(side.name(), round.iops, round.cpu_us)?;
    Ok(round)
}

/// With connections that are there.
pub(super) fn measured(host: &mut LightHost, target: &mut Target, time: Duration) -> Result<Round> {
    let (busy, had) = (target.busy_us()?, target.processor_time()?);
    let watch = Stopwatch::start();
    let run = host.measure(time)?;
    let (wall_ns, host_ns) = (watch.wall_ns(), watch.cpu_ns());
    let target_ns = target.processor_time()?.saturating_sub(had).as_nanos() as f64;
    Ok(Round {
        iops: run.iops,
        p50_us: run.percentile_us(0.5),
        p99_us: run.percentile_us(0.99),
        cpu_us: per_command(busy, target.busy_us()?, run.count as f64),
        processor_share: host_ns.min(target_ns) / wall_ns,
        least_share: Some(run.least_share),
    })
}

/// For a profiler so much is left out at both ends of what SPDK's initiator measures: when that was is known by the end of its process
/// alone.
const TAIL: Duration = Duration::from_millis(500);

fn by_perf(
    case: &Case,
    (side, perf): (&Side<'_>, &Perf),
    target: &mut Target,
    time: Duration,
) -> Result<Round> {
    let (busy, had) = (target.busy_us()?, target.processor_time()?);
    let watch = Stopwatch::start();
    let (told, ran) = perf.measure(target.address(), case, time)?;
    let wall_ns = watch.wall_ns();
    let target_ns = target.processor_time()?.saturating_sub(had).as_nanos() as f64;
    let (time, seconds) = (Perf::time(time), Perf::time(time).as_secs_f64());
    // Where many connections join and leave, that is too much of what the account has.
    let cpu_us = per_command(busy, target.busy_us()?, told.iops * seconds).filter(|_| case.connections == 1);
    Begun::ended((TAIL, time.saturating_sub(TAIL + TAIL)), side.name(), told.iops, cpu_us)?;
    Ok(Round {
        iops: told.iops,
        p50_us: told.p50_us,
        p99_us: told.p99_us,
        cpu_us,
        // Beyond its measurement it waits now and then.
        processor_share: (ran.as_secs_f64() / seconds).min(target_ns / wall_ns),
        least_share: None,
    })
}

/// None also where the account did not move: it is brought up to date now and then, and a round may be shorter than that.
fn per_command(before: Option<f64>, after: Option<f64>, commands: f64) -> Option<f64> {
    Some((after? - before?) / commands).filter(|cost| *cost > 0.0)
}
