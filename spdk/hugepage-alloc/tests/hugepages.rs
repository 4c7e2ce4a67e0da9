//! Real huge pages: reserves some, uses them, and puts the reservation back. In a binary of its own, for the
//! reservation is the machine's.

use std::fs;

use hugepage_alloc::{Backing, BufferPool, PoolOptions};

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Puts the reservation back, also when the test fails.
struct Restore(usize);

impl Drop for Restore {
    fn drop(&mut self) {
        if let Err(error) = fs::write(NR_HUGEPAGES, self.0.to_string()) {
            eprintln!("{NR_HUGEPAGES} could not be set back to {}: {error}", self.0);
        }
    }
}

fn reserved() -> Option<usize> {
    fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse().ok()
}

fn free() -> usize {
    let meminfo = fs::read_to_string("/proc/meminfo").expect("procfs");
    let line =
        meminfo.lines().find(|line| line.starts_with("HugePages_Free:")).expect("hugetlb in the kernel");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

#[test]
fn a_pool_takes_huge_pages_when_there_are_any() {
    let Some(before) = reserved() else {
        eprintln!("SKIPPED: this kernel has no huge pages ({NR_HUGEPAGES} is missing)");
        return;
    };
    if fs::write(NR_HUGEPAGES, (before + 4).to_string()).is_err() {
        eprintln!("SKIPPED: {NR_HUGEPAGES} cannot be written; run as root");
        return;
    }
    let _restore = Restore(before);
    if reserved() != Some(before + 4) || free() < 4 {
        eprintln!("SKIPPED: the kernel cannot supply 4 huge pages (memory is fragmented or short)");
        return;
    }
    let free_before = free();
    let pool =
        BufferPool::new(&PoolOptions { bytes: 4 * (2 << 20), ..PoolOptions::default() }).expect("a pool");
    assert_eq!(pool.backing(), Backing::HugePages2M, "{:?}", pool.notice());
    assert_eq!(pool.notice(), None);
    assert_eq!(free(), free_before - 4, "the pages are taken now, not on first touch");

    let buf = pool.alloc(2 << 20).expect("an empty pool");
    assert_eq!(buf.as_ptr().addr() % (2 << 20), 0);
    buf.write_from((2 << 20) - 4, b"last");

    let second = BufferPool::new(&PoolOptions { bytes: (free() + 1) * (2 << 20), ..PoolOptions::default() })
        .expect("ordinary pages");
    assert_ne!(second.backing(), Backing::HugePages2M);
    drop((buf, pool));
    assert_eq!(free(), free_before, "a dropped pool gives its pages back");
}
