//! Fields of NVM Command Set commands (NVM section 3).

use core::mem::{offset_of, size_of};

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// CDW12 of Read, Write, Compare, Verify and Write Zeroes (NVM sections 3.3.2, 3.3.4, 3.3.5, 3.3.6, 3.3.8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IoCdw12 {
    /// NLB: number of logical blocks, zero-based.
    pub nlb_z: u16,
    #[bits(4)]
    __: u8,
    /// DTYPE: directive type; Write only.
    #[bits(4)]
    pub dtype: u8,
    /// STC: storage tag check.
    pub stc: bool,
    /// DEAC: deallocate; Write Zeroes only, else reserved.
    pub deac: bool,
    /// PRINFO: protection information; PRACT is its highest bit.
    #[bits(4)]
    pub prinfo: u8,
    /// FUA: force unit access.
    pub fua: bool,
    /// LR: limited retry.
    pub lr: bool,
}

/// A range of a Dataset Management command (NVM section 3.3.3). Lengths are counts, not zero-based.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DatasetManagementRange {
    /// Context attributes: hints.
    pub context_attributes: U32,
    /// Length in logical blocks.
    pub length: U32,
    /// SLBA: starting logical block.
    pub slba: U64,
}
const _: () = assert!(size_of::<DatasetManagementRange>() == 16);

/// CDW10 and CDW11 of Dataset Management.
pub mod dsm {
    /// NR, number of ranges, zero-based: CDW10 bits 7:0.
    pub const NR_MASK: u32 = 0xFF;
    /// AD, deallocate: CDW11 bit 2.
    pub const AD: u32 = 1 << 2;
    /// IDW, integral dataset for write: CDW11 bit 1; a hint.
    pub const IDW: u32 = 1 << 1;
    /// IDR, integral dataset for read: CDW11 bit 0; a hint.
    pub const IDR: u32 = 1 << 0;
    /// Most ranges of one command.
    pub const RANGES_MAX: usize = 256;
}

/// CDW12 of Copy (NVM section 3.3.2). SDLBA, where the copy goes, is in CDW10 and CDW11.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CopyCdw12 {
    /// NR: number of source ranges, zero-based.
    pub nr_z: u8,
    /// CDF: copy descriptor format.
    #[bits(4)]
    pub format: u8,
    /// PRINFOR: protection information of the reads.
    #[bits(4)]
    pub prinfor: u8,
    #[bits(4)]
    __: u8,
    /// DTYPE: directive type.
    #[bits(4)]
    pub dtype: u8,
    /// STCW: storage tag check of the writes.
    pub stcw: bool,
    /// STCR: storage tag check of the reads.
    pub stcr: bool,
    /// PRINFOW: protection information of the writes.
    #[bits(4)]
    pub prinfow: u8,
    /// FUA: force unit access.
    pub fua: bool,
    /// LR: limited retry.
    pub lr: bool,
}

/// A source range of a Copy, descriptor format 0h (NVM section 3.3.2).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct CopySourceRange {
    /// Reserved.
    pub reserved0: [u8; 8],
    /// SLBA: starting logical block.
    pub slba: U64,
    /// NLB: number of logical blocks, zero-based.
    pub nlb_z: U16,
    /// Reserved.
    pub reserved18: [u8; 6],
    /// EILBRT.
    pub eilbrt: U32,
    /// ELBAT.
    pub elbat: U16,
    /// ELBATM.
    pub elbatm: U16,
}
const _: () = assert!(size_of::<CopySourceRange>() == 32);
const _: () = assert!(offset_of!(CopySourceRange, nlb_z) == 16);
const _: () = assert!(offset_of!(CopySourceRange, eilbrt) == 24);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cdw12_has_its_bits_in_place() {
        assert_eq!(IoCdw12::new().with_fua(true).into_bits(), 1 << 30);
        assert_eq!(IoCdw12::new().with_lr(true).into_bits(), 1 << 31);
        assert_eq!(IoCdw12::new().with_deac(true).into_bits(), 1 << 25);
        assert_eq!(IoCdw12::new().with_prinfo(0b1000).into_bits(), 1 << 29);
        assert_eq!(IoCdw12::from_bits(0xFFFF).nlb_z(), 0xFFFF);
        assert_eq!(IoCdw12::new().with_dtype(1).into_bits(), 1 << 20);
        assert_eq!(CopyCdw12::new().with_fua(true).with_nr_z(127).into_bits(), 1 << 30 | 127);
        assert_eq!(CopyCdw12::new().with_format(1).with_prinfow(1).into_bits(), 1 << 8 | 1 << 26);
        assert_eq!(CopyCdw12::new().with_prinfor(1).with_dtype(1).into_bits(), 1 << 12 | 1 << 20);
    }
}
