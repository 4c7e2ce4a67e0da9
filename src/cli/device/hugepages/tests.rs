//! Goal: a pool gets the size asked for or it is said how much was got, now and at the next boot.
//! Method: a host made of files, and a kernel that has only so many pages.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::cli::device::fake::FakeHost;
use crate::cli::device::kernel::Claim;

/// A kernel that has `room` pages, and `compacted` more when memory is put together.
#[derive(Debug)]
struct Pages {
    room: Cell<u64>,
    compacted: u64,
}

impl Kernel for Pages {
    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        if path.ends_with(COMPACT) {
            self.room.set(self.room.get() + self.compacted);
            return Ok(());
        }
        assert!(path.exists(), "sysfs makes no files: {}", path.display());
        let count: u64 = value.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
        fs::write(path, count.min(self.room.get()).to_string())
    }

    fn load_module(&self, name: &str) -> Result<(), String> {
        Err(name.to_owned())
    }

    fn claim(&self, _: &Path) -> io::Result<Claim> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn pause(&self, _: Duration) {}
}

fn host() -> FakeHost {
    let host = FakeHost::new();
    for name in ["hugepages-2048kB", "hugepages-1048576kB"] {
        for place in [HOST_POOLS, &format!("{NODES}/node0/hugepages"), &format!("{NODES}/node1/hugepages")] {
            host.file(format!("{place}/{name}/nr_hugepages"), "0\n");
            host.file(format!("{place}/{name}/free_hugepages"), "0\n");
        }
        host.file(format!("{HOST_POOLS}/{name}/resv_hugepages"), "0\n");
    }
    host.file(COMPACT, "");
    host
}

fn args(page_size: u64, node: Option<u32>, persist: bool) -> HugepagesArgs {
    HugepagesArgs {
        count: None,
        size: None,
        page_size: ByteLen(page_size),
        node,
        persist,
        json: JsonFlag::default(),
    }
}

fn kernel(room: u64, compacted: u64) -> Pages {
    Pages { room: Cell::new(room), compacted }
}

const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;

#[test]
fn pools_are_listed_by_size_and_node() {
    let host = host();
    host.file(format!("{NODES}/node1/hugepages/hugepages-2048kB/free_hugepages"), "7\n");
    let pools = pools(&host.host());
    let seen: Vec<_> = pools.iter().map(|pool| (pool.page_bytes, pool.node, pool.free)).collect();
    let expected = [
        (M2, None, 0),
        (M2, Some(0), 0),
        (M2, Some(1), 7),
        (G1, None, 0),
        (G1, Some(0), 0),
        (G1, Some(1), 0),
    ];
    assert_eq!(seen, expected);
    assert_eq!((pools[0].reserved, pools[1].reserved, pools[0].surplus), (Some(0), None, None));
}

#[test]
fn what_is_asked_for_is_got_or_the_rest_is_told() {
    let host = host();
    let below = host.host();
    let got = reserve(&below, &kernel(100, 0), &args(M2, None, false), 64).expect("reserved");
    assert_eq!((got.before, got.wanted, got.got), (0, 64, 64));
    let got = reserve(&below, &kernel(70, 10), &args(M2, None, false), 96).expect("reserved");
    assert_eq!((got.before, got.wanted, got.got), (64, 96, 80), "compaction gave ten more");
    assert!(remedy(&got).contains("hugepagesz=2M hugepages=96"));
    let got = reserve(&below, &kernel(1, 0), &args(G1, Some(1), false), 2).expect("reserved");
    assert_eq!((got.got, host.read(attribute(G1, Some(1)))), (1, "1".to_owned()));
    assert!(remedy(&got).contains("hugepagesz=1G hugepages=1:2"));
    assert_eq!(host.read(attribute(M2, None)), "80", "the other pool is left alone");
}

