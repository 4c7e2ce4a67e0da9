//! Ctrl-C and its kin as something to wait for: the only system calls of the command line.
#![expect(unsafe_code, reason = "signalfd and signal masks, which no safe interface of ours offers")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// SIGINT, SIGTERM and SIGHUP, blocked and turned into a descriptor. To be taken before other threads start, for
/// they inherit the mask; and so do child processes.
#[derive(Debug)]
pub(super) struct StopSignals {
    descriptor: OwnedFd,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// To end: SIGINT or SIGTERM.
    Stop,
    /// To read the configuration again: SIGHUP. Who has none to read ends.
    Reload,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// Somebody asks for something.
    Asked(Asked),
    /// The other descriptor of this index is readable.
    Readable(usize),
    /// The time is over.
    Timeout,
}

impl StopSignals {
    /// Takes the signals.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub(super) fn take() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset writes the whole set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: written by the call above.
        let mut set = unsafe { set.assume_init() };
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: a valid set, and a valid signal number.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: a valid set; the old mask is not asked for.
        let code = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
        if code != 0 {
            return Err(io::Error::from_raw_os_error(code));
        }
        // SAFETY: a valid set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { descriptor })
    }

    /// What somebody asked for since the last look; the oldest first.
    pub(super) fn asked(&self) -> Option<Asked> {
        // One struct signalfd_siginfo (linux/signalfd.h): 128 bytes, the number first.
        let mut info = [0u8; 128];
        let len = rustix::io::read(&self.descriptor, &mut info).ok().filter(|&len| len > 0)?;
        let number = info.first_chunk::<4>().filter(|_| len >= 4).map(|bytes| u32::from_ne_bytes(*bytes));
        let reload = number.and_then(|number| i32::try_from(number).ok()) == Some(libc::SIGHUP);
        Some(if reload { Asked::Reload } else { Asked::Stop })
    }

    /// Waits for a signal, for one of `others` to be readable, or for the time to pass.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub(super) fn wait(&self, others: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Wake> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.descriptor.as_fd(), PollFlags::IN)];
        fds.extend(others.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(0) => return Ok(Wake::Timeout),
                Ok(_) => break,
            }
        }
        if let Some(asked) = self.asked() {
            return Ok(Wake::Asked(asked));
        }
        let readable = fds.iter().skip(1).position(|fd| !fd.revents().is_empty());
        Ok(readable.map_or(Wake::Timeout, Wake::Readable))
    }
}
