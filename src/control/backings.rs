//! What the namespaces of a configuration stand on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::block::BlockDevice;
use crate::config::{Backing, Config, Namespace};
use crate::extent::FrozenMap;
use crate::fabrics::{HostPolicy, Identity, NamespaceSpec, SubsystemSpec};

/// What one namespace stands on.
#[derive(Clone)]
pub(super) struct Backed {
    pub(super) namespace: Namespace,
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) map: Option<Arc<FrozenMap>>,
    pub(super) identity: Identity,
    /// The file was let go, and its export is fenced.
    pub(super) is_let_go: bool,
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
                    .map(Backed::spec)
                    .collect(),
            })
            .collect()
    }

    /// A file was let go: what stands on it is not good any more, and stays fenced until the file can be pinned anew.
    pub(super) fn let_go(&mut self, path: &Path) {
        let on_it = self.0.values_mut().filter(|backed| backed.path() == Some(path));
        on_it.for_each(|backed| backed.is_let_go = true);
    }

    /// Whether a namespace stands on a file that is held.
    pub(super) fn names(&self, path: &Path) -> bool {
        self.0.values().any(|backed| !backed.is_let_go && backed.path() == Some(path))
    }
}

impl Backed {
    fn path(&self) -> Option<&Path> {
        match &self.namespace.backing {
            Backing::File { path, .. } => Some(path),
            Backing::Memory { .. } | Backing::Null { .. } => None,
        }
    }

    fn spec(&self) -> NamespaceSpec {
        let info = self.device.info();
        NamespaceSpec {
            nsid: nvme_spec::Nsid(self.namespace.nsid),
            map: self.map.clone(),
            device: Arc::clone(&self.device),
            read_only: self.namespace.read_only,
            on_fence: self.namespace.on_fence,
            block_size: self.namespace.block_size.unwrap_or(info.logical_block_size),
            len: self.map.as_ref().map_or(info.len, |map| map.len()),
            identity: self.identity.clone(),
        }
    }
}
