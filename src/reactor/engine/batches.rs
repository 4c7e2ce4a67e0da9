//! The commands of one turn have most of their stamps in common: these are kept once a batch, and a command has its number.
//!
//! ```text
//!   open (first command of a turn) -> parsed (launch: so many commands) -> rung, submitted -> leave, leave ... -> free
//! ```
//!
//! A batch whose last command has left is free only when all that ended was collected: whoever collects looks it up.

use crate::stage::{Stamp, Stamps};

/// Batches that have room without allocating: so many turns whose commands are still under way. More are made once.
const BATCHES: usize = 1024;

/// A batch's number, and which way its command went to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    batch: u32,
    with_ring: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Batch {
    begun: Stamp,
    parsed: Stamp,
    looked_up: Stamp,
    /// When the ring submitted, and when doorbells were rung.
    submitted: Stamp,
    rung: Stamp,
    commands: usize,
}

/// The batches of one core.
#[derive(Debug)]
pub(super) struct Batches {
    all: Vec<Batch>,
    free: Vec<u32>,
    /// Left by all, and perhaps still to be looked up.
    ended: Vec<u32>,
    /// Given to queues: those for which no doorbell has been rung since, and those that the ring has not submitted since.
    unrung: Vec<u32>,
    unsubmitted: Vec<u32>,
}

impl Batches {
    pub(super) fn new() -> Self {
        let list = || Vec::with_capacity(BATCHES);
        Self {
            all: Vec::with_capacity(BATCHES),
            free: list(),
            ended: list(),
            unrung: list(),
            unsubmitted: list(),
        }
    }

    fn take(&mut self, batch: Batch) -> u32 {
        if let Some(number) = self.free.pop() {
            self.all[number as usize] = batch;
            return number;
        }
        // There are never more than commands.
        let number = u32::try_from(self.all.len()).unwrap_or(u32::MAX);
        self.all.push(batch);
        number
    }

    /// The batch of a turn, whose first command begins.
    pub(super) fn open(&mut self, begun: Stamp) -> u32 {
        self.take(Batch { begun, ..Batch::default() })
    }

    /// A command ended.
    #[inline]
    pub(super) fn leave(&mut self, number: u32) {
        let batch = &mut self.all[number as usize];
        batch.commands -= 1;
        if batch.commands == 0 {
            self.ended.push(number);
        }
    }

    /// All that ended was collected.
    pub(super) fn collected(&mut self) {
        self.free.append(&mut self.ended);
    }

    /// All commands of the batch are begun, so many, one at least, and are looked up now. Without a time, parsing and lookup are told as
    /// one, for a look at the clock would take as long as the second.
    pub(super) fn parsed(&mut self, number: u32, at: Stamp, commands: usize) {
        let batch = &mut self.all[number as usize];
        batch.parsed = at;
        batch.commands = commands;
        self.untold(number);
    }

    /// A command found no room on its device, and tries again: by itself from now on. Gives its batch.
    pub(super) fn again(&mut self, number: u32) -> u32 {
        let batch = self.all[number as usize];
        let mut alone = number;
        if batch.commands > 1 {
            self.leave(number);
            alone = self.take(Batch { commands: 1, ..batch });
        }
        self.untold(alone);
        alone
    }

    fn untold(&mut self, number: u32) {
        self.unrung.push(number);
        self.unsubmitted.push(number);
    }

    /// Whether there are any for which doorbells were not rung.
    #[inline]
    pub(super) const fn are_untold(&self) -> bool {
        !self.unrung.is_empty()
    }

    /// All lookups are done, and doorbells were rung.
    #[inline]
    pub(super) fn rung(&mut self, at: Stamp) {
        for number in self.unrung.drain(..) {
            let batch = &mut self.all[number as usize];
            batch.looked_up_by(at);
            batch.rung = at.max(batch.looked_up);
        }
    }

    /// All lookups are done, and the ring submitted.
    #[inline]
    pub(super) fn submitted(&mut self, at: Stamp) {
        for number in self.unsubmitted.drain(..) {
            let batch = &mut self.all[number as usize];
            batch.looked_up_by(at);
            batch.submitted = at.max(batch.looked_up);
        }
    }

    /// The stamps of a command that is found complete now, but for its arrival.
    #[inline]
    pub(super) fn stamps(&self, timing: Timing, now: Stamp) -> Stamps {
        let Some(batch) = self.all.get(timing.batch as usize) else { return Stamps::NONE };
        let Batch { begun, parsed, .. } = *batch;
        let parsed = parsed.max(begun);
        // One that failed before it came to its device passed all that is left at once.
        let looked_up = batch.looked_up.max(parsed);
        let handed = if timing.with_ring { batch.submitted } else { batch.rung }.max(looked_up);
        Stamps { arrived: begun, begun, parsed, looked_up, handed, done: now.max(handed) }
    }
}

