//! Controller properties over fabrics (NVM Express Base Specification 2.1, sections 3.1.4 and 6.5, 6.6): enabling,
//! reset and shutdown.
//!
//! CSTS tells the truth about I/O: RDY is not cleared and SHST not complete before every I/O queue of the controller is
//! drained, and RDY is not set while an earlier controller of the same host still drains. So no write of a host's past
//! lands after a read of its present.

use nvme_spec::register::{Cap, Cc, Crto, Csts, Property, css};

use super::command::CommandError;
use super::options::{READY_TIMEOUT_500MS, VERSION};

/// Byte offsets in Property Get and Property Set.
const AT_ATTRIB: u16 = 40;
const AT_OFST: u16 = 44;
const AT_VALUE: u16 = 48;

/// What writing CC does beyond the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CcEffect {
    /// Nothing.
    None,
    /// EN was set.
    Enable,
    /// EN was cleared: a Controller Level Reset.
    Reset,
    /// SHN was set.
    ShutDown,
}

/// The properties of one controller.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Registers {
    cc: Cc,
    /// Enabled, and nothing of the past in flight.
    ready: bool,
    /// A shutdown was asked for since the controller was enabled.
    shut_down: bool,
    /// I/O queues of the past are gone.
    drained: bool,
    discovery: bool,
    mqes_z: u16,
}

impl Registers {
    /// The properties of a controller that is not enabled, with queues of up to `queue_entries_max`.
    pub(super) fn new(discovery: bool, queue_entries_max: u16) -> Self {
        Self { discovery, mqes_z: queue_entries_max.saturating_sub(1), drained: true, ..Self::default() }
    }

    /// Takes note of whether the controller's own I/O queues are `drained`, and whether an earlier controller of the
    /// host is not. Gives whether the controller became ready by it.
    pub(super) fn advance(&mut self, drained: bool, past_in_flight: bool) -> bool {
        self.drained = drained;
        let becomes = self.cc.en() && !self.ready && !self.shut_down && drained && !past_in_flight;
        self.ready |= becomes;
        becomes
    }

    /// Whether admin commands other than Fabrics commands are taken.
    pub(super) fn is_ready(&self) -> bool {
        self.ready && !self.shut_down
    }

    /// Whether EN is set and no shutdown was asked for.
    pub(super) fn is_enabled(&self) -> bool {
        self.cc.en() && !self.shut_down
    }

    /// Property Get.
    pub(super) fn get(&self, attrib: u8, offset: u32) -> Result<u64, CommandError> {
        let (value, is_eight_bytes) = match Property(offset) {
            Property::CAP => (self.cap().into_bits(), true),
            Property::VS => (VERSION.into(), false),
            Property::CC => (self.cc.into_bits().into(), false),
            Property::CSTS => (self.csts().into_bits().into(), false),
            Property::CRTO => (self.crto().into_bits().into(), false),
            _ => return Err(CommandError::field(AT_OFST)),
        };
        check_size(attrib, is_eight_bytes)?;
        Ok(value)
    }

    /// Property Set: CC is the only property that a host may write, NSSR not being supported (CAP.NSSRS is 0).
    pub(super) fn set(&mut self, attrib: u8, offset: u32, value: u64) -> Result<CcEffect, CommandError> {
        if Property(offset) != Property::CC {
            return Err(CommandError::field(AT_OFST));
        }
        check_size(attrib, false)?;
        let value = u32::try_from(value & 0xFFFF_FFFF).unwrap_or_default();
        self.write_cc(Cc::from_bits(value))
    }

    fn write_cc(&mut self, cc: Cc) -> Result<CcEffect, CommandError> {
        let old = self.cc;
        if cc.en() && !self.is_acceptable(cc) {
            return Err(CommandError::field(AT_VALUE));
        }
        self.cc = cc;
        if old.en() && !cc.en() {
            (self.ready, self.shut_down) = (false, false);
            return Ok(CcEffect::Reset);
        }
        if cc.shn() != 0 && !self.shut_down {
            self.shut_down = true;
            return Ok(CcEffect::ShutDown);
        }
        if cc.en() && !old.en() {
            self.shut_down = false;
            return Ok(CcEffect::Enable);
        }
        Ok(CcEffect::None)
    }

    /// Whether a controller may be enabled with these settings: NVM Command Set, 4 KiB pages, round robin, entries of 64
    /// and 16 bytes. Discovery controllers have no I/O queues, so their entry sizes do not matter.
    fn is_acceptable(&self, cc: Cc) -> bool {
        let sizes = self.discovery || (cc.iosqes() == 6 && cc.iocqes() == 4);
        sizes && cc.css() == css::NVM && cc.mps() == 0 && cc.ams() == 0
    }

