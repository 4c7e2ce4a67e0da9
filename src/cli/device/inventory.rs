//! Every NVMe controller of the host: who drives it, what hangs on it, and whether it can be taken.

use std::collections::BTreeSet;

use async_nvme::vfio::{GroupMember, PciAddress, PciFunction, Sysfs};

use super::error::{DeviceError, Obstacle};
use super::host::Host;
use super::nvme::{self, KernelController, Namespace};
use super::record::{Binding, Records};
use super::usage::{Process, Usage, Use};

/// The driver that takes a controller for us.
pub(in crate::cli) const VFIO_DRIVER: &str = "vfio-pci";
/// The kernel's own driver.
pub(super) const NVME_DRIVER: &str = "nvme";

/// A controller, as it was when it was looked at.
#[derive(Debug)]
pub(in crate::cli) struct Controller {
    /// Its PCI function.
    pub(in crate::cli) function: PciFunction,
    /// What the kernel's driver shows of it; `None` when another driver has it, or none.
    pub(super) kernel: Option<KernelController>,
    /// Its namespaces with their uses.
    pub(super) namespaces: Vec<(Namespace, Vec<Use>)>,
    /// Uses of its own node.
    pub(super) own_uses: Vec<Use>,
    /// Its virtual functions.
    pub(super) virtual_functions: Vec<GroupMember>,
    /// What it was before fastice took it, when it did.
    pub(in crate::cli) binding: Option<Result<Binding, DeviceError>>,
    /// Processes that have it open through VFIO.
    pub(in crate::cli) vfio_users: Vec<Process>,
}

/// All controllers of a host.
#[derive(Debug)]
pub(in crate::cli) struct Inventory {
    /// By address.
    pub(in crate::cli) controllers: Vec<Controller>,
    /// Whether VFIO hands out devices that no IOMMU guards.
    pub(in crate::cli) no_iommu_mode: bool,
}

/// What is to be taken, and with which consent.
#[derive(Clone, Debug, Default)]
pub(super) struct Wish {
    /// The controllers that are taken together.
    pub(super) addresses: BTreeSet<PciAddress>,
    /// Whether no IOMMU is accepted.
    pub(super) no_iommu: bool,
}

impl Wish {
    /// One controller, with an IOMMU.
    pub(super) fn of(address: PciAddress) -> Self {
        Self { addresses: BTreeSet::from([address]), no_iommu: false }
    }
}

impl Inventory {
    /// Looks at the host. Changes nothing.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    pub(in crate::cli) fn read(host: &Host, records: &Records) -> Result<Self, DeviceError> {
        let sysfs = Sysfs::at(host.path("sys"));
        let usage = Usage::read(host);
        let functions = sysfs.nvme_controllers()?;
        let controllers = functions.into_iter().map(|function| look(host, &sysfs, &usage, records, function));
        Ok(Self { controllers: controllers.collect(), no_iommu_mode: no_iommu_mode(host) })
    }

    /// The controller at `address`.
    ///
    /// # Errors
    /// When there is none there.
    pub(super) fn at(&self, host: &Host, address: PciAddress) -> Result<&Controller, DeviceError> {
        if let Some(found) = self.controllers.iter().find(|one| one.function.address == address) {
            return Ok(found);
        }
        let function = Sysfs::at(host.path("sys")).function(address)?;
        Err(DeviceError::NotNvme { address, class: function.class })
    }

    /// Why the controller cannot be taken together with the others of `wish`; nothing when it can.
    pub(super) fn obstacles(&self, one: &Controller, wish: &Wish) -> Vec<Obstacle> {
        let mut found = Vec::new();
        match one.function.driver.as_deref() {
            None | Some(NVME_DRIVER | "pci-stub") => {}
            Some(_) if one.function.is_bound_to_vfio() => {}
            Some(driver) => found.push(Obstacle::ForeignDriver { driver: driver.to_owned() }),
        }
        let taken = |name: &str| {
            let is_it = |kernel: &KernelController| kernel.name == name;
            self.controllers.iter().any(|other| {
                wish.addresses.contains(&other.function.address) && other.kernel.as_ref().is_some_and(is_it)
            })
        };
        for (namespace, uses) in &one.namespaces {
            if !namespace.paths.iter().any(|path| path.is_live() && !taken(&path.controller)) {
                let last =
                    |used: &Use| Obstacle::LastPath { namespace: namespace.name.clone(), used: used.clone() };
                found.extend(uses.iter().map(last));
            }
        }
        found.extend(one.own_uses.iter().cloned().map(Obstacle::Controller));
        let busy: Vec<_> = one.virtual_functions.iter().filter(|vf| vf.driver.is_some()).cloned().collect();
        if !busy.is_empty() {
            found.push(Obstacle::VirtualFunctions(busy));
        }
        found.extend(self.isolation(one, wish));
        found
    }

    /// Why the kernel would not hand the controller's group to us.
    fn isolation(&self, one: &Controller, wish: &Wish) -> Option<Obstacle> {
        let Some(group) = one.function.group.as_ref().filter(|group| !group.no_iommu) else {
            let mode_enabled = self.no_iommu_mode;
            return (!(wish.no_iommu && mode_enabled)).then_some(Obstacle::NoIommu { mode_enabled });
        };
        let mut mates = one.function.members_in_the_way();
        mates.retain(|mate| !wish.addresses.contains(&mate.address));
        (!mates.is_empty()).then_some(Obstacle::Group { number: group.number, mates })
    }
}

