//! `fastice-bench`: see bench/README.md.
#![deny(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use fastice_bench::chosen::Chosen;
use fastice_bench::guard::figures::Verdict;
use fastice_bench::report::{Report, Row};
use fastice_bench::suite::{KernelPeer, Plan};
use fastice_bench::{count, guard, guest, machine, profiles, publish as published, scale, server, target};

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
    /// The target over TCP on loopback, beside a bare responder: the ceiling of the kernel's TCP
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

#[derive(Debug, Subcommand)]
enum Profiles {
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
        #[arg(long)]
        at_depth_1: bool,
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

#[derive(Debug, Args)]
struct Driver {
    /// What to drive: replay (costs nothing: the driver alone), model (in this process), vfio-user (the model in another
    /// process), vfio-user:SOCKET, vfio:PCI-ADDRESS. The last two are only read
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [Chosen::Replay, Chosen::Model, Chosen::VfioUser],
        value_name = "DEVICE",
    )]
    device: Vec<Chosen>,
    /// The namespace to read, of a device outside
    #[arg(long, default_value_t = 1, value_name = "NSID", value_parser = clap::value_parser!(u32).range(1..=0xFFFF_FFFE))]
    nsid: u32,
    /// Queue depths
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 128], value_name = "N,N")]
    depths: Vec<u16>,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 7, value_name = "N")]
    rounds: usize,
    /// Milliseconds of a round
    #[arg(long, default_value_t = 100, value_name = "MS")]
    round_ms: u64,
    /// The kernel's block device on the namespace of the device outside, to compare with
    #[arg(long, value_name = "DEVICE")]
    kernel: Option<PathBuf>,
    /// Take the kernel's completions by interrupt, where its driver has no poll queues
    #[arg(long, requires = "kernel")]
    kernel_interrupts: bool,
    /// This processor is emulated: do not judge what the driver adds to a latency
    #[arg(long)]
    emulated: bool,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

#[derive(Debug, Args)]
struct Scale {
    /// Extents of the one file
    #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    extents: u64,
    /// Files pinned at once
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    files: u64,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// How long to wait for a machine at rest before each part; 0 measures at once
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    rest: u64,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

#[derive(Debug, Args)]
struct Target {
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
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// Milliseconds of a round
    #[arg(long, default_value_t = 500, value_name = "MS")]
    round_ms: u64,
    /// How much longer all may take together where rounds are disturbed and tried again
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    spare: u64,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

#[derive(Debug, Args)]
struct Guest {
    /// A file to serve, on the disk in one piece
    #[arg(long)]
    file: PathBuf,
    /// Where it begins on the disk, in bytes
    #[arg(long, value_name = "BYTES")]
    offset: u64,
    /// The kernel's disk of the namespace
    #[arg(long, value_name = "DEVICE")]
    disk: PathBuf,
    /// Another controller of the same namespace, bound to vfio-pci
    #[arg(long, value_name = "ADDRESS")]
    pci: String,
    /// The processor of our one core
    #[arg(long, default_value_t = 0, value_name = "CPU")]
    core: usize,
    /// The processor of fio
    #[arg(long, default_value_t = 1, value_name = "CPU")]
    fio_cpu: usize,
    /// I/O queues of the initiator; the kernel has the first one on processor 0
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    io_queues: u16,
    /// Our core polls always, instead of while there is work
    #[arg(long)]
    poll_always: bool,
    /// Only cases whose name holds this: nvme, uring or null
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 7, value_name = "N")]
    rounds: usize,
    /// Milliseconds of a round
    #[arg(long, default_value_t = 2000, value_name = "MS")]
    round_ms: u64,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

#[derive(Debug, Args)]
struct Idle {
    /// Only parts whose name holds this, such as light
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// Milliseconds of a round of full load
    #[arg(long, default_value_t = 1000, value_name = "MS")]
    round_ms: u64,
    /// Milliseconds of a round without load, and of light load
    #[arg(long, default_value_t = 10_000, value_name = "MS")]
    idle_ms: u64,
    /// Most seconds beyond that for pairs of rounds that are not undisturbed
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    spare: u64,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

#[derive(Debug, Args)]
struct Instructions {
    /// Queue depths
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 128], value_name = "N,N")]
    depths: Vec<u16>,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

/// Counts, for the rows of memory.
#[global_allocator]
static ALLOCATOR: scale::Counting = scale::Counting;

