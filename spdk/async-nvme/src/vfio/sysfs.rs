//! What sysfs says of PCI functions: who drives one, what shares its IOMMU group, and where VFIO offers it.
//!
//! ```text
//! /sys/bus/pci/devices/0000:03:00.0/
//!   class  vendor  device  numa_node  driver_override  reset_method
//!   driver -> .../bus/pci/drivers/nvme
//!   nvme/nvme0                                   while the kernel's driver has it
//!   iommu_group -> .../kernel/iommu_groups/12    devices/* are its members; name is `vfio-noiommu` for a feigned one
//!   vfio-dev/vfio3                               /dev/vfio/devices/vfio3, on a kernel with device files for VFIO
//!   physfn -> ../0000:03:00.0                    of a virtual function
//! ```
//!
//! Only reads. What is bound to what is changed elsewhere, by whoever may decide that.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The place of a PCI function: domain, bus, device and function, written `0000:03:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// `None` when the device is above 31 or the function above 7.
    #[must_use]
    pub const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        Some(Self { domain, bus, device, function })
    }

    /// The domain (segment); above 0xFFFF behind a volume management device.
    #[must_use]
    pub const fn domain(&self) -> u32 {
        self.domain
    }

    /// The bus.
    #[must_use]
    pub const fn bus(&self) -> u8 {
        self.bus
    }

    /// The device on the bus, at most 31.
    #[must_use]
    pub const fn device(&self) -> u8 {
        self.device
    }

    /// The function of the device, at most 7.
    #[must_use]
    pub const fn function(&self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// A text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no PCI address: write domain:bus:device.function in hexadecimal, such as 0000:03:00.0")]
pub struct BadPciAddress {
    /// The text.
    pub text: String,
}

impl FromStr for PciAddress {
    type Err = BadPciAddress;

    /// Reads `0000:03:00.0`, or `03:00.0` in domain 0, as `lspci` prints them.
    fn from_str(text: &str) -> Result<Self, BadPciAddress> {
        parse_address(text).ok_or_else(|| BadPciAddress { text: text.to_owned() })
    }
}

fn parse_address(text: &str) -> Option<PciAddress> {
    let (rest, function) = text.rsplit_once('.')?;
    let mut parts = rest.rsplitn(3, ':');
    let device = hex(parts.next()?, 2)?;
    let bus = hex(parts.next()?, 2)?;
    let domain = parts.next().map_or(Some(0), |domain| hex(domain, 8))?;
    PciAddress::new(
        domain,
        u8::try_from(bus).ok()?,
        u8::try_from(device).ok()?,
        u8::try_from(hex(function, 1)?).ok()?,
    )
}

/// At most `digits_max` hexadecimal digits, without sign or prefix.
fn hex(text: &str, digits_max: usize) -> Option<u32> {
    let fits = (1..=digits_max).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

/// Why sysfs gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// No such function, or not any more.
    #[error("there is no PCI function {address}")]
    NoSuch {
        /// Where nothing is.
        address: PciAddress,
    },
    /// A file or directory could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file holds something else than it should.
    #[error("{} holds {text:?}", path.display())]
    Malformed {
        /// Which one.
        path: PathBuf,
        /// What is in it.
        text: String,
    },
}

/// One PCI function, as it was when it was looked at.
#[derive(Clone, Debug)]
pub struct PciFunction {
    /// Its place.
    pub address: PciAddress,
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
    /// Class, subclass and programming interface: 0x010802 for an NVMe I/O controller.
    pub class: u32,
    /// The driver that has it, `None` when it is free.
    pub driver: Option<String>,
    /// The only driver that may have it, when one is named.
    pub driver_override: Option<String>,
    /// What the kernel's NVMe driver calls it, such as `nvme0`.
    pub nvme_name: Option<String>,
    /// Its IOMMU group; `None` when no IOMMU stands before it.
    pub group: Option<IommuGroup>,
    /// Its VFIO device file in `/dev/vfio/devices`, on a kernel that has such files.
    pub vfio_device: Option<String>,
    /// The NUMA node that it is nearest to.
    pub numa_node: Option<u32>,
    /// The physical function whose virtual function it is.
    pub physical_function: Option<PciAddress>,
    /// How the kernel can reset it alone, best first (`flr`, `bus`, ...); empty when it cannot, or does not say.
    pub reset_methods: Vec<String>,
}

/// The functions that an IOMMU cannot tell apart, or does not keep from each other.
#[derive(Clone, Debug)]
pub struct IommuGroup {
    /// Its number: `/dev/vfio/<number>`, or `/dev/vfio/noiommu-<number>`.
    pub number: u32,
    /// A group that VFIO made up in its no-IOMMU mode. Nothing is protected.
    pub no_iommu: bool,
    /// All of its functions, the one that was asked for too.
    pub members: Vec<GroupMember>,
}

/// A function in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMember {
    /// Its place.
    pub address: PciAddress,
    /// The driver that has it.
    pub driver: Option<String>,
}

