//! Curves: the rate and the latency at many loads, all within one short time, so that their points belong together.
//!
//! ```text
//!   ours: look, load 1, look, load 2, ... | a peer: the same | ... | look      a sweep: some seconds
//! ```
//!
//! A sweep counts like a pair of rounds ([`super::calm`]): when all its looks found the machine in one state. A row's number is the
//! median of some sweeps of one state, one after the other. Rows of such a window name it, and are drawn only with each other.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;

use super::Plan;
use super::calm::Calm;
use super::cases::Case;
use super::peers::{Peer, Side};
use super::process::Served;
use super::round::{Round, by_light_host};
use super::work::{Kind, Work};
use crate::report::{Measurement, Row};

/// Sweeps of one state that are wanted, at most.
const SWEEPS: usize = 3;
/// How long a load lasts, at most.
const TIME: Duration = Duration::from_millis(200);
const DEPTHS: [u16; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// Each with four commands in flight.
const CONNECTIONS: [u16; 5] = [1, 4, 16, 64, 256];

/// A number of a round.
type Number = fn(&Round) -> f64;

/// What a line of points is measured of.
struct Curve {
    name: String,
    cases: Vec<Case>,
    /// Whether it is connections that there are more and more of.
    of_connections: bool,
}

impl Curve {
    /// A load, in the names of its rows: `qd32`, `1x4`.
    fn load(&self, case: &Case) -> String {
        if self.of_connections { format!("{}x{}", case.connections, case.depth) } else { case.load() }
    }
}

fn all() -> Vec<Curve> {
    let of_depths = |kind| {
        let first = Case::new(Served::Null, Work::small(kind), 1, 1);
        let cases = DEPTHS.map(|depth| first.with(1, depth)).into();
        Curve { name: curve_name(&first), cases, of_connections: false }
    };
    let first = Case::new(Served::Null, Work::small(Kind::Read), 1, 4);
    let name = format!("{}-connections", curve_name(&first));
    let cases = CONNECTIONS.map(|connections| first.with(connections, 4)).into();
    vec![of_depths(Kind::Read), of_depths(Kind::Write), Curve { name, cases, of_connections: true }]
}

/// `target/curve/null/randread`.
fn curve_name(case: &Case) -> String {
    case.place().replacen("target/", "target/curve/", 1)
}

/// The rows of all curves.
pub(super) fn rows(plan: &Plan, rows: &mut Vec<Row>, peers: &[Peer], calm: &mut Calm) -> Result<()> {
    for curve in all().into_iter().filter(|curve| plan.wants(&curve.name)) {
        one(plan, rows, &curve, peers, calm)?;
    }
    Ok(())
}

fn one(plan: &Plan, rows: &mut Vec<Row>, curve: &Curve, peers: &[Peer], calm: &mut Calm) -> Result<()> {
    let is_drawn = |peer: &&Peer| {
        matches!(peer, Peer::Bare | Peer::Spdk(_)) && curve.cases.iter().all(|case| peer.can(case))
    };
    let peers: Vec<_> = peers.iter().filter(is_drawn).collect();
    let mut sides = vec![Side::Ours];
    sides.extend(peers.iter().map(|peer| Side::Peer(peer)));
    let begun = SystemTime::now();
    let collected = calm.collect(plan.rounds.min(SWEEPS), |number, looks| {
        let mut sweep: Vec<Vec<Round>> = vec![Vec::new(); sides.len()];
        for turn in 0..sides.len() {
            // Each is first as often as another.
            let at = (turn + number) % sides.len();
            let Some((side, rounds)) = sides.get(at).zip(sweep.get_mut(at)) else { continue };
            let Some(first) = curve.cases.first() else { continue };
            let mut target = side.start(first)?;
            for case in &curve.cases {
                looks.take()?;
                rounds.push(by_light_host(case, side, &mut target, plan.time.min(TIME))?);
            }
        }
        let share = sweep.iter().flatten().map(|round| round.processor_share).fold(1.0, f64::min);
        Ok((sweep, share))
    })?;
    let (sweeps, what) = collected.best();
    let seconds = begun.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let window = format!("{seconds}: {what}");
    let method = format!("{}; all loads in one sweep; {what}", super::placing(super::LIGHT_HOST)?);
    for (at, case) in curve.cases.iter().enumerate() {
        let of = |side: usize, number: Number| -> Vec<f64> {
            sweeps.iter().filter_map(|sweep| sweep.get(side)?.get(at).map(number)).collect()
        };
        let numbers: [(&str, &str, Number); 2] =
            [("iops", "IOPS", |round| round.iops), ("p50", "us", |round| round.p50_us)];
        for (label, unit, number) in numbers {
            let ours = of(0, number);
            let place = format!("{}/{}", curve.name, curve.load(case));
            let put = |rows: &mut Vec<Row>, name: String, peer: Option<(&str, &[f64])>| {
                let measured = Measurement { name, unit, ours: &ours, peer, bar: None, method: &method };
                plan.row_of_window(rows, &measured, Some(&window))
            };
            if peers.is_empty() {
                put(rows, format!("{place}/{label}"), None)?;
            }
            for (number_of_peer, peer) in peers.iter().enumerate() {
                let theirs = of(number_of_peer + 1, number);
                let name = format!("{place}{}/{label}", peer.place());
                put(rows, name, Some((peer.name(), &theirs)))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_have_names_of_their_own_and_loads_in_order() {
        let curves = all();
        let names: Vec<_> = curves.iter().map(|curve| curve.name.as_str()).collect();
        let place = "target/curve/null";
        assert_eq!(names[..2], [format!("{place}/randread"), format!("{place}/randwrite")]);
        assert_eq!(names[2], format!("{place}/randread-connections"));
        let loads: Vec<_> = curves[2].cases.iter().map(|case| curves[2].load(case)).collect();
        assert_eq!(loads, ["1x4", "4x4", "16x4", "64x4", "256x4"]);
    }
}
