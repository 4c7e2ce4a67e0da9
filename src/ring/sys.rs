//! The engine: slot table, submission and completion. All `unsafe` of the ring is here.
//!
//! The invariant that makes it sound: a submission queue entry points only into memory that its slot owns, a slot
//! is filled before its entry is pushed, and it is emptied only by the completion that carries its index and
//! generation (each operation here has exactly one completion). Batches in a slot are raw pointers from
//! `Box::leak`, so that no Rust reference or `Box` to them exists while the kernel uses them.
#![expect(unsafe_code, reason = "hands memory to the kernel and takes it back")]

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::time::{Duration, Instant};

use hugepage_alloc::{BufferPool, DmaBuf};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue};
use rustix::fs::FallocateFlags;

use super::client::{Inbox, RingDone, RingResource};
use super::handle::FileInner;
use super::{RecvBatch, RingError, RingOptions, SendBatch, Wait, setup};

/// `user_data` of cancellations, whose own completions tell nothing. No slot has this index.
const CANCEL_DATA: u64 = u64::MAX;
/// Completions taken from the queue at a time, before they are delivered.
const HARVEST_LEN: usize = 64;
/// How long a dying ring waits between two looks at the clock.
const DROP_WAIT_STEP: Duration = Duration::from_millis(100);

pub(super) const IOVEC_NONE: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };

pub(super) const fn empty_msghdr() -> libc::msghdr {
    // SAFETY: a plain C struct of integers and pointers; all zero is "no name, no parts, no control data".
    unsafe { mem::zeroed() }
}

