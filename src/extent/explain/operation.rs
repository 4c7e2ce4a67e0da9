//! What others may try on a pinned file, and how it is called.

use crate::extent::mode::GuardMode;
use crate::extent::readers::LocalReaders;

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
    Unmount,
    TruncateUnflagged,
    SetFileAttr,
    CloneWithin,
    SwapOff,
    Remount,
    WriteElsewhere,
    Thaw,
    StolenMapping,
    Kill,
    RawDevice,
    Offline,
}

/// An operation, a stable name for scripts, and what it is, for people; in the order in which they are told.
const ROWS: [(Operation, &str, &str); 24] = {
    use Operation::*;
    [
        (OpenRead, "open-read", "open for reading (cat, cp)"),
        (OpenWrite, "open-write", "open for writing (and then write, punch, ...)"),
        (Truncate, "truncate", "truncate(2) by path"),
        (Unlink, "unlink", "unlink"),
        (Rename, "rename", "rename"),
        (Link, "link", "hard link"),
        (Chmod, "chmod", "chmod"),
        (SetXattr, "setxattr", "setxattr"),
        (Utimes, "utimes", "utimensat (touch)"),
        (CloneFrom, "clone-from", "FICLONE from it (cp --reflink)"),
        (ClearFlag, "clear-flag", "chattr -i"),
        (OpenedBefore, "opened-before", "a write descriptor opened before the pin"),
        (Unmount, "unmount", "umount"),
        (TruncateUnflagged, "truncate-unflagged", "truncate(2) after the flag was cleared"),
        (SetFileAttr, "file-setattr", "file_setattr(2) clearing the flag by path"),
        (CloneWithin, "clone-within", "FICLONE by a descriptor that got past the mark"),
        (SwapOff, "swapoff", "swapoff, with the immutable flag set"),
        (Remount, "remount", "mount -o remount,rw"),
        (WriteElsewhere, "write-elsewhere", "write to any other file of the filesystem"),
        (Thaw, "thaw", "fsfreeze --unfreeze"),
        (StolenMapping, "stolen-mapping", "root maps it by a stolen descriptor (pidfd_getfd)"),
        (Kill, "kill", "root kills the process that serves"),
        (RawDevice, "raw-device", "root writes to the device itself"),
        (Offline, "offline", "offline tools (resize2fs, fsck, xfs_repair)"),
    ]
};

impl Operation {
    /// All of them, in the order in which they are told.
    pub fn all() -> impl Iterator<Item = Self> {
        ROWS.into_iter().map(|(operation, ..)| operation)
    }

    fn row(self) -> (Self, &'static str, &'static str) {
        // In the order of the rows, which a test makes sure of.
        ROWS[self as usize]
    }

    /// A stable name for scripts.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// What it is, for people.
    #[must_use]
    pub fn what(self) -> &'static str {
        self.row().2
    }

    /// The operation of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all().find(|operation| operation.name() == name)
    }

    /// Whether there is such a thing on a file that is guarded so.
    pub(super) const fn is_of(self, mode: GuardMode) -> bool {
        match self {
            Self::SwapOff => matches!(mode, GuardMode::SwapFile),
            Self::Remount => matches!(mode, GuardMode::ReadOnlyMount),
            Self::TruncateUnflagged => mode.sets_flag(),
            Self::WriteElsewhere | Self::Thaw => matches!(mode, GuardMode::FrozenFilesystem),
            _ => true,
        }
    }

    /// Whether it is no break of the pin but what was asked for.
    pub(super) const fn is_let_through(self, readers: LocalReaders) -> bool {
        matches!((self, readers), (Self::OpenRead, LocalReaders::Allow))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_told_once_and_found_by_its_name() {
        for (at, operation) in Operation::all().enumerate() {
            assert_eq!(operation as usize, at, "{operation:?}");
            assert_eq!(Operation::from_name(operation.name()), Some(operation));
        }
        assert_eq!(Operation::all().count(), Operation::Offline as usize + 1);
        assert_eq!(Operation::from_name("no such operation"), None);
    }
}
