//! How the commands of a busy connection come, and what is done so that they come together: its socket is left alone for a moment, and
//! responses are held until there are several.
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
//! Whether that pays depends on the host: one that is quicker runs out of commands meanwhile. No rule tells, so it is tried
//! ([`Trial`]): a connection is served with it and without in turn for a moment, and goes on as was better, until it is tried
//! again. Where it makes no difference nobody is delayed. A host has to have had twice as many commands answered by one send,
//! not long ago, as by this one: of a burst that is answered whole no more are awaited. Few commands at a time are never delayed, nor
//! such as move much data: beside that a system call is nothing.
//!
//! How many responses are held together ([`Gather::together`]) is half of what the host has outstanding. Where that is not known it is
//! asked of a trial as well: half of what came together lately, or all. It is asked of all hosts, whether or not the answer is needed.
//!
//! Not here: how long the ways are tried (`trial`), what a host has outstanding (`tcp/conn/outstanding.rs`), which responses can be held
//! (`tcp/conn/held.rs`).

use std::time::{Duration, Instant};

use super::trial::{Question, Trial};

/// So many commands that are answered are many.
const MANY: u64 = 8;
/// Of a command, at the most: 16 KiB.
const BYTES_MAX: u64 = 16 << 10;
/// What the slower hosts need for a command and its answer.
const OF_A_COMMAND: Duration = Duration::from_micros(2);
/// What is tried: that its socket is left alone, and that all is answered together.
const LEAVES_ALONE: Question = Question::First;
const ANSWERS_ALL: Question = Question::Second;
/// After so many batches, what was seen before the last so many is forgotten.
const BATCHES_A_SPAN: u32 = 512;
/// So many small ones are as good as one: a host has few under way only if it goes on like that. Between two trials a slow host that is
/// not waited for may send by sixes.
const SMALL_BATCHES_A_BATCH: u32 = 128;

/// How a connection's commands come.
#[derive(Debug)]
pub struct Gather {
    most: Duration,
    /// Most commands that one send answered in this span, and in the one before: a host that had so many under way.
    peak: u64,
    peak_before: u64,
    /// How much of the span is over, in small batches.
    span: u32,
    /// How long the socket is left alone, if the next look finds nothing.
    wait: Option<Duration>,
    until: Option<Instant>,
    /// Which ways pay; none before a host had enough under way. In place: a small piece of the heap that is taken under load lies behind
    /// the large buffers of that time, and keeps their memory when they are given back, 12 KiB a connection.
    trial: Option<Trial>,
}

impl Gather {
    /// For a connection that begins; its socket is left alone for `most` at a time, and never if that is zero.
    #[must_use]
    pub const fn new(most: Duration) -> Self {
        Self { most, peak: 0, peak_before: 0, span: 0, wait: None, until: None, trial: None }
    }

    /// So many commands were answered by one send, for which so many bytes were received and sent.
    #[inline]
    pub fn answered(&mut self, commands: u64, bytes: u64, now: Instant) {
        (self.wait, self.until) = (None, None);
        if let Some(trial) = &mut self.trial {
            trial.answered(commands, now);
        }
        let is_many = commands >= MANY;
        self.span += if is_many { SMALL_BATCHES_A_BATCH } else { 1 };
        if self.span >= BATCHES_A_SPAN * SMALL_BATCHES_A_BATCH {
            (self.peak_before, self.peak, self.span) = (self.peak, 0, 0);
        }
        if is_many && bytes <= commands.saturating_mul(BYTES_MAX) {
            self.answered_many(commands, now);
        }
    }

    fn answered_many(&mut self, commands: u64, now: Instant) {
        self.peak = self.peak.max(commands);
        if self.most.is_zero() || commands > self.peak() / 2 {
            return;
        }
        if self.trial.get_or_insert_with(|| Trial::new(now)).is_with(LEAVES_ALONE) {
            let commands = u32::try_from(commands).unwrap_or(u32::MAX);
            self.wait = Some(OF_A_COMMAND.saturating_mul(commands).min(self.most));
        }
    }

