//! The calls that VFIO and iommufd consist of, typed, so that their order can be tried on a kernel made for tests.
//!
//! Each method is one system call, named after it. None of them decides anything.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use hugepage_alloc::DmaRegion;

use super::info::{DeviceInfo, IommuInfo, IovaRange, IrqInfo, RegionInfo};

/// A part of a BAR in memory. Unmapped on drop.
///
/// An offset that is not aligned or leaves the part reads as all ones, and a write there does nothing; so does
/// every access once the device is gone.
pub(super) trait Window: fmt::Debug + Send + Sync {
    /// Reads four bytes.
    fn read32(&self, offset: usize) -> u32;
    /// Writes four bytes, after all that was written to memory before.
    fn write32(&self, offset: usize, value: u32);
    /// Reads eight bytes in one access.
    fn read64(&self, offset: usize) -> u64;
    /// Writes eight bytes in one access, after all that was written to memory before.
    fn write64(&self, offset: usize, value: u64);
    /// Whether an access failed because the device is not there any more.
    fn is_gone(&self) -> bool;
}

/// A kernel with VFIO. All methods fail with the errno of the call.
pub(super) trait Kernel: fmt::Debug + Send + Sync {
    /// An open file, closed on drop.
    type File: fmt::Debug + Send + Sync;
    /// A mapped part of a BAR.
    type Window: Window;

    /// Opens a device file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Self::File>;

    /// `VFIO_GET_API_VERSION` on a container.
    fn api_version(&self, container: &Self::File) -> io::Result<u32>;
    /// `VFIO_CHECK_EXTENSION` on a container.
    fn has_extension(&self, container: &Self::File, extension: u32) -> io::Result<bool>;
    /// `VFIO_SET_IOMMU` on a container that has a group.
    fn set_iommu(&self, container: &Self::File, kind: u32) -> io::Result<()>;
    /// `VFIO_IOMMU_GET_INFO` on a container that has an IOMMU.
    fn iommu_info(&self, container: &Self::File) -> io::Result<IommuInfo>;
    /// `VFIO_IOMMU_MAP_DMA`: all of a region, to read and write. The pages stay pinned until it is unmapped.
    fn map_dma(&self, container: &Self::File, region: &DmaRegion, iova: u64) -> io::Result<()>;
    /// `VFIO_IOMMU_UNMAP_DMA`; how many bytes were mapped.
    fn unmap_dma(&self, container: &Self::File, iova: u64, len: u64) -> io::Result<u64>;

    /// `VFIO_GROUP_GET_STATUS`: whether the group is viable.
    fn is_group_viable(&self, group: &Self::File) -> io::Result<bool>;
    /// `VFIO_GROUP_SET_CONTAINER`.
    fn set_container(&self, group: &Self::File, container: &Self::File) -> io::Result<()>;
    /// `VFIO_GROUP_GET_DEVICE_FD`.
    fn device(&self, group: &Self::File, name: &str) -> io::Result<Self::File>;

    /// `VFIO_DEVICE_BIND_IOMMUFD`, the first call on a device file.
    fn bind_iommufd(&self, device: &Self::File, iommufd: &Self::File) -> io::Result<()>;
    /// `IOMMU_IOAS_ALLOC`: a new address space in an iommufd.
    fn ioas_alloc(&self, iommufd: &Self::File) -> io::Result<u32>;
    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
    fn attach_ioas(&self, device: &Self::File, ioas: u32) -> io::Result<()>;
    /// `IOMMU_IOAS_IOVA_RANGES`; narrowed by each device that is attached.
    fn ioas_ranges(&self, iommufd: &Self::File, ioas: u32) -> io::Result<Vec<IovaRange>>;
    /// `IOMMU_IOAS_MAP` at a fixed address: all of a region, to read and write.
    fn ioas_map(&self, iommufd: &Self::File, ioas: u32, region: &DmaRegion, iova: u64) -> io::Result<()>;
    /// `IOMMU_IOAS_UNMAP`; how many bytes were mapped.
    fn ioas_unmap(&self, iommufd: &Self::File, ioas: u32, iova: u64, len: u64) -> io::Result<u64>;

    /// `VFIO_DEVICE_GET_INFO`.
    fn device_info(&self, device: &Self::File) -> io::Result<DeviceInfo>;
    /// `VFIO_DEVICE_GET_REGION_INFO`.
    fn region_info(&self, device: &Self::File, index: u32) -> io::Result<RegionInfo>;
    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    fn irq_info(&self, device: &Self::File, index: u32) -> io::Result<IrqInfo>;
    /// `VFIO_DEVICE_SET_IRQS`: signals each interrupt from `start` on by its eventfd, or not at all. `Ok(n)` with n
    /// above 0 when only n could be had; then nothing was changed.
    fn set_irqs(
        &self,
        device: &Self::File,
        index: u32,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<u32>;
    /// `VFIO_DEVICE_RESET`: of the function, by the best way it has.
    fn reset(&self, device: &Self::File) -> io::Result<()>;

    /// Reads from a device file.
    fn read(&self, device: &Self::File, offset: u64, target: &mut [u8]) -> io::Result<()>;
    /// Writes to a device file.
    fn write(&self, device: &Self::File, offset: u64, source: &[u8]) -> io::Result<()>;
    /// Maps a part of a device file, to read and write, shared.
    fn map(&self, device: &Self::File, offset: u64, len: usize) -> io::Result<Self::Window>;
}
