//! What known devices do differently, by PCI vendor and device.

use std::time::Duration;

/// The ways in which a device may be odd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quirks {
    /// Reading CSTS right after writing CC upsets it: wait this long.
    pub delay_before_ready: Option<Duration>,
    /// Write Zeroes is offered but does not work.
    pub no_write_zeroes: bool,
    /// Identify with the newer CNS values (03h and up) is answered with nonsense.
    pub old_identify_only: bool,
    /// The list of namespace identification descriptors is answered with nonsense.
    pub no_descriptors: bool,
    /// NGUID, EUI64 and UUID are the same on several devices: they identify nothing and are not taken.
    pub bogus_ids: bool,
    /// A read or write that crosses a multiple of MDTS is slow: as if NOIOB said so.
    pub boundary_at_mdts: bool,
    /// Submission queues must be of medium priority.
    pub medium_priority: bool,
    /// The lists of commands must be aligned to this many bytes, a power of two.
    pub list_align: u16,
    /// Most commands of a queue at a time.
    pub depth_max: Option<u16>,
    /// Bits of an address that it looks at.
    pub address_bits: u8,
    /// Why it cannot be driven at all.
    pub refusal: Option<&'static str>,
}

impl Default for Quirks {
    fn default() -> Self {
        NONE
    }
}

const NONE: Quirks = Quirks {
    delay_before_ready: None,
    no_write_zeroes: false,
    old_identify_only: false,
    no_descriptors: false,
    bogus_ids: false,
    boundary_at_mdts: false,
    medium_priority: false,
    list_align: 64,
    depth_max: None,
    address_bits: 64,
    refusal: None,
};
const SLOW_READY: Quirks = Quirks { delay_before_ready: Some(Duration::from_millis(2300)), ..NONE };
const BOUNDARY: Quirks = Quirks { boundary_at_mdts: true, ..NONE };
const NO_ZEROES: Quirks = Quirks { no_write_zeroes: true, ..NONE };
const BOGUS: Quirks = Quirks { bogus_ids: true, ..NONE };
const ADDRESS_48: Quirks = Quirks { address_bits: 48, ..NONE };

