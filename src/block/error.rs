//! What goes wrong with a block device: while opening it, and per operation.

use std::fmt;
use std::io;
use std::path::PathBuf;

use nvme_spec::Status;
use nvme_spec::status::sct;

use super::nvme::ReachError;

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

/// What the kernel or the device said, for logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockErrorCause {
    /// The kernel's error number.
    Errno(i32),
    /// The NVMe controller's status.
    Nvme(Status),
}

/// Why an operation failed, with what the kernel or the device said of it. `Copy`: making one allocates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockError {
    /// The kind, by which callers decide.
    pub kind: BlockErrorKind,
    /// What was said, when it was not us who found the error.
    pub cause: Option<BlockErrorCause>,
}

impl BlockError {
    /// An error found by us.
    #[must_use]
    pub const fn new(kind: BlockErrorKind) -> Self {
        Self { kind, cause: None }
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
        Self { kind, cause: Some(BlockErrorCause::Errno(errno)) }
    }

    /// The error that an NVMe controller reports for a read (`is_write` false) or anything else (Base specification,
    /// section 4.2.3; NVM Command Set specification, section 3.1.3).
    ///
    /// What this table does not know is a failure of the medium when the controller says that it is not worth another
    /// try, and one of the host's side when it does not say so.
    #[must_use]
    pub fn from_status(status: Status, is_write: bool) -> Self {
        use BlockErrorKind as Kind;
        let medium = if is_write { Kind::WriteFault } else { Kind::Media };
        let kind = match status.code() {
            Status::LBA_OUT_OF_RANGE => Kind::OutOfRange,
            Status::CAPACITY_EXCEEDED => Kind::NoSpace,
            Status::NAMESPACE_WRITE_PROTECTED | Status::ACCESS_DENIED if is_write => Kind::ReadOnly,
            Status::INVALID_OPCODE => Kind::NotSupported,
            Status::INVALID_FIELD | Status::PRP_OFFSET_INVALID | Status::DATA_SGL_LENGTH_INVALID => {
                Kind::InvalidRequest
            }
            // We ask for an abort only when a command is late.
            Status::COMMAND_ABORT_REQUESTED => Kind::TimedOut,
            Status::ABORTED_SQ_DELETION | Status::COMMAND_INTERRUPTED => Kind::Aborted,
            Status::NAMESPACE_NOT_READY | Status::INVALID_NAMESPACE | Status::POWER_LOSS => Kind::Gone,
            _ if status.sct() == sct::PATH => Kind::Gone,
            _ if status.sct() == sct::MEDIA || status.dnr() => medium,
            _ => Kind::Internal,
        };
        Self { kind, cause: Some(BlockErrorCause::Nvme(status)) }
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            Some(BlockErrorCause::Errno(errno)) => {
                write!(f, "{} ({})", self.kind, io::Error::from_raw_os_error(errno))
            }
            Some(BlockErrorCause::Nvme(status)) => write!(f, "{} ({status})", self.kind),
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
    /// An NVMe controller cannot be reached.
    #[error(transparent)]
    Reach(#[from] ReachError),
    /// An NVMe controller cannot be driven.
    #[error("{name} cannot be driven")]
    Nvme {
        /// The way to it.
        name: String,
        /// Why.
        #[source]
        source: async_nvme::Error,
    },
    /// An NVMe controller is lost, or the thread that drives it does not answer.
    #[error("{name} is lost or does not answer: see the log")]
    NvmeSilent {
        /// The way to it.
        name: String,
    },
    /// A namespace cannot be used.
    #[error("namespace {nsid} of {name}: {what}")]
    NvmeNamespace {
        /// The way to the controller.
        name: String,
        /// The namespace.
        nsid: u32,
        /// Why.
        what: String,
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
            let cause = Some(BlockErrorCause::Errno(errno));
            assert_eq!(BlockError::from_errno(errno, false), BlockError { kind: read, cause });
            assert_eq!(BlockError::from_errno(errno, true), BlockError { kind: write, cause });
        }
    }

    #[test]
    fn what_a_controller_says_keeps_its_meaning() {
        use BlockErrorKind as Kind;
        for (status, read, write) in [
            (Status::UNRECOVERED_READ_ERROR, Kind::Media, Kind::WriteFault),
            (Status::WRITE_FAULT, Kind::Media, Kind::WriteFault),
            (Status::ACCESS_DENIED, Kind::Media, Kind::ReadOnly),
            (Status::LBA_OUT_OF_RANGE, Kind::OutOfRange, Kind::OutOfRange),
            (Status::CAPACITY_EXCEEDED, Kind::NoSpace, Kind::NoSpace),
            (Status::NAMESPACE_WRITE_PROTECTED, Kind::Internal, Kind::ReadOnly),
            (Status::INVALID_OPCODE, Kind::NotSupported, Kind::NotSupported),
            (Status::COMMAND_ABORT_REQUESTED, Kind::TimedOut, Kind::TimedOut),
            (Status::NAMESPACE_NOT_READY, Kind::Gone, Kind::Gone),
            (Status::INTERNAL_PATH_ERROR, Kind::Gone, Kind::Gone),
            (Status::INTERNAL_ERROR, Kind::Internal, Kind::Internal),
            (Status::INTERNAL_ERROR.with_dnr(), Kind::Media, Kind::WriteFault),
            (Status::new(sct::VENDOR, 0x42), Kind::Internal, Kind::Internal),
        ] {
            assert_eq!(BlockError::from_status(status, false).kind, read, "{status} on a read");
            assert_eq!(BlockError::from_status(status, true).kind, write, "{status} on a write");
        }
        let told = BlockError::from_status(Status::WRITE_FAULT, true).to_string();
        assert_eq!(told, "the device could not write the data (Write Fault (0x280))");
    }
}
