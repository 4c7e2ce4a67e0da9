//! The address space of a device: how it is opened, and how regions get into it.
//!
//! ```text
//!   group           /dev/vfio/vfio  /dev/vfio/12     SET_CONTAINER, SET_IOMMU, GET_DEVICE_FD     MAP_DMA
//!   device file     /dev/vfio/devices/vfio3  /dev/iommu    BIND_IOMMUFD, IOAS_ALLOC, ATTACH      IOAS_MAP
//!   no IOMMU        /dev/vfio/vfio  /dev/vfio/noiommu-0    as a group, and then there is nothing to map
//! ```
//!
//! The order of the calls is the kernel's (`Documentation/driver-api/vfio.rst`, `userspace-api/iommufd.rst`). What is
//! opened is closed when a later call fails, in the reverse order; that undoes all of it.

use std::io;
use std::path::{Path, PathBuf};

use hugepage_alloc::DmaRegion;
use vfio_bindings::bindings::vfio as abi;

use super::error::OpenError;
use super::info::IovaRange;
use super::kernel::Kernel;
use super::sysfs::PciFunction;

const CONTAINER: &str = "/dev/vfio/vfio";
const IOMMUFD: &str = "/dev/iommu";

/// Where the mappings of a device are. The files are closed in the order of the fields.
#[derive(Debug)]
pub(super) enum Space<K: Kernel> {
    /// A container with one group.
    Container {
        /// Open as long as the device is in use.
        _group: K::File,
        container: K::File,
    },
    /// An address space in an iommufd.
    Ioas { iommufd: K::File, ioas: u32 },
    /// None: the device uses physical addresses.
    Physical { _group: K::File, _container: K::File },
}

/// A device file and the address space that its device is in. The device is closed first.
#[derive(Debug)]
pub(super) struct Opened<K: Kernel> {
    pub(super) device: K::File,
    pub(super) space: Space<K>,
}

impl<K: Kernel> Space<K> {
    /// Whether the kernel keeps the device to what is mapped.
    pub(super) const fn is_guarded(&self) -> bool {
        !matches!(self, Self::Physical { .. })
    }

    /// Where mappings may be.
    pub(super) fn ranges(&self, kernel: &K) -> io::Result<Vec<IovaRange>> {
        match self {
            Self::Container { container, .. } => {
                let info = kernel.iommu_info(container)?;
                tracing::debug!(mappings_left = info.mappings_left, "IOMMU of the container");
                Ok(info.ranges.unwrap_or_else(|| RANGES_BEFORE_5_4.to_vec()))
            }
            Self::Ioas { iommufd, ioas } => kernel.ioas_ranges(iommufd, *ioas),
            Self::Physical { .. } => Ok(Vec::new()),
        }
    }

    pub(super) fn map(&self, kernel: &K, region: &DmaRegion, iova: u64) -> io::Result<()> {
        match self {
            Self::Container { container, .. } => kernel.map_dma(container, region, iova),
            Self::Ioas { iommufd, ioas } => kernel.ioas_map(iommufd, *ioas, region, iova),
            Self::Physical { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Ends a mapping as it was made; anything else that the kernel says it did is an error.
    pub(super) fn unmap(&self, kernel: &K, iova: u64, len: u64) -> io::Result<()> {
        let unmapped = match self {
            Self::Container { container, .. } => kernel.unmap_dma(container, iova, len)?,
            Self::Ioas { iommufd, ioas } => kernel.ioas_unmap(iommufd, *ioas, iova, len)?,
            Self::Physical { .. } => return Err(io::ErrorKind::Unsupported.into()),
        };
        if unmapped == len {
            return Ok(());
        }
        Err(io::Error::other(format!("{unmapped} of {len} bytes were mapped")))
    }
}

/// What every IOMMU translates when the kernel does not say: 39 bits, without the x86 window of MSI.
const RANGES_BEFORE_5_4: [IovaRange; 2] =
    [IovaRange { start: 0, last: 0xFEDF_FFFF }, IovaRange { start: 0xFEF0_0000, last: (1 << 39) - 1 }];

/// Opens a device by its group, with an IOMMU of type 1.
pub(super) fn open_group<K: Kernel>(kernel: &K, function: &PciFunction) -> Result<Opened<K>, OpenError> {
    let Some(group) = function.group.as_ref().filter(|group| !group.no_iommu) else {
        return Err(OpenError::NoIommu { address: function.address });
    };
    let step = Steps { kernel, function };
    let container = step.container(abi::VFIO_TYPE1v2_IOMMU, "its VFIO has no IOMMU of type 1, version 2")?;
    let file = step.open(&Path::new("/dev/vfio").join(group.number.to_string()), "vfio-pci")?;
    step.join(&file, &container)?;
    kernel.set_iommu(&container, abi::VFIO_TYPE1v2_IOMMU).map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) => step.no_interrupt_remapping(),
        _ => step.failed("VFIO_SET_IOMMU", source),
    })?;
    let device = step.device(&file)?;
    Ok(Opened { device, space: Space::Container { _group: file, container } })
}

/// Opens a device without an IOMMU. Nothing keeps it to any memory.
pub(super) fn open_unguarded<K: Kernel>(kernel: &K, function: &PciFunction) -> Result<Opened<K>, OpenError> {
    let Some(group) = function.group.as_ref() else {
        return Err(OpenError::NoIommuModeOff { address: function.address });
    };
    if !group.no_iommu {
        return Err(OpenError::IommuPresent { address: function.address });
    }
    let step = Steps { kernel, function };
    let container = step.container(abi::VFIO_NOIOMMU_IOMMU, "its VFIO has no no-IOMMU mode")?;
    let file = step.open(&Path::new("/dev/vfio").join(format!("noiommu-{}", group.number)), "vfio-pci")?;
    step.join(&file, &container)?;
    kernel
        .set_iommu(&container, abi::VFIO_NOIOMMU_IOMMU)
        .map_err(|source| step.failed("VFIO_SET_IOMMU", source))?;
    let device = step.device(&file)?;
    Ok(Opened { device, space: Space::Physical { _group: file, _container: container } })
}

