//! The frozen-filesystem guard: on top of the default guards, nothing on the whole filesystem can be changed (`FIFREEZE`).
//!
//! ```text
//!   pin     thaw, if ours is there already --> default guards, map, record --> mark in the state directory --> freeze
//!   watch   FIFREEZE answers EBUSY while it is frozen; when it does not, somebody has thawed it
//!   unpin   thaw --> clear the flag --> remove the record --> freeze again, if other pins want that
//! ```
//!
//! The kernel counts no freezes: there is one of a filesystem, and anybody with the right to thaws it. So the state
//! directory has a file for each filesystem that fastice has frozen (`UUID.frozen`), which is written before the freeze and
//! removed after the thaw: what a crash leaves is thawed by whoever unpins, or pins, next. Whoever has frozen it without
//! that file is somebody else, and is left alone. All pins of a filesystem share one freeze.
//!
//! Everything that writes to a frozen filesystem waits until it is thawed, also in uninterruptible sleep: so fastice
//! writes nothing to it while it is frozen, and refuses a filesystem that this process, or the system, must write to.
//!
//! What it does not do: share a filesystem between processes. While one serves a file of it with this guard, others
//! cannot pin or let go there.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use crate::durable;
use crate::extent::error::ExtentError;
use crate::extent::facts::{FileFacts, number_of, swap_devices};
use crate::extent::identity::{MapIdentity, to_hex};
use crate::extent::mode::GuardMode;
use crate::extent::owner::Owner;
use crate::extent::record::RecordHead;
use crate::extent::state::StateDir;
use crate::extent::sys;

/// The name of this guard in errors.
pub(in crate::extent) const FROZEN: &str = "frozen-filesystem";

/// Held while this process has a filesystem thawed for a moment, so that its own watch does not take that for a break.
static THAWING: Mutex<()> = Mutex::new(());
/// Held while it is found out whether a filesystem is frozen, so that two who do so never meet in the middle of it.
static LOOKING: Mutex<()> = Mutex::new(());

/// Places that the system writes to at any time: a filesystem with one of them stops the host when it is frozen.
const NEEDED: [&str; 12] = [
    "/", "/usr", "/etc", "/var", "/var/log", "/var/lib", "/var/tmp", "/tmp", "/run", "/dev/shm", "/root",
    "/boot",
];

