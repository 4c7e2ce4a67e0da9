//! The thread that guards a pinned file: it denies opens, and hears of lease breaks.
//!
//! ```text
//!    open(2) of anyone --> fanotify group --+                  +--> FAN_DENY; FAN_ALLOW for this process
//!    lease break -------> signalfd ---------+--> one thread ---+--> recall: eventfd, callback
//!    stop --------------> eventfd ----------+                  +--> ends; closing the group frees all openers
//! ```
//!
//! Lease breaks arrive as a signal that is directed to this one thread, which has it blocked, so no other thread of
//! the process can be hit by it. A guard that fails recalls too: a pin without its guards must not be served.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fd::BorrowedFd;

use super::sys::{self, ThreadId};

/// Why a pin must be let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RecallReason {
    /// The lease is being broken: somebody opens the file for writing or truncates it, and waits for at most
    /// `/proc/sys/fs/lease-break-time` seconds until we let go.
    LeaseBreak,
    /// The thread that denies opens and hears of lease breaks has failed.
    GuardFailed,
}

impl fmt::Display for RecallReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LeaseBreak => "somebody with the power to do so opens the file for writing (lease break)",
            Self::GuardFailed => "the guard that denies opens of the file failed",
        })
    }
}

/// What to call on a recall. Runs on the guard's thread: to be short, and to wake others.
pub type OnRecall = Arc<dyn Fn(RecallReason) + Send + Sync>;

/// Sees a recall: by asking, or by polling its descriptor.
#[derive(Clone, Debug)]
pub struct RecallWatch {
    signal: Arc<RecallSignal>,
}

impl RecallWatch {
    /// Why the pin is recalled; `None` while it is not. Never returns to `None`.
    #[must_use]
    pub fn reason(&self) -> Option<RecallReason> {
        match self.signal.state.load(Ordering::Acquire) {
            LEASE_BREAK => Some(RecallReason::LeaseBreak),
            GUARD_FAILED => Some(RecallReason::GuardFailed),
            _ => None,
        }
    }
}

impl AsFd for RecallWatch {
    /// An eventfd that becomes and stays readable with the recall. To be polled, not read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.event.as_fd()
    }
}

const HELD: u8 = 0;
const LEASE_BREAK: u8 = 1;
const GUARD_FAILED: u8 = 2;

struct RecallSignal {
    state: AtomicU8,
    event: OwnedFd,
    on_recall: Option<OnRecall>,
}

impl fmt::Debug for RecallSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecallSignal").field("state", &self.state).finish_non_exhaustive()
    }
}

impl RecallSignal {
    /// The first reason stays.
    fn raise(&self, state: u8, reason: RecallReason) {
        if self.state.compare_exchange(HELD, state, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        if let Err(error) = rustix::io::write(&self.event, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot signal a recall by eventfd");
        }
        if let Some(on_recall) = &self.on_recall {
            on_recall(reason);
        }
    }
}

/// The guard thread of one file. Dropping it stops it, and lets every waiting opener go on.
#[derive(Debug)]
pub(super) struct Guard {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    signals_to: ThreadId,
    watch: RecallWatch,
}

impl Guard {
    /// From now on every open of `file` by another process is denied.
    pub(super) fn start(file: &File, on_recall: Option<OnRecall>) -> io::Result<Self> {
        let group = sys::fanotify_group()?;
        sys::mark_opens(group.as_fd(), file.as_fd())?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = Arc::new(rustix::event::eventfd(0, flags)?);
        let event = rustix::event::eventfd(0, flags)?;
        let signal = Arc::new(RecallSignal { state: AtomicU8::new(HELD), event, on_recall });
        let (ready, started) = mpsc::channel();
        let body = Body { group, stop: Arc::clone(&stop), signal: Arc::clone(&signal) };
        let thread =
            thread::Builder::new().name("fastice-guard".to_owned()).spawn(move || body.run(&ready))?;
        let watch = RecallWatch { signal };
        match started.recv() {
            Ok(Ok(signals_to)) => Ok(Self { stop, thread: Some(thread), signals_to, watch }),
            Ok(Err(error)) => Err(error),
            Err(mpsc::RecvError) => Err(io::Error::other("the guard thread ended at once")),
        }
    }

    /// Directs the lease breaks of `file` to the guard thread. To be called before the lease is taken.
    pub(super) fn hear_leases_of(&self, file: &File) -> io::Result<()> {
        sys::direct_signals(file.as_fd(), self.signals_to)
    }

    pub(super) fn watch(&self) -> &RecallWatch {
        &self.watch
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes()) {
            // Only a full counter refuses, and then the thread has been told already.
            tracing::error!(%error, "cannot stop a guard thread by eventfd");
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a guard thread panicked");
        }
    }
}

