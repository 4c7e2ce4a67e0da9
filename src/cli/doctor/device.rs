//! What driving NVMe controllers from user space needs: an IOMMU, VFIO, groups of our own, and permission; and what a
//! run that died has left behind.
//!
//! A host without NVMe controllers needs none of it: there, what is missing is a fact and no warning.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use async_nvme::vfio::PciFunction;

use super::Check;
use super::kernel::has_module;
use crate::cli::device::host::Host;
use crate::cli::device::inventory::{Controller, Inventory, VFIO_DRIVER, group_node};
use crate::cli::device::record::{Records, boot_id};

/// `cmdline` words that turn an IOMMU off.
const OFF: [&str; 4] = ["iommu=off", "intel_iommu=off", "amd_iommu=off", "iommu=soft"];
pub(super) const NO_IOMMU_MODE: &str = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

pub(super) fn check(checks: &mut Vec<Check>, host: &Host, state_dir: &Path) {
    let records = Records::at(state_dir);
    let inventory = match Inventory::read(host, &records) {
        Ok(inventory) => inventory,
        Err(error) => {
            checks.push(Check::unknown("nvme", error.to_string()));
            return;
        }
    };
    checks.push(controllers(&inventory));
    let needed = !inventory.controllers.is_empty();
    checks.push(iommu(host, needed));
    checks.extend(no_iommu_mode(&inventory));
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    checks.push(vfio(host, needed, has_module(&release, VFIO_DRIVER)));
    let user = User::this_process();
    for one in inventory.controllers.iter().filter(|one| one.function.is_bound_to_vfio()) {
        checks.push(group(&one.function));
        checks.extend(permission(host, &one.function, &user));
    }
    checks.extend(taken(host, &inventory, &records));
}

/// A warning where there are controllers, else a fact.
fn lacking(needed: bool, id: &'static str, detail: &str, remedy: impl Into<String>) -> Check {
    if needed {
        return Check::warn(id, detail, remedy);
    }
    Check::info(id, format!("{detail} (there is no NVMe controller that would need it)"))
}

fn controllers(inventory: &Inventory) -> Check {
    const ID: &str = "nvme";
    let all = inventory.controllers.len();
    if all == 0 {
        return Check::info(ID, "no NVMe controllers on the PCI buses of this host");
    }
    let taken = inventory.controllers.iter().filter(|one| one.function.is_bound_to_vfio()).count();
    Check::info(ID, format!("{all} controller(s), {taken} with VFIO: fastice device list"))
}

/// Whether an IOMMU is on; else what keeps it off, as far as processor, firmware and command line tell.
fn iommu(host: &Host, needed: bool) -> Check {
    const ID: &str = "iommu";
    let units = host.names("sys/class/iommu");
    if !units.is_empty() {
        return Check::ok(ID, format!("on ({})", units.join(", ")));
    }
    let command_line = host.text("proc/cmdline").unwrap_or_default();
    let off = command_line.split_whitespace().find(|word| OFF.contains(word));
    let processor = host.text("proc/cpuinfo").unwrap_or_default();
    let has_table = |name: &str| host.exists(format!("sys/firmware/acpi/tables/{name}"));
    let boot = "in /etc/default/grub (GRUB_CMDLINE_LINUX), then update-grub and reboot";
    if let Some(word) = off {
        let detail = format!("off: the kernel command line says {word}");
        return lacking(needed, ID, &detail, format!("take {word} out {boot}"));
    }
    if processor.contains("GenuineIntel") {
        if has_table("DMAR") {
            let remedy = format!("add intel_iommu=on {boot}");
            return lacking(
                needed,
                ID,
                "off: the firmware offers VT-d, and the kernel does not use it",
                remedy,
            );
        }
        let remedy = format!("turn VT-d on in the firmware setup, add intel_iommu=on {boot}");
        return lacking(needed, ID, "off: the firmware offers none (no DMAR table)", remedy);
    }
    if processor.contains("AuthenticAMD") || processor.contains("HygonGenuine") {
        if has_table("IVRS") {
            let remedy = format!("see `dmesg | grep -i -e AMD-Vi -e iommu`; add amd_iommu=on {boot}");
            return lacking(needed, ID, "off, though the firmware offers AMD-Vi", remedy);
        }
        let remedy =
            "turn the IOMMU (AMD-Vi, SVM) on in the firmware setup; the kernel then uses it by itself";
        return lacking(needed, ID, "off: the firmware offers none (no IVRS table)", remedy);
    }
    let remedy =
        "turn the IOMMU (SMMU) on in the firmware setup, or in the definition of the virtual machine";
    lacking(needed, ID, "off, or this host has none", remedy)
}

