//! How a core makes sure, after a pause, that nothing was missed meanwhile.
//!
//! A process that is stopped (a debugger, SIGSTOP, a frozen cgroup) hears of nothing: the kernel waits for its lease no
//! longer than `/proc/sys/fs/lease-break-time`, and then lets the opener in. When the process goes on, the commands that
//! came meanwhile are in its sockets, and a core may find them before the guard has found the signal. So a core that
//! finds that it was away asks here, and begins nothing before all files were looked at.
//!
//! ```text
//!   core    away for a second? --> prove_since(now) --wakes--> watch: inode, lease, map of every file
//!                                        ^                                |
//!                                        +------------- proven -----------+   (or a recall, whose fence is down by then)
//! ```
//!
//! What is left: a process that is stopped between the last look at the clock and the system call that submits, some
//! microseconds of it, for as long as the kernel waits for a lease.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;

/// How long a core waits between two looks whether the proof is there.
const STEP: Duration = Duration::from_millis(1);

/// What cores and the watch tell each other.
#[derive(Debug)]
pub struct Oversight {
    origin: Instant,
    /// Since `origin`: every file is to be looked at by looks that begin after this.
    wanted_ns: AtomicU64,
    /// Every file was looked at, by looks that began after this.
    proven_ns: AtomicU64,
    /// Whether there is a watch that answers.
    is_kept: AtomicBool,
    wake: OwnedFd,
}

impl Oversight {
    /// Nobody watches yet, as there is nothing to watch.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            origin: Instant::now(),
            wanted_ns: AtomicU64::new(0),
            proven_ns: AtomicU64::new(0),
            is_kept: AtomicBool::new(false),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn ns(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.origin).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Waits until every pinned file was looked at after `since`; each that is not what it was is fenced by then. False
    /// when that is not so by `deadline`. At once when there are no files, or when the watch has ended, which fenced all.
    #[must_use]
    pub fn prove_since(&self, since: Instant, deadline: Instant) -> bool {
        self.want(since);
        let since_ns = self.ns(since);
        while self.is_kept.load(Ordering::Acquire) && self.proven_ns.load(Ordering::Acquire) < since_ns {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(STEP);
        }
        true
    }

    /// Has every file looked at.
    pub(super) fn want(&self, since: Instant) {
        self.wanted_ns.fetch_max(self.ns(since), Ordering::AcqRel);
        self.wake();
    }

    /// Whether a proof is wanted that is not there.
    pub(in crate::extent) fn is_wanted(&self) -> bool {
        self.wanted_ns.load(Ordering::Acquire) > self.proven_ns.load(Ordering::Acquire)
    }

    /// Every file was looked at, by looks that began at `begun` or later.
    pub(in crate::extent) fn proven(&self, begun: Instant) {
        self.proven_ns.fetch_max(self.ns(begun), Ordering::AcqRel);
    }

    /// A watch answers from now on, or, with all files recalled, none any more.
    pub(in crate::extent) fn keep(&self, is_kept: bool) {
        self.is_kept.store(is_kept, Ordering::Release);
    }

    /// Wakes the watch.
    pub(in crate::extent) fn wake(&self) {
        // Refused only by a full counter, which wakes as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Whoever woke the watch is served by what it does next.
    pub(in crate::extent) fn awake(&self) {
        let mut count = [0_u8; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
    }
}

impl AsFd for Oversight {
    /// Readable when the watch is to look.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// How long the kernel waits for a lease to be let go (`/proc/sys/fs/lease-break-time`). Its default when it does not tell,
/// and when it waits for ever, which is what 0 means (`fs/locks.c`, `__break_lease`): whoever waits is not to wait so long.
#[must_use]
pub fn lease_break_time() -> Duration {
    const DEFAULT: Duration = Duration::from_secs(45);
    lease_break_limit().unwrap_or(DEFAULT)
}

/// The same as the kernel tells it: `None` when it waits for ever, or does not tell.
pub(in crate::extent) fn lease_break_limit() -> Option<Duration> {
    limit_of(&std::fs::read_to_string("/proc/sys/fs/lease-break-time").unwrap_or_default())
}

fn limit_of(text: &str) -> Option<Duration> {
    text.trim().parse().ok().filter(|seconds| *seconds > 0).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(30)
    }

    #[test]
    fn a_lease_break_time_of_0_is_no_limit() {
        assert_eq!(limit_of("45\n"), Some(Duration::from_secs(45)));
        assert_eq!(limit_of("0\n"), None, "not one of no time at all");
        assert_eq!((limit_of(""), limit_of("soon")), (None, None));
        // Whatever the kernel waits, fastice makes use of some time, and never of no time.
        assert!(lease_break_time() >= Duration::from_secs(1));
    }

    #[test]
    fn only_a_look_that_began_after_the_pause_proves() {
        let oversight = Oversight::new().expect("a descriptor");
        assert!(oversight.prove_since(Instant::now(), soon()), "nobody watches, as there are no files");
        oversight.keep(true);
        let before = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        let pause_end = Instant::now();
        assert!(!oversight.prove_since(pause_end, soon()) && oversight.is_wanted());
        oversight.proven(before);
        assert!(!oversight.prove_since(pause_end, soon()), "that look began before");
        oversight.proven(pause_end);
        assert!(oversight.prove_since(pause_end, soon()) && !oversight.is_wanted());
        oversight.keep(false);
        assert!(oversight.prove_since(Instant::now(), soon()), "the watch has ended, and fenced all");
    }

    #[test]
    fn a_core_that_waits_goes_on_with_the_proof() {
        let oversight = Oversight::new().expect("a descriptor");
        oversight.keep(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !oversight.is_wanted() {
                    std::thread::yield_now();
                }
                oversight.proven(Instant::now());
            });
            assert!(oversight.prove_since(Instant::now(), Instant::now() + Duration::from_secs(20)));
        });
    }
}
