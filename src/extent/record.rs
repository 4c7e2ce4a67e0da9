//! The stored form of a pin: one JSON document with a version and a checksum.
//!
//! ```text
//!   { "format": "fastice-pin", "version": 2,
//!     "checksum": SHA-256 of the compact JSON of what "pin" holds, but with no extents,
//!     "pin": { "identity": { ... }, "generation": 3, "owner": { ... }, "immutable_was_set_before": false,
//!              "map": { "checksum": SHA-256, "extents": [ [device offset, length], ... ] } } }
//! ```
//!
//! The extents are covered by the checksum of the map. Version 1 covers them by the other checksum as well, for which a map of a
//! million extents is written out once more; it is read, and replaced by version 2 with the next pin.
//!
//! Extents follow each other in the file without gaps, so their file offsets are not written. [`parse`] and [`parse_head`]
//! are plain functions over bytes and never panic.
//!
//! The extents come last, on lines of their own, and what is in front of them is proven without them. So of a record that is
//! looked at for whose it is only the head is read, whatever the size of the map.

use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::ser::Formatter;
use sha2::{Digest as _, Sha256};

use super::error::StateProblem;
use super::identity::{MapIdentity, hex_bytes};
use super::map::{Extent, FrozenMap, checksum_of, validate};
use super::mode::GuardMode;
use super::owner::Owner;
use super::readers::LocalReaders;

const FORMAT: &str = "fastice-pin";
/// The version that this release writes. It reads this one, and those before.
const VERSION: u64 = 2;

/// A pin as the state directory keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredPin {
    /// Whose map it is.
    pub identity: MapIdentity,
    /// Which freeze of the file it is.
    pub generation: u64,
    /// The process that pinned it.
    pub owner: Owner,
    /// Whether the file was immutable before fastice pinned it, so that unpinning must leave it so.
    pub immutable_was_set_before: bool,
    /// Whether the operator asked for the pin by itself: it then outlives whoever serves the file.
    #[serde(default)]
    pub kept: bool,
    /// Which guards hold the map. Records of releases that knew one mode only have none.
    #[serde(default, skip_serializing_if = "is_default")]
    pub guard: GuardMode,
    /// Whether other processes may read the file. Records of releases that always refused have nothing.
    #[serde(default, skip_serializing_if = "refuses")]
    pub local_readers: LocalReaders,
    /// Whether fastice wrote the swap header into the file, which is wiped when the pin ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub header_written: bool,
    /// Whether the file's modification time is to be set when the pin ends, as hosts wrote to it past the filesystem.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub update_mtime: bool,
    /// The map; `None` when the pinning process died before it was frozen.
    pub map: Option<StoredMap>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
fn is_default(guard: &GuardMode) -> bool {
    *guard == GuardMode::Default
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
fn refuses(readers: &LocalReaders) -> bool {
    *readers == LocalReaders::Refuse
}

impl StoredPin {
    /// The path under which the file was pinned.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.identity.path
    }

    /// The checksum of the map, if it was frozen.
    #[must_use]
    pub fn checksum(&self) -> Option<[u8; 32]> {
        self.map.as_ref().map(|map| map.checksum)
    }
}

/// What a record says beside the extents of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RecordHead {
    pub(super) identity: MapIdentity,
    pub(super) owner: Owner,
    pub(super) kept: bool,
    pub(super) guard: GuardMode,
}

impl From<StoredPin> for RecordHead {
    fn from(pin: StoredPin) -> Self {
        Self { identity: pin.identity, owner: pin.owner, kept: pin.kept, guard: pin.guard }
    }
}

/// The map of a stored pin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredMap {
    /// As [`FrozenMap::checksum`](super::FrozenMap::checksum).
    #[serde(with = "hex_bytes")]
    pub checksum: [u8; 32],
    /// The extents, in file order, without gaps.
    #[serde(with = "pairs")]
    pub extents: Vec<Extent>,
}

