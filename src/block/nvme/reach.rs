//! The ways to an NVMe controller, and going them.
//!
//! ```text
//!   NvmeWay --Reach--> Reached { access, stands_on }
//!     pci         a PCI function that the kernel gave to user space (VFIO)
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
use async_nvme::vfio::PciAddress;

use super::model;

/// How a controller is reached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NvmeWay {
    /// The PCI function at this address.
    Pci(PciAddress),
    /// The vfio-user server that listens on this socket.
    VfioUser(PathBuf),
    /// A controller in software over this block device or image: for demonstrations and tests.
    Model(PathBuf),
}

impl fmt::Display for NvmeWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => fmt::Display::fmt(address, f),
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

/// Why a controller cannot be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReachError {
    /// This build does not know the way.
    #[error("{way}: this fastice was built without that way to a controller")]
    NotBuilt {
        /// The way.
        way: NvmeWay,
    },
    /// The way is known, and closed.
    #[error(transparent)]
    Access(#[from] AccessError),
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

/// Goes the ways to controllers.
pub trait Reach: Send + Sync {
    /// Reaches a controller. What was reached before on this way is not used any more when this is called.
    ///
    /// # Errors
    /// When there is no controller at that place, or it may not be had.
    fn reach(&self, way: &NvmeWay) -> Result<Reached, ReachError>;
}

/// The real ways.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemReach;

impl Reach for SystemReach {
    fn reach(&self, way: &NvmeWay) -> Result<Reached, ReachError> {
        match way {
            NvmeWay::Pci(_) | NvmeWay::VfioUser(_) => Err(ReachError::NotBuilt { way: way.clone() }),
            NvmeWay::Model(path) => {
                model::over(path).map_err(|source| ReachError::Model { path: path.clone(), source })
            }
        }
    }
}
