//! The loans: what the kernel has of ours, from the submission of an operation to its completion. All `unsafe` of the ring
//! is here.
//!
//! ```text
//!   lend(request, file, tag)   slot: payload + file + tag, and an entry that points into them    submission queue
//!   take()                     slot emptied by the completion that has its number               completion queue
//! ```
//!
//! What makes it sound: an entry points only into memory that its slot owns (see [`entry`]), the slot is filled before
//! its entry is pushed, and emptied only by the completion that carries its index and generation; each operation has
//! exactly one. What is still lent when this is dropped is leaked.
//!
//! What it does not do: decide anything. Who waits for what, and for how long, is the [engine](super::engine)'s business.
#![expect(unsafe_code, reason = "hands memory to the kernel and takes it back")]

mod entry;
pub(super) mod now;

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::rc::Rc;
use std::time::Duration;

use hugepage_alloc::BufferPool;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, Submitter, cqueue, opcode, squeue};

pub(super) use entry::Request;

use super::client::RingResource;
use super::handle::FileInner;
use super::{RingError, Wait};
use entry::Payload;

/// `user_data` of cancellations, whose own completions tell nothing. No slot has this index.
const CANCEL_DATA: u64 = u64::MAX;
/// Completions taken from the queue at a time, before they are delivered.
const HARVEST_LEN: usize = 64;

pub(super) const IOVEC_NONE: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };

pub(super) const fn empty_msghdr() -> libc::msghdr {
    // SAFETY: a plain C struct of integers and pointers; all zero is "no name, no parts, no control data".
    unsafe { mem::zeroed() }
}

struct InFlight<T> {
    payload: Payload,
    file: Rc<FileInner>,
    tag: T,
}

struct Slot<T> {
    generation: u32,
    op: Option<InFlight<T>>,
}

/// An operation that is over.
pub(super) struct Ended<T> {
    pub(super) tag: T,
    pub(super) result: io::Result<u32>,
    pub(super) resource: RingResource,
    /// Dropping it may close it, and empty its place in the file table.
    pub(super) _file: Rc<FileInner>,
}

/// A ring and what it was lent; each loan is known to its owner by a tag.
pub(super) struct Loans<T> {
    uring: IoUring,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// Kept mapped while it is registered.
    pool: Option<BufferPool>,
    /// Completions of this ring that are taken and not looked at: from `next` on.
    harvest: Vec<cqueue::Entry>,
    next: usize,
}

impl<T> Loans<T> {
    /// Of a ring that nobody else has, with room for so many loans.
    pub(super) fn new(uring: IoUring, slots: u32) -> Self {
        Self {
            uring,
            slots: (0..slots).map(|_| Slot { generation: 0, op: None }).collect(),
            free: (0..slots).rev().collect(),
            pool: None,
            harvest: Vec::with_capacity(HARVEST_LEN),
            next: 0,
        }
    }

