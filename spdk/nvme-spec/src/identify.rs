//! Identify data structures (Base section 5.1.13; NVM section 4.1.5).

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::fabrics::NQN_FIELD_LEN;

mod namespace;

pub use namespace::{IdentifyNamespace, IdentifyNamespaceIndependent, LbaFormat, nsattr, nsfeat, nstat};

/// Size of every Identify data structure.
pub const IDENTIFY_LEN: usize = 4096;
/// Most entries of an Active Namespace ID list.
pub const NAMESPACE_LIST_MAX: usize = 1024;
/// Most entries of a controller list (its first 2 bytes are the count).
pub const CONTROLLER_LIST_MAX: usize = 2047;

open_enum! {
    /// CNS: what Identify asks for (Base section 5.1.13, figure "Identify – CNS Values").
    pub struct Cns(u8) {
        /// Identify Namespace, NVM Command Set.
        NAMESPACE = 0x00,
        /// Identify Controller.
        CONTROLLER = 0x01,
        /// Active Namespace ID list.
        ACTIVE_NAMESPACES = 0x02,
        /// Namespace Identification Descriptor list.
        NAMESPACE_DESCRIPTORS = 0x03,
        /// I/O Command Set specific Identify Namespace.
        IO_NAMESPACE = 0x05,
        /// I/O Command Set specific Identify Controller.
        IO_CONTROLLER = 0x06,
        /// I/O Command Set specific Active Namespace ID list.
        IO_ACTIVE_NAMESPACES = 0x07,
        /// I/O Command Set Independent Identify Namespace.
        INDEPENDENT_NAMESPACE = 0x08,
        /// Allocated Namespace ID list.
        ALLOCATED_NAMESPACES = 0x10,
        /// Identify Namespace of an allocated namespace.
        ALLOCATED_NAMESPACE = 0x11,
        /// Controllers attached to a namespace.
        NAMESPACE_CONTROLLERS = 0x12,
        /// Controllers in the subsystem.
        SUBSYSTEM_CONTROLLERS = 0x13,
        /// Primary Controller Capabilities.
        PRIMARY_CONTROLLER = 0x14,
        /// Secondary Controller list.
        SECONDARY_CONTROLLERS = 0x15,
        /// Namespace Granularity list.
        NAMESPACE_GRANULARITY = 0x16,
        /// UUID list.
        UUID_LIST = 0x17,
        /// Identify I/O Command Set: the combinations.
        IO_COMMAND_SETS = 0x1C,
    }
}

open_enum! {
    /// CNTRLTYPE, controller type.
    #[derive(zerocopy::Unaligned)]
    pub struct ControllerType(u8) {
        /// Not reported.
        NOT_REPORTED = 0,
        /// I/O controller.
        IO = 1,
        /// Discovery controller.
        DISCOVERY = 2,
        /// Administrative controller.
        ADMINISTRATIVE = 3,
    }
}

open_enum! {
    /// NIDT: type of a namespace identifier (Base section 5.1.13.2.3).
    #[derive(zerocopy::Unaligned)]
    pub struct NamespaceIdType(u8) {
        /// EUI64, 8 bytes.
        EUI64 = 1,
        /// NGUID, 16 bytes.
        NGUID = 2,
        /// UUID, 16 bytes.
        UUID = 3,
        /// Command Set Identifier, 1 byte.
        CSI = 4,
    }
}

/// The command set identifier of the NVM Command Set (Base, figure "Command Set Identifiers").
pub const CSI_NVM: u8 = 0;

/// Header of a namespace identification descriptor; NIDL bytes of identifier follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct NamespaceIdDescriptor {
    /// NIDT.
    pub nidt: NamespaceIdType,
    /// NIDL: bytes of the identifier.
    pub nidl: u8,
    /// Reserved.
    pub reserved: [u8; 2],
}
const _: () = assert!(size_of::<NamespaceIdDescriptor>() == 4);

