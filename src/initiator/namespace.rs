//! Blocks of a namespace, read and written by LBA from one thread at a time.
//!
//! Long transfers are split to what a command may carry, and as many commands as the queue holds run at once. For
//! speed with small blocks see [`super::bench`].

use super::command::{self, Transfer};
use super::controller::Controller;
use super::error::InitiatorError;
use super::transport::{Deadline, Done, Queue};
use crate::units::{BlockCount, BlockSize, ByteLen, Lba};
use nvme_spec::identify::IdentifyNamespace;
use nvme_spec::nvm::{DatasetManagementRange, dsm};
use nvme_spec::{Nsid, NvmOpcode, SubmissionQueueEntry};
use std::time::Duration;
use zerocopy::IntoBytes;

/// Commands of one transfer in flight: enough to keep a path busy, and not a buffer for each slot of the queue.
const IN_FLIGHT_MAX: usize = 16;

/// A namespace of a connected controller.
pub struct Namespace<'a> {
    controller: &'a Controller,
    nsid: Nsid,
    identity: Box<IdentifyNamespace>,
    block_size: BlockSize,
}

/// A run of whole blocks that one command moves: where its bytes are in the caller's buffer.
#[derive(Clone, Copy)]
struct Piece {
    start: usize,
    len: usize,
}

impl<'a> Namespace<'a> {
    pub(super) fn new(controller: &'a Controller, nsid: Nsid) -> Result<Self, InitiatorError> {
        let identity = controller.identify_namespace(nsid)?;
        // Identify of a namespace that is valid but not active gives zeros (NVM Express Base Specification 2.1, 5.1.13).
        if identity.nsze.get() == 0 {
            return Err(InitiatorError::invalid(format!("there is no namespace {}", nsid.0)));
        }
        let block_size = block_size_of(&identity)?;
        Ok(Self { controller, nsid, identity, block_size })
    }

    /// NSID.
    #[must_use]
    pub const fn nsid(&self) -> Nsid {
        self.nsid
    }

    /// Identify Namespace as it was when this was made.
    #[must_use]
    pub fn identify(&self) -> &IdentifyNamespace {
        &self.identity
    }

    /// The size of a logical block.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// NSZE.
    #[must_use]
    pub fn blocks(&self) -> BlockCount {
        BlockCount(self.identity.nsze.get())
    }

    /// Reads whole blocks from `lba` on into `data`.
    ///
    /// # Errors
    /// A command fails or the queue dies; [`super::error::ErrorKind::InvalidArgument`] when `data` is not of whole blocks.
    pub fn read(&self, lba: Lba, data: &mut [u8]) -> Result<(), InitiatorError> {
        let total = data.len();
        self.run(
            "Read",
            NvmOpcode::READ,
            lba,
            total,
            false,
            |piece, queue, done| {
                data[piece.start..piece.start + piece.len]
                    .copy_from_slice(&queue.buffer(done.slot)[..piece.len]);
            },
            |_, _| {},
        )
    }

