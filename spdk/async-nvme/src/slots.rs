//! The commands that a queue pair has open, by identifier.
//!
//! ```text
//!   CID   15  12 11          0
//!         [ gen ][   slot    ]      gen goes 1, 2 ... 15, 1: an identifier seen twice, or never given, is noticed
//! ```

use crate::clock::Moment;

/// Bits of the slot; the highest slot is not used, so that FFFFh is never an identifier (Base section 4.1).
const SLOT_BITS: u32 = 12;
/// Most slots.
pub(crate) const SLOTS_MAX: u16 = (1 << SLOT_BITS) - 1;

/// An open command.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slot {
    /// The operation that it is a part of.
    pub(crate) op: u16,
    generation: u16,
    open: bool,
    pub(crate) aborting: bool,
    /// Set when it was first seen open by the watch.
    pub(crate) deadline: Option<Moment>,
}

/// All slots of a queue pair.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u16>,
}

impl Slots {
    pub(crate) fn new(count: u16) -> Self {
        Self {
            slots: vec![Slot::default(); usize::from(count)].into_boxed_slice(),
            free: (0..count).rev().collect(),
        }
    }

    pub(crate) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Opens a slot for a part of `op`: its number and identifier.
    pub(crate) fn open(&mut self, op: u16) -> Option<(u16, u16)> {
        let number = self.free.pop()?;
        let slot = self.slots.get_mut(usize::from(number))?;
        let generation = if slot.generation >= 15 { 1 } else { slot.generation + 1 };
        *slot = Slot { op, generation, open: true, aborting: false, deadline: None };
        Some((number, generation << SLOT_BITS | number))
    }

    /// Closes the slot of an identifier and tells its operation; `None` when no open command has the identifier.
    pub(crate) fn close(&mut self, cid: u16) -> Option<u16> {
        let number = cid & SLOTS_MAX;
        let slot = self.slots.get_mut(usize::from(number))?;
        if !slot.open || slot.generation != cid >> SLOT_BITS {
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
        let numbered = (0u16..).zip(self.slots.iter_mut());
        numbered
            .filter(|(_, slot)| slot.open)
            .map(|(number, slot)| (slot.generation << SLOT_BITS | number, slot))
    }
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
        let mut slots = Slots::new(SLOTS_MAX);
        let mut seen = std::collections::HashSet::new();
        while let Some((_, cid)) = slots.open(0) {
            assert!(cid != 0xFFFF && cid != 0 && seen.insert(cid));
        }
        assert_eq!(seen.len(), usize::from(SLOTS_MAX));
        slots.close_all();
        assert!(slots.has_free());
        assert_eq!(slots.open_mut().count(), 0);
    }
}
