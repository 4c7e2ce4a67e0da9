//! Which sockets a core reads by itself, without the ring.
//!
//! ```text
//!   few are busy     those heard a moment ago are read at every turn            silent for a while: to the ring
//!   many are busy    some of all that are busy are read at every turn, as long  silent for some looks: to the ring
//!                    as they have something often enough                        too seldom: all to the ring, for a while
//! ```
//!
//! A socket that is read costs one cheap call a look; one that waits in the ring costs more for each receive
//! (an entry, a poll that is armed and fires, a completion), and nothing while it waits. So reading pays for the few that a
//! core works for right now, whose next command it must not be late for; and for many that have sent again by the time that all
//! others had their turn. It is all of these or none: a connection in the ring is served in other turns, and would not have its share
//! beside others that are read.

use std::time::Duration;

use crate::stage::Stamp;

/// So many busy connections are few.
const FEW: usize = 4;
/// A socket that was silent for so long goes back to the ring, when few are busy.
const SILENCE_MAX: Duration = Duration::from_micros(200);
/// A socket that had nothing so many times in a row goes back to the ring, when many are busy.
const MISSES_MAX: u8 = 32;
/// A receive in the ring costs as much as so many looks at a socket that has nothing.
const LOOKS_A_HIT_MAX: u64 = 6;
/// Spans of time for which the many stay in the ring when reading them did not pay.
const REST_SPANS: u32 = 50;

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
    at: Stamp,
    span: u32,
    /// How often in a row there was nothing when it was read.
    misses: u8,
}

impl Heard {
    /// A connection that begins now.
    #[must_use]
    pub const fn new(now: Stamp) -> Self {
        Self { at: now, span: 0, misses: 0 }
    }
}

/// How many sockets a core reads by itself, how many are busy, and what comes of it.
#[derive(Debug)]
pub struct SocketPolls {
    silence_max_ns: u64,
    /// Sockets that are read by the core at the most: all that it serves. Were some of many busy ones left to the ring, these would be
    /// served in every second turn, and those that are read in one of many.
    polled_max: usize,
    polled: usize,
    /// Connections that were heard in this span of time between two ticks, and in the one before.
    busy: usize,
    busy_before: usize,
    span: u32,
    /// In this span: how often a socket was read, and how often it had nothing.
    looks: u64,
    misses: u64,
    /// Spans for which reading many is given up.
    rests: u32,
}

impl SocketPolls {
    /// For a core of so many connections that polls for `idle` after its last work; `None` for one that never sleeps.
    pub(super) fn new(idle: Option<Duration>, connections_max: usize) -> Self {
        let silence_max = idle.map_or(SILENCE_MAX, |idle| idle.min(SILENCE_MAX));
        Self {
            silence_max_ns: u64::try_from(silence_max.as_nanos()).unwrap_or(u64::MAX),
            polled_max: connections_max,
            polled: 0,
            busy: 0,
            busy_before: 0,
            span: 1,
            looks: 0,
            misses: 0,
            rests: 0,
        }
    }

    /// A connection has received something.
    pub fn heard(&mut self, heard: &mut Heard, now: Stamp) {
        heard.at = now;
        heard.misses = 0;
        if heard.span != self.span {
            heard.span = self.span;
            self.busy += 1;
        }
    }

    /// A socket is read by the core.
    pub const fn look(&mut self) {
        self.looks = self.looks.wrapping_add(1);
    }

    /// A socket is not read, for what it sent before is not dealt with: as good as nothing, so that a core is not kept awake by a
    /// host that takes no answers.
    pub const fn held(&self, heard: &mut Heard) {
        heard.misses = heard.misses.saturating_add(1);
    }

    /// A socket that was read by the core had nothing.
    pub const fn missed(&mut self, heard: &mut Heard) {
        self.misses = self.misses.wrapping_add(1);
        heard.misses = heard.misses.saturating_add(1);
    }

    /// A socket is not looked at until then: its silence is not its own.
    pub const fn left_alone(&self, heard: &mut Heard, until: Stamp) {
        heard.at = until;
    }

    /// Whether one more may be read by the core itself: this one, which has no receive in the ring.
    #[must_use]
    pub fn has_place(&self, heard: &Heard, now: Stamp) -> bool {
        let places = if self.are_few() { FEW } else { self.polled_max };
        self.polled < places && self.goes_on(heard, now)
    }

    /// Whether one that is read by the core itself stays so.
    #[must_use]
    pub fn goes_on(&self, heard: &Heard, now: Stamp) -> bool {
        if self.are_few() {
            return now.ns_since(heard.at) < self.silence_max_ns;
        }
        self.rests == 0 && heard.misses < MISSES_MAX && self.silence_max_ns > 0
    }

    /// Whether few connections are busy.
    pub(super) fn are_few(&self) -> bool {
        self.busy.max(self.busy_before) <= FEW
    }

    /// So many are read by the core itself.
    pub(super) const fn set_polled(&mut self, polled: usize) {
        self.polled = polled;
    }

