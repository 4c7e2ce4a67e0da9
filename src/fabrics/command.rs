//! How a command fails, and the checks that commands of every kind share.

use nvme_spec::command::psdt;
use nvme_spec::{Status, SubmissionQueueEntry};

/// Byte offsets in the submission queue entry (NVM Express Base Specification 2.1, section 4.1): what the Error
/// Information log calls the parameter error location.
pub(super) mod at {
    pub(in crate::fabrics) const OPCODE: u16 = 0;
    pub(in crate::fabrics) const FLAGS: u16 = 1;
    pub(in crate::fabrics) const NSID: u16 = 4;
    pub(in crate::fabrics) const FCTYPE: u16 = 4;
    pub(in crate::fabrics) const SGL_OFFSET: u16 = 24;
    pub(in crate::fabrics) const SGL_LENGTH: u16 = 32;
    pub(in crate::fabrics) const SGL_ID: u16 = 39;
    pub(in crate::fabrics) const CDW10: u16 = 40;
    pub(in crate::fabrics) const CDW11: u16 = 44;
    pub(in crate::fabrics) const CDW12: u16 = 48;
    pub(in crate::fabrics) const CDW14: u16 = 56;
}

/// Why a command failed: its status, and the byte of the command at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CommandError {
    pub(super) status: Status,
    pub(super) location: Option<u16>,
}

impl CommandError {
    /// A fault in the byte `location`; trying again is of no use. The Error Information log will have an entry.
    pub(super) const fn at(status: Status, location: u16) -> Self {
        Self { status: status.with_dnr().with_more(), location: Some(location) }
    }

    /// A fault in no particular byte; trying again is of no use.
    pub(super) const fn fatal(status: Status) -> Self {
        Self { status: status.with_dnr().with_more(), location: None }
    }

    /// A passing fault: the host may try again.
    pub(super) const fn retryable(status: Status) -> Self {
        Self { status: status.with_more(), location: None }
    }

    /// Invalid Field in Command, at `location`.
    pub(super) const fn field(location: u16) -> Self {
        Self::at(Status::INVALID_FIELD, location)
    }

    /// Invalid Command Opcode.
    pub(super) const fn opcode() -> Self {
        Self::at(Status::INVALID_OPCODE, at::OPCODE)
    }

    /// A command that does not belong to this moment.
    pub(super) const fn sequence() -> Self {
        Self::fatal(Status::COMMAND_SEQUENCE_ERROR)
    }
}

/// Refuses fused commands and PRPs: over fabrics PSDT is 01b (NVM Express Base Specification 2.1, section 4.1).
#[inline]
pub(super) fn check_flags(sqe: &SubmissionQueueEntry) -> Result<(), CommandError> {
    if sqe.fuse() != 0 || sqe.psdt() != psdt::SGL { Err(CommandError::field(at::FLAGS)) } else { Ok(()) }
}
