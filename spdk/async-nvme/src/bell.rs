//! An eventfd that a sleeper waits for: rung by the device's interrupt, or by another part of the driver.
//!
//! ```text
//!   arm:     let the interrupt through  ->  silence  ->  look once more  ->  sleep until readable
//!   device:                            completion written  ->  interrupt  ->  readable
//! ```
//!
//! What was written before the last look is seen by it, what is written after it rings. Nothing lies between.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::clock::Moment;

/// What [`crate::IoQueue::arm`] and [`crate::Controller::arm`] say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arm {
    /// There is something to do now: poll, do not sleep.
    Busy,
    /// Sleep until the eventfd is readable, but poll by this moment at the latest; without one, only then.
    Sleep {
        /// The moment, for time-outs.
        until: Option<Moment>,
    },
}

/// See the picture above.
#[derive(Debug)]
pub(crate) struct Bell {
    fd: OwnedFd,
}

impl Bell {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Makes it readable. It fails only when it is so already.
    pub(crate) fn ring(&self) {
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable.
    pub(crate) fn silence(&self) {
        let _ = rustix::io::read(&self.fd, &mut [0; 8]);
    }
}
