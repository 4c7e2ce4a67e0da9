//! A client of a ring: what it submits comes back to its own inbox.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use hugepage_alloc::DmaBuf;
use rustix::fs::FallocateFlags;

use super::engine::Engine;
use super::handle::FileInner;
use super::sys::Request;
use super::{FileRef, RecvBatch, SendBatch, Socket};
use crate::units::{ByteLen, ByteOffset};

/// There is no room for another operation now: pop completions or take a turn, then try again. Holds what was to
/// be submitted.
#[derive(Debug)]
pub struct Full<T>(pub T);

/// One operation's end.
#[derive(Debug)]
pub struct RingDone {
    /// The token it was submitted with.
    pub token: u64,
    /// Bytes transferred (receive, send, read, write), events (`wait_readable`), or nothing to tell (0).
    pub result: io::Result<u32>,
    /// What it was submitted with, or what it made.
    pub resource: RingResource,
}

/// What an operation gives back.
#[derive(Debug)]
pub enum RingResource {
    /// Of [`RingClient::recv`]; [`RecvBatch::complete`] is not yet called.
    Recv(Box<RecvBatch>),
    /// Of [`RingClient::send`]; [`SendBatch::advance`] is not yet called.
    Send(Box<SendBatch>),
    /// Of [`RingClient::read`] and [`RingClient::write`].
    Buffer(DmaBuf),
    /// Of [`RingClient::accept`], when it succeeded.
    Accepted(OwnedFd),
    /// Of all others.
    None,
}

/// Completions of one client, waiting to be popped.
pub(super) struct Inbox {
    queue: RefCell<VecDeque<RingDone>>,
    capacity: usize,
    in_flight: Cell<usize>,
    alive: Cell<bool>,
}

impl Inbox {
    pub(super) fn has_room(&self) -> bool {
        self.in_flight.get() + self.queue.borrow().len() < self.capacity
    }

    pub(super) fn started(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    /// Takes a completion; drops it when nobody will ask for it.
    pub(super) fn deliver(&self, done: RingDone) {
        self.in_flight.set(self.in_flight.get() - 1);
        if self.alive.get() {
            // Within the capacity reserved at the start: submitting checked for room.
            self.queue.borrow_mut().push_back(done);
        }
    }
}

/// One user of a ring. Every submission takes over what it needs; [`RingClient::pop`] gives it back.
///
/// Dropping a client cancels what it has in flight. What comes back then is dropped when it comes, not before. To
/// have a last message sent, wait for its completion first.
pub struct RingClient {
    engine: Rc<Engine>,
    inbox: Rc<Inbox>,
}

impl RingClient {
    pub(super) fn new(engine: Rc<Engine>, capacity: usize) -> Self {
        let inbox = Inbox {
            queue: RefCell::new(VecDeque::with_capacity(capacity)),
            capacity,
            in_flight: Cell::new(0),
            alive: Cell::new(true),
        };
        Self { engine, inbox: Rc::new(inbox) }
    }

    /// Receives into the batch's direct buffer and `rx`. The result is the byte count; 0 is the end of the stream.
    /// A batch without any room completes with ENOBUFS.
    ///
    /// # Errors
    /// When there is no room for another operation.
    pub fn recv(
        &self,
        token: u64,
        socket: &Socket,
        batch: Box<RecvBatch>,
    ) -> Result<(), Full<Box<RecvBatch>>> {
        match self.start(token, socket.inner(), Request::Recv(batch)) {
            Err(Request::Recv(batch)) => Err(Full(batch)),
            _ => Ok(()),
        }
    }

    /// Sends the whole batch (`sendmsg` with `MSG_NOSIGNAL | MSG_WAITALL`). The result is the byte count, which
    /// is short only when the socket failed or a signal came: [`SendBatch::advance`], and send again.
    ///
    /// # Errors
    /// When there is no room for another operation.
    pub fn send(
        &self,
        token: u64,
        socket: &Socket,
        batch: Box<SendBatch>,
    ) -> Result<(), Full<Box<SendBatch>>> {
        match self.start(token, socket.inner(), Request::Send(batch)) {
            Err(Request::Send(batch)) => Err(Full(batch)),
            _ => Ok(()),
        }
    }

