//! Giving controllers back: from VFIO to the driver that had them, from wherever a crash left them.

use std::time::{Duration, Instant};

use async_nvme::vfio::{PciAddress, PciFunction, SysfsError};
use serde::Serialize;

use super::error::DeviceError;
use super::handover::{Handover, Step};
use super::inventory::{Inventory, NVME_DRIVER, VFIO_DRIVER};
use super::record::{Binding, RecordsLock, boot_id};

/// How long the kernel's driver gets to show the namespaces that were there before.
const RETURN_PATIENCE: Duration = Duration::from_secs(15);
const RETURN_PAUSE: Duration = Duration::from_millis(50);

/// What became of a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Return {
    /// It was given back.
    Given,
    /// It was not taken: nothing was done.
    Nothing,
    /// The record was of an earlier boot, or of a device that is gone: it was removed.
    Forgotten,
}

/// A controller that was given back, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Given {
    pub(super) address: String,
    pub(super) result: Return,
    /// The driver that has it now.
    pub(super) driver: Option<String>,
    /// What the kernel's driver calls it now.
    pub(super) name: Option<String>,
    /// The block devices of its namespaces.
    pub(super) namespaces: Vec<String>,
    /// Whether namespaces that were there before did not come back in time.
    pub(super) namespaces_missing: bool,
}

impl Binding {
    /// Whether it says what this function was before, in this boot.
    pub(super) fn is_of(&self, function: &PciFunction, boot_id: &str) -> bool {
        self.boot_id == boot_id && (self.vendor_id, self.device_id) == (function.vendor, function.device)
    }
}