fn say(line: &str) {
    // A reader that went away is no reason to stop.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Driver(options) => driver(&options),
        Command::Count { depth, reads, batch } => {
            count::run(depth, reads, batch).map(|()| say(&count::told(0)))
        }
        Command::CountTarget { served, work, depth, rounds } => {
            guard::served::run(served, work, depth, rounds).map(|done| say(&count::told(done.host_calls)))
        }
        Command::Guard { accept: false, figures } => check(&figures),
        Command::Guard { accept: true, figures } => accept(&figures),
        Command::Scale(options) => at_scale(&options),
        Command::Target(options) => target_over_tcp(&options),
        Command::Guest(options) => beside_nvmet(&options),
        Command::ServeConfiguration { file } => guest::serve(&file),
        Command::Absent { peer, why, report } => absent(&peer, &why, &report),
        Command::ServeTarget { served, file } => target::serve(served, file.as_deref()),
        Command::Idle(options) => idle(&options, target::idle::Plan::run),
        Command::Growth(options) => idle(&options, target::idle::Plan::growth),
        Command::ServeIdle(wanted) => target::idle::serve(wanted),
        Command::Instructions(options) => instructions(&options),
        Command::Merge { from, report } => merge(&from, &report),
        Command::ServeModel { socket } => server::serve(&socket),
        Command::Show { report } => show(&report),
        Command::Readme { report, readme } => update(&report, &readme),
        Command::Publish { report } => publish(&report),
        Command::Profiles(what) => profile(&what),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr().lock(), "fastice-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn driver(options: &Driver) -> Result<()> {
    let plan = Plan {
        depths: options.depths.clone(),
        rounds: options.rounds,
        time: Duration::from_millis(options.round_ms),
        emulated: options.emulated,
        machine: machine::describe(),
        tell: say,
    };
    plan.check()?;
    ensure!(
        options.kernel.is_none() || options.device.iter().any(Chosen::is_outside),
        "the kernel's driver can be compared with on a device outside only"
    );
    let kernel = options.kernel.as_ref();
    let kernel = kernel.map(|path| KernelPeer { path: path.clone(), polled: !options.kernel_interrupts });
    add(&options.report, |rows| {
        for device in &options.device {
            match device {
                Chosen::Replay => plan.replay(rows)?,
                Chosen::Model => plan.model(rows)?,
                outside => {
                    let mut opened = outside.open_outside(options.nsid)?;
                    plan.outside(rows, &mut opened.device, kernel.as_ref())?;
                }
            }
        }
        Ok(())
    })
}

/// Measures, and puts the rows into the report. A report that cannot be read is told of before hours of work.
fn add(path: &Path, measure: impl FnOnce(&mut Vec<Row>) -> Result<()>) -> Result<()> {
    let mut report = Report::load(path)?;
    let mut rows = Vec::new();
    measure(&mut rows)?;
    report.merge(rows);
    Ok(report.save(path)?)
}

fn at_scale(options: &Scale) -> Result<()> {
    let Scale { extents, files, rounds, rest, .. } = *options;
    let plan = scale::Plan {
        extents,
        files,
        rounds,
        rest: Duration::from_secs(rest),
        machine: machine::describe(),
        tell: say,
    };
    add(&options.report, |rows| plan.run(rows))
}

fn target_over_tcp(options: &Target) -> Result<()> {
    let mut report = Report::load(&options.report)?;
    let plan = target::Plan {
        depths: options.depths.clone(),
        only: options.only.clone(),
        rounds: options.rounds,
        time: Duration::from_millis(options.round_ms),
        spare: Duration::from_secs(options.spare),
        machine: machine::describe(),
        tell: say,
    };
    let (mut rows, mut absent) = (Vec::new(), Vec::new());
    plan.run(&mut rows, &mut absent)?;
    if options.only.is_none() {
        // Rows that are not measured any more are of another time, and would be taken for those of this one.
        report.rows.retain(|row| !target::is_made_here(&row.name));
    }
    report.merge(rows);
    // Of a peer in the guest this run knows nothing.
    report.absent.retain(|line| line.starts_with(guest::PEER));
    report.absent.extend(absent);
    Ok(report.save(&options.report)?)
}

fn beside_nvmet(options: &Guest) -> Result<()> {
    let plan = guest::Plan {
        file: options.file.clone(),
        offset: options.offset,
        disk: options.disk.clone(),
        pci: options.pci.clone(),
        core: options.core,
        fio_cpu: options.fio_cpu,
        io_queues: options.io_queues,
        is_polling: options.poll_always,
        only: options.only.clone(),
        rounds: options.rounds,
        time: Duration::from_millis(options.round_ms),
        machine: machine::describe(),
        tell: say,
    };
    add(&options.report, |rows| plan.run(rows))
}

