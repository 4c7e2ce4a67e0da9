//! Takes the extent map of one file, proves it fit to serve, pins it, seals it, records it and looks it up.
//!
//! ```text
//!            file on XFS or ext4
//!                   |
//!    prepare        |   optional: write zeros into holes, unshare, pad       (alters the file, before the pin)
//!                   v
//!    guard    open-permission mark, immutable flag, lease; or another mode   (the kernel now refuses or delays)
//!                   v
//!    fiemap   FIEMAP with SYNC  ->  records        <- facts, device: size, flags, swap, disk, partition
//!                   v
//!    accept   every reason not to serve these records
//!                   v
//!    map      FrozenMap: sealed memory, identity, generation, checksum
//!              |            |                |
//!    lookup  segments,    state  the stored   verify  the sealed or stored map against the living file
//!            check        form, for restarts
//! ```
//!
//! [`pin`] runs the whole column; [`PinnedFile`] owns what it built. All unsafe code and raw system calls are in
//! `sys`. [`take_over`] is the way in for a file whose filesystem is not mounted: its map is read from the device by
//! [`ondisk`]. The module knows nothing of NVMe-oF, of exports or of how devices are opened.
//!
//! A [`Warden`] keeps the guards of all pinned files of a process, and watches them: see `guard` and `watch`. Whoever
//! serves hears of a recall, fences, drains, and lets go. [`probe`] tries all that on a scratch file: see `explain`.
//!
//! What it does not do: resolve device-mapper, MD or multi-device filesystems, or protect a file from root's every means: root can
//! kill the process, clear the flag and change the file, which is then seen but not prevented.

mod accept;
mod claim;
mod commands;
mod compare;
mod device;
mod error;
mod explain;
mod facts;
mod fiemap;
mod find;
pub mod fuzz;
mod guard;
mod handover;
mod holders;
mod identity;
mod lease;
mod lookup;
mod map;
mod mode;
mod nvme_identity;
pub mod ondisk;
mod orphans;
mod owner;
mod pin;
mod pinned;
mod places;
mod prepare;
mod progress;
mod proof;
mod read;
mod readers;
mod record;
mod state;
mod stretches;
mod survey;
mod sys;
#[cfg(test)]
mod tests;
mod timeline;
mod together;
mod undo;
mod unmounted;
mod unpin;
mod verify;
mod watch;

pub use accept::{Violation, violations};
pub use commands::CommandsHold;
pub use compare::{Comparison, Difference, Place, compare};
pub use error::{Claimant, ExtentError, ExtentErrorKind, Holder, LookupError, MapFault, StateProblem};
pub use explain::{
    Attempted, Attempts, FailedCall, Finding, Operation, Outlook, Probe, SharedHole, Verdict, attempt,
    outlook, probe,
};
pub use facts::FileFacts;
pub(crate) use facts::unescape_octal;
pub use fiemap::{FiemapFlags, RawExtent};
pub use guard::{
    Baseline, Doubt, Incident, OnRecall, Oversight, RecallReason, RecallWatch, Warden, WatchReport,
    lease_break_time,
};
pub use handover::{HandedOver, is_let_go, stored_pin, take_over, take_unmounted, verify_on_device};
pub use identity::{DeviceNumber, DiskIdentity, FilesystemIdentity, FilesystemKind, MapIdentity};
pub use lookup::{LookupCursor, LookupHint, Segment, Segments};
pub use map::{Extent, FrozenMap};
pub use mode::{GuardMode, GuardReport};
pub use nvme_identity::{IdentityVerdict, NamespaceIdentity, parse_identifier};
pub use orphans::{Orphan, OrphanStanding, left_behind, orphans};
pub use owner::Owner;
pub use pin::{PinOptions, pin};
pub use pinned::PinnedFile;
pub use places::{Driven, Still, StillError};
pub use prepare::{PrepareReport, prepare};
pub use progress::{NoProgress, Progress};
pub use proof::{Mismatch, Sample, SampleOf, Witness};
pub use read::{ReadOutcome, read_left, read_pinned};
pub use readers::LocalReaders;
pub use record::{StoredMap, StoredPin};
pub use state::StateDir;
pub use survey::{Survey, accept, read_map, survey};
pub use timeline::{MovedBlocks, PinEvent, PinStep, StoredIncident, Timeline};
pub use together::{Wanted, in_the_way_of};
pub use unmounted::Unmounted;
pub use unpin::{UnpinReport, unpin};
pub use verify::{VerifyReport, is_mounted, verify_stored};
pub use watch::{SecondLook, WatchOptions, WatchPlan};
