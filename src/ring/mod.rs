//! io_uring whose operations own what the kernel uses.
//!
//! ```text
//!   RingClient (a connection, a device queue, ...)      one inbox each, of fixed capacity
//!      | read/write/recv/send(token, resource)   ^ pop() -> RingDone { token, result, resource }
//!      v                                         |
//!   Ring   slot table: resource + file + inbox, named by (index, generation) in user_data
//!      |   SQ: filled by the calls above         ^ CQ: emptied by turn() into the inboxes
//!      v                                         |
//!   kernel      one io_uring_enter a turn submits, runs task work, and may wait
//! ```
//!
//! A socket can also be read and written without the ring ([`Socket::recv_now`], [`Socket::send_now`]): one plain system
//! call, cheaper where it is known that it will not have to wait.
//!
//! One ring a core, shared by its sockets and its io_uring devices. A buffer, batch or file that the kernel may
//! touch moves into the ring's slot and comes back in the [`RingDone`]; no path lets go of it earlier, not even
//! dropping the client or the ring. A ring that is dropped cancels what is in flight and waits a bounded time;
//! what the kernel still holds then is leaked, never freed.
//!
//! After [`Ring::new`] and [`Ring::client`] nothing here allocates or locks. Handles are `!Send`: the ring belongs
//! to the thread that made it.
//!
//! What it does not do: multishot and provided-buffer receives, zero-copy sends, IOPOLL, SQPOLL, timers.
//!
//! Sources: io_uring_enter(2), io_uring_setup(2), io_uring_register(2).

mod batch;
mod client;
mod engine;
mod handle;
mod setup;
mod sys;

use std::fmt;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use hugepage_alloc::BufferPool;

pub use batch::{RecvBatch, RecvSplit, SendBatch};
pub use client::{Full, RingClient, RingDone, RingResource};
pub use handle::{FileRef, Socket};

use engine::Engine;
use std::os::fd::OwnedFd;

/// How large a ring shall be.
#[derive(Clone, Debug)]
pub struct RingOptions {
    /// Submission queue entries. When it is full, submitting enters the kernel early.
    pub sq_entries: u32,
    /// The most operations in flight, of all clients together. The completion queue is at least as large.
    pub slots: u32,
    /// Size of the table of registered files.
    pub files: u32,
    /// How long dropping the ring waits for cancelled operations.
    pub drop_wait: Duration,
}

impl Default for RingOptions {
    fn default() -> Self {
        Self { sq_entries: 256, slots: 4096, files: 64, drop_wait: Duration::from_secs(5) }
    }
}

/// How [`Ring::turn`] waits when nothing is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until a completion arrives, a signal is handled, or the time is over.
    UpTo(Duration),
}

/// What goes wrong with a ring as a whole. A failed operation is a [`RingDone`] with an error instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The kernel has no io_uring, or the administrator forbids it.
    #[error(
        "io_uring is not permitted: set `sysctl kernel.io_uring_disabled=0`, and allow io_uring_setup in the \
         seccomp profile of the container or service"
    )]
    Disabled {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("io_uring of this kernel lacks {what}: Linux 5.15 or newer is needed")]
    TooOld {
        /// The missing feature.
        what: &'static str,
    },
    /// The options make no sense.
    #[error("io_uring options: {what}")]
    BadOptions {
        /// What is wrong with which option.
        what: &'static str,
    },
    /// Making the ring failed otherwise.
    #[error("setting up an io_uring of {slots} slots failed: is RLIMIT_MEMLOCK or memory too small?")]
    Setup {
        /// The number of slots asked for.
        slots: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A second pool was to be registered.
    #[error("a buffer pool is registered with this ring already")]
    PoolRegistered,
    /// Submitting or waiting failed in a way that cannot be retried.
    #[error("io_uring_enter failed")]
    Enter {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// One core's io_uring. A handle: cloning is cheap. Not `Send`.
#[derive(Clone)]
pub struct Ring {
    engine: Rc<Engine>,
}

impl Ring {
    /// Makes a ring that belongs to the calling thread.
    ///
    /// # Errors
    /// When io_uring is disabled or too old, or memory is short; the message says what to do.
    pub fn new(options: &RingOptions) -> Result<Self, RingError> {
        Ok(Self { engine: Rc::new(Engine::new(options)?) })
    }

    /// Registers the pool's memory, so that reads and writes with its buffers need no page pinning each. Where
    /// the kernel refuses (limit on locked memory), plain reads and writes are used and [`Ring::notices`] says so.
    ///
    /// # Errors
    /// When a pool is registered already.
    pub fn register_pool(&self, pool: &BufferPool) -> Result<(), RingError> {
        self.engine.register_pool(pool)
    }

    /// Takes over a file and registers it, which saves a reference count per operation. When the table is full or
    /// missing the file is used unregistered; that only costs time.
    #[must_use]
    pub fn register_file(&self, fd: OwnedFd) -> FileRef {
        FileRef::from_inner(self.engine.register_fd(&self.engine, fd))
    }

    /// Takes over a stream socket and registers it, as [`Ring::register_file`] does. See [`Socket::new`].
    #[must_use]
    pub fn register_socket(&self, fd: OwnedFd) -> Socket {
        handle::make_blocking(&fd);
        Socket::from_inner(self.engine.register_fd(&self.engine, fd))
    }

    /// A client whose completions wait in an inbox of their own. `capacity` is the most operations it may have
    /// submitted and not yet popped.
    #[must_use]
    pub fn client(&self, capacity: usize) -> RingClient {
        RingClient::new(Rc::clone(&self.engine), capacity)
    }

    /// Submits all that is pending and moves completions into the inboxes; returns how many. At most one system
    /// call, and none when nothing is pending and nothing waits to be completed.
    ///
    /// # Errors
    /// When the kernel refuses in a way that trying again cannot mend. Signals, a full completion queue and short
    /// memory are no errors: what was not submitted stays for the next turn.
    pub fn turn(&self, wait: Wait) -> Result<usize, RingError> {
        self.engine.turn(wait)
    }

    /// Operations that the kernel has, or will have with the next turn.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    /// What this ring has to do without, and the remedy: one sentence each.
    #[must_use]
    pub fn notices(&self) -> Vec<String> {
        self.engine.notices()
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}