impl From<&FrozenMap> for StoredMap {
    fn from(map: &FrozenMap) -> Self {
        Self { checksum: map.checksum(), extents: map.extents().to_vec() }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<P> {
    format: String,
    version: u64,
    #[serde(with = "hex_bytes")]
    checksum: [u8; 32],
    pin: P,
}

/// What every version of the document begins with.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u64,
}

/// Writes the document of `pin`.
///
/// # Errors
/// Those of `to`.
pub(super) fn write(pin: &StoredPin, to: impl Write) -> io::Result<()> {
    let extents = pin.map.as_ref().map_or(&[][..], |map| &map.extents);
    write_with(&without_extents(pin), extents, to)
}

/// Writes the document of a pin whose map has these extents, while its own are left out: a map of a million of them is then not
/// copied, and takes a third of the time that it would take field by field.
///
/// # Errors
/// Those of `to`.
pub(super) fn write_with(head: &StoredPin, extents: &[Extent], mut to: impl Write) -> io::Result<()> {
    let mut text = Vec::new();
    write_document(VERSION, head, &mut text)?;
    // The extents come last: only ends follow.
    let place = text.windows(2).rposition(|end| end == b"[]").map(|at| at + 1);
    let Some((before, behind)) =
        place.filter(|_| head.map.is_some()).and_then(|at| text.split_at_checked(at))
    else {
        return to.write_all(&text);
    };
    to.write_all(before)?;
    write_extents(extents, &mut to)?;
    to.write_all(behind)
}

/// The extents as [`Layout`] has them.
fn write_extents(extents: &[Extent], to: &mut impl Write) -> io::Result<()> {
    const PIECE_LEN: usize = 1 << 16;
    const EXTENT_LEN_MAX: usize = 64;
    let (mut piece, mut number) = (Vec::with_capacity(PIECE_LEN), itoa::Buffer::new());
    for (at, extent) in extents.iter().enumerate() {
        piece.extend_from_slice(if at == 0 { b"\n    [" } else { b",\n    [" });
        piece.extend_from_slice(number.format(extent.device_offset.get()).as_bytes());
        piece.extend_from_slice(b", ");
        piece.extend_from_slice(number.format(extent.len.get()).as_bytes());
        piece.push(b']');
        if piece.len() > PIECE_LEN - EXTENT_LEN_MAX {
            to.write_all(&piece)?;
            piece.clear();
        }
    }
    to.write_all(&piece)
}

/// Writes the document as that version had it, field by field.
fn write_document(version: u64, pin: &StoredPin, to: impl Write) -> io::Result<()> {
    let document = Document { format: FORMAT.to_owned(), version, checksum: checksum(pin, version)?, pin };
    let mut serializer = serde_json::Serializer::with_formatter(to, Layout::default());
    document.serialize(&mut serializer)?;
    serializer.into_inner().write_all(b"\n")
}

/// The document of that version, extents and all.
#[cfg(test)]
pub(super) fn write_as(version: u64, pin: &StoredPin, to: impl Write) -> io::Result<()> {
    write_document(version, pin, to)
}

/// The same pin, but for the extents of its map.
pub(super) fn without_extents(pin: &StoredPin) -> StoredPin {
    let StoredPin { map, identity, owner, .. } = pin;
    StoredPin {
        identity: identity.clone(),
        owner: owner.clone(),
        map: map.as_ref().map(|map| StoredMap { checksum: map.checksum, extents: Vec::new() }),
        ..*pin
    }
}

/// Reads a document, and proves that it is whole and that its map is one.
///
/// # Errors
/// In what way it is not.
pub(super) fn parse(bytes: &[u8]) -> Result<StoredPin, StateProblem> {
    let pin = parse_document(bytes)?;
    if let Some(map) = &pin.map {
        validate(&pin.identity, &map.extents).map_err(StateProblem::Map)?;
        if checksum_of(&pin.identity, &map.extents) != map.checksum {
            return Err(StateProblem::Checksum);
        }
    }
    Ok(pin)
}

/// How much of a record is read to find its head: paths of 4096 bytes that are all escapes are 20 KiB long.
pub(super) const HEAD_LEN_MAX: usize = 32 << 10;

/// Reads what stands in front of the extents, of which `beginning` may have some, and proves that it is whole. `None` when that
/// cannot be told without all of the document: version 1, and what was not laid out by [`write`].
///
/// # Errors
/// In what way it is not whole.
pub(super) fn parse_head(beginning: &[u8]) -> Option<Result<RecordHead, StateProblem>> {
    const EXTENTS: &[u8] = b"\"extents\": [";
    // JSON has no line ends within strings: a line that begins so is what it seems.
    let mut lines = beginning.split_inclusive(|byte| *byte == b'\n');
    let mut len = 0;
    let found = lines.find_map(|line| {
        let start = len;
        len += line.len();
        let blanks = line.iter().take_while(|byte| **byte == b' ').count();
        line.get(blanks..)?.starts_with(EXTENTS).then_some(start + blanks + EXTENTS.len())
    })?;
    let mut document = beginning.get(..found)?.to_vec();
    document.extend_from_slice(b"]}}}");
    if matches!(serde_json::from_slice(&document), Ok(Header { version: 1, .. })) {
        return None;
    }
    match parse_document(&document) {
        // Fields may stand behind the extents.
        Err(StateProblem::Malformed(_)) => None,
        result => Some(result.map(RecordHead::from)),
    }
}

/// Reads a document, and proves what its own checksum covers.
fn parse_document(bytes: &[u8]) -> Result<StoredPin, StateProblem> {
    let header: Header = serde_json::from_slice(bytes).map_err(StateProblem::Malformed)?;
    if header.format != FORMAT {
        let error = serde::de::Error::custom(format_args!("the format is not {FORMAT}"));
        return Err(StateProblem::Malformed(error));
    }
    if !(1..=VERSION).contains(&header.version) {
        return Err(StateProblem::Version { found: header.version, known: VERSION });
    }
    let document: Document<StoredPin> = serde_json::from_slice(bytes).map_err(StateProblem::Malformed)?;
    let pin = document.pin;
    if checksum(&pin, header.version).ok() != Some(document.checksum) {
        return Err(StateProblem::Checksum);
    }
    Ok(pin)
}

/// What the document of that version says in "checksum".
fn checksum(pin: &StoredPin, version: u64) -> io::Result<[u8; 32]> {
    let mut hasher = io::BufWriter::with_capacity(1 << 16, HashWriter(Sha256::new()));
    if version == 1 {
        serde_json::to_writer(&mut hasher, pin)?;
    } else {
        serde_json::to_writer(&mut hasher, &without_extents(pin))?;
    }
    let hasher = hasher.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(hasher.0.finalize().into())
}

struct HashWriter(Sha256);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One line a field and a line an extent, so that a record can be read, and compared by `diff`.
#[derive(Default)]
struct Layout {
    objects: usize,
    arrays: usize,
}

impl Layout {
    fn line<W: ?Sized + Write>(&self, to: &mut W) -> io::Result<()> {
        to.write_all(b"\n")?;
        (0..self.objects + self.arrays).try_for_each(|_| to.write_all(b" "))
    }
}

impl Formatter for Layout {
    fn begin_object<W: ?Sized + Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.objects += 1;
        to.write_all(b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.objects = self.objects.saturating_sub(1);
        self.line(to)?;
        to.write_all(b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, to: &mut W, first: bool) -> io::Result<()> {
        if !first {
            to.write_all(b",")?;
        }
        self.line(to)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(b": ")
    }

    fn begin_array<W: ?Sized + Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.arrays += 1;
        to.write_all(b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.arrays = self.arrays.saturating_sub(1);
        to.write_all(b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, to: &mut W, first: bool) -> io::Result<()> {
        match (self.arrays, first) {
            (..=1, true) => self.line(to),
            (..=1, false) => to.write_all(b",").and_then(|()| self.line(to)),
            (_, true) => Ok(()),
            (_, false) => to.write_all(b", "),
        }
    }
}

/// Extents as pairs of device offset and length.
mod pairs {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::Extent;
    use crate::units::{ByteLen, ByteOffset};

    pub(super) fn serialize<S: Serializer>(extents: &[Extent], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(extents.iter().map(|extent| (extent.device_offset, extent.len)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Extent>, D::Error> {
        let pairs = Vec::<(ByteOffset, ByteLen)>::deserialize(from)?;
        let mut file_offset = ByteOffset(0);
        let mut extents = Vec::with_capacity(pairs.len());
        for (device_offset, len) in pairs {
            extents.push(Extent { file_offset, device_offset, len });
            file_offset = file_offset
                .checked_add(len.get())
                .ok_or_else(|| D::Error::custom("extents of more than 64 bits"))?;
        }
        Ok(extents)
    }
}