/// Identify Controller (Base section 5.1.13.2.1, CNS 01h). Fields that only memory-based controllers have are kept
/// as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyController {
    /// VID: PCI vendor.
    pub vid: U16,
    /// SSVID: PCI subsystem vendor.
    pub ssvid: U16,
    /// SN: serial number, ASCII.
    pub sn: [u8; 20],
    /// MN: model number, ASCII.
    pub mn: [u8; 40],
    /// FR: firmware revision, ASCII.
    pub fr: [u8; 8],
    /// RAB: recommended arbitration burst.
    pub rab: u8,
    /// IEEE: OUI.
    pub ieee: [u8; 3],
    /// CMIC: multi-path and sharing; see [`cmic`].
    pub cmic: u8,
    /// MDTS: largest transfer as a power of two of the smallest memory page; 0 is no limit.
    pub mdts: u8,
    /// CNTLID.
    pub cntlid: U16,
    /// VER.
    pub ver: U32,
    /// RTD3R: RTD3 resume latency in microseconds.
    pub rtd3r_us: U32,
    /// RTD3E: RTD3 entry latency in microseconds.
    pub rtd3e_us: U32,
    /// OAES: optional asynchronous events; see [`crate::aer::config`].
    pub oaes: U32,
    /// CTRATT: controller attributes; see [`ctratt`].
    pub ctratt: U32,
    /// RRLS: read recovery levels.
    pub rrls: U16,
    /// BPCAP: boot partition capabilities.
    pub bpcap: u8,
    /// Reserved.
    pub reserved103: u8,
    /// NSSL: NVM subsystem shutdown latency in microseconds.
    pub nssl_us: U32,
    /// Reserved.
    pub reserved108: [u8; 2],
    /// PLSI: power loss signaling information.
    pub plsi: u8,
    /// CNTRLTYPE.
    pub cntrltype: ControllerType,
    /// FGUID: FRU globally unique identifier.
    pub fguid: [u8; 16],
    /// CRDT1 to CRDT3: command retry delay times in 100 ms.
    pub crdt_100ms: [U16; 3],
    /// CRCAP: controller reachability capabilities.
    pub crcap: u8,
    /// Reserved.
    pub reserved135: [u8; 105],
    /// NVMe management interface.
    pub nvme_mi: [u8; 16],
    /// OACS: optional admin commands; see [`oacs`].
    pub oacs: U16,
    /// ACL: abort command limit, zero-based.
    pub acl_z: u8,
    /// AERL: asynchronous event request limit, zero-based.
    pub aerl_z: u8,
    /// FRMW: firmware updates; bit 0 slot 1 read only, bits 3:1 number of slots.
    pub frmw: u8,
    /// LPA: log page attributes; see [`lpa`].
    pub lpa: u8,
    /// ELPE: error log page entries, zero-based.
    pub elpe_z: u8,
    /// NPSS: number of power states, zero-based.
    pub npss_z: u8,
    /// AVSCC.
    pub avscc: u8,
    /// APSTA: autonomous power state transition attributes.
    pub apsta: u8,
    /// WCTEMP: warning composite temperature in kelvins.
    pub wctemp: U16,
    /// CCTEMP: critical composite temperature in kelvins.
    pub cctemp: U16,
    /// MTFA: maximum time for firmware activation in 100 ms.
    pub mtfa_100ms: U16,
    /// HMPRE.
    pub hmpre: U32,
    /// HMMIN.
    pub hmmin: U32,
    /// TNVMCAP: total capacity in bytes, 128 bits.
    pub tnvmcap: [u8; 16],
    /// UNVMCAP: unallocated capacity in bytes, 128 bits.
    pub unvmcap: [u8; 16],
    /// RPMBS.
    pub rpmbs: U32,
    /// EDSTT: extended device self-test time in minutes.
    pub edstt_min: U16,
    /// DSTO.
    pub dsto: u8,
    /// FWUG: firmware update granularity.
    pub fwug: u8,
    /// KAS: keep alive support: granularity in 100 ms.
    pub kas_100ms: U16,
    /// HCTMA and the thermal limits.
    pub hctma: [u8; 6],
    /// SANICAP.
    pub sanicap: U32,
    /// HMMINDS: host memory buffer minimum descriptor entry size.
    pub hmminds: U32,
    /// HMMAXD: host memory maximum descriptor entries.
    pub hmmaxd: U16,
    /// NSETIDMAX: highest NVM set identifier.
    pub nsetidmax: U16,
    /// ENDGIDMAX: highest endurance group identifier.
    pub endgidmax: U16,
    /// ANATT: the longest that a change of ANA state takes, in seconds.
    pub anatt_s: u8,
    /// ANACAP: asymmetric namespace access capabilities; see [`anacap`].
    pub anacap: u8,
    /// ANAGRPMAX: highest ANA group identifier.
    pub anagrpmax: U32,
    /// NANAGRPID: number of ANA groups.
    pub nanagrpid: U32,
    /// PELS to reserved byte 511.
    pub bytes352: [u8; 160],
    /// SQES: required size in bits 3:0, maximum in 7:4, powers of two.
    pub sqes: u8,
    /// CQES, likewise.
    pub cqes: u8,
    /// MAXCMD: most outstanding commands of a queue.
    pub maxcmd: U16,
    /// NN: highest namespace identifier.
    pub nn: U32,
    /// ONCS: optional NVM commands; see [`oncs`].
    pub oncs: U16,
    /// FUSES.
    pub fuses: U16,
    /// FNA.
    pub fna: u8,
    /// VWC: volatile write cache; see [`vwc`].
    pub vwc: u8,
    /// AWUN, zero-based.
    pub awun_z: U16,
    /// AWUPF, zero-based.
    pub awupf_z: U16,
    /// ICSVSCC.
    pub icsvscc: u8,
    /// NWPC: namespace write protection capabilities.
    pub nwpc: u8,
    /// ACWU, zero-based.
    pub acwu_z: U16,
    /// CDFS: copy descriptor formats.
    pub cdfs: U16,
    /// SGLS: SGL support; see [`sgls`].
    pub sgls: U32,
    /// MNAN: maximum number of allowed namespaces.
    pub mnan: U32,
    /// MAXDNA to reserved byte 767.
    pub bytes544: [u8; 224],
    /// SUBNQN: terminated by NUL.
    pub subnqn: [u8; NQN_FIELD_LEN],
    /// Reserved.
    pub reserved1024: [u8; 768],
    /// IOCCSZ: I/O command capsule size in 16 bytes.
    pub ioccsz_16b: U32,
    /// IORCSZ: I/O response capsule size in 16 bytes.
    pub iorcsz_16b: U32,
    /// ICDOFF: in-capsule data offset in 16 bytes.
    pub icdoff_16b: U16,
    /// FCATT: bit 0 set for a static controller.
    pub fcatt: u8,
    /// MSDBD: most SGL data block descriptors in a capsule; 0 is no limit.
    pub msdbd: u8,
    /// OFCS: optional fabrics commands; bit 0 Disconnect.
    pub ofcs: U16,
    /// DCTYPE: discovery controller type.
    pub dctype: u8,
    /// Reserved.
    pub reserved1807: [u8; 241],
    /// PSD0 to PSD31: power state descriptors of 32 bytes.
    pub psd: [[u8; 32]; 32],
    /// Vendor specific.
    pub vendor: [u8; 1024],
}
const _: () = assert!(size_of::<IdentifyController>() == IDENTIFY_LEN);
const _: () = assert!(offset_of!(IdentifyController, cntlid) == 78);
const _: () = assert!(offset_of!(IdentifyController, oaes) == 92);
const _: () = assert!(offset_of!(IdentifyController, cntrltype) == 111);
const _: () = assert!(offset_of!(IdentifyController, oacs) == 256);
const _: () = assert!(offset_of!(IdentifyController, kas_100ms) == 320);
const _: () = assert!(offset_of!(IdentifyController, anatt_s) == 342);
const _: () = assert!(offset_of!(IdentifyController, anagrpmax) == 344);
const _: () = assert!(offset_of!(IdentifyController, sqes) == 512);
const _: () = assert!(offset_of!(IdentifyController, nn) == 516);
const _: () = assert!(offset_of!(IdentifyController, oncs) == 520);
const _: () = assert!(offset_of!(IdentifyController, vwc) == 525);
const _: () = assert!(offset_of!(IdentifyController, sgls) == 536);
const _: () = assert!(offset_of!(IdentifyController, subnqn) == 768);
const _: () = assert!(offset_of!(IdentifyController, ioccsz_16b) == 1792);
const _: () = assert!(offset_of!(IdentifyController, psd) == 2048);

