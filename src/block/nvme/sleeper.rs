//! Sleeping on a core's ring until the interrupt of a queue pair comes.

use async_nvme::{Arm, IoQueue};

use crate::ring::{FileRef, Ring, RingClient};

/// Watches of queue pairs: the present one, and cancelled ones of former pairs that have not come back yet.
const WATCHES_MAX: usize = 4;

/// Watches the eventfd of a queue pair by the ring that the core sleeps on.
pub(super) struct Sleeper {
    client: RingClient,
    eventfd: Option<FileRef>,
    /// Which queue pair: watches of a former one say nothing of this.
    token: u64,
    is_watched: bool,
}

impl Sleeper {
    pub(super) fn new(ring: &Ring) -> Self {
        Self { client: ring.client(WATCHES_MAX), eventfd: None, token: 0, is_watched: false }
    }

    /// The queue has this queue pair from now on.
    pub(super) fn change(&mut self, pair: &IoQueue) {
        if self.is_watched {
            self.client.cancel(self.token);
        }
        self.token += 1;
        self.is_watched = false;
        // Without a descriptor there is no sleep, and no harm.
        self.eventfd = pair.interrupt().and_then(|fd| fd.try_clone_to_owned().ok()).map(FileRef::new);
    }

    /// Whether the core may sleep: an interrupt of the queue pair will end the turn of its ring.
    pub(super) fn arm(&mut self, pair: &mut IoQueue) -> bool {
        let Some(eventfd) = &self.eventfd else { return false };
        while let Some(done) = self.client.pop() {
            self.is_watched &= done.token != self.token;
        }
        if !self.is_watched {
            self.is_watched = self.client.wait_readable(self.token, eventfd).is_ok();
        }
        self.is_watched && matches!(pair.arm(), Ok(Arm::Sleep { .. }))
    }
}
