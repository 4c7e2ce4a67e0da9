//! What is known to become of an operation before it is tried.

use super::operation::Operation;
use super::{
    FLAG, FREEZE, FROZEN, LEASE, LEASE_PROOF, MAP_WATCH, MARK, MOUNTS, READ_ONLY, STATX, SWAP, Verdict,
};
use crate::extent::mode::GuardMode;
use crate::extent::readers::LocalReaders;

/// What is known of an operation before anything is tried.
pub(super) struct Known {
    pub(super) verdict: Verdict,
    pub(super) by: Option<&'static str>,
    pub(super) text: &'static str,
}

const fn refused(by: &'static str, text: &'static str) -> Known {
    Known { verdict: Verdict::Refused, by: Some(by), text }
}

const fn delayed(by: &'static str, text: &'static str) -> Known {
    Known { verdict: Verdict::Delayed, by: Some(by), text }
}

const fn detected(by: &'static str, text: &'static str) -> Known {
    Known { verdict: Verdict::Detected, by: Some(by), text }
}

const fn out_of_reach(text: &'static str) -> Known {
    Known { verdict: Verdict::OutOfReach, by: None, text }
}

impl Operation {
    /// What is known of it on a file that is guarded so.
    pub(super) const fn known(self, (mode, readers): (GuardMode, LocalReaders)) -> Known {
        match readers {
            LocalReaders::Allow => self.known_beside_readers(mode),
            LocalReaders::Refuse => self.known_alone(mode),
        }
    }

    const fn known_alone(self, mode: GuardMode) -> Known {
        match mode {
            GuardMode::Default => self.known_by_default(),
            GuardMode::SwapFile => self.known_of_swap(),
            GuardMode::ReadOnlyMount => self.known_of_read_only(),
            GuardMode::FrozenFilesystem => self.known_of_frozen(),
        }
    }

    /// Where the mark refuses nobody.
    const fn known_beside_readers(self, mode: GuardMode) -> Known {
        match (self, mode) {
            (Self::OpenRead, _) => Known {
                verdict: Verdict::Allowed,
                by: None,
                text: "local readers are let in: what is cached is as old as its reading; `fastice read` and O_DIRECT read the disk",
            },
            (Self::OpenWrite, GuardMode::ReadOnlyMount) => refused(READ_ONLY, "EROFS"),
            (Self::OpenWrite, _) => refused(FLAG, ""),
            (Self::CloneFrom, GuardMode::SwapFile) => refused(SWAP, ""),
            (Self::CloneFrom, _) => {
                Known { verdict: Verdict::Impossible, by: None, text: "else readers would not be let in" }
            }
            (Self::ClearFlag, GuardMode::FrozenFilesystem) => delayed(FROZEN, UNTIL_THE_END),
            (Self::ClearFlag, GuardMode::ReadOnlyMount) => refused(READ_ONLY, "there is no flag"),
            (Self::ClearFlag, _) => detected(STATX, "root may, as it can open the file"),
            (Self::SwapOff, _) => refused(FLAG, "it must open the file for writing"),
            _ => self.known_alone(mode),
        }
    }

    const fn known_of_swap(self) -> Known {
        match self {
            Self::OpenedBefore => {
                refused(SWAP, "the pin is made; what is tried through that descriptor fails")
            }
            Self::TruncateUnflagged | Self::CloneWithin => refused(SWAP, ""),
            Self::CloneFrom => refused(MARK, "the swap area would refuse it too"),
            Self::SwapOff => refused("open-permission mark, immutable flag", "it must open the file"),
            Self::StolenMapping => out_of_reach(
                "what is older in it than on the disk holds up `unpin`; when root clears the flag, ends the swap area and writes beside \
                 it, it goes back over what hosts wrote",
            ),
            Self::Unmount => refused(SWAP, "EBUSY while pinned, served or not"),
            Self::Kill => out_of_reach(
                "the mark ends with the process, and so does serving; swap area and immutable flag stay",
            ),
            Self::Offline => out_of_reach(
                "no umount while pinned; after a reboot they ignore the flag, and the next start compares the map",
            ),
            _ => self.known_by_default(),
        }
    }

