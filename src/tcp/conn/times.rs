//! How long commands took: noted when their answers are put into a batch, counted when the batch is sent.
//!
//! Commands that went through all stages together are one entry: a busy connection counts some times a batch, not some times
//! a command.

use std::sync::Arc;

use super::request::CellIndex;
use crate::fabrics::ExportSlot;
use crate::stage::{Cell, Stamp, Stamps};

/// Commands of one batch that share all stamps and their cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timed {
    stamps: Stamps,
    cell: CellIndex,
    count: u32,
}

/// The commands whose answers are in a batch.
#[derive(Debug)]
pub(super) struct Notes(Vec<Timed>);

impl Notes {
    /// With room for `most` entries.
    pub(super) fn with_capacity(most: usize) -> Self {
        Self(Vec::with_capacity(most))
    }

    /// Whether one more may need room that is not there.
    pub(super) const fn is_full(&self) -> bool {
        self.0.len() >= self.0.capacity()
    }

    /// An answer is in the batch.
    #[inline]
    pub(super) fn note(&mut self, stamps: &Stamps, cell: CellIndex) {
        match self.0.last_mut() {
            Some(last) if last.cell == cell && last.stamps.is_of_one_batch(stamps) => last.count += 1,
            _ => self.0.push(Timed { stamps: *stamps, cell, count: 1 }),
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// The cells of the namespaces that the connection's commands went to.
#[derive(Debug, Default)]
pub(super) struct Cells {
    cells: Vec<Arc<Cell>>,
    /// Sorted by slot.
    slots: Vec<(ExportSlot, CellIndex)>,
    /// What was found last.
    last: Option<(ExportSlot, CellIndex)>,
}

impl Cells {
    /// The cell of an export, if it has been added.
    #[inline]
    pub(super) fn find(&mut self, slot: ExportSlot) -> Option<CellIndex> {
        if let Some((last, cell)) = self.last
            && last == slot
        {
            return Some(cell);
        }
        let at = self.slots.binary_search_by_key(&slot, |(slot, _)| *slot).ok()?;
        self.last = self.slots.get(at).copied();
        self.last.map(|(_, cell)| cell)
    }

    /// Keeps the cell of an export that has none.
    #[cold]
    pub(super) fn add(&mut self, slot: ExportSlot, cell: Arc<Cell>) -> Option<CellIndex> {
        let index = CellIndex::try_from(self.cells.len()).ok()?;
        self.cells.push(cell);
        let at = self.slots.partition_point(|(other, _)| *other < slot);
        self.slots.insert(at, (slot, index));
        Some(index)
    }

    /// The batch with these commands was sent.
    pub(super) fn count(&self, notes: &Notes, sent: Stamp) {
        for Timed { stamps, cell, count } in &notes.0 {
            if let Some(cell) = self.cells.get(*cell as usize) {
                cell.record(stamps, sent, u64::from(*count));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamps(ns: u64) -> Stamps {
        Stamps { done: Stamp::from_ns(ns), ..Stamps::NONE }
    }

    #[test]
    fn commands_that_went_together_are_counted_together_and_others_apart() {
        let mut cells = Cells::default();
        let (first, second) = (Arc::<Cell>::default(), Arc::<Cell>::default());
        let one = cells.add(ExportSlot(9), Arc::clone(&first)).expect("an index");
        let two = cells.add(ExportSlot(3), Arc::clone(&second)).expect("an index");
        let mut notes = Notes::with_capacity(8);
        for (at, cell) in [(1, one), (1, one), (1, two), (2, two), (2, one)] {
            notes.note(&stamps(at), cell);
        }
        assert_eq!(notes.0.iter().map(|timed| timed.count).collect::<Vec<_>>(), [2, 1, 1, 1]);
        cells.count(&notes, Stamp::from_ns(500));
        assert_eq!((first.times().total.count(), second.times().total.count()), (3, 2));
        notes.clear();
        cells.count(&notes, Stamp::from_ns(500));
        assert_eq!(first.times().total.count(), 3);
    }

    #[test]
    fn each_export_finds_its_own_cell() {
        let mut cells = Cells::default();
        assert_eq!(cells.find(ExportSlot(1)), None);
        let slots = [5, 1, 9, 3];
        for (index, slot) in slots.into_iter().enumerate() {
            assert_eq!(cells.add(ExportSlot(slot), Arc::default()), CellIndex::try_from(index).ok());
        }
        for (index, slot) in slots.into_iter().enumerate() {
            assert_eq!(cells.find(ExportSlot(slot)), CellIndex::try_from(index).ok());
            assert_eq!(
                cells.find(ExportSlot(slot)),
                CellIndex::try_from(index).ok(),
                "also when asked again"
            );
        }
        assert_eq!(cells.find(ExportSlot(4)), None);
    }
}
