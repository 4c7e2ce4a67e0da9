//! Finding a disk by its number, opening it, and reading what it is from sysfs.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use hugepage_alloc::BUFFER_LEN_MAX;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::UringOptions;
use crate::block::{DeviceInfo, OpenError, check};
use crate::units::{BlockSize, ByteLen};

/// The unit of `size` in sysfs, whatever the logical block size (kernel, `include/linux/blk_types.h`).
const SECTOR_BYTES: u64 = 512;

pub(super) fn open(options: &UringOptions) -> Result<(DeviceInfo, OwnedFd), OpenError> {
    let &UringOptions { major, minor, .. } = options;
    let sysfs = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let uevent = fs::read_to_string(sysfs.join("uevent")).map_err(|source| OpenError::NotFound {
        major,
        minor,
        source,
    })?;
    let node = node_path(&uevent, major, minor);
    if sysfs.join("partition").exists() {
        return Err(OpenError::Partition { path: node });
    }
    let read_only = options.read_only || number(&sysfs.join("ro"))? != 0;
    let fd = open_node(&node, read_only)?;
    check_identity(&fd, &node, major, minor)?;
    let info = read_info(&sysfs, &node, options, read_only)?;
    Ok((info, fd))
}

/// The device node, named by the kernel (`DEVNAME`, which may have subdirectories).
fn node_path(uevent: &str, major: u32, minor: u32) -> PathBuf {
    match uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")) {
        Some(name) => Path::new("/dev").join(name),
        None => PathBuf::from(format!("/dev/block/{major}:{minor}")),
    }
}

fn open_node(node: &Path, read_only: bool) -> Result<OwnedFd, OpenError> {
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    rustix::fs::open(node, access | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        let remedy = match errno {
            Errno::BUSY => {
                "the kernel refuses to write under a mounted filesystem (CONFIG_BLK_DEV_WRITE_MOUNTED=n): boot \
                 with bdev_allow_write_mounted=1, or export read-only"
            }
            Errno::ACCESS | Errno::PERM => {
                "run as root or in group disk, and allow the device in the service's device policy (systemd: \
                 DeviceAllow)"
            }
            Errno::INVAL => "the device does not support O_DIRECT",
            Errno::NOENT => "the node is missing: is /dev managed by devtmpfs or udev?",
            Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM => "the device is gone: attach it again",
            _ => "look into the kernel log",
        };
        OpenError::Open { path: node.to_owned(), remedy, source: errno.into() }
    })
}

/// A name can change its device between sysfs and here; the number of the open file cannot.
fn check_identity(fd: &OwnedFd, node: &Path, major: u32, minor: u32) -> Result<(), OpenError> {
    let stat = rustix::fs::fstat(fd)
        .map_err(|errno| OpenError::Property { path: node.to_owned(), source: errno.into() })?;
    let is_block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    if is_block && rustix::fs::major(stat.st_rdev) == major && rustix::fs::minor(stat.st_rdev) == minor {
        return Ok(());
    }
    Err(OpenError::WrongNode { path: node.to_owned(), major, minor })
}

fn read_info(
    sysfs: &Path,
    node: &Path,
    options: &UringOptions,
    read_only: bool,
) -> Result<DeviceInfo, OpenError> {
    let queue = sysfs.join("queue");
    let bad = |name: &str, what| OpenError::BadProperty { path: queue.join(name), what };
    let logical_block_size = u32::try_from(number(&queue.join("logical_block_size"))?)
        .ok()
        .and_then(BlockSize::new)
        .ok_or_else(|| bad("logical_block_size", "no power of two from 512 to 65536"))?;
    let physical_block_bytes = u32::try_from(number(&queue.join("physical_block_size"))?)
        .map_err(|_| bad("physical_block_size", "does not fit 32 bits"))?;
    let len = number(&sysfs.join("size"))?.checked_mul(SECTOR_BYTES).map(ByteLen).ok_or_else(|| {
        OpenError::BadProperty { path: sysfs.join("size"), what: "does not fit 64 bits in bytes" }
    })?;
    check::check_size(len, logical_block_size)?;
    Ok(DeviceInfo {
        name: node.display().to_string(),
        dev: Some((options.major, options.minor)),
        logical_block_size,
        physical_block_bytes: physical_block_bytes.max(logical_block_size.bytes()),
        len,
        // Whatever is not plainly "write through" counts as volatile: a flush too many only costs time.
        volatile_write_cache: text(&queue.join("write_cache"))? != "write through",
        write_zeroes: !read_only,
        deallocate: !read_only && number(&queue.join("write_zeroes_max_bytes"))? > 0,
        transfer_len_max: ByteLen(BUFFER_LEN_MAX as u64),
        read_only,
    })
}

fn text(path: &Path) -> Result<String, OpenError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim_end().to_owned()),
        Err(source) => Err(OpenError::Property { path: path.to_owned(), source }),
    }
}

fn number(path: &Path) -> Result<u64, OpenError> {
    text(path)?.parse().map_err(|error| OpenError::Property {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_is_named_by_the_kernel() {
        let uevent = "MAJOR=259\nMINOR=3\nDEVNAME=nvme0n1\nDEVTYPE=disk\n";
        assert_eq!(node_path(uevent, 259, 3), Path::new("/dev/nvme0n1"));
        assert_eq!(node_path("DEVNAME=cciss/c0d0", 104, 0), Path::new("/dev/cciss/c0d0"));
        assert_eq!(node_path("", 104, 0), Path::new("/dev/block/104:0"));
    }

    #[test]
    fn a_number_nobody_has_is_refused() {
        let error = UringOptions { major: 4095, minor: 77, read_only: true };
        assert!(matches!(open(&error), Err(OpenError::NotFound { major: 4095, minor: 77, .. })));
    }
}