/// An operation to be started, with what it takes over.
pub(super) enum Request {
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
enum Payload {
    Recv(NonNull<RecvBatch>),
    Send(NonNull<SendBatch>),
    Buffer(DmaBuf),
    Accept,
    None,
}

struct InFlight {
    inbox: Rc<Inbox>,
    token: u64,
    file: Rc<FileInner>,
    payload: Payload,
}

struct Slot {
    generation: u32,
    op: Option<InFlight>,
}

struct Slots {
    entries: Vec<Slot>,
    free: Vec<u32>,
}

pub(super) struct Engine {
    uring: RefCell<IoUring>,
    slots: RefCell<Slots>,
    in_flight: Cell<usize>,
    /// Kept mapped while it is registered.
    pool: OnceCell<BufferPool>,
    files_free: RefCell<Vec<u32>>,
    notices: RefCell<Vec<String>>,
    drop_wait: Duration,
}

impl Engine {
    pub(super) fn new(options: &RingOptions) -> Result<Self, RingError> {
        let setup::Made { uring, files, notices } = setup::make(options)?;
        let slots = Slots {
            entries: (0..options.slots).map(|_| Slot { generation: 0, op: None }).collect(),
            free: (0..options.slots).rev().collect(),
        };
        Ok(Self {
            uring: RefCell::new(uring),
            slots: RefCell::new(slots),
            in_flight: Cell::new(0),
            pool: OnceCell::new(),
            files_free: RefCell::new((0..files).rev().collect()),
            notices: RefCell::new(notices),
            drop_wait: options.drop_wait,
        })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    pub(super) fn notices(&self) -> Vec<String> {
        self.notices.borrow().clone()
    }

    pub(super) fn register_pool(&self, pool: &BufferPool) -> Result<(), RingError> {
        if self.pool.get().is_some() {
            return Err(RingError::PoolRegistered);
        }
        let iovecs: Vec<libc::iovec> = pool
            .regions()
            .map(|(base, len)| libc::iovec { iov_base: base.cast_mut().cast(), iov_len: len })
            .collect();
        // SAFETY: the regions stay mapped while the pool lives, and `self.pool` keeps it until the ring is closed.
        match unsafe { self.uring.borrow().submitter().register_buffers(&iovecs) } {
            Ok(()) => {
                let _ = self.pool.set(pool.clone());
            }
            Err(error) => self.notices.borrow_mut().push(format!(
                "the buffer pool cannot be registered with io_uring ({error}): each transfer costs more; raise \
                 RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=infinity)"
            )),
        }
        Ok(())
    }

    pub(super) fn register_fd(&self, this: &Rc<Self>, fd: OwnedFd) -> FileInner {
        let Some(index) = self.files_free.borrow_mut().pop() else { return FileInner::plain(fd) };
        match self.uring.borrow().submitter().register_files_update(index, &[fd.as_raw_fd()]) {
            Ok(1) => FileInner::registered(fd, Rc::downgrade(this), index),
            _ => {
                self.files_free.borrow_mut().push(index);
                FileInner::plain(fd)
            }
        }
    }

    pub(super) fn unregister_fd(&self, index: u32) {
        // An entry that cannot be emptied is not used again; closing the ring empties it.
        if let Ok(1) = self.uring.borrow().submitter().register_files_update(index, &[-1]) {
            self.files_free.borrow_mut().push(index);
        }
    }

    /// Starts an operation, or gives the request back when there is no room in the inbox, the slot table or the
    /// submission queue.
    pub(super) fn start(
        &self,
        inbox: &Rc<Inbox>,
        token: u64,
        file: &Rc<FileInner>,
        request: Request,
    ) -> Result<(), Request> {
        if !inbox.has_room() {
            return Err(request);
        }
        let request = match request {
            // A receive of no bytes would return 0, which says "end of stream".
            Request::Recv(batch) if batch.direct.is_none() && batch.free_space() == 0 => {
                inbox.started();
                let result = Err(io::Error::from_raw_os_error(libc::ENOBUFS));
                inbox.deliver(RingDone { token, result, resource: RingResource::Recv(batch) });
                return Ok(());
            }
            other => other,
        };
        let mut uring = self.uring.borrow_mut();
        if !has_sq_room(&mut uring) {
            return Err(request);
        }
        let mut slots = self.slots.borrow_mut();
        let Some(index) = slots.free.pop() else { return Err(request) };
        let slot = &mut slots.entries[index as usize];
        let (payload, entry) = match file.index_in(self) {
            Some(registered) => {
                let (payload, entry) = self.prepare(request, registered.cast_signed());
                (payload, entry.flags(squeue::Flags::FIXED_FILE))
            }
            None => self.prepare(request, file.fd().as_raw_fd()),
        };
        slot.op = Some(InFlight { inbox: Rc::clone(inbox), token, file: Rc::clone(file), payload });
        let entry = entry.user_data(user_data(index, slot.generation));
        // SAFETY: see the module's invariant; the slot holds payload and file until the completion.
        let pushed = unsafe { uring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "room in the submission queue was checked");
        inbox.started();
        self.in_flight.set(self.in_flight.get() + 1);
        Ok(())
    }

    /// Turns a request into what the slot keeps and the entry that points into it. `file` is a descriptor, or an
    /// index of the file table for entries that will be flagged so.
    fn prepare(&self, request: Request, file: RawFd) -> (Payload, squeue::Entry) {
        let fd = Fd(file);
        match request {
            Request::Recv(batch) => {
                let batch = NonNull::from(Box::leak(batch));
                (Payload::Recv(batch), prepare_recv(batch, fd))
            }
            Request::Send(batch) => {
                let batch = NonNull::from(Box::leak(batch));
                (Payload::Send(batch), prepare_send(batch, fd))
            }
            Request::Accept => {
                let entry = opcode::Accept::new(fd, ptr::null_mut(), ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build();
                (Payload::Accept, entry)
            }
            Request::Poll => (Payload::None, opcode::PollAdd::new(fd, libc::POLLIN as u32).build()),
            Request::Read { buf, offset } => {
                let (start, len) = (buf.as_ptr(), io_len(&buf));
                let entry = if self.is_registered(&buf) {
                    opcode::ReadFixed::new(fd, start, len, buf.region_index()).offset(offset).build()
                } else {
                    opcode::Read::new(fd, start, len).offset(offset).build()
                };
                (Payload::Buffer(buf), entry)
            }
            Request::Write { buf, offset, dsync } => {
                let (start, len) = (buf.as_ptr().cast_const(), io_len(&buf));
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                let entry = if self.is_registered(&buf) {
                    let write = opcode::WriteFixed::new(fd, start, len, buf.region_index());
                    write.offset(offset).rw_flags(flags).build()
                } else {
                    opcode::Write::new(fd, start, len).offset(offset).rw_flags(flags).build()
                };
                (Payload::Buffer(buf), entry)
            }
            Request::Fsync => (Payload::None, opcode::Fsync::new(fd).build()),
            Request::Fallocate { mode, offset, len } => {
                let mode = mode.bits().cast_signed();
                (Payload::None, opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build())
            }
        }
    }

    fn is_registered(&self, buf: &DmaBuf) -> bool {
        self.pool.get().is_some_and(|pool| buf.is_of(pool))
    }

    pub(super) fn turn(&self, wait: Wait) -> Result<usize, RingError> {
        {
            let mut uring = self.uring.borrow_mut();
            let (_, sq, cq) = uring.split();
            let submit_len = u32::try_from(sq.len()).unwrap_or(u32::MAX);
            let kernel_waits = sq.taskrun() || sq.cq_overflow();
            let is_ready = !cq.is_empty();
            drop((sq, cq));
            match wait {
                Wait::UpTo(timeout) if !is_ready && !kernel_waits => {
                    enter(&mut uring, submit_len, Some(timeout))?;
                }
                _ if submit_len > 0 || kernel_waits => enter(&mut uring, submit_len, None)?,
                _ => {}
            }
        }
        Ok(self.harvest())
    }

    /// Moves completions to the inboxes. The ring is not borrowed while they are delivered: dropping what nobody
    /// waits for may unregister a file.
    fn harvest(&self) -> usize {
        let mut count = 0;
        loop {
            let mut space = [const { MaybeUninit::<cqueue::Entry>::uninit() }; HARVEST_LEN];
            let entries = self.uring.borrow_mut().completion().fill(&mut space);
            for entry in &*entries {
                count += usize::from(self.complete(entry.user_data(), entry.result(), entry.flags()));
            }
            if entries.len() < HARVEST_LEN {
                return count;
            }
        }
    }

    /// Ends the operation of one completion. False when it names none.
    fn complete(&self, user_data: u64, result: i32, flags: u32) -> bool {
        let op = {
            let mut slots = self.slots.borrow_mut();
            let Slots { entries, free } = &mut *slots;
            #[expect(clippy::cast_possible_truncation, reason = "the halves of user_data")]
            let (index, generation) = (user_data as u32, (user_data >> 32) as u32);
            let Some(slot) = entries.get_mut(index as usize) else { return false };
            if slot.generation != generation {
                return false;
            }
            let Some(op) = slot.op.take() else { return false };
            slot.generation = slot.generation.wrapping_add(1);
            free.push(index);
            op
        };
        self.in_flight.set(self.in_flight.get() - 1);
        let InFlight { inbox, token, file, payload } = op;
        let resource = take_back(payload, result, flags);
        let result = u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        inbox.deliver(RingDone { token, result, resource });
        drop(file);
        true
    }

    /// Asks the kernel to cancel operations of `inbox`: those with `token`, or all.
    pub(super) fn cancel(&self, inbox: &Rc<Inbox>, token: Option<u64>) {
        self.cancel_where(|op| Rc::ptr_eq(&op.inbox, inbox) && token.is_none_or(|token| op.token == token));
    }

    fn cancel_where(&self, wanted: impl Fn(&InFlight) -> bool) {
        let mut uring = self.uring.borrow_mut();
        let slots = self.slots.borrow();
        for (index, slot) in (0u32..).zip(&slots.entries) {
            if !slot.op.as_ref().is_some_and(&wanted) {
                continue;
            }
            let entry = opcode::AsyncCancel::new(user_data(index, slot.generation)).build();
            if !has_sq_room(&mut uring) {
                return;
            }
            // SAFETY: a cancellation points to no memory.
            let _ = unsafe { uring.submission().push(&entry.user_data(CANCEL_DATA)) };
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let deadline = Instant::now() + self.drop_wait;
        self.cancel_where(|_| true);
        while self.in_flight.get() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.turn(Wait::UpTo(left.min(DROP_WAIT_STEP))) {
                Ok(_) if !left.is_zero() => {}
                _ => break,
            }
        }
        let slots = self.slots.get_mut();
        for op in slots.entries.iter_mut().filter_map(|slot| slot.op.take()) {
            tracing::error!(token = op.token, "an io_uring operation did not end: its memory is given up");
            mem::forget(op);
        }
    }
}

const fn user_data(index: u32, generation: u32) -> u64 {
    (generation as u64) << 32 | index as u64
}

/// Buffers end at 2 MiB.
fn io_len(buf: &DmaBuf) -> u32 {
    u32::try_from(buf.len()).unwrap_or(0)
}

/// Makes room in a full submission queue by submitting what it holds.
fn has_sq_room(uring: &mut IoUring) -> bool {
    if !uring.submission().is_full() {
        return true;
    }
    let len = u32::try_from(uring.submission().len()).unwrap_or(u32::MAX);
    enter(uring, len, None).is_ok() && !uring.submission().is_full()
}

/// Submits `submit_len` entries, runs task work, and waits for one completion when there is a timeout.
fn enter(uring: &mut IoUring, submit_len: u32, timeout: Option<Duration>) -> Result<(), RingError> {
    let submitter = uring.submitter();
    let result = match timeout {
        // SAFETY: no argument; entries in the queue obey the module's invariant.
        None => unsafe {
            submitter.enter::<libc::sigset_t>(submit_len, 0, EnterFlags::GETEVENTS.bits(), None)
        },
        Some(timeout) => {
            let timespec = Timespec::from(timeout);
            let args = SubmitArgs::new().timespec(&timespec);
            let flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
            // SAFETY: `SubmitArgs` is what EXT_ARG announces, and it and the timespec outlive the call.
            unsafe { submitter.enter(submit_len, 1, flags.bits(), Some(&args)) }
        }
    };
    match result {
        Ok(_) => Ok(()),
        Err(source) => match source.raw_os_error() {
            // A signal; the timeout; no memory for a request just now; completions must be taken first. What was
            // not submitted is still in the queue.
            Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY) => Ok(()),
            _ => Err(RingError::Enter { source }),
        },
    }
}

fn prepare_recv(batch: NonNull<RecvBatch>, fd: Fd) -> squeue::Entry {
    let raw = batch.as_ptr();
    // SAFETY: the caller leaked the box and tells nobody else; this reference ends before the entry is built, and
    // the pointers made from it stay good because nothing touches the batch until the completion.
    let (first, count, poll_first) = unsafe {
        let batch = &mut *raw;
        let mut count = 0;
        if let Some(buf) = &batch.direct {
            batch.iovecs[0] = libc::iovec { iov_base: buf.as_ptr().cast(), iov_len: buf.len() };
            count = 1;
        }
        let free = batch.rx.len() - batch.end;
        if free > 0 {
            let start = batch.rx.as_mut_ptr().wrapping_add(batch.end);
            batch.iovecs[count] = libc::iovec { iov_base: start.cast(), iov_len: free };
            count += 1;
        }
        batch.header.msg_iov = batch.iovecs.as_mut_ptr();
        batch.header.msg_iovlen = count as _;
        (batch.iovecs[0], count, batch.poll_first)
    };
    let ioprio = if poll_first { RECVSEND_POLL_FIRST } else { 0 };
    if count == 1 {
        let len = u32::try_from(first.iov_len).unwrap_or(u32::MAX);
        return opcode::Recv::new(fd, first.iov_base.cast(), len).ioprio(ioprio).build();
    }
    // SAFETY: only the address of a field of the leaked batch is taken.
    let header = unsafe { &raw mut (*raw).header };
    opcode::RecvMsg::new(fd, header).ioprio(ioprio).build()
}

/// Do not try at once, arm the poll first (`include/uapi/linux/io_uring.h`).
const RECVSEND_POLL_FIRST: u16 = 1;

fn prepare_send(batch: NonNull<SendBatch>, fd: Fd) -> squeue::Entry {
    let raw = batch.as_ptr();
    // SAFETY: as in `prepare_recv`.
    unsafe {
        let batch = &mut *raw;
        batch.fill_iovecs();
        batch.header.msg_iov = batch.iovecs.as_mut_ptr();
        batch.header.msg_iovlen = batch.iovecs.len() as _;
    }
    // SAFETY: only the address of a field of the leaked batch is taken.
    let header = unsafe { &raw const (*raw).header };
    let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL).cast_unsigned();
    opcode::SendMsg::new(fd, header).flags(flags).build()
}

/// Takes what the kernel has finished with out of the slot.
fn take_back(payload: Payload, result: i32, flags: u32) -> RingResource {
    match payload {
        Payload::Recv(batch) => {
            // SAFETY: leaked by `prepare`, and the kernel's one completion for it has come.
            let mut batch = unsafe { Box::from_raw(batch.as_ptr()) };
            batch.poll_first = result > 0 && !cqueue::sock_nonempty(flags);
            RingResource::Recv(batch)
        }
        // SAFETY: as above.
        Payload::Send(batch) => RingResource::Send(unsafe { Box::from_raw(batch.as_ptr()) }),
        Payload::Buffer(buf) => RingResource::Buffer(buf),
        // SAFETY: the kernel made this descriptor for us, and nobody else knows it.
        Payload::Accept if result >= 0 => RingResource::Accepted(unsafe { OwnedFd::from_raw_fd(result) }),
        Payload::Accept | Payload::None => RingResource::None,
    }
}
