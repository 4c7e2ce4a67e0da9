//! Whether somebody else has the other half of a core.
//!
//! ```text
//!   a core of the machine:  | a processor of ours | its other thread: of another guest, of another program, or idle |
//! ```
//!
//! Where the other thread works, a processor does half to two thirds of what it does alone. No account of processor time shows that, and
//! on a machine that is shared it changes every few seconds, for each processor by itself: the same target then answers half as much
//! again as a moment before, and a target is set beside another that had a whole core.
//!
//! It is told by what both threads of a core share: its ways to its nearest cache. Copies within that cache go at one rate where the core
//! is whole, and at half of it, or less, where the other thread works with memory too; on the machine that this was made on nothing lay
//! between (some hundred looks). A neighbour that only computes may not show. Both processors are looked at in the same moment, for
//! they may be threads of one core themselves.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::server::{both_ends, stay_on};

/// Source and destination fit into the nearest cache together.
const COPY_LEN: usize = 8 << 10;
/// How long one look takes.
const TIME: Duration = Duration::from_millis(3);
/// Copies between two looks at the clock.
const COPIES: u32 = 16;
/// A whole core has at least so much of the best rate so far.
const WHOLE_MIN: f64 = 0.75;

/// The best rates of this process so far.
static BEST: Mutex<[f64; 2]> = Mutex::new([0.0; 2]);

/// The best rates so far, by which a look is judged: by those that are known in the end, for a run may begin where no core is whole.
pub(super) fn best_rates() -> [f64; 2] {
    *BEST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes a nanosecond that the first and the last processor copy within their nearest caches at this moment, both at once.
///
/// # Errors
/// When a thread cannot be put on a processor.
pub(super) fn copy_rates() -> Result<[f64; 2]> {
    let (_, processors) = both_ends()?;
    let here = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let threads = processors.map(|processor| {
            let here = &here;
            scope.spawn(move || {
                let placed = stay_on(processor);
                here.fetch_add(1, Ordering::Relaxed);
                let begun = Instant::now();
                // One that does not come is not waited for.
                while here.load(Ordering::Relaxed) < processors.len() && begun.elapsed() < TIME {
                    std::hint::spin_loop();
                }
                let rate = copy();
                placed.map(|()| rate)
            })
        });
        let mut rates = [0.0; 2];
        for (rate, thread) in rates.iter_mut().zip(threads) {
            *rate = thread.join().map_err(|_| anyhow!("a thread ended before its time"))??;
        }
        let mut best = BEST.lock().unwrap_or_else(PoisonError::into_inner);
        best.iter_mut().zip(rates).for_each(|(best, rate)| *best = best.max(rate));
        Ok(rates)
    })
}

fn copy() -> f64 {
    let (from, mut to) = (vec![0x5A_u8; COPY_LEN], vec![0; COPY_LEN]);
    let (begun, mut copied_len) = (Instant::now(), 0);
    while begun.elapsed() < TIME {
        for _ in 0..COPIES {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
            copied_len += COPY_LEN;
        }
    }
    copied_len as f64 / begun.elapsed().as_nanos() as f64
}

/// Whether the first and the last processor are whole cores, by the best rates that are known.
pub(super) fn whole(rates: [f64; 2], best: [f64; 2]) -> [bool; 2] {
    [rates[0] >= best[0] * WHOLE_MIN, rates[1] >= best[1] * WHOLE_MIN]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_whole_near_its_best_rate() {
        assert_eq!(whole([80.0, 78.0], [80.0, 80.0]), [true, true]);
        assert_eq!(whole([42.0, 79.0], [80.0, 80.0]), [false, true]);
        // Each by its own best one: cores may differ.
        assert_eq!(whole([80.0, 40.0], [80.0, 41.0]), [true, true]);
    }

    #[test]
    fn both_processors_copy_something() {
        let rates = copy_rates().unwrap();
        let best = best_rates();
        assert!(
            rates.iter().zip(best).all(|(rate, best)| *rate > 0.0 && *rate <= best),
            "{rates:?} {best:?}"
        );
    }
}
