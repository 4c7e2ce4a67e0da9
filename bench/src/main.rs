//! `fastice-bench`: see bench/README.md.
#![deny(unsafe_code)]

mod cli;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use fastice_bench::ending::Told;
use fastice_bench::{count, guard, guest, scale, server, target};

use cli::counted::Instructions;
use cli::driver::Driver;
use cli::guest::Guest;
use cli::profiles::Profiles;
use cli::say;
use cli::scale::Scale;
use cli::target::{Idle, Target};

/// Sets fastice beside its peers
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The NVMe driver: cycles a read, reads a second, latency
    Driver(Driver),
    /// A fixed number of reads on the replayed device, for a tool that counts instructions
    Count {
        /// Queue depth
        #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1023))]
        depth: u16,
        /// Reads
        #[arg(long, default_value_t = 10_000)]
        reads: usize,
        /// How many are complete at a time
        #[arg(long, default_value_t = count::BATCH)]
        batch: usize,
    },
    /// A fixed number of I/Os of the target, for a tool that counts instructions
    CountTarget {
        /// What is served
        served: guard::served::Served,
        /// What the host does
        work: guard::served::Direction,
        /// Queue depth
        #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=128))]
        depth: u16,
        /// How often so many I/Os
        #[arg(long, default_value_t = 100)]
        rounds: usize,
    },
    /// A fixed number of lookups in a map, for a tool that counts instructions
    CountLookups {
        /// Extents of the map
        #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
        extents: u64,
        /// Lookups
        #[arg(long, default_value_t = 100_000, value_name = "N")]
        lookups: u64,
    },
    /// Counts the instructions and system calls of the hot path, and fails when they grew by more than 3 %
    Guard {
        /// Record what is counted now, on purpose
        #[arg(long)]
        accept: bool,
        /// What was recorded
        #[arg(long, default_value = "bench/instructions.json", value_name = "FILE")]
        figures: PathBuf,
    },
    /// A million extents in one file, a thousand pinned files: time, memory, lookups, watching (root)
    Scale(Scale),
    /// The target over TCP on loopback, beside each peer that is here
    Target(Target),
    /// A target until standard input ends; started by `target`
    #[command(hide = true)]
    ServeTarget {
        /// What answers
        served: target::Served,
        /// The file, where one is served, or the disk under it
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// The target beside the kernel's, with the kernel's initiator and fio; for a guest such as that of bench/guest.sh (root)
    Guest(Guest),
    /// A target until standard input ends; started by `guest`
    #[command(hide = true)]
    ServeConfiguration {
        /// What it serves
        file: PathBuf,
    },
    /// Names a peer that is not here, and why, in the report
    Absent {
        /// What rows call the peer
        peer: String,
        /// Why it is absent
        why: String,
        /// Where the report is
        #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
        report: PathBuf,
    },
    /// What a target costs that has nothing or little to do, and what it loses by going to sleep
    Idle(Idle),
    /// Start, memory, a thousand connections and namespaces, and how costs grow
    Growth(Idle),
    /// A target that sleeps until standard input ends; started by `idle` and `growth`
    #[command(hide = true)]
    ServeIdle(target::idle::Wanted),
    /// Instructions a read of the driver, counted by valgrind
    Instructions(Instructions),
    /// Puts the rows of a report that was made elsewhere, such as in a guest, into another
    Merge {
        /// The report made elsewhere; `-` is standard input
        from: PathBuf,
        /// Where the rows go, into what is there
        #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
        report: PathBuf,
    },
    /// The model behind vfio-user until standard input ends; started by `driver`
    #[command(hide = true)]
    ServeModel {
        /// Where to listen
        #[arg(long)]
        socket: PathBuf,
    },
    /// What bench/profile.sh is made of
    #[command(subcommand)]
    Profiles(Profiles),
    /// Write the report for people, with plots, beside report.json
    Publish {
        /// Where the report is
        #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
        report: PathBuf,
    },
    /// Write what is demanded, and what it came to, into the README, between its two marks
    Readme {
        /// Where the report is
        #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
        report: PathBuf,
        /// What to write into
        #[arg(long, default_value = "README.md", value_name = "FILE")]
        readme: PathBuf,
    },
    /// The report as a table
    Show {
        /// Where the report is
        #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
        report: PathBuf,
    },
}

/// Counts, for the rows of memory.
#[global_allocator]
static ALLOCATOR: scale::Counting = scale::Counting;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Driver(options) => cli::driver::run(&options),
        Command::Count { depth, reads, batch } => {
            count::run(depth, reads, batch).map(|()| say(&count::told(0)))
        }
        Command::CountTarget { served, work, depth, rounds } => {
            guard::served::run(served, work, depth, rounds).map(|done| say(&count::told(done.host_calls)))
        }
        Command::CountLookups { extents, lookups } => {
            scale::lookup::count(extents, lookups).map(|()| say(&count::told(0)))
        }
        Command::Guard { accept: false, figures } => cli::counted::check(&figures),
        Command::Guard { accept: true, figures } => cli::counted::accept(&figures),
        Command::Scale(options) => cli::scale::run(&options),
        Command::Target(options) => cli::target::run(&options),
        Command::Guest(options) => cli::guest::run(&options),
        Command::ServeConfiguration { file } => guest::serve(&file),
        Command::Absent { peer, why, report } => cli::report::absent(&peer, &why, &report),
        Command::ServeTarget { served, file } => target::serve(served, file.as_deref()),
        Command::Idle(options) => cli::target::idle(&options, target::idle::Plan::run),
        Command::Growth(options) => cli::target::idle(&options, target::idle::Plan::growth),
        Command::ServeIdle(wanted) => target::idle::serve(wanted),
        Command::Instructions(options) => cli::counted::instructions(&options),
        Command::Merge { from, report } => cli::report::merge(&from, &report),
        Command::ServeModel { socket } => server::serve(&socket),
        Command::Show { report } => cli::report::show(&report),
        Command::Readme { report, readme } => cli::report::update(&report, &readme),
        Command::Publish { report } => cli::report::publish(&report),
        Command::Profiles(what) => cli::profiles::run(&what),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr().lock(), "fastice-bench: {error:#}");
            if let Some(told) = error.downcast_ref::<Told>() {
                told.die();
            }
            ExitCode::FAILURE
        }
    }
}
