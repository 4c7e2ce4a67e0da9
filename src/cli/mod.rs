//! The command line: one file a subcommand, and what they share.
//!
//! ```text
//!   main --clap--> Cli --> one subcommand's run(&args) -> Outcome
//!                                   |                        |
//!                    out  tables, JSON on stdout     exit  status, error chain and remedy on stderr
//!                    progress  bars on stderr        log   tracing on stderr
//! ```
//!
//! Commands take arguments, call the library, and print. What they print with `--json` is an interface, described
//! in `docs/USER.md`: fields are added, never renamed. They decide nothing about files, maps or NVMe.

pub mod bench;
pub mod completions;
pub mod demo;
pub mod device;
pub mod discover;
pub mod doctor;
pub mod exit;
pub mod explain;
mod files;
pub mod log;
pub mod man;
mod many;
pub mod map;
pub mod out;
mod peer;
pub mod pin;
pub mod pins;
pub mod progress;
pub mod read;
pub mod serve;
mod served;
mod service;
pub mod status;
mod sys;
pub mod top;
pub mod trace;
pub mod unpin;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use exit::{Exit, Failure, Outcome};

use crate::config::{DEFAULT_STATE_DIR, LogFormat, LogLevel};

/// Serves pinned extents of XFS and ext4 files to remote hosts over NVMe-oF
#[derive(Clone, Debug, Parser)]
#[command(name = "fastice", version, about, propagate_version = true, after_help = exit::help_table())]
pub struct Cli {
    /// How much to log, and how.
    #[command(flatten)]
    pub logs: log::LogArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Clone, Debug, Subcommand)]
#[expect(missing_docs, reason = "the documentation of each is that of its arguments, which clap shows")]
pub enum Command {
    Demo(demo::DemoArgs),
    Pin(pin::PinArgs),
    Unpin(unpin::UnpinArgs),
    Pins(pins::PinsArgs),
    Map(map::MapArgs),
    Read(read::ReadArgs),
    Serve(serve::ServeArgs),
    Status(status::StatusArgs),
    Top(top::TopArgs),
    Trace(trace::TraceArgs),
    Device(device::DeviceArgs),
    Discover(discover::DiscoverArgs),
    Bench(Box<bench::BenchArgs>),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
    #[command(name = explain::PROBE, hide = true)]
    Probe(explain::ProbeArgs),
}

/// `--state-dir`, for the commands that read or write records of pins and devices.
#[derive(Clone, Debug, clap::Args)]
pub struct StateDirArg {
    /// Where records of pins and taken controllers are kept
    #[arg(long, value_name = "DIR", env = "FASTICE_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
}

impl Command {
    /// Runs it. Logs are started here, but for `serve`, which first asks its configuration how.
    fn run(&self, logs: &log::LogArgs) -> Outcome {
        if !matches!(self, Self::Serve(_)) {
            log::start(logs, LogLevel::Warn, LogFormat::Human)
                .map_err(|error| Failure::new(Exit::Usage, error))?;
        }
        match self {
            Self::Demo(args) => demo::run(args),
            Self::Serve(args) => serve::run(args, logs),
            Self::Status(args) => status::run(args),
            Self::Top(args) => top::run(args),
            Self::Trace(args) => trace::run(args),
            Self::Device(args) => device::run(args),
            Self::Discover(args) => discover::run(args),
            Self::Bench(args) => bench::run(args),
            Self::Pin(args) => pin::run(args),
            Self::Unpin(args) => unpin::run(args),
            Self::Pins(args) => pins::run(args),
            Self::Map(args) => map::run(args),
            Self::Read(args) => read::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::Completions(args) => completions::run(args),
            Self::Man(args) => man::run(args),
            Self::Probe(args) => explain::run_probe(args),
        }
    }

    /// Whether errors are to be JSON too.
    fn wants_json(&self) -> bool {
        match self {
            Self::Pin(args) => args.json.json,
            Self::Unpin(args) => args.json.json,
            Self::Pins(args) => args.json.json,
            Self::Status(args) => args.json.json,
            Self::Map(args) => args.wants_json(),
            Self::Doctor(args) => args.json.json,
            Self::Device(args) => args.wants_json(),
            Self::Discover(args) => args.json.json,
            Self::Bench(args) => args.json.json,
            Self::Demo(_)
            | Self::Read(_)
            | Self::Serve(_)
            | Self::Top(_)
            | Self::Trace(_)
            | Self::Completions(_)
            | Self::Man(_)
            | Self::Probe(_) => false,
        }
    }
}

/// The whole program: reads the command line, runs the command, tells what failed.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command.run(&cli.logs) {
        Ok(exit) => exit.into(),
        Err(failure) if failure.is_broken_pipe() => Exit::Ok.into(),
        Err(failure) => {
            let text =
                if cli.command.wants_json() { failure.to_json().to_string() } else { failure.to_string() };
            // Nothing is left to do when standard error is closed.
            let _ = writeln!(std::io::stderr(), "{text}");
            failure.exit.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