impl Handover<'_> {
    /// Gives a controller back to the driver that had it, or to `driver`.
    ///
    /// # Errors
    /// When a process drives it, nothing tells what it was, or the kernel refuses. What was recorded is then kept.
    pub(super) fn give_back(
        &self,
        lock: &RecordsLock,
        address: PciAddress,
        driver: Option<&str>,
    ) -> Result<Given, DeviceError> {
        let recorded = match self.records.load(address) {
            // Told what to do, we need no record; it is replaced.
            Err(DeviceError::Record { .. }) if driver.is_some() => None,
            other => other?,
        };
        let inventory = Inventory::read(self.host, self.records)?;
        let one = match inventory.at(self.host, address) {
            Ok(one) => one,
            Err(DeviceError::Sysfs(SysfsError::NoSuch { .. })) if recorded.is_some() => {
                return self.forget(lock, address);
            }
            Err(error) => return Err(error),
        };
        let function = &one.function;
        if !one.vfio_users.is_empty() {
            return Err(DeviceError::InUse { address, by: one.vfio_users.clone() });
        }
        let boot_id = boot_id(self.host);
        // Ours to undo: with VFIO, or on the way there.
        let is_taken =
            function.is_bound_to_vfio() || function.driver_override.as_deref() == Some(VFIO_DRIVER);
        let binding = match (driver, recorded) {
            (Some(driver), recorded) => self.told(function, driver, recorded, boot_id),
            (None, Some(binding)) if binding.is_of(function, &boot_id) => binding,
            (None, Some(binding)) if is_taken && binding.boot_id == boot_id => {
                return Err(DeviceError::Replaced { address });
            }
            (None, _) if function.is_bound_to_vfio() => return Err(DeviceError::NotOurs { address }),
            (None, Some(_)) => return self.forget(lock, address),
            (None, None) => return Ok(self.standing(address, Return::Nothing, &[])),
        };
        if driver.is_some() {
            // So that a crash from here on is mended by the same means.
            self.records.store(lock, address, &binding)?;
        }
        self.restore(lock, address, &binding)?;
        Ok(self.awaited(address, &binding))
    }

    /// A binding made up of what the operator says.
    fn told(
        &self,
        function: &PciFunction,
        driver: &str,
        recorded: Option<Binding>,
        boot_id: String,
    ) -> Binding {
        let (driver, driver_override) = (Some(driver.to_owned()), None);
        match recorded {
            Some(binding) if binding.is_of(function, &boot_id) => {
                Binding { driver, driver_override, ..binding }
            }
            _ => Binding {
                address: function.address.to_string(),
                driver,
                driver_override,
                vendor_id: function.vendor,
                device_id: function.device,
                name: None,
                model: None,
                serial: None,
                firmware: None,
                nsids: Vec::new(),
                boot_id,
                taken_at_unix_s: 0,
            },
        }
    }

    /// Walks back to what the record says, and removes the record. Every step is done only if it is still to be done,
    /// so that this may be cut short anywhere and begun again.
    pub(super) fn restore(
        &self,
        lock: &RecordsLock,
        address: PciAddress,
        binding: &Binding,
    ) -> Result<(), DeviceError> {
        let wanted = binding.driver.as_deref();
        let before = binding.driver_override.as_deref();
        // An override that would keep the wanted driver away can come back only when that driver has it.
        let on_the_way = before.filter(|_| before == wanted);
        self.set_override(address, on_the_way)?;
        if self.function(address)?.is_bound_to_vfio() && wanted != Some(VFIO_DRIVER) {
            self.run(address, &Step::unbind(address))?;
        }
        if let Some(wanted) = wanted
            && self.function(address)?.driver.is_none()
        {
            self.need_driver(wanted)?;
            // The driver may have found it by itself when its module came.
            if self.function(address)?.driver.is_none() {
                self.run(address, &Step::bind(address, wanted))?;
            }
        }
        let found = self.function(address)?.driver;
        if wanted.is_some() && found.as_deref() != wanted {
            let wanted = wanted.unwrap_or_default().to_owned();
            return Err(DeviceError::NotBound { address, wanted, found });
        }
        self.set_override(address, before)?;
        self.records.remove(lock, address)
    }

    fn set_override(&self, address: PciAddress, driver: Option<&str>) -> Result<(), DeviceError> {
        if self.function(address)?.driver_override.as_deref() == driver {
            return Ok(());
        }
        self.run(address, &Step::driver_override(address, driver))
    }

    fn forget(&self, lock: &RecordsLock, address: PciAddress) -> Result<Given, DeviceError> {
        self.records.remove(lock, address)?;
        Ok(self.standing(address, Return::Forgotten, &[]))
    }

    /// Waits until the kernel shows the namespaces that were there before, so that they can be mounted.
    fn awaited(&self, address: PciAddress, binding: &Binding) -> Given {
        let deadline = Instant::now() + RETURN_PATIENCE;
        loop {
            let given = self.standing(address, Return::Given, &binding.nsids);
            let waits = given.namespaces_missing && given.driver.as_deref() == Some(NVME_DRIVER);
            if !waits || Instant::now() >= deadline {
                return given;
            }
            self.kernel.pause(RETURN_PAUSE);
        }
    }

    /// How the controller stands now.
    fn standing(&self, address: PciAddress, result: Return, nsids: &[u32]) -> Given {
        let inventory = Inventory::read(self.host, self.records).ok();
        let mut controllers = inventory.into_iter().flat_map(|inventory| inventory.controllers);
        let one = controllers.find(|one| one.function.address == address);
        let namespaces = one.as_ref().map_or(&[][..], |one| &one.namespaces);
        let is_back =
            |nsid: &u32| namespaces.iter().any(|(ns, _)| ns.nsid == Some(*nsid) && ns.directory.is_some());
        Given {
            address: address.to_string(),
            result,
            driver: one.as_ref().and_then(|one| one.function.driver.clone()),
            name: one.as_ref().and_then(|one| Some(one.kernel.as_ref()?.name.clone())),
            namespaces: namespaces.iter().map(|(namespace, _)| namespace.name.clone()).collect(),
            namespaces_missing: !nsids.iter().all(is_back),
        }
    }
}
