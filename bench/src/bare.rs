//! The device alone: the least that any software must do to read from it.
//!
//! ```text
//!   start   disable, enable, Identify Namespace, Number of Queues, one queue pair      no driver of ours in it
//!   turn    prepared entries into the ring, one doorbell | phase tag, status | one doorbell
//! ```
//!
//! It is what the driver is compared with: the same device by the same access, with nothing of what makes a driver
//! (ownership of buffers, checks of what the device says, deadlines, splitting, resets). Never use it for more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use async_nvme::access::{Access, DmaMapping};
use hugepage_alloc::DmaRegion;
use nvme_spec::feature::FeatureId;
use nvme_spec::identify::{Cns, IdentifyNamespace};
use nvme_spec::queue::{
    CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11, NumberOfQueues, cq_head_doorbell, sq_tail_doorbell,
};
use nvme_spec::register::{Cap, Cc, Csts, Property};
use nvme_spec::{AdminOpcode, CompletionQueueEntry, NvmOpcode, SubmissionQueueEntry};
use zerocopy::{FromZeros, IntoBytes, transmute};

use crate::load::{PLACES, READ_LEN, places, shared_memory};

const PAGE: usize = 4096;
const QID: u16 = 1;
const ADMIN_ENTRIES: u16 = 16;
/// For anything that is not a read.
const LIMIT: Duration = Duration::from_secs(30);

/// Where things lie in the region of the queues.
const ADMIN_SQ: usize = 0;
const ADMIN_CQ: usize = PAGE;
const DATA: usize = 2 * PAGE;
const IO_CQ: usize = 3 * PAGE;
const IO_SQ: usize = 64 * PAGE;
/// So that both I/O rings have their place, with one entry more than commands.
const DEPTH_MAX: u16 = 1023;

/// One ring pair.
#[derive(Debug)]
struct Ring {
    region: DmaRegion,
    qid: u16,
    sq_at: usize,
    cq_at: usize,
    entries: u16,
    tail: u16,
    head: u16,
    phase: u64,
}

impl Ring {
    fn new(region: &DmaRegion, qid: u16, sq_at: usize, cq_at: usize, entries: u16) -> Self {
        Self { region: region.clone(), qid, sq_at, cq_at, entries, tail: 0, head: 0, phase: 1 }
    }

    #[inline]
    fn push(&mut self, words: [u64; 8]) {
        let stored = self.region.store_u64s(self.sq_at + usize::from(self.tail) * 64, words);
        debug_assert!(stored, "the ring lies in its region");
        self.tail = if self.tail + 1 == self.entries { 0 } else { self.tail + 1 };
    }

    #[inline]
    fn pop(&mut self) -> Option<CompletionQueueEntry> {
        let at = self.cq_at + usize::from(self.head) * 16;
        let high = self.region.load_u64(at + 8)?;
        if u64::from_le(high) >> 48 & 1 != self.phase {
            return None;
        }
        let low = self.region.load_u64(at)?;
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase ^= 1;
        }
        Some(transmute!([low, high]))
    }

    #[inline]
    fn ring_tail(&self, access: &dyn Access, dstrd: u8) {
        access.write32(sq_tail_doorbell(self.qid, dstrd), u32::from(self.tail));
    }

    #[inline]
    fn ring_head(&self, access: &dyn Access, dstrd: u8) {
        access.write32(cq_head_doorbell(self.qid, dstrd), u32::from(self.head));
    }
}

/// A controller with one queue pair, and the reads to give it.
#[derive(Debug)]
pub struct Bare {
    access: Arc<dyn Access>,
    queues: DmaMapping,
    data: DmaMapping,
    dstrd: u8,
    admin: Ring,
    io: Ring,
    nsid: u32,
    /// Blocks of each read, less one.
    nlb_z: u64,
    places: Box<[u64]>,
    next: usize,
    /// Identifiers that are not open; each has a buffer of its own.
    free: Vec<u16>,
    depth: usize,
}

