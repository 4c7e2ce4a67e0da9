//! From the device number a file reports to the whole disk under it, by sysfs.
//!
//! ```text
//!   st_dev 259:3 -> /sys/dev/block/259:3 -> .../nvme0n1/nvme0n1p2    partition, start (512-byte sectors), size
//!                                           .../nvme0n1              queue/logical_block_size, slaves/, nguid, ...
//! ```
//!
//! An NVMe disk with several paths is a child of its subsystem (`nvme-subsys0/nvme0n1`), one with a single path of its
//! controller (`nvme0/nvme0n1`). Both have the serial number under `device/`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::accept::Violation;
use super::identity::{DeviceNumber, DiskIdentity};
use crate::units::{BlockSize, ByteLen, ByteOffset};

/// The unit of `start` and `size` in sysfs, whatever the disk's logical block is.
const SECTOR_LEN: u64 = 512;

/// A sysfs tree: the system's, or one made for a test.
#[derive(Clone, Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    /// The system's.
    pub(super) fn system() -> Self {
        Self { root: PathBuf::from("/sys") }
    }

    /// The directory of a block device; `None` when there is none of that number.
    fn directory(&self, device: DeviceNumber) -> Option<PathBuf> {
        fs::canonicalize(self.root.join(format!("dev/block/{device}"))).ok()
    }

    /// The name of a block device in sysfs.
    pub(super) fn device_name(&self, device: DeviceNumber) -> Option<String> {
        Some(self.directory(device)?.file_name()?.to_str()?.to_owned())
    }

    /// The node of a block device below `/dev`.
    pub(super) fn device_node(&self, device: DeviceNumber) -> Option<PathBuf> {
        Some(node(&self.directory(device)?))
    }

    /// The name of the block device that has the identity of `disk`, by its identifiers alone: names and numbers change.
    /// `None` when there is none, or when the disk told no identifier.
    pub(super) fn same_disk(&self, disk: &DiskIdentity) -> io::Result<Option<String>> {
        let told = [("nguid", &disk.nguid), ("eui", &disk.eui64), ("wwid", &disk.wwid)];
        for entry in fs::read_dir(self.root.join("block"))? {
            let directory = entry?.path();
            let same =
                |(name, told): &(&str, &Option<String>)| told.is_some() && text(&directory, name) == **told;
            if told.iter().any(same) {
                return Ok(Some(file_name(&directory)));
            }
        }
        Ok(None)
    }

    /// The device that a filesystem on `disk` is on now, a partition or a whole disk, and what that disk is in this boot. It is
    /// found by its identifiers, or where it told none by its name; and is cut as it was.
    pub(super) fn filesystem_device(
        &self,
        disk: &DiskIdentity,
    ) -> io::Result<Option<(DeviceNumber, DiskIdentity)>> {
        for entry in fs::read_dir(self.root.join("block"))? {
            let Ok(whole) = fs::canonicalize(entry?.path()) else { continue };
            // Partitions are directories of their disk.
            let parts = fs::read_dir(&whole).into_iter().flatten().flatten().map(|entry| entry.path());
            let parts = parts.filter(|part| part.join("partition").exists());
            for device in std::iter::once(whole.clone()).chain(parts) {
                let Some(number) = text(&device, "dev").and_then(|text| parse_number(&text)) else {
                    continue;
                };
                // What goes at this moment is not it.
                let Ok(Ok(found)) = self.disk(number) else { continue };
                if found.is_same_place(disk) {
                    return Ok(Some((number, found)));
                }
            }
        }
        Ok(None)
    }

    /// The length of a whole disk; `None` when there is none of that number.
    pub(super) fn len_of(&self, disk: DeviceNumber) -> io::Result<Option<ByteLen>> {
        match self.directory(disk) {
            Some(directory) => Ok(Some(ByteLen(sectors(&directory, "size")?))),
            None => Ok(None),
        }
    }

    /// The whole disk under the device `device`, which may be a partition of it, or why it cannot be served.
    pub(super) fn disk(&self, device: DeviceNumber) -> io::Result<Result<DiskIdentity, Violation>> {
        let Some(directory) = self.directory(device) else {
            return Ok(Err(Violation::NoDisk { device }));
        };
        let is_partition = directory.join("partition").exists();
        let whole = if is_partition { directory.parent().unwrap_or(&directory) } else { &directory };
        if let Some(violation) = stacked(&directory)?.or(stacked(whole)?) {
            return Ok(Err(violation));
        }
        let name = file_name(whole);
        let block_bytes = number(whole, "queue/logical_block_size")?;
        let Some(logical_block_size) = u32::try_from(block_bytes).ok().and_then(BlockSize::new) else {
            return Ok(Err(Violation::BlockSize { disk: name, bytes: block_bytes }));
        };
        let start = if is_partition { sectors(&directory, "start")? } else { 0 };
        Ok(Ok(DiskIdentity {
            number: text(whole, "dev")
                .and_then(|text| parse_number(&text))
                .ok_or_else(|| broken(whole, "dev"))?,
            node: node(whole),
            size: ByteLen(sectors(whole, "size")?),
            logical_block_size,
            partition_start: ByteOffset(start),
            partition_len: ByteLen(sectors(&directory, "size")?),
            serial: text(whole, "device/serial").or_else(|| text(whole, "serial")),
            wwid: text(whole, "wwid").or_else(|| text(whole, "device/wwid")),
            model: text(whole, "device/model"),
            nguid: text(whole, "nguid"),
            eui64: text(whole, "eui"),
            uuid: text(whole, "uuid"),
            nsid: text(whole, "nsid").and_then(|text| text.parse().ok()),
            name,
        }))
    }
}

