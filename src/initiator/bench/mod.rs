//! The workload engine behind `fastice bench`: one thread a queue, no allocation and no lock per command.
//!
//! ```text
//!   run -+- worker 0: queue 1 --- its share of the blocks (verify, sequential), or all of them (random)
//!        +- worker 1: queue 2
//!        +- ...                   counters, one cache line a worker --> progress callback --> report
//! ```
//!
//! With [`Verify`] every logical block that is written describes itself ([`verify`]), and a table keeps what each
//! unit must hold: the last acknowledged write. A read finds a block that is wrong, stale, torn or misplaced. After
//! a connection that broke, units with a write in flight may hold either generation; all others may not.

pub mod ledger;
pub mod report;
pub mod verify;
mod worker;

pub use ledger::Ledger;
pub use report::{BenchReport, DirectionReport, LatencyReport, VerifyReport};
pub(crate) use report::{latency, rate};

use super::controller::{ConnectOptions, Controller};
use super::error::{ErrorKind, InitiatorError};
use super::namespace::Namespace;
use super::transport::DEPTH_MAX;
use crate::units::{BlockSize, ByteLen, ByteOffset, Lba};
use nvme_spec::Nsid;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use worker::{Share, Worker};

/// The most units of one verifying run: the table takes four bytes each.
const VERIFY_UNITS_MAX: u64 = 1 << 28;
/// Time between two calls of the progress callback.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Time to the first one, which tells whoever waits for it that the run has begun.
const PROGRESS_FIRST: Duration = Duration::from_millis(20);

/// Which unit comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// One after the other, from the start again after the end.
    Sequential,
    /// Any.
    Random,
}

/// Whether and when data is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Not at all.
    Off,
    /// All that was written is read back at the end.
    AfterWrites,
    /// Each read of what this run wrote is checked, and all of it is read back at the end.
    OnRead,
}

/// When a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// After a time.
    Duration(Duration),
    /// After so many bytes, of all queues together.
    Bytes(ByteLen),
}

/// A workload.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Which controller; its `io_queues` and `queue_size` follow from `queues` and `depth`.
    pub connect: ConnectOptions,
    /// Which namespace.
    pub nsid: Nsid,
    /// The order.
    pub pattern: Pattern,
    /// Reads in percent; the rest is writes.
    pub read_percent: u8,
    /// Bytes of a read or write: whole blocks, and no more than the controller takes at once.
    pub unit_len: u32,
    /// Commands in flight on each queue.
    pub depth: u16,
    /// Queues, each with a thread.
    pub queues: u16,
    /// When to end.
    pub limit: Limit,
    /// Where on the namespace the workload begins.
    pub start: ByteOffset,
    /// How long the part of the namespace is that is used; to the end when `None`.
    pub span: Option<ByteLen>,
    /// Makes the run repeatable: order of units, and content of blocks.
    pub seed: u64,
    /// Verification.
    pub verify: Verify,
    /// Write with Force Unit Access.
    pub fua: bool,
    /// Writes between two Flush commands of a queue; 0 for none.
    pub flush_interval: u32,
    /// How long to try to connect again when the connection breaks; `None` ends the run with the error.
    pub reconnect: Option<Duration>,
}

impl BenchOptions {
    /// Random 4 KiB reads, 32 in flight on one queue, for ten seconds.
    #[must_use]
    pub fn new(connect: ConnectOptions, nsid: Nsid) -> Self {
        Self {
            connect,
            nsid,
            pattern: Pattern::Random,
            read_percent: 100,
            unit_len: 4096,
            depth: 32,
            queues: 1,
            limit: Limit::Duration(Duration::from_secs(10)),
            start: ByteOffset(0),
            span: None,
            seed: 0,
            verify: Verify::Off,
            fua: false,
            flush_interval: 0,
            reconnect: None,
        }
    }
}

/// What a worker has done so far; it alone writes, on a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    errors: AtomicU64,
    verified: AtomicU64,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default)]
pub struct BenchProgress {
    /// Since the first command.
    pub elapsed: Duration,
    /// Reads that completed.
    pub reads: u64,
    /// Writes that completed.
    pub writes: u64,
    /// Commands among these, and flushes, that failed.
    pub errors: u64,
    /// Units read back at the end.
    pub verified: u64,
    /// Bytes of a read or write.
    pub unit_len: u32,
}

/// The part of the namespace a run uses, in units.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    block_size: BlockSize,
    first_lba: Lba,
    blocks_per_unit: u32,
    units: u64,
}

impl Geometry {
    fn new(options: &BenchOptions, namespace: &Namespace<'_>) -> Result<Self, InitiatorError> {
        let block_size = namespace.block_size();
        let unit = ByteLen(options.unit_len.into());
        let whole = |what: &str, len: ByteLen| {
            block_size.blocks_in(len).ok_or_else(|| {
                InitiatorError::invalid(format!("{what} is no multiple of the {block_size}-byte block"))
            })
        };
        let first = whole("the start", ByteLen(options.start.get()))?.get();
        let available = namespace.blocks().get().saturating_sub(first);
        let blocks = match options.span {
            Some(span) => whole("the span", span)?.get(),
            None => available,
        };
        let per_unit = whole("the size of a read or write", unit)?.get();
        if per_unit == 0 || blocks < per_unit || blocks > available {
            return Err(InitiatorError::invalid(format!(
                "{blocks} blocks from block {first} on do not fit a namespace of {} with units of {per_unit}",
                namespace.blocks()
            )));
        }
        let geometry = Self {
            block_size,
            first_lba: Lba(first),
            blocks_per_unit: u32::try_from(per_unit).unwrap_or(u32::MAX),
            units: blocks / per_unit,
        };
        if options.verify != Verify::Off && geometry.units > VERIFY_UNITS_MAX {
            return Err(InitiatorError::invalid(format!(
                "{} units are too many to verify (at most {VERIFY_UNITS_MAX}): use a smaller span or larger units",
                geometry.units
            )));
        }
        Ok(geometry)
    }

