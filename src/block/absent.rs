//! A device that is not there: for a namespace that hosts are shown, and whose file cannot be served.
//!
//! It has nothing to read or write, no descriptor and no address. A command that reaches it, past the fence that stands before
//! it, fails.

use std::collections::VecDeque;
use std::sync::Arc;

use hugepage_alloc::{BUFFER_LEN_MAX, BufferPool};

use super::{
    BlockDevice, BlockDone, BlockError, BlockErrorKind, BlockOp, BlockQueue, DeviceInfo, OpenError, check,
    drain,
};
use crate::ring::Ring;
use crate::units::{BlockSize, ByteLen};

/// A device of which no more is known than its size.
#[derive(Debug)]
pub struct AbsentDevice {
    info: Arc<DeviceInfo>,
}

impl AbsentDevice {
    /// In place of one of `len` bytes.
    ///
    /// # Errors
    /// When `len` is no positive multiple of the block size.
    pub fn new(len: ByteLen, block_size: BlockSize) -> Result<Self, OpenError> {
        check::check_size(len, block_size)?;
        let info = DeviceInfo {
            name: "absent".to_owned(),
            dev: None,
            logical_block_size: block_size,
            physical_block_bytes: block_size.bytes(),
            len,
            // Nobody knows, and hosts that believe in none would not flush.
            volatile_write_cache: true,
            write_zeroes: false,
            deallocate: false,
            transfer_len_max: ByteLen(BUFFER_LEN_MAX as u64),
            read_only: false,
        };
        Ok(Self { info: Arc::new(info) })
    }
}

impl BlockDevice for AbsentDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(&self, _: &Ring, _: &BufferPool, depth: usize) -> Result<Box<dyn BlockQueue>, BlockError> {
        Ok(Box::new(AbsentQueue { failed: VecDeque::with_capacity(depth), depth }))
    }
}

struct AbsentQueue {
    failed: VecDeque<BlockDone>,
    depth: usize,
}

impl BlockQueue for AbsentQueue {
    fn submit(&mut self, op: BlockOp) -> Result<(), BlockOp> {
        if self.failed.len() >= self.depth {
            return Err(op);
        }
        let result = Err(BlockError::new(BlockErrorKind::Gone));
        self.failed.push_back(BlockDone { token: op.token, result, buf: op.buf });
        Ok(())
    }

    fn commit(&mut self) {}

    fn poll(&mut self, budget: usize, done: &mut Vec<BlockDone>) -> usize {
        drain(&mut self.failed, budget, done)
    }

    fn outstanding(&self) -> usize {
        self.failed.len()
    }

    fn must_poll(&self) -> bool {
        !self.failed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockOpKind, OpToken};
    use crate::units::ByteOffset;

    #[test]
    fn whatever_reaches_it_fails() {
        let mut queue = AbsentQueue { failed: VecDeque::new(), depth: 2 };
        for token in 0..2 {
            let kind = BlockOpKind::WriteZeroes { deallocate: false, fua: false };
            let op =
                BlockOp { token: OpToken(token), kind, offset: ByteOffset(0), len: ByteLen(4096), buf: None };
            queue.submit(op).expect("room");
        }
        let flush = BlockOp {
            token: OpToken(9),
            kind: BlockOpKind::Flush,
            offset: ByteOffset(0),
            len: ByteLen(0),
            buf: None,
        };
        assert!(queue.submit(flush).is_err(), "full");
        let mut done = Vec::with_capacity(8);
        assert_eq!(queue.poll(8, &mut done), 2);
        assert!(
            done.iter()
                .all(|done| done.result.as_ref().is_err_and(|error| error.kind == BlockErrorKind::Gone))
        );
        assert_eq!(queue.outstanding(), 0);
    }
}
