//! Looking at a file without touching it: its facts, its records, and every reason not to serve it.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::accept::{Violation, of_record, violations};
use super::error::ExtentError;
use super::facts::FileFacts;
use super::fiemap::{self, RawExtent};
use super::identity::MapIdentity;
use super::map::Extent;
use super::stretches::{Stretch, in_stretches};
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

/// The extents of the file of `facts`, as a map has them, read by several threads, which keep nothing else. `None` when a record
/// tells against serving the file: [`survey_file`] then says all that does.
pub(super) fn fit_extents(
    file: &File,
    path: &Path,
    facts: &FileFacts,
) -> Result<Option<Vec<Extent>>, ExtentError> {
    let Ok(disk) = &facts.disk else { return Ok(None) };
    let part = |stretch: Stretch| {
        let mut records = fiemap::Records::within(file.as_fd(), path, stretch);
        let stretch = Stretch { end: stretch.end.min(facts.size.get()), ..stretch };
        let is_fit = |record: &RawExtent| of_record(facts, record).is_none();
        let part = fit_part(stretch, disk.partition_start, records.by_ref(), is_fit);
        records.end().map(|()| part)
    };
    let (_, are_all) = fiemap::read_first(file, path)?;
    let about = if are_all { 0 } else { usize::MAX };
    let parts = fiemap::patiently(|| in_stretches(file.as_fd(), path, facts.size, about, &part))?;
    Ok(joined(parts))
}

/// The extents of neighbouring parts, if all are there.
pub(super) fn joined(parts: Vec<Option<Vec<Extent>>>) -> Option<Vec<Extent>> {
    let mut all = Vec::with_capacity(parts.iter().flatten().map(Vec::len).sum());
    for part in parts {
        let part = part?;
        let Some((first, others)) = part.split_first() else { continue };
        push_joined(&mut all, *first);
        all.extend_from_slice(others);
    }
    Some(all)
}

/// The extents of a stretch that lies within the file; `None` when a record is not fit, or something is missing.
pub(super) fn fit_part(
    stretch: Stretch,
    partition_start: ByteOffset,
    records: impl Iterator<Item = RawExtent>,
    is_fit: impl Fn(&RawExtent) -> bool,
) -> Option<Vec<Extent>> {
    let (mut extents, mut covered) = (Vec::new(), stretch.start);
    // Beyond the stretch, which may be all of the file that there is, nothing is asked.
    for record in records.take_while(|record| record.file_offset.get() < stretch.end) {
        let Some(record) = stretch.clip(record) else { continue };
        if record.file_offset.get() != covered || !is_fit(&record) {
            return None;
        }
        covered = record.file_end();
        let device_offset = record.device_offset.checked_add(partition_start.get())?;
        push_joined(&mut extents, Extent { file_offset: record.file_offset, device_offset, len: record.len });
    }
    (covered == stretch.end).then_some(extents)
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
        push_joined(
            &mut extents,
            Extent { file_offset: record.file_offset, device_offset, len: ByteLen(len) },
        );
    }
    extents
}

/// Puts an extent behind the others, as part of the last one where it goes on with it.
fn push_joined(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut() {
        Some(last) if follows(last, &extent) => last.len = ByteLen(last.len.get() + extent.len.get()),
        _ => extents.push(extent),
    }
}

fn follows(last: &Extent, next: &Extent) -> bool {
    last.file_offset.checked_add(last.len.get()) == Some(next.file_offset)
        && last.device_offset.checked_add(last.len.get()) == Some(next.device_offset)
}
