//! 4 KiB random reads through the driver, as a caller on one core does them.
//!
//! ```text
//!   fill()     submit until `depth` are open, then one doorbell           driver
//!   (device)   works by itself, or is stepped by the caller               not ours
//!   reap()     take what is complete; its buffers are used again          driver
//! ```

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use async_nvme::access::Access;
use async_nvme::{Clock, Controller, Done, IoQueue, Moment, Op, OpKind, Options, SystemClock, block_on};
use hugepage_alloc::{BufferPool, DmaBuf, RegionOptions};

/// Bytes of each read.
pub const READ_LEN: u32 = 4096;
/// Bytes of each write that fills the namespace.
const WRITE_LEN: u32 = 256 << 10;
/// Random places, used over and over: a power of two.
pub(crate) const PLACES: usize = 1 << 14;

/// How buffers are had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffers {
    /// Each completed read's buffer serves the next one.
    Reused,
    /// Each read takes its buffer from the pool, and gives it back when complete, as a target does.
    Pooled,
}

/// A started controller with one queue pair, and the reads to give it.
#[derive(Debug)]
pub struct Load {
    controller: Controller,
    clock: Arc<SystemClock>,
    now: Moment,
    queue: IoQueue,
    pool: BufferPool,
    buffers: Buffers,
    spare: Vec<DmaBuf>,
    done: Vec<Done>,
    places: Box<[u64]>,
    next: usize,
    /// Blocks of a read, and of the part of the namespace that is read.
    blocks: u64,
    blocks_max: u64,
    depth: usize,
    open: usize,
    failed: u64,
}

impl Load {
    /// Starts the controller and opens a queue pair for `nsid`. `idle` lets the device work.
    ///
    /// # Errors
    /// When the controller does not start, or the namespace cannot be read in 4 KiB.
    pub fn start(
        access: Arc<dyn Access>,
        nsid: u32,
        depth: u16,
        buffers: Buffers,
        idle: &mut dyn FnMut(),
    ) -> Result<Self> {
        let clock = Arc::new(SystemClock::default());
        let mut controller = Controller::new(access, Options::default(), clock.clone())?;
        block_on(controller.ready(), &mut *idle)?;
        let namespace = controller.namespaces().iter().find(|namespace| namespace.nsid == nsid);
        let namespace = namespace.with_context(|| format!("there is no namespace {nsid}"))?;
        let blocks = u64::from(READ_LEN) >> namespace.block_shift;
        let places_max = namespace.blocks.checked_div(blocks).unwrap_or(0);
        ensure!(places_max > 0, "namespace {nsid} is too small, or its blocks are above {READ_LEN} bytes");
        let bytes = (usize::from(depth) * READ_LEN as usize).max(4 << 20);
        let pool = BufferPool::with_options(bytes, &shared_memory())?;
        let queue = controller.queue_ticket(nsid, depth)?.open(&pool)?;
        block_on(controller.until(|_| queue.is_ready() || queue.is_gone()), &mut *idle)?;
        if let Some(status) = queue.refused_with() {
            bail!("the queue pair was refused: {status}");
        }
        ensure!(queue.is_ready(), "the controller went away");
        ensure!(queue.depth() == usize::from(depth), "the controller has no queue of depth {depth}");
        let depth = usize::from(depth);
        let spare = (0..depth).map(|_| pool.alloc(READ_LEN)).collect::<Option<Vec<_>>>();
        let mut spare = spare.context("the pool is too small")?;
        if buffers == Buffers::Pooled {
            spare.clear();
        }
        Ok(Self {
            controller,
            now: clock.now(),
            clock,
            queue,
            pool,
            buffers,
            spare,
            done: Vec::with_capacity(depth),
            places: places(places_max, blocks),
            next: 0,
            blocks,
            blocks_max: places_max * blocks,
            depth,
            open: 0,
            failed: 0,
        })
    }

