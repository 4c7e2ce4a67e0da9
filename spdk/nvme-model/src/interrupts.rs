//! Interrupts: an eventfd for each vector, and a bit for what could not be delivered, as MSI-X has it.

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::controller::Controller;

#[derive(Debug, Default)]
pub(crate) struct Vector {
    eventfd: Option<OwnedFd>,
    /// Raised while nobody was attached.
    pending: bool,
}

impl Vector {
    fn raise(&mut self) {
        match &self.eventfd {
            // It fails only when it is readable already.
            Some(eventfd) => _ = rustix::io::write(eventfd, &1u64.to_ne_bytes()),
            None => self.pending = true,
        }
    }
}

impl Controller {
    /// Raises an interrupt, if the queue has one.
    pub(crate) fn interrupt(&mut self, vector: Option<u16>) {
        if self.faults.registers.interrupts_lost {
            return;
        }
        if let Some(vector) = vector.and_then(|vector| self.vectors.get_mut(usize::from(vector))) {
            vector.raise();
        }
    }

    /// Whether there is such a vector.
    pub(crate) fn attach_vector(&mut self, vector: u16, eventfd: BorrowedFd<'_>) -> std::io::Result<bool> {
        let Some(place) = self.vectors.get_mut(usize::from(vector)) else { return Ok(false) };
        place.eventfd = Some(eventfd.try_clone_to_owned()?);
        self.interrupts_on = true;
        if std::mem::take(&mut place.pending) {
            place.raise();
        }
        Ok(true)
    }

    /// Whether there is such a vector.
    pub(crate) fn detach_vector(&mut self, vector: u16) -> bool {
        let Some(place) = self.vectors.get_mut(usize::from(vector)) else { return false };
        place.eventfd = None;
        true
    }
}
