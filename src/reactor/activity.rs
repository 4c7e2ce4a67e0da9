//! What a core does with its time: the states of the idle policy, and what ends a sleep.
//!
//! ```text
//!            work                nothing to do for the polling time
//!   busy <---------- polling ----------------------------> asleep
//!     '---- none left --->^                                   |
//!     ^                   '------- the next look at deadlines-|
//!     '----------------- a socket, a device, mail, a guest ---'
//! ```
//!
//! Counted from the times at which a turn looks at the clock anyway; a system call that waits counts as sleep, whatever the
//! kernel does in it.

use crate::stage::Stamp;

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Something was received from a host, or sent to one.
    Socket,
    /// A device completed something.
    Device,
    /// Another thread posted a letter, or a session has news.
    Mail,
    /// A connection was accepted.
    Accept,
    /// It was time to look at deadlines.
    Timer,
}

impl Wake {
    /// All.
    pub const ALL: [Self; 5] = [Self::Socket, Self::Device, Self::Mail, Self::Accept, Self::Timer];

    /// A stable word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Device => "device",
            Self::Mail => "mail",
            Self::Accept => "accept",
            Self::Timer => "timer",
        }
    }
}

/// What a core did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoreActivity {
    /// Time of turns that had work, in nanoseconds.
    pub busy_ns: u64,
    /// Time of turns that looked for work and found none.
    pub polling_ns: u64,
    /// Time asleep in the kernel.
    pub asleep_ns: u64,
    /// How often it found work, after a turn that had none, or a sleep.
    pub begins_of_work: u64,
    /// How often it found none, after a turn that had some, or a sleep.
    pub begins_of_polling: u64,
    /// What ended its sleeps: how often each of [`Wake::ALL`]. It fell asleep as often.
    pub wakes: [u64; Wake::ALL.len()],
}

impl CoreActivity {
    /// How often it fell asleep.
    #[must_use]
    pub fn sleeps(&self) -> u64 {
        self.wakes.iter().fold(0, |sum, wakes| sum.wrapping_add(*wakes))
    }
}

/// Counts the turns of one core.
#[derive(Debug)]
pub(super) struct Ledger {
    counted: CoreActivity,
    /// When the turn before began, and whether it had work.
    before: Stamp,
    had_work: bool,
}

/// One turn, as the loop saw it.
#[derive(Clone, Copy, Debug)]
pub(super) struct TurnTaken {
    /// When it entered the kernel, and when it came back.
    pub(super) submits: Stamp,
    pub(super) now: Stamp,
    /// Whether it might wait there, and then what it found.
    pub(super) slept: Option<Wake>,
    pub(super) has_work: bool,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self { counted: CoreActivity::default(), before: Stamp::now(), had_work: false }
    }

    #[inline]
    pub(super) const fn turn(&mut self, turn: TurnTaken) {
        let TurnTaken { submits, now, slept, has_work } = turn;
        // From when it came back the last time, it dealt with what it found then.
        let dealt_ns = submits.ns_since(self.before);
        let inside_ns = now.ns_since(submits);
        let counted = &mut self.counted;
        // A sleep lies between this turn and the one before.
        let is_another = slept.is_some() || has_work != self.had_work;
        let begins = if has_work { &mut counted.begins_of_work } else { &mut counted.begins_of_polling };
        *begins = begins.wrapping_add(is_another as u64);
        if self.had_work {
            counted.busy_ns = counted.busy_ns.wrapping_add(dealt_ns);
        } else {
            counted.polling_ns = counted.polling_ns.wrapping_add(dealt_ns);
        }
        if let Some(wake) = slept {
            counted.asleep_ns = counted.asleep_ns.wrapping_add(inside_ns);
            counted.wakes[wake as usize] = counted.wakes[wake as usize].wrapping_add(1);
        } else if has_work {
            counted.busy_ns = counted.busy_ns.wrapping_add(inside_ns);
        } else {
            counted.polling_ns = counted.polling_ns.wrapping_add(inside_ns);
        }
        (self.before, self.had_work) = (now, has_work);
    }

    pub(super) const fn counted(&self) -> &CoreActivity {
        &self.counted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_nanosecond_is_counted_once_where_it_belongs() {
        let mut ledger = Ledger::new();
        let begun = ledger.before.ns();
        let at = |ns: u64| Stamp::from_ns(begun + ns);
        let mut turn = |submits, now, slept, has_work| {
            ledger.turn(TurnTaken { submits: at(submits), now: at(now), slept, has_work });
        };
        turn(10, 100, None, false); // polls: 100
        turn(105, 200, None, true); // the rest of the last one: 5; the system call that found work: 95
        turn(500, 600, None, false); // deals with it: 300; finds nothing: 100
        turn(610, 5_610, Some(Wake::Socket), true); // 10; asleep: 5000
        turn(6_000, 26_000, Some(Wake::Timer), false); // deals with it: 390; asleep: 20000
        let counted = *ledger.counted();
        assert_eq!(counted.polling_ns, 100 + 5 + 100 + 10);
        assert_eq!(counted.busy_ns, 95 + 300 + 390);
        assert_eq!(counted.asleep_ns, 25_000);
        assert_eq!(counted.polling_ns + counted.busy_ns + counted.asleep_ns, 26_000);
        assert_eq!((counted.wakes, counted.sleeps()), ([1, 0, 0, 0, 1], 2));
        assert_eq!(counted.begins_of_work, 2, "of 95 and of the sleep that a socket ended");
        assert_eq!(counted.begins_of_polling, 2, "after 300, and of the sleep that time ended");
    }

    #[test]
    fn what_ends_a_sleep_is_told_in_the_order_of_the_list() {
        for (at, wake) in Wake::ALL.into_iter().enumerate() {
            assert_eq!(wake as usize, at, "{}", wake.word());
        }
    }
}
