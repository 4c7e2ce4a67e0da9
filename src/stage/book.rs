//! Which cells there are: one for each core, host and export, up to a limit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Cell, Times};

/// Cells of one core, besides the one for all others: 6.5 KiB each, made when a host first sends a command to an export.
pub const CELLS_MAX: usize = 256;

/// Whose commands a cell counts, and to what.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The host's NQN.
    pub host: Box<str>,
    /// The NQN of the export's subsystem.
    pub subsystem: Box<str>,
    /// The export's namespace identifier there.
    pub nsid: u32,
}

impl Key {
    pub(super) fn new(host: &str, subsystem: &str, nsid: u32) -> Self {
        Self { host: host.into(), subsystem: subsystem.into(), nsid }
    }
}

#[derive(Debug)]
struct Entry {
    core: usize,
    /// `None` for all others.
    key: Option<Key>,
    cell: Arc<Cell>,
}

/// What a cell counted so far.
#[derive(Clone, Debug)]
pub struct Row {
    /// The number of its core.
    pub core: usize,
    /// Whose commands; `None` for those that have no cell of their own.
    pub key: Option<Key>,
    /// How long they took.
    pub times: Times,
}

/// All cells of a target.
#[derive(Debug, Default)]
pub struct Book {
    entries: Mutex<Vec<Entry>>,
}

impl Book {
    /// The number of a new core, and its cell for all that have none of their own.
    pub(super) fn new_core(&self) -> (usize, Arc<Cell>) {
        let mut entries = self.lock();
        let core = entries.iter().filter(|entry| entry.key.is_none()).count();
        let cell = Arc::<Cell>::default();
        entries.push(Entry { core, key: None, cell: Arc::clone(&cell) });
        (core, cell)
    }

    /// The cell of a core for `key`. To be called by the core's own thread, for `others`, the core's own, may take over what is
    /// in a cell that nobody uses any more.
    pub(super) fn cell(&self, core: usize, others: &Arc<Cell>, key: Key) -> Arc<Cell> {
        let mut entries = self.lock();
        let mine = || entries.iter().filter(|entry| entry.core == core && entry.key.is_some());
        if let Some(entry) = mine().find(|entry| entry.key.as_ref() == Some(&key)) {
            return Arc::clone(&entry.cell);
        }
        if mine().count() < CELLS_MAX {
            let cell = Arc::<Cell>::default();
            entries.push(Entry { core, key: Some(key), cell: Arc::clone(&cell) });
            return cell;
        }
        // Connections hold the cells that they use: a count of one is the book's own.
        let idle = entries
            .iter_mut()
            .find(|entry| entry.core == core && entry.key.is_some() && Arc::strong_count(&entry.cell) == 1);
        let Some(idle) = idle else { return Arc::clone(others) };
        others.absorb(&idle.cell);
        idle.key = Some(key);
        idle.cell = Arc::default();
        Arc::clone(&idle.cell)
    }

    /// What all cells counted so far. Cells are not used again while they are read: nothing counts twice.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let held: Vec<_> = {
            let entries = self.lock();
            entries.iter().map(|entry| (entry.core, entry.key.clone(), Arc::clone(&entry.cell))).collect()
        };
        held.into_iter().map(|(core, key, cell)| Row { core, key, times: cell.times() }).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CoreStages, Stamp, Stamps};
    use super::*;

    fn commands(rows: &[Row]) -> u64 {
        rows.iter().map(|row| row.times.total.count()).sum()
    }

    #[test]
    fn a_host_finds_its_cell_again_and_shares_it_with_nobody_else() {
        let book = Arc::<Book>::default();
        let (first, second) = (CoreStages::new(Arc::clone(&book)), CoreStages::new(Arc::clone(&book)));
        let cell = first.cell("host", "subsystem", 1);
        assert!(Arc::ptr_eq(&cell, &first.cell("host", "subsystem", 1)));
        for other in [
            first.cell("other", "subsystem", 1),
            first.cell("host", "other", 1),
            first.cell("host", "subsystem", 2),
            second.cell("host", "subsystem", 1),
            first.others(),
        ] {
            assert!(!Arc::ptr_eq(&cell, &other));
        }
        assert_eq!(book.rows().len(), 5 + 2);
    }

    #[test]
    fn what_finds_no_cell_counts_with_the_others_and_cells_of_the_gone_are_used_again() {
        let book = Arc::<Book>::default();
        let core = CoreStages::new(Arc::clone(&book));
        let count = |cell: &Cell| cell.record(&Stamps::default(), Stamp::from_ns(1), 1);
        let mut held: Vec<_> = (0..CELLS_MAX)
            .map(|nsid| core.cell("host", "subsystem", u32::try_from(nsid).expect("small")))
            .collect();
        held.iter().for_each(|cell| count(cell));
        let late = core.cell("late", "subsystem", 1);
        assert!(Arc::ptr_eq(&late, &core.others()));
        count(&late);
        assert_eq!((book.rows().len(), commands(&book.rows())), (CELLS_MAX + 1, CELLS_MAX as u64 + 1));

        held.remove(7);
        let reading = book.rows();
        let again = core.cell("late", "subsystem", 1);
        assert!(!Arc::ptr_eq(&again, &core.others()));
        count(&again);
        let rows = book.rows();
        assert_eq!(rows.len(), reading.len());
        assert_eq!(commands(&rows), commands(&reading) + 1, "nothing that was counted is lost");
        assert!(
            rows.iter().all(|row| row.key.as_ref().is_none_or(|key| (&*key.host, key.nsid) != ("host", 7)))
        );
    }
}
