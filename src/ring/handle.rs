//! Files and sockets that operations in flight keep open.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};

use rustix::fs::OFlags;

use super::engine::Engine;
use super::sys::now;
use super::{RecvBatch, SendBatch};

/// An open file, and its place in a ring's file table if it has one.
pub(super) struct FileInner {
    fd: OwnedFd,
    registered: Option<(Weak<Engine>, u32)>,
}

impl FileInner {
    pub(super) const fn plain(fd: OwnedFd) -> Self {
        Self { fd, registered: None }
    }

    pub(super) const fn registered(fd: OwnedFd, engine: Weak<Engine>, index: u32) -> Self {
        Self { fd, registered: Some((engine, index)) }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The index in the file table of `engine`; none when registered elsewhere or not at all.
    pub(super) fn index_in(&self, engine: &Engine) -> Option<u32> {
        let (owner, index) = self.registered.as_ref()?;
        std::ptr::eq(owner.as_ptr(), engine).then_some(*index)
    }
}

impl Drop for FileInner {
    fn drop(&mut self) {
        if let Some((engine, index)) = self.registered.take()
            && let Some(engine) = engine.upgrade()
        {
            engine.unregister_fd(index);
        }
    }
}

macro_rules! handle {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone)]
        pub struct $name {
            inner: Rc<FileInner>,
        }

        impl $name {
            pub(super) fn from_inner(inner: FileInner) -> Self {
                Self { inner: Rc::new(inner) }
            }

            pub(super) const fn inner(&self) -> &Rc<FileInner> {
                &self.inner
            }
        }

        impl AsFd for $name {
            fn as_fd(&self) -> BorrowedFd<'_> {
                self.inner.fd()
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_tuple(stringify!($name)).field(&self.inner.fd).finish()
            }
        }
    };
}

handle!(
    /// A stream socket. A handle: the socket closes when the last handle and the last operation on it are gone.
    Socket
);
handle!(
    /// A file, block device, eventfd or the like. A handle: it closes when the last handle and the last operation
    /// on it are gone.
    FileRef
);

impl Socket {
    /// Takes over a stream socket, and makes it blocking: on a non-blocking one, io_uring would fail with EAGAIN
    /// where it should wait.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        make_blocking(&fd);
        Self::from_inner(FileInner::plain(fd))
    }

    /// Sends what the socket takes at once, without the ring: how many bytes of the batch, which is not yet advanced. Not
    /// to be called while the ring has a send on this socket: their bytes would mix.
    ///
    /// # Errors
    /// As `sendmsg(2)` with `MSG_DONTWAIT`: `WouldBlock` when the socket takes nothing now.
    pub fn send_now(&self, batch: &mut SendBatch) -> io::Result<u32> {
        now::send(self.as_fd(), batch)
    }

    /// Receives what is there, without the ring: how many bytes, which are not yet booked ([`RecvBatch::complete`]); 0 is
    /// the end of the stream. Not to be called while the ring has a receive on this socket.
    ///
    /// # Errors
    /// As `recvmsg(2)` with `MSG_DONTWAIT`: `WouldBlock` when nothing is there; ENOBUFS when the batch has no room.
    pub fn recv_now(&self, batch: &mut RecvBatch) -> io::Result<u32> {
        now::recv(self.as_fd(), batch)
    }
}

impl FileRef {
    /// Takes over an open file.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self::from_inner(FileInner::plain(fd))
    }
}

pub(super) fn make_blocking(fd: &OwnedFd) {
    // Neither call fails on an open socket; if they did, the operations would say EAGAIN.
    if let Ok(flags) = rustix::fs::fcntl_getfl(fd)
        && flags.contains(OFlags::NONBLOCK)
    {
        let _ = rustix::fs::fcntl_setfl(fd, flags - OFlags::NONBLOCK);
    }
}
