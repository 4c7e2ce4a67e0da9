//! A kernel made for tests: one NVMe function behind VFIO, with the rules that the real kernel has.
//!
//! ```text
//!   container    no call of an IOMMU before SET_IOMMU; no SET_IOMMU before a group is in; only one
//!   group        open once; not in two containers; no device before its container has an IOMMU; its files keep it
//!   device file  nothing before BIND_IOMMUFD; bound once; not while the group is open
//!   iommufd      the ranges of an address space narrow when a device is attached
//!   mappings     inside the ranges, aligned, apart, limited in number and bytes; unmapped only as they were mapped
//!   vectors      those that are on cannot become more
//! ```
//!
//! By `drivers/vfio/{container,group,device_cdev,vfio_iommu_type1}.c`, `drivers/vfio/pci/`, and
//! `drivers/iommu/iommufd/` of Linux 6.12, their documentation, and the comments of both headers. It records the
//! calls, and fails any of them when told to.

mod calls;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio as abi;

use super::info::{Area, IovaRange};
use super::kernel::Window;

/// A region's place in the device file, as vfio-pci has it.
const REGION_SHIFT: u32 = 40;
pub(super) const BAR_LEN: u64 = 0x4000;
const CONFIG_LEN: u64 = 4096;
pub(super) const MASTER: u16 = 4;
const CC: u32 = 0x14;
const CSTS: u32 = 0x1C;

/// What the host and the device are like.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) api_version: u32,
    pub(super) extensions: Vec<u32>,
    /// The group is one of the no-IOMMU mode.
    pub(super) no_iommu: bool,
    pub(super) viable: bool,
    /// The kernel says where mappings may be.
    pub(super) tells_ranges: bool,
    pub(super) ranges: Vec<IovaRange>,
    pub(super) mappings_max: usize,
    pub(super) locked_len_max: u64,
    pub(super) can_reset: bool,
    pub(super) vectors: u32,
    /// Vectors that the kernel has left.
    pub(super) vectors_left: u32,
    /// The parts of BAR 0 that can be mapped.
    pub(super) areas: Vec<Area>,
    /// The device does not let its bus master be turned off.
    pub(super) master_sticks: bool,
}

/// What happens inside.
#[derive(Debug)]
pub(super) struct State {
    pub(super) host: Host,
    /// Every call, in order.
    pub(super) calls: Vec<&'static str>,
    /// Files by what they are, closed ones too, in the order in which they were closed.
    pub(super) closed: Vec<&'static str>,
    /// These calls fail, with this errno.
    pub(super) failing: BTreeMap<&'static str, i32>,
    /// The call with this number fails, with this errno.
    pub(super) fail_at: Option<(usize, i32)>,
    files: BTreeMap<u32, Object>,
    next_file: u32,
    containers: BTreeMap<u32, Container>,
    group: Group,
    ioases: BTreeMap<u32, Mappings>,
    pub(super) device: Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Object {
    Container,
    Group,
    /// Through the group.
    Device,
    /// By its own file: the iommufd it is bound to.
    DeviceFile(Option<u32>),
    Iommufd,
}

#[derive(Debug, Default)]
struct Container {
    has_group: bool,
    iommu: Option<u32>,
    mappings: Mappings,
}

#[derive(Debug, Default)]
struct Group {
    open: bool,
    devices: u32,
    container: Option<u32>,
}

#[derive(Debug, Default)]
struct Mappings {
    /// First address and length.
    entries: BTreeMap<u64, u64>,
}

#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) command: u16,
    pub(super) registers: BTreeMap<u32, u32>,
    pub(super) vectors_on: u32,
    /// By index and vector.
    pub(super) eventfds: BTreeMap<(u32, u32), OwnedFd>,
    pub(super) resets: u32,
    /// It was taken out: all ones, and SIGBUS.
    pub(super) gone: bool,
    /// The address space that it is in, of an iommufd.
    ioas: Option<u32>,
}

/// A handle on the kernel, which is also the kernel.
#[derive(Clone, Debug)]
pub(super) struct FakeKernel(Arc<Mutex<State>>);

fn errno<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

