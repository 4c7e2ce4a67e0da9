//! Shadow doorbells (Base section 5.2.5, Doorbell Buffer Config): doorbells in memory, for controllers in software, which
//! would have to interrupt us to see a write to a register.
//!
//! ```text
//!   page 0   shadow doorbells: we write each tail and head here         same offsets as the doorbells themselves
//!   page 1   EventIdx: the controller writes which value it wants to be told of by a register write
//! ```
//!
//! The order is what matters: our value is stored, then a full fence, then EventIdx is read. The controller does it the
//! other way round: it stores EventIdx, fences, and reads the value once more before it sleeps. So one of both sees
//! what the other wrote, and no value is missed.
//!
//! A controller reset ends the arrangement (the admin queue sets it up anew), and all of both pages is zero before. A
//! value that the controller writes wrongly costs a late doorbell at worst, and the time-outs of commands find that.

use std::sync::atomic::{Ordering, fence};

use hugepage_alloc::DmaRegion;
use nvme_spec::queue::{DOORBELL_BASE, cq_head_doorbell, sq_tail_doorbell};

use crate::access::{DmaMapping, Iova};

/// Both pages of a controller.
#[derive(Clone, Debug)]
pub(crate) struct ShadowPages {
    mapping: DmaMapping,
    page: usize,
    dstrd: u8,
}

impl ShadowPages {
    /// Bytes that the pages take.
    pub(crate) const fn len(page: usize) -> usize {
        2 * page
    }

    pub(crate) const fn new(mapping: DmaMapping, page: usize, dstrd: u8) -> Self {
        Self { mapping, page, dstrd }
    }

    /// The device's addresses of the shadow doorbells and of EventIdx.
    pub(crate) fn addresses(&self) -> Option<(Iova, Iova)> {
        Some((self.mapping.iova(0)?, self.mapping.iova(self.page)?))
    }

    /// Zeroes everything. Only while the controller does not use it.
    pub(crate) fn clear(&self) {
        let zeroed = self.mapping.region().zero(0, 2 * self.page);
        debug_assert!(zeroed, "the pages lie in the region");
    }

    /// The part of a queue pair; `None` when its doorbells lie behind the first page, so that it has no shadow.
    pub(crate) fn of_queue(&self, qid: u16) -> Option<Shadow> {
        let tail_at = (sq_tail_doorbell(qid, self.dstrd) - DOORBELL_BASE) as usize;
        let head_at = (cq_head_doorbell(qid, self.dstrd) - DOORBELL_BASE) as usize;
        if head_at + 4 > self.page {
            return None;
        }
        let region = self.mapping.region().clone();
        Some(Shadow { region, tail_at, head_at, event_at: self.page, always: false })
    }
}

/// The shadow doorbells of one queue pair.
#[derive(Debug)]
pub(crate) struct Shadow {
    region: DmaRegion,
    tail_at: usize,
    head_at: usize,
    /// How far behind a doorbell its EventIdx lies.
    event_at: usize,
    /// Registers are written in any case.
    always: bool,
}

impl Shadow {
    /// For the admin queue, which controllers differ about: its values stand in memory, and are written to the
    /// registers as well.
    pub(crate) const fn with_registers(mut self) -> Self {
        self.always = true;
        self
    }

    /// Zeroes what a former queue pair of this identifier left behind. Only while the device has no such queue.
    pub(crate) fn clear(&self) {
        self.store(0, 0);
        for at in [self.tail_at, self.head_at] {
            let _ = self.region.store_u32(at + self.event_at, 0);
        }
    }

    /// Stores both values.
    pub(crate) fn store(&self, tail: u16, head: u16) {
        let _ = self.region.store_u32(self.tail_at, u32::from(tail).to_le());
        let _ = self.region.store_u32(self.head_at, u32::from(head).to_le());
    }

    /// Stores a new submission tail; whether the register must be written too.
    pub(crate) fn submitted(&self, old: u16, new: u16) -> bool {
        self.publish(self.tail_at, old, new)
    }

    /// Stores a new completion head; whether the register must be written too.
    pub(crate) fn completed(&self, old: u16, new: u16) -> bool {
        self.publish(self.head_at, old, new)
    }

    fn publish(&self, at: usize, old: u16, new: u16) -> bool {
        let stored = self.region.store_u32(at, u32::from(new).to_le());
        fence(Ordering::SeqCst);
        let event = self.region.load_u32(at + self.event_at).map_or(0, u32::from_le);
        self.always || !stored || passes(event, old, new)
    }
}

