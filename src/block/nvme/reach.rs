//! The ways to an NVMe controller, and going them.
//!
//! ```text
//!   NvmeWay --Reach--> Reached { access, stands_on }
//!     pci         a PCI function that the kernel gave to user space (VFIO), behind an IOMMU or, unsafe, without one
//!     vfio_user   a controller in another process, at the other end of a socket
//!     model       our controller in software, in this process, over a block device or an image
//! ```
//!
//! [`SystemReach`] goes the real ways. Tests go others: to a model that they can pull out and plug in.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use async_nvme::access::{Access, AccessError};
use async_nvme::vfio::{self, PciAddress, Sysfs, UnsafeNoIommuVfio, Vfio, VfioOptions};
use async_nvme::vfio_user::{VfioUserAccess, VfioUserOptions};
use hugepage_alloc::physical::UnsafeWithoutIommu;

use super::model;

/// How a controller is reached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NvmeWay {
    /// The PCI function at this address, behind an IOMMU.
    Pci(PciAddress),
    /// The PCI function at this address, without an IOMMU: it can then write to any memory of the host.
    PciWithoutIommu(PciAddress),
    /// The vfio-user server that listens on this socket. It can read and write the buffers of all cores.
    VfioUser(PathBuf),
    /// A controller in software over this block device or image: for demonstrations and tests.
    Model(PathBuf),
}

impl NvmeWay {
    /// Whether both lead to the same controller.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Pci(one) | Self::PciWithoutIommu(one),
                Self::Pci(other) | Self::PciWithoutIommu(other),
            ) => one == other,
            _ => self == other,
        }
    }
}

impl fmt::Display for NvmeWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => fmt::Display::fmt(address, f),
            Self::PciWithoutIommu(address) => write!(f, "{address} without IOMMU"),
            Self::VfioUser(path) => write!(f, "vfio-user {}", path.display()),
            Self::Model(path) => write!(f, "model of {}", path.display()),
        }
    }
}

/// A controller that was reached.
#[derive(Clone, Debug)]
pub struct Reached {
    /// The way to it.
    pub access: Arc<dyn Access>,
    /// The number of the kernel's block device that its blocks are those of, for a controller in software.
    pub stands_on: Option<(u32, u32)>,
}

impl Reached {
    /// A controller that stands on nothing of the kernel's.
    fn at(access: impl Access + 'static) -> Self {
        Self { access: Arc::new(access), stands_on: None }
    }
}

/// Why a controller cannot be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReachError {
    /// The other process does not give the controller.
    #[error(transparent)]
    VfioUser(#[from] AccessError),
    /// The kernel does not give the PCI function.
    #[error(transparent)]
    Vfio(#[from] vfio::OpenError),
    /// What a model stands on cannot be used.
    #[error("the model cannot stand on {path}")]
    Model {
        /// The block device or image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is nothing at that place now.
    #[error("{way}: there is no controller now")]
    Absent {
        /// The way.
        way: NvmeWay,
    },
}

impl ReachError {
    /// Whether the controller may be had in a moment: somebody has it who may be on the way out, such as the process
    /// before this one that was killed.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Vfio(vfio::OpenError::Busy { .. }) => true,
            // The kernel could not have the function to itself for the reset that an opening begins with.
            Self::Vfio(vfio::OpenError::Kernel { source, .. }) => source.kind() == io::ErrorKind::WouldBlock,
            Self::VfioUser(AccessError::Io { source, .. }) => source.kind() != io::ErrorKind::NotFound,
            Self::VfioUser(AccessError::Gone { .. }) => true,
            Self::Vfio(_) | Self::VfioUser(_) | Self::Model { .. } | Self::Absent { .. } => false,
        }
    }
}

/// Goes the ways to controllers.
pub trait Reach: Send + Sync {
    /// Reaches a controller. What was reached before on this way is not used any more when this is called.
    ///
    /// # Errors
    /// When there is no controller at that place, or it may not be had.
    fn reach(&self, way: &NvmeWay) -> Result<Reached, ReachError>;

    /// The controllers that there are to be had, for whoever knows only the identity of what he looks for.
    fn list(&self) -> Vec<NvmeWay> {
        Vec::new()
    }
}

/// The real ways.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemReach;

impl Reach for SystemReach {
    fn reach(&self, way: &NvmeWay) -> Result<Reached, ReachError> {
        match way {
            NvmeWay::Pci(address) => Ok(Reached::at(Vfio::open(*address, &VfioOptions::default())?)),
            NvmeWay::PciWithoutIommu(address) => {
                let sure = UnsafeWithoutIommu::accept_that_the_device_can_write_anywhere();
                tracing::warn!(%address, "driven without an IOMMU: the device can write to any memory of this host");
                Ok(Reached::at(UnsafeNoIommuVfio::open(*address, &Sysfs::default(), sure)?))
            }
            NvmeWay::VfioUser(path) => {
                Ok(Reached::at(VfioUserAccess::connect(path, &VfioUserOptions::default())?))
            }
            NvmeWay::Model(path) => {
                model::over(path).map_err(|source| ReachError::Model { path: path.clone(), source })
            }
        }
    }

    /// Those that the kernel has given to user space, behind an IOMMU.
    fn list(&self) -> Vec<NvmeWay> {
        let functions = Sysfs::default().nvme_controllers().unwrap_or_else(|error| {
            tracing::warn!(%error, "the controllers of this host cannot be listed");
            Vec::new()
        });
        let guarded = functions
            .iter()
            .filter(|it| it.is_bound_to_vfio() && it.group.as_ref().is_some_and(|it| !it.no_iommu));
        guarded.map(|function| NvmeWay::Pci(function.address)).collect()
    }
}
