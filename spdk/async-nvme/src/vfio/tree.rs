//! A sysfs tree made for a test: PCI functions, their drivers and groups. Removed on drop.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::sysfs::Sysfs;

/// The root of a tree.
#[derive(Debug)]
pub(super) struct Tree {
    root: TempDir,
}

/// One function in it, while it is described.
#[derive(Debug)]
pub(super) struct Function {
    root: PathBuf,
    path: PathBuf,
    name: String,
}

impl Tree {
    pub(super) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("bus/pci/devices")).unwrap();
        Self { root }
    }

    pub(super) fn sysfs(&self) -> Sysfs {
        Sysfs::at(self.root.path())
    }

    /// Adds a function with the identifiers of QEMU's controller.
    pub(super) fn function(&self, name: &str, class: u32) -> Function {
        let path = self.root.path().join("bus/pci/devices").join(name);
        fs::create_dir_all(&path).unwrap();
        let function = Function { root: self.root.path().to_owned(), path, name: name.to_owned() };
        function
            .file("vendor", "0x1b36\n")
            .file("device", "0x0010\n")
            .file("class", &format!("{class:#08x}\n"))
    }

    /// Names a group.
    pub(super) fn group_name(&self, group: u32, name: &str) {
        fs::write(self.root.path().join(format!("kernel/iommu_groups/{group}/name")), format!("{name}\n"))
            .unwrap();
    }
}

impl Function {
    pub(super) fn file(self, name: &str, text: &str) -> Self {
        let path = self.path.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    pub(super) fn driver(self, name: &str) -> Self {
        let driver = self.root.join("bus/pci/drivers").join(name);
        link(&driver, &self.path.join("driver"));
        self
    }

    pub(super) fn group(self, number: u32) -> Self {
        let group = self.root.join(format!("kernel/iommu_groups/{number}"));
        fs::create_dir_all(group.join("devices")).unwrap();
        link(&self.path, &group.join("devices").join(&self.name));
        link(&group, &self.path.join("iommu_group"));
        self
    }
}

fn link(target: &Path, at: &Path) {
    fs::create_dir_all(target).unwrap();
    symlink(target, at).unwrap();
}