    fn cap(&self) -> Cap {
        Cap::new()
            .with_mqes_z(self.mqes_z)
            .with_cqr(true)
            .with_to(READY_TIMEOUT_500MS)
            .with_css_nvm(true)
            .with_crwms(true)
            .with_crims(true)
    }

    fn crto(&self) -> Crto {
        Crto::new().with_crwmt(READY_TIMEOUT_500MS.into()).with_crimt(READY_TIMEOUT_500MS.into())
    }

    fn csts(&self) -> Csts {
        let rdy = if self.cc.en() { self.ready } else { !self.drained };
        let shst = match (self.shut_down, self.drained) {
            (false, _) => 0b00,
            (true, false) => 0b01,
            (true, true) => 0b10,
        };
        Csts::new().with_rdy(rdy).with_shst(shst)
    }
}

fn check_size(attrib: u8, is_eight_bytes: bool) -> Result<(), CommandError> {
    if attrib & 0b111 == u8::from(is_eight_bytes) { Ok(()) } else { Err(CommandError::field(AT_ATTRIB)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CC: u32 = 0x14;
    const CSTS: u32 = 0x1C;
    const ENABLE: u64 = 0x0046_0001;

    #[test]
    fn properties_are_read_in_their_own_size_only() {
        let registers = Registers::new(false, 1024);
        let cap = registers.get(1, 0).unwrap();
        assert_eq!(cap, 0x1800_0020_1E01_03FF);
        assert_eq!(registers.get(0, 0), Err(CommandError::field(40)));
        assert_eq!(registers.get(0, 8), Ok(0x0002_0000));
        assert_eq!(registers.get(1, 8), Err(CommandError::field(40)));
        assert_eq!(registers.get(0, 0x68), Ok(0x001E_001E));
        for reserved in [0x0C, 0x10, 0x18, 0x20, 0x24, 0x28, 0x30, 0x100, u32::MAX] {
            assert_eq!(registers.get(0, reserved), Err(CommandError::field(44)), "{reserved:#x}");
        }
    }

    #[test]
    fn only_cc_can_be_written_and_only_with_what_is_supported() {
        let mut registers = Registers::new(false, 1024);
        for offset in [0x00, 0x08, CSTS, 0x20, 0x68] {
            assert_eq!(registers.set(0, offset, 0), Err(CommandError::field(44)), "{offset:#x}");
        }
        assert_eq!(registers.set(1, CC, ENABLE), Err(CommandError::field(40)));
        for bad in [0x0000_0001, 0x0066_0001, 0x0046_0061, 0x0046_0081, 0x0046_0801] {
            assert_eq!(registers.set(0, CC, bad), Err(CommandError::field(48)), "{bad:#x}");
        }
        assert_eq!(registers.get(0, CC), Ok(0));
        assert_eq!(registers.set(0, CC, 0x0046_0000), Ok(CcEffect::None));
        assert_eq!(registers.set(0, CC, ENABLE), Ok(CcEffect::Enable));
        assert_eq!(Registers::new(true, 128).set(0, CC, 1), Ok(CcEffect::Enable));
    }

    #[test]
    fn ready_waits_for_the_past_and_reset_for_the_present() {
        let mut registers = Registers::new(false, 1024);
        registers.set(0, CC, ENABLE).unwrap();
        assert!(!registers.advance(true, true));
        assert_eq!(registers.get(0, CSTS), Ok(0));
        assert!(registers.advance(true, false));
        assert_eq!(registers.get(0, CSTS), Ok(1));
        assert!(!registers.advance(false, false));
        assert_eq!(registers.set(0, CC, ENABLE & !1), Ok(CcEffect::Reset));
        assert_eq!(registers.get(0, CSTS), Ok(1), "I/O is still in flight");
        registers.advance(true, false);
        assert_eq!(registers.get(0, CSTS), Ok(0));
    }

    #[test]
    fn shutdown_is_complete_when_io_is_drained_and_reset_ends_it() {
        let mut registers = Registers::new(false, 1024);
        registers.set(0, CC, ENABLE).unwrap();
        registers.advance(true, false);
        registers.advance(false, false);
        assert_eq!(registers.set(0, CC, ENABLE | 1 << 14), Ok(CcEffect::ShutDown));
        assert!(!registers.is_ready());
        assert_eq!(registers.get(0, CSTS), Ok(0b0101));
        registers.advance(true, false);
        assert_eq!(registers.get(0, CSTS), Ok(0b1001));
        assert_eq!(registers.set(0, CC, ENABLE & !1), Ok(CcEffect::Reset));
        assert_eq!(registers.get(0, CSTS), Ok(0));
    }
}
