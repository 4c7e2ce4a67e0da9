//! The engine: who has started what, and to whose inbox it comes back.
//!
//! Made once for each ring and shared by its handles. Nothing is borrowed while a completion is delivered: dropping what
//! nobody waits for may come back to the ring, to empty a place in the table of files.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use hugepage_alloc::BufferPool;

use super::client::{Inbox, RingDone, RingResource};
use super::handle::FileInner;
use super::sys::{Ended, Loans, Request};
use super::{RingError, RingOptions, Wait, setup};

/// How long a dying ring waits between two looks at the clock.
const DROP_WAIT_STEP: Duration = Duration::from_millis(100);

/// Who waits for an operation.
struct Waiting {
    inbox: Rc<Inbox>,
    token: u64,
}

pub(super) struct Engine {
    loans: RefCell<Loans<Waiting>>,
    files_free: RefCell<Vec<u32>>,
    notices: RefCell<Vec<String>>,
    drop_wait: Duration,
}

impl Engine {
    pub(super) fn new(options: &RingOptions) -> Result<Self, RingError> {
        let setup::Made { uring, files, notices } = setup::make(options)?;
        Ok(Self {
            loans: RefCell::new(Loans::new(uring, options.slots)),
            files_free: RefCell::new((0..files).rev().collect()),
            notices: RefCell::new(notices),
            drop_wait: options.drop_wait,
        })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.loans.borrow().in_flight()
    }

    pub(super) fn notices(&self) -> Vec<String> {
        self.notices.borrow().clone()
    }

    pub(super) fn register_pool(&self, pool: &BufferPool) -> Result<(), RingError> {
        let mut loans = self.loans.borrow_mut();
        if loans.has_pool() {
            return Err(RingError::PoolRegistered);
        }
        if let Err(error) = loans.register_pool(pool) {
            self.notices.borrow_mut().push(format!(
                "the buffer pool cannot be registered with io_uring ({error}): each transfer costs more; raise \
                 RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=infinity)"
            ));
        }
        Ok(())
    }

    pub(super) fn register_fd(&self, this: &Rc<Self>, fd: OwnedFd) -> FileInner {
        let Some(index) = self.files_free.borrow_mut().pop() else { return FileInner::plain(fd) };
        match self.loans.borrow().submitter().register_files_update(index, &[fd.as_raw_fd()]) {
            Ok(1) => FileInner::registered(fd, Rc::downgrade(this), index),
            _ => {
                self.files_free.borrow_mut().push(index);
                FileInner::plain(fd)
            }
        }
    }

    pub(super) fn unregister_fd(&self, index: u32) {
        // An entry that cannot be emptied is not used again; closing the ring empties it.
        if let Ok(1) = self.loans.borrow().submitter().register_files_update(index, &[-1]) {
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
            Request::Recv(batch) if batch.direct_left() == 0 && batch.free_space() == 0 => {
                inbox.started();
                let result = Err(io::Error::from_raw_os_error(libc::ENOBUFS));
                inbox.deliver(RingDone { token, result, resource: RingResource::Recv(batch) });
                return Ok(());
            }
            other => other,
        };
        let waiting = Waiting { inbox: Rc::clone(inbox), token };
        self.loans.borrow_mut().lend(request, file, file.index_in(self), waiting)?;
        inbox.started();
        Ok(())
    }

    pub(super) fn turn(&self, wait: Wait) -> Result<usize, RingError> {
        self.loans.borrow_mut().submit(wait)?;
        let mut count = 0;
        while let Some(ended) = self.next_ended() {
            let Ended { tag: Waiting { inbox, token }, result, resource, _file } = ended;
            inbox.deliver(RingDone { token, result, resource });
            count += 1;
        }
        Ok(count)
    }

    /// A function of its own, whose borrow has ended when it returns.
    fn next_ended(&self) -> Option<Ended<Waiting>> {
        self.loans.borrow_mut().take()
    }

    /// Asks the kernel to cancel operations of `inbox`: those with `token`, or all.
    pub(super) fn cancel(&self, inbox: &Rc<Inbox>, token: Option<u64>) {
        self.loans.borrow_mut().cancel_where(|waiting| {
            Rc::ptr_eq(&waiting.inbox, inbox) && token.is_none_or(|token| waiting.token == token)
        });
    }
}

impl Drop for Engine {
    /// Cancels what is in flight and waits for it. What does not end in time stays the kernel's.
    fn drop(&mut self) {
        let deadline = Instant::now() + self.drop_wait;
        self.loans.borrow_mut().cancel_where(|_| true);
        while self.in_flight() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.turn(Wait::UpTo(left.min(DROP_WAIT_STEP))) {
                Ok(_) if !left.is_zero() => {}
                _ => break,
            }
        }
    }
}
