//! Looking at a file without touching it: its facts, its records, and every reason not to serve it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::accept::{Violation, violations};
use super::error::ExtentError;
use super::facts::FileFacts;
use super::fiemap::{self, RawExtent};
use super::identity::MapIdentity;
use super::map::Extent;
use crate::units::{ByteLen, ByteOffset};

/// What a look at a file found.
#[derive(Clone, Debug)]
pub struct Survey {
    /// What is known beside the extents.
    pub facts: FileFacts,
    /// The filesystem's records in file order, also those beyond the size.
    pub records: Vec<RawExtent>,
    /// Every reason not to serve the file; empty when it can be pinned as it is.
    pub violations: Vec<Violation>,
}

impl Survey {
    /// The identity a map of this file would have; `None` where filesystem or disk cannot be served at all.
    #[must_use]
    pub fn identity(&self) -> Option<MapIdentity> {
        self.facts.identity().ok()
    }
}

/// Looks at the file at `path`. Dirty pages are written back first, so that the records are those of its data.
///
/// # Errors
/// [`ExtentError::Io`] when the file cannot be opened or its filesystem has no FIEMAP.
pub fn survey(path: &Path) -> Result<Survey, ExtentError> {
    let path = absolute(path)?;
    let file = open_read(&path)?;
    survey_file(&file, &path)
}

/// The survey of an open file.
pub(super) fn survey_file(file: &File, path: &Path) -> Result<Survey, ExtentError> {
    let facts = FileFacts::gather(file, path)?;
    let records = match fiemap::read_split(file, path, facts.size) {
        Ok(records) => records,
        // No FIEMAP here: the facts say why, unless they see nothing wrong.
        Err(_) if facts.filesystem.is_none() || facts.not_regular.is_some() => Vec::new(),
        Err(error) => return Err(error),
    };
    let mut violations = violations(&facts, &records);
    if facts.filesystem.is_none() {
        // Without usable addresses the extents say nothing; a hole seen because FIEMAP is missing would mislead.
        violations.retain(|violation| !matches!(violation, Violation::Hole { .. }));
    }
    Ok(Survey { facts, records, violations })
}

/// Whether the file can be pinned, as far as its facts and the first of its records tell: cheap, whatever the size of the
/// map. Where they tell against it, all of it is looked at.
pub(super) fn survey_start(file: &File, path: &Path) -> Result<Survey, ExtentError> {
    let facts = FileFacts::gather(file, path)?;
    if facts.filesystem.is_none() || facts.not_regular.is_some() {
        return survey_file(file, path);
    }
    let (records, are_all) = fiemap::read_first(file, path)?;
    let told = records.last().map_or(0, RawExtent::file_end);
    let mut violations = violations(&facts, &records);
    if !are_all {
        // What lies behind the first records is not known yet.
        violations.retain(
            |found| !matches!(found, Violation::Hole { file_offset, .. } if file_offset.get() >= told),
        );
    }
    if violations.is_empty() { Ok(Survey { facts, records, violations }) } else { survey_file(file, path) }
}

/// Reads the map of any file on a filesystem that fastice knows, also of one that cannot be served, with all flags.
///
/// # Errors
/// [`ExtentError::NotAccepted`] when filesystem or disk leave the file without an identity, [`ExtentError::Io`]
/// otherwise.
pub fn read_map(path: &Path) -> Result<(MapIdentity, Vec<RawExtent>), ExtentError> {
    let survey = survey(path)?;
    match survey.facts.identity() {
        Ok(identity) => Ok((identity, survey.records)),
        Err(violation) => Err(ExtentError::NotAccepted {
            path: survey.facts.path,
            first: Box::new(violation),
            count: survey.violations.len(),
        }),
    }
}

/// Every reason not to serve the file at `path`; empty when it can be pinned as it is.
///
/// # Errors
/// As [`survey`].
pub fn accept(path: &Path) -> Result<Vec<Violation>, ExtentError> {
    Ok(survey(path)?.violations)
}

/// The absolute path behind all symbolic links.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, ExtentError> {
    fs::canonicalize(path).map_err(|source| ExtentError::io("find", path, source))
}

/// Opens a file for reading only, which is all that pinning needs, and never waits for a pipe or a lease.
pub(super) fn open_read(path: &Path) -> Result<File, ExtentError> {
    let what = fs::metadata(path).map_err(|source| ExtentError::io("stat", path, source))?.file_type();
    // Opening these could have effects of its own (a tape rewinds, a writer of the pipe wakes up).
    if what.is_char_device() || what.is_fifo() || what.is_socket() {
        let first = Box::new(Violation::NotRegular { what: "a device, pipe or socket" });
        return Err(ExtentError::NotAccepted { path: path.to_path_buf(), first, count: 1 });
    }
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| ExtentError::io("open", path, source))
}

/// Makes extents of records: addresses of the whole disk, clipped to the size, neighbours joined where they are
/// contiguous in the file and on the disk. For records that were accepted; what does not fit 64 bits is left out,
/// which the map's own validation then refuses as a gap.
pub(super) fn to_extents(records: &[RawExtent], partition_start: ByteOffset, size: ByteLen) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::with_capacity(records.len());
    for record in records {
        let len = record.len.get().min(size.get().saturating_sub(record.file_offset.get()));
        let Some(device_offset) = record.device_offset.checked_add(partition_start.get()) else { continue };
        if len == 0 {
            continue;
        }
        let extent = Extent { file_offset: record.file_offset, device_offset, len: ByteLen(len) };
        match extents.last_mut() {
            Some(last) if follows(last, &extent) => last.len = ByteLen(last.len.get() + len),
            _ => extents.push(extent),
        }
    }
    extents
}

fn follows(last: &Extent, next: &Extent) -> bool {
    last.file_offset.checked_add(last.len.get()) == Some(next.file_offset)
        && last.device_offset.checked_add(last.len.get()) == Some(next.device_offset)
}
