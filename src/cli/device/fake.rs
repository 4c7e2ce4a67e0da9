//! Hosts and kernels for tests: a tree of `/sys`, `/proc` and `/dev` made file by file, and a kernel that changes it
//! as the real one does when its attributes are written, and that can die between any two steps.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_nvme::vfio::PciAddress;

use super::host::Host;
use super::kernel::{Claim, Kernel};
use super::record::Records;

/// A host below a directory that is removed with it.
#[derive(Debug)]
pub(in crate::cli) struct FakeHost {
    root: tempfile::TempDir,
    mounts: RefCell<String>,
}

/// The text of a PCI address.
pub(in crate::cli) fn at(text: &str) -> PciAddress {
    text.parse().expect("a PCI address")
}

impl FakeHost {
    /// A host with drivers, an IOMMU and no devices.
    pub(in crate::cli) fn new() -> Self {
        let host = Self { root: tempfile::tempdir().expect("a directory"), mounts: RefCell::default() };
        for driver in ["nvme", "vfio-pci", "pcieport"] {
            host.driver(driver);
        }
        for directory in ["sys/bus/pci/devices", "sys/class/nvme-subsystem", "sys/block", "dev/vfio"] {
            host.directory(directory);
        }
        host.file("sys/bus/pci/drivers_probe", "");
        host.file("sys/class/iommu/dmar0/name", "dmar0");
        host.file("proc/sys/kernel/random/boot_id", "boot-1\n");
        host.file("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        host.link("proc/self/ns/mnt", "mnt:[1]");
        host.mount("0:5", "/proc", "proc", "proc");
        host
    }

    pub(in crate::cli) fn host(&self) -> Host {
        Host::at(self.root.path())
    }

    pub(in crate::cli) fn records(&self) -> Records {
        Records::at(self.root.path().join("state"))
    }

    pub(in crate::cli) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.path().join(relative)
    }

