//! Which side was measured when, for a profiler that samples meanwhile: so that what a target does between rounds counts for nothing.
//!
//! A line a round, in the file that [`FILE`] names: begin and end by the monotonic clock in nanoseconds, commands, microseconds for which
//! the target was busy or `-`, and the side.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::time::{ClockId, clock_gettime};

/// Names the file. Without it nothing is noted.
pub const FILE: &str = "FASTICE_BENCH_WINDOWS";
/// What ours is called.
pub const OURS: &str = "fastice";
/// What is called so is ours too, but for its pin.
pub const UNPINNED: &str = "fastice without the pin";
/// What it calls the responder that has no work.
pub const BARE: &str = "the bare responder";

/// A round.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// Whose it was.
    pub side: String,
    /// Its begin, in nanoseconds.
    pub begun_ns: u64,
    /// Its end.
    pub ended_ns: u64,
    /// Commands in it.
    pub commands: f64,
    /// Microseconds for which the target was busy; none where it does not tell.
    pub busy_us: Option<f64>,
}

/// A round that runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun(u64);

impl Begun {
    /// Now.
    pub(crate) fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        let ns = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
        Self(u64::try_from(ns).unwrap_or_default())
    }

    /// Notes that it has ended, with so many commands a second, each of which took the target so long.
    pub(crate) fn end(self, side: &str, iops: f64, busy_us_each: Option<f64>) -> Result<()> {
        self.end_at(Self::now().0, side, iops, busy_us_each)
    }

    /// The same of one that has ended `ago`, which lasted for so long.
    pub(crate) fn ended(
        (ago, lasted): (Duration, Duration),
        side: &str,
        iops: f64,
        busy_us_each: Option<f64>,
    ) -> Result<()> {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let ended_ns = Self::now().0.saturating_sub(ns(ago));
        Self(ended_ns.saturating_sub(ns(lasted))).end_at(ended_ns, side, iops, busy_us_each)
    }

    fn end_at(self, ended_ns: u64, side: &str, iops: f64, busy_us_each: Option<f64>) -> Result<()> {
        let Some(path) = std::env::var_os(FILE) else { return Ok(()) };
        let commands = iops * ended_ns.saturating_sub(self.0) as f64 / 1e9;
        let busy_us = busy_us_each.map(|each| each * commands);
        let window = Window { side: side.to_owned(), begun_ns: self.0, ended_ns, commands, busy_us };
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let mut file = file.with_context(|| format!("{}", Path::new(&path).display()))?;
        Ok(writeln!(file, "{window}")?)
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let busy = self.busy_us.map_or_else(|| "-".to_owned(), |us| format!("{us:.0}"));
        write!(f, "{} {} {:.0} {busy} {}", self.begun_ns, self.ended_ns, self.commands, self.side)
    }
}

impl Window {
    /// Whether it was under way then.
    #[must_use]
    pub const fn has(&self, time_ns: u64) -> bool {
        self.begun_ns <= time_ns && time_ns < self.ended_ns
    }

    fn read(line: &str) -> Option<Self> {
        let mut words = line.splitn(5, ' ');
        let mut word = || words.next();
        let (begun_ns, ended_ns) = (word()?.parse().ok()?, word()?.parse().ok()?);
        let commands = word()?.parse().ok()?;
        let busy_us = match word()? {
            "-" => None,
            us => Some(us.parse().ok()?),
        };
        Some(Self { begun_ns, ended_ns, commands, busy_us, side: word()?.to_owned() })
    }
}

/// All of a file.
///
/// # Errors
/// When there are none, or a line is none.
pub fn read(path: &Path) -> Result<Vec<Window>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let windows: Option<Vec<_>> = text.lines().map(Window::read).collect();
    windows.with_context(|| format!("{} has lines that are no rounds", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_read_as_it_was_written() {
        for busy_us in [None, Some(77.0)] {
            let side = "SPDK's target".to_owned();
            let window = Window { side, begun_ns: 5, ended_ns: 9, commands: 3.0, busy_us };
            assert_eq!(Window::read(&window.to_string()), Some(window.clone()));
            assert!(window.has(5) && window.has(8) && !window.has(9) && !window.has(4));
        }
        assert_eq!(Window::read("1 2 3"), None);
        assert_eq!(Window::read("1 2 3 x fastice"), None);
    }
}
