//! Goal: after start, the I/O path allocates nothing.
//! Method: an allocator that counts what this thread asks for while it is told to count; the model steps uncounted.
#![expect(unsafe_code, reason = "a global allocator is unsafe to implement")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use async_nvme::{Arm, Clock, OpKind, Requeue};
use common::{Rig, op};
use nvme_model::{ControllerOptions, NamespaceOptions};

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
fn nothing_is_allocated_or_freed_after_start() {
    for [sgl, shadow_doorbells] in [[false, false], [true, false], [false, true]] {
        let options = ControllerOptions { mdts: 2, sgl, shadow_doorbells, ..ControllerOptions::default() };
        let mut rig = Rig::new(NamespaceOptions::memory(1, 9, 4096), options);
        rig.start().unwrap();
        let ticket = rig.controller.queue_ticket(1, 32).unwrap().with_requeue(Requeue::Idempotent);
        let mut queue = rig.opened(ticket.with_interrupt().unwrap());
        let mut done = Vec::with_capacity(64);
        let mut completed = 0;
        for round in 0..200u64 {
            counted(|| {
                for token in 0..32 {
                    let kind = match (token + round) % 7 {
                        6 => OpKind::Copy { to: 3900, fua: false },
                        0 => OpKind::Write { fua: false },
                        1 => OpKind::Flush,
                        2 => OpKind::WriteZeroes { deallocate: true, fua: false },
                        3 => OpKind::Deallocate,
                        _ => OpKind::Read,
                    };
                    // 100 blocks are four commands.
                    let blocks = if token % 5 == 0 { 100 } else { 8 };
                    let buf = rig.pool.alloc(u32::try_from(blocks * 512).unwrap());
                    queue.submit(op(token, kind, token * 100, blocks, buf)).unwrap();
                }
                queue.ring();
            });
            while queue.outstanding() > 0 {
                rig.model.step();
                counted(|| {
                    completed += queue.poll(rig.clock.now(), 16, &mut done);
                    done.clear();
                    if queue.arm().unwrap() == Arm::Busy {
                        queue.disarm();
                    }
                });
            }
        }
        assert_eq!(completed, 6400);
        assert_eq!(COUNT.get(), 0, "allocations and frees on the I/O path");
    }
    // The counter counts.
    counted(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!(COUNT.get(), 2);
}

#[test]
fn a_batch_costs_one_doorbell() {
    let mut rig = Rig::ready();
    let mut queue = rig.queue(64);
    for token in 0..64 {
        queue.submit(op(token, OpKind::Read, token, 1, rig.pool.alloc(512))).unwrap();
    }
    queue.ring();
    queue.ring();
    assert_eq!((queue.stats().commands, queue.stats().doorbells), (64, 1));
    assert_eq!(rig.collect(&mut queue, 64, 1000).len(), 64);
}
