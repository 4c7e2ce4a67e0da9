//! Real huge pages: reserves some, uses them, and puts the reservation back. The reservation is the machine's, so
//! these tests take turns, also with other processes that run them. Other tests take huge pages where they find any: so
//! some more are reserved, and what is counted is what this process has.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use hugepage_alloc::physical::{PhysicalError, PhysicalRegion, UnsafeWithoutIommu};
use hugepage_alloc::{
    AllocError, Backing, BufferPool, DmaRegion, HugePageCounts, Pages, PoolOptions, RegionOptions, numa_nodes,
};

const MIB: usize = 1 << 20;
/// Pages of 2 MiB for other tests that run at the same time.
const FOR_OTHERS: usize = 16;

/// Some more huge pages than there were; put back on drop, also when the test fails.
struct Reservation {
    pages: Pages,
    before: usize,
    _turn: File,
}

impl Reservation {
    /// `None`, and a word about it, when the host cannot supply them.
    fn take(test: &str, pages: Pages, count: usize) -> Option<Self> {
        let skipped = |why: &str| {
            eprintln!("SKIPPED: {test}: {why}");
            None
        };
        let turn = File::create(std::env::temp_dir().join("hugepage-alloc-tests.lock")).expect("a lock file");
        turn.lock().expect("a lock");
        let Some(before) = HugePageCounts::read(pages, None) else {
            return skipped(&format!("this kernel has no huge pages of {} bytes", pages.len()));
        };
        // Without those that stay only as long as somebody has them.
        let before_count = before.total.saturating_sub(before.surplus);
        let more = if pages == Pages::Huge2M { count + FOR_OTHERS } else { count };
        if fs::write(nr_hugepages(pages), (before_count + more).to_string()).is_err() {
            return skipped("the number of huge pages cannot be written; run as root");
        }
        let reservation = Self { pages, before: before_count, _turn: turn };
        let now = HugePageCounts::read(pages, None).expect("read before");
        if now.total < before_count + more || now.free < count {
            return skipped("the kernel cannot supply the huge pages (memory is fragmented or short)");
        }
        Some(reservation)
    }
}

/// Bytes of huge pages that this process has mapped.
fn mapped() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("HugetlbPages:")).expect("huge pages");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Err(error) = fs::write(nr_hugepages(self.pages), self.before.to_string()) {
            eprintln!("huge pages could not be set back to {}: {error}", self.before);
        }
    }
}

fn nr_hugepages(pages: Pages) -> PathBuf {
    HugePageCounts::directory(pages, None).expect("huge pages").join("nr_hugepages")
}

fn strict(pages: Pages) -> RegionOptions {
    RegionOptions { pages, fallback: false, ..RegionOptions::default() }
}

#[test]
fn a_pool_takes_huge_pages_when_there_are_any() {
    let Some(_host) = Reservation::take("a_pool_takes_huge_pages_when_there_are_any", Pages::Huge2M, 4)
    else {
        return;
    };
    let pool = BufferPool::new(&PoolOptions { bytes: 8 * MIB, ..PoolOptions::default() }).expect("a pool");
    assert_eq!(pool.backing(), Backing::HugePages2M, "{:?}", pool.notice());
    assert_eq!(pool.notice(), None);
    assert_eq!(mapped(), 8 * MIB, "the pages are taken now, not on first touch");

    let buf = pool.alloc(2 << 20).expect("an empty pool");
    assert_eq!(buf.as_ptr().addr() % (2 << 20), 0);
    buf.write_from((2 << 20) - 4, b"last");

    let total = HugePageCounts::read(Pages::Huge2M, None).expect("read before").total;
    let bytes = (total + 1) * (2 << 20);
    let second = BufferPool::new(&PoolOptions { bytes, ..PoolOptions::default() }).expect("ordinary pages");
    assert!(!second.backing().is_huge());
    let refused = DmaRegion::with_options(bytes, &strict(Pages::Huge2M));
    let Err(AllocError::NoHugePages { why }) = refused else { panic!("{refused:?}") };
    assert!(why.contains("vm.nr_hugepages"), "{why}");
    drop((buf, pool));
    assert_eq!(mapped(), 0, "a dropped pool gives its pages back");
}

