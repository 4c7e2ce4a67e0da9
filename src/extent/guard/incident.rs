//! Why a pin is recalled, and how whoever serves it hears of that.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use rustix::event::EventfdFlags;
use rustix::fd::BorrowedFd;
use serde::{Deserialize, Serialize};

use crate::extent::compare::Difference;

/// Why a pin must be let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RecallReason {
    /// The lease is being broken: somebody opens the file for writing or truncates it, and waits for at most
    /// `/proc/sys/fs/lease-break-time` seconds until we let go.
    LeaseBreak,
    /// The thread that denies opens and hears of lease breaks has failed.
    GuardFailed,
    /// The frozen map may not be that of the living file any more.
    Doubt(Doubt),
}

/// What the watch found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Doubt {
    /// FIEMAP tells another map, or flags that forbid to serve it.
    MapMoved,
    /// The file has another size.
    Resized,
    /// The immutable flag is not set any more.
    FlagCleared,
    /// The change time is another one: somebody changed the inode, and may have changed it back.
    Touched,
    /// The inode has another generation: its content was exchanged with another's.
    OtherGeneration,
    /// The lease is not held any more, and nobody was told of a break.
    LeaseLost,
    /// The file is pinned as a swap area, and is none any more.
    SwapOff,
    /// The file is pinned on a read-only filesystem, which is none any more.
    Writable,
    /// The filesystem of the file was frozen for it, and is no more.
    Thawed,
    /// The disk under the filesystem is gone, or has another size.
    DiskChanged,
    /// The filesystem does not tell.
    NotReadable,
    /// Nobody has looked at the file for longer than was promised.
    WatchLate,
}

impl Doubt {
    /// Whether a second look, with the export fenced, may show that nothing has changed.
    #[must_use]
    pub const fn may_be_cleared(self) -> bool {
        matches!(self, Self::Touched | Self::DiskChanged | Self::NotReadable | Self::WatchLate)
    }
}

impl RecallReason {
    /// A stable word for scripts.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::LeaseBreak => "lease-break",
            Self::GuardFailed => "guard-failed",
            Self::Doubt(doubt) => doubt.word(),
        }
    }
}

impl fmt::Display for RecallReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LeaseBreak => "somebody with the power to do so opens the file for writing (lease break)",
            Self::GuardFailed => "the guard that denies opens of the file failed",
            Self::Doubt(doubt) => doubt.text(),
        })
    }
}

impl Doubt {
    /// As in JSON.
    const fn word(self) -> &'static str {
        match self {
            Self::MapMoved => "map-moved",
            Self::Resized => "resized",
            Self::FlagCleared => "flag-cleared",
            Self::Touched => "touched",
            Self::OtherGeneration => "other-generation",
            Self::LeaseLost => "lease-lost",
            Self::SwapOff => "swap-off",
            Self::Writable => "writable",
            Self::Thawed => "thawed",
            Self::DiskChanged => "disk-changed",
            Self::NotReadable => "not-readable",
            Self::WatchLate => "watch-late",
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::MapMoved => "the extent map of the file changed",
            Self::Resized => "the size of the file changed",
            Self::FlagCleared => "the immutable flag of the file was cleared",
            Self::Touched => "somebody changed the inode of the file",
            Self::OtherGeneration => "the content of the file was exchanged",
            Self::LeaseLost => "the lease on the file is lost",
            Self::SwapOff => "the swap area on the file was ended (swapoff)",
            Self::Writable => "the filesystem was remounted read-write",
            Self::Thawed => "the filesystem was thawed",
            Self::DiskChanged => "the disk under the file is gone or has another size",
            Self::NotReadable => "the filesystem does not tell the map of the file",
            Self::WatchLate => "nobody has looked at the file for longer than was promised",
        }
    }
}

/// A recall: what was found, when, and how exactly the file differs.
#[derive(Clone, Debug)]
pub struct Incident {
    /// Which of the recalls of this pin it is, from 1.
    pub number: u64,
    /// Why.
    pub reason: RecallReason,
    /// More of it, for people; may be empty.
    pub detail: String,
    /// Which blocks are elsewhere now: the first ones.
    pub differences: Vec<Difference>,
    /// When it was noticed, by the clock on the wall.
    pub at: SystemTime,
    /// When it was noticed.
    pub noticed: Instant,
    /// When the inode was changed last, by the filesystem's own word; `None` when it was not, as by what only the map shows.
    pub changed: Option<SystemTime>,
}

/// What to call on a recall. Runs on a thread of the guards: to be short, and to wake others.
pub type OnRecall = Arc<dyn Fn(&Incident) + Send + Sync>;

/// Sees a recall: by asking, or by polling its descriptor.
#[derive(Clone, Debug)]
pub struct RecallWatch {
    pub(super) signal: Arc<RecallSignal>,
}

impl RecallWatch {
    /// Why the pin is recalled; `None` while it is not.
    #[must_use]
    pub fn reason(&self) -> Option<RecallReason> {
        self.signal.lock().now.as_ref().map(|incident| incident.reason)
    }

