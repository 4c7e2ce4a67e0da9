//! What the kernel tells of an IOMMU, a region and an interrupt, read from the bytes it writes.
//!
//! ```text
//!   struct vfio_region_info | capability | capability | ...
//!     argsz   flags   index   cap_offset ---^     `next`: the offset of the next one, 0 in the last
//! ```
//!
//! The kernel is trusted, but a chain is followed only forward and only inside the bytes, so that no mistake of
//! either side becomes a wrong read.

use vfio_bindings::bindings::vfio as abi;

/// First and last address, inclusive, of a run that a device may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IovaRange {
    pub(super) start: u64,
    pub(super) last: u64,
}

/// `VFIO_IOMMU_GET_INFO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IommuInfo {
    /// Where mappings may be; `None` before Linux 5.4, which does not say.
    pub(super) ranges: Option<Vec<IovaRange>>,
    /// How many mappings can still be made; `None` before Linux 5.10.
    pub(super) mappings_left: Option<u32>,
}

impl IommuInfo {
    /// Reads a `vfio_iommu_type1_info` and what follows it. `None` when it is cut short.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let flags = word(bytes, 4)?;
        let mut info = Self { ranges: None, mappings_left: None };
        if flags & abi::VFIO_IOMMU_INFO_CAPS == 0 {
            return Some(info);
        }
        for capability in Chain::new(bytes, word(bytes, 16)?) {
            match capability.id {
                abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                    let pairs = pairs(capability.bytes)?;
                    info.ranges = Some(pairs.map(|(start, last)| IovaRange { start, last }).collect());
                }
                abi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.mappings_left = word(capability.bytes, 8),
                _ => {}
            }
        }
        Some(info)
    }
}

/// A part of a region: where it begins in the region, and its length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// `VFIO_DEVICE_GET_REGION_INFO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RegionInfo {
    /// Where the region begins in the device's file.
    pub(super) file_offset: u64,
    /// Its length in bytes; 0 when the device has no such region.
    pub(super) len: u64,
    /// The parts that can be mapped, by offset; what lies between them is reached by reading and writing the file.
    pub(super) areas: Vec<Area>,
}

impl RegionInfo {
    /// Reads a `vfio_region_info` and what follows it. `None` when it is cut short.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let flags = word(bytes, 4)?;
        let (len, file_offset) = (long(bytes, 16)?, long(bytes, 24)?);
        let mut areas = Vec::new();
        if flags & abi::VFIO_REGION_INFO_FLAG_MMAP != 0 {
            areas.push(Area { offset: 0, len });
        }
        if flags & abi::VFIO_REGION_INFO_FLAG_CAPS != 0 && !areas.is_empty() {
            for capability in Chain::new(bytes, word(bytes, 12)?) {
                // Before Linux 4.16 the page of the MSI-X table is left out so. Since then the whole BAR can be
                // mapped, which VFIO_REGION_INFO_CAP_MSIX_MAPPABLE says and needs no answer: the driver keeps its
                // hands off the table.
                if capability.id == abi::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
                    areas = pairs(capability.bytes)?.map(|(offset, len)| Area { offset, len }).collect();
                }
            }
        }
        areas.retain(|area| area.len > 0 && area.offset.checked_add(area.len).is_some_and(|end| end <= len));
        areas.sort_by_key(|area| area.offset);
        Some(Self { file_offset, len, areas })
    }
}

/// `VFIO_DEVICE_GET_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceInfo {
    /// It is a PCI function.
    pub(super) is_pci: bool,
    /// It can be reset.
    pub(super) can_reset: bool,
}

/// `VFIO_DEVICE_GET_IRQ_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IrqInfo {
    /// How many interrupts the index has.
    pub(super) count: u32,
}

/// One link of a capability chain.
#[derive(Clone, Copy, Debug)]
struct Capability<'a> {
    id: u32,
    /// From its header to the end of the buffer.
    bytes: &'a [u8],
}

/// The links of a chain, forward only.
struct Chain<'a> {
    bytes: &'a [u8],
    next: u32,
    seen: u32,
}

impl<'a> Chain<'a> {
    const fn new(bytes: &'a [u8], first: u32) -> Self {
        Self { bytes, next: first, seen: 0 }
    }
}

impl<'a> Iterator for Chain<'a> {
    type Item = Capability<'a>;

