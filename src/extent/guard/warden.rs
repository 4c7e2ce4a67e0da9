//! The threads that guard all pinned files of a process.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::incident::{Doubt, RecallReason};
use super::opens::{self, Opens, Verdict};
use super::oversight::Oversight;
use super::post::{LATE_GRACE, Post};
use crate::extent::sys::{self, ThreadId};
use crate::extent::watch::{Watch, WatchOptions, cpu_time};

/// How often the guard thread looks whether the watch thread keeps its promises.
const OVERSIGHT: Duration = Duration::from_millis(500);
/// A thread that had no turn for so much longer than it asked for was stopped, with the whole process perhaps.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Guards files: as many as one likes, with two threads. Ends when the last file and the last owner are gone.
pub struct Warden {
    shared: Arc<Shared>,
    signals_to: ThreadId,
    guard: Option<JoinHandle<()>>,
    watch: Watch,
}

/// A file that a reader opens, and the descriptor by which the kernel asks about that.
type Opening = (Arc<Post>, OwnedFd);

/// What the threads share.
pub(in crate::extent) struct Shared {
    group: OwnedFd,
    stop: OwnedFd,
    posts: Mutex<BTreeMap<u64, Arc<Post>>>,
    next: AtomicU64,
    /// Lets readers in, where they are.
    doorman: Mutex<Option<mpsc::Sender<Opening>>>,
    pub(in crate::extent) oversight: Arc<Oversight>,
    /// What the guard thread did by the clock and the watch has not counted yet, in processor time.
    rounds_ns: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Post>>> {
        self.posts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All files, as they are now.
    pub(in crate::extent) fn posts(&self) -> Vec<(u64, Arc<Post>)> {
        self.lock().iter().map(|(id, post)| (*id, Arc::clone(post))).collect()
    }

    /// What becomes of the open of this file by another process: denied, or handed on to who lets readers in.
    ///
    /// A file is known from before its mark until after that is gone. So one that nobody knows is pinned no more, and its open
    /// was asked about just before: it goes on, as it would have a moment later. Whoever pins the file anew has it counted
    /// among those who have it open, as long as it waits for this answer too, and refuses.
    fn judge(&self, file: OwnedFd) -> Verdict {
        let Ok(stat) = rustix::fs::fstat(&file) else { return Verdict::Deny(file) };
        let post = self.lock().values().find(|post| post.is_at((stat.st_dev, stat.st_ino))).cloned();
        let Some(post) = post else { return Verdict::Allow(file) };
        if !post.lets_in() {
            return Verdict::Deny(file);
        }
        let doorman = self.doorman.lock().unwrap_or_else(PoisonError::into_inner);
        match doorman.as_ref() {
            None => Verdict::Deny(file),
            Some(doorman) => match doorman.send((post, file)) {
                Ok(()) => Verdict::HandedOn,
                Err(mpsc::SendError((_, file))) => Verdict::Deny(file),
            },
        }
    }

    /// Starts the thread that lets readers in, unless it is there: a gigabyte in the page cache takes some 60 ms to drop, which
    /// must not hold up the recalls. It ends with the last that can hand it something.
    fn start_doorman(&self) -> io::Result<()> {
        let mut doorman = self.doorman.lock().unwrap_or_else(PoisonError::into_inner);
        if doorman.is_some() {
            return Ok(());
        }
        let (group, (hand_on, opens)) = (self.group.try_clone()?, mpsc::channel::<Opening>());
        thread::Builder::new().name("fastice-readers".to_owned()).spawn(move || {
            for (post, file) in opens {
                post.drop_cache();
                if let Err(error) = opens::respond(&group, &file, true) {
                    tracing::error!(path = %post.path.display(), %error, "a local reader waits in vain");
                }
            }
        })?;
        *doorman = Some(hand_on);
        Ok(())
    }

    /// One file.
    pub(in crate::extent) fn post(&self, id: u64) -> Option<Arc<Post>> {
        self.lock().get(&id).cloned()
    }

    /// What the guard thread did by the clock since this was asked last, in processor time.
    pub(in crate::extent) fn take_rounds(&self) -> Duration {
        Duration::from_nanos(self.rounds_ns.swap(0, Ordering::Relaxed))
    }

    /// Recalls all files.
    pub(in crate::extent) fn recall_all(&self, reason: RecallReason, detail: &str) {
        self.posts().iter().for_each(|(_, post)| post.recall(reason, detail.to_owned()));
    }
}

impl Warden {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the kernel gives no fanotify group or descriptors (fanotify with permission events takes `CAP_SYS_ADMIN`),
    /// or no threads.
    pub fn start(options: WatchOptions) -> io::Result<Arc<Self>> {
        Self::start_with(options, Arc::new(Oversight::new()?))
    }

