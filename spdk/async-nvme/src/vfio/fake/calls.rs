//! The calls, each with the rules that the kernel has for it.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use hugepage_alloc::DmaRegion;
use vfio_bindings::bindings::vfio as abi;

use super::super::info::{Area, DeviceInfo, IommuInfo, IovaRange, IrqInfo, RegionInfo};
use super::super::kernel::Kernel;
use super::{
    BAR_LEN, CONFIG_LEN, Container, FakeFile, FakeKernel, FakeWindow, MASTER, Mappings, Object, REGION_SHIFT,
    Space, errno,
};

impl Kernel for FakeKernel {
    type File = FakeFile;
    type Window = FakeWindow;

    fn open(&self, path: &Path) -> io::Result<FakeFile> {
        let (call, object) = match path.to_str() {
            Some("/dev/vfio/vfio") => ("open container", Object::Container),
            Some("/dev/vfio/12" | "/dev/vfio/noiommu-12") => ("open group", Object::Group),
            Some("/dev/iommu") => ("open iommufd", Object::Iommufd),
            Some("/dev/vfio/devices/vfio3") => ("open device", Object::DeviceFile(None)),
            _ => return errno(libc::ENOENT),
        };
        let mut state = self.enter(call)?;
        if object == Object::Group {
            if path.ends_with("noiommu-12") != state.host.no_iommu {
                return errno(libc::ENOENT);
            }
            let bound = state.files.values().any(|object| matches!(object, Object::DeviceFile(Some(_))));
            if state.group.open || state.group.devices > 0 || bound {
                return errno(libc::EBUSY);
            }
            state.group.open = true;
        }
        let file = self.file(state, object);
        if object == Object::Container {
            self.state().containers.insert(file.id, Container::default());
        }
        Ok(file)
    }

    fn api_version(&self, container: &FakeFile) -> io::Result<u32> {
        let mut state = self.enter("GET_API_VERSION")?;
        state.container(container)?;
        Ok(state.host.api_version)
    }

    fn has_extension(&self, container: &FakeFile, extension: u32) -> io::Result<bool> {
        let mut state = self.enter("CHECK_EXTENSION")?;
        state.container(container)?;
        Ok(state.host.extensions.contains(&extension))
    }

    fn set_iommu(&self, container: &FakeFile, kind: u32) -> io::Result<()> {
        let mut state = self.enter("SET_IOMMU")?;
        let fits =
            state.host.extensions.contains(&kind) && state.host.no_iommu == (kind == abi::VFIO_NOIOMMU_IOMMU);
        let container = state.container(container)?;
        if !container.has_group || container.iommu.is_some() {
            return errno(libc::EINVAL);
        }
        if !fits {
            return errno(libc::ENODEV);
        }
        container.iommu = Some(kind);
        Ok(())
    }

    fn iommu_info(&self, container: &FakeFile) -> io::Result<IommuInfo> {
        let mut state = self.enter("IOMMU_GET_INFO")?;
        let used = state.iommu(container)?.mappings.entries.len();
        let left = u32::try_from(state.host.mappings_max - used).ok();
        let ranges = state.host.tells_ranges.then(|| state.host.ranges.clone());
        Ok(IommuInfo { ranges, mappings_left: left })
    }

    fn map_dma(&self, container: &FakeFile, region: &DmaRegion, iova: u64) -> io::Result<()> {
        let mut state = self.enter("MAP_DMA")?;
        state.iommu(container)?;
        state.map(Space::Container(container.id), iova, region.len() as u64)
    }

    fn unmap_dma(&self, container: &FakeFile, iova: u64, len: u64) -> io::Result<u64> {
        self.enter("UNMAP_DMA")?.iommu(container)?.mappings.unmap(iova, len)
    }

    fn is_group_viable(&self, group: &FakeFile) -> io::Result<bool> {
        let state = self.enter("GROUP_GET_STATUS")?;
        match state.files.get(&group.id) {
            Some(Object::Group) => Ok(state.host.viable),
            _ => errno(libc::ENOTTY),
        }
    }

    fn set_container(&self, group: &FakeFile, container: &FakeFile) -> io::Result<()> {
        let mut state = self.enter("SET_CONTAINER")?;
        if state.files.get(&group.id) != Some(&Object::Group) {
            return errno(libc::ENOTTY);
        }
        if state.group.container.is_some() {
            return errno(libc::EINVAL);
        }
        if !state.host.viable {
            return errno(libc::EBUSY);
        }
        let Ok(one) = state.container(container) else { return errno(libc::EBADFD) };
        one.has_group = true;
        state.group.container = Some(container.id);
        Ok(())
    }

