//! Physical addresses, for a device without an IOMMU before it. **Dangerous**: read this page first.
//!
//! A device that is told physical addresses can write to *any* memory of the host: a wrong address, a stale
//! command, a broken or hostile device overwrites the kernel or another process, and nothing stops it. There is no
//! way to cut such a device off but its own good will. Behind an IOMMU use [`crate::IovaAllocator`] and map.
//!
//! Only huge pages have addresses here: ordinary pages, locked or not, are moved by the kernel whenever it likes
//! (compaction), and the device would go on writing to where they were. Huge pages of hugetlbfs stay where they are
//! in normal running, but not by promise: taking memory out of the host, `migrate_pages(2)`, reserving 1 GiB pages
//! on a running system, and CMA may move them. [`PhysicalRegion::is_unmoved`] tells afterwards, no earlier.
//!
//! The kernel shows page frames only to a process with `CAP_SYS_ADMIN`; to others they read as 0
//! (kernel, `Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::{BUFFER_LEN_MAX, DmaRegion};

const PAGEMAP: &str = "/proc/self/pagemap";
/// The page that `pagemap` counts in, in bytes.
const FRAME_LEN: u64 = 4096;
/// Frames of a 2 MiB page.
const FRAMES: usize = BUFFER_LEN_MAX / 4096;
/// Bit 63: the page is present.
const PRESENT: u64 = 1 << 63;
/// Bits 0 to 54: the page frame number.
const FRAME_MASK: u64 = (1 << 55) - 1;

/// Why a region has no physical addresses that a device may use.
#[derive(Debug, thiserror::Error)]
pub enum PhysicalError {
    /// Its pages are no huge pages.
    #[error("the memory is of {backing}: the kernel may move them; reserve huge pages")]
    NotHuge {
        /// What they are.
        backing: crate::Backing,
    },
    /// The kernel keeps page frames secret from this process.
    #[error("page frames are hidden from this process: run it with CAP_SYS_ADMIN")]
    Hidden,
    /// A page is not in memory.
    #[error("the page at {offset} of the region is not in memory")]
    NotPresent {
        /// Its position in the region in bytes.
        offset: usize,
    },
    /// A huge page that is none: its frames do not follow each other.
    #[error("the 2 MiB at {offset} of the region are not contiguous in physical memory")]
    Scattered {
        /// Their position in the region in bytes.
        offset: usize,
    },
    /// `pagemap` cannot be read.
    #[error("reading {PAGEMAP} failed")]
    Io(#[from] std::io::Error),
}

/// Says that whoever made it knows what a device without an IOMMU can do.
///
/// Make it where an operator has chosen so, such as a configuration key with `unsafe` in its name; never by default.
#[derive(Clone, Copy, Debug)]
pub struct UnsafeWithoutIommu(());

impl UnsafeWithoutIommu {
    /// The device may overwrite any memory of the host, and that is accepted.
    #[must_use]
    pub const fn accept_that_the_device_can_write_anywhere() -> Self {
        Self(())
    }
}

/// A region with the physical address of each of its 2 MiB. It keeps the region mapped.
#[derive(Clone, Debug)]
pub struct PhysicalRegion {
    region: DmaRegion,
    parts: Box<[u64]>,
}

impl PhysicalRegion {
    /// Looks up where the region lies in physical memory.
    ///
    /// # Errors
    /// When it is not of huge pages, when a page is not present, or when the kernel does not tell.
    pub fn look_up(region: &DmaRegion, _: UnsafeWithoutIommu) -> Result<Self, PhysicalError> {
        Ok(Self { region: region.clone(), parts: parts(region)?.into() })
    }

    /// The region.
    #[must_use]
    pub const fn region(&self) -> &DmaRegion {
        &self.region
    }

    /// The physical address of each 2 MiB, all of them multiples of 2 MiB. They need not follow each other.
    #[must_use]
    pub fn parts(&self) -> &[u64] {
        &self.parts
    }

