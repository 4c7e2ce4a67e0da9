//! Letters to a core: how the control thread and other cores reach a reactor that shares nothing.
//!
//! Never used by the I/O path. A letter is pushed under a lock and the core is woken by an eventfd that its ring
//! watches, so a sleeping core reads its mail at once and a busy one within a turn.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use crate::fabrics::{Export, ExportSlot, PortId};
use crate::stage::TraceCopy;

/// A connection that was accepted and waits for a core to adopt it.
#[derive(Debug)]
pub struct Accepted {
    /// The connected socket.
    pub socket: OwnedFd,
    /// Who connected.
    pub peer: SocketAddr,
    /// The address that was connected to.
    pub local: SocketAddr,
    /// The port (listener) it came in by.
    pub port: PortId,
}

/// What can be asked of a core.
pub enum Letter {
    /// Serve this connection from now on.
    Adopt(Accepted),
    /// Accept connections here and spread them over all cores.
    Listen {
        /// The listening socket.
        listener: OwnedFd,
        /// Which port that is.
        port: PortId,
    },
    /// Stop accepting on a port.
    Unlisten(PortId),
    /// Open device queues for these exports; answered when all are open, or with the first failure.
    Open {
        /// What to open.
        exports: Vec<Arc<Export>>,
        /// Where the answer goes.
        reply: mpsc::Sender<Result<(), String>>,
    },
    /// Answer as soon as no command of this export is in flight on this core. The export must be fenced first.
    Drain {
        /// Which export.
        slot: ExportSlot,
        /// Called from the core's loop: to be short.
        answer: Box<dyn FnOnce() + Send>,
    },
    /// Forget a drained export, and close its device queue when no other export uses it.
    Close(ExportSlot),
    /// Tell of the last commands.
    Trace {
        /// Where the answer goes.
        reply: mpsc::Sender<TraceCopy>,
    },
    /// Finish what is in flight, end every connection, and leave the loop; at the deadline at the latest.
    Stop {
        /// When patience ends.
        deadline: Instant,
    },
}

#[derive(Debug)]
struct Shared {
    letters: Mutex<Vec<Letter>>,
    /// Set by whoever wakes the core, cleared by the core: keeps a storm of wakes to one system call.
    rung: AtomicBool,
    bell: OwnedFd,
    /// Connections that the core has, or was sent and did not refuse yet.
    connections: AtomicUsize,
}

impl std::fmt::Debug for Letter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Adopt(_) => "Adopt",
            Self::Listen { .. } => "Listen",
            Self::Unlisten(_) => "Unlisten",
            Self::Open { .. } => "Open",
            Self::Drain { .. } => "Drain",
            Self::Close(_) => "Close",
            Self::Trace { .. } => "Trace",
            Self::Stop { .. } => "Stop",
        })
    }
}

/// The address of a core: cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct Mailbox(Arc<Shared>);

impl Mailbox {
    /// An empty mailbox with its bell.
    ///
    /// # Errors
    /// When the kernel has no eventfd to give (file descriptor limit).
    pub fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Shared {
            letters: Mutex::default(),
            rung: AtomicBool::new(false),
            bell,
            connections: AtomicUsize::new(0),
        })))
    }

    /// Posts a letter and wakes the core.
    pub fn post(&self, letter: Letter) {
        if matches!(letter, Letter::Adopt(_)) {
            self.0.connections.fetch_add(1, Ordering::Relaxed);
        }
        self.0.letters.lock().unwrap_or_else(PoisonError::into_inner).push(letter);
        self.ring_bell();
    }

    /// How many connections the core has, those among them that are on their way to it.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.connections.load(Ordering::Relaxed)
    }

    /// For the core: a connection that it was sent has ended, or was refused.
    pub(super) fn let_go(&self) {
        // Each was sent before.
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// Wakes the core without a letter: its sessions have something to say.
    pub fn ring_bell(&self) {
        if !self.0.rung.swap(true, Ordering::AcqRel) {
            // A full counter (the only way this fails) means the core is awake already.
            let _ = rustix::io::write(&self.0.bell, &1u64.to_ne_bytes());
        }
    }

    /// For the core: hushes the bell and takes all letters, in order.
    ///
    /// The bell is hushed first: a letter that comes between the two is taken now, and its ring only costs a turn. Who finds it rung
    /// already does not ring: what it did before is seen by whoever looks after this.
    pub fn collect(&self, letters: &mut Vec<Letter>) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.0.bell, &mut count);
        self.0.rung.swap(false, Ordering::AcqRel);
        letters.append(&mut self.0.letters.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The eventfd that is readable when there is mail.
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
    }
}

impl crate::fabrics::Waker for Mailbox {
    fn wake(&self) {
        self.ring_bell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(mailbox: &Mailbox) -> bool {
        let mut fds = [rustix::event::PollFd::new(&mailbox.0.bell, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).expect("poll an eventfd")
            == 1
    }

    #[test]
    fn the_bell_rings_once_for_many_letters_and_again_after_collecting() {
        let mailbox = Mailbox::new().expect("eventfd");
        assert!(!readable(&mailbox));
        mailbox.post(Letter::Unlisten(PortId(1)));
        mailbox.post(Letter::Unlisten(PortId(2)));
        assert!(readable(&mailbox));
        let mut letters = Vec::new();
        mailbox.collect(&mut letters);
        assert!(matches!(letters[..], [Letter::Unlisten(PortId(1)), Letter::Unlisten(PortId(2))]));
        assert!(!readable(&mailbox));
        mailbox.ring_bell();
        assert!(readable(&mailbox));
    }

    #[test]
    fn letters_from_many_threads_all_arrive() {
        let mailbox = Mailbox::new().expect("eventfd");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|n| mailbox.post(Letter::Unlisten(PortId(n)))));
            }
        });
        let mut letters = Vec::new();
        mailbox.collect(&mut letters);
        assert_eq!(letters.len(), 400);
    }
}
