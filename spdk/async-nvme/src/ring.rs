//! The two rings of a queue pair, in memory shared with the device (Base section 3.3.1).
//!
//! ```text
//!   region  | submission entries | (page) completion entries | lists, one for each command |
//! ```
//!
//! `push` only stores; `ring_submissions` tells the device, once for all that was pushed, by the doorbell register or by
//! its shadow. A completion is there when its phase tag is the expected one; that word is read first, the other after it.

use hugepage_alloc::{BUFFER_LEN_MAX, DmaRegion};
use nvme_spec::queue::{cq_head_doorbell, sq_tail_doorbell};
use nvme_spec::{CompletionQueueEntry, SubmissionQueueEntry};
use zerocopy::transmute;

use crate::access::{Access, DmaMapping, Iova};
use crate::shadow::Shadow;

/// Bytes of an entry in each ring.
const SQE_LEN: usize = 64;
const CQE_LEN: usize = 16;

const _: () = assert!(Layout::ENTRIES_OF_A_PART as usize * SQE_LEN == BUFFER_LEN_MAX);

/// Where things lie in the region of a queue pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) entries: u16,
    cq_at: usize,
    lists_at: usize,
    list_len: usize,
    pub(crate) total_len: usize,
}

impl Layout {
    /// For `entries` in both rings and a list of `list_len` bytes (a power of two of at most 4096) for each command.
    pub(crate) fn new(entries: u16, page: usize, list_len: usize) -> Self {
        let cq_len = usize::from(entries) * CQE_LEN;
        let mut cq_at = (usize::from(entries) * SQE_LEN).next_multiple_of(page);
        // The parts of a mapping need not follow each other, and a ring must.
        if cq_at / BUFFER_LEN_MAX != (cq_at + cq_len - 1) / BUFFER_LEN_MAX {
            cq_at = cq_at.next_multiple_of(BUFFER_LEN_MAX);
        }
        let lists_at = (cq_at + cq_len).next_multiple_of(4096.max(page));
        Self { entries, cq_at, lists_at, list_len, total_len: lists_at + usize::from(entries) * list_len }
    }

    /// Most entries of rings that each lie in one part of a mapping.
    pub(crate) const ENTRIES_OF_A_PART: u16 = 32768;

    /// Whether each ring is contiguous for the device.
    pub(crate) fn fits(&self, mapping: &DmaMapping) -> bool {
        let entries = usize::from(self.entries);
        mapping.is_contiguous(0, entries * SQE_LEN) && mapping.is_contiguous(self.cq_at, entries * CQE_LEN)
    }

    pub(crate) const fn list_len(&self) -> usize {
        self.list_len
    }

    pub(crate) const fn list_at(&self, slot: u16) -> usize {
        self.lists_at + slot as usize * self.list_len
    }
}

/// A submission and a completion ring of the same length.
#[derive(Debug)]
pub(crate) struct Rings {
    region: DmaRegion,
    pub(crate) layout: Layout,
    qid: u16,
    sq_doorbell: u32,
    cq_doorbell: u32,
    tail: u16,
    tail_rung: u16,
    head: u16,
    head_rung: u16,
    phase: bool,
    /// The doorbells in memory, while the controller looks at them.
    shadow: Option<Shadow>,
}

impl Rings {
    /// Rings in a mapped region, which is zeroed. `None` when the layout does not fit.
    pub(crate) fn new(mapping: &DmaMapping, layout: Layout, qid: u16, dstrd: u8) -> Option<Self> {
        let region = mapping.region().clone();
        if region.len() < layout.total_len {
            return None;
        }
        let mut rings = Self {
            region,
            layout,
            qid,
            sq_doorbell: sq_tail_doorbell(qid, dstrd),
            cq_doorbell: cq_head_doorbell(qid, dstrd),
            tail: 0,
            tail_rung: 0,
            head: 0,
            head_rung: 0,
            phase: true,
            shadow: None,
        };
        rings.restart();
        Some(rings)
    }

