//! Mending what a dead run left behind: an immutable file and its record.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::claim::{Claim, why_denied};
use super::error::{ExtentError, StateProblem};
use super::facts::FileFacts;
use super::find::refuse_copy;
use super::identity::MapIdentity;
use super::mode::frozen::Thawed;
use super::mode::{self, GuardMode, Undone};
use super::pin::no_record;
use super::pinned::set_modified_now;
use super::readers::{drop_cache, settle_cache};
use super::record::StoredPin;
use super::state::StateDir;
use super::survey::open_read;
use super::timeline::PinStep;
use super::verify::{is_mounted, verify_file};

/// What unpinning did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnpinReport {
    /// Whether the immutable flag was cleared; not when it was set before fastice pinned the file, or not set.
    pub immutable_cleared: bool,
    /// Whether a swap area on the file was ended.
    pub swap_ended: bool,
    /// Which guards it had; `None` when no record told.
    pub guard: Option<GuardMode>,
    /// Whether the living map is the recorded one; `None` when there was none to compare.
    pub map_was_true: Option<bool>,
    /// Whether nothing but the record was removed: the file is gone, or cannot be reached. Wherever it is, it has the flag still.
    pub forgotten: bool,
}

/// Undoes the leftover pin of a run that has ended: clears the immutable flag if fastice set it, ends a swap area, removes
/// the record.
///
/// `force` also gives up a pin whose map has changed, whose file is gone or replaced, whose record is damaged, or of which old
/// blocks are cached. With a
/// damaged record nobody knows who set the immutable flag, so it is cleared.
///
/// # Errors
/// [`ExtentError::AlreadyPinned`] and [`ExtentError::HeldElsewhere`] while a living process holds the pin, and
/// [`ExtentError::CommandsLeft`] and [`ExtentError::ControllerLeft`] while commands of a dead one may be on the device, also with
/// `force`; [`ExtentError::State`] without a (good) record; [`ExtentError::Changed`]; [`ExtentError::StaleCache`] while
/// somebody keeps old blocks in the page cache; [`ExtentError::Io`].
pub fn unpin(path: &Path, state: &StateDir, force: bool) -> Result<UnpinReport, ExtentError> {
    let path =
        fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_path_buf());
    await_last_owners(&path, state)?;
    let _alone = state.lock()?;
    refuse_if_held(&path, state)?;
    let file = match open_read(&path).map_err(|error| why_denied(error, state.path())) {
        Ok(file) => Arc::new(file),
        Err(error @ ExtentError::HeldElsewhere { .. }) => return Err(error),
        Err(_) if force => return forget_by_path(&path, state),
        Err(ExtentError::Io { source, path: asked, action }) if source.kind() == io::ErrorKind::NotFound => {
            let Some(record) = state.record_by_path(&path)? else {
                return Err(ExtentError::Io { source, path: asked, action });
            };
            refuse_if_served(&record, state)?;
            let problem = if is_mounted(&record) { StateProblem::FileGone } else { StateProblem::NotMounted };
            return Err(ExtentError::State { path, problem });
        }
        Err(error) => return Err(error),
    };
    let identity = match FileFacts::gather(&file, &path)?.identity() {
        Ok(identity) => identity,
        Err(_) if force => return forget_by_path(&path, state),
        Err(_) => return Err(no_record(&path)),
    };
    let key = identity.key();
    let _claim = Claim::lay_to_undo(&file, &path, &key, state.path())?;
    let record = match state.load(&key) {
        Ok(Some(record)) => record,
        Ok(None) if state.record_by_path(&path)?.is_some() => {
            if force {
                return forget_by_path(&path, state);
            }
            return Err(ExtentError::State { path, problem: StateProblem::OtherFile });
        }
        Ok(None) if force && mode::swap_file::is_ours(&file) => {
            // A swap area that nobody recorded is told by its header, and nothing but root's swapoff ends it else.
            state.await_commands_of_the_dead(&path)?;
            let undone = undo_unrecorded(&file, &path)?;
            return Ok(report(undone, None, None));
        }
        Ok(None) => return Err(no_record(&path)),
        Err(ExtentError::State { .. }) if force => {
            // It does not say whose it is.
            state.await_commands_of_the_dead(&path)?;
            let thawed = Thawed::begin(&file, &path, state, &identity, false)?;
            let undone = undo_unrecorded(&file, &path)?;
            state.remove(&key)?;
            drop(thawed);
            state.clear_incident(&key)?;
            let generation = state.next_generation(&key).map_or(0, |next| next - 1);
            state.note(&key, &path, generation, PinStep::Unpinned, "by force: the record was damaged");
            return Ok(report(undone, None, None));
        }
        Err(error) => return Err(error),
    };
    refuse_copy(&record, &identity)?;
    state.await_commands_of(&record.owner, &path)?;
    let map_was_true = compare_map(&record, &file, force)?;
    let undone = undo_whole(&record, (&file, &path, &identity), state, force)?;
    state.clear_incident(&key)?;
    state.note(&key, &path, record.generation, PinStep::Unpinned, if force { "by force" } else { "" });
    Ok(report(undone, Some(record.guard), map_was_true))
}

