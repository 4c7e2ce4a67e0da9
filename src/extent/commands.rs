//! Whether commands of a process may still be on the devices, also when the process was killed.
//!
//! ```text
//!   serve          flock(processes/PID-START-N.commands) --- a copy of the descriptor in the file table of each core's io_uring
//!     |            PID-START-N.places: the controllers that it drives itself (see `places`)
//!     | SIGKILL                                    |
//!     v                                            v
//!   process gone, its pin locks free       the kernel frees the ring, and the lock with it, only when the last
//!                                          command has come back from the device
//!   pin, unpin     read the owner from the record, wait for that lock, and still its controllers
//! ```
//!
//! The locks of pins go with the process, but writes that it had submitted may reach the device later. Until they have,
//! nobody may grant the blocks anew, for an old write could overtake a new one; and nobody may let the file go, for it
//! could hit what the filesystem puts there next.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use super::error::ExtentError;
use super::owner::Owner;
use super::places::{self, Driven};
use super::state::{StateDir, files_in, open_lock};

const EXTENSION: &str = "commands";
/// How long the commands of a dead process are waited for. What takes longer is a device in trouble.
const DEAD_PATIENCE: Duration = Duration::from_secs(5);
/// A living process that holds no pin of the file any more has let go of it in order; it may also be just dying.
const LIVING_PATIENCE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(10);

/// Held as long as this process, or the kernel for it, may have commands on devices.
#[derive(Debug)]
pub struct CommandsHold {
    file: File,
    path: PathBuf,
    driven: Driven,
}

impl CommandsHold {
    /// A copy of the descriptor, for whatever the kernel keeps until the last command is done: a ring's file table.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// The controllers that this process drives itself.
    #[must_use]
    pub const fn driven(&self) -> &Driven {
        &self.driven
    }

    /// No command is on a device any more. Without this, the lock stays until the kernel has closed every copy, and the
    /// controllers are stilled by whoever comes after.
    pub fn all_done(&self) {
        if let Err(error) = self.driven.keep_only(&BTreeSet::new()) {
            tracing::warn!(%error, "cannot clear the list of controllers");
        }
        let removed = fs::remove_file(&self.path);
        let unlocked = rustix::fs::flock(&self.file, FlockOperation::Unlock).map_err(io::Error::from);
        for error in [removed, unlocked].into_iter().filter_map(Result::err) {
            tracing::warn!(path = %self.path.display(), %error, "cannot clear the mark of commands under way");
        }
    }
}