/// CMIC bits.
pub mod cmic {
    /// More than one port.
    pub const MULTI_PORT: u8 = 1 << 0;
    /// More than one controller.
    pub const MULTI_CONTROLLER: u8 = 1 << 1;
    /// Asymmetric namespace access reporting.
    pub const ANA: u8 = 1 << 3;
}

/// ANACAP bits (Base section 5.1.13.2.1): which ANA states a controller may report, and how steady ANAGRPID is.
pub mod anacap {
    /// ANA Optimized.
    pub const OPTIMIZED: u8 = 1 << 0;
    /// ANA Non-Optimized.
    pub const NON_OPTIMIZED: u8 = 1 << 1;
    /// ANA Inaccessible.
    pub const INACCESSIBLE: u8 = 1 << 2;
    /// ANA Persistent Loss.
    pub const PERSISTENT_LOSS: u8 = 1 << 3;
    /// ANA Change.
    pub const CHANGE: u8 = 1 << 4;
    /// ANAGRPID of a namespace does not change while it is attached.
    pub const GROUP_IS_FIXED: u8 = 1 << 6;
}

/// CTRATT bits.
pub mod ctratt {
    /// HIDS: 128-bit host identifier.
    pub const HOST_ID_128: u32 = 1 << 0;
    /// TBKAS: traffic based keep alive.
    pub const TRAFFIC_BASED_KEEP_ALIVE: u32 = 1 << 6;
}

