//! Whether commands of a process may still be on the devices, also when the process was killed.
//!
//! ```text
//!   serve          flock(PID-START.commands) --- a copy of the descriptor in the file table of each core's io_uring
//!     |            PID-START-N.places: the controllers that it drives itself
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
//!
//! Commands that the kernel carries out hold the lock. A controller that the process drove itself holds nothing: the
//! kernel (or the server of a controller in software) lets go of it some time after the process. So the process writes
//! down what it drives, and whoever comes after it has each of these disabled, by a [`Still`] from above, before it goes
//! on. What a living process has written down was taken, and so reset, after the dead one had lost it.

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::error::{ExtentError, StateProblem};
use super::owner::Owner;
use super::state::{StateDir, open_lock, replace};
use crate::durable;

const EXTENSION: &str = "commands";
const PLACES: &str = "places";
/// How long the commands of a dead process are waited for. What takes longer is a device in trouble.
const DEAD_PATIENCE: Duration = Duration::from_secs(5);
/// A living process that holds no pin of the file any more has let go of it in order; it may also be just dying.
const LIVING_PATIENCE: Duration = Duration::from_millis(500);
/// How long a controller of a dead process may be with whoever has it.
const STILL_PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);

/// Stills controllers that processes drove themselves.
pub trait Still: Send + Sync + fmt::Debug {
    /// Makes sure that the controller at `place` (as [`CommandsHold::drive`] was told it) executes nothing of what it
    /// was given before. One that is not there any more is still.
    ///
    /// # Errors
    /// Why that is not sure.
    fn still(&self, place: &str) -> Result<(), StillError>;
}

/// Why a controller may still execute commands of a dead process.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct StillError {
    /// Whether it may be had in a moment, for somebody has it who may be on the way out.
    pub may_pass: bool,
    /// The cause.
    #[source]
    pub source: Box<dyn StdError + Send + Sync>,
}

/// Controllers that a process drives itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Places {
    owner: Owner,
    places: BTreeSet<String>,
}

/// Held as long as this process, or the kernel for it, may have commands on devices.
#[derive(Debug)]
pub struct CommandsHold {
    file: File,
    path: PathBuf,
    places_path: PathBuf,
    places: Mutex<BTreeSet<String>>,
}

impl CommandsHold {
    /// A copy of the descriptor, for whatever the kernel keeps until the last command is done: a ring's file table.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Says that this process drives the controllers at `places`, and no others. To be told after a controller was
    /// taken and reset, and before it is given a command that writes; and of one that was let go, after that.
    ///
    /// # Errors
    /// [`ExtentError::Io`]; what was said before then holds.
    pub fn drive(&self, places: BTreeSet<String>) -> Result<(), ExtentError> {
        let mut said = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if *said == places {
            return Ok(());
        }
        let document = Places { owner: Owner::this_process(), places };
        if document.places.is_empty() {
            let removed = durable::remove(&self.places_path);
            removed.map_err(|error| ExtentError::io("remove", &self.places_path, error))?;
        } else {
            replace(&self.places_path, |file| {
                serde_json::to_writer(&mut *file, &document)?;
                file.write_all(b"\n")
            })?;
        }
        *said = document.places;
        Ok(())
    }