impl GroupMember {
    /// Whether the kernel refuses the group to user space because of this member: it has a driver, and one that
    /// does DMA of its own (kernel, `Documentation/driver-api/vfio.rst`).
    #[must_use]
    pub fn is_in_the_way(&self) -> bool {
        let Some(driver) = self.driver.as_deref() else { return false };
        !is_vfio_driver(driver) && !matches!(driver, "pci-stub" | "pcieport")
    }
}

impl PciFunction {
    /// Whether it is an NVMe I/O controller.
    #[must_use]
    pub const fn is_nvme(&self) -> bool {
        self.class == CLASS_NVME
    }

    /// Whether VFIO has it, so that it can be opened.
    #[must_use]
    pub fn is_bound_to_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }

    /// The members of its group that keep the group from being used from user space, itself left out.
    #[must_use]
    pub fn members_in_the_way(&self) -> Vec<GroupMember> {
        let members = self.group.iter().flat_map(|group| &group.members);
        members.filter(|one| one.address != self.address && one.is_in_the_way()).cloned().collect()
    }
}

/// `vfio-pci`, or a driver made from its library for one kind of device.
fn is_vfio_driver(driver: &str) -> bool {
    driver.replace('_', "-").ends_with("vfio-pci")
}

/// Mass storage, non-volatile memory, NVM Express I/O controller (PCI Code and ID Assignment Specification).
const CLASS_NVME: u32 = 0x01_0802;

/// A sysfs tree.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    /// `/sys`.
    fn default() -> Self {
        Self::at("/sys")
    }
}

impl Sysfs {
    /// A tree that lies elsewhere.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory of a function.
    #[must_use]
    pub fn path_of(&self, address: PciAddress) -> PathBuf {
        self.root.join("bus/pci/devices").join(address.to_string())
    }

