//! The status field of a completion (Base section 4.2.3).

use core::fmt;

/// SC, SCT, CRD, M and DNR: bits 15:1 of the last word of a completion, that is without the phase tag.
///
/// ```text
///   14   13   12 11   10 8   7     0
///   DNR  M    CRD     SCT    SC
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Status(pub u16);

/// Status Code Types (Base section 4.2.3, figure "Status Code Type Values").
pub mod sct {
    /// Generic Command Status.
    pub const GENERIC: u8 = 0;
    /// Command Specific Status.
    pub const COMMAND_SPECIFIC: u8 = 1;
    /// Media and Data Integrity Errors.
    pub const MEDIA: u8 = 2;
    /// Path Related Status.
    pub const PATH: u8 = 3;
    /// Vendor specific.
    pub const VENDOR: u8 = 7;
}

macro_rules! statuses {
    ($($(#[$meta:meta])* $name:ident = $value:expr, $text:expr;)*) => {
        impl Status {
            $($(#[$meta])* pub const $name: Self = Self($value);)*

            /// The specification's name of the status, without regard to DNR, M and CRD.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 & 0x7FF {
                    $(value if value == $value => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// Generic 00h.
    SUCCESS = 0x000, "Successful Completion";
    /// Generic 01h.
    INVALID_OPCODE = 0x001, "Invalid Command Opcode";
    /// Generic 02h.
    INVALID_FIELD = 0x002, "Invalid Field in Command";
    /// Generic 03h.
    COMMAND_ID_CONFLICT = 0x003, "Command ID Conflict";
    /// Generic 04h.
    DATA_TRANSFER_ERROR = 0x004, "Data Transfer Error";
    /// Generic 05h.
    POWER_LOSS = 0x005, "Commands Aborted due to Power Loss Notification";
    /// Generic 06h.
    INTERNAL_ERROR = 0x006, "Internal Error";
    /// Generic 07h.
    COMMAND_ABORT_REQUESTED = 0x007, "Command Abort Requested";
    /// Generic 08h.
    ABORTED_SQ_DELETION = 0x008, "Command Aborted due to SQ Deletion";
    /// Generic 0Bh.
    INVALID_NAMESPACE = 0x00B, "Invalid Namespace or Format";
    /// Generic 0Ch.
    COMMAND_SEQUENCE_ERROR = 0x00C, "Command Sequence Error";
    /// Generic 0Dh.
    INVALID_SGL_SEGMENT = 0x00D, "Invalid SGL Segment Descriptor";
    /// Generic 0Eh.
    INVALID_SGL_COUNT = 0x00E, "Invalid Number of SGL Descriptors";
    /// Generic 0Fh.
    DATA_SGL_LENGTH_INVALID = 0x00F, "Data SGL Length Invalid";
    /// Generic 10h.
    METADATA_SGL_LENGTH_INVALID = 0x010, "Metadata SGL Length Invalid";
    /// Generic 11h.
    SGL_TYPE_INVALID = 0x011, "SGL Descriptor Type Invalid";
    /// Generic 13h.
    PRP_OFFSET_INVALID = 0x013, "PRP Offset Invalid";
    /// Generic 16h.
    SGL_OFFSET_INVALID = 0x016, "SGL Offset Invalid";
    /// Generic 18h.
    HOST_ID_INCONSISTENT = 0x018, "Host Identifier Inconsistent Format";
    /// Generic 19h.
    KEEP_ALIVE_EXPIRED = 0x019, "Keep Alive Timer Expired";
    /// Generic 1Ah.
    KEEP_ALIVE_INVALID = 0x01A, "Keep Alive Timeout Invalid";
    /// Generic 20h.
    NAMESPACE_WRITE_PROTECTED = 0x020, "Namespace is Write Protected";
    /// Generic 21h.
    COMMAND_INTERRUPTED = 0x021, "Command Interrupted";
    /// Generic 22h.
    TRANSIENT_TRANSPORT_ERROR = 0x022, "Transient Transport Error";
    /// Generic 24h.
    ADMIN_MEDIA_NOT_READY = 0x024, "Admin Command Media Not Ready";
    /// Generic, NVM 80h.
    LBA_OUT_OF_RANGE = 0x080, "LBA Out of Range";
    /// Generic, NVM 81h.
    CAPACITY_EXCEEDED = 0x081, "Capacity Exceeded";
    /// Generic, NVM 82h.
    NAMESPACE_NOT_READY = 0x082, "Namespace Not Ready";
    /// Generic, NVM 83h.
    RESERVATION_CONFLICT = 0x083, "Reservation Conflict";
    /// Command specific 01h.
    INVALID_QUEUE_IDENTIFIER = 0x101, "Invalid Queue Identifier";
    /// Command specific 02h.
    INVALID_QUEUE_SIZE = 0x102, "Invalid Queue Size";
    /// Command specific 03h.
    ABORT_LIMIT_EXCEEDED = 0x103, "Abort Command Limit Exceeded";
    /// Command specific 05h.
    ASYNC_EVENT_LIMIT_EXCEEDED = 0x105, "Asynchronous Event Request Limit Exceeded";
    /// Command specific 09h.
    INVALID_LOG_PAGE = 0x109, "Invalid Log Page";
    /// Command specific 0Ah.
    INVALID_FORMAT = 0x10A, "Invalid Format";
    /// Command specific 0Dh.
    FEATURE_NOT_SAVEABLE = 0x10D, "Feature Identifier Not Saveable";
    /// Command specific 0Eh.
    FEATURE_NOT_CHANGEABLE = 0x10E, "Feature Not Changeable";
    /// Command specific 0Fh.
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F, "Feature Not Namespace Specific";
    /// Command specific, Fabrics 80h.
    CONNECT_INCOMPATIBLE_FORMAT = 0x180, "Connect Incompatible Format";
    /// Command specific, Fabrics 81h.
    CONNECT_CONTROLLER_BUSY = 0x181, "Connect Controller Busy";
    /// Command specific, Fabrics 82h.
    CONNECT_INVALID_PARAMETERS = 0x182, "Connect Invalid Parameters";
    /// Command specific, Fabrics 83h.
    CONNECT_RESTART_DISCOVERY = 0x183, "Connect Restart Discovery";
    /// Command specific, Fabrics 84h.
    CONNECT_INVALID_HOST = 0x184, "Connect Invalid Host";
    /// Command specific, Fabrics 85h.
    DISCONNECT_INVALID_QUEUE_TYPE = 0x185, "Invalid Queue Type";
    /// Command specific, Fabrics 90h.
    DISCOVER_RESTART = 0x190, "Discover Restart";
    /// Command specific, Fabrics 91h.
    AUTHENTICATION_REQUIRED = 0x191, "Authentication Required";
    /// Media 80h.
    WRITE_FAULT = 0x280, "Write Fault";
    /// Media 81h.
    UNRECOVERED_READ_ERROR = 0x281, "Unrecovered Read Error";
    /// Media 85h.
    COMPARE_FAILURE = 0x285, "Compare Failure";
    /// Media 86h.
    ACCESS_DENIED = 0x286, "Access Denied";
    /// Media 87h.
    DEALLOCATED_OR_UNWRITTEN = 0x287, "Deallocated or Unwritten Logical Block";
    /// Path 00h.
    INTERNAL_PATH_ERROR = 0x300, "Internal Path Error";
    /// Path 01h.
    ANA_PERSISTENT_LOSS = 0x301, "Asymmetric Access Persistent Loss";
    /// Path 02h.
    ANA_INACCESSIBLE = 0x302, "Asymmetric Access Inaccessible";
    /// Path 03h.
    ANA_TRANSITION = 0x303, "Asymmetric Access Transition";
    /// Path 70h.
    HOST_PATH_ERROR = 0x370, "Host Pathing Error";
    /// Path 71h.
    HOST_ABORTED = 0x371, "Command Aborted By Host";
}

impl Status {
    const DNR: u16 = 1 << 14;
    const MORE: u16 = 1 << 13;

    /// The status of a type and a code.
    #[must_use]
    pub const fn new(sct: u8, sc: u8) -> Self {
        Self((sct as u16 & 7) << 8 | sc as u16)
    }

    /// With Do Not Retry set.
    #[must_use]
    pub const fn with_dnr(self) -> Self {
        Self(self.0 | Self::DNR)
    }

    /// With More set: the Error Information log has an entry.
    #[must_use]
    pub const fn with_more(self) -> Self {
        Self(self.0 | Self::MORE)
    }

    /// With CRD, the index of the Command Retry Delay Time after which to try again: 1 to 3, or 0 for at once (Base
    /// section 4.2.3). Of other numbers the low two bits count.
    #[must_use]
    pub const fn with_crd(self, index: u8) -> Self {
        Self(self.0 & !(3 << 11) | (index as u16 & 3) << 11)
    }

    /// CRD.
    #[must_use]
    pub const fn crd(self) -> u8 {
        (self.0 >> 11 & 3) as u8
    }

    /// SC, status code.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the low byte is meant")]
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// SCT, status code type; see [`sct`].
    #[must_use]
    pub const fn sct(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }

    /// DNR, do not retry.
    #[must_use]
    pub const fn dnr(self) -> bool {
        self.0 & Self::DNR != 0
    }

    /// Type and code only, for comparing with the constants.
    #[must_use]
    pub const fn code(self) -> Self {
        Self(self.0 & 0x7FF)
    }

    /// Whether the command succeeded.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 & 0x7FF == 0
    }

    /// The status as it stands in a completion whose phase tag is 0, as over fabrics.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        self.0 << 1
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:#05x})", self.0 & 0x7FF)?,
            None => write!(f, "status {:#05x}", self.0 & 0x7FF)?,
        }
        f.write_str(if self.dnr() { ", do not retry" } else { "" })
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn parts_are_taken_apart_and_put_together() {
        let status = Status::CONNECT_INVALID_HOST.with_dnr();
        assert_eq!((status.sct(), status.sc(), status.dnr()), (sct::COMMAND_SPECIFIC, 0x84, true));
        assert_eq!(status.code(), Status::CONNECT_INVALID_HOST);
        assert_eq!(status.to_wire(), 0x4184 << 1);
        assert_eq!(Status::new(2, 0x81), Status::UNRECOVERED_READ_ERROR);
        assert!(Status::SUCCESS.is_success() && !status.is_success());
    }

    #[test]
    fn names_are_the_specifications() {
        assert_eq!(
            format!("{}", Status::INVALID_FIELD.with_dnr()),
            "Invalid Field in Command (0x002), do not retry"
        );
        assert_eq!(format!("{}", Status::new(7, 0x42)), "status 0x742");
    }
}