/// OACS bits.
pub mod oacs {
    /// Security Send and Receive.
    pub const SECURITY: u16 = 1 << 0;
    /// Format NVM.
    pub const FORMAT: u16 = 1 << 1;
    /// Firmware commands.
    pub const FIRMWARE: u16 = 1 << 2;
    /// Namespace management.
    pub const NAMESPACE_MANAGEMENT: u16 = 1 << 3;
    /// Doorbell Buffer Config: shadow doorbells.
    pub const DOORBELL_BUFFER_CONFIG: u16 = 1 << 8;
}

/// LPA bits.
pub mod lpa {
    /// SMART log for each namespace.
    pub const SMART_PER_NAMESPACE: u8 = 1 << 0;
    /// Commands Supported and Effects log.
    pub const COMMANDS_EFFECTS: u8 = 1 << 1;
    /// Extended data (NUMDU, LPO) for Get Log Page.
    pub const EXTENDED_DATA: u8 = 1 << 2;
    /// MLPS: the Supported Log Pages, and the feature and MI effects logs.
    pub const MISCELLANEOUS: u8 = 1 << 5;
}

/// ONCS bits.
pub mod oncs {
    /// Compare.
    pub const COMPARE: u16 = 1 << 0;
    /// Write Uncorrectable.
    pub const WRITE_UNCORRECTABLE: u16 = 1 << 1;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u16 = 1 << 2;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u16 = 1 << 3;
    /// Save and Select fields of features.
    pub const SAVE_AND_SELECT: u16 = 1 << 4;
    /// Reservations.
    pub const RESERVATIONS: u16 = 1 << 5;
    /// Timestamp.
    pub const TIMESTAMP: u16 = 1 << 6;
    /// Verify.
    pub const VERIFY: u16 = 1 << 7;
    /// Copy.
    pub const COPY: u16 = 1 << 8;
}

/// VWC bits.
pub mod vwc {
    /// A volatile write cache is present.
    pub const PRESENT: u8 = 1 << 0;
    /// Bits 2:1 = 10b: Flush with the broadcast namespace is not supported.
    pub const FLUSH_ALL_UNSUPPORTED: u8 = 0b10 << 1;
    /// Bits 2:1 = 11b: Flush with the broadcast namespace is supported.
    pub const FLUSH_ALL_SUPPORTED: u8 = 0b11 << 1;
}

/// SGLS bits.
pub mod sgls {
    /// Bits 1:0 = 01b: SGLs supported, no alignment demanded.
    pub const SUPPORTED: u32 = 0b01;
    /// Bits 1:0 = 10b: SGLs supported; addresses and lengths are of dwords.
    pub const SUPPORTED_BY_DWORDS: u32 = 0b10;
    /// SGL bit bucket descriptors.
    pub const BIT_BUCKET: u32 = 1 << 16;
    /// SAOS: the address of a data block may be an offset.
    pub const ADDRESS_AS_OFFSET: u32 = 1 << 20;
    /// Transport Data Block descriptors.
    pub const TRANSPORT_DATA_BLOCK: u32 = 1 << 21;
}

/// Identify Controller of the NVM Command Set (NVM section 4.1.5.4, CNS 06h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyControllerNvm {
    /// VSL: Verify size limit as a power of two of the smallest memory page.
    pub vsl: u8,
    /// WZSL: Write Zeroes size limit, likewise; 0 is no limit.
    pub wzsl: u8,
    /// WUSL: Write Uncorrectable size limit.
    pub wusl: u8,
    /// DMRL: most ranges of a Dataset Management; 0 is no limit.
    pub dmrl: u8,
    /// DMRSL: most blocks of one range; 0 is no limit.
    pub dmrsl: U32,
    /// DMSL: most blocks of all ranges; 0 is no limit.
    pub dmsl: U64,
    /// Reserved, and later additions.
    pub reserved16: [u8; 4080],
}
const _: () = assert!(size_of::<IdentifyControllerNvm>() == IDENTIFY_LEN);

macro_rules! zeroed {
    ($($name:ident),*) => {$(
        impl $name {
            /// All fields zero: what is not set is not supported.
            #[must_use]
            pub fn zeroed() -> Self {
                Self::new_zeroed()
            }
        }
    )*};
}
zeroed!(IdentifyController, IdentifyNamespace, IdentifyControllerNvm, IdentifyNamespaceIndependent);