    /// How many commands shall be answered together; zero where a host never had many under way. It has so many outstanding, where
    /// that is known.
    ///
    /// Half of what it has, for one that got all its answers at once would wait for the core, and then the core for it: it works on these
    /// while the core does on the others. Where that is not known, half of what came together lately is less, for a host that got few
    /// answers at once sends few commands: so all is tried too.
    #[must_use]
    #[inline]
    pub fn together(&self, outstanding: Option<u16>) -> u64 {
        let peak = self.peak();
        match (outstanding, &self.trial) {
            // What one send answered was outstanding.
            (Some(outstanding), _) => match u64::from(outstanding).max(peak) {
                few if few < MANY => 0,
                many => many.div_ceil(2),
            },
            (None, Some(trial)) if peak != 0 && trial.is_with(ANSWERS_ALL) => u64::MAX,
            (None, _) => peak / 2,
        }
    }

    fn peak(&self) -> u64 {
        self.peak.max(self.peak_before)
    }

    /// A look at the socket found nothing. Until when it is to be left alone, if it is.
    #[inline]
    pub fn missed(&mut self, now: Instant) -> Option<Instant> {
        let until = now + self.wait.take()?;
        self.until = Some(until);
        Some(until)
    }

    /// Whether the socket is to be left alone for now.
    #[inline]
    pub fn holds(&mut self, now: Instant) -> bool {
        let Some(until) = self.until else { return false };
        let holds = now < until;
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
    const US: Duration = Duration::from_micros(1);

    /// Of a host that had this many answered together not long ago.
    fn seen(peak: u64) -> Gather {
        let mut gather = Gather::new(LONG);
        let now = Instant::now();
        gather.answered(peak, 0, now);
        assert_eq!(gather.missed(now), None);
        gather
    }

    /// How long the socket is left alone after a batch of so many and a look in vain.
    fn wait(gather: &mut Gather, commands: u64) -> Option<Duration> {
        let now = Instant::now();
        gather.answered(commands, 0, now);
        gather.missed(now).map(|until| until - now)
    }

    #[test]
    fn the_socket_is_left_alone_after_many_answers_and_a_look_in_vain() {
        let mut gather = seen(64);
        let now = Instant::now();
        assert!(!gather.holds(now));
        gather.answered(32, 0, now);
        assert!(!gather.holds(now), "the next look may find something");
        let until = gather.missed(now).expect("it is left alone");
        assert_eq!(until, now + 32 * OF_A_COMMAND);
        assert!(gather.holds(now) && gather.holds(until - US));
        assert!(!gather.holds(until), "it is over");
        assert_eq!(gather.missed(now), None, "once a batch");
        gather.answered(32, 0, now);
        assert!(gather.missed(now).is_some());
        gather.answered(1, 0, now);
        assert!(!gather.holds(now), "other answers: another look");
    }

    #[test]
    fn it_is_for_as_long_as_a_host_needs_for_the_answers_and_no_longer_than_was_told() {
        let mut gather = seen(1000);
        assert_eq!(wait(&mut gather, 20), Some(20 * OF_A_COMMAND));
        gather.most = 5 * US;
        assert_eq!(wait(&mut gather, 20), Some(5 * US));
        gather.most = Duration::ZERO;
        assert_eq!(wait(&mut gather, 20), None, "switched off");
        assert!(!gather.holds(Instant::now()));
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
        gather.answered(32, 32 * BYTES_MAX + 1, now);
        assert_eq!(gather.missed(now), None);
        gather.answered(32, 32 * BYTES_MAX, now);
        assert!(gather.missed(now).is_some());
    }

    #[test]
    fn half_of_what_came_together_is_answered_together() {
        let mut gather = seen(32);
        assert_eq!(gather.together(None), 16);
        gather.most = Duration::ZERO;
        assert_eq!(gather.together(None), 16, "also of one that is never left alone");
        let now = Instant::now();
        let small = |gather: &mut Gather, count| (0..count).for_each(|_| gather.answered(MANY - 1, 0, now));
        small(&mut gather, BATCHES_A_SPAN * SMALL_BATCHES_A_BATCH);
        assert_eq!(gather.together(None), 16, "for a second it may have few");
        small(&mut gather, BATCHES_A_SPAN * SMALL_BATCHES_A_BATCH);
        assert_eq!(gather.together(None), 0, "it has few by now");
        assert_eq!(Gather::new(LONG).together(None), 0, "of one of which nothing is known");
    }

    #[test]
    fn half_of_what_is_outstanding_is_answered_together() {
        let mut gather = seen(16);
        for (outstanding, together) in [(32, 16), (31, 16), (128, 64), (1023, 512)] {
            assert_eq!(gather.together(Some(outstanding)), together);
        }
        assert_eq!(gather.together(Some(4)), 8, "as many as 16 were answered by one send");
        let begun = Instant::now();
        for ms in 0..100 {
            gather.answered(8, 0, begun + Duration::from_millis(ms));
            assert_eq!(gather.together(Some(32)), 16, "whatever is tried, {ms}");
        }
        let silent = Gather::new(LONG);
        assert_eq!(silent.together(Some(9)), 5, "though it never had many here");
        assert_eq!(silent.together(Some(7)), 0, "few");
    }

    #[test]
    fn how_many_a_host_had_is_forgotten() {
        let mut gather = seen(64);
        // Two spans, less the batch of 64, within less time than it is tried for.
        let now = Instant::now();
        let waits: Vec<bool> = (1..2 * BATCHES_A_SPAN)
            .map(|_| {
                gather.answered(32, 0, now);
                gather.missed(now).is_some()
            })
            .collect();
        let [remembered @ .., last] = waits.as_slice() else { panic!("no batches") };
        assert!(remembered.iter().all(|waits| *waits));
        assert!(!last, "64 at a time is long ago, and 32 is all that is known");
    }

    /// A host whose batches of 16 take so long where it is served in a way, and where it is not: how often it is served so in the second
    /// of two seconds.
    fn served_so(
        way: impl Fn(&mut Gather, Instant) -> bool,
        with: Duration,
        without: Duration,
    ) -> (usize, usize) {
        let mut gather = seen(64);
        let begun = Instant::now();
        let (mut now, mut so, mut batches) = (begun, 0, 0);
        while now < begun + Duration::from_secs(2) {
            // All come together now and then.
            if batches % 100 == 0 {
                gather.answered(64, 0, now);
            }
            gather.answered(16, 0, now);
            let is_so = way(&mut gather, now);
            if now > begun + Duration::from_secs(1) {
                so += usize::from(is_so);
                batches += 1;
            }
            now += if is_so { with } else { without };
        }
        (so, batches)
    }

    /// A way is kept where the host does more by it, and nowhere else.
    fn is_kept_where_it_is_more(way: impl Fn(&mut Gather, Instant) -> bool) {
        let (so, batches) = served_so(&way, 20 * US, 24 * US);
        assert!(so > batches * 9 / 10, "{so} of {batches}");
        for (with, without) in [(24, 20), (20, 20)] {
            let (so, batches) = served_so(&way, with * US, without * US);
            assert!(so < batches / 10, "{with} {without}: {so} of {batches}");
        }
    }

    #[test]
    fn a_host_that_does_more_with_it_is_waited_for_and_no_other() {
        is_kept_where_it_is_more(|gather, now| gather.missed(now).is_some());
    }

    #[test]
    fn all_is_answered_together_where_that_is_more() {
        is_kept_where_it_is_more(|gather, _| gather.together(None) == u64::MAX);
    }
}