    fn next(&mut self) -> Option<Capability<'a>> {
        // 0 ends the chain, and a step back would make it endless.
        if self.next <= self.seen {
            return None;
        }
        self.seen = self.next;
        let bytes = self.bytes.get(usize::try_from(self.seen).ok()?..)?;
        let id = word(bytes, 0)? & 0xFFFF;
        self.next = word(bytes, 4)?;
        Some(Capability { id, bytes })
    }
}

/// A capability that is a header, a count, a reserved word and pairs: sparse areas and address ranges alike.
fn pairs(bytes: &[u8]) -> Option<impl Iterator<Item = (u64, u64)>> {
    let count = usize::try_from(word(bytes, 8)?).ok()?;
    let bytes = bytes.get(16..)?.get(..count.checked_mul(16)?)?;
    let value = |part: &[u8]| part.try_into().map_or(0, u64::from_ne_bytes);
    Some(bytes.chunks_exact(16).map(move |pair| {
        let (first, second) = pair.split_at(8);
        (value(first), value(second))
    }))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Words in the machine's order, as the kernel writes them.
    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn region(flags: u32, cap_offset: u32, rest: &[u32]) -> Vec<u8> {
        let head = [0, flags, 0, cap_offset, 0x4000, 0, 0, 0x10];
        bytes(&[&head, rest].concat())
    }

    #[test]
    fn a_bar_that_can_be_mapped_is_one_area() {
        let info = RegionInfo::from_bytes(&region(7, 0, &[])).unwrap();
        let whole = Area { offset: 0, len: 0x4000 };
        assert_eq!(info, RegionInfo { file_offset: 0x10_0000_0000, len: 0x4000, areas: vec![whole] });
        let mappable = RegionInfo::from_bytes(&region(0xF, 32, &[3 | 1 << 16, 0])).unwrap();
        assert_eq!(mappable.areas, [whole], "the MSI-X table may be mapped with it");
        assert!(RegionInfo::from_bytes(&region(3, 0, &[])).unwrap().areas.is_empty());
    }

    #[test]
    fn a_bar_with_a_hole_has_the_areas_around_it() {
        let sparse = [1 | 1 << 16, 0, 3, 0, 0x3000, 0, 0x1000, 0, 0, 0, 0x2000, 0, 0x3000, 0, 0x9000, 0];
        let rest = [&[3 | 1 << 16, 40][..], &sparse].concat();
        let info = RegionInfo::from_bytes(&region(0xF, 32, &rest)).unwrap();
        let areas = [Area { offset: 0, len: 0x2000 }, Area { offset: 0x3000, len: 0x1000 }];
        assert_eq!(info.areas, areas, "by offset, and without the one that leaves the BAR");
    }

    #[test]
    fn address_ranges_and_the_mappings_left_are_found() {
        let head = [0, 3, 0x1000, 0, 24, 0];
        let ranges = [1 | 1 << 16, 72, 2, 0, 0, 0, 0xFEDF_FFFF, 0, 0xFEF0_0000, 0, u32::MAX, 0x7F];
        let avail = [3 | 1 << 16, 0, 65535];
        let info = IommuInfo::from_bytes(&bytes(&[&head[..], &ranges, &avail].concat())).unwrap();
        let low = IovaRange { start: 0, last: 0xFEDF_FFFF };
        let high = IovaRange { start: 0xFEF0_0000, last: 0x7F_FFFF_FFFF };
        assert_eq!(info, IommuInfo { ranges: Some(vec![low, high]), mappings_left: Some(65535) });
    }

    #[test]
    fn an_old_kernel_says_less() {
        let info = IommuInfo::from_bytes(&bytes(&[0, 1, 0x1000, 0])).unwrap();
        assert_eq!(info, IommuInfo { ranges: None, mappings_left: None });
        assert_eq!(IommuInfo::from_bytes(&[0; 7]), None);
    }

    #[test]
    fn a_chain_that_turns_back_ends() {
        let looped = region(0xF, 32, &[9, 40, 9, 32]);
        assert_eq!(Chain::new(&looped, 32).count(), 2);
        assert_eq!(Chain::new(&looped, 4096).count(), 0);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_no_area_leaves_the_region(bytes in proptest::collection::vec(any::<u8>(), 0..160)) {
            let _ = IommuInfo::from_bytes(&bytes);
            if let Some(info) = RegionInfo::from_bytes(&bytes) {
                prop_assert!(info.areas.iter().all(|area| area.offset + area.len <= info.len));
            }
        }
    }
}