    const fn known_of_frozen(self) -> Known {
        match self {
            Self::Unlink
            | Self::Rename
            | Self::Link
            | Self::Chmod
            | Self::SetXattr
            | Self::Utimes
            | Self::SetFileAttr
            | Self::TruncateUnflagged
            | Self::CloneWithin
            | Self::WriteElsewhere => delayed(FROZEN, UNTIL_THE_END),
            Self::CloneFrom => refused(MARK, "else it would wait until the pin ends"),
            Self::StolenMapping => out_of_reach(
                "when root has thawed the filesystem: as with the default guard, on XFS what is older in it than on the disk can be \
                 put back over what hosts wrote",
            ),
            Self::Thaw => detected(FREEZE, "only root may; the default guards hold the file all the same"),
            Self::Unmount => refused(FROZEN, "EBUSY, served or not"),
            Self::Kill => {
                out_of_reach("mark and lease end with the process, and so does serving; flag and freeze stay")
            }
            _ => self.known_by_default(),
        }
    }

    const fn known_of_read_only(self) -> Known {
        match self {
            Self::OpenWrite => refused("open-permission mark, read-only filesystem", ""),
            Self::Truncate
            | Self::Unlink
            | Self::Rename
            | Self::Link
            | Self::Chmod
            | Self::SetXattr
            | Self::Utimes
            | Self::SetFileAttr
            | Self::CloneWithin => refused(READ_ONLY, "EROFS"),
            Self::CloneFrom => refused(MARK, "and no clone can be made on a read-only filesystem"),
            Self::ClearFlag => refused(MARK, "there is no flag on a read-only filesystem"),
            Self::OpenedBefore => refused(
                READ_ONLY,
                "it cannot be remounted read-only while anyone has a file open for writing",
            ),
            Self::StolenMapping => out_of_reach(
                "when root has remounted it read-write, takes the file and writes beside what is older in it than on the disk, that \
                 goes back over what hosts wrote",
            ),
            Self::Remount => detected(MOUNTS, "only root may; who then opens the file meets mark and lease"),
            Self::Kill => out_of_reach(
                "mark and lease end with the process, and so does serving; the filesystem stays read-only",
            ),
            Self::Offline => out_of_reach("no umount while served; the next start compares the map"),
            _ => self.known_by_default(),
        }
    }

    const fn known_by_default(self) -> Known {
        match self {
            Self::OpenRead => refused(MARK, "local readers are kept out: `fastice read` reads for them"),
            Self::OpenWrite => refused("open-permission mark, immutable flag", ""),
            Self::Truncate
            | Self::Unlink
            | Self::Rename
            | Self::Link
            | Self::Chmod
            | Self::SetXattr
            | Self::Utimes => refused(FLAG, ""),
            Self::CloneFrom => refused(MARK, "the immutable flag alone would allow it"),
            Self::ClearFlag => refused(MARK, "refused to root too, as it must open the file"),
            Self::OpenedBefore => refused(LEASE_PROOF, "the pin is refused while anyone has the file open"),
            Self::Unmount => {
                Known { verdict: Verdict::Refused, by: None, text: "EBUSY while served, as the file is open" }
            }
            Self::TruncateUnflagged => delayed(LEASE, "it waits until fastice has fenced and let go"),
            Self::SetFileAttr => detected(STATX, "Linux 6.17 and later: needs no open"),
            Self::SwapOff | Self::Remount | Self::WriteElsewhere | Self::Thaw => {
                Known { verdict: Verdict::Impossible, by: None, text: "" }
            }
            Self::CloneWithin => detected(MAP_WATCH, "leaves no trace but SHARED in the map"),
            Self::StolenMapping => out_of_reach(
                "when root clears the flag, takes the file and writes beside what is older in it than on the disk, on XFS that goes \
                 back over what hosts wrote; ext4 refuses the write, as the flag is set again",
            ),
            Self::Kill => out_of_reach(
                "mark and lease end with the process, and so does serving; the immutable flag stays",
            ),
            Self::RawDevice => out_of_reach("no guard of a file sees it, as it never touches the inode"),
            Self::Offline => out_of_reach(
                "no umount while served; else they ignore the flag, and the next start compares the map",
            ),
        }
    }
}

const UNTIL_THE_END: &str = "it waits until the pin ends, and cannot be killed meanwhile";
