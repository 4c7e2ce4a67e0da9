//! The commands that a queue pair has open, by identifier.
//!
//! ```text
//!   CID   15  12 11          0
//!         [ gen ][   slot    ]      gen goes 1, 2 ... 15, 1: an identifier seen twice, or never given, is noticed
//! ```
//!
//! Queues deeper than 4095 take bits from the generation, up to all of them: then only an identifier that is not open is
//! noticed.

use crate::clock::Moment;

/// Bits of the slot, at least; the highest slot is not used, so that FFFFh is never an identifier (Base section 4.1).
const SLOT_BITS_MIN: u32 = 12;
/// Most slots: with one more entry than that in a ring, its length still is 16 bits.
pub(crate) const SLOTS_MAX: u16 = u16::MAX - 1;

/// An open command.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slot {
    /// The operation that it is a part of.
    pub(crate) op: u16,
    generation: u16,
    open: bool,
    pub(crate) aborting: bool,
    /// Set when it was first seen open by the watch; the first moment there is until then.
    deadline: Moment,
}

impl Slot {
    pub(crate) fn deadline(&self) -> Option<Moment> {
        (self.deadline != Moment::default()).then_some(self.deadline)
    }

    pub(crate) fn set_deadline(&mut self, deadline: Moment) {
        // A clock that stands at its origin is late by a nanosecond.
        self.deadline = deadline.max(Moment(1));
    }
}

const _: () = assert!(size_of::<Slot>() == 16);

/// All slots of a queue pair.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// Bits of the slot in an identifier, 12 to 16.
    bits: u32,
    generation_max: u16,
}

impl Slots {
    pub(crate) fn new(count: u16) -> Self {
        let bits = (u16::BITS - count.leading_zeros()).max(SLOT_BITS_MIN);
        let generation_max = u16::try_from((1u32 << (u16::BITS - bits)) - 1).unwrap_or(0);
        Self {
            bits,
            generation_max,
            slots: vec![Slot::default(); usize::from(count)].into_boxed_slice(),
            free: (0..count).rev().collect(),
        }
    }

    #[inline]
    pub(crate) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    pub(crate) fn any_open(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    /// Opens a slot for a part of `op`: its number and identifier.
    #[inline]
    pub(crate) fn open(&mut self, op: u16) -> Option<(u16, u16)> {
        let number = self.free.pop()?;
        let slot = self.slots.get_mut(usize::from(number))?;
        let last = self.generation_max;
        let generation = if slot.generation >= last { last.min(1) } else { slot.generation + 1 };
        *slot = Slot { op, generation, open: true, aborting: false, deadline: Moment::default() };
        Some((number, cid(generation, number, self.bits)))
    }

    /// Closes the slot of an identifier and tells its operation; `None` when no open command has the identifier.
    #[inline]
    pub(crate) fn close(&mut self, cid: u16) -> Option<u16> {
        let number = cid & cid_mask(self.bits);
        let slot = self.slots.get_mut(usize::from(number))?;
        if !slot.open || u32::from(slot.generation) != u32::from(cid) >> self.bits {
            return None;
        }
        slot.open = false;
        self.free.push(number);
        Some(slot.op)
    }

    /// Closes all slots. Their generations go on, so that a completion of before is still nobody's.
    pub(crate) fn close_all(&mut self) {
        for (number, slot) in (0..).zip(&mut self.slots) {
            if slot.open {
                slot.open = false;
                self.free.push(number);
            }
        }
    }

    /// The open commands with their identifiers.
    pub(crate) fn open_mut(&mut self) -> impl Iterator<Item = (u16, &mut Slot)> {
        let bits = self.bits;
        let numbered = (0u16..).zip(self.slots.iter_mut());
        numbered
            .filter(|(_, slot)| slot.open)
            .map(move |(number, slot)| (cid(slot.generation, number, bits), slot))
    }
}

/// The identifier of a slot.
#[expect(clippy::cast_possible_truncation, reason = "the generation has as many bits as are left")]
const fn cid(generation: u16, number: u16, bits: u32) -> u16 {
    (generation as u32).wrapping_shl(bits) as u16 | number
}

/// The bits of the slot in an identifier.
#[expect(clippy::cast_possible_truncation, reason = "at most 16 bits")]
const fn cid_mask(bits: u32) -> u16 {
    ((1u32 << bits) - 1) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_closes_one_command_once() {
        let mut slots = Slots::new(4);
        let (_, cid) = slots.open(7).unwrap();
        assert_eq!(slots.close(cid), Some(7));
        assert_eq!(slots.close(cid), None, "twice");
        let (_, next) = slots.open(8).unwrap();
        assert_ne!(next, cid, "same slot, another identifier");
        assert_eq!(slots.close(cid), None, "of before");
        assert_eq!(slots.close(0), None, "never given");
        assert_eq!(slots.close(0xFFFF), None);
        assert_eq!(slots.close(next), Some(8));
    }

    #[test]
    fn there_are_as_many_as_were_asked_for() {
        for count in [1, 4095, 4096, 8191, 8192, 32767, 32768, SLOTS_MAX] {
            let mut slots = Slots::new(count);
            for _ in 0..3 {
                let mut seen = std::collections::HashSet::new();
                while let Some((_, cid)) = slots.open(0) {
                    assert!(cid != 0xFFFF && seen.insert(cid));
                    assert!(cid != 0 || count > 32767, "an entry of zeros is nobody's");
                }
                assert_eq!(seen.len(), usize::from(count));
                assert_eq!(slots.open_mut().filter(|(cid, _)| seen.contains(cid)).count(), seen.len());
                for &cid in seen.iter().step_by(2) {
                    assert_eq!(slots.close(cid), Some(0));
                    assert_eq!(slots.close(cid), None, "twice");
                }
                slots.close_all();
                assert!(slots.has_free());
                assert_eq!(slots.open_mut().count(), 0);
            }
        }
    }
}
