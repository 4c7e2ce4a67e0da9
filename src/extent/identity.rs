//! Whose map it is: file, filesystem and device, by properties that outlive names and reboots.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::nvme_identity::{NamespaceIdentity, parse_identifier};
use crate::units::{BlockSize, ByteLen, ByteOffset};

/// A device number as the kernel prints it, `major:minor`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceNumber {
    /// The driver's number.
    pub major: u32,
    /// The device's number within the driver.
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The filesystems whose FIEMAP addresses are addresses of the device under them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FilesystemKind {
    /// XFS, data section.
    Xfs,
    /// ext4 with extents or indirect blocks.
    Ext4,
}

impl FilesystemKind {
    /// The name that `/proc/self/mountinfo` uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xfs => "xfs",
            Self::Ext4 => "ext4",
        }
    }
}

impl fmt::Display for FilesystemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The filesystem that holds the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesystemIdentity {
    /// Its type.
    pub kind: FilesystemKind,
    /// Its UUID as the filesystem itself reports it, 16 bytes in network order.
    #[serde(with = "hex_bytes")]
    pub uuid: [u8; 16],
    /// Its block size in bytes, from which extents are built.
    pub block_size: u32,
    /// The device number files of it report (`st_dev`): the partition, or the disk where there is none. Valid for
    /// one boot only.
    pub device: DeviceNumber,
}

/// The whole disk under the filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskIdentity {
    /// Its device number. Valid for one boot only.
    pub number: DeviceNumber,
    /// Its name in sysfs, e.g. `nvme0n1`. A name is no identity: it can change at the next boot.
    pub name: String,
    /// Its device node, e.g. `/dev/nvme0n1`.
    #[serde(with = "path_text")]
    pub node: PathBuf,
    /// Its size.
    pub size: ByteLen,
    /// Its logical block size.
    #[serde(with = "block_size")]
    pub logical_block_size: BlockSize,
    /// Where the filesystem begins on the disk: the partition start, or zero.
    pub partition_start: ByteOffset,
    /// The length of that partition, or of the disk.
    pub partition_len: ByteLen,
    /// The serial number, when the device tells one.
    pub serial: Option<String>,
    /// The world wide identifier, when the device tells one.
    pub wwid: Option<String>,
    /// The model, when the device tells one.
    pub model: Option<String>,
    /// The namespace's NGUID as sysfs prints it, for NVMe.
    pub nguid: Option<String>,
    /// The namespace's EUI-64 as sysfs prints it, for NVMe.
    pub eui64: Option<String>,
    /// The namespace's UUID as sysfs prints it, for NVMe; the kernel prints the NGUID where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// The namespace identifier, for NVMe.
    pub nsid: Option<u32>,
}

impl DiskIdentity {
    /// Whether it is the same disk, by the identifiers that it tells or else by its name, and the filesystem is at the same place.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        let is_cut_alike = self.size == other.size
            && self.logical_block_size == other.logical_block_size
            && self.partition_start == other.partition_start
            && self.partition_len == other.partition_len;
        let told = [(&self.nguid, &other.nguid), (&self.eui64, &other.eui64), (&self.wwid, &other.wwid)];
        let mut told = told.into_iter().filter(|(_, other)| other.is_some()).peekable();
        let is_same_disk = match told.peek() {
            Some(_) => told.all(|(mine, other)| mine == other),
            None => self.name == other.name && self.serial == other.serial,
        };
        is_cut_alike && is_same_disk
    }

    /// What it is called as an NVMe namespace; empty for other disks.
    #[must_use]
    pub fn namespace(&self) -> NamespaceIdentity {
        if self.nsid.is_none() {
            return NamespaceIdentity::default();
        }
        let nguid = self.nguid.as_deref().and_then(parse_identifier);
        NamespaceIdentity {
            nguid,
            eui64: self.eui64.as_deref().and_then(parse_identifier),
            uuid: self.uuid.as_deref().and_then(parse_identifier).filter(|uuid| nguid != Some(*uuid)),
            serial: self.serial.clone(),
            nsid: self.nsid,
        }
    }
}

/// Whose extent map a frozen map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapIdentity {
    /// The absolute path under which the file was opened. Not part of the checksum.
    #[serde(with = "path_text")]
    pub path: PathBuf,
    /// The inode number.
    pub inode: u64,
    /// The inode's generation, which tells a reused inode number from the old one.
    pub inode_generation: u32,
    /// The file's size (`i_size`), which is also the length of the map.
    pub size: ByteLen,
    /// How many bytes at the beginning of the file are never served: what the guard of the pin needs for itself. The
    /// extents of the map hold them too, as they must not move either; lookups begin behind them.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub reserved: ByteLen,
    /// The filesystem.
    pub filesystem: FilesystemIdentity,
    /// The whole disk.
    pub disk: DiskIdentity,
}

impl MapIdentity {
    /// Whether `other` is the same file of the same filesystem: UUID, inode and inode generation.
    #[must_use]
    pub fn is_same_file(&self, other: &Self) -> bool {
        self.filesystem.uuid == other.filesystem.uuid
            && self.inode == other.inode
            && self.inode_generation == other.inode_generation
    }