#[test]
fn shared_huge_pages_are_the_same_memory_through_their_file() {
    let test = "shared_huge_pages_are_the_same_memory_through_their_file";
    let Some(_host) = Reservation::take(test, Pages::Huge2M, 2) else { return };
    let options = RegionOptions { share: true, ..strict(Pages::Huge2M) };
    let region = DmaRegion::with_options(4 * MIB, &options).expect("reserved");
    assert_eq!(region.backing(), Backing::HugePages2M);
    assert_eq!(mapped(), 4 * MIB);
    let (file, offset) = region.file().expect("asked for");
    assert_eq!(offset, 0);
    let file = file.try_clone_to_owned().expect("a descriptor");
    let second =
        DmaRegion::from_file(file.try_clone().expect("one more"), 2 << 20, 2 << 20, true).expect("same file");
    assert!(region.write((2 << 20) + 5, b"through both"));
    let mut bytes = [0; 12];
    assert!(second.read(5, &mut bytes));
    assert_eq!(&bytes, b"through both");
    assert!(
        DmaRegion::from_file(file, 4096, 2 << 20, true).is_err(),
        "an offset that is no multiple of the huge page"
    );
    drop(region);
    assert!(second.read(5, &mut bytes), "the memory lives as long as anybody has it");
    drop(second);
    assert_eq!(mapped(), 0);
}

#[test]
fn pages_of_1_gib_are_taken_whole() {
    let Some(_host) = Reservation::take("pages_of_1_gib_are_taken_whole", Pages::Huge1G, 1) else { return };
    let pool = BufferPool::with_options(1, &strict(Pages::Huge1G)).expect("reserved");
    assert_eq!(pool.backing(), Backing::HugePages1G);
    assert_eq!(pool.stats().bytes_total, 1 << 30);
    assert_eq!(mapped(), 1 << 30);
    let region = pool.dma_regions().next().expect("one").clone();
    assert_eq!(region.as_ptr().addr() % (1 << 30), 0);
    if let Some(physical) = look_up(&region, "pages_of_1_gib_are_taken_whole") {
        let first = physical.parts()[0];
        assert_eq!(first % (1 << 30), 0);
        let expected: Vec<u64> = (0..512).map(|part| first + (part << 21)).collect();
        assert_eq!(physical.parts(), expected, "1 GiB is contiguous");
    }
    drop(pool);
    assert_eq!(mapped(), 1 << 30, "the region outlives the pool");
    drop(region);
    assert_eq!(mapped(), 0);
    let shared = DmaRegion::with_options(1, &RegionOptions { share: true, ..strict(Pages::Huge1G) });
    assert_eq!(shared.expect("given back").len(), 1 << 30);
}

#[test]
fn without_1_gib_pages_those_of_2_mib_are_taken_and_that_is_told() {
    let test = "without_1_gib_pages_those_of_2_mib_are_taken_and_that_is_told";
    let Some(_host) = Reservation::take(test, Pages::Huge2M, 1) else { return };
    if HugePageCounts::read(Pages::Huge1G, None).is_some_and(|counts| counts.free > 0) {
        eprintln!("SKIPPED: {test}: this host has 1 GiB pages");
        return;
    }
    let options = RegionOptions { pages: Pages::Huge1G, ..RegionOptions::default() };
    let region = DmaRegion::with_options(2 * MIB, &options).expect("2 MiB");
    assert_eq!(region.backing(), Backing::HugePages2M);
    let notice = region.notice().expect("a reason");
    assert!(notice.contains("1 GiB huge pages") && notice.contains("hugepagesz=1G"), "{notice}");
}

