//! Block devices behind one trait, for a poll loop a core.
//!
//! ```text
//!   BlockDevice (Send + Sync, one a device)     info(), open_queue() on each core
//!      |
//!   BlockQueue (one a core and device, !Send)   submit(op) ... commit()      poll() -> BlockDone
//!      |
//!   nvme: our driver     uring: the kernel's block device, O_DIRECT     mem: memory, for benches     null: nothing
//!   absent: none, in place of one that cannot be had
//! ```
//!
//! A queue owns an operation's buffer from `submit` until it gives it back in a [`BlockDone`], whatever happens.
//! Every operation accepted by `submit` completes exactly once. Offsets count from the start of the whole device;
//! an operation that leaves the device, is not aligned to its logical blocks, or writes to a read-only device is
//! refused before it reaches the device.
//!
//! What it does not do: know files, extents or namespaces; retry; order operations among each other (as on any
//! NVMe queue, an operation that must come after another is submitted when that one is complete).

mod absent;
mod check;
mod error;
mod mem;
mod null;
pub mod nvme;
mod uring;

use std::collections::VecDeque;

use hugepage_alloc::{BufferPool, DmaBuf};

pub use absent::AbsentDevice;
pub use error::{BlockError, BlockErrorCause, BlockErrorKind, OpenError};
pub use mem::{FaultOn, MemDevice, MemFault, MemOptions};
pub use null::NullDevice;
pub use uring::{UringDevice, UringOptions};

use crate::ring::Ring;
use crate::units::{BlockSize, ByteLen, ByteOffset};

/// The name that its submitter gave an operation. Any value; the queue does not look at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OpToken(pub u64);

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockOpKind {
    /// Fill the buffer from the device.
    Read,
    /// Write the buffer to the device; with `fua` it is durable when complete.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Make durable whatever was complete when this was submitted. Offset and length are ignored.
    Flush,
    /// Make a range read as zeros.
    WriteZeroes {
        /// Whether the device may give the blocks up in doing so. They read as zeros either way.
        deallocate: bool,
        /// Force unit access.
        fua: bool,
    },
    /// Tell the device that the contents of a range are no longer needed. Advisory: a device that cannot
    /// deallocate succeeds and does nothing (as Dataset Management may, NVM Command Set specification).
    Deallocate,
}

impl BlockOpKind {
    /// Whether it changes what the device holds.
    #[must_use]
    pub const fn is_write(self) -> bool {
        matches!(self, Self::Write { .. } | Self::WriteZeroes { .. } | Self::Deallocate)
    }
}

/// One operation.
#[derive(Debug)]
pub struct BlockOp {
    /// Comes back in [`BlockDone`].
    pub token: OpToken,
    /// What to do.
    pub kind: BlockOpKind,
    /// Where, from the start of the whole device; a multiple of the logical block size.
    pub offset: ByteOffset,
    /// How much; a multiple of the logical block size. Above 0, but for Flush.
    pub len: ByteLen,
    /// For Read and Write: exactly `len` bytes. Others do not use it, but give it back.
    pub buf: Option<DmaBuf>,
}

/// One operation's end.
#[derive(Debug)]
pub struct BlockDone {
    /// From [`BlockOp`].
    pub token: OpToken,
    /// How it ended. After an error, the bytes of a write may or may not have reached the device, and the buffer
    /// of a read holds no meaningful data.
    pub result: Result<(), BlockError>,
    /// The buffer of the operation. After a read of a buffer that the operation held [alone](DmaBuf::is_sole) it may be another
    /// one of the same length, which holds what was read and which others read too: nobody writes to it.
    pub buf: Option<DmaBuf>,
}

