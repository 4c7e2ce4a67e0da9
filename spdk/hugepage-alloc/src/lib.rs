//! Hugepage memory for direct I/O and DMA, pools of buffers in it, and the addresses by which devices reach it.
//!
//! ```text
//!   Region      one mapping: 1 GiB or 2 MiB huge pages, else ordinary memory, locked when the limit allows
//!     |
//!   BufferPool  one core's. 2 MiB pages, each carved on demand into buffers of one size class
//!     |           page 0 [4K|4K|4K|...]   page 1 [64K|64K|...]   page 2 (free)   page 3 [2M]
//!   DmaBuf      a slice of a buffer; counts its clones, the last one gives the buffer back
//!
//!   DmaRegion      a region with several owners, among them the device it is mapped for; checked copies and words
//!   SharedMemory   one mapping that all cores copy from and to: what stands behind a memory disk
//!   IovaAllocator  which addresses of a device's address space are free, behind an IOMMU
//!   physical       where huge pages lie in physical memory, for devices without an IOMMU: dangerous, by consent only
//!   numa_nodes, HugePageCounts   what the host has
//!   prefetch       a hint to the caches, for any memory
//! ```
//!
//! A device or the kernel writes into this memory whenever it likes, so no Rust reference to it exists, not even
//! inside this crate: bytes are copied in and out through raw pointers. Memory stays mapped as long as anybody holds
//! it: a buffer holds its pool's regions, and whatever maps a region for a device holds a [`DmaRegion`] of it.
//!
//! After [`BufferPool::new`] nothing here allocates, locks or calls the kernel. A pool and its buffers stay on
//! one thread (`!Send`); their counts are plain cells.
//!
//! ```
//! use hugepage_alloc::{BufferPool, Pages, RegionOptions};
//!
//! # fn main() -> Result<(), hugepage_alloc::AllocError> {
//! // 2 MiB pages when there are any, else locked ordinary ones, and a word about it.
//! let options = RegionOptions { pages: Pages::Huge2M, share: true, ..RegionOptions::default() };
//! let pool = BufferPool::with_options(8 << 20, &options)?;
//! if let Some(notice) = pool.notice() {
//!     eprintln!("{notice}");
//! }
//! let buf = pool.alloc(4096).expect("an empty pool");
//! buf.write_from(0, b"for a device");
//! for region in pool.dma_regions() {
//!     // What a software device in another process needs in order to map it.
//!     let (_file, _offset) = region.file().expect("asked for");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What it does not do: IOMMU mappings themselves (a driver takes [`BufferPool::dma_regions`] and maps them), buffers
//! above 2 MiB, pools that grow, other huge page sizes than those of `x86_64`.

mod buf;
mod cache;
mod dma;
mod host;
mod iova;
mod mapping;
pub mod physical;
mod pool;
mod region;
mod shared;

pub use buf::DmaBuf;
pub use cache::prefetch;
pub use dma::DmaRegion;
pub use host::{HugePageCounts, numa_nodes};
pub use iova::{IOVA_GRANULE, IovaAllocator};
pub use mapping::PeerFileError;
pub use pool::{BufferPool, PoolOptions, PoolStats};
pub use region::{Backing, Pages, Region, RegionOptions};
pub use shared::SharedMemory;

/// The alignment of every buffer, in bytes.
pub const BUFFER_ALIGN: usize = 4096;
/// The largest buffer, in bytes: one huge page.
pub const BUFFER_LEN_MAX: usize = 2 << 20;

/// Why memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum AllocError {
    /// A size of zero, or one that address arithmetic cannot hold.
    #[error("cannot map {bytes} bytes: ask for at least 1 and at most 1 TiB")]
    BadSize {
        /// The size asked for.
        bytes: usize,
    },
    /// More than is free. The kernel would grant it and then kill processes, not always ours.
    #[error("{bytes} bytes of memory are wanted and {available} are available: ask for less, or free some")]
    NoRoom {
        /// The size asked for.
        bytes: usize,
        /// What the host can give without taking it from others.
        available: usize,
    },
    /// Options that contradict each other.
    #[error("{why}")]
    BadOptions {
        /// What is wrong, and what to do.
        why: &'static str,
    },
    /// Huge pages were demanded, and are not to be had.
    #[error("{why}")]
    NoHugePages {
        /// Which, why not, and what to do.
        why: String,
    },
    /// The host has no such NUMA node, or none with memory.
    #[error("memory of NUMA node {node} cannot be had: name one of /sys/devices/system/node/has_memory")]
    Node {
        /// The node asked for.
        node: u32,
        /// What the kernel said.
        #[source]
        source: rustix::io::Errno,
    },
    /// Neither huge nor ordinary pages could be mapped.
    #[error("mapping {bytes} bytes of memory failed: free memory or configure a smaller pool")]
    Map {
        /// The size of the mapping.
        bytes: usize,
        /// What the kernel said.
        #[source]
        source: rustix::io::Errno,
    },
}
