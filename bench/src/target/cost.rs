//! Where the time of the target's core goes: rows `target/cost/null/WORK/qdN/STAGE`, in microseconds a command.
//!
//! At depth 1 by the target's own histograms (`fastice::stage`): a command is alone there, so its stages are what the core did for
//! it; what the kernel has before it hands the capsule over is in none. At depth 32, where commands wait for one another, by samples
//! of the core ([`super::profile`]), beside SPDK's. `target/cost/clock` is the core's clock meanwhile, by which plots tell cycles.

use std::time::Duration;

use anyhow::Result;
use fastice::control::LatencyStatus;
use fastice::stage::Stage;

use super::calm::Calm;
use super::cases::Case;
use super::peers::{Peer, Side, Target};
use super::process::Served;
use super::profile::{Parts, Place, Recording};
use super::round::{by_light_host, measured};
use super::work::{Kind, Work};
use super::{LIGHT_HOST, Plan, placing, skipped};
use crate::clock::cycles_per_ns;
use crate::report::{Measurement, Row};

/// The row of the core's clock.
pub const CLOCK: &str = "target/cost/clock";
/// How long a core is sampled.
const TIME: Duration = Duration::from_secs(1);
/// How much longer it is kept busy: until perf has begun.
const AROUND: Duration = Duration::from_millis(700);
const DEPTH: u16 = 32;

/// All of them.
pub(super) fn rows(plan: &Plan, rows: &mut Vec<Row>, peers: &[Peer], calm: &mut Calm) -> Result<()> {
    let mut clock = Vec::new();
    for kind in [Kind::Read, Kind::Write] {
        clock.push(cycles_per_ns());
        let case = Case::new(Served::Null, Work::small(kind), 1, 1);
        let (alone, many) = (name(&case), name(&case.with(1, DEPTH)));
        if plan.wants(&alone) {
            stages(plan, rows, &case, calm)?;
        }
        if plan.wants(&many) {
            match Recording::is_possible() {
                Ok(()) => samples(plan, rows, &case.with(1, DEPTH), (peers, calm))?,
                Err(why) => skipped(&many, &why.to_string()),
            }
        }
    }
    if plan.wants(CLOCK) {
        let (name, method) = (
            CLOCK.to_owned(),
            "a chain of dependent instructions of one cycle each, before each kind of work",
        );
        plan.row(rows, &Measurement { name, unit: "GHz", ours: &clock, peer: None, bar: None, method })?;
    }
    Ok(())
}

/// `target/cost/null/randread/qd1`.
fn name(case: &Case) -> String {
    case.name().replacen("target/", "target/cost/", 1)
}

/// The mean of each stage at depth 1.
fn stages(plan: &Plan, rows: &mut Vec<Row>, case: &Case, calm: &mut Calm) -> Result<()> {
    let collected = calm.collect(plan.rounds.min(3), |_, _| {
        let mut target = Side::Ours.start(case)?;
        let round = by_light_host(case, &Side::Ours, &mut target, plan.time)?;
        let Target::Child(process) = &mut target else { anyhow::bail!("another target than ours") };
        Ok((process.latencies()?, round.processor_share))
    })?;
    let (told, what) = collected.best();
    let method = format!("{}; mean of each stage by fastice's own histograms; {what}", placing(LIGHT_HOST)?);
    for stage in Stage::ALL {
        let ours: Vec<_> = told.iter().filter_map(|latencies| mean_us(latencies, stage)).collect();
        let name = format!("{}/{}", name(case), stage.word());
        let measured =
            Measurement { name, unit: "us a command", ours: &ours, peer: None, bar: None, method: &method };
        plan.row(rows, &measured)?;
    }
    Ok(())
}

fn mean_us(latencies: &[LatencyStatus], stage: Stage) -> Option<f64> {
    let times = latencies.iter().filter_map(|status| status.stages.get(stage.word()));
    let (ns, count) = times.fold((0, 0), |(ns, count), times| (ns + times.sum_ns, count + times.count));
    (count > 0).then(|| ns as f64 / count as f64 / 1e3)
}

