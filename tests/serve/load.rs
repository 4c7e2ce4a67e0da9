//! Load of our own host, in a thread of this process.

use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fastice::initiator::bench::{
    self, BenchOptions, BenchProgress, BenchReport, Ledger, Limit, Pattern, Verify,
};
use fastice::initiator::controller::{ConnectOptions, Host};
use fastice::initiator::error::InitiatorError;
use nvme_spec::Nsid;

use super::daemon::{NQN, PATIENCE, eventually};

/// A seed for this run of a test; `FASTICE_TEST_SEED` repeats an old one.
pub(crate) fn seed(test: &str) -> u64 {
    let now =
        || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::from(since.subsec_nanos()));
    let seed = std::env::var("FASTICE_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(now);
    println!("{test}: FASTICE_TEST_SEED={seed}");
    seed
}

/// How a host connects here.
pub(crate) fn connect_options(address: SocketAddr) -> ConnectOptions {
    ConnectOptions::new(address, NQN, Host::random())
}

/// Mixed verified load on two queues until it is stopped.
pub(crate) fn options(address: SocketAddr, nsid: u32, seed: u64) -> BenchOptions {
    BenchOptions {
        pattern: Pattern::Random,
        read_percent: 30,
        depth: 16,
        queues: 2,
        limit: Limit::Duration(Duration::from_secs(60)),
        seed,
        verify: Verify::OnRead,
        flush_interval: 40,
        reconnect: Some(PATIENCE),
        ..BenchOptions::new(connect_options(address), Nsid(nsid))
    }
}

/// Of these more than a hundred units are written and known.
const COMMANDS_MIN: u64 = 300;

/// A load that runs.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    errors: Arc<AtomicU64>,
    thread: JoinHandle<Result<(BenchReport, Ledger), InitiatorError>>,
}

impl Load {
    /// Starts it, and waits until it has done enough to tell something, however busy the machine is.
    pub(crate) fn start(options: BenchOptions) -> Self {
        let load = Self::begin(options);
        load.reaches(COMMANDS_MIN);
        load
    }

    /// Starts it.
    pub(crate) fn begin(options: BenchOptions) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let errors = Arc::new(AtomicU64::new(0));
        let (stopped, counter, failed) = (Arc::clone(&stop), Arc::clone(&done), Arc::clone(&errors));
        let progress = move |progress: &BenchProgress| {
            counter.store(progress.reads + progress.writes, Ordering::Relaxed);
            failed.store(progress.errors, Ordering::Relaxed);
        };
        let thread = std::thread::spawn(move || bench::run_to_ledger(&options, &stopped, progress));
        Self { stop, done, errors, thread }
    }

    /// Reads and writes that had completed some tenths of a second ago.
    fn commands(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until it has done more.
    pub(crate) fn goes_on(&self) {
        let before = self.commands();
        eventually("the load goes on", || self.commands() > before || self.thread.is_finished());
    }

    /// Waits until it has done so many.
    pub(crate) fn reaches(&self, commands: u64) {
        eventually("the load goes on", || self.commands() >= commands || self.thread.is_finished());
    }

    /// Waits until it was refused something.
    pub(crate) fn is_refused(&self) {
        let errors = || self.errors.load(Ordering::Relaxed);
        eventually("the load is refused something", || errors() > 0 || self.thread.is_finished());
    }

    /// Waits until it ends without being told to.
    pub(crate) fn is_cut_off(&self) {
        eventually("the load is cut off", || self.thread.is_finished());
    }

    /// Stops it: its report, and what it wrote.
    pub(crate) fn end(self) -> Result<(BenchReport, Ledger), InitiatorError> {
        self.stop.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + 2 * PATIENCE;
        while !self.thread.is_finished() {
            assert!(Instant::now() < deadline, "the load does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.thread.join().expect("the load does not panic")
    }

    /// Stops it; it must not have met anything wrong.
    pub(crate) fn end_clean(self) -> (BenchReport, Ledger) {
        let (report, ledger) = self.end().expect("the load ends well");
        assert!(report.is_clean(), "{report:?}");
        assert!(report.writes.commands > 0 && report.reads.commands > 0, "{report:?}");
        (report, ledger)
    }
}

/// Every acknowledged write must be in the file, read through the filesystem.
pub(crate) fn assert_in_file(ledger: &mut Ledger, path: &Path) {
    let units_checked = units_in_file(ledger, path);
    assert!(units_checked > 100, "{units_checked}");
}

/// The same, also where a failure has left many writes of which nobody knows whether they were done: how many are known.
pub(crate) fn units_in_file(ledger: &mut Ledger, path: &Path) -> u64 {
    units_behind(ledger, path, 0)
}

/// The same for a file that hosts see from byte `begin` on.
pub(crate) fn units_behind(ledger: &mut Ledger, path: &Path, begin: u64) -> u64 {
    let file = std::fs::File::open(path).expect("the file is free");
    // What this process read before is older than what was written past the cache since.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
    let audit = ledger
        .audit(|offset, data| file.read_exact_at(data, offset.get() + begin))
        .expect("the file is read");
    assert_eq!(audit.faults, 0, "{audit:?}");
    audit.units_checked
}
