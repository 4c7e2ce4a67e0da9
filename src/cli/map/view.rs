//! A map as it is shown: of the living file, or as a pin stored it.

use std::path::Path;

use serde::Serialize;

use crate::cli::exit::Failure;
use crate::cli::files::{existing_state, is_denied, record_of};
use crate::config::format_size;
use crate::extent::{Extent, FiemapFlags, GuardMode, MapIdentity, StoredPin, Violation, survey};
use crate::units::{ByteLen, ByteOffset};

/// Where a map comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Source {
    /// The filesystem, asked now.
    Living,
    /// The record of a pin.
    Stored,
}

/// Everything that is shown of a map.
pub(super) struct View {
    path: String,
    source: Source,
    size: ByteLen,
    /// `None` when filesystem or disk cannot be served; offsets are then those of the filesystem's device.
    identity: Option<MapIdentity>,
    generation: Option<u64>,
    checksum: Option<[u8; 32]>,
    pub(super) extents: Vec<Extent>,
    /// One an extent; empty for stored maps, where no extent has any.
    flags: Vec<FiemapFlags>,
    violations: Vec<Violation>,
    note: Option<String>,
}

impl View {
    /// The living map; the stored one when a pin lets nobody open the file.
    pub(super) fn of(path: &Path, state_dir: &Path) -> Result<Self, Failure> {
        let error = match survey(path) {
            Ok(survey) => {
                let mut view = Self::living(&survey);
                let record = existing_state(state_dir).ok().flatten();
                let record = record.and_then(|state| record_of(&state, path).ok().flatten());
                if let Some(pin) = &record {
                    view.know(pin);
                }
                view.note = record
                    .map(|pin| format!("pinned: generation {}, guarded by no process now", pin.generation));
                return Ok(view);
            }
            Err(error) if is_denied(&error) => error,
            Err(error) => return Err(error.into()),
        };
        let state = existing_state(state_dir).ok().flatten();
        let pin = state.as_ref().and_then(|state| record_of(state, path).ok().flatten());
        let (Some(state), Some(pin)) = (state, pin) else { return Err(error.into()) };
        let mut view = Self::stored(&pin);
        if let Ok(Some(owner)) = state.holder(&pin.identity.key()) {
            view.note =
                Some(format!("pinned by {owner}, which lets nobody open the file; this is its frozen map"));
        }
        Ok(view)
    }

    fn living(survey: &crate::extent::Survey) -> Self {
        let identity = survey.identity();
        let start = identity.as_ref().map_or(0, |identity| identity.disk.partition_start.get());
        let extents = survey.records.iter().map(|record| Extent {
            file_offset: record.file_offset,
            device_offset: ByteOffset(record.device_offset.get().saturating_add(start)),
            len: record.len,
        });
        Self {
            path: survey.facts.path.display().to_string(),
            source: Source::Living,
            size: survey.facts.size,
            identity,
            generation: None,
            checksum: None,
            extents: extents.collect(),
            flags: survey.records.iter().map(|record| record.flags).collect(),
            violations: survey.violations.clone(),
            note: None,
        }
    }

    /// What the record says of a file that no process holds, beside the map.
    fn know(&mut self, pin: &StoredPin) {
        if let Some(identity) = &mut self.identity {
            identity.reserved = pin.identity.reserved;
        }
        // It is one because it is pinned.
        self.violations.retain(|found| pin.guard != GuardMode::SwapFile || *found != Violation::Swap);
    }

    /// The map of a record.
    pub(super) fn stored(pin: &StoredPin) -> Self {
        Self {
            path: pin.path().display().to_string(),
            source: Source::Stored,
            size: pin.identity.size,
            identity: Some(pin.identity.clone()),
            generation: Some(pin.generation),
            checksum: pin.checksum(),
            extents: pin.map.as_ref().map(|map| map.extents.clone()).unwrap_or_default(),
            flags: Vec::new(),
            violations: Vec::new(),
            note: None,
        }
    }

