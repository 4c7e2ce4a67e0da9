//! A device that stores nothing, for benches: what is left is the cost of everything else.

use std::collections::VecDeque;
use std::sync::Arc;

use hugepage_alloc::{BUFFER_LEN_MAX, BufferPool, DmaBuf};

use super::{
    BlockDevice, BlockDone, BlockError, BlockOp, BlockOpKind, BlockQueue, DeviceInfo, OpenError, check, drain,
};
use crate::ring::Ring;
use crate::units::{BlockSize, ByteLen};

/// What reads are lent at most: short ones. Of longer ones the pool sets a bound to what a core does in a turn for all who ask.
const LENT_LEN_MAX: usize = 8 << 10;

/// A device that forgets every write and reads as zeros. What lies in the buffer of a read is another host's data: it is
/// exchanged for a part of the pool's [zeroes](BufferPool::zeroes), or zeroed where these are shorter or others hold it too. Short reads
/// are lent such a part from the start, and nobody's buffer is exchanged.
#[derive(Debug)]
pub struct NullDevice {
    info: Arc<DeviceInfo>,
}

impl NullDevice {
    /// A null device of `len` bytes.
    ///
    /// # Errors
    /// When `len` is no positive multiple of the block size.
    pub fn new(len: ByteLen, block_size: BlockSize) -> Result<Self, OpenError> {
        check::check_size(len, block_size)?;
        let info = DeviceInfo {
            name: "null".to_owned(),
            dev: None,
            logical_block_size: block_size,
            physical_block_bytes: block_size.bytes(),
            len,
            volatile_write_cache: false,
            write_zeroes: true,
            deallocate: true,
            transfer_len_max: ByteLen(BUFFER_LEN_MAX as u64),
            read_only: false,
        };
        Ok(Self { info: Arc::new(info) })
    }
}

impl BlockDevice for NullDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(
        &self,
        _: &Ring,
        pool: &BufferPool,
        depth: usize,
    ) -> Result<Box<dyn BlockQueue>, BlockError> {
        let (info, zeroes) = (Arc::clone(&self.info), pool.zeroes());
        Ok(Box::new(NullQueue { info, zeroes, ready: VecDeque::with_capacity(depth), depth }))
    }
}

struct NullQueue {
    info: Arc<DeviceInfo>,
    zeroes: Option<DmaBuf>,
    ready: VecDeque<BlockDone>,
    depth: usize,
}

impl BlockQueue for NullQueue {
    fn submit(&mut self, mut op: BlockOp) -> Result<(), BlockOp> {
        if self.ready.len() >= self.depth {
            return Err(op);
        }
        let result = self.execute(&mut op);
        self.ready.push_back(BlockDone { token: op.token, result, buf: op.buf });
        Ok(())
    }

    fn is_immediate(&self) -> bool {
        true
    }

    fn execute(&mut self, op: &mut BlockOp) -> Result<(), BlockError> {
        if op.kind == BlockOpKind::Read
            && let Some(buf) = &mut op.buf
        {
            match &self.zeroes {
                Some(zeroes) if buf.is_of_same_buffer(zeroes) => {}
                // Who holds another part of the buffer looks there, not at what comes back.
                Some(zeroes) if buf.is_sole() && buf.len() <= zeroes.len() => {
                    *buf = zeroes.slice(0, buf.len());
                }
                _ => buf.zero(),
            }
        }
        check::check(&self.info, op).map_err(BlockError::new)
    }

    fn lends(&self) -> Option<DmaBuf> {
        self.zeroes.as_ref().map(|zeroes| zeroes.slice(0, zeroes.len().min(LENT_LEN_MAX)))
    }

    fn commit(&mut self) {}

    fn poll(&mut self, budget: usize, done: &mut Vec<BlockDone>) -> usize {
        drain(&mut self.ready, budget, done)
    }

    fn outstanding(&self) -> usize {
        self.ready.len()
    }

    fn must_poll(&self) -> bool {
        !self.ready.is_empty()
    }
}