impl Batch {
    /// The first time counts: later ones are of waiting for room.
    #[inline]
    fn looked_up_by(&mut self, at: Stamp) {
        if self.looked_up.is_none() {
            if self.parsed.is_none() {
                self.parsed = at.max(self.begun);
            }
            self.looked_up = at.max(self.parsed);
        }
    }
}

impl Timing {
    /// Of a command that never came to a device.
    pub const NONE: Self = Self { batch: u32::MAX, with_ring: false };

    pub(super) const fn new(batch: u32, with_ring: bool) -> Self {
        Self { batch, with_ring }
    }

    /// Whether there is any.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.batch == u32::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ns: u64) -> Stamp {
        Stamp::from_ns(ns)
    }

    #[test]
    fn commands_of_a_turn_share_their_stamps_and_the_way_to_the_device_tells_when_it_was_told() {
        let mut batches = Batches::new();
        let batch = batches.open(at(10));
        batches.parsed(batch, at(20), 2);
        assert!(batches.are_untold());
        batches.rung(at(30));
        batches.submitted(at(40));
        assert!(!batches.are_untold());
        let ring = batches.stamps(Timing::new(batch, true), at(90));
        let bell = batches.stamps(Timing::new(batch, false), at(90));
        let (arrived, begun, parsed, looked_up) = (at(10), at(10), at(20), at(30));
        assert_eq!(ring, Stamps { arrived, begun, parsed, looked_up, handed: at(40), done: at(90) });
        assert_eq!(bell, Stamps { handed: at(30), ..ring });
    }

    #[test]
    fn one_that_waits_for_room_leaves_its_batch_and_is_told_later() {
        let mut batches = Batches::new();
        let batch = batches.open(at(10));
        batches.parsed(batch, at(20), 2);
        batches.rung(at(30));
        batches.submitted(at(40));
        let alone = batches.again(batch);
        assert_ne!(alone, batch);
        assert_eq!(batches.again(alone), alone, "it is alone already");
        batches.rung(at(300));
        batches.submitted(at(400));
        let stamps = batches.stamps(Timing::new(alone, true), at(900));
        assert_eq!((stamps.looked_up, stamps.handed), (at(30), at(400)));
        assert_eq!(batches.stamps(Timing::new(batch, true), at(900)).handed, at(40));
    }

    #[test]
    fn a_batch_is_used_again_only_when_what_ended_was_collected() {
        let mut batches = Batches::new();
        let first = batches.open(at(10));
        batches.parsed(first, at(11), 1);
        batches.leave(first);
        let second = batches.open(at(20));
        assert_ne!(first, second);
        assert_eq!(batches.stamps(Timing::new(first, true), at(30)).begun, at(10));
        batches.collected();
        assert_eq!(batches.open(at(30)), first);
        batches.parsed(second, at(31), 2);
        batches.leave(second);
        batches.collected();
        assert_ne!(batches.open(at(40)), second, "one is left in it");
    }

    #[test]
    fn a_lookup_that_takes_no_time_is_told_with_parsing() {
        let mut batches = Batches::new();
        let batch = batches.open(at(10));
        batches.parsed(batch, Stamp::NONE, 1);
        let early = batches.stamps(Timing::new(batch, false), at(15));
        assert_eq!(
            [early.parsed, early.looked_up, early.handed, early.done],
            [at(10), at(10), at(10), at(15)]
        );
        batches.rung(at(30));
        let stamps = batches.stamps(Timing::new(batch, false), at(90));
        let [begun, told, done] = [10, 30, 90].map(at);
        assert_eq!([stamps.begun, stamps.parsed, stamps.looked_up, stamps.handed], [begun, told, told, told]);
        assert_eq!(stamps.done, done);
    }

    #[test]
    fn stamps_never_go_back() {
        let mut batches = Batches::new();
        let batch = batches.open(at(10));
        batches.parsed(batch, at(50), 1);
        let early = batches.stamps(Timing::new(batch, true), at(45));
        assert_eq!(
            [early.looked_up, early.handed, early.done],
            [at(50); 3],
            "it failed before it was given away"
        );
        batches.submitted(at(30));
        batches.rung(at(40));
        for with_ring in [false, true] {
            let stamps = batches.stamps(Timing::new(batch, with_ring), at(45));
            assert_eq!([stamps.looked_up, stamps.handed, stamps.done], [at(50); 3]);
        }
        assert_eq!(batches.stamps(Timing::NONE, at(45)), Stamps::NONE);
    }
}
