//! A block device of the kernel, O_DIRECT over io_uring: works on any host, and under a mounted filesystem.
//!
//! | operation | system call | notes |
//! |---|---|---|
//! | Read, Write | `READ_FIXED`, `WRITE_FIXED` | short transfers are continued; the kernel splits what is above the device's limit |
//! | Write, FUA | with `RWF_DSYNC` | becomes REQ_FUA, or a flush where the device has no FUA |
//! | Flush | `fsync` | writes back the device's page cache, then flushes its volatile cache |
//! | Write Zeroes | `FALLOC_FL_ZERO_RANGE`, then `fsync` for FUA | the kernel writes zeros where the device cannot |
//! | Write Zeroes, deallocate | `FALLOC_FL_PUNCH_HOLE` | reads as zeros afterwards; where the device cannot, as above |
//! | Deallocate | `FALLOC_FL_PUNCH_HOLE` | advisory: where the device cannot, success and nothing done |
//!
//! What it does not do: IOPOLL (it needs a ring without sockets), NVMe passthrough, follow a device that changes
//! its size.

mod open;
mod queue;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hugepage_alloc::BufferPool;

use super::{BlockDevice, BlockError, BlockErrorCause, BlockErrorKind, BlockQueue, DeviceInfo, OpenError};
use crate::ring::Ring;

/// Which device to open, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UringOptions {
    /// Major number of the whole disk.
    pub major: u32,
    /// Minor number of the whole disk.
    pub minor: u32,
    /// Whether to open it read-only. A device that is read-only itself is opened so anyway.
    pub read_only: bool,
}

/// A block device of the kernel.
#[derive(Debug)]
pub struct UringDevice {
    info: Arc<DeviceInfo>,
    fd: OwnedFd,
}

impl UringDevice {
    /// Opens the whole disk with the given number, and checks that it is that one.
    ///
    /// # Errors
    /// When there is no such disk, it is a partition, or the kernel refuses; the message says what to do.
    pub fn open(options: &UringOptions) -> Result<Self, OpenError> {
        let (info, fd) = open::open(options)?;
        Ok(Self { info: Arc::new(info), fd })
    }
}

impl BlockDevice for UringDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(
        &self,
        ring: &Ring,
        _: &BufferPool,
        depth: usize,
    ) -> Result<Box<dyn BlockQueue>, BlockError> {
        let fd = self.fd.try_clone().map_err(|error| BlockError {
            kind: BlockErrorKind::Internal,
            cause: error.raw_os_error().map(BlockErrorCause::Errno),
        })?;
        Ok(Box::new(queue::UringQueue::new(Arc::clone(&self.info), ring, ring.register_file(fd), depth)))
    }
}
