//! What an operator wants served, checked: the input of [`Target::prepare`](super::Target::prepare).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nvme_spec::Nsid;

use super::export::FencePolicy;
use super::identity::Identity;
use super::options::NSID_MAX;
use crate::block::BlockDevice;
use crate::extent::FrozenMap;
use crate::units::{BlockSize, ByteLen};

/// The well-known name of the discovery subsystem (NVM Express Base Specification 2.1, section 4.7).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// The longest NQN in bytes, without its terminator (the same section).
pub const NQN_BYTES_MAX: usize = 223;

/// The number of a port in the discovery log (PORTID).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u16);

/// One NVMe/TCP port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// Its number; distinct.
    pub id: PortId,
    /// The address listened on. A wildcard is advertised as the local address that the asking host came in on.
    pub listen: SocketAddr,
    /// The address to advertise instead of the one listened on.
    pub advertise: Option<IpAddr>,
    /// Only the discovery subsystem answers here, and the discovery log does not name the port for others.
    pub discovery_only: bool,
}

/// Which hosts may connect to a subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPolicy {
    /// Every host.
    Any,
    /// The hosts of these NQNs.
    List(BTreeSet<String>),
}

impl HostPolicy {
    /// Whether the host of NQN `host` may connect.
    #[must_use]
    pub fn allows(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::List(list) => list.contains(host),
        }
    }

    /// The hosts that both policies allow.
    pub(super) fn and(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Any, only) | (only, Self::Any) => only.clone(),
            (Self::List(one), Self::List(two)) => Self::List(one.intersection(two).cloned().collect()),
        }
    }
}

/// One NVM subsystem to serve, on every port that is not discovery-only.
#[derive(Clone, Debug)]
pub struct SubsystemSpec {
    /// Its NQN; distinct, at most [`NQN_BYTES_MAX`] bytes.
    pub nqn: String,
    /// Serial number of up to 20 printable ASCII characters; [`serial_of`](super::serial_of) makes a stable one.
    pub serial: String,
    /// Model number of up to 40 printable ASCII characters.
    pub model: String,
    /// Who may connect.
    pub hosts: HostPolicy,
    /// The namespaces; identifiers are distinct.
    pub namespaces: Vec<NamespaceSpec>,
}

/// One namespace to serve.
#[derive(Clone)]
pub struct NamespaceSpec {
    /// Its identifier: 1 to [`NSID_MAX`].
    pub nsid: Nsid,
    /// The frozen map, or `None` to serve the device itself from byte 0.
    pub map: Option<Arc<FrozenMap>>,
    /// The device that holds the blocks.
    pub device: Arc<dyn BlockDevice>,
    /// Hosts may not write.
    pub read_only: bool,
    /// What hosts see of a fence.
    pub on_fence: FencePolicy,
    /// The logical block size that hosts see: that of the device or a multiple of it.
    pub block_size: BlockSize,
    /// The length: a multiple of `block_size`, no longer than the map or the device.
    pub len: ByteLen,
    /// What the namespace's stable names derive from.
    pub identity: Identity,
}

impl fmt::Debug for NamespaceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NamespaceSpec")
            .field("nsid", &self.nsid.0)
            .field("read_only", &self.read_only)
            .field("on_fence", &self.on_fence)
            .field("block_size", &self.block_size)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Why subsystems and ports cannot be served as given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Not a usable NQN.
    #[error("subsystem {0:?}: an NQN has 1 to 223 bytes, no NUL, and is not the discovery subsystem's")]
    Nqn(String),
    /// The same NQN twice.
    #[error("subsystem {0} is given twice; give every subsystem its own NQN")]
    DuplicateSubsystem(String),
    /// A serial or model number that does not fit its field.
    #[error("subsystem {0}: a serial has 1 to 20 and a model 1 to 40 printable ASCII characters")]
    Text(String),
    /// A serial or model number that changed while the subsystem is served.
    #[error("subsystem {0}: serial and model cannot change while hosts use them; restart the target")]
    IdentityChanged(String),
    /// A namespace identifier out of range or twice.
    #[error("subsystem {subsystem}: namespace identifier {nsid} is out of 1 to {NSID_MAX}, or given twice")]
    Nsid {
        /// The subsystem.
        subsystem: String,
        /// The identifier.
        nsid: u32,
    },
    /// A length or block size that the device or map does not carry.
    #[error("subsystem {subsystem}, namespace {nsid}: {reason}")]
    Geometry {
        /// The subsystem.
        subsystem: String,
        /// The namespace.
        nsid: u32,
        /// What does not fit.
        reason: &'static str,
    },
    /// The same port number twice.
    #[error("port {0} is given twice; give every port its own number")]
    DuplicatePort(u16),
    /// Every slot that an export can have was given out.
    #[error("the target has given out every export number; restart it")]
    SlotsExhausted,
    /// A plan that was made before another one was carried out.
    #[error("the target changed since this plan was prepared; prepare it again")]
    StalePlan,
}

/// Checks everything that does not depend on what is served already.
pub(super) fn check(subsystems: &[SubsystemSpec], ports: &[PortSpec]) -> Result<(), TargetError> {
    let mut names = BTreeSet::new();
    for subsystem in subsystems {
        check_subsystem(subsystem)?;
        if !names.insert(subsystem.nqn.as_str()) {
            return Err(TargetError::DuplicateSubsystem(subsystem.nqn.clone()));
        }
    }
    let mut ids = BTreeMap::new();
    for port in ports {
        if ids.insert(port.id, ()).is_some() {
            return Err(TargetError::DuplicatePort(port.id.0));
        }
    }
    Ok(())
}

fn check_subsystem(subsystem: &SubsystemSpec) -> Result<(), TargetError> {
    let nqn = &subsystem.nqn;
    if nqn.is_empty() || nqn.len() > NQN_BYTES_MAX || nqn.contains('\0') || nqn == DISCOVERY_NQN {
        return Err(TargetError::Nqn(nqn.clone()));
    }
    if !is_text(&subsystem.serial, 20) || !is_text(&subsystem.model, 40) {
        return Err(TargetError::Text(nqn.clone()));
    }
    let mut nsids = BTreeSet::new();
    for namespace in &subsystem.namespaces {
        let nsid = namespace.nsid.0;
        if nsid == 0 || nsid > NSID_MAX || !nsids.insert(nsid) {
            return Err(TargetError::Nsid { subsystem: nqn.clone(), nsid });
        }
        check_geometry(namespace).map_err(|reason| TargetError::Geometry {
            subsystem: nqn.clone(),
            nsid,
            reason,
        })?;
    }
    Ok(())
}

fn check_geometry(namespace: &NamespaceSpec) -> Result<(), &'static str> {
    let info = namespace.device.info();
    if namespace.len.0 == 0 || namespace.block_size.blocks_in(namespace.len).is_none() {
        return Err("the length is zero or no multiple of the block size");
    }
    if namespace.block_size.bytes() < info.logical_block_size.bytes() {
        return Err("the block size is smaller than the device's");
    }
    let carried = namespace.map.as_ref().map_or(info.len, |map| map.len());
    if namespace.len > carried {
        return Err("the length is more than the map or the device holds");
    }
    if info.read_only && !namespace.read_only {
        return Err("the device is read-only and the namespace is not");
    }
    Ok(())
}

fn is_text(text: &str, bytes_max: usize) -> bool {
    (1..=bytes_max).contains(&text.len()) && text.bytes().all(|byte| (0x20..0x7F).contains(&byte))
}
