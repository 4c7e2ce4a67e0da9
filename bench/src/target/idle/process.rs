//! A target as it is installed, not as it is raced: it sleeps when it has nothing to do, unless it is told to poll always.
//!
//! This program once more, in a process of its own, as in [`super::super::process`]: it says where it listens, and for each line
//! that it is given, for how many microseconds its cores were busy and polled in vain so far. It ends with standard input.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use fastice::config::Config;
use fastice::control;
use fastice::extent::NoProgress;
use rustix::thread::CpuSet;

use super::super::{LEN, NQN};
use super::memory::Resident;
use crate::server::{both_ends, end, stay_on};
use crate::threads::cpu_time_of;

/// What a core does without work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Poll {
    /// What the configuration does by default: polls for a moment, then sleeps
    Adaptive,
    /// The same, but it sleeps between any two commands (`linger_us = 0`)
    Asleep,
    /// Polls always
    Always,
}

/// What is to be served, and how.
#[derive(Args, Clone, Copy, Debug)]
pub struct Wanted {
    /// What a core does without work
    #[arg(long)]
    pub poll: Poll,
    /// Namespaces that store nothing
    #[arg(long)]
    pub namespaces: u32,
    /// Cores: the first is the first processor, the second the last
    #[arg(long)]
    pub cores: usize,
    /// The port to listen at; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    pub port: u16,
}

impl Wanted {
    /// One namespace on one core.
    pub(super) const fn plain(poll: Poll) -> Self {
        Self { poll, namespaces: 1, cores: 1, port: 0 }
    }

    /// The configuration, on these processors.
    fn configuration(self, state_dir: &std::path::Path, cores: &[usize]) -> String {
        let poll = match self.poll {
            Poll::Adaptive => "",
            Poll::Asleep => "linger_us = 0\n",
            Poll::Always => "poll = \"always\"\n",
        };
        let mut text = format!(
            "state_dir = {state_dir:?}\ncores = {cores:?}\n{poll}[[listener]]\naddress = \"{}\"\n[[subsystem]]\nnqn = \
             \"{NQN}\"\nallow_any_host = true\n",
            SocketAddr::from((Ipv4Addr::LOCALHOST, self.port)),
        );
        for nsid in 1..=self.namespaces {
            // A string takes everything.
            let _ = write!(text, "[[subsystem.namespace]]\nnsid = {nsid}\nnull = \"{}MiB\"\n", LEN >> 20);
        }
        text
    }
}

/// Serves until standard input ends.
///
/// # Errors
/// When it cannot listen.
pub fn serve(wanted: Wanted) -> Result<()> {
    let (_, [first, last]) = both_ends()?;
    let mut cores = vec![first];
    if wanted.cores > 1 {
        ensure!(
            wanted.cores == 2 && first != last,
            "this machine has no {} cores for a target",
            wanted.cores
        );
        cores.push(last);
    }
    let state = tempfile::tempdir()?;
    let text = wanted.configuration(state.path(), &cores);
    let running = control::start(Config::parse(&text, "bench")?, &mut NoProgress)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", running.addresses().first().context("it listens nowhere")?)?;
    out.flush()?;
    for line in std::io::stdin().lines() {
        line?;
        let cores = running.cores();
        let busy_us: u64 = cores.iter().map(|core| core.busy_us).sum();
        let polling_us: u64 = cores.iter().map(|core| core.polling_us).sum();
        writeln!(out, "{busy_us} {polling_us}")?;
        out.flush()?;
    }
    Ok(running.stop(control::Running::STOP_PATIENCE)?)
}

/// What a target has used so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Used {
    /// Processor time of all its threads.
    pub(super) processor: Duration,
    /// Microseconds of its cores with work, and of those in which they looked for it in vain.
    busy_us: f64,
    polling_us: f64,
}

impl Used {
    /// Microseconds of processor time a command since `before`, without what was polled in vain.
    pub(super) fn us_a_command(&self, before: &Self, commands: u64) -> f64 {
        let processor_us = (self.processor.saturating_sub(before.processor)).as_secs_f64() * 1e6;
        let (busy, polling) = (self.busy_us - before.busy_us, self.polling_us - before.polling_us);
        processor_us * busy / (busy + polling).max(1.0) / commands as f64
    }
}

