//! Watching pinned files: whether each is still what was frozen, looked at again and again, at a bounded cost.
//!
//! ```text
//!   every 100 ms or so   statx (immutable, size, change time), lease                        a microsecond a file
//!                        what the guard mode adds to that: the list of swap areas, of mounts; the freeze
//!   at an interval       FIEMAP against the frozen map, the disk under it, all of the above,    by the extents
//!                        inode generation
//!   at once              all of it, when /proc/self/mountinfo or /proc/swaps changes
//! ```
//!
//! The quick looks see whatever leaves a trace in the inode; only FIEMAP sees the rest (clones from the file, exchanged
//! extents). The intervals of the maps follow from their cost and from the share of a processor that watching may have:
//! with costs c and a share s, intervals of sqrt(c) * (sum of all sqrt(c)) / s spend exactly s, and make the sum of the
//! intervals the smallest. The share is that of both threads, guard and watch, and of all that they do by the clock: what
//! that is beside looks is measured, and looks have what is left (see `pace`). Not counted is what others bring about,
//! opens that are asked about and leases that break: else whoever opens a file all the time would have the others watched
//! less. A difference recalls the pin, as a lease break does. What falls behind is found by the guard thread, and recalls
//! too.
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
use check::{Disks, look};
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
        let interval = Pace::new(self, Instant::now()).interval_alone(cost);
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

/// Between two tries to wake one that is to end.
const STOP_PAUSE: Duration = Duration::from_millis(1);

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
            pace: Pace::new(options, Instant::now()),
            worked: Duration::ZERO,
            beside: Duration::ZERO,
            disks: Disks::default(),
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
        let Some(thread) = self.thread.take() else { return };
        // A successor may be at work already, and both wait for the same descriptor: it may take what was to wake this one.
        while !thread.is_finished() {
            self.wake();
            thread::sleep(STOP_PAUSE);
        }
        if thread.join().is_err() {
            tracing::error!("a watch thread panicked");
        }
        // And this one what was to wake the successor.
        self.wake();
    }
}

struct Body {
    shared: Arc<Shared>,
    pace: Pace,
    /// The processor time of this thread up to the last turn.
    worked: Duration,
    /// What of it was no look, since the last turn that looked.
    beside: Duration,
    disks: Disks,
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
        // A proof may wait for somebody else to be told of a recall.
        let is_wanted = oversight.is_wanted();
        let pause = if is_wanted { Some(PROOF_PAUSE) } else { self.pace.pause(Instant::now()) };
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
            self.pace.set_anew();
        }
        // Always with POLLERR, by which the kernel tells of a change of these files (`fs/namespace.c`, `mm/swapfile.c`).
        let is_hurried = (mounts | swaps).contains(PollFlags::PRI);
        if is_hurried {
            tracing::debug!("mounts or swap files changed: looking at all pinned files");
            self.pace.hurry(Instant::now());
        }
        let proof = oversight.is_wanted().then(Instant::now);
        // A thousand files that are pinned one after the other wake it a thousand times, but are planned a few times.
        let is_time = proof.is_some() || is_hurried || self.pace.is_rested(Instant::now());
        let looked = if is_time { self.look_around(proof.is_some()) } else { Duration::ZERO };
        self.account(looked, is_time);
        if let Some(begun) = proof.filter(|_| self.shared.posts().iter().all(|(_, post)| post.is_settled())) {
            oversight.proven(begun);
        }
        Ok(())
    }

    /// Looks at what is due, or at all. What the looks took of the processor.
    fn look_around(&mut self, at_all: bool) -> Duration {
        let now = Instant::now();
        if at_all || self.pace.is_plan_due(now) {
            self.plan(now);
        }
        if at_all {
            self.pace.all_due(now);
            // Nothing that was seen before is a proof.
            self.disks = Disks::default();
        }
        let mut looked = Duration::ZERO;
        if self.pace.is_quick_due(now) {
            let posts = self.watched();
            let begun = cpu_time();
            posts.iter().for_each(|(_, post)| check::quick(post));
            looked = cpu_time().saturating_sub(begun);
            self.pace.quick_done(Instant::now(), looked);
        }
        let due = self.pace.due(Instant::now());
        let begun = cpu_time();
        // From the end of one look to that of the next: nothing between them is forgotten.
        let mut until = begun;
        for id in due {
            match self.shared.post(id).filter(|post| is_watched(post)) {
                Some(post) => {
                    until = look(&post, &mut self.disks, until);
                    self.pace.done(id, Instant::now());
                }
                None => self.pace.forget(id),
            }
        }
        looked + until.saturating_sub(begun)
    }

    fn plan(&mut self, now: Instant) {
        let posts = self.watched();
        let costs: Vec<_> = posts.iter().map(|(id, post)| (*id, post.watch.cost())).collect();
        let intervals = self.pace.plan(now, &costs);
        posts.iter().zip(intervals).for_each(|((_, post), interval)| post.watch.set_interval(interval));
    }

    /// Counts what this thread and the guard did beside looks, and rests for what this one did.
    fn account(&mut self, looked: Duration, rests: bool) {
        let (now, worked) = (Instant::now(), cpu_time());
        let beside = worked.saturating_sub(self.worked + looked);
        self.worked = worked;
        self.beside += beside;
        self.pace.worked(now, beside + self.shared.take_rounds());
        if rests {
            self.pace.rest(now, std::mem::take(&mut self.beside));
        }
    }

    /// The files that have a map and are not recalled.
    fn watched(&self) -> Vec<(u64, Arc<Post>)> {
        let mut posts = self.shared.posts();
        posts.retain(|(_, post)| is_watched(post));
        posts
    }
}

fn is_watched(post: &Post) -> bool {
    post.map.get().is_some() && !post.is_recalled()
}
