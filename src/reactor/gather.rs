//! When the socket of a busy connection is left alone for a moment, so that its next commands come together.
//!
//! ```text
//!   the core     answers 20 . look: nothing . . . . . . . . . . look: 20     one call for 20 commands, one for 20 answers
//!   the host             takes 4, sends 4, takes 4, sends 4 ...
//! ```
//!
//! A core that is faster than its host, and looks again and again, gets the host's commands by twos and threes. Each costs both
//! sides a system call and the kernel its way through TCP, and the host, which is what limits the rate, has the less time for
//! commands. So where a look after many answers finds nothing, the core leaves the socket alone for as long as the host
//! is likely to need for them.
//!
//! It must not wait for a host that waits for it. That cannot be where the host has at least as many more commands under way
//! as were answered just now, and it has been seen with so many not long ago: so of a burst that is answered whole no more are
//! awaited. A few commands at a time are never delayed.

use std::time::{Duration, Instant};

/// So many commands that are answered together are many.
const MANY: u64 = 8;
/// What the slower hosts need for a command and its answer.
const OF_A_COMMAND: Duration = Duration::from_micros(2);
/// After so many batches, what was seen before the last so many is forgotten.
const BATCHES_A_SPAN: u32 = 512;

/// How a connection's commands come.
#[derive(Debug)]
pub struct Gather {
    most: Duration,
    /// Most commands that were answered together in this span, and in the one before.
    peak: u64,
    peak_before: u64,
    batches: u32,
    /// How long the socket is left alone, if the next look finds nothing.
    wait: Option<Duration>,
    until: Option<Instant>,
}

impl Gather {
    /// For a connection that begins; its socket is left alone for `most` at a time, and never if that is zero.
    #[must_use]
    pub const fn new(most: Duration) -> Self {
        Self { most, peak: 0, peak_before: 0, batches: 0, wait: None, until: None }
    }

    /// So many commands were answered by one send.
    #[inline]
    pub fn answered(&mut self, commands: u64) {
        self.batches += 1;
        if self.batches == BATCHES_A_SPAN {
            (self.peak_before, self.peak, self.batches) = (self.peak, 0, 0);
        }
        self.peak = self.peak.max(commands);
        let is_part = commands <= self.peak.max(self.peak_before) / 2;
        self.wait = (commands >= MANY && is_part && !self.most.is_zero()).then(|| self.of(commands));
        self.until = None;
    }

    #[cold]
    fn of(&self, commands: u64) -> Duration {
        let commands = u32::try_from(commands).unwrap_or(u32::MAX);
        OF_A_COMMAND.saturating_mul(commands).min(self.most)
    }

    /// A look at the socket found nothing.
    #[inline]
    pub fn missed(&mut self) {
        if let Some(wait) = self.wait.take() {
            self.until = Some(Instant::now() + wait);
        }
    }

    /// Whether the socket is to be left alone for now.
    #[inline]
    pub fn holds(&mut self) -> bool {
        let Some(until) = self.until else { return false };
        let holds = Instant::now() < until;
        if !holds {
            self.until = None;
        }
        holds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    /// Of a host that had this many answered together not long ago.
    fn seen(peak: u64) -> Gather {
        let mut gather = Gather::new(LONG);
        gather.answered(peak);
        gather
    }

    /// How long it waits after a batch of so many.
    fn wait(gather: &mut Gather, commands: u64) -> Option<Duration> {
        gather.answered(commands);
        gather.wait
    }

    #[test]
    fn the_socket_is_left_alone_after_many_answers_and_a_look_in_vain() {
        let mut gather = seen(64);
        assert!(!gather.holds());
        gather.answered(32);
        assert!(!gather.holds(), "the next look may find something");
        gather.missed();
        gather.until = gather.until.map(|until| until + LONG);
        assert!(gather.holds());
        gather.answered(32);
        assert!(!gather.holds(), "other answers: another look");
        gather.missed();
        gather.until = Some(Instant::now());
        assert!(!gather.holds(), "it is over");
        gather.missed();
        assert!(!gather.holds(), "once a batch");
    }

    #[test]
    fn it_is_for_as_long_as_a_host_needs_for_the_answers_and_no_longer_than_was_told() {
        let mut gather = seen(1000);
        assert_eq!(wait(&mut gather, 20), Some(20 * OF_A_COMMAND));
        gather.most = Duration::from_micros(5);
        assert_eq!(wait(&mut gather, 20), Some(Duration::from_micros(5)));
        gather.most = Duration::ZERO;
        assert_eq!(wait(&mut gather, 20), None, "switched off");
        gather.missed();
        assert!(!gather.holds());
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
    fn how_many_a_host_had_is_forgotten() {
        let mut gather = seen(64);
        // Two spans, less the batch of 64.
        let waits: Vec<bool> = (1..2 * BATCHES_A_SPAN).map(|_| wait(&mut gather, 32).is_some()).collect();
        let [remembered @ .., last] = waits.as_slice() else { panic!("no batches") };
        assert!(remembered.iter().all(|waits| *waits));
        assert!(!last, "64 at a time is long ago, and 32 is all that is known");
    }
}
