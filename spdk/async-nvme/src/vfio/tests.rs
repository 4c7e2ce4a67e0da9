//! The ways to a device and what is done with it, on a kernel made for tests.

mod opening;
mod reaching;
mod using;

use hugepage_alloc::DmaRegion;
use hugepage_alloc::physical::UnsafeWithoutIommu;

use super::fake::{BAR_LEN, FakeKernel, MASTER};
use super::function::Function;
use super::info::{Area, IovaRange};
use super::sysfs::PciAddress;
use super::tree::Tree;
use super::{OpenError, VfioOptions, Via, open, open_unguarded};
use crate::access::{Access, AccessError, DmaMapping, Iova};

const CC: u32 = 0x14;
const CSTS: u32 = 0x1C;

/// A way to a device, with the host that it needs.
#[derive(Clone, Copy, Debug)]
enum Way {
    Group,
    DeviceFile,
    NoIommu,
}

const WAYS: [Way; 3] = [Way::Group, Way::DeviceFile, Way::NoIommu];

fn address() -> PciAddress {
    "0000:03:00.0".parse().unwrap()
}

/// A host whose function is bound to vfio-pci.
fn host(way: Way) -> (Tree, FakeKernel) {
    let tree = Tree::new();
    let function = tree.function("0000:03:00.0", 0x01_0802).driver("vfio-pci").group(12);
    if matches!(way, Way::DeviceFile) {
        function.file("vfio-dev/vfio3/dev", "511:3\n");
    }
    if matches!(way, Way::NoIommu) {
        tree.group_name(12, "vfio-noiommu");
        return (tree, FakeKernel::without_iommu());
    }
    (tree, FakeKernel::new())
}

fn open_by(way: Way, tree: &Tree, kernel: &FakeKernel) -> Result<Function<FakeKernel>, OpenError> {
    let sysfs = tree.sysfs();
    let options = |via| VfioOptions { via, sysfs: sysfs.clone() };
    match way {
        Way::Group => open(kernel.clone(), address(), &options(Via::Group)),
        Way::DeviceFile => open(kernel.clone(), address(), &options(Via::DeviceFile)),
        Way::NoIommu => {
            let sure = UnsafeWithoutIommu::accept_that_the_device_can_write_anywhere();
            open_unguarded(kernel.clone(), address(), &sysfs, sure)
        }
    }
}

fn opened(way: Way) -> (Function<FakeKernel>, FakeKernel) {
    let (tree, kernel) = host(way);
    let function = open_by(way, &tree, &kernel).unwrap();
    (function, kernel)
}

fn region(mib: usize) -> DmaRegion {
    DmaRegion::map(mib << 20, false, false).unwrap()
}

fn iova(mapping: &DmaMapping) -> u64 {
    mapping.iova(0).unwrap().0
}

fn reaches(kernel: &FakeKernel, mapping: &DmaMapping) -> bool {
    let last = mapping.region().len() as u64 - 1;
    kernel.state().reaches(iova(mapping)) && kernel.state().reaches(iova(mapping) + last)
}