impl Bare {
    /// Resets and enables the controller, and makes a queue pair for `nsid`. `idle` lets the device work.
    ///
    /// # Errors
    /// When the controller does not do as it should, or the namespace cannot be read in 4 KiB.
    pub fn start(access: Arc<dyn Access>, nsid: u32, depth: u16, idle: &mut dyn FnMut()) -> Result<Self> {
        ensure!((1..=DEPTH_MAX).contains(&depth), "the depth is not in 1 to {DEPTH_MAX}");
        let cap = Cap::from_bits(access.read64(Property::CAP.0));
        ensure!(cap.mpsmin() == 0, "the controller has no pages of 4 KiB");
        ensure!(cap.mqes_z() >= depth, "the controller has no queue of depth {depth}");
        let queues = access.dma_map(&DmaRegion::with_options(IO_SQ + 65 * PAGE, &shared_memory())?)?;
        let data_len = usize::from(depth) * READ_LEN as usize;
        let data = access.dma_map(&DmaRegion::with_options(data_len, &shared_memory())?)?;
        let region = queues.region().clone();
        let mut bare = Self {
            admin: Ring::new(&region, 0, ADMIN_SQ, ADMIN_CQ, ADMIN_ENTRIES),
            io: Ring::new(&region, QID, IO_SQ, IO_CQ, depth + 1),
            dstrd: cap.dstrd(),
            access,
            queues,
            data,
            nsid,
            nlb_z: 0,
            places: Box::default(),
            next: 0,
            free: (0..depth).rev().collect(),
            depth: usize::from(depth),
        };
        bare.enable(idle)?;
        bare.open(idle)?;
        Ok(bare)
    }

    fn iova(&self, at: usize) -> Result<u64> {
        Ok(self.queues.iova(at).context("the queues have no address")?.0)
    }

    fn enable(&mut self, idle: &mut dyn FnMut()) -> Result<()> {
        self.access.write32(Property::CC.0, 0);
        self.until_ready(false, idle)?;
        let size_z = u32::from(ADMIN_ENTRIES) - 1;
        self.access.write32(Property::AQA.0, size_z | size_z << 16);
        self.access.write64(Property::ASQ.0, self.iova(ADMIN_SQ)?);
        self.access.write64(Property::ACQ.0, self.iova(ADMIN_CQ)?);
        let cc = Cc::new().with_iosqes(6).with_iocqes(4).with_en(true);
        self.access.write32(Property::CC.0, cc.into_bits());
        self.until_ready(true, idle)
    }

    fn until_ready(&self, ready: bool, idle: &mut dyn FnMut()) -> Result<()> {
        let begun = Instant::now();
        loop {
            let bits = self.access.read32(Property::CSTS.0);
            ensure!(bits != u32::MAX, "the controller is gone");
            let csts = Csts::from_bits(bits);
            ensure!(!ready || !csts.cfs(), "the controller reports a fatal status");
            if csts.rdy() == ready {
                return Ok(());
            }
            ensure!(begun.elapsed() < LIMIT, "the controller does not become ready or disabled");
            idle();
        }
    }

    fn open(&mut self, idle: &mut dyn FnMut()) -> Result<()> {
        let at = self.iova(DATA)?;
        let cns = u32::from(Cns::NAMESPACE.0);
        self.run_admin(AdminOpcode::IDENTIFY, self.nsid, at, [cns, 0], idle)?;
        let mut identify = IdentifyNamespace::new_zeroed();
        ensure!(self.queues.region().read(DATA, identify.as_mut_bytes()), "the data page is missing");
        let shift = identify.lbaf[usize::from(identify.flbas & 0xF)].lbads;
        ensure!((9..=12).contains(&shift), "the blocks of namespace {} are above 4 KiB", self.nsid);
        let blocks = u64::from(READ_LEN >> shift);
        let places_max = identify.nsze.get() / blocks;
        ensure!(places_max > 0, "namespace {} is too small", self.nsid);
        (self.places, self.nlb_z) = (places(places_max, blocks), blocks - 1);

        let number = NumberOfQueues::new().into_bits();
        self.run_admin(
            AdminOpcode::SET_FEATURES,
            0,
            0,
            [FeatureId::NUMBER_OF_QUEUES.0.into(), number],
            idle,
        )?;
        let size = CreateQueueCdw10::new().with_qid(QID).with_qsize_z(self.io.entries - 1).into_bits();
        let cq = CreateCqCdw11::new().with_pc(true).into_bits();
        self.run_admin(AdminOpcode::CREATE_IO_CQ, 0, self.iova(IO_CQ)?, [size, cq], idle)?;
        let sq = CreateSqCdw11::new().with_pc(true).with_cqid(QID).into_bits();
        self.run_admin(AdminOpcode::CREATE_IO_SQ, 0, self.iova(IO_SQ)?, [size, sq], idle)
    }

