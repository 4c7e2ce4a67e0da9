//! A target in a process of its own on the first processor, and this thread on the last: this program once more, told to serve.
//!
//! It listens at a port that the kernel chose and says so in a line. For each line that it is given it tells for how many
//! microseconds its cores were busy so far. It ends with standard input.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result};
use fastice::config::Config;
use fastice::control;
use fastice::extent::NoProgress;
use rustix::thread::CpuSet;

use super::work::{Kind, Work};
use super::{NQN, bare};
use crate::server::{both_ends, end, stay_on};

/// What answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Served {
    /// fastice, with a namespace that stores nothing
    Null,
    /// fastice, with a namespace in memory
    Memory,
    /// The bare responder, to reads of 4 KiB
    BareReads,
    /// The bare responder, to writes of 4 KiB
    BareWrites,
}

impl Served {
    /// The name on the command line, and in rows.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Memory => "memory",
            Self::BareReads => "bare-reads",
            Self::BareWrites => "bare-writes",
        }
    }
}

/// Serves until standard input ends.
///
/// # Errors
/// When it cannot listen.
pub fn serve(served: Served) -> Result<()> {
    let (_, [first, _]) = both_ends()?;
    let tell = |address: SocketAddr| -> Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{address}")?;
        Ok(out.flush()?)
    };
    let namespace = match served {
        Served::Null => "null",
        Served::Memory => "memory",
        Served::BareReads | Served::BareWrites => {
            stay_on(first)?;
            let work = Work::small(if served == Served::BareReads { Kind::Read } else { Kind::Write });
            let listener = TcpListener::bind("127.0.0.1:0")?;
            tell(listener.local_addr()?)?;
            // It ends with the process, which ends with standard input.
            std::thread::Builder::new()
                .name("bare".to_owned())
                .spawn(move || bare::answer(&listener, work))?;
            std::io::stdin().read_to_end(&mut Vec::new())?;
            return Ok(());
        }
    };
    let state = tempfile::tempdir()?;
    let text = format!(
        "state_dir = {:?}\ncores = [{first}]\npoll = \"always\"\n[[listener]]\naddress = \"127.0.0.1:0\"\n[[subsystem]]\nnqn = \
         \"{NQN}\"\nallow_any_host = true\n[[subsystem.namespace]]\nnsid = 1\n{namespace} = \"{}MiB\"\n",
        state.path(),
        super::LEN >> 20,
    );
    let running = control::start(Config::parse(&text, "bench")?, &mut NoProgress)?;
    tell(*running.addresses().first().context("it listens nowhere")?)?;
    for line in std::io::stdin().lines() {
        line?;
        let busy_us: u64 = running.cores().iter().map(|core| core.busy_us).sum();
        let mut out = std::io::stdout().lock();
        writeln!(out, "{busy_us}")?;
        out.flush()?;
    }
    Ok(running.stop(control::Running::STOP_PATIENCE)?)
}

/// A target that runs as long as this lives.
#[derive(Debug)]
pub(super) struct TargetProcess {
    child: Child,
    out: BufReader<ChildStdout>,
    pub(super) address: SocketAddr,
    /// The processors of this thread, before.
    allowed: CpuSet,
}

impl TargetProcess {
    pub(super) fn start(served: Served) -> Result<Self> {
        let (allowed, [_, last]) = both_ends()?;
        let program = std::env::current_exe().context("which program this is")?;
        let mut child = Command::new(program)
            .args(["serve-target", served.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the target cannot be started")?;
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

    /// Microseconds for which its core was busy so far, up to its last tick.
    pub(super) fn busy_us(&mut self) -> Result<f64> {
        let stdin = self.child.stdin.as_mut().context("the target has no standard input")?;
        writeln!(stdin, "busy")?;
        let mut line = String::new();
        self.out.read_line(&mut line)?;
        let busy_us: u32 = line.trim().parse().context("the target does not tell how busy it was")?;
        Ok(busy_us.into())
    }
}

impl Drop for TargetProcess {
    fn drop(&mut self) {
        end(&mut self.child, &self.allowed);
    }
}
