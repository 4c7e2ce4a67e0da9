//! The device of a filesystem that is not mounted, while the kernel still has the disk: held exclusively.
//!
//! ```text
//!   record (disk, partition) --> /sys/block: the same disk, cut the same way --> /dev/NODE, O_EXCL
//!                                                                                  |
//!       EBUSY: it is mounted somewhere, in whatever mount namespace, or swap, or under a mapping
//!       else:  as long as it is open, the kernel refuses to mount it, and whoever else wants it exclusively
//!              (mkfs, e2fsck, xfs_repair, swapon, dmsetup, mdadm)
//! ```
//!
//! That is the guard of a file that is served so: nothing of the kernel changes a filesystem that is not mounted. What the device
//! holds is compared with the record before (see `handover`).
//!
//! What it does not do: keep root from writing to the device without asking for it exclusively, which is out of reach as ever.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::device::Sysfs;
use super::error::ExtentError;
use super::facts::number_of;
use super::identity::DiskIdentity;
use super::ondisk::ReadAt;
use super::record::StoredPin;
use crate::aligned::AlignedBuffer;

/// What direct I/O is cut by, on every disk that is served.
const BLOCK_LEN: u64 = 4096;

/// A device that nobody can mount as long as this lives.
#[derive(Debug)]
pub struct Unmounted {
    file: File,
    disk: DiskIdentity,
    buffer: std::sync::Mutex<AlignedBuffer>,
}

impl Unmounted {
    /// Holds the device of the filesystem that the file of `stored` is on.
    ///
    /// # Errors
    /// [`ExtentError::KernelHasIt`] while it is mounted, or somebody else has it exclusively, and when there is no such disk;
    /// [`ExtentError::Io`].
    pub fn hold(stored: &StoredPin) -> Result<Self, ExtentError> {
        Self::hold_beside(&Sysfs::system(), stored)
    }

    fn hold_beside(sysfs: &Sysfs, stored: &StoredPin) -> Result<Self, ExtentError> {
        let by = |by: String| Err(ExtentError::KernelHasIt { path: stored.path().to_path_buf(), by });
        let recorded = &stored.identity.disk;
        let found = sysfs
            .filesystem_device(recorded)
            .map_err(|source| ExtentError::io("list the disks below", Path::new("/sys/block"), source))?;
        let Some((number, disk)) = found else {
            return by(format!(
                "there is no disk like {} here, cut as it was when the file was pinned",
                recorded.name
            ));
        };
        let node = sysfs.device_node(number).unwrap_or_else(|| PathBuf::from("/dev"));
        // For reading: what is served is written by whoever opens the whole disk.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_DIRECT).open(&node);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                return by(format!("{} is mounted, or somebody else has it exclusively", node.display()));
            }
            Err(error) => return Err(ExtentError::io("open", &node, error)),
        };
        let is_it = file.metadata().is_ok_and(|meta| number_of(meta.rdev()) == number);
        if !is_it {
            return by(format!("{} is another device", node.display()));
        }
        Ok(Self { file, disk, buffer: std::sync::Mutex::new(AlignedBuffer::new(0)) })
    }

    /// Whether the filesystem of `stored` is on this device.
    #[must_use]
    pub fn is_of(&self, stored: &StoredPin) -> bool {
        self.disk.is_same_place(&stored.identity.disk)
    }

    /// The disk, as it is called in this boot.
    #[must_use]
    pub const fn disk(&self) -> &DiskIdentity {
        &self.disk
    }
}

impl ReadAt for &Unmounted {
    fn read_at(&mut self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let skip = offset % BLOCK_LEN;
        let first = offset - skip;
        let end = offset.checked_add(target.len() as u64).ok_or_else(outside)?;
        // The last block of a device may be a part of one.
        let end =
            end.checked_next_multiple_of(BLOCK_LEN).ok_or_else(outside)?.min(self.disk.partition_len.get());
        let len = usize::try_from(end.checked_sub(first).ok_or_else(outside)?).map_err(|_| outside())?;
        let mut buffer = self.buffer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if buffer.bytes().len() < len {
            *buffer = AlignedBuffer::new(len);
        }
        let bytes = buffer.bytes_mut().get_mut(..len).ok_or_else(outside)?;
        self.file.read_exact_at(bytes, first)?;
        let wanted = usize::try_from(skip).ok().and_then(|skip| bytes.get(skip..)?.get(..target.len()));
        target.copy_from_slice(wanted.ok_or_else(outside)?);
        Ok(())
    }
}
