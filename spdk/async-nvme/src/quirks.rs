//! What known devices do differently, by PCI vendor and device.

use std::time::Duration;

/// The ways in which a device may be odd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// Reading CSTS right after writing CC upsets it: wait this long.
    pub delay_before_ready: Option<Duration>,
    /// Write Zeroes is offered but does not work.
    pub no_write_zeroes: bool,
    /// Identify with the newer CNS values (03h and up) is answered with nonsense.
    pub old_identify_only: bool,
}

struct Entry {
    vendor: u16,
    device: u16,
    quirks: Quirks,
}

const NONE: Quirks = Quirks { delay_before_ready: None, no_write_zeroes: false, old_identify_only: false };
const SLOW_READY: Quirks = Quirks { delay_before_ready: Some(Duration::from_millis(2300)), ..NONE };

/// Known from the table of the Linux driver (`drivers/nvme/host/pci.c`), as facts about the devices.
const TABLE: &[Entry] = &[
    // HGST SN100 adapter.
    Entry { vendor: 0x1C58, device: 0x0003, quirks: SLOW_READY },
    // Memblaze Pblaze4 adapter.
    Entry { vendor: 0x1C5F, device: 0x0540, quirks: SLOW_READY },
    // Samsung PM1725 and PM1725a.
    Entry { vendor: 0x144D, device: 0xA821, quirks: SLOW_READY },
    Entry { vendor: 0x144D, device: 0xA822, quirks: SLOW_READY },
    // QEMU's controller under its former identifier.
    Entry {
        vendor: 0x8086,
        device: 0x5845,
        quirks: Quirks { no_write_zeroes: true, old_identify_only: true, ..NONE },
    },
];

impl Quirks {
    /// The quirks of a device; none for one that is not in the table.
    #[must_use]
    pub fn of(vendor: u16, device: u16) -> Self {
        let found = TABLE.iter().find(|entry| entry.vendor == vendor && entry.device == device);
        found.map_or(NONE, |entry| entry.quirks)
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
}
