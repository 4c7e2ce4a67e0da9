//! Which devices a run measures, as they are named on the command line.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use async_nvme::vfio::{PciAddress, Vfio, VfioOptions};

use crate::device::Device;

/// A device, or a way to one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The one that costs nothing.
    Replay,
    /// The model in this process.
    Model,
    /// A PCI function bound to vfio-pci.
    Vfio(PciAddress),
}

/// What is none of the devices.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no device: replay, model, or vfio:PCI-ADDRESS")]
pub struct NoDevice(String);

impl FromStr for Chosen {
    type Err = NoDevice;

    fn from_str(text: &str) -> Result<Self, NoDevice> {
        let none = || NoDevice(text.to_owned());
        match text.split_once(':') {
            None if text == "replay" => Ok(Self::Replay),
            None if text == "model" => Ok(Self::Model),
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
            Self::Vfio(address) => write!(f, "vfio:{address}"),
        }
    }
}

impl Chosen {
    /// The device, when it is one that works by itself.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn open_outside(&self, nsid: u32) -> Result<Option<Device>> {
        match self {
            Self::Replay | Self::Model => Ok(None),
            Self::Vfio(address) => {
                let access = Vfio::open(*address, &VfioOptions::default());
                let access = access.with_context(|| format!("{address} cannot be opened"))?;
                Ok(Some(Device::outside("vfio", Arc::new(access), nsid)))
            }
        }
    }
}
