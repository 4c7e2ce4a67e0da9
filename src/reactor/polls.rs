//! Which sockets a core reads by itself, without the ring.
//!
//! ```text
//!   heard a moment ago, and few others are busy      read at every turn, one plain system call        Nothing, Data
//!   silent for a while, or many are busy             a receive waits in the ring                      Cold
//! ```
//!
//! A socket that is read at every turn costs one cheap call a turn; one that waits in the ring costs more for each receive
//! (an entry, a poll that is armed and fires, a completion), and nothing while it waits. So the first is for the few that a
//! core works for right now, and the second for all others.

use std::time::{Duration, Instant};

/// Sockets that a core reads by itself at the most.
pub(super) const POLLED_MAX: usize = 4;
/// A socket that was silent for so long goes back to the ring.
const SILENCE_MAX: Duration = Duration::from_micros(200);

/// What came of looking at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    /// Nothing is there.
    Nothing,
    /// Something was received, or the connection's end.
    Data,
    /// It is not to be looked at any more.
    Cold,
}

/// When a connection was heard last.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    at: Instant,
    span: u32,
}

impl Heard {
    /// A connection that begins now.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self { at: now, span: 0 }
    }
}

/// How many sockets a core reads by itself, and how many are busy.
#[derive(Debug)]
pub struct SocketPolls {
    silence_max: Duration,
    polled: usize,
    /// Connections that were heard in this span of time between two ticks, and in the one before.
    busy: usize,
    busy_before: usize,
    span: u32,
}

impl SocketPolls {
    /// For a core that polls for `idle` after its last work; `None` for one that never sleeps.
    pub(super) fn new(idle: Option<Duration>) -> Self {
        let silence_max = idle.map_or(SILENCE_MAX, |idle| idle.min(SILENCE_MAX));
        Self { silence_max, polled: 0, busy: 0, busy_before: 0, span: 1 }
    }

    /// A connection has received something.
    pub fn heard(&mut self, heard: &mut Heard, now: Instant) {
        heard.at = now;
        if heard.span != self.span {
            heard.span = self.span;
            self.busy += 1;
        }
    }

    /// Whether one more may be read by the core itself: this one, which has no receive in the ring.
    #[must_use]
    pub fn has_place(&self, heard: &Heard, now: Instant) -> bool {
        self.polled < POLLED_MAX && self.goes_on(heard, now)
    }

    /// Whether one that is read by the core itself stays so.
    #[must_use]
    pub fn goes_on(&self, heard: &Heard, now: Instant) -> bool {
        self.busy.max(self.busy_before) <= POLLED_MAX
            && now.saturating_duration_since(heard.at) < self.silence_max
    }

    /// So many are read by the core itself.
    pub(super) const fn set_polled(&mut self, polled: usize) {
        self.polled = polled;
    }

    /// A span of time is over.
    pub(super) const fn tick(&mut self) {
        self.busy_before = self.busy;
        self.busy = 0;
        self.span = self.span.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn who_was_heard_a_moment_ago_has_a_place_and_loses_it_by_silence() {
        let now = Instant::now();
        let mut polls = SocketPolls::new(None);
        let mut heard = Heard::new(now);
        polls.heard(&mut heard, now);
        assert!(polls.has_place(&heard, now + 199 * US));
        assert!(!polls.has_place(&heard, now + 200 * US));
        polls.set_polled(POLLED_MAX);
        assert!(!polls.has_place(&heard, now), "all places are taken");
        assert!(polls.goes_on(&heard, now), "who has one keeps it");
    }

    #[test]
    fn a_core_that_sleeps_sooner_looks_for_no_longer() {
        let now = Instant::now();
        let heard = Heard::new(now);
        let polls = SocketPolls::new(Some(20 * US));
        assert!(polls.has_place(&heard, now + 19 * US));
        assert!(!polls.has_place(&heard, now + 20 * US));
        assert!(!SocketPolls::new(Some(Duration::ZERO)).has_place(&heard, now), "one that sleeps at once");
    }

    #[test]
    fn when_many_are_busy_all_go_to_the_ring_and_come_back_when_they_are_silent() {
        let now = Instant::now();
        let mut polls = SocketPolls::new(None);
        let mut many = [Heard::new(now); POLLED_MAX + 1];
        for heard in &mut many[..POLLED_MAX] {
            polls.heard(heard, now);
            polls.heard(heard, now);
        }
        assert!(polls.goes_on(&many[0], now), "one connection counts once");
        polls.heard(&mut many[POLLED_MAX], now);
        assert!(!polls.goes_on(&many[0], now));
        polls.tick();
        polls.heard(&mut many[0], now);
        assert!(!polls.goes_on(&many[0], now), "they were busy in the span before");
        polls.tick();
        assert!(polls.goes_on(&many[0], now));
    }
}