    /// Writes whole blocks from `lba` on; with `fua`, to the medium before the command completes.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, lba: Lba, data: &[u8], fua: bool) -> Result<(), InitiatorError> {
        self.run(
            "Write",
            NvmOpcode::WRITE,
            lba,
            data.len(),
            fua,
            |_, _, _| {},
            |piece, buffer| {
                buffer.copy_from_slice(&data[piece.start..piece.start + piece.len]);
            },
        )
    }

    /// Flush: what was written and completed is on the medium afterwards.
    ///
    /// # Errors
    /// The command fails or the queue dies.
    pub fn flush(&self) -> Result<(), InitiatorError> {
        self.simple("Flush", &command::command(NvmOpcode::FLUSH.0, self.nsid), &[])
    }

    /// Writes zeroes over `blocks` blocks, in commands of at most 65536 blocks or the controller's limit.
    ///
    /// # Errors
    /// A command fails or the queue dies.
    pub fn write_zeroes(&self, lba: Lba, blocks: BlockCount) -> Result<(), InitiatorError> {
        let mut at = lba;
        let mut left = blocks.get();
        while left > 0 {
            let count = left.min(1 << 16);
            let nlb_z = u16::try_from(count - 1).unwrap_or(u16::MAX);
            let sqe = command::io(NvmOpcode::WRITE_ZEROES, self.nsid, at, nlb_z, false);
            self.simple("Write Zeroes", &sqe, &[])?;
            left -= count;
            at = at.checked_add(count).ok_or_else(|| InitiatorError::invalid("blocks beyond 64 bits"))?;
        }
        Ok(())
    }

    /// Tells the controller that `blocks` blocks are no longer needed (Dataset Management, attribute Deallocate).
    ///
    /// # Errors
    /// The command fails or the queue dies; more than 256 ranges of 2^32 - 1 blocks are an invalid argument.
    pub fn deallocate(&self, lba: Lba, blocks: BlockCount) -> Result<(), InitiatorError> {
        let mut ranges = Vec::new();
        let mut at = lba.get();
        let mut left = blocks.get();
        while left > 0 {
            let length = u32::try_from(left).unwrap_or(u32::MAX);
            ranges.push(DatasetManagementRange {
                context_attributes: 0.into(),
                length: length.into(),
                slba: at.into(),
            });
            left -= u64::from(length);
            at = at.saturating_add(length.into());
        }
        let count = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
        if count == 0 || ranges.len() > dsm::RANGES_MAX {
            return Err(InitiatorError::invalid(format!("cannot deallocate {blocks} blocks at once")));
        }
        let sqe = SubmissionQueueEntry {
            cdw10: (count - 1).into(),
            cdw11: dsm::AD.into(),
            ..command::command(NvmOpcode::DATASET_MANAGEMENT.0, self.nsid)
        };
        self.simple("Dataset Management", &sqe, ranges.as_bytes())
    }

    /// One command that must succeed.
    fn simple(&self, what: &str, sqe: &SubmissionQueueEntry, data: &[u8]) -> Result<(), InitiatorError> {
        self.controller.with_any_io_queue(|queue| {
            let slot = queue.reserve().ok_or_else(|| InitiatorError::invalid("the queue is in use"))?;
            let transfer = super::controller::transfer_of(data, &[])?;
            queue.buffer_mut(slot, data.len()).copy_from_slice(data);
            queue.submit(slot, sqe, transfer, Deadline::Default);
            let done = queue.finish(slot, |_, _| {})?;
            queue.release(slot);
            done.check(what).map(drop)
        })
    }

    /// Moves `total` bytes by commands of `opcode`: `fill` puts data into a slot before, `took` takes it after.
    #[expect(clippy::too_many_arguments, reason = "what Read and Write share, nothing else calls it")]
    fn run(
        &self,
        what: &str,
        opcode: NvmOpcode,
        lba: Lba,
        total: usize,
        fua: bool,
        mut took: impl FnMut(Piece, &Queue, &Done),
        mut fill: impl FnMut(Piece, &mut [u8]),
    ) -> Result<(), InitiatorError> {
        if self.block_size.blocks_in(ByteLen(total as u64)).is_none() {
            return Err(InitiatorError::invalid(format!("{total} bytes are no multiple of the block size")));
        }
        let block = self.block_size.bytes() as usize;
        let piece_len_max = ((self.controller.transfer_len_max() as usize / block).clamp(1, 1 << 16)) * block;
        self.controller.with_any_io_queue(|queue| {
            let mut pieces = vec![Piece { start: 0, len: 0 }; queue.depth()];
            let mut at = 0;
            let mut failed = None;
            loop {
                while at < total && failed.is_none() && queue.in_flight() < IN_FLIGHT_MAX {
                    let Some(slot) = queue.reserve() else { break };
                    let piece = Piece { start: at, len: piece_len_max.min(total - at) };
                    pieces[slot.index()] = piece;
                    let nlb_z = u16::try_from(piece.len / block - 1).unwrap_or(u16::MAX);
                    let piece_lba = Lba(lba.get().wrapping_add((at / block) as u64));
                    let len = u32::try_from(piece.len).unwrap_or(u32::MAX);
                    let transfer = if opcode == NvmOpcode::READ {
                        Transfer::ToHost(len)
                    } else {
                        fill(piece, queue.buffer_mut(slot, piece.len));
                        Transfer::ToController(len)
                    };
                    queue.submit(
                        slot,
                        &command::io(opcode, self.nsid, piece_lba, nlb_z, fua),
                        transfer,
                        Deadline::Default,
                    );
                    at += piece.len;
                }
                if queue.in_flight() == 0 {
                    break;
                }
                queue.poll(Duration::from_millis(100))?;
                while let Some(done) = queue.pop_done() {
                    match done.check(what) {
                        Ok(_) => took(pieces[done.slot.index()], queue, &done),
                        Err(error) => failed = failed.or(Some(error)),
                    }
                    queue.release(done.slot);
                }
            }
            failed.map_or(Ok(()), Err)
        })
    }
}

/// The block size of the format in use.
pub(super) fn block_size_of(identity: &IdentifyNamespace) -> Result<BlockSize, InitiatorError> {
    let index = usize::from(identity.flbas & 0xF | (identity.flbas >> 1 & 0x30));
    let format = identity.lbaf.get(index).copied().unwrap_or_default();
    if format.ms.get() != 0 {
        return Err(InitiatorError::incompatible("the namespace has metadata, which this host cannot do"));
    }
    1u32.checked_shl(format.lbads.into())
        .and_then(BlockSize::new)
        .ok_or_else(|| InitiatorError::incompatible(format!("blocks of 2^{} bytes", format.lbads)))
}
