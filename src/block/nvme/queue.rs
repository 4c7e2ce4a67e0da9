//! One core's queue: a queue pair of the driver, and what waits for it.
//!
//! ```text
//!   submit --> table --> queue pair --> ready --> poll
//!                 '-> held -^         held while the controller is reset
//!                                     lost: all ends with Gone, and a new queue pair comes when the device is back
//! ```
//!
//! What a reset interrupts, the driver gives to the device again ([`async_nvme::Requeue::Idempotent`]): whoever
//! submitted it notices only that it took longer. That is right here because a write that is not complete has no order
//! to any other: a host that cares waits for it, and a host that comes back after its connection broke is let in when
//! all is complete.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_nvme::{Clock as _, Done, IoError, IoQueue, Op, OpKind, QueueTicket, RefusedWhy, SystemClock};
use hugepage_alloc::{BufferPool, DmaBuf};

use super::device::Seat;
use super::sleeper::Sleeper;
use crate::block::{
    BlockDone, BlockError, BlockErrorKind, BlockOp, BlockOpKind, BlockQueue, DeviceInfo, OpToken, check,
    drain,
};

/// Completions taken from the queue pair at once.
const HARVEST: usize = 256;

/// An operation taken over. Its place in the table is the driver's token.
#[derive(Clone, Copy, Debug)]
struct Pending {
    token: OpToken,
    kind: BlockOpKind,
    lba: u64,
    blocks: u64,
}

/// One core's way to a namespace.
pub struct NvmeQueue {
    info: Arc<DeviceInfo>,
    seat: Arc<Seat>,
    pool: BufferPool,
    clock: SystemClock,
    /// `None` where the core has no ring to sleep on.
    sleeper: Option<Sleeper>,
    /// `None` while the device is lost.
    pair: Option<IoQueue>,
    table: Box<[Option<Pending>]>,
    free: Vec<u16>,
    /// Taken over, and not yet by the queue pair.
    held: VecDeque<(u16, Option<DmaBuf>)>,
    ready: VecDeque<BlockDone>,
    harvest: Vec<Done>,
}

impl NvmeQueue {
    pub(super) fn new(
        info: Arc<DeviceInfo>,
        seat: Arc<Seat>,
        pool: BufferPool,
        mut sleeper: Option<Sleeper>,
        pair: IoQueue,
    ) -> Self {
        if let Some(sleeper) = &mut sleeper {
            sleeper.change(&pair);
        }
        let depth = u16::try_from(pair.depth()).unwrap_or(u16::MAX);
        let count = usize::from(depth);
        Self {
            info,
            seat,
            pool,
            clock: SystemClock::default(),
            sleeper,
            pair: Some(pair),
            table: vec![None; count].into_boxed_slice(),
            free: (0..depth).rev().collect(),
            held: VecDeque::with_capacity(count),
            ready: VecDeque::with_capacity(count),
            harvest: Vec::with_capacity(HARVEST.min(count)),
        }
    }

    /// What the driver has counted for the present queue pair.
    #[must_use]
    pub fn stats(&self) -> async_nvme::QueueStats {
        self.pair.as_ref().map(IoQueue::stats).unwrap_or_default()
    }

    fn end(&mut self, token: OpToken, result: Result<(), BlockError>, buf: Option<DmaBuf>) {
        self.ready.push_back(BlockDone { token, result, buf });
    }

    /// Ends the operation at a place of the table.
    fn finish(&mut self, index: u16, result: Result<(), BlockError>, buf: Option<DmaBuf>) {
        let Some(pending) = self.table.get_mut(usize::from(index)).and_then(Option::take) else { return };
        self.free.push(index);
        self.end(pending.token, result, buf);
    }

    /// Gives the operation at a place of the table to the queue pair; false when it has to wait.
    fn issue(&mut self, index: u16, buf: Option<DmaBuf>) -> bool {
        let Some(Some(pending)) = self.table.get(usize::from(index)) else { return true };
        let Some(pair) = &mut self.pair else {
            if self.seat.has_ticket() {
                self.held.push_front((index, buf));
                return false;
            }
            self.finish(index, Err(BlockErrorKind::Gone.into()), buf);
            return true;
        };
        let Pending { kind, lba, blocks, .. } = *pending;
        let op = Op { token: index.into(), kind: kind_of(kind), lba, blocks, buf };
        let Err(refused) = pair.submit(op) else { return true };
        let buf = refused.op.buf;
        match refused.why {
            RefusedWhy::Full | RefusedWhy::NotReady => {
                self.held.push_front((index, buf));
                return false;
            }
            RefusedWhy::Gone => self.finish(index, Err(BlockErrorKind::Gone.into()), buf),
            RefusedWhy::Invalid(why) => {
                // The checks before were ours, so this is an error of ours too.
                tracing::error!(device = self.info.name, why, "the driver refused an operation");
                self.finish(index, Err(BlockErrorKind::InvalidRequest.into()), buf);
            }
        }
        true
    }

    fn issue_held(&mut self) {
        while let Some((index, buf)) = self.held.pop_front() {
            if !self.issue(index, buf) {
                break;
            }
        }
    }

    /// Takes an operation back from the driver.
    fn take_back(&mut self, done: Done) {
        let Ok(index) = u16::try_from(done.token) else { return };
        let Some(Some(pending)) = self.table.get(usize::from(index)) else { return };
        let is_write = pending.kind != BlockOpKind::Read;
        let result = match done.result {
            Ok(_) => Ok(()),
            // Twice, or late: whoever submitted it may try once more.
            Err(IoError::Reset { .. }) => Err(BlockErrorKind::Aborted.into()),
            Err(IoError::Status(status)) => Err(BlockError::from_status(status, is_write)),
            Err(IoError::Gone | IoError::Stranded) => Err(BlockErrorKind::Gone.into()),
        };
        self.finish(index, result, done.buf);
    }

