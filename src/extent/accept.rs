//! What may be served: every reason against it is a [`Violation`] of its own, with the remedy.

use super::facts::FileFacts;
use super::fiemap::{FiemapFlags, RawExtent};
use super::identity::DeviceNumber;
use crate::units::{BlockSize, ByteLen, ByteOffset};

/// One reason why a file cannot be served. Offsets are file offsets in bytes unless the name says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each message says it all")]
#[non_exhaustive]
pub enum Violation {
    #[error("it is {what}, not a regular file")]
    NotRegular { what: &'static str },
    #[error("it is empty")]
    Empty,
    #[error("its filesystem is {name}, whose extent map holds no addresses of one device")]
    Filesystem { name: String },
    #[error("its filesystem is on device {device}, which is no block device that sysfs knows")]
    NoDisk { device: DeviceNumber },
    #[error("its filesystem is on {disk}, which stands on {lowers}")]
    Stacked { disk: String, lowers: String },
    #[error("its disk {disk} has logical blocks of {bytes} bytes")]
    BlockSize { disk: String, bytes: u64 },
    #[error("its filesystem tells no UUID")]
    NoUuid,
    #[error("its size of {size} bytes is no multiple of the logical block of {block} bytes")]
    UnalignedSize { size: ByteLen, block: BlockSize },
    #[error("it is encrypted (STATX_ATTR_ENCRYPTED)")]
    Encrypted,
    #[error("it is sealed by fs-verity (STATX_ATTR_VERITY)")]
    Verity,
    #[error("its data goes through the journal ({how})")]
    JournaledData { how: &'static str },
    #[error("it is an active swap file (/proc/swaps)")]
    Swap,
    #[error("it is accessed by DAX (STATX_ATTR_DAX)")]
    Dax,
    #[error("it lies on the XFS realtime device (FS_XFLAG_REALTIME)")]
    Realtime,
    #[error("its filesystem offers no direct I/O on it (stx_dio_mem_align is 0)")]
    NoDirectIo,
    #[error("a hole of {len} bytes at file offset {file_offset}")]
    Hole { file_offset: ByteOffset, len: ByteLen },
    #[error("{len} bytes at file offset {file_offset} are allocated but unwritten (FIEMAP_EXTENT_UNWRITTEN)")]
    Unwritten { file_offset: ByteOffset, len: ByteLen },
    #[error("{len} bytes at file offset {file_offset} are shared with another file (FIEMAP_EXTENT_SHARED)")]
    Shared { file_offset: ByteOffset, len: ByteLen },
    #[error("{len} bytes at file offset {file_offset} are not allocated yet (FIEMAP_EXTENT_DELALLOC)")]
    Delalloc { file_offset: ByteOffset, len: ByteLen },
    #[error("the place of {len} bytes at file offset {file_offset} is not known (FIEMAP_EXTENT_UNKNOWN)")]
    UnknownPlace { file_offset: ByteOffset, len: ByteLen },
    #[error("{len} bytes at file offset {file_offset} are encoded, e.g. compressed (FIEMAP_EXTENT_ENCODED)")]
    Encoded { file_offset: ByteOffset, len: ByteLen },
    #[error("{len} bytes at file offset {file_offset} are encrypted (FIEMAP_EXTENT_DATA_ENCRYPTED)")]
    EncryptedExtent { file_offset: ByteOffset, len: ByteLen },
    #[error("{len} bytes at file offset {file_offset} lie in the inode (FIEMAP_EXTENT_DATA_INLINE)")]
    Inline { file_offset: ByteOffset, len: ByteLen },
    #[error(
        "{len} bytes at file offset {file_offset} share their block with other files (FIEMAP_EXTENT_DATA_TAIL)"
    )]
    Tail { file_offset: ByteOffset, len: ByteLen },
    #[error("{len} bytes at file offset {file_offset} are on no block boundary (FIEMAP_EXTENT_NOT_ALIGNED)")]
    NotAligned { file_offset: ByteOffset, len: ByteLen },
    #[error("{len} bytes at file offset {file_offset} have flags {bits:#x} that fastice does not know")]
    UnknownFlag { bits: u32, file_offset: ByteOffset, len: ByteLen },
    #[error(
        "the extent at file offset {file_offset} lies at {device_offset}, off the logical block of {block} bytes"
    )]
    Misaligned { file_offset: ByteOffset, device_offset: ByteOffset, block: BlockSize },
    #[error(
        "the extent at file offset {file_offset} lies at {device_offset}, not inside its device of {device_len} bytes"
    )]
    OutsideDevice { file_offset: ByteOffset, device_offset: ByteOffset, device_len: ByteLen },
}

