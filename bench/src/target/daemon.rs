//! A target that is another program: started on the first processor, its output in a file, ended when it is not needed any more.

use std::env;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::server::{both_ends, stay_on};

/// For each step.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A directory and a port for one that is about to be started.
#[derive(Debug)]
pub(super) struct Place {
    directory: tempfile::TempDir,
    pub(super) address: SocketAddr,
    /// The processors that this thread may use.
    allowed: CpuSet,
    /// The first and the last of them.
    pub(super) processors: [usize; 2],
}

/// One that runs as long as this lives, and keeps the thread that started it on the last processor.
#[derive(Debug)]
pub(super) struct Daemon {
    child: Child,
    place: Place,
}

/// The program of this name on `PATH`.
pub(super) fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// What a program says when it is asked for its version. The error says why it cannot be used.
pub(super) fn version_of(program: &Path) -> Result<String> {
    let told = Command::new(program).arg("--version").output();
    let told = told.with_context(|| format!("{} cannot be started", program.display()))?;
    let why = String::from_utf8_lossy(&told.stderr);
    ensure!(told.status.success(), "{} tells no version: {}", program.display(), why.trim());
    Ok(String::from_utf8_lossy(&told.stdout).trim().to_owned())
}

impl Place {
    pub(super) fn new() -> Result<Self> {
        let (allowed, processors) = both_ends()?;
        // One that nobody listens at, at this moment.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ok(Self { directory: tempfile::tempdir()?, address, allowed, processors })
    }

    /// A file of its own.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts `command`, and waits until it listens.
    pub(super) fn start(self, command: &mut Command) -> Result<Daemon> {
        let log = fs::File::create(self.path("log"))?;
        let command = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.process_group(0).spawn();
        let child = child.with_context(|| format!("{command:?} cannot be started"))?;
        let last = self.processors[1];
        let mut daemon = Daemon { child, place: self };
        stay_on(last)?;
        daemon.await_listening(Path::new(command.get_program()))?;
        Ok(daemon)
    }
}

impl Daemon {
    fn await_listening(&mut self, program: &Path) -> Result<()> {
        let begun = Instant::now();
        let name = program.display();
        while TcpStream::connect(self.place.address).is_err() {
            let log = || fs::read_to_string(self.place.path("log")).unwrap_or_default();
            if let Some(status) = self.child.try_wait()? {
                bail!("{name} ended with {status}: {}", log());
            }
            ensure!(begun.elapsed() < PATIENCE, "{name} does not listen: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where it listens.
    pub(super) const fn address(&self) -> SocketAddr {
        self.place.address
    }

    /// A file of its own.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.place.path(name)
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // What could be set before can be set again; if not, this thread goes on where it is.
        let _ = sched_setaffinity(None, &self.place.allowed);
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        // A child that is gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
