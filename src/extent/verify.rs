//! Whether a frozen or stored map is still that of the living file.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use super::compare::{Comparison, compare_within};
use super::error::{ExtentError, StateProblem};
use super::facts::{FileFacts, stat};
use super::fiemap::{self, Records};
use super::guard::RecallReason;
use super::identity::MapIdentity;
use super::map::Extent;
use super::mode::GuardMode;
use super::record::StoredPin;
use super::stretches::{Stretch, in_stretches};
use super::survey::open_read;
use super::watch::cpu_time;
use crate::units::ByteLen;

/// What a verification saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// The comparison of the maps, place by place.
    pub comparison: Comparison,
    /// The size of the living file.
    pub size: ByteLen,
    /// Whether that is the size that was frozen.
    pub size_is_frozen: bool,
    /// Whether the immutable flag is set.
    pub immutable: bool,
    /// Whether the lease is held and not being broken; `None` when nothing holds one, as for a stored pin.
    pub lease_held: Option<bool>,
    /// Why the pin is recalled, if it is.
    pub recalled: Option<RecallReason>,
    /// Which guards the pin has.
    pub guard: GuardMode,
    /// Whether what that mode adds to the default is in force: for a swap file, that it is one.
    pub guard_holds: bool,
}

impl VerifyReport {
    /// Whether the map is true and every guard is in place.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.map_is_true() && self.is_held() && self.lease_held != Some(false) && self.recalled.is_none()
    }

    /// Whether the guards that need no process hold the map.
    #[must_use]
    pub fn is_held(&self) -> bool {
        (self.immutable || !self.guard.sets_flag()) && self.guard_holds
    }

    /// The same report of a pin with these guards.
    pub(super) fn under(
        self,
        guard: GuardMode,
        file: &File,
        identity: &MapIdentity,
    ) -> Result<Self, ExtentError> {
        let guard_holds = guard
            .holds(file, identity.inode, identity.filesystem.device)
            .map_err(|error| ExtentError::io("look at the guards of", &identity.path, error))?;
        Ok(Self { guard, guard_holds, ..self })
    }

    /// Whether every byte of the file still lies where the map says.
    #[must_use]
    pub fn map_is_true(&self) -> bool {
        self.size_is_frozen && self.comparison.is_equal()
    }
}

/// Compares extents with the living file.
pub(super) fn verify_file(
    identity: &MapIdentity,
    extents: &[Extent],
    file: &File,
) -> Result<VerifyReport, ExtentError> {
    Ok(verify_at_cost(identity, extents, file)?.0)
}

/// As [`verify_file`]; also what reading and comparing the map cost in processor time.
pub(super) fn verify_at_cost(
    identity: &MapIdentity,
    extents: &[Extent],
    file: &File,
) -> Result<(VerifyReport, Duration), ExtentError> {
    let path = &identity.path;
    let size = identity.size;
    let part = |stretch: Stretch| {
        let begun = cpu_time();
        let mut living = Records::within(file.as_fd(), path, stretch);
        let stretch = Stretch { end: stretch.end.min(size.get()), ..stretch };
        let start = identity.disk.partition_start;
        let comparison = compare_within(stretch, extents, living.by_ref(), start, &mut |_| {});
        living.end().map(|()| (comparison, cpu_time().saturating_sub(begun)))
    };
    let parts = fiemap::patiently(|| in_stretches(file.as_fd(), path, size, extents.len(), &part))?;
    let (mut comparison, mut cost) = (Comparison::default(), Duration::ZERO);
    for (part, part_cost) in parts {
        (comparison, cost) = (comparison.and(part), cost + part_cost);
    }
    let stat = stat(file, path)?;
    let report = VerifyReport {
        comparison,
        size: ByteLen(stat.stx_size),
        size_is_frozen: stat.stx_size == identity.size.get(),
        immutable: stat.stx_attributes.contains(rustix::fs::StatxAttributes::IMMUTABLE),
        lease_held: None,
        recalled: None,
        guard: GuardMode::Default,
        guard_holds: true,
    };
    Ok((report, cost))
}

/// Whether the path of a stored pin leads to its filesystem, whatever is there. True when nobody can tell.
#[must_use]
pub fn is_mounted(pin: &StoredPin) -> bool {
    let directory = pin.path().ancestors().skip(1).find_map(|place| Some((open_read(place).ok()?, place)));
    let Some((directory, place)) = directory else { return true };
    let facts = FileFacts::gather(&directory, place);
    facts.map_or(true, |facts| facts.filesystem_uuid == Some(pin.identity.filesystem.uuid))
}

/// Compares a stored pin with the file now at its path. A pin without a map is compared as an empty one: all differs.
///
/// # Errors
/// [`ExtentError::State`] with [`StateProblem::OtherFile`] when another file is there, [`StateProblem::FileGone`] when
/// none is, [`StateProblem::NotMounted`] when the filesystem is not; [`ExtentError::Io`], also when
/// the file is pinned by another process, which alone can then verify it.
pub fn verify_stored(pin: &StoredPin) -> Result<VerifyReport, ExtentError> {
    let file = open_read(pin.path()).map_err(|error| match error {
        ExtentError::Io { source, path, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            let problem = if is_mounted(pin) { StateProblem::FileGone } else { StateProblem::NotMounted };
            ExtentError::State { path, problem }
        }
        error => error,
    })?;
    // Its numbers are those of this boot.
    let living = same_file(&pin.identity, &file, pin.path())?;
    let extents = pin.map.as_ref().map_or(&[][..], |map| &map.extents);
    verify_file(&pin.identity, extents, &file)?.under(pin.guard, &file, &living)
}

/// Makes sure that `file`, opened as `path`, is the file of `identity`.
pub(super) fn same_file(
    identity: &MapIdentity,
    file: &File,
    path: &Path,
) -> Result<MapIdentity, ExtentError> {
    let other = || ExtentError::State { path: path.to_path_buf(), problem: StateProblem::OtherFile };
    let living = FileFacts::gather(file, path)?.identity().map_err(|_| other())?;
    if living.is_same_file(identity) { Ok(living) } else { Err(other()) }
}
