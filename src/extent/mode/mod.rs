//! The guard modes: which guards of the kernel hold the map of a pinned file.
//!
//! ```text
//!   mode               opens denied   lease   flag   and                                     after a kill -9
//!   default                 x           x      x                                             flag
//!   swap-file               x                  x     the kernel's own lock on swap files     flag, swap area
//!   read-only-mount         x           x            the superblock is read-only              what was there before
//!   frozen-filesystem       x           x      x     the whole filesystem is frozen           flag, frozen filesystem
//! ```
//!
//! A mode is chosen when a file is pinned, is kept in its record, and stays until it is unpinned. A file whose filesystem
//! is not mounted needs no guard at all: see `handover`.
//!
//! What it does not do: deny opens, take leases, set the flag, which all are as in the default mode: see `pin`.

mod danger;
pub(super) mod frozen;
pub(super) mod read_only;
pub(super) mod swap_file;

use std::fmt;
use std::fs::File;
use std::path::Path;

use rustix::fs::Statx;
use serde::{Deserialize, Serialize};

use super::error::ExtentError;
use super::facts::{FileFacts, is_immutable, is_swap};
use super::guard::Doubt;
use super::identity::DeviceNumber;
use super::readers::{self, LocalReaders};
use super::record::StoredPin;
use super::undo::change_flag;
use crate::units::ByteLen;
use swap_file::SwapPlan;

/// Which guards hold the map of a pinned file.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GuardMode {
    /// Open-permission mark, immutable flag, lease
    #[default]
    Default,
    /// The file becomes a swap area of one page: no descriptor, however old, changes its map
    SwapFile,
    /// The filesystem is mounted read-only: nothing on it changes
    ReadOnlyMount,
    /// On top of the default guards the whole filesystem is frozen
    FrozenFilesystem,
}

/// What one guard of a pin does, for display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardReport {
    /// Its name.
    pub name: &'static str,
    /// Which operations of others it refuses.
    pub refuses: &'static str,
    /// Which it delays, and for how long.
    pub delays: &'static str,
    /// Which it only detects.
    pub detects: &'static str,
    /// Whether it outlives this process.
    pub outlives_process: bool,
}

const MARK: GuardReport = GuardReport {
    name: "open-permission mark",
    refuses: "every open of the file by another process (cat, cp --reflink, chattr -i), with EPERM",
    delays: "",
    detects: "",
    outlives_process: false,
};
/// Where readers are let in.
const OPEN_MARK: GuardReport = GuardReport {
    name: MARK.name,
    refuses: "nothing: local readers are let in, after the page cache was dropped; what they read while hosts write may be \
              old",
    ..MARK
};
const FLAG: GuardReport = GuardReport {
    name: "immutable flag",
    refuses: "write, truncate, fallocate, unlink, rename, link, chmod, setxattr, with EPERM",
    delays: "",
    detects: "that it was cleared (statx)",
    outlives_process: true,
};
const LEASE: GuardReport = GuardReport {
    name: "read lease",
    refuses: "",
    delays: "an open for writing, or a truncation, by up to /proc/sys/fs/lease-break-time seconds (0: without limit)",
    detects: "that one is tried, before it happens",
    outlives_process: false,
};
const SWAP: GuardReport = GuardReport {
    name: "swap area",
    refuses: "every change of the map through any descriptor or mapping, also one opened before the pin (ETXTBSY, \
              SIGBUS); swapoff while the immutable flag is set; umount and remount,ro of the filesystem (EBUSY)",
    delays: "",
    detects: "that it was ended (/proc/swaps)",
    outlives_process: true,
};

const READ_ONLY: GuardReport = GuardReport {
    name: "read-only filesystem",
    refuses: "every change of anything on the filesystem, with EROFS",
    delays: "",
    detects: "that it was remounted read-write (/proc/self/mountinfo)",
    outlives_process: true,
};

