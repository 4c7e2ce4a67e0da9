//! When the socket of a busy connection is left alone for a moment, so that its next commands come together.
//!
//! ```text
//!   the core     answers 20 . look: nothing . . . . . . . . . . look: 20     one call for 20 commands, one for 20 answers
//!   the host             takes 4, sends 4, takes 4, sends 4 ...
//! ```
//!
//! A core that is faster than its host, and looks again and again, gets the host's commands by twos and threes. Each costs both
//! sides a system call and the kernel its way through TCP, and the host, which is what limits the rate, has the less time for
//! commands. So where a look after many answers finds nothing, the core leaves the socket alone: two microseconds an answer, which
//! is what the slower hosts need.
//!
//! It is of no use to wait for a host that waits for the core, and that is guarded against twice. A host has to have had twice as
//! many commands answered by one send, not long ago, as by this one: of a burst that is answered whole no more are awaited. And
//! where again and again nothing came in the second half of the time, or the core was busy with others meanwhile, the host is not
//! waited for during some thousand batches. Few commands at a time are never delayed, nor such as move much data: beside that a system call
//! is nothing.

use std::time::{Duration, Instant};

/// So many commands that are answered are many.
const MANY: u64 = 8;
/// Of a command, at the most: 16 KiB.
const BYTES_MAX: u64 = 16 << 10;
/// What the slower hosts need for a command and its answer.
const OF_A_COMMAND: Duration = Duration::from_micros(2);
/// After so many batches, what was seen before the last so many is forgotten.
const BATCHES_A_SPAN: u32 = 512;
/// So often in a row nothing may come in the second half of the time. Hosts send several commands at once: now and then it is so by
/// chance.
const IN_VAIN_MAX: u8 = 16;
/// Batches for which a host is not waited for then: so one in 256 may be delayed for nothing.
const BATCHES_OF_REST: u32 = 4096;

/// How a connection's commands come.
#[derive(Debug)]
pub struct Gather {
    most: Duration,
    /// Most commands that one send answered in this span, and in the one before: a host that had so many under way.
    peak: u64,
    peak_before: u64,
    batches: u32,
    /// How long the socket is left alone, if the next look finds nothing.
    wait: Option<Duration>,
    pause: Option<Pause>,
    in_vain: u8,
    /// Batches for which nothing is waited for.
    rest: u32,
}

/// A socket is left alone.
#[derive(Clone, Copy, Debug)]
struct Pause {
    half: Instant,
    until: Instant,
    /// Bytes that were there after half of the time, once that is known.
    seen_bytes: Option<u64>,
}

impl Gather {
    /// For a connection that begins; its socket is left alone for `most` at a time, and never if that is zero.
    #[must_use]
    pub const fn new(most: Duration) -> Self {
        Self { most, peak: 0, peak_before: 0, batches: 0, wait: None, pause: None, in_vain: 0, rest: 0 }
    }

    /// So many commands were answered by one send, for which so many bytes were received and sent.
    #[inline]
    pub fn answered(&mut self, commands: u64, bytes: u64) {
        (self.wait, self.pause) = (None, None);
        if commands >= MANY && bytes <= commands.saturating_mul(BYTES_MAX) && !self.most.is_zero() {
            self.answered_many(commands);
        }
    }

    fn answered_many(&mut self, commands: u64) {
        self.batches += 1;
        if self.batches == BATCHES_A_SPAN {
            (self.peak_before, self.peak, self.batches) = (self.peak, 0, 0);
        }
        self.peak = self.peak.max(commands);
        if self.rest > 0 {
            self.rest -= 1;
        } else if commands <= self.peak.max(self.peak_before) / 2 {
            let commands = u32::try_from(commands).unwrap_or(u32::MAX);
            self.wait = Some(OF_A_COMMAND.saturating_mul(commands).min(self.most));
        }
    }

    /// A look at the socket found nothing. Until when it is to be left alone, if it is.
    #[inline]
    pub fn missed(&mut self, now: Instant) -> Option<Instant> {
        let wait = self.wait.take()?;
        let until = now + wait;
        self.pause = Some(Pause { half: now + wait / 2, until, seen_bytes: None });
        Some(until)
    }

    /// Whether the socket is to be left alone for now; `unread` tells how many bytes are there.
    #[inline]
    pub fn holds(&mut self, now: Instant, unread: impl FnOnce() -> u64) -> bool {
        let Some(pause) = &mut self.pause else { return false };
        if now < pause.half {
            return true;
        }
        if now < pause.until {
            pause.seen_bytes.get_or_insert_with(unread);
            return true;
        }
        let seen_bytes = pause.seen_bytes;
        self.pause = None;
        // Where the core was busy elsewhere for all of the second half, commands gather without being waited for.
        self.judge(seen_bytes.is_some_and(|seen_bytes| unread() > seen_bytes));
        false
    }

