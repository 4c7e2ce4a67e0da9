//! One system call, no ring: for a socket that is known to be ready, or that is looked at again soon anyway.
//!
//! By `syscall(2)` and not by the functions of the C library, which are cancellation points: with more than one thread each call
//! costs two atomic operations for a cancellation that nobody asks for.
//!
//! The kernel is done with the memory when the call returns; the exclusive borrow of the batch lasts for as long.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr;

use crate::ring::{RecvBatch, SendBatch};

/// Sends what the socket takes at once: how many bytes.
pub(in crate::ring) fn send(socket: BorrowedFd<'_>, batch: &mut SendBatch) -> io::Result<u32> {
    batch.fill_header();
    // SAFETY: the header names the batch's own vector, whose entries lie in its arena and in buffers that it holds: all of
    // it lives, and is not moved, while the batch is borrowed. The kernel only reads.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_sendmsg,
            socket.as_raw_fd(),
            &raw const batch.header,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    u32::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives what is there into the batch's room: how many bytes. 0 is the end of the stream.
pub(in crate::ring) fn recv(socket: BorrowedFd<'_>, batch: &mut RecvBatch) -> io::Result<u32> {
    let count = batch.fill_iovecs();
    let fd = socket.as_raw_fd();
    let received = match count {
        // No bytes asked for would give 0, which says "end of stream".
        0 => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
        1 => {
            let first = batch.iovecs[0];
            // SAFETY: the one entry is the free part of the batch's receive buffer or of the direct buffer that it holds;
            // both live and are nobody else's while the batch is borrowed.
            unsafe {
                libc::syscall(
                    libc::SYS_recvfrom,
                    fd,
                    first.iov_base,
                    first.iov_len,
                    libc::MSG_DONTWAIT,
                    ptr::null_mut::<libc::sockaddr>(),
                    ptr::null_mut::<libc::socklen_t>(),
                )
            }
        }
        _ => {
            batch.header.msg_iov = batch.iovecs.as_mut_ptr();
            batch.header.msg_iovlen = count as _;
            // SAFETY: as above, for both entries; the header names the batch's own vector.
            unsafe { libc::syscall(libc::SYS_recvmsg, fd, &raw mut batch.header, libc::MSG_DONTWAIT) }
        }
    };
    u32::try_from(received).map_err(|_| io::Error::last_os_error())
}