    /// The lines before the drawing.
    pub(super) fn head(&self) -> Vec<String> {
        let count = self.extents.len();
        let mut lines = vec![format!("{}: {} in {count} extent(s)", self.path, format_size(self.size.get()))];
        if let Some(identity) = &self.identity {
            let (fs, disk) = (&identity.filesystem, &identity.disk);
            let start = match disk.partition_start.get() {
                0 => String::new(),
                bytes => format!(", partition at {bytes}"),
            };
            let device = format!("{} ({}{start})", disk.node.display(), format_size(disk.size.get()));
            let (fs_block, block) = (fs.block_size, disk.logical_block_size);
            lines.push(format!("{} with blocks of {fs_block}, on {device} with blocks of {block}", fs.kind));
        }
        if let Some(reserved @ 1..) = self.identity.as_ref().map(|identity| identity.reserved.get()) {
            lines.push(format!(
                "served from byte {reserved} of the file on: the bytes before it are the guard's"
            ));
        }
        if let Some(generation) = self.generation {
            let checksum = self.checksum.map(|sum| format!(", SHA-256 {}", hex(&sum))).unwrap_or_default();
            lines.push(format!("frozen: generation {generation}{checksum}"));
        }
        lines.extend(self.note.clone());
        lines
    }

    /// The cells of the table.
    pub(super) fn rows(&self) -> Vec<[String; 5]> {
        let row = |(index, extent): (usize, &Extent)| {
            let flags = self.flags.get(index).map(|flags| flag_names(*flags).join(" ")).unwrap_or_default();
            [
                index.to_string(),
                extent.file_offset.to_string(),
                extent.device_offset.to_string(),
                extent.len.to_string(),
                flags,
            ]
        };
        self.extents.iter().enumerate().map(row).collect()
    }

    /// Whether the file can be pinned, and else why not: each kind of reason once, with its remedy.
    pub(super) fn verdict(&self) -> Vec<String> {
        if self.source == Source::Stored {
            return Vec::new();
        }
        if self.violations.is_empty() {
            return vec![String::new(), "fit to be pinned and served".to_owned()];
        }
        let mut lines = vec![String::new(), "not fit to be served as it is:".to_owned()];
        let mut told: Vec<&str> = Vec::new();
        for violation in &self.violations {
            let name = violation.name();
            if told.contains(&name) {
                continue;
            }
            told.push(name);
            let more = self.violations.iter().filter(|other| other.name() == name).count().saturating_sub(1);
            let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
            lines.push(format!("  {violation}{more}"));
            lines.push(format!("    -> {}", violation.remedy()));
        }
        lines
    }

    /// What `--json` and `map export` print.
    pub(super) fn document(&self) -> Document<'_> {
        let extent = |(index, extent): (usize, &Extent)| ExtentDocument {
            file_offset_bytes: extent.file_offset.get(),
            device_offset_bytes: extent.device_offset.get(),
            len_bytes: extent.len.get(),
            flags: self.flags.get(index).map(|flags| flag_names(*flags)).unwrap_or_default(),
        };
        let violation = |violation: &Violation| ViolationDocument {
            name: violation.name(),
            message: violation.to_string(),
            remedy: violation.remedy(),
        };
        Document {
            path: &self.path,
            source: self.source,
            size_bytes: self.size.get(),
            generation: self.generation,
            checksum: self.checksum.map(|sum| hex(&sum)),
            identity: self.identity.as_ref(),
            extents: self.extents.iter().enumerate().map(extent).collect(),
            fit: self.violations.is_empty(),
            violations: self.violations.iter().map(violation).collect(),
        }
    }
}

/// The JSON form of a map. Offsets are bytes; device offsets count from the start of the whole disk.
#[derive(Serialize)]
pub(super) struct Document<'view> {
    path: &'view str,
    source: Source,
    size_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
    identity: Option<&'view MapIdentity>,
    fit: bool,
    violations: Vec<ViolationDocument>,
    extents: Vec<ExtentDocument>,
}

#[derive(Serialize)]
struct ExtentDocument {
    file_offset_bytes: u64,
    device_offset_bytes: u64,
    len_bytes: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    flags: Vec<String>,
}

#[derive(Serialize)]
struct ViolationDocument {
    name: &'static str,
    message: String,
    remedy: String,
}

/// The flags that say something, by their names; unknown ones as a number.
fn flag_names(flags: FiemapFlags) -> Vec<String> {
    let mut names = Vec::new();
    let known = flags.difference(FiemapFlags::LAST);
    for (name, _) in known.iter_names() {
        names.push(name.to_ascii_lowercase().replace('_', "-"));
    }
    let mut named = known.iter_names();
    named.by_ref().for_each(drop);
    let rest = named.remaining().bits();
    if rest != 0 {
        names.push(format!("{rest:#x}"));
    }
    names
}

/// Lower-case hexadecimal.
pub(in crate::cli) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
