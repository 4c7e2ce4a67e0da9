//! Why a target cannot serve, or cannot change what it serves.

use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use async_nvme::vfio::{self, PciAddress};

use crate::block::nvme::ReachError;
use crate::block::{BlockError, OpenError};
use crate::extent::{Difference, ExtentError, ExtentErrorKind, Mismatch};
use crate::fabrics::TargetError;
use crate::reactor::CoresError;
use crate::tcp::congestion::Congestion;
use crate::units::{BlockSize, ByteLen};

/// What stands in the way of serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A file cannot be pinned, or the state directory cannot be used.
    #[error(transparent)]
    Extent(#[from] ExtentError),
    /// The device under a file, or a memory device, cannot be had.
    #[error("subsystem {nqn}, namespace {nsid}: the device cannot be used")]
    Device {
        /// The subsystem.
        nqn: String,
        /// The namespace.
        nsid: u32,
        /// Why.
        source: Box<DiskError>,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}; is the address of this host, and is the port free (`ss -ltnp`)?")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A listener cannot have the congestion control that is configured.
    #[error("connections of {address} cannot have the congestion control `{name}`")]
    Congestion {
        /// Where it listens.
        address: SocketAddr,
        /// What is configured.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Subsystems and ports do not fit together.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The cores cannot run, or a device gives them no queue.
    #[error(transparent)]
    Cores(#[from] CoresError),
    /// The control thread could not be started, or has ended.
    #[error("the control thread is gone")]
    ControlGone,
    /// A core ended while it should have served.
    #[error("a core has stopped serving; the log says why. All exports were fenced and their pins kept")]
    CoreLost,
    /// Commands did not come back from a device in time.
    #[error(
        "commands were still on a device when the target had to end; the pins are kept, so that nothing else gets \
         the blocks. When the device is well, start the target again or run `fastice unpin`"
    )]
    NotDrained,
}

impl ServeError {
    /// Whether it is about one file, and others may be served without it. How many queue pairs a controller has to have for a
    /// configuration is about that.
    pub(super) fn is_of_one_file(&self) -> bool {
        match self {
            Self::Extent(_) => true,
            Self::Device { source, .. } => !matches!(**source, DiskError::QueuePairs { .. }),
            _ => false,
        }
    }

    /// Where the map of a file is not what it was.
    pub(super) fn difference(&self) -> Option<&Difference> {
        let extent = match self {
            Self::Extent(error) => error,
            Self::Device { source, .. } => match &**source {
                DiskError::Extent(error) => error,
                _ => return None,
            },
            _ => return None,
        };
        match extent {
            ExtentError::Changed { difference, .. } => Some(difference),
            _ => None,
        }
    }

    /// What to do about it, where the message itself does not say.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Extent(error) => Some(error.remedy()),
            Self::Device { source, .. } => source.remedy(),
            Self::Congestion { name, source, .. } => Some(Congestion::remedy(name, source)),
            _ => None,
        }
    }
}

/// Why a device is not to be had, or is not the one under a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The file cannot be compared with it.
    #[error(transparent)]
    Extent(#[from] ExtentError),
    /// None of the controllers has it.
    #[error("no controller of [[nvme]] has the disk {disk} ({told}): {tried}")]
    NotFound {
        /// The kernel's name of the disk.
        disk: String,
        /// What the kernel says that it is.
        told: String,
        /// What was looked at, and why it is not that disk.
        tried: String,
        /// Controllers that the kernel has not given to user space, so that they could not be asked.
        unbound: Vec<PciAddress>,
        /// Whether the system forbade to ask one of them.
        is_forbidden: bool,
    },
    /// It has another size or block size.
    #[error(
        "{namespace} has {blocks} blocks of {block_len} bytes, but the disk {disk} has {disk_len} bytes in blocks of \
         {disk_block}"
    )]
    Shape {
        /// The kernel's name of the disk.
        disk: String,
        /// Its length.
        disk_len: ByteLen,
        /// Its logical block.
        disk_block: BlockSize,
        /// The namespace.
        namespace: String,
        /// Its size in blocks.
        blocks: u64,
        /// Its block size in bytes.
        block_len: u32,
    },
    /// It cannot be read.
    #[error("{device} cannot be read")]
    Read {
        /// The device.
        device: String,
        /// Why.
        source: BlockError,
    },
    /// It holds something else than the filesystem says.
    #[error("{device} is not the disk under {path}, whatever it says it is")]
    Mismatch {
        /// The device.
        device: String,
        /// The file.
        path: PathBuf,
        /// The first difference.
        source: Mismatch,
    },
    /// Its controller has too few queue pairs.
    #[error("{way} grants {grants} I/O queue pairs, and {namespaces} namespace(s) on all cores need {needs}")]
    QueuePairs {
        /// The controller.
        way: String,
        /// How many it grants.
        grants: usize,
        /// How many are needed: one a namespace and core.
        needs: usize,
        /// How many of its namespaces are served.
        namespaces: usize,
    },
    /// The map of a file changed while its device was lost.
    #[error("the extent map of {path} is no longer the frozen one")]
    MapChanged {
        /// The file.
        path: PathBuf,
    },
}

