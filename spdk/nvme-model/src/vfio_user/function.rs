//! The PCI function around the model: configuration space, and the memory of its MSI-X table (PCI Local Bus 3.0,
//! chapter 6).
//!
//! ```text
//!   0x00 vendor, device   0x04 command, status   0x08 class   0x10 BAR 0 (64 bit): registers
//!   0x20 BAR 4 (32 bit): MSI-X table and pending bits         0x34 -> 0x40 MSI-X capability
//! ```

use async_nvme::access::Access;

use crate::Model;

/// The length of configuration space in bytes.
pub(crate) const CONFIG_LEN: usize = 256;
/// The region of the MSI-X table: BAR 4.
pub(crate) const TABLE_REGION: u32 = 4;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const BAR4: usize = 0x20;
const SUBSYSTEM: usize = 0x2C;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
const MSIX: usize = 0x40;
/// Bits of the command register that can be written: memory space, bus master, parity, SERR, INTx off.
const COMMAND_WRITABLE: u16 = 0x0546;
const BUS_MASTER: u16 = 1 << 2;
/// Enable and function mask of MSI-X.
const MSIX_CONTROL_WRITABLE: u16 = 0xC000;

/// A PCI function.
#[derive(Debug)]
pub(crate) struct Function {
    config: [u8; CONFIG_LEN],
    /// Which bits a driver may change.
    writable: [u8; CONFIG_LEN],
    table: Vec<u8>,
}

impl Function {
    /// The function of a model, as after power-on.
    pub(crate) fn new(model: &Model) -> Self {
        let mut function = Self { config: [0; CONFIG_LEN], writable: [0; CONFIG_LEN], table: Vec::new() };
        let id = model.config_read32(0).unwrap_or(u32::MAX);
        function.set(0, &id.to_le_bytes());
        function.set(8, &model.config_read32(8).unwrap_or(u32::MAX).to_le_bytes());
        function.set(SUBSYSTEM, &id.to_le_bytes());
        function.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        function.allow(INTERRUPT_LINE, &[0xFF]);
        // Memory, 64 bits wide; the bits below its size stay 0, by which a driver finds the size.
        function.set(BAR0, &[0b100]);
        function.allow(BAR0, &bar_mask(model.bar_len()).to_le_bytes());
        function.add_msix(model.interrupts_max().min(2048));
        function
    }

    fn add_msix(&mut self, vectors: u16) {
        if vectors == 0 {
            return;
        }
        let pending_at = (u32::from(vectors) * 16).next_multiple_of(4096);
        self.table = vec![0; pending_at as usize + 4096];
        for entry in self.table.get_mut(..usize::from(vectors) * 16).unwrap_or_default().chunks_mut(16) {
            // A vector is masked after power-on.
            entry[12] = 1;
        }
        self.set(STATUS, &[1 << 4]);
        #[expect(clippy::cast_possible_truncation, reason = "0x40")]
        self.set(CAPABILITIES, &[MSIX as u8]);
        self.set(MSIX, &[0x11, 0]);
        self.set(MSIX + 2, &(vectors - 1).to_le_bytes());
        self.set(MSIX + 4, &TABLE_REGION.to_le_bytes());
        self.set(MSIX + 8, &(pending_at | TABLE_REGION).to_le_bytes());
        self.allow(MSIX + 2, &MSIX_CONTROL_WRITABLE.to_le_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
        self.allow(BAR4, &(bar_mask(self.table.len() as u64) as u32).to_le_bytes());
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.config[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// The length of the region of the MSI-X table, 0 without one.
    pub(crate) fn table_len(&self) -> u64 {
        self.table.len() as u64
    }

    /// Whether the function may write to memory.
    pub(crate) fn is_bus_master(&self) -> bool {
        u16::from_le_bytes([self.config[COMMAND], self.config[COMMAND + 1]]) & BUS_MASTER != 0
    }

    /// Reads configuration space; false when the range leaves it.
    pub(crate) fn read_config(&self, offset: u64, target: &mut [u8]) -> bool {
        copy(&self.config, offset, target)
    }

    /// Writes what of configuration space can be written; false when the range leaves it.
    pub(crate) fn write_config(&mut self, offset: u64, source: &[u8]) -> bool {
        let Some(range) = range(self.config.len(), offset, source.len()) else { return false };
        for (at, byte) in range.zip(source) {
            let writable = self.writable[at];
            self.config[at] = self.config[at] & !writable | byte & writable;
        }
        true
    }

    /// Reads the MSI-X table; false when the range leaves it.
    pub(crate) fn read_table(&self, offset: u64, target: &mut [u8]) -> bool {
        copy(&self.table, offset, target)
    }

    /// Writes the MSI-X table. It is a client's own note: interrupts are delivered by eventfds.
    pub(crate) fn write_table(&mut self, offset: u64, source: &[u8]) -> bool {
        let Some(range) = range(self.table.len(), offset, source.len()) else { return false };
        let Some(target) = self.table.get_mut(range) else { return false };
        target.copy_from_slice(source);
        true
    }
}

fn bar_mask(len: u64) -> u64 {
    !(len.next_power_of_two().max(4096) - 1)
}

fn range(len: usize, offset: u64, count: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(count)?;
    (end <= len).then_some(start..end)
}

fn copy(from: &[u8], offset: u64, target: &mut [u8]) -> bool {
    let source = range(from.len(), offset, target.len()).and_then(|range| from.get(range));
    if let Some(source) = source {
        target.copy_from_slice(source);
    }
    source.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ControllerOptions, Subsystem};

    fn read32(function: &Function, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        assert!(function.read_config(offset, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    fn function() -> Function {
        Function::new(&Subsystem::new("PCI").controller(ControllerOptions::default()))
    }

    #[test]
    fn the_size_of_bar_0_is_found_as_usual() {
        let mut function = function();
        assert_eq!(read32(&function, 0x10) & 0xF, 0b100, "memory of 64 bits");
        assert!(function.write_config(0x10, &[0xFF; 8]));
        let mask = u64::from(read32(&function, 0x10)) | u64::from(read32(&function, 0x14)) << 32;
        assert_eq!(!(mask & !0xF) + 1, 8192);
        assert_eq!(read32(&function, 0x18), 0);
    }

    #[test]
    fn only_what_can_be_written_is() {
        let mut function = function();
        let before = read32(&function, 0);
        assert!(!function.is_bus_master());
        assert!(function.write_config(0, &[0xFF; 256]));
        assert_eq!(read32(&function, 0), before);
        assert_eq!(read32(&function, 4) & 0xFFFF, u32::from(COMMAND_WRITABLE));
        assert_eq!(read32(&function, 8), 0x0108_0200);
        assert!(function.is_bus_master());
        assert!(!function.write_config(255, &[0; 2]) && !function.write_config(u64::MAX, &[0]));
        assert!(!function.read_config(253, &mut [0; 4]));
    }

    #[test]
    fn vectors_show_as_msix() {
        let mut function = function();
        function.table = Vec::new();
        function.add_msix(300);
        assert_eq!(read32(&function, 0x34) & 0xFF, 0x40);
        assert_eq!(read32(&function, 0x40), 299 << 16 | 0x11);
        assert_eq!((read32(&function, 0x44), read32(&function, 0x48)), (4, 8192 | 4));
        assert_eq!(function.table_len(), 12288);
        let mut control = [0; 4];
        assert!(function.read_table(299 * 16 + 12, &mut control));
        assert_eq!(control, [1, 0, 0, 0], "masked");
        assert!(function.write_table(0, &[7; 16]) && !function.write_table(12280, &[0; 16]));
    }
}
