//! What a reload changes: what can be done live, and what of it needs a restart.

use super::{Config, Hosts, LogLevel, Namespace, Nqn, NvmeChoice, PollMode, Subsystem};

/// The difference between two configurations, in the order in which it is to be applied: what goes before what
/// comes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What can be applied while hosts are connected.
    pub live: Vec<LiveChange>,
    /// What stays as it was until the next start.
    pub restart: Vec<RestartReason>,
}

/// A change that needs no restart. A namespace that is defined anew is removed and added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LiveChange {
    /// Log this much from now on.
    LogLevel(LogLevel),
    /// Look among these controllers for the devices of files that are pinned from now on. Devices in use stay.
    Controllers(Vec<NvmeChoice>),
    /// Fence the namespace and let its file go.
    NamespaceRemoved {
        /// Its subsystem, which stays.
        nqn: Nqn,
        /// Its identifier.
        nsid: u32,
    },
    /// Disconnect the hosts of the subsystem and let its files go.
    SubsystemRemoved(Nqn),
    /// Other hosts may connect than before; those that may no longer are to be disconnected.
    HostsChanged {
        /// The subsystem.
        nqn: Nqn,
        /// Who may connect now.
        hosts: Hosts,
    },
    /// Pin and offer a new namespace of a subsystem that stays.
    NamespaceAdded {
        /// The subsystem.
        nqn: Nqn,
        /// The namespace.
        namespace: Namespace,
    },
    /// Offer a new subsystem.
    SubsystemAdded(Box<Subsystem>),
}

/// A key that cannot change while the target runs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestartReason {
    /// `state_dir`.
    #[error("state_dir")]
    StateDir,
    /// `cores`.
    #[error("cores")]
    Cores,
    /// `buffer_memory`.
    #[error("buffer_memory")]
    BufferMemory,
    /// `poll`.
    #[error("poll")]
    Poll,
    /// `idle_after_us`.
    #[error("idle_after_us")]
    IdleAfter,
    /// `linger_us`.
    #[error("linger_us")]
    Linger,
    /// `gather_us`.
    #[error("gather_us")]
    Gather,
    /// `watch_cpu_percent`.
    #[error("watch_cpu_percent")]
    Watch,
    /// `strict`.
    #[error("strict")]
    Strict,
    /// `log_format`.
    #[error("log_format")]
    LogFormat,
    /// `[metrics]`.
    #[error("metrics")]
    Metrics,
    /// Any `[[listener]]`.
    #[error("listener")]
    Listeners,
    /// The first `vfio_user` of an `[[nvme]]`: buffers are shared with other processes from the start, or never.
    #[error("vfio_user, of which there was none,")]
    SharedBuffers,
    /// `serial` or `model` of a subsystem that stays: hosts take them for the identity of the device.
    #[error("serial or model of {0}")]
    Identity(Nqn),
}

impl Changes {
    /// Whether the two configurations mean the same.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.live.is_empty() && self.restart.is_empty()
    }
}

pub(super) fn changes(old: &Config, new: &Config) -> Changes {
    let mut found = Changes { live: Vec::new(), restart: restarts(old, new) };
    if old.log != new.log {
        found.live.push(LiveChange::LogLevel(new.log));
    }
    if old.nvme != new.nvme {
        found.live.push(LiveChange::Controllers(new.nvme.clone()));
    }
    for before in &old.subsystems {
        match find(new, &before.nqn) {
            None => found.live.push(LiveChange::SubsystemRemoved(before.nqn.clone())),
            Some(after) => {
                let gone = before.namespaces.iter().filter(|namespace| !after.namespaces.contains(namespace));
                found.live.extend(gone.map(|namespace| LiveChange::NamespaceRemoved {
                    nqn: before.nqn.clone(),
                    nsid: namespace.nsid,
                }));
            }
        }
    }
    for after in &new.subsystems {
        match find(old, &after.nqn) {
            None => found.live.push(LiveChange::SubsystemAdded(Box::new(after.clone()))),
            Some(before) => {
                if !same_hosts(&before.hosts, &after.hosts) {
                    let (nqn, hosts) = (after.nqn.clone(), after.hosts.clone());
                    found.live.push(LiveChange::HostsChanged { nqn, hosts });
                }
                let fresh =
                    after.namespaces.iter().filter(|namespace| !before.namespaces.contains(namespace));
                found.live.extend(fresh.map(|namespace| LiveChange::NamespaceAdded {
                    nqn: after.nqn.clone(),
                    namespace: namespace.clone(),
                }));
            }
        }
    }
    found
}

/// `new` with all that takes effect at a start as it is in `running`: what is served after a reload.
pub(super) fn kept(running: &Config, new: Config) -> Config {
    let mut subsystems = new.subsystems;
    for after in &mut subsystems {
        if let Some(before) = find(running, &after.nqn) {
            (after.serial, after.model) = (before.serial.clone(), before.model.clone());
        }
    }
    Config {
        state_dir: running.state_dir.clone(),
        cores: running.cores.clone(),
        buffer_memory: running.buffer_memory,
        poll: running.poll,
        gather: running.gather,
        watch: running.watch,
        strict: running.strict,
        log_format: running.log_format,
        metrics: running.metrics,
        listeners: running.listeners.clone(),
        log: new.log,
        nvme: new.nvme,
        subsystems,
    }
}

fn restarts(old: &Config, new: &Config) -> Vec<RestartReason> {
    let mut reasons = Vec::new();
    let mut note = |changed: bool, reason: RestartReason| {
        if changed {
            reasons.push(reason);
        }
    };
    note(old.state_dir != new.state_dir, RestartReason::StateDir);
    note(old.cores != new.cores, RestartReason::Cores);
    note(old.buffer_memory != new.buffer_memory, RestartReason::BufferMemory);
    match (old.poll, new.poll) {
        (
            PollMode::Adaptive { idle_after, linger },
            PollMode::Adaptive { idle_after: idle_after_then, linger: linger_then },
        ) => {
            note(idle_after != idle_after_then, RestartReason::IdleAfter);
            note(linger != linger_then, RestartReason::Linger);
        }
        (before, after) => note(before != after, RestartReason::Poll),
    }
    note(old.gather != new.gather, RestartReason::Gather);
    note(old.watch != new.watch, RestartReason::Watch);
    note(old.strict != new.strict, RestartReason::Strict);
    note(old.log_format != new.log_format, RestartReason::LogFormat);
    note(old.metrics != new.metrics, RestartReason::Metrics);
    note(old.listeners != new.listeners, RestartReason::Listeners);
    note(!old.shares_buffers() && new.shares_buffers(), RestartReason::SharedBuffers);
    for after in &new.subsystems {
        if let Some(before) = find(old, &after.nqn) {
            let changed = before.serial != after.serial || before.model != after.model;
            note(changed, RestartReason::Identity(after.nqn.clone()));
        }
    }
    reasons
}

fn find<'config>(config: &'config Config, nqn: &Nqn) -> Option<&'config Subsystem> {
    config.subsystems.iter().find(|subsystem| subsystem.nqn == *nqn)
}

/// The order of a host list has no meaning.
fn same_hosts(a: &Hosts, b: &Hosts) -> bool {
    match (a, b) {
        (Hosts::Any, Hosts::Any) => true,
        (Hosts::List(a), Hosts::List(b)) => a.len() == b.len() && a.iter().all(|host| b.contains(host)),
        _ => false,
    }
}
