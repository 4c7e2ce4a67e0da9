//! The map of a file as it stands on the device, read without the kernel: for a filesystem that is not mounted.
//!
//! ```text
//!   a pin made while mounted ---- stored map ----------------------.
//!                                                                   compare
//!   unmounted device: superblock -> inode -> extents on the disk --'
//! ```
//!
//! A controller that is handed over to user space takes its filesystem away from the kernel, and with it FIEMAP. What
//! remains is what the filesystem wrote: the superblock with its UUID, the inode with its generation and immutable
//! flag, and the extent tree. [`read`] takes the map from there, so that a stored map can be compared with the device
//! itself before the first grant.
//!
//! Whatever is read may be anything: every address is checked, every walk is bounded, unknown features are refused.
//! Checksums of the metadata are not verified: what decides is that the result equals the stored map.
//!
//! What it does not do: replay a journal (a filesystem that was not unmounted in order is refused: what its journal holds may
//! have given the blocks to another file), follow XFS realtime files or ext4 files without extents,
//! find a file by its path.

mod bytes;
mod ext4;
mod xfs;

use std::io;

use super::fiemap::RawExtent;
use super::identity::{FilesystemKind, MapIdentity};
use crate::units::{ByteLen, ByteOffset};

/// The most extents that are read: more than a stored pin may hold.
const EXTENTS_MAX: usize = 64 << 20;

/// The device that holds a filesystem.
pub trait ReadAt {
    /// Fills `target` from `offset`, in bytes from where the FILESYSTEM begins.
    ///
    /// # Errors
    /// When not all of it can be read.
    fn read_at(&mut self, offset: u64, target: &mut [u8]) -> io::Result<()>;
}

/// A file as the device has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnDiskFile {
    /// Its size.
    pub size: ByteLen,
    /// Whether its immutable flag is set.
    pub immutable: bool,
    /// Its extents in file order; device offsets count from where the filesystem begins.
    pub extents: Vec<RawExtent>,
}

/// Why the device does not tell the map of the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OnDiskError {
    /// The device cannot be read.
    #[error("the device cannot be read at byte {offset} of the filesystem")]
    Io {
        /// From where the filesystem begins.
        offset: u64,
        /// What the device said.
        #[source]
        source: io::Error,
    },
    /// There is another filesystem, or none.
    #[error("the device holds no {kind} with the UUID of the pinned file's filesystem")]
    OtherFilesystem {
        /// Which kind was looked for.
        kind: FilesystemKind,
    },
    /// There is another file at the inode number, or none.
    #[error("inode {inode} is no longer the pinned file")]
    OtherFile {
        /// The inode number.
        inode: u64,
    },
    /// It is the file, but anybody who mounts the filesystem could change it.
    #[error("the file is not immutable on the device")]
    NotImmutable,
    /// The filesystem wants its journal replayed first.
    #[error("the filesystem was not unmounted in order: its journal must be replayed first")]
    Unclean,
    /// The filesystem or the file is of a kind that is not read here.
    #[error("{what} is not read without mounting the filesystem")]
    Unsupported {
        /// What it is.
        what: &'static str,
    },
    /// What stands there cannot be.
    #[error("the {what} at byte {offset} of the filesystem is damaged")]
    Damaged {
        /// What was read.
        what: &'static str,
        /// From where the filesystem begins.
        offset: u64,
    },
}

impl OnDiskError {
    /// What the operator can do about it.
    #[must_use]
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Io { .. } => "look into the kernel log and the device's error log (`fastice device probe`)",
            Self::OtherFilesystem { .. } => "name the controller that has the namespace of the pinned file",
            Self::OtherFile { .. } => {
                "the file was removed or replaced: give the controller back, mount, and look (`fastice pins`)"
            }
            Self::NotImmutable => "give the controller back, mount, and pin the file again",
            Self::Unclean => {
                "mount the filesystem (give its controller back before, if fastice has it), unmount it, and try again"
            }
            Self::Unsupported { .. } => "serve the file while its filesystem is mounted",
            Self::Damaged { .. } => {
                "give the controller back and check the filesystem (xfs_repair -n, e2fsck -n)"
            }
        }
    }
}

/// Reads the file of `identity` from the device of its filesystem.
///
/// # Errors
/// Any [`OnDiskError`].
pub fn read(device: &mut dyn ReadAt, identity: &MapIdentity) -> Result<OnDiskFile, OnDiskError> {
    match identity.filesystem.kind {
        FilesystemKind::Xfs => xfs::read(device, identity),
        FilesystemKind::Ext4 => ext4::read(device, identity),
    }
}

fn read_vec(device: &mut dyn ReadAt, offset: u64, len: usize) -> Result<Vec<u8>, OnDiskError> {
    let mut data = vec![0; len];
    device.read_at(offset, &mut data).map_err(|source| OnDiskError::Io { offset, source })?;
    Ok(data)
}

/// Extents as they are found, in file order.
struct Found {
    extents: Vec<RawExtent>,
    /// Bytes a block.
    block: u64,
    /// Blocks of the filesystem.
    blocks: u64,
}

impl Found {
    const fn new(block: u64, blocks: u64) -> Self {
        Self { extents: Vec::new(), block, blocks }
    }

    /// Adds `count` blocks of the file from `file_block` at `device_block`. False when that cannot be.
    fn add(&mut self, file_block: u64, device_block: u64, count: u64, unwritten: bool) -> bool {
        use super::fiemap::FiemapFlags;
        let inside = device_block.checked_add(count).is_some_and(|end| end <= self.blocks);
        let bytes = |blocks: u64| blocks.checked_mul(self.block);
        let (Some(file_offset), Some(device_offset), Some(len)) =
            (bytes(file_block), bytes(device_block), bytes(count))
        else {
            return false;
        };
        let follows = self.extents.last().is_none_or(|last| last.file_end() <= file_offset);
        let ends = file_offset.checked_add(len).is_some();
        if count == 0 || !inside || !follows || !ends || self.extents.len() >= EXTENTS_MAX {
            return false;
        }
        let flags = if unwritten { FiemapFlags::UNWRITTEN } else { FiemapFlags::empty() };
        self.extents.push(RawExtent {
            file_offset: ByteOffset(file_offset),
            device_offset: ByteOffset(device_offset),
            len: ByteLen(len),
            flags,
        });
        true
    }
}
