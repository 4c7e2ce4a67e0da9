//! One frozen map (or raw device) offered as a namespace, and the right of hosts to use it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use nvme_spec::Nsid;

use crate::block::BlockDevice;
use crate::extent::FrozenMap;
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
    /// The operator asked for it, or the target is stopping.
    Operator,
}

/// Whether hosts may use an export now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Yes.
    Live,
    /// No, but a host may try again: commands end with Namespace Not Ready.
    Fenced(FenceReason),
    /// No, and never again: commands end with Invalid Namespace or Format, Do Not Retry.
    Removed,
}

const LIVE: u8 = 0;
const FENCED_MAP: u8 = 1;
const FENCED_DEVICE: u8 = 2;
const FENCED_OPERATOR: u8 = 3;
const REMOVED: u8 = 255;

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
    /// The logical block size of the namespace: that of the device or a multiple of it.
    pub block_size: BlockSize,
    /// The length of the namespace: a multiple of `block_size`.
    pub len: ByteLen,
    /// The namespace's NGUID.
    pub nguid: [u8; 16],
    /// The namespace's EUI64.
    pub eui64: [u8; 8],
    pub(super) grant: AtomicU8,
}

impl Export {
    /// Whether hosts may use the export.
    #[must_use]
    pub fn grant(&self) -> Grant {
        match self.grant.load(Ordering::Acquire) {
            LIVE => Grant::Live,
            FENCED_MAP => Grant::Fenced(FenceReason::MapInDoubt),
            FENCED_DEVICE => Grant::Fenced(FenceReason::DeviceFailed),
            FENCED_OPERATOR => Grant::Fenced(FenceReason::Operator),
            _ => Grant::Removed,
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
            && (&self.subsystem, self.nsid, self.read_only) == (&other.subsystem, other.nsid, other.read_only)
            && (self.block_size, self.len) == (other.block_size, other.len)
            && (self.nguid, self.eui64) == (other.nguid, other.eui64)
            && self.grant() != Grant::Removed
    }

    /// Whether a command may start: the one load that each I/O command pays for fencing.
    #[inline]
    pub(super) fn is_live(&self) -> bool {
        self.grant.load(Ordering::Acquire) == LIVE
    }

    /// Refuses new commands with a retryable status. A removed export stays removed.
    pub(crate) fn fence(&self, reason: FenceReason) {
        let fenced = match reason {
            FenceReason::MapInDoubt => FENCED_MAP,
            FenceReason::DeviceFailed => FENCED_DEVICE,
            FenceReason::Operator => FENCED_OPERATOR,
        };
        self.replace(|_| fenced);
    }

    /// Lets commands in again. A removed export stays removed.
    pub(super) fn unfence(&self) {
        self.replace(|_| LIVE);
    }

    /// Refuses new commands for ever.
    pub(super) fn remove(&self) {
        self.grant.store(REMOVED, Ordering::Release);
    }

    fn replace(&self, with: impl Fn(u8) -> u8) {
        let _ = self.grant.fetch_update(Ordering::AcqRel, Ordering::Acquire, |grant| {
            (grant != REMOVED).then(|| with(grant))
        });
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("slot", &self.slot)
            .field("subsystem", &self.subsystem)
            .field("nsid", &self.nsid.0)
            .field("read_only", &self.read_only)
            .field("block_size", &self.block_size)
            .field("len", &self.len)
            .field("grant", &self.grant())
            .finish_non_exhaustive()
    }
}
