//! What a device must hold if it is the one under a pinned file.
//!
//! ```text
//!   through the filesystem                          by another way (its caller's business)
//!   superblock: kind, UUID                          the same bytes of the whole disk
//!   file blocks, O_DIRECT: first, last, random  --> Sample { device_offset, len } --check--> or a Mismatch
//! ```
//!
//! Identifiers can lie: a namespace may be cloned, a bridge may make them up, and an address off by a partition start
//! reads perfectly well. So before a driver of ours serves a pinned file, what it reads at the addresses of the frozen
//! map is compared with what the filesystem reads. The file is pinned, so neither side can change meanwhile.
//!
//! What it does not do: tell a device from a copy of it that is equal in all that was looked at.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::Arc;
use std::time::Instant;

use super::error::ExtentError;
use super::identity::{FilesystemKind, to_hex};
use super::lookup::{LookupCursor, LookupHint};
use super::map::FrozenMap;
use super::verify::{VerifyReport, verify_file};
use crate::units::{ByteLen, ByteOffset};

/// Direct I/O is content with this alignment of memory on any device that can be served.
const MEMORY_ALIGN: usize = 4096;
/// Where both filesystems have their superblock: in the first 4 KiB.
const SUPERBLOCK_LEN: u64 = 4096;
/// Random blocks that are compared, beside the first and the last one.
const RANDOM_SAMPLES: usize = 62;

/// What is looked at on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleOf {
    /// The filesystem's superblock.
    Superblock,
    /// A block of the file.
    File {
        /// Where in the file.
        file_offset: ByteOffset,
    },
}

/// Some bytes of the whole disk, and what they must be.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Where on the whole disk.
    pub device_offset: ByteOffset,
    /// How many bytes: a multiple of the logical block.
    pub len: ByteLen,
    /// What lies there.
    pub of: SampleOf,
    expected: Expected,
}

#[derive(Clone, Debug)]
enum Expected {
    Superblock { kind: FilesystemKind, uuid: [u8; 16] },
    Bytes(Box<[u8]>),
}

/// How a device differs from the one under the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// No superblock where it must be.
    #[error("no {kind} superblock at byte {device_offset} of the disk")]
    NoSuperblock {
        /// The filesystem.
        kind: FilesystemKind,
        /// Where it was looked for.
        device_offset: ByteOffset,
    },
    /// Another filesystem of the same kind.
    #[error("the {kind} filesystem at byte {device_offset} of the disk has UUID {found}, not {expected}")]
    OtherFilesystem {
        /// The filesystem.
        kind: FilesystemKind,
        /// Where it begins.
        device_offset: ByteOffset,
        /// The UUID that was read.
        found: String,
        /// The UUID of the mounted filesystem.
        expected: String,
    },
    /// Other bytes than the file has.
    #[error("the block at byte {device_offset} of the disk is not the block at {file_offset} of the file")]
    OtherBytes {
        /// Where on the disk.
        device_offset: ByteOffset,
        /// Where in the file.
        file_offset: ByteOffset,
    },
    /// Fewer bytes than were asked for.
    #[error("only {found} bytes were read at byte {device_offset} of the disk")]
    Short {
        /// Where on the disk.
        device_offset: ByteOffset,
        /// How many bytes there were.
        found: usize,
    },
}

impl Sample {
    /// Whether `bytes`, read from the place of the sample by another way, are what is there.
    ///
    /// # Errors
    /// How they differ.
    pub fn check(&self, bytes: &[u8]) -> Result<(), Mismatch> {
        let device_offset = self.device_offset;
        if u64::try_from(bytes.len()) != Ok(self.len.get()) {
            return Err(Mismatch::Short { device_offset, found: bytes.len() });
        }
        match (&self.expected, self.of) {
            (Expected::Superblock { kind, uuid }, _) => check_superblock(*kind, uuid, device_offset, bytes),
            (Expected::Bytes(expected), SampleOf::File { file_offset }) if **expected != *bytes => {
                Err(Mismatch::OtherBytes { device_offset, file_offset })
            }
            (Expected::Bytes(_), _) => Ok(()),
        }
    }

