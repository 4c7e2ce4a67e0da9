//! What a target's processor did while its side was measured, of the samples that `perf script` prints.
//!
//! ```text
//!   a sample, by its innermost function   the kernel's | the program's own, libraries and vDSO among it
//!   of the kernel's, by its call chain    work for commands | a look at a socket, which may have been in vain
//! ```
//!
//! A target that polls looks at its sockets when nothing is there as well. How much of it that was no sample can tell: so of looks
//! none counts as needed where a limit is told, as far as the target had time without work by its own account.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::windows::{BARE, OURS, UNPINNED, Window};
use crate::target::OF_BARE_MIN;

/// How the names of the threads of targets begin.
pub(super) const THREADS: [&str; 3] = ["core-", "bare", "reactor_"];
/// In the kernel with one of these in the chain: something was there.
const WORK: [&str; 14] = [
    "tcp_sendmsg",
    "inet_sendmsg",
    "sock_sendmsg",
    "____sys_sendmsg",
    "skb_copy_datagram",
    "__skb_datagram_iter",
    "tcp_cleanup_rbuf",
    "tcp_rcv_space_adjust",
    "tcp_eat_recv_skb",
    "net_rx_action",
    "blkdev_read_iter",
    "blk_",
    "io_read",
    "lo_",
];
/// Functions that are shown of a side.
const SHOWN: usize = 30;
/// Fewer samples say nothing.
const SAMPLES_MIN: usize = 100;
/// Where a target has no work for so much of the time, its host is what limits the rate.
const IDLE_MIN: f64 = 0.1;
/// Others that had more than this of a target's processor make a limit doubtful.
const OTHERS_MAX: f64 = 0.02;

/// What one side did.
#[derive(Clone, Debug, Default)]
pub(super) struct Side {
    pub(super) name: String,
    wall_us: f64,
    commands: f64,
    /// None where it did not tell.
    busy_us: Option<f64>,
    /// Samples of all of its processor, of its thread, of that in the kernel, and of that in looks.
    all: usize,
    of_thread: usize,
    in_kernel: usize,
    in_looks: usize,
    functions: HashMap<(bool, String), usize>,
    others: HashMap<String, usize>,
}

/// A profile's text: what is its limit, then a section a side, of the processor that targets have.
#[must_use]
pub fn profile(script: &str, windows: &[Window], processor: u32, at_depth_1: bool) -> (String, String) {
    let sides = sides(script, windows, processor, &THREADS);
    let mut text = String::new();
    for side in &sides {
        // A string takes everything.
        let _ = write!(text, "\n## {}\n{}", side.name, side.section());
    }
    (limit(&sides, at_depth_1), text)
}

/// What each side did on a processor, by threads whose names begin so; ours first.
pub(super) fn sides(script: &str, windows: &[Window], processor: u32, threads: &[&str]) -> Vec<Side> {
    let mut sides: Vec<Side> = Vec::new();
    for window in windows {
        let side = if let Some(side) = sides.iter_mut().find(|side| side.name == window.side) {
            side
        } else {
            sides.push(Side { name: window.side.clone(), busy_us: Some(0.0), ..Side::default() });
            let Some(side) = sides.last_mut() else { continue };
            side
        };
        side.wall_us += (window.ended_ns - window.begun_ns) as f64 / 1e3;
        side.commands += window.commands;
        side.busy_us = side.busy_us.zip(window.busy_us).map(|(sum, more)| sum + more);
    }
    sides.sort_by_key(|side| side.name != OURS);
    each(script, windows, |window, head, chain| {
        if head.cpu == Some(processor)
            && let Some(side) = sides.iter_mut().find(|side| side.name == window.side)
        {
            side.take(head.comm, threads, chain);
        }
    });
    sides
}

/// Gives each sample that is in a window: the window, its first line, its functions from the innermost on.
pub(super) fn each<'t>(
    script: &'t str,
    windows: &[Window],
    mut take: impl FnMut(&Window, Head<'t>, &[(&'t str, bool)]),
) {
    for sample in script.split("\n\n") {
        let mut lines = sample.lines().filter(|line| !line.trim().is_empty());
        let Some(head) = lines.next().and_then(head) else { continue };
        let Some(window) = windows.iter().find(|window| window.has(head.time_ns)) else { continue };
        let chain: Vec<_> = lines.filter_map(function).collect();
        take(window, head, &chain);
    }
}

