//! Why a target cannot serve, or cannot change what it serves.

use std::net::SocketAddr;

use crate::block::OpenError;
use crate::extent::ExtentError;
use crate::fabrics::TargetError;
use crate::reactor::CoresError;

/// What stands in the way of serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A file cannot be pinned, or the state directory cannot be used.
    #[error(transparent)]
    Extent(#[from] ExtentError),
    /// The device under a file, or a memory device, cannot be opened.
    #[error("subsystem {nqn}, namespace {nsid}: the device cannot be opened")]
    Device {
        /// The subsystem.
        nqn: String,
        /// The namespace.
        nsid: u32,
        /// Why.
        source: OpenError,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}; is the address of this host, and is the port free (`ss -ltnp`)?")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
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
    /// What to do about it, where the message itself does not say.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Extent(error) => Some(error.remedy()),
            _ => None,
        }
    }
}
