//! The controllers that a configuration names in `[[nvme]]`: is each one there, and could `fastice serve` open it now.
//!
//! ```text
//!   pci         there? an NVMe controller? an IOMMU? with VFIO?   then its group and node, as `device` looks at them
//!   vfio_user   a socket? may this user write to it?
//!   model       a block device or image? may this user read and write it?
//!   no place    does VFIO have any controller that could be asked?
//! ```
//!
//! Nothing is opened, reset or connected to: a running `fastice serve` may have it.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use async_nvme::vfio::{PciAddress, PciFunction, Sysfs, SysfsError};
use rustix::fs::{Access, AtFlags, CWD};

use super::device::{NO_IOMMU_MODE, group};
use super::{Check, Status};
use crate::block::nvme::NvmeWay;
use crate::cli::device::host::Host;
use crate::config::{Backing, Config, DeviceWay, NvmeChoice};

const ID: &str = "controller";

pub(super) fn check(checks: &mut Vec<Check>, host: &Host, config: &Config) {
    let needed = is_driver_used(config);
    for choice in &config.nvme {
        let mut found = look(host, choice);
        // What no namespace uses stops nothing.
        for check in found.iter_mut().filter(|check| !needed && check.status == Status::Fail) {
            check.status = Status::Warn;
        }
        checks.append(&mut found);
    }
}

/// Whether a namespace is reached by our own driver.
fn is_driver_used(config: &Config) -> bool {
    backings(config).any(|(backing, _)| {
        matches!(backing, Backing::File { device: DeviceWay::Nvme | DeviceWay::HandedOver, .. })
    })
}

/// Whether the kernel's node of a disk is opened for writing: by `io_uring`, or by a model over a block device.
pub(super) fn writes_kernel_disks(config: &Config) -> bool {
    let by_uring = backings(config).any(|(backing, read_only)| {
        !read_only && matches!(backing, Backing::File { device: DeviceWay::Uring, .. })
    });
    by_uring || (is_driver_used(config) && config.nvme.iter().any(stands_on_block_device))
}

