//! What a reset of the controller does not end.
//!
//! When CSTS.RDY has become 0 the controller executes nothing of before any more, so whatever is given to it anew cannot
//! be overtaken by its own former self. What is not known is whether it was executed before. So an operation may be given
//! anew when executing it twice is the same as once, for everybody who looks:
//!
//! * **Never given to the device**: any operation.
//! * **Read, Compare, Verify**: they change nothing. Their answer is of some moment between `submit` and completion, as it
//!   would be without the reset.
//! * **Flush**: what was complete when it was submitted still is, and is older than the second Flush. A controller reset
//!   does not empty a write cache; a controller that lost it in a crash of its own is beyond any driver's knowledge.
//! * **Write, Write Zeroes, Deallocate**: the buffer is still the queue's, so the same data goes to the same blocks. Twice
//!   differs from once only when somebody wrote those blocks in between and was told so. As long as the first write is
//!   not complete, NVMe orders nothing between it and others, so a host that cares does not send another one to the same
//!   blocks; but one that saw the first one's data by a read might. Of such writes, those through this queue are known:
//!   each that was given back since the first was submitted is in a journal, and an operation that overlaps one of them
//!   ends instead. Those through other queues or controllers are not known, and [`Requeue::Idempotent`] is the owner's
//!   word that there are none.
//! * **Copy, Dataset Management, raw commands** that were given to the device: never. A Copy's source may have changed, and
//!   what the others do is not known here.
//!
//! Nothing is given anew twice, nor is a command that was late: what brings a controller down must not do it for ever. So
//! an operation lasts at most two time-outs with their graces, and the reset between them.

use nvme_spec::command::DataDirection;

use crate::kind::Kind;
use crate::op::OpKind;

/// Which operations are given to a controller anew after its reset; the others end with [`crate::IoError::Reset`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Requeue {
    /// None: the owner decides.
    #[default]
    Nothing,
    /// Those never given to the device, and those that change nothing: Read, Compare, Verify, Flush.
    Harmless,
    /// Those, and writes that nobody has overwritten: Write, Write Zeroes, Deallocate. The owner promises that nobody
    /// overwrites, through another queue or controller, blocks of a write that is not complete.
    Idempotent,
}

/// What an operation does to blocks, for this purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Nothing,
    /// Blocks get contents that the operation itself names.
    Sets,
    /// Blocks get contents that depend on something else, or it is not known what happens.
    Unknown,
}

impl Effect {
    pub(crate) const fn of(kind: Kind) -> Self {
        match kind {
            Kind::Read | Kind::Compare | Kind::Verify | Kind::Flush => Self::Nothing,
            Kind::Write | Kind::WriteZeroes | Kind::Deallocate => Self::Sets,
            Kind::Copy | Kind::DatasetManagement | Kind::Raw => Self::Unknown,
        }
    }
}

/// The blocks that an operation may change: where, and how many.
pub(crate) const fn changes(kind: OpKind, lba: u64, blocks: u64) -> (u64, u64) {
    match kind {
        OpKind::Read | OpKind::Compare | OpKind::Verify | OpKind::Flush => (0, 0),
        OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::Deallocate => (lba, blocks),
        OpKind::Copy { to, .. } => (to, blocks),
        OpKind::DatasetManagement { .. } => (0, u64::MAX),
        // A command that only brings data changes no blocks, whatever else it does.
        OpKind::Raw(raw) => match DataDirection::of(raw.opcode) {
            DataDirection::ControllerToHost => (0, 0),
            _ => (0, u64::MAX),
        },
    }
}

/// The changes that were given back lately. Made once; noting one is two words.
#[derive(Debug)]
pub(crate) struct Journal {
    ring: Box<[(u64, u64)]>,
    /// Changes noted, ever.
    count: u64,
}

impl Journal {
    /// For `depth` operations at a time.
    pub(crate) fn new(depth: u16) -> Self {
        let entries = (usize::from(depth) * 4).next_power_of_two().max(1024);
        Self { ring: vec![(0, 0); entries].into_boxed_slice(), count: 0 }
    }

    /// Where the journal stands: what is noted later is younger.
    pub(crate) const fn position(&self) -> u64 {
        self.count
    }

    #[expect(clippy::cast_possible_truncation, reason = "modulo the length, a power of two")]
    pub(crate) fn note(&mut self, (lba, blocks): (u64, u64)) {
        if blocks == 0 {
            return;
        }
        let at = self.count as usize & (self.ring.len() - 1);
        if let Some(place) = self.ring.get_mut(at) {
            *place = (lba, blocks);
        }
        self.count += 1;
    }

    /// Whether a change noted since `position` may overlap these blocks. Also when that is no longer known.
    pub(crate) fn overlaps(&self, position: u64, lba: u64, blocks: u64) -> bool {
        let since = usize::try_from(self.count - position).unwrap_or(usize::MAX);
        if since > self.ring.len() {
            return true;
        }
        let end = lba.saturating_add(blocks);
        (position..self.count).any(|number| {
            let at = usize::try_from(number % self.ring.len() as u64).unwrap_or(0);
            let (other, others) = self.ring.get(at).copied().unwrap_or((0, u64::MAX));
            other < end && lba < other.saturating_add(others)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::RawCommand;

    #[test]
    fn only_younger_changes_of_the_same_blocks_count() {
        let mut journal = Journal::new(1);
        journal.note((10, 5));
        let position = journal.position();
        assert!(!journal.overlaps(position, 0, 100), "it is older");
        journal.note((20, 5));
        journal.note((0, 0));
        assert!(!journal.overlaps(position, 0, 20) && !journal.overlaps(position, 25, 10));
        assert!(journal.overlaps(position, 24, 1) && journal.overlaps(position, 0, 21));
        journal.note((0, u64::MAX));
        assert!(journal.overlaps(position, 1 << 60, 1), "a raw command");
    }

    #[test]
    fn what_is_no_longer_known_counts_as_an_overlap() {
        let mut journal = Journal::new(1);
        let position = journal.position();
        for _ in 0..1024 {
            journal.note((1, 1));
        }
        assert!(!journal.overlaps(position, 5, 1));
        journal.note((1, 1));
        assert!(journal.overlaps(position, 5, 1));
        assert!(!journal.overlaps(position + 1, 5, 1));
    }

    #[test]
    fn a_raw_read_changes_nothing() {
        let raw = |opcode| OpKind::Raw(RawCommand { opcode, cdw10_15: [0; 6] });
        assert_eq!(changes(raw(0x02), 0, 1), (0, 0));
        assert_eq!(changes(raw(0x01), 0, 1), (0, u64::MAX));
        assert_eq!(changes(raw(0x08), 0, 1), (0, u64::MAX));
        assert_eq!(Effect::of(raw(0x02).kind()), Effect::Unknown, "and is not repeated all the same");
    }
}
