//! The round trip of a cache line between the two processors, which moves the latency of everything that crosses them.
//!
//! On machines that are shared it has two states, some hundred nanoseconds apart; rows of different states do not compare.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::server::{both_ends, stay_on};

const ROUNDS: u32 = 5_000;
const TRIES: usize = 3;
/// How long one try goes on: where others have the processors, every round waits for its turn.
const TIME_MAX: Duration = Duration::from_millis(5);
const ROUNDS_BETWEEN_LOOKS: u32 = 16;
/// What is written when there is no more.
const END: u32 = u32::MAX - 1;

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
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let placed = stay_on(first);
            answer(&line.0);
            placed
        });
        let ours = scope.spawn(|| -> Result<f64> {
            let placed = stay_on(last);
            let trip_ns = ask(&line.0);
            placed?;
            Ok(trip_ns)
        });
        let gone = |_| anyhow::anyhow!("a thread ended before its time");
        other.join().map_err(gone)??;
        ours.join().map_err(gone)?
    })
}

/// Writes odd numbers and waits for the even ones behind them; tells the mean time of both, and ends the other side.
fn ask(line: &AtomicU32) -> f64 {
    let (begun, mut rounds) = (Instant::now(), 0);
    while rounds < ROUNDS && (rounds % ROUNDS_BETWEEN_LOOKS != 0 || begun.elapsed() < TIME_MAX) {
        line.store(2 * rounds + 1, Ordering::Release);
        while line.load(Ordering::Acquire) != 2 * rounds + 2 {
            std::hint::spin_loop();
        }
        rounds += 1;
    }
    let elapsed = begun.elapsed();
    line.store(END, Ordering::Release);
    elapsed.as_nanos() as f64 / f64::from(rounds.max(1))
}

/// Answers each odd number with the next one, until the end.
fn answer(line: &AtomicU32) {
    loop {
        match line.load(Ordering::Acquire) {
            END => return,
            number if number % 2 == 1 => line.store(number + 1, Ordering::Release),
            _ => std::hint::spin_loop(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_to_and_fro_within_bounded_time() {
        let begun = Instant::now();
        assert!(round_trip_ns().unwrap() > 0.0);
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    }
}