    pub(in crate::cli) fn file(&self, relative: impl AsRef<Path>, text: &str) {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, text).expect("a file");
    }

    pub(in crate::cli) fn read(&self, relative: impl AsRef<Path>) -> String {
        fs::read_to_string(self.path(relative)).expect("a file").trim().to_owned()
    }

    pub(in crate::cli) fn directory(&self, relative: impl AsRef<Path>) {
        fs::create_dir_all(self.path(relative)).expect("a directory");
    }

    /// A link with the text `target`.
    pub(in crate::cli) fn link(&self, relative: impl AsRef<Path>, target: &str) {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        symlink(target, path).expect("a link");
    }

    /// A link to a place of this host.
    fn link_to(&self, relative: impl AsRef<Path>, target: &str) {
        let target = self.path(target);
        self.link(relative, target.to_str().expect("UTF-8"));
    }

    pub(in crate::cli) fn remove(&self, relative: impl AsRef<Path>) {
        let path = self.path(relative);
        let meta = fs::symlink_metadata(&path).expect("something there");
        if meta.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("removed");
    }

    pub(in crate::cli) fn driver(&self, name: &str) {
        for attribute in ["bind", "unbind"] {
            self.file(format!("sys/bus/pci/drivers/{name}/{attribute}"), "");
        }
    }

    /// A PCI function of a class, in an IOMMU group unless `group` is `None`, with a driver unless that is `None`.
    pub(in crate::cli) fn function(
        &self,
        address: &str,
        class: u32,
        group: Option<u32>,
        driver: Option<&str>,
    ) {
        let real = format!("sys/devices/pci0000:00/{address}");
        for (name, text) in [
            ("vendor", "0x1b36\n"),
            ("device", "0x0010\n"),
            ("driver_override", "(null)\n"),
            ("numa_node", "0\n"),
            ("class", &format!("{class:#08x}\n")),
        ] {
            self.file(format!("{real}/{name}"), text);
        }
        self.link_to(format!("sys/bus/pci/devices/{address}"), &real);
        if let Some(group) = group {
            let place = format!("sys/kernel/iommu_groups/{group}");
            self.directory(format!("{place}/devices"));
            self.link_to(format!("{place}/devices/{address}"), &real);
            self.link_to(format!("{real}/iommu_group"), &place);
        }
        if let Some(driver) = driver {
            self.link_to(format!("{real}/driver"), &format!("sys/bus/pci/drivers/{driver}"));
        }
    }

    /// An NVMe controller that the kernel drives, without namespaces, of the subsystem `nvme-subsysN`.
    pub(in crate::cli) fn controller(&self, address: &str, group: u32, name: &str, subsystem: u32) {
        self.function(address, 0x01_0802, Some(group), Some("nvme"));
        let place = format!("sys/devices/pci0000:00/{address}/nvme/{name}");
        for (attribute, text) in [
            ("state", "live\n"),
            ("model", "Model One                               \n"),
            ("serial", "SERIAL1             \n"),
            ("firmware_rev", "1.0     \n"),
            ("subsysnqn", "nqn.2026-11.test:one\n"),
            ("dev", "240:0\n"),
        ] {
            self.file(format!("{place}/{attribute}"), text);
        }
        self.directory(format!("sys/class/nvme-subsystem/nvme-subsys{subsystem}"));
        self.link_to(format!("sys/class/nvme-subsystem/nvme-subsys{subsystem}/{name}"), &place);
    }

    fn disk(&self, place: &str, nsid: u32, number: Option<&str>) {
        for (attribute, text) in [
            ("nsid", format!("{nsid}\n")),
            ("size", "2097152\n".to_owned()),
            ("queue/logical_block_size", "512\n".to_owned()),
            ("nguid", format!("00000000-0000-0000-fa57-{nsid:012x}\n")),
            ("eui", "00 00 00 00 00 00 00 00\n".to_owned()),
        ] {
            self.file(format!("{place}/{attribute}"), &text);
        }
        self.directory(format!("{place}/holders"));
        if let Some(number) = number {
            self.file(format!("{place}/dev"), number);
        }
    }

    /// A namespace of one controller, without native multipath: `nvme0n1` with this device number.
    pub(in crate::cli) fn namespace(
        &self,
        address: &str,
        controller: &str,
        disk: &str,
        number: &str,
    ) -> String {
        let place = format!("sys/devices/pci0000:00/{address}/nvme/{controller}/{disk}");
        self.disk(&place, 1, Some(number));
        self.file(format!("dev/{disk}"), "");
        self.link_to(format!("sys/block/{disk}"), &place);
        place
    }

    /// A namespace head of a subsystem, and a path to it from each of the controllers (address and name).
    pub(in crate::cli) fn shared(&self, subsystem: u32, number: &str, paths: &[(&str, &str)]) -> String {
        let disk = format!("nvme{subsystem}n1");
        let place = format!("sys/class/nvme-subsystem/nvme-subsys{subsystem}/{disk}");
        self.disk(&place, 1, Some(number));
        self.file(format!("dev/{disk}"), "");
        self.link_to(format!("sys/block/{disk}"), &place);
        for (address, controller) in paths {
            let index = controller.trim_start_matches("nvme");
            let path = format!("nvme{subsystem}c{index}n1");
            let at = format!("sys/devices/pci0000:00/{address}/nvme/{controller}/{path}");
            self.disk(&at, 1, None);
            self.file(format!("{at}/ana_state"), "optimized\n");
        }
        place
    }

    pub(in crate::cli) fn partition(&self, disk: &str, name: &str, number: &str) -> String {
        let place = format!("{disk}/{name}");
        self.file(format!("{place}/partition"), "1\n");
        self.file(format!("{place}/dev"), number);
        self.directory(format!("{place}/holders"));
        place
    }

    /// Mounts something, as this process sees it.
    pub(in crate::cli) fn mount(&self, number: &str, point: &str, filesystem: &str, source: &str) {
        let mut mounts = self.mounts.borrow_mut();
        let line = format!("30 1 {number} / {point} rw,relatime shared:1 - {filesystem} {source} rw\n");
        mounts.push_str(&line);
        self.file("proc/self/mountinfo", &mounts);
    }

    pub(in crate::cli) fn unmount(&self, point: &str) {
        let mut mounts = self.mounts.borrow_mut();
        let kept = mounts.lines().filter(|line| line.split(' ').nth(4) != Some(point));
        let kept = kept.map(|line| format!("{line}\n")).collect::<String>();
        *mounts = kept;
        self.file("proc/self/mountinfo", &mounts);
    }

    /// A process with a node open.
    pub(in crate::cli) fn process(&self, pid: u32, command: &str, open: &str) {
        self.file(format!("proc/{pid}/comm"), command);
        self.link(format!("proc/{pid}/fd/3"), open);
    }

    /// Forgets what the kernel forgets at a boot.
    pub(in crate::cli) fn reboot(&self) {
        self.file("proc/sys/kernel/random/boot_id", "boot-2\n");
    }

    /// The driver and the override of a function.
    pub(in crate::cli) fn standing(&self, address: &str) -> (Option<String>, Option<String>) {
        let sysfs = async_nvme::vfio::Sysfs::at(self.path("sys"));
        let function = sysfs.function(at(address)).expect("a function");
        (function.driver, function.driver_override)
    }
}

/// A kernel for a [`FakeHost`].
#[derive(Debug)]
pub(in crate::cli) struct FakeKernel<'a> {
    host: &'a FakeHost,
    /// Steps that are still done; then everything fails, as for a process that was killed. `None`: no end.
    steps_left: Cell<Option<usize>>,
    /// Nodes that are in use, though nothing shows it.
    pub(in crate::cli) claimed: RefCell<BTreeSet<String>>,
    /// Nodes that were claimed.
    pub(in crate::cli) asked: RefCell<Vec<String>>,
    /// A driver whose probe fails.
    pub(in crate::cli) refusing: RefCell<Option<String>>,
    /// What was written.
    pub(in crate::cli) log: RefCell<Vec<String>>,
    /// What is mounted just before the first node is claimed: number, mount point, type, source.
    pub(in crate::cli) mounted_first: Cell<Option<[&'static str; 4]>>,
}

