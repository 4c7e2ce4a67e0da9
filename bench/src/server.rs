//! The model in a process of its own, behind vfio-user: this program once more, told to serve.
//!
//! Each of both has a processor of its own, for each spins: on one processor they would wait for each other's time to
//! run out, and that is what would be measured.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nvme_model::vfio_user::{Server, ServerOptions};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::device;

/// What the server says once it listens.
const LISTENING: &[u8] = b"listening\n";
/// How long the server may take to listen.
const LIMIT: Duration = Duration::from_secs(10);

/// The first and the last processor that this thread may use.
pub(crate) fn both_ends() -> Result<(CpuSet, [usize; 2])> {
    let allowed = sched_getaffinity(None)?;
    let mut usable = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
    let first = usable.next().context("there is no processor")?;
    Ok((allowed, [first, usable.next_back().unwrap_or(first)]))
}

pub(crate) fn stay_on(cpu: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu);
    Ok(sched_setaffinity(None, &only)?)
}

/// Ends a child that serves until its standard input ends, and lets this thread have its processors again.
pub(crate) fn end(child: &mut Child, allowed: &CpuSet) {
    // What could be set before can be set again; if not, this thread goes on where it is.
    let _ = sched_setaffinity(None, allowed);
    drop(child.stdin.take());
    let begun = Instant::now();
    while matches!(child.try_wait(), Ok(None)) && begun.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(5));
    }
    // A child that is gone already is as good.
    let _ = child.kill();
    let _ = child.wait();
}

/// Serves the model at a socket until standard input ends.
///
/// # Errors
/// When it cannot listen.
pub fn serve(socket: &Path) -> Result<()> {
    let (_, [_, last]) = both_ends()?;
    stay_on(last)?;
    let server = Server::bind(socket, device::memory_model()?, ServerOptions::default());
    let server = server.with_context(|| format!("{} cannot be listened at", socket.display()))?;
    let mut out = std::io::stdout().lock();
    out.write_all(LISTENING)?;
    out.flush()?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    // Whoever started it holds the other end, and takes it along, however it ends.
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        stopped.store(true, Ordering::Relaxed);
    })?;
    Ok(server.run(&stop)?)
}

/// A server that runs as long as this lives, and keeps the thread that started it on another processor.
#[derive(Debug)]
pub struct ServerProcess {
    child: Child,
    directory: PathBuf,
    /// The processors of this thread, before.
    allowed: CpuSet,
}

impl ServerProcess {
    /// Starts `program`, this one, as a server.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn start(program: &Path) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("fastice-bench.{}", std::process::id()));
        std::fs::create_dir(&directory).with_context(|| format!("{}", directory.display()))?;
        let socket = directory.join("model.sock");
        let (allowed, [first, _]) = both_ends()?;
        let child = Command::new(program)
            .arg("serve-model")
            .arg("--socket")
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the model cannot be started")?;
        let mut server = Self { child, directory, allowed };
        stay_on(first)?;
        let mut out = server.child.stdout.take().context("the model has no standard output")?;
        let timeout = Timespec::try_from(LIMIT)?;
        let said = poll(&mut [PollFd::new(&out, PollFlags::IN)], Some(&timeout))?;
        ensure!(said > 0, "the model does not listen");
        let mut line = [0; LISTENING.len()];
        out.read_exact(&mut line).context("the model ended before it listened")?;
        Ok(server)
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("model.sock")
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        end(&mut self.child, &self.allowed);
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            let _ = writeln!(std::io::stderr().lock(), "{}: {error}", self.directory.display());
        }
    }
}
