//! What others may try on a pinned file, what is known to become of it, and how it is tried.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Timespec, Timestamps, XattrFlags};

use super::{
    FLAG, FREEZE, FROZEN, LEASE, LEASE_PROOF, MAP_WATCH, MARK, MOUNTS, READ_ONLY, STATX, SWAP, Verdict,
};
use crate::extent::mode::GuardMode;
use crate::extent::sys;
use crate::extent::undo::change_flag;

/// Something that a process may try on a pinned file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each text says it all")]
#[non_exhaustive]
pub enum Operation {
    OpenRead,
    OpenWrite,
    Truncate,
    Unlink,
    Rename,
    Link,
    Chmod,
    SetXattr,
    Utimes,
    CloneFrom,
    ClearFlag,
    OpenedBefore,
    SetFileAttr,
    TruncateUnflagged,
    CloneWithin,
    SwapOff,
    Remount,
    WriteElsewhere,
    Thaw,
    Unmount,
    Kill,
    RawDevice,
    Offline,
}

/// What is known of an operation before anything is tried.
pub(super) struct Known {
    pub(super) verdict: Verdict,
    pub(super) by: Option<&'static str>,
    pub(super) text: &'static str,
}

impl Operation {
    /// All of them, in the order in which they are told.
    pub const ALL: [Self; 23] = [
        Self::OpenRead,
        Self::OpenWrite,
        Self::Truncate,
        Self::Unlink,
        Self::Rename,
        Self::Link,
        Self::Chmod,
        Self::SetXattr,
        Self::Utimes,
        Self::CloneFrom,
        Self::ClearFlag,
        Self::OpenedBefore,
        Self::Unmount,
        Self::TruncateUnflagged,
        Self::SetFileAttr,
        Self::CloneWithin,
        Self::SwapOff,
        Self::Remount,
        Self::WriteElsewhere,
        Self::Thaw,
        Self::Kill,
        Self::RawDevice,
        Self::Offline,
    ];

