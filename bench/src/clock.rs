//! Time, and the clock of the core, so that time can be told in cycles.
//!
//! ```text
//!   time stamp counter   counts at a constant rate, whatever the core does: time, not cycles
//!   cycles of the core   a counter of the processor; virtual machines often hide it
//!   what is done here    a chain of dependent one-cycle instructions is timed: cycles / time = the core's clock now
//! ```
//!
//! The chain is xorshift64: six instructions, each of which needs the result of the one before, and each of which takes
//! one cycle on every `x86_64` core since 2008 and on the larger ARM cores. So `iterations * 6` cycles passed, and the
//! clock says how long that took. What it cannot see: a core that changes its clock between this and the measurement
//! (it is done right before each), and time that a hypervisor takes away and does not tell of. Both make a measurement
//! look slower, or the chain, which is why the fastest of several chains is taken.
//!
//! Where a thread only computes, its own time ([`Stopwatch::cpu_ns`]) is the measure: other processes on the core do
//! not count in it. Where it waits for a device, it is the time of day.

use std::hint::black_box;
use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};

/// Cycles of one iteration: shift and exclusive or, three times, each waiting for the one before.
const CHAIN_CYCLES: u32 = 6;
/// About a millisecond a chain.
const CHAIN_ITERATIONS: u32 = 500_000;
/// Chains a measurement; the fastest was disturbed the least.
const CHAINS: usize = 5;

/// Both times since a moment.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    wall: Instant,
    cpu: f64,
}

impl Stopwatch {
    /// From now on.
    #[must_use]
    pub fn start() -> Self {
        Self { wall: Instant::now(), cpu: thread_ns() }
    }

    /// Nanoseconds that passed.
    #[must_use]
    pub fn wall_ns(&self) -> f64 {
        self.wall.elapsed().as_nanos() as f64
    }

    /// Nanoseconds that this thread ran.
    #[must_use]
    pub fn cpu_ns(&self) -> f64 {
        thread_ns() - self.cpu
    }
}

fn thread_ns() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// The core's clock in cycles a nanosecond, measured now: some milliseconds.
#[must_use]
pub fn cycles_per_ns() -> f64 {
    let mut best = 0.0f64;
    for _ in 0..CHAINS {
        let watch = Stopwatch::start();
        black_box(chain(black_box(0x9E37_79B9_7F4A_7C15), black_box(CHAIN_ITERATIONS)));
        best = best.max(f64::from(CHAIN_ITERATIONS) * f64::from(CHAIN_CYCLES) / watch.cpu_ns());
    }
    best
}

#[inline(never)]
fn chain(mut word: u64, iterations: u32) -> u64 {
    for _ in 0..iterations {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_that_of_a_processor() {
        // Up to 8 GHz. An emulated processor is slower than any, so there is no lower end.
        let clock = cycles_per_ns();
        assert!(clock > 0.0 && clock < 8.0, "{clock} cycles a nanosecond");
    }
}