    /// A span of time is over.
    pub(super) fn tick(&mut self) {
        let hits = self.looks - self.misses.min(self.looks);
        let pays = hits.saturating_mul(LOOKS_A_HIT_MAX) >= self.looks;
        self.rests = if pays || self.are_few() { self.rests.saturating_sub(1) } else { REST_SPANS };
        (self.looks, self.misses) = (0, 0);
        self.busy_before = self.busy;
        self.busy = 0;
        self.span = self.span.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLLED_MAX: usize = 1024;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn who_was_heard_a_moment_ago_has_a_place_and_loses_it_by_silence() {
        let now = Stamp::now();
        let mut polls = SocketPolls::new(None, POLLED_MAX);
        let mut heard = Heard::new(now);
        polls.heard(&mut heard, now);
        assert!(polls.has_place(&heard, now.after(199 * US)));
        assert!(!polls.has_place(&heard, now.after(200 * US)));
        polls.set_polled(FEW);
        assert!(!polls.has_place(&heard, now), "all places are taken");
        assert!(polls.goes_on(&heard, now), "who has one keeps it");
    }

    #[test]
    fn while_a_socket_is_left_alone_it_is_not_silent() {
        let now = Stamp::now();
        let polls = SocketPolls::new(Some(20 * US), POLLED_MAX);
        let mut heard = Heard::new(now);
        polls.left_alone(&mut heard, now.after(32 * US));
        assert!(polls.goes_on(&heard, now) && polls.goes_on(&heard, now.after(51 * US)));
        assert!(!polls.goes_on(&heard, now.after(52 * US)));
    }

    #[test]
    fn a_core_that_sleeps_sooner_looks_for_no_longer() {
        let now = Stamp::now();
        let heard = Heard::new(now);
        let polls = SocketPolls::new(Some(20 * US), POLLED_MAX);
        assert!(polls.has_place(&heard, now.after(19 * US)));
        assert!(!polls.has_place(&heard, now.after(20 * US)));
        let mut polls = SocketPolls::new(Some(Duration::ZERO), POLLED_MAX);
        assert!(!polls.has_place(&heard, now), "one that sleeps at once");
        for mut heard in [Heard::new(now); FEW + 1] {
            polls.heard(&mut heard, now);
            assert!(!polls.has_place(&heard, now), "one that sleeps at once, of many");
        }
    }

    /// Many that were heard in this span.
    fn many(polls: &mut SocketPolls, now: Stamp) -> [Heard; FEW + 1] {
        let mut many = [Heard::new(now); FEW + 1];
        for heard in &mut many {
            polls.heard(heard, now);
        }
        many
    }

    #[test]
    fn of_many_all_that_are_busy_are_read_however_long_a_turn_takes() {
        let now = Stamp::now();
        let later = now.after(100 * SILENCE_MAX);
        let mut polls = SocketPolls::new(None, POLLED_MAX);
        let [mut busy, mut silent, ..] = many(&mut polls, now);
        polls.set_polled(POLLED_MAX - 1);
        assert!(polls.has_place(&busy, later));
        polls.set_polled(POLLED_MAX);
        assert!(!polls.has_place(&busy, later), "all places are taken");
        for _ in 0..MISSES_MAX {
            assert!(polls.goes_on(&silent, later));
            polls.missed(&mut silent);
            polls.missed(&mut busy);
            polls.heard(&mut busy, now);
        }
        assert!(!polls.goes_on(&silent, later));
        assert!(polls.goes_on(&busy, later));
    }

    #[test]
    fn many_rest_in_the_ring_when_they_are_read_in_vain_too_often() {
        let now = Stamp::now();
        let mut polls = SocketPolls::new(None, POLLED_MAX);
        let span = |polls: &mut SocketPolls, looks: u64| {
            let mut many = many(polls, now);
            for look in 0..looks {
                polls.look();
                if look > 0 {
                    polls.missed(&mut many[0]);
                }
            }
            polls.tick();
            polls.goes_on(&many[1], now)
        };
        assert!(span(&mut polls, LOOKS_A_HIT_MAX), "one in so many pays");
        for _ in 0..2 {
            assert!(!span(&mut polls, LOOKS_A_HIT_MAX + 1));
            for rest in 1..REST_SPANS {
                assert!(!span(&mut polls, 0), "{rest}");
            }
            assert!(span(&mut polls, 0), "they are tried again");
        }
    }

    #[test]
    fn many_are_few_again_when_they_are_silent() {
        let now = Stamp::now();
        let late = now.after(SILENCE_MAX);
        let mut polls = SocketPolls::new(None, POLLED_MAX);
        let mut many = [Heard::new(now); FEW + 1];
        for heard in &mut many[..FEW] {
            polls.heard(heard, now);
            polls.heard(heard, now);
        }
        assert!(!polls.goes_on(&many[0], late), "one connection counts once: they are few");
        polls.heard(&mut many[FEW], now);
        assert!(polls.goes_on(&many[0], late));
        polls.tick();
        polls.heard(&mut many[0], now);
        assert!(polls.goes_on(&many[0], late), "they were busy in the span before");
        polls.tick();
        assert!(!polls.goes_on(&many[0], late));
        assert!(polls.goes_on(&many[0], now));
    }
}
