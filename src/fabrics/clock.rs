//! The timers of an admin queue (NVM Express Base Specification 2.1, section 3.9 "Keep Alive").
//!
//! Keep alive here is traffic based (TBKAS): any command on any queue of the controller is a sign of life. At each
//! expiry of the timeout the counts of commands are compared with those of the last one; so a silent host is noticed
//! after one timeout at the earliest and two at the latest.

use std::time::{Duration, Instant};

use super::options::{IDLE_TIMEOUT, KAS};

/// What the timer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// For the host to enable the controller, or to go after a shutdown: a fixed time, whatever the host sends.
    Enable,
    /// For the host's signs of life.
    Life,
}

/// The timer of one controller.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    kato_ms: u32,
    /// A controller without a timeout ends after the fixed idle time: discovery controllers do.
    ends_when_idle: bool,
    waiting: Waiting,
    since: Instant,
    seen: u64,
}

impl Clock {
    /// A timer for a controller that is not enabled yet.
    pub(super) fn new(kato_ms: u32, ends_when_idle: bool, now: Instant) -> Self {
        let kato_ms = round_up(kato_ms);
        Self { kato_ms, ends_when_idle, waiting: Waiting::Enable, since: now, seen: 0 }
    }

    /// KATO as the controller keeps it: a multiple of its granularity.
    pub(super) fn kato_ms(&self) -> u32 {
        self.kato_ms
    }

    /// Sets KATO; the time runs anew.
    pub(super) fn set_kato_ms(&mut self, kato_ms: u32, commands: u64, now: Instant) {
        self.kato_ms = round_up(kato_ms);
        (self.since, self.seen) = (now, commands);
    }

    /// Waits for something else from now on.
    pub(super) fn wait_for(&mut self, waiting: Waiting, commands: u64, now: Instant) {
        if self.waiting != waiting {
            (self.waiting, self.since, self.seen) = (waiting, now, commands);
        }
    }

    /// When [`Clock::expired`] has to be asked.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let timeout = match self.waiting {
            Waiting::Enable => IDLE_TIMEOUT,
            Waiting::Life if self.kato_ms != 0 => Duration::from_millis(self.kato_ms.into()),
            Waiting::Life if self.ends_when_idle => IDLE_TIMEOUT,
            Waiting::Life => return None,
        };
        self.since.checked_add(timeout)
    }

    /// Whether the time is up at `now`, the controller having seen `commands` so far; if not, it runs anew where there
    /// were signs of life.
    pub(super) fn expired(&mut self, commands: impl FnOnce() -> u64, now: Instant) -> bool {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return false;
        }
        let commands = commands();
        if self.waiting == Waiting::Enable || commands == self.seen {
            return true;
        }
        (self.since, self.seen) = (now, commands);
        false
    }

    /// Whether it is the host's own timeout that runs.
    pub(super) fn is_keep_alive(&self) -> bool {
        self.waiting == Waiting::Life && self.kato_ms != 0
    }
}

/// `kato_ms` as a multiple of KAS. The largest value that is one is the limit.
fn round_up(kato_ms: u32) -> u32 {
    let unit = u32::from(KAS) * 100;
    kato_ms.checked_next_multiple_of(unit).unwrap_or(u32::MAX / unit * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn silence_expires_and_life_does_not() {
        let start = Instant::now();
        let mut clock = Clock::new(4500, false, start);
        clock.wait_for(Waiting::Life, 3, start);
        assert_eq!(clock.kato_ms(), 5000);
        assert_eq!(clock.deadline(), Some(start + 5 * SECOND));
        assert!(!clock.expired(|| panic!("not asked before the deadline"), start + 4 * SECOND));
        assert!(!clock.expired(|| 4, start + 5 * SECOND));
        assert_eq!(clock.deadline(), Some(start + 10 * SECOND));
        assert!(clock.expired(|| 4, start + 10 * SECOND));
    }

    #[test]
    fn without_a_timeout_only_idle_discovery_controllers_end() {
        let start = Instant::now();
        let mut io = Clock::new(0, false, start);
        io.wait_for(Waiting::Life, 0, start);
        assert_eq!(io.deadline(), None);
        let mut discovery = Clock::new(0, true, start);
        discovery.wait_for(Waiting::Life, 0, start);
        assert_eq!(discovery.deadline(), Some(start + IDLE_TIMEOUT));
        assert!(!discovery.is_keep_alive());
    }

    #[test]
    fn commands_do_not_replace_enabling() {
        let start = Instant::now();
        let mut clock = Clock::new(5000, false, start);
        assert!(!clock.expired(|| 0, start + IDLE_TIMEOUT - SECOND));
        assert!(clock.expired(|| 1000, start + IDLE_TIMEOUT));
    }

    #[test]
    fn the_largest_timeout_neither_wraps_nor_panics() {
        assert_eq!(round_up(u32::MAX), 4_294_967_000);
        assert_eq!(round_up(1), 1000);
        assert_eq!(round_up(0), 0);
    }
}