    /// Whether it could tell one device from another: a block of nothing but equal bytes is everywhere.
    #[must_use]
    pub fn is_telling(&self) -> bool {
        match &self.expected {
            Expected::Superblock { .. } => true,
            Expected::Bytes(bytes) => {
                bytes.first().is_some_and(|first| bytes.iter().any(|byte| byte != first))
            }
        }
    }
}

/// XFS: `struct xfs_dsb`, sb_magicnum at 0 and sb_uuid at 32. ext4: the superblock is at 1024, with s_magic at 0x38 and
/// s_uuid at 0x68.
fn check_superblock(
    kind: FilesystemKind,
    uuid: &[u8; 16],
    device_offset: ByteOffset,
    bytes: &[u8],
) -> Result<(), Mismatch> {
    let (magic_at, magic, uuid_at): (usize, &[u8], usize) = match kind {
        FilesystemKind::Xfs => (0, b"XFSB", 32),
        FilesystemKind::Ext4 => (1024 + 0x38, &[0x53, 0xEF], 1024 + 0x68),
    };
    if bytes.get(magic_at..).is_none_or(|rest| !rest.starts_with(magic)) {
        return Err(Mismatch::NoSuperblock { kind, device_offset });
    }
    let found = bytes.get(uuid_at..).and_then(<[u8]>::first_chunk::<16>).copied().unwrap_or_default();
    if found == *uuid {
        return Ok(());
    }
    let (found, expected) = (to_hex(&found), to_hex(uuid));
    Err(Mismatch::OtherFilesystem { kind, device_offset, found, expected })
}

/// A pinned file as somebody else may look at it, on another thread: what it holds, and whether its map is still true.
/// Does not keep the file pinned.
#[derive(Debug)]
pub struct Witness {
    file: File,
    map: Arc<FrozenMap>,
}

impl Witness {
    pub(super) const fn new(file: File, map: Arc<FrozenMap>) -> Self {
        Self { file, map }
    }

    /// The map of the file.
    #[must_use]
    pub fn map(&self) -> &Arc<FrozenMap> {
        &self.map
    }

    /// Compares the frozen map with the living file.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when the filesystem does not answer, which is no reason to trust the map.
    pub fn verify(&self) -> Result<VerifyReport, ExtentError> {
        verify_file(self.map.identity(), self.map.extents(), &self.file)
    }

    /// What the device must hold: the superblock, the first and the last block of the file, and random ones until
    /// `deadline`, each read through the filesystem past the page cache.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when the file cannot be read.
    pub fn samples(&self, deadline: Instant) -> Result<Vec<Sample>, ExtentError> {
        let identity = self.map.identity();
        let reader = Reader::open(self)?;
        let mut samples = Vec::with_capacity(RANDOM_SAMPLES + 3);
        samples.push(Sample {
            device_offset: identity.disk.partition_start,
            len: ByteLen(SUPERBLOCK_LEN),
            of: SampleOf::Superblock,
            expected: Expected::Superblock { kind: identity.filesystem.kind, uuid: identity.filesystem.uuid },
        });
        // Of what is served: the rest is the kernel's to change.
        let blocks = identity.served().get().div_ceil(reader.block_len);
        samples.extend(reader.sample(0)?);
        samples.extend(reader.sample(blocks.saturating_sub(1))?);
        let random = RandomState::new();
        for number in 0..RANDOM_SAMPLES {
            if Instant::now() >= deadline {
                break;
            }
            let Some(block) = random.hash_one(number).checked_rem(blocks) else { break };
            samples.extend(reader.sample(block)?);
        }
        Ok(samples)
    }
}

/// Reads blocks of the file by direct I/O. A block is as long as one of the filesystem; where it crosses extents, its first
/// part is looked at.
struct Reader<'a> {
    witness: &'a Witness,
    direct: File,
    block_len: u64,
}

impl<'a> Reader<'a> {
    fn open(witness: &'a Witness) -> Result<Self, ExtentError> {
        let identity = witness.map.identity();
        // The very inode that is pinned, whatever its name is now. The guard lets this process in.
        let again = format!("/proc/self/fd/{}", witness.file.as_raw_fd());
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(again)
            .map_err(|source| ExtentError::io("open for direct I/O", &identity.path, source))?;
        let block_len = identity.filesystem.block_size.max(identity.disk.logical_block_size.bytes());
        Ok(Self { witness, direct, block_len: block_len.into() })
    }

