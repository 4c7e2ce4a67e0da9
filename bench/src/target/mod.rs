//! The whole target over TCP on loopback, beside each peer that there is.
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `target/DEVICE/WORK/qdN/iops` | commands a second of one connection | the bare responder: the ceiling of the kernel's TCP |
//! | `target/DEVICE/WORK/CxN/iops` | of C connections, each of depth N | |
//! | `.../p50`, `p99` | microseconds of a command | as above |
//! | `.../PEER/iops`, `p50`, `p99`, `cpu` | the same, and microseconds of the target's processor a command | that peer |
//! | `.../CxN/share` | the slowest connection's part of the mean | |
//! | `target/round-trip` | nanoseconds of a cache line between the two processors | |
//!
//! Targets have the first processor, the host the last. The host is a light one: see [`light`]. Sides take turns, each with a
//! process and connections of its own every round.

pub mod bare;
mod calm;
mod cases;
pub(crate) mod inbound;
pub(crate) mod join;
pub mod light;
mod peers;
mod process;
mod round_trip;
mod spdk;
mod speed;
pub mod work;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock::Stopwatch;
use crate::report::{Bar, Measurement, Row};
use calm::{Pairs, Turn};
use cases::{Bars, Case};
use peers::{Peer, Side};
pub use process::{Served, serve};
pub use round_trip::round_trip_ns;

pub(crate) const NQN: &str = "nqn.2026-11.io.fastice:bench";
/// Of the namespaces, in bytes.
const LEN: u64 = 256 << 20;
/// Of a warming up, which is not counted; no longer than a round.
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
    /// The part of the time for which target and host had their processors: the lesser of both.
    processor_share: f64,
}

impl Plan {
    fn row(&self, rows: &mut Vec<Row>, measured: &Measurement<'_>) -> Result<()> {
        let row = Row::new(measured, &self.machine);
        let row = row.with_context(|| format!("{} was not measured", measured.name))?;
        (self.tell)(&row.to_string());
        rows.push(row);
        Ok(())
    }

    /// All of it. Peers that are not here are named in `absent`.
    ///
    /// # Errors
    /// When something does not work that should.
    pub fn run(&self, rows: &mut Vec<Row>, absent: &mut Vec<String>) -> Result<()> {
        ensure!(
            self.rounds > 0 && self.depths.iter().all(|depth| *depth > 0),
            "there must be rounds and depths"
        );
        let peers = peers::found(absent);
        absent.iter().for_each(|absent| (self.tell)(&format!("ABSENT: {absent}")));
        let (mut trips, mut best_mib_s) = (Vec::new(), 0.0);
        let wanted = |case: &Case| self.only.as_ref().is_none_or(|part| case.name().contains(part.as_str()));
        for case in cases::all(&self.depths).into_iter().filter(wanted) {
            let mut share = Vec::new();
            for peer in peers.iter().filter(|peer| peer.can(&case)) {
                share.extend(self.pair(rows, &case, peer, (&mut trips, &mut best_mib_s))?);
            }
            if share.is_empty() {
                share = self.alone(rows, &case)?;
                trips.push(round_trip_ns()?);
            }
            if case.connections > 1 {
                self.share(rows, &case, &share)?;
            }
        }
        ensure!(!trips.is_empty(), "no case has a name like that");
        let method = "a cache line from one processor to the other and back, before and after every round";
        let name = "target/round-trip".to_owned();
        self.row(rows, &Measurement { name, unit: "ns", ours: &trips, peer: None, bar: None, method })
    }

    /// Ours beside one peer; gives our rounds' shares of the slowest connection.
    fn pair(
        &self,
        rows: &mut Vec<Row>,
        case: &Case,
        peer: &Peer,
        (trips, best_mib_s): (&mut Vec<f64>, &mut f64),
    ) -> Result<Vec<f64>> {
        let pairs = Pairs::collect(self.rounds, best_mib_s, |turn| {
            let side = if turn == Turn::Ours { Side::Ours } else { Side::Peer(peer) };
            self.round(case, &side)
        })?;
        trips.extend(&pairs.trips_ns);
        let (best, what) = pairs.best();
        let [ours, theirs]: [Vec<Round>; 2] =
            [0, 1].map(|side| best.iter().map(|pair| pair[side].clone()).collect());
        let method = format!("{METHOD}; {what}");
        let place = format!("{}{}", case.name(), peer.place());
        self.numbers(rows, (&place, &method), case, (peer, peer.bars(case)), (&ours, &theirs))?;
        Ok(ours.iter().map(|round| round.run.least_share).collect())
    }

    /// Ours, where no peer that is here can do the same.
    fn alone(&self, rows: &mut Vec<Row>, case: &Case) -> Result<Vec<f64>> {
        let rounds = (0..self.rounds).map(|_| self.round(case, &Side::Ours)).collect::<Result<Vec<_>>>()?;
        let (name, unit) = (format!("{}/iops", case.name()), "IOPS");
        let ours: Vec<_> = rounds.iter().map(|round| round.run.iops).collect();
        self.row(rows, &Measurement { name, unit, ours: &ours, peer: None, bar: None, method: METHOD })?;
        Ok(rounds.iter().map(|round| round.run.least_share).collect())
    }

    fn numbers(
        &self,
        rows: &mut Vec<Row>,
        (place, method): (&str, &str),
        case: &Case,
        (peer, bars): (&Peer, Bars),
        (ours, theirs): (&[Round], &[Round]),
    ) -> Result<()> {
        type Number = fn(&Round) -> Option<f64>;
        const MIB: f64 = (1 << 20) as f64;
        let mut wanted: Vec<(&str, &str, Number, Option<Bar>)> =
            vec![("iops", "IOPS", |round| Some(round.run.iops), bars.rate)];
        wanted.push(("p50", "us", |round| Some(round.run.percentile_us(0.5)), bars.latency));
        wanted.push(("p99", "us", |round| Some(round.run.percentile_us(0.99)), bars.latency));
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
            self.row(rows, &Measurement { name, unit, ours: &ours, peer, bar, method })?;
        }
        Ok(())
    }

    fn share(&self, rows: &mut Vec<Row>, case: &Case, share: &[f64]) -> Result<()> {
        let name = format!("{}/share", case.name());
        let method = "commands of the slowest connection, in parts of the mean of all";
        let bar = case.bar_of_share();
        self.row(rows, &Measurement { name, unit: "of the mean", ours: share, peer: None, bar, method })
    }

    /// One round of one side.
    fn round(&self, case: &Case, side: &Side<'_>) -> Result<Round> {
        let mut target = side.start(case)?;
        let mut host = target.host(case)?;
        host.measure(WARM_UP.min(self.time))?;
        let (busy, had) = (target.busy_us()?, target.processor_time()?);
        let watch = Stopwatch::start();
        let run = host.measure(self.time)?;
        let (wall_ns, host_ns) = (watch.wall_ns(), watch.cpu_ns());
        let target_ns = (target.processor_time()?.saturating_sub(had)).as_nanos() as f64;
        let cpu_us = match (busy, target.busy_us()?) {
            (Some(before), Some(after)) => Some((after - before) / (run.count as f64)),
            _ => None,
        };
        Ok(Round { run, cpu_us, processor_share: host_ns.min(target_ns) / wall_ns })
    }
}

const METHOD: &str = "target on the first processor and a light host on the last, both polling; loopback; medians of rounds that take turns";