/// A sample's first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head<'t> {
    /// The thread's name.
    pub(super) comm: &'t str,
    /// The processor, where it was asked for.
    pub(super) cpu: Option<u32>,
    pub(super) time_ns: u64,
}

/// Reads one.
pub(super) fn head(line: &str) -> Option<Head<'_>> {
    let (rest, time) = line.trim().trim_end_matches(':').rsplit_once(' ')?;
    let (mut rest, mut cpu) = (rest.trim_end(), None);
    if let Some((before, last)) = rest.rsplit_once(' ')
        && let Some(number) = last.strip_prefix('[').and_then(|last| last.strip_suffix(']'))
    {
        (rest, cpu) = (before.trim_end(), number.parse().ok());
    }
    let (comm, _tid) = rest.rsplit_once(' ')?;
    Some(Head { comm: comm.trim(), cpu, time_ns: super::nanoseconds(time)? })
}

/// Of a further line, the function's name, and whether it is the kernel's.
pub(super) fn function(line: &str) -> Option<(&str, bool)> {
    let (address, rest) = line.trim().split_once(' ')?;
    let (name, file) = rest.rsplit_once(" (")?;
    let in_upper_half = u64::from_str_radix(address, 16).is_ok_and(|address| address >> 63 == 1);
    Some((name, file.starts_with("[kernel") || in_upper_half))
}

impl Side {
    fn take(&mut self, comm: &str, threads: &[&str], chain: &[(&str, bool)]) {
        self.all += 1;
        if !threads.iter().any(|thread| comm.starts_with(thread)) {
            // Workers of the kernel say what they work on behind their name, and have numbers in it.
            let name = comm.split(['/', ':', '-']).find(|part| !part.is_empty()).unwrap_or(comm);
            *self.others.entry(name.to_owned()).or_default() += 1;
            return;
        }
        self.of_thread += 1;
        let Some(&(name, in_kernel)) = chain.first() else { return };
        if in_kernel {
            self.in_kernel += 1;
            let is_work = chain.iter().any(|(name, _)| WORK.iter().any(|part| name.starts_with(part)));
            self.in_looks += usize::from(!is_work);
        }
        *self.functions.entry((in_kernel, name.to_owned())).or_default() += 1;
    }

    /// Of a processor whose account is not the target's.
    pub(super) fn without_account(self) -> Self {
        Self { busy_us: None, ..self }
    }

    fn part(&self, count: usize) -> f64 {
        count as f64 / self.of_thread.max(1) as f64
    }

    /// Whether there are enough samples to tell anything.
    pub(super) const fn is_told(&self) -> bool {
        self.of_thread >= SAMPLES_MIN
    }

    fn kernel(&self) -> f64 {
        self.part(self.in_kernel)
    }

    /// Microseconds of its thread a command.
    pub(super) fn each_us(&self) -> f64 {
        self.wall_us * self.of_thread as f64 / self.all.max(1) as f64 / self.commands.max(1.0)
    }

    /// Commands a microsecond.
    fn rate(&self) -> f64 {
        self.commands / self.wall_us.max(1.0)
    }

    /// The part of its time that was no look at a socket, nor own code around looks, of which it has as much a call as around others.
    pub(super) fn at_work(&self) -> f64 {
        1.0 - self.in_looks as f64 / self.in_kernel.max(1) as f64
    }

    /// Microseconds of work a command, by its account.
    fn work_us(&self) -> Option<f64> {
        self.busy_us.map(|busy_us| busy_us / self.commands.max(1.0))
    }

    /// The part of its time in which it had nothing to do: by its account, else all looks. The account does not know when others
    /// had its processor, with work and without.
    fn idle(&self) -> f64 {
        self.busy_us.filter(|_| self.wall_us > 0.0).map_or_else(
            || self.part(self.in_looks),
            |busy_us| (1.0 - busy_us / self.wall_us).clamp(0.0, 1.0),
        )
    }

    /// The part of its processor's time that others had.
    fn others(&self) -> f64 {
        1.0 - self.of_thread as f64 / self.all.max(1) as f64
    }

