//! Asymmetric namespace access: a fence as a path that is lost for a while (NVM Express Base Specification 2.1,
//! section 8.1.1).
//!
//! ```text
//!   namespace on_fence = ana, controller shows ANA           granted            fenced
//!   every other namespace                                 ANA Optimized     ANA Inaccessible
//!                                                         ANA Optimized     ANA Optimized, and Namespace Not Ready
//! ```
//!
//! A host with native multipath keeps the commands that end with Asymmetric Access Inaccessible, and sends them again
//! when the log page says that the namespace is optimized again. A host that knows nothing of ANA would take that status
//! for an error, or send the command again and again without a pause; so it is told only to hosts that have read the log
//! page, and to others Namespace Not Ready ([`told`]).
//!
//! A controller shows ANA when its subsystem had a namespace that asks for it when the host connected: what a controller
//! can does not change under a host. Each namespace is a group of its own, whose number is its NSID, so that a fence
//! touches no other. There is no Persistent Loss, for whatever was fenced can be resumed, and that state has no way back;
//! and no Change, for a fence is one atomic step.

use std::mem::size_of;

use nvme_spec::identify::{IdentifyController, anacap, cmic};
use nvme_spec::log::{AnaGroupDescriptor, AnaHeader, AnaState};
use nvme_spec::{Nsid, Status};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::export::{Export, FencePolicy, Grant};
use super::options::{NSID_MAX, TRANSFER_BYTES_MAX};
use super::subsystem::Subsystem;

/// ANATT, in seconds. No state takes time to change; it is what a host that finds no other path waits at the least
/// before it gives up.
const TRANSITION_S: u8 = 10;

/// The length of the log page: what hosts reckon with that know NANAGRPID and MNAN only. nvme-cli reads all of it, in
/// pieces, however many groups there are; so what is behind them is zeroes, and not beyond the end.
const LOG_BYTES: usize =
    size_of::<AnaHeader>() + NSID_MAX as usize * (size_of::<AnaGroupDescriptor>() + size_of::<u32>());
const _: () = assert!(LOG_BYTES <= TRANSFER_BYTES_MAX as usize, "Linux reads it at once");

/// The ANA fields of Identify Controller.
pub(super) fn show(data: &mut IdentifyController) {
    data.cmic |= cmic::ANA;
    data.anatt_s = TRANSITION_S;
    data.anacap = anacap::OPTIMIZED | anacap::INACCESSIBLE | anacap::GROUP_IS_FIXED;
    data.anagrpmax = U32::new(NSID_MAX);
    data.nanagrpid = U32::new(NSID_MAX);
}

/// ANAGRPID of a namespace.
pub(super) const fn group_of(nsid: Nsid) -> U32 {
    U32::new(nsid.0)
}

/// The state of a namespace, for controllers that show ANA.
pub(super) fn state_of(export: &Export) -> AnaState {
    match (export.on_fence, export.grant()) {
        (FencePolicy::Ana, Grant::Fenced(_) | Grant::Removed) => AnaState::INACCESSIBLE,
        _ => AnaState::OPTIMIZED,
    }
}

/// The log page (section 5.1.12.1.13): a descriptor for each namespace of now.
pub(super) fn log(subsystem: &Subsystem, groups_only: bool) -> Vec<u8> {
    // The count first: a page that is newer than its number is read once more, an older one is never kept.
    let change_count = U64::new(subsystem.ana_changes());
    let table = subsystem.table();
    let groups = U16::new(u16::try_from(table.iter().count()).unwrap_or(u16::MAX));
    let mut page = Vec::with_capacity(LOG_BYTES);
    page.extend_from_slice(AnaHeader { change_count, groups, ..AnaHeader::default() }.as_bytes());
    for export in table.iter() {
        let descriptor = AnaGroupDescriptor {
            group: group_of(export.nsid),
            namespaces: U32::new(u32::from(!groups_only)),
            change_count: U64::new(export.ana_changed()),
            state: state_of(export),
            reserved17: [0; 15],
        };
        page.extend_from_slice(descriptor.as_bytes());
        if !groups_only {
            page.extend_from_slice(&export.nsid.0.to_le_bytes());
        }
    }
    page.resize(LOG_BYTES, 0);
    page
}

/// A status as a host takes it that has read the log page, or has not.
pub(super) fn told(status: Status, knows_ana: bool) -> Status {
    if knows_ana || status.code() != Status::ANA_INACCESSIBLE {
        return status;
    }
    Status::NAMESPACE_NOT_READY.with_crd(status.crd())
}