/// The mode in which VFIO hands out devices that nothing keeps from memory.
fn no_iommu_mode(inventory: &Inventory) -> Option<Check> {
    inventory.no_iommu_mode.then(|| {
        Check::warn(
            "no-iommu",
            "VFIO's no-IOMMU mode is on: a controller that is given out so can write to all memory",
            format!("when the IOMMU is on: echo N > /{NO_IOMMU_MODE}"),
        )
    })
}

fn vfio(host: &Host, needed: bool, has_module: Option<bool>) -> Check {
    const ID: &str = "vfio-pci";
    if host.exists(format!("sys/bus/pci/drivers/{VFIO_DRIVER}")) {
        return Check::ok(ID, "the kernel has it");
    }
    match has_module {
        Some(true) => Check::ok(ID, "there is a module for it; `fastice device bind` loads it"),
        Some(false) => {
            let remedy = "install the kernel's extra modules, or use a kernel with CONFIG_VFIO_PCI=m";
            lacking(needed, ID, "this kernel has it not: no controller can be taken", remedy)
        }
        None => Check::unknown(ID, "not loaded, and the list of modules cannot be read"),
    }
}

/// Whether the kernel would give us the group of a controller.
pub(super) fn group(function: &PciFunction) -> Check {
    const ID: &str = "vfio-group";
    let address = function.address;
    let Some(group) = &function.group else {
        return Check::unknown(ID, format!("{address}: it is in no IOMMU group"));
    };
    let number = group.number;
    let mates = function.members_in_the_way();
    if mates.is_empty() {
        return Check::ok(ID, format!("{address}: group {number} is viable"));
    }
    let named: Vec<String> = mates
        .iter()
        .map(|mate| format!("{} (driver {})", mate.address, mate.driver.as_deref().unwrap_or("none")))
        .collect();
    let remedies: Vec<String> = mates
        .iter()
        .map(|mate| match mate.driver.as_deref() {
            Some("nvme") => format!("fastice device bind {}", mate.address),
            _ => format!("echo {0} > /sys/bus/pci/devices/{0}/driver/unbind", mate.address),
        })
        .collect();
    Check::fail(
        ID,
        format!("{address}: group {number} is not viable, the kernel's drivers have {}", named.join(", ")),
        format!("{}   (when nothing needs them)", remedies.join("; ")),
    )
}

/// Who this process is.
#[derive(Debug)]
struct User {
    uid: u32,
    groups: Vec<u32>,
}

impl User {
    fn this_process() -> Self {
        let mut groups: Vec<u32> =
            rustix::process::getgroups().unwrap_or_default().into_iter().map(|gid| gid.as_raw()).collect();
        groups.push(rustix::process::getegid().as_raw());
        Self { uid: rustix::process::geteuid().as_raw(), groups }
    }

    /// Whether the mode of a node lets this user read and write it.
    fn may_use(&self, uid: u32, gid: u32, mode: u32) -> bool {
        let bits = if self.uid == uid {
            mode >> 6
        } else if self.groups.contains(&gid) {
            mode >> 3
        } else {
            mode
        };
        self.uid == 0 || bits & 0o6 == 0o6
    }
}

