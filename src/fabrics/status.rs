//! What hosts are told when a device or the frozen map says no: one table, where Do Not Retry is decided.
//!
//! The rule: retry only what another attempt may cure. A medium error, a full device, a range out of bounds stay what
//! they are; a device that is gone, late or out of resources may be back. Linux retries a command without Do Not Retry
//! a few times and only then reports an error.

use nvme_spec::Status;

use super::export::{FencePolicy, FenceReason, Grant};
use crate::block::BlockErrorKind;
use crate::extent::LookupError;

/// CRDT1 to CRDT3 of Identify Controller, in 100 ms: after how long a host tries a command again that ends with that CRD.
/// A Linux host does so five times, and then tells whoever did the I/O.
pub(super) const RETRY_DELAYS_100MS: [u16; 3] = [1, 10, 50];
/// CRD of a fence that may be over in a moment: a second look at a file.
const RETRY_IN_A_SECOND: u8 = 2;
/// CRD of a device that is lost: it may be back after a reset, or when somebody has plugged it in.
const RETRY_LATER: u8 = 3;

/// The status for commands to an export that is not granted; `None` when it is.
pub(super) const fn of_grant(grant: Grant, on_fence: FencePolicy, is_write: bool) -> Option<Status> {
    let reason = match grant {
        Grant::Live => return None,
        Grant::Removed => return Some(Status::INVALID_NAMESPACE.with_dnr()),
        Grant::Fenced(reason) => reason,
    };
    let status = match on_fence {
        // To be told at once is what this policy is for.
        FencePolicy::WriteProtect if is_write => return Some(Status::NAMESPACE_WRITE_PROTECTED.with_dnr()),
        FencePolicy::NotReady | FencePolicy::WriteProtect => Status::NAMESPACE_NOT_READY,
        FencePolicy::Ana => Status::ANA_INACCESSIBLE,
    };
    Some(status.with_crd(match reason {
        FenceReason::DeviceFailed => RETRY_LATER,
        FenceReason::MapInDoubt | FenceReason::NotServed | FenceReason::Operator => RETRY_IN_A_SECOND,
    }))
}

/// The status for an operation that failed on the device (NVM Express Base Specification 2.1, section 4.2.3; NVM
/// Command Set Specification 1.1, section 3.1.3).
#[must_use]
pub const fn of_block_error(kind: BlockErrorKind) -> Status {
    match kind {
        BlockErrorKind::Media => Status::UNRECOVERED_READ_ERROR.with_dnr(),
        BlockErrorKind::WriteFault => Status::WRITE_FAULT.with_dnr(),
        BlockErrorKind::ReadOnly => Status::NAMESPACE_WRITE_PROTECTED.with_dnr(),
        BlockErrorKind::NotSupported => Status::INVALID_OPCODE.with_dnr(),
        BlockErrorKind::NoSpace => Status::CAPACITY_EXCEEDED.with_dnr(),
        // The host's range was checked against the namespace before: leaving the device is our fault, and a lie
        // about the host's LBA would send its operator looking in the wrong place.
        BlockErrorKind::OutOfRange | BlockErrorKind::InvalidRequest => Status::INTERNAL_ERROR.with_dnr(),
        BlockErrorKind::TimedOut | BlockErrorKind::Internal => Status::INTERNAL_ERROR,
        BlockErrorKind::Gone => Status::NAMESPACE_NOT_READY.with_crd(RETRY_LATER),
        BlockErrorKind::Aborted => Status::COMMAND_ABORT_REQUESTED,
    }
}

/// The status for a range that the frozen map does not carry. The host's range was checked against the namespace
/// before, so each of these is an error of the target's, and the export should be fenced.
#[must_use]
pub const fn of_lookup_error(error: &LookupError) -> Status {
    match error {
        LookupError::OutOfRange { .. }
        | LookupError::Misaligned { .. }
        | LookupError::NotInMap { .. }
        | LookupError::Disagrees { .. } => Status::INTERNAL_ERROR.with_dnr(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Segment;
    use crate::units::{ByteLen, ByteOffset};

    #[test]
    fn every_device_error_has_its_status() {
        use BlockErrorKind as K;
        let table = [
            (K::Media, 0x281, true),
            (K::WriteFault, 0x280, true),
            (K::OutOfRange, 0x006, true),
            (K::ReadOnly, 0x020, true),
            (K::NotSupported, 0x001, true),
            (K::NoSpace, 0x081, true),
            (K::TimedOut, 0x006, false),
            (K::Gone, 0x082, false),
            (K::Aborted, 0x007, false),
            (K::InvalidRequest, 0x006, true),
            (K::Internal, 0x006, false),
        ];
        for (kind, code, dnr) in table {
            let status = of_block_error(kind);
            assert_eq!((status.code().0, status.dnr()), (code, dnr), "{kind:?}");
            assert!(!status.is_success());
        }
    }

    #[test]
    fn every_policy_has_its_status() {
        use FencePolicy as P;
        let grants = [Grant::Fenced(FenceReason::MapInDoubt), Grant::Fenced(FenceReason::DeviceFailed)];
        for (grant, crd) in grants.into_iter().zip([RETRY_IN_A_SECOND, RETRY_LATER]) {
            for (policy, read, write) in [
                (P::NotReady, Status::NAMESPACE_NOT_READY, Status::NAMESPACE_NOT_READY),
                (P::Ana, Status::ANA_INACCESSIBLE, Status::ANA_INACCESSIBLE),
                (P::WriteProtect, Status::NAMESPACE_NOT_READY, Status::NAMESPACE_WRITE_PROTECTED),
            ] {
                assert_eq!(of_grant(grant, policy, false), Some(read.with_crd(crd)));
                let write = match policy {
                    P::WriteProtect => write.with_dnr(),
                    _ => write.with_crd(crd),
                };
                assert_eq!(of_grant(grant, policy, true), Some(write));
                assert_eq!(of_grant(Grant::Live, policy, true), None);
                let removed = Some(Status::INVALID_NAMESPACE.with_dnr());
                assert_eq!(of_grant(Grant::Removed, policy, true), removed);
            }
        }
    }

    #[test]
    fn no_map_error_is_the_hosts_fault_or_worth_a_retry() {
        let (file_offset, len) = (ByteOffset(0), ByteLen(512));
        let segment = Segment { file_offset, device_offset: ByteOffset(0), len, extent_index: 0 };
        for error in [
            LookupError::OutOfRange { file_offset, len, map_len: ByteLen(0) },
            LookupError::Misaligned { file_offset, len },
            LookupError::NotInMap { file_offset },
            LookupError::Disagrees { segment },
        ] {
            assert_eq!(of_lookup_error(&error), Status::INTERNAL_ERROR.with_dnr());
        }
    }
}
