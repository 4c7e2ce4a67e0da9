//! What the namespaces of a configuration stand on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::block::BlockDevice;
use crate::config::{Backing, Config, DeviceWay, Namespace};
use crate::extent::FrozenMap;
use crate::fabrics::{Export, HostPolicy, Identity, NamespaceSpec, SubsystemSpec};

/// What one namespace stands on.
#[derive(Clone)]
pub(super) struct Backed {
    pub(super) namespace: Namespace,
    /// What hosts are shown; `None` for a file of which not even the size is known.
    pub(super) shown: Option<Shown>,
    /// Why its file is not held, and its export fenced: it was let go, or a start could not pin it.
    pub(super) fault: Option<String>,
}

/// What hosts are shown of a namespace.
#[derive(Clone)]
pub(super) struct Shown {
    pub(super) device: Arc<dyn BlockDevice>,
    /// `None` also where a device that is [absent](crate::block::AbsentDevice) stands for a file.
    pub(super) map: Option<Arc<FrozenMap>>,
    pub(super) identity: Identity,
}

/// The key of a namespace: its subsystem and identifier.
pub(super) type NamespaceKey = (String, u32);

/// The namespaces of a configuration, backed.
#[derive(Clone, Default)]
pub(super) struct Backings(pub(super) BTreeMap<NamespaceKey, Backed>);

impl Backings {
    /// The subsystems of `config`, whose namespaces these are.
    pub(super) fn specs(&self, config: &Config) -> Vec<SubsystemSpec> {
        config
            .subsystems
            .iter()
            .map(|subsystem| SubsystemSpec {
                nqn: subsystem.nqn.to_string(),
                serial: subsystem.serial.clone(),
                model: subsystem.model.clone(),
                hosts: match &subsystem.hosts {
                    crate::config::Hosts::Any => HostPolicy::Any,
                    crate::config::Hosts::List(hosts) => {
                        HostPolicy::List(hosts.iter().map(ToString::to_string).collect())
                    }
                },
                namespaces: subsystem
                    .namespaces
                    .iter()
                    .filter_map(|namespace| self.0.get(&(subsystem.nqn.to_string(), namespace.nsid)))
                    .filter_map(Backed::spec)
                    .collect(),
            })
            .collect()
    }

    /// A file was let go: what stands on it is not good any more, and stays fenced until the file can be pinned anew.
    pub(super) fn let_go(&mut self, path: &Path, why: &str) {
        let on_it = self.0.values_mut().filter(|backed| backed.path() == Some(path));
        on_it.for_each(|backed| backed.fault = Some(why.to_owned()));
    }

    /// What the namespace of an export stands on; `None` for one that a reload is taking away.
    pub(super) fn of(&self, export: &Export) -> Option<&Backed> {
        self.0.get(&(export.subsystem.to_string(), export.nsid.0))
    }

    /// Whether a namespace stands on a file that is held.
    pub(super) fn names(&self, path: &Path) -> bool {
        self.0.values().any(|backed| backed.fault.is_none() && backed.path() == Some(path))
    }

    /// How many namespaces can be served.
    pub(super) fn whole(&self) -> usize {
        self.0.values().filter(|backed| backed.fault.is_none()).count()
    }

    /// Those that hosts do not see, by their subsystem.
    pub(super) fn hidden(&self) -> impl Iterator<Item = (&str, &Backed)> {
        self.0.iter().filter(|(_, backed)| backed.shown.is_none()).map(|((nqn, _), it)| (nqn.as_str(), it))
    }
}

impl Backed {
    /// A namespace that can be served.
    pub(super) fn whole(
        namespace: &Namespace,
        device: Arc<dyn BlockDevice>,
        map: Option<Arc<FrozenMap>>,
        identity: Identity,
    ) -> Self {
        Self { namespace: namespace.clone(), shown: Some(Shown { device, map, identity }), fault: None }
    }

    /// The file under it, if one is.
    pub(super) fn path(&self) -> Option<&Path> {
        match &self.namespace.backing {
            Backing::File { path, .. } => Some(path),
            Backing::Memory { .. } | Backing::Null { .. } => None,
        }
    }

    /// How the device under its file is reached.
    pub(super) const fn way(&self) -> Option<DeviceWay> {
        match &self.namespace.backing {
            Backing::File { device, .. } => Some(*device),
            Backing::Memory { .. } | Backing::Null { .. } => None,
        }
    }

    fn spec(&self) -> Option<NamespaceSpec> {
        let Shown { device, map, identity } = self.shown.as_ref()?;
        let info = device.info();
        Some(NamespaceSpec {
            nsid: nvme_spec::Nsid(self.namespace.nsid),
            map: map.clone(),
            device: Arc::clone(device),
            read_only: self.namespace.read_only,
            on_fence: self.namespace.on_fence,
            block_size: self.namespace.block_size.unwrap_or(info.logical_block_size),
            len: map.as_ref().map_or(info.len, |map| map.len()),
            identity: identity.clone(),
        })
    }
}
