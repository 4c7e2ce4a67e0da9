//! The controllers that a process drives itself, written down for whoever comes after it.
//!
//! ```text
//!   serve      a controller started, and so reset --> PID-START-N.places: where it is, and since when
//!     | SIGKILL
//!     v
//!   the kernel (or the server of a controller in software) lets go of it, some time after the process
//!   pin, unpin     of each place on the list:
//!                    a living process has taken it since     it is still: taking it reset it
//!                    else                                    [`Still`] has it disabled
//!                  then the list goes, and the file is touched
//! ```
//!
//! Commands that the kernel carries out hold a lock (see `commands`); those of a controller in user space hold nothing,
//! which is why the list is there. How a controller is reached is not known here: the means come from above.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as StdError;
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::commands::marked;
use super::error::ExtentError;
use super::owner::Owner;
use super::record::RecordHead;
use super::state::{StateDir, replace};
use crate::durable;

pub(super) const EXTENSION: &str = "places";
const VERSION: u32 = 1;
/// How long the controllers of a dead process may be with whoever has them.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// Stills controllers that processes drove themselves.
pub trait Still: Send + Sync + fmt::Debug {
    /// Makes sure that the controller at `place` (as [`Driven::take`] was told it) executes nothing of what it was given
    /// before. One that is not there any more is still.
    ///
    /// # Errors
    /// Why that is not sure.
    fn still(&self, place: &str) -> Result<(), StillError>;
}

/// Why a controller may still execute commands of a dead process.
#[derive(Debug, thiserror::Error)]
#[error("it is not known to be still")]
pub struct StillError {
    /// Whether it may be had in a moment, for somebody has it who may be on the way out.
    pub may_pass: bool,
    /// The cause.
    #[source]
    pub source: Box<dyn StdError + Send + Sync>,
}

/// What is in a list.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    owner: Owner,
    /// When each was taken, in nanoseconds since boot.
    places: BTreeMap<String, u64>,
}

/// A list of another process, or of this one.
#[derive(Debug)]
struct List {
    path: PathBuf,
    number: (u32, u64),
    content: Result<Content, Box<dyn StdError + Send + Sync>>,
}

impl List {
    /// Whether its process lives and has taken a place later than `since`.
    fn has_taken(&self, place: &str, since: u64) -> bool {
        let Ok(content) = &self.content else { return false };
        content.owner.is_alive() && content.places.get(place).is_some_and(|&taken| taken > since)
    }
}

/// The controllers that this process drives, as they are written down.
#[derive(Debug)]
pub struct Driven {
    path: PathBuf,
    places: Mutex<BTreeMap<String, u64>>,
}

impl Driven {
    pub(super) fn new(state: &StateDir, stem: &str) -> Self {
        Self { path: state.processes().join(format!("{stem}.{EXTENSION}")), places: Mutex::default() }
    }

    /// A controller was taken, or taken again after it was lost: it was reset, and is given nothing that writes before
    /// this returns.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn take(&self, place: String) -> Result<(), ExtentError> {
        let mut places = self.places();
        let mut new = places.clone();
        new.insert(place, since_boot_ns());
        self.write(&mut places, new)
    }

    /// All controllers but these were let go of.
    ///
    /// # Errors
    /// [`ExtentError::Io`]; the list then has more than it should.
    pub fn keep_only(&self, kept: &BTreeSet<String>) -> Result<(), ExtentError> {
        let mut places = self.places();
        let mut new = places.clone();
        new.retain(|place, _| kept.contains(place));
        self.write(&mut places, new)
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(
        &self,
        places: &mut BTreeMap<String, u64>,
        new: BTreeMap<String, u64>,
    ) -> Result<(), ExtentError> {
        if *places == new {
            return Ok(());
        }
        if new.is_empty() {
            durable::remove(&self.path).map_err(|error| ExtentError::io("remove", &self.path, error))?;
        } else {
            let content = Content { version: VERSION, owner: Owner::this_process(), places: new.clone() };
            replace(&self.path, |file| {
                serde_json::to_writer(&mut *file, &content)?;
                file.write_all(b"\n")
            })?;
        }
        *places = new;
        Ok(())
    }
}

/// The clock of the boot, which also runs while the host sleeps, and is the same for all processes.
fn since_boot_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

