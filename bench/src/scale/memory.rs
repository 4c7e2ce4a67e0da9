//! What a pinned file of many extents keeps in memory, and what it takes for a moment.
//!
//! ```text
//!   stays       the sealed map (extents, where lookups begin), and what the allocator was asked for and not given back
//!   for a look  the most that the allocator had given out while the watch looked, beyond what stays
//!   for a pin   the same while the file was pinned
//! ```

#![expect(unsafe_code, reason = "a global allocator is unsafe to implement")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, anyhow, ensure};
use fastice::extent::{Warden, WatchOptions};

use super::Plan;
use super::ground::Ground;
use super::pin::pin_one;
use crate::report::{Bar, Measurement, Row};

/// Most that may stay for a served file.
const BYTES_AN_EXTENT_MAX: f64 = 40.0;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counting the bytes that are given out. To be the global one of a program that measures memory.
#[derive(Debug)]
pub struct Counting;

impl Counting {
    fn took(len: usize) {
        let live = LIVE.fetch_add(len, Ordering::Relaxed) + len;
        MOST.fetch_max(live, Ordering::Relaxed);
    }
}

// SAFETY: all work is left to the system's allocator; counting touches only atomic numbers.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::took(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::took(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_len: usize) -> *mut u8 {
        Self::took(new_len);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(ptr, layout, new_len) }
    }
}

fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// What `work` returns, and the most that was given out meanwhile beyond what was before.
fn most_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = live();
    MOST.store(before, Ordering::Relaxed);
    let done = work();
    (done, MOST.load(Ordering::Relaxed).saturating_sub(before))
}

pub(super) fn rows(plan: &Plan, rows: &mut Vec<Row>, ground: &Ground, name: &str) -> Result<()> {
    ensure!(live() > 0, "this program does not count what it allocates");
    let (state, warden) = (ground.state()?, Warden::start(WatchOptions::default())?);
    let path = ground.fragmented_file();
    let before = live();
    let (pinned, pin_bytes) = most_of(|| pin_one(&path, &warden, &state));
    let pinned = pinned?;
    let heap = live().saturating_sub(before);
    let extents = pinned.map().extent_count() as f64;
    let resident = heap as f64 + pinned.map().resident_len().get() as f64;
    let look = pinned.second_look().context("the file is not guarded")?;
    let (looked, look_bytes) = most_of(|| look.look());
    looked.map_err(|differs| anyhow!("the file changed: {differs}"))?;
    pinned.release()?;
    let mut measure = |what: &str, bytes: f64, bar, method| {
        plan.row(
            rows,
            &Measurement {
                name: format!("{name}/memory/{what}"),
                unit: "bytes an extent",
                ours: &[bytes / extents],
                peer: None,
                bar,
                method,
            },
        )
    };
    measure(
        "stays",
        resident,
        Some(Bar::OursAtMost(BYTES_AN_EXTENT_MAX)),
        "the sealed map, and what the allocator gave and did not get back while the file was pinned",
    )?;
    measure(
        "with-a-look",
        resident + look_bytes as f64,
        Some(Bar::OursAtMost(BYTES_AN_EXTENT_MAX)),
        "the same, and the most that a look of the watch had allocated at a time",
    )?;
    measure(
        "for-a-pin",
        pin_bytes as f64,
        None,
        "the most that pinning had allocated at a time, for that moment",
    )
}
