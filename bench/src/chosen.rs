//! Which devices a run measures, as they are named on the command line.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use async_nvme::vfio::{PciAddress, Vfio, VfioOptions};
use async_nvme::{VfioUserAccess, VfioUserOptions};

use crate::device::Device;
use crate::run;
use crate::server::ServerProcess;

/// A device, or a way to one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The one that costs nothing.
    Replay,
    /// The model in this process.
    Model,
    /// The model in a process of its own.
    VfioUser,
    /// A software controller behind a socket, whoever serves it.
    VfioUserAt(PathBuf),
    /// A PCI function bound to vfio-pci.
    Vfio(PciAddress),
}

/// What is none of the devices.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no device: replay, model, vfio-user, vfio-user:SOCKET or vfio:PCI-ADDRESS")]
pub struct NoDevice(String);

impl FromStr for Chosen {
    type Err = NoDevice;

    fn from_str(text: &str) -> Result<Self, NoDevice> {
        let none = || NoDevice(text.to_owned());
        match text.split_once(':') {
            None if text == "replay" => Ok(Self::Replay),
            None if text == "model" => Ok(Self::Model),
            None if text == "vfio-user" => Ok(Self::VfioUser),
            Some(("vfio-user", socket)) => Ok(Self::VfioUserAt(socket.into())),
            Some(("vfio", address)) => Ok(Self::Vfio(address.parse().map_err(|_| none())?)),
            _ => Err(none()),
        }
    }
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replay => f.write_str("replay"),
            Self::Model => f.write_str("model"),
            Self::VfioUser => f.write_str("vfio-user"),
            Self::VfioUserAt(socket) => write!(f, "vfio-user:{}", socket.display()),
            Self::Vfio(address) => write!(f, "vfio:{address}"),
        }
    }
}

/// A device that works by itself, and what it needs to.
#[derive(Debug)]
pub struct Outside {
    /// The device. Dropped before its server.
    pub device: Device,
    _server: Option<ServerProcess>,
}

impl Chosen {
    /// Whether it works by itself.
    #[must_use]
    pub const fn is_outside(&self) -> bool {
        !matches!(self, Self::Replay | Self::Model)
    }

    /// Opens it, when it is one that works by itself.
    ///
    /// # Errors
    /// When it is none, or cannot be reached.
    pub fn open_outside(&self, nsid: u32) -> Result<Outside> {
        let connect = |socket: &Path| {
            let access = VfioUserAccess::connect(socket, &VfioUserOptions::default());
            let access = access.with_context(|| format!("{} cannot be reached", socket.display()))?;
            Ok::<_, anyhow::Error>(Device::outside("vfio-user", Arc::new(access), nsid))
        };
        match self {
            Self::Replay | Self::Model => bail!("{self} does not work by itself"),
            Self::VfioUser => {
                let program = std::env::current_exe().context("which program this is")?;
                let server = ServerProcess::start(&program)?;
                let mut device = connect(&server.socket())?;
                // Ours alone, and never written yet.
                run::write_all(&mut device)?;
                Ok(Outside { device, _server: Some(server) })
            }
            Self::VfioUserAt(socket) => Ok(Outside { device: connect(socket)?, _server: None }),
            Self::Vfio(address) => {
                let access = Vfio::open(*address, &VfioOptions::default());
                let access = access.with_context(|| format!("{address} cannot be opened"))?;
                Ok(Outside { device: Device::outside("vfio", Arc::new(access), nsid), _server: None })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_as_it_is_shown() {
        for name in ["replay", "model", "vfio-user", "vfio-user:/run/nvme:0.sock", "vfio:0000:01:00.0"] {
            assert_eq!(name.parse::<Chosen>().unwrap().to_string(), name);
        }
        for name in ["", "vfio", "vfio:1", "model:x", "replay1"] {
            assert!(name.parse::<Chosen>().is_err(), "{name}");
        }
    }
}