impl<'a> FakeKernel<'a> {
    pub(in crate::cli) fn of(host: &'a FakeHost) -> Self {
        Self {
            host,
            steps_left: Cell::new(None),
            claimed: RefCell::default(),
            asked: RefCell::default(),
            refusing: RefCell::default(),
            log: RefCell::default(),
            mounted_first: Cell::default(),
        }
    }

    /// Dies before the step after so many.
    pub(in crate::cli) fn dying_after(host: &'a FakeHost, steps: usize) -> Self {
        let kernel = Self::of(host);
        kernel.steps_left.set(Some(steps));
        kernel
    }

    fn live_on(&self) -> io::Result<()> {
        match self.steps_left.get() {
            None => Ok(()),
            Some(0) => Err(io::Error::other("killed")),
            Some(left) => {
                self.steps_left.set(Some(left - 1));
                Ok(())
            }
        }
    }

    fn device(address: &str) -> String {
        format!("sys/bus/pci/devices/{address}")
    }

    /// Gives a function to a driver, as `really_probe()` of the kernel.
    fn attach(&self, address: &str, driver: &str) -> io::Result<()> {
        if self.refusing.borrow().as_deref() == Some(driver) {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let device = Self::device(address);
        self.host.link_to(format!("{device}/driver"), &format!("sys/bus/pci/drivers/{driver}"));
        // What the driver shows of its namespaces was put aside when it let go of them.
        let aside = self.host.path(format!("aside/{address}"));
        if driver == "nvme" && aside.exists() {
            fs::rename(aside, self.host.path(format!("{device}/nvme")))?;
        }
        Ok(())
    }

    fn detach(&self, address: &str) -> io::Result<()> {
        let device = Self::device(address);
        fs::remove_file(self.host.path(format!("{device}/driver")))?;
        let shown = self.host.path(format!("{device}/nvme"));
        if shown.exists() {
            self.host.directory("aside");
            fs::rename(shown, self.host.path(format!("aside/{address}")))?;
        }
        Ok(())
    }

    /// What may have the function: the override alone when there is one.
    fn matches(&self, address: &str, driver: &str) -> bool {
        let only = self.host.read(format!("{}/driver_override", Self::device(address)));
        if only == "(null)" || only.is_empty() { driver == "nvme" } else { only == driver }
    }
}

impl Kernel for FakeKernel<'_> {
    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        self.live_on()?;
        let relative = path.strip_prefix(self.host.root.path()).expect("below the root");
        let relative = relative.to_str().expect("UTF-8").to_owned();
        self.log.borrow_mut().push(format!("{relative} <- {}", value.trim()));
        let missing = || io::Error::from_raw_os_error(libc::ENODEV);
        let has_driver = |address: &str| self.host.path(format!("{}/driver", Self::device(address))).exists();
        if relative.ends_with("/driver_override") {
            let text = if value.trim().is_empty() { "(null)" } else { value };
            self.host.file(relative, text);
            return Ok(());
        }
        if relative.ends_with("/unbind") {
            return if has_driver(value) { self.detach(value) } else { Err(missing()) };
        }
        if relative == "sys/bus/pci/drivers_probe" {
            let drivers = self.host.host().names("sys/bus/pci/drivers");
            let found = drivers.iter().find(|driver| self.matches(value, driver));
            return match found {
                Some(driver) if !has_driver(value) => self.attach(value, driver),
                _ => Ok(()),
            };
        }
        let driver =
            relative.strip_prefix("sys/bus/pci/drivers/").and_then(|rest| rest.strip_suffix("/bind"));
        match driver {
            Some(driver) if !self.host.path(format!("sys/bus/pci/drivers/{driver}")).exists() => {
                Err(io::ErrorKind::NotFound.into())
            }
            Some(driver) if self.matches(value, driver) && !has_driver(value) => self.attach(value, driver),
            Some(_) => Err(missing()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn load_module(&self, name: &str) -> Result<(), String> {
        self.live_on().map_err(|error| error.to_string())?;
        self.log.borrow_mut().push(format!("modprobe {name}"));
        if name == "absent" {
            return Err(format!("modprobe: FATAL: Module {name} not found"));
        }
        self.host.driver(name);
        Ok(())
    }

    fn claim(&self, node: &Path) -> io::Result<Claim> {
        let name = node.file_name().expect("a name").to_str().expect("UTF-8").to_owned();
        if let Some([number, point, filesystem, source]) = self.mounted_first.take() {
            self.host.mount(number, point, filesystem, source);
        }
        fs::metadata(node)?;
        if self.claimed.borrow().contains(&name) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        self.asked.borrow_mut().push(name);
        Ok(Claim::feigned())
    }

    fn pause(&self, _: Duration) {}
}