impl Violation {
    /// A stable name for scripts.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NotRegular { .. } => "not-regular",
            Self::Empty => "empty",
            Self::Filesystem { .. } => "filesystem",
            Self::NoDisk { .. } => "no-disk",
            Self::Stacked { .. } => "stacked",
            Self::BlockSize { .. } => "block-size",
            Self::NoUuid => "no-uuid",
            Self::UnalignedSize { .. } => "unaligned-size",
            Self::Encrypted => "encrypted",
            Self::Verity => "verity",
            Self::JournaledData { .. } => "journaled-data",
            Self::Swap => "swap",
            Self::Dax => "dax",
            Self::Realtime => "realtime",
            Self::NoDirectIo => "no-direct-io",
            Self::Hole { .. } => "hole",
            Self::Unwritten { .. } => "unwritten",
            Self::Shared { .. } => "shared",
            Self::Delalloc { .. } => "delalloc",
            Self::UnknownPlace { .. } => "unknown-place",
            Self::Encoded { .. } => "encoded",
            Self::EncryptedExtent { .. } => "encrypted-extent",
            Self::Inline { .. } => "inline",
            Self::Tail { .. } => "tail",
            Self::NotAligned { .. } => "not-aligned",
            Self::UnknownFlag { .. } => "unknown-flag",
            Self::Misaligned { .. } => "misaligned",
            Self::OutsideDevice { .. } => "outside-device",
        }
    }

    /// What the operator can do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        let remedy = match self {
            Self::NotRegular { .. } => "name a regular file",
            Self::Empty => "give it its size first: `truncate -s SIZE`, then pin with --prepare",
            Self::Filesystem { .. } | Self::NoUuid => "copy the file to an XFS or ext4 filesystem",
            Self::NoDisk { .. } | Self::Stacked { .. } => {
                "copy the file to a filesystem that lies directly on a disk or a partition"
            }
            Self::BlockSize { .. } => "use a disk with logical blocks of 512 to 65536 bytes",
            Self::UnalignedSize { .. } | Self::Hole { .. } | Self::Unwritten { .. } | Self::Shared { .. } => {
                "pin with --prepare, or serve with `prepare = true`"
            }
            Self::Encrypted | Self::EncryptedExtent { .. } => {
                "copy the file to a directory without encryption"
            }
            Self::Verity => "copy the file; the copy has no fs-verity",
            Self::JournaledData { .. } => {
                "mount with data=ordered and `chattr -j` the file: the journal would overwrite served blocks"
            }
            Self::Swap => "swapoff it first",
            Self::Dax => "mount with dax=never, or `xfs_io -c 'chattr -x'` the file and drop its cache",
            Self::Realtime => {
                "copy the file to one of the data section: `xfs_io -c 'chattr -t'` an empty file first"
            }
            Self::NoDirectIo => "copy the file to a plain one (neither inline, encrypted nor journaled)",
            Self::Delalloc { .. } | Self::UnknownPlace { .. } => "stop its writers and `sync` it",
            Self::Encoded { .. } => "copy the file without compression",
            Self::Inline { .. } | Self::Tail { .. } | Self::NotAligned { .. } => {
                "grow the file beyond what fits the inode, or copy it to a filesystem without inline data"
            }
            Self::UnknownFlag { .. } => "use a fastice release that knows this kernel's flags",
            Self::Misaligned { .. } => {
                "copy the file to a filesystem whose block is a multiple of the logical block"
            }
            Self::OutsideDevice { .. } => "check the filesystem and the partition table",
        };
        remedy.to_owned()
    }

    /// Whether `--prepare` can mend it.
    #[must_use]
    pub const fn is_preparable(&self) -> bool {
        matches!(
            self,
            Self::UnalignedSize { .. } | Self::Hole { .. } | Self::Unwritten { .. } | Self::Shared { .. }
        ) || self.is_unsettled()
    }

    /// Whether a `sync` settles it.
    const fn is_unsettled(&self) -> bool {
        matches!(self, Self::Delalloc { .. } | Self::UnknownPlace { .. })
    }
}

/// Every reason against serving the file of `facts` with the extents `records` (in file order): first those of the
/// file as a whole, then those of its extents in file order. Blocks beyond the size do not count.
#[must_use]
pub fn violations(facts: &FileFacts, records: &[RawExtent]) -> Vec<Violation> {
    let mut found = of_file(facts);
    if facts.not_regular.is_some() {
        return found;
    }
    let size = facts.size.get();
    let mut covered = 0;
    for record in records.iter().take_while(|record| record.file_offset.get() < size) {
        let at = record.file_offset.get();
        if at > covered {
            found.push(Violation::Hole { file_offset: ByteOffset(covered), len: ByteLen(at - covered) });
        }
        covered = record.file_end();
        found.extend(of_record(facts, record));
    }
    if covered < size {
        found.push(Violation::Hole { file_offset: ByteOffset(covered), len: ByteLen(size - covered) });
    }
    found
}

