//! Whether commands of a process may still be on the devices, also when the process was killed.
//!
//! ```text
//!   serve          flock(PID-START.commands) --- a copy of the descriptor in the file table of each core's io_uring
//!     | SIGKILL                                    |
//!     v                                            v
//!   process gone, its pin locks free       the kernel frees the ring, and the lock with it, only when the last
//!                                          command has come back from the device
//!   pin, unpin     read the owner from the record, and wait for that lock
//! ```
//!
//! The locks of pins go with the process, but writes that it had submitted may reach the device later. Until they have,
//! nobody may grant the blocks anew, for an old write could overtake a new one; and nobody may let the file go, for it
//! could hit what the filesystem puts there next.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use super::error::ExtentError;
use super::owner::Owner;
use super::state::{StateDir, open_lock};

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
}

impl CommandsHold {
    /// A copy of the descriptor, for whatever the kernel keeps until the last command is done: a ring's file table.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// No command is on a device any more. Without this, the lock stays until the kernel has closed every copy.
    pub fn all_done(&self) {
        let removed = fs::remove_file(&self.path);
        let unlocked = rustix::fs::flock(&self.file, FlockOperation::Unlock).map_err(io::Error::from);
        for error in [removed, unlocked].into_iter().filter_map(Result::err) {
            tracing::warn!(path = %self.path.display(), %error, "cannot clear the mark of commands under way");
        }
    }
}

impl StateDir {
    /// Says, to whoever finds a pin of this process later, that it may have commands on devices. To be taken before
    /// the first of them, and once in a process and state directory.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn hold_commands(&self) -> Result<CommandsHold, ExtentError> {
        let _alone = self.lock()?;
        self.sweep_commands()?;
        let path = self.commands_of(&Owner::this_process());
        let file = open_lock(&path)?;
        // Shared, because several targets of one process may use one directory.
        rustix::fs::flock(&file, FlockOperation::LockShared)
            .map_err(|error| ExtentError::io("lock", &path, error))?;
        Ok(CommandsHold { file, path })
    }

    /// Waits until no command of `owner`, who made a pin of `path` that nobody holds any more, is on a device.
    ///
    /// # Errors
    /// [`ExtentError::CommandsLeft`] when some still are after a while, [`ExtentError::Io`].
    pub(super) fn await_commands_of(&self, owner: &Owner, path: &Path) -> Result<(), ExtentError> {
        if *owner == Owner::this_process() {
            return Ok(());
        }
        let held = self.commands_of(owner);
        let started = Instant::now();
        while !is_free(&held)? {
            let living = owner.is_alive();
            if living && started.elapsed() >= LIVING_PATIENCE {
                return Ok(());
            }
            if started.elapsed() >= DEAD_PATIENCE {
                let owner = Box::new(owner.clone());
                return Err(ExtentError::CommandsLeft { path: path.to_path_buf(), owner });
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn commands_of(&self, owner: &Owner) -> PathBuf {
        self.path().join(format!("{}-{}.{EXTENSION}", owner.pid, owner.start_time_ticks))
    }

    /// Removes what processes left that were killed and are done since.
    fn sweep_commands(&self) -> Result<(), ExtentError> {
        let io = |error| ExtentError::io("read the state directory", self.path(), error);
        for entry in fs::read_dir(self.path()).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) && is_free(&path)? {
                // The next one tries again.
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }
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

    #[test]
    fn commands_of_a_dead_process_are_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = StateDir::open(dir.path()).expect("a state directory");
        let dead = Owner { pid: u32::MAX, start_time_ticks: 1, boot_id: "an earlier one".to_owned() };
        let file = Path::new("/srv/file");
        state.await_commands_of(&dead, file).expect("it left nothing");
        let held = open_lock(&state.commands_of(&dead)).expect("a file");
        rustix::fs::flock(&held, FlockOperation::LockShared).expect("a lock");
        let error = state.await_commands_of(&dead, file).expect_err("the lock is held");
        assert!(matches!(error, ExtentError::CommandsLeft { .. }), "{error}");
        let later = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(held);
        });
        state.await_commands_of(&dead, file).expect("they came back");
        later.join().expect("no panic");
        let own = state.hold_commands().expect("a lock");
        assert!(!state.commands_of(&dead).exists(), "swept");
        let path = own.path.clone();
        assert!(!is_free(&path).expect("asked"));
        state.await_commands_of(&Owner::this_process(), file).expect("our own are our own matter");
        own.all_done();
        assert!(!path.exists());
    }
}