impl StateDir {
    /// Stills what a dead process drove, and forgets that it did.
    pub(super) fn still_controllers_of(&self, owner: &Owner, path: &Path) -> Result<(), ExtentError> {
        let (theirs, others): (Vec<_>, Vec<_>) =
            self.lists()?.into_iter().partition(|list| list.number == owner.number());
        let deadline = Instant::now() + PATIENCE;
        for list in theirs {
            let left = |place: String, source| ExtentError::ControllerLeft {
                path: path.to_path_buf(),
                owner: Box::new(owner.clone()),
                place,
                source,
            };
            match list.content {
                Ok(content) if owner.is_of_this_boot() => {
                    for (place, since) in content.places {
                        if others.iter().any(|other| other.has_taken(&place, since)) {
                            continue;
                        }
                        self.still_patiently(&place, deadline)
                            .map_err(|source| left(place.clone(), source))?;
                        tracing::info!(place, %owner, "the controller of a process that is gone is still");
                    }
                }
                // A host that was reset has reset its devices; a container that was not may have another boot_id all the
                // same, so what can be disabled is.
                Ok(content) => {
                    for place in content.places.keys() {
                        if let Err(error) = self.still_once(place) {
                            let error: &(dyn StdError + 'static) = &error;
                            tracing::info!(place, error, "driven before the last boot");
                        }
                    }
                }
                Err(source) if owner.is_of_this_boot() => {
                    return Err(left(list.path.display().to_string(), source));
                }
                Err(_) => {}
            }
            durable::remove(&list.path).map_err(|error| ExtentError::io("remove", &list.path, error))?;
        }
        Ok(())
    }

    fn still_once(&self, place: &str) -> Result<(), StillError> {
        match self.still() {
            Some(still) => still.still(place),
            None => {
                let source = "whoever asks has no means to disable controllers".into();
                Err(StillError { may_pass: false, source })
            }
        }
    }

    fn still_patiently(&self, place: &str, deadline: Instant) -> Result<(), Box<dyn StdError + Send + Sync>> {
        loop {
            match self.still_once(place) {
                Ok(()) => return Ok(()),
                Err(error) if error.may_pass && Instant::now() < deadline => thread::sleep(PAUSE),
                Err(error) => return Err(error.source),
            }
        }
    }

    /// All lists.
    fn lists(&self) -> Result<Vec<List>, ExtentError> {
        let mut lists = Vec::new();
        for path in self.files_of(EXTENSION)? {
            let Some(number) = marked(&path) else { continue };
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                // Its process has just ended in order.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(ExtentError::io("read", &path, error)),
            };
            let content = match serde_json::from_slice::<Content>(&bytes) {
                Ok(content) if content.version == VERSION => Ok(content),
                Ok(content) => Err(format!("it is of version {}", content.version).into()),
                Err(error) => Err(error.into()),
            };
            lists.push(List { path, number, content });
        }
        Ok(lists)
    }

