//! Whose time the processors' is while the kernel's initiator and fio ask a target on the same machine, of samples by `perf script`. The
//! kernel's target and its initiator share worker threads, so it is call chains that tell them apart: by the outermost function that
//! belongs to one of both.
//!
//! ```text
//!   target      thread core-* or bare, or nvmet_* in the chain; and what its device needs: the driver of the disk, interrupts of it
//!   initiator   nvme_tcp_* in the chain
//!   fio         its thread, where it is in neither
//!   idle        a processor that waits
//! ```

use std::collections::HashMap;
use std::fmt::Write as _;

use super::samples::{each, most};
use super::windows::{OURS, Window};
use crate::guest::{PEER, RATIO_MIN};

/// Of the target's processor: packets come in there, and our core is pinned there.
const PROCESSOR: u32 = 0;
const SAMPLES_MIN: usize = 100;
/// Functions that are shown of a target.
const SHOWN: usize = 15;

/// Whose a sample is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Target,
    Device,
    Initiator,
    Fio,
    Idle,
    Else,
}

impl Whose {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Target, "the target"),
        (Self::Device, "the kernel's driver of the disk"),
        (Self::Initiator, "the kernel's initiator"),
        (Self::Fio, "fio"),
        (Self::Idle, "idle"),
        (Self::Else, "else"),
    ];

    fn of(comm: &str, chain: &[(&str, bool)]) -> Self {
        const PARTS: [(&str, Whose); 4] = [
            ("nvmet_", Whose::Target),
            ("nvme_tcp_", Whose::Initiator),
            ("nvme_irq", Whose::Device),
            ("nvme_queue_rq", Whose::Device),
        ];
        if comm.starts_with("core-") || comm.starts_with("bare") {
            return Self::Target;
        }
        let of_one =
            |name: &str| PARTS.iter().find(|(begin, _)| name.starts_with(begin)).map(|(_, whose)| *whose);
        if let Some(whose) = chain.iter().rev().find_map(|(name, _)| of_one(name)) {
            return whose;
        }
        if comm.starts_with("fio") {
            return Self::Fio;
        }
        // A processor without work halts, or does what came by an interrupt.
        let halts = |name: &str| name.contains("idle") || name.contains("halt");
        if comm.starts_with("swapper") && chain.first().is_none_or(|(name, _)| halts(name)) {
            return Self::Idle;
        }
        Self::Else
    }
}

#[derive(Clone, Debug, Default)]
struct Side {
    name: String,
    wall_us: f64,
    commands: f64,
    /// By [`Whose::ALL`]: of the target's processor, and of the others.
    counts: [[usize; 2]; Whose::ALL.len()],
    of_target_in_kernel: usize,
    functions: HashMap<(bool, String), usize>,
}

/// A profile's text: what is its limit, then a section a side.
#[must_use]
pub fn profile(script: &str, windows: &[Window]) -> (String, String) {
    let mut sides: Vec<Side> = Vec::new();
    for window in windows {
        if !sides.iter().any(|side| side.name == window.side) {
            sides.push(Side { name: window.side.clone(), ..Side::default() });
        }
        if let Some(side) = sides.iter_mut().find(|side| side.name == window.side) {
            side.wall_us += window.ended_ns.saturating_sub(window.begun_ns) as f64 / 1e3;
            side.commands += window.commands;
        }
    }
    sides.sort_by_key(|side| side.name != OURS);
    each(script, windows, |window, head, chain| {
        let whose = Whose::of(head.comm, chain);
        let Some(side) = sides.iter_mut().find(|side| side.name == window.side) else { return };
        let other = usize::from(head.cpu != Some(PROCESSOR));
        let at = Whose::ALL.iter().position(|(known, _)| *known == whose);
        if let Some(count) =
            at.and_then(|at| side.counts.get_mut(at)).and_then(|counts| counts.get_mut(other))
        {
            *count += 1;
        }
        if let Some(&(name, in_kernel)) = chain.first().filter(|_| whose == Whose::Target) {
            side.of_target_in_kernel += usize::from(in_kernel);
            *side.functions.entry((in_kernel, name.to_owned())).or_default() += 1;
        }
    });
    let mut text = String::new();
    for side in &sides {
        // A string takes everything.
        let _ = write!(text, "\n## {}\n{}", side.name, side.section());
    }
    (limit(&sides), text)
}

impl Side {
    /// Samples of one processor, or of the others.
    fn all(&self, other: usize) -> usize {
        self.counts.iter().filter_map(|counts| counts.get(other)).sum()
    }

    fn part(&self, wanted: Whose, other: usize) -> f64 {
        let counts = Whose::ALL.iter().zip(&self.counts).find(|((whose, _), _)| *whose == wanted);
        let count = counts.and_then(|(_, counts)| counts.get(other)).copied().unwrap_or_default();
        count as f64 / self.all(other).max(1) as f64
    }

    /// The target's part of its processor, that of its disk's driver included.
    fn of_target(&self) -> f64 {
        self.part(Whose::Target, 0) + self.part(Whose::Device, 0)
    }

    /// What initiator, fio and interrupts have of it.
    fn others(&self) -> f64 {
        (1.0 - self.of_target() - self.part(Whose::Idle, 0)).max(0.0)
    }

    /// Microseconds between two commands.
    fn each_us(&self) -> f64 {
        self.wall_us / self.commands.max(1.0)
    }

