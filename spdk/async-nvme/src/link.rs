//! What a controller and its queue pairs, on other cores, know of each other.
//!
//! ```text
//!             queue                    controller
//!   open ---> WANTED ----------------> CREATING ---> LIVE
//!               ^                          \          | reset begins
//!               | rings emptied,            v         v
//!               | operations failed         REFUSED  HOLD     the device may still write: buffers are held
//!               |                                     | CSTS.RDY is 0, or the device is cut off
//!               `------------------------------------ LOST
//!   drop ---> CLOSING -- queues deleted --> CLOSED         for good: GONE (cut off), STRANDED (could not be)
//! ```
//!
//! One word a queue, written seldom: reading it costs a poll next to nothing. There is no lock on the I/O path.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hugepage_alloc::{DmaRegion, RegionOptions};
use nvme_spec::Status;

use crate::access::{Access, DmaMapping, Iova};
use crate::bell::Bell;
use crate::error::Error;
use crate::info::NamespaceInfo;
use crate::limits::Limits;
use crate::shadow::{Shadow, ShadowPages};

/// See the picture above.
pub(crate) mod state {
    pub(crate) const WANTED: u8 = 0;
    pub(crate) const CREATING: u8 = 1;
    pub(crate) const LIVE: u8 = 2;
    pub(crate) const HOLD: u8 = 3;
    pub(crate) const LOST: u8 = 4;
    pub(crate) const CLOSING: u8 = 5;
    pub(crate) const CLOSED: u8 = 6;
    pub(crate) const REFUSED: u8 = 7;
    pub(crate) const GONE: u8 = 8;
    pub(crate) const STRANDED: u8 = 9;
}

/// Why a queue wants its controller reset.
pub(crate) mod wish {
    pub(crate) const NONE: u8 = 0;
    pub(crate) const TIMEOUT: u8 = 1;
    pub(crate) const VIOLATION: u8 = 2;
}

/// One queue pair as both sides see it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) qid: u16,
    pub(crate) entries: u16,
    pub(crate) sq: Iova,
    pub(crate) cq: Iova,
    pub(crate) mapping: DmaMapping,
    /// The namespace, and what its commands may be, as it was when the queue pair was asked for.
    pub(crate) namespace: NamespaceInfo,
    pub(crate) limits: Limits,
    /// Bytes of list of each command.
    pub(crate) list_len: usize,
    /// QPRIO of the submission queue.
    pub(crate) priority: u8,
    /// The interrupt vector of the completion queue, when it has one.
    pub(crate) vector: Option<u16>,
    /// Wakes the queue's core.
    pub(crate) bell: Option<Bell>,
    state: AtomicU8,
    /// The status with which creation failed.
    refused: AtomicU16,
    /// A command to abort: its identifier, and bit 16 set.
    abort: AtomicU32,
}

impl Link {
    pub(crate) fn new(
        qid: u16,
        entries: u16,
        rings: (Iova, Iova),
        mapping: DmaMapping,
        namespace: NamespaceInfo,
        (limits, list_len): (Limits, usize),
    ) -> Self {
        Self {
            qid,
            entries,
            sq: rings.0,
            cq: rings.1,
            mapping,
            namespace,
            limits,
            list_len,
            priority: 0,
            vector: None,
            bell: None,
            state: AtomicU8::new(state::WANTED),
            refused: AtomicU16::new(0),
            abort: AtomicU32::new(0),
        }
    }

    pub(crate) fn with_interrupt(self, vector: Option<u16>, bell: Option<Bell>) -> Self {
        Self { vector, bell, ..self }
    }

    pub(crate) fn with_priority(self, priority: u8) -> Self {
        Self { priority, ..self }
    }

    pub(crate) fn state(&self) -> u8 {
        self.state.load(Ordering::Acquire)
    }

