//! Sleeping while there is nothing to poll for.
//!
//! ```text
//!   loop {                                   core with a queue pair
//!       poll ... until nothing came for a while
//!       if let Sleep { until } = queue.arm()? {
//!           wait for queue.interrupt() to be readable, or until then
//!       }
//!       queue.disarm();                  when it polls for a while again; it may also stay armed
//!   }
//! ```
//!
//! `arm` lets the interrupt through first, makes the eventfd unreadable, and looks at the completion queue after that: what is completed before the look
//! makes it say Busy, what is completed after it signals the eventfd. `disarm` masks the interrupt again, so that a core
//! that polls costs nobody an interrupt. An eventfd is also signalled by the other side of the driver: the controller wakes
//! a queue pair that was created, lost or given up, a queue pair wakes the controller when it needs something.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::bell::Arm;
use crate::clock::Moment;
use crate::controller::Controller;
use crate::error::Error;
use crate::link::{Shared, state};
use crate::options::State;
use crate::queue::{IoQueue, Life};

/// How long to sleep at most while CSTS is waited for: nothing signals its change.
const CSTS_EVERY: Duration = Duration::from_millis(1);

/// Lets interrupt `vector` through to the bell, once.
fn attach(shared: &Shared, vector: u16, bell: BorrowedFd<'_>, attached: &mut bool) -> Result<(), Error> {
    if !*attached {
        let failed = |source| Error::Access { name: shared.name(), source: Arc::new(source) };
        shared.access.interrupt_attach(vector, bell).map_err(failed)?;
        *attached = true;
    }
    Ok(())
}

impl IoQueue {
    /// The eventfd to sleep on after [`IoQueue::arm`], when the queue pair was opened with one.
    #[must_use]
    pub fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        self.link.bell.as_ref().map(crate::bell::Bell::fd)
    }

    /// Gets ready to sleep. A queue pair without an interrupt vector is Busy as long as commands are open.
    ///
    /// # Errors
    /// When the interrupt cannot be attached; then only polling is left.
    pub fn arm(&mut self) -> Result<Arm, Error> {
        let Some(bell) = &self.link.bell else { return Ok(Arm::Busy) };
        if let Some(vector) = self.link.vector {
            attach(&self.shared, vector, bell.fd(), &mut self.attached)?;
        }
        bell.silence();
        // From here on everything rings. What has rung is there to be seen.
        let open = self.slots.any_open();
        let due = match self.link.state() {
            state::LIVE => match self.life {
                Life::New => !self.waiting.is_empty(),
                Life::Live => {
                    self.rings.has_completion()
                        || !self.rings.is_rung()
                        || (!self.waiting.is_empty() && self.slots.has_free())
                        || (open && self.link.vector.is_none())
                }
                Life::Poisoned => false,
            },
            state::WANTED | state::CREATING | state::HOLD => false,
            state::LOST => true,
            _ => self.outstanding() > 0,
        };
        if due || !self.ready.is_empty() {
            return Ok(Arm::Busy);
        }
        let watched = open && self.life == Life::Live && self.link.state() == state::LIVE;
        Ok(Arm::Sleep { until: watched.then_some(self.watch_at) })
    }

    /// Masks the interrupt again, where that is possible, and makes the eventfd unreadable.
    pub fn disarm(&mut self) {
        let Some(bell) = &self.link.bell else { return };
        if let Some(vector) = self.link.vector
            && self.attached
            && self.shared.access.interrupt_detach(vector).is_ok()
        {
            self.attached = false;
        }
        bell.silence();
    }
}

impl Controller {
    /// The eventfd to sleep on after [`Controller::arm`], when [`crate::Options::interrupts`] asked for one.
    #[must_use]
    pub fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        self.shared.bell.as_ref().map(crate::bell::Bell::fd)
    }

    /// Gets ready to sleep until the eventfd is readable. CSTS signals nothing: it is looked at as often as
    /// [`crate::Options::status_every`] says, and each millisecond while its change is waited for.
    ///
    /// # Errors
    /// When the interrupt cannot be attached; then only polling is left.
    pub fn arm(&mut self) -> Result<Arm, Error> {
        let Some(bell) = &self.shared.bell else { return Ok(Arm::Busy) };
        let vectors = self.shared.access.interrupts_max() > 0;
        if vectors {
            attach(&self.shared, 0, bell.fd(), &mut self.attached)?;
        }
        bell.silence();
        let due = self.shared.has_attention()
            || !self.events.is_empty()
            || self.admin.is_due()
            || (!vectors && self.admin.deadline().is_some());
        let until: Option<Moment> = match self.state {
            _ if due => return Ok(Arm::Busy),
            State::Idle | State::Stopped | State::Failed | State::Removed => None,
            State::Disabling | State::Enabling | State::ShuttingDown => Some(self.now().after(CSTS_EVERY)),
            State::Starting => self.admin.deadline(),
            State::Ready => {
                let status_at = self.status_at;
                Some(self.admin.deadline().map_or(status_at, |deadline| deadline.min(status_at)))
            }
        };
        Ok(Arm::Sleep { until })
    }

    /// Masks the interrupt again, where that is possible, and makes the eventfd unreadable.
    pub fn disarm(&mut self) {
        let Some(bell) = &self.shared.bell else { return };
        if self.attached && self.shared.access.interrupt_detach(0).is_ok() {
            self.attached = false;
        }
        bell.silence();
    }
}