/// Whether this user may open a controller that VFIO has: by its own device file, or else by its group, as the driver
/// itself tries them.
fn permission(host: &Host, function: &PciFunction, user: &User) -> Option<Check> {
    const ID: &str = "vfio-access";
    let may_use = |node: &str| {
        std::fs::metadata(host.path(format!("dev/{node}")))
            .ok()
            .map(|meta| user.may_use(meta.uid(), meta.gid(), meta.mode()))
    };
    if let Some(name) = &function.vfio_device {
        let node = format!("vfio/devices/{name}");
        if may_use(&node) == Some(true) && may_use("iommu") == Some(true) {
            return Some(Check::ok(ID, format!("this user may open /dev/{node} and /dev/iommu")));
        }
    }
    let node = group_node(function)?;
    let path = format!("/dev/{node}");
    match may_use(&node) {
        None => {
            let remedy = "start udev, or see the kernel log for vfio-pci";
            Some(Check::fail(ID, format!("{path} is not there"), remedy))
        }
        Some(true) => Some(Check::ok(ID, format!("this user may open {path}"))),
        Some(false) => {
            let detail = format!("user {} may not open {path}", user.uid);
            let rule = "udev: SUBSYSTEM==\"vfio\", GROUP=\"fastice\", MODE=\"0660\"";
            let remedy = format!("as root: chown {} {path}   (for good, by {rule})", user.uid);
            Some(Check::fail(ID, detail, remedy))
        }
    }
}

/// Controllers that fastice has taken, and what a death on the way has left.
fn taken(host: &Host, inventory: &Inventory, records: &Records) -> Vec<Check> {
    const ID: &str = "taken";
    let addresses = match records.addresses() {
        Ok(addresses) => addresses,
        Err(error) => return vec![Check::unknown(ID, error.to_string())],
    };
    let boot_id = boot_id(host);
    let mut checks: Vec<Check> =
        inventory.controllers.iter().filter_map(|one| judge(one, &boot_id)).collect();
    for address in addresses {
        if !inventory.controllers.iter().any(|one| one.function.address == address) {
            let detail = format!("{address} was taken, and is not there any more");
            checks.push(Check::warn(ID, detail, format!("fastice device unbind {address}")));
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(ID, "no controller is taken by fastice"));
    }
    checks
}

/// `None` for a controller with which we have nothing to do.
fn judge(one: &Controller, boot_id: &str) -> Option<Check> {
    const ID: &str = "taken";
    let function = &one.function;
    let address = function.address;
    let unbind = format!("fastice device unbind {address}");
    let driver = function.driver.as_deref().unwrap_or("none");
    let binding = match &one.binding {
        Some(Ok(binding)) => binding,
        Some(Err(error)) => {
            let remedy = format!("fastice device unbind --driver nvme {address}");
            return Some(Check::warn(ID, error.to_string(), remedy));
        }
        None if function.driver.is_none() && function.driver_override.as_deref() == Some(VFIO_DRIVER) => {
            let detail =
                format!("{address} waits for vfio-pci, and nothing says why: no other driver gets it");
            return Some(Check::warn(ID, detail, format!("fastice device unbind --driver nvme {address}")));
        }
        None => return None,
    };
    if binding.boot_id != boot_id {
        let detail =
            format!("{address}: the record of its taking is of an earlier boot (driver now: {driver})");
        return Some(Check::warn(ID, detail, unbind));
    }
    let before = binding.driver.as_deref().unwrap_or("none");
    if !function.is_bound_to_vfio() {
        let detail =
            format!("{address}: a change of hands was cut short (driver now: {driver}, before: {before})");
        return Some(Check::warn(ID, detail, unbind));
    }
    let users: Vec<String> = one.vfio_users.iter().map(ToString::to_string).collect();
    Some(if users.is_empty() {
        let detail =
            format!("{address} is taken and nobody drives it (driver before: {before}); back: {unbind}");
        Check::info(ID, detail)
    } else {
        Check::ok(ID, format!("{address} is driven by {} (driver before: {before})", users.join(", ")))
    })
}

#[cfg(test)]
mod tests;
