//! One pinned file in the care of a warden.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::incident::{OnRecall, RecallReason, RecallSignal, RecallWatch};
use super::warden::Warden;
use crate::extent::compare::Difference;
use crate::extent::map::FrozenMap;
use crate::extent::mode::GuardMode;
use crate::extent::readers::{self, LocalReaders};
use crate::extent::sys::{self, Lease};

/// What a file was like when its map was frozen, as far as it is cheap to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// When the inode was last changed (`stx_ctime`): seconds and nanoseconds.
    pub(in crate::extent) changed: (i64, u32),
    /// `FS_IOC_GETVERSION`; `None` where the filesystem has none.
    pub(in crate::extent) inode_generation: Option<u32>,
}

/// What the guards share of a file.
#[derive(Debug)]
pub(in crate::extent) struct Post {
    pub(in crate::extent) path: PathBuf,
    pub(in crate::extent) file: Arc<File>,
    pub(in crate::extent) mode: GuardMode,
    readers: LocalReaders,
    /// Device and inode, by which an open is known to be one of this file.
    place: (u64, u64),
    pub(super) signal: RecallWatch,
    /// The lease that is held; what the kernel says otherwise is a break.
    lease: Mutex<Lease>,
    /// Set when the watch begins.
    pub(in crate::extent) map: OnceLock<Arc<FrozenMap>>,
    pub(in crate::extent) baseline: Mutex<Option<Baseline>>,
    pub(in crate::extent) watch: WatchState,
}

/// How far the watch of one file is. Written by the watch thread, read by all.
#[derive(Debug)]
pub(in crate::extent) struct WatchState {
    origin: Instant,
    /// Since `origin`: when the map was last read and found to be the frozen one.
    last_ok_ns: AtomicU64,
    interval_ns: AtomicU64,
    cost_ns: AtomicU64,
    checks: AtomicU64,
}

/// The same, as it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchReport {
    /// How often the map was read since the file was pinned.
    pub checks: u64,
    /// How long ago it was last found to be the frozen one.
    pub last_check_ago: Duration,
    /// How long it may be until the next look.
    pub interval: Duration,
    /// After how long without a look the file counts as changed: what a change that nothing but the map shows may take to
    /// be noticed, at the longest.
    pub bound: Duration,
    /// What one look costs in processor time.
    pub cost: Duration,
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl WatchState {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            origin: Instant::now(),
            last_ok_ns: zero(),
            interval_ns: zero(),
            cost_ns: zero(),
            checks: zero(),
        }
    }

    /// A look that began at `begun` found nothing.
    pub(in crate::extent) fn found_nothing(&self, begun: Instant, cost: Duration) {
        self.last_ok_ns.fetch_max(ns(begun.saturating_duration_since(self.origin)), Ordering::Relaxed);
        self.cost_ns.store(ns(smoothed(self.cost(), cost)).max(1), Ordering::Relaxed);
        self.checks.fetch_add(1, Ordering::Relaxed);
    }

    pub(in crate::extent) fn set_interval(&self, interval: Duration) {
        self.interval_ns.store(ns(interval), Ordering::Relaxed);
    }

    pub(in crate::extent) fn cost(&self) -> Duration {
        Duration::from_nanos(self.cost_ns.load(Ordering::Relaxed))
    }

    pub(in crate::extent) fn report(&self) -> WatchReport {
        let interval = Duration::from_nanos(self.interval_ns.load(Ordering::Relaxed));
        let last_ok = self.origin + Duration::from_nanos(self.last_ok_ns.load(Ordering::Relaxed));
        WatchReport {
            checks: self.checks.load(Ordering::Relaxed),
            last_check_ago: last_ok.elapsed(),
            interval,
            bound: bound_of(interval),
            cost: self.cost(),
        }
    }
}

/// What a look is taken to cost that cost `before` so far, and `now` the last time. A dear one counts for more than a cheap one:
/// who takes looks for too cheap has too many of them before he knows better.
pub(in crate::extent) fn smoothed(before: Duration, now: Duration) -> Duration {
    match before {
        Duration::ZERO => now,
        _ if now > before => (before + now) / 2,
        _ => before / 8 * 7 + now / 8,
    }
}

/// How long the end of a look is waited for when a file is let go: that of a million extents takes a quarter of this.
const LOOK_PATIENCE: Duration = Duration::from_secs(1);
/// What a busy host may delay a look by without that it counts as late.
pub(in crate::extent) const LATE_GRACE: Duration = Duration::from_secs(2);

/// After how long without a look a file counts as changed whose map is looked at every `interval`.
pub(in crate::extent) const fn bound_of(interval: Duration) -> Duration {
    interval.saturating_mul(2).saturating_add(LATE_GRACE)
}

impl Post {
    /// Whether this is the file at that place.
    pub(super) fn is_at(&self, place: (u64, u64)) -> bool {
        self.place == place
    }

    /// Whether other processes may open the file.
    pub(super) fn lets_in(&self) -> bool {
        self.readers == LocalReaders::Allow
    }

