//! How long commands took: noted when their answers are put into a batch, counted and traced as sent when the batch is.
//!
//! ```text
//!   device done -> Groups: the group of what ended together --> request -> answer -> Notes: a count a group -> sent: Cells, Trace
//! ```
//!
//! Commands that went through all stages together are one group: a busy connection counts some times a batch, not some times
//! a command. A command has little more to do than to compare its group with that of the one before.

use std::rc::Rc;
use std::sync::Arc;

use nvme_spec::Nsid;

use crate::probes;
use crate::reactor::Timing;
use crate::stage::{Cell, GroupNumber, Stamp, Stamps, Trace, Who};

/// Index of a cell in its connection's list.
pub(super) type CellIndex = u32;

/// Which commands of a connection went together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GroupId(u64);

impl GroupId {
    /// Of those that came to no device: each goes by itself.
    pub(super) const NONE: Self = Self(0);
    /// Of no command.
    const NOBODY: Self = Self(u64::MAX);
}

/// When a command passed its stages, with whom, and where that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Passed {
    group: GroupId,
    cell: CellIndex,
    pub(super) stamps: Stamps,
}

impl Passed {
    /// Of one that came to no device yet.
    pub(super) const NONE: Self = Self { group: GroupId::NONE, cell: CellIndex::MAX, stamps: Stamps::NONE };

    /// The same of one that arrived at a time.
    pub(super) const fn arrived(arrived: Stamp) -> Self {
        Self { stamps: Stamps { arrived, ..Stamps::NONE }, ..Self::NONE }
    }
}

/// What commands have in common that went together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Common {
    pub(super) timing: Timing,
    pub(super) arrived: Stamp,
    /// When they were found complete.
    pub(super) done: Stamp,
    pub(super) nsid: Nsid,
}

/// When the commands of a connection passed their stages: what is known of the last ones that ended, and where that is counted.
#[derive(Debug)]
pub(super) struct Times {
    cells: Vec<Arc<Cell>>,
    /// Which cell is whose, sorted.
    of_nsid: Vec<(Nsid, CellIndex)>,
    /// The last group.
    common: Option<Common>,
    last: Passed,
}

impl Default for Times {
    fn default() -> Self {
        Self { cells: Vec::new(), of_nsid: Vec::new(), common: None, last: Passed::NONE }
    }
}

impl Times {
    /// The group of a command, when it ended with the one before.
    #[inline]
    pub(super) fn joins(&self, common: &Common) -> Option<&Passed> {
        (self.common.as_ref() == Some(common)).then_some(&self.last)
    }

    /// A command ended with nobody before it.
    #[inline]
    pub(super) fn begin(&mut self, common: Common, cell: CellIndex, stamps: Stamps) -> Passed {
        self.common = Some(common);
        // 580 years of a command a nanosecond.
        let group = GroupId(self.last.group.0 + 1);
        let passed = Passed { group, cell, stamps: Stamps { arrived: common.arrived, ..stamps } };
        self.last = passed;
        passed
    }

    /// The cell of a namespace, if it has been added.
    pub(super) fn cell(&self, nsid: Nsid) -> Option<CellIndex> {
        let at = self.of_nsid.binary_search_by_key(&nsid, |(nsid, _)| *nsid).ok()?;
        self.of_nsid.get(at).map(|(_, cell)| *cell)
    }

    /// Keeps the cell of a namespace that has none.
    #[cold]
    pub(super) fn add(&mut self, nsid: Nsid, cell: Arc<Cell>) -> CellIndex {
        let index = CellIndex::try_from(self.cells.len()).unwrap_or(CellIndex::MAX);
        self.cells.push(cell);
        let at = self.of_nsid.partition_point(|(other, _)| *other < nsid);
        self.of_nsid.insert(at, (nsid, index));
        index
    }

    /// The batch with these commands was sent.
    pub(super) fn count(&self, notes: &Notes, sent: Stamp, trace: &mut Trace) {
        for Timed { stamps, cell, traced, count } in &notes.entries {
            // Those that came to no device have none.
            if let Some(cell) = self.cells.get(*cell as usize) {
                cell.record(stamps, sent, *count);
            }
            trace.sent(*traced, sent);
            probes::answers_sent(*count, stamps.arrived.ns());
        }
        trace.ahead();
    }
}

/// Commands of one batch and one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timed {
    stamps: Stamps,
    cell: CellIndex,
    /// The group that they are traced with.
    traced: GroupNumber,
    count: u64,
}

/// The commands whose answers are in a batch.
#[derive(Debug)]
pub(super) struct Notes {
    entries: Vec<Timed>,
    /// Of the last entry: its group, and what it will have when it is complete.
    group: GroupId,
    traced: GroupNumber,
    count: u64,
}

impl Notes {
    /// With room for `most` entries.
    pub(super) fn with_capacity(most: usize) -> Self {
        let entries = Vec::with_capacity(most);
        Self { entries, group: GroupId::NOBODY, traced: GroupNumber::default(), count: 0 }
    }

    /// Whether one more may need room that is not there.
    pub(super) const fn is_full(&self) -> bool {
        self.entries.len() >= self.entries.capacity()
    }