    /// The same, for cores that ask `oversight` before they go on after a pause.
    ///
    /// # Errors
    /// As [`Warden::start`].
    pub fn start_with(options: WatchOptions, oversight: Arc<Oversight>) -> io::Result<Arc<Self>> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (group, next) = (sys::fanotify_group()?, AtomicU64::new(0));
        let shared = Arc::new(Shared {
            group,
            stop,
            posts: Mutex::default(),
            next,
            doorman: Mutex::default(),
            oversight,
            rounds_ns: AtomicU64::new(0),
        });
        let (ready, started) = mpsc::channel();
        let body = Body::new(&shared);
        let guard =
            thread::Builder::new().name("fastice-guard".to_owned()).spawn(move || body.run(&ready))?;
        let signals_to = match started.recv() {
            Ok(Ok(signals_to)) => signals_to,
            Ok(Err(error)) => return Err(error),
            Err(mpsc::RecvError) => return Err(io::Error::other("the guard thread ended at once")),
        };
        // From here on dropping it ends the guard thread too.
        let mut warden =
            Self { shared: Arc::clone(&shared), signals_to, guard: Some(guard), watch: Watch::idle() };
        warden.watch.begin(shared, options)?;
        Ok(Arc::new(warden))
    }

    /// Whether both threads are at work. When one ended by itself, all files were recalled, and the warden is of no use for
    /// others.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| !guard.is_finished()) && self.watch.is_at_work()
    }

    pub(super) fn signals_to(&self) -> ThreadId {
        self.signals_to
    }

    /// Takes a file in: opens of it are asked about from now on.
    pub(super) fn take_in(&self, post: &Arc<Post>) -> io::Result<u64> {
        if post.lets_in() {
            self.shared.start_doorman()?;
        }
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        // Before the mark: what is asked about the file can be told to it.
        self.shared.lock().insert(id, Arc::clone(post));
        sys::mark_opens(self.shared.group.as_fd(), post.file.as_fd()).inspect_err(|_| {
            self.shared.lock().remove(&id);
        })?;
        Ok(id)
    }

    pub(super) fn let_out(&self, id: u64, post: &Post) {
        if let Err(error) = sys::unmark_opens(self.shared.group.as_fd(), post.file.as_fd()) {
            tracing::error!(path = %post.path.display(), %error, "the open-permission mark cannot be taken away");
        }
        self.shared.lock().remove(&id);
    }

    /// Something is to be watched that was not before.
    pub(super) fn look_anew(&self) {
        self.watch.wake();
    }
}

impl fmt::Debug for Warden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Warden").field("files", &self.shared.lock().len()).finish_non_exhaustive()
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        // A thread that ended by itself has told that already, and another warden may be at work since.
        if self.is_whole() {
            self.shared.oversight.keep(false);
        }
        if let Err(error) = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes()) {
            // Only a full counter refuses, and then the thread has been told already.
            tracing::error!(%error, "cannot stop a guard thread by eventfd");
        }
        if self.guard.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a guard thread panicked");
        }
    }
}

/// What runs on the guard thread. Recalls all files when it ends without having been told to, by a panic too.
struct Body {
    shared: Arc<Shared>,
    last_turn: Cell<Instant>,
    /// The last time that this thread, and all others perhaps, had no turn: until when, and for how long.
    pause: Cell<(Instant, Duration)>,
}

enum Turn {
    Goon,
    Stop,
}