    /// No command is on a device any more. Without this, the lock stays until the kernel has closed every copy, and the
    /// controllers are stilled by whoever comes after.
    pub fn all_done(&self) {
        if let Err(error) = self.drive(BTreeSet::new()) {
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
    /// the first of them, and once in a process and state directory.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn hold_commands(&self) -> Result<CommandsHold, ExtentError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let _alone = self.lock()?;
        self.sweep_commands()?;
        let me = Owner::this_process();
        let path = self.path().join(format!("{}.{EXTENSION}", stem(&me)));
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let places_path = self.path().join(format!("{}-{number}.{PLACES}", stem(&me)));
        let file = open_lock(&path)?;
        // Shared, because several targets of one process may use one directory.
        rustix::fs::flock(&file, FlockOperation::LockShared)
            .map_err(|error| ExtentError::io("lock", &path, error))?;
        Ok(CommandsHold { file, path, places_path, places: Mutex::default() })
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
        let held = self.path().join(format!("{}.{EXTENSION}", stem(owner)));
        let started = Instant::now();
        while !is_free(&held)? {
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

    /// Stills what a dead process drove, and forgets that it did.
    fn still_controllers_of(&self, owner: &Owner, path: &Path) -> Result<(), ExtentError> {
        let all = self.places()?;
        let is_taken = |place: &String| {
            all.iter().any(|(_, other)| {
                other.owner != *owner && other.owner.is_alive() && other.places.contains(place)
            })
        };
        for (file, left) in all.iter().filter(|(_, left)| left.owner == *owner) {
            // A controller does not keep commands over a boot of its host.
            let to_still = left.places.iter().filter(|place| owner.is_of_this_boot() && !is_taken(place));
            for place in to_still {
                self.still_one(place).map_err(|source| ExtentError::ControllerLeft {
                    path: path.to_path_buf(),
                    owner: Box::new(owner.clone()),
                    place: place.clone(),
                    source,
                })?;
            }
            durable::remove(file).map_err(|error| ExtentError::io("remove", file, error))?;
        }
        Ok(())
    }

    fn still_one(&self, place: &str) -> Result<(), StillError> {
        let Some(still) = self.still() else {
            let source = "whoever asks cannot reach controllers".into();
            return Err(StillError { may_pass: false, source });
        };
        let deadline = Instant::now() + STILL_PATIENCE;
        loop {
            match still.still(place) {
                Err(error) if error.may_pass && Instant::now() < deadline => thread::sleep(PAUSE),
                other => return other,
            }
        }
    }

    /// All lists of controllers, with their files.
    fn places(&self) -> Result<Vec<(PathBuf, Places)>, ExtentError> {
        let mut all = Vec::new();
        for path in self.files_of(PLACES)? {
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                // Its process has just ended in order.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(ExtentError::io("read", &path, error)),
            };
            match serde_json::from_slice(&bytes) {
                Ok(places) => all.push((path, places)),
                Err(error) => {
                    return Err(ExtentError::State { path, problem: StateProblem::Malformed(error) });
                }
            }
        }
        Ok(all)
    }

    fn files_of(&self, extension: &str) -> Result<Vec<PathBuf>, ExtentError> {
        let io = |error| ExtentError::io("read the state directory", self.path(), error);
        let entries = fs::read_dir(self.path()).map_err(io)?.collect::<Result<Vec<_>, _>>().map_err(io)?;
        let paths = entries.into_iter().map(|entry| entry.path());
        Ok(paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect())
    }

    /// Removes what processes left that were killed and are done since.
    fn sweep_commands(&self) -> Result<(), ExtentError> {
        for path in self.files_of(EXTENSION)? {
            if is_free(&path)? {
                // The next one tries again.
                let _ = fs::remove_file(&path);
            }
        }
        // Whoever takes over a pin stills the controllers of its owner first: without a pin nobody can be hurt. Of a
        // record that cannot be read it is not known whose it is.
        let records = self.records()?;
        let may_be_needed = |owner: &Owner| {
            records
                .iter()
                .any(|record| record.as_ref().is_ok_and(|record| record.owner == *owner) || record.is_err())
        };
        for (path, places) in self.places()? {
            if !places.owner.is_alive() && !may_be_needed(&places.owner) {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }
}

fn stem(owner: &Owner) -> String {
    format!("{}-{}", owner.pid, owner.start_time_ticks)
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

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let state = StateDir::open(dir.path()).expect("a state directory");
        (dir, state)
    }

    #[test]
    fn commands_of_a_dead_process_are_waited_for() {
        let (_dir, state) = state();
        let file = Path::new("/srv/file");
        state.await_commands_of(&dead(), file).expect("it left nothing");
        let mark = state.path().join(format!("{}.{EXTENSION}", stem(&dead())));
        let held = open_lock(&mark).expect("a file");
        rustix::fs::flock(&held, FlockOperation::LockShared).expect("a lock");
        let error = state.await_commands_of(&dead(), file).expect_err("the lock is held");
        assert!(matches!(error, ExtentError::CommandsLeft { .. }), "{error}");
        let later = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(held);
        });
        state.await_commands_of(&dead(), file).expect("they came back");
        later.join().expect("no panic");
        let own = state.hold_commands().expect("a lock");
        assert!(!mark.exists(), "swept");
        let path = own.path.clone();
        assert!(!is_free(&path).expect("asked"));
        state.await_commands_of(&Owner::this_process(), file).expect("our own are our own matter");
        own.all_done();
        assert!(!path.exists());
    }

    /// Is busy some times, then still, and counts; or never.
    #[derive(Debug, Default)]
    struct Lab {
        busy: AtomicU32,
        never: bool,
        stilled: Mutex<Vec<String>>,
    }

    impl Still for Lab {
        fn still(&self, place: &str) -> Result<(), StillError> {
            let busy = self.busy.load(Ordering::Relaxed);
            if self.never || busy > 0 {
                self.busy.store(busy.saturating_sub(1), Ordering::Relaxed);
                return Err(StillError { may_pass: !self.never, source: "it is in use".into() });
            }
            self.stilled.lock().expect("no panic").push(place.to_owned());
            Ok(())
        }
    }

    fn leave(state: &StateDir, owner: &Owner, places: &[&str]) -> PathBuf {
        let places = places.iter().map(ToString::to_string).collect();
        let path = state.path().join(format!("{}-7.{PLACES}", stem(owner)));
        let document = serde_json::to_vec(&Places { owner: owner.clone(), places }).expect("JSON");
        fs::write(&path, document).expect("room");
        path
    }

    #[test]
    fn what_a_dead_process_drove_is_stilled_once_before_anything_else() {
        let (_dir, state) = state();
        let lab = std::sync::Arc::new(Lab { busy: AtomicU32::new(3), ..Lab::default() });
        let state = state.stilling_by(lab.clone());
        let list = leave(&state, &dead(), &["pci 1", "pci 2"]);
        let other = leave(&state, &Owner { pid: u32::MAX - 1, ..dead() }, &["pci 3"]);
        for _ in 0..2 {
            state.await_commands_of(&dead(), Path::new("/srv/file")).expect("still");
            assert_eq!(*lab.stilled.lock().expect("no panic"), ["pci 1", "pci 2"]);
            assert!(!list.exists() && other.exists());
        }
    }

    #[test]
    fn a_controller_that_cannot_be_stilled_holds_the_file() {
        let (_dir, state) = state();
        let list = leave(&state, &dead(), &["pci 1"]);
        let blind = state.await_commands_of(&dead(), Path::new("/srv/file")).expect_err("nobody can");
        assert!(matches!(blind, ExtentError::ControllerLeft { .. }), "{blind}");
        let state = state.stilling_by(std::sync::Arc::new(Lab { never: true, ..Lab::default() }));
        let error = state.await_commands_of(&dead(), Path::new("/srv/file")).expect_err("it will not");
        assert!(matches!(&error, ExtentError::ControllerLeft { place, .. } if place == "pci 1"), "{error}");
        assert!(list.exists(), "the next one is to try again");
    }

    #[test]
    fn what_a_living_process_drives_or_an_earlier_boot_had_is_still() {
        let (_dir, state) = state();
        let early = Owner { boot_id: "an earlier one".to_owned(), ..dead() };
        let list = leave(&state, &early, &["pci 1"]);
        state.await_commands_of(&early, Path::new("/srv/file")).expect("the host was reset");
        assert!(!list.exists());
        let own = state.hold_commands().expect("a lock");
        own.drive(BTreeSet::from(["pci 1".to_owned()])).expect("written");
        let list = leave(&state, &dead(), &["pci 1"]);
        state.await_commands_of(&dead(), Path::new("/srv/file")).expect("we took it after");
        assert!(!list.exists() && own.places_path.exists());
        own.all_done();
        assert!(!own.places_path.exists());
    }

    #[test]
    fn lists_are_swept_when_no_pin_needs_them_and_nonsense_is_told() {
        let (_dir, state) = state();
        let list = leave(&state, &dead(), &["pci 1"]);
        state.hold_commands().expect("a lock").all_done();
        assert!(!list.exists());
        fs::write(&list, "{}").expect("room");
        let error = state.hold_commands().expect_err("nonsense");
        assert!(matches!(error, ExtentError::State { .. }), "{error}");
    }
}
