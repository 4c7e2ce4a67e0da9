//! Leases: the proof that nobody else has a file open, and the early word of whoever comes later.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use super::error::ExtentError;
use super::facts::FileFacts;
use super::guard::Guard;
use super::holders;
use super::readers::LocalReaders;
use super::sys::{self, Lease};

/// How often, and at which distance, the write lease is asked for. An open that is being denied at this moment is a
/// second user for some microseconds; a closed file of a process that just ended, for some milliseconds.
const ATTEMPTS: u32 = 25;
const PAUSE: Duration = Duration::from_millis(8);

/// Takes a write lease, which the kernel grants only when this descriptor is the only one open on the inode: no other
/// reader, no writer, no mapping, no loop device, no swap. Where readers are let in it is a read lease, which the kernel
/// grants when there is no writer, and none who has it mapped to write. Breaks of it are told to `guard`.
pub(super) fn prove<'a>(
    file: &File,
    facts: &FileFacts,
    guard: &'a Guard,
    readers: LocalReaders,
) -> Result<LeaseHold<'a>, ExtentError> {
    let failed = |problem, source| ExtentError::Guard {
        path: facts.path.clone(),
        guard: "lease",
        problem,
        source: Some(source),
    };
    guard.hear_leases_of(file).map_err(|source| failed("its breaks cannot be heard", source))?;
    let lease = match readers {
        LocalReaders::Refuse => Lease::Write,
        LocalReaders::Allow => Lease::Read,
    };
    for attempt in 0..ATTEMPTS {
        match guard.change_lease(lease) {
            Ok(()) => return Ok(LeaseHold(guard)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed("cannot be taken", error)),
        }
        if attempt + 1 < ATTEMPTS {
            thread::sleep(PAUSE);
        }
    }
    Err(in_use(facts))
}

/// A lease that is let go when this is dropped: at once, and not only when the last copy of the descriptor is closed,
/// which a child that is just being started may have for a moment longer.
pub(super) struct LeaseHold<'a>(&'a Guard);

impl LeaseHold<'_> {
    /// Leaves the lease to whoever owns the file.
    pub(super) fn disarm(self) {
        std::mem::forget(self);
    }
}

impl Drop for LeaseHold<'_> {
    fn drop(&mut self) {
        drop_lease(self.0);
    }
}

/// Makes sure that the write lease is still whole.
pub(super) fn still_unopened(file: &File, facts: &FileFacts) -> Result<(), ExtentError> {
    match sys::get_lease(file.as_fd()) {
        Ok(Lease::Write) => Ok(()),
        Ok(_) => Err(in_use(facts)),
        Err(error) => Err(ExtentError::io("ask for the lease of", &facts.path, error)),
    }
}

/// Turns the lease into a read lease, which readers do not break.
pub(super) fn downgrade(guard: &Guard, facts: &FileFacts) -> Result<(), ExtentError> {
    guard.change_lease(Lease::Read).map_err(|source| ExtentError::Guard {
        path: facts.path.clone(),
        guard: "lease",
        problem: "cannot be turned into a read lease",
        source: Some(source),
    })
}

/// Whether the read lease is held and not being broken.
pub(super) fn is_held(file: &File) -> bool {
    sys::get_lease(file.as_fd()).is_ok_and(|lease| lease == Lease::Read)
}

/// Lets the lease go; whoever waits for it goes on.
pub(super) fn drop_lease(guard: &Guard) {
    if let Err(error) = guard.change_lease(Lease::None) {
        // EAGAIN: there was none any more.
        tracing::debug!(%error, "dropping a lease");
    }
}

fn in_use(facts: &FileFacts) -> ExtentError {
    let holders = holders::find(facts.inode, facts.device, facts.swap);
    ExtentError::InUse { path: facts.path.clone(), holders }
}
