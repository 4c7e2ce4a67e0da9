//! Reaching an NVMe controller through VFIO, the kernel's way to give a PCI function to user space.

pub mod sysfs;
#[cfg(test)]
mod tree;

pub use sysfs::{BadPciAddress, GroupMember, IommuGroup, PciAddress, PciFunction, Sysfs, SysfsError};