/// The reasons that lie in the file, its filesystem or its disk.
pub(super) fn of_file(facts: &FileFacts) -> Vec<Violation> {
    let mut found = Vec::new();
    if let Some(what) = facts.not_regular {
        // Nothing else about a directory or a device is worth mending.
        return vec![Violation::NotRegular { what }];
    }
    if facts.filesystem.is_none() {
        found.push(Violation::Filesystem { name: facts.filesystem_name.clone() });
    }
    if facts.size.get() == 0 {
        found.push(Violation::Empty);
    }
    if facts.filesystem.is_some() {
        match &facts.disk {
            Err(violation) => found.push(violation.clone()),
            Ok(disk) if disk.logical_block_size.blocks_in(facts.size).is_none() => {
                found.push(Violation::UnalignedSize { size: facts.size, block: disk.logical_block_size });
            }
            Ok(_) => {}
        }
        if facts.filesystem_uuid.is_none() {
            found.push(Violation::NoUuid);
        }
    }
    let flags = [
        (facts.encrypted, Violation::Encrypted),
        (facts.verity, Violation::Verity),
        (facts.swap, Violation::Swap),
        (facts.dax, Violation::Dax),
        (facts.realtime, Violation::Realtime),
    ];
    found.extend(flags.into_iter().filter_map(|(set, violation)| set.then_some(violation)));
    if let Some(how) = facts.journaled_data {
        found.push(Violation::JournaledData { how });
    }
    // Inline, encrypted and journaled files have no direct I/O either; those reasons say more.
    if facts.no_direct_io && found.is_empty() {
        found.push(Violation::NoDirectIo);
    }
    found
}

/// The reason that lies in one record, if there is one.
pub(super) fn of_record(facts: &FileFacts, record: &RawExtent) -> Option<Violation> {
    of_flags(record).or_else(|| of_address(facts, record))
}

/// The most telling flag of a record, if one forbids to serve it.
fn of_flags(record: &RawExtent) -> Option<Violation> {
    let RawExtent { file_offset, len, flags, .. } = *record;
    let harmful = flags.difference(FiemapFlags::HARMLESS);
    if harmful.is_empty() {
        return None;
    }
    // Filesystems set NOT_ALIGNED with INLINE and TAIL, UNKNOWN with DELALLOC, ENCODED with ENCRYPTED: name the cause.
    let named = [
        (FiemapFlags::DATA_INLINE, Violation::Inline { file_offset, len }),
        (FiemapFlags::DATA_TAIL, Violation::Tail { file_offset, len }),
        (FiemapFlags::DATA_ENCRYPTED, Violation::EncryptedExtent { file_offset, len }),
        (FiemapFlags::ENCODED, Violation::Encoded { file_offset, len }),
        (FiemapFlags::DELALLOC, Violation::Delalloc { file_offset, len }),
        (FiemapFlags::UNKNOWN, Violation::UnknownPlace { file_offset, len }),
        (FiemapFlags::UNWRITTEN, Violation::Unwritten { file_offset, len }),
        (FiemapFlags::SHARED, Violation::Shared { file_offset, len }),
        (FiemapFlags::NOT_ALIGNED, Violation::NotAligned { file_offset, len }),
    ];
    let known = named.into_iter().find_map(|(flag, violation)| harmful.contains(flag).then_some(violation));
    Some(known.unwrap_or(Violation::UnknownFlag { bits: harmful.bits(), file_offset, len }))
}

/// Whether the place of a record is one that the disk can have.
fn of_address(facts: &FileFacts, record: &RawExtent) -> Option<Violation> {
    let disk = facts.disk.as_ref().ok()?;
    let RawExtent { file_offset, device_offset, len, .. } = *record;
    let block = disk.logical_block_size;
    let in_file = len.get().min(facts.size.get().saturating_sub(file_offset.get()));
    if !block.is_aligned(file_offset) || !block.is_aligned(device_offset) {
        return Some(Violation::Misaligned { file_offset, device_offset, block });
    }
    let device_len = disk.partition_len;
    let inside = device_offset.get().checked_add(in_file).is_some_and(|end| end <= device_len.get());
    // Offset 0 holds the superblock of XFS and the boot block of ext4, never file data.
    if !inside || device_offset.get() == 0 {
        return Some(Violation::OutsideDevice { file_offset, device_offset, device_len });
    }
    None
}