    /// The recall; `None` while there is none.
    #[must_use]
    pub fn incident(&self) -> Option<Incident> {
        self.signal.lock().now.clone()
    }
}

impl AsFd for RecallWatch {
    /// An eventfd that becomes and stays readable with the first recall. To be polled, not read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.event.as_fd()
    }
}

/// What one file's recall is raised by. One at a time: what comes while one stands adds nothing.
pub(super) struct RecallSignal {
    standing: Mutex<Standing>,
    event: OwnedFd,
    on_recall: Option<OnRecall>,
    /// The number of the last recall that was told on.
    told: AtomicU64,
}

#[derive(Debug, Default)]
struct Standing {
    now: Option<Incident>,
    count: u64,
}

impl fmt::Debug for RecallSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecallSignal").field("standing", &*self.lock()).finish_non_exhaustive()
    }
}

impl RecallSignal {
    pub(super) fn new(on_recall: Option<OnRecall>) -> std::io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { standing: Mutex::default(), event, on_recall, told: AtomicU64::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_raised(&self) -> bool {
        self.lock().now.is_some()
    }

    /// Recalls. The first reason stays, but for a doubt, which anything graver replaces: whoever waits in an open does
    /// not wait for us to be sure.
    pub(super) fn raise(
        &self,
        reason: RecallReason,
        detail: String,
        differences: Vec<Difference>,
        changed: Option<SystemTime>,
    ) {
        let incident = {
            let mut standing = self.lock();
            let graver = !matches!(reason, RecallReason::Doubt(_));
            let in_doubt = |now: &Incident| matches!(now.reason, RecallReason::Doubt(_));
            if standing.now.as_ref().is_some_and(|now| !(graver && in_doubt(now))) {
                return;
            }
            standing.count += 1;
            let (at, noticed) = (SystemTime::now(), Instant::now());
            let number = standing.count;
            let incident = Incident { number, reason, detail, differences, at, noticed, changed };
            standing.now = Some(incident.clone());
            incident
        };
        if let Err(error) = rustix::io::write(&self.event, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot signal a recall by eventfd");
        }
        if let Some(on_recall) = &self.on_recall {
            on_recall(&incident);
        }
        self.told.fetch_max(incident.number, Ordering::AcqRel);
    }

    /// Whether whoever has to know of the recall that stands, if one does, knows it.
    pub(super) fn is_settled(&self) -> bool {
        let number = self.lock().now.as_ref().map_or(0, |incident| incident.number);
        self.told.load(Ordering::Acquire) >= number
    }

    /// A doubt was cleared. Whether it was the one that stands.
    pub(super) fn clear(&self, number: u64) -> bool {
        let mut standing = self.lock();
        let is_it = standing.now.as_ref().is_some_and(|now| now.number == number);
        if is_it {
            standing.now = None;
        }
        is_it
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_word_that_scripts_may_rely_on() {
        use Doubt::{
            DiskChanged, FlagCleared, LeaseLost, MapMoved, NotReadable, OtherGeneration, Resized, SwapOff,
            Thawed, Touched, WatchLate, Writable,
        };
        let lost = [FlagCleared, LeaseLost, SwapOff, Writable, Thawed];
        let others = [MapMoved, Resized, Touched, OtherGeneration, DiskChanged, NotReadable, WatchLate];
        for doubt in lost.into_iter().chain(others) {
            let json = serde_json::to_string(&doubt).expect("a word");
            assert_eq!(json, format!("\"{}\"", RecallReason::Doubt(doubt).word()));
            let manual = include_str!("../../../docs/USER.md");
            assert!(manual.contains(&format!("`{}`", RecallReason::Doubt(doubt).word())), "{doubt:?}");
        }
        assert_eq!(RecallReason::LeaseBreak.word(), "lease-break");
        assert_eq!(RecallReason::GuardFailed.word(), "guard-failed");
    }

    #[test]
    fn the_gravest_recall_stands_and_only_a_doubt_is_cleared() {
        let count = Arc::new(AtomicU64::new(0));
        let heard = Arc::clone(&count);
        let on_recall: OnRecall = Arc::new(move |incident| heard.store(incident.number, Ordering::Relaxed));
        let signal = RecallSignal::new(Some(on_recall)).expect("an eventfd");
        let doubt = |doubt| signal.raise(RecallReason::Doubt(doubt), String::new(), Vec::new(), None);
        doubt(Doubt::Touched);
        doubt(Doubt::MapMoved);
        assert_eq!(count.load(Ordering::Relaxed), 1, "one is enough");
        signal.raise(RecallReason::LeaseBreak, String::new(), Vec::new(), None);
        assert_eq!(count.load(Ordering::Relaxed), 2);
        doubt(Doubt::MapMoved);
        assert!(!signal.clear(1), "another one stands");
        assert_eq!(signal.lock().now.as_ref().map(|now| now.reason), Some(RecallReason::LeaseBreak));
        assert!(signal.clear(2) && !signal.is_raised());
        doubt(Doubt::MapMoved);
        assert_eq!(count.load(Ordering::Relaxed), 3, "cleared, it can be raised again");
    }
}
