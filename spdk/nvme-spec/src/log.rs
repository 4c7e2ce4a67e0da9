//! Log pages (Base section 5.1.12.1).

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::fabrics::NQN_FIELD_LEN;

mod ana;

pub use ana::{ANA_RETURN_GROUPS_ONLY, AnaGroupDescriptor, AnaHeader, AnaState};

open_enum! {
    /// Log Page Identifier (Base section 5.1.12, figure "Get Log Page – Log Page Identifiers").
    pub struct LogPageId(u8) {
        /// Supported Log Pages.
        SUPPORTED = 0x00,
        /// Error Information.
        ERROR_INFORMATION = 0x01,
        /// SMART / Health Information.
        SMART_HEALTH = 0x02,
        /// Firmware Slot Information.
        FIRMWARE_SLOT = 0x03,
        /// Changed Attached Namespace List.
        CHANGED_NAMESPACES = 0x04,
        /// Commands Supported and Effects.
        COMMANDS_EFFECTS = 0x05,
        /// Device Self-test.
        DEVICE_SELF_TEST = 0x06,
        /// Asymmetric Namespace Access.
        ANA = 0x0C,
        /// Feature Identifiers Supported and Effects.
        FEATURES_EFFECTS = 0x12,
        /// Discovery.
        DISCOVERY = 0x70,
        /// Reservation Notification.
        RESERVATION_NOTIFICATION = 0x80,
    }
}

/// Error Information Log Entry (Base section 5.1.12.1.2).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ErrorInformationEntry {
    /// Error count: unique, from 1; 0 in an empty entry.
    pub error_count: U64,
    /// SQID.
    pub sqid: U16,
    /// CID.
    pub cid: U16,
    /// Status field as in the completion, with the phase tag in bit 0.
    pub status: U16,
    /// Parameter error location: byte in bits 7:0, bit in bits 10:8; FFFFh when not of a field.
    pub parameter_error_location: U16,
    /// First LBA with the error.
    pub lba: U64,
    /// NSID.
    pub nsid: U32,
    /// Vendor specific information available.
    pub vendor: u8,
    /// TRTYPE.
    pub trtype: u8,
    /// CSI.
    pub csi: u8,
    /// OPC.
    pub opcode: u8,
    /// Command specific information.
    pub command_specific: U64,
    /// Transport type specific information.
    pub transport_specific: U16,
    /// Reserved.
    pub reserved42: [u8; 21],
    /// LPVER: log page version.
    pub version: u8,
}
const _: () = assert!(size_of::<ErrorInformationEntry>() == 64);

/// SMART / Health Information (Base section 5.1.12.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SmartHealth {
    /// Critical warning.
    pub critical_warning: u8,
    /// Composite temperature in kelvins.
    pub composite_temperature: U16,
    /// Available spare in percent.
    pub available_spare: u8,
    /// Available spare threshold in percent.
    pub available_spare_threshold: u8,
    /// Percentage used.
    pub percentage_used: u8,
    /// Endurance group critical warning summary.
    pub endurance_group_summary: u8,
    /// Reserved.
    pub reserved7: [u8; 25],
    /// Data units read, in thousands of 512 bytes, 128 bits.
    pub data_units_read: [u8; 16],
    /// Data units written, likewise.
    pub data_units_written: [u8; 16],
    /// Host read commands.
    pub host_read_commands: [u8; 16],
    /// Host write commands.
    pub host_write_commands: [u8; 16],
    /// Controller busy time in minutes.
    pub controller_busy_time_min: [u8; 16],
    /// Power cycles.
    pub power_cycles: [u8; 16],
    /// Power on hours.
    pub power_on_hours: [u8; 16],
    /// Unsafe shutdowns.
    pub unsafe_shutdowns: [u8; 16],
    /// Media and data integrity errors.
    pub media_errors: [u8; 16],
    /// Number of Error Information log entries.
    pub error_log_entries: [u8; 16],
    /// Everything from byte 192: temperature times and sensors.
    pub rest: [u8; 320],
}
const _: () = assert!(size_of::<SmartHealth>() == 512);
const _: () = assert!(offset_of!(SmartHealth, data_units_read) == 32);

/// Firmware Slot Information (Base section 5.1.12.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FirmwareSlot {
    /// AFI: active slot in bits 2:0.
    pub afi: u8,
    /// Reserved.
    pub reserved1: [u8; 7],
    /// FRS1 to FRS7: revision in each slot.
    pub revisions: [[u8; 8]; 7],
    /// Reserved.
    pub reserved64: [u8; 448],
}
const _: () = assert!(size_of::<FirmwareSlot>() == 512);

/// Entries of the Changed Attached Namespace List (Base section 5.1.12.1.5).
pub const CHANGED_NAMESPACES_MAX: usize = 1024;

/// Supported Log Pages (Base section 5.1.12.1.1): a LID Supported and Effects dword for each identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SupportedLogPages {
    /// One dword a log page; bit 0 LSUPP.
    pub lids: [U32; 256],
}
const _: () = assert!(size_of::<SupportedLogPages>() == 1024);

