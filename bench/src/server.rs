//! The model in a process of its own, behind vfio-user: this program once more, told to serve.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nvme_model::vfio_user::{Server, ServerOptions};

use crate::device;

/// How long the server may take to listen.
const LIMIT: Duration = Duration::from_secs(10);

/// Serves the model at a socket until standard input ends.
///
/// # Errors
/// When it cannot listen.
pub fn serve(socket: &Path) -> Result<()> {
    let server = Server::bind(socket, device::memory_model()?, ServerOptions::default());
    let server = server.with_context(|| format!("{} cannot be listened at", socket.display()))?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    // Whoever started it holds the other end, and takes it along, however it ends.
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        stopped.store(true, Ordering::Relaxed);
    })?;
    Ok(server.run(&stop)?)
}

/// A server that runs as long as this lives.
#[derive(Debug)]
pub struct ServerProcess {
    child: Child,
    directory: PathBuf,
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
        let child = Command::new(program)
            .arg("serve-model")
            .arg("--socket")
            .arg(&socket)
            .stdin(Stdio::piped())
            .spawn()
            .context("the model cannot be started")?;
        let mut server = Self { child, directory };
        let begun = Instant::now();
        while !socket.exists() {
            ensure!(server.child.try_wait()?.is_none(), "the model ended before it listened");
            ensure!(begun.elapsed() < LIMIT, "the model does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
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
        drop(self.child.stdin.take());
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(5));
        }
        // A child that is gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            let _ = writeln!(std::io::stderr().lock(), "{}: {error}", self.directory.display());
        }
    }
}