    /// Feeds what identifies file and layout into `hasher`. Left out is what a reboot or a rename changes without
    /// any block moving: path, device numbers, device names.
    pub(crate) fn hash_into(&self, hasher: &mut Sha256) {
        hasher.update(b"fastice map 1\0");
        hasher.update(self.filesystem.kind.name().as_bytes());
        hasher.update([0]);
        hasher.update(self.filesystem.uuid);
        hasher.update(self.filesystem.block_size.to_le_bytes());
        hasher.update(self.inode.to_le_bytes());
        hasher.update(self.inode_generation.to_le_bytes());
        hasher.update(self.size.get().to_le_bytes());
        hasher.update(self.disk.partition_start.get().to_le_bytes());
        hasher.update(self.disk.logical_block_size.bytes().to_le_bytes());
        // Maps without it have the checksum that they had before there was any.
        if self.reserved.get() != 0 {
            hasher.update(b"reserved");
            hasher.update(self.reserved.get().to_le_bytes());
        }
    }

    /// How many bytes can be served: all but what is [`reserved`](Self::reserved).
    #[must_use]
    pub fn served(&self) -> ByteLen {
        ByteLen(self.size.get().saturating_sub(self.reserved.get()))
    }

    /// A name for this file that is safe in a file name and independent of path and boot: 32 hexadecimal digits.
    #[must_use]
    pub fn key(&self) -> String {
        key_of(&self.filesystem.uuid, self.inode, self.inode_generation)
    }
}

/// The [key](MapIdentity::key) of a file.
pub(super) fn key_of(filesystem_uuid: &[u8; 16], inode: u64, inode_generation: u32) -> String {
    let mut hasher = Sha256::new();
    hasher.update(b"fastice file 1\0");
    hasher.update(filesystem_uuid);
    hasher.update(inode.to_le_bytes());
    hasher.update(inode_generation.to_le_bytes());
    let digest = hasher.finalize();
    to_hex(digest.get(..16).unwrap_or_default())
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
const fn is_nothing(len: &ByteLen) -> bool {
    len.0 == 0
}

/// Lower-case hexadecimal.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The bytes of `text`, or `None` when it is not exactly `N` bytes of lower-case hexadecimal.
pub(crate) fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = *pair else { return None };
        *byte = nibble(high)? << 4 | nibble(low)?;
    }
    Some(bytes)
}

const fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// Byte arrays as hexadecimal text.
pub(crate) mod hex_bytes {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer, const N: usize>(
        bytes: &[u8; N],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.serialize_str(&super::to_hex(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        from: D,
    ) -> Result<[u8; N], D::Error> {
        let text = String::deserialize(from)?;
        super::from_hex(&text)
            .ok_or_else(|| D::Error::custom(format_args!("expected {} hexadecimal digits", N * 2)))
    }
}

/// Paths as text that loses nothing: bytes outside UTF-8, and the backslash, are written `\xNN`.
pub(crate) mod path_text {
    use std::ffi::OsString;
    use std::fmt::Write as _;
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&escape(path))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        let text = String::deserialize(from)?;
        unescape(&text).ok_or_else(|| D::Error::custom("broken escape in a path"))
    }

    pub(super) fn escape(path: &Path) -> String {
        let mut text = String::new();
        for chunk in path.as_os_str().as_bytes().utf8_chunks() {
            for letter in chunk.valid().chars() {
                if letter == '\\' { text.push_str("\\x5c") } else { text.push(letter) }
            }
            for byte in chunk.invalid() {
                // Writing to a String cannot fail.
                let _ = write!(text, "\\x{byte:02x}");
            }
        }
        text
    }

    pub(super) fn unescape(text: &str) -> Option<PathBuf> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut parts = text.split('\\');
        bytes.extend_from_slice(parts.next()?.as_bytes());
        for part in parts {
            let digits = part.strip_prefix('x')?;
            let [byte] = super::from_hex::<1>(digits.get(..2)?)?;
            bytes.push(byte);
            bytes.extend_from_slice(digits.get(2..)?.as_bytes());
        }
        Some(PathBuf::from(OsString::from_vec(bytes)))
    }
}

/// Block sizes as their number of bytes.
mod block_size {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use crate::units::BlockSize;

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
    pub(super) fn serialize<S: Serializer>(size: &BlockSize, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(size.bytes())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BlockSize, D::Error> {
        let bytes = u32::deserialize(from)?;
        BlockSize::new(bytes)
            .ok_or_else(|| D::Error::custom(format_args!("{bytes} is no logical block size")))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    use std::path::Path;

    use super::*;

    #[test]
    fn any_path_survives_its_text_form() {
        for bytes in
            [&b"/srv/a b"[..], b"/srv/\xff\xfe\\x41", b"/\\", "/h\u{e9}\u{1f9ca}".as_bytes(), b"/x\\xff"]
        {
            let path = Path::new(OsStr::from_bytes(bytes));
            assert_eq!(path_text::unescape(&path_text::escape(path)).as_deref(), Some(path));
        }
        for broken in ["/\\", "/\\y41", "/\\x4", "/\\xg1", "/\\x\u{e9}"] {
            assert_eq!(path_text::unescape(broken), None, "{broken}");
        }
    }

    #[test]
    fn hexadecimal_is_exact() {
        assert_eq!(from_hex::<2>("0aff"), Some([0x0a, 0xff]));
        for broken in ["0AFF", "0af", "0aff0", "0ag0", ""] {
            assert_eq!(from_hex::<2>(broken), None, "{broken}");
        }
    }
}
