//! One frozen map (or raw device) offered as a namespace, and the right of hosts to use it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nvme_spec::{Nsid, Status};
use serde::{Deserialize, Serialize};

use super::status::of_grant;
use crate::block::BlockDevice;
use crate::extent::FrozenMap;
use crate::probes;
use crate::units::{BlockSize, ByteLen};

/// An export's index in the tables that each core keeps. Never used twice in the life of a target: a command may wait
/// for its data while its export goes and another comes, and a plan may be dropped after some cores have opened what
/// it adds. Neither may ever reach the blocks of another export by the number of an old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExportSlot(pub u32);

/// Why commands to an export are refused for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceReason {
    /// The living file's map may differ from the frozen one, or somebody recalls the file.
    MapInDoubt,
    /// The device failed or is gone.
    DeviceFailed,
    /// Its file could not be had when the target started; no device stands behind it.
    NotServed,
    /// The operator asked for it, or the target is stopping.
    Operator,
}

/// What hosts see of a fence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FencePolicy {
    /// Commands end with Namespace Not Ready: a Linux host tries five more times and then reports an error.
    #[default]
    NotReady,
    /// The namespace is in the ANA Inaccessible state: a host with native multipath keeps its commands until it is
    /// accessible again. For other hosts as [`FencePolicy::NotReady`].
    Ana,
    /// The namespace is write protected: writes end at once with Namespace is Write Protected, reads as with
    /// [`FencePolicy::NotReady`], for a block that may be another file's must not be read either.
    WriteProtect,
}

impl FencePolicy {
    /// The word in configurations and in JSON.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::NotReady => "not-ready",
            Self::Ana => "ana",
            Self::WriteProtect => "write-protect",
        }
    }
}

impl fmt::Display for FencePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Whether hosts may use an export now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Yes.
    Live,
    /// No, but that may pass: commands end as its [`FencePolicy`] says.
    Fenced(FenceReason),
    /// No, and never again: commands end with Invalid Namespace or Format, Do Not Retry.
    Removed,
}

/// The grant is a set of what stands in its way: each reason is set and taken back by itself.
const LIVE: u8 = 0;
const MAP_IN_DOUBT: u8 = 1 << 0;
const DEVICE_FAILED: u8 = 1 << 1;
const OPERATOR: u8 = 1 << 2;
const NOT_SERVED: u8 = 1 << 3;
const REMOVED: u8 = 1 << 7;

impl FenceReason {
    /// All, the gravest first.
    pub const ALL: [Self; 4] = [Self::MapInDoubt, Self::DeviceFailed, Self::NotServed, Self::Operator];

    /// A stable word for scripts.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::MapInDoubt => "map-in-doubt",
            Self::DeviceFailed => "device-failed",
            Self::NotServed => "not-served",
            Self::Operator => "operator",
        }
    }

    /// The reason that this is the [word](Self::word) of.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.word() == word)
    }

    const fn bit(self) -> u8 {
        match self {
            Self::MapInDoubt => MAP_IN_DOUBT,
            Self::DeviceFailed => DEVICE_FAILED,
            Self::NotServed => NOT_SERVED,
            Self::Operator => OPERATOR,
        }
    }
}

impl fmt::Display for FenceReason {
    /// For people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MapInDoubt => "the file was recalled, or its map is in doubt",
            Self::DeviceFailed => "its device failed, or is not proven to be the same again",
            Self::NotServed => "its file could not be served when the target started",
            Self::Operator => "by the operator, or because the target ends",
        })
    }
}

/// One namespace as it is served. Shared by all cores; the grant is all that ever changes.
pub struct Export {
    /// Its index in the cores' tables.
    pub slot: ExportSlot,
    /// The subsystem it belongs to.
    pub subsystem: Arc<str>,
    /// Its namespace identifier there.
    pub nsid: Nsid,
    /// The frozen map, or `None` where the namespace is the device itself from byte 0 to `len`.
    pub map: Option<Arc<FrozenMap>>,
    /// The device that holds the blocks.
    pub device: Arc<dyn BlockDevice>,
    /// Hosts may not write.
    pub read_only: bool,
    /// What hosts see of a fence.
    pub on_fence: FencePolicy,
    /// The logical block size of the namespace: that of the device or a multiple of it.
    pub block_size: BlockSize,
    /// The length of the namespace: a multiple of `block_size`.
    pub len: ByteLen,
    /// The namespace's NGUID.
    pub nguid: [u8; 16],
    /// The namespace's EUI64.
    pub eui64: [u8; 8],
    pub(super) grant: AtomicU8,
    /// The change count of the ANA log when its state changed last.
    pub(super) ana_changed: AtomicU64,
    /// When it was fenced last while it was live, in milliseconds since 1970; 0 before.
    pub(super) fenced_at_ms: AtomicU64,
}

