//! Controller properties (Base section 3.1.4, "Controller Properties").

use bitfield_struct::bitfield;

open_enum! {
    /// Offset of a property (Base section 3.1.4).
    pub struct Property(u32) {
        /// Controller Capabilities, 8 bytes.
        CAP = 0x00,
        /// Version.
        VS = 0x08,
        /// Interrupt Mask Set (not over fabrics).
        INTMS = 0x0C,
        /// Interrupt Mask Clear (not over fabrics).
        INTMC = 0x10,
        /// Controller Configuration.
        CC = 0x14,
        /// Controller Status.
        CSTS = 0x1C,
        /// NVM Subsystem Reset.
        NSSR = 0x20,
        /// Admin Queue Attributes (not over fabrics).
        AQA = 0x24,
        /// Admin Submission Queue Base Address, 8 bytes (not over fabrics).
        ASQ = 0x28,
        /// Admin Completion Queue Base Address, 8 bytes (not over fabrics).
        ACQ = 0x30,
        /// Controller Ready Timeouts.
        CRTO = 0x68,
    }
}

/// CAP, Controller Capabilities (Base section 3.1.4.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// MQES: most entries of a queue, zero-based.
    pub mqes_z: u16,
    /// CQR: queues must be physically contiguous (1 over fabrics).
    pub cqr: bool,
    /// AMS: arbitration mechanisms beside round robin.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// TO: worst time for CSTS.RDY to follow CC.EN, in 500 ms.
    pub to: u8,
    /// DSTRD: doorbell stride.
    #[bits(4)]
    pub dstrd: u8,
    /// NSSRS: NVM subsystem reset supported.
    pub nssrs: bool,
    /// CSS bit 0: NVM Command Set supported.
    pub css_nvm: bool,
    #[bits(5)]
    __: u8,
    /// CSS bit 6: one or more I/O Command Sets, chosen by CC.CSS = 110b.
    pub css_iocs: bool,
    /// CSS bit 7: no I/O command set.
    pub css_noiocs: bool,
    /// BPS: boot partitions.
    pub bps: bool,
    /// CPS: controller power scope.
    #[bits(2)]
    pub cps: u8,
    /// MPSMIN: smallest memory page, 2^(12 + MPSMIN).
    #[bits(4)]
    pub mpsmin: u8,
    /// MPSMAX: largest memory page.
    #[bits(4)]
    pub mpsmax: u8,
    /// PMRS: persistent memory region.
    pub pmrs: bool,
    /// CMBS: controller memory buffer.
    pub cmbs: bool,
    /// NSSS: NVM subsystem shutdown supported.
    pub nsss: bool,
    /// CRMS.CRWMS: controller ready with media supported.
    pub crwms: bool,
    /// CRMS.CRIMS: controller ready independent of media supported.
    pub crims: bool,
    /// NSSES: NVM subsystem shutdown enhancements.
    pub nsses: bool,
    #[bits(2)]
    __: u8,
}

/// VS, Version (Base section 3.1.4.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Vs {
    /// Tertiary number.
    pub ter: u8,
    /// Minor number.
    pub mnr: u8,
    /// Major number.
    pub mjr: u16,
}

/// CC, Controller Configuration (Base section 3.1.4.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// EN: enable.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// CSS: I/O command set selected; 000b NVM, 110b all supported, 111b admin only.
    #[bits(3)]
    pub css: u8,
    /// MPS: memory page size, 2^(12 + MPS).
    #[bits(4)]
    pub mps: u8,
    /// AMS: arbitration mechanism selected.
    #[bits(3)]
    pub ams: u8,
    /// SHN: shutdown notification; 01b normal, 10b abrupt.
    #[bits(2)]
    pub shn: u8,
    /// IOSQES: I/O submission queue entry size as a power of two.
    #[bits(4)]
    pub iosqes: u8,
    /// IOCQES: I/O completion queue entry size as a power of two.
    #[bits(4)]
    pub iocqes: u8,
    /// CRIME: controller ready independent of media enable.
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

/// CSTS, Controller Status (Base section 3.1.4.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// RDY: ready.
    pub rdy: bool,
    /// CFS: controller fatal status.
    pub cfs: bool,
    /// SHST: shutdown status; 00b normal operation, 01b under way, 10b complete.
    #[bits(2)]
    pub shst: u8,
    /// NSSRO: NVM subsystem reset occurred.
    pub nssro: bool,
    /// PP: processing paused.
    pub pp: bool,
    /// ST: shutdown type.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

/// CRTO, Controller Ready Timeouts (Base section 3.1.4.21).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Crto {
    /// CRWMT: ready with media timeout, in 500 ms.
    pub crwmt: u16,
    /// CRIMT: ready independent of media timeout, in 500 ms.
    pub crimt: u16,
}

/// CC.CSS and CAP.CSS values.
pub mod css {
    /// The NVM Command Set.
    pub const NVM: u8 = 0b000;
    /// All supported I/O command sets.
    pub const ALL: u8 = 0b110;
    /// Admin commands only.
    pub const ADMIN_ONLY: u8 = 0b111;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_their_bits_where_the_specification_has_them() {
        assert_eq!(Cap::new().with_mqes_z(0x7F).with_cqr(true).into_bits(), 0x1_007F);
        assert_eq!(Cap::new().with_to(30).into_bits(), 30 << 24);
        assert_eq!(Cap::new().with_css_nvm(true).with_css_iocs(true).into_bits(), 1 << 37 | 1 << 43);
        assert_eq!(Cap::new().with_mpsmin(1).with_mpsmax(2).into_bits(), 1 << 48 | 2 << 52);
        assert_eq!(Cap::new().with_crwms(true).with_crims(true).into_bits(), 1 << 59 | 1 << 60);
        assert_eq!(Cap::new().with_nssrs(true).into_bits(), 1 << 36);
        // The value that Linux writes to enable: IOCQES 4, IOSQES 6, EN.
        let cc = Cc::from_bits(0x0046_0001);
        assert!(cc.en() && cc.iosqes() == 6 && cc.iocqes() == 4 && cc.shn() == 0 && cc.css() == 0);
        assert_eq!(Cc::new().with_shn(1).into_bits(), 1 << 14);
        assert_eq!(Cc::new().with_crime(true).into_bits(), 1 << 24);
        assert_eq!(Csts::new().with_rdy(true).with_shst(2).into_bits(), 0b1001);
        assert_eq!(Vs::new().with_mjr(2).with_mnr(1).into_bits(), 0x0002_0100);
    }
}