/// Known from the table of the Linux driver (`drivers/nvme/host/pci.c`), as facts about the devices. Those that are odd
/// only in saving power are not here, for this driver does not touch that.
const TABLE: &[(u16, u16, Quirks)] = &[
    // Intel: 750, P3500, P3600, P3700; P3520; P4500, P4600; P4600 of Dell; 600P and P3100.
    (0x8086, 0x0953, BOUNDARY),
    (0x8086, 0x0A53, BOUNDARY),
    (0x8086, 0x0A54, Quirks { bogus_ids: true, ..BOUNDARY }),
    (0x8086, 0x0A55, BOUNDARY),
    (0x8086, 0xF1A5, Quirks { medium_priority: true, ..NO_ZEROES }),
    // QEMU: its former identifier, and the present one.
    (0x8086, 0x5845, Quirks { no_write_zeroes: true, old_identify_only: true, ..BOGUS }),
    (0x1B36, 0x0010, BOGUS),
    // O2 Micro, in the Steam Deck.
    (0x1217, 0x8760, Quirks { list_align: 512, ..NONE }),
    // Silicon Motion.
    (0x126F, 0x2262, BOGUS),
    (0x126F, 0x2263, Quirks { no_descriptors: true, ..BOGUS }),
    // Seagate Nytro.
    (0x1BB1, 0x0100, Quirks { no_descriptors: true, ..SLOW_READY }),
    // HGST adapter, SN200.
    (0x1C58, 0x0003, SLOW_READY),
    (0x1C58, 0x0023, SLOW_READY),
    // Memblaze Pblaze4 adapter.
    (0x1C5F, 0x0540, SLOW_READY),
    // Samsung: PM1725, PM1725a, PM9B1, MZALQ256HBJD, SM953.
    (0x144D, 0xA821, SLOW_READY),
    (0x144D, 0xA822, Quirks { no_write_zeroes: true, ..SLOW_READY }),
    (0x144D, 0xA80B, Quirks { no_write_zeroes: true, ..BOGUS }),
    (0x144D, 0xA809, NO_ZEROES),
    (0x144D, 0xA802, BOGUS),
    // Phison: E12, E16, E19, E21.
    (0x1987, 0x5012, BOGUS),
    (0x1987, 0x5016, BOGUS),
    (0x1987, 0x5019, NO_ZEROES),
    (0x1987, 0x5021, NO_ZEROES),
    // Lexar: 256 GB; NM610 (and SPCC), NM620, NM760.
    (0x1B4B, 0x1092, Quirks { no_descriptors: true, ..NONE }),
    (0x1D97, 0x2263, Quirks { no_write_zeroes: true, ..BOGUS }),
    (0x1D97, 0x1D97, BOGUS),
    (0x1D97, 0x2269, BOGUS),
    // ADATA: IM2P33F8ABR1, SX6000LNP, SX6000PNP, XPG GAMMIX S50 and S70; Acer FA100; TEAMGROUP MP33.
    (0x1CC1, 0x33F8, BOGUS),
    (0x10EC, 0x5762, BOGUS),
    (0x10EC, 0x5763, BOGUS),
    (0x10EC, 0x5765, BOGUS),
    (0x1CC1, 0x5350, BOGUS),
    (0x1DBE, 0x5216, BOGUS),
    (0x1DBE, 0x5236, BOGUS),
    // Micron Nitro; Crucial P2.
    (0x1344, 0x6001, BOGUS),
    (0xC0A9, 0x540A, BOGUS),
    // SK Hynix: PC400, P31, BC901.
    (0x1C5C, 0x1504, NO_ZEROES),
    (0x1C5C, 0x174A, BOGUS),
    (0x1C5C, 0x1D59, NO_ZEROES),
    // Sandisk Skyhawk; UMIS.
    (0x15B7, 0x2001, NO_ZEROES),
    (0x1CC4, 0x6303, NO_ZEROES),
    (0x1CC4, 0x6302, NO_ZEROES),
    // Kingston OM8SFP4, OM3PGP4, OM8PGP4.
    (0x2646, 0x5018, NO_ZEROES),
    (0x2646, 0x5016, NO_ZEROES),
    (0x2646, 0x501A, NO_ZEROES),
    (0x2646, 0x501B, NO_ZEROES),
    (0x2646, 0x501E, NO_ZEROES),
    // Netac NV3000, NV7000; MAXIO MAP1001, MAP1002, MAP1202, MAP1602.
    (0x1F40, 0x1202, BOGUS),
    (0x1F40, 0x5236, BOGUS),
    (0x1E4B, 0x1001, BOGUS),
    (0x1E4B, 0x1002, BOGUS),
    (0x1E4B, 0x1202, BOGUS),
    (0x1E4B, 0x1602, BOGUS),
    // Amazon.
    (0x1D0F, 0x0061, ADDRESS_48),
    (0x1D0F, 0x0065, ADDRESS_48),
    (0x1D0F, 0x8061, ADDRESS_48),
    (0x1D0F, 0xCD00, ADDRESS_48),
    (0x1D0F, 0xCD01, ADDRESS_48),
    (0x1D0F, 0xCD02, ADDRESS_48),
    // Apple, in the MacBook8,1; and with the T2.
    (0x106B, 0x2001, Quirks { depth_max: Some(1), ..NONE }),
    (
        0x106B,
        0x2005,
        Quirks {
            refusal: Some("its submission queue entries are 128 bytes long, not those of NVMe"),
            ..NONE
        },
    ),
];

impl Quirks {
    /// The quirks of a device; none for one that is not in the table.
    #[must_use]
    pub fn of(vendor: u16, device: u16) -> Self {
        let found = TABLE.iter().find(|entry| (entry.0, entry.1) == (vendor, device));
        found.map_or(NONE, |entry| entry.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_devices_are_odd() {
        assert_eq!(Quirks::of(0x144D, 0xA80A), Quirks::default());
        assert!(Quirks::of(0x8086, 0x5845).old_identify_only);
        assert!(Quirks::of(0x144D, 0xA822).delay_before_ready.is_some());
    }

    #[test]
    fn no_device_is_listed_twice() {
        let mut ids: Vec<_> = TABLE.iter().map(|entry| (entry.0, entry.1)).collect();
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count);
        assert!(TABLE.iter().all(|entry| entry.2.list_align.is_power_of_two()));
    }
}
