//! Fabrics commands (Base section 6) and the names of hosts and subsystems (Base section 4.7).

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

open_enum! {
    /// FCTYPE, byte 4 of a Fabrics command (Base section 6, figure "Fabrics Command Type").
    #[derive(zerocopy::Unaligned)]
    pub struct FabricsCommandType(u8) {
        /// Property Set.
        PROPERTY_SET = 0x00,
        /// Connect.
        CONNECT = 0x01,
        /// Property Get.
        PROPERTY_GET = 0x04,
        /// Authentication Send.
        AUTHENTICATION_SEND = 0x05,
        /// Authentication Receive.
        AUTHENTICATION_RECEIVE = 0x06,
        /// Disconnect.
        DISCONNECT = 0x08,
    }
}

/// The well-known NQN of the discovery service (Base section 4.7).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// Longest NQN in bytes, without its terminator (Base section 4.7).
pub const NQN_LEN_MAX: usize = 223;
/// Size of an NQN field.
pub const NQN_FIELD_LEN: usize = 256;

/// The Connect command (Base section 6.3).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ConnectCommand {
    /// OPC, 7Fh.
    pub opcode: u8,
    /// PSDT in bits 7:6.
    pub flags: u8,
    /// CID.
    pub cid: U16,
    /// FCTYPE, 01h.
    pub fctype: u8,
    /// Reserved.
    pub reserved5: [u8; 19],
    /// SGL1: 1024 bytes of [`ConnectData`].
    pub sgl1: crate::SglDescriptor,
    /// RECFMT, record format: 0.
    pub recfmt: U16,
    /// QID.
    pub qid: U16,
    /// SQSIZE: entries of the queue, zero-based.
    pub sqsize_z: U16,
    /// CATTR; see [`cattr`].
    pub cattr: u8,
    /// Reserved.
    pub reserved47: u8,
    /// KATO: keep alive timeout in milliseconds, 0 for none; admin queue only.
    pub kato_ms: U32,
    /// Reserved.
    pub reserved52: [u8; 12],
}
const _: () = assert!(size_of::<ConnectCommand>() == 64);
const _: () = assert!(offset_of!(ConnectCommand, recfmt) == 40);
const _: () = assert!(offset_of!(ConnectCommand, kato_ms) == 48);

/// CATTR, connect attributes (Base section 6.3).
pub mod cattr {
    /// Priority class of the queue, bits 1:0.
    pub const PRIORITY_MASK: u8 = 0b11;
    /// Disable SQ flow control.
    pub const DISABLE_SQ_FLOW_CONTROL: u8 = 1 << 2;
    /// Individual I/O queue deletion supported by the host.
    pub const INDIVIDUAL_IO_QUEUE_DELETION: u8 = 1 << 3;
}

/// The data of a Connect command (Base section 6.3, figure "Connect Command – Data").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ConnectData {
    /// HOSTID: 128-bit host identifier.
    pub hostid: [u8; 16],
    /// CNTLID: the controller wanted, [`crate::Cntlid::DYNAMIC`] for any.
    pub cntlid: U16,
    /// Reserved.
    pub reserved18: [u8; 238],
    /// SUBNQN.
    pub subnqn: [u8; NQN_FIELD_LEN],
    /// HOSTNQN.
    pub hostnqn: [u8; NQN_FIELD_LEN],
    /// Reserved.
    pub reserved768: [u8; 256],
}
const _: () = assert!(size_of::<ConnectData>() == 1024);
const _: () = assert!(offset_of!(ConnectData, subnqn) == 256);
const _: () = assert!(offset_of!(ConnectData, hostnqn) == 512);

/// DW0 of a failed Connect: where the invalid parameter is (Base section 6.3, Connect Invalid Parameters).
/// IATTR bit 0 set means an offset into the data, clear into the command.
#[must_use]
pub const fn invalid_parameter_dw0(in_data: bool, offset_bytes: u16) -> u32 {
    offset_bytes as u32 | (in_data as u32) << 16
}