/// Whether the device stands on others (device-mapper, MD, bcache): its addresses are not those of a disk.
fn stacked(directory: &Path) -> io::Result<Option<Violation>> {
    let mut lowers = Vec::new();
    match fs::read_dir(directory.join("slaves")) {
        Ok(entries) => {
            for entry in entries {
                lowers.push(entry?.file_name().to_string_lossy().into_owned());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    lowers.sort();
    // A mapped device without lower ones (dm-zero, an inactive array) is no disk either.
    for kind in ["dm", "md", "bcache"] {
        if lowers.is_empty() && directory.join(kind).is_dir() {
            lowers.push(format!("a {kind} mapping"));
        }
    }
    if lowers.is_empty() {
        return Ok(None);
    }
    Ok(Some(Violation::Stacked { disk: file_name(directory), lowers: lowers.join(", ") }))
}

fn file_name(directory: &Path) -> String {
    directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The device node: by the name the kernel gives to udev, which may differ from the one in sysfs.
fn node(directory: &Path) -> PathBuf {
    let told = text(directory, "uevent")
        .and_then(|uevent| uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=").map(str::to_owned)));
    Path::new("/dev").join(told.unwrap_or_else(|| file_name(directory).replace('!', "/")))
}

/// The trimmed content of an attribute; `None` when it is missing or empty.
fn text(directory: &Path, attribute: &str) -> Option<String> {
    let text = fs::read_to_string(directory.join(attribute)).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn number(directory: &Path, attribute: &str) -> io::Result<u64> {
    text(directory, attribute).and_then(|text| text.parse().ok()).ok_or_else(|| broken(directory, attribute))
}

fn sectors(directory: &Path, attribute: &str) -> io::Result<u64> {
    number(directory, attribute)?.checked_mul(SECTOR_LEN).ok_or_else(|| broken(directory, attribute))
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

fn broken(directory: &Path, attribute: &str) -> io::Error {
    let attribute = directory.join(attribute);
    io::Error::new(io::ErrorKind::InvalidData, format!("no usable value in {}", attribute.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const DISK: DeviceNumber = DeviceNumber { major: 259, minor: 0 };
    const PART: DeviceNumber = DeviceNumber { major: 259, minor: 2 };

    struct Tree {
        root: tempfile::TempDir,
    }

    impl Tree {
        fn new() -> Self {
            let tree = Self { root: tempfile::tempdir().unwrap() };
            let disk = "devices/pci/nvme0/nvme0n1";
            let attributes = [
                ("dev", "259:0\n"),
                ("size", "1000000\n"),
                ("queue/logical_block_size", "4096\n"),
                ("uevent", "MAJOR=259\nDEVNAME=nvme0n1\n"),
                ("nguid", "00-01\n"),
                ("nsid", "7\n"),
                ("wwid", "eui.0001\n"),
                ("device/serial", "S3R1AL  \n"),
                ("nvme0n1p2/dev", "259:2\n"),
                ("nvme0n1p2/partition", "2\n"),
                ("nvme0n1p2/start", "2048\n"),
                ("nvme0n1p2/size", "8192\n"),
                ("nvme0n1p2/uevent", "DEVNAME=nvme0n1p2\n"),
            ];
            for (name, value) in attributes {
                tree.write(&format!("{disk}/{name}"), value);
            }
            fs::create_dir_all(tree.root.path().join("dev/block")).unwrap();
            fs::create_dir(tree.root.path().join(disk).join("slaves")).unwrap();
            for (number, target) in [("259:0", ""), ("259:2", "/nvme0n1p2")] {
                let link = tree.root.path().join("dev/block").join(number);
                symlink(format!("../../{disk}{target}"), link).unwrap();
            }
            tree
        }

        fn write(&self, name: &str, value: &str) {
            let path = self.root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }

        fn disk(&self, device: DeviceNumber) -> Result<DiskIdentity, Violation> {
            Sysfs { root: self.root.path().to_path_buf() }.disk(device).unwrap()
        }
    }

    #[test]
    fn the_device_of_a_filesystem_is_found_again_by_identity_and_not_by_name() {
        let tree = Tree::new();
        fs::create_dir(tree.root.path().join("block")).unwrap();
        symlink("../devices/pci/nvme0/nvme0n1", tree.root.path().join("block/nvme0n1")).unwrap();
        let sysfs = Sysfs { root: tree.root.path().to_path_buf() };
        let number = |disk: &DiskIdentity| sysfs.filesystem_device(disk).unwrap().map(|found| found.0);
        let [whole, part] = [DISK, PART].map(|device| tree.disk(device).unwrap());
        assert_eq!((number(&whole), number(&part)), (Some(DISK), Some(PART)));
        let renamed = DiskIdentity { name: "nvme3n1".to_owned(), ..part.clone() };
        assert_eq!(number(&renamed), Some(PART), "names change");
        let moved = ByteOffset(part.partition_start.get() + 512);
        for other in [
            DiskIdentity { nguid: Some("00-02".to_owned()), ..part.clone() },
            DiskIdentity { partition_start: moved, ..part.clone() },
            DiskIdentity { size: ByteLen(512), ..part.clone() },
        ] {
            assert_eq!(number(&other), None, "{other:?}");
        }
        // What tells no identifier is found by name and serial number.
        let plain = DiskIdentity { nguid: None, eui64: None, wwid: None, ..part };
        assert_eq!(number(&plain), Some(PART));
        assert_eq!(number(&DiskIdentity { name: "sda".to_owned(), ..plain.clone() }), None);
        assert_eq!(number(&DiskIdentity { serial: None, ..plain }), None);
    }

    #[test]
    fn a_partition_leads_to_its_disk() {
        let disk = Tree::new().disk(PART).unwrap();
        assert_eq!((disk.number, disk.name.as_str()), (DISK, "nvme0n1"));
        assert_eq!(disk.node, Path::new("/dev/nvme0n1"));
        assert_eq!(disk.partition_start, ByteOffset(2048 * 512));
        assert_eq!(disk.partition_len, ByteLen(8192 * 512));
        assert_eq!(disk.size, ByteLen(512_000_000));
        assert_eq!(disk.logical_block_size, BlockSize::B4096);
        assert_eq!((disk.serial.as_deref(), disk.nsid), (Some("S3R1AL"), Some(7)));
    }

    #[test]
    fn a_whole_disk_starts_at_zero() {
        let disk = Tree::new().disk(DISK).unwrap();
        assert_eq!((disk.partition_start, disk.partition_len), (ByteOffset(0), disk.size));
    }

    #[test]
    fn a_disk_with_several_paths_has_the_serial_of_its_subsystem() {
        let tree = Tree { root: tempfile::tempdir().unwrap() };
        let subsystem = "devices/virtual/nvme-subsystem/nvme-subsys0";
        let head = format!("{subsystem}/nvme0n1");
        for (name, value) in [
            ("dev", "259:0\n"),
            ("size", "2048\n"),
            ("queue/logical_block_size", "512\n"),
            ("nguid", "00000000-0000-0000-0000-000000000000\n"),
            ("eui", "00 25 38 ab cd ef 01 23\n"),
            ("uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8\n"),
            ("nsid", "3\n"),
        ] {
            tree.write(&format!("{head}/{name}"), value);
        }
        tree.write(&format!("{subsystem}/serial"), "SUB0                \n");
        symlink("../../nvme-subsys0", tree.root.path().join(&head).join("device")).unwrap();
        fs::create_dir_all(tree.root.path().join("dev/block")).unwrap();
        symlink(format!("../../{head}"), tree.root.path().join("dev/block/259:0")).unwrap();
        let identity = tree.disk(DISK).unwrap().namespace();
        assert_eq!(identity.nguid, None, "zeros are no identifier");
        assert_eq!(identity.eui64, Some([0, 0x25, 0x38, 0xAB, 0xCD, 0xEF, 1, 0x23]));
        assert_eq!(identity.uuid.map(|uuid| uuid[0]), Some(0x6B));
        assert_eq!((identity.serial.as_deref(), identity.nsid), (Some("SUB0"), Some(3)));
    }

    #[test]
    fn a_uuid_that_is_only_the_nguid_again_is_none() {
        let tree = Tree::new();
        let id = "0001feed-0203-0405-0607-08090a0b0c0d\n";
        tree.write("devices/pci/nvme0/nvme0n1/nguid", id);
        tree.write("devices/pci/nvme0/nvme0n1/uuid", id);
        let identity = tree.disk(PART).unwrap().namespace();
        assert!(identity.nguid.is_some() && identity.uuid.is_none(), "{identity}");
        fs::remove_file(tree.root.path().join("devices/pci/nvme0/nvme0n1/nsid")).unwrap();
        assert!(tree.disk(PART).unwrap().namespace().is_empty(), "no NVMe disk");
    }

    #[test]
    fn stacked_devices_are_refused_with_what_they_stand_on() {
        let tree = Tree::new();
        tree.write("devices/pci/nvme0/nvme0n1/slaves/sdb", "");
        tree.write("devices/pci/nvme0/nvme0n1/slaves/sda", "");
        let expected = Violation::Stacked { disk: "nvme0n1".into(), lowers: "sda, sdb".into() };
        assert_eq!(tree.disk(PART), Err(expected.clone()));
        assert_eq!(tree.disk(DISK), Err(expected));
    }

    #[test]
    fn a_disk_is_found_by_its_identifiers_and_by_nothing_else() {
        let tree = Tree::new();
        let disk = tree.disk(DISK).unwrap();
        let sysfs = Sysfs { root: tree.root.path().to_path_buf() };
        fs::create_dir(tree.root.path().join("block")).unwrap();
        assert_eq!(sysfs.same_disk(&disk).unwrap(), None);
        tree.write("block/nvme0n1/nguid", "00-02\n");
        assert_eq!(sysfs.same_disk(&disk).unwrap(), None, "the name alone says nothing");
        tree.write("block/nvme3n1/wwid", "eui.0001\n");
        assert_eq!(sysfs.same_disk(&disk).unwrap().as_deref(), Some("nvme3n1"));
        let nameless = DiskIdentity { nguid: None, wwid: None, ..disk };
        tree.write("block/sda/nguid", "\n");
        assert_eq!(sysfs.same_disk(&nameless).unwrap(), None);
    }

    #[test]
    fn a_mapping_without_lower_devices_is_no_disk() {
        let tree = Tree::new();
        tree.write("devices/pci/nvme0/nvme0n1/dm/name", "zero");
        assert!(matches!(tree.disk(DISK), Err(Violation::Stacked { .. })));
    }

    #[test]
    fn unknown_numbers_and_odd_block_sizes_are_refused() {
        let tree = Tree::new();
        let device = DeviceNumber { major: 0, minor: 41 };
        assert_eq!(tree.disk(device), Err(Violation::NoDisk { device }));
        tree.write("devices/pci/nvme0/nvme0n1/queue/logical_block_size", "520");
        assert_eq!(tree.disk(DISK), Err(Violation::BlockSize { disk: "nvme0n1".into(), bytes: 520 }));
    }
}
