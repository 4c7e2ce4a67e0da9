//! Where a swap area is known to be dangerous: where its disk may go away, and the area with it.
//!
//! A filesystem that shuts down with an active swap file on it leaves an area that nothing ends but a reboot: swapoff
//! fails with EIO, umount with EBUSY. So disks that come and go are refused. A loop device is warned of, and not refused:
//! its disk may be as steady as any, but nothing here can tell.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::swap_file::failed;
use crate::extent::device::Sysfs;
use crate::extent::error::ExtentError;
use crate::extent::facts::FileFacts;
use crate::extent::identity::{DeviceNumber, FilesystemKind};

/// What is known against a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Danger {
    Refused(&'static str),
    Warned(&'static str),
}

/// Disks that were warned of: once in the life of a process is enough.
static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Refuses, or warns.
pub(super) fn refuse(facts: &FileFacts) -> Result<(), ExtentError> {
    let Ok(disk) = &facts.disk else { return Ok(()) };
    let mut dangers: Vec<Danger> = of_disk(Path::new("/sys"), &disk.name).into_iter().collect();
    dangers.extend(of_hibernation(Path::new("/sys"), facts.device));
    if has_errors(facts) {
        dangers.push(Danger::Refused("its filesystem has recorded errors: e2fsck it first"));
    }
    for danger in dangers {
        match danger {
            Danger::Refused(problem) => return Err(failed(&facts.path, problem, None)),
            Danger::Warned(what) => {
                if WARNED.lock().unwrap_or_else(PoisonError::into_inner).insert(disk.name.clone()) {
                    tracing::warn!(disk = disk.name, "{what}");
                }
            }
        }
    }
    Ok(())
}

/// Whether the filesystem has recorded errors. XFS has no such record: once it has failed, it fails the flush with which
/// each pin begins.
pub(super) fn has_errors(facts: &FileFacts) -> bool {
    let name = Sysfs::system().device_name(facts.device).unwrap_or_default();
    facts.filesystem == Some(FilesystemKind::Ext4) && of_ext4(Path::new("/sys"), &name)
}

fn of_disk(sys: &Path, name: &str) -> Option<Danger> {
    let directory = sys.join("block").join(name);
    let attribute = |attribute: &str| fs::read_to_string(directory.join(attribute)).unwrap_or_default();
    let starts = |kinds: &[&str]| kinds.iter().any(|kind| name.starts_with(kind));
    if starts(&["nbd", "rbd", "drbd"]) || is_remote(&directory) {
        return Some(Danger::Refused(
            "its disk is reached by a network: when that fails, only a reboot ends the swap area",
        ));
    }
    let place = fs::canonicalize(&directory).unwrap_or_default();
    if attribute("removable").trim() == "1" || place.to_string_lossy().contains("/usb") {
        return Some(Danger::Refused(
            "its disk is removable: when it goes, only a reboot ends the swap area",
        ));
    }
    if starts(&["zram"]) {
        return Some(Danger::Refused("its disk is memory"));
    }
    starts(&["loop"]).then_some(Danger::Warned(
        "a swap-file pin on a loop device: if what is below it fails, only a reboot ends the swap area",
    ))
}

/// NVMe over Fabrics, iSCSI, Fibre Channel.
fn is_remote(directory: &Path) -> bool {
    let place = fs::canonicalize(directory).unwrap_or_default();
    let scsi = place.components().any(|part| {
        let part = part.as_os_str().to_string_lossy();
        part.starts_with("session") || part.starts_with("rport-")
    });
    // Of its one controller, or of each that leads to it.
    let device = directory.join("device");
    let controllers = fs::read_dir(&device).into_iter().flatten().flatten().map(|entry| entry.path());
    let transport =
        |controller: PathBuf| fs::read_to_string(controller.join("transport")).unwrap_or_default();
    let mut transports = controllers.chain([device.clone()]).map(transport);
    scsi || transports.any(|transport| matches!(transport.trim(), "tcp" | "rdma" | "fc"))
}

/// The kernel writes the image of a hibernated host to the device that `resume=` names, by the swap area that is on it.
fn of_hibernation(sys: &Path, device: DeviceNumber) -> Option<Danger> {
    let resume = fs::read_to_string(sys.join("power/resume")).unwrap_or_default();
    (resume.trim() == device.to_string()).then_some(Danger::Refused(
        "this host hibernates to its filesystem (resume=), and a swap area there may be taken for it",
    ))
}

fn of_ext4(sys: &Path, name: &str) -> bool {
    let count = fs::read_to_string(sys.join("fs/ext4").join(name).join("errors_count")).unwrap_or_default();
    count.trim().parse::<u64>().is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, value: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("room");
        fs::write(path, value).expect("room");
    }

    #[test]
    fn disks_that_come_and_go_are_refused() {
        let sys = tempfile::tempdir().expect("a directory");
        let root = sys.path();
        write(root, "block/sda/removable", "1\n");
        write(root, "block/sdb/removable", "0\n");
        write(root, "block/nvme0n1/device/transport", "pcie\n");
        write(root, "block/nvme1n1/device/transport", "tcp\n");
        write(root, "block/nvme2n1/device/nvme7/transport", "rdma\n");
        for (name, text) in
            [("sda", "removable"), ("nvme1n1", "network"), ("nvme2n1", "network"), ("nbd0", "network")]
        {
            let found = of_disk(root, name);
            assert!(matches!(found, Some(Danger::Refused(why)) if why.contains(text)), "{name}: {found:?}");
        }
        assert_eq!((of_disk(root, "sdb"), of_disk(root, "nvme0n1")), (None, None));
        assert!(matches!(of_disk(root, "loop0"), Some(Danger::Warned(_))));
    }

    #[test]
    fn errors_of_the_filesystem_and_hibernation_are_known() {
        let sys = tempfile::tempdir().expect("a directory");
        let device = DeviceNumber { major: 259, minor: 2 };
        assert_eq!((of_hibernation(sys.path(), device), of_ext4(sys.path(), "sda1")), (None, false));
        write(sys.path(), "power/resume", "0:0\n");
        write(sys.path(), "fs/ext4/sda1/errors_count", "0\n");
        assert_eq!((of_hibernation(sys.path(), device), of_ext4(sys.path(), "sda1")), (None, false));
        write(sys.path(), "power/resume", "259:2\n");
        write(sys.path(), "fs/ext4/sda1/errors_count", "3\n");
        assert!(of_hibernation(sys.path(), device).is_some() && of_ext4(sys.path(), "sda1"));
    }
}
