//! How a controller is reached: its registers, its way to memory, its interrupts, its reset.
//!
//! ```text
//!   driver --- read32/write32 ---> BAR 0: properties, doorbells
//!          --- dma_map ----------> a region gets addresses that the device may use
//!          --- dma_revoke -------> ... and loses them all
//!          --- function_reset ---> for a controller that no longer answers its own reset
//!          --- interrupt_attach -> an eventfd for each vector
//!          --- config_read32 ----> PCI configuration space
//! ```
//!
//! One trait; what stands behind it may be a PCI function given to user space, a process at the other end of a
//! socket, or a controller in software in this process. The driver holds no other way to the device.

use std::fmt;
use std::os::fd::BorrowedFd;

use hugepage_alloc::{BUFFER_LEN_MAX, DmaRegion};

/// An address as the device uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

/// A region that a device may reach.
///
/// Each 2 MiB of the region is contiguous to the device; the parts need not follow each other (without an IOMMU
/// they are wherever the huge pages are).
#[derive(Clone, Debug)]
pub struct DmaMapping {
    region: DmaRegion,
    /// The address of each 2 MiB.
    parts: Box<[u64]>,
}

impl DmaMapping {
    /// A region whose addresses follow each other from `iova`. `None` when they would leave 64 bits.
    #[must_use]
    pub fn contiguous(region: DmaRegion, iova: Iova) -> Option<Self> {
        iova.0.checked_add(region.len() as u64)?;
        let parts = (0..region.len()).step_by(BUFFER_LEN_MAX).map(|at| iova.0 + at as u64).collect();
        Some(Self { region, parts })
    }

    /// A region with an address for each 2 MiB. `None` when the number of addresses is another, or when one of
    /// them is no multiple of 4096.
    #[must_use]
    pub fn by_part(region: DmaRegion, parts: Vec<Iova>) -> Option<Self> {
        let fits = parts.len() * BUFFER_LEN_MAX == region.len();
        let aligned = parts.iter().all(|part| part.0 % 4096 == 0 && part.0.checked_add(2 << 20).is_some());
        (fits && aligned).then(|| Self { region, parts: parts.iter().map(|part| part.0).collect() })
    }

    /// The region.
    #[must_use]
    pub const fn region(&self) -> &DmaRegion {
        &self.region
    }

    /// The highest address of any byte of the region.
    #[must_use]
    pub fn iova_max(&self) -> Iova {
        Iova(self.parts.iter().map(|part| part.saturating_add(BUFFER_LEN_MAX as u64 - 1)).max().unwrap_or(0))
    }

    /// Whether the `len` bytes from `offset` follow each other for the device, as a queue must.
    #[must_use]
    pub fn is_contiguous(&self, offset: usize, len: usize) -> bool {
        let end = offset.saturating_add(len.max(1) - 1);
        let parts = self.parts.get(offset / BUFFER_LEN_MAX..=end / BUFFER_LEN_MAX);
        parts.is_some_and(|parts| {
            parts.windows(2).all(|pair| pair[0].checked_add(BUFFER_LEN_MAX as u64) == Some(pair[1]))
        })
    }

    /// The device's address of the byte at `offset` in the region, `None` behind its end. Holds for the bytes up
    /// to the next multiple of 2 MiB.
    #[must_use]
    pub fn iova(&self, offset: usize) -> Option<Iova> {
        let part = self.parts.get(offset / BUFFER_LEN_MAX)?;
        Some(Iova(part + (offset % BUFFER_LEN_MAX) as u64))
    }
}

/// Why the way to a device refused something.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// This way to the device cannot do that at all.
    #[error("{what} is not possible through {name}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// The name of the access.
        name: String,
    },
    /// The device is no longer there.
    #[error("{name} is gone")]
    Gone {
        /// The name of the access.
        name: String,
    },
    /// An argument that the device does not have: an offset, a vector, a region.
    #[error("{name} has no {what}")]
    NoSuch {
        /// What was named.
        what: String,
        /// The name of the access.
        name: String,
    },
    /// The kernel or the other process refused.
    #[error("{what} of {name} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The name of the access.
        name: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

/// The way to one controller.
///
/// Register accesses are single loads and stores of their width that the compiler neither merges nor reorders; a
/// write is ordered after every earlier write to memory that the device can read. They cannot fail: a device that
/// is gone reads as all ones and ignores writes, as PCI Express has it, and so does an offset outside the BAR.
pub trait Access: Send + Sync + fmt::Debug {
    /// What to call the device in messages, such as its PCI address.
    fn name(&self) -> &str;

    /// The length of BAR 0 in bytes.
    fn bar_len(&self) -> u64;