impl StateDir {
    /// Says, to whoever finds a pin of this process later, that it may have commands on devices. To be taken before
    /// the first of them.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn hold_commands(&self) -> Result<CommandsHold, ExtentError> {
        /// A process may have several targets, each with marks of its own.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let _alone = self.lock()?;
        let processes = self.processes();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&processes)
            .map_err(|error| ExtentError::io("create", &processes, error))?;
        self.sweep_commands()?;
        let me = Owner::this_process();
        let stem = format!("{}-{}-{}", me.pid, me.start_time_ticks, NEXT.fetch_add(1, Ordering::Relaxed));
        let path = processes.join(format!("{stem}.{EXTENSION}"));
        let file = open_lock(&path)?;
        rustix::fs::flock(&file, FlockOperation::LockShared)
            .map_err(|error| ExtentError::io("lock", &path, error))?;
        Ok(CommandsHold { file, path, driven: Driven::new(self, &stem) })
    }

    /// Waits until no command of `owner`, who made a pin of `path` that nobody holds any more, is on a device.
    ///
    /// # Errors
    /// [`ExtentError::CommandsLeft`] when some still are after a while, [`ExtentError::ControllerLeft`] when a
    /// controller that it drove could not be stilled, [`ExtentError::Io`].
    pub(super) fn await_commands_of(&self, owner: &Owner, path: &Path) -> Result<(), ExtentError> {
        if *owner == Owner::this_process() {
            return Ok(());
        }
        let started = Instant::now();
        while !self.is_done(owner)? {
            if owner.is_alive() && started.elapsed() >= LIVING_PATIENCE {
                return Ok(());
            }
            if started.elapsed() >= DEAD_PATIENCE {
                let owner = Box::new(owner.clone());
                return Err(ExtentError::CommandsLeft { path: path.to_path_buf(), owner });
            }
            thread::sleep(PAUSE);
        }
        if owner.is_alive() { Ok(()) } else { self.still_controllers_of(owner, path) }
    }

    /// As [`StateDir::await_commands_of`], for every process that is gone and left a mark: when it is not known whose a
    /// pin was.
    ///
    /// # Errors
    /// As there.
    pub(super) fn await_commands_of_the_dead(&self, path: &Path) -> Result<(), ExtentError> {
        let mut marks = self.files_of(EXTENSION)?;
        marks.extend(self.files_of(places::EXTENSION)?);
        let mut owners: Vec<_> = marks.iter().filter_map(|mark| Owner::named_by(mark)).collect();
        owners.dedup();
        for owner in owners {
            if !owner.is_alive() {
                self.await_commands_of(&owner, path)?;
            }
        }
        Ok(())
    }

    /// Whether the kernel has nothing of a process any more.
    fn is_done(&self, owner: &Owner) -> Result<bool, ExtentError> {
        for mark in self.files_of(EXTENSION)? {
            if marked(&mark) == Some(owner.number()) && !is_free(&mark)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Processes that are gone and may have left commands on devices, or controllers that go on by themselves. By their
    /// numbers: of a list that was left before the last boot the rest is told only inside.
    pub(super) fn suspects(&self) -> Result<BTreeSet<(u32, u64)>, ExtentError> {
        let mut marks = self.files_of(places::EXTENSION)?;
        for mark in self.files_of(EXTENSION)? {
            if !is_free(&mark)? {
                marks.push(mark);
            }
        }
        let dead = marks.iter().filter_map(|mark| Owner::named_by(mark)).filter(|owner| !owner.is_alive());
        Ok(dead.map(|owner| owner.number()).collect())
    }

    /// The marks with this extension.
    pub(super) fn files_of(&self, extension: &str) -> Result<Vec<PathBuf>, ExtentError> {
        files_in(&self.processes(), extension)
    }

    /// Removes what processes left that were killed and are done since.
    fn sweep_commands(&self) -> Result<(), ExtentError> {
        for path in self.files_of(EXTENSION)? {
            if is_free(&path)? {
                // The next one tries again.
                let _ = fs::remove_file(&path);
            }
        }
        self.sweep_places()
    }
}

/// The process that a file is named after.
pub(super) fn marked(path: &Path) -> Option<(u32, u64)> {
    Owner::named_by(path).map(|owner| owner.number())
}

/// Whether nobody holds the lock; a file that is not there is free.
fn is_free(path: &Path) -> Result<bool, ExtentError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(ExtentError::io("open the lock", path, error)),
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::AGAIN) => Ok(false),
        Err(error) => Err(ExtentError::io("ask for the lock", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead() -> Owner {
        Owner { pid: u32::MAX, start_time_ticks: 1, ..Owner::this_process() }
    }

    #[test]
    fn commands_of_a_dead_process_are_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = StateDir::open(dir.path()).expect("a state directory");
        let file = Path::new("/srv/file");
        state.await_commands_of(&dead(), file).expect("it left nothing");
        fs::create_dir(state.processes()).expect("a directory");
        // One of its targets was done, the other one was not.
        let marks =
            [0, 1].map(|number| state.processes().join(format!("{}-1-{number}.{EXTENSION}", u32::MAX)));
        let [_done, held] = marks.each_ref().map(|mark| open_lock(mark).expect("a file"));
        rustix::fs::flock(&held, FlockOperation::LockShared).expect("a lock");
        let error = state.await_commands_of(&dead(), file).expect_err("the lock is held");
        assert!(matches!(error, ExtentError::CommandsLeft { .. }), "{error}");
        let error = state.await_commands_of_the_dead(file).expect_err("the lock is held");
        assert!(matches!(error, ExtentError::CommandsLeft { .. }), "{error}");
        let later = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(held);
        });
        state.await_commands_of(&dead(), file).expect("they came back");
        later.join().expect("no panic");
        let (own, other) = (state.hold_commands().expect("a lock"), state.hold_commands().expect("a lock"));
        assert!(marks.iter().all(|mark| !mark.exists()), "swept");
        assert!(!is_free(&own.path).expect("asked"));
        state.await_commands_of(&Owner::this_process(), file).expect("our own are our own matter");
        state.await_commands_of_the_dead(file).expect("we live");
        own.all_done();
        assert!(!own.path.exists() && other.path.exists() && !is_free(&other.path).expect("asked"));
    }
}