/// Whether the filesystem of `file` is frozen. Found out by freezing it, which is undone if that succeeds.
pub(super) fn is_frozen(file: &File) -> io::Result<bool> {
    let _looking = LOOKING.lock().unwrap_or_else(PoisonError::into_inner);
    let _alone = match THAWING.try_lock() {
        Ok(alone) => alone,
        Err(TryLockError::Poisoned(alone)) => alone.into_inner(),
        // It is about to be frozen again.
        Err(TryLockError::WouldBlock) => return Ok(true),
    };
    match sys::freeze(file.as_fd()) {
        Ok(()) => {
            sys::thaw(file.as_fd())?;
            Ok(false)
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Refuses a filesystem that must not be frozen.
pub(in crate::extent) fn refuse_unfit(facts: &FileFacts, state: Option<&Path>) -> Result<(), ExtentError> {
    let path = facts.path.as_path();
    let is_on_it = |place: &Path| fs::metadata(place).is_ok_and(|meta| number_of(meta.dev()) == facts.device);
    if state.is_some_and(is_on_it) {
        return Err(failed(
            path,
            "the state directory is on the same filesystem, and could not be written",
            None,
        ));
    }
    if NEEDED.iter().any(|place| is_on_it(Path::new(place))) {
        return Err(failed(path, "the system writes to its filesystem, and would stop", None));
    }
    if is_on_it(Path::new("/proc/self/exe")) || is_written_by_this_process(facts) {
        return Err(failed(
            path,
            "this program, or its log, is on the same filesystem, and would stop",
            None,
        ));
    }
    let swaps = swap_devices()
        .map_err(|error| ExtentError::io("look for swap files while examining", path, error))?;
    if swaps.contains(&facts.device) {
        return Err(failed(path, "the host swaps to its filesystem", None));
    }
    Ok(())
}

/// Whether this process has anything there open for writing.
fn is_written_by_this_process(facts: &FileFacts) -> bool {
    fs::read_dir("/proc/self/fd").into_iter().flatten().flatten().any(|entry| {
        let there = fs::metadata(entry.path())
            .is_ok_and(|meta| meta.is_file() && number_of(meta.dev()) == facts.device);
        there && is_open_for_writing(&entry.file_name().to_string_lossy())
    })
}

fn is_open_for_writing(descriptor: &str) -> bool {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()).unwrap_or_default();
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// A filesystem that was thawed for a moment, to change something on it, or is about to be frozen. Dropped, it is frozen
/// again, if it was before and pins are left that want it.
pub(in crate::extent) struct Thawed<'a> {
    file: &'a File,
    path: PathBuf,
    state: &'a StateDir,
    identity: MapIdentity,
    /// To be frozen when this is dropped.
    freeze: bool,
    _alone: MutexGuard<'static, ()>,
}

impl<'a> Thawed<'a> {
    /// Thaws the filesystem of `file`, if fastice has frozen it: by the mark, or because `is_recorded`, a record of the very
    /// file says so. To be called under the lock of the state directory.
    ///
    /// # Errors
    /// [`ExtentError::Guard`] while another process serves a file of it with this guard; [`ExtentError::Io`].
    pub(in crate::extent) fn begin(
        file: &'a File,
        path: &Path,
        state: &'a StateDir,
        identity: &MapIdentity,
        is_recorded: bool,
    ) -> Result<Self, ExtentError> {
        let others = others_of(state, identity)?;
        let me = std::process::id();
        for other in &others {
            if state.holder(&other.key())?.is_some_and(|owner| owner.pid != me) {
                let problem = "another process serves a file of the same filesystem with it, which would take a thaw for a break";
                return Err(failed(path, problem, None));
            }
        }
        let alone = THAWING.lock().unwrap_or_else(PoisonError::into_inner);
        let io = |action| move |error| ExtentError::io(action, path, error);
        let is_ours = is_marked(state, identity);
        if is_ours || is_recorded {
            match sys::thaw(file.as_fd()) {
                Ok(()) => {}
                // A crash came between the mark and the freeze, a reboot, or somebody else's thaw.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(io("thaw the filesystem of")(error)),
            }
        }
        let (path, identity) = (path.to_owned(), identity.clone());
        Ok(Self { file, path, state, identity, freeze: is_ours, _alone: alone })
    }

    /// Freezes it: the pin is whole.
    pub(in crate::extent) fn freeze(mut self) -> Result<(), ExtentError> {
        self.freeze = false;
        self.freeze_now()
    }

    fn freeze_now(&self) -> Result<(), ExtentError> {
        write_mark(self.state, &self.identity)?;
        let mark = mark(self.state, &self.identity);
        sys::freeze(self.file.as_fd()).map_err(|error| {
            // It says what is not so; what is left of it is found to be so by the next thaw.
            let _ = durable::remove(&mark);
            failed(&self.path, "its filesystem cannot be frozen", Some(error))
        })
    }

    /// After the record is gone, or was never made: frozen again for others, or known to be thawed.
    fn end(&self) -> Result<(), ExtentError> {
        if !others_of(self.state, &self.identity)?.is_empty() {
            return self.freeze_now();
        }
        let mark = mark(self.state, &self.identity);
        durable::remove(&mark).map_err(|error| ExtentError::io("remove", &mark, error))
    }
}

impl Drop for Thawed<'_> {
    fn drop(&mut self) {
        if self.freeze
            && let Err(error) = self.end()
        {
            let error = crate::chain::Chain(&error).to_string();
            tracing::error!(path = %self.path.display(), error, "a filesystem is not frozen again");
        }
    }
}

/// Says that fastice has frozen a filesystem.
fn mark(state: &StateDir, identity: &MapIdentity) -> PathBuf {
    state.path().join(format!("{}.frozen", to_hex(&identity.filesystem.uuid)))
}

/// Whether it was in this boot: a reboot thaws all, and what is frozen then is somebody else's doing.
pub(in crate::extent) fn is_marked(state: &StateDir, identity: &MapIdentity) -> bool {
    fs::read_to_string(mark(state, identity)).is_ok_and(|boot| boot == Owner::this_process().boot_id)
}

/// Refuses a filesystem that somebody else has frozen, or that cannot be frozen. Found out by doing it, under the mark, as a
/// kill may come in between: so the record of the pin must be there already.
pub(in crate::extent) fn refuse_foreign(
    file: &File,
    path: &Path,
    state: &StateDir,
    identity: &MapIdentity,
) -> Result<(), ExtentError> {
    if is_marked(state, identity) {
        return Ok(());
    }
    write_mark(state, identity)?;
    let Err(error) = sys::freeze(file.as_fd()) else {
        return sys::thaw(file.as_fd())
            .map_err(|error| ExtentError::io("thaw the filesystem of", path, error));
    };
    let mark = mark(state, identity);
    durable::remove(&mark).map_err(|error| ExtentError::io("remove", &mark, error))?;
    Err(match error.raw_os_error() {
        Some(libc::EBUSY) => {
            failed(path, "somebody else has frozen its filesystem: `fsfreeze --unfreeze` it", None)
        }
        Some(libc::EPERM) => failed(path, "it takes CAP_SYS_ADMIN", Some(error)),
        _ => failed(path, "its filesystem cannot be frozen", Some(error)),
    })
}

fn write_mark(state: &StateDir, identity: &MapIdentity) -> Result<(), ExtentError> {
    let mark = mark(state, identity);
    durable::replace(&mark, |file| io::Write::write_all(file, Owner::this_process().boot_id.as_bytes()))
        .map_err(|error| ExtentError::io("write", &mark, error))
}

/// Removes a mark that no record stands behind, as a crash at the very end of an unpin leaves it: what is frozen then is
/// somebody else's doing. A record that cannot be read may stand behind it.
pub(in crate::extent) fn forget_stale_mark(
    state: &StateDir,
    identity: &MapIdentity,
) -> Result<(), ExtentError> {
    if !is_marked(state, identity) {
        return Ok(());
    }
    let stands_behind = |head: &Result<RecordHead, ExtentError>| match head {
        Ok(head) => {
            head.guard == GuardMode::FrozenFilesystem
                && head.identity.filesystem.uuid == identity.filesystem.uuid
        }
        Err(_) => true,
    };
    if state.heads()?.iter().any(|(_, head)| stands_behind(head)) {
        return Ok(());
    }
    let mark = mark(state, identity);
    durable::remove(&mark).map_err(|error| ExtentError::io("remove", &mark, error))
}

/// What is wrong with a pin with other guards on a filesystem that is frozen for pins with this one: whatever it writes would
/// wait for ever.
pub(in crate::extent) fn for_others(path: &Path, mode: GuardMode) -> ExtentError {
    let (path, guard, problem) = (path.to_path_buf(), mode.name(), FOR_OTHERS);
    ExtentError::Guard { path, guard, problem, source: None }
}

/// The same, of a configuration: nothing is frozen yet.
pub(in crate::extent) fn for_wanted(path: &Path, mode: GuardMode) -> ExtentError {
    let (path, guard, problem) = (path.to_path_buf(), mode.name(), FOR_WANTED);
    ExtentError::Guard { path, guard, problem, source: None }
}

/// What is wrong with preparing a file there.
pub(in crate::extent) fn not_prepared(path: &Path) -> ExtentError {
    failed(path, NOT_PREPARED, None)
}

/// What is wrong with a pin with this guard beside pins with others, which could be let go only by writing to the
/// filesystem.
pub(in crate::extent) fn beside_others(path: &Path) -> ExtentError {
    failed(path, BESIDE_OTHERS, None)
}

const FOR_OTHERS: &str =
    "its filesystem is frozen for files that are pinned with the frozen-filesystem guard";
const FOR_WANTED: &str = "its filesystem would be frozen for other files, by the frozen-filesystem guard";
const NOT_PREPARED: &str = "preparing writes to it, and its filesystem is frozen for other pins";
const BESIDE_OTHERS: &str = "other files of its filesystem are pinned without it";

/// What to do about these.
pub(in crate::extent) fn remedy(problem: &str) -> Option<&'static str> {
    match problem {
        FOR_WANTED => Some(
            "give all files of a filesystem that guard, or none (`guard` of the namespaces; the guard of a recorded pin \
             counts, see `fastice pins`)",
        ),
        FOR_OTHERS => Some(
            "pin it with the frozen-filesystem guard too (--guard, or `guard` of the namespace), or unpin those \
             files first; `fastice pins` lists them",
        ),
        NOT_PREPARED => {
            Some("unpin those files (`fastice pins`), prepare this one, and pin all of them again")
        }
        BESIDE_OTHERS => Some(
            "unpin those first (`fastice pins` lists them), or pin all files of the filesystem with one guard: \
             while it is frozen they could not be let go",
        ),
        _ => None,
    }
}

