//! What tells of others that come to a file: leases, the signals of their breaking, and permission to open it.

#![expect(unsafe_code, reason = "fcntl, signalfd and fanotify have no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;

use super::check;

/// The lease types of `fcntl(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::extent) enum Lease {
    /// Broken by an open for writing, or a truncation.
    Read,
    /// Broken by any open.
    Write,
    /// None.
    None,
}

impl Lease {
    const fn raw(self) -> libc::c_int {
        (match self {
            Self::Read => libc::F_RDLCK,
            Self::Write => libc::F_WRLCK,
            Self::None => libc::F_UNLCK,
        }) as libc::c_int
    }
}

/// Takes, changes or drops the lease on `file`.
pub(in crate::extent) fn set_lease(file: BorrowedFd<'_>, lease: Lease) -> io::Result<()> {
    // SAFETY: F_SETLEASE takes an integer; no memory is touched.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, lease.raw()) }).map(drop)
}

/// The lease on `file`; while it is being broken, the type it must become.
pub(in crate::extent) fn get_lease(file: BorrowedFd<'_>) -> io::Result<Lease> {
    // SAFETY: F_GETLEASE takes no argument; no memory is touched.
    let raw = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) })?;
    Ok(if raw == Lease::Read.raw() {
        Lease::Read
    } else if raw == Lease::Write.raw() {
        Lease::Write
    } else {
        Lease::None
    })
}

/// Directs the signals of `file` (lease breaks) to one thread of this process, as the realtime signal [`break_signal`].
pub(in crate::extent) fn direct_signals(file: BorrowedFd<'_>, thread: ThreadId) -> io::Result<()> {
    /// `fcntl.h`: not in the libc crate for every target.
    const F_SETSIG: libc::c_int = 10;
    const F_SETOWN_EX: libc::c_int = 15;
    const F_OWNER_TID: libc::c_int = 0;
    #[repr(C)]
    struct OwnerEx {
        kind: libc::c_int,
        pid: libc::pid_t,
    }
    let owner = OwnerEx { kind: F_OWNER_TID, pid: thread.0 };
    // SAFETY: F_SETOWN_EX reads a struct f_owner_ex, which `owner` is laid out as and outlives the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, &raw const owner) })?;
    // SAFETY: F_SETSIG takes an integer; no memory is touched.
    check(unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, break_signal()) }).map(drop)
}

/// The signal that tells of a lease break. It is sent to one thread, which has it blocked, so it meets no other user
/// of the same number in this process.
fn break_signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

/// The kernel's id of a thread.
#[derive(Clone, Copy, Debug)]
pub(in crate::extent) struct ThreadId(libc::pid_t);

/// Blocks the lease-break signal, and SIGIO which the kernel falls back to when its queue is full, in the calling
/// thread for good, and returns a descriptor to read them from and the id to direct them to. For threads of our own
/// making only.
pub(in crate::extent) fn take_signals() -> io::Result<(OwnedFd, ThreadId)> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set; the others read or change that initialised set, and the mask of the
    // calling thread only. The descriptor signalfd returns is new and ours alone.
    unsafe {
        check(libc::sigemptyset(set.as_mut_ptr()))?;
        check(libc::sigaddset(set.as_mut_ptr(), break_signal()))?;
        check(libc::sigaddset(set.as_mut_ptr(), libc::SIGIO))?;
        let set = set.assume_init_ref();
        match libc::pthread_sigmask(libc::SIG_BLOCK, set, ptr::null_mut()) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        let fd = check(libc::signalfd(-1, set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok((OwnedFd::from_raw_fd(fd), ThreadId(libc::gettid())))
    }
}

/// A fanotify group that is asked for permission. Its event descriptors are opened non-blocking, so that reading an
/// event never waits for a lease of our own.
pub(in crate::extent) fn fanotify_group() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_CONTENT | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
    let event_flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_LARGEFILE | libc::O_NONBLOCK;
    let event_flags = libc::c_uint::try_from(event_flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: fanotify_init takes integers; the descriptor it returns is new and ours alone.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::fanotify_init(flags, event_flags))?)) }
}

/// Asks `group` for permission for every open, also for execution, of the inode of `file`.
pub(in crate::extent) fn mark_opens(group: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    let mask = libc::FAN_OPEN_PERM;
    // SAFETY: a null path makes the mark that of the descriptor itself; no memory is touched.
    check(unsafe {
        libc::fanotify_mark(group.as_raw_fd(), libc::FAN_MARK_ADD, mask, file.as_raw_fd(), ptr::null())
    })
    .map(drop)
}

/// Takes that back. Whoever waits to open the file goes on.
pub(in crate::extent) fn unmark_opens(group: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    let (flags, mask) = (libc::FAN_MARK_REMOVE, libc::FAN_OPEN_PERM);
    // SAFETY: as in `mark_opens`.
    check(unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask, file.as_raw_fd(), ptr::null()) })
        .map(drop)
}

/// Takes ownership of the descriptor that came in a fanotify event.
pub(in crate::extent) fn event_descriptor(fd: i32) -> Option<OwnedFd> {
    // SAFETY: the kernel installed this descriptor for the reader of the event, who is its only owner.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
