//! The real kernel: the ioctls of `linux/vfio.h` and `linux/iommufd.h`.
//!
//! The numbers of the commands and the structures of iommufd stand here, because `vfio-bindings` has neither.
#![expect(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::Path;

use hugepage_alloc::DmaRegion;
use rustix::fs::{Mode, OFlags};
use vfio_bindings::bindings::vfio as abi;

use super::info::{DeviceInfo, IommuInfo, IovaRange, IrqInfo, RegionInfo};
use super::kernel::Kernel;
use super::mmio::Mmio;

/// The kernel that runs this process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Linux;

/// The number of an ioctl: `_IO(';', 100 + n)`, of VFIO.
const fn vfio(n: u32) -> u32 {
    (abi::VFIO_TYPE as u32) << 8 | (abi::VFIO_BASE + n)
}

/// The number of an ioctl: `_IO(';', 0x80 + n)`, of iommufd.
const fn iommufd(n: u32) -> u32 {
    (abi::VFIO_TYPE as u32) << 8 | (0x80 + n)
}

const GET_API_VERSION: u32 = vfio(0);
const CHECK_EXTENSION: u32 = vfio(1);
const SET_IOMMU: u32 = vfio(2);
const GROUP_GET_STATUS: u32 = vfio(3);
const GROUP_SET_CONTAINER: u32 = vfio(4);
const GROUP_GET_DEVICE_FD: u32 = vfio(6);
const DEVICE_GET_INFO: u32 = vfio(7);
const DEVICE_GET_REGION_INFO: u32 = vfio(8);
const DEVICE_GET_IRQ_INFO: u32 = vfio(9);
const DEVICE_SET_IRQS: u32 = vfio(10);
const DEVICE_RESET: u32 = vfio(11);
const IOMMU_GET_INFO: u32 = vfio(12);
const IOMMU_MAP_DMA: u32 = vfio(13);
const IOMMU_UNMAP_DMA: u32 = vfio(14);
const DEVICE_BIND_IOMMUFD: u32 = vfio(18);
const DEVICE_ATTACH_IOMMUFD_PT: u32 = vfio(19);
const IOAS_ALLOC: u32 = iommufd(1);
const IOAS_IOVA_RANGES: u32 = iommufd(4);
const IOAS_MAP: u32 = iommufd(5);
const IOAS_UNMAP: u32 = iommufd(6);

/// `struct iommu_ioas_alloc`.
#[derive(Default)]
#[repr(C)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

/// `struct iommu_ioas_iova_ranges`.
#[derive(Default)]
#[repr(C)]
struct IoasIovaRanges {
    size: u32,
    ioas_id: u32,
    num_iovas: u32,
    reserved: u32,
    allowed_iovas: u64,
    out_iova_alignment: u64,
}

/// `struct iommu_ioas_map`.
#[derive(Default)]
#[repr(C)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

/// `struct iommu_ioas_unmap`.
#[derive(Default)]
#[repr(C)]
struct IoasUnmap {
    size: u32,
    ioas_id: u32,
    iova: u64,
    length: u64,
}

const IOAS_MAP_FIXED_IOVA: u32 = 1;
const IOAS_MAP_WRITEABLE: u32 = 2;
const IOAS_MAP_READABLE: u32 = 4;