    /// The part of its time that the kernel needed for commands, at least.
    fn needed(&self) -> f64 {
        self.kernel() - self.part(self.in_looks).min(self.idle())
    }

    pub(super) fn section(&self) -> String {
        let (kernel, each_us) = (self.kernel(), self.each_us());
        if !self.is_told() {
            return format!("{} samples: too few to tell anything\n", self.of_thread);
        }
        let mut text = format!(
            "{:.1} % of its samples are in the kernel, {:.1} % in looks at sockets, of which some are in vain; {:.1} % are its own code. A \
             command: {each_us:.2} us, {:.2} in the kernel, {:.2} its own.",
            100.0 * kernel,
            100.0 * self.part(self.in_looks),
            100.0 * (1.0 - kernel),
            each_us * kernel,
            each_us * (1.0 - kernel)
        );
        // A string takes everything, here and below.
        if self.busy_us.is_some() {
            let _ = write!(
                text,
                " By its own account it had work for {:.0} % of the time.",
                100.0 * (1.0 - self.idle())
            );
        }
        let others: Vec<_> = most(&self.others).into_iter().take(4).collect();
        let others: Vec<_> = others
            .iter()
            .map(|(name, count)| format!("{name} {:.1} %", 100.0 * *count as f64 / self.all as f64))
            .collect();
        if !others.is_empty() {
            let _ = write!(text, " Others on its processor: {}.", others.join(", "));
        }
        text.push('\n');
        for ((in_kernel, name), count) in most(&self.functions).into_iter().take(SHOWN) {
            let kind = if *in_kernel { 'k' } else { '.' };
            let _ = writeln!(text, "{:5.1} % {kind} {name}", 100.0 * self.part(count));
        }
        text
    }
}

/// The largest first, those that are equal by name.
pub(super) fn most<K: Ord>(counts: &HashMap<K, usize>) -> Vec<(&K, usize)> {
    let mut all: Vec<_> = counts.iter().map(|(key, count)| (key, *count)).collect();
    all.sort_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(other.0)));
    all
}

/// What no target can get beyond, in a sentence.
pub(super) fn limit(sides: &[Side], at_depth_1: bool) -> String {
    let told = |side: &&Side| side.is_told();
    let ours = sides.iter().find(|side| side.name == OURS).filter(told);
    let peers = sides.iter().filter(|side| side.name != OURS).filter(told);
    let parts: Vec<_> = peers
        .map(|peer| match ours {
            Some(ours) if peer.name == UNPINNED => beside_unpinned(ours, peer),
            _ if at_depth_1 => at_depth_of_1(peer),
            _ => beside(ours, peer),
        })
        .collect();
    if parts.is_empty() {
        return "not told: there are samples of no peer".to_owned();
    }
    let others = sides.iter().map(Side::others).fold(0.0, f64::max);
    let doubt = if others > OTHERS_MAX {
        format!(". Others had up to {:.0} % of the processor meanwhile: take it for a guess", 100.0 * others)
    } else {
        String::new()
    };
    parts.join("; ") + &doubt
}

/// How the sides did in the rounds of the profile: processor time where both give an account of it.
fn compared(ours: &Side, peer: &Side) -> String {
    let mut text = format!("{:.2} times the rate", ours.rate() / peer.rate());
    if let Some((ours_us, peer_us)) = ours.work_us().zip(peer.work_us()) {
        // A string takes everything.
        let _ = write!(text, ", {:.2} of the processor time", ours_us / peer_us);
    }
    text
}