/// What each place takes of the core's time at depth.
fn samples(plan: &Plan, rows: &mut Vec<Row>, case: &Case, (peers, calm): (&[Peer], &mut Calm)) -> Result<()> {
    let peer = peers.iter().find(|peer| matches!(peer, Peer::Spdk(_)));
    let collected = calm.collect(1, |_, looks| {
        let (ours, share) = sampled(plan, case, &Side::Ours)?;
        let Some(peer) = peer else { return Ok(((ours, None), share)) };
        looks.take()?;
        let (theirs, other_share) = sampled(plan, case, &Side::Peer(peer))?;
        Ok(((ours, Some(theirs)), share.min(other_share)))
    })?;
    let (best, what) = collected.best();
    let method = format!("{}; samples of the target's core, polling included; {what}", placing(LIGHT_HOST)?);
    let Some((ours, theirs)) = best.into_iter().next() else { return Ok(()) };
    let mut put = |place: &str, ours: f64, theirs: Option<f64>| {
        // A place that had no sample has no ratio.
        let theirs = theirs.filter(|us| *us > 0.0).map(|us| [us]);
        let peer = peer.and_then(|peer| Some((peer.name(), &theirs.as_ref()?[..])));
        let name = format!("{}/{place}", name(case));
        plan.row(
            rows,
            &Measurement { name, unit: "us a command", ours: &[ours], peer, bar: None, method: &method },
        )
    };
    match (ours, theirs) {
        (Some(ours), theirs) => {
            let theirs = theirs.flatten();
            for (at, place) in Place::ALL.into_iter().enumerate() {
                let of = |costs: &Costs| costs.get(at).copied();
                let beside = theirs.as_ref().filter(|_| place.is_kernel()).and_then(of);
                put(place.name(), of(&ours).unwrap_or_default(), beside)?;
            }
            put("process", own(&ours), theirs.as_ref().map(own))
        }
        (None, _) => {
            skipped(&name(case), "too few samples");
            Ok(())
        }
    }
}

/// Microseconds a command, of each of [`Place::ALL`].
type Costs = [f64; Place::ALL.len()];

/// What is not the kernel's.
fn own(costs: &Costs) -> f64 {
    Place::ALL.iter().zip(costs).filter(|(place, _)| !place.is_kernel()).map(|(_, us)| us).sum()
}

/// None where there were too few samples, as in a round that is short.
fn sampled(plan: &Plan, case: &Case, side: &Side<'_>) -> Result<(Option<Costs>, f64)> {
    let mut target = side.start(case)?;
    let mut host = side.host(&target, case)?;
    let time = TIME.min(plan.time * 2);
    let recording = Recording::begin(target.pid(), time)?;
    let round = measured(&mut host, &mut target, time + AROUND)?;
    let costs = recording.end().ok().map(|Parts(parts)| parts.map(|part| part * 1e6 / round.iops));
    Ok((costs, round.processor_share))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use fastice::control::StageTimes;

    use super::*;

    #[test]
    fn a_stage_is_the_mean_of_all_commands_of_all_hosts() {
        let one = |count, sum_ns| LatencyStatus {
            subsystem: None,
            nsid: None,
            host: None,
            total: StageTimes::default(),
            stages: BTreeMap::from([(
                "parse".to_owned(),
                StageTimes { count, sum_ns, ..StageTimes::default() },
            )]),
        };
        assert_eq!(mean_us(&[one(1, 1000), one(3, 7000)], Stage::Parse), Some(2.0));
        assert_eq!(mean_us(&[one(1, 1000)], Stage::Send), None);
    }

    #[test]
    fn what_is_not_the_kernels_is_the_process() {
        let costs = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
        assert_eq!(own(&costs), 504.0);
    }
}
