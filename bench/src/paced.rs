//! The model with the latency of a device: it learns of an I/O doorbell only after a while.
//!
//! A model that answers within a function call is faster than any device, so that whatever a driver does looks large
//! beside it. Here a doorbell is kept for the latency, counted from when it was rung: what the driver does after ringing
//! it goes on at the same time, as with a real device, and what it does after the completion comes on top.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_nvme::access::{Access, AccessError, DmaMapping};
use hugepage_alloc::DmaRegion;
use nvme_model::Model;
use nvme_spec::queue::sq_tail_doorbell;

/// The queue pair that is paced: the first one a driver gets.
const QID: u16 = 1;

/// The way to the device. Meant for one command at a time: a second doorbell starts the latency again.
#[derive(Debug)]
pub struct Paced {
    model: Arc<Model>,
    origin: Instant,
    latency_ns: u64,
    tail: AtomicU32,
    /// When the doorbell is given on, in nanoseconds since `origin`; 0 while there is none.
    due_ns: AtomicU64,
}

impl Paced {
    /// Over a model with the doorbell stride 0.
    #[must_use]
    pub fn new(model: Arc<Model>, latency: Duration) -> Arc<Self> {
        let latency_ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX / 2);
        let (tail, due_ns) = (AtomicU32::new(0), AtomicU64::new(0));
        Arc::new(Self { model, origin: Instant::now(), latency_ns, tail, due_ns })
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX / 2)
    }

    /// Lets the model work on what is due.
    #[inline]
    pub fn work(&self) {
        let due = self.due_ns.load(Ordering::Relaxed);
        if due != 0 && self.now_ns() >= due {
            self.due_ns.store(0, Ordering::Relaxed);
            self.model.write32(sq_tail_doorbell(QID, 0), self.tail.load(Ordering::Relaxed));
            self.model.step();
        }
    }

    /// Lets the model work on what is not I/O.
    pub fn idle(&self) {
        self.work();
        self.model.step();
    }
}

impl Access for Paced {
    fn name(&self) -> &str {
        "paced"
    }

    fn bar_len(&self) -> u64 {
        self.model.bar_len()
    }

    fn read32(&self, offset: u32) -> u32 {
        self.model.read32(offset)
    }

    fn write32(&self, offset: u32, value: u32) {
        if offset == sq_tail_doorbell(QID, 0) {
            self.tail.store(value, Ordering::Relaxed);
            self.due_ns.store(self.now_ns() + self.latency_ns, Ordering::Relaxed);
        } else {
            self.model.write32(offset, value);
        }
    }

    fn read64(&self, offset: u32) -> u64 {
        self.model.read64(offset)
    }

    fn write64(&self, offset: u32, value: u64) {
        self.model.write64(offset, value);
    }

    fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError> {
        self.model.dma_map(region)
    }

    fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError> {
        self.model.dma_unmap(mapping)
    }

    fn dma_revoke(&self) -> Result<(), AccessError> {
        self.model.dma_revoke()
    }

    fn dma_restore(&self) -> Result<(), AccessError> {
        self.model.dma_restore()
    }

    fn function_reset(&self) -> Result<(), AccessError> {
        self.model.function_reset()
    }

    fn config_read32(&self, offset: u16) -> Result<u32, AccessError> {
        self.model.config_read32(offset)
    }
}
