//! The whole target over TCP on loopback, beside the ceiling of the kernel's TCP.
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `target/DEVICE/WORK/qd1/p50`, `p99` | microseconds of a command, one at a time | the bare responder |
//! | `target/DEVICE/WORK/qdN/iops` | commands of 4 KiB a second, one connection | the bare responder |
//! | `target/round-trip` | nanoseconds of a cache line between the two processors | |
//!
//! Target and responder have the first processor each, the host the last. The host is a light one: see [`light`]. Sides take
//! turns, each with a process and a connection of its own every round.

pub mod bare;
pub mod light;
mod process;
mod round_trip;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::report::{Bar, Measurement, Row};
use light::{LightHost, Run, UNIT_LEN, Work};
use process::TargetProcess;
pub use process::{Served, serve};
pub use round_trip::round_trip_ns;

const NQN: &str = "nqn.2026-11.io.fastice:bench";
/// Of the namespaces, in bytes.
const LEN: u64 = 256 << 20;
/// Least part of the bare responder's rate, where many commands are in flight.
const RATE_MIN: f64 = 0.85;
/// From this depth on.
const DEEP: u16 = 32;
/// Of a warming up, which is not counted.
const WARM_UP: Duration = Duration::from_millis(100);

/// How long, how deep, how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Queue depths.
    pub depths: Vec<u16>,
    /// Rounds of each side.
    pub rounds: usize,
    /// How long a round is busy.
    pub time: Duration,
    /// See [`Row::machine`].
    pub machine: String,
    /// Told of each row.
    pub tell: fn(&str),
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
        let mut trips = vec![round_trip_ns()?];
        for (served, device) in [(Served::Null, "null"), (Served::Memory, "memory")] {
            for work in [Work::Read, Work::Write] {
                for &depth in &self.depths {
                    self.pair(
                        rows,
                        served,
                        &format!("target/{device}/{}/qd{depth}", work.name()),
                        work,
                        depth,
                    )?;
                }
            }
            trips.push(round_trip_ns()?);
        }
        self.row(
            rows,
            &Measurement {
                name: "target/round-trip".to_owned(),
                unit: "ns",
                ours: &trips,
                peer: None,
                bar: None,
                method: "a cache line from one processor to the other and back, before, between and after the rows of the target",
            },
        )
    }

    fn pair(&self, rows: &mut Vec<Row>, served: Served, name: &str, work: Work, depth: u16) -> Result<()> {
        let ceiling = if work == Work::Read { Served::BareReads } else { Served::BareWrites };
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for round in 0..self.rounds {
            // Neither is always the first.
            if round % 2 == 0 {
                bare.push(self.side(ceiling, work, depth)?);
            }
            ours.push(self.side(served, work, depth)?);
            if round % 2 == 1 {
                bare.push(self.side(ceiling, work, depth)?);
            }
        }
        let rate = |runs: &[Run]| runs.iter().map(|run| run.iops).collect::<Vec<_>>();
        let (our_rate, bare_rate) = (rate(&ours), rate(&bare));
        self.row(
            rows,
            &Measurement {
                name: format!("{name}/iops"),
                unit: "IOPS",
                ours: &our_rate,
                peer: Some((CEILING, &bare_rate)),
                bar: (depth >= DEEP && served == Served::Null).then_some(Bar::RatioAtLeast(RATE_MIN)),
                method: "4 KiB, one connection, target on the first processor and a light host on the last, both polling",
            },
        )?;
        if depth > 1 {
            return Ok(());
        }
        for (part, label) in [(0.5, "p50"), (0.99, "p99")] {
            let of = |runs: &[Run]| runs.iter().filter_map(|run| run.percentile_us(part)).collect::<Vec<_>>();
            let (ours, bare) = (of(&ours), of(&bare));
            self.row(
                rows,
                &Measurement {
                    name: format!("{name}/{label}"),
                    unit: "us",
                    ours: &ours,
                    peer: Some((CEILING, &bare)),
                    bar: None,
                    method: "of single commands of 4 KiB, as the light host sees them",
                },
            )?;
        }
        Ok(())
    }

    /// One round of one side.
    fn side(&self, served: Served, work: Work, depth: u16) -> Result<Run> {
        let target = TargetProcess::start(served)?;
        let blocks = LEN / u64::from(UNIT_LEN);
        let mut host = match served {
            Served::Null | Served::Memory => LightHost::join(target.address, work, depth, blocks)?,
            Served::BareReads | Served::BareWrites => {
                LightHost::connect_bare(target.address, work, depth, blocks)?
            }
        };
        host.measure(WARM_UP)?;
        host.measure(self.time)
    }
}

const CEILING: &str = "a bare responder on the same sockets, which has no work";