impl FakeKernel {
    pub(super) fn new() -> Self {
        let host = Host {
            api_version: 0,
            extensions: vec![abi::VFIO_TYPE1v2_IOMMU],
            no_iommu: false,
            viable: true,
            tells_ranges: true,
            ranges: vec![
                IovaRange { start: 0, last: 0xFEDF_FFFF },
                IovaRange { start: 0xFEF0_0000, last: (1 << 39) - 1 },
            ],
            mappings_max: 65535,
            locked_len_max: u64::MAX,
            can_reset: true,
            vectors: 65,
            vectors_left: 1000,
            areas: vec![Area { offset: 0, len: BAR_LEN }],
            master_sticks: false,
        };
        let state = State {
            host,
            calls: Vec::new(),
            closed: Vec::new(),
            failing: BTreeMap::new(),
            fail_at: None,
            files: BTreeMap::new(),
            next_file: 3,
            containers: BTreeMap::new(),
            group: Group::default(),
            ioases: BTreeMap::new(),
            device: Device::default(),
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// A host without an IOMMU, in VFIO's no-IOMMU mode.
    pub(super) fn without_iommu() -> Self {
        let kernel = Self::new();
        kernel.state().host.no_iommu = true;
        kernel.state().host.extensions = vec![abi::VFIO_NOIOMMU_IOMMU];
        kernel
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a call, and fails it if it shall.
    fn enter(&self, call: &'static str) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        let number = state.calls.len();
        state.calls.push(call);
        let at = state.fail_at.filter(|&(at, _)| at == number).map(|(_, errno)| errno);
        match at.or_else(|| state.failing.get(call).copied()) {
            Some(code) => errno(code),
            None => Ok(state),
        }
    }

    fn file(&self, mut state: MutexGuard<'_, State>, object: Object) -> FakeFile {
        let id = state.next_file;
        state.next_file += 1;
        state.files.insert(id, object);
        FakeFile { id, kernel: self.clone() }
    }
}

impl State {
    /// What is still there of an opening: nothing, when it was undone.
    pub(super) fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = self.files.values().map(|object| format!("{object:?} open")).collect();
        let mappings = self.containers.values().map(|one| &one.mappings).chain(self.ioases.values());
        left.extend(mappings.flat_map(|one| &one.entries).map(|entry| format!("{entry:x?} mapped")));
        left.extend(self.group.container.map(|id| format!("group in container {id}")));
        left.extend((self.device.command & MASTER != 0).then(|| "bus master on".to_owned()));
        left.extend(self.device.eventfds.keys().map(|key| format!("eventfd of {key:?}")));
        left
    }

    /// Whether the device can reach the byte at `iova`.
    pub(super) fn reaches(&self, iova: u64) -> bool {
        if self.device.command & MASTER == 0 {
            return false;
        }
        self.host.no_iommu || self.space().is_some_and(|mappings| mappings.holds(iova))
    }

    /// How many mappings the device's space has.
    pub(super) fn mapped(&self) -> Vec<(u64, u64)> {
        self.space().map_or_else(Vec::new, |mappings| mappings.entries.clone().into_iter().collect())
    }

    fn space(&self) -> Option<&Mappings> {
        let container = self.group.container.and_then(|id| self.containers.get(&id));
        let attached = self.device.ioas.and_then(|id| self.ioases.get(&id));
        container.map(|container| &container.mappings).or(attached)
    }

    fn container(&mut self, file: &FakeFile) -> io::Result<&mut Container> {
        self.containers.get_mut(&file.id).map_or_else(|| errno(libc::ENOTTY), Ok)
    }

    /// A container that has an IOMMU: others know no more calls.
    fn iommu(&mut self, file: &FakeFile) -> io::Result<&mut Container> {
        let container = self.container(file)?;
        match container.iommu {
            None => errno(libc::EINVAL),
            Some(abi::VFIO_NOIOMMU_IOMMU) => errno(libc::ENOTTY),
            Some(_) => Ok(container),
        }
    }

    /// A device that may be used: through a group at once, by its file when it is bound.
    fn usable(&self, file: &FakeFile) -> io::Result<()> {
        match self.files.get(&file.id) {
            Some(Object::Device | Object::DeviceFile(Some(_))) => Ok(()),
            Some(Object::DeviceFile(None)) => errno(libc::EINVAL),
            _ => errno(libc::ENOTTY),
        }
    }

    fn open_device(&mut self) {
        if self.host.can_reset {
            self.reset();
        }
        self.device.command &= !MASTER;
    }

    fn close_device(&mut self) {
        self.device.command &= !MASTER;
        self.device.vectors_on = 0;
        self.device.eventfds.clear();
    }

    fn reset(&mut self) {
        self.device.resets += 1;
        self.device.registers.insert(CC, 0);
        self.device.registers.insert(CSTS, 0);
    }

    fn close(&mut self, id: u32) {
        let Some(object) = self.files.remove(&id) else { return };
        self.closed.push(match object {
            Object::Container => "container",
            Object::Group => "group",
            Object::Device | Object::DeviceFile(_) => "device",
            Object::Iommufd => "iommufd",
        });
        match object {
            Object::Device => {
                self.close_device();
                self.group.devices -= 1;
            }
            Object::DeviceFile(bound) => {
                if bound.is_some() {
                    self.close_device();
                }
                self.device.ioas = None;
            }
            Object::Group => self.group.open = false,
            Object::Container | Object::Iommufd => {}
        }
        // A device keeps its group, a group its container, and a bound device its iommufd.
        let unused = !self.group.open && self.group.devices == 0;
        let left = if unused { self.group.container.take() } else { None };
        if let Some(container) = left.and_then(|id| self.containers.get_mut(&id)) {
            *container = Container::default();
        }
        let files = &self.files;
        let used = self.group.container;
        self.containers.retain(|id, _| files.contains_key(id) || used == Some(*id));
        if !files.values().any(|object| matches!(object, Object::Iommufd | Object::DeviceFile(Some(_)))) {
            self.ioases.clear();
        }
    }

    fn map(&mut self, space: Space, iova: u64, len: u64) -> io::Result<()> {
        let (ranges, limit, locked_max) =
            (self.host.ranges.clone(), self.host.mappings_max, self.host.locked_len_max);
        let mappings = match space {
            Space::Container(id) => self.containers.get_mut(&id).map(|one| &mut one.mappings),
            Space::Ioas(id) => self.ioases.get_mut(&id),
        };
        let Some(mappings) = mappings else { return errno(libc::ENOENT) };
        if len == 0 || !(iova | len).is_multiple_of(4096) || iova.checked_add(len).is_none() {
            return errno(libc::EINVAL);
        }
        if mappings.entries.iter().any(|(&start, &other)| start < iova + len && iova < start + other) {
            return errno(libc::EEXIST);
        }
        if mappings.entries.len() >= limit {
            return errno(libc::ENOSPC);
        }
        if !ranges.iter().any(|range| range.start <= iova && iova + len - 1 <= range.last) {
            return errno(libc::EINVAL);
        }
        if mappings.entries.values().sum::<u64>() + len > locked_max {
            return errno(libc::ENOMEM);
        }
        mappings.entries.insert(iova, len);
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Space {
    Container(u32),
    Ioas(u32),
}

impl Mappings {
    fn holds(&self, iova: u64) -> bool {
        self.entries.range(..=iova).next_back().is_some_and(|(start, len)| iova - start < *len)
    }

    /// Ends all mappings inside a range; none may lie in it only by part.
    fn unmap(&mut self, iova: u64, len: u64) -> io::Result<u64> {
        let end = iova + len;
        let cut = |(&start, &other): (&u64, &u64)| {
            let (overlaps, inside) =
                (start < end && iova < start + other, start >= iova && start + other <= end);
            overlaps && !inside
        };
        if self.entries.iter().any(cut) {
            return errno(libc::EINVAL);
        }
        let before: u64 = self.entries.values().sum();
        self.entries.retain(|&start, _| start < iova || start >= end);
        Ok(before - self.entries.values().sum::<u64>())
    }
}

/// An open file, closed on drop.
pub(super) struct FakeFile {
    id: u32,
    kernel: FakeKernel,
}

impl fmt::Debug for FakeFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FakeFile({})", self.id)
    }
}

impl Drop for FakeFile {
    fn drop(&mut self) {
        self.kernel.state().close(self.id);
    }
}

/// A mapped part of BAR 0.
#[derive(Debug)]
pub(super) struct FakeWindow {
    kernel: FakeKernel,
    start: u32,
}

impl FakeWindow {
    #[expect(clippy::cast_possible_truncation, reason = "a BAR of a few pages")]
    const fn at(&self, offset: usize) -> u32 {
        self.start + offset as u32
    }
}

impl Window for FakeWindow {
    fn read32(&self, offset: usize) -> u32 {
        let state = self.kernel.state();
        if state.device.gone { u32::MAX } else { *state.device.registers.get(&self.at(offset)).unwrap_or(&0) }
    }

    fn write32(&self, offset: usize, value: u32) {
        self.kernel.state().device.registers.insert(self.at(offset), value);
    }

    fn read64(&self, offset: usize) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
    fn write64(&self, offset: usize, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    fn is_gone(&self) -> bool {
        self.kernel.state().device.gone
    }
}