    fn device(&self, group: &FakeFile, name: &str) -> io::Result<FakeFile> {
        let mut state = self.enter("GET_DEVICE_FD")?;
        if state.files.get(&group.id) != Some(&Object::Group) {
            return errno(libc::ENOTTY);
        }
        if name != "0000:03:00.0" {
            return errno(libc::ENODEV);
        }
        let container = state.group.container.and_then(|id| state.containers.get(&id));
        if container.is_none_or(|container| container.iommu.is_none()) {
            return errno(libc::EINVAL);
        }
        state.group.devices += 1;
        state.open_device();
        Ok(self.file(state, Object::Device))
    }

    fn bind_iommufd(&self, device: &FakeFile, iommufd: &FakeFile) -> io::Result<()> {
        let mut state = self.enter("BIND_IOMMUFD")?;
        if state.files.get(&device.id) != Some(&Object::DeviceFile(None)) {
            return errno(libc::EINVAL);
        }
        if state.group.open || state.group.devices > 0 || !state.host.viable {
            return errno(libc::EBUSY);
        }
        if state.files.values().any(|object| matches!(object, Object::DeviceFile(Some(_)))) {
            return errno(libc::EINVAL);
        }
        if state.files.get(&iommufd.id) != Some(&Object::Iommufd) {
            return errno(libc::EBADFD);
        }
        state.files.insert(device.id, Object::DeviceFile(Some(iommufd.id)));
        state.open_device();
        Ok(())
    }

    fn ioas_alloc(&self, iommufd: &FakeFile) -> io::Result<u32> {
        let mut state = self.enter("IOAS_ALLOC")?;
        if state.files.get(&iommufd.id) != Some(&Object::Iommufd) {
            return errno(libc::ENOTTY);
        }
        // Identifiers are shared with the devices, of which there is one.
        let id = u32::try_from(state.ioases.len()).unwrap_or(0) + 2;
        state.ioases.insert(id, Mappings::default());
        Ok(id)
    }

    fn attach_ioas(&self, device: &FakeFile, ioas: u32) -> io::Result<()> {
        let mut state = self.enter("ATTACH_IOMMUFD_PT")?;
        state.usable(device)?;
        if matches!(state.files.get(&device.id), Some(Object::Device)) {
            return errno(libc::ENOTTY);
        }
        if !state.ioases.contains_key(&ioas) {
            return errno(libc::ENOENT);
        }
        state.device.ioas = Some(ioas);
        Ok(())
    }

    fn ioas_ranges(&self, _: &FakeFile, ioas: u32) -> io::Result<Vec<IovaRange>> {
        let state = self.enter("IOAS_IOVA_RANGES")?;
        match state.ioases.get(&ioas) {
            None => errno(libc::ENOENT),
            Some(_) if state.device.ioas == Some(ioas) => Ok(state.host.ranges.clone()),
            Some(_) => Ok(vec![IovaRange { start: 0, last: u64::MAX }]),
        }
    }

    fn ioas_map(&self, _: &FakeFile, ioas: u32, region: &DmaRegion, iova: u64) -> io::Result<()> {
        self.enter("IOAS_MAP")?.map(Space::Ioas(ioas), iova, region.len() as u64)
    }

    fn ioas_unmap(&self, _: &FakeFile, ioas: u32, iova: u64, len: u64) -> io::Result<u64> {
        let mut state = self.enter("IOAS_UNMAP")?;
        let Some(mappings) = state.ioases.get_mut(&ioas) else { return errno(libc::ENOENT) };
        match mappings.unmap(iova, len)? {
            0 => errno(libc::ENOENT),
            unmapped => Ok(unmapped),
        }
    }

    fn device_info(&self, device: &FakeFile) -> io::Result<DeviceInfo> {
        let state = self.enter("DEVICE_GET_INFO")?;
        state.usable(device)?;
        Ok(DeviceInfo { is_pci: true, can_reset: state.host.can_reset })
    }

    fn region_info(&self, device: &FakeFile, index: u32) -> io::Result<RegionInfo> {
        let state = self.enter("GET_REGION_INFO")?;
        state.usable(device)?;
        let file_offset = u64::from(index) << REGION_SHIFT;
        match index {
            abi::VFIO_PCI_BAR0_REGION_INDEX => {
                Ok(RegionInfo { file_offset, len: BAR_LEN, areas: state.host.areas.clone() })
            }
            abi::VFIO_PCI_CONFIG_REGION_INDEX => {
                Ok(RegionInfo { file_offset, len: CONFIG_LEN, areas: Vec::new() })
            }
            _ => errno(libc::EINVAL),
        }
    }

