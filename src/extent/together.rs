//! Whether files can be pinned with the guards that are wanted, on the filesystems as they are mounted now: looked at before
//! any of them is pinned, for `fastice serve --check`.
//!
//! ```text
//!   the guard of each file      that of its record; one for this filesystem, device and mount
//!   the files of a filesystem   all with the frozen-filesystem guard, or none: recorded pins count too
//! ```
//!
//! Files that are not there are passed over, and so is what would take opening a file that a living process holds: a
//! configuration may be checked on another host, and while it is served.
//!
//! What it does not do: say whether the files themselves are fit, which `fastice doctor --config` does.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::error::ExtentError;
use super::facts::{FileFacts, number_of};
use super::mode::{GuardMode, frozen, obstacle};
use super::pin::{is_to_be_prepared, mode_of};
use super::readers::LocalReaders;
use super::record::RecordHead;
use super::state::StateDir;
use super::survey::{absolute, open_read, survey_file};
use crate::units::BlockSize;

/// A file that is to be pinned, and how.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Where it is.
    pub path: PathBuf,
    /// The guards that are asked for; else those of its record, or the default ones.
    pub guard: Option<GuardMode>,
    /// Whether local readers are asked to be let in, or kept out.
    pub local_readers: Option<LocalReaders>,
    /// Whether it is to be prepared first.
    pub prepare: bool,
    /// To what its size is then padded.
    pub block_size: Option<BlockSize>,
}

/// A file, wanted or recorded, as it is here.
struct Found {
    path: PathBuf,
    mode: GuardMode,
    inode: u64,
    /// Its filesystem; `None` when that is not known.
    uuid: Option<[u8; 16]>,
    /// Preparing it would write to it.
    prepares: bool,
}

/// Every reason why these files cannot all be pinned, in the order in which they are wanted. `state` is where their records
/// are, or will be.
///
/// # Errors
/// [`ExtentError::Io`] when the state directory cannot be read.
pub fn in_the_way_of(wanted: &[Wanted], state: &Path) -> Result<Vec<ExtentError>, ExtentError> {
    let heads = if state.is_dir() { StateDir::open(state)?.heads()? } else { Vec::new() };
    let records: Vec<RecordHead> = heads.into_iter().filter_map(|(_, head)| head.ok()).collect();
    // Where it will be made.
    let state = state.ancestors().find(|place| place.exists()).unwrap_or(state);
    let (mut errors, mut all) = (Vec::new(), Vec::new());
    for file in wanted {
        match find(file, &records, state) {
            Ok(Some((found, refused))) => {
                errors.extend(refused);
                all.push(found);
            }
            Ok(None) => {}
            Err(error) => errors.push(error),
        }
    }
    let others: Vec<Found> =
        records.iter().map(recorded).filter(|pin| !all.iter().any(|file| file.is(pin))).collect();
    for (at, file) in all.iter().enumerate() {
        let (before, after) = all.split_at(at);
        errors.extend(beside(file, before, after, &others));
    }
    Ok(errors)
}

/// The file as it is here, and why it cannot have its guards. `None` when there is none.
fn find(
    wanted: &Wanted,
    records: &[RecordHead],
    state: &Path,
) -> Result<Option<(Found, Option<ExtentError>)>, ExtentError> {
    let Ok(meta) = fs::metadata(&wanted.path) else { return Ok(None) };
    let path = absolute(&wanted.path)?;
    let (inode, device) = (meta.ino(), number_of(meta.dev()));
    let is_it =
        |record: &&RecordHead| record.identity.inode == inode && record.identity.filesystem.device == device;
    let record = records.iter().find(is_it);
    let mode = mode_of(&path, wanted.guard, record.map(|record| record.guard))?;
    let Ok(file) = open_read(&path) else {
        // Somebody holds it, and so it can have what it has.
        let uuid = record.map(|record| record.identity.filesystem.uuid);
        return Ok(Some((Found { path, mode, inode, uuid, prepares: false }, None)));
    };
    let facts = FileFacts::gather(&file, &path)?;
    let refused = obstacle(
        (mode, wanted.local_readers.unwrap_or_default()),
        &file,
        &facts,
        Some(state),
        wanted.prepare,
    );
    let prepares = wanted.prepare
        && survey_file(&file, &path).is_ok_and(|survey| is_to_be_prepared(&survey, wanted.block_size));
    Ok(Some((Found { path, mode, inode, uuid: facts.filesystem_uuid, prepares }, refused)))
}

fn recorded(pin: &RecordHead) -> Found {
    let (identity, mode) = (&pin.identity, pin.guard);
    let (path, uuid) = (identity.path.clone(), Some(identity.filesystem.uuid));
    Found { path, mode, inode: identity.inode, uuid, prepares: false }
}

impl Found {
    fn is(&self, other: &Self) -> bool {
        (self.inode, self.uuid) == (other.inode, other.uuid)
    }

    fn is_frozen(&self) -> bool {
        self.mode == GuardMode::FrozenFilesystem
    }
}

/// What other files of its filesystem have against a file: those that are pinned before it, from it on, and those that are
/// recorded and not wanted.
fn beside(file: &Found, before: &[Found], from: &[Found], others: &[Found]) -> Option<ExtentError> {
    file.uuid?;
    let there = |other: &&Found| other.uuid == file.uuid;
    if !file.is_frozen() {
        let mut all = before.iter().chain(from).chain(others).filter(there);
        return all.any(Found::is_frozen).then(|| frozen::for_wanted(&file.path, file.mode));
    }
    if file.prepares && before.iter().chain(others).filter(there).any(Found::is_frozen) {
        return Some(frozen::not_prepared(&file.path));
    }
    // Of the wanted ones, those are told of that are in the way of this one.
    others.iter().filter(there).find(|other| !other.is_frozen()).map(|_| frozen::beside_others(&file.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str, mode: GuardMode, uuid: u8) -> Found {
        let inode = name.bytes().map(u64::from).sum();
        Found { path: PathBuf::from(name), mode, inode, uuid: Some([uuid; 16]), prepares: false }
    }

    fn told(file: &Found, before: &[Found], from: &[Found], others: &[Found]) -> Option<String> {
        beside(file, before, from, others).map(|error| error.to_string())
    }

    #[test]
    fn a_filesystem_is_frozen_for_all_its_files_or_for_none() {
        use GuardMode::{Default, FrozenFilesystem, SwapFile};
        let (frozen, plain, elsewhere) =
            (found("/a", FrozenFilesystem, 1), found("/b", Default, 1), found("/c", SwapFile, 2));
        let all = [found("/a", FrozenFilesystem, 1), found("/c", SwapFile, 2)];
        assert!(told(&plain, &all, &[], &[]).is_some_and(|text| text.contains("/b with the default guard")));
        assert!(told(&plain, &[], &all, &[]).is_some(), "whichever comes first");
        assert!(told(&plain, &[], &[], &all).is_some(), "a recorded pin counts");
        assert_eq!(told(&elsewhere, &all, &[], &all), None);
        assert_eq!(told(&frozen, &[], &[found("/b", Default, 1)], &[]), None, "the other one is told of");
        assert!(told(&frozen, &[], &[], &[found("/b", Default, 1)]).is_some());
        let prepared = Found { prepares: true, ..found("/d", FrozenFilesystem, 1) };
        assert!(told(&prepared, &all, &[], &[]).is_some() && told(&prepared, &[], &all, &[]).is_none());
        let unknown = Found { uuid: None, ..plain };
        assert_eq!(told(&unknown, &all, &[], &[]), None);
    }
}
