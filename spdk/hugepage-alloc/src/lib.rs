//! Hugepage memory for direct I/O, and pools of buffers in it.
//!
//! ```text
//!   Region      one mapping: 2 MiB huge pages, else ordinary memory, locked when the limit allows
//!     |
//!   BufferPool  one core's. 2 MiB pages, each carved on demand into buffers of one size class
//!     |           page 0 [4K|4K|4K|...]   page 1 [64K|64K|...]   page 2 (free)   page 3 [2M]
//!   DmaBuf      a slice of a buffer; counts its clones, the last one gives the buffer back
//!
//!   DmaRegion     a region with several owners, among them the device it is mapped for; checked copies and words
//!   SharedMemory  one mapping that all cores copy from and to: what stands behind a memory disk
//! ```
//!
//! A device or the kernel writes into this memory whenever it likes, so no Rust reference to it exists, not even
//! inside this crate: bytes are copied in and out through raw pointers.
//!
//! After [`BufferPool::new`] nothing here allocates, locks or calls the kernel. A pool and its buffers stay on
//! one thread (`!Send`); their counts are plain cells.
//!
//! What it does not do: physical addresses and IOMMU mappings (a driver takes
//! [`BufferPool::dma_regions`] and maps them), buffers above 2 MiB, pools that grow.

mod buf;
mod dma;
mod pool;
mod region;
mod shared;

pub use buf::DmaBuf;
pub use dma::DmaRegion;
pub use pool::{BufferPool, PoolOptions, PoolStats};
pub use region::{Backing, Region};
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