    /// How many there are.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// For what takes no memory: the table of files.
    pub(super) fn submitter(&self) -> Submitter<'_> {
        self.uring.submitter()
    }

    pub(super) const fn has_pool(&self) -> bool {
        self.pool.is_some()
    }

    /// Registers the memory of a pool with the ring. To be done once.
    pub(super) fn register_pool(&mut self, pool: &BufferPool) -> io::Result<()> {
        let iovecs: Vec<libc::iovec> = pool
            .regions()
            .map(|(base, len)| libc::iovec { iov_base: base.cast_mut().cast(), iov_len: len })
            .collect();
        // SAFETY: the regions stay mapped while the pool lives, and `self.pool` keeps it until the ring is closed.
        unsafe { self.uring.submitter().register_buffers(&iovecs)? };
        self.pool = Some(pool.clone());
        Ok(())
    }

    /// Starts an operation on `file`, which is at `registered` in the file table or nowhere there; or gives the request back
    /// when there is no room.
    pub(super) fn lend(
        &mut self,
        request: Request,
        file: &Rc<FileInner>,
        registered: Option<u32>,
        tag: T,
    ) -> Result<(), Request> {
        if !self.has_sq_room() {
            return Err(request);
        }
        let Some(index) = self.free.pop() else { return Err(request) };
        let Some(slot) = self.slots.get_mut(index as usize) else { return Err(request) };
        let pool = self.pool.as_ref();
        let (payload, entry) = match registered {
            Some(registered) => {
                let (payload, entry) = request.prepare(registered.cast_signed(), pool);
                (payload, entry.flags(squeue::Flags::FIXED_FILE))
            }
            None => request.prepare(file.fd().as_raw_fd(), pool),
        };
        slot.op = Some(InFlight { payload, file: Rc::clone(file), tag });
        let entry = entry.user_data(user_data(index, slot.generation));
        // SAFETY: see the module's invariant; the slot holds payload and file until the completion.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "room in the submission queue was checked");
        Ok(())
    }

    /// Asks the kernel to cancel operations, as far as there is room.
    pub(super) fn cancel_where(&mut self, wanted: impl Fn(&T) -> bool) {
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get(index) else { return };
            if !slot.op.as_ref().is_some_and(|op| wanted(&op.tag)) {
                continue;
            }
            let Ok(index) = u32::try_from(index) else { return };
            let entry = opcode::AsyncCancel::new(user_data(index, slot.generation)).build();
            if !self.has_sq_room() {
                return;
            }
            // SAFETY: a cancellation points to no memory.
            let _ = unsafe { self.uring.submission().push(&entry.user_data(CANCEL_DATA)) };
        }
    }

    /// Submits what is pending, and waits when nothing is complete.
    pub(super) fn submit(&mut self, wait: Wait) -> Result<(), RingError> {
        let (_, sq, cq) = self.uring.split();
        let submit_len = u32::try_from(sq.len()).unwrap_or(u32::MAX);
        let kernel_waits = sq.taskrun() || sq.cq_overflow();
        let is_ready = !cq.is_empty();
        drop((sq, cq));
        match wait {
            Wait::UpTo(timeout) if !is_ready && !kernel_waits => self.enter(submit_len, Some(timeout)),
            _ if submit_len > 0 || kernel_waits => self.enter(submit_len, None),
            _ => Ok(()),
        }
    }

    /// The next operation that is over.
    pub(super) fn take(&mut self) -> Option<Ended<T>> {
        loop {
            if self.next == self.harvest.len() && !self.refill() {
                return None;
            }
            let entry = self.harvest.get(self.next)?;
            let (user_data, result, flags) = (entry.user_data(), entry.result(), entry.flags());
            self.next += 1;
            // One that names no operation is that of a cancellation.
            if let Some(ended) = self.end(user_data, result, flags) {
                return Some(ended);
            }
        }
    }

    /// Takes completions from the queue. False when there are none.
    fn refill(&mut self) -> bool {
        let mut space = [const { MaybeUninit::<cqueue::Entry>::uninit() }; HARVEST_LEN];
        self.harvest.clear();
        self.next = 0;
        self.harvest.extend_from_slice(self.uring.completion().fill(&mut space));
        !self.harvest.is_empty()
    }

    /// Ends the operation of one completion of this ring.
    fn end(&mut self, user_data: u64, result: i32, flags: u32) -> Option<Ended<T>> {
        #[expect(clippy::cast_possible_truncation, reason = "the halves of user_data")]
        let (index, generation) = (user_data as u32, (user_data >> 32) as u32);
        let slot = self.slots.get_mut(index as usize).filter(|slot| slot.generation == generation)?;
        let InFlight { payload, file, tag } = slot.op.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        let resource = take_back(payload, result, flags);
        let result = u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        Some(Ended { tag, result, resource, _file: file })
    }

    /// Makes room in a full submission queue by submitting what it holds.
    fn has_sq_room(&mut self) -> bool {
        if !self.uring.submission().is_full() {
            return true;
        }
        let len = u32::try_from(self.uring.submission().len()).unwrap_or(u32::MAX);
        self.enter(len, None).is_ok() && !self.uring.submission().is_full()
    }

    /// Submits `submit_len` entries, runs task work, and waits for one completion when there is a timeout.
    fn enter(&self, submit_len: u32, timeout: Option<Duration>) -> Result<(), RingError> {
        let submitter = self.uring.submitter();
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
}

impl<T> Drop for Loans<T> {
    fn drop(&mut self) {
        for op in self.slots.iter_mut().filter_map(|slot| slot.op.take()) {
            tracing::error!("an io_uring operation did not end: its memory is given up");
            mem::forget(op);
        }
    }
}

const fn user_data(index: u32, generation: u32) -> u64 {
    (generation as u64) << 32 | index as u64
}

/// Makes what the kernel has finished with ours again.
fn take_back(payload: Payload, result: i32, flags: u32) -> RingResource {
    match payload {
        Payload::Recv(batch) => {
            // SAFETY: of `Box::into_raw` by `prepare`, and the kernel's one completion for it has come.
            let mut batch = unsafe { Box::from_raw(batch) };
            batch.poll_first = result > 0 && !cqueue::sock_nonempty(flags);
            RingResource::Recv(batch)
        }
        // SAFETY: as above.
        Payload::Send(batch) => RingResource::Send(unsafe { Box::from_raw(batch) }),
        Payload::Buffer(buf) => RingResource::Buffer(buf),
        // SAFETY: the kernel made this descriptor for us, and nobody else knows it.
        Payload::Accept if result >= 0 => RingResource::Accepted(unsafe { OwnedFd::from_raw_fd(result) }),
        Payload::Accept | Payload::None => RingResource::None,
    }
}
