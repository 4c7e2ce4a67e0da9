//! `target`, `idle` and `growth`: the target over TCP on loopback, beside its peers, without work, and as it grows.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use fastice_bench::ending::Ending;
use fastice_bench::report::{Report, Row};
use fastice_bench::{guest, machine, rest, target};

use super::{add, for_rows, say};

#[derive(Debug, Args)]
pub(crate) struct Target {
    /// Queue depths
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [1, 32, 128],
        value_name = "N,N",
        value_parser = clap::value_parser!(u16).range(1..=1023),
    )]
    depths: Vec<u16>,
    /// Only cases whose name holds this, such as null/randread
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only beside these; all that are here without it
    #[arg(long, value_delimiter = ',', value_name = "PEER,PEER")]
    peers: Option<Vec<target::PeerKind>>,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// Milliseconds of a round
    #[arg(long, default_value_t = 500, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    round_ms: u64,
    /// How much longer all may take together where rounds are disturbed and tried again, and wait for whole cores
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    spare: u64,
    /// How long to wait for a machine at rest before; 0 measures at once
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    rest: u64,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Idle {
    /// Only parts whose name holds this, such as light
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// Milliseconds of a round of full load
    #[arg(long, default_value_t = 1000, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    round_ms: u64,
    /// Milliseconds of a round without load, and of light load
    #[arg(long, default_value_t = 10_000, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    idle_ms: u64,
    /// Most seconds beyond that for pairs of rounds that are not undisturbed
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    spare: u64,
    /// How long to wait for a machine at rest before; 0 measures at once
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    rest: u64,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

/// Measures the target beside each peer that is here.
pub(crate) fn run(options: &Target) -> Result<()> {
    let mut report = for_rows(&options.report)?;
    let plan = target::Plan {
        depths: options.depths.clone(),
        only: options.only.clone(),
        peers: options.peers.clone(),
        rounds: options.rounds,
        time: Duration::from_millis(options.round_ms),
        spare: Duration::from_secs(options.spare),
        machine: machine::describe(),
        tell: say,
        ending: Ending::by_signals()?,
    };
    settle(options.rest, &plan.ending)?;
    let (mut rows, mut absent) = (Vec::new(), Vec::new());
    if let Err(error) = plan.run(&mut rows, &mut absent) {
        return Err(keep(report, rows, &options.report, error));
    }
    if options.only.is_none() && options.peers.is_none() {
        // Rows that are not measured any more are of another time, and would be taken for those of this one.
        report.rows.retain(|row| !target::is_made_here(&row.name));
    }
    report.merge(rows);
    // Of a peer in the guest this run knows nothing.
    report.absent.retain(|line| line.starts_with(guest::PEER));
    report.absent.extend(absent);
    Ok(report.save(&options.report)?)
}

/// Measures by `run` what a target costs that has little to do, or how it grows.
pub(crate) fn idle(options: &Idle, run: fn(&target::idle::Plan, &mut Vec<Row>) -> Result<()>) -> Result<()> {
    let plan = target::idle::Plan {
        only: options.only.clone(),
        rounds: options.rounds,
        idle: Duration::from_millis(options.idle_ms),
        time: Duration::from_millis(options.round_ms),
        spare: Duration::from_secs(options.spare),
        machine: machine::describe(),
        tell: say,
        ending: Ending::by_signals()?,
    };
    add(&options.report, |rows| {
        settle(options.rest, &plan.ending)?;
        run(&plan, rows)
    })
}

/// What was measured before something went wrong, or before somebody had it end, is as good, and of the rest nothing is known: it goes into
/// the report. Gives the error back.
fn keep(mut report: Report, rows: Vec<Row>, path: &Path, error: anyhow::Error) -> anyhow::Error {
    let count = rows.len();
    if count == 0 {
        return error;
    }
    report.merge(rows);
    match report.save(path) {
        Ok(()) => {
            say(&format!("kept: {count} rows"));
            error
        }
        Err(why) => error.context(format!("{count} rows are lost: {why}")),
    }
}

/// Waits until nobody else has the machine, and says so where it does not come to rest: the figures are then of a busy one.
fn settle(seconds: u64, ending: &Ending) -> Result<()> {
    if seconds > 0
        && let Err(busy) = rest::wait(Duration::from_secs(seconds), || ending.look().is_err())
    {
        ending.look()?;
        say(&format!("before the measurements: {busy}"));
    }
    Ok(())
}
