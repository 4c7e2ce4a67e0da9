//! The right to open a queue pair, made by the controller and carried to the core where the queue will live.

use std::sync::Arc;

use hugepage_alloc::BufferPool;

use crate::access::DmaMapping;
use crate::bell::Bell;
use crate::error::Error;
use crate::info::NamespaceInfo;
use crate::link::{Link, Shared};
use crate::queue::{IoQueue, QueueSettings};
use crate::requeue::Requeue;
use crate::ring::{Layout, Rings};
use crate::slots::SLOTS_MAX;

/// The right to open one queue pair: made by the controller, used on the core where the queue will live.
#[derive(Debug)]
pub struct QueueTicket {
    pub(crate) shared: Arc<Shared>,
    pub(crate) qid: QidLease,
    pub(crate) depth: u16,
    pub(crate) namespace: NamespaceInfo,
    pub(crate) settings: QueueSettings,
    pub(crate) list_len: usize,
    pub(crate) priority: u8,
    /// The interrupt vector that the queue would have.
    pub(crate) vector: Option<u16>,
    pub(crate) bell: Option<Bell>,
}

/// A queue identifier that goes back to the controller unless a queue pair gets it.
#[derive(Debug)]
pub(crate) struct QidLease {
    shared: Arc<Shared>,
    qid: u16,
    used: bool,
}

impl QidLease {
    pub(crate) const fn new(shared: Arc<Shared>, qid: u16) -> Self {
        Self { shared, qid, used: false }
    }
}

impl Drop for QidLease {
    fn drop(&mut self) {
        if !self.used {
            self.shared.give_back(self.qid);
        }
    }
}

impl QueueTicket {
    /// Gives the queue pair an eventfd to sleep on, see [`IoQueue::interrupt`]; and an interrupt vector that signals it,
    /// where there is one for it.
    ///
    /// # Errors
    /// When there are no more descriptors to be had.
    pub fn with_interrupt(mut self) -> Result<Self, Error> {
        let failed = |source| Error::Eventfd { name: self.shared.name(), source: Arc::new(source) };
        self.bell = Some(Bell::new().map_err(failed)?);
        Ok(self)
    }

    /// Which operations are given to the device anew after a reset of the controller.
    #[must_use]
    pub const fn with_requeue(mut self, requeue: Requeue) -> Self {
        self.settings.requeue = requeue;
        self
    }

    /// Opens the queue pair for buffers of `pool`: maps them, makes the rings, and asks the controller to create the
    /// queues. It takes operations when that is done, see [`IoQueue::is_ready`].
    ///
    /// # Errors
    /// When memory cannot be had or mapped, or the controller is no longer there.
    pub fn open(mut self, pool: &BufferPool) -> Result<IoQueue, Error> {
        let (qid, shared) = (self.qid.qid, self.shared.clone());
        let buffers = pool.dma_regions().map(|region| shared.map(region)).collect::<Result<Vec<_>, _>>()?;
        let (mapping, layout) = self.ring_memory()?;
        let exhausted = || Error::Exhausted { name: shared.name(), what: "memory for the rings" };
        let rings = Rings::new(&mapping, layout, qid, shared.dstrd).ok_or_else(exhausted)?;
        let addresses = Rings::addresses(&mapping, &layout).ok_or_else(exhausted)?;
        let vector = self.switch_interrupt_on();
        let limits = (self.settings.limits, self.list_len);
        let link = Link::new(qid, layout.entries, addresses, mapping, self.namespace, limits);
        let link = Arc::new(link.with_interrupt(vector, self.bell).with_priority(self.priority));
        if let Err(error) = shared.add_link(&link) {
            shared.unmap(&link.mapping);
            return Err(error);
        }
        self.qid.used = true;
        Ok(IoQueue::new(self.settings, shared, link, rings, pool, &buffers))
    }

    /// The vector of the completion queue, ready to be let through: a controller refuses a queue with a vector that is
    /// not on (Base section 5.2.1, Invalid Interrupt Vector), and some never signal one that comes on later. `None`
    /// where it cannot be had: then the queue pair is polled.
    fn switch_interrupt_on(&self) -> Option<u16> {
        let (vector, bell) = (self.vector?, self.bell.as_ref()?);
        let access = &self.shared.access;
        if let Err(error) = access.interrupt_attach(vector, bell.fd()) {
            tracing::warn!(name = access.name(), vector, %error, "no interrupt: the queue pair is polled");
            return None;
        }
        // Masked until `IoQueue::arm`; where that cannot be, it rings while nobody sleeps.
        let _ = access.interrupt_detach(vector);
        Some(vector)
    }

    /// Memory for rings of the depth wanted, or as deep as fits where huge pages do not follow each other.
    fn ring_memory(&self) -> Result<(DmaMapping, Layout), Error> {
        let layout = |entries| Layout::new(entries, self.shared.page, self.list_len);
        let deep = layout(self.depth.min(SLOTS_MAX) + 1);
        let mapping = self.shared.queue_memory(deep.total_len)?;
        if deep.fits(&mapping) {
            return Ok((mapping, deep));
        }
        self.shared.unmap(&mapping);
        let shallow = layout(deep.entries.min(Layout::ENTRIES_OF_A_PART));
        Ok((self.shared.queue_memory(shallow.total_len)?, shallow))
    }
}