impl Controller {
    /// The namespaces whose block devices would go with the controllers of `wish`.
    pub(super) fn vanishing<'one>(
        &'one self,
        inventory: &'one Inventory,
        wish: &'one Wish,
    ) -> impl Iterator<Item = &'one Namespace> {
        let names: BTreeSet<&str> = inventory
            .controllers
            .iter()
            .filter(|other| wish.addresses.contains(&other.function.address))
            .filter_map(|other| Some(other.kernel.as_ref()?.name.as_str()))
            .collect();
        let stays = move |namespace: &Namespace| {
            namespace.paths.iter().any(|path| path.is_live() && !names.contains(path.controller.as_str()))
        };
        self.namespaces.iter().map(|(namespace, _)| namespace).filter(move |one| !stays(one))
    }
}

/// Whether the operator of this host has turned VFIO's no-IOMMU mode on.
fn no_iommu_mode(host: &Host) -> bool {
    let parameter = host.text("sys/module/vfio/parameters/enable_unsafe_noiommu_mode");
    parameter.is_some_and(|text| matches!(text.as_str(), "Y" | "1"))
}

/// Where a PCI function is in sysfs, relative to the root.
pub(super) fn directory_of(address: PciAddress) -> String {
    format!("sys/bus/pci/devices/{address}")
}

fn look(host: &Host, sysfs: &Sysfs, usage: &Usage, records: &Records, function: PciFunction) -> Controller {
    let directory = directory_of(function.address);
    let mut own_uses = Vec::new();
    let mut namespaces = Vec::new();
    let kernel = function.nvme_name.as_deref().map(|name| {
        let place = format!("{directory}/nvme/{name}");
        own_uses = usage.of_character(name, &place);
        for namespace in nvme::namespaces(host, &place, name) {
            let mut uses = namespace.directory.as_deref().map_or_else(Vec::new, |disk| usage.of_disk(disk));
            if let Some((node, at)) = namespace.generic() {
                uses.extend(usage.of_character(&node, &at));
            }
            namespaces.push((namespace, uses));
        }
        nvme::controller(host, &place, name)
    });
    Controller {
        kernel,
        namespaces,
        own_uses,
        virtual_functions: virtual_functions(host, sysfs, &directory),
        binding: records.load(function.address).transpose(),
        vfio_users: vfio_users(usage, &function),
        function,
    }
}

fn virtual_functions(host: &Host, sysfs: &Sysfs, directory: &str) -> Vec<GroupMember> {
    let links = host.names(directory).into_iter().filter(|name| name.starts_with("virtfn"));
    let member = |link: String| {
        let address = host.link_name(format!("{directory}/{link}"))?.parse().ok()?;
        Some(GroupMember { address, driver: sysfs.function(address).ok()?.driver })
    };
    links.filter_map(member).collect()
}

/// The node below `/dev/vfio` by which the group of a function is opened.
pub(in crate::cli) fn group_node(function: &PciFunction) -> Option<String> {
    let group = function.group.as_ref()?;
    let feigned = if group.no_iommu { "noiommu-" } else { "" };
    Some(format!("vfio/{feigned}{}", group.number))
}

/// Who has a function open: by its group, or by its own device file where the kernel has these.
fn vfio_users(usage: &Usage, function: &PciFunction) -> Vec<Process> {
    let own = function.vfio_device.as_ref().map(|name| format!("vfio/devices/{name}"));
    let nodes = group_node(function).into_iter().chain(own);
    let users: BTreeSet<Process> = nodes.flat_map(|node| usage.open_by_name(&node)).collect();
    users.into_iter().collect()
}