fn absent(peer: &str, why: &str, path: &Path) -> Result<()> {
    let mut report = Report::load(path)?;
    report.name_absent(peer, why);
    Ok(report.save(path)?)
}

fn idle(options: &Idle, run: fn(&target::idle::Plan, &mut Vec<Row>) -> Result<()>) -> Result<()> {
    let plan = target::idle::Plan {
        only: options.only.clone(),
        rounds: options.rounds,
        idle: Duration::from_millis(options.idle_ms),
        time: Duration::from_millis(options.round_ms),
        spare: Duration::from_secs(options.spare),
        machine: machine::describe(),
        tell: say,
    };
    add(&options.report, |rows| run(&plan, rows))
}

fn instructions(options: &Instructions) -> Result<()> {
    let program = std::env::current_exe().context("which program this is")?;
    add(&options.report, |rows| {
        for &depth in &options.depths {
            let row = count::row(&program, depth, &machine::describe())?;
            say(&row.to_string());
            rows.push(row);
        }
        Ok(())
    })
}

/// The profile by which programs are counted, for its figures do not depend on code elsewhere; and that of this program.
const COUNTED: &str = "counted";
const PROFILE: &str = env!("FASTICE_BENCH_PROFILE");

/// What to do when figures are no longer right.
const ACCEPT: &str =
    "`make accept-instructions` records the new figures; commit them with the change that makes them so";

fn check(figures: &Path) -> Result<()> {
    ensure!(
        PROFILE == COUNTED,
        "a build of the profile {PROFILE} is not what is counted: build with --profile {COUNTED}"
    );
    let program = std::env::current_exe().context("which program this is")?;
    let compared = guard::check(&program, figures)?;
    say(compared.to_string().trim_end());
    match compared.verdict() {
        Verdict::Holds if compared.has_shrunk() => say(&format!("less than was recorded: {ACCEPT}")),
        Verdict::Holds => say("the hot path costs what was recorded"),
        Verdict::Broken => bail!(
            "the hot path costs more than was recorded in {}, or other things are counted. If that is meant, {ACCEPT}",
            figures.display()
        ),
        // A test that cannot be done here: see .ci/test.
        Verdict::CannotTell => say(&format!(
            "SKIPPED: hot path: more than was recorded, but this is another build ({}). {ACCEPT}",
            compared.differences.join("; ")
        )),
    }
    Ok(())
}

fn accept(figures: &Path) -> Result<()> {
    ensure!(
        PROFILE == COUNTED,
        "a build of the profile {PROFILE} is not what is counted: build with --profile {COUNTED}"
    );
    let program = std::env::current_exe().context("which program this is")?;
    let compared = guard::accept(&program, figures)?;
    say(compared.to_string().trim_end());
    say(&format!("recorded in {}", figures.display()));
    Ok(())
}

fn merge(from: &Path, into: &Path) -> Result<()> {
    let rows = if from == Path::new("-") {
        Report::read(std::io::stdin().lock(), from)?.rows
    } else {
        ensure!(from.exists(), "{} does not exist", from.display());
        Report::load(from)?.rows
    };
    ensure!(!rows.is_empty(), "{} has no rows", from.display());
    let mut report = Report::load(into)?;
    report.merge(rows);
    Ok(report.save(into)?)
}

/// Prints what a profile is made of.
fn profile(what: &Profiles) -> Result<()> {
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
        Profiles::Samples { windows, processor, at_depth_1 } => {
            let windows = profiles::windows::read(windows)?;
            profiles::samples::profile(&script()?, &windows, *processor, *at_depth_1)
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

/// Writes what is told of the report beside it.
fn publish(path: &Path) -> Result<()> {
    ensure!(path.exists(), "{} does not exist", path.display());
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    published::publish(&Report::load(path)?, directory.unwrap_or(Path::new(".")))
}

/// Writes the README's part that is made of the report.
fn update(report: &Path, readme: &Path) -> Result<()> {
    ensure!(report.exists(), "{} does not exist", report.display());
    published::readme::update(&Report::load(report)?, readme)
}

fn show(path: &Path) -> Result<()> {
    for row in Report::load(path)?.rows {
        say(&row.to_string());
    }
    Ok(())
}
