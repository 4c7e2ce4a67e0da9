//! Reaching an NVMe controller through VFIO, the kernel's way to give a PCI function to user space.
//!
//! ```text
//!   Vfio, UnsafeNoIommuVfio       what others use: an Access
//!     function     one open function: command register, revoke and restore, release, drop
//!       bar        registers, in memory or through the file       mmio, sigbus   (unsafe)
//!       memory     which regions are mapped where
//!       irq        MSI-X vectors
//!     space        the three ways to an address space, call by call
//!       kernel     each call as a method, so that a test can play the kernel
//!         linux    the real one                                                  (unsafe)
//!         info     what it answers
//!   sysfs          who drives a function, and what shares its group
//! ```
//!
//! Three ways lead to a device: **by its group** (`/dev/vfio/<group>`, an IOMMU of type 1), **by its own file and an
//! iommufd** (Linux 6.6 and later), and **without an IOMMU**. What has been tried:
//!
//! | way | test kernel (each build) | real kernel, emulated controller |
//! |---|---|---|
//! | group | yes | Debian's 6.12, by the guest tests; `tests/vfio_device.rs` |
//! | device file | yes | by hand only: a 6.12 built with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV; `tests/vfio_device.rs` |
//! | without IOMMU | yes | by hand only: the same with CONFIG_VFIO_NOIOMMU; `examples/vfio_identify.rs` |
//!
//! Debian's kernels offer the first way only, so no regular test runs the other two on a real one. Nothing has met
//! hardware yet.
//!
//! * Registers are reached by volatile accesses; a device that is gone reads as all ones, also where the kernel
//!   answers with SIGBUS: the first opening installs a handler for it that passes on what is not its own.
//! * When the host wants the function back (unbind, hot-plug), the function reads as gone at once. Whoever drives it
//!   ends, drops it, and the host gets it; without that the kernel would wait for ever.
//! * Each function has an address space of its own. Memory that two controllers use is pinned, and counted against
//!   the limit on locked memory, twice (by group) or once (by device file).
//!
//! What it does not do: bind and unbind drivers; several functions of one IOMMU group (the second opening says
//! that the group is in use); a reset of the slot or bus where the function alone cannot be reset; virtual functions
//! whose physical function belongs to VFIO too; AER events.

mod bar;
mod error;
#[cfg(test)]
mod fake;
mod function;
mod info;
mod irq;
mod kernel;
mod linux;
mod memory;
mod mmio;
mod sigbus;
mod space;
pub mod sysfs;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tree;

use std::os::fd::BorrowedFd;

use hugepage_alloc::DmaRegion;
use hugepage_alloc::physical::UnsafeWithoutIommu;

pub use error::OpenError;
pub use sysfs::{BadPciAddress, GroupMember, IommuGroup, PciAddress, PciFunction, Sysfs, SysfsError};

use crate::access::{Access, AccessError, DmaMapping};
use function::Function;
use kernel::Kernel;
use linux::Linux;

/// Which way to a device behind an IOMMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Via {
    /// By its own file where the kernel has one and it may be opened, else by its group.
    #[default]
    Best,
    /// By its group, in a container of type 1.
    Group,
    /// By its own file, in an address space of an iommufd.
    DeviceFile,
}

/// How a function is opened.
#[derive(Clone, Debug, Default)]
pub struct VfioOptions {
    /// Which way.
    pub via: Via,
    /// Where the function is looked up.
    pub sysfs: Sysfs,
}

/// A controller behind an IOMMU, which keeps it to the memory that is mapped for it.
#[derive(Debug)]
pub struct Vfio(Function<Linux>);

impl Vfio {
    /// Opens a function that is bound to vfio-pci. The kernel resets it if it can; its bus master is on unless it
    /// is still enabled, then [`Access::dma_restore`] turns it on.
    ///
    /// # Errors
    /// Why it cannot be had, and what to do about it. Whatever was done is undone.
    pub fn open(address: PciAddress, options: &VfioOptions) -> Result<Self, OpenError> {
        open(Linux, address, options).map(Self)
    }

    /// Whether the host wants the function back (to unbind it, or because it is being removed), or it is not there
    /// any more. From then on it reads as gone; drop it, and the host has it.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.0.is_gone()
    }
}