fn stands_on_block_device(choice: &NvmeChoice) -> bool {
    let Some(NvmeWay::Model(path)) = &choice.way else { return false };
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// What stores the blocks of each namespace, and whether it is read-only.
fn backings(config: &Config) -> impl Iterator<Item = (&Backing, bool)> {
    let namespaces = config.subsystems.iter().flat_map(|subsystem| &subsystem.namespaces);
    namespaces.map(|namespace| (&namespace.backing, namespace.read_only))
}

fn look(host: &Host, choice: &NvmeChoice) -> Vec<Check> {
    match &choice.way {
        None => vec![anywhere(host, choice)],
        Some(NvmeWay::Pci(address)) => pci(host, *address, false),
        Some(NvmeWay::PciWithoutIommu(address)) => pci(host, *address, true),
        Some(NvmeWay::VfioUser(path)) => vec![vfio_user(path)],
        Some(NvmeWay::Model(path)) => vec![model(path)],
    }
}

/// An identity without a place: it is looked for on whatever controllers VFIO has. Which of them has it only asking
/// them would tell.
fn anywhere(host: &Host, choice: &NvmeChoice) -> Check {
    let controllers = match Sysfs::at(host.path("sys")).nvme_controllers() {
        Ok(controllers) => controllers,
        Err(error) => return Check::unknown(ID, error.to_string()),
    };
    let bound = controllers.iter().filter(|one| one.is_bound_to_vfio()).count();
    if bound > 0 {
        let detail =
            format!("an [[nvme]] without a place: `fastice serve` asks the {bound} controller(s) with VFIO");
        return Check::ok(ID, detail);
    }
    let serial_of = |one: &PciFunction| {
        let name = one.nvme_name.as_deref()?;
        host.text(format!("sys/bus/pci/devices/{}/nvme/{name}/serial", one.address))
    };
    let wanted = choice.identity.serial.as_deref();
    let found = controllers.iter().find(|one| wanted.is_some() && serial_of(one).as_deref() == wanted);
    let remedy = found.map_or_else(
        || "fastice device bind PCI   (`fastice device list` shows all)".to_owned(),
        |one| format!("fastice device bind {}   (it has the serial number)", one.address),
    );
    Check::fail(ID, "an [[nvme]] without a place, and VFIO has no controller that could be asked", remedy)
}

fn pci(host: &Host, address: PciAddress, without_iommu: bool) -> Vec<Check> {
    const CORRECT: &str = "fastice device list, and correct pci in [[nvme]]";
    let function = match Sysfs::at(host.path("sys")).function(address) {
        Ok(function) => function,
        Err(SysfsError::NoSuch { .. }) => {
            return vec![Check::fail(ID, format!("{address} of [[nvme]] is not there"), CORRECT)];
        }
        Err(error) => return vec![Check::unknown(ID, format!("{address}: {error}"))],
    };
    if !function.is_nvme() {
        let detail =
            format!("{address} of [[nvme]] is no NVMe controller: its class is {:#08x}", function.class);
        return vec![Check::fail(ID, detail, CORRECT)];
    }
    if let Some(check) = isolation(&function, without_iommu) {
        return vec![check];
    }
    if function.is_bound_to_vfio() {
        // Its group and its node are looked at with those of all controllers that VFIO has.
        return vec![Check::ok(ID, format!("{address} of [[nvme]] is with VFIO"))];
    }
    let driver = function.driver.as_deref().unwrap_or("none");
    let consent = if without_iommu { "--no-iommu " } else { "" };
    let detail = format!("{address} of [[nvme]] is not given to user space (its driver: {driver})");
    let mut checks = vec![Check::fail(ID, detail, format!("fastice device bind {consent}{address}"))];
    // Then binding it alone would not do.
    checks.extend(Some(group(&function)).filter(|check| !without_iommu && check.status == Status::Fail));
    checks
}

/// What does not fit between the IOMMU before a function and what the configuration says of it.
fn isolation(function: &PciFunction, without_iommu: bool) -> Option<Check> {
    let address = function.address;
    let group = function.group.as_ref();
    let is_guarded = group.is_some_and(|group| !group.no_iommu);
    if !without_iommu {
        let remedy = "turn the IOMMU on: the check `iommu` says how";
        let detail = format!("no IOMMU stands before {address} of [[nvme]]");
        return (!is_guarded).then(|| Check::fail(ID, detail, remedy));
    }
    if is_guarded {
        let detail = format!("an IOMMU stands before {address} of [[nvme]]: it is opened the safe way only");
        return Some(Check::fail(ID, detail, "take unsafe_no_iommu out"));
    }
    // VFIO makes a group up when it is given a function in that mode.
    (function.is_bound_to_vfio() && group.is_none()).then(|| {
        let detail = format!("{address} of [[nvme]] was given to VFIO before its no-IOMMU mode was on");
        let remedy = format!(
            "fastice device unbind {address}; echo Y > /{NO_IOMMU_MODE}; fastice device bind --no-iommu {address}"
        );
        Check::fail(ID, detail, remedy)
    })
}

fn vfio_user(path: &Path) -> Check {
    const REMEDY: &str = "start the server of this controller, or correct vfio_user in [[nvme]]";
    let name = path.display();
    match fs::metadata(path) {
        Err(error) => absent(path, &error, REMEDY),
        Ok(meta) if !meta.file_type().is_socket() => {
            Check::fail(ID, format!("{name} of [[nvme]] is no socket"), REMEDY)
        }
        Ok(_) => allowed(path, Access::WRITE_OK, "there is a socket"),
    }
}

fn model(path: &Path) -> Check {
    const REMEDY: &str = "attach or make it, or correct model in [[nvme]]";
    let name = path.display();
    match fs::metadata(path) {
        Err(error) => absent(path, &error, REMEDY),
        Ok(meta) if !meta.is_file() && !meta.file_type().is_block_device() => {
            Check::fail(ID, format!("{name} of [[nvme]] is no block device and no image"), REMEDY)
        }
        Ok(_) => allowed(path, Access::READ_OK | Access::WRITE_OK, "a model can stand on it"),
    }
}

fn absent(path: &Path, error: &io::Error, remedy: &str) -> Check {
    let name = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => Check::fail(ID, format!("{name} of [[nvme]] is not there"), remedy),
        io::ErrorKind::PermissionDenied => denied(path),
        _ => Check::unknown(ID, format!("{name}: {error}")),
    }
}

/// Whether this user may do with it what the driver does.
fn allowed(path: &Path, access: Access, detail: &str) -> Check {
    let name = path.display();
    match rustix::fs::accessat(CWD, path, access, AtFlags::EACCESS) {
        Ok(()) => Check::ok(ID, format!("{name} of [[nvme]]: {detail}")),
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => denied(path),
        Err(error) => Check::unknown(ID, format!("{name}: {}", io::Error::from(error))),
    }
}

fn denied(path: &Path) -> Check {
    let name = path.display();
    let user = rustix::process::geteuid().as_raw();
    let remedy = format!("run as root, or as root: chown {user} {name}");
    Check::fail(ID, format!("user {user} may not open {name} of [[nvme]]"), remedy)
}

#[cfg(test)]
mod tests;
