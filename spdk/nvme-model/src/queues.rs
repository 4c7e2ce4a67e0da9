//! Queues as the controller has them, and how it learns of tails and heads: by doorbells, or by their shadows.
//!
//! ```text
//!   awake    looks at the shadow itself
//!     |  nothing to do: EventIdx = where it stands, fence, one more look
//!     v
//!   asleep   looks at nothing until the doorbell is written
//! ```
//!
//! It takes the arrangement at its word: a host that does not write a doorbell when EventIdx asks for it waits for ever.

use std::sync::atomic::{Ordering, fence};

use nvme_spec::queue::{DOORBELL_BASE, cq_head_doorbell, sq_tail_doorbell};

use crate::controller::Controller;

/// Asynchronous event: type error, an invalid doorbell write value; Persistent information is not kept.
const INVALID_DOORBELL_VALUE: u32 = 0x0001_0100;

#[derive(Debug)]
pub(crate) struct SubmissionQueue {
    pub(crate) base: u64,
    pub(crate) entries: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) cqid: u16,
    /// With shadow doorbells: looks at the shadow.
    awake: bool,
}

impl SubmissionQueue {
    pub(crate) const fn new(base: u64, entries: u32, cqid: u16) -> Self {
        Self { base, entries, head: 0, tail: 0, cqid, awake: false }
    }

    /// Returns whether the queue has such a tail.
    pub(crate) const fn set_tail(&mut self, tail: u32) -> bool {
        self.awake = true;
        if tail >= self.entries {
            return false;
        }
        self.tail = tail;
        true
    }
}

#[derive(Debug)]
pub(crate) struct CompletionQueue {
    pub(crate) base: u64,
    pub(crate) entries: u32,
    head: u32,
    pub(crate) tail: u32,
    pub(crate) phase: bool,
    /// What is written a step late: address and word.
    pub(crate) torn: Option<Torn>,
    /// Its interrupt.
    pub(crate) vector: Option<u16>,
    awake: bool,
}

/// The part of an entry that is not yet there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Torn {
    pub(crate) at: u64,
    pub(crate) words: [u64; 2],
}

impl CompletionQueue {
    pub(crate) const fn new(base: u64, entries: u32, vector: Option<u16>) -> Self {
        Self { base, entries, head: 0, tail: 0, phase: true, torn: None, vector, awake: false }
    }

    /// Returns whether the queue has such a head.
    pub(crate) const fn set_head(&mut self, head: u32) -> bool {
        self.awake = true;
        if head >= self.entries {
            return false;
        }
        self.head = head;
        true
    }

    const fn is_full(&self) -> bool {
        (self.tail + 1) % self.entries == self.head
    }
}

/// Where shadow doorbells and EventIdx are, for the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShadowBuffers {
    pub(crate) doorbells: u64,
    pub(crate) events: u64,
}

/// One entry of both buffers.
#[derive(Clone, Copy)]
struct ShadowEntry {
    doorbell: u64,
    event: u64,
}

impl Controller {
    /// The shadow of the doorbell at `offset`; none for the admin queue, whose doorbells are always written.
    fn shadow_entry(&self, qid: u16, offset: u32) -> Option<ShadowEntry> {
        let buffers = self.shadow.filter(|_| qid != 0)?;
        let at = u64::from(offset - DOORBELL_BASE);
        (at + 4 <= self.page() as u64)
            .then_some(ShadowEntry { doorbell: buffers.doorbells + at, event: buffers.events + at })
    }

    fn tail_entry(&self, qid: u16) -> Option<ShadowEntry> {
        self.shadow_entry(qid, sq_tail_doorbell(qid, self.options.dstrd & 0xF))
    }

    fn head_entry(&self, cqid: u16) -> Option<ShadowEntry> {
        self.shadow_entry(cqid, cq_head_doorbell(cqid, self.options.dstrd & 0xF))
    }

    /// Writes EventIdx and looks at the doorbell after that.
    fn sleep_at(&self, entry: ShadowEntry, value: u32, entries: u32) -> Option<u32> {
        let wrong = self.faults.registers.event_idx_wrong;
        let event = if wrong { (value + entries / 2) % entries } else { value };
        let _ = self.iommu.store_u32(entry.event, event.to_le());
        fence(Ordering::SeqCst);
        self.iommu.load_u32(entry.doorbell).map(u32::from_le)
    }

    /// Whether a submission queue has a command, as far as the controller may know.
    pub(crate) fn has_command(&mut self, qid: u16) -> bool {
        let Some(queue) = self.sqs.get(&qid) else { return false };
        if queue.head != queue.tail {
            return true;
        }
        let Some(entry) = self.tail_entry(qid).filter(|_| queue.awake) else { return false };
        let (tail, entries) = (queue.tail, queue.entries);
        let mut seen = self.iommu.load_u32(entry.doorbell).map(u32::from_le);
        if seen == Some(tail) {
            seen = self.sleep_at(entry, tail, entries);
        }
        let Some(queue) = self.sqs.get_mut(&qid) else { return false };
        match seen {
            Some(new) if new == tail => queue.awake = false,
            Some(new) if queue.set_tail(new) => return true,
            _ => {
                queue.awake = false;
                self.raise(INVALID_DOORBELL_VALUE);
            }
        }
        false
    }

    /// The newest tail of a queue that is in memory: commands before it may be fetched.
    pub(crate) fn newest_tail(&self, qid: u16) -> u32 {
        let Some(queue) = self.sqs.get(&qid) else { return 0 };
        let seen = self.tail_entry(qid).and_then(|entry| self.iommu.load_u32(entry.doorbell));
        seen.map(u32::from_le).filter(|&tail| tail < queue.entries).unwrap_or(queue.tail)
    }

    /// Whether a completion queue can take an entry, as far as the controller may know.
    pub(crate) fn has_room(&mut self, cqid: u16) -> bool {
        let Some(queue) = self.cqs.get(&cqid) else { return false };
        if queue.torn.is_some() {
            return false;
        }
        if !queue.is_full() {
            return true;
        }
        let Some(entry) = self.head_entry(cqid).filter(|_| queue.awake) else { return false };
        let (head, entries) = (queue.head, queue.entries);
        let mut seen = self.iommu.load_u32(entry.doorbell).map(u32::from_le);
        if seen == Some(head) {
            seen = self.sleep_at(entry, head, entries);
        }
        let Some(queue) = self.cqs.get_mut(&cqid) else { return false };
        match seen {
            Some(new) if new == head => queue.awake = false,
            Some(new) if queue.set_head(new) => return !queue.is_full(),
            _ => {
                queue.awake = false;
                self.raise(INVALID_DOORBELL_VALUE);
            }
        }
        false
    }

    /// Shadow doorbells hold from now on, for the queues that there are too.
    pub(crate) fn set_shadow(&mut self, buffers: ShadowBuffers) {
        self.shadow = Some(buffers);
        self.sqs.values_mut().for_each(|queue| queue.awake = true);
        self.cqs.values_mut().for_each(|queue| queue.awake = true);
    }
}