#[test]
fn a_pool_that_is_not_there_is_told_with_those_that_are() {
    let host = host();
    for (page, node) in [(M2, Some(9)), (16 << 20, None)] {
        let failure = reserve(&host.host(), &kernel(9, 0), &args(page, node, false), 1).expect_err("none");
        assert_eq!(failure.exit, Exit::Usage);
        let remedy = failure.remedy.expect("a remedy");
        assert!(remedy.contains("2 MiB and 1 GiB") && remedy.contains("[0, 1]"), "{remedy}");
    }
}

#[test]
fn what_the_host_needs_to_live_is_not_taken() {
    let host = host();
    let below = host.host();
    // 160 MiB, of which 10 MiB stay.
    host.file("proc/meminfo", "MemTotal:       163840 kB\nMemFree:  9 kB\nMemAvailable:    53248 kB\n");
    let failure = reserve(&below, &kernel(99, 0), &args(M2, None, false), 22).expect_err("too many");
    assert_eq!(failure.exit, Exit::Refused);
    assert!(
        failure.error.to_string().contains("44 MiB more") && failure.error.to_string().contains("42 MiB can")
    );
    assert_eq!(host.read(attribute(M2, None)), "0");
    assert_eq!(reserve(&below, &kernel(99, 0), &args(M2, None, false), 21).expect("reserved").got, 21);
    assert_eq!(reserve(&below, &kernel(99, 0), &args(M2, None, false), 42).expect("21 more").got, 42);
    let table = "Node 1 MemTotal:  16384 kB\nNode 1 MemFree:  2048 kB\nNode 1 FilePages:  3072 kB\n";
    host.file(format!("{NODES}/node1/meminfo"), table);
    assert!(reserve(&below, &kernel(9, 0), &args(M2, Some(1), false), 3).is_err());
    assert_eq!(reserve(&below, &kernel(9, 0), &args(M2, Some(1), false), 2).expect("4 MiB").got, 2);
}

#[test]
fn how_many_is_said_as_pages_or_as_bytes() {
    let of = |count: Option<u64>, size: Option<u64>, page: u64| {
        wanted(&HugepagesArgs { count, size: size.map(ByteLen), ..args(page, None, false) })
    };
    assert_eq!(of(Some(0), None, M2).expect("good"), Some(0));
    assert_eq!(of(None, Some(1 << 30), M2).expect("good"), Some(512));
    assert_eq!(of(None, None, M2).expect("only show"), None);
    assert!(of(None, Some(3 << 20), M2).is_err(), "half a page");
    assert!(of(None, Some(1), 0).is_err() && of(None, Some(1 << 62), M2).is_err());
    assert!(wanted(&args(M2, Some(0), false)).is_err() && wanted(&args(M2, None, true)).is_err());
}

#[test]
fn what_persists_is_written_once_for_each_pool() {
    let host = host();
    let below = host.host();
    let persist = |page, node, count| {
        reserve(&below, &kernel(4096, 0), &args(page, node, true), count).expect("reserved")
    };
    let got = persist(M2, None, 64);
    assert_eq!(got.persisted, Some(host.path(SNIPPET)));
    persist(G1, Some(0), 2);
    persist(G1, Some(1), 3);
    persist(M2, None, 128);
    let head = "# Huge pages, written by `fastice device hugepages --persist`.";
    let g1 = |node: u32| format!("w /{NODES}/node{node}/hugepages/hugepages-1048576kB/nr_hugepages - - - -");
    let m2 = format!("w /{HOST_POOLS}/hugepages-2048kB/nr_hugepages - - - -");
    assert_eq!(host.read(SNIPPET), [head.into(), g1(0) + " 2", g1(1) + " 3", m2 + " 128"].join("\n"));
    // The host's number and a node's exclude each other.
    persist(G1, None, 5);
    persist(M2, Some(1), 9);
    let g1 = format!("w /{HOST_POOLS}/hugepages-1048576kB/nr_hugepages - - - - 5");
    let m2 = format!("w /{NODES}/node1/hugepages/hugepages-2048kB/nr_hugepages - - - - 9");
    assert_eq!(host.read(SNIPPET), [head.into(), g1, m2].join("\n"));
    let mode = fs::metadata(host.path(SNIPPET)).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o644);
}