    /// Submits until `depth` reads are open, and rings the doorbell once.
    #[inline(never)]
    pub fn fill(&mut self) {
        while self.open < self.depth {
            let buf = match self.buffers {
                Buffers::Reused => self.spare.pop(),
                Buffers::Pooled => self.pool.alloc(READ_LEN),
            };
            let lba = self.places[self.next];
            self.next = (self.next + 1) & (PLACES - 1);
            let op = Op { token: lba, kind: OpKind::Read, lba, blocks: self.blocks, buf };
            if let Err(refused) = self.queue.submit(op) {
                self.refused(refused.op);
                return;
            }
            self.open += 1;
        }
        self.queue.ring();
    }

    /// Takes what is complete: how many.
    #[inline(never)]
    pub fn reap(&mut self) -> usize {
        let count = self.queue.poll(self.now, self.depth, &mut self.done);
        self.open -= count;
        for done in self.done.drain(..) {
            self.failed += u64::from(done.result.is_err());
            if self.buffers == Buffers::Reused
                && let Some(buf) = done.buf
            {
                self.spare.push(buf);
            }
        }
        count
    }

    /// Reads the clock, by which late commands are noticed: now and then is enough.
    pub fn look_at_clock(&mut self) {
        self.now = self.clock.now();
    }

    /// Serves the controller itself; for long runs, outside of what is timed.
    pub fn serve(&mut self) {
        self.look_at_clock();
        self.controller.poll();
    }

    /// Reads that failed, or could not be submitted.
    #[must_use]
    pub const fn failed(&self) -> u64 {
        self.failed
    }

    #[cold]
    fn refused(&mut self, op: Op) {
        self.failed += 1;
        self.spare.extend(op.buf);
    }

    /// Writes the whole namespace, one write at a time: memory that was never written is no memory yet, and the first
    /// reads would measure how the kernel finds some.
    ///
    /// # Errors
    /// When a write fails, or the device does not answer.
    pub fn write_all(&mut self, idle: &mut dyn FnMut()) -> Result<()> {
        ensure!(self.open == 0, "reads are open");
        let step = self.blocks * u64::from(WRITE_LEN / READ_LEN);
        for lba in (0..self.blocks_max).step_by(usize::try_from(step)?) {
            let blocks = step.min(self.blocks_max - lba);
            let len = u32::try_from(blocks / self.blocks)? * READ_LEN;
            let buf = self.pool.alloc(len);
            if let Some(buf) = &buf {
                buf.write_from(0, &[0x5A; WRITE_LEN as usize][..len as usize]);
            }
            let op = Op { token: lba, kind: OpKind::Write { fua: false }, lba, blocks, buf };
            if let Err(refused) = self.queue.submit(op) {
                bail!("a write was refused: {:?}", refused.why);
            }
            self.queue.ring();
            while self.done.is_empty() {
                idle();
                self.serve();
                self.queue.poll(self.now, 1, &mut self.done);
                ensure!(!self.queue.is_gone(), "the controller went away");
            }
            for done in self.done.drain(..) {
                done.result?;
            }
        }
        Ok(())
    }

    /// Waits for all reads, then shuts the controller down.
    ///
    /// # Errors
    /// When a read failed, or the controller does not stop.
    pub fn finish(mut self, idle: &mut dyn FnMut()) -> Result<()> {
        while self.open > 0 {
            idle();
            self.serve();
            self.reap();
            ensure!(!self.queue.is_gone(), "the controller went away");
        }
        ensure!(self.failed == 0, "{} reads failed", self.failed);
        drop(self.queue);
        block_on(self.controller.shutdown(), idle)?;
        Ok(())
    }
}

/// Memory that a device in another process can be given too.
#[must_use]
pub fn shared_memory() -> RegionOptions {
    RegionOptions { share: true, ..RegionOptions::default() }
}

/// Random first blocks of 4 KiB, the same in each run.
#[must_use]
pub fn places(places_max: u64, blocks: u64) -> Box<[u64]> {
    let mut word = 0x2545_F491_4F6C_DD1Du64;
    let mut next = || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word % places_max * blocks
    };
    (0..PLACES).map(|_| next()).collect()
}
