//! `scale`: a million extents in one file, a thousand pinned files.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use fastice_bench::{machine, scale};

use super::{add, say};

#[derive(Debug, Args)]
pub(crate) struct Scale {
    /// Extents of the one file
    #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    extents: u64,
    /// Files pinned at once
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    files: u64,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// Measures the pin of the one file alone, on this filesystem
    #[arg(long, value_name = "FS", value_parser = ["xfs", "ext4"])]
    only_pin: Option<String>,
    /// Measures the lookups of a turn alone, and what they wait for
    #[arg(long, conflicts_with = "only_pin")]
    only_waits: bool,
    /// How long to wait for a machine at rest before each part; 0 measures at once
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    rest: u64,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

/// Measures all of it.
pub(crate) fn run(options: &Scale) -> Result<()> {
    let Scale { extents, files, rounds, rest, .. } = *options;
    let plan = scale::Plan {
        extents,
        files,
        rounds,
        only_pin: options.only_pin.clone(),
        only_waits: options.only_waits,
        rest: Duration::from_secs(rest),
        machine: machine::describe(),
        tell: say,
    };
    add(&options.report, |rows| plan.run(rows))
}
