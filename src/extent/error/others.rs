//! Others who have a file: open, or locked. How errors name them.

use std::fmt;
use std::path::PathBuf;

/// Who has a file open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holder {
    /// A process, through a file descriptor or a memory mapping.
    Process {
        /// Its process id.
        pid: u32,
        /// Its command name.
        command: String,
    },
    /// A loop device that is backed by the file.
    LoopDevice {
        /// Its name, e.g. `loop3`.
        name: String,
    },
    /// The file is an active swap file.
    Swap,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, command } => write!(f, "process {pid} ({command})"),
            Self::LoopDevice { name } => write!(f, "loop device /dev/{name}"),
            Self::Swap => f.write_str("active swap"),
        }
    }
}

/// All of them in one line.
pub(super) struct Holders<'a>(pub(super) &'a [Holder]);

impl fmt::Display for Holders<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no process is seen to have it, so the kernel or another container has");
        }
        for (at, holder) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str(", ")?;
            }
            holder.fmt(f)?;
        }
        Ok(())
    }
}

/// A process that has a file locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// Its process id.
    pub pid: u32,
    /// Its command name.
    pub command: String,
    /// The state directory in which it has the file pinned; none when it is no fastice, as far as this process may see.
    pub state_dir: Option<PathBuf>,
}

/// What it has done to the file.
pub(super) struct ClaimText<'a>(pub(super) Option<&'a Claimant>);

impl fmt::Display for ClaimText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(Claimant { pid, command, state_dir: Some(place) }) => {
                write!(
                    f,
                    "pinned by process {pid} ({command}) with another state directory, {}",
                    place.display()
                )
            }
            Some(Claimant { pid, command, state_dir: None }) => {
                write!(f, "locked (flock) by process {pid} ({command})")
            }
            None => f.write_str(
                "locked (flock) by a process that is not seen from here, as one of another container",
            ),
        }
    }
}

/// What to do about it.
pub(super) fn claim_remedy(by: Option<&Claimant>) -> String {
    match by.and_then(|by| by.state_dir.as_ref()) {
        Some(place) => format!(
            "a file is pinned by one fastice at a time: take it out of the configuration of that process and reload it (SIGHUP), or \
             end that process; `--state-dir {}` shows what it has",
            place.display()
        ),
        None => "have that process unlock the file, or end it; if it is a fastice in another container, take the file out of \
                 its configuration"
            .to_owned(),
    }
}
