//! Stilling a controller that a process drove which is gone.
//!
//! ```text
//!   not there, or not with vfio-pci any more, or its server is gone     still: whoever took it from there reset it
//!   somebody has it                                                     not yet: the kernel may be taking it back
//!   ours for a moment                                                   disabled, and so still
//! ```
//!
//! A model in the process itself ended with it, so it has no place that would have to be remembered.

use std::io;
use std::path::PathBuf;

use async_nvme::access::AccessError;
use async_nvme::vfio::{OpenError as VfioError, SysfsError};
use async_nvme::{Error, quiesce};

use super::reach::{NvmeWay, Reach, ReachError};

const PCI: &str = "pci ";
const PCI_WITHOUT_IOMMU: &str = "pci-without-iommu ";
const VFIO_USER: &str = "vfio-user ";

/// Why a controller may still execute what it was given.
#[derive(Debug, thiserror::Error)]
pub enum StillError {
    /// It cannot be had.
    #[error("it cannot be reached")]
    Reach(#[from] ReachError),
    /// It was reached and does not stop.
    #[error("it does not stop")]
    Driver(#[from] Error),
}

impl StillError {
    /// Whether it may be had in a moment.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Reach(error) if error.may_pass())
    }
}

impl NvmeWay {
    /// The way as a word that can be written down; `None` when what is there ends with this process.
    #[must_use]
    pub fn place(&self) -> Option<String> {
        match self {
            Self::Pci(address) => Some(format!("{PCI}{address}")),
            Self::PciWithoutIommu(address) => Some(format!("{PCI_WITHOUT_IOMMU}{address}")),
            Self::VfioUser(path) => Some(format!("{VFIO_USER}{}", path.display())),
            Self::Model(_) => None,
        }
    }

    /// Reads what [`NvmeWay::place`] wrote.
    #[must_use]
    pub fn from_place(place: &str) -> Option<Self> {
        if let Some(address) = place.strip_prefix(PCI) {
            return address.parse().ok().map(Self::Pci);
        }
        if let Some(address) = place.strip_prefix(PCI_WITHOUT_IOMMU) {
            return address.parse().ok().map(Self::PciWithoutIommu);
        }
        place.strip_prefix(VFIO_USER).map(|path| Self::VfioUser(PathBuf::from(path)))
    }
}

/// Makes sure that the controller at the end of `way` executes nothing of what it was given before. Nobody may be
/// driving it.
///
/// # Errors
/// When that is not sure.
pub fn still(way: &NvmeWay, reach: &dyn Reach) -> Result<(), StillError> {
    let reached = match reach.reach(way) {
        Ok(reached) => reached,
        Err(error) if is_nobodys(&error) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    Ok(quiesce(&*reached.access)?)
}

/// Whether what a process drove there is out of its hands for good: the kernel lets a function go from vfio-pci, or from
/// the bus, only after it was closed, and closing resets it.
fn is_nobodys(error: &ReachError) -> bool {
    match error {
        ReachError::Absent { .. }
        | ReachError::Vfio(
            VfioError::NotBound { .. } | VfioError::Sysfs { source: SysfsError::NoSuch { .. }, .. },
        ) => true,
        ReachError::VfioUser(AccessError::Io { source, .. }) => {
            matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
        }
        _ => false,
    }
}
