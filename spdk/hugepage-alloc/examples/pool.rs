//! A pool of huge pages, its buffers, and the addresses that a device would use.
//!
//! `cargo run -p hugepage-alloc --example pool`, better after `sysctl vm.nr_hugepages=8`.
#![expect(clippy::print_stdout, reason = "an example that shows what it got")]

use hugepage_alloc::{BufferPool, HugePageCounts, IovaAllocator, Pages, RegionOptions, numa_nodes};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for node in numa_nodes() {
        let counts = HugePageCounts::read(Pages::Huge2M, Some(node));
        println!("node {node}: 2 MiB pages {counts:?}");
    }

    let options = RegionOptions { pages: Pages::Huge2M, share: true, ..RegionOptions::default() };
    let pool = BufferPool::with_options(8 << 20, &options)?;
    println!("pool of {} bytes: {}", pool.stats().bytes_total, pool.backing());
    if let Some(notice) = pool.notice() {
        println!("notice: {notice}");
    }

    // What an IOMMU allows: all of 48 bits but the window of interrupts.
    let mut iova = IovaAllocator::new(&[(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)]);
    for region in pool.dma_regions() {
        let at = iova.allocate(region.len() as u64, 2 << 20).ok_or("no addresses left")?;
        println!("region at {:p} on node {:?}: device address {at:#x}", region.as_ptr(), region.node());
    }

    let buf = pool.alloc(8192).ok_or("the pool is empty")?;
    buf.write_from(0, b"frozen and held fast");
    let tail = buf.slice(11, 9);
    let mut bytes = [0; 9];
    tail.read_into(0, &mut bytes);
    println!("{:?} in region {} at {}", str::from_utf8(&bytes)?, tail.region_index(), tail.region_offset());
    Ok(())
}