    fn lba_of(&self, unit: u64) -> Lba {
        Lba(self.first_lba.get() + unit * u64::from(self.blocks_per_unit))
    }
}

fn check(options: &BenchOptions, controller: &Controller) -> Result<(), InitiatorError> {
    let wrong = |what: String| Err(InitiatorError::invalid(what));
    if options.read_percent > 100 {
        return wrong(format!("{} percent of reads", options.read_percent));
    }
    if options.depth == 0 || usize::from(options.depth) > DEPTH_MAX || options.queues == 0 {
        return wrong(format!(
            "{} queues of depth {} (depth 1 to {DEPTH_MAX})",
            options.queues, options.depth
        ));
    }
    if options.verify == Verify::AfterWrites && options.read_percent != 0 {
        return wrong("verification after the writes goes with writes only (0 percent of reads)".into());
    }
    if options.unit_len > controller.transfer_len_max() {
        return wrong(format!(
            "units of {} bytes, the controller takes {} at once",
            options.unit_len,
            controller.transfer_len_max()
        ));
    }
    if controller.io_queue_count() < usize::from(options.queues) {
        return wrong(format!(
            "{} queues wanted, the controller grants {}",
            options.queues,
            controller.io_queue_count()
        ));
    }
    Ok(())
}

/// What becomes of the table of what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtEnd {
    /// All that was written is read back from the target.
    ReadBack,
    /// The caller gets it; a run that is stopped while the target is gone ends there and then.
    HandOver,
}

/// Runs a workload. `progress` is called about five times a second; `stop`, once set, ends the run early: what is
/// in flight completes, and what was written is still verified.
///
/// # Errors
/// The options do not fit the namespace, or a connection fails and stays so. Failed commands and wrong blocks are no
/// errors of the run: they are in the report.
pub fn run(
    options: &BenchOptions,
    stop: &AtomicBool,
    progress: impl FnMut(&BenchProgress),
) -> Result<BenchReport, InitiatorError> {
    Ok(run_to(AtEnd::ReadBack, options, stop, progress)?.0)
}

/// As [`run`], but nothing is read back at the end: the caller gets the ledger of what must be there, to look for it
/// by another way than the target. A run that is stopped while the target is gone ends without it; what was in flight
/// is then in doubt.
///
/// # Errors
/// As [`run`]; and when the options do not verify, for then there is no ledger.
pub fn run_to_ledger(
    options: &BenchOptions,
    stop: &AtomicBool,
    progress: impl FnMut(&BenchProgress),
) -> Result<(BenchReport, Ledger), InitiatorError> {
    if options.verify == Verify::Off {
        return Err(InitiatorError::invalid("a run that does not verify keeps no ledger"));
    }
    run_to(AtEnd::HandOver, options, stop, progress)
}

fn run_to(
    at_end: AtEnd,
    options: &BenchOptions,
    stop: &AtomicBool,
    mut progress: impl FnMut(&BenchProgress),
) -> Result<(BenchReport, Ledger), InitiatorError> {
    let connect = ConnectOptions {
        io_queues: options.queues,
        queue_size: options.depth.saturating_add(1).max(2),
        ..options.connect.clone()
    };
    let controller = Controller::connect(&connect)?;
    check(options, &controller)?;
    let geometry = Geometry::new(options, &controller.namespace(options.nsid)?)?;
    let counters: Arc<[Counters]> = (0..options.queues).map(|_| Counters::default()).collect();
    let ended = AtomicBool::new(false);
    let started = Instant::now();
    let mut workers = Vec::with_capacity(options.queues.into());
    for index in 0..options.queues {
        let queue = controller.take_io_queue(index.into()).ok_or_else(|| {
            InitiatorError::new(ErrorKind::Incompatible, format!("I/O queue {index} is missing"))
        })?;
        let share = Share::new(options, &geometry, index);
        workers.push(Worker::new(options, &connect, geometry, share, queue, at_end));
    }
    let results = std::thread::scope(|scope| {
        let handles: Vec<_> = workers
            .into_iter()
            .zip(counters.iter())
            .map(|(worker, counters)| scope.spawn(|| worker.run(started, stop, &ended, counters)))
            .collect();
        let mut interval = PROGRESS_FIRST;
        while !handles.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            let slice = Duration::from_millis(10);
            let tick = Instant::now();
            while tick.elapsed() < interval && !handles.iter().all(std::thread::ScopedJoinHandle::is_finished)
            {
                std::thread::sleep(slice);
            }
            progress(&snapshot(started, options, &counters));
            interval = PROGRESS_INTERVAL;
        }
        handles
            .into_iter()
            .map(|handle| handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Result<Vec<_>, _>>()
    })?;
    let (reports, shares): (Vec<_>, Vec<_>) = results.into_iter().map(|end| (end.report, end.share)).unzip();
    let ledger = Ledger::new(geometry, shares.into_iter().flatten().collect());
    Ok((BenchReport::merge(options, reports), ledger))
}

fn snapshot(started: Instant, options: &BenchOptions, counters: &[Counters]) -> BenchProgress {
    let sum =
        |get: fn(&Counters) -> &AtomicU64| counters.iter().map(|one| get(one).load(Ordering::Relaxed)).sum();
    BenchProgress {
        elapsed: started.elapsed(),
        reads: sum(|one| &one.reads),
        writes: sum(|one| &one.writes),
        errors: sum(|one| &one.errors),
        verified: sum(|one| &one.verified),
        unit_len: options.unit_len,
    }
}
