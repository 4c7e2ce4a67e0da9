//! Taking controllers: from the kernel's driver to VFIO.

use std::collections::BTreeSet;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use async_nvme::vfio::{PciAddress, PciFunction};
use serde::Serialize;

use super::error::{DeviceError, Obstacle, Undone};
use super::handover::{Handover, Step, is_under_way};
use super::inventory::{Controller, Inventory, VFIO_DRIVER, Wish, group_node};
use super::kernel::Claim;
use super::record::{Binding, RecordsLock, boot_id};

/// A controller that is with VFIO, or would be, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Taken {
    pub(super) address: String,
    /// Whether it was there before.
    pub(super) already: bool,
    /// The driver that had it; `None` when none did, or when nothing is recorded.
    pub(super) previous_driver: Option<String>,
    pub(super) iommu_group: Option<u32>,
    /// What a process opens to drive it; `None` when nothing was done.
    pub(super) node: Option<String>,
    /// What was done, or would be, as commands.
    pub(super) steps: Vec<String>,
}

/// The controllers that may be taken, kept from getting new users until this is dropped.
#[derive(Debug)]
pub(super) struct Cleared {
    inventory: Inventory,
    _claims: Vec<Claim>,
}

impl Handover<'_> {
    /// Makes sure that there is a controller at every address, before anything is made or waited for.
    ///
    /// # Errors
    /// When there is not: all that is in the way of `wish`, as [`Handover::clear`].
    pub(super) fn find(&self, wish: &Wish) -> Result<(), Vec<DeviceError>> {
        let inventory = Inventory::read(self.host, self.records).map_err(|error| vec![error])?;
        if wish.addresses.iter().all(|&address| inventory.at(self.host, address).is_ok()) {
            return Ok(());
        }
        self.judge(&inventory, wish)
    }

    /// Makes sure that nothing which is used would lose its last path, and that nothing new comes to be used.
    ///
    /// # Errors
    /// For each controller that cannot be taken, why. None of the others may be taken then either.
    pub(super) fn clear(&self, wish: &Wish) -> Result<Cleared, Vec<DeviceError>> {
        let inventory = Inventory::read(self.host, self.records).map_err(|error| vec![error])?;
        self.judge(&inventory, wish)?;
        let claims = self.claim(&inventory, wish)?;
        // What came into use between the first look and the claims is seen now; later nothing can.
        let inventory = Inventory::read(self.host, self.records).map_err(|error| vec![error])?;
        self.judge(&inventory, wish)?;
        Ok(Cleared { inventory, _claims: claims })
    }

    fn judge(&self, inventory: &Inventory, wish: &Wish) -> Result<(), Vec<DeviceError>> {
        let mut errors = Vec::new();
        for &address in &wish.addresses {
            match inventory.at(self.host, address) {
                Err(error) => errors.push(error),
                Ok(one) if one.function.is_bound_to_vfio() => {}
                Ok(one) => {
                    let obstacles = inventory.obstacles(one, wish);
                    if !obstacles.is_empty() {
                        errors.push(DeviceError::Refused { address, obstacles });
                    }
                }
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// Holds every block device that would go, so that the kernel lets nobody begin to use it.
    fn claim(&self, inventory: &Inventory, wish: &Wish) -> Result<Vec<Claim>, Vec<DeviceError>> {
        let mut claims = Vec::new();
        let mut errors = Vec::new();
        // Two controllers that are taken together may lead to the same block device.
        let mut seen = BTreeSet::new();
        let taken = |one: &&Controller| wish.addresses.contains(&one.function.address);
        for one in inventory.controllers.iter().filter(taken) {
            let mut obstacles = Vec::new();
            for namespace in one.vanishing(inventory, wish).filter(|namespace| namespace.directory.is_some())
            {
                if !seen.insert(namespace.name.clone()) {
                    continue;
                }
                let node = self.host.path("dev").join(&namespace.name);
                match self.kernel.claim(&node) {
                    Ok(claim) => claims.push(claim),
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                        obstacles.push(Obstacle::Claimed { device: namespace.name.clone() });
                    }
                    Err(error) => {
                        obstacles.push(Obstacle::Unclaimed { node, why: error.to_string() });
                    }
                }
            }
            if !obstacles.is_empty() {
                errors.push(DeviceError::Refused { address: one.function.address, obstacles });
            }
        }
        if errors.is_empty() { Ok(claims) } else { Err(errors) }
    }

    /// What taking one of the cleared controllers would do.
    pub(super) fn plan(&self, cleared: &Cleared, address: PciAddress) -> Result<Taken, DeviceError> {
        let one = cleared.inventory.at(self.host, address)?;
        let function = &one.function;
        if function.is_bound_to_vfio() {
            return Ok(already(one));
        }
        let record = self.records.path_of(address);
        let mut steps = vec![format!("# record what it is now in {}", record.display())];
        if !self.host.exists(format!("sys/bus/pci/drivers/{VFIO_DRIVER}")) {
            steps.insert(0, format!("modprobe {VFIO_DRIVER}"));
        }
        steps.extend(steps_of(function).iter().map(ToString::to_string));
        Ok(Taken {
            already: false,
            previous_driver: function.driver.clone(),
            node: None,
            steps,
            ..already(one)
        })
    }

    /// Takes one of the cleared controllers. On an error it is given back, or, where that is not possible, the
    /// record tells how.
    pub(super) fn take(
        &self,
        lock: &RecordsLock,
        cleared: &Cleared,
        address: PciAddress,
    ) -> Result<Taken, DeviceError> {
        let one = cleared.inventory.at(self.host, address)?;
        if one.function.is_bound_to_vfio() {
            return Ok(already(one));
        }
        let function = self.function(address)?;
        self.need_driver(VFIO_DRIVER)?;
        let binding = self.binding(one, &function)?;
        self.records.store(lock, address, &binding)?;
        let steps = steps_of(&function);
        let walked =
            steps.iter().try_for_each(|step| self.run(address, step)).and_then(|()| self.arrived(address));
        match walked {
            Ok(after) => Ok(Taken {
                address: address.to_string(),
                already: false,
                previous_driver: binding.driver,
                iommu_group: after.group.as_ref().map(|group| group.number),
                node: group_node(&after).map(|node| format!("/dev/{node}")),
                steps: steps.iter().map(ToString::to_string).collect(),
            }),
            Err(error) => Err(self.turn_back(lock, address, &binding, error)),
        }
    }

    /// Proves that VFIO has it.
    fn arrived(&self, address: PciAddress) -> Result<PciFunction, DeviceError> {
        let function = self.function(address)?;
        if function.is_bound_to_vfio() {
            return Ok(function);
        }
        Err(DeviceError::NotBound { address, wanted: VFIO_DRIVER.to_owned(), found: function.driver })
    }

    /// Undoes a taking that failed, unless the kernel may still be at it.
    fn turn_back(
        &self,
        lock: &RecordsLock,
        address: PciAddress,
        binding: &Binding,
        error: DeviceError,
    ) -> DeviceError {
        let back = !is_under_way(&error) && self.restore(lock, address, binding).is_ok();
        match error {
            DeviceError::Step { address, path, value, source, .. } => {
                let undone = if back { Undone::Yes } else { Undone::No };
                DeviceError::Step { address, path, value, undone, source }
            }
            other => other,
        }
    }

    /// What the controller was before. That is as it is now, unless a walk of this boot was cut short: then the record
    /// knows better than a function without a driver, or one that has its driver back but not yet its override.
    fn binding(&self, one: &Controller, function: &PciFunction) -> Result<Binding, DeviceError> {
        let boot_id = boot_id(self.host);
        if let Some(binding) = self.records.load(function.address)?
            && binding.is_of(function, &boot_id)
            && (function.driver.is_none() || function.driver == binding.driver)
        {
            return Ok(binding);
        }
        let kernel = one.kernel.as_ref();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut nsids: Vec<u32> = one.namespaces.iter().filter_map(|(namespace, _)| namespace.nsid).collect();
        nsids.sort_unstable();
        Ok(Binding {
            address: function.address.to_string(),
            driver: function.driver.clone(),
            driver_override: function.driver_override.clone(),
            vendor_id: function.vendor,
            device_id: function.device,
            name: kernel.map(|kernel| kernel.name.clone()),
            model: kernel.and_then(|kernel| kernel.model.clone()),
            serial: kernel.and_then(|kernel| kernel.serial.clone()),
            firmware: kernel.and_then(|kernel| kernel.firmware.clone()),
            nsids,
            boot_id,
            taken_at_unix_s: now.as_secs(),
        })
    }
}

/// The way to VFIO from where the function is.
fn steps_of(function: &PciFunction) -> Vec<Step> {
    let address = function.address;
    let mut steps = vec![Step::driver_override(address, Some(VFIO_DRIVER))];
    if function.driver.is_some() {
        steps.push(Step::unbind(address));
    }
    steps.push(Step::probe(address));
    steps
}

fn already(one: &Controller) -> Taken {
    let function = &one.function;
    let binding = one.binding.as_ref().and_then(|binding| binding.as_ref().ok());
    Taken {
        address: function.address.to_string(),
        already: true,
        previous_driver: binding.and_then(|binding| binding.driver.clone()),
        iommu_group: function.group.as_ref().map(|group| group.number),
        node: group_node(function).map(|node| format!("/dev/{node}")),
        steps: Vec::new(),
    }
}
