//! The whole target over TCP on loopback, beside each peer that there is.
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `target/DEVICE/WORK/qdN/iops` | commands a second of one connection | the bare responder: the ceiling of the kernel's TCP |
//! | `target/DEVICE/WORK/CxN/iops` | of C connections, each of depth N | |
//! | `target/DEVICE/WORK/qd1/p50`, `p99` | microseconds of a command, one at a time | the bare responder |
//! | `.../PEER/iops`, `p50`, `p99`, `cpu` | the same, and microseconds of the target's processor a command | that peer |
//! | `.../CxN/share` | the slowest connection's part of the mean | |
//! | `target/round-trip` | nanoseconds of a cache line between the two processors | |
//!
//! Targets have the first processor, the host the last. The host is a light one: see [`light`]. Sides take turns, each with a
//! process and connections of its own every round.

pub mod bare;
mod cases;
mod inbound;
mod join;
pub mod light;
mod peers;
mod process;
mod round_trip;
mod spdk;
pub mod work;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::report::{Bar, Measurement, Row};
use cases::{Bars, Case};
use peers::{Peer, Side};
pub use process::{Served, serve};
pub use round_trip::round_trip_ns;

const NQN: &str = "nqn.2026-11.io.fastice:bench";
/// Of the namespaces, in bytes.
const LEN: u64 = 256 << 20;
/// Of a warming up, which is not counted.
const WARM_UP: Duration = Duration::from_millis(100);

/// How long, how deep, how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Queue depths.
    pub depths: Vec<u16>,
    /// Only cases whose name holds this.
    pub only: Option<String>,
    /// Rounds of each side.
    pub rounds: usize,
    /// How long a round is busy.
    pub time: Duration,
    /// See [`Row::machine`].
    pub machine: String,
    /// Told of each row.
    pub tell: fn(&str),
}

/// What one round of one side gave.
#[derive(Clone, Debug)]
struct Round {
    run: light::Run,
    /// Microseconds of processor that the target was busy for a command; none where it does not tell.
    cpu_us: Option<f64>,
}

impl Plan {
    fn row(&self, rows: &mut Vec<Row>, measured: &Measurement<'_>) -> Result<()> {
        let row = Row::new(measured, &self.machine);
        let row = row.with_context(|| format!("{} was not measured", measured.name))?;
        (self.tell)(&row.to_string());
        rows.push(row);
        Ok(())
    }

    /// All of it.
    ///
    /// # Errors
    /// When something does not work that should.
    pub fn run(&self, rows: &mut Vec<Row>) -> Result<()> {
        ensure!(
            self.rounds > 0 && self.depths.iter().all(|depth| *depth > 0),
            "there must be rounds and depths"
        );
        let peers = peers::found(self.tell);
        let mut trips = vec![round_trip_ns()?];
        let wanted = |case: &Case| self.only.as_ref().is_none_or(|part| case.name().contains(part.as_str()));
        for case in cases::all(&self.depths).into_iter().filter(wanted) {
            let mut share = Vec::new();
            for peer in peers.iter().filter(|peer| peer.can(&case)) {
                share.extend(self.pair(rows, &case, peer)?);
            }
            if case.connections > 1 {
                self.share(rows, &case, &share)?;
            }
            trips.push(round_trip_ns()?);
        }
        let method =
            "a cache line from one processor to the other and back, before, between and after the cases";
        let name = "target/round-trip".to_owned();
        self.row(rows, &Measurement { name, unit: "ns", ours: &trips, peer: None, bar: None, method })
    }

    /// Ours beside one peer; gives our rounds' shares of the slowest connection.
    fn pair(&self, rows: &mut Vec<Row>, case: &Case, peer: &Peer) -> Result<Vec<f64>> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let theirs_side = Side::Peer(peer);
        for round in 0..self.rounds {
            // Neither is always the first.
            if round % 2 == 0 {
                theirs.push(self.round(case, &theirs_side)?);
            }
            ours.push(self.round(case, &Side::Ours)?);
            if round % 2 == 1 {
                theirs.push(self.round(case, &theirs_side)?);
            }
        }
        let bars = peer.bars(case);
        let place = format!("{}{}", case.name(), peer.place());
        self.numbers(rows, &place, case, (peer, bars), (&ours, &theirs))?;
        Ok(ours.iter().map(|round| round.run.least_share).collect())
    }

    fn numbers(
        &self,
        rows: &mut Vec<Row>,
        place: &str,
        case: &Case,
        (peer, bars): (&Peer, Bars),
        (ours, theirs): (&[Round], &[Round]),
    ) -> Result<()> {
        type Number = fn(&Round) -> Option<f64>;
        const MIB: f64 = (1 << 20) as f64;
        let mut wanted: Vec<(&str, &str, Number, Option<Bar>)> =
            vec![("iops", "IOPS", |round| Some(round.run.iops), bars.rate)];
        if case.depth == 1 {
            wanted.push(("p50", "us", |round| Some(round.run.percentile_us(0.5)), bars.latency));
            wanted.push(("p99", "us", |round| Some(round.run.percentile_us(0.99)), bars.latency));
        }
        wanted.push(("cpu", "us a command", |round| round.cpu_us, bars.cpu));
        for (label, unit, number, bar) in wanted {
            let of = |rounds: &[Round]| rounds.iter().filter_map(number).collect::<Vec<_>>();
            let (mut ours, mut theirs, mut unit) = (of(ours), of(theirs), unit);
            if ours.is_empty() || theirs.is_empty() {
                continue;
            }
            let is_large = label == "iops" && case.work.len > 4096;
            if is_large {
                let scale = f64::from(case.work.len) / MIB;
                ours.iter_mut().chain(&mut theirs).for_each(|rate| *rate *= scale);
                unit = "MiB/s";
            }
            let label = if is_large { "rate" } else { label };
            let name = format!("{place}/{label}");
            let peer = Some((peer.name(), theirs.as_slice()));
            self.row(rows, &Measurement { name, unit, ours: &ours, peer, bar, method: METHOD })?;
        }
        Ok(())
    }

    fn share(&self, rows: &mut Vec<Row>, case: &Case, share: &[f64]) -> Result<()> {
        if share.is_empty() {
            return Ok(());
        }
        let name = format!("{}/share", case.name());
        let method = "commands of the slowest connection, in parts of the mean of all";
        let bar = case.bar_of_share();
        self.row(rows, &Measurement { name, unit: "of the mean", ours: share, peer: None, bar, method })
    }

    /// One round of one side.
    fn round(&self, case: &Case, side: &Side<'_>) -> Result<Round> {
        let mut target = side.start(case)?;
        let mut host = target.host(case)?;
        host.measure(WARM_UP)?;
        let busy = target.busy_us()?;
        let run = host.measure(self.time)?;
        let cpu_us = match (busy, target.busy_us()?) {
            (Some(before), Some(after)) => Some((after - before) / (run.count as f64)),
            _ => None,
        };
        Ok(Round { run, cpu_us })
    }
}

const METHOD: &str = "target on the first processor and a light host on the last, both polling; loopback; medians of rounds that take turns";