impl Body {
    fn new(shared: &Arc<Shared>) -> Self {
        let now = Instant::now();
        Self {
            shared: Arc::clone(shared),
            last_turn: Cell::new(now),
            pause: Cell::new((now, Duration::ZERO)),
        }
    }

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
        let alarm = Alarm(&self.shared, "the guard thread has ended");
        loop {
            match self.turn(&signals) {
                Ok(Turn::Goon) => {}
                Ok(Turn::Stop) => {
                    std::mem::forget(alarm);
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "the guard of pinned files failed");
                    return;
                }
            }
        }
    }

    /// Waits for what comes first and deals with it.
    fn turn(&self, signals: &OwnedFd) -> io::Result<Turn> {
        let shared = &*self.shared;
        let begun = cpu_time();
        let timeout = Timespec { tv_sec: 0, tv_nsec: OVERSIGHT.subsec_nanos().into() };
        let mut fds = [
            PollFd::new(&shared.group, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(&shared.stop, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => return Ok(Turn::Goon),
            result => result?,
        };
        let [opens, breaks, stop] = fds.map(|fd| fd.revents());
        if breaks.contains(PollFlags::IN) {
            drain(signals)?;
            // Whose it was is told by the leases: a signal that found the queue full says nothing.
            shared.posts().iter().for_each(|(_, post)| post.look_at_lease());
        }
        if opens.contains(PollFlags::IN)
            && opens::answer(&shared.group, &|file| shared.judge(file))? == Opens::Overrun
        {
            shared.recall_all(
                RecallReason::GuardFailed,
                "the kernel had more opens to ask about than it keeps",
            );
        }
        if (opens | breaks).intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            return Err(io::Error::other("a descriptor of the guard went bad"));
        }
        self.look_after_the_watch();
        if (opens | breaks).is_empty() {
            let took = u64::try_from(cpu_time().saturating_sub(begun).as_nanos()).unwrap_or(u64::MAX);
            shared.rounds_ns.fetch_add(took, Ordering::Relaxed);
        }
        Ok(if stop.is_empty() { Turn::Goon } else { Turn::Stop })
    }

    /// Recalls what the watch has not looked at for too long. A process that was stopped could not look, and its cores
    /// wait until it has: the watch is given the time to.
    fn look_after_the_watch(&self) {
        let now = Instant::now();
        let gap = now.duration_since(self.last_turn.replace(now));
        if gap > OVERSIGHT + PAUSE_MIN {
            self.pause.set((now, gap));
            self.shared.oversight.want(now);
        }
        let (until, pause) = self.pause.get();
        let excused = if now.duration_since(until) < LATE_GRACE { pause } else { Duration::ZERO };
        let late = |post: &Arc<Post>| Some((Arc::clone(post), post.is_late(excused)?));
        let late: Vec<_> = self.shared.lock().values().filter_map(late).collect();
        for (post, late) in late {
            let detail = format!("the last look was {} ms ago", late.as_millis());
            post.recall(RecallReason::Doubt(Doubt::WatchLate), detail);
        }
    }
}

/// Raises [`RecallReason::GuardFailed`] for all files when dropped.
pub(in crate::extent) struct Alarm<'a>(pub(in crate::extent) &'a Shared, pub(in crate::extent) &'static str);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        self.0.recall_all(RecallReason::GuardFailed, self.1);
        // Nothing is let in that a proof could be wanted for.
        self.0.oversight.keep(false);
    }
}

fn drain(signals: &OwnedFd) -> io::Result<()> {
    /// `struct signalfd_siginfo`.
    const SIGINFO_LEN: usize = 128;
    let mut info = [0_u8; SIGINFO_LEN * 8];
    loop {
        match rustix::io::read(signals, &mut info) {
            Ok(len) if len == info.len() => {}
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::process::Command;

    use super::*;
    use crate::extent::guard::Guard;
    use crate::extent::mode::GuardMode;
    use crate::extent::readers::LocalReaders;

    fn may_be_opened(path: &std::path::Path) -> bool {
        Command::new("cat").arg(path).output().expect("cat runs").status.success()
    }

    #[test]
    fn an_open_that_was_asked_about_when_the_pin_ended_goes_on() {
        let warden = match Warden::start(WatchOptions::default()) {
            Ok(warden) => warden,
            Err(error) => {
                let _ = writeln!(io::stderr(), "SKIPPED: opens at the end of a pin: {error}");
                return;
            }
        };
        let mut named = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).expect("room");
        named.write_all(b"text").expect("room");
        let file = Arc::new(File::open(named.path()).expect("ours"));
        let kind = (GuardMode::Default, LocalReaders::Refuse);
        let guard = Guard::start(Arc::clone(&warden), &file, named.path().to_owned(), kind, None);
        let guard = guard.expect("a mark");
        assert!(!may_be_opened(named.path()), "it is guarded");
        // What the guard thread has before it when the file was let go while somebody waits: an event, and no post.
        let posts = std::mem::take(&mut *warden.shared.lock());
        assert!(may_be_opened(named.path()), "nobody has it pinned");
        *warden.shared.lock() = posts;
        assert!(!may_be_opened(named.path()), "it is guarded again");
        drop(guard);
        assert!(may_be_opened(named.path()));
    }
}
