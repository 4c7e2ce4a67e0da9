//! How an operation is tried.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Timespec, Timestamps, XattrFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use super::operation::Operation;
use crate::extent::sys;
use crate::extent::undo::change_flag;

impl Operation {
    /// Whether another process tries it on the path, and nothing else is needed.
    pub(super) const fn is_tried_by_path(self) -> bool {
        matches!(
            self,
            Self::OpenRead
                | Self::OpenWrite
                | Self::Truncate
                | Self::Unlink
                | Self::Rename
                | Self::Link
                | Self::Chmod
                | Self::SetXattr
                | Self::Utimes
                | Self::CloneFrom
                | Self::ClearFlag
                | Self::SetFileAttr
                | Self::SwapOff
                | Self::WriteElsewhere
        )
    }

    /// Whether another process tries it on the place where the filesystem is mounted, which must be one of ours.
    pub(super) const fn is_tried_on_mount(self) -> bool {
        matches!(self, Self::Unmount | Self::Remount | Self::Thaw)
    }
}

/// What became of an attempt: the call that failed, and how; `None` when all went through.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attempted {
    /// The failure.
    pub failed: Option<FailedCall>,
}

/// The call that failed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FailedCall {
    /// Its name.
    pub call: String,
    /// Its errno; 0 when there was none.
    pub errno: i32,
}

/// The call that failed, and how.
pub(super) type Tried = Result<(), (&'static str, io::Error)>;

/// Tries an operation on the file at `path`, for good or ill: it changes the file when nothing stops it. To be called
/// in a process of its own, as the guards let the process through that holds the pin. An operation that is not tried
/// by path, or on a mount, fails with ENOSYS.
#[must_use]
pub fn attempt(operation: Operation, path: &Path) -> Attempted {
    let failed = try_it(operation, path).err().map(|(call, error)| FailedCall {
        call: call.to_owned(),
        errno: error.raw_os_error().unwrap_or_default(),
    });
    Attempted { failed }
}

fn try_it(operation: Operation, path: &Path) -> Tried {
    let told = |call: &'static str| move |error: io::Error| (call, error);
    let told_by_rustix = |call: &'static str| move |error: rustix::io::Errno| (call, error.into());
    match operation {
        Operation::OpenRead => File::open(path).map(drop).map_err(told("open")),
        Operation::OpenWrite => OpenOptions::new().write(true).open(path).map(drop).map_err(told("open")),
        Operation::Truncate | Operation::TruncateUnflagged => {
            sys::truncate(&c_path(path)?, 0).map_err(told("truncate"))
        }
        Operation::Unlink => fs::remove_file(path).map_err(told("unlink")),
        Operation::Rename => fs::rename(path, beside(path, "renamed")).map_err(told("rename")),
        Operation::Link => fs::hard_link(path, beside(path, "linked")).map_err(told("link")),
        Operation::Chmod => fs::set_permissions(path, Permissions::from_mode(0o640)).map_err(told("chmod")),
        Operation::SetXattr => rustix::fs::setxattr(path, "user.fastice", b"1", XattrFlags::empty())
            .map_err(told_by_rustix("setxattr")),
        Operation::Utimes => {
            let long_ago = Timespec { tv_sec: 1, tv_nsec: 0 };
            let times = Timestamps { last_access: long_ago, last_modification: long_ago };
            rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::empty())
                .map_err(told_by_rustix("utimensat"))
        }
        Operation::CloneFrom => {
            let source = File::open(path).map_err(told("open"))?;
            clone_from(&source, &beside(path, "cloned"))
        }
        Operation::ClearFlag => {
            let file = File::open(path).map_err(told("open"))?;
            change_flag(&file, false).map_err(told("FS_IOC_SETFLAGS"))
        }
        Operation::SwapOff => sys::swap_off_by_path(&c_path(path)?).map_err(told("swapoff")),
        Operation::WriteElsewhere => {
            File::create(beside(path, "elsewhere")).map(drop).map_err(told("create"))
        }
        Operation::Unmount => {
            rustix::mount::unmount(path, UnmountFlags::empty()).map_err(told_by_rustix("umount2"))
        }
        Operation::Remount => {
            rustix::mount::mount_remount(path, MountFlags::empty(), "").map_err(told_by_rustix("mount"))
        }
        Operation::Thaw => {
            let mount = File::open(path).map_err(told("open"))?;
            sys::thaw(mount.as_fd()).map_err(told("FITHAW"))
        }
        Operation::SetFileAttr => sys::clear_immutable_by_path(&c_path(path)?).map_err(told("file_setattr")),
        Operation::OpenedBefore
        | Operation::CloneWithin
        | Operation::Kill
        | Operation::StolenMapping
        | Operation::RawDevice
        | Operation::Offline => Err(("none", io::Error::from_raw_os_error(libc::ENOSYS))),
    }
}

/// Makes a file at `target` that shares the blocks of `source`.
pub(super) fn clone_from(source: &File, target: &Path) -> Tried {
    let target = File::create_new(target).map_err(|error| ("create", error))?;
    rustix::fs::ioctl_ficlone(&target, source).map_err(|error| ("FICLONE", error.into()))
}

fn c_path(path: &Path) -> Result<CString, (&'static str, io::Error)> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| ("path", io::Error::from_raw_os_error(libc::EINVAL)))
}

/// A path in the same directory.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    path.with_extension(suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_tell_the_call_that_failed() {
        let dir = tempfile::tempdir().expect("a directory");
        let missing = dir.path().join("missing").join("file");
        for operation in Operation::all().filter(|operation| operation.is_tried_by_path()) {
            let failed = attempt(operation, &missing).failed.expect("there is no such file");
            let without = operation == Operation::SetFileAttr && !sys::has_file_setattr();
            let expected = if without { libc::ENOSYS } else { libc::ENOENT };
            // Without the privilege it does not come as far as the path.
            if operation == Operation::SwapOff && failed.errno == libc::EPERM {
                continue;
            }
            assert_eq!(failed.errno, expected, "{operation:?}: {failed:?}");
        }
        assert_eq!(attempt(Operation::Kill, &missing).failed.map(|failed| failed.errno), Some(libc::ENOSYS));
    }

    #[test]
    fn attempts_go_through_on_a_file_that_nothing_guards() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        let through = |operation| {
            fs::write(&path, "some bytes").expect("room");
            assert_eq!(attempt(operation, &path).failed, None, "{operation:?}");
        };
        through(Operation::OpenRead);
        through(Operation::WriteElsewhere);
        through(Operation::OpenWrite);
        through(Operation::Truncate);
        assert_eq!(fs::metadata(&path).expect("it is there").len(), 0);
        through(Operation::Link);
        assert!(dir.path().join("file.linked").exists());
        through(Operation::Rename);
        assert!(!path.exists() && dir.path().join("file.renamed").exists());
        through(Operation::Unlink);
        assert!(!path.exists());
    }
}
