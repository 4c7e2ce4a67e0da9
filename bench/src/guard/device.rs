//! A device whose operations are done at once, and found complete later, as those of a real one are; and which touches no data: valgrind
//! counts a string instruction once a byte.

use std::collections::VecDeque;

use fastice::block::{BlockDevice, BlockDone, BlockError, BlockOp, BlockQueue, DeviceInfo};
use fastice::ring::Ring;
use fastice::units::{BlockSize, ByteLen};
use hugepage_alloc::{BUFFER_LEN_MAX, BufferPool};

/// It gives back the buffers of reads as they are. Hosts of another process must never see it.
#[derive(Debug)]
pub(super) struct DoneAtOnce(DeviceInfo);

impl DoneAtOnce {
    pub(super) fn new(len: ByteLen) -> Self {
        Self(DeviceInfo {
            name: "done-at-once".to_owned(),
            dev: None,
            logical_block_size: BlockSize::B4096,
            physical_block_bytes: BlockSize::B4096.bytes(),
            len,
            volatile_write_cache: false,
            write_zeroes: false,
            deallocate: false,
            transfer_len_max: ByteLen(BUFFER_LEN_MAX as u64),
            read_only: false,
        })
    }
}

impl BlockDevice for DoneAtOnce {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn open_queue(&self, _: &Ring, _: &BufferPool, depth: usize) -> Result<Box<dyn BlockQueue>, BlockError> {
        Ok(Box::new(Queue { done: VecDeque::with_capacity(depth), depth }))
    }
}

struct Queue {
    done: VecDeque<BlockDone>,
    depth: usize,
}

impl BlockQueue for Queue {
    fn submit(&mut self, op: BlockOp) -> Result<(), BlockOp> {
        if self.done.len() >= self.depth {
            return Err(op);
        }
        self.done.push_back(BlockDone { token: op.token, result: Ok(()), buf: op.buf });
        Ok(())
    }

    fn commit(&mut self) {}

    fn poll(&mut self, budget: usize, done: &mut Vec<BlockDone>) -> usize {
        let count = budget.min(done.capacity() - done.len()).min(self.done.len());
        done.extend(self.done.drain(..count));
        count
    }

    fn outstanding(&self) -> usize {
        self.done.len()
    }

    fn must_poll(&self) -> bool {
        !self.done.is_empty()
    }
}
