//! Serving a pinned file whose filesystem is unmounted, and mostly its controller taken from the kernel.
//!
//! ```text
//!   while mounted      pin (kept): map stored, file immutable
//!   unmounted          the controller changes hands
//!   stored_pin         the record, by its path: which device to look for
//!   take_over          nobody else holds it; the kernel has neither filesystem nor disk; the map that the DEVICE holds
//!                      is the stored one  -->  HandedOver
//!   ... served ...
//!   given back, mounted: `verify_stored` compares again, as after any restart
//! ```
//!
//! No guard of the kernel is needed meanwhile, for the kernel cannot reach the device. What is checked instead is that
//! this is so, and that what the filesystem wrote last agrees with what was frozen.
//!
//! A disk that the kernel keeps is served by it in the same way, when the device of the filesystem is held exclusively, so that
//! nobody mounts it: [`take_unmounted`].

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::compare::compare;
use super::device::Sysfs;
use super::error::{ExtentError, StateProblem};
use super::identity::MapIdentity;
use super::map::{Extent, FrozenMap};
use super::ondisk::{self, OnDiskError, ReadAt};
use super::owner::Owner;
use super::pin::no_record;
use super::record::StoredPin;
use super::state::{PinLock, StateDir};
use super::timeline::PinStep;
use super::unmounted::Unmounted;

/// A pinned file that is reached without its filesystem. Dropped, it lets go of the record, which stays.
#[derive(Debug)]
pub struct HandedOver {
    map: Arc<FrozenMap>,
    _lock: PinLock,
    /// Where the kernel still has the disk: what keeps it from mounting the filesystem.
    held: Option<Arc<Unmounted>>,
}

impl HandedOver {
    /// The frozen map: the stored one, of the same generation.
    #[must_use]
    pub const fn map(&self) -> &Arc<FrozenMap> {
        &self.map
    }

    /// Whether the kernel still has the disk, whose filesystem nobody can mount meanwhile.
    #[must_use]
    pub const fn is_held_exclusively(&self) -> bool {
        self.held.is_some()
    }
}

/// The record of the file that was pinned at `path`, which need not exist now.
///
/// # Errors
/// [`ExtentError::State`] when there is none, or one without a map; [`ExtentError::Io`].
pub fn stored_pin(path: &Path, state: &StateDir) -> Result<StoredPin, ExtentError> {
    let path = std::path::absolute(path).map_err(|error| ExtentError::io("find", path, error))?;
    match state.record_by_path(&path)? {
        Some(record) if record.map.is_some() => Ok(record),
        _ => Err(no_record(&path)),
    }
}

/// Whether the kernel has let go of a pinned file: neither its filesystem nor its disk is there.
///
/// # Errors
/// [`ExtentError::KernelHasIt`] while one of them is; [`ExtentError::Io`].
pub fn is_let_go(stored: &StoredPin) -> Result<(), ExtentError> {
    refuse_if_the_kernel_has_it(&Sysfs::system(), stored, stored.path())
}

/// Takes the file of `stored` over: proves that the kernel has let go of it, and that `device`, read from where the
/// filesystem begins, holds the stored map.
///
/// # Errors
/// [`ExtentError::AlreadyPinned`], [`ExtentError::CommandsLeft`], [`ExtentError::ControllerLeft`];
/// [`ExtentError::KernelHasIt`] while the filesystem is
/// mounted or the kernel has the disk; [`ExtentError::OnDisk`] when the device does not tell the map;
/// [`ExtentError::Changed`] and [`ExtentError::Resized`] when it tells another; [`ExtentError::Guard`] when the file
/// is not immutable there.
pub fn take_over(
    stored: &StoredPin,
    state: &StateDir,
    device: &mut dyn ReadAt,
) -> Result<HandedOver, ExtentError> {
    let is_let_go = |stored: &StoredPin| refuse_if_the_kernel_has_it(&Sysfs::system(), stored, stored.path());
    take(stored, state, device, &is_let_go, None)
}

/// Takes the file of `stored` over from `device`, which is held exclusively and so mounted nowhere: proves that it holds the
/// stored map.
///
/// # Errors
/// As [`take_over`].
pub fn take_unmounted(
    stored: &StoredPin,
    state: &StateDir,
    device: &Arc<Unmounted>,
) -> Result<HandedOver, ExtentError> {
    let is_of = |stored: &StoredPin| match device.is_of(stored) {
        true => Ok(()),
        false => Err(no_record(stored.path())),
    };
    take(stored, state, &mut &**device, &is_of, Some(device))
}