/// Whether going from `old` to `new` passes `event`: the value that the controller wants to be told of. All of them
/// count modulo the queue's length, which the wrapping difference takes along: what has wrapped in `new` has wrapped in
/// both differences.
#[expect(clippy::cast_possible_truncation, reason = "the high half is not defined")]
const fn passes(event: u32, old: u16, new: u16) -> bool {
    new.wrapping_sub(event as u16).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    /// What `passes` means, step by step: does the value leave `event` on its way?
    fn leaves(event: u16, old: u16, new: u16, entries: u16) -> bool {
        let mut at = old;
        while at != new {
            if at == event {
                return true;
            }
            at = (at + 1) % entries;
        }
        false
    }

    #[test]
    fn a_doorbell_is_rung_when_the_value_leaves_the_event_behind() {
        for entries in [2u16, 3, 7, 8, 33] {
            for old in 0..entries {
                for new in 0..entries {
                    for event in 0..entries {
                        if old == new {
                            continue;
                        }
                        let rung = passes(event.into(), old, new);
                        assert!(
                            rung || !leaves(event, old, new, entries),
                            "missed: {entries}: {old} to {new}, event {event}"
                        );
                        // Spurious only where a short ring has wrapped.
                        assert!(new < old || rung == leaves(event, old, new, entries));
                    }
                }
            }
        }
    }

    /// Goal: host and controller race for the moment of going to sleep, and no value is missed. Method: a controller that
    /// sleeps after each value, as the model does, on a thread of its own. Without the fence most runs fail.
    #[test]
    fn no_value_is_missed_when_the_controller_goes_to_sleep() {
        const ENTRIES: u16 = 7;
        let region = DmaRegion::map(8192, false, false).unwrap();
        let mapping = DmaMapping::contiguous(region.clone(), Iova(0)).unwrap();
        let shadow = ShadowPages::new(mapping, 4096, 0).of_queue(1).unwrap();
        let (tail_at, event_at) = (shadow.tail_at, shadow.tail_at + shadow.event_at);
        // What the controller has seen, and the register: how often it was written.
        let (seen, register) = (AtomicU64::new(0), AtomicU64::new(0));
        let rounds = 100_000u64;
        let tail_of = |round: u64| u16::try_from(round % u64::from(ENTRIES)).unwrap();
        let begun = Instant::now();
        let patient = || begun.elapsed() < Duration::from_secs(60);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rung = 0;
                for round in 0..rounds {
                    let here = u32::from(tail_of(round));
                    loop {
                        assert!(region.store_u32(event_at, here));
                        fence(Ordering::SeqCst);
                        if region.load_u32(tail_at) != Some(here) {
                            break;
                        }
                        while register.load(Ordering::Acquire) == rung {
                            if !patient() {
                                return;
                            }
                            std::hint::spin_loop();
                        }
                        rung = register.load(Ordering::Acquire);
                    }
                    seen.store(round + 1, Ordering::Release);
                }
            });
            for round in 0..rounds {
                if shadow.submitted(tail_of(round), tail_of(round + 1)) {
                    register.fetch_add(1, Ordering::Release);
                }
                while seen.load(Ordering::Acquire) <= round {
                    assert!(patient(), "value {} was missed", round + 1);
                    std::hint::spin_loop();
                }
            }
        });
    }

    #[test]
    fn queues_behind_the_page_have_no_shadow() {
        let region = DmaRegion::map(8192, false, false).unwrap();
        let mapping = DmaMapping::contiguous(region, Iova(0x10_0000)).unwrap();
        let pages = ShadowPages::new(mapping, 4096, 0);
        assert!(pages.of_queue(511).is_some() && pages.of_queue(512).is_none());
        let shadow = pages.of_queue(3).unwrap();
        assert!(shadow.submitted(0, 1), "EventIdx is 0: the first value is told");
        assert!(!shadow.submitted(1, 2), "and the next ones are not");
        assert_eq!(shadow.region.load_u32(24), Some(2));
        assert!(shadow.region.store_u32(4096 + 24, 2));
        assert!(shadow.submitted(2, 5));
        assert!(shadow.completed(0, 1));
        shadow.clear();
        assert_eq!(shadow.region.load_u32(4096 + 24), Some(0));
        assert!(pages.of_queue(0).unwrap().with_registers().submitted(7, 8));
    }
}