const FREEZE: GuardReport = GuardReport {
    name: "frozen filesystem",
    refuses: "umount and remount of the filesystem, with EBUSY",
    delays: "every change of anything on the filesystem, until the pin ends",
    detects: "that it was thawed (FIFREEZE)",
    outlives_process: true,
};

impl GuardMode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Default, Self::SwapFile, Self::ReadOnlyMount, Self::FrozenFilesystem];

    /// The name in configurations, records and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::SwapFile => "swap-file",
            Self::ReadOnlyMount => read_only::READ_ONLY,
            Self::FrozenFilesystem => frozen::FROZEN,
        }
    }

    /// How many bytes at the beginning of the file it takes for itself; they are not served.
    #[must_use]
    pub const fn reserved(self) -> ByteLen {
        match self {
            Self::Default | Self::ReadOnlyMount | Self::FrozenFilesystem => ByteLen(0),
            Self::SwapFile => ByteLen(swap_file::RESERVED_LEN as u64),
        }
    }

    /// What each of its guards refuses, delays or only detects.
    #[must_use]
    pub fn guards(self, readers: LocalReaders) -> Vec<GuardReport> {
        let guards: &[GuardReport] = match self {
            Self::Default => &[MARK, FLAG, LEASE],
            Self::SwapFile => &[MARK, SWAP, FLAG],
            Self::ReadOnlyMount => &[MARK, READ_ONLY, LEASE],
            Self::FrozenFilesystem => &[MARK, FLAG, LEASE, FREEZE],
        };
        let mark = |guard: &GuardReport| if *guard == MARK { OPEN_MARK } else { *guard };
        match readers {
            LocalReaders::Refuse => guards.to_vec(),
            LocalReaders::Allow => guards.iter().map(mark).collect(),
        }
    }

    /// What to know of a pin whose guard, beside the flag, is gone: what is so, and what to do. Nothing for one that has no
    /// other.
    #[must_use]
    pub const fn gone(self) -> &'static str {
        match self {
            Self::Default => "",
            Self::SwapFile => "its swap area is gone, as after a reboot: pin it again, or unpin it",
            Self::ReadOnlyMount => {
                "its filesystem is not mounted read-only any more: remount it read-only, or unpin it"
            }
            Self::FrozenFilesystem => {
                "its filesystem is not frozen any more, as after a reboot: pin it again, or unpin it"
            }
        }
    }

    /// Whether it holds a lease, and has the proof by lease that nobody else has the file open.
    ///
    /// The kernel gives no lease on a swap area, which it has open for writing itself (EAGAIN). The proof is not needed
    /// there: what it is to rule out, changes through a descriptor or mapping from before, the swap area refuses too.
    pub(super) const fn takes_lease(self) -> bool {
        !matches!(self, Self::SwapFile)
    }

    /// Whether the immutable flag is one of its guards. It cannot be set on a read-only filesystem.
    #[must_use]
    pub const fn sets_flag(self) -> bool {
        !matches!(self, Self::ReadOnlyMount)
    }

    /// Whether what it adds to the guards of the default mode is in force.
    pub(super) fn holds(self, file: &File, inode: u64, device: DeviceNumber) -> std::io::Result<bool> {
        match self {
            Self::Default => Ok(true),
            Self::FrozenFilesystem => frozen::is_frozen(file),
            Self::SwapFile => is_swap(inode, device),
            Self::ReadOnlyMount => read_only::is_read_only(device),
        }
    }

    /// The same for a file that is watched: what is not as it must be.
    pub(super) fn broken(
        self,
        file: &File,
        stat: &Statx,
        path: &Path,
    ) -> Result<Option<(Doubt, String)>, ExtentError> {
        let device = DeviceNumber { major: stat.stx_dev_major, minor: stat.stx_dev_minor };
        let holds = self
            .holds(file, stat.stx_ino, device)
            .map_err(|error| ExtentError::io("look at the guards of", path, error))?;
        Ok(match self {
            _ if holds => None,
            Self::Default => None,
            Self::SwapFile => Some((Doubt::SwapOff, "it is not in /proc/swaps".to_owned())),
            Self::ReadOnlyMount => Some((Doubt::Writable, "its superblock is not read-only".to_owned())),
            Self::FrozenFilesystem => Some((Doubt::Thawed, "it could be frozen anew".to_owned())),
        })
    }
}

