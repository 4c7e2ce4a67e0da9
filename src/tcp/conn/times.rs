//! How long commands took: noted when their answers are put into a batch, counted and traced as sent when the batch is.
//!
//! Commands that went through all stages together are one entry: a busy connection counts some times a batch, not some times
//! a command.

use std::rc::Rc;
use std::sync::Arc;

use super::request::CellIndex;
use crate::fabrics::ExportSlot;
use crate::stage::{Cell, GroupNumber, Stamp, Stamps, Trace, Who};

/// Commands of one batch that share all stamps and their cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timed {
    stamps: Stamps,
    /// None of those that came to no device.
    cell: Option<CellIndex>,
    group: GroupNumber,
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

    /// An answer is in the batch; the group that it is traced with.
    #[inline]
    pub(super) fn note(
        &mut self,
        stamps: &Stamps,
        cell: Option<CellIndex>,
        trace: &mut Trace,
        who: Option<&Rc<Who>>,
    ) -> GroupNumber {
        match self.0.last_mut() {
            Some(last) if last.cell == cell && last.stamps.is_of_one_batch(stamps) => {
                last.count += 1;
                last.group
            }
            _ => {
                let group = trace.group(stamps, who);
                self.0.push(Timed { stamps: *stamps, cell, group, count: 1 });
                group
            }
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
    pub(super) fn count(&self, notes: &Notes, sent: Stamp, trace: &mut Trace) {
        for Timed { stamps, cell, group, count } in &notes.0 {
            if let Some(cell) = cell.and_then(|cell| self.cells.get(cell as usize)) {
                cell.record(stamps, sent, u64::from(*count));
            }
            trace.sent(*group, sent);
        }
    }
}

#[cfg(test)]
mod tests {
    use nvme_spec::{Status, SubmissionQueueEntry};

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
        let (mut notes, mut trace) = (Notes::with_capacity(8), Trace::default());
        let (one, two) = (Some(one), Some(two));
        for (at, cell) in [(1, one), (1, one), (1, two), (2, two), (2, one), (2, None)] {
            let group = notes.note(&stamps(at), cell, &mut trace, None);
            trace.command(group, &SubmissionQueueEntry::default(), Status::SUCCESS);
        }
        assert_eq!(notes.0.iter().map(|timed| timed.count).collect::<Vec<_>>(), [2, 1, 1, 1, 1]);
        cells.count(&notes, Stamp::from_ns(500), &mut trace);
        let traced: Vec<_> = trace.copy(0).commands().map(|it| (it.stamps.done.ns(), it.sent.ns())).collect();
        assert_eq!(traced, [(1, 500), (1, 500), (1, 500), (2, 500), (2, 500), (2, 500)]);
        assert_eq!((first.times().total.count(), second.times().total.count()), (3, 2));
        notes.clear();
        cells.count(&notes, Stamp::from_ns(500), &mut trace);
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
