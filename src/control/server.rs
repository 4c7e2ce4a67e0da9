//! The control thread: owns pins, devices, cores and listeners, and is the only one to change what is served.

mod device;
mod recall;
mod reload;
mod report;
mod set_up;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use self::device::fence_lost;
use self::recall::Endings;
use self::reload::{Asked, Reloaded};
use self::set_up::{bind, publish, start_cores};
use super::allocator::{self, Settled};
use super::api::Api;
use super::backings::Backings;
use super::drains::Drains;
use super::error::ServeError;
use super::event::Event;
use super::metrics::{Metrics, Source};
use super::orphans;
use super::provider::{Provider, Unfit};
use super::recalls::Recalls;
use super::status::Fences;
use super::still::open_state_reaching;
use crate::block::nvme::Reach;
use crate::config::Config;
use crate::extent::{CommandsHold, Progress};
use crate::fabrics::{Export, PortSpec, Target, TargetOptions};
use crate::reactor::{ConnectionFactory, CoreGauges, Cores};
use crate::stage::Book;
use crate::tcp::{TcpCounters, TcpFactory, TcpTimeouts};

/// How long commands may take when the control thread ends by accident.
const DROP_PATIENCE: Duration = Duration::from_secs(5);
/// How often the cores are looked after.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);

/// Everything that serves.
pub(super) struct Server {
    pub(super) target: Arc<Target>,
    pub(super) counters: Arc<TcpCounters>,
    pub(super) addresses: Vec<SocketAddr>,
    config: Config,
    ports: Vec<PortSpec>,
    provider: Provider,
    backings: Backings,
    /// `None` once they were stopped.
    cores: Option<Cores>,
    /// Until every command has come back.
    commands: Arc<CommandsHold>,
    /// For threads that work for the control thread.
    events: Sender<Event>,
    fences: Fences,
    recalls: Recalls,
    drains: Drains,
    endings: Endings,
    /// Reloads that wait, and those whose last exports are being drained.
    asked: VecDeque<Asked>,
    reloaded: Vec<Reloaded>,
    /// Exports that are gone, and not drained yet.
    retiring: Vec<Arc<Export>>,
    started: Instant,
    /// Of memory that connections gave back.
    settled: Settled,
    /// Whether other processes can reach the buffers: settled at the start.
    shares_buffers: bool,
    /// Tells what it is doing; without it nobody can ask.
    _api: Option<Api>,
    metrics: Option<Metrics>,
    /// How many namespaces hosts do not see.
    pub(super) hidden: Arc<AtomicUsize>,
}

impl Server {
    /// Binds, pins, opens and serves, in this order: what is cheap to fail comes first.
    pub(super) fn start(
        config: Config,
        events: Sender<Event>,
        reach: Arc<dyn Reach>,
        progress: &mut dyn Progress,
    ) -> Result<Self, ServeError> {
        let state = open_state_reaching(&config.state_dir, Arc::clone(&reach))?;
        let (ports, listeners) = bind(&config)?;
        let commands = Arc::new(state.hold_commands()?);
        let target = Target::new(TargetOptions::default());
        let counters = Arc::new(TcpCounters::default());
        let mut provider =
            Provider::new(state, &target, events.clone(), reach, Arc::clone(&commands), &config)?;
        let unfit = if config.strict { Unfit::Fails } else { Unfit::SetAside };
        let backings = provider.back(&config, &Backings::default(), unfit, progress).inspect_err(|_| {
            commands.all_done();
            provider.release_all();
        })?;
        orphans::tell(provider.state());
        let factory = TcpFactory::new(Arc::clone(&target), Arc::clone(&counters), TcpTimeouts::default());
        let factory: Arc<dyn ConnectionFactory> = Arc::new(factory);
        let started = start_cores(&config, &factory, &commands, provider.oversight()).and_then(|cores| {
            match publish(&target, &cores, &provider, &backings, &config, &ports) {
                Ok(_) => Ok(cores),
                Err(error) => {
                    // No host was let in, so nothing is in flight.
                    cores.stop(Instant::now());
                    Err(error)
                }
            }
        });
        let cores = match started {
            Ok(cores) => cores,
            Err(error) => {
                commands.all_done();
                provider.release_all();
                return Err(error);
            }
        };
        fence_lost(&target, &mut provider);
        let addresses: Vec<_> = ports.iter().map(|port| port.listen).collect();
        for (listener, port) in listeners.into_iter().zip(&ports) {
            cores.listen(listener, port.id);
        }
        tell_served(&config, &addresses, &provider, &backings);
        let source = Source::new(&events, &target, &counters, &cores);
        let metrics = config.metrics.and_then(|address| Metrics::start(address, source));
        let api = Api::start(provider.state(), events.clone()).inspect_err(|error| {
            tracing::warn!(%error, "no control socket: `fastice status` will not know of this target");
        });
        let server = Self {
            shares_buffers: config.shares_buffers(),
            target,
            counters,
            addresses,
            config,
            ports,
            provider,
            backings,
            cores: Some(cores),
            commands,
            drains: Drains::new(events.clone()),
            events,
            fences: Fences::new(),
            recalls: Recalls::default(),
            endings: Endings::new(),
            asked: VecDeque::new(),
            reloaded: Vec::new(),
            retiring: Vec::new(),
            started: Instant::now(),
            settled: Settled::new(Instant::now()),
            _api: api.ok(),
            metrics,
            hidden: Arc::default(),
        };
        server.tell_hidden();
        Ok(server)
    }

