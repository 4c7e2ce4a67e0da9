//! Which record is that of the file at a path: without opening the file, which its holder would deny, and without reading the
//! maps of others.
//!
//! ```text
//!   key_at     filesystem UUID (asked of the directory), inode number and generation (of the file's handle)
//!                --> KEY.json, KEY.lock: two names, however many records there are
//!   by_path    the heads of all records: for a file that is gone, or that another has taken the place of
//! ```
//!
//! Where a filesystem does not tell so much, all heads are looked at too. What is found by its head is loaded whole, and so
//! proven, before anything is done by what it says. Damaged records name no file: here they are passed over. They hide
//! nothing, as whoever holds a pin is told by the lock, and as pinning and unpinning refuse a damaged record of their file.

use std::ffi::CString;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::error::{ExtentError, StateProblem};
use super::facts::{mount_options, number_of, uuid_by};
use super::identity::{DeviceNumber, MapIdentity, key_of};
use super::owner::Owner;
use super::record::{RecordHead, StoredPin};
use super::state::{StateDir, read_record};
use super::sys;

/// The key of the file at `path`; `None` where that is not told without opening it.
pub(super) fn key_at(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    let (inode, generation) = sys::inode_by_path(&CString::new(path.as_os_str().as_bytes()).ok()?).ok()??;
    let directory = File::open(path.parent()?).ok()?;
    // Else it is mounted there by itself, or another file by now.
    if inode != meta.ino() || directory.metadata().ok()?.dev() != meta.dev() {
        return None;
    }
    Some(key_of(&uuid_by(&directory, number_of(meta.dev())).ok()??, inode, generation))
}

/// Whether a record is that of the file `meta`, by its inode and the device number of this boot.
fn is_of_inode(head: &RecordHead, meta: Option<&Metadata>) -> bool {
    let identity = &head.identity;
    meta.is_some_and(|meta| {
        identity.inode == meta.ino() && identity.filesystem.device == number_of(meta.dev())
    })
}

/// Whether a record is that of the same file on the original of a copied filesystem, or on a copy: both are mounted, and the
/// record says which of them it is of. Numbers of devices are good for one boot.
fn is_of_a_copy(owner: &Owner, identity: &MapIdentity, device: DeviceNumber) -> bool {
    let recorded = identity.filesystem.device;
    recorded != device && owner.is_of_this_boot() && matches!(mount_options(recorded), Ok(Some(_)))
}

/// Refuses a record of another filesystem that is mounted beside the one of `living`, and has its UUID.
pub(super) fn refuse_copy(pin: &StoredPin, living: &MapIdentity) -> Result<(), ExtentError> {
    if is_of_a_copy(&pin.owner, &pin.identity, living.filesystem.device) {
        return Err(ExtentError::State { path: living.path.clone(), problem: StateProblem::Copy });
    }
    Ok(())
}

impl StateDir {
    /// The record of the file at `path`, by the file itself, in the same boot by its inode, or by its path: a pinned file may
    /// not even be opened, and may have been moved. Damaged records are passed over.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when the directory cannot be read.
    pub fn record_at(&self, path: &Path) -> Result<Option<StoredPin>, ExtentError> {
        let meta = fs::metadata(path).ok();
        let is_copied = |pin: &StoredPin| {
            meta.as_ref().is_some_and(|meta| is_of_a_copy(&pin.owner, &pin.identity, number_of(meta.dev())))
        };
        if let Some(pin) = key_at(path).and_then(|key| self.load(&key).ok().flatten())
            && !is_copied(&pin)
        {
            return Ok(Some(pin));
        }
        let (mut by_inode, mut by_path) = (Vec::new(), Vec::new());
        for (place, head) in self.whole_heads()? {
            if is_of_inode(&head, meta.as_ref()) {
                by_inode.push(place);
            } else if head.identity.path == path {
                by_path.push(place);
            }
        }
        by_path.reverse();
        by_inode.extend(by_path);
        Ok(by_inode.iter().find_map(|place| read_record(place).ok().flatten()))
    }

    /// The keys by which the file at `path` may be known here, by the file itself: also when its record is damaged, or gone. None
    /// when nothing is there.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when the directory cannot be read.
    pub fn keys_at(&self, path: &Path) -> Result<Vec<String>, ExtentError> {
        let meta = fs::metadata(path).ok();
        let mut keys = Vec::new();
        if let Some(key) = key_at(path) {
            let copied = |head: RecordHead| {
                meta.as_ref()
                    .is_some_and(|meta| is_of_a_copy(&head.owner, &head.identity, number_of(meta.dev())))
            };
            if !self.head(&key).ok().flatten().is_some_and(copied) {
                keys.push(key);
            }
        } else if meta.is_some() {
            let heads = self.whole_heads()?.into_iter().map(|(_, head)| head);
            keys.extend(
                heads.filter(|head| is_of_inode(head, meta.as_ref())).map(|head| head.identity.key()),
            );
        }
        Ok(keys)
    }

    /// The record that names `path`, whatever is there now.
    pub(super) fn record_by_path(&self, path: &Path) -> Result<Option<StoredPin>, ExtentError> {
        let named = self.whole_heads()?.into_iter().filter(|(_, head)| head.identity.path == path);
        Ok(named.into_iter().find_map(|(place, _)| read_record(&place).ok().flatten()))
    }

    /// The living process that holds a pin of the file at `path`.
    pub(super) fn holder_at(&self, path: &Path) -> Result<Option<Owner>, ExtentError> {
        if let Some(key) = key_at(path) {
            return self.holder(&key);
        }
        let Ok(meta) = fs::metadata(path) else { return Ok(None) };
        for (_, head) in self.whole_heads()? {
            if is_of_inode(&head, Some(&meta))
                && let Some(owner) = self.holder(&head.identity.key())?
            {
                return Ok(Some(owner));
            }
        }
        Ok(None)
    }

    /// Who had the file at `path` last, and does not hold it any more, as far as commands of theirs may be on the way: the
    /// owner that its record names, and processes that are gone and had another file there.
    pub(super) fn last_owners_at(&self, path: &Path) -> Result<Vec<Owner>, ExtentError> {
        let mut heads = Vec::new();
        if let Some(key) = key_at(path) {
            // A damaged one does not say whose it is. Who pins or lets go of the file comes upon it under the lock.
            heads.extend(self.head(&key).ok().flatten());
        }
        let suspects = self.suspects()?;
        if !suspects.is_empty() {
            let meta = fs::metadata(path).ok();
            let is_it = |head: &RecordHead| {
                suspects.contains(&head.owner.number())
                    && (head.identity.path == path || is_of_inode(head, meta.as_ref()))
            };
            heads.extend(self.whole_heads()?.into_iter().map(|(_, head)| head).filter(is_it));
        }
        let mut owners = Vec::new();
        for head in heads {
            if self.holder(&head.identity.key())?.is_none() && !owners.contains(&head.owner) {
                owners.push(head.owner);
            }
        }
        Ok(owners)
    }

    /// The heads that are whole.
    fn whole_heads(&self) -> Result<Vec<(PathBuf, RecordHead)>, ExtentError> {
        Ok(self.heads()?.into_iter().filter_map(|(place, head)| Some((place, head.ok()?))).collect())
    }
}
