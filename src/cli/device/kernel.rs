//! The four things that are asked of the kernel when a controller changes hands: write an attribute of sysfs, load a
//! module, hold a block device, wait.
//!
//! Behind a trait, for the tests have a kernel of their own, which can also die between any two steps.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long the kernel may take for one step. A driver that lets go of a controller in trouble waits for it.
const STEP_PATIENCE: Duration = Duration::from_secs(60);
/// After so long the operator is told what is waited for.
const STEP_NOTICE: Duration = Duration::from_secs(3);
const MODPROBE_PATIENCE: Duration = Duration::from_secs(30);
const MODPROBE_PAUSE: Duration = Duration::from_millis(10);

/// A block device that nobody else can begin to use while this lives.
#[derive(Debug)]
pub(super) struct Claim {
    /// Held by the exclusive open; the tests' kernel has nothing to hold.
    _file: Option<File>,
}

impl Claim {
    /// One that holds nothing.
    #[cfg(test)]
    pub(super) const fn feigned() -> Self {
        Self { _file: None }
    }
}

/// What is asked of the kernel.
pub(super) trait Kernel: Debug {
    /// Writes `value` into an attribute of sysfs, in one call.
    ///
    /// # Errors
    /// The kernel's own; [`io::ErrorKind::TimedOut`] when it has not answered, and may yet do it.
    fn write(&self, path: &Path, value: &str) -> io::Result<()>;

    /// Loads a module with what it needs.
    ///
    /// # Errors
    /// With what `modprobe` said.
    fn load_module(&self, name: &str) -> Result<(), String>;

    /// Takes a block device for ourselves: nobody can then mount it or build on it.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] when it is in use; others when it cannot be opened.
    fn claim(&self, node: &Path) -> io::Result<Claim>;

    /// Lets time pass.
    fn pause(&self, how_long: Duration);
}

/// The kernel that runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running;

impl Kernel for Running {
    /// The write is done by a thread: it cannot be broken off, but we need not wait for it for ever.
    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        let (tell, told) = mpsc::sync_channel(1);
        let (to, text) = (path.to_owned(), value.to_owned());
        thread::Builder::new().name("sysfs-write".to_owned()).spawn(move || {
            // Nobody listens any more when we were given up.
            let _ = tell.send(write_now(&to, &text));
        })?;
        if let Ok(result) = told.recv_timeout(STEP_NOTICE) {
            return result;
        }
        tracing::warn!(path = %path.display(), value, "still waiting for the kernel");
        told.recv_timeout(STEP_PATIENCE.saturating_sub(STEP_NOTICE)).unwrap_or_else(|_| {
            let text = format!("the kernel has not answered within {} s", STEP_PATIENCE.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        })
    }

    fn load_module(&self, name: &str) -> Result<(), String> {
        let mut command = Command::new(modprobe());
        command.arg("--").arg(name).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("modprobe cannot be run: {error}"))?;
        let deadline = Instant::now() + MODPROBE_PATIENCE;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => thread::sleep(MODPROBE_PAUSE),
                Ok(None) => {
                    // It may be past being killed; then it is left behind.
                    let _ = child.kill();
                    return Err(format!("modprobe has not ended within {} s", MODPROBE_PATIENCE.as_secs()));
                }
                Err(error) => return Err(error.to_string()),
            }
        };
        if status.success() {
            return Ok(());
        }
        let mut said = String::new();
        if let Some(stderr) = child.stderr.take() {
            let _ = stderr.take(4096).read_to_string(&mut said);
        }
        let said = said.trim();
        Err(if said.is_empty() { format!("modprobe: {status}") } else { said.to_owned() })
    }

    fn claim(&self, node: &Path) -> io::Result<Claim> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(node)?;
        Ok(Claim { _file: Some(file) })
    }

    fn pause(&self, how_long: Duration) {
        thread::sleep(how_long);
    }
}

fn write_now(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    let len = file.write(value.as_bytes())?;
    if len == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// `modprobe` is not on every user's `PATH`.
fn modprobe() -> PathBuf {
    let places = ["/sbin/modprobe", "/usr/sbin/modprobe"].map(PathBuf::from);
    places.into_iter().find(|path| path.exists()).unwrap_or_else(|| PathBuf::from("modprobe"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_reaches_an_existing_file_and_makes_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("attribute");
        let missing = Running.write(&path, "x").expect_err("nothing there");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(!path.exists());
        std::fs::write(&path, "").expect("a file");
        Running.write(&path, "vfio-pci").expect("written");
        assert_eq!(std::fs::read(&path).expect("a file"), b"vfio-pci");
    }

    #[test]
    fn a_module_that_does_not_exist_says_so() {
        let why = Running.load_module("fastice_no_such_module").expect_err("no such module");
        assert!(!why.is_empty());
    }
}
