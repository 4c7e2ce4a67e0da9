//! The round trip of a cache line between the two processors, which moves the latency of everything that crosses them.
//!
//! On machines that are shared it has two states, some hundred nanoseconds apart; rows of different states do not compare.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::Result;

use crate::server::{both_ends, stay_on};

const ROUNDS: u32 = 5_000;
const TRIES: usize = 3;

#[repr(align(128))]
struct Line(AtomicU32);

/// Nanoseconds there and back, the median of some tries.
///
/// # Errors
/// When a thread cannot be put on a processor.
pub fn round_trip_ns() -> Result<f64> {
    let (_, [first, last]) = both_ends()?;
    let mut tries = Vec::with_capacity(TRIES);
    for _ in 0..TRIES {
        tries.push(one_try(first, last)?);
    }
    tries.sort_by(f64::total_cmp);
    Ok(tries.get(TRIES / 2).copied().unwrap_or_default())
}

fn one_try(first: usize, last: usize) -> Result<f64> {
    let line = Line(AtomicU32::new(0));
    // Odd numbers are the other's, even ones ours.
    let wait_for = |number: u32| {
        while line.0.load(Ordering::Acquire) != number {
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let placed = stay_on(first);
            for round in 0..ROUNDS {
                wait_for(2 * round + 1);
                line.0.store(2 * round + 2, Ordering::Release);
            }
            placed
        });
        let ours = scope.spawn(|| -> Result<f64> {
            let placed = stay_on(last);
            let begun = Instant::now();
            for round in 0..ROUNDS {
                line.0.store(2 * round + 1, Ordering::Release);
                wait_for(2 * round + 2);
            }
            placed?;
            Ok(begun.elapsed().as_nanos() as f64 / f64::from(ROUNDS))
        });
        let gone = |_| anyhow::anyhow!("a thread ended before its time");
        other.join().map_err(gone)??;
        ours.join().map_err(gone)?
    })
}