/// The size of a structure, as its first field wants it.
#[expect(clippy::cast_possible_truncation, reason = "the largest has 40 bytes")]
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// An ioctl with a structure.
///
/// # Safety
/// `argument` is what the command reads and writes, by its definition, and is valid for both.
unsafe fn call<T>(file: &OwnedFd, command: u32, argument: *mut T) -> io::Result<u32> {
    // SAFETY: as the caller promises.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::Ioctl::from(command), argument) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// An ioctl whose argument is a number, or nothing.
fn call_with(file: &OwnedFd, command: u32, number: u32) -> io::Result<u32> {
    // SAFETY: the commands that this is used for take a number and touch no memory of ours.
    let result =
        unsafe { libc::ioctl(file.as_raw_fd(), libc::Ioctl::from(command), libc::c_ulong::from(number)) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// An ioctl that fills in a structure of `head` bytes and, when there is room, capabilities behind it.
fn call_for_chain(file: &OwnedFd, command: u32, head: usize, index: Option<u32>) -> io::Result<Vec<u8>> {
    /// More than any kernel says.
    const BYTES_MAX: usize = 64 << 10;
    let mut len = head;
    loop {
        // Words, for the alignment.
        let mut words = vec![0u64; len.div_ceil(8)];
        let bytes = u32::try_from(words.len() * 8).map_err(|_| io::ErrorKind::InvalidData)?;
        let (argsz, third) = words.split_at_mut(1);
        if let (Some(argsz), Some(third)) = (argsz.first_mut(), third.first_mut()) {
            // argsz and flags; then, in a region, its index.
            *argsz = first_of_two(bytes);
            *third = index.map_or(0, first_of_two);
        }
        // SAFETY: the kernel reads and writes the structure, whose size the words have at least, and what `argsz`
        // says behind it.
        unsafe { call(file, command, words.as_mut_ptr())? };
        let told: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let wanted = told.first_chunk().copied().map_or(0, u32::from_ne_bytes) as usize;
        if wanted <= told.len() || len > head {
            return Ok(told);
        }
        if wanted > BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        len = wanted;
    }
}

/// Eight bytes that begin with a word, on a little-endian machine: all that this module is built for.
const fn first_of_two(word: u32) -> u64 {
    word as u64
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is cut short")
}

impl Kernel for Linux {
    type File = OwnedFd;
    type Window = Mmio;

    fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
    }

    fn api_version(&self, container: &OwnedFd) -> io::Result<u32> {
        call_with(container, GET_API_VERSION, 0)
    }

    fn has_extension(&self, container: &OwnedFd, extension: u32) -> io::Result<bool> {
        Ok(call_with(container, CHECK_EXTENSION, extension)? != 0)
    }

    fn set_iommu(&self, container: &OwnedFd, kind: u32) -> io::Result<()> {
        call_with(container, SET_IOMMU, kind).map(drop)
    }

    fn iommu_info(&self, container: &OwnedFd) -> io::Result<IommuInfo> {
        let head = size_of::<abi::vfio_iommu_type1_info>();
        let bytes = call_for_chain(container, IOMMU_GET_INFO, head, None)?;
        IommuInfo::from_bytes(&bytes).ok_or_else(malformed)
    }

    fn map_dma(&self, container: &OwnedFd, region: &DmaRegion, iova: u64) -> io::Result<()> {
        let mut map = abi::vfio_iommu_type1_dma_map {
            argsz: size::<abi::vfio_iommu_type1_dma_map>(),
            flags: abi::VFIO_DMA_MAP_FLAG_READ | abi::VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: region.as_ptr().expose_provenance() as u64,
            iova,
            size: region.len() as u64,
        };
        // SAFETY: the structure of this command. That a device may write to the region from now on is what regions
        // are for: no Rust reference points into one.
        unsafe { call(container, IOMMU_MAP_DMA, &raw mut map) }.map(drop)
    }

    fn unmap_dma(&self, container: &OwnedFd, iova: u64, len: u64) -> io::Result<u64> {
        let mut unmap = abi::vfio_iommu_type1_dma_unmap {
            argsz: size::<abi::vfio_iommu_type1_dma_unmap>(),
            iova,
            size: len,
            ..Default::default()
        };
        // SAFETY: the structure of this command; without flags no data follows it.
        unsafe { call(container, IOMMU_UNMAP_DMA, &raw mut unmap)? };
        Ok(unmap.size)
    }

    fn is_group_viable(&self, group: &OwnedFd) -> io::Result<bool> {
        let mut status = abi::vfio_group_status { argsz: size::<abi::vfio_group_status>(), flags: 0 };
        // SAFETY: the structure of this command.
        unsafe { call(group, GROUP_GET_STATUS, &raw mut status)? };
        Ok(status.flags & abi::VFIO_GROUP_FLAGS_VIABLE != 0)
    }

    fn set_container(&self, group: &OwnedFd, container: &OwnedFd) -> io::Result<()> {
        let mut container = container.as_raw_fd();
        // SAFETY: the command reads one int.
        unsafe { call(group, GROUP_SET_CONTAINER, &raw mut container) }.map(drop)
    }

    fn device(&self, group: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
        let mut name = std::ffi::CString::new(name)?.into_bytes_with_nul();
        // SAFETY: the command reads a text that ends with 0.
        let fd = unsafe { call(group, GROUP_GET_DEVICE_FD, name.as_mut_ptr())? };
        let fd = i32::try_from(fd).map_err(|_| malformed())?;
        // SAFETY: the descriptor was made for us by this call, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn bind_iommufd(&self, device: &OwnedFd, iommufd: &OwnedFd) -> io::Result<()> {
        let mut bind = abi::vfio_device_bind_iommufd {
            argsz: size::<abi::vfio_device_bind_iommufd>(),
            iommufd: iommufd.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the structure of this command.
        unsafe { call(device, DEVICE_BIND_IOMMUFD, &raw mut bind) }.map(drop)
    }

    fn ioas_alloc(&self, iommufd: &OwnedFd) -> io::Result<u32> {
        let mut alloc = IoasAlloc { size: size::<IoasAlloc>(), ..Default::default() };
        // SAFETY: the structure of this command.
        unsafe { call(iommufd, IOAS_ALLOC, &raw mut alloc)? };
        Ok(alloc.out_ioas_id)
    }

    fn attach_ioas(&self, device: &OwnedFd, ioas: u32) -> io::Result<()> {
        let mut attach = abi::vfio_device_attach_iommufd_pt {
            argsz: size::<abi::vfio_device_attach_iommufd_pt>(),
            pt_id: ioas,
            ..Default::default()
        };
        // SAFETY: the structure of this command.
        unsafe { call(device, DEVICE_ATTACH_IOMMUFD_PT, &raw mut attach) }.map(drop)
    }

    fn ioas_ranges(&self, iommufd: &OwnedFd, ioas: u32) -> io::Result<Vec<IovaRange>> {
        // A host has a hole or two for each IOMMU; more room is asked for twice at most.
        let mut pairs = vec![[0u64; 2]; 64];
        for _ in 0..2 {
            let mut ask = IoasIovaRanges {
                size: size::<IoasIovaRanges>(),
                ioas_id: ioas,
                num_iovas: u32::try_from(pairs.len()).map_err(|_| malformed())?,
                allowed_iovas: pairs.as_mut_ptr().expose_provenance() as u64,
                ..Default::default()
            };
            // SAFETY: the structure of this command, and an array of as many pairs of words as it says.
            let answer = unsafe { call(iommufd, IOAS_IOVA_RANGES, &raw mut ask) };
            let count = ask.num_iovas as usize;
            match answer {
                Ok(_) => {
                    pairs.truncate(count);
                    return Ok(pairs.iter().map(|&[start, last]| IovaRange { start, last }).collect());
                }
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) && count <= 1 << 16 => {
                    pairs.resize(count, [0; 2]);
                }
                Err(error) => return Err(error),
            }
        }
        Err(malformed())
    }

    fn ioas_map(&self, iommufd: &OwnedFd, ioas: u32, region: &DmaRegion, iova: u64) -> io::Result<()> {
        let mut map = IoasMap {
            size: size::<IoasMap>(),
            flags: IOAS_MAP_FIXED_IOVA | IOAS_MAP_WRITEABLE | IOAS_MAP_READABLE,
            ioas_id: ioas,
            reserved: 0,
            user_va: region.as_ptr().expose_provenance() as u64,
            length: region.len() as u64,
            iova,
        };
        // SAFETY: as in `map_dma`.
        unsafe { call(iommufd, IOAS_MAP, &raw mut map) }.map(drop)
    }

    fn ioas_unmap(&self, iommufd: &OwnedFd, ioas: u32, iova: u64, len: u64) -> io::Result<u64> {
        let mut unmap = IoasUnmap { size: size::<IoasUnmap>(), ioas_id: ioas, iova, length: len };
        // SAFETY: the structure of this command.
        unsafe { call(iommufd, IOAS_UNMAP, &raw mut unmap)? };
        Ok(unmap.length)
    }

    fn device_info(&self, device: &OwnedFd) -> io::Result<DeviceInfo> {
        let mut info = abi::vfio_device_info { argsz: size::<abi::vfio_device_info>(), ..Default::default() };
        // SAFETY: the structure of this command; without room behind it no capabilities follow.
        unsafe { call(device, DEVICE_GET_INFO, &raw mut info)? };
        Ok(DeviceInfo {
            is_pci: info.flags & abi::VFIO_DEVICE_FLAGS_PCI != 0,
            can_reset: info.flags & abi::VFIO_DEVICE_FLAGS_RESET != 0,
        })
    }

    fn region_info(&self, device: &OwnedFd, index: u32) -> io::Result<RegionInfo> {
        let head = size_of::<abi::vfio_region_info>();
        let bytes = call_for_chain(device, DEVICE_GET_REGION_INFO, head, Some(index))?;
        RegionInfo::from_bytes(&bytes).ok_or_else(malformed)
    }

    fn irq_info(&self, device: &OwnedFd, index: u32) -> io::Result<IrqInfo> {
        let mut info =
            abi::vfio_irq_info { argsz: size::<abi::vfio_irq_info>(), index, ..Default::default() };
        // SAFETY: the structure of this command.
        unsafe { call(device, DEVICE_GET_IRQ_INFO, &raw mut info)? };
        Ok(IrqInfo { count: info.count })
    }

    fn set_irqs(
        &self,
        device: &OwnedFd,
        index: u32,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<u32> {
        let count = u32::try_from(eventfds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let argsz = count.checked_mul(4).and_then(|len| len.checked_add(20));
        let head = [
            argsz.ok_or(io::ErrorKind::InvalidInput)?,
            abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_TRIGGER,
            index,
            start,
            count,
        ];
        // -1 is no eventfd.
        let fds = eventfds.iter().map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd()).cast_unsigned());
        let mut words: Vec<u32> = head.into_iter().chain(fds).collect();
        // SAFETY: `struct vfio_irq_set` is five words, and `count` descriptors follow, as `argsz` says.
        unsafe { call(device, DEVICE_SET_IRQS, words.as_mut_ptr()) }
    }

    fn reset(&self, device: &OwnedFd) -> io::Result<()> {
        call_with(device, DEVICE_RESET, 0).map(drop)
    }

    fn read(&self, device: &OwnedFd, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let want = target.len();
        let got = rustix::io::pread(device, target, offset)?;
        if got == want { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn write(&self, device: &OwnedFd, offset: u64, source: &[u8]) -> io::Result<()> {
        let put = rustix::io::pwrite(device, source, offset)?;
        if put == source.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn map(&self, device: &OwnedFd, offset: u64, len: usize) -> io::Result<Mmio> {
        Mmio::map(device.as_fd(), offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_headers() {
        // linux/vfio.h and linux/iommufd.h: _IO(';', n).
        assert_eq!(GET_API_VERSION, 0x3B64);
        assert_eq!(IOMMU_UNMAP_DMA, 0x3B72);
        assert_eq!(DEVICE_ATTACH_IOMMUFD_PT, 0x3B77);
        assert_eq!(IOAS_ALLOC, 0x3B81);
        assert_eq!(IOAS_UNMAP, 0x3B86);
        assert_eq!([size::<IoasAlloc>(), size::<IoasIovaRanges>()], [12, 32]);
        assert_eq!([size::<IoasMap>(), size::<IoasUnmap>()], [40, 24]);
    }

    #[test]
    fn a_file_that_is_no_vfio_refuses_every_call() {
        let null = Linux.open(Path::new("/dev/null")).unwrap();
        let region = DmaRegion::map(1, false, false).unwrap();
        let refused = [
            Linux.api_version(&null).err(),
            Linux.set_iommu(&null, 3).err(),
            Linux.iommu_info(&null).err(),
            Linux.map_dma(&null, &region, 0).err(),
            Linux.unmap_dma(&null, 0, 4096).err(),
            Linux.is_group_viable(&null).err(),
            Linux.set_container(&null, &null).err(),
            Linux.device(&null, "0000:00:00.0").err(),
            Linux.bind_iommufd(&null, &null).err(),
            Linux.ioas_alloc(&null).err(),
            Linux.attach_ioas(&null, 1).err(),
            Linux.ioas_ranges(&null, 1).err(),
            Linux.ioas_map(&null, 1, &region, 0).err(),
            Linux.ioas_unmap(&null, 1, 0, 4096).err(),
            Linux.device_info(&null).err(),
            Linux.region_info(&null, 0).err(),
            Linux.irq_info(&null, 0).err(),
            Linux.set_irqs(&null, 0, 0, &[None]).err(),
            Linux.reset(&null).err(),
        ];
        for (index, error) in refused.iter().enumerate() {
            let errno = error.as_ref().and_then(io::Error::raw_os_error);
            assert_eq!(errno, Some(libc::ENOTTY), "call {index}");
        }
    }
}