    fn section(&self) -> String {
        if self.all(0) < SAMPLES_MIN {
            return format!("{} samples: too few to tell anything\n", self.all(0));
        }
        let target: usize = self.counts.first().map_or(0, |counts| counts.iter().sum());
        let mut text = format!(
            "{:.0} commands, one every {:.1} us. Of its own samples the target has {:.0} % in the kernel. Microseconds a command, of \
             processor {PROCESSOR} and of the other, and in per cent of each:\n",
            self.commands,
            self.each_us(),
            100.0 * self.of_target_in_kernel as f64 / target.max(1) as f64
        );
        for (whose, name) in Whose::ALL {
            let [first, other] = [0, 1].map(|other| self.part(whose, other));
            // A string takes everything.
            let _ = writeln!(
                text,
                "{:8.1} us {:8.1} us {:5.1} % {:5.1} % {name}",
                first * self.each_us(),
                other * self.each_us(),
                100.0 * first,
                100.0 * other
            );
        }
        text.push_str("The target's samples, by function, in per cent of them:\n");
        for ((in_kernel, name), count) in most(&self.functions).into_iter().take(SHOWN) {
            let kind = if *in_kernel { 'k' } else { '.' };
            let _ = writeln!(text, "{:5.1} % {kind} {name}", 100.0 * count as f64 / target.max(1) as f64);
        }
        text
    }
}

/// What no target can get beyond: the others' time, on the processor that all of it must pass, remains. They need not take as long beside
/// each target.
fn limit(sides: &[Side]) -> String {
    let told = |side: &&Side| side.all(0) >= SAMPLES_MIN;
    let Some(peer) = sides.iter().find(|side| side.name == PEER).filter(told) else {
        return "not told: there are samples of no peer".to_owned();
    };
    let others_us = |side: &Side| side.others().max(0.01) * side.each_us();
    let mut text = format!(
        "beside {} the initiator, fio and interrupts have {:.0} % of processor {PROCESSOR}, through which each command passes, the target and \
         its disk {:.0} %, and {:.0} % are idle: a target that took no time at all, and left them theirs, would have at most \
         {:.2} times its rate",
        peer.name,
        100.0 * peer.others(),
        100.0 * peer.of_target(),
        100.0 * peer.part(Whose::Idle, 0),
        peer.each_us() / others_us(peer)
    );
    if let Some(ours) = sides.iter().find(|side| side.name == OURS).filter(told) {
        let may_us = (peer.each_us() / RATIO_MIN - others_us(ours)).max(0.0);
        // A string takes everything.
        let _ = write!(
            text,
            ". Beside ours, which had {:.2} times its rate meanwhile, they take {:.1} us a command, beside {} {:.1}: so for {RATIO_MIN} \
             times ours may take {may_us:.1}; it takes {:.1}, looks in vain included, and {2} with its disk {:.1}",
            peer.each_us() / ours.each_us(),
            others_us(ours),
            peer.name,
            others_us(peer),
            ours.of_target() * ours.each_us(),
            peer.of_target() * peer.each_us()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(comm: &str, cpu: u32, at_s: u32, chain: &[&str], count: usize) -> String {
        let chain: String =
            chain.iter().map(|name| format!("\tffffffff81a31aa4 {name} ([kernel.kallsyms])\n")).collect();
        format!("{comm}  123 [{cpu:03}]  {at_s}.000000500: \n{chain}\n").repeat(count)
    }

    #[test]
    fn the_kernels_target_and_its_initiator_are_told_apart_by_their_chains() {
        let window = |side: &str, at_s: u64| Window {
            side: side.to_owned(),
            begun_ns: at_s * 1_000_000_000,
            ended_ns: (at_s + 1) * 1_000_000_000,
            commands: 10_000.0,
            busy_us: None,
        };
        let worker = "kworker/0:1H-nv";
        let script = samples(worker, 0, 1, &["tcp_sendmsg", "nvmet_tcp_io_work"], 400)
            // What the target sends is received within the call: it is the target's time.
            + &samples(worker, 0, 1, &["nvme_tcp_data_ready", "tcp_rcv_established", "nvmet_tcp_try_send"], 100)
            + &samples(worker, 0, 1, &["tcp_sendmsg", "nvme_tcp_io_work"], 300)
            + &samples("swapper", 0, 1, &["native_halt", "default_idle"], 200)
            + &samples("fio", 1, 1, &["io_submit_sqes"], 500)
            + &samples("core-0", 0, 2, &["tcp_sendmsg"], 300)
            + &samples(worker, 0, 2, &["tcp_sendmsg", "nvme_tcp_io_work"], 300);
        let script = script + &samples("bare", 0, 3, &["tcp_sendmsg"], 500);
        let windows = [window("a bare responder", 3), window("nvmet-tcp", 1), window(OURS, 2)];
        let (limit, text) = profile(&script, &windows);
        assert!(text.contains("## a bare responder\n10000 commands"), "{text}");
        assert!(text.contains("   100.0 us      0.0 us 100.0 %   0.0 % the target"), "{text}");
        assert!(text.starts_with("\n## fastice\n10000 commands, one every 100.0 us."), "{text}");
        assert!(text.contains("    50.0 us      0.0 us  50.0 %   0.0 % the target"), "{text}");
        assert!(text.contains("    30.0 us      0.0 us  30.0 %   0.0 % the kernel's initiator"), "{text}");
        assert!(text.contains("     0.0 us    100.0 us   0.0 % 100.0 % fio"), "{text}");
        assert!(limit.contains("at most 3.33 times its rate"), "{limit}");
        // Ours leaves the initiator half of the time, nvmet-tcp 30 %: 66.7 us less those 50 remain for ours.
        let beside = "Beside ours, which had 1.00 times its rate meanwhile, they take 50.0 us a command, beside nvmet-tcp 30.0: so for 1.5 times \
                      ours may take 16.7; it takes 50.0, looks in vain included, and nvmet-tcp with its disk 50.0";
        assert!(limit.contains(beside), "{limit}");
    }
}
