//! Watching pinned files: whether each is still what was frozen, looked at again and again, at a bounded cost.
//!
//! ```text
//!   every 100 ms or so   statx (immutable, size, change time), lease, inode generation      a microsecond or two a file
//!                        what the guard mode adds to that: the list of swap areas, of mounts; the freeze
//!   at an interval       FIEMAP against the frozen map, the disk under it                   by the extents
//!   at once              all of it, when /proc/self/mountinfo or /proc/swaps changes
//! ```
//!
//! The quick looks see whatever leaves a trace in the inode; only FIEMAP sees the rest (clones from the file, exchanged
//! extents). The intervals of the maps follow from their cost and from the share of a processor that watching may have:
//! with costs c and a share s, intervals of sqrt(c) * (sum of all sqrt(c)) / s spend exactly s, and make the sum of the
//! intervals the smallest. Quick looks have 35 % of the share, maps as much, waking up and planning 20 %, the guard thread the rest. A difference recalls the pin, as a lease break does. What falls behind is found by the guard
//! thread, and recalls too.
//!
//! What it does not do: fence, which whoever serves the file does when it hears of the recall; look at files that are
//! recalled already.

mod check;
mod pace;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

pub use check::SecondLook;
use check::look;
pub(in crate::extent) use check::{baseline_of, cost_of, cpu_time};

use pace::{Pace, QUICK_INTERVAL_MIN};

use super::guard::post::bound_of;
use super::guard::warden::{Alarm, Shared};
use super::guard::{Oversight, Post};

/// How long the watch waits for another thread to tell of a recall, before it says that nothing was missed.
const PROOF_PAUSE: Duration = Duration::from_millis(1);

/// How files are watched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WatchOptions {
    /// The part of one processor that watching may take, above 0 and at most 1.
    pub share: f64,
    /// The shortest interval between two looks at a map.
    pub interval_min: Duration,
}

impl Default for WatchOptions {
    /// One per cent; 100 ms.
    fn default() -> Self {
        Self { share: 0.01, interval_min: Duration::from_millis(100) }
    }
}

impl WatchOptions {
    /// How often a file is watched whose map costs `cost` of a processor to look at, when it is the only one.
    #[must_use]
    pub fn alone(self, cost: Duration) -> WatchPlan {
        let interval = Pace::new(self).interval_alone(cost);
        WatchPlan { quick_interval: QUICK_INTERVAL_MIN, interval, bound: bound_of(interval), cost }
    }
}

/// How often one file is, or would be, looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchPlan {
    /// Between two looks at the inode, at the least.
    pub quick_interval: Duration,
    /// Between two looks at the map.
    pub interval: Duration,
    /// What a change that nothing but the map shows may take to be noticed, at the longest: without a look for so long
    /// the file counts as changed.
    pub bound: Duration,
    /// What one look at the map costs in processor time.
    pub cost: Duration,
}

/// The thread that watches.
#[derive(Debug)]
pub(in crate::extent) struct Watch {
    wake: Option<Arc<Oversight>>,
    stop: Arc<std::sync::atomic::AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// No thread yet.
    pub(in crate::extent) fn idle() -> Self {
        Self { wake: None, stop: Arc::default(), thread: None }
    }

    /// Starts it.
    pub(in crate::extent) fn begin(&mut self, shared: Arc<Shared>, options: WatchOptions) -> io::Result<()> {
        let oversight = Arc::clone(&shared.oversight);
        let body = Body {
            shared,
            pace: Pace::new(options),
            worked: Duration::ZERO,
            stop: Arc::clone(&self.stop),
            mounts: File::open("/proc/self/mountinfo")?,
            swaps: File::open("/proc/swaps")?,
        };
        self.thread =
            Some(thread::Builder::new().name("fastice-watch".to_owned()).spawn(move || body.run())?);
        oversight.keep(true);
        self.wake = Some(oversight);
        Ok(())
    }

    pub(in crate::extent) fn is_at_work(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Makes it look at what is new.
    pub(in crate::extent) fn wake(&self) {
        if let Some(wake) = &self.wake {
            wake.wake();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Release);
        self.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a watch thread panicked");
        }
    }
}

struct Body {
    shared: Arc<Shared>,
    pace: Pace,
    /// The processor time of this thread up to the last turn.
    worked: Duration,
    stop: Arc<std::sync::atomic::AtomicBool>,
    mounts: File,
    swaps: File,
}

impl Body {
    fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let alarm = Alarm(&shared, "the watch thread has ended");
        loop {
            match self.turn() {
                Ok(()) if self.stop.load(std::sync::atomic::Ordering::Acquire) => {
                    std::mem::forget(alarm);
                    return;
                }
                Ok(()) => {}
                Err(error) => {
                    tracing::error!(%error, "the watch over pinned files failed");
                    return;
                }
            }
        }
    }

    /// Waits until a file is due or something happens, and looks.
    fn turn(&mut self) -> io::Result<()> {
        let oversight = Arc::clone(&self.shared.oversight);
        let pause = self.pace.pause(Instant::now(), &self.watched());
        // A proof that waits for somebody else to be told of a recall.
        let pause = if oversight.is_wanted() { Some(PROOF_PAUSE) } else { pause };
        let timeout = pause.map(|pause| Timespec {
            tv_sec: pause.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: pause.subsec_nanos().into(),
        });
        let mut fds = [
            PollFd::new(&*oversight, PollFlags::IN),
            PollFd::new(&self.mounts, PollFlags::PRI),
            PollFd::new(&self.swaps, PollFlags::PRI),
        ];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            result => result?,
        };
        let [wake, mounts, swaps] = fds.map(|fd| fd.revents());
        if wake.contains(PollFlags::IN) {
            // Before the list is read: whoever woke us is in it.
            oversight.awake();
        }
        // Always with POLLERR, by which the kernel tells of a change of these files (`fs/namespace.c`, `mm/swapfile.c`).
        if (mounts | swaps).contains(PollFlags::PRI) {
            tracing::debug!("mounts or swap files changed: looking at all pinned files");
            self.pace.hurry();
        }
        let begun = oversight.is_wanted().then(Instant::now);
        if begun.is_some() {
            self.pace.all_due();
        }
        let posts = self.watched();
        self.pace.plan(&posts);
        let mut looked = Duration::ZERO;
        if self.pace.is_quick_due(Instant::now()) {
            let begun = cpu_time();
            posts.iter().for_each(|(_, post)| check::quick(post));
            let cost = cpu_time().saturating_sub(begun);
            self.pace.quick_done(Instant::now(), cost);
            looked += cost;
        }
        for (id, post) in &posts {
            if self.pace.is_due(*id, Instant::now()) {
                let begun = cpu_time();
                look(post);
                looked += cpu_time().saturating_sub(begun);
                self.pace.done(*id, Instant::now());
            }
        }
        let worked = cpu_time();
        self.pace.worked(Instant::now(), worked.saturating_sub(self.worked + looked));
        self.worked = worked;
        if let Some(begun) = begun.filter(|_| self.shared.posts().iter().all(|(_, post)| post.is_settled())) {
            oversight.proven(begun);
        }
        Ok(())
    }

    /// The files that have a map and are not recalled.
    fn watched(&self) -> Vec<(u64, Arc<Post>)> {
        let mut posts = self.shared.posts();
        posts.retain(|(_, post)| post.map.get().is_some() && !post.is_recalled());
        posts
    }
}
