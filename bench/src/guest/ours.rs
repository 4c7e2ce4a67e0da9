//! fastice in a process of its own: this program once more, told to serve a configuration.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use fastice::config::Config;
use fastice::control;
use fastice::extent::NoProgress;

use super::Listens;

pub(super) const NQN: &str = "nqn.2026-11.io.fastice:guest";
/// For its end: it lets its file go, and the controller.
const PATIENCE: Duration = Duration::from_secs(40);

/// Serves what a file says until standard input ends. It says where it listens in a line.
///
/// # Errors
/// When it cannot serve it.
pub fn serve(path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let running = control::start(Config::parse(&text, "bench")?, &mut NoProgress)?;
    let address = running.addresses().first().context("it listens nowhere")?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{address}")?;
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(running.stop(control::Running::STOP_PATIENCE)?)
}

/// A target that runs as long as this lives.
#[derive(Debug)]
pub(super) struct Ours {
    child: Child,
    address: SocketAddr,
    /// Its configuration and its records.
    _directory: tempfile::TempDir,
}

impl Ours {
    pub(super) fn start(configuration: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("fastice.toml");
        let state = directory.path().join("state");
        std::fs::create_dir(&state)?;
        std::fs::write(&path, format!("state_dir = {state:?}\n{configuration}"))?;
        let program = std::env::current_exe().context("which program this is")?;
        let child = Command::new(program)
            .arg("serve-configuration")
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the target cannot be started")?;
        let address = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut ours = Self { child, address, _directory: directory };
        let out = ours.child.stdout.take().context("the target has no standard output")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        match line.trim().parse() {
            Ok(address) => ours.address = address,
            Err(_) => bail!("the target ended before it listened"),
        }
        Ok(ours)
    }
}

impl Listens for Ours {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn nqn(&self) -> &str {
        NQN
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(20));
        }
        // A child that is gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
