//! A disk in memory, shared by all cores: for benches, and with faults for tests.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hugepage_alloc::{BUFFER_LEN_MAX, Backing, BufferPool, SharedMemory};

use super::{
    BlockDevice, BlockDone, BlockError, BlockErrorKind, BlockOp, BlockOpKind, BlockQueue, DeviceInfo,
    OpenError, check, drain,
};
use crate::ring::Ring;
use crate::units::{BlockSize, ByteLen};

/// What a memory device shall be.
#[derive(Clone, Debug)]
pub struct MemOptions {
    /// Its size, a multiple of the block size.
    pub len: ByteLen,
    /// Its block size.
    pub block_size: BlockSize,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether its memory shall be of huge pages, which then are missing for buffers.
    pub prefer_huge: bool,
    /// Errors to make.
    pub faults: Vec<MemFault>,
    /// How long each operation takes. An operation reads or changes the memory at the end of that time.
    pub latency: Option<Duration>,
}

impl MemOptions {
    /// A plain memory device.
    #[must_use]
    pub const fn new(len: ByteLen, block_size: BlockSize) -> Self {
        Self { len, block_size, read_only: false, prefer_huge: false, faults: Vec::new(), latency: None }
    }
}

/// Which operations a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOn {
    /// All of them.
    Any,
    /// Read.
    Read,
    /// Write.
    Write,
    /// Flush, wherever the range is.
    Flush,
    /// Write Zeroes.
    WriteZeroes,
    /// Deallocate.
    Deallocate,
}

impl FaultOn {
    const fn hits(self, kind: BlockOpKind) -> bool {
        matches!(
            (self, kind),
            (Self::Any, _)
                | (Self::Read, BlockOpKind::Read)
                | (Self::Write, BlockOpKind::Write { .. })
                | (Self::Flush, BlockOpKind::Flush)
                | (Self::WriteZeroes, BlockOpKind::WriteZeroes { .. })
                | (Self::Deallocate, BlockOpKind::Deallocate)
        )
    }
}

/// One kind of error to make. The operation it hits does nothing but fail.
#[derive(Clone, Debug)]
pub struct MemFault {
    /// Which operations it hits.
    pub on: FaultOn,
    /// The byte range; an operation that touches it is hit.
    pub range: Range<u64>,
    /// The error it makes.
    pub kind: BlockErrorKind,
    /// How often it hits, over all cores, before it is used up.
    pub count: u32,
}

/// A disk in memory.
///
/// Operations that overlap in time and place are not atomic against each other across cores, not even within a
/// block: a read may see parts of two writes. Operations of one core are executed one after the other.
pub struct MemDevice {
    shared: Arc<Shared>,
}

struct Shared {
    info: DeviceInfo,
    memory: SharedMemory,
    faults: Vec<(MemFault, AtomicU32)>,
    latency: Option<Duration>,
}

impl MemDevice {
    /// Maps the memory of a device, zeroed.
    ///
    /// # Errors
    /// When the memory cannot be mapped, or the size is no positive multiple of the block size.
    pub fn new(options: MemOptions) -> Result<Self, OpenError> {
        check::check_size(options.len, options.block_size)?;
        let bytes = options.len.get();
        let memory = usize::try_from(bytes)
            .map_err(|_| hugepage_alloc::AllocError::BadSize { bytes: usize::MAX })
            .and_then(|len| SharedMemory::new(len, options.prefer_huge))
            .map_err(|source| OpenError::Memory { bytes, source })?;
        let info = DeviceInfo {
            name: "mem".to_owned(),
            dev: None,
            logical_block_size: options.block_size,
            physical_block_bytes: options.block_size.bytes(),
            len: options.len,
            volatile_write_cache: false,
            write_zeroes: true,
            deallocate: true,
            transfer_len_max: ByteLen(BUFFER_LEN_MAX as u64),
            read_only: options.read_only,
        };
        let faults = options.faults.into_iter().map(|fault| {
            let left = AtomicU32::new(fault.count);
            (fault, left)
        });
        let shared = Shared { info, memory, faults: faults.collect(), latency: options.latency };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// What kind of pages its memory is of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.shared.memory.backing()
    }
}