/// The Property Set command (Base section 6.6).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PropertySetCommand {
    /// OPC, 7Fh.
    pub opcode: u8,
    /// PSDT in bits 7:6.
    pub flags: u8,
    /// CID.
    pub cid: U16,
    /// FCTYPE, 00h.
    pub fctype: u8,
    /// Reserved.
    pub reserved5: [u8; 19],
    /// Reserved: no data, so no SGL.
    pub reserved24: [u8; 16],
    /// ATTRIB: size in bits 2:0; 000b 4 bytes, 001b 8 bytes.
    pub attrib: u8,
    /// Reserved.
    pub reserved41: [u8; 3],
    /// OFST: the property.
    pub ofst: U32,
    /// VALUE.
    pub value: U64,
    /// Reserved.
    pub reserved56: [u8; 8],
}
const _: () = assert!(size_of::<PropertySetCommand>() == 64);
const _: () = assert!(offset_of!(PropertySetCommand, ofst) == 44);
const _: () = assert!(offset_of!(PropertySetCommand, value) == 48);

/// The Property Get command (Base section 6.5). The value comes in DW0 and DW1 of the completion.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PropertyGetCommand {
    /// OPC, 7Fh.
    pub opcode: u8,
    /// PSDT in bits 7:6.
    pub flags: u8,
    /// CID.
    pub cid: U16,
    /// FCTYPE, 04h.
    pub fctype: u8,
    /// Reserved.
    pub reserved5: [u8; 19],
    /// Reserved: no data, so no SGL.
    pub reserved24: [u8; 16],
    /// ATTRIB: size in bits 2:0; 000b 4 bytes, 001b 8 bytes.
    pub attrib: u8,
    /// Reserved.
    pub reserved41: [u8; 3],
    /// OFST: the property.
    pub ofst: U32,
    /// Reserved.
    pub reserved48: [u8; 16],
}
const _: () = assert!(size_of::<PropertyGetCommand>() == 64);
const _: () = assert!(offset_of!(PropertyGetCommand, ofst) == 44);

/// The Disconnect command (Base section 6.4).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DisconnectCommand {
    /// OPC, 7Fh.
    pub opcode: u8,
    /// PSDT in bits 7:6.
    pub flags: u8,
    /// CID.
    pub cid: U16,
    /// FCTYPE, 08h.
    pub fctype: u8,
    /// Reserved.
    pub reserved5: [u8; 19],
    /// Reserved: no data, so no SGL.
    pub reserved24: [u8; 16],
    /// RECFMT, record format: 0.
    pub recfmt: U16,
    /// Reserved.
    pub reserved42: [u8; 22],
}
const _: () = assert!(size_of::<DisconnectCommand>() == 64);

/// The text of an NQN field: terminated by NUL, 1 to 223 bytes of UTF-8 without control characters. `None` otherwise.
#[must_use]
pub fn nqn_text(field: &[u8; NQN_FIELD_LEN]) -> Option<&str> {
    let end = field.iter().position(|&byte| byte == 0)?;
    if end == 0 || end > NQN_LEN_MAX {
        return None;
    }
    let text = core::str::from_utf8(field.get(..end)?).ok()?;
    if text.chars().any(char::is_control) { None } else { Some(text) }
}

/// `text` as an NQN field, or `None` when it is empty or longer than 223 bytes.
#[must_use]
pub fn nqn_field(text: &str) -> Option<[u8; NQN_FIELD_LEN]> {
    let mut field = [0; NQN_FIELD_LEN];
    if text.is_empty() || text.len() > NQN_LEN_MAX {
        return None;
    }
    field.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    Some(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nqn_fields_go_there_and_back() {
        let Some(field) = nqn_field(DISCOVERY_NQN) else { panic!("a valid NQN") };
        assert_eq!(nqn_text(&field), Some(DISCOVERY_NQN));
    }

    #[test]
    fn bad_nqn_fields_are_no_text() {
        assert_eq!(nqn_text(&[0; 256]), None);
        assert_eq!(nqn_text(&[b'a'; 256]), None);
        let mut long = [b'a'; 256];
        long[224] = 0;
        assert_eq!(nqn_text(&long), None);
        long[223] = 0;
        assert!(nqn_text(&long).is_some());
        let mut bad = [0; 256];
        bad[0] = 0xFF;
        assert_eq!(nqn_text(&bad), None);
        bad[0] = b'\n';
        assert_eq!(nqn_text(&bad), None);
    }
}
