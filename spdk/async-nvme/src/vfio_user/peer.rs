//! The process at the other end: is it still there?
//!
//! A process that has ended has no memory mapped any more, and so writes nothing: the kernel takes its mappings away
//! before it closes its sockets, and says that it has ended after both. Nothing less than that shows that a server
//! that no longer answers can do no harm.
//!
//! The kernel names the process that called `listen`. A server that has another process serve its connections is
//! taken for the wrong one; one that had ended by the time of connecting proves nothing and is not watched.
#![expect(unsafe_code, reason = "asks the kernel for a descriptor of the peer's process")]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Since Linux 6.5 (kernel, `include/uapi/asm-generic/socket.h`).
const SO_PEERPIDFD: libc::c_int = 77;

/// A process that serves us.
#[derive(Debug)]
pub(crate) struct Peer {
    pidfd: OwnedFd,
}

impl Peer {
    /// The process behind a connected socket. `None` when the kernel does not tell, or it has ended already.
    pub(crate) fn of(socket: &UnixStream) -> Option<Self> {
        let pidfd = peer_pidfd(socket).or_else(|| peer_pidfd_by_number(socket))?;
        let peer = Self { pidfd };
        (!peer.has_ended_within(Duration::ZERO)).then_some(peer)
    }

    /// Whether the process has ended, or does within `wait`.
    pub(crate) fn has_ended_within(&self, wait: Duration) -> bool {
        let timeout = Timespec::try_from(wait).ok();
        poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], timeout.as_ref()).is_ok_and(|ready| ready > 0)
    }
}

fn peer_pidfd(socket: &UnixStream) -> Option<OwnedFd> {
    let mut fd: libc::c_int = -1;
    option(socket, SO_PEERPIDFD, &mut fd)?;
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// As an older kernel has it. The process answers us just now, so its number is its own.
fn peer_pidfd_by_number(socket: &UnixStream) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(peer_pid(socket)?)?, PidfdFlags::empty()).ok()
}

/// 0, which is no process, when it lives where we cannot name it (another namespace).
fn peer_pid(socket: &UnixStream) -> Option<i32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    option(socket, libc::SO_PEERCRED, &mut credentials)?;
    Some(credentials.pid)
}

/// Reads a socket option of exactly the size of `T`.
fn option<T: Copy>(socket: &UnixStream, name: libc::c_int, value: &mut T) -> Option<()> {
    let mut len = libc::socklen_t::try_from(size_of::<T>()).ok()?;
    let wanted = len;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has as many and holds plain numbers (both callers).
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut *value).cast(),
            &raw mut len,
        )
    };
    (result == 0 && len == wanted).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_runs_has_not_ended() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).expect("our own process");
        assert!(!peer.has_ended_within(Duration::from_millis(20)));
        assert_eq!(peer_pid(&ours), Some(i32::try_from(std::process::id()).unwrap()));
    }

    #[test]
    fn either_way_names_the_same_process() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let pid_of = |fd: OwnedFd| {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
            info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<u32>().ok())
        };
        assert_eq!(pid_of(peer_pidfd_by_number(&ours).unwrap()), Some(std::process::id()));
        match peer_pidfd(&ours) {
            Some(fd) => assert_eq!(pid_of(fd), Some(std::process::id())),
            None => eprintln!("SKIPPED: either_way_names_the_same_process: no SO_PEERPIDFD before Linux 6.5"),
        }
    }

    #[test]
    fn a_process_that_ends_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let peer = Peer { pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap() };
        assert!(!peer.has_ended_within(Duration::ZERO));
        child.kill().unwrap();
        assert!(peer.has_ended_within(Duration::from_secs(5)));
        child.wait().unwrap();
        assert!(peer.has_ended_within(Duration::ZERO));
    }
}
