//! `profiles`: what bench/profile.sh is made of.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use fastice_bench::report::Report;
use fastice_bench::{machine, profiles};

use super::say;

#[derive(Debug, Subcommand)]
pub(crate) enum Profiles {
    /// The lines of the table that explain rows that are not met; on standard error such rows as none does
    Unmet {
        /// Which profile explains which rows
        #[arg(long, default_value = "bench/profiles/table", value_name = "FILE")]
        table: PathBuf,
        /// Where the report is
        #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
        report: PathBuf,
    },
    /// A profile's text, of samples that perf script printed to standard input
    Samples {
        /// Which side was measured when
        #[arg(long, value_name = "FILE")]
        windows: PathBuf,
        /// The targets' processor
        #[arg(long, value_name = "CPU")]
        processor: u32,
        /// One command was in flight at a time
        #[arg(long, conflicts_with = "host")]
        at_depth_1: bool,
        /// The processor of the host, which is SPDK's initiator
        #[arg(long, value_name = "CPU")]
        host: Option<u32>,
    },
    /// A profile's text, of samples of all processors while a large file was pinned, from standard input
    Pins {
        /// Which side was measured when
        #[arg(long, value_name = "FILE")]
        windows: PathBuf,
        /// Samples a second of each processor
        #[arg(long, value_name = "N")]
        hz: f64,
        /// How the names of the threads begin that pin, and that read the map bare
        #[arg(long, value_name = "NAME", value_delimiter = ',')]
        threads: Vec<String>,
    },
    /// A profile's text, of samples while lookups were measured, from standard input, of what these took, and of what was counted
    Lookups {
        /// Which side was measured when
        #[arg(long, value_name = "FILE")]
        windows: PathBuf,
        /// What was measured meanwhile
        #[arg(long, value_name = "FILE")]
        report: PathBuf,
        /// How the names of the threads begin that look up
        #[arg(long, value_name = "NAME", value_delimiter = ',')]
        threads: Vec<String>,
        /// Instructions of a lookup among many extents
        #[arg(long, value_name = "N")]
        instructions: f64,
        /// The same in a map of one
        #[arg(long, value_name = "N")]
        instructions_in_one: f64,
        /// Lines of memory that a lookup among many asks for and the core's caches have not
        #[arg(long, value_name = "N")]
        lines: f64,
    },
    /// A profile's text, of samples of all processors beside the kernel's initiator and fio, from standard input
    Shares {
        /// Which side was measured when
        #[arg(long, value_name = "FILE")]
        windows: PathBuf,
    },
    /// A profile's text, of the scheduler's events that perf script printed to standard input
    Wakes {
        /// Which side was measured when
        #[arg(long, value_name = "FILE")]
        windows: PathBuf,
        /// What was measured meanwhile
        #[arg(long, value_name = "FILE")]
        report: PathBuf,
    },
}

/// Prints what a profile is made of.
pub(crate) fn run(what: &Profiles) -> Result<()> {
    let (limit, text) = match what {
        Profiles::Unmet { table, report } => {
            let lines = profiles::table::read(table)?;
            let (wanted, bare) = profiles::table::unmet(&lines, &Report::load(report)?);
            wanted.iter().for_each(|line| say(&line.text));
            for name in bare {
                let _ = writeln!(std::io::stderr().lock(), "{name} is not met, and no profile explains it");
            }
            return Ok(());
        }
        Profiles::Samples { windows, processor, at_depth_1, host } => {
            let windows = profiles::windows::read(windows)?;
            match host {
                Some(host) => profiles::host::profile(&script()?, &windows, (*processor, *host)),
                None => profiles::samples::profile(&script()?, &windows, *processor, *at_depth_1),
            }
        }
        Profiles::Pins { windows, hz, threads } => {
            let threads: Vec<_> = threads.iter().map(String::as_str).collect();
            profiles::pins::profile(&script()?, &profiles::windows::read(windows)?, *hz, &threads)
        }
        Profiles::Lookups { windows, report, threads, instructions, instructions_in_one, lines } => {
            let threads: Vec<_> = threads.iter().map(String::as_str).collect();
            let counted = profiles::lookups::Counted {
                instructions: *instructions,
                instructions_in_one: *instructions_in_one,
                lines: *lines,
            };
            profiles::lookups::profile(
                &script()?,
                &profiles::windows::read(windows)?,
                &Report::load(report)?.rows,
                counted,
                (&threads, &machine::caches()),
            )
        }
        Profiles::Shares { windows } => {
            profiles::shares::profile(&script()?, &profiles::windows::read(windows)?)
        }
        Profiles::Wakes { windows, report } => {
            let rows = Report::load(report)?.rows;
            profiles::wakes::profile(&script()?, &profiles::windows::read(windows)?, &rows)
        }
    };
    say(&format!("{}{limit}", profiles::LIMIT));
    say(text.trim_end());
    Ok(())
}

/// Names in it may be of any bytes.
fn script() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
