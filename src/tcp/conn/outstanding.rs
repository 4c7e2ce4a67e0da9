//! How many commands a host has outstanding, by how many CIDs it uses.
//!
//! ```text
//!   commands    | the first 512 | ............ 65,024 ............ | 512 | ............ 65,024 ............ | 512 | ...
//!   CIDs          3 0 1 2 3 0 1 2 ..: four                           counted again
//! ```
//!
//! Seen from here a host has only those outstanding that have arrived and are not answered: what is on its way, or waits for the host
//! itself to look, is not seen. But a host gives a CID to a command for as long as that is outstanding, and many give the one that
//! was free last, or the lowest. Of so many commands that each of these comes several times, they use as many CIDs as they had
//! commands outstanding at the most.
//!
//! Others go round: then the CIDs are as many as their queue has entries, or as commands were looked at. That says nothing, and is not
//! taken for an answer. Linux's CIDs have a generation in the upper four bits, which does not count.
//!
//! What it does not do: decide anything that must be right. A host that misleads it is answered in larger or smaller batches.

/// Commands that are looked at.
const WINDOW: u32 = 512;
/// They are the last of so many; but at first the first ones.
const PERIOD: u32 = 65_536;
/// CIDs that are told apart: a queue has no more entries.
const CIDS: usize = 1024;
/// More than so many in a window are not each there several times.
const COUNT_MAX: u32 = WINDOW / 2;

/// The CIDs that came lately, and how many there were before.
#[derive(Debug)]
pub(super) struct Outstanding {
    /// Commands until the window ends.
    left: u32,
    seen: [u64; CIDS / u64::BITS as usize],
    /// Of the last window.
    count: Option<u16>,
}

impl Outstanding {
    pub(super) const fn new() -> Self {
        Self { left: WINDOW, seen: [0; CIDS / u64::BITS as usize], count: None }
    }

    /// A command came, on a queue with so many entries.
    #[inline]
    pub(super) fn saw(&mut self, cid: u16, entries: usize) {
        self.left -= 1;
        if self.left < WINDOW {
            self.count_in(cid, entries);
        }
    }

    #[cold]
    fn count_in(&mut self, cid: u16, entries: usize) {
        let cid = usize::from(cid) % CIDS;
        self.seen[cid / 64] |= 1 << (cid % 64);
        if self.left == 0 {
            let count: u32 = self.seen.iter().map(|word| word.count_ones()).sum();
            let tells = count <= COUNT_MAX && (count as usize) < entries;
            self.count = u16::try_from(count).ok().filter(|_| tells);
            (self.left, self.seen) = (PERIOD, [0; CIDS / u64::BITS as usize]);
        }
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

    const ENTRIES: usize = 128;

    /// What is known after so many commands with these CIDs.
    fn after(commands: u32, entries: usize, cid: impl Fn(u32) -> u16) -> Option<u16> {
        let mut outstanding = Outstanding::new();
        (0..commands).for_each(|at| outstanding.saw(cid(at), entries));
        outstanding.most()
    }

    #[test]
    fn a_host_has_as_many_outstanding_as_it_uses_cids() {
        for count in [1, 8, 32, 100, 127] {
            let cid = |at: u32| u16::try_from(at * 7 % count).unwrap();
            assert_eq!(after(WINDOW - 1, ENTRIES, cid), None, "too early");
            assert_eq!(after(WINDOW, ENTRIES, cid), u16::try_from(count).ok());
        }
    }

    #[test]
    fn what_goes_round_says_nothing() {
        let of_the_queue = |at: u32| u16::try_from(at % 128).unwrap();
        assert_eq!(after(WINDOW, ENTRIES, of_the_queue), None);
        assert_eq!(after(WINDOW, ENTRIES + 1, of_the_queue), Some(128), "of a larger queue it does");
        let of_all = |at: u32| u16::try_from(at % 65_536).unwrap();
        assert_eq!(after(WINDOW, 1024, of_all), None);
        assert_eq!(after(WINDOW, 1024, |at| u16::try_from(at % 256).unwrap()), Some(256));
        assert_eq!(after(WINDOW, 1024, |at| u16::try_from(at % 257).unwrap()), None, "too seldom");
    }

    #[test]
    fn a_generation_in_a_cid_does_not_count() {
        let cid = |at: u32| u16::try_from(((at / 16 % 16) << 12) | (at % 16)).unwrap();
        assert_eq!(after(WINDOW, ENTRIES, cid), Some(16));
    }

    #[test]
    fn it_is_counted_again_after_a_while() {
        let cid = |at: u32| u16::try_from(if at < 2 * WINDOW { at % 100 } else { at % 20 }).unwrap();
        assert_eq!(after(WINDOW + PERIOD - 1, ENTRIES, cid), Some(100));
        assert_eq!(after(WINDOW + PERIOD, ENTRIES, cid), Some(20));
        let cid = |at: u32| u16::try_from(if at < 2 * WINDOW { at % 100 } else { at % 128 }).unwrap();
        assert_eq!(after(WINDOW + PERIOD, ENTRIES, cid), None, "an answer of long ago is none");
    }
}