    /// Whether more came in the second half.
    fn judge(&mut self, came: bool) {
        self.in_vain = if came { 0 } else { self.in_vain + 1 };
        if self.in_vain == IN_VAIN_MAX {
            (self.rest, self.in_vain) = (BATCHES_OF_REST, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const US: Duration = Duration::from_micros(1);

    /// Of a host that had this many answered together not long ago.
    fn seen(peak: u64) -> Gather {
        let mut gather = Gather::new(LONG);
        gather.answered(peak, 0);
        assert_eq!(gather.missed(Instant::now()), None);
        gather
    }

    /// How long the socket is left alone after a batch of so many and a look in vain.
    fn wait(gather: &mut Gather, commands: u64) -> Option<Duration> {
        gather.answered(commands, 0);
        let now = Instant::now();
        gather.missed(now).map(|until| until - now)
    }

    fn holds(gather: &mut Gather, now: Instant) -> bool {
        gather.holds(now, || 0)
    }

    #[test]
    fn the_socket_is_left_alone_after_many_answers_and_a_look_in_vain() {
        let mut gather = seen(64);
        let now = Instant::now();
        assert!(!holds(&mut gather, now));
        gather.answered(32, 0);
        assert!(!holds(&mut gather, now), "the next look may find something");
        let until = gather.missed(now).expect("it is left alone");
        assert_eq!(until, now + 32 * OF_A_COMMAND);
        assert!(holds(&mut gather, now) && holds(&mut gather, until - US));
        assert!(!holds(&mut gather, until), "it is over");
        assert_eq!(gather.missed(now), None, "once a batch");
        gather.answered(32, 0);
        assert!(gather.missed(now).is_some());
        gather.answered(1, 0);
        assert!(!holds(&mut gather, now), "other answers: another look");
    }

    #[test]
    fn it_is_for_as_long_as_a_host_needs_for_the_answers_and_no_longer_than_was_told() {
        let mut gather = seen(1000);
        assert_eq!(wait(&mut gather, 20), Some(20 * OF_A_COMMAND));
        gather.most = 5 * US;
        assert_eq!(wait(&mut gather, 20), Some(5 * US));
        gather.most = Duration::ZERO;
        assert_eq!(wait(&mut gather, 20), None, "switched off");
        assert!(!holds(&mut gather, Instant::now()));
    }

    #[test]
    fn nobody_is_awaited_who_may_have_no_other_command() {
        let mut gather = seen(32);
        assert_eq!(wait(&mut gather, 32), None, "all that it had");
        assert_eq!(wait(&mut gather, 17), None);
        assert!(wait(&mut gather, 16).is_some());
        assert!(wait(&mut gather, MANY).is_some());
        assert_eq!(wait(&mut gather, MANY - 1), None, "few are never delayed");
        assert_eq!(wait(&mut gather, 0), None);
    }

    #[test]
    fn commands_that_move_much_are_not_awaited() {
        let mut gather = seen(64);
        let now = Instant::now();
        gather.answered(32, 32 * BYTES_MAX + 1);
        assert_eq!(gather.missed(now), None);
        gather.answered(32, 32 * BYTES_MAX);
        assert!(gather.missed(now).is_some());
    }

    #[test]
    fn how_many_a_host_had_is_forgotten() {
        let mut gather = seen(64);
        // Two spans, less the batch of 64.
        let waits: Vec<bool> = (1..2 * BATCHES_A_SPAN).map(|_| wait(&mut gather, 32).is_some()).collect();
        let [remembered @ .., last] = waits.as_slice() else { panic!("no batches") };
        assert!(remembered.iter().all(|waits| *waits));
        assert!(!last, "64 at a time is long ago, and 32 is all that is known");
    }

    /// One wait after 16 answers, of a host that has sent so much after half of it, and at its end. False where there was none.
    fn waited(gather: &mut Gather, after_half: u64, at_the_end: u64) -> bool {
        gather.answered(16, 0);
        let now = Instant::now();
        let Some(until) = gather.missed(now) else { return false };
        assert!(gather.holds(until - US, || after_half));
        assert!(!gather.holds(until, || at_the_end));
        true
    }

    #[test]
    fn a_host_that_has_nothing_more_to_say_is_not_waited_for_again_and_again() {
        let mut gather = seen(64);
        for _ in 0..100 {
            assert!(waited(&mut gather, 72, 144), "it goes on to send");
        }
        for _ in 1..IN_VAIN_MAX {
            assert!(waited(&mut gather, 72, 72));
        }
        assert!(waited(&mut gather, 72, 73), "in time");
        for _ in 0..IN_VAIN_MAX {
            assert!(waited(&mut gather, 1152, 1152), "all of its 16 are there long before");
        }
        while gather.rest > 0 {
            gather.answered(64, 0);
            assert_eq!(gather.missed(Instant::now()), None);
            if gather.rest > 0 {
                assert!(!waited(&mut gather, 0, 0), "a burst of 64, and then 16, is no reason either");
            }
        }
        assert!(waited(&mut gather, 0, 0), "it is tried again");
    }

    #[test]
    fn a_core_whose_turns_take_longer_than_the_wait_does_not_wait_for_ever() {
        let mut gather = seen(64);
        for turn in 0..IN_VAIN_MAX {
            gather.answered(16, 0);
            let until = gather.missed(Instant::now()).unwrap_or_else(|| panic!("turn {turn}"));
            assert!(!gather.holds(until, || 1152), "the look in the second half did not take place");
        }
        assert_eq!(wait(&mut gather, 16), None);
    }
}