fn beside(ours: Option<&Side>, peer: &Side) -> String {
    let (needed, with_work) = (peer.needed(), 1.0 - peer.idle());
    let mut text =
        format!("{} has the kernel work for at least {:.0} % of its time", peer.name, 100.0 * needed);
    let _ = write!(
        text,
        ", so whoever needs the kernel as long a command has at most {:.2} times its rate, and at least {:.2} times its processor time \
         a command",
        1.0 / needed,
        (needed / with_work).min(1.0)
    );
    if let Some(ours) = ours {
        let kernel_us = ours.each_us() * ours.needed();
        let _ = write!(
            text,
            ". Of our {:.2} us a command, beside {:.2} ({}), the kernel has at least {kernel_us:.2} and code of ours {:.2}: without any we \
             would have at most {:.2} times the rate",
            ours.each_us(),
            peer.each_us(),
            compared(ours, peer),
            ours.each_us() * (1.0 - ours.kernel()),
            peer.each_us() / kernel_us
        );
        if peer.name == BARE {
            let most_us = peer.each_us() / OF_BARE_MIN;
            let _ = write!(
                text,
                "; at {OF_BARE_MIN} of its rate a command takes {most_us:.2} us, and code of ours may have {:.2} of these",
                (most_us - kernel_us).max(0.0)
            );
        }
        if ours.idle() > IDLE_MIN {
            let _ = write!(
                text,
                ". We had no work for {:.0} % of the time: the host is what limits the rate",
                100.0 * ours.idle()
            );
        }
    }
    text
}

fn at_depth_of_1(peer: &Side) -> String {
    // What it does while it waits for the host delays nothing.
    let own = (1.0 - peer.kernel()).min(1.0 - peer.idle());
    format!(
        "at most {:.0} % of the time of a command of {} is its own code: with none at all, and everything else as it is, a command would \
         take {:.2} times as long",
        100.0 * own,
        peer.name,
        1.0 - own
    )
}

