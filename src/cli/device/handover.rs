//! What taking and giving back share: the steps in sysfs, and where a controller stands.
//!
//! ```text
//!   take   record --> driver_override = vfio-pci --> driver/unbind --> drivers_probe --> vfio-pci has it
//!             |              |                           |                 |                  |
//!             `--------------`------- a crash here ------`-----------------`------------------'
//!                                          |
//!   give back             driver_override as before --> unbind from vfio-pci --> bind to the driver before --> record away
//! ```
//!
//! Every arrow back may be walked any number of times: each step first looks whether it is still to be done.

use std::fmt;
use std::io;

use async_nvme::vfio::{PciAddress, PciFunction, Sysfs};

use super::error::{DeviceError, Undone};
use super::host::Host;
use super::inventory::directory_of;
use super::kernel::Kernel;
use super::record::Records;

/// Who changes what, on which host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handover<'a> {
    pub(super) host: &'a Host,
    pub(super) kernel: &'a dyn Kernel,
    pub(super) records: &'a Records,
}

/// One value for one attribute of sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Relative to the root.
    pub(super) path: String,
    pub(super) value: String,
}

impl Step {
    /// The only driver that may have a function; `None` for whichever matches.
    pub(super) fn driver_override(address: PciAddress, driver: Option<&str>) -> Self {
        // An empty line is how the kernel is told that there is none.
        Self {
            path: format!("{}/driver_override", directory_of(address)),
            value: driver.unwrap_or("\n").to_owned(),
        }
    }

    /// Takes a function from the driver that has it.
    pub(super) fn unbind(address: PciAddress) -> Self {
        Self { path: format!("{}/driver/unbind", directory_of(address)), value: address.to_string() }
    }

    /// Gives a function to a driver.
    pub(super) fn bind(address: PciAddress, driver: &str) -> Self {
        Self { path: format!("sys/bus/pci/drivers/{driver}/bind"), value: address.to_string() }
    }

    /// Has the kernel look for a driver.
    pub(super) fn probe(address: PciAddress) -> Self {
        Self { path: "sys/bus/pci/drivers_probe".to_owned(), value: address.to_string() }
    }
}

/// As a shell would do it.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "echo {} > /{}", self.value.trim(), self.path)
    }
}

impl Handover<'_> {
    /// The function as it is now.
    pub(super) fn function(&self, address: PciAddress) -> Result<PciFunction, DeviceError> {
        Ok(Sysfs::at(self.host.path("sys")).function(address)?)
    }

    /// Does one step.
    pub(super) fn run(&self, address: PciAddress, step: &Step) -> Result<(), DeviceError> {
        tracing::debug!(%address, %step, "sysfs");
        let path = self.host.path(&step.path);
        self.kernel.write(&path, &step.value).map_err(|source| DeviceError::Step {
            address,
            path,
            value: step.value.trim().to_owned(),
            undone: Undone::Nothing,
            source,
        })
    }

    /// Loads a driver's module when the driver is not there.
    pub(super) fn need_driver(&self, driver: &str) -> Result<(), DeviceError> {
        let place = format!("sys/bus/pci/drivers/{driver}");
        let failed = |why| DeviceError::Module { module: driver.to_owned(), why };
        if self.host.exists(&place) {
            return Ok(());
        }
        self.kernel.load_module(driver).map_err(failed)?;
        if self.host.exists(&place) {
            return Ok(());
        }
        Err(failed(format!("it was loaded, but there is no PCI driver {driver}")))
    }
}

/// Whether the kernel may still do what it was told.
pub(super) fn is_under_way(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Step { source, .. } if source.kind() == io::ErrorKind::TimedOut)
}