/// What runs on the guard thread. Recalls when it is dropped without having been told to stop, by a panic too.
struct Body {
    group: OwnedFd,
    stop: Arc<OwnedFd>,
    signal: Arc<RecallSignal>,
}

enum Turn {
    Goon,
    Stop,
}

impl Body {
    fn run(self, ready: &mpsc::Sender<io::Result<ThreadId>>) {
        let signals = match sys::take_signals() {
            Ok((signals, id)) => {
                // The receiver waits for exactly this message.
                let _ = ready.send(Ok(id));
                signals
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let alarm = Alarm(&self.signal);
        loop {
            match self.turn(&signals) {
                Ok(Turn::Goon) => {}
                Ok(Turn::Stop) => {
                    std::mem::forget(alarm);
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "the guard of a pinned file failed");
                    return;
                }
            }
        }
    }

    /// Waits for what comes first and deals with it.
    fn turn(&self, signals: &OwnedFd) -> io::Result<Turn> {
        let mut fds = [
            PollFd::new(&self.group, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(&*self.stop, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => return Ok(Turn::Goon),
            result => result?,
        };
        let [opens, breaks, stop] = fds.map(|fd| fd.revents());
        if breaks.contains(PollFlags::IN) {
            drain(signals)?;
            self.signal.raise(LEASE_BREAK, RecallReason::LeaseBreak);
        }
        if opens.contains(PollFlags::IN) {
            self.answer_opens()?;
        }
        if (opens | breaks).intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            return Err(io::Error::other("a descriptor of the guard went bad"));
        }
        Ok(if stop.is_empty() { Turn::Goon } else { Turn::Stop })
    }

    /// Reads pending permission events and answers each.
    fn answer_opens(&self) -> io::Result<()> {
        let mut buffer = [0_u8; 4096];
        let len = match rustix::io::read(&self.group, &mut buffer) {
            // The kernel has denied by itself where it could not give us a descriptor: the file's lease is breaking.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            // Events whose descriptor cannot be made for want of a free number are denied by the kernel, too.
            Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
                tracing::warn!("out of file descriptors: an open of a pinned file was denied unseen");
                return Ok(());
            }
            result => result?,
        };
        let mut rest = buffer.get(..len).unwrap_or_default();
        while let Some((event, tail)) = OpenEvent::parse(rest)? {
            rest = tail;
            let Some(fd) = sys::event_descriptor(event.fd) else { continue };
            let mine = u32::try_from(event.pid).ok() == Some(std::process::id());
            let verdict = if mine { libc::FAN_ALLOW } else { libc::FAN_DENY };
            let mut response = [0; 8];
            response[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
            response[4..].copy_from_slice(&verdict.to_ne_bytes());
            match rustix::io::write(&self.group, &response) {
                // The opener was killed while it waited.
                Ok(_) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
            if !mine {
                tracing::debug!(pid = event.pid, "denied an open of a pinned file");
            }
        }
        Ok(())
    }
}

/// Raises [`RecallReason::GuardFailed`] when dropped.
struct Alarm<'a>(&'a RecallSignal);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        self.0.raise(GUARD_FAILED, RecallReason::GuardFailed);
    }
}

fn drain(signals: &OwnedFd) -> io::Result<()> {
    /// `struct signalfd_siginfo`.
    const SIGINFO_LEN: usize = 128;
    let mut info = [0_u8; SIGINFO_LEN * 8];
    match rustix::io::read(signals, &mut info) {
        Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// `struct fanotify_event_metadata`: event_len u32, vers u8, reserved u8, metadata_len u16, mask u64, fd i32, pid i32.
struct OpenEvent {
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
        let [l0, l1, l2, l3, version, _, _, _, _, _, _, _, _, _, _, _, f0, f1, f2, f3, p0, p1, p2, p3] =
            *event;
        let len = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        if version != Self::VERSION || len < Self::LEN {
            return Err(broken());
        }
        let tail = bytes.get(len..).ok_or_else(broken)?;
        let fd = i32::from_ne_bytes([f0, f1, f2, f3]);
        Ok(Some((Self { fd, pid: i32::from_ne_bytes([p0, p1, p2, p3]) }, tail)))
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
        event[16] = 9;
        event[20] = 42;
        let (parsed, tail) = OpenEvent::parse(&event).unwrap().unwrap();
        assert_eq!((parsed.fd, parsed.pid, tail.len()), (9, 42, 0));
        assert!(OpenEvent::parse(&event[..23]).is_err());
        assert!(OpenEvent::parse(&[]).unwrap().is_none());
        for (at, value) in [(0, 25), (0, 0), (4, 2)] {
            let mut bad = event;
            bad[at] = value;
            assert!(OpenEvent::parse(&bad).is_err(), "{at} {value}");
        }
    }
}