impl std::fmt::Debug for MemDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemDevice").field("info", &self.shared.info).finish_non_exhaustive()
    }
}

impl BlockDevice for MemDevice {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn open_queue(&self, _: &Ring, _: &BufferPool, depth: usize) -> Result<Box<dyn BlockQueue>, BlockError> {
        Ok(Box::new(MemQueue {
            shared: Arc::clone(&self.shared),
            ready: VecDeque::with_capacity(depth),
            delayed: VecDeque::with_capacity(if self.shared.latency.is_some() { depth } else { 0 }),
            depth,
        }))
    }
}

impl Shared {
    fn execute(&self, op: &BlockOp) -> Result<(), BlockError> {
        self.try_execute(op).map_err(BlockError::new)
    }

    fn done(&self, op: BlockOp) -> BlockDone {
        let result = self.execute(&op);
        BlockDone { token: op.token, result, buf: op.buf }
    }

    fn try_execute(&self, op: &BlockOp) -> Result<(), BlockErrorKind> {
        check::check(&self.info, op)?;
        if !self.faults.is_empty()
            && let Some(kind) = self.fault(op)
        {
            return Err(kind);
        }
        // Both fit: the range lies in the device, which was mapped whole.
        let at = usize::try_from(op.offset.get()).map_err(|_| BlockErrorKind::OutOfRange)?;
        let len = usize::try_from(op.len.get()).map_err(|_| BlockErrorKind::OutOfRange)?;
        let is_done = match (op.kind, &op.buf) {
            (BlockOpKind::Read, Some(buf)) => self.memory.copy_out(at, buf),
            (BlockOpKind::Write { .. }, Some(buf)) => self.memory.copy_in(at, buf),
            (BlockOpKind::Read | BlockOpKind::Write { .. }, None) => {
                return Err(BlockErrorKind::InvalidRequest);
            }
            (BlockOpKind::WriteZeroes { .. } | BlockOpKind::Deallocate, _) => self.memory.zero(at, len),
            (BlockOpKind::Flush, _) => true,
        };
        if is_done { Ok(()) } else { Err(BlockErrorKind::OutOfRange) }
    }

    /// The error that is due for `op`, used up by asking.
    fn fault(&self, op: &BlockOp) -> Option<BlockErrorKind> {
        let start = op.offset.get();
        let end = start.saturating_add(op.len.get());
        self.faults.iter().find_map(|(fault, left)| {
            let is_in = op.kind == BlockOpKind::Flush || (fault.range.start < end && start < fault.range.end);
            let is_hit = is_in
                && fault.on.hits(op.kind)
                && left
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                    .is_ok();
            is_hit.then_some(fault.kind)
        })
    }
}

struct MemQueue {
    shared: Arc<Shared>,
    ready: VecDeque<BlockDone>,
    /// Operations that take their time, oldest first.
    delayed: VecDeque<(Instant, BlockOp)>,
    depth: usize,
}

impl BlockQueue for MemQueue {
    fn submit(&mut self, op: BlockOp) -> Result<(), BlockOp> {
        if self.outstanding() >= self.depth {
            return Err(op);
        }
        match self.shared.latency {
            None => self.ready.push_back(self.shared.done(op)),
            Some(latency) => self.delayed.push_back((Instant::now() + latency, op)),
        }
        Ok(())
    }

    fn is_immediate(&self) -> bool {
        self.shared.latency.is_none()
    }

    fn execute(&mut self, op: &mut BlockOp) -> Result<(), BlockError> {
        if self.is_immediate() { self.shared.execute(op) } else { Err(BlockErrorKind::Internal.into()) }
    }

    fn commit(&mut self) {}

    fn poll(&mut self, budget: usize, done: &mut Vec<BlockDone>) -> usize {
        if !self.delayed.is_empty() {
            let now = Instant::now();
            while self.delayed.front().is_some_and(|(due, _)| *due <= now)
                && let Some((_, op)) = self.delayed.pop_front()
            {
                self.ready.push_back(self.shared.done(op));
            }
        }
        drain(&mut self.ready, budget, done)
    }

    fn outstanding(&self) -> usize {
        self.ready.len() + self.delayed.len()
    }

    fn must_poll(&self) -> bool {
        self.outstanding() > 0
    }
}