/// Undoes whatever can be fastice's, where no record tells what is.
fn undo_unrecorded(file: &File, path: &Path) -> Result<Undone, ExtentError> {
    // Hosts may have written since it was cached; what nobody has mapped goes.
    drop_cache(file).map_err(|error| ExtentError::io("drop the page cache of", path, error))?;
    mode::undo_all(file, path)
}

/// Undoes the pin of a record that is whole, and removes it.
fn undo_whole(
    record: &StoredPin,
    (file, path, identity): (&File, &Path, &MapIdentity),
    state: &StateDir,
    force: bool,
) -> Result<Undone, ExtentError> {
    if force {
        // What nobody has mapped goes, at least.
        drop_cache(file).map_err(|error| ExtentError::io("drop the page cache of", path, error))?;
    } else {
        // Who read it meanwhile may have kept what is older than the last writes of hosts.
        settle_cache(file, path, identity.size.get())?;
    }
    let thawed = is_frozen(record).then(|| Thawed::begin(file, path, state, identity, true)).transpose()?;
    let undone = mode::undo(record, file, path)?;
    if record.update_mtime && record.guard != GuardMode::ReadOnlyMount {
        // As `PinnedFile::release` does.
        if let Err(error) = set_modified_now(file) {
            tracing::warn!(path = %path.display(), %error, "the modification time is not set");
        }
    }
    state.remove(&identity.key())?;
    drop(thawed);
    Ok(undone)
}

fn is_frozen(record: &StoredPin) -> bool {
    record.guard == GuardMode::FrozenFilesystem
}

const fn report(undone: Undone, guard: Option<GuardMode>, map_was_true: Option<bool>) -> UnpinReport {
    UnpinReport {
        immutable_cleared: undone.flag_cleared,
        swap_ended: undone.swap_ended,
        guard,
        map_was_true,
        forgotten: false,
    }
}

/// Compares the record's map with the file; a difference is an error unless `force`.
pub(super) fn compare_map(record: &StoredPin, file: &File, force: bool) -> Result<Option<bool>, ExtentError> {
    let Some(map) = &record.map else { return Ok(None) };
    let report = verify_file(&record.identity, &map.extents, file)?;
    let path = record.path().to_path_buf();
    match report.comparison.first {
        _ if force => Ok(Some(report.map_is_true())),
        _ if !report.size_is_frozen => {
            Err(ExtentError::Resized { path, frozen: record.identity.size, living: report.size })
        }
        Some(difference) => Err(ExtentError::Changed { path, difference }),
        None => Ok(Some(true)),
    }
}

/// Removes the records that name `path`, whose file is gone or another: there are several where files took the place of each
/// other.
fn forget_by_path(path: &Path, state: &StateDir) -> Result<UnpinReport, ExtentError> {
    let first = state.record_by_path(path)?.ok_or_else(|| no_record(path))?;
    let guard = Some(first.guard);
    let mut next = Some(first);
    while let Some(record) = next {
        let key = record.identity.key();
        refuse_if_served(&record, state)?;
        state.await_commands_of(&record.owner, path)?;
        state.remove(&key)?;
        state.clear_incident(&key)?;
        state.note(&key, path, record.generation, PinStep::Unpinned, "by force: the file is gone or another");
        next = state.record_by_path(path)?;
    }
    Ok(UnpinReport { forgotten: true, ..report(Undone::default(), guard, Some(false)) })
}

/// A file that is out of reach may be served all the same: its filesystem was unmounted lazily, or it was handed over.
fn refuse_if_served(record: &StoredPin, state: &StateDir) -> Result<(), ExtentError> {
    match state.holder(&record.identity.key())? {
        Some(owner) => {
            Err(ExtentError::AlreadyPinned { path: record.path().to_path_buf(), owner: Box::new(owner) })
        }
        None => Ok(()),
    }
}

/// Refuses when a living process holds a pin of the file at `path`. Opens nothing, since that would be denied.
pub(super) fn refuse_if_held(path: &Path, state: &StateDir) -> Result<(), ExtentError> {
    match state.holder_at(path)? {
        Some(owner) => Err(ExtentError::AlreadyPinned { path: path.to_path_buf(), owner: Box::new(owner) }),
        None => Ok(()),
    }
}

/// Waits for the commands of whoever had the file at `path` last, without holding up everybody else who pins or lets go
/// of files. What came in between is looked at again under the lock.
pub(super) fn await_last_owners(path: &Path, state: &StateDir) -> Result<(), ExtentError> {
    state.last_owners_at(path)?.iter().try_for_each(|owner| state.await_commands_of(owner, path))
}