    /// The sample of a block of what is served; `None` for one that the map does not have, which only a broken map could bring about.
    fn sample(&self, block: u64) -> Result<Option<Sample>, ExtentError> {
        let map = &self.witness.map;
        let start = ByteOffset(block.saturating_mul(self.block_len));
        let len = ByteLen(self.block_len.min(map.len().get().saturating_sub(start.get())));
        let mut cursor = LookupCursor::default();
        // As commands are looked up, in one step, and the first part where a block has several.
        let segment = map
            .segment(&mut cursor, LookupHint::NONE, start, len)
            .or_else(|| map.segments(&mut cursor, start, len).ok().and_then(|mut found| found.next()));
        let Some(segment) = segment else { return Ok(None) };
        let file_offset = segment.file_offset;
        let bytes = self
            .read(file_offset, segment.len)
            .map_err(|source| ExtentError::io("read", &map.identity().path, source))?;
        Ok(Some(Sample {
            device_offset: segment.device_offset,
            len: segment.len,
            of: SampleOf::File { file_offset },
            expected: Expected::Bytes(bytes),
        }))
    }

    fn read(&self, at: ByteOffset, len: ByteLen) -> io::Result<Box<[u8]>> {
        let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let block_len = usize::try_from(self.block_len).map_err(too_large)?;
        let len = usize::try_from(len.get()).map_err(too_large)?;
        let mut memory = vec![0; block_len.saturating_add(MEMORY_ALIGN)];
        let start = memory.as_ptr().align_offset(MEMORY_ALIGN);
        let block = memory.get_mut(start..).and_then(|rest| rest.get_mut(..block_len));
        let block = block.ok_or(io::ErrorKind::InvalidInput)?;
        // The last block of a file is read whole and ends where the file does.
        let count = self.direct.read_at(block, at.get())?;
        if count < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(block.get(..len).unwrap_or_default().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: ByteOffset = ByteOffset(1 << 20);

    fn superblock(kind: FilesystemKind) -> Sample {
        let expected = Expected::Superblock { kind, uuid: *b"0123456789abcdef" };
        Sample { device_offset: AT, len: ByteLen(SUPERBLOCK_LEN), of: SampleOf::Superblock, expected }
    }

    #[test]
    fn superblocks_are_known_by_magic_and_uuid() {
        for (kind, magic_at, magic, uuid_at) in [
            (FilesystemKind::Xfs, 0, &b"XFSB"[..], 32),
            (FilesystemKind::Ext4, 1080, &[0x53, 0xEF][..], 1128),
        ] {
            let sample = superblock(kind);
            let mut bytes = vec![0; 4096];
            let none = Mismatch::NoSuperblock { kind, device_offset: AT };
            assert_eq!(sample.check(&bytes), Err(none));
            bytes[magic_at..magic_at + magic.len()].copy_from_slice(magic);
            let other = sample.check(&bytes).expect_err("no UUID yet");
            assert!(matches!(&other, Mismatch::OtherFilesystem { .. }), "{other}");
            bytes[uuid_at..uuid_at + 16].copy_from_slice(b"0123456789abcdef");
            assert_eq!(sample.check(&bytes), Ok(()));
            assert_eq!(sample.check(&bytes[..4095]), Err(Mismatch::Short { device_offset: AT, found: 4095 }));
            assert_eq!(sample.check(&[]), Err(Mismatch::Short { device_offset: AT, found: 0 }));
        }
    }

    #[test]
    fn one_byte_is_enough_to_differ() {
        let of = SampleOf::File { file_offset: ByteOffset(8192) };
        let expected = Expected::Bytes(vec![7; 512].into());
        let sample = Sample { device_offset: AT, len: ByteLen(512), of, expected };
        assert!(!sample.is_telling());
        assert_eq!(sample.check(&[7; 512]), Ok(()));
        let mut bytes = [7; 512];
        bytes[511] = 8;
        let file_offset = ByteOffset(8192);
        assert_eq!(sample.check(&bytes), Err(Mismatch::OtherBytes { device_offset: AT, file_offset }));
    }
}