    /// Reads four bytes of BAR 0.
    fn read32(&self, offset: u32) -> u32;

    /// Writes four bytes of BAR 0.
    fn write32(&self, offset: u32, value: u32);

    /// Reads eight bytes of BAR 0; as two halves, the lower first, where the way has no wider access.
    fn read64(&self, offset: u32) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset.saturating_add(4))) << 32
    }

    /// Writes eight bytes of BAR 0; as two halves, the lower first, where the way has no wider access.
    #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
    fn write64(&self, offset: u32, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset.saturating_add(4), (value >> 32) as u32);
    }

    /// Lets the device reach a region. The access keeps the region alive until it is unmapped or the access itself
    /// ends with the device unable to reach it.
    ///
    /// # Errors
    /// When the region cannot be mapped, with what to do about it in the source.
    fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError>;

    /// Ends a mapping: the device can no longer reach the region when this returns.
    ///
    /// # Errors
    /// When it is none of this access, or the kernel refused; then it still stands.
    fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError>;

    /// Cuts the device off from all memory at once, whatever state it is in: by ending all mappings, or by bus
    /// mastering off and read back. When this returns Ok, nothing the device does can reach memory until
    /// [`Access::dma_restore`]. Must not rely on the controller's co-operation.
    ///
    /// # Errors
    /// When that could not be made sure of.
    fn dma_revoke(&self) -> Result<(), AccessError>;

    /// Undoes [`Access::dma_revoke`]: the mappings made before hold again, at the same addresses.
    ///
    /// # Errors
    /// When the device cannot be let back.
    fn dma_restore(&self) -> Result<(), AccessError>;

    /// Resets the function from outside (FLR or better). When this returns Ok, no DMA of before is still under way.
    ///
    /// # Errors
    /// When there is no such reset, or it failed.
    fn function_reset(&self) -> Result<(), AccessError>;

    /// Reads four bytes of PCI configuration space; `offset` is a multiple of 4.
    ///
    /// # Errors
    /// When the offset is not there.
    fn config_read32(&self, offset: u16) -> Result<u32, AccessError>;

    /// How many interrupt vectors there are; 0 when only polling works.
    fn interrupts_max(&self) -> u16 {
        0
    }

    /// Signals `eventfd` on interrupt `vector` from now on. The access duplicates the descriptor. An eventfd attached
    /// before is replaced.
    ///
    /// # Errors
    /// When there is no such vector, or no interrupts at all.
    fn interrupt_attach(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), AccessError> {
        let _ = (vector, eventfd);
        Err(AccessError::Unsupported { what: "an interrupt", name: self.name().to_owned() })
    }

    /// Ends what [`Access::interrupt_attach`] began: the vector is masked, so that a queue that is polled costs nobody
    /// an interrupt. One that would have been raised meanwhile may be signalled at the next attach, or never: whoever
    /// attaches looks at the queue after it.
    ///
    /// # Errors
    /// When there is no such vector, or this way cannot mask one; then it goes on being signalled.
    fn interrupt_detach(&self, vector: u16) -> Result<(), AccessError> {
        let _ = vector;
        Err(AccessError::Unsupported { what: "masking an interrupt", name: self.name().to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_the_parts() {
        let region = DmaRegion::map(4 << 20, false, false).unwrap();
        let mapping =
            DmaMapping::by_part(region.clone(), vec![Iova(0x4000_0000), Iova(0x1000_0000)]).unwrap();
        assert_eq!(mapping.iova(0x1234), Some(Iova(0x4000_1234)));
        assert_eq!(mapping.iova((2 << 20) + 8), Some(Iova(0x1000_0008)));
        assert_eq!(mapping.iova(4 << 20), None);
        assert!(mapping.is_contiguous(0, 2 << 20) && mapping.is_contiguous(2 << 20, 2 << 20));
        assert!(!mapping.is_contiguous(0, (2 << 20) + 1) && !mapping.is_contiguous(4096, 4 << 20));
        assert!(DmaMapping::by_part(region.clone(), vec![Iova(0)]).is_none());
        assert!(DmaMapping::by_part(region.clone(), vec![Iova(0), Iova(100)]).is_none());
        assert!(DmaMapping::contiguous(region.clone(), Iova(u64::MAX - 4096)).is_none());
        let mapping = DmaMapping::contiguous(region, Iova(0x10_0000)).unwrap();
        assert!(mapping.is_contiguous(4096, (4 << 20) - 4096) && !mapping.is_contiguous(4096, 4 << 20));
        assert_eq!(mapping.iova((2 << 20) + 1), Some(Iova(0x30_0001)));
    }
}