    /// All NVMe I/O controllers, by address. A host without PCI has none.
    ///
    /// # Errors
    /// When the list, or one of them, cannot be read.
    pub fn nvme_controllers(&self) -> Result<Vec<PciFunction>, SysfsError> {
        let mut found = Vec::new();
        for name in names_in(&self.root.join("bus/pci/devices"))? {
            let Ok(address) = name.parse::<PciAddress>() else { continue };
            // One that went away meanwhile is none.
            match self.function(address) {
                Ok(function) if function.is_nvme() => found.push(function),
                Ok(_) | Err(SysfsError::NoSuch { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        found.sort_by_key(|function| function.address);
        Ok(found)
    }

    /// What is known of one function.
    ///
    /// # Errors
    /// When there is none at this address, or it cannot be read.
    pub fn function(&self, address: PciAddress) -> Result<PciFunction, SysfsError> {
        let path = self.path_of(address);
        if !path.is_dir() {
            return Err(SysfsError::NoSuch { address });
        }
        let id = |name: &str| {
            let path = path.join(name);
            let text = text_of(&path)?.ok_or(SysfsError::NoSuch { address })?;
            let digits = text.strip_prefix("0x").unwrap_or(&text);
            u32::from_str_radix(digits, 16).map_err(|_| SysfsError::Malformed { path, text })
        };
        let short = |name: &str| {
            let value = id(name)?;
            let malformed = |_| SysfsError::Malformed { path: path.join(name), text: format!("{value:#x}") };
            u16::try_from(value).map_err(malformed)
        };
        let reset_methods = text_of(&path.join("reset_method"))?.unwrap_or_default();
        Ok(PciFunction {
            address,
            vendor: short("vendor")?,
            device: short("device")?,
            class: id("class")?,
            driver: target_of(&path.join("driver"))?,
            driver_override: text_of(&path.join("driver_override"))?.filter(|name| name != "(null)"),
            nvme_name: names_in(&path.join("nvme"))?.into_iter().next(),
            group: self.group_of(&path)?,
            vfio_device: names_in(&path.join("vfio-dev"))?.into_iter().next(),
            // -1 where the host has but one, or the firmware does not say.
            numa_node: text_of(&path.join("numa_node"))?.and_then(|node| node.parse().ok()),
            physical_function: target_of(&path.join("physfn"))?.and_then(|name| name.parse().ok()),
            reset_methods: reset_methods.split_whitespace().map(str::to_owned).collect(),
        })
    }

    fn group_of(&self, function: &Path) -> Result<Option<IommuGroup>, SysfsError> {
        let link = function.join("iommu_group");
        let Some(name) = target_of(&link)? else { return Ok(None) };
        let number = name.parse().map_err(|_| SysfsError::Malformed { path: link.clone(), text: name })?;
        let mut members = Vec::new();
        for name in names_in(&link.join("devices"))? {
            // A group may hold devices of other buses too; they have no PCI address.
            let Ok(address) = name.parse() else { continue };
            let driver = target_of(&self.path_of(address).join("driver"))?;
            members.push(GroupMember { address, driver });
        }
        members.sort_by_key(|member| member.address);
        let no_iommu = text_of(&link.join("name"))?.as_deref() == Some("vfio-noiommu");
        Ok(Some(IommuGroup { number, no_iommu, members }))
    }
}

/// The names in a directory, sorted; none when it is not there.
fn names_in(path: &Path) -> Result<Vec<String>, SysfsError> {
    let failed = |source| SysfsError::Read { path: path.to_owned(), source };
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    names.sort();
    Ok(names)
}

/// The trimmed text of a file; `None` when it is empty or not there.
fn text_of(path: &Path) -> Result<Option<String>, SysfsError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
        Err(error) if is_absent(&error) => Ok(None),
        Err(source) => Err(SysfsError::Read { path: path.to_owned(), source }),
    }
}

/// The last name that a link points to; `None` when it is not there.
fn target_of(path: &Path) -> Result<Option<String>, SysfsError> {
    match std::fs::read_link(path) {
        Ok(target) => Ok(target.file_name().map(OsStr::to_string_lossy).map(String::from)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(source) => Err(SysfsError::Read { path: path.to_owned(), source }),
    }
}

/// Not there, or its device was removed between open and read.
fn is_absent(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vfio::tree::Tree;

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_is_read_as_lspci_writes_it() {
        assert_eq!(address("0000:03:00.0"), PciAddress::new(0, 3, 0, 0).unwrap());
        assert_eq!(address("c1:1f.7"), PciAddress::new(0, 0xC1, 0x1F, 7).unwrap());
        assert_eq!(address("10000:e1:00.0").domain(), 0x10000);
        assert_eq!(address("10000:e1:00.0").to_string(), "10000:e1:00.0");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "nvme0",
            "0000:03:00",
            "0000:03:20.0",
            "0000:03:00.8",
            "0:0:100.0",
            "1:2:3:4.0",
            "0000:+3:00.0",
            "03.0",
        ] {
            assert_eq!(text.parse::<PciAddress>(), Err(BadPciAddress { text: text.to_owned() }));
        }
    }

    proptest! {
        #[test]
        fn an_address_is_read_as_it_was_written(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let one = PciAddress::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(one.to_string().parse(), Ok(one));
        }

        #[test]
        fn no_text_panics(text in ".{0,24}") {
            let _ = text.parse::<PciAddress>();
        }
    }

    #[test]
    fn a_controller_of_the_kernel_is_described() {
        let tree = Tree::new();
        tree.function("0000:03:00.0", 0x01_0802)
            .driver("nvme")
            .group(12)
            .file("numa_node", "1\n")
            .file("nvme/nvme4/state", "live\n");
        tree.function("0000:03:00.1", 0x02_0000).driver("e1000e").group(12);
        tree.function("0000:02:00.0", 0x06_0400).driver("pcieport").group(12);
        let one = tree.sysfs().function(address("0000:03:00.0")).unwrap();
        assert!(one.is_nvme() && !one.is_bound_to_vfio());
        assert_eq!((one.vendor, one.device), (0x1B36, 0x0010));
        assert_eq!((one.driver.as_deref(), one.nvme_name.as_deref()), (Some("nvme"), Some("nvme4")));
        assert_eq!(one.numa_node, Some(1));
        let group = one.group.as_ref().unwrap();
        assert_eq!((group.number, group.no_iommu, group.members.len()), (12, false, 3));
        let in_the_way = one.members_in_the_way();
        assert_eq!(in_the_way.len(), 1, "neither itself nor the port: {in_the_way:?}");
        assert_eq!(in_the_way[0].address, address("0000:03:00.1"));
    }

    #[test]
    fn a_controller_given_to_vfio_is_described() {
        let tree = Tree::new();
        tree.function("0000:03:00.0", 0x01_0802)
            .driver("vfio-pci")
            .group(7)
            .file("vfio-dev/vfio3/dev", "511:3\n")
            .file("driver_override", "vfio-pci\n")
            .file("numa_node", "-1\n")
            .file("reset_method", "flr bus\n");
        let one = tree.sysfs().function(address("0000:03:00.0")).unwrap();
        assert!(one.is_bound_to_vfio());
        assert_eq!(one.vfio_device.as_deref(), Some("vfio3"));
        assert_eq!(one.driver_override.as_deref(), Some("vfio-pci"));
        assert_eq!(one.reset_methods, ["flr", "bus"]);
        assert_eq!(one.numa_node, None);
    }

    #[test]
    fn a_feigned_group_is_told_from_a_real_one() {
        let tree = Tree::new();
        tree.function("0000:03:00.0", 0x01_0802).driver("vfio-pci").group(0);
        tree.group_name(0, "vfio-noiommu");
        tree.function("0000:04:00.0", 0x01_0802).file("driver_override", "(null)\n");
        let sysfs = tree.sysfs();
        assert!(sysfs.function(address("0000:03:00.0")).unwrap().group.unwrap().no_iommu);
        let other = sysfs.function(address("0000:04:00.0")).unwrap();
        assert!(other.group.is_none() && other.driver_override.is_none());
    }

    #[test]
    fn all_nvme_controllers_are_listed_and_nothing_else() {
        let tree = Tree::new();
        tree.function("0000:05:00.0", 0x01_0802);
        tree.function("0000:03:00.0", 0x01_0802);
        tree.function("0000:04:00.0", 0x01_0601);
        let all = tree.sysfs().nvme_controllers().unwrap();
        let all: Vec<_> = all.iter().map(|one| one.address.to_string()).collect();
        assert_eq!(all, ["0000:03:00.0", "0000:05:00.0"]);
        assert!(Sysfs::at("/nowhere").nvme_controllers().unwrap().is_empty());
    }

    #[test]
    fn what_is_not_there_or_not_readable_is_said() {
        let tree = Tree::new();
        tree.function("0000:03:00.0", 0x01_0802).file("class", "storage\n");
        let sysfs = tree.sysfs();
        let error = sysfs.function(address("0000:03:00.0")).unwrap_err();
        assert!(matches!(&error, SysfsError::Malformed { text, .. } if text == "storage"), "{error}");
        let error = sysfs.function(address("0000:09:00.0")).unwrap_err();
        assert!(matches!(error, SysfsError::NoSuch { .. }), "{error}");
    }
}