fn beside_unpinned(ours: &Side, peer: &Side) -> String {
    let own = |side: &Side| side.each_us() * (1.0 - side.kernel());
    let (with, without) = (own(ours), own(peer));
    let mut text = format!(
        "with the pin {with:.2} us a command are our own code and {without:.2} without, looks at the device in vain among it: {:+.1} % of the \
         {:.2} us between two commands",
        100.0 * (with - without) / peer.each_us(),
        peer.each_us()
    );
    // What polls while it waits for the device is no work for a command, and only its account leaves it out; the kernel's part is in it.
    if let (Some(with), Some(without)) = (ours.work_us(), peer.work_us()) {
        let _ = write!(
            text,
            "; by its account the core works {with:.2} us a command with it and {without:.2} without, calls of the kernel among it"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEND: &str = "ffffffff81a31aa4 _copy_from_iter ([kernel.kallsyms])\n\tffffffff81cd65e1 tcp_sendmsg_locked ([kernel.kallsyms])";
    const LOOK: &str = "ffffffff81a31aa4 tcp_recvmsg_locked ([kernel.kallsyms])\n\tffffffff81cd65e1 __sys_recvfrom ([kernel.kallsyms])";
    const OWN: &str = "55d0a0 fastice::reactor::core::Core::step (/x/fastice)";
    const VDSO: &str = "7ffd0a0 __vdso_clock_gettime ([vdso])";

    fn samples(comm: &str, at_s: u32, chain: &str, count: usize) -> String {
        format!("{comm}  123 [002]  {at_s}.000000500: \n\t{chain}\n\n").repeat(count)
    }

    fn window(side: &str, at_s: u64, busy_us: Option<f64>) -> Window {
        let (begun_ns, ended_ns) = (at_s * 1_000_000_000, (at_s + 1) * 1_000_000_000);
        Window { side: side.to_owned(), begun_ns, ended_ns, commands: 1e6, busy_us }
    }

    /// A side of 60 % sending, 20 % looks, 20 % own code, in one second.
    fn side(comm: &str, at_s: u32) -> String {
        [(SEND, 600), (LOOK, 200), (OWN, 150), (VDSO, 50)]
            .map(|(chain, count)| samples(comm, at_s, chain, count))
            .concat()
    }

    #[test]
    fn a_name_may_have_blanks_and_the_processor_is_there_or_not() {
        let head = |line| head(line).map(|head| (head.comm, head.cpu, head.time_ns));
        assert_eq!(head("my job 1  22150   1.000000007: "), Some(("my job 1", None, 1_000_000_007)));
        assert_eq!(head("core-0  5 [001]   0.000000007:"), Some(("core-0", Some(1), 7)));
        assert_eq!(head("core-0  5"), None);
    }

    #[test]
    fn all_samples_of_a_side_count_and_none_of_between() {
        let script = side("core-0", 1)
            + &samples("core-0", 5, OWN, 999)
            + &samples("core-0", 1, OWN, 999).replace("[002]", "[001]")
            + &samples("kworker/0:2-mm", 1, SEND, 250);
        let (limit, text) = profile(&script, &[window(OURS, 1, Some(800_000.0))], 2, false);
        assert!(text.contains("80.0 % of its samples are in the kernel, 20.0 % in looks"), "{text}");
        assert!(
            text.contains("20.0 % are its own code. A command: 0.80 us, 0.64 in the kernel, 0.16"),
            "{text}"
        );
        assert!(text.contains("work for 80 % of the time") && text.contains("kworker 20.0 %"), "{text}");
        assert!(text.contains(" 60.0 % k _copy_from_iter") && text.contains("  5.0 % . __vdso"), "{text}");
        assert!(limit.starts_with("not told"), "{limit}");
        let script = script + &side("bare", 2);
        let (limit, _) = profile(
            &script,
            &[window(OURS, 1, Some(800_000.0)), window("the bare responder", 2, None)],
            2,
            false,
        );
        // Of 0.8 us 60 % are sending; of looks none counts, for it had nothing to do as often.
        assert!(
            limit.contains(
                "Of our 0.80 us a command, beside 1.00 (1.00 times the rate), the kernel has at least 0.48 and code of ours 0.16"
            ),
            "{limit}"
        );
        assert!(
            limit.contains("at most 2.08 times the rate; at 0.85 of its rate a command takes 1.18 us, and code of ours may have 0.70"),
            "{limit}"
        );
        assert!(limit.contains("of these. We had no work for 20 % of the time"), "{limit}");
        assert!(limit.contains("Others had up to 20 % of the processor"), "{limit}");
    }

    #[test]
    fn the_limit_is_what_the_kernel_leaves_and_looks_in_vain_are_no_need() {
        let script = side("core-0", 1) + &side("reactor_0", 2) + &side("bare", 3);
        let told =
            |peer, at, busy| profile(&script, &[window(OURS, 1, None), window(peer, at, busy)], 2, false).0;
        let limit = told("SPDK's target", 2, Some(1e6));
        assert!(
            limit.contains("at least 80 % of its time") && limit.contains("at most 1.25 times its rate"),
            "{limit}"
        );
        assert!(limit.contains("at least 0.80 times its processor time"), "{limit}");
        // It had nothing to do for a tenth of the time: half of its looks may have been for nothing.
        let limit = told("SPDK's target", 2, Some(900_000.0));
        assert!(limit.contains("at least 70 %") && limit.contains("at most 1.43 times its rate"), "{limit}");
        assert!(limit.contains("at least 0.78 times its processor time"), "{limit}");
        let limit = told("the bare responder", 3, None);
        assert!(limit.contains("at least 60 %") && limit.contains("at most 1.67 times its rate"), "{limit}");
        let alone = profile(&script, &[window("the bare responder", 3, None)], 2, false).0;
        assert!(alone.contains("at most 1.67") && !alone.contains("Of our"), "{alone}");
    }

    #[test]
    fn at_depth_1_own_code_is_all_that_can_be_saved() {
        let script = side("reactor_0", 2);
        let (limit, _) = profile(&script, &[window("SPDK's target", 2, Some(900_000.0))], 2, true);
        assert!(limit.contains("at most 20 % of the time of a command of SPDK's target"), "{limit}");
        assert!(limit.contains("0.80 times as long"), "{limit}");
    }

    #[test]
    fn beside_the_same_blocks_without_a_pin_own_code_is_compared() {
        let script = side("core-0", 1) + &samples("core-0", 2, SEND, 900) + &samples("core-0", 2, OWN, 100);
        let windows = [window(OURS, 1, None), window(UNPINNED, 2, None)];
        let (limit, _) = profile(&script, &windows, 2, true);
        assert!(
            limit.contains("0.20 us a command are our own code and 0.10 without")
                && limit.contains("+10.0 % of the 1.00 us"),
            "{limit}"
        );
        let windows = [window(OURS, 1, Some(620_000.0)), window(UNPINNED, 2, Some(600_000.0))];
        let (limit, _) = profile(&script, &windows, 2, true);
        assert!(limit.contains("works 0.62 us a command with it and 0.60 without"), "{limit}");
    }
}