/// A target that runs as long as this lives; the thread that started it is on the last processor meanwhile.
#[derive(Debug)]
pub(super) struct IdleTarget {
    child: Child,
    out: BufReader<ChildStdout>,
    pub(super) address: SocketAddr,
    /// The processors of this thread, before.
    allowed: CpuSet,
}

impl IdleTarget {
    /// Starts it, and waits until it listens.
    pub(super) fn start(wanted: Wanted) -> Result<Self> {
        let mut target = Self::spawn(wanted)?;
        target.await_listening()?;
        Ok(target)
    }

    /// Starts it, and does not wait. Where it listens is known when it was told the port.
    pub(super) fn spawn(wanted: Wanted) -> Result<Self> {
        let (allowed, [_, last]) = both_ends()?;
        let program = std::env::current_exe().context("which program this is")?;
        let poll = wanted.poll.to_possible_value().context("a way to poll without a name")?;
        let mut child = Command::new(program)
            .args(["serve-idle", "--poll", poll.get_name(), "--namespaces", &wanted.namespaces.to_string()])
            .args(["--cores", &wanted.cores.to_string(), "--port", &wanted.port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("the target cannot be started")?;
        let out = BufReader::new(child.stdout.take().context("the target has no standard output")?);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, wanted.port));
        let target = Self { child, out, address, allowed };
        stay_on(last)?;
        Ok(target)
    }

    /// Reads where it listens.
    pub(super) fn await_listening(&mut self) -> Result<()> {
        self.address = self.line()?.parse().context("the target ended before it listened")?;
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.out.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// What it has used so far; of its cores as of their last tick.
    pub(super) fn used(&mut self) -> Result<Used> {
        let stdin = self.child.stdin.as_mut().context("the target has no standard input")?;
        writeln!(stdin, "used")?;
        let line = self.line()?;
        let (busy, polling) = line.split_once(' ').context("the target does not tell what it used")?;
        Ok(Used { processor: self.processor_time()?, busy_us: busy.parse()?, polling_us: polling.parse()? })
    }

    /// The processor time of all its threads so far.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        cpu_time_of(&self.child.id().to_string(), &[""])
    }

    /// What it has in memory.
    pub(super) fn resident(&self) -> Result<Resident> {
        Resident::of(self.child.id())
    }
}

impl Drop for IdleTarget {
    fn drop(&mut self) {
        end(&mut self.child, &self.allowed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_is_a_configuration() {
        let wanted = Wanted { poll: Poll::Always, namespaces: 1000, cores: 1, port: 0 };
        let text = wanted.configuration(std::path::Path::new("/tmp"), &[0]);
        let config = Config::parse(&text, "test").unwrap();
        assert_eq!(config.poll, fastice::config::PollMode::Always);
        assert_eq!(config.subsystems[0].namespaces.len(), 1000);
        let adaptive = Wanted::plain(Poll::Adaptive).configuration(std::path::Path::new("/tmp"), &[0]);
        let default = Config::parse(&adaptive, "test").unwrap().poll;
        assert_ne!(default, fastice::config::PollMode::Always);
        let asleep = Wanted::plain(Poll::Asleep).configuration(std::path::Path::new("/tmp"), &[0]);
        let fastice::config::PollMode::Adaptive { linger, idle_after } =
            Config::parse(&asleep, "test").unwrap().poll
        else {
            panic!("{asleep}")
        };
        assert!(linger.is_zero(), "{asleep}");
        assert_ne!(default, fastice::config::PollMode::Adaptive { linger, idle_after });
    }

    #[test]
    fn polling_in_vain_is_no_cost_of_a_command() {
        let used =
            |ms, busy_us, polling_us| Used { processor: Duration::from_millis(ms), busy_us, polling_us };
        let us = used(300, 100_000.0, 100_000.0).us_a_command(&used(100, 0.0, 0.0), 1000);
        assert!((us - 100.0).abs() < 1e-9, "{us}");
    }
}
