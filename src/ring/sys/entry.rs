//! What is lent to the kernel for an operation, and the entry that points into it.
//!
//! Nothing here is `unsafe`, but [the loans](super) rely on it: an entry holds addresses of its payload, of the batch that the
//! payload is, or of memory of a kind that lives as long as the ring does, and of nothing else. Batches are raw pointers of
//! `Box::into_raw` from the moment the entry exists, so that no Rust reference or `Box` to them does.

use std::mem::offset_of;
use std::os::fd::RawFd;
use std::ptr;

use hugepage_alloc::{BufferPool, DmaBuf};
use io_uring::types::Fd;
use io_uring::{opcode, squeue};
use rustix::fs::FallocateFlags;

use crate::ring::{RecvBatch, SendBatch};

/// An operation to be started, with what it takes over.
pub(in crate::ring) enum Request {
    Recv(Box<RecvBatch>),
    Send(Box<SendBatch>),
    Accept,
    Poll,
    Read { buf: DmaBuf, offset: u64 },
    Write { buf: DmaBuf, offset: u64, dsync: bool },
    Fsync,
    Fallocate { mode: FallocateFlags, offset: u64, len: u64 },
}

/// What the kernel may touch while the operation is in flight. Leaks when dropped, but for the buffer.
pub(super) enum Payload {
    Recv(*mut RecvBatch),
    Send(*mut SendBatch),
    Buffer(DmaBuf),
    Accept,
    None,
}

/// Do not try at once, arm the poll first (`include/uapi/linux/io_uring.h`).
const RECVSEND_POLL_FIRST: u16 = 1;

impl Request {
    /// Turns it into what is lent and the entry that points into that. `file` is a descriptor, or an index of the file table
    /// for entries that will be flagged so. Buffers of `pool` are registered with the ring.
    pub(super) fn prepare(self, file: RawFd, pool: Option<&BufferPool>) -> (Payload, squeue::Entry) {
        let fd = Fd(file);
        let is_registered = |buf: &DmaBuf| pool.is_some_and(|pool| buf.is_of(pool));
        match self {
            Self::Recv(batch) => prepare_recv(batch, fd),
            Self::Send(batch) => prepare_send(batch, fd),
            Self::Accept => {
                let entry = opcode::Accept::new(fd, ptr::null_mut(), ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build();
                (Payload::Accept, entry)
            }
            Self::Poll => (Payload::None, opcode::PollAdd::new(fd, libc::POLLIN as u32).build()),
            Self::Read { buf, offset } => {
                let (start, len) = (buf.as_ptr(), io_len(&buf));
                let entry = if is_registered(&buf) {
                    opcode::ReadFixed::new(fd, start, len, buf.region_index()).offset(offset).build()
                } else {
                    opcode::Read::new(fd, start, len).offset(offset).build()
                };
                (Payload::Buffer(buf), entry)
            }
            Self::Write { buf, offset, dsync } => {
                let (start, len) = (buf.as_ptr().cast_const(), io_len(&buf));
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                let entry = if is_registered(&buf) {
                    let write = opcode::WriteFixed::new(fd, start, len, buf.region_index());
                    write.offset(offset).rw_flags(flags).build()
                } else {
                    opcode::Write::new(fd, start, len).offset(offset).rw_flags(flags).build()
                };
                (Payload::Buffer(buf), entry)
            }
            Self::Fsync => (Payload::None, opcode::Fsync::new(fd).build()),
            Self::Fallocate { mode, offset, len } => {
                let mode = mode.bits().cast_signed();
                (Payload::None, opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build())
            }
        }
    }
}

/// Buffers end at 2 MiB.
fn io_len(buf: &DmaBuf) -> u32 {
    u32::try_from(buf.len()).unwrap_or(0)
}

fn prepare_recv(mut batch: Box<RecvBatch>, fd: Fd) -> (Payload, squeue::Entry) {
    let count = batch.fill_iovecs();
    batch.header.msg_iov = batch.iovecs.as_mut_ptr();
    batch.header.msg_iovlen = count as _;
    let first = batch.iovecs[0];
    let ioprio = if batch.poll_first { RECVSEND_POLL_FIRST } else { 0 };
    let batch = Box::into_raw(batch);
    let entry = if count == 1 {
        let len = u32::try_from(first.iov_len).unwrap_or(u32::MAX);
        opcode::Recv::new(fd, first.iov_base.cast(), len).ioprio(ioprio).build()
    } else {
        let header = batch.wrapping_byte_add(offset_of!(RecvBatch, header)).cast();
        opcode::RecvMsg::new(fd, header).ioprio(ioprio).build()
    };
    (Payload::Recv(batch), entry)
}

fn prepare_send(mut batch: Box<SendBatch>, fd: Fd) -> (Payload, squeue::Entry) {
    batch.fill_header();
    let batch = Box::into_raw(batch);
    let header = batch.wrapping_byte_add(offset_of!(SendBatch, header)).cast_const().cast();
    let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL).cast_unsigned();
    (Payload::Send(batch), opcode::SendMsg::new(fd, header).flags(flags).build())
}
