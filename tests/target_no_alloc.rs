//! The I/O path of the whole target allocates nothing: counted by the allocator, on the threads of the cores.
//!
//! Method: an allocator that counts for each thread by its kernel id; a target in this process; a host that warms up
//! and then sends thousands of reads, writes and flushes, in the capsule and by R2T. Not one allocation may happen on
//! a core's thread meanwhile. What the host allocates on threads of its own does not count.
#![expect(unsafe_code, reason = "an allocator that counts")]

#[expect(dead_code, reason = "shared with tests that use more of it")]
#[path = "target/support.rs"]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use fastice::initiator::controller::{ConnectOptions, Controller};
use fastice::initiator::namespace::Namespace;
use fastice::units::Lba;
use nvme_spec::Nsid;

/// Threads that can be told apart; later ones share the last place.
const THREADS_MAX: usize = 64;

static NEXT: AtomicU64 = AtomicU64::new(0);
static THREADS: [AtomicI32; THREADS_MAX] = [const { AtomicI32::new(0) }; THREADS_MAX];
static COUNTS: [AtomicU64; THREADS_MAX] = [const { AtomicU64::new(0) }; THREADS_MAX];

thread_local! {
    static PLACE: Cell<Option<usize>> = const { Cell::new(None) };
}

struct Counting;

fn count() {
    let place = PLACE.get().unwrap_or_else(|| {
        let next = usize::try_from(NEXT.fetch_add(1, Ordering::Relaxed)).unwrap_or(usize::MAX);
        let place = next.min(THREADS_MAX - 1);
        THREADS[place].store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
        PLACE.set(Some(place));
        place
    });
    COUNTS[place].fetch_add(1, Ordering::Relaxed);
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`; the memory came from the system's allocator.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`; the memory came from the system's allocator.
        unsafe { System.realloc(memory, layout, new_len) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations so far on the threads named `core-N`, and how many such threads there are.
fn on_cores() -> (u64, usize) {
    let mut sum = (0, 0);
    for (thread, count) in THREADS.iter().zip(&COUNTS) {
        let name =
            std::fs::read_to_string(format!("/proc/self/task/{}/comm", thread.load(Ordering::Relaxed)));
        if name.is_ok_and(|name| name.starts_with("core-")) {
            sum = (sum.0 + count.load(Ordering::Relaxed), sum.1 + 1);
        }
    }
    sum
}

fn load(namespace: &Namespace<'_>, rounds: usize) {
    let mut data = vec![0x5A; 64 * 1024];
    for round in 0..rounds {
        let lba = Lba(round as u64 % 1000);
        namespace.write(lba, &data[..4096], false).expect("a write in the capsule");
        namespace.write(lba, &data, round % 2 == 0).expect("a write by R2T");
        namespace.read(lba, &mut data[..4096]).expect("a small read");
        namespace.read(lba, &mut data).expect("a large read");
        namespace.flush().expect("a flush");
    }
}

#[test]
fn the_io_path_of_the_target_allocates_nothing() {
    let target = support::memory_target();
    for data_digest in [false, true] {
        let options = ConnectOptions { kato_ms: 0, data_digest, ..support::options(&target) };
        let controller = Controller::connect(&options).expect("the host connects");
        // Opening it sends Identify, an admin command, which may allocate.
        let namespace = controller.namespace(Nsid(1)).expect("namespace 1");
        load(&namespace, 100);
        let (before, cores) = on_cores();
        assert!(cores > 0 && before > 0, "the threads of the cores were found");
        load(&namespace, 1000);
        let (after, _) = on_cores();
        assert_eq!(
            after - before,
            0,
            "allocations on the cores for 5000 commands, data digest {data_digest}"
        );
        controller.shutdown().expect("shutdown");
    }
}
