//! What goes wrong with a block device: while opening it, and per operation.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why an operation failed. Small and stable: the NVMe status is chosen by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockErrorKind {
    /// The device could not read the data back: it is lost, or damaged.
    Media,
    /// The device could not write.
    WriteFault,
    /// The range leaves the device.
    OutOfRange,
    /// The device is read-only.
    ReadOnly,
    /// The device cannot do this.
    NotSupported,
    /// A thinly provisioned device is full.
    NoSpace,
    /// The device did not answer in time.
    TimedOut,
    /// The device is gone, or cannot be reached.
    Gone,
    /// The operation was cancelled.
    Aborted,
    /// The operation makes no sense: misaligned, without a buffer, or too large.
    InvalidRequest,
    /// Resources of this host, or an error of this program.
    Internal,
}

impl fmt::Display for BlockErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Media => "the device could not read the data",
            Self::WriteFault => "the device could not write the data",
            Self::OutOfRange => "the range leaves the device",
            Self::ReadOnly => "the device is read-only",
            Self::NotSupported => "the device does not support the operation",
            Self::NoSpace => "the device has no space left",
            Self::TimedOut => "the device did not answer in time",
            Self::Gone => "the device is gone",
            Self::Aborted => "the operation was cancelled",
            Self::InvalidRequest => "the operation is misaligned, without buffer, or too large",
            Self::Internal => "the host lacks resources for the operation",
        })
    }
}

/// Why an operation failed, with the errno the kernel gave if it was asked. `Copy`: making one allocates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockError {
    /// The kind, by which callers decide.
    pub kind: BlockErrorKind,
    /// The kernel's error number, for logs.
    pub errno: Option<i32>,
}

impl BlockError {
    /// An error found by us.
    #[must_use]
    pub const fn new(kind: BlockErrorKind) -> Self {
        Self { kind, errno: None }
    }

    /// The error the kernel's block layer reports for a read (`is_write` false) or anything else.
    ///
    /// The numbers are those of `blk_errors` in `block/blk-core.c`: ENODATA a medium error, EILSEQ a protection
    /// error, ENOLINK the transport, EREMOTEIO the target, ENODEV an offline device, ETIME a duration limit.
    #[must_use]
    pub fn from_errno(errno: i32, is_write: bool) -> Self {
        let kind = match errno {
            libc::EIO | libc::ENODATA | libc::EILSEQ | libc::EREMOTEIO if is_write => {
                BlockErrorKind::WriteFault
            }
            libc::EIO | libc::ENODATA | libc::EILSEQ | libc::EREMOTEIO => BlockErrorKind::Media,
            libc::ENOSPC | libc::EDQUOT => BlockErrorKind::NoSpace,
            libc::EROFS | libc::EPERM | libc::EBADF => BlockErrorKind::ReadOnly,
            libc::EOPNOTSUPP | libc::ENOTTY => BlockErrorKind::NotSupported,
            libc::ETIMEDOUT | libc::ETIME => BlockErrorKind::TimedOut,
            libc::ENODEV | libc::ENXIO | libc::ENOLINK | libc::ENOMEDIUM => BlockErrorKind::Gone,
            libc::ECANCELED | libc::EINTR => BlockErrorKind::Aborted,
            libc::EINVAL | libc::EFAULT => BlockErrorKind::InvalidRequest,
            _ => BlockErrorKind::Internal,
        };
        Self { kind, errno: Some(errno) }
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno {
            Some(errno) => write!(f, "{} ({})", self.kind, io::Error::from_raw_os_error(errno)),
            None => fmt::Display::fmt(&self.kind, f),
        }
    }
}

impl std::error::Error for BlockError {}

impl From<BlockErrorKind> for BlockError {
    fn from(kind: BlockErrorKind) -> Self {
        Self::new(kind)
    }
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No block device has the number.
    #[error("no block device {major}:{minor} in /sys/dev/block: is it still attached?")]
    NotFound {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The number is that of a partition.
    #[error("{path} is a partition: offsets are on the whole disk, open that")]
    Partition {
        /// The partition.
        path: PathBuf,
    },
    /// The device node is that of another device.
    #[error("{path} is not block device {major}:{minor}: is /dev managed by devtmpfs or udev?")]
    WrongNode {
        /// The node that was opened.
        path: PathBuf,
        /// Major number wanted.
        major: u32,
        /// Minor number wanted.
        minor: u32,
    },
    /// Opening the node failed.
    #[error("opening {path} with O_DIRECT failed: {remedy}")]
    Open {
        /// The device node.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A property of the device cannot be had.
    #[error("reading {path} failed")]
    Property {
        /// The file in sysfs, or the device node.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A property of the device is not what a block device may have.
    #[error("{path}: {what}")]
    BadProperty {
        /// The file in sysfs, or the device node.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Memory for a memory device cannot be had.
    #[error("a memory device of {bytes} bytes cannot be made: use a smaller one")]
    Memory {
        /// Its size.
        bytes: u64,
        /// Why.
        #[source]
        source: hugepage_alloc::AllocError,
    },
    /// The size is no positive multiple of the block size.
    #[error("a device of {bytes} bytes is no positive multiple of its block size {block_size}")]
    BadSize {
        /// Its size.
        bytes: u64,
        /// Its block size.
        block_size: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_layers_errors_keep_their_meaning() {
        use BlockErrorKind as Kind;
        for (errno, read, write) in [
            (libc::EIO, Kind::Media, Kind::WriteFault),
            (libc::ENODATA, Kind::Media, Kind::WriteFault),
            (libc::EILSEQ, Kind::Media, Kind::WriteFault),
            (libc::ENOSPC, Kind::NoSpace, Kind::NoSpace),
            (libc::ETIMEDOUT, Kind::TimedOut, Kind::TimedOut),
            (libc::ENOLINK, Kind::Gone, Kind::Gone),
            (libc::ENODEV, Kind::Gone, Kind::Gone),
            (libc::EOPNOTSUPP, Kind::NotSupported, Kind::NotSupported),
            (libc::ECANCELED, Kind::Aborted, Kind::Aborted),
            (libc::EINVAL, Kind::InvalidRequest, Kind::InvalidRequest),
            (libc::ENOMEM, Kind::Internal, Kind::Internal),
            (libc::EPERM, Kind::ReadOnly, Kind::ReadOnly),
        ] {
            assert_eq!(BlockError::from_errno(errno, false), BlockError { kind: read, errno: Some(errno) });
            assert_eq!(BlockError::from_errno(errno, true), BlockError { kind: write, errno: Some(errno) });
        }
    }
}
