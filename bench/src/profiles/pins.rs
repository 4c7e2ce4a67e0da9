//! What the processors did while a large file was pinned, and while its map was read bare, of the samples that `perf script` prints.
//!
//! Each side is a process's threads on all processors: the pin's work is shared out over them, the bare calls are made by one. What
//! the kernel does with FIEMAP in the call chain is reading maps; a pin reads the map twice, for the second look is what shows that
//! the guards hold.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::samples::{each, most};
use super::windows::{OURS, Window};

/// Functions that are shown of a side.
const SHOWN: usize = 25;
/// Fewer samples say nothing.
const SAMPLES_MIN: usize = 50;

/// What one side did.
#[derive(Clone, Debug, Default)]
struct Side {
    name: String,
    rounds: f64,
    wall_us: f64,
    /// Samples of the process, of those in FIEMAP, in the kernel else; and of other processes.
    all: usize,
    in_fiemap: usize,
    in_kernel: usize,
    others: usize,
    functions: HashMap<(bool, String), usize>,
}

/// A profile's text: its limit, and a section a side. `hz` is how many samples were taken a second of each processor, `program`
/// how the names of the process's threads begin.
#[must_use]
pub fn profile(script: &str, windows: &[Window], hz: f64, program: &[&str]) -> (String, String) {
    let mut sides: Vec<Side> = Vec::new();
    for window in windows {
        let at = sides.iter().position(|side| side.name == window.side).unwrap_or_else(|| {
            sides.push(Side { name: window.side.clone(), ..Side::default() });
            sides.len() - 1
        });
        if let Some(side) = sides.get_mut(at) {
            side.rounds += 1.0;
            side.wall_us += window.ended_ns.saturating_sub(window.begun_ns) as f64 / 1e3;
        }
    }
    sides.sort_by_key(|side| side.name != OURS);
    each(script, windows, |window, head, chain| {
        let is_ours = program.iter().any(|name| head.comm.starts_with(name));
        if let Some(side) = sides.iter_mut().find(|side| side.name == window.side) {
            side.take(is_ours, head.comm, chain);
        }
    });
    let mut text = String::new();
    for side in &sides {
        // A string takes everything.
        let _ = write!(text, "\n## {}\n{}", side.name, side.section(hz));
    }
    (limit(&sides, hz), text)
}

impl Side {
    fn take(&mut self, is_ours: bool, comm: &str, chain: &[(&str, bool)]) {
        if !is_ours {
            // An idle processor is nobody's.
            self.others += usize::from(!comm.starts_with("swapper"));
            return;
        }
        let Some(&(name, in_kernel)) = chain.first() else { return };
        self.all += 1;
        if chain.iter().any(|(name, in_kernel)| *in_kernel && name.contains("fiemap")) {
            self.in_fiemap += 1;
        } else {
            self.in_kernel += usize::from(in_kernel);
        }
        *self.functions.entry((in_kernel, name.to_owned())).or_default() += 1;
    }

    /// Milliseconds of processor time a round.
    fn ms(&self, samples: usize, hz: f64) -> f64 {
        samples as f64 / hz * 1e3 / self.rounds.max(1.0)
    }

    fn wall_ms(&self) -> f64 {
        self.wall_us / 1e3 / self.rounds.max(1.0)
    }

    fn section(&self, hz: f64) -> String {
        let mut text = format!(
            "{:.0} rounds of {:.0} ms; processor time of each: {:.0} ms, of it FIEMAP in the kernel {:.0}, all else in the kernel {:.0}, \
             own code {:.0}; other processes {:.0}\n",
            self.rounds,
            self.wall_ms(),
            self.ms(self.all, hz),
            self.ms(self.in_fiemap, hz),
            self.ms(self.in_kernel, hz),
            self.ms(self.all - self.in_fiemap - self.in_kernel, hz),
            self.ms(self.others, hz),
        );
        for ((in_kernel, name), count) in most(&self.functions).into_iter().take(SHOWN) {
            let part = count as f64 * 100.0 / self.all.max(1) as f64;
            let _ = writeln!(text, "{part:5.1} {} {name}", if *in_kernel { 'k' } else { '.' });
        }
        text
    }
}

