//! A core that polls on between commands that come often, though it sleeps when they are over.
//!
//! ```text
//!   commands    |  |  |   |            |                        gaps
//!   the core    polls ----------......zz poll ......zz          each gap below the longest: polls on, else sleeps at once
//! ```
//!
//! To be woken costs a host some ten microseconds and more for each command. Where commands come one after the other the core
//! spares them that, for no more than the longest gap after the last one. A command that comes alone is no reason to poll; but one
//! long gap among short ones is by chance, and only a second one tells that they are over: commands that come at random, a hundred a
//! second, have one of 60 ms or more every four seconds.

use std::time::Duration;

use crate::stage::Stamp;

/// When there were commands last, and whether they come often.
#[derive(Debug)]
pub(super) struct Linger {
    gap_max_ns: u64,
    last: Stamp,
    now: Stamp,
    is_often: bool,
    /// Whether the gap before the last commands was short.
    was_short: bool,
}

impl Linger {
    /// For commands that are no further apart than this; of zero it never polls on.
    pub(super) fn new(gap_max: Duration) -> Self {
        let gap_max_ns = u64::try_from(gap_max.as_nanos()).unwrap_or(u64::MAX);
        let now = Stamp::now();
        Self { gap_max_ns, last: now, now, is_often: false, was_short: false }
    }

    /// A turn of the core, and whether commands ended in it.
    #[inline]
    pub(super) const fn turn(&mut self, now: Stamp, has_commands: bool) {
        self.now = now;
        if has_commands {
            let is_short = now.ns_since(self.last) < self.gap_max_ns;
            self.is_often = is_short || self.was_short;
            (self.last, self.was_short) = (now, is_short);
        }
    }

    /// Whether the core is to poll on.
    #[inline]
    pub(super) const fn goes_on(&self) -> bool {
        self.is_often && self.now.ns_since(self.last) < self.gap_max_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Whether it polls on right after each command, and at the end of each gap.
    fn seen(gap_max_ms: u64, gaps_ms: &[u64]) -> Vec<(bool, bool)> {
        let mut linger = Linger::new(Duration::from_millis(gap_max_ms));
        let mut at = linger.now.ns() + 1000 * MS;
        gaps_ms
            .iter()
            .map(|gap| {
                linger.turn(Stamp::from_ns(at), true);
                let after = linger.goes_on();
                at += gap * MS;
                linger.turn(Stamp::from_ns(at), false);
                (after, linger.goes_on())
            })
            .collect()
    }

    #[test]
    fn commands_that_come_often_are_polled_for_until_they_stop() {
        assert_eq!(seen(20, &[10, 10, 19, 20]), [(false, false), (true, true), (true, true), (true, false)]);
    }

    #[test]
    fn a_command_alone_is_no_reason_to_poll() {
        assert_eq!(seen(20, &[30, 1000, 20]), [(false, false); 3]);
    }

    #[test]
    fn one_long_gap_among_short_ones_is_by_chance_and_two_are_the_end() {
        let seen = seen(20, &[10, 10, 30, 10, 30, 30, 10]);
        let polls_on: Vec<bool> = seen.iter().map(|(after, _)| *after).collect();
        assert_eq!(polls_on, [false, true, true, true, true, true, false]);
        assert!(!seen[2].1 && !seen[4].1, "for no longer than the longest gap all the same");
    }

    #[test]
    fn without_a_gap_it_sleeps_between_any_two() {
        assert_eq!(seen(0, &[0, 0, 1]), [(false, false); 3]);
    }
}