    /// Removes lists of dead processes that no pin names as its owner: whoever takes over a pin stills the controllers of
    /// its owner first, so without one nobody can be hurt. Of a record that cannot be read it is not known whose it is.
    pub(super) fn sweep_places(&self) -> Result<(), ExtentError> {
        let mut dead = self.lists()?;
        dead.retain(|list| list.content.as_ref().is_ok_and(|content| !content.owner.is_alive()));
        if dead.is_empty() {
            return Ok(());
        }
        let heads = self.heads()?.into_iter().map(|(_, head)| head);
        let owner = |head: Result<RecordHead, _>| head.map(|head| head.owner.number());
        let Ok(owners) = heads.map(owner).collect::<Result<BTreeSet<_>, _>>() else { return Ok(()) };
        for list in dead {
            if !owners.contains(&list.number) {
                // The next one tries again.
                let _ = fs::remove_file(&list.path);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const FILE: &str = "/srv/file";

    fn dead() -> Owner {
        Owner { pid: u32::MAX, start_time_ticks: 1, ..Owner::this_process() }
    }

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let state = StateDir::open(dir.path()).expect("a state directory");
        (dir, state)
    }

    /// Is busy some times, then still, and counts; or never.
    #[derive(Debug, Default)]
    struct Lab {
        busy: AtomicU32,
        never: bool,
        stilled: Mutex<Vec<String>>,
    }

    impl Lab {
        fn stilled(&self) -> Vec<String> {
            self.stilled.lock().expect("no panic").clone()
        }
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

    fn leave(state: &StateDir, owner: &Owner, places: &[&str], since: u64) -> PathBuf {
        let places = places.iter().map(|&place| (place.to_owned(), since)).collect();
        fs::create_dir_all(state.processes()).expect("a directory");
        let path = state.processes().join(format!("{}-{}-0.{EXTENSION}", owner.pid, owner.start_time_ticks));
        let content = Content { version: VERSION, owner: owner.clone(), places };
        fs::write(&path, serde_json::to_vec(&content).expect("JSON")).expect("room");
        path
    }

    fn left(result: Result<(), ExtentError>) -> String {
        match result.expect_err("it may not be still") {
            ExtentError::ControllerLeft { place, .. } => place,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn what_a_dead_process_drove_is_stilled_once_before_anything_else() {
        let (_dir, state) = state();
        let lab = Arc::new(Lab { busy: AtomicU32::new(3), ..Lab::default() });
        let state = state.stilling_by(lab.clone());
        let list = leave(&state, &dead(), &["pci 1", "pci 2"], 5);
        let other = leave(&state, &Owner { pid: u32::MAX - 1, ..dead() }, &["pci 3"], 5);
        for _ in 0..2 {
            state.await_commands_of(&dead(), Path::new(FILE)).expect("still");
            assert_eq!(lab.stilled(), ["pci 1", "pci 2"]);
            assert!(!list.exists() && other.exists());
        }
        state.await_commands_of_the_dead(Path::new(FILE)).expect("still");
        assert_eq!(lab.stilled(), ["pci 1", "pci 2", "pci 3"]);
        assert!(!other.exists());
    }

    #[test]
    fn a_controller_that_cannot_be_stilled_holds_the_file() {
        let (_dir, state) = state();
        let list = leave(&state, &dead(), &["pci 1"], 5);
        assert_eq!(left(state.await_commands_of(&dead(), Path::new(FILE))), "pci 1", "nobody can");
        let state = state.stilling_by(Arc::new(Lab { never: true, ..Lab::default() }));
        assert_eq!(left(state.await_commands_of(&dead(), Path::new(FILE))), "pci 1", "it will not");
        assert!(list.exists(), "the next one is to try again");
        fs::write(&list, "{}").expect("room");
        assert_eq!(left(state.await_commands_of(&dead(), Path::new(FILE))), list.display().to_string());
        let other = Owner { pid: 3, start_time_ticks: u64::MAX, ..dead() };
        state
            .await_commands_of(&other, Path::new(FILE))
            .expect("nonsense of another process is its own matter");
    }

    #[test]
    fn what_a_living_process_took_later_is_still_and_what_it_had_before_is_not() {
        let (_dir, state) = state();
        let lab = Arc::new(Lab::default());
        let state = state.stilling_by(lab.clone());
        let own = state.hold_commands().expect("a lock");
        own.driven().take("pci 1".to_owned()).expect("written");
        leave(&state, &dead(), &["pci 1"], since_boot_ns());
        state.await_commands_of(&dead(), Path::new(FILE)).expect("disabled");
        assert_eq!(lab.stilled(), ["pci 1"], "the dead one had it after us");
        leave(&state, &dead(), &["pci 1"], since_boot_ns());
        own.driven().take("pci 1".to_owned()).expect("written");
        state.await_commands_of(&dead(), Path::new(FILE)).expect("we have reset it since");
        assert_eq!(lab.stilled().len(), 1);
        let path = own.driven().path.clone();
        assert!(path.exists());
        own.driven().keep_only(&BTreeSet::from(["pci 2".to_owned()])).expect("written");
        assert!(!path.exists(), "nothing is driven any more");
        own.driven().take("pci 2".to_owned()).expect("written");
        own.all_done();
        assert!(!path.exists());
    }

    #[test]
    fn after_a_boot_what_can_be_disabled_is_and_the_rest_forgotten() {
        let (_dir, state) = state();
        let early = Owner { boot_id: "an earlier one".to_owned(), ..dead() };
        let lab = Arc::new(Lab { busy: AtomicU32::new(1), ..Lab::default() });
        let state = state.stilling_by(lab.clone());
        let list = leave(&state, &early, &["pci 1", "pci 2"], u64::MAX);
        state.await_commands_of(&early, Path::new(FILE)).expect("the host was reset");
        assert!(!list.exists());
        assert_eq!(lab.stilled(), ["pci 2"]);
        fs::write(&list, "{}").expect("room");
        state.await_commands_of(&early, Path::new(FILE)).expect("whatever it says");
        assert!(!list.exists());
    }

    #[test]
    fn lists_are_swept_when_no_pin_needs_them() {
        let (_dir, state) = state();
        let list = leave(&state, &dead(), &["pci 1"], 5);
        state.hold_commands().expect("a lock").all_done();
        assert!(!list.exists());
        leave(&state, &dead(), &["pci 1"], 5);
        fs::write(state.path().join("0123.json"), "damaged").expect("room");
        state.hold_commands().expect("a lock").all_done();
        assert!(list.exists(), "nobody knows whose the damaged record is");
    }
}