    /// A stable name for scripts.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::OpenRead => "open-read",
            Self::OpenWrite => "open-write",
            Self::Truncate => "truncate",
            Self::Unlink => "unlink",
            Self::Rename => "rename",
            Self::Link => "link",
            Self::Chmod => "chmod",
            Self::SetXattr => "setxattr",
            Self::Utimes => "utimes",
            Self::CloneFrom => "clone-from",
            Self::ClearFlag => "clear-flag",
            Self::OpenedBefore => "opened-before",
            Self::SetFileAttr => "file-setattr",
            Self::TruncateUnflagged => "truncate-unflagged",
            Self::CloneWithin => "clone-within",
            Self::SwapOff => "swapoff",
            Self::Remount => "remount",
            Self::WriteElsewhere => "write-elsewhere",
            Self::Thaw => "thaw",
            Self::Unmount => "unmount",
            Self::Kill => "kill",
            Self::RawDevice => "raw-device",
            Self::Offline => "offline",
        }
    }

    /// The operation of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.name() == name)
    }

    /// What it is, for people.
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::OpenRead => "open for reading (cat, cp)",
            Self::OpenWrite => "open for writing (and then write, punch, ...)",
            Self::Truncate => "truncate(2) by path",
            Self::Unlink => "unlink",
            Self::Rename => "rename",
            Self::Link => "hard link",
            Self::Chmod => "chmod",
            Self::SetXattr => "setxattr",
            Self::Utimes => "utimensat (touch)",
            Self::CloneFrom => "FICLONE from it (cp --reflink)",
            Self::ClearFlag => "chattr -i",
            Self::OpenedBefore => "a write descriptor opened before the pin",
            Self::SetFileAttr => "file_setattr(2) clearing the flag by path",
            Self::TruncateUnflagged => "truncate(2) after the flag was cleared",
            Self::CloneWithin => "FICLONE by a descriptor that got past the mark",
            Self::Remount => "mount -o remount,rw",
            Self::WriteElsewhere => "write to any other file of the filesystem",
            Self::Thaw => "fsfreeze --unfreeze",
            Self::SwapOff => "swapoff, with the immutable flag set",
            Self::Unmount => "umount",
            Self::Kill => "root kills the process that serves",
            Self::RawDevice => "root writes to the device itself",
            Self::Offline => "offline tools (resize2fs, fsck, xfs_repair)",
        }
    }

    /// Whether there is such a thing on a file that is guarded so.
    pub(super) fn is_of(self, mode: GuardMode) -> bool {
        match self {
            Self::SwapOff => mode == GuardMode::SwapFile,
            Self::Remount => mode == GuardMode::ReadOnlyMount,
            Self::WriteElsewhere | Self::Thaw => mode == GuardMode::FrozenFilesystem,
            _ => true,
        }
    }

    /// What is known of it on a file that is guarded so.
    pub(super) const fn known(self, mode: GuardMode) -> Known {
        match mode {
            GuardMode::Default => self.known_by_default(),
            GuardMode::SwapFile => self.known_of_swap(),
            GuardMode::ReadOnlyMount => self.known_of_read_only(),
            GuardMode::FrozenFilesystem => self.known_of_frozen(),
        }
    }

    const fn known_of_swap(self) -> Known {
        use Verdict::{OutOfReach, Refused};
        let (verdict, by, text) = match self {
            Self::OpenedBefore => {
                (Refused, Some(SWAP), "the pin is made; what is tried through that descriptor fails")
            }
            Self::TruncateUnflagged | Self::CloneWithin => (Refused, Some(SWAP), ""),
            Self::SwapOff => (Refused, Some("open-permission mark, immutable flag"), "it must open the file"),
            Self::Unmount => (Refused, Some(SWAP), "EBUSY while pinned, served or not"),
            Self::Kill => (
                OutOfReach,
                None,
                "the mark ends with the process, and so does serving; swap area and immutable flag stay",
            ),
            Self::Offline => (
                OutOfReach,
                None,
                "no umount while pinned; after a reboot they ignore the flag, and the next start compares the map",
            ),
            _ => return self.known_by_default(),
        };
        Known { verdict, by, text }
    }

    const fn known_of_frozen(self) -> Known {
        use Verdict::{Delayed, Detected, OutOfReach, Refused};
        let (verdict, by, text) = match self {
            Self::OpenWrite => (Refused, Some(MARK), ""),
            Self::Truncate
            | Self::Unlink
            | Self::Rename
            | Self::Link
            | Self::Chmod
            | Self::SetXattr
            | Self::Utimes
            | Self::SetFileAttr
            | Self::TruncateUnflagged
            | Self::CloneWithin
            | Self::WriteElsewhere => {
                (Delayed, Some(FROZEN), "it waits until the pin ends, and cannot be killed meanwhile")
            }
            Self::Thaw => {
                (Detected, Some(FREEZE), "only root may; the default guards hold the file all the same")
            }
            Self::Unmount => (Refused, Some(FROZEN), "EBUSY, served or not"),
            Self::Kill => (
                OutOfReach,
                None,
                "mark and lease end with the process, and so does serving; flag and freeze stay",
            ),
            _ => return self.known_by_default(),
        };
        Known { verdict, by, text }
    }

    const fn known_of_read_only(self) -> Known {
        use Verdict::{Detected, OutOfReach, Refused};
        let (verdict, by, text) = match self {
            Self::OpenWrite => (Refused, Some("open-permission mark, read-only filesystem"), ""),
            Self::Truncate
            | Self::Unlink
            | Self::Rename
            | Self::Link
            | Self::Chmod
            | Self::SetXattr
            | Self::Utimes
            | Self::SetFileAttr
            | Self::CloneWithin => (Refused, Some(READ_ONLY), "EROFS"),
            Self::ClearFlag | Self::TruncateUnflagged => {
                (Verdict::Impossible, None, "there is no flag on a read-only filesystem")
            }
            Self::Remount => {
                (Detected, Some(MOUNTS), "only root may; who then opens the file meets mark and lease")
            }
            Self::Kill => (
                OutOfReach,
                None,
                "mark and lease end with the process, and so does serving; the filesystem stays read-only",
            ),
            Self::Offline => (OutOfReach, None, "no umount while served; the next start compares the map"),
            _ => return self.known_by_default(),
        };
        Known { verdict, by, text }
    }

    const fn known_by_default(self) -> Known {
        use Verdict::{Delayed, Detected, OutOfReach, Refused};
        let (verdict, by, text) = match self {
            Self::OpenRead => {
                (Refused, Some(MARK), "local readers are kept out: `fastice read` reads for them")
            }
            Self::OpenWrite => (Refused, Some("open-permission mark, immutable flag"), ""),
            Self::Truncate
            | Self::Unlink
            | Self::Rename
            | Self::Link
            | Self::Chmod
            | Self::SetXattr
            | Self::Utimes => (Refused, Some(FLAG), ""),
            Self::CloneFrom => (Refused, Some(MARK), "the immutable flag alone would allow it"),
            Self::ClearFlag => (Refused, Some(MARK), "refused to root too, as it must open the file"),
            Self::OpenedBefore => {
                (Refused, Some(LEASE_PROOF), "the pin is refused while anyone has the file open")
            }
            Self::Unmount => (Refused, None, "EBUSY while served, as the file is open"),
            Self::TruncateUnflagged => (Delayed, Some(LEASE), "it waits until fastice has fenced and let go"),
            Self::SetFileAttr => (Detected, Some(STATX), "Linux 6.17 and later: needs no open"),
            Self::SwapOff | Self::Remount | Self::WriteElsewhere | Self::Thaw => {
                (Verdict::Impossible, None, "")
            }
            Self::CloneWithin => (Detected, Some(MAP_WATCH), "leaves no trace but SHARED in the map"),
            Self::Kill => (
                OutOfReach,
                None,
                "mark and lease end with the process, and so does serving; the immutable flag stays",
            ),
            Self::RawDevice => {
                (OutOfReach, None, "no guard of a file sees it, as it never touches the inode")
            }
            Self::Offline => (
                OutOfReach,
                None,
                "no umount while served; else they ignore the flag, and the next start compares the map",
            ),
        };
        Known { verdict, by, text }
    }

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
        )
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

type Tried = Result<(), (&'static str, io::Error)>;

/// Tries an operation on the file at `path`, for good or ill: it changes the file when nothing stops it. To be called
/// in a process of its own, as the guards let the process through that holds the pin. An operation that is not tried
/// by path fails with ENOSYS.
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
        Operation::SetFileAttr => sys::clear_immutable_by_path(&c_path(path)?).map_err(told("file_setattr")),
        Operation::OpenedBefore
        | Operation::CloneWithin
        | Operation::Remount
        | Operation::WriteElsewhere
        | Operation::Thaw
        | Operation::Unmount
        | Operation::Kill
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
    fn every_operation_is_told_once_and_found_by_its_name() {
        for operation in Operation::ALL {
            assert_eq!(Operation::from_name(operation.name()), Some(operation));
        }
        assert_eq!(Operation::from_name("no such operation"), None);
    }

    #[test]
    fn attempts_tell_the_call_that_failed() {
        let dir = tempfile::tempdir().expect("a directory");
        let missing = dir.path().join("missing");
        for operation in Operation::ALL.into_iter().filter(|operation| operation.is_tried_by_path()) {
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