/// A controller without an IOMMU. **Unsafe**: it can write to any memory of the host, whether it is told to or not.
///
/// * A broken controller, or a wrong address, overwrites the kernel or other processes.
/// * A process that is killed while the controller runs leaves it writing to memory that others get next.
/// * Only huge pages can be mapped. The kernel does not promise that they stay where they are (see
///   [`hugepage_alloc::physical`]).
/// * A region stays mapped until the bus master is off: [`Access::dma_unmap`] before that is refused.
/// * It needs `CAP_SYS_RAWIO` and `CAP_SYS_ADMIN`, and taints the kernel.
///
/// No regular test runs this way on a real kernel (see the module).
#[derive(Debug)]
pub struct UnsafeNoIommuVfio(Function<Linux>);

impl UnsafeNoIommuVfio {
    /// Opens a function that is bound to vfio-pci in the kernel's unsafe no-IOMMU mode.
    ///
    /// # Errors
    /// As [`Vfio::open`]; also when there is an IOMMU, or when the controller is still enabled and cannot be reset.
    pub fn open(address: PciAddress, sysfs: &Sysfs, sure: UnsafeWithoutIommu) -> Result<Self, OpenError> {
        open_unguarded(Linux, address, sysfs, sure).map(Self)
    }

    /// As [`Vfio::is_gone`].
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.0.is_gone()
    }
}

/// Looks a function up and makes sure that it can be opened at all.
fn look_up(address: PciAddress, sysfs: &Sysfs) -> Result<PciFunction, OpenError> {
    let function = sysfs.function(address).map_err(|source| OpenError::Sysfs { address, source })?;
    if !function.is_nvme() {
        return Err(OpenError::NotNvme { address, class: function.class });
    }
    if !function.is_bound_to_vfio() {
        return Err(OpenError::NotBound { address, driver: function.driver });
    }
    Ok(function)
}

fn open<K: Kernel>(kernel: K, address: PciAddress, options: &VfioOptions) -> Result<Function<K>, OpenError> {
    let function = look_up(address, &options.sysfs)?;
    let opened = match options.via {
        Via::Group => space::open_group(&kernel, &function)?,
        Via::DeviceFile => space::open_device(&kernel, &function)?,
        Via::Best if function.vfio_device.is_none() => space::open_group(&kernel, &function)?,
        // A kernel may have device files and no iommufd for this user; the group may still be his.
        Via::Best => match space::open_device(&kernel, &function) {
            Err(OpenError::Absent { .. } | OpenError::Permission { .. }) => {
                space::open_group(&kernel, &function)?
            }
            other => other?,
        },
    };
    Function::new(kernel, address, opened, None)
}

fn open_unguarded<K: Kernel>(
    kernel: K,
    address: PciAddress,
    sysfs: &Sysfs,
    sure: UnsafeWithoutIommu,
) -> Result<Function<K>, OpenError> {
    let function = look_up(address, sysfs)?;
    let opened = space::open_unguarded(&kernel, &function)?;
    Function::new(kernel, address, opened, Some(sure))
}

/// Both types are their function.
macro_rules! access {
    ($type:ty) => {
        impl Access for $type {
            fn name(&self) -> &str {
                self.0.name()
            }
            fn bar_len(&self) -> u64 {
                self.0.bar_len()
            }
            fn read32(&self, offset: u32) -> u32 {
                self.0.read32(offset)
            }
            fn write32(&self, offset: u32, value: u32) {
                self.0.write32(offset, value);
            }
            fn read64(&self, offset: u32) -> u64 {
                self.0.read64(offset)
            }
            fn write64(&self, offset: u32, value: u64) {
                self.0.write64(offset, value);
            }
            fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError> {
                self.0.dma_map(region)
            }
            fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError> {
                self.0.dma_unmap(mapping)
            }
            fn dma_revoke(&self) -> Result<(), AccessError> {
                self.0.dma_revoke()
            }
            fn dma_restore(&self) -> Result<(), AccessError> {
                self.0.dma_restore()
            }
            fn function_reset(&self) -> Result<(), AccessError> {
                self.0.function_reset()
            }
            fn config_read32(&self, offset: u16) -> Result<u32, AccessError> {
                self.0.config_read32(offset)
            }
            fn interrupts_max(&self) -> u16 {
                self.0.interrupts_max()
            }
            fn interrupt_attach(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), AccessError> {
                self.0.interrupt_attach(vector, eventfd)
            }
            fn interrupt_detach(&self, vector: u16) -> Result<(), AccessError> {
                self.0.interrupt_detach(vector)
            }
        }
    };
}

access!(Vfio);
access!(UnsafeNoIommuVfio);
