//! The model's IOMMU: which of the device's addresses are which memory; and the walk over PRPs and SGLs.

use async_nvme::access::{DmaMapping, Iova};
use hugepage_alloc::DmaRegion;
use nvme_spec::command::{SglDescriptor, psdt, sgl_sub_type, sgl_type};
use nvme_spec::{Status, SubmissionQueueEntry};
use zerocopy::{FromBytes, IntoBytes};

/// The first address given out: never 0, so that a forgotten address is caught.
const IOVA_FIRST: u64 = 0x10_0000_0000;
/// Most SGL descriptors of one command.
const SGL_DESCRIPTORS_MAX: usize = 4096;

/// Generic 1Eh: SGL Data Block Granularity Invalid.
const SGL_GRANULARITY_INVALID: Status = Status::new(0, 0x1E);

/// A piece of a command's data as the device addresses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) iova: u64,
    pub(crate) len: usize,
}

/// What the device may reach.
#[derive(Debug)]
pub(crate) struct Iommu {
    mapped: Vec<(u64, DmaRegion)>,
    next: u64,
    revoked: bool,
}

impl Iommu {
    pub(crate) const fn new() -> Self {
        Self { mapped: Vec::new(), next: IOVA_FIRST, revoked: false }
    }

    pub(crate) fn map(&mut self, region: &DmaRegion) -> Option<DmaMapping> {
        let iova = self.next;
        // A gap of 2 MiB, so that running over an end is caught.
        self.next += region.len() as u64 + (2 << 20);
        self.mapped.push((iova, region.clone()));
        DmaMapping::contiguous(region.clone(), Iova(iova))
    }

    pub(crate) fn unmap(&mut self, region: &DmaRegion) -> bool {
        let before = self.mapped.len();
        self.mapped.retain(|(_, mapped)| !mapped.is_same(region));
        self.mapped.len() < before
    }

    /// Maps a region at an address of the driver's choice. False when something is there already, or it would leave 64
    /// bits.
    pub(crate) fn map_at(&mut self, iova: u64, region: &DmaRegion) -> bool {
        let Some(last) = iova.checked_add(region.len() as u64 - 1) else { return false };
        let free = self.mapped.iter().all(|(base, other)| {
            last < *base || iova.checked_sub(*base).is_some_and(|at| at >= other.len() as u64)
        });
        if free {
            self.mapped.push((iova, region.clone()));
        }
        free
    }

    /// Ends the mapping of this very range.
    pub(crate) fn unmap_at(&mut self, iova: u64, len: u64) -> bool {
        let before = self.mapped.len();
        self.mapped.retain(|(base, region)| (*base, region.len() as u64) != (iova, len));
        self.mapped.len() < before
    }

    pub(crate) const fn set_revoked(&mut self, revoked: bool) {
        self.revoked = revoked;
    }

    /// The memory behind `len` bytes at an address: region and position.
    fn find(&self, iova: u64, len: usize) -> Option<(&DmaRegion, usize)> {
        if self.revoked {
            return None;
        }
        self.mapped.iter().find_map(|(base, region)| {
            let at = usize::try_from(iova.checked_sub(*base)?).ok()?;
            (at < region.len() && len <= region.len() - at).then_some((region, at))
        })
    }

    /// Whether the device may reach all of a range.
    pub(crate) fn holds(&self, iova: u64, len: usize) -> bool {
        self.find(iova, len).is_some()
    }

    /// The host's address of a segment, for telling which buffers may still be touched.
    pub(crate) fn host_address(&self, segment: Segment) -> Option<usize> {
        self.find(segment.iova, segment.len).map(|(region, at)| region.as_ptr().addr() + at)
    }

    pub(crate) fn read(&self, iova: u64, target: &mut [u8]) -> bool {
        self.find(iova, target.len()).is_some_and(|(region, at)| region.read(at, target))
    }

    pub(crate) fn write(&self, iova: u64, source: &[u8]) -> bool {
        self.find(iova, source.len()).is_some_and(|(region, at)| region.write(at, source))
    }

    pub(crate) fn load_u32(&self, iova: u64) -> Option<u32> {
        let (region, at) = self.find(iova, 4)?;
        region.load_u32(at)
    }

