//! What the tests of ring and block share.

use fastice::ring::{Ring, RingOptions};
use hugepage_alloc::{BufferPool, PoolOptions};

/// A pool of ordinary memory.
pub(crate) fn pool(mib: usize) -> BufferPool {
    let options = PoolOptions { bytes: mib << 20, prefer_huge: false, lock: false };
    BufferPool::new(&options).expect("a few MiB of memory")
}

/// A ring of modest size.
pub(crate) fn ring() -> Ring {
    Ring::new(&RingOptions { sq_entries: 16, slots: 128, files: 8, ..RingOptions::default() })
        .expect("io_uring")
}