    /// Drops what is cached of the file, so that whoever opens it now reads nothing that is older.
    pub(super) fn drop_cache(&self) {
        if let Err(error) = readers::drop_cache(&self.file) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "cannot drop the page cache: a local reader may see old data");
        }
    }

    /// Recalls when the kernel says that the lease is another than the one that was taken.
    pub(super) fn look_at_lease(&self) {
        let held = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        if *held == Lease::None {
            return;
        }
        let found = sys::get_lease(self.file.as_fd());
        match found {
            Ok(found) if found == *held => {}
            Ok(_) => self.recall(RecallReason::LeaseBreak, String::new()),
            Err(error) => self.recall(RecallReason::GuardFailed, format!("asking for the lease: {error}")),
        }
    }

    pub(in crate::extent) fn recall(&self, reason: RecallReason, detail: String) {
        self.signal.signal.raise(reason, detail, Vec::new(), None);
    }

    /// The same for what a look at the inode or at the map has found; with when the inode was changed, if it was.
    pub(in crate::extent) fn recall_with(
        &self,
        reason: RecallReason,
        detail: String,
        differences: Vec<Difference>,
        changed: Option<SystemTime>,
    ) {
        self.signal.signal.raise(reason, detail, differences, changed);
    }

    pub(in crate::extent) fn is_recalled(&self) -> bool {
        self.signal.signal.is_raised()
    }

    /// Whether nobody has to be told of a recall any more.
    pub(in crate::extent) fn is_settled(&self) -> bool {
        self.signal.signal.is_settled()
    }

    /// Whether the map is watched and was not looked at for too long; not counting a pause of the whole process.
    pub(super) fn is_late(&self, pause: Duration) -> Option<Duration> {
        self.map.get()?;
        let report = self.watch.report();
        let ago = report.last_check_ago.saturating_sub(pause);
        (ago > report.bound).then_some(report.last_check_ago)
    }
}

/// A file in the care of a warden. Dropping it ends that, and lets every waiting opener go on.
#[derive(Debug)]
pub(in crate::extent) struct Guard {
    warden: Arc<Warden>,
    id: u64,
    post: Arc<Post>,
}

impl Guard {
    /// From now on every open of `file` by another process is denied, or, where readers are let in, heard of.
    pub(in crate::extent) fn start(
        warden: Arc<Warden>,
        file: &Arc<File>,
        path: PathBuf,
        (mode, readers): (GuardMode, LocalReaders),
        on_recall: Option<OnRecall>,
    ) -> io::Result<Self> {
        let stat = file.metadata()?;
        let signal = RecallWatch { signal: Arc::new(RecallSignal::new(on_recall)?) };
        let post = Arc::new(Post {
            path,
            file: Arc::clone(file),
            mode,
            readers,
            place: (stat.dev(), stat.ino()),
            signal,
            lease: Mutex::new(Lease::None),
            map: OnceLock::new(),
            baseline: Mutex::new(None),
            watch: WatchState::new(),
        });
        let id = warden.take_in(&post)?;
        Ok(Self { warden, id, post })
    }

    /// Directs the lease breaks of `file` to the guard thread. To be called before the lease is taken.
    pub(in crate::extent) fn hear_leases_of(&self, file: &File) -> io::Result<()> {
        sys::direct_signals(file.as_fd(), self.warden.signals_to())
    }

    /// Takes, changes or lets go of the lease on the file, so that the guard thread never takes the change for a break.
    pub(in crate::extent) fn change_lease(&self, lease: Lease) -> io::Result<()> {
        let mut held = self.post.lease.lock().unwrap_or_else(PoisonError::into_inner);
        if lease == Lease::None {
            // Whatever comes of it, nothing is expected any more.
            *held = lease;
        }
        sys::set_lease(self.post.file.as_fd(), lease)?;
        *held = lease;
        Ok(())
    }

    /// From now on the file is watched: it has to stay what `map` and `baseline` say. It was looked at a moment ago, for
    /// `cost` of processor time, from which the first interval follows.
    pub(in crate::extent) fn watch_over(&self, map: &Arc<FrozenMap>, baseline: Baseline, cost: Duration) {
        *self.post.baseline.lock().unwrap_or_else(PoisonError::into_inner) = Some(baseline);
        self.post.watch.found_nothing(Instant::now(), cost);
        // Set once in the life of a guard.
        let _ = self.post.map.set(Arc::clone(map));
        self.warden.look_anew();
    }

    pub(in crate::extent) fn post(&self) -> &Arc<Post> {
        &self.post
    }

    pub(in crate::extent) fn watch(&self) -> &RecallWatch {
        &self.post.signal
    }

    /// The doubt was cleared: the file was looked at, and is as it was but for `baseline`. Whether it was the recall that
    /// stands.
    pub(in crate::extent) fn clear(&self, number: u64, baseline: Baseline) -> bool {
        *self.post.baseline.lock().unwrap_or_else(PoisonError::into_inner) = Some(baseline);
        self.post.watch.found_nothing(Instant::now(), self.post.watch.cost());
        let cleared = self.post.signal.signal.clear(number);
        // A file that was recalled was not looked at: when it was the last one, the watch sleeps.
        self.warden.look_anew();
        cleared
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.warden.let_out(self.id, &self.post);
        // Whoever looks at the file at this moment has it open, and whoever pins it next would find it in use.
        let until = Instant::now() + LOOK_PATIENCE;
        while Arc::strong_count(&self.post) > 1 && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