impl fmt::Display for GuardMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a file cannot have these guards now, as far as a look at it tells; with the remedy. `state` is the state
/// directory, where there is one; `may_overwrite`: what the guard needs of the file is given up.
pub(super) fn obstacle(
    (mode, readers): (GuardMode, LocalReaders),
    file: &File,
    facts: &FileFacts,
    state: Option<&Path>,
    may_overwrite: bool,
) -> Option<ExtentError> {
    let found = match mode {
        GuardMode::Default => None,
        GuardMode::SwapFile => SwapPlan::make(file, facts, may_overwrite).err(),
        GuardMode::ReadOnlyMount => read_only::refuse_unfit(facts, state).err(),
        GuardMode::FrozenFilesystem => frozen::refuse_unfit(facts, state).err(),
    };
    found.or_else(|| readers::obstacle(readers, mode, file, facts))
}

/// What undoing a mode did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Undone {
    /// The immutable flag was cleared.
    pub(super) flag_cleared: bool,
    /// A swap area was ended.
    pub(super) swap_ended: bool,
}

/// Takes away the guards of a pin that outlive a process, but for a freeze, which is thawed before: in the order in which
/// the kernel lets them go, from whatever step a crash has left them at. What is done already is not done again.
pub(super) fn undo(record: &StoredPin, file: &File, path: &Path) -> Result<Undone, ExtentError> {
    let not_ours = record.immutable_was_set_before || !record.guard.sets_flag();
    let flag_cleared = clear_flag(file, path, not_ours)?;
    let swap_ended = match record.guard {
        GuardMode::SwapFile => swap_file::end(file, path, record.header_written)?,
        GuardMode::Default | GuardMode::ReadOnlyMount | GuardMode::FrozenFilesystem => false,
    };
    Ok(Undone { flag_cleared, swap_ended })
}

/// The same without a record that could be read: whatever can be fastice's goes.
pub(super) fn undo_all(file: &File, path: &Path) -> Result<Undone, ExtentError> {
    let flag_cleared = clear_flag(file, path, false)?;
    let swap_ended = swap_file::is_ours(file) && swap_file::end(file, path, true)?;
    Ok(Undone { flag_cleared, swap_ended })
}

fn clear_flag(file: &File, path: &Path, not_ours: bool) -> Result<bool, ExtentError> {
    if not_ours || !is_immutable(file, path)? {
        return Ok(false);
    }
    change_flag(file, false)
        .and_then(|()| file.sync_all())
        .map_err(|error| ExtentError::io("clear the immutable flag of", path, error))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_mode_has_one_name_everywhere() {
        for mode in GuardMode::ALL {
            let json = serde_json::to_string(&mode).expect("a word");
            assert_eq!(json, format!("\"{mode}\""));
            assert_eq!(serde_json::from_str::<GuardMode>(&json).expect("the same"), mode);
            assert_eq!(GuardMode::from_str(mode.name(), false).as_ref(), Ok(&mode));
            assert_eq!(mode.gone().is_empty(), mode == GuardMode::Default);
            assert_eq!(
                mode.guards(LocalReaders::Refuse).first().map(|guard| guard.name),
                Some("open-permission mark")
            );
        }
        assert_eq!(GuardMode::default().reserved(), ByteLen(0));
    }

    #[test]
    fn only_a_mode_without_the_proof_by_lease_has_another_one() {
        for mode in GuardMode::ALL {
            let swap = mode.guards(LocalReaders::Allow).iter().any(|guard| guard.name == "swap area");
            assert_eq!(mode.takes_lease(), !swap, "{mode}");
        }
    }
}
