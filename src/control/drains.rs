//! Exports that are being drained: which cores still have commands of them on a device.
//!
//! ```text
//!   fenced export --begin--> a letter to each core ... Event::Drained from each ... the last one: it is drained
//! ```
//!
//! The control thread waits for none of them, so that what one device keeps holds up nobody else. An export is fenced, for a
//! while or for good, before its drain begins, and stays so until it has ended: an answer that came once stays true.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use super::event::Event;
use crate::fabrics::ExportSlot;
use crate::reactor::Cores;

/// The exports under way, with how many cores owe an answer.
pub(super) struct Drains {
    events: Sender<Event>,
    owed: BTreeMap<ExportSlot, usize>,
}

impl Drains {
    pub(super) const fn new(events: Sender<Event>) -> Self {
        Self { events, owed: BTreeMap::new() }
    }

    /// Drains a fenced export, unless that is under way. The answers arrive as [`Event::Drained`].
    pub(super) fn begin(&mut self, cores: &Cores, slot: ExportSlot) {
        let events = self.events.clone();
        self.begin_by(slot, || {
            cores.drain(slot, &move || {
                // The control thread is gone only when the cores are.
                let _ = events.send(Event::Drained { slot });
            })
        });
    }

    fn begin_by(&mut self, slot: ExportSlot, ask: impl FnOnce() -> usize) {
        if !self.is_under_way(slot) {
            let asked = ask();
            if asked > 0 {
                self.owed.insert(slot, asked);
            }
        }
    }

    /// A core has answered. Whether that was the last one: no command of the export is on a device.
    pub(super) fn answered(&mut self, slot: ExportSlot) -> bool {
        let Some(owed) = self.owed.get_mut(&slot) else { return false };
        *owed -= 1;
        let is_last = *owed == 0;
        if is_last {
            self.owed.remove(&slot);
        }
        is_last
    }

    /// Whether commands of the export may be on a device.
    pub(super) fn is_under_way(&self, slot: ExportSlot) -> bool {
        self.owed.contains_key(&slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_drained_when_each_core_has_answered_for_it_and_not_for_another() {
        let mut drains = Drains::new(std::sync::mpsc::channel().0);
        let (one, two) = (ExportSlot(1), ExportSlot(2));
        drains.begin_by(one, || 2);
        drains.begin_by(two, || 2);
        drains.begin_by(one, || panic!("it is under way"));
        assert!(!drains.answered(one) && !drains.answered(two));
        assert!(drains.answered(two) && !drains.is_under_way(two));
        assert!(drains.is_under_way(one), "the other owes nothing to this one");
        assert!(!drains.answered(two), "nobody was asked");
        assert!(drains.answered(one) && !drains.is_under_way(one));
    }
}