    /// From one state to another; false when it is in neither, because the other side was faster.
    pub(crate) fn advance(&self, from: u8, to: u8) -> bool {
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Like [`Link::advance`], for the controller: wakes the queue's core.
    pub(crate) fn advance_by_controller(&self, from: u8, to: u8) {
        if self.advance(from, to)
            && let Some(bell) = &self.bell
        {
            bell.ring();
        }
    }

    pub(crate) fn set_closed(&self) {
        self.state.store(state::CLOSED, Ordering::Release);
    }

    pub(crate) fn refuse(&self, status: Status) {
        self.refused.store(status.0, Ordering::Relaxed);
        self.advance_by_controller(state::CREATING, state::REFUSED);
    }

    pub(crate) fn refused_with(&self) -> Status {
        Status(self.refused.load(Ordering::Relaxed))
    }

    /// Asks for an abort; false while another one waits.
    fn ask_abort(&self, cid: u16) -> bool {
        let asked = u32::from(cid) | 1 << 16;
        self.abort.compare_exchange(0, asked, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    #[expect(clippy::cast_possible_truncation, reason = "the low half is the identifier")]
    pub(crate) fn take_abort(&self) -> Option<u16> {
        let asked = self.abort.swap(0, Ordering::AcqRel);
        (asked != 0).then_some(asked as u16)
    }
}

/// What all parts of a driven controller share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) access: Arc<dyn Access>,
    pub(crate) dstrd: u8,
    pub(crate) page: usize,
    /// Bits of an address that the device looks at.
    address_bits: u8,
    /// What a sleeping controller is woken by.
    pub(crate) bell: Option<Bell>,
    wish: AtomicU8,
    /// A link changed, or wants something.
    attention: AtomicBool,
    shadow: Mutex<Option<ShadowPages>>,
    /// The controller is over or dropped: nobody serves links any more.
    closed: AtomicBool,
    links: Mutex<Vec<Arc<Link>>>,
    /// Identifiers of queues that were not opened.
    returned: Mutex<Vec<u16>>,
    mappings: Mutex<Vec<DmaMapping>>,
}

impl Shared {
    pub(crate) fn new(
        access: Arc<dyn Access>,
        dstrd: u8,
        page: usize,
        address_bits: u8,
        bell: Option<Bell>,
    ) -> Self {
        Self {
            access,
            dstrd,
            page,
            address_bits,
            bell,
            attention: AtomicBool::new(false),
            shadow: Mutex::new(None),
            wish: AtomicU8::new(wish::NONE),
            closed: AtomicBool::new(false),
            links: Mutex::new(Vec::new()),
            returned: Mutex::new(Vec::new()),
            mappings: Mutex::new(Vec::new()),
        }
    }

    pub(crate) fn name(&self) -> String {
        self.access.name().to_owned()
    }

    pub(crate) fn ask_reset(&self, why: u8) {
        let _ = self.wish.compare_exchange(wish::NONE, why, Ordering::AcqRel, Ordering::Relaxed);
        self.call_controller();
    }

    /// Has the controller look at the links.
    pub(crate) fn call_controller(&self) {
        self.attention.store(true, Ordering::Release);
        if let Some(bell) = &self.bell {
            bell.ring();
        }
    }

    /// Whether a link changed since this was asked last.
    pub(crate) fn take_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed) && self.attention.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn has_attention(&self) -> bool {
        self.attention.load(Ordering::Acquire) || self.wish.load(Ordering::Acquire) != wish::NONE
    }

    /// Asks for an abort; false while another one of the queue waits.
    pub(crate) fn ask_abort(&self, link: &Link, cid: u16) -> bool {
        let asked = link.ask_abort(cid);
        self.call_controller();
        asked
    }

    /// Like [`Link::advance`], for the queue: wakes the controller.
    pub(crate) fn advance_by_queue(&self, link: &Link, from: u8, to: u8) {
        if link.advance(from, to) {
            self.call_controller();
        }
    }

    /// The queue is dropped. Returns the state before.
    pub(crate) fn close_link(&self, link: &Link) -> u8 {
        let was = link.state.swap(state::CLOSING, Ordering::AcqRel);
        self.call_controller();
        was
    }

    /// The shadow doorbells that the controller looks at in this life, if it does.
    pub(crate) fn set_shadow(&self, pages: Option<ShadowPages>) {
        *self.shadow.lock().unwrap_or_else(PoisonError::into_inner) = pages;
    }

    pub(crate) fn shadow_of(&self, link: &Link) -> Option<Shadow> {
        let pages = self.shadow.lock().unwrap_or_else(PoisonError::into_inner);
        pages.as_ref().and_then(|pages| pages.of_queue(link.qid))
    }

    pub(crate) fn take_wish(&self) -> u8 {
        if self.wish.load(Ordering::Relaxed) == wish::NONE {
            return wish::NONE;
        }
        self.wish.swap(wish::NONE, Ordering::AcqRel)
    }

    pub(crate) fn links(&self) -> MutexGuard<'_, Vec<Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a new queue pair known to the controller.
    pub(crate) fn add_link(&self, link: &Arc<Link>) -> Result<(), Error> {
        let mut links = self.links();
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::NotReady { name: self.name() });
        }
        links.push(link.clone());
        drop(links);
        self.call_controller();
        Ok(())
    }

    /// A queue identifier that no queue pair uses.
    pub(crate) fn give_back(&self, qid: u16) {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner).push(qid);
    }

    pub(crate) fn returned(&self) -> Vec<u16> {
        std::mem::take(&mut *self.returned.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether links may be added from now on.
    pub(crate) fn set_closed(&self, closed: bool) {
        let _links = self.links();
        self.closed.store(closed, Ordering::Release);
    }

    /// The mapping of a region, made now unless there is one.
    pub(crate) fn map(&self, region: &DmaRegion) -> Result<DmaMapping, Error> {
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = mappings.iter().find(|known| known.region().is_same(region)) {
            return Ok(known.clone());
        }
        let mapping = self
            .access
            .dma_map(region)
            .map_err(|source| Error::Access { name: self.name(), source: Arc::new(source) })?;
        let last = mapping.iova_max().0;
        if u32::from(self.address_bits) < u64::BITS - last.leading_zeros() {
            let _ = self.access.dma_unmap(&mapping);
            let what = format!("it takes addresses of {} bits, and got {last:#x}", self.address_bits);
            return Err(Error::Unsupported { name: self.name(), what });
        }
        mappings.push(mapping.clone());
        Ok(mapping)
    }

    /// Ends all mappings. Only when the device can no longer write.
    pub(crate) fn unmap_all(&self) {
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        mappings.retain(|mapping| self.access.dma_unmap(mapping).is_err());
    }

    /// Ends a mapping; one that cannot be ended keeps its memory.
    pub(crate) fn unmap(&self, mapping: &DmaMapping) {
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        if self.access.dma_unmap(mapping).is_ok() {
            mappings.retain(|known| !known.region().is_same(mapping.region()));
        }
    }

    /// Memory for queues, mapped.
    pub(crate) fn queue_memory(&self, bytes: usize) -> Result<DmaMapping, Error> {
        // Shared, for the device may be another process.
        let options = RegionOptions { share: true, ..RegionOptions::default() };
        let region = DmaRegion::with_options(bytes, &options)
            .map_err(|source| Error::Memory { name: self.name(), source: Arc::new(source) })?;
        self.map(&region)
    }
}