    fn tell_hidden(&self) {
        self.hidden.store(self.backings.hidden().count(), Ordering::Relaxed);
    }

    pub(super) fn gauges(&self) -> Vec<Arc<CoreGauges>> {
        self.cores.as_ref().map(Cores::gauges).unwrap_or_default()
    }

    pub(super) fn stages(&self) -> Arc<Book> {
        self.cores.as_ref().map(Cores::stages).unwrap_or_default()
    }

    /// Serves until told to stop, or until a core is lost. The result has gone to whoever asked for the stop.
    pub(super) fn run(mut self, events: &Receiver<Event>) -> Result<(), ServeError> {
        let mut next_look = Instant::now() + HEALTH_INTERVAL;
        loop {
            let due =
                [self.endings_due(), self.reloads_due()].into_iter().flatten().fold(next_look, Instant::min);
            match events.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    if let Some((patience, reply)) = self.hear(event) {
                        let stopped = self.stop(patience);
                        let clean = stopped.is_ok();
                        let _ = reply.send(stopped);
                        return if clean { Ok(()) } else { Err(ServeError::NotDrained) };
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.stop(Duration::from_secs(5)),
            }
            let now = Instant::now();
            if now >= next_look {
                next_look = now + HEALTH_INTERVAL;
                if !self.cores.as_ref().is_some_and(Cores::healthy) {
                    tracing::error!("a core is gone: ending the target");
                    let _ = self.stop(Duration::from_secs(1));
                    return Err(ServeError::CoreLost);
                }
                self.give_memory_back(now);
            }
            self.look_after_endings(now);
            self.go_on_with_reloads();
        }
    }

    /// When connections became idle or ended, their memory is the kernel's again.
    fn give_memory_back(&mut self, now: Instant) {
        let tcp = self.counters.snapshot();
        if self.settled.is_due(tcp.shrunk.saturating_add(tcp.connections_ended), now) {
            allocator::give_free_pages_back();
        }
    }

    /// Deals with an event, but for a stop, which it returns. No recall, and nobody who asks, waits for commands on a device.
    fn hear(&mut self, event: Event) -> Option<(Duration, Sender<Result<(), ServeError>>)> {
        match event {
            Event::Recalled { wire, incident } => self.recalled(&wire, incident),
            Event::Drained { slot } => {
                if self.drains.answered(slot) {
                    // A file that is recalled keeps its record, whether a reload takes it away or not.
                    self.go_on_with_endings();
                    self.retire_drained();
                }
            }
            Event::Looked { wire, incident, looked } => self.looked(&wire, &incident, looked),
            Event::LetGo { path } => self.let_go(&path),
            Event::Device { key, change } => self.device_changed(key, change),
            Event::Verdict { key, epoch, verdict } => self.device_proven(&key, epoch, verdict),
            Event::Status { histograms, reply } => drop(reply.send(Box::new(self.status(histograms)))),
            Event::Trace { reply } => drop(reply.send(self.trace())),
            Event::Reload { config, reply } => self.reload_asked(config, reply),
            Event::Stop { patience, reply } => return Some((patience, reply)),
        }
        None
    }

    /// Tells the hosts, drains, and lets go of the files.
    fn stop(mut self, patience: Duration) -> Result<(), ServeError> {
        self.end(patience)
    }

    fn end(&mut self, patience: Duration) -> Result<(), ServeError> {
        let Some(cores) = self.cores.take() else { return Ok(()) };
        tracing::info!("stopping: no new connections, draining");
        for port in &self.ports {
            cores.unlisten(port.id);
        }
        self.target.shut_down();
        let deadline = Instant::now() + patience;
        let clean = cores.stop(deadline);
        // Also when commands are left on a device: a controller that is shut down executes none of them any more.
        self.provider.disks().shut_down();
        if clean {
            self.commands.all_done();
            self.provider.release_all();
            self.provider.await_leaving(deadline);
            tracing::info!("stopped");
            Ok(())
        } else {
            self.provider.keep_all();
            Err(ServeError::NotDrained)
        }
    }
}

/// So that nobody misses what is not.
fn tell_served(config: &Config, addresses: &[SocketAddr], provider: &Provider, backings: &Backings) {
    let pinned_bytes = provider.pinned_len().0;
    tracing::info!(subsystems = config.subsystems.len(), pinned_bytes, ?addresses, "serving");
    let (served, namespaces) = (backings.whole(), backings.0.len());
    if served < namespaces {
        tracing::error!(
            "SERVING {served} OF {namespaces} NAMESPACES: `fastice status` shows which not, and why"
        );
    } else {
        tracing::info!(namespaces, "all are served");
    }
}

impl Drop for Server {
    /// Also when the control thread panics: the guards must not go while the cores still serve.
    fn drop(&mut self) {
        if let Err(error) = self.end(DROP_PATIENCE) {
            tracing::error!(%error, "the control thread ended without a clean stop");
        }
    }
}
