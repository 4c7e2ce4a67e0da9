//! The control thread: owns pins, devices, cores and listeners, and is the only one to change what is served.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::api::Api;
use super::backings::Backings;
use super::disks::{NvmeKey, exports_on};
use super::error::{DiskError, ServeError};
use super::event::{Event, ReloadReport};
use super::listen::listen_patiently;
use super::metrics::{Metrics, Source};
use super::orphans;
use super::proof::prove_again;
use super::provider::Provider;
use super::status::{DeviceStatus, ExportStatus, Fences, HostStatus, Status, WatchStatus};
use super::still::open_state_reaching;
use crate::block::BlockDevice as _;
use crate::block::nvme::{Epoch, NvmeChange, Reach, Standing};
use crate::config::{Config, PollMode};
use crate::extent::{
    Baseline, CommandsHold, ExtentError, Incident, Oversight, PinStep, Progress, RecallReason,
    lease_break_time,
};
use crate::fabrics::{Export, FenceReason, Grant, PortId, PortSpec, Target, TargetOptions};
use crate::reactor::{ConnectionFactory, CoreGauges, CoreOptions, Cores, IdlePolicy};
use crate::tcp::{TcpCounters, TcpFactory, TcpTimeouts};

/// Connections that one core serves at the most.
const CONNECTIONS_PER_CORE: usize = 1024;
/// How long commands may take when the control thread ends by accident.
const DROP_PATIENCE: Duration = Duration::from_secs(5);
/// How often the cores are looked after.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);
/// Part of /proc/sys/fs/lease-break-time that draining may take; the rest is for letting go.
const RECALL_SHARE: f64 = 0.5;
/// Part of it that the exports which a reload removes may take to drain before they are left to themselves.
const RETIRE_SHARE: f64 = 0.25;

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
    started: Instant,
    /// Tells what it is doing; without it nobody can ask.
    _api: Option<Api>,
    metrics: Option<Metrics>,
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
        let backings = match provider.back(&config, &Backings::default(), progress) {
            Ok(backings) => backings,
            Err(error) => {
                commands.all_done();
                provider.release_all();
                return Err(error);
            }
        };
        orphans::tell(provider.state());
        let factory = TcpFactory::new(Arc::clone(&target), Arc::clone(&counters), TcpTimeouts::default());
        let factory: Arc<dyn ConnectionFactory> = Arc::new(factory);
        let started = start_cores(&config, &factory, &commands, provider.oversight()).and_then(|cores| {
            match publish(&target, &cores, &backings, &config, &ports) {
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
        provider.arm(&target.exports());
        fence_lost(&target, &mut provider);
        let addresses = ports.iter().map(|port| port.listen).collect();
        for (listener, port) in listeners.into_iter().zip(&ports) {
            cores.listen(listener, port.id);
        }
        let exports = target.exports().len();
        let pinned_bytes = provider.pinned_len().0;
        tracing::info!(subsystems = config.subsystems.len(), exports, pinned_bytes, ?addresses, "serving");
        let source = Source::new(&events, &target, &counters, cores.gauges());
        let metrics = config.metrics.and_then(|address| Metrics::start(address, source));
        let cores = Some(cores);
        let api = Api::start(provider.state(), events.clone()).inspect_err(|error| {
            tracing::warn!(%error, "no control socket: `fastice status` will not know of this target");
        });
        Ok(Self {
            target,
            counters,
            addresses,
            config,
            ports,
            provider,
            backings,
            cores,
            commands,
            events,
            fences: Fences::new(),
            started: Instant::now(),
            _api: api.ok(),
            metrics,
        })
    }

    pub(super) fn gauges(&self) -> Vec<Arc<CoreGauges>> {
        self.cores.as_ref().map(Cores::gauges).unwrap_or_default()
    }

    fn status(&self) -> Status {
        let exports = self.target.exports();
        let hosts = self.target.controllers().into_iter().map(|it| HostStatus {
            host: it.host,
            subsystem: it.subsystem,
            cntlid: it.cntlid,
            io_queues: it.io_queues,
            commands: it.commands,
            read_bytes: it.read_bytes,
            written_bytes: it.written_bytes,
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            exports: exports.iter().map(|export| self.export_status(export)).collect(),
            hosts: hosts.collect(),
            fences: self.fences.status(),
            devices: self.devices(),
            metrics: self.metrics.as_ref().map(|metrics| metrics.address().to_string()),
        }
    }

    fn devices(&self) -> Vec<DeviceStatus> {
        let state = |standing| match standing {
            Standing::Proven(_) => "proven",
            Standing::Unproven(_) => "unproven",
            Standing::Lost => "lost",
        };
        let all = self.provider.nvme_standings().into_iter();
        all.map(|(device, nsid, standing)| DeviceStatus { device, nsid, state: state(standing).to_owned() })
            .collect()
    }

    fn export_status(&self, export: &Export) -> ExportStatus {
        let (grant, reason) = match export.grant() {
            Grant::Live => ("live", None),
            Grant::Fenced(reason) => ("fenced", Some(format!("{reason:?}"))),
            Grant::Removed => ("removed", None),
        };
        let map = export.map.as_ref();
        ExportStatus {
            subsystem: export.subsystem.to_string(),
            nsid: export.nsid.0,
            path: map.map(|map| map.identity().path.clone()),
            grant: grant.to_owned(),
            reason,
            generation: map.map(|map| map.generation()),
            extents: map.map(|map| map.extent_count()),
            guard: map.and_then(|map| self.provider.guard_mode(map)),
            guards: map.map(|map| self.provider.guards(map)).unwrap_or_default(),
            watch: map.and_then(|map| self.provider.watched(map)).map(WatchStatus::from),
        }
    }

    /// Serves until told to stop, or until a core is lost. The result has gone to whoever asked for the stop.
    pub(super) fn run(mut self, events: &Receiver<Event>) -> Result<(), ServeError> {
        loop {
            match events.recv_timeout(HEALTH_INTERVAL) {
                Ok(Event::Recalled { path, incident }) => self.recalled(&path, &incident),
                Ok(Event::Looked { path, incident, looked }) => self.looked(&path, &incident, looked),
                Ok(Event::Device { key, change }) => self.device_changed(key, change),
                Ok(Event::Verdict { key, epoch, verdict }) => self.device_proven(&key, epoch, verdict),
                Ok(Event::Status { reply }) => drop(reply.send(Box::new(self.status()))),
                Ok(Event::Reload { config, reply }) => {
                    let report = self.reload(*config);
                    // Whoever asked may have lost patience.
                    let _ = reply.send(report);
                }
                Ok(Event::Stop { patience, reply }) => {
                    let stopped = self.stop(patience);
                    let clean = stopped.is_ok();
                    let _ = reply.send(stopped);
                    return if clean { Ok(()) } else { Err(ServeError::NotDrained) };
                }
                Err(RecvTimeoutError::Timeout) => {
                    if !self.cores.as_ref().is_some_and(Cores::healthy) {
                        tracing::error!("a core is gone: ending the target");
                        let _ = self.stop(Duration::from_secs(1));
                        return Err(ServeError::CoreLost);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return self.stop(Duration::from_secs(5)),
            }
        }
    }

    /// The fence is down already. Drains, then lets the file go, before the kernel loses its patience; or looks again.
    fn recalled(&mut self, path: &Path, incident: &Incident) {
        let shown = path.display();
        let (reason, detail) = (incident.reason, incident.detail.as_str());
        tracing::error!(path = %shown, %reason, detail, "pin recalled: its export is fenced");
        self.provider.note(path, PinStep::Recalled, text_of(incident));
        let deadline = Instant::now() + lease_break_time().mul_f64(RECALL_SHARE);
        let drained = match self.provider.export_of(path) {
            Some(export) => {
                // Down already, unless the file was pinned anew since: then letting it go unfenced would be worse.
                self.target.fence(&export, FenceReason::MapInDoubt);
                self.provider.note(path, PinStep::Fenced, since(incident));
                self.cores.as_ref().is_none_or(|cores| cores.drain(export.slot, deadline))
            }
            None => true,
        };
        // An export that a reload removed may have left commands behind, though that of now has none.
        if !drained || self.provider.is_undrained(path) {
            self.fences.not_drained();
            self.provider.note(path, PinStep::NotDrained, since(incident));
            // Better an opener that the kernel lets in late than one that we let in on blocks being written.
            tracing::error!(path = %shown, "commands are still on the device; the file is held until the kernel breaks in");
            return;
        }
        self.fences.drained(incident.noticed.elapsed());
        self.provider.note(path, PinStep::Drained, since(incident));
        match reason {
            RecallReason::Doubt(doubt) if doubt.may_be_cleared() => self.provider.look_again(path, incident),
            _ => self.abandon(path, incident),
        }
    }

    /// What a second look at a file in doubt has found.
    fn looked(&mut self, path: &Path, incident: &Incident, looked: Result<Baseline, String>) {
        let shown = path.display();
        match looked {
            Ok(baseline) => {
                if self.provider.clear(path, incident.number, baseline) {
                    tracing::warn!(path = %shown, "the file is as it was: served again");
                    self.fences.cleared();
                    self.provider.note(path, PinStep::Cleared, since(incident));
                }
            }
            Err(differs) => {
                tracing::error!(path = %shown, differs, "the doubt stands");
                let detail = format!("{}; then: {differs}", incident.detail);
                self.abandon(path, &Incident { detail, ..incident.clone() });
            }
        }
    }

    /// Lets go of a file that somebody wants, or that is not what it was. Its export is fenced and drained. The record stays:
    /// whoever serves the file next has its map to compare, and nobody serves another one unasked.
    fn abandon(&mut self, path: &Path, incident: &Incident) {
        self.provider.abandon(path, incident);
        // A reload that names the file is to pin it anew, not to find this fenced one still good.
        self.backings.let_go(path);
        tracing::error!(
            path = %path.display(),
            "drained and let go: `fastice pins` shows what is wrong. If its map is the recorded one, a reload serves it again; \
             else mend it, then `fastice pin --resume` and reload"
        );
    }

    /// A lost device has its exports fenced already; one that is back has to prove itself.
    fn device_changed(&mut self, key: NvmeKey, change: NvmeChange) {
        let (way, nsid) = (key.0.to_string(), key.1);
        let Some(device) = self.provider.disks().nvme(&key) else { return };
        let exports = exports_on(&self.target, device.info());
        match change {
            NvmeChange::Lost { why } => {
                tracing::error!(
                    way,
                    nsid,
                    why,
                    exports = exports.len(),
                    "device lost: its exports are fenced until it is back"
                );
                fence_lost(&self.target, &mut self.provider);
            }
            NvmeChange::Back(epoch) => match self.provider.vouchers(&exports) {
                Ok(vouchers) => {
                    tracing::warn!(way, nsid, files = vouchers.len(), "device back: proving it");
                    prove_again(key, device, epoch, vouchers, self.events.clone());
                }
                Err(error) => {
                    tracing::error!(way, nsid, %error, "device back, but it cannot be proven: still fenced")
                }
            },
        }
    }

    /// Serves the exports of a device again that has proven itself. Their maps are those that they had.
    fn device_proven(&mut self, key: &NvmeKey, epoch: Epoch, verdict: Result<(), DiskError>) {
        let (way, nsid) = (key.0.to_string(), key.1);
        let Some(device) = self.provider.disks().nvme(key) else { return };
        let exports = exports_on(&self.target, device.info());
        if let Err(error) = verdict {
            let error = &error as &dyn std::error::Error;
            tracing::error!(way, nsid, error, "what is back is not what was lost: its exports stay fenced");
            exports.iter().for_each(|export| self.target.fence(export, FenceReason::MapInDoubt));
            return;
        }
        // It was reset when it came back, perhaps after somebody else had it.
        if let Err(error) = self.provider.disks().taken(&key.0) {
            tracing::error!(way, nsid, %error, "its exports stay fenced");
            return;
        }
        if let Err(error) = device.admit(epoch)
            && device.standing() != Standing::Proven(epoch)
        {
            tracing::warn!(way, nsid, %error, "lost again before it was served");
            return;
        }
        exports.iter().for_each(|export| self.target.unfence(export, FenceReason::DeviceFailed));
        // A loss since then was noticed by a thread that may have fenced before we let in.
        fence_lost(&self.target, &mut self.provider);
        tracing::warn!(way, nsid, exports = exports.len(), "device is the one that was lost: served again");
    }

    /// Carries out what can be changed while hosts are connected.
    fn reload(&mut self, new: Config) -> Result<ReloadReport, ServeError> {
        let changes = Config::changes(&self.config, &new);
        let config = Config {
            state_dir: self.config.state_dir.clone(),
            watch: self.config.watch,
            cores: self.config.cores.clone(),
            buffer_memory: self.config.buffer_memory,
            poll: self.config.poll,
            listeners: self.config.listeners.clone(),
            ..new
        };
        let cores = self.cores.as_ref().ok_or(ServeError::CoreLost)?;
        let published = self.provider.back(&config, &self.backings, &mut crate::extent::NoProgress).and_then(
            |backings| {
                let published = publish(&self.target, cores, &backings, &config, &self.ports)?;
                Ok((backings, published))
            },
        );
        let (backings, published) = match published {
            Ok(done) => done,
            Err(error) => {
                // Nothing has changed for the hosts; what was pinned for nothing goes.
                self.provider.release_unnamed(&self.backings);
                return Err(error);
            }
        };
        self.provider.arm(&published.added);
        fence_lost(&self.target, &mut self.provider);
        // From here on the new configuration is served, whatever becomes of the old exports: were it forgotten, the
        // next reload that fails would let go of files that hosts use.
        (self.config, self.backings) = (config, backings);
        // One deadline for all: a recall that comes meanwhile is fenced, but waits here to be let go.
        let deadline = Instant::now() + lease_break_time().mul_f64(RETIRE_SHARE);
        for export in &published.removed {
            if !cores.retire(export.slot, deadline) {
                tracing::error!(nsid = %export.nsid, "removed export did not drain; its file stays pinned");
                self.provider.hold(export);
            }
        }
        self.provider.release_unnamed(&self.backings);
        // What only removed exports stood on is let go of by now.
        self.provider.disks().settle();
        Ok(ReloadReport {
            added: published.added.len(),
            removed: published.removed.len(),
            kept: published.kept.len(),
            needs_restart: changes.restart,
        })
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
        let clean = cores.stop(Instant::now() + patience);
        // Also when commands are left on a device: a controller that is shut down executes none of them any more.
        self.provider.disks().shut_down();
        if clean {
            self.commands.all_done();
            self.provider.release_all();
            tracing::info!("stopped");
            Ok(())
        } else {
            self.provider.keep_all();
            Err(ServeError::NotDrained)
        }
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

/// Why, for the events of a pin.
fn text_of(incident: &Incident) -> String {
    match incident.detail.as_str() {
        "" => incident.reason.to_string(),
        detail => format!("{}: {detail}", incident.reason),
    }
}

/// How long after it was noticed.
fn since(incident: &Incident) -> String {
    format!("{} us after it was noticed", incident.noticed.elapsed().as_micros())
}

/// Fences what stands on devices that are lost, or not proven again: for exports that came, or were let in, while the
/// loss was noticed.
fn fence_lost(target: &Target, provider: &mut Provider) {
    for device in provider.disks().nvme_in_use() {
        if !matches!(device.standing(), Standing::Proven(_)) {
            for export in exports_on(target, device.info()) {
                target.fence(&export, FenceReason::DeviceFailed);
            }
        }
    }
}

/// Listening sockets for all listeners, with the ports as they are bound.
fn bind(config: &Config) -> Result<(Vec<PortSpec>, Vec<OwnedFd>), ServeError> {
    let mut ports = Vec::with_capacity(config.listeners.len());
    let mut listeners = Vec::with_capacity(config.listeners.len());
    for (id, listener) in (1..).zip(&config.listeners) {
        let (socket, address) = listen_patiently(listener.address)
            .map_err(|source| ServeError::Listen { address: listener.address, source })?;
        ports.push(PortSpec {
            id: PortId(id),
            listen: address,
            advertise: listener.advertise,
            discovery_only: listener.discovery_only,
        });
        listeners.push(socket);
    }
    Ok((ports, listeners))
}

fn start_cores(
    config: &Config,
    factory: &Arc<dyn ConnectionFactory>,
    hold: &CommandsHold,
    oversight: &Arc<Oversight>,
) -> Result<Cores, ServeError> {
    let idle = match config.poll {
        PollMode::Always => IdlePolicy::AlwaysPoll,
        PollMode::Adaptive { idle_after } => IdlePolicy::SleepAfter(idle_after),
    };
    let hold = hold.copy().map_err(|source| ExtentError::Io {
        action: "copy the descriptor of",
        path: config.state_dir.clone(),
        source,
    })?;
    let options = CoreOptions {
        buffer_memory: config.buffer_memory,
        share_buffers: config.shares_buffers(),
        idle,
        connections_max: CONNECTIONS_PER_CORE,
        hold: Some(Arc::new(hold)),
        oversight: Some(Arc::clone(oversight)),
    };
    let cpus: Vec<usize> = config.cores.iter().map(|&cpu| cpu as usize).collect();
    Ok(Cores::start(&cpus, &options, factory)?)
}

/// Opens the queues of what is new on all cores, then lets the hosts see it.
fn publish(
    target: &Target,
    cores: &Cores,
    backings: &Backings,
    config: &Config,
    ports: &[PortSpec],
) -> Result<crate::fabrics::Published, ServeError> {
    let plan = target.prepare(backings.specs(config), ports.to_vec())?;
    cores.open(&plan.changes.added)?;
    Ok(target.commit(plan)?)
}