    /// An answer is in the batch; the group that it is traced with.
    #[inline]
    pub(super) fn note(&mut self, passed: &Passed, trace: &mut Trace, who: Option<&Rc<Who>>) -> GroupNumber {
        if passed.group == self.group {
            self.count += 1;
            return self.traced;
        }
        self.begin(passed, trace, who)
    }

    #[inline(never)]
    fn begin(&mut self, passed: &Passed, trace: &mut Trace, who: Option<&Rc<Who>>) -> GroupNumber {
        self.complete();
        let Passed { mut group, cell, stamps } = *passed;
        if group == GroupId::NONE {
            // The next one is another by itself.
            group = GroupId::NOBODY;
        }
        let traced = trace.group(&stamps, who);
        self.entries.push(Timed { stamps, cell, traced, count: 1 });
        (self.group, self.traced, self.count) = (group, traced, 1);
        traced
    }

    /// Nothing more is put into the batch.
    pub(super) fn complete(&mut self) {
        if let Some(last) = self.entries.last_mut() {
            last.count = self.count;
        }
    }

    /// Commands of all entries, once they are complete.
    pub(super) fn commands(&self) -> u64 {
        self.entries.iter().map(|timed| timed.count).sum()
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.group = GroupId::NOBODY;
    }
}

#[cfg(test)]
mod tests {
    use nvme_spec::{Status, SubmissionQueueEntry};

    use super::*;

    fn common(done: u64, nsid: u32) -> Common {
        Common {
            timing: Timing::NONE,
            arrived: Stamp::from_ns(1),
            done: Stamp::from_ns(done),
            nsid: Nsid(nsid),
        }
    }

    /// The group of a command that ended at a time.
    fn passed(times: &mut Times, done: u64, nsid: u32) -> Passed {
        let common = common(done, nsid);
        if let Some(passed) = times.joins(&common) {
            return *passed;
        }
        let cell = times.cell(Nsid(nsid)).expect("added");
        let stamps = Stamps { done: Stamp::from_ns(done), ..Stamps::NONE };
        times.begin(common, cell, stamps)
    }

    #[test]
    fn commands_that_went_together_are_counted_together_and_others_apart() {
        let mut times = Times::default();
        let (one, two) = (Arc::<Cell>::default(), Arc::<Cell>::default());
        times.add(Nsid(9), Arc::clone(&one));
        times.add(Nsid(3), Arc::clone(&two));
        let (mut notes, mut trace) = (Notes::with_capacity(8), Trace::default());
        let mut ended: Vec<_> = [(2, 9), (2, 9), (2, 3), (3, 3), (3, 9)]
            .map(|(done, nsid)| passed(&mut times, done, nsid))
            .into();
        let nowhere = Passed::arrived(ended[0].stamps.arrived);
        ended.extend([nowhere, nowhere]);
        for passed in &ended {
            let group = notes.note(passed, &mut trace, None);
            trace.command(group, &SubmissionQueueEntry::default(), Status::SUCCESS);
        }
        notes.complete();
        assert_eq!(notes.entries.iter().map(|timed| timed.count).collect::<Vec<_>>(), [2, 1, 1, 1, 1, 1]);
        assert_eq!(notes.commands(), 7);
        times.count(&notes, Stamp::from_ns(500), &mut trace);
        let traced: Vec<_> = trace.copy(0).commands().map(|it| (it.stamps.done.ns(), it.sent.ns())).collect();
        assert_eq!(traced, [(2, 500), (2, 500), (2, 500), (3, 500), (3, 500), (0, 500), (0, 500)]);
        assert_eq!((one.times().total.count(), two.times().total.count()), (3, 2));
        notes.clear();
        times.count(&notes, Stamp::from_ns(500), &mut trace);
        assert_eq!(one.times().total.count(), 3);
    }

    #[test]
    fn a_group_that_is_sent_in_two_batches_is_counted_in_each() {
        let mut times = Times::default();
        let cell = Arc::<Cell>::default();
        times.add(Nsid(1), Arc::clone(&cell));
        let mut trace = Trace::default();
        let command = passed(&mut times, 2, 1);
        let mut sizes = Vec::new();
        let mut notes = Notes::with_capacity(2);
        for count in [3, 4] {
            for _ in 0..count {
                notes.note(&command, &mut trace, None);
            }
            notes.complete();
            times.count(&notes, Stamp::from_ns(10 * count), &mut trace);
            sizes.push(notes.entries.len());
            notes.clear();
        }
        assert_eq!((sizes, cell.times().total.count()), (vec![1, 1], 7));
        assert_eq!(cell.times().total.sum_ns(), 3 * 29 + 4 * 39);
    }

    #[test]
    fn each_namespace_finds_its_own_cell() {
        let mut times = Times::default();
        assert_eq!(times.cell(Nsid(1)), None);
        let nsids = [5, 1, 9, 3].map(Nsid);
        for (index, nsid) in nsids.into_iter().enumerate() {
            assert_eq!(CellIndex::try_from(index), Ok(times.add(nsid, Arc::default())));
        }
        for (index, nsid) in nsids.into_iter().enumerate() {
            assert_eq!(times.cell(nsid), CellIndex::try_from(index).ok());
        }
        assert_eq!(times.cell(Nsid(4)), None);
    }
}