    /// Accepts one connection (close-on-exec).
    ///
    /// # Errors
    /// When there is no room for another operation.
    pub fn accept(&self, token: u64, listener: &Socket) -> Result<(), Full<()>> {
        self.start(token, listener.inner(), Request::Accept).map_err(|_| Full(()))
    }

    /// Waits until `file` is readable: an eventfd, signalfd, timerfd, pipe. The result is the `poll` event mask.
    ///
    /// # Errors
    /// When there is no room for another operation.
    pub fn wait_readable(&self, token: u64, file: &FileRef) -> Result<(), Full<()>> {
        self.start(token, file.inner(), Request::Poll).map_err(|_| Full(()))
    }

    /// Reads `buf.len()` bytes at `offset` of the file. The result may be short.
    ///
    /// # Errors
    /// When there is no room for another operation.
    pub fn read(
        &self,
        token: u64,
        file: &FileRef,
        buf: DmaBuf,
        offset: ByteOffset,
    ) -> Result<(), Full<DmaBuf>> {
        match self.start(token, file.inner(), Request::Read { buf, offset: offset.get() }) {
            Err(Request::Read { buf, .. }) => Err(Full(buf)),
            _ => Ok(()),
        }
    }

    /// Writes `buf` at `offset` of the file; with `dsync` it is durable when complete (`RWF_DSYNC`). The result
    /// may be short.
    ///
    /// # Errors
    /// When there is no room for another operation.
    pub fn write(
        &self,
        token: u64,
        file: &FileRef,
        buf: DmaBuf,
        offset: ByteOffset,
        dsync: bool,
    ) -> Result<(), Full<DmaBuf>> {
        match self.start(token, file.inner(), Request::Write { buf, offset: offset.get(), dsync }) {
            Err(Request::Write { buf, .. }) => Err(Full(buf)),
            _ => Ok(()),
        }
    }

    /// Makes all completed writes durable (`fsync`).
    ///
    /// # Errors
    /// When there is no room for another operation.
    pub fn fsync(&self, token: u64, file: &FileRef) -> Result<(), Full<()>> {
        self.start(token, file.inner(), Request::Fsync).map_err(|_| Full(()))
    }

    /// `fallocate`: zeroes or deallocates a range.
    ///
    /// # Errors
    /// When there is no room for another operation.
    pub fn fallocate(
        &self,
        token: u64,
        file: &FileRef,
        mode: FallocateFlags,
        offset: ByteOffset,
        len: ByteLen,
    ) -> Result<(), Full<()>> {
        let request = Request::Fallocate { mode, offset: offset.get(), len: len.get() };
        self.start(token, file.inner(), request).map_err(|_| Full(()))
    }

    /// Asks the kernel to cancel this client's operations with `token`. Best effort: each still completes, with
    /// ECANCELED or as if nothing had been asked, and gives its resource back. Looks through all slots: not for
    /// the hot path.
    pub fn cancel(&self, token: u64) {
        self.engine.cancel(&self.inbox, Some(token));
    }

    /// As [`RingClient::cancel`], for all operations of this client.
    pub fn cancel_all(&self) {
        self.engine.cancel(&self.inbox, None);
    }

    /// The oldest completion.
    #[must_use]
    pub fn pop(&self) -> Option<RingDone> {
        self.inbox.queue.borrow_mut().pop_front()
    }

    /// Completions that wait to be popped.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.inbox.queue.borrow().len()
    }

    /// Operations submitted and not yet complete.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.inbox.in_flight.get()
    }

    fn start(&self, token: u64, file: &Rc<FileInner>, request: Request) -> Result<(), Request> {
        self.engine.start(&self.inbox, token, file, request)
    }
}

impl Drop for RingClient {
    fn drop(&mut self) {
        self.inbox.alive.set(false);
        // Taken out first: dropping a completion may drop files, which come back to the ring.
        let unread = self.inbox.queue.take();
        drop(unread);
        if self.inbox.in_flight.get() > 0 {
            self.engine.cancel(&self.inbox, None);
        }
    }
}

impl fmt::Debug for RingClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingClient")
            .field("in_flight", &self.in_flight())
            .field("ready", &self.ready())
            .finish_non_exhaustive()
    }
}
