//! The parts that a server is put together from: sockets, cores, and what hosts see.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{Config, Listener, PollMode};
use crate::control::backings::Backings;
use crate::control::error::ServeError;
use crate::control::listen::{congestion_of, listen_patiently};
use crate::control::provider::Provider;
use crate::extent::{CommandsHold, ExtentError, Oversight};
use crate::fabrics::{Export, FenceReason, PortId, PortSpec, Published, Target};
use crate::reactor::{ConnectionFactory, CoreOptions, Cores, IdlePolicy};
use crate::tcp::congestion::Congestion;

/// Connections that one core serves at the most.
const CONNECTIONS_PER_CORE: usize = 1024;

/// Listening sockets for all listeners, with the ports as they are bound.
pub(super) fn bind(config: &Config) -> Result<(Vec<PortSpec>, Vec<OwnedFd>), ServeError> {
    let mut ports = Vec::with_capacity(config.listeners.len());
    let mut listeners = Vec::with_capacity(config.listeners.len());
    for (id, listener) in (1..).zip(&config.listeners) {
        let congestion = congestion_of(listener)?;
        tell_of(listener, &congestion);
        let (socket, address) = listen_patiently(listener.address, &congestion)
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

/// Tells of a congestion control that was taken unasked, and of one that had better not be.
fn tell_of(listener: &Listener, congestion: &Congestion) {
    let Congestion { name, pacing_default: Some(default) } = congestion else { return };
    let listener = listener.address;
    match name {
        Some(name) => tracing::info!(
            %listener, congestion_control = %name, %default,
            "the kernel's default congestion control paces what is sent, so connections have this one; the listener's `congestion_control` chooses"
        ),
        None => tracing::warn!(
            %listener, congestion_control = %default,
            "the kernel's default paces what is sent, which makes near hosts wait, and this process may choose no other"
        ),
    }
}

pub(super) fn start_cores(
    config: &Config,
    factory: &Arc<dyn ConnectionFactory>,
    hold: &CommandsHold,
    oversight: &Arc<Oversight>,
) -> Result<Cores, ServeError> {
    let (idle, linger) = match config.poll {
        PollMode::Always => (IdlePolicy::AlwaysPoll, Duration::ZERO),
        PollMode::Adaptive { idle_after, linger } => (IdlePolicy::SleepAfter(idle_after), linger),
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
        linger,
        gather: config.gather,
        connections_max: CONNECTIONS_PER_CORE,
        hold: Some(Arc::new(hold)),
        oversight: Some(Arc::clone(oversight)),
        stages: Arc::default(),
    };
    let cpus: Vec<usize> = config.cores.iter().map(|&cpu| cpu as usize).collect();
    Ok(Cores::start(&cpus, &options, factory)?)
}

/// Opens the queues of what is new on all cores, has recalls reach it, then lets the hosts see it.
pub(super) fn publish(
    target: &Target,
    cores: &Cores,
    provider: &Provider,
    backings: &Backings,
    config: &Config,
    ports: &[PortSpec],
) -> Result<Published, ServeError> {
    let plan = target.prepare(backings.specs(config), ports.to_vec())?;
    cores.open(&plan.changes.added)?;
    provider.arm(&plan.changes.added);
    let is_faulty = |export: &Export| backings.of(export).is_some_and(|backed| backed.fault.is_some());
    for export in plan.changes.added.iter().filter(|export| is_faulty(export)) {
        // One without a map was never had; of one with a map the file was let go since.
        export.fence(if export.map.is_some() { FenceReason::MapInDoubt } else { FenceReason::NotServed });
    }
    Ok(target.commit(plan)?)
}
