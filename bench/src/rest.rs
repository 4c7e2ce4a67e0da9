//! Waiting until the machine is at rest, so that what was done before a measurement is not measured with it.
//!
//! A filesystem goes on with what it was told long after the call has returned: XFS takes half a minute of a core to free
//! the extents of a removed file (`xfs-inodegc`), ext4 its log, a loop device its image. On two cores that is half of what
//! a measurement could have had.
//!
//! What it does not do: find out who is busy, or end it.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// How long one look takes.
const LOOK: Duration = Duration::from_millis(500);
/// Looks in a row that must find the machine at rest.
const LOOKS: u32 = 4;
/// Most of one core that all processes and the kernel may take together.
const BUSY_MAX: f64 = 0.1;

/// Time of all processors since the boot, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    all: u64,
    processors: u64,
}

/// Waits until the machine has been at rest for two seconds. What it took of a core at the end, when it is still busy after `most` or when
/// the caller `gives_up`.
///
/// # Errors
/// [`StillBusy`]; also where `/proc/stat` cannot be read, as nothing is known then.
pub fn wait(most: Duration, gives_up: impl Fn() -> bool) -> Result<(), StillBusy> {
    let begun = Instant::now();
    let (mut before, mut at_rest) = (look()?, 0);
    loop {
        thread::sleep(LOOK);
        let now = look()?;
        let cores = busy_cores(before, now);
        before = now;
        at_rest = if cores <= BUSY_MAX { at_rest + 1 } else { 0 };
        if at_rest == LOOKS {
            return Ok(());
        }
        if begun.elapsed() > most || gives_up() {
            return Err(StillBusy::Cores(cores));
        }
    }
}

/// Why a measurement would be of more than what it measures.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each message says it all")]
#[non_exhaustive]
pub enum StillBusy {
    #[error("the machine does not come to rest: {0:.2} of a core are busy")]
    Cores(f64),
    #[error("/proc/stat tells nothing of the processors")]
    Unknown,
}

/// Microseconds for which all processors together were busy since the boot, to a hundredth of a second.
///
/// # Errors
/// Where `/proc/stat` cannot be read.
pub(crate) fn busy_us() -> Result<f64, StillBusy> {
    // `proc_stat(5)` tells hundredths of a second to programs, whatever the kernel counts in.
    Ok(look()?.busy as f64 * 10_000.0)
}

fn look() -> Result<Ticks, StillBusy> {
    let text = fs::read_to_string("/proc/stat").map_err(|_| StillBusy::Unknown)?;
    parse(&text).ok_or(StillBusy::Unknown)
}

/// `proc_stat(5)`: user, nice, system, idle, iowait, irq, softirq, steal, guest and `guest_nice`, which user and nice hold already.
fn parse(stat: &str) -> Option<Ticks> {
    let mut lines = stat.lines();
    let total = lines.next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> =
        total.split_whitespace().take(8).map(|word| word.parse().ok()).collect::<Option<_>>()?;
    let [_, _, _, idle, waiting, ..] = ticks[..] else { return None };
    let all = ticks.iter().sum();
    let processors = lines.take_while(|line| line.starts_with("cpu")).count() as u64;
    Some(Ticks { busy: all - idle - waiting, all, processors })
}

/// How many cores' time was taken between two looks.
fn busy_cores(before: Ticks, now: Ticks) -> f64 {
    let all = now.all.saturating_sub(before.all).max(1);
    let busy = now.busy.saturating_sub(before.busy);
    busy as f64 / all as f64 * now.processors as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  100 20 30 1000 50 1 2 3 7 0\ncpu0 50 10 15 500 25 0 1 1 0 0\ncpu1 50 10 15 500 25 1 1 2 0 0\nintr 1\n";

    #[test]
    fn idle_and_waiting_are_rest_and_all_else_is_not() {
        let before = parse(STAT).unwrap();
        assert_eq!(before, Ticks { busy: 156, all: 1206, processors: 2 });
        let now = Ticks { busy: 156 + 60, all: 1206 + 100, processors: 2 };
        assert!((busy_cores(before, now) - 1.2).abs() < 1e-9);
    }

    #[test]
    fn what_is_no_stat_is_unknown() {
        for text in ["", "intr 1\n", "cpu  1 2 x 4 5\n", "cpu  1 2 3\n"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
