//! Identify Namespace, of the NVM Command Set and independent of any.

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::IDENTIFY_LEN;

/// An LBA format (NVM section 4.1.5.1).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct LbaFormat {
    /// MS: metadata bytes.
    pub ms: U16,
    /// LBADS: block size as a power of two.
    pub lbads: u8,
    /// RP: relative performance in bits 1:0, 0 best.
    pub rp: u8,
}
const _: () = assert!(size_of::<LbaFormat>() == 4);

/// Identify Namespace of the NVM Command Set (NVM section 4.1.5.1, CNS 00h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// NSZE: size in blocks.
    pub nsze: U64,
    /// NCAP: capacity in blocks.
    pub ncap: U64,
    /// NUSE: blocks in use.
    pub nuse: U64,
    /// NSFEAT; see [`nsfeat`].
    pub nsfeat: u8,
    /// NLBAF: number of LBA formats, zero-based.
    pub nlbaf_z: u8,
    /// FLBAS: the format in use, bits 3:0.
    pub flbas: u8,
    /// MC.
    pub mc: u8,
    /// DPC.
    pub dpc: u8,
    /// DPS.
    pub dps: u8,
    /// NMIC: bit 0 set when controllers may share the namespace.
    pub nmic: u8,
    /// RESCAP: reservation capabilities.
    pub rescap: u8,
    /// FPI.
    pub fpi: u8,
    /// DLFEAT: deallocated block features; bits 2:0 001b reads zeros, bit 3 deallocate in Write Zeroes.
    pub dlfeat: u8,
    /// NAWUN, zero-based.
    pub nawun_z: U16,
    /// NAWUPF, zero-based.
    pub nawupf_z: U16,
    /// NACWU, zero-based.
    pub nacwu_z: U16,
    /// NABSN, zero-based.
    pub nabsn_z: U16,
    /// NABO.
    pub nabo: U16,
    /// NABSPF, zero-based.
    pub nabspf_z: U16,
    /// NOIOB: optimal I/O boundary in blocks.
    pub noiob: U16,
    /// NVMCAP: capacity in bytes, 128 bits.
    pub nvmcap: [u8; 16],
    /// NPWG: preferred write granularity in blocks, zero-based.
    pub npwg_z: U16,
    /// NPWA: preferred write alignment, zero-based.
    pub npwa_z: U16,
    /// NPDG: preferred deallocate granularity, zero-based.
    pub npdg_z: U16,
    /// NPDA: preferred deallocate alignment, zero-based.
    pub npda_z: U16,
    /// NOWS: optimal write size, zero-based.
    pub nows_z: U16,
    /// MSSRL: most blocks of a source range of a Copy.
    pub mssrl: U16,
    /// MCL: most blocks of a Copy.
    pub mcl: U32,
    /// MSRC: most source ranges of a Copy, zero-based.
    pub msrc: u8,
    /// KPIOS.
    pub kpios: u8,
    /// NULBAF.
    pub nulbaf: u8,
    /// Reserved.
    pub reserved83: u8,
    /// KPIODAAG.
    pub kpiodaag: U32,
    /// Reserved.
    pub reserved88: [u8; 4],
    /// ANAGRPID.
    pub anagrpid: U32,
    /// Reserved.
    pub reserved96: [u8; 3],
    /// NSATTR; see [`nsattr`].
    pub nsattr: u8,
    /// NVMSETID.
    pub nvmsetid: U16,
    /// ENDGID.
    pub endgid: U16,
    /// NGUID.
    pub nguid: [u8; 16],
    /// EUI64.
    pub eui64: [u8; 8],
    /// LBAF0 to LBAF63.
    pub lbaf: [LbaFormat; 64],
    /// Vendor specific.
    pub vendor: [u8; 3712],
}
const _: () = assert!(size_of::<IdentifyNamespace>() == IDENTIFY_LEN);
const _: () = assert!(offset_of!(IdentifyNamespace, nmic) == 30);
const _: () = assert!(offset_of!(IdentifyNamespace, noiob) == 46);
const _: () = assert!(offset_of!(IdentifyNamespace, mssrl) == 74);
const _: () = assert!(offset_of!(IdentifyNamespace, anagrpid) == 92);
const _: () = assert!(offset_of!(IdentifyNamespace, nsattr) == 99);
const _: () = assert!(offset_of!(IdentifyNamespace, nguid) == 104);
const _: () = assert!(offset_of!(IdentifyNamespace, eui64) == 120);
const _: () = assert!(offset_of!(IdentifyNamespace, lbaf) == 128);

/// NSFEAT bits.
pub mod nsfeat {
    /// Thin provisioning.
    pub const THIN: u8 = 1 << 0;
    /// Bit 4 (OPTPERF bit 0): NPWG, NPWA, NPDG, NPDA and NOWS are defined.
    pub const OPTIMAL_PERFORMANCE: u8 = 1 << 4;
}

/// NSATTR bits.
pub mod nsattr {
    /// The namespace is write protected now, for whatever reason.
    pub const WRITE_PROTECTED: u8 = 1 << 0;
}

/// NSTAT bits.
pub mod nstat {
    /// NRDY: the namespace is ready.
    pub const READY: u8 = 1 << 0;
}

/// I/O Command Set Independent Identify Namespace (Base section 5.1.13.2.8, CNS 08h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespaceIndependent {
    /// NSFEAT: bit 3 UIDREUSE, bit 4 RMEDIA, bit 5 VWCNP.
    pub nsfeat: u8,
    /// NMIC.
    pub nmic: u8,
    /// RESCAP.
    pub rescap: u8,
    /// FPI.
    pub fpi: u8,
    /// ANAGRPID.
    pub anagrpid: U32,
    /// NSATTR; see [`nsattr`].
    pub nsattr: u8,
    /// Reserved.
    pub reserved9: u8,
    /// NVMSETID.
    pub nvmsetid: U16,
    /// ENDGID.
    pub endgid: U16,
    /// NSTAT; see [`nstat`].
    pub nstat: u8,
    /// KPIOS and the rest.
    pub reserved15: [u8; 4081],
}
const _: () = assert!(size_of::<IdentifyNamespaceIndependent>() == IDENTIFY_LEN);
const _: () = assert!(offset_of!(IdentifyNamespaceIndependent, nstat) == 14);
