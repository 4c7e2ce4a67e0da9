//! A device that costs almost nothing: its completions are prepared, so that what is left is the driver's own cost.
//!
//! ```text
//!   driver --- registers, admin queue ------------------> Model (starts, identifies, creates the queues)
//!          --- doorbells of I/O queue 1 --> Replay           one word each, nothing happens
//!                                             |
//!                                        Player::play()      for each new command: its CID, into a completion
//! ```
//!
//! No data moves and no command is looked at but for its identifier. The entries are read and written in the very
//! memory of the driver's rings, found by watching the admin commands that create them. `play` runs on the driver's
//! core: that leaves the rings in its nearest cache, where a device on a bus would leave them in the last-level cache
//! at best.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nvme::access::{Access, AccessError, DmaMapping};
use hugepage_alloc::DmaRegion;
use nvme_model::Model;
use nvme_spec::queue::{CreateQueueCdw10, cq_head_doorbell, sq_tail_doorbell};
use nvme_spec::register::Property;
use nvme_spec::{AdminOpcode, SubmissionQueueEntry};
use zerocopy::IntoBytes;

/// The queue pair that is replayed: the first one a driver gets.
const QID: u16 = 1;
const SQE_LEN: usize = 64;
const CQE_LEN: usize = 16;

/// The way to the device. Give it to a driver, then take the [`Player`].
#[derive(Debug)]
pub struct Replay {
    model: Arc<Model>,
    sq_tail: AtomicU32,
    setup: Mutex<Setup>,
}

/// What was seen of the driver's preparations.
#[derive(Debug, Default)]
struct Setup {
    mappings: Vec<DmaMapping>,
    asq: u64,
    admin_entries: u32,
    admin_head: u32,
    /// Address and entries of the rings.
    sq: Option<(u64, u32)>,
    cq: Option<(u64, u32)>,
}

impl Replay {
    /// Over a model with the doorbell stride 0.
    #[must_use]
    pub fn new(model: Arc<Model>) -> Arc<Self> {
        Arc::new(Self { model, sq_tail: AtomicU32::new(0), setup: Mutex::default() })
    }

    fn setup(&self) -> MutexGuard<'_, Setup> {
        self.setup.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's side of the queue pair; `None` until the driver has created it.
    #[must_use]
    pub fn player(self: &Arc<Self>) -> Option<Player> {
        let setup = self.setup();
        let ((sq, entries), (cq, cq_entries)) = (setup.sq?, setup.cq?);
        let (sq_region, sq_at) = setup.find(sq)?;
        let (cq_region, cq_at) = setup.find(cq)?;
        if entries != cq_entries || entries < 2 {
            return None;
        }
        let replay = self.clone();
        Some(Player { replay, sq_region, sq_at, cq_region, cq_at, entries, head: 0, cq_tail: 0, phase: 1 })
    }
}

impl Setup {
    /// The memory behind an address that the driver names.
    fn find(&self, iova: u64) -> Option<(DmaRegion, usize)> {
        self.mappings.iter().find_map(|mapping| {
            let at = usize::try_from(iova.checked_sub(mapping.iova(0)?.0)?).ok()?;
            (at < mapping.region().len()).then(|| (mapping.region().clone(), at))
        })
    }

    /// Looks at the admin commands up to `tail`, for the ones that create the rings.
    fn watch(&mut self, tail: u32) {
        let Some((region, at)) = self.find(self.asq) else { return };
        while self.admin_entries > 0 && self.admin_head != tail {
            let mut sqe = SubmissionQueueEntry::default();
            if !region.read(at + self.admin_head as usize * SQE_LEN, sqe.as_mut_bytes()) {
                return;
            }
            let create = CreateQueueCdw10::from_bits(sqe.cdw10.get());
            let ring = Some((sqe.dptr.address.get(), u32::from(create.qsize_z()) + 1));
            match AdminOpcode(sqe.opcode) {
                AdminOpcode::CREATE_IO_SQ if create.qid() == QID => self.sq = ring,
                AdminOpcode::CREATE_IO_CQ if create.qid() == QID => self.cq = ring,
                _ => {}
            }
            self.admin_head = (self.admin_head + 1) % self.admin_entries;
        }
    }
}

impl Access for Replay {
    fn name(&self) -> &str {
        "replay"
    }

    fn bar_len(&self) -> u64 {
        self.model.bar_len()
    }

    fn read32(&self, offset: u32) -> u32 {
        self.model.read32(offset)
    }

    fn write32(&self, offset: u32, value: u32) {
        if offset == sq_tail_doorbell(QID, 0) {
            // After all that the driver wrote, as a doorbell must be.
            self.sq_tail.store(value, Ordering::Release);
            return;
        }
        if offset == cq_head_doorbell(QID, 0) {
            // There is always room: the driver has no more commands open than the ring has entries.
            return;
        }
        match Property(offset) {
            Property::AQA => self.setup().admin_entries = (value & 0xFFF) + 1,
            Property::CC => self.setup().admin_head = 0,
            _ if offset == sq_tail_doorbell(0, 0) => self.setup().watch(value),
            _ => {}
        }
        self.model.write32(offset, value);
    }

    fn read64(&self, offset: u32) -> u64 {
        self.model.read64(offset)
    }

    fn write64(&self, offset: u32, value: u64) {
        if Property(offset) == Property::ASQ {
            self.setup().asq = value;
        }
        self.model.write64(offset, value);
    }

    fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError> {
        let mapping = self.model.dma_map(region)?;
        self.setup().mappings.push(mapping.clone());
        Ok(mapping)
    }

    fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError> {
        self.setup().mappings.retain(|known| !known.region().is_same(mapping.region()));
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

/// The device's side of the queue pair.
#[derive(Debug)]
pub struct Player {
    replay: Arc<Replay>,
    sq_region: DmaRegion,
    sq_at: usize,
    cq_region: DmaRegion,
    cq_at: usize,
    entries: u32,
    head: u32,
    cq_tail: u32,
    phase: u64,
}

impl Player {
    /// Completes at most `most` of the commands whose doorbell was rung: how many.
    pub fn play(&mut self, most: usize) -> usize {
        let tail = self.replay.sq_tail.load(Ordering::Acquire);
        let mut played = 0;
        while self.head != tail && played < most {
            self.complete();
            played += 1;
        }
        played
    }

    /// Completes `count` entries of the ring, whether they are new or not: what `play` costs by itself.
    pub fn play_alone(&mut self, count: usize) {
        for _ in 0..count {
            self.complete();
        }
    }

    #[inline]
    fn complete(&mut self) {
        let at = self.sq_at + self.head as usize * SQE_LEN;
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
        }
        let cid = self.sq_region.load_u32(at).unwrap_or(0) >> 16;
        let dw2 = u64::from(self.head) | u64::from(QID) << 16;
        let words = [0, dw2 | u64::from(cid) << 32 | self.phase << 48];
        let stored = self.cq_region.store_u64s(self.cq_at + self.cq_tail as usize * CQE_LEN, words);
        debug_assert!(stored, "the ring lies in its region");
        self.cq_tail += 1;
        if self.cq_tail == self.entries {
            self.cq_tail = 0;
            self.phase ^= 1;
        }
    }
}