/// What a device is.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// What to call it in messages, such as `/dev/nvme0n1` or `mem`.
    pub name: String,
    /// Its number, major and minor, when the kernel knows it.
    pub dev: Option<(u32, u32)>,
    /// The unit of addressing.
    pub logical_block_size: BlockSize,
    /// The unit the device writes without reading first, in bytes; never below the logical block size.
    pub physical_block_bytes: u32,
    /// The size of the device.
    pub len: ByteLen,
    /// Whether a completed write may be lost on power failure unless flushed.
    pub volatile_write_cache: bool,
    /// Whether Write Zeroes works.
    pub write_zeroes: bool,
    /// Whether Deallocate does something.
    pub deallocate: bool,
    /// The largest Read or Write.
    pub transfer_len_max: ByteLen,
    /// Whether it refuses whatever changes it.
    pub read_only: bool,
}

/// A device, shared by all cores.
pub trait BlockDevice: Send + Sync {
    /// What the device is. Does not change.
    fn info(&self) -> &DeviceInfo;

    /// A queue for the calling thread, for at most `depth` operations at a time. `ring` and `pool` are those of
    /// the thread; a device may use them or not.
    ///
    /// # Errors
    /// When the device cannot make a queue.
    fn open_queue(
        &self,
        ring: &Ring,
        pool: &BufferPool,
        depth: usize,
    ) -> Result<Box<dyn BlockQueue>, BlockError>;
}

/// One core's way to a device. Not `Send`.
pub trait BlockQueue {
    /// Takes an operation over. One that the device would never accept also is taken, and completes with an error.
    ///
    /// # Errors
    /// Gives the operation back when the queue is full: poll, then try again.
    fn submit(&mut self, op: BlockOp) -> Result<(), BlockOp>;

    /// Whether operations of this device take no time but the processor's, so that [`BlockQueue::execute`] does them.
    fn is_immediate(&self) -> bool {
        false
    }

    /// Does an operation at once, for who has nothing to gain from asking again for its end: as [`BlockQueue::submit`] and
    /// [`BlockQueue::poll`] together, without a token. Its buffer may be another one afterwards, as in [`BlockDone`].
    ///
    /// # Errors
    /// As in [`BlockDone::result`]; and always, where the device is not [immediate](BlockQueue::is_immediate).
    fn execute(&mut self, op: &mut BlockOp) -> Result<(), BlockError> {
        let _ = op;
        Err(BlockError::new(BlockErrorKind::Internal))
    }

    /// A buffer that holds what this device reads everywhere, where there is such a thing: a read of no more bytes may have its first
    /// ones for a buffer, and others have them too. Nobody writes to it.
    fn lends(&self) -> Option<DmaBuf> {
        None
    }

    /// Makes what was submitted known to the device: once after a batch.
    fn commit(&mut self);

    /// Moves at most `budget` completions to `done`, and never more than `done` has spare capacity for. Returns
    /// how many.
    fn poll(&mut self, budget: usize, done: &mut Vec<BlockDone>) -> usize;

    /// Operations taken over and not yet given back by `poll`.
    fn outstanding(&self) -> usize;

    /// Whether the device is told by [`Ring::turn`], and not by [`BlockQueue::commit`].
    fn goes_with_ring(&self) -> bool {
        false
    }

    /// Whether completions come only by polling: then the caller must not sleep in [`Ring::turn`] now, unless
    /// [`BlockQueue::arm`] says that it may.
    fn must_poll(&self) -> bool;

    /// Gets ready for the caller to sleep in [`Ring::turn`] while operations are under way: their end will end the
    /// turn. False when it will not, or when there is something to poll for already.
    fn arm(&mut self) -> bool {
        !self.must_poll()
    }

    /// The caller is awake, and polls again.
    fn disarm(&mut self) {}
}

/// Moves from `ready` what budget and spare capacity allow; returns how many.
fn drain(ready: &mut VecDeque<BlockDone>, budget: usize, done: &mut Vec<BlockDone>) -> usize {
    let count = budget.min(done.capacity() - done.len()).min(ready.len());
    done.extend(ready.drain(..count));
    count
}
