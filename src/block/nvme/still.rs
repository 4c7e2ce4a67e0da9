//! Stilling a controller that a process drove which is gone.
//!
//! ```text
//!   not on the bus any more; with the kernel's driver, and live; no server at the socket      still
//!   somebody has it; on its way from one driver to the next                                   not yet
//!   ours for a moment                                                                         disabled, and so still
//! ```
//!
//! The kernel takes a function from the bus only after it was closed. Between drivers it proves nothing: the link of the
//! old one goes before the old one lets go, and closing does not always reset. Of a vfio-user server only the socket is
//! known: one that was unlinked under a living server looks like none. A model in the process itself ended with it, so it has no place that would have to be remembered.

use std::io;
use std::path::PathBuf;

use async_nvme::access::AccessError;
use async_nvme::vfio::{OpenError as VfioError, PciAddress, Sysfs, SysfsError};
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
        match self {
            // From one driver to the next.
            Self::Reach(ReachError::Vfio(VfioError::NotBound { driver, .. })) => {
                driver.as_deref().is_none_or(|driver| driver == "nvme")
            }
            Self::Reach(error) => error.may_pass(),
            // A server that threw us out for the one before us.
            Self::Driver(error) => matches!(error, Error::Gone { .. }),
        }
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

/// Whether what a process drove there is out of its hands for good.
fn is_nobodys(error: &ReachError) -> bool {
    match error {
        ReachError::Absent { .. }
        | ReachError::Vfio(VfioError::Sysfs { source: SysfsError::NoSuch { .. }, .. }) => true,
        ReachError::Vfio(VfioError::NotBound { address, driver: Some(driver) }) => {
            driver == "nvme" && is_live(*address)
        }
        ReachError::VfioUser(AccessError::Io { what: "the connection", source, .. }) => {
            matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
        }
        _ => false,
    }
}

/// Whether the kernel's driver has reset a controller and made it its own (`drivers/nvme/host/sysfs.c`, `state`).
fn is_live(address: PciAddress) -> bool {
    let Ok(Some(name)) = Sysfs::default().function(address).map(|function| function.nvme_name) else {
        return false;
    };
    let state = std::fs::read_to_string(format!("/sys/class/nvme/{name}/state"));
    state.is_ok_and(|state| state.trim() == "live")
}