    fn poll_pair(&mut self) {
        let Some(pair) = &mut self.pair else { return };
        pair.poll(self.clock.now(), HARVEST, &mut self.harvest);
        let mut harvest = std::mem::take(&mut self.harvest);
        for done in harvest.drain(..) {
            self.take_back(done);
        }
        self.harvest = harvest;
    }

    /// Lets a queue pair go that will never work again, and takes the new one when there is one.
    #[cold]
    fn change_pair(&mut self) {
        if self.pair.as_ref().is_some_and(|pair| pair.outstanding() > 0) {
            return;
        }
        if let Some(pair) = self.pair.take()
            && let Some(status) = pair.refused_with()
        {
            tracing::error!(device = self.info.name, %status, "the controller refused a queue");
            self.seat.broken.store(true, Ordering::Release);
        }
        let Some(ticket) = self.seat.take_ticket() else { return };
        match open_pair(ticket, &self.pool, self.sleeper.is_some()) {
            Ok(pair) => {
                if let Some(sleeper) = &mut self.sleeper {
                    sleeper.change(&pair);
                }
                self.pair = Some(pair);
            }
            Err(error) => {
                tracing::error!(device = self.info.name, %error, "a queue could not be opened again");
                self.seat.broken.store(true, Ordering::Release);
            }
        }
    }

    /// Whether the queue pair has to be replaced, or is to be.
    fn is_changing(&self) -> bool {
        self.seat.has_ticket() || self.pair.as_ref().is_some_and(IoQueue::is_gone)
    }
}

impl BlockQueue for NvmeQueue {
    fn submit(&mut self, op: BlockOp) -> Result<(), BlockOp> {
        if self.outstanding() >= self.table.len() {
            return Err(op);
        }
        let BlockOp { token, kind, offset, len, .. } = op;
        let refusal = match check::check(&self.info, &op) {
            Err(kind) => Some(Err(kind.into())),
            // An advice that the device cannot take is followed by doing nothing.
            Ok(()) if kind == BlockOpKind::Deallocate && !self.info.deallocate => Some(Ok(())),
            Ok(()) if matches!(kind, BlockOpKind::WriteZeroes { .. }) && !self.info.write_zeroes => {
                Some(Err(BlockErrorKind::NotSupported.into()))
            }
            Ok(()) => None,
        };
        if let Some(result) = refusal {
            self.end(token, result, op.buf);
            return Ok(());
        }
        let Some(index) = self.free.pop() else { return Err(op) };
        let shift = self.info.logical_block_size.bytes().trailing_zeros();
        let (lba, blocks) = (offset.get() >> shift, len.get() >> shift);
        if let Some(place) = self.table.get_mut(usize::from(index)) {
            *place = Some(Pending { token, kind, lba, blocks });
        }
        if self.held.is_empty() {
            let _ = self.issue(index, op.buf);
        } else {
            self.held.push_back((index, op.buf));
        }
        Ok(())
    }

    fn commit(&mut self) {
        if !self.held.is_empty() {
            self.issue_held();
        }
        if let Some(pair) = &mut self.pair {
            pair.ring();
        }
    }

    fn poll(&mut self, budget: usize, done: &mut Vec<BlockDone>) -> usize {
        // An idle queue costs a look at whether the controller still has it.
        let is_ready = self.pair.as_ref().is_some_and(IoQueue::is_ready) && !self.seat.has_ticket();
        if is_ready && self.outstanding() == 0 {
            return 0;
        }
        self.poll_pair();
        if self.is_changing() {
            self.change_pair();
        }
        if !self.held.is_empty() {
            self.commit();
        }
        drain(&mut self.ready, budget, done)
    }

    fn outstanding(&self) -> usize {
        self.table.len() - self.free.len() + self.ready.len()
    }

    fn must_poll(&self) -> bool {
        self.outstanding() > 0
    }

    fn arm(&mut self) -> bool {
        if !self.ready.is_empty() || self.is_changing() {
            return false;
        }
        match (&mut self.sleeper, &mut self.pair) {
            (Some(sleeper), Some(pair)) => sleeper.arm(pair),
            _ => self.outstanding() == 0,
        }
    }

    fn disarm(&mut self) {
        if let (Some(_), Some(pair)) = (&self.sleeper, &mut self.pair) {
            pair.disarm();
        }
    }
}

impl fmt::Debug for NvmeQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NvmeQueue")
            .field("device", &self.info.name)
            .field("outstanding", &self.outstanding())
            .field("held", &self.held.len())
            .field("pair", &self.pair)
            .finish_non_exhaustive()
    }
}

/// Opens a queue pair, with an interrupt to sleep on where that is of use.
pub(super) fn open_pair(
    ticket: QueueTicket,
    pool: &BufferPool,
    interrupt: bool,
) -> Result<IoQueue, async_nvme::Error> {
    let ticket = if interrupt { ticket.with_interrupt()? } else { ticket };
    ticket.open(pool)
}

const fn kind_of(kind: BlockOpKind) -> OpKind {
    match kind {
        BlockOpKind::Read => OpKind::Read,
        BlockOpKind::Write { fua } => OpKind::Write { fua },
        BlockOpKind::Flush => OpKind::Flush,
        BlockOpKind::WriteZeroes { deallocate, fua } => OpKind::WriteZeroes { deallocate, fua },
        BlockOpKind::Deallocate => OpKind::Deallocate,
    }
}
