//! Goal: the loop that is measured allocates and frees nothing, at any depth, by either way to get buffers; nor does the
//! controller that is served meanwhile.
//! Method: an allocator that counts what this thread asks for while it is told to; the device works uncounted.
#![expect(unsafe_code, reason = "a global allocator is unsafe to implement")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use fastice_bench::device::Device;
use fastice_bench::load::{Buffers, Load};

thread_local! {
    static COUNTING: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: all work is left to the system's allocator; counting touches only thread-local cells.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.get() {
            COUNT.set(COUNT.get() + 1);
        }
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if COUNTING.get() {
            COUNT.set(COUNT.get() + 1);
        }
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn counted<T>(work: impl FnOnce() -> T) -> T {
    COUNTING.set(true);
    let result = work();
    COUNTING.set(false);
    result
}

#[test]
fn the_measured_loop_allocates_nothing() {
    for depth in [1, 32, 128] {
        for buffers in [Buffers::Reused, Buffers::Pooled] {
            for mut device in [Device::replay(7).unwrap(), Device::model().unwrap()] {
                let (access, nsid) = (device.access(), device.nsid());
                let mut load = Load::start(access, nsid, depth, buffers, &mut || device.idle()).unwrap();
                device.opened().unwrap();
                let mut done = 0;
                while done < 5000 {
                    counted(|| load.fill());
                    device.work();
                    counted(|| load.serve());
                    done += counted(|| load.reap());
                }
                load.finish(&mut || device.idle()).unwrap();
                let where_ = format!("{} at depth {depth}, {buffers:?}", device.name);
                assert_eq!(COUNT.get(), 0, "allocations and frees on {where_}");
            }
        }
    }
    // The counter counts.
    counted(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!(COUNT.get(), 2);
}