fn limit(sides: &[Side], hz: f64) -> String {
    let ours = sides.iter().find(|side| side.name == OURS);
    let bare = sides.iter().find(|side| side.name != OURS);
    let (Some(ours), Some(bare)) = (ours, bare) else {
        return "none is known: a side was not seen".to_owned();
    };
    if ours.all.min(bare.all) < SAMPLES_MIN {
        return format!("none is known: {} and {} samples are too few", ours.all, bare.all);
    }
    let (reads, reads_bare) = (ours.ms(ours.in_fiemap, hz), bare.ms(bare.in_fiemap, hz));
    let rest = ours.ms(ours.all - ours.in_fiemap, hz);
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    format!(
        "a pin reads the map twice: FIEMAP has {reads:.0} ms of processor time a pin, on all {processors} processors, where reading it once, \
         alone, has {reads_bare:.0}: what is beyond twice that is threads of one pin waiting for each other at the inode's lock. With all \
         else for nothing a pin would take {:.2} times as long as the bare calls, and {:.2} if its threads did not meet there; it takes \
         {:.2}. All else, seal and record among it, has {rest:.0} ms",
        reads / processors / bare.wall_ms(),
        2.0 * reads_bare / processors / bare.wall_ms(),
        ours.wall_ms() / bare.wall_ms(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(side: &str, begun_ms: u64, ended_ms: u64) -> Window {
        let (begun_ns, ended_ns) = (begun_ms * 1_000_000, ended_ms * 1_000_000);
        Window { side: side.to_owned(), begun_ns, ended_ns, commands: 0.0, busy_us: None }
    }

    /// So many samples, one a millisecond.
    fn samples(comm: &str, from_ms: u64, count: u64, chain: &str) -> String {
        (from_ms..from_ms + count)
            .map(|ms| format!("{comm} 7 [001] 0.{ms:03}000000: \n{chain}\n\n"))
            .collect()
    }

    const FIEMAP: &str = "  ffffffff81000000 iomap_iter ([kernel.kallsyms])\n  ffffffff81000100 xfs_vn_fiemap ([kernel.kallsyms])";
    const WRITE: &str = "  ffffffff81000200 ext4_write ([kernel.kallsyms])";
    const OWN: &str = "  55d0 fastice::extent::seal (/usr/bin/fastice)";

    #[test]
    fn the_time_of_both_sides_is_told_apart() {
        let windows = [window("bare", 0, 100), window(OURS, 100, 300)];
        let script = samples("bench", 0, 100, FIEMAP)
            + &samples("stretch", 100, 120, FIEMAP)
            + &samples("bench", 220, 60, OWN)
            + &samples("bench", 280, 20, WRITE)
            + &samples("swapper", 100, 50, WRITE)
            + &samples("kworker", 100, 10, WRITE)
            + &samples("bench", 400, 100, OWN);
        let (limit, text) = profile(&script, &windows, 1000.0, &["bench", "stretch"]);
        assert!(text.contains(
            "1 rounds of 200 ms; processor time of each: 200 ms, of it FIEMAP in the kernel 120, all else in the kernel 20, own code 60; \
             other processes 10"
        ));
        assert!(text.contains(" 60.0 k iomap_iter\n"), "{text}");
        assert!(text.find(OURS) < text.find("bare"), "ours comes first");
        for part in ["FIEMAP has 120 ms", "alone, has 100:", "it takes 2.00.", "has 80 ms"] {
            assert!(limit.contains(part), "{part}: {limit}");
        }
    }

    #[test]
    fn too_few_samples_make_no_limit() {
        let windows = [window("bare", 0, 100), window(OURS, 100, 300)];
        assert!(profile("", &windows, 1000.0, &[]).0.contains("none is known"));
        assert!(profile("", &[], 1000.0, &[]).0.contains("none is known"));
    }
}
