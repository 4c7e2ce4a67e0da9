//! Answering the kernel's question whether a pinned file may be opened.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use crate::extent::sys;

/// What a look at the group showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opens {
    /// Everything that was asked is answered.
    Answered,
    /// The kernel threw questions away: somebody may have been let in.
    Overrun,
}

/// What becomes of an open, by the descriptor with which the kernel asks about it.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It goes on.
    Allow(OwnedFd),
    /// It fails.
    Deny(OwnedFd),
    /// Somebody else has the descriptor now, and answers.
    HandedOn,
}

/// Reads pending permission events of `group` and answers each. `judge` is asked about those of other processes.
pub(super) fn answer(group: &OwnedFd, judge: &dyn Fn(OwnedFd) -> Verdict) -> io::Result<Opens> {
    let mut buffer = [0_u8; 4096];
    let len = match rustix::io::read(group, &mut buffer) {
        // The kernel has denied by itself where it could not give us a descriptor: the file's lease is breaking.
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Opens::Answered),
        // Events whose descriptor cannot be made for want of a free number are denied by the kernel, too.
        Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
            tracing::warn!("out of file descriptors: an open of a pinned file was denied unseen");
            return Ok(Opens::Answered);
        }
        result => result?,
    };
    let mut rest = buffer.get(..len).unwrap_or_default();
    let mut opens = Opens::Answered;
    while let Some((event, tail)) = OpenEvent::parse(rest)? {
        rest = tail;
        if event.mask & libc::FAN_Q_OVERFLOW != 0 {
            opens = Opens::Overrun;
        }
        let Some(fd) = sys::event_descriptor(event.fd) else { continue };
        let is_ours = u32::try_from(event.pid).ok() == Some(std::process::id());
        match if is_ours { Verdict::Allow(fd) } else { judge(fd) } {
            Verdict::Allow(fd) => respond(group, &fd, true)?,
            Verdict::Deny(fd) => {
                respond(group, &fd, false)?;
                tracing::debug!(pid = event.pid, "denied an open of a pinned file");
            }
            Verdict::HandedOn => {}
        }
    }
    Ok(opens)
}

/// Tells the kernel what becomes of the open that it has asked about with this descriptor.
pub(super) fn respond(group: &OwnedFd, fd: &OwnedFd, allowed: bool) -> io::Result<()> {
    let verdict = if allowed { libc::FAN_ALLOW } else { libc::FAN_DENY };
    let mut response = [0; 8];
    response[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
    response[4..].copy_from_slice(&verdict.to_ne_bytes());
    match rustix::io::write(group, &response) {
        // The opener was killed while it waited.
        Ok(_) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// `struct fanotify_event_metadata`: event_len u32, vers u8, reserved u8, metadata_len u16, mask u64, fd i32, pid i32.
struct OpenEvent {
    mask: u64,
    fd: i32,
    pid: i32,
}

impl OpenEvent {
    const LEN: usize = 24;
    const VERSION: u8 = 3;

    /// The first event of `bytes` and what follows it; `None` at the end.
    fn parse(bytes: &[u8]) -> io::Result<Option<(Self, &[u8])>> {
        let broken = || io::Error::other("the kernel's fanotify event has an unknown form");
        if bytes.is_empty() {
            return Ok(None);
        }
        let event = bytes.first_chunk::<{ Self::LEN }>().ok_or_else(broken)?;
        let [
            l0,
            l1,
            l2,
            l3,
            version,
            _,
            _,
            _,
            m0,
            m1,
            m2,
            m3,
            m4,
            m5,
            m6,
            m7,
            f0,
            f1,
            f2,
            f3,
            p0,
            p1,
            p2,
            p3,
        ] = *event;
        let len = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        if version != Self::VERSION || len < Self::LEN {
            return Err(broken());
        }
        let tail = bytes.get(len..).ok_or_else(broken)?;
        let fd = i32::from_ne_bytes([f0, f1, f2, f3]);
        let mask = u64::from_ne_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
        Ok(Some((Self { mask, fd, pid: i32::from_ne_bytes([p0, p1, p2, p3]) }, tail)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_unknown_form_stop_the_parser() {
        let mut event = [0_u8; 24];
        event[0] = 24;
        event[4] = 3;
        event[9] = 0x40;
        event[16] = 9;
        event[20] = 42;
        let (parsed, tail) = OpenEvent::parse(&event).unwrap().unwrap();
        assert_eq!((parsed.fd, parsed.pid, tail.len()), (9, 42, 0));
        assert_eq!(parsed.mask, libc::FAN_Q_OVERFLOW);
        assert!(OpenEvent::parse(&event[..23]).is_err());
        assert!(OpenEvent::parse(&[]).unwrap().is_none());
        for (at, value) in [(0, 25), (0, 0), (4, 2)] {
            let mut bad = event;
            bad[at] = value;
            assert!(OpenEvent::parse(&bad).is_err(), "{at} {value}");
        }
    }
}
