//! One core's queue: each operation is a small state machine over ring operations.
//!
//! ```text
//!   Read, Write   Transfer --short--> Transfer ... --> done
//!   Flush         Sync --> done
//!   WriteZeroes   [Punch --not supported-->] Zero --fua--> Sync --> done
//!   Deallocate    Punch --> done
//! ```

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use hugepage_alloc::DmaBuf;
use rustix::fs::FallocateFlags;

use crate::block::{
    BlockDone, BlockError, BlockErrorKind, BlockOp, BlockOpKind, BlockQueue, DeviceInfo, OpToken, check,
};
use crate::ring::{FileRef, Full, Ring, RingClient, RingDone, RingResource};
use crate::units::{ByteLen, ByteOffset};

/// What the kernel is asked for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Transfer,
    Punch,
    Zero,
    Sync,
}

/// An operation taken over. Its place in the table is the ring token.
struct Pending {
    token: OpToken,
    kind: BlockOpKind,
    offset: ByteOffset,
    len: ByteLen,
    /// The whole buffer, while the ring does not have it.
    buf: Option<DmaBuf>,
    step: Step,
    /// Bytes transferred.
    done_len: usize,
}

pub(super) struct UringQueue {
    info: Arc<DeviceInfo>,
    file: FileRef,
    client: RingClient,
    table: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// Taken over, and refused by the ring for want of room: tried again with each commit and poll.
    waiting: VecDeque<usize>,
    /// Complete without having been to the ring.
    ready: VecDeque<BlockDone>,
    depth: usize,
}

impl UringQueue {
    pub(super) fn new(info: Arc<DeviceInfo>, ring: &Ring, file: FileRef, depth: usize) -> Self {
        Self {
            info,
            file,
            client: ring.client(depth),
            table: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(depth),
            ready: VecDeque::with_capacity(depth),
            depth,
        }
    }

    /// Hands the operation's step to the ring; when that is full, the operation waits.
    fn start(&mut self, index: usize) {
        if !self.try_start(index) {
            self.waiting.push_back(index);
        }
    }

    fn try_start(&mut self, index: usize) -> bool {
        let Self { client, file, table, .. } = self;
        let Some(op) = table.get_mut(index).and_then(Option::as_mut) else { return true };
        let token = index as u64;
        match op.step {
            Step::Transfer => op.start_transfer(client, file, token),
            Step::Punch => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                client.fallocate(token, file, mode, op.offset, op.len).is_ok()
            }
            Step::Zero => {
                let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                client.fallocate(token, file, mode, op.offset, op.len).is_ok()
            }
            Step::Sync => client.fsync(token, file).is_ok(),
        }
    }

    fn start_waiting(&mut self) {
        while let Some(&index) = self.waiting.front()
            && self.try_start(index)
        {
            self.waiting.pop_front();
        }
    }

    /// Takes one ring operation's end: the operation goes on, or is done.
    fn advance(&mut self, ring_done: RingDone) -> Option<BlockDone> {
        let index = usize::try_from(ring_done.token).ok()?;
        let entry = self.table.get_mut(index)?;
        let op = entry.as_mut()?;
        if let RingResource::Buffer(buf) = ring_done.resource {
            // After a continued transfer this is but a part, and the whole is here already.
            op.buf.get_or_insert(buf);
        }
        match op.step(ring_done.result, self.info.logical_block_size.bytes() as usize) {
            None => {
                self.start(index);
                None
            }
            Some(result) => {
                let op = entry.take()?;
                self.free.push(index);
                Some(BlockDone { token: op.token, result, buf: op.buf })
            }
        }
    }
}

impl BlockQueue for UringQueue {
    fn submit(&mut self, op: BlockOp) -> Result<(), BlockOp> {
        if self.outstanding() >= self.depth {
            return Err(op);
        }
        if let Err(kind) = check::check(&self.info, &op) {
            let result = Err(BlockError::new(kind));
            self.ready.push_back(BlockDone { token: op.token, result, buf: op.buf });
            return Ok(());
        }
        let Some(index) = self.free.pop() else { return Err(op) };
        if let Some(entry) = self.table.get_mut(index) {
            *entry = Some(Pending::new(op));
        }
        if self.waiting.is_empty() {
            self.start(index);
        } else {
            self.waiting.push_back(index);
        }
        Ok(())
    }

    /// The ring's next turn submits; here only what found no room before gets another try.
    fn commit(&mut self) {
        self.start_waiting();
    }

    fn poll(&mut self, budget: usize, done: &mut Vec<BlockDone>) -> usize {
        self.start_waiting();
        let room = budget.min(done.capacity() - done.len());
        let mut count = 0;
        while count < room {
            let finished = match self.ready.pop_front() {
                Some(finished) => Some(finished),
                None => match self.client.pop() {
                    Some(ring_done) => self.advance(ring_done),
                    None => break,
                },
            };
            if let Some(finished) = finished {
                done.push(finished);
                count += 1;
            }
        }
        count
    }

    fn outstanding(&self) -> usize {
        self.depth - self.free.len() + self.ready.len()
    }

    fn goes_with_ring(&self) -> bool {
        true
    }

    fn must_poll(&self) -> bool {
        !self.ready.is_empty() || !self.waiting.is_empty() || self.client.ready() > 0
    }
}

impl Pending {
    fn new(op: BlockOp) -> Self {
        let step = match op.kind {
            BlockOpKind::Read | BlockOpKind::Write { .. } => Step::Transfer,
            BlockOpKind::Flush => Step::Sync,
            BlockOpKind::WriteZeroes { deallocate: false, .. } => Step::Zero,
            BlockOpKind::WriteZeroes { deallocate: true, .. } | BlockOpKind::Deallocate => Step::Punch,
        };
        let BlockOp { token, kind, offset, len, buf } = op;
        Self { token, kind, offset, len, buf, step, done_len: 0 }
    }