/// Opens a device by its own file, with an address space of an iommufd.
pub(super) fn open_device<K: Kernel>(kernel: &K, function: &PciFunction) -> Result<Opened<K>, OpenError> {
    if function.group.as_ref().is_none_or(|group| group.no_iommu) {
        return Err(OpenError::NoIommu { address: function.address });
    }
    let step = Steps { kernel, function };
    let Some(name) = function.vfio_device.as_deref() else {
        let what = "it has no device file: that needs Linux 6.6 with CONFIG_VFIO_DEVICE_CDEV";
        return Err(step.unsupported(what));
    };
    let iommufd = step.open(Path::new(IOMMUFD), "iommufd")?;
    let device = step.open(&Path::new("/dev/vfio/devices").join(name), "vfio-pci")?;
    kernel.bind_iommufd(&device, &iommufd).map_err(|source| match source.raw_os_error() {
        // The group has members that the host drives, or somebody has the group open.
        Some(libc::EBUSY) => step.not_viable_or_busy(name),
        // Somebody has bound the device: only groups can be opened twice.
        Some(libc::EINVAL) => OpenError::Busy { what: name.to_owned() },
        Some(libc::EPERM) => step.no_interrupt_remapping(),
        _ => step.failed("VFIO_DEVICE_BIND_IOMMUFD", source),
    })?;
    let ioas = kernel.ioas_alloc(&iommufd).map_err(|source| step.failed("IOMMU_IOAS_ALLOC", source))?;
    kernel.attach_ioas(&device, ioas).map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) => step.no_interrupt_remapping(),
        _ => step.failed("VFIO_DEVICE_ATTACH_IOMMUFD_PT", source),
    })?;
    Ok(Opened { device, space: Space::Ioas { iommufd, ioas } })
}

/// Steps that the ways have in common, with their errors explained.
struct Steps<'a, K> {
    kernel: &'a K,
    function: &'a PciFunction,
}

impl<K: Kernel> Steps<'_, K> {
    /// A container that can have an IOMMU of this kind.
    fn container(&self, kind: u32, lacking: &str) -> Result<K::File, OpenError> {
        let container = self.open(Path::new(CONTAINER), "vfio")?;
        let version = self.kernel.api_version(&container);
        let version = version.map_err(|source| self.failed("VFIO_GET_API_VERSION", source))?;
        if version != abi::VFIO_API_VERSION {
            return Err(self.unsupported(&format!("its VFIO has version {version}, not 0")));
        }
        let there = self.kernel.has_extension(&container, kind);
        if !there.map_err(|source| self.failed("VFIO_CHECK_EXTENSION", source))? {
            return Err(self.unsupported(lacking));
        }
        Ok(container)
    }

    /// Puts a group into a container.
    fn join(&self, group: &K::File, container: &K::File) -> Result<(), OpenError> {
        let viable = self.kernel.is_group_viable(group);
        if !viable.map_err(|source| self.failed("VFIO_GROUP_GET_STATUS", source))? {
            return Err(self.not_viable());
        }
        self.kernel.set_container(group, container).map_err(|source| match source.raw_os_error() {
            // A driver took a member since.
            Some(libc::EBUSY) => self.not_viable(),
            _ => self.failed("VFIO_GROUP_SET_CONTAINER", source),
        })
    }

    fn device(&self, group: &K::File) -> Result<K::File, OpenError> {
        let address = self.function.address;
        self.kernel.device(group, &address.to_string()).map_err(|source| match source.raw_os_error() {
            Some(libc::EACCES) => self.unsupported(
                "it is a virtual function whose physical function belongs to VFIO too; give that to another driver",
            ),
            Some(libc::EBUSY) => OpenError::Busy { what: address.to_string() },
            _ => self.failed("VFIO_GROUP_GET_DEVICE_FD", source),
        })
    }

    fn open(&self, path: &Path, module: &'static str) -> Result<K::File, OpenError> {
        self.kernel.open(path).map_err(|source| {
            let path: PathBuf = path.to_owned();
            match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenError::Absent { path, module },
                Some(libc::EACCES | libc::EPERM) => OpenError::Permission { path },
                Some(libc::EBUSY) => OpenError::Busy { what: path.display().to_string() },
                _ => self.failed("opening a device file", source),
            }
        })
    }

    fn not_viable(&self) -> OpenError {
        OpenError::GroupNotViable { group: self.group(), members: self.function.members_in_the_way() }
    }

    fn no_interrupt_remapping(&self) -> OpenError {
        OpenError::NoInterruptRemapping { group: self.group() }
    }

    fn group(&self) -> u32 {
        self.function.group.as_ref().map_or(0, |group| group.number)
    }

    fn not_viable_or_busy(&self, name: &str) -> OpenError {
        if self.function.members_in_the_way().is_empty() {
            return OpenError::Busy { what: format!("{name} or its group") };
        }
        self.not_viable()
    }

    fn unsupported(&self, what: &str) -> OpenError {
        OpenError::Unsupported { address: self.function.address, what: what.to_owned() }
    }

    const fn failed(&self, call: &'static str, source: io::Error) -> OpenError {
        OpenError::Kernel { call, address: self.function.address, source }
    }
}