impl Export {
    /// Whether hosts may use the export; of several fences, the gravest.
    #[must_use]
    pub fn grant(&self) -> Grant {
        match self.grant.load(Ordering::Acquire) {
            LIVE => Grant::Live,
            set if set & REMOVED != 0 => Grant::Removed,
            set if set & MAP_IN_DOUBT != 0 => Grant::Fenced(FenceReason::MapInDoubt),
            set if set & DEVICE_FAILED != 0 => Grant::Fenced(FenceReason::DeviceFailed),
            set if set & NOT_SERVED != 0 => Grant::Fenced(FenceReason::NotServed),
            _ => Grant::Fenced(FenceReason::Operator),
        }
    }

    /// Whether hosts would see no difference, and the same bytes.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        let same_map = match (&self.map, &other.map) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        same_map
            && Arc::ptr_eq(&self.device, &other.device)
            && (&self.subsystem, self.nsid) == (&other.subsystem, other.nsid)
            && (self.read_only, self.on_fence) == (other.read_only, other.on_fence)
            && (self.block_size, self.len) == (other.block_size, other.len)
            && (self.nguid, self.eui64) == (other.nguid, other.eui64)
            && self.grant() != Grant::Removed
    }

    /// Whether a command may start: the one load that each I/O command pays for fencing.
    #[inline]
    pub(super) fn is_live(&self) -> bool {
        self.grant.load(Ordering::Acquire) == LIVE
    }

    /// Whether the map may not be that of the living file any more, whatever else stands in the way.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.grant.load(Ordering::Acquire) & MAP_IN_DOUBT != 0
    }

    /// The status of a command that may not start now; `None` when it may.
    pub(crate) fn refusal(&self, is_write: bool) -> Option<Status> {
        of_grant(self.grant(), self.on_fence, is_write)
    }

    /// Whether writes end with Namespace is Write Protected now.
    pub(super) fn is_write_protected(&self) -> bool {
        self.read_only || (self.on_fence == FencePolicy::WriteProtect && !self.is_live())
    }

    /// The change count of the ANA log when its state changed last.
    pub(super) fn ana_changed(&self) -> u64 {
        self.ana_changed.load(Ordering::Relaxed)
    }

    /// Its ANA state changed, with the change `count` of the ANA log.
    pub(super) fn note_ana_change(&self, count: u64) {
        self.ana_changed.fetch_max(count, Ordering::Relaxed);
    }

    /// Refuses new commands for now. Whether they were let in before.
    pub(crate) fn fence(&self, reason: FenceReason) -> bool {
        let was_live = self.grant.fetch_or(reason.bit(), Ordering::AcqRel) == LIVE;
        if was_live {
            probes::export_fenced(self.slot.0, self.nsid);
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.fenced_at_ms.store(u64::try_from(since.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        was_live
    }

    /// Since when it is fenced, in milliseconds since 1970; `None` when it is not.
    #[must_use]
    pub fn fenced_since_ms(&self) -> Option<u64> {
        let at_ms = self.fenced_at_ms.load(Ordering::Relaxed);
        (matches!(self.grant(), Grant::Fenced(_)) && at_ms > 0).then_some(at_ms)
    }

    /// Takes one reason to refuse commands back. Whether they are let in by that: nothing else stands in the way.
    pub(super) fn unfence(&self, reason: FenceReason) -> bool {
        self.grant.fetch_and(!reason.bit(), Ordering::AcqRel) == reason.bit()
    }

    /// Refuses new commands for ever.
    pub(super) fn remove(&self) {
        self.grant.fetch_or(REMOVED, Ordering::AcqRel);
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("slot", &self.slot)
            .field("subsystem", &self.subsystem)
            .field("nsid", &self.nsid.0)
            .field("read_only", &self.read_only)
            .field("on_fence", &self.on_fence)
            .field("block_size", &self.block_size)
            .field("len", &self.len)
            .field("grant", &self.grant())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_and_policies_have_one_word_each() {
        for reason in FenceReason::ALL {
            assert_eq!(FenceReason::of_word(reason.word()), Some(reason));
            assert_ne!(reason.to_string(), reason.word(), "people get more than that");
        }
        assert_eq!(FenceReason::of_word("MapInDoubt"), None);
        for policy in [FencePolicy::NotReady, FencePolicy::Ana, FencePolicy::WriteProtect] {
            let json = serde_json::to_string(&policy).expect("a word");
            assert_eq!(json, format!("\"{policy}\""));
        }
    }
}