    fn irq_info(&self, device: &FakeFile, index: u32) -> io::Result<IrqInfo> {
        let state = self.enter("GET_IRQ_INFO")?;
        state.usable(device)?;
        match index {
            abi::VFIO_PCI_MSIX_IRQ_INDEX => Ok(IrqInfo { count: state.host.vectors }),
            abi::VFIO_PCI_REQ_IRQ_INDEX => Ok(IrqInfo { count: 1 }),
            _ => errno(libc::EINVAL),
        }
    }

    fn set_irqs(
        &self,
        device: &FakeFile,
        index: u32,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<u32> {
        let mut state = self.enter("SET_IRQS")?;
        state.usable(device)?;
        let count = u32::try_from(eventfds.len()).unwrap_or(u32::MAX);
        let have = if index == abi::VFIO_PCI_MSIX_IRQ_INDEX { state.host.vectors } else { 1 };
        if count == 0 || start.checked_add(count).is_none_or(|end| end > have) {
            return errno(libc::EINVAL);
        }
        if index == abi::VFIO_PCI_MSIX_IRQ_INDEX {
            match state.device.vectors_on {
                0 if state.host.vectors_left == 0 => return errno(libc::ENOSPC),
                0 if start + count > state.host.vectors_left => return Ok(state.host.vectors_left),
                0 => state.device.vectors_on = start + count,
                on if start + count > on => return errno(libc::EINVAL),
                _ => {}
            }
        }
        for (vector, eventfd) in (start..).zip(eventfds) {
            match eventfd {
                Some(eventfd) => {
                    let own = eventfd.try_clone_to_owned()?;
                    state.device.eventfds.insert((index, vector), own);
                }
                None => _ = state.device.eventfds.remove(&(index, vector)),
            }
        }
        Ok(0)
    }

    fn reset(&self, device: &FakeFile) -> io::Result<()> {
        let mut state = self.enter("DEVICE_RESET")?;
        state.usable(device)?;
        if !state.host.can_reset {
            return errno(libc::EINVAL);
        }
        state.reset();
        Ok(())
    }

    fn read(&self, device: &FakeFile, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let state = self.enter("read")?;
        state.usable(device)?;
        let at = offset & ((1 << REGION_SHIFT) - 1);
        let word = match (offset >> REGION_SHIFT, at) {
            _ if state.device.gone => u32::MAX,
            (0, at) => u32::try_from(at).map_or(0, |at| *state.device.registers.get(&at).unwrap_or(&0)),
            (7, 0) => 0x0010_1B36,
            (7, 4) => state.device.command.into(),
            (7, _) => 0,
            _ => return errno(libc::EINVAL),
        };
        let len = target.len();
        target.copy_from_slice(&word.to_le_bytes()[..len]);
        Ok(())
    }

    fn write(&self, device: &FakeFile, offset: u64, source: &[u8]) -> io::Result<()> {
        let mut state = self.enter("write")?;
        state.usable(device)?;
        let at = offset & ((1 << REGION_SHIFT) - 1);
        let mut bytes = [0; 4];
        bytes[..source.len()].copy_from_slice(source);
        let word = u32::from_le_bytes(bytes);
        match (offset >> REGION_SHIFT, at) {
            _ if state.device.gone => {}
            (0, at) => _ = state.device.registers.insert(u32::try_from(at).unwrap_or(0), word),
            (7, 4) if source.len() == 2 => {
                let stuck = if state.host.master_sticks { state.device.command & MASTER } else { 0 };
                state.device.command = u16::from_le_bytes([bytes[0], bytes[1]]) | stuck;
            }
            _ => return errno(libc::EINVAL),
        }
        Ok(())
    }

    fn map(&self, device: &FakeFile, offset: u64, len: usize) -> io::Result<FakeWindow> {
        let state = self.enter("mmap")?;
        state.usable(device)?;
        let at = offset & ((1 << REGION_SHIFT) - 1);
        let fits = |area: &Area| area.offset <= at && at + len as u64 <= area.offset + area.len;
        if offset >> REGION_SHIFT != 0 || !at.is_multiple_of(4096) || !state.host.areas.iter().any(fits) {
            return errno(libc::EINVAL);
        }
        drop(state);
        Ok(FakeWindow { kernel: self.clone(), start: u32::try_from(at).unwrap_or(0) })
    }
}