/// Commands Supported and Effects (Base section 5.1.12.1.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CommandsEffects {
    /// ACS0 to ACS255: admin commands; see [`effect`].
    pub admin: [U32; 256],
    /// IOCS0 to IOCS255: I/O commands.
    pub io: [U32; 256],
    /// Reserved.
    pub reserved2048: [u8; 2048],
}
const _: () = assert!(size_of::<CommandsEffects>() == 4096);

/// Bits of a Commands Supported and Effects dword.
pub mod effect {
    /// CSUPP: supported.
    pub const SUPPORTED: u32 = 1 << 0;
    /// LBCC: logical block content change.
    pub const BLOCK_CONTENT_CHANGE: u32 = 1 << 1;
    /// NCC: namespace capability change.
    pub const NAMESPACE_CAPABILITY_CHANGE: u32 = 1 << 2;
}

/// The header of the Discovery log page (Base section 5.1.12.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DiscoveryLogHeader {
    /// GENCTR: generation counter.
    pub genctr: U64,
    /// NUMREC: number of records.
    pub numrec: U64,
    /// RECFMT: record format, 0.
    pub recfmt: U16,
    /// Reserved.
    pub reserved18: [u8; 1006],
}
const _: () = assert!(size_of::<DiscoveryLogHeader>() == 1024);

/// A record of the Discovery log page (Base section 5.1.12.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DiscoveryLogEntry {
    /// TRTYPE; see [`TransportType`].
    pub trtype: TransportType,
    /// ADRFAM; see [`AddressFamily`].
    pub adrfam: AddressFamily,
    /// SUBTYPE; see [`SubsystemType`].
    pub subtype: SubsystemType,
    /// TREQ: transport requirements; see [`treq`].
    pub treq: u8,
    /// PORTID.
    pub portid: U16,
    /// CNTLID: FFFFh in the dynamic controller model.
    pub cntlid: U16,
    /// ASQSZ: admin submission queue size, at least 32.
    pub asqsz: U16,
    /// EFLAGS; see [`eflags`].
    pub eflags: U16,
    /// Reserved.
    pub reserved12: [u8; 20],
    /// TRSVCID: the TCP port in ASCII, padded with spaces.
    pub trsvcid: [u8; 32],
    /// Reserved.
    pub reserved64: [u8; 192],
    /// SUBNQN.
    pub subnqn: [u8; NQN_FIELD_LEN],
    /// TRADDR: the address in ASCII, padded with spaces.
    pub traddr: [u8; 256],
    /// TSAS: transport specific; for TCP byte 0 is SECTYPE.
    pub tsas: [u8; 256],
}
const _: () = assert!(size_of::<DiscoveryLogEntry>() == 1024);
const _: () = assert!(offset_of!(DiscoveryLogEntry, trsvcid) == 32);
const _: () = assert!(offset_of!(DiscoveryLogEntry, subnqn) == 256);
const _: () = assert!(offset_of!(DiscoveryLogEntry, traddr) == 512);

open_enum! {
    /// TRTYPE.
    #[derive(zerocopy::Unaligned)]
    pub struct TransportType(u8) {
        /// RDMA.
        RDMA = 1,
        /// Fibre Channel.
        FC = 2,
        /// TCP.
        TCP = 3,
        /// Intra-host (loopback).
        LOOP = 254,
    }
}

open_enum! {
    /// ADRFAM.
    #[derive(zerocopy::Unaligned)]
    pub struct AddressFamily(u8) {
        /// IPv4.
        IPV4 = 1,
        /// IPv6.
        IPV6 = 2,
        /// InfiniBand.
        IB = 3,
        /// Fibre Channel.
        FC = 4,
    }
}

open_enum! {
    /// SUBTYPE.
    #[derive(zerocopy::Unaligned)]
    pub struct SubsystemType(u8) {
        /// A referral to another discovery service.
        REFERRAL = 1,
        /// A subsystem with namespaces.
        NVM = 2,
        /// This discovery service itself.
        CURRENT_DISCOVERY = 3,
    }
}

/// TREQ.
pub mod treq {
    /// Secure channel: not specified.
    pub const SECURE_CHANNEL_NOT_SPECIFIED: u8 = 0;
    /// Secure channel: required.
    pub const SECURE_CHANNEL_REQUIRED: u8 = 1;
    /// Secure channel: not required.
    pub const SECURE_CHANNEL_NOT_REQUIRED: u8 = 2;
    /// Disabling SQ flow control is supported.
    pub const DISABLE_SQ_FLOW_CONTROL: u8 = 1 << 2;
}

/// EFLAGS.
pub mod eflags {
    /// DUPRETINFO: other ports of this discovery service return the same information.
    pub const DUPLICATE_INFORMATION: u16 = 1 << 0;
    /// EPCSD: explicit persistent connections of discovery controllers supported.
    pub const EXPLICIT_PERSISTENT_CONNECTION: u16 = 1 << 1;
    /// NCC: no connectivity to a centralised discovery controller.
    pub const NO_CDC_CONNECTIVITY: u16 = 1 << 2;
}

/// SECTYPE values of TCP (TCP section 3.1.2).
pub mod sectype {
    /// No transport security.
    pub const NONE: u8 = 0;
    /// TLS 1.2 (obsolete).
    pub const TLS12: u8 = 1;
    /// TLS 1.3.
    pub const TLS13: u8 = 2;
}
