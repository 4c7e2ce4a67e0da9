//! A target in a process of its own on the first processor, and this thread on the last: this program once more, told to serve.
//!
//! It listens at a port that the kernel chose and says so in a line. For each line that it is given it answers with one: to
//! [`BUSY`], for how many microseconds its cores were busy so far; to [`STAGES`], how long its commands took. It ends with
//! standard input.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result};
use fastice::config::Config;
use fastice::control::{self, LatencyStatus};
use fastice::extent::NoProgress;
use fastice::tcp::congestion::Congestion;
use rustix::thread::CpuSet;

use super::file::ServedFile;
use super::front::{self, Together};
use super::whole::{OnNull, Whole};
use super::work::{Kind, Work};
use super::{NQN, bare};
use crate::server::{both_ends, end, stay_on};

const BUSY: &str = "busy";
const STAGES: &str = "stages";

/// What answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Served {
    /// fastice, with a namespace that stores nothing
    Null,
    /// The same, and no socket is ever left alone (`gather_us = 0`)
    #[value(name = "null-ungathered")]
    Ungathered,
    /// fastice, with a namespace in memory
    Memory,
    /// fastice, with a file, pinned
    File,
    /// fastice, with the disk under a file, as it is
    Disk,
    /// fastice, with a frozen map of one extent on what stores nothing, and with the latter without it
    #[value(name = "map-1-extent")]
    MapOfOne,
    /// The same, of 10,000 extents
    #[value(name = "map-10000-extents")]
    MapOfMany,
    /// fastice, with an image by our own driver and a controller in software
    Model,
    /// The bare responder, to reads of 4 KiB
    BareReads,
    /// The bare responder, to writes of 4 KiB
    BareWrites,
    /// The bare responder, to reads of 4 KiB, which sleeps until they come
    BareSleeps,
    /// The bare responder to a host that joins by the book; each response behind its data
    #[value(name = "front-one")]
    FrontOne,
    /// The same, all responses of a batch behind all its data
    #[value(name = "front-all")]
    FrontAll,
    /// As the first of both, asleep until commands come
    #[value(name = "front-sleeps")]
    FrontSleeps,
}

impl Served {
    /// The name on the command line, and in rows.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Ungathered => "null-ungathered",
            Self::Memory => "memory",
            Self::File => "file",
            Self::Disk => "disk",
            Self::MapOfOne => "map-1-extent",
            Self::MapOfMany => "map-10000-extents",
            Self::Model => "model",
            Self::BareReads => "bare-reads",
            Self::BareWrites => "bare-writes",
            Self::BareSleeps => "bare-sleeps",
            Self::FrontOne => "front-one",
            Self::FrontAll => "front-all",
            Self::FrontSleeps => "front-sleeps",
        }
    }

    /// The extents of a map on the null device.
    const fn extents(self) -> Option<u64> {
        match self {
            Self::MapOfOne => Some(1),
            Self::MapOfMany => Some(OnNull::EXTENTS),
            _ => None,
        }
    }
}

/// Of a namespace, what is in it: a line of a configuration.
pub(super) fn namespace_of(served: Served) -> Option<String> {
    let len_mib = super::LEN >> 20;
    match served {
        Served::Null | Served::Ungathered => Some(format!("null = \"{len_mib}MiB\"")),
        Served::Memory => Some(format!("memory = \"{len_mib}MiB\"")),
        _ => None,
    }
}

/// The configuration of one namespace on one core that always polls.
pub(super) fn configuration(namespace: &str, state: &Path, cpu: usize, address: SocketAddr) -> String {
    configuration_of("always", namespace, state, cpu, address)
}

fn configuration_of(poll: &str, namespace: &str, state: &Path, cpu: usize, address: SocketAddr) -> String {
    format!(
        "state_dir = {state:?}\ncores = [{cpu}]\npoll = \"{poll}\"\n[[listener]]\naddress = \"{address}\"\n[[subsystem]]\nnqn = \
         \"{NQN}\"\nallow_any_host = true\n[[subsystem.namespace]]\nnsid = 1\nblock_size = 4096\n{namespace}\n",
    )
}

/// Serves until standard input ends.
///
/// # Errors
/// When it cannot listen, or cannot serve the file.
pub fn serve(served: Served, file: Option<&Path>) -> Result<()> {
    let (_, [first, _]) = both_ends()?;
    let namespace = match served {
        Served::Null | Served::Ungathered | Served::Memory => namespace_of(served),
        Served::File => Some(format!("file = {:?}", file.context("no file is named")?)),
        _ => None,
    };
    if let Some(namespace) = namespace {
        let keys = if served == Served::Ungathered { "gather_us = 0\n" } else { "" };
        return serve_configured(keys, &namespace, first);
    }
    let whole = match served {
        Served::Disk => Whole::start_disk(file.context("no file is named")?, first)?,
        Served::Model => return serve_model(first),
        Served::BareReads => return serve_bare(Kind::Read, false, first),
        Served::BareWrites => return serve_bare(Kind::Write, false, first),
        Served::BareSleeps => return serve_bare(Kind::Read, true, first),
        Served::FrontOne => return serve_front(Together::One, false, first),
        Served::FrontAll => return serve_front(Together::All, false, first),
        Served::FrontSleeps => return serve_front(Together::One, true, first),
        _ => Whole::start_on_null(OnNull::make(served.extents())?, first)?,
    };
    answer_lines(whole.address, || whole.busy_us(), Vec::new)?;
    whole.stop()
}