    /// Whether all pages are still where they were. If not, the device may have written to memory of others since.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn is_unmoved(&self) -> Result<bool, PhysicalError> {
        Ok(*self.parts == *parts(&self.region)?)
    }
}

fn parts(region: &DmaRegion) -> Result<Vec<u64>, PhysicalError> {
    if !region.backing().is_huge() {
        return Err(PhysicalError::NotHuge { backing: region.backing() });
    }
    let pagemap = File::open(PAGEMAP)?;
    let mut parts = Vec::with_capacity(region.len() / BUFFER_LEN_MAX);
    let mut entries = [0; FRAMES * 8];
    for offset in (0..region.len()).step_by(BUFFER_LEN_MAX) {
        let address = (region.as_ptr().addr() + offset) as u64;
        pagemap.read_exact_at(&mut entries, address / FRAME_LEN * 8)?;
        parts.push(part(&entries, offset)?);
    }
    Ok(parts)
}

/// The address of 2 MiB, by their `pagemap` entries.
fn part(entries: &[u8; FRAMES * 8], offset: usize) -> Result<u64, PhysicalError> {
    let mut first = 0;
    let (words, _) = entries.as_chunks::<8>();
    for ((index, at), word) in (0u64..).zip((0..).step_by(4096)).zip(words) {
        let entry = u64::from_ne_bytes(*word);
        if entry & PRESENT == 0 {
            return Err(PhysicalError::NotPresent { offset: offset + at });
        }
        let frame = entry & FRAME_MASK;
        if frame == 0 {
            return Err(PhysicalError::Hidden);
        }
        if index == 0 {
            first = frame;
        }
        if frame != first + index || first % FRAMES as u64 != 0 {
            return Err(PhysicalError::Scattered { offset });
        }
    }
    first.checked_mul(FRAME_LEN).ok_or(PhysicalError::Scattered { offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(frame: impl Fn(u64) -> u64) -> [u8; FRAMES * 8] {
        let mut entries = [0; FRAMES * 8];
        for (index, word) in (0u64..).zip(entries.as_chunks_mut::<8>().0) {
            *word = frame(index).to_ne_bytes();
        }
        entries
    }

    #[test]
    fn a_huge_page_has_the_address_of_its_first_frame() {
        // Other flag bits (soft-dirty, exclusive, file page) do not matter.
        let entries = entries(|index| PRESENT | 1 << 55 | 1 << 61 | (0x12_3400 + index));
        assert_eq!(part(&entries, 0).unwrap(), 0x1_2340_0000);
    }

    #[test]
    fn what_is_no_huge_page_in_memory_has_no_address() {
        assert!(matches!(part(&entries(|_| PRESENT), 0), Err(PhysicalError::Hidden)));
        assert!(matches!(
            part(&entries(|index| if index == 3 { 0x200 } else { PRESENT | (0x200 + index) }), 2 << 20),
            Err(PhysicalError::NotPresent { offset }) if offset == (2 << 20) + 3 * 4096
        ));
        assert!(matches!(
            part(&entries(|index| PRESENT | (0x200 + (index ^ 1))), 0),
            Err(PhysicalError::Scattered { offset: 0 })
        ));
        assert!(matches!(
            part(&entries(|index| PRESENT | (0x201 + index)), 0),
            Err(PhysicalError::Scattered { .. })
        ));
        let top = entries(|index| PRESENT | (FRAME_MASK - 511 + index));
        assert!(part(&top, 0).is_err(), "no such address");
    }

    #[test]
    fn ordinary_pages_are_refused_locked_or_not() {
        for lock in [false, true] {
            let region = DmaRegion::map(1, false, lock).unwrap();
            let sure = UnsafeWithoutIommu::accept_that_the_device_can_write_anywhere();
            assert!(matches!(PhysicalRegion::look_up(&region, sure), Err(PhysicalError::NotHuge { .. })));
        }
    }
}