    fn run_admin(
        &mut self,
        opcode: AdminOpcode,
        nsid: u32,
        prp1: u64,
        [cdw10, cdw11]: [u32; 2],
        idle: &mut dyn FnMut(),
    ) -> Result<()> {
        let mut sqe = SubmissionQueueEntry {
            opcode: opcode.0,
            nsid: nsid.into(),
            cdw10: cdw10.into(),
            cdw11: cdw11.into(),
            ..Default::default()
        };
        sqe.dptr.address.set(prp1);
        self.admin.push(transmute!(sqe));
        self.admin.ring_tail(&*self.access, self.dstrd);
        let begun = Instant::now();
        let cqe = loop {
            if let Some(cqe) = self.admin.pop() {
                break cqe;
            }
            ensure!(begun.elapsed() < LIMIT, "{opcode:?} is not answered");
            idle();
        };
        self.admin.ring_head(&*self.access, self.dstrd);
        if !cqe.status().is_success() {
            bail!("{opcode:?}: {}", cqe.status());
        }
        Ok(())
    }

    /// Gives the device as many reads as fit, with one doorbell.
    #[inline(never)]
    pub fn fill(&mut self) {
        if self.free.is_empty() {
            return;
        }
        while let Some(cid) = self.free.pop() {
            let lba = self.places[self.next];
            self.next = (self.next + 1) & (PLACES - 1);
            let head = u64::from(NvmOpcode::READ.0) | u64::from(cid) << 16 | u64::from(self.nsid) << 32;
            let prp1 = self.data.iova(usize::from(cid) * READ_LEN as usize).map_or(0, |iova| iova.0);
            self.io.push([head, 0, 0, prp1, 0, lba, self.nlb_z, 0].map(u64::to_le));
        }
        self.io.ring_tail(&*self.access, self.dstrd);
    }

    /// Takes what is complete: how many.
    ///
    /// # Errors
    /// When a read failed.
    #[inline(never)]
    pub fn reap(&mut self) -> Result<usize> {
        let mut count = 0;
        while let Some(cqe) = self.io.pop() {
            if !cqe.status().is_success() {
                bail!("a read failed: {}", cqe.status());
            }
            self.free.push(cqe.cid.get());
            count += 1;
        }
        if count > 0 {
            self.io.ring_head(&*self.access, self.dstrd);
        }
        Ok(count)
    }

    /// Waits for all reads, disables the controller, and ends the mappings.
    ///
    /// # Errors
    /// When the controller does not do as it should.
    pub fn finish(mut self, idle: &mut dyn FnMut()) -> Result<()> {
        let begun = Instant::now();
        while self.free.len() < self.depth {
            idle();
            self.reap()?;
            ensure!(begun.elapsed() < LIMIT, "reads are not answered");
        }
        self.access.write32(Property::CC.0, 0);
        self.until_ready(false, idle)?;
        self.access.dma_unmap(&self.data)?;
        self.access.dma_unmap(&self.queues)?;
        Ok(())
    }
}

impl Drop for Bare {
    /// However it ended: the device is disabled before its memory goes.
    fn drop(&mut self) {
        self.access.write32(Property::CC.0, 0);
    }
}

const _: () = assert!(IO_CQ + (DEPTH_MAX as usize + 1) * 16 <= IO_SQ);
const _: () = assert!((DEPTH_MAX as usize + 1) * 64 <= 64 * PAGE);