    pub(crate) fn store_u32(&self, iova: u64, word: u32) -> bool {
        self.find(iova, 4).is_some_and(|(region, at)| region.store_u32(at, word))
    }

    pub(crate) fn store_u64(&self, iova: u64, word: u64) -> bool {
        self.find(iova, 8).is_some_and(|(region, at)| region.store_u64s(at, [word]))
    }

    /// Gathers the data of a command.
    pub(crate) fn gather(&self, segments: &[Segment], data: &mut [u8]) -> Result<(), Status> {
        let mut done = 0;
        for segment in segments {
            let Some(part) = data.get_mut(done..done + segment.len) else { break };
            if !self.read(segment.iova, part) {
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            done += segment.len;
        }
        if done == data.len() { Ok(()) } else { Err(Status::DATA_TRANSFER_ERROR) }
    }

    /// Scatters the data of a command.
    pub(crate) fn scatter(&self, segments: &[Segment], data: &[u8]) -> Result<(), Status> {
        let mut rest = data;
        for segment in segments {
            let Some((part, after)) = rest.split_at_checked(segment.len.min(rest.len())) else { break };
            if !self.write(segment.iova, part) {
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            rest = after;
        }
        if rest.is_empty() { Ok(()) } else { Err(Status::DATA_TRANSFER_ERROR) }
    }

    /// The segments of a command that moves `len` bytes, by its data pointer (Base section 4.3). SGLs are taken when they
    /// have a granularity in bytes.
    pub(crate) fn segments(
        &self,
        sqe: &SubmissionQueueEntry,
        len: usize,
        page: usize,
        sgl_granularity: Option<u32>,
    ) -> Result<Vec<Segment>, Status> {
        match sqe.psdt() {
            psdt::PRP => self.prp_segments(sqe, len, page),
            psdt::SGL if sgl_granularity.is_some() => {
                let segments = self.sgl_segments(sqe.dptr, len)?;
                let unit = u64::from(sgl_granularity.unwrap_or(1));
                let fits = |part: &Segment| (part.iova | part.len as u64).is_multiple_of(unit);
                if segments.iter().all(fits) { Ok(segments) } else { Err(SGL_GRANULARITY_INVALID.with_dnr()) }
            }
            _ => Err(Status::INVALID_FIELD.with_dnr()),
        }
    }

    fn prp_segments(
        &self,
        sqe: &SubmissionQueueEntry,
        len: usize,
        page: usize,
    ) -> Result<Vec<Segment>, Status> {
        let mask = page as u64 - 1;
        let (prp1, prp2) = prps(sqe);
        if prp1 & 3 != 0 {
            return Err(Status::PRP_OFFSET_INVALID.with_dnr());
        }
        let first = len.min(page - offset_in(prp1, mask));
        let mut segments = vec![Segment { iova: prp1, len: first }];
        let mut left = len - first;
        if left == 0 {
            return Ok(segments);
        }
        if left <= page {
            if prp2 & mask != 0 {
                return Err(Status::PRP_OFFSET_INVALID.with_dnr());
            }
            segments.push(Segment { iova: prp2, len: left });
            return Ok(segments);
        }
        if prp2 & 7 != 0 {
            return Err(Status::PRP_OFFSET_INVALID.with_dnr());
        }
        let mut at = prp2;
        while left > 0 {
            let mut entry = self.list_entry(at)?;
            // The last entry of a list's page points to the next list when more than one page of data is left.
            if (at & mask) == mask - 7 && left > page {
                if entry & 7 != 0 {
                    return Err(Status::PRP_OFFSET_INVALID.with_dnr());
                }
                at = entry;
                entry = self.list_entry(at)?;
            }
            if entry & mask != 0 {
                return Err(Status::PRP_OFFSET_INVALID.with_dnr());
            }
            let part = left.min(page);
            segments.push(Segment { iova: entry, len: part });
            left -= part;
            at += 8;
        }
        Ok(segments)
    }

    fn list_entry(&self, at: u64) -> Result<u64, Status> {
        let mut bytes = [0; 8];
        if self.read(at, &mut bytes) {
            Ok(u64::from_le_bytes(bytes))
        } else {
            Err(Status::DATA_TRANSFER_ERROR)
        }
    }

    fn sgl_segments(&self, first: SglDescriptor, len: usize) -> Result<Vec<Segment>, Status> {
        let mut segments = Vec::new();
        let mut list = vec![first];
        let mut seen = 0;
        let mut left = len;
        loop {
            let mut next = None;
            let count = list.len();
            for (index, descriptor) in list.iter().enumerate() {
                seen += 1;
                if seen > SGL_DESCRIPTORS_MAX {
                    return Err(Status::INVALID_SGL_COUNT.with_dnr());
                }
                if descriptor.sub_type() != sgl_sub_type::ADDRESS {
                    return Err(Status::SGL_TYPE_INVALID.with_dnr());
                }
                let block = descriptor.length.get() as usize;
                match descriptor.sgl_type() {
                    sgl_type::DATA_BLOCK => {
                        left = left.checked_sub(block).ok_or(Status::DATA_SGL_LENGTH_INVALID.with_dnr())?;
                        segments.push(Segment { iova: descriptor.address.get(), len: block });
                    }
                    sgl_type::SEGMENT | sgl_type::LAST_SEGMENT if index + 1 == count => {
                        next = Some(*descriptor);
                    }
                    _ => return Err(Status::SGL_TYPE_INVALID.with_dnr()),
                }
            }
            let Some(pointer) = next else { break };
            list = self.sgl_list(pointer)?;
        }
        if left == 0 { Ok(segments) } else { Err(Status::DATA_SGL_LENGTH_INVALID.with_dnr()) }
    }

    fn sgl_list(&self, pointer: SglDescriptor) -> Result<Vec<SglDescriptor>, Status> {
        let bytes = pointer.length.get() as usize;
        if bytes == 0 || !bytes.is_multiple_of(16) || bytes / 16 > SGL_DESCRIPTORS_MAX {
            return Err(Status::INVALID_SGL_SEGMENT.with_dnr());
        }
        let mut list = vec![SglDescriptor::default(); bytes / 16];
        if self.read(pointer.address.get(), list.as_mut_slice().as_mut_bytes()) {
            Ok(list)
        } else {
            Err(Status::DATA_TRANSFER_ERROR)
        }
    }
}

/// PRP1 and PRP2.
pub(crate) fn prps(sqe: &SubmissionQueueEntry) -> (u64, u64) {
    let prp2 = sqe.dptr.as_bytes().get(8..16).and_then(|bytes| u64::read_from_bytes(bytes).ok());
    (sqe.dptr.address.get(), u64::from_le(prp2.unwrap_or(0)))
}

#[expect(clippy::cast_possible_truncation, reason = "below the page size")]
const fn offset_in(iova: u64, mask: u64) -> usize {
    (iova & mask) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::command::SglDescriptor;

    fn command(prp1: u64, prp2: u64) -> SubmissionQueueEntry {
        let mut sqe = SubmissionQueueEntry::default();
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&prp1.to_le_bytes());
        bytes[8..].copy_from_slice(&prp2.to_le_bytes());
        sqe.dptr = SglDescriptor::read_from_bytes(&bytes).unwrap();
        sqe
    }

    fn iommu() -> (Iommu, u64, DmaRegion) {
        let mut iommu = Iommu::new();
        let region = DmaRegion::map(4 << 20, false, false).unwrap();
        let base = iommu.map(&region).unwrap().iova(0).unwrap().0;
        (iommu, base, region)
    }

    #[test]
    fn prps_at_every_legal_offset_cover_the_data() {
        let (iommu, base, region) = iommu();
        let list = 1 << 20;
        for entry in 0..512 {
            // Pages in falling order, so that a walk by arithmetic would be wrong.
            let page = 300 - entry.min(300) as u64;
            assert!(region.store_u64s(list + entry * 8, [base + page * 4096]));
        }
        for offset in (0..4096usize).step_by(4) {
            for len in [4usize, 512, 4096, 8192, 65536] {
                let two_pages = len > 4096 - offset && len - (4096 - offset) <= 4096;
                let prp2 = if two_pages { base + 8 * 4096 } else { base + list as u64 };
                let segments = iommu.segments(&command(base + offset as u64, prp2), len, 4096, None).unwrap();
                assert_eq!(segments.iter().map(|segment| segment.len).sum::<usize>(), len);
                assert!(segments.iter().skip(1).all(|segment| segment.iova % 4096 == 0));
            }
        }
    }

    #[test]
    fn a_list_that_starts_inside_its_page_ends_with_it() {
        let (iommu, base, region) = iommu();
        // Two entries are left in the page: one for data, one that points to the next list, which has an offset too.
        let list = (1 << 20) + 4096 - 16;
        let next = (1 << 20) + 8192 + 24;
        assert!(region.store_u64s(list, [base + 4096, base + next as u64]));
        assert!(region.store_u64s(next, [base + 3 * 4096, base + 5 * 4096]));
        let segments = iommu.segments(&command(base, base + list as u64), 4 * 4096, 4096, None).unwrap();
        let pages: Vec<_> = segments.iter().map(|segment| (segment.iova - base) / 4096).collect();
        assert_eq!(pages, [0, 1, 3, 5]);
    }

    #[test]
    fn wrong_offsets_are_refused() {
        let (iommu, base, _region) = iommu();
        let refused =
            |prp1, prp2, len| iommu.segments(&command(prp1, prp2), len, 4096, None).unwrap_err().code();
        assert_eq!(refused(base + 2, 0, 512), Status::PRP_OFFSET_INVALID);
        assert_eq!(refused(base, base + 4096 + 8, 8192), Status::PRP_OFFSET_INVALID);
        assert_eq!(refused(base, base + 4096 + 4, 12288), Status::PRP_OFFSET_INVALID);
        assert_eq!(refused(base, 0, 12288), Status::DATA_TRANSFER_ERROR);
    }

    #[test]
    fn mappings_of_the_drivers_choice_do_not_overlap() {
        let mut iommu = Iommu::new();
        let region = DmaRegion::map(1, false, false).unwrap();
        let len = region.len() as u64;
        assert!(iommu.map_at(0x10_0000, &region));
        for taken in [0x10_0000, 0x10_0000 + len - 4096, 0x10_0000 - 4096, 0] {
            assert!(!iommu.map_at(taken, &region), "{taken:#x}");
        }
        assert!(!iommu.map_at(u64::MAX - 4095, &region));
        assert!(iommu.map_at(0x10_0000 + len, &region));
        assert!(!iommu.unmap_at(0x10_0000, len - 4096) && !iommu.unmap_at(0x11_0000, len));
        assert!(iommu.unmap_at(0x10_0000, len) && !iommu.unmap_at(0x10_0000, len));
        assert!(!iommu.read(0x10_0000, &mut [0; 4]) && iommu.read(0x10_0000 + len, &mut [0; 4]));
    }

    #[test]
    fn sgls_must_name_the_very_length() {
        let (iommu, base, region) = iommu();
        let with = |dptr| SubmissionQueueEntry { flags: 0x40, dptr, ..Default::default() };
        let block = SglDescriptor::of(0, 0, base + 3, 512);
        assert_eq!(
            iommu.segments(&with(block), 512, 4096, Some(1)).unwrap(),
            [Segment { iova: base + 3, len: 512 }]
        );
        let refused = iommu.segments(&with(block), 512, 4096, Some(4)).unwrap_err();
        assert_eq!(refused.code(), SGL_GRANULARITY_INVALID);
        assert!(iommu.segments(&with(block), 1024, 4096, Some(1)).is_err());
        assert!(iommu.segments(&with(block), 256, 4096, Some(1)).is_err());
        assert!(iommu.segments(&with(block), 512, 4096, None).is_err());
        let list = [SglDescriptor::of(0, 0, base, 256), SglDescriptor::of(0, 0, base + 8192, 256)];
        assert!(region.write(4096, list.as_slice().as_bytes()));
        let pointer = SglDescriptor::of(sgl_type::LAST_SEGMENT, 0, base + 4096, 32);
        assert_eq!(iommu.segments(&with(pointer), 512, 4096, Some(1)).unwrap().len(), 2);
        // A list that points to itself ends.
        let loops = SglDescriptor::of(sgl_type::SEGMENT, 0, base + 4096, 16);
        assert!(region.write(4096, loops.as_bytes()));
        assert!(iommu.segments(&with(loops), 512, 4096, Some(1)).is_err());
    }
}