    pub(crate) const fn region(&self) -> &DmaRegion {
        &self.region
    }

    /// The device's addresses of both rings.
    pub(crate) fn addresses(mapping: &DmaMapping, layout: &Layout) -> Option<(Iova, Iova)> {
        Some((mapping.iova(0)?, mapping.iova(layout.cq_at)?))
    }

    /// Whether the controller looks at shadow doorbells: where they are, with the present values stored.
    pub(crate) fn set_shadow(&mut self, shadow: Option<Shadow>) {
        if let Some(shadow) = &shadow {
            shadow.store(self.tail_rung, self.head_rung);
        }
        self.shadow = shadow;
    }

    /// Empties both rings. Only while no device uses them.
    pub(crate) fn restart(&mut self) {
        self.shadow = None;
        let zeroed = self.region.zero(0, self.layout.lists_at);
        debug_assert!(zeroed, "the layout fits the region");
        (self.tail, self.tail_rung, self.head, self.head_rung, self.phase) = (0, 0, 0, 0, true);
    }

    /// Stores a command behind the others, as eight words. The caller has made sure that the ring has room.
    #[inline]
    pub(crate) fn push(&mut self, words: [u64; 8]) {
        let stored = self.region.store_u64s(usize::from(self.tail) * SQE_LEN, words.map(u64::to_le));
        debug_assert!(stored, "the tail lies in the ring");
        self.tail += 1;
        if self.tail == self.layout.entries {
            self.tail = 0;
        }
    }

    /// Like [`Rings::push`], by the names of the fields.
    pub(crate) fn push_entry(&mut self, sqe: SubmissionQueueEntry) {
        let words: [u64; 8] = transmute!(sqe);
        self.push(words.map(u64::from_le));
    }

    /// Tells the device of everything pushed; whether that took a doorbell.
    pub(crate) fn ring_submissions(&mut self, access: &dyn Access) -> bool {
        if self.tail == self.tail_rung {
            return false;
        }
        let old = self.tail_rung;
        self.tail_rung = self.tail;
        if let Some(shadow) = &self.shadow
            && !shadow.submitted(old, self.tail)
        {
            return false;
        }
        access.write32(self.sq_doorbell, u32::from(self.tail));
        true
    }

    /// The next completion, if there is one.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<CompletionQueueEntry> {
        let at = self.layout.cq_at + usize::from(self.head) * CQE_LEN;
        let high = self.region.load_u64(at + 8)?;
        // The phase tag is bit 0 of the last two bytes.
        if (u64::from_le(high) >> 48 & 1 == 1) != self.phase {
            return None;
        }
        let low = self.region.load_u64(at)?;
        self.head += 1;
        if self.head == self.layout.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
        Some(transmute!([low, high]))
    }

    /// Whether a completion is there. Takes nothing.
    pub(crate) fn has_completion(&self) -> bool {
        let at = self.layout.cq_at + usize::from(self.head) * CQE_LEN;
        self.region.load_u64(at + 8).is_some_and(|high| (u64::from_le(high) >> 48 & 1 == 1) == self.phase)
    }

    /// Whether everything pushed was told to the device, and all room given back.
    pub(crate) const fn is_rung(&self) -> bool {
        self.tail == self.tail_rung && self.head == self.head_rung
    }

    /// Gives the device back the room of everything popped.
    pub(crate) fn ring_completions(&mut self, access: &dyn Access) {
        if self.head == self.head_rung {
            return;
        }
        let old = self.head_rung;
        self.head_rung = self.head;
        if let Some(shadow) = &self.shadow
            && !shadow.completed(old, self.head)
        {
            return;
        }
        access.write32(self.cq_doorbell, u32::from(self.head));
    }

    /// Whether a completion names what this queue pair can have: its own queue and a head inside it.
    #[inline]
    pub(crate) const fn is_plausible(&self, cqe: &CompletionQueueEntry) -> bool {
        cqe.sqid.get() == self.qid && cqe.sqhd.get() < self.layout.entries
    }
}