fn look_up(region: &DmaRegion, test: &str) -> Option<PhysicalRegion> {
    let sure = UnsafeWithoutIommu::accept_that_the_device_can_write_anywhere();
    match PhysicalRegion::look_up(region, sure) {
        Ok(physical) => Some(physical),
        Err(PhysicalError::Hidden) => {
            eprintln!("SKIPPED: {test}: page frames are hidden; run with CAP_SYS_ADMIN");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn huge_pages_have_physical_addresses_of_their_own() {
    let test = "huge_pages_have_physical_addresses_of_their_own";
    let Some(_host) = Reservation::take(test, Pages::Huge2M, 5) else { return };
    let region = DmaRegion::with_options(8 * MIB, &strict(Pages::Huge2M)).expect("reserved");
    let other = DmaRegion::with_options(2 * MIB, &strict(Pages::Huge2M)).expect("reserved");
    let (Some(physical), Some(second)) = (look_up(&region, test), look_up(&other, test)) else { return };
    let mut parts = [physical.parts(), second.parts()].concat();
    assert_eq!(parts.len(), 5);
    assert!(parts.iter().all(|part| part % (2 << 20) == 0 && *part > 0));
    parts.sort_unstable();
    parts.dedup();
    assert_eq!(parts.len(), 5, "no two pages share an address");
    assert!(physical.is_unmoved().expect("read before"));
}

/// A hugetlbfs of our own, unmounted on drop.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(page: &str) -> Option<Self> {
        let directory = tempfile::tempdir().expect("a directory");
        let option = format!("pagesize={page}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "hugetlbfs", "-o", &option, "none"]).arg(directory.path());
        mount.status().is_ok_and(|status| status.success()).then(|| Self(directory))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.0.path()).status();
        assert!(status.is_ok_and(|status| status.success()), "{} stays mounted", self.0.path().display());
    }
}

#[test]
fn huge_pages_come_from_a_mount_too() {
    let test = "huge_pages_come_from_a_mount_too";
    let Some(_host) = Reservation::take(test, Pages::Huge2M, 2) else { return };
    let Some(mount) = Mount::new("2M") else {
        eprintln!("SKIPPED: {test}: hugetlbfs cannot be mounted; run as root");
        return;
    };
    let options = RegionOptions { hugetlbfs: Some(mount.0.path().to_path_buf()), ..strict(Pages::Huge2M) };
    let region = DmaRegion::with_options(4 * MIB, &options).expect("reserved");
    assert_eq!(region.backing(), Backing::HugePages2M);
    assert_eq!(mapped(), 4 * MIB);
    assert!(region.file().is_none(), "it cannot be sealed, so it is not shared");
    assert!(region.write(4 * MIB - 3, b"end"));
    assert_eq!(fs::read_dir(mount.0.path()).expect("the mount").count(), 0, "no file stays behind");
    let wrong = RegionOptions { pages: Pages::Huge1G, ..options };
    let refused = DmaRegion::with_options(1, &wrong);
    assert!(
        matches!(&refused, Err(AllocError::NoHugePages { why }) if why.contains("2097152")),
        "{refused:?}"
    );
    drop(region);
    assert_eq!(mapped(), 0);
}

#[test]
fn memory_comes_from_the_node_that_is_named() {
    let test = "memory_comes_from_the_node_that_is_named";
    let nodes = numa_nodes();
    if nodes.len() < 2 {
        eprintln!("SKIPPED in part: {test}: this host has one NUMA node, which has to do");
    }
    for &node in &nodes {
        for share in [false, true] {
            let options = RegionOptions { node: Some(node), share, ..RegionOptions::ordinary() };
            let region = DmaRegion::with_options(1, &options).expect("a little memory");
            assert_eq!(region.node(), Some(node));
        }
    }
    let Some(_host) = Reservation::take(test, Pages::Huge2M, 2 * nodes.len()) else { return };
    for &node in &nodes {
        if HugePageCounts::read(Pages::Huge2M, Some(node)).is_none_or(|counts| counts.free < 1) {
            eprintln!("SKIPPED in part: {test}: node {node} has no huge page free");
            continue;
        }
        let options = RegionOptions { node: Some(node), ..strict(Pages::Huge2M) };
        let region = DmaRegion::with_options(1, &options).expect("reserved");
        assert_eq!((region.node(), region.backing()), (Some(node), Backing::HugePages2M));
    }
}

#[test]
fn a_node_that_is_not_there_is_an_error() {
    let last = numa_nodes().into_iter().max().expect("a node");
    for node in [last + 1, 1023, 1024, u32::MAX] {
        let options = RegionOptions { node: Some(node), ..RegionOptions::ordinary() };
        let refused = DmaRegion::with_options(1, &options);
        assert!(matches!(refused, Err(AllocError::Node { node: told, .. }) if told == node), "{refused:?}");
    }
}