fn serve_configured(keys: &str, namespace: &str, cpu: usize) -> Result<()> {
    let state = tempfile::tempdir()?;
    let text = configuration(namespace, state.path(), cpu, SocketAddr::from(([127, 0, 0, 1], 0)));
    let text = format!("{keys}{text}");
    let running = control::start(Config::parse(&text, "bench")?, &mut NoProgress)?;
    let address = *running.addresses().first().context("it listens nowhere")?;
    let busy_us = || running.cores().iter().map(|core| core.busy_us).sum();
    answer_lines(address, busy_us, || running.latencies())?;
    Ok(running.stop(control::Running::STOP_PATIENCE)?)
}

fn serve_model(cpu: usize) -> Result<()> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(super::LEN)?;
    let whole = Whole::start_model(image.path(), cpu)?;
    answer_lines(whole.address, || whole.busy_us(), Vec::new)?;
    whole.stop()
}

fn serve_bare(kind: Kind, sleeps: bool, cpu: usize) -> Result<()> {
    serve_thread(cpu, move |listener| bare::answer(listener, Work::small(kind), sleeps))
}

/// Until standard input ends: the thread ends with the process.
fn serve_thread(cpu: usize, answer: impl FnOnce(&TcpListener) -> Result<()> + Send + 'static) -> Result<()> {
    stay_on(cpu)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    // It tells what the kernel gives to fastice, so it takes from it what fastice takes.
    Congestion::choose(None)?.give(&listener)?;
    say(&listener.local_addr()?.to_string())?;
    std::thread::Builder::new().name("bare".to_owned()).spawn(move || {
        if let Err(error) = answer(&listener) {
            // Its parent finds that nobody answers; here is why.
            let _ = writeln!(std::io::stderr().lock(), "the bare responder: {error:#}");
        }
    })?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// The bare responder in front of a target that sleeps until its admin queue is used.
fn serve_front(together: Together, sleeps: bool, cpu: usize) -> Result<()> {
    let namespace = namespace_of(Served::Null).context("no namespace")?;
    let state = tempfile::tempdir()?;
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    // It has the responder's processor, and must not poll on it.
    let text = configuration_of("adaptive", &namespace, state.path(), cpu, anywhere);
    let running = control::start(Config::parse(&text, "bench")?, &mut NoProgress)?;
    let admin = *running.addresses().first().context("it listens nowhere")?;
    serve_thread(cpu, move |listener| front::answer(listener, admin, together, sleeps))?;
    Ok(running.stop(control::Running::STOP_PATIENCE)?)
}

/// Answers until standard input ends.
fn answer_lines(
    address: SocketAddr,
    busy_us: impl Fn() -> u64,
    stages: impl Fn() -> Vec<LatencyStatus>,
) -> Result<()> {
    say(&address.to_string())?;
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            STAGES => say(&serde_json::to_string(&stages())?)?,
            _ => say(&busy_us().to_string())?,
        }
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// A target that runs as long as this lives.
#[derive(Debug)]
pub(crate) struct TargetProcess {
    child: Child,
    out: BufReader<ChildStdout>,
    pub(crate) address: SocketAddr,
    /// The processors of this thread, before.
    allowed: CpuSet,
}

impl TargetProcess {
    pub(crate) fn start(served: Served, file: Option<&ServedFile>) -> Result<Self> {
        let (allowed, [_, last]) = both_ends()?;
        let program: PathBuf = std::env::current_exe().context("which program this is")?;
        let mut command = Command::new(program);
        command.args(["serve-target", served.name()]);
        if let Some(file) = file {
            command.args(["--file", file.path_text()?]);
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).spawn();
        let mut child = child.context("the target cannot be started")?;
        let out = child.stdout.take().context("the target has no standard output")?;
        let (mut out, mut line) = (BufReader::new(out), String::new());
        let read = out.read_line(&mut line);
        let Some(address) = read.ok().and_then(|_| line.trim().parse().ok()) else {
            let _ = child.kill();
            let _ = child.wait();
            anyhow::bail!("the target ended before it listened");
        };
        let process = Self { child, out, address, allowed };
        stay_on(last)?;
        Ok(process)
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn ask(&mut self, question: &str) -> Result<String> {
        let stdin = self.child.stdin.as_mut().context("the target has no standard input")?;
        writeln!(stdin, "{question}")?;
        let mut line = String::new();
        self.out.read_line(&mut line)?;
        Ok(line)
    }

    /// Microseconds for which its core was busy so far, up to its last tick.
    pub(super) fn busy_us(&mut self) -> Result<f64> {
        let line = self.ask(BUSY)?;
        let busy_us: u32 = line.trim().parse().context("the target does not tell how busy it was")?;
        Ok(busy_us.into())
    }

    /// How long its commands took so far.
    pub(super) fn latencies(&mut self) -> Result<Vec<LatencyStatus>> {
        serde_json::from_str(&self.ask(STAGES)?).context("the target does not tell of its stages")
    }
}

impl Drop for TargetProcess {
    fn drop(&mut self) {
        end(&mut self.child, &self.allowed);
    }
}