    /// Reads or writes what is left. The first time the buffer itself moves to the ring and comes back whole.
    fn start_transfer(&mut self, client: &RingClient, file: &FileRef, token: u64) -> bool {
        let Some(whole) = self.buf.take() else { return true };
        let (part, kept) = match self.done_len {
            0 => (whole, None),
            done => (whole.slice(done, whole.len() - done), Some(whole)),
        };
        self.buf = kept;
        // Checked against the device's end: the sum does not wrap.
        let offset = ByteOffset(self.offset.get() + self.done_len as u64);
        let started = match self.kind {
            BlockOpKind::Write { fua } => client.write(token, file, part, offset, fua),
            _ => client.read(token, file, part, offset),
        };
        match started {
            Ok(()) => true,
            Err(Full(part)) => {
                self.buf.get_or_insert(part);
                false
            }
        }
    }

    /// What follows from the end of the present step: the result of the operation, or `None` with the next step
    /// set.
    fn step(&mut self, result: io::Result<u32>, block_bytes: usize) -> Option<Result<(), BlockError>> {
        let count = match result {
            Ok(count) => count as usize,
            Err(error) => return self.failed(error.raw_os_error().unwrap_or(libc::EIO)),
        };
        match (self.step, self.kind) {
            (Step::Transfer, _) => {
                let total = self.buf.as_ref().map_or(0, DmaBuf::len);
                self.done_len += count;
                if self.done_len >= total {
                    return Some(Ok(()));
                }
                // Only whole blocks can be continued with O_DIRECT; a part of one is transferred again.
                let progress = count - count % block_bytes;
                self.done_len -= count - progress;
                if progress > 0 {
                    return None;
                }
                // The device ends earlier than it said.
                let kind =
                    if self.kind.is_write() { BlockErrorKind::WriteFault } else { BlockErrorKind::Media };
                Some(Err(BlockError::new(kind)))
            }
            (Step::Punch | Step::Zero, BlockOpKind::WriteZeroes { fua: true, .. }) => {
                self.step = Step::Sync;
                None
            }
            (Step::Punch | Step::Zero | Step::Sync, _) => Some(Ok(())),
        }
    }

    fn failed(&mut self, errno: i32) -> Option<Result<(), BlockError>> {
        if self.step == Step::Punch && errno == libc::EOPNOTSUPP {
            if self.kind == BlockOpKind::Deallocate {
                return Some(Ok(()));
            }
            self.step = Step::Zero;
            return None;
        }
        Some(Err(BlockError::from_errno(errno, self.kind != BlockOpKind::Read)))
    }
}

#[cfg(test)]
mod tests {
    use hugepage_alloc::{BufferPool, PoolOptions};

    use super::*;

    fn pending(kind: BlockOpKind, len: u32) -> Pending {
        let pool =
            BufferPool::new(&PoolOptions { bytes: 1, prefer_huge: false, lock: false }).expect("2 MiB");
        let buf = pool.alloc(len);
        let (offset, len) = (ByteOffset(8192), ByteLen(len.into()));
        Pending::new(BlockOp { token: OpToken(1), kind, offset, len, buf })
    }

    fn os_error(errno: i32) -> io::Result<u32> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn a_short_transfer_goes_on_with_the_first_unfinished_block() {
        let mut op = pending(BlockOpKind::Read, 4096);
        assert_eq!(op.step(Ok(1000), 512), None);
        assert_eq!(op.done_len, 512, "the half block is read again");
        assert_eq!(op.step(Ok(3072), 512), None);
        assert_eq!(op.step(Ok(512), 512), Some(Ok(())));
    }

    #[test]
    fn a_transfer_without_progress_is_an_error() {
        for (kind, expected) in [
            (BlockOpKind::Read, BlockErrorKind::Media),
            (BlockOpKind::Write { fua: false }, BlockErrorKind::WriteFault),
        ] {
            for count in [0, 511] {
                let mut op = pending(kind, 4096);
                assert_eq!(op.step(Ok(512), 512), None);
                assert_eq!(op.step(Ok(count), 512), Some(Err(BlockError::new(expected))), "{kind:?} {count}");
            }
        }
    }

    #[test]
    fn what_the_device_cannot_punch_is_zeroed_or_left() {
        let mut op = pending(BlockOpKind::WriteZeroes { deallocate: true, fua: true }, 4096);
        assert_eq!(op.step, Step::Punch);
        assert_eq!(op.step(os_error(libc::EOPNOTSUPP), 512), None);
        assert_eq!(op.step, Step::Zero);
        assert_eq!(op.step(Ok(0), 512), None);
        assert_eq!(op.step, Step::Sync, "FUA");
        assert_eq!(op.step(Ok(0), 512), Some(Ok(())));

        let mut op = pending(BlockOpKind::Deallocate, 4096);
        assert_eq!(op.step(os_error(libc::EOPNOTSUPP), 512), Some(Ok(())), "advisory");
        let mut op = pending(BlockOpKind::Deallocate, 4096);
        let error = BlockError::from_errno(libc::EIO, true);
        assert_eq!(op.step(os_error(libc::EIO), 512), Some(Err(error)), "anything else is an error");
        let mut op = pending(BlockOpKind::WriteZeroes { deallocate: false, fua: false }, 4096);
        let error = BlockError::from_errno(libc::EOPNOTSUPP, true);
        assert_eq!(op.step(os_error(libc::EOPNOTSUPP), 512), Some(Err(error)));
    }
}