/// `is_free` tells whether nothing but us can reach the blocks of a record.
fn take(
    stored: &StoredPin,
    state: &StateDir,
    device: &mut dyn ReadAt,
    is_free: &dyn Fn(&StoredPin) -> Result<(), ExtentError>,
    held: Option<&Arc<Unmounted>>,
) -> Result<HandedOver, ExtentError> {
    let path = stored.path().to_path_buf();
    // First without the lock, which others need.
    state.await_commands_of(&stored.owner, &path)?;
    let _alone = state.lock()?;
    let key = stored.identity.key();
    let lock = match state.lock_pin(&key)? {
        Ok(lock) => lock,
        Err(owner) => return Err(ExtentError::AlreadyPinned { path, owner: Box::new(owner) }),
    };
    // It may have changed hands since it was looked up.
    let stored = state.load(&key)?.ok_or_else(|| no_record(&path))?;
    state.await_commands_of(&stored.owner, &path)?;
    is_free(&stored)?;
    let extents = stored.map.as_ref().map_or(&[][..], |map| &map.extents);
    prove(&stored.identity, extents, device)?;
    let Some(map) = &stored.map else { return Err(no_record(&path)) };
    // Names and numbers of disks hold for one boot.
    let disk = held.map_or(&stored.identity.disk, |held| held.disk()).clone();
    let identity = MapIdentity { disk, ..stored.identity.clone() };
    let frozen = FrozenMap::from_extents(identity.clone(), stored.generation, map.extents.iter().copied())?;
    if frozen.checksum() != map.checksum {
        return Err(ExtentError::State { path, problem: StateProblem::Checksum });
    }
    state.store(&StoredPin { owner: Owner::this_process(), identity, ..stored })?;
    state.note(&key, &path, frozen.generation(), PinStep::TakenOver, "");
    tracing::info!(path = %path.display(), generation = frozen.generation(), "taken over from the device itself");
    Ok(HandedOver { map: frozen.shared(), _lock: lock, held: held.cloned() })
}

/// While the kernel can reach the blocks, only the guards of a living pin hold them still.
fn refuse_if_the_kernel_has_it(sysfs: &Sysfs, stored: &StoredPin, path: &Path) -> Result<(), ExtentError> {
    let by = |by: String| Err(ExtentError::KernelHasIt { path: path.to_path_buf(), by });
    let identity = &stored.identity;
    // A mount point that is not mounted shows another file, or none.
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.ino() == identity.inode) {
        return by("the filesystem is mounted".to_owned());
    }
    match sysfs.same_disk(&identity.disk) {
        Ok(None) => Ok(()),
        Ok(Some(name)) => by(format!("its disk is /dev/{name}")),
        Err(source) => Err(ExtentError::io("list the disks below", &PathBuf::from("/sys/block"), source)),
    }
}

/// Whether the device, of an unmounted filesystem, still holds this map, and the file is immutable there.
///
/// # Errors
/// As [`take_over`], where it speaks of the device.
pub fn verify_on_device(map: &FrozenMap, device: &mut dyn ReadAt) -> Result<(), ExtentError> {
    prove(map.identity(), map.extents(), device)
}

/// Compares a map with the one that the device holds.
fn prove(identity: &MapIdentity, extents: &[Extent], device: &mut dyn ReadAt) -> Result<(), ExtentError> {
    let path = identity.path.clone();
    let on_disk = match ondisk::read(device, identity) {
        Ok(on_disk) => on_disk,
        Err(source) => return Err(ExtentError::OnDisk { path, source: Box::new(source) }),
    };
    if on_disk.size != identity.size {
        return Err(ExtentError::Resized { path, frozen: identity.size, living: on_disk.size });
    }
    let start = identity.disk.partition_start;
    if let Some(difference) = compare(extents, &on_disk.extents, start, identity.size).first {
        return Err(ExtentError::Changed { path, difference });
    }
    if !on_disk.immutable {
        let source = Box::new(OnDiskError::NotImmutable);
        return Err(ExtentError::OnDisk { path, source });
    }
    Ok(())
}