impl DiskError {
    /// The controller that could not be opened because the kernel has not given it to user space.
    pub(super) const fn unbound(&self) -> Option<PciAddress> {
        match self {
            Self::Open(OpenError::Reach(ReachError::Vfio(vfio::OpenError::NotBound { address, .. }))) => {
                Some(*address)
            }
            _ => None,
        }
    }

    /// Whether the system forbids to open the device, or one that may be it.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        match self {
            Self::NotFound { is_forbidden, .. } => *is_forbidden,
            Self::Open(OpenError::Reach(ReachError::Vfio(vfio::OpenError::Permission { .. }))) => true,
            Self::Open(error) => {
                let mut cause = error.source();
                let causes = std::iter::from_fn(|| {
                    let next = cause?;
                    cause = next.source();
                    Some(next)
                });
                causes
                    .filter_map(|cause| cause.downcast_ref::<io::Error>())
                    .any(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
            }
            _ => false,
        }
    }

    /// Whether it says that the device or the map is not what it was, rather than that this could not be found out.
    #[must_use]
    pub const fn is_verdict(&self) -> bool {
        match self {
            Self::Mismatch { .. } | Self::MapChanged { .. } | Self::Shape { .. } => true,
            Self::Extent(error) => {
                matches!(error.kind(), ExtentErrorKind::Changed | ExtentErrorKind::NotAccepted)
            }
            _ => false,
        }
    }

    /// What to do about it, where the message itself does not say.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Extent(error) => Some(error.remedy()),
            Self::NotFound { unbound, .. } if !unbound.is_empty() => {
                let addresses: Vec<String> = unbound.iter().map(ToString::to_string).collect();
                Some(format!("fastice device bind {}", addresses.join(" ")))
            }
            Self::NotFound { .. } => Some(
                "name the controller that has the disk in [[nvme]] and give it to user space (`fastice device list` \
                 shows all, `fastice device bind PCI`), or use device = \"uring\""
                    .to_owned(),
            ),
            Self::QueuePairs { grants, namespaces, .. } => Some(match grants / namespaces.max(&1) {
                0 => "serve fewer of its namespaces".to_owned(),
                cores => format!("set cores = {cores}, or serve fewer of its namespaces"),
            }),
            Self::Shape { .. } | Self::Mismatch { .. } => {
                Some("it is a copy, or another disk: correct [[nvme]]; nothing was written to it".to_owned())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn not_found(unbound: &[&str]) -> DiskError {
        let unbound = unbound.iter().map(|text| text.parse().expect("an address")).collect();
        DiskError::NotFound {
            disk: "nvme0n1".into(),
            told: "S1".into(),
            tried: "nothing".into(),
            unbound,
            is_forbidden: false,
        }
    }

    #[test]
    fn a_controller_that_is_named_and_not_bound_is_to_be_bound() {
        let remedy = not_found(&["0000:01:00.0", "0000:02:00.0"]).remedy();
        assert_eq!(remedy.as_deref(), Some("fastice device bind 0000:01:00.0 0000:02:00.0"));
        let remedy = not_found(&[]).remedy().expect("another one");
        assert!(remedy.starts_with("name the controller that has the disk in [[nvme]]"), "{remedy}");
    }

    #[test]
    fn only_the_lack_of_a_binding_is_mended_by_one() {
        let address: PciAddress = "0000:01:00.0".parse().expect("an address");
        let of = |error| DiskError::Open(OpenError::Reach(ReachError::Vfio(error)));
        let driver = Some("nvme".to_owned());
        assert_eq!(of(vfio::OpenError::NotBound { address, driver }).unbound(), Some(address));
        assert_eq!(of(vfio::OpenError::NoIommu { address }).unbound(), None);
    }

    #[test]
    fn a_device_that_may_not_be_opened_is_forbidden_and_one_that_is_not_there_is_not() {
        let vfio = |error| DiskError::Open(OpenError::Reach(ReachError::Vfio(error)));
        assert!(vfio(vfio::OpenError::Permission { path: "/dev/vfio/7".into() }).is_forbidden());
        let address = "0000:01:00.0".parse().expect("an address");
        assert!(!vfio(vfio::OpenError::NoIommu { address }).is_forbidden());
        let model = |kind: io::ErrorKind| {
            DiskError::Open(OpenError::Reach(ReachError::Model { path: "/x".into(), source: kind.into() }))
        };
        assert!(model(io::ErrorKind::PermissionDenied).is_forbidden());
        assert!(!model(io::ErrorKind::NotFound).is_forbidden());
        assert!(!not_found(&[]).is_forbidden());
    }
}
