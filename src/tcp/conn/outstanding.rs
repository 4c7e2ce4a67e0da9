//! How many commands a host has outstanding, by how many CIDs it uses.
//!
//! ```text
//!   commands    | the first 512 | ............ 7,680 ............ | 512 | ............ 7,680 ............ | 512 | ...
//!   CIDs          3 0 1 2 3 0 1 2 ..: four                          counted again
//! ```
//!
//! Seen from here a host has only those outstanding that have arrived and are not answered: what is on its way, or waits for the host
//! itself to look, is not seen. But a host gives a CID to a command for as long as that is outstanding, and many give the one that
//! was free last, or the lowest. Of so many commands that each of these comes several times, they use as many CIDs as they had
//! commands outstanding at the most, and these are the lowest ones.
//!
//! SPDK's initiator is such a host. Others go round: then the CIDs are as many as their queue has room for, or as commands were looked
//! at, or they are not the lowest. That says nothing, and is not taken for an answer. So nothing is known of Linux: its CIDs begin at 1
//! (0 is for Connect), have a generation in the upper four bits, and go round. One that goes round in fewer numbers than its queue has
//! room for is not told apart: all that it has is answered together.
//!
//! What it does not do: decide anything that must be right. A host that misleads it is answered in larger or smaller batches.

/// Commands that are looked at.
const WINDOW: u32 = 512;
/// They are the last of so many; but at first the first ones.
const PERIOD: u32 = 8192;
/// CIDs that are told apart. Whoever uses higher ones says nothing.
const CIDS: usize = 1024;
/// More than so many in a window are not each there several times.
const COUNT_MAX: usize = WINDOW as usize / 2;
/// A queue has room for one command less than it has entries, and some hosts keep another one for themselves.
const ENTRIES_UNUSED: usize = 2;

/// The CIDs that came lately, and how many there were before.
#[derive(Debug)]
pub(super) struct Outstanding {
    /// Commands until the window ends.
    left: u32,
    seen: [u64; CIDS / u64::BITS as usize],
    /// A CID was too high.
    is_beyond: bool,
    /// Of the last window.
    count: Option<u16>,
}

impl Outstanding {
    pub(super) const fn new() -> Self {
        Self { left: WINDOW, seen: [0; CIDS / u64::BITS as usize], is_beyond: false, count: None }
    }

    /// A command came, on a queue that may have so many under way.
    #[inline]
    pub(super) fn saw(&mut self, cid: u16, entries: usize) {
        self.left -= 1;
        if self.left < WINDOW {
            self.count_in(cid, entries);
        }
    }

    #[cold]
    fn count_in(&mut self, cid: u16, entries: usize) {
        let cid = usize::from(cid);
        match self.seen.get_mut(cid / 64) {
            Some(word) => *word |= 1 << (cid % 64),
            None => self.is_beyond = true,
        }
        if self.left == 0 {
            self.count = self.counted(entries);
            (self.left, self.seen, self.is_beyond) = (PERIOD, [0; CIDS / u64::BITS as usize], false);
        }
    }

    /// What the window says.
    fn counted(&self, entries: usize) -> Option<u16> {
        let count = self.seen.iter().map(|word| word.count_ones() as usize).sum();
        let are_lowest =
            !self.is_beyond && (0..count).all(|cid| (self.seen[cid / 64] >> (cid % 64)) & 1 != 0);
        let is_round = count > COUNT_MAX || count + ENTRIES_UNUSED >= entries;
        if are_lowest && !is_round { u16::try_from(count).ok() } else { None }
    }

    /// The most commands that the host had outstanding lately, where that is known.
    #[inline]
    pub(super) const fn most(&self) -> Option<u16> {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRIES: usize = 129;

    /// What is known after so many commands with these CIDs.
    fn after(commands: u32, entries: usize, cid: impl Fn(u32) -> u32) -> Option<u16> {
        let mut outstanding = Outstanding::new();
        (0..commands).for_each(|at| outstanding.saw(u16::try_from(cid(at) % 65_536).unwrap(), entries));
        outstanding.most()
    }

    #[test]
    fn a_host_has_as_many_outstanding_as_it_uses_cids() {
        for count in [1, 8, 32, 100, 126] {
            let cid = |at: u32| at * 13 % count;
            assert_eq!(after(WINDOW - 1, ENTRIES, cid), None, "too early");
            assert_eq!(after(WINDOW, ENTRIES, cid), u16::try_from(count).ok());
        }
    }

    #[test]
    fn what_goes_round_says_nothing() {
        for count in [127, 128] {
            assert_eq!(after(WINDOW, ENTRIES, |at| at % count), None, "all that the queue has room for");
            assert_eq!(after(WINDOW, 1024, |at| at % count), u16::try_from(count).ok(), "of a larger queue");
        }
        assert_eq!(after(WINDOW, 1024, |at| at), None);
        assert_eq!(after(PERIOD + WINDOW, 1024, |at| at), None);
        assert_eq!(after(WINDOW, 1024, |at| at % 256), Some(256));
        assert_eq!(after(WINDOW, 1024, |at| at % 257), None, "too seldom");
    }

    #[test]
    fn cids_that_are_not_the_lowest_say_nothing() {
        assert_eq!(after(WINDOW, ENTRIES, |at| 1 + at % 16), None);
        assert_eq!(after(WINDOW, ENTRIES, |at| at % 16 * 2), None, "with gaps");
        assert_eq!(after(WINDOW, ENTRIES, |at| at % 16 * 1024), None, "one that is counted, and others");
        assert_eq!(after(WINDOW, ENTRIES, |at| (3 << 10) | (at % 16)), None, "none that is counted");
        assert_eq!(after(WINDOW, ENTRIES, |at| ((at / 16 % 16) << 12) | (at % 16)), None, "a generation");
    }

    #[test]
    fn it_is_counted_again_after_a_while() {
        let early = |at: u32| at < 2 * WINDOW;
        let cid = |at: u32| if early(at) { at % 100 } else { at % 20 };
        assert_eq!(after(WINDOW + PERIOD - 1, ENTRIES, cid), Some(100));
        assert_eq!(after(WINDOW + PERIOD, ENTRIES, cid), Some(20));
        let cid = |at: u32| if early(at) { at % 100 } else { at % 128 };
        assert_eq!(after(WINDOW + PERIOD, ENTRIES, cid), None, "an answer of long ago is none");
    }
}
