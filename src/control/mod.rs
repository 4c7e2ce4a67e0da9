//! The running target: started from a configuration, changed by another one, stopped in order.
//!
//! ```text
//!   cli serve, demo, tests
//!      | start, reload, stop            recall (guard thread): fences at once
//!      v                                   |
//!   [ control thread: Server ] <-- Event --+-- device lost (controller's thread): fences at once; or back
//!      |  pins and devices (Provider)   what hosts see (fabrics::Target)   cores (reactor::Cores)
//! ```
//!
//! One thread owns everything that can change and is asked by messages, so that a reload, a recall and a stop never
//! meet. What happens on the I/O path is none of its business.
//!
//! A socket in the state directory tells what it is doing (`api`, `status`), and its last commands (`trace`). So does a page of
//! metrics of the first, when the configuration asks for one (`metrics`).

mod allocator;
mod api;
mod backings;
mod disks;
mod drains;
mod error;
mod event;
mod latency;
mod listen;
mod metrics;
mod orphans;
mod proof;
mod provider;
mod recalls;
mod server;
mod status;
mod still;
mod together;
mod trace;
mod tripwire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

pub use self::api::{ask_all, ask_all_for_traces, ask_all_with_histograms};
pub use self::error::{DiskError, ServeError};
use self::event::Event;
pub use self::event::ReloadReport;
pub use self::latency::{BucketCounts, CoreStatus, HistogramStatus, LatencyStatus, StageTimes};
pub use self::listen::check_listener;
pub use self::metrics::fuzz_metrics_request;
pub use self::recalls::{LastRecall, RecallStatus};
use self::server::Server;
pub use self::status::{
    DeviceStatus, ExportStatus, FenceStatus, HostStatus, SinceChange, Status, WatchStatus,
};
pub use self::still::open_state;
pub use self::together::check_guards;
pub use self::trace::{CommandTrace, CoreTrace, MOMENTS, TraceStatus, TracedConnection};
use crate::block::nvme::{Reach, SystemReach};
use crate::config::Config;
use crate::extent::Progress;
use crate::fabrics::{Grant, Target, TargetStats};
use crate::reactor::{CoreGauges, CoreStats};
use crate::stage::Book;
use crate::tcp::{TcpCounters, TcpStats};

/// A target that serves.
///
/// Dropping it stops it with the patience of [`Running::STOP_PATIENCE`].
pub struct Running {
    addresses: Vec<SocketAddr>,
    target: Arc<Target>,
    counters: Arc<TcpCounters>,
    gauges: Vec<Arc<CoreGauges>>,
    stages: Arc<Book>,
    hidden: Arc<AtomicUsize>,
    events: Sender<Event>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

/// Pins the files of `config`, opens their devices, and serves. Returns when hosts can connect.
///
/// A file that cannot be pinned is left aside, unless the configuration is strict, or no other namespace can be served: its
/// namespace is fenced until a reload has more luck, or, when nobody knows its size, hosts do not see it.
///
/// # Errors
/// The first thing that stands in the way; nothing is left pinned then.
pub fn start(config: Config, progress: &mut dyn Progress) -> Result<Running, ServeError> {
    start_reaching(config, Arc::new(SystemReach), progress)
}

/// As [`start`], with other ways to NVMe controllers than the system's: for tests that pull devices out.
///
/// # Errors
/// As [`start`].
pub fn start_reaching(
    config: Config,
    reach: Arc<dyn Reach>,
    progress: &mut dyn Progress,
) -> Result<Running, ServeError> {
    allocator::give_large_pieces_back();
    let (events, inbox) = channel();
    let server = Server::start(config, events.clone(), reach, progress)?;
    let addresses = server.addresses.clone();
    let (gauges, stages, hidden) = (server.gauges(), server.stages(), Arc::clone(&server.hidden));
    let (target, counters) = (Arc::clone(&server.target), Arc::clone(&server.counters));
    let thread = std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || server.run(&inbox))
        .map_err(|_| ServeError::ControlGone)?;
    Ok(Running { addresses, target, counters, gauges, stages, hidden, events, thread: Some(thread) })
}

impl Running {
    /// How long commands under way may take when the target stops.
    pub const STOP_PATIENCE: Duration = Duration::from_secs(10);

    /// The addresses listened on, in the order of the configuration.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// How many namespaces hosts may use at this moment, and of how many.
    #[must_use]
    pub fn served(&self) -> (usize, usize) {
        let exports = self.target.exports();
        let live = exports.iter().filter(|export| export.grant() == Grant::Live).count();
        (live, exports.len() + self.hidden.load(Ordering::Relaxed))
    }

    /// What hosts did so far.
    #[must_use]
    pub fn stats(&self) -> (TargetStats, TcpStats) {
        (self.target.stats(), self.counters.snapshot())
    }

    /// What each core holds, as of its last tick: no older than a few [`Core::TICK`](crate::reactor::Core::TICK), or
    /// [`Core::TICK_ASLEEP`](crate::reactor::Core::TICK_ASLEEP) when it has nothing to do.
    #[must_use]
    pub fn core_stats(&self) -> Vec<CoreStats> {
        self.gauges.iter().map(|gauges| gauges.get()).collect()
    }

    /// What each core does with its time, as of its last tick.
    #[must_use]
    pub fn cores(&self) -> Vec<CoreStatus> {
        self.gauges.iter().map(|gauges| CoreStatus::of(gauges)).collect()
    }

    /// How long commands took so far, by host and export.
    #[must_use]
    pub fn latencies(&self) -> Vec<LatencyStatus> {
        latency::of_book(&self.stages)
    }

    /// Serves `config` from now on, as far as it can be changed while hosts are connected.
    ///
    /// # Errors
    /// What stands in the way; the old configuration is then served on.
    pub fn reload(&self, config: Config) -> Result<ReloadReport, ServeError> {
        let (reply, answer) = channel();
        let event = Event::Reload { config: Box::new(config), reply };
        self.events.send(event).map_err(|_| ServeError::ControlGone)?;
        answer.recv().map_err(|_| ServeError::ControlGone)?
    }

    /// Whether the target has ended by itself, which it does only when it cannot serve any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends it in order: no new connections, commands under way completed (for at most `patience`), hosts
    /// disconnected, files released.
    ///
    /// # Errors
    /// When a device did not give commands back, or the target had ended by itself.
    pub fn stop(mut self, patience: Duration) -> Result<(), ServeError> {
        self.end(patience)
    }

    fn end(&mut self, patience: Duration) -> Result<(), ServeError> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let (reply, answer) = channel();
        // A thread that has ended tells why by its own result.
        let _ = self.events.send(Event::Stop { patience, reply });
        drop(answer);
        thread.join().unwrap_or(Err(ServeError::ControlGone))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.end(Self::STOP_PATIENCE) {
            tracing::error!(%error, "the target did not stop in order");
        }
    }
}