/// Refuses a filesystem with pins that have other guards.
pub(in crate::extent) fn refuse_mixed(
    state: &StateDir,
    path: &Path,
    identity: &MapIdentity,
) -> Result<(), ExtentError> {
    let is_in_the_way = |head: &RecordHead| {
        head.guard != GuardMode::FrozenFilesystem
            && head.identity.filesystem.uuid == identity.filesystem.uuid
            && !head.identity.is_same_file(identity)
    };
    match state.heads()?.iter().flat_map(|(_, head)| head).any(is_in_the_way) {
        true => Err(beside_others(path)),
        false => Ok(()),
    }
}

/// The other files of the filesystem that are recorded with this guard.
fn others_of(state: &StateDir, identity: &MapIdentity) -> Result<Vec<MapIdentity>, ExtentError> {
    let is_other = |found: &MapIdentity| {
        found.filesystem.uuid == identity.filesystem.uuid && !found.is_same_file(identity)
    };
    let heads = state.heads()?.into_iter().filter_map(|(_, head)| head.ok());
    let frozen = heads.filter(|head| head.guard == GuardMode::FrozenFilesystem);
    Ok(frozen.map(|head| head.identity).filter(is_other).collect())
}

fn failed(path: &Path, problem: &'static str, source: Option<io::Error>) -> ExtentError {
    ExtentError::Guard { path: path.to_path_buf(), guard: FROZEN, problem, source }
}
