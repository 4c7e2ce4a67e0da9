//! What lookups among many extents wait for: where in a turn the time is, by samples that `perf script` prints, and how much of it no lookup
//! could do without.
//!
//! ```text
//!   a lookup in a map of one extent           its work: the segment, the check
//! + an extent read, 32 together, places known what is beyond the core's caches: no lookup fetches less       = the least
//!
//!   a lookup in a map of 100 extents          its work, and each step of a search
//! + index and four extents read, 32 together  what a search asks for, of a turn all at once                  = as it searches
//! ```
//!
//! The sums are of work and waits one after the other: where a processor does both at a time it may take less. Reads are told as what they
//! take more than those that the core's caches have, which the work has too. No counter of the processor is in it: virtual machines show none.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::samples::{each, most};
use super::windows::Window;
use crate::report::Row;
use crate::scale::lookup::{LOOKUP_RATIO_MAX, TURN};

/// How the names of rows begin.
const ROWS: &str = "scale/lookup/";
/// Functions that are shown of a side, and the least nanoseconds a lookup of one.
const SHOWN: usize = 12;
const SHOWN_NS_MIN: f64 = 0.5;

/// What was counted of lookups, each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counted {
    /// Instructions among many extents.
    pub instructions: f64,
    /// Instructions in a map of one.
    pub instructions_in_one: f64,
    /// Lines of memory that were asked for among many, and that a cache as large as the core's own had not.
    pub lines: f64,
}

/// Nanoseconds of each side, as far as the reckoning needs them.
#[derive(Clone, Copy, Debug)]
struct Taken {
    extents: u64,
    bytes: f64,
    index_bytes: f64,
    many_ns: f64,
    one_ns: f64,
    ratio: f64,
    ratio_in_rounds: (f64, f64),
    searched_ns: f64,
    /// More than from the core's caches, here and below.
    own_ns: f64,
    indexed_ns: f64,
    wait_ns: f64,
}

/// A profile's text: its limit, where the map lies, a section a side of turns, and the rows. `program` is how the names of the threads
/// begin that look up, `caches` the levels of those for data and their bytes.
#[must_use]
pub fn profile(
    script: &str,
    windows: &[Window],
    rows: &[Row],
    counted: Counted,
    (program, caches): (&[&str], &[(u32, u64)]),
) -> (String, String) {
    let taken = Taken::of(rows);
    let mut text = String::new();
    // A string takes everything, here and below.
    if let Some(taken) = &taken {
        let _ = write!(text, "\n## What a lookup needs, and what would have it\n{}", taken.levels(caches));
    }
    let sides = sides(script, windows, program);
    for (name, side) in &sides {
        let _ = write!(text, "\n## {name}: samples, nanoseconds a lookup\n{}", side.section());
    }
    text.push_str("\n## As measured meanwhile\n");
    for row in rows {
        let _ = writeln!(text, "{row}");
    }
    let limit = taken.map_or_else(
        || "not told: not all that it is reckoned from was measured".to_owned(),
        |taken| taken.limit(counted, caches),
    );
    (limit, text)
}

impl Taken {
    fn of(rows: &[Row]) -> Option<Self> {
        let named = |wanted: &str| {
            rows.iter().find_map(|row| {
                let (extents, label) = row.name.strip_prefix(ROWS)?.split_once("-extents/")?;
                (label == wanted).then_some((row, extents.parse().ok()?))
            })
        };
        let (turn, extents) = named("turn")?;
        let ours = |label| named(label).map(|(row, _)| row.ours);
        let more = |label| named(label).and_then(|(row, _)| Some((row.ours - row.peer?).max(0.0)));
        Some(Self {
            extents,
            bytes: ours("bytes")?,
            index_bytes: ours("bytes/index")?,
            many_ns: turn.ours,
            one_ns: turn.peer.filter(|ns| *ns > 0.0)?,
            ratio: turn.ratio?,
            ratio_in_rounds: turn.ratio_min.zip(turn.ratio_max)?,
            searched_ns: ours("turn/searched")?,
            own_ns: more("turn/own")?,
            indexed_ns: more("turn/indexed")?,
            wait_ns: more("wait").filter(|ns| *ns > 0.0)?,
        })
    }

    /// A lookup that waits for nothing but its extent.
    fn least_ns(&self) -> f64 {
        self.one_ns + self.own_ns
    }

    /// A lookup that searches as ours does, whose waits are those of all others of its turn.
    fn as_it_searches_ns(&self) -> f64 {
        self.searched_ns + self.indexed_ns
    }

    fn levels(&self, caches: &[(u32, u64)]) -> String {
        let mut text = String::new();
        for (what, bytes) in [
            ("a word of where lookups begin", self.index_bytes),
            ("the extents around its place", self.bytes - self.index_bytes),
        ] {
            let _ = writeln!(
                text,
                "{:8.0} KiB {what}: {}",
                bytes / 1024.0,
                smallest(bytes, caches).map_or_else(
                    || "larger than each cache that the kernel tells of".to_owned(),
                    |(level, len)| format!("fits L{level} ({} KiB), where nothing else is in it", len >> 10)
                )
            );
        }
        let _ = writeln!(
            text,
            "A turn reads {} of each, and before it {} KiB of other data went through the same caches.",
            TURN,
            crate::scale::lookup::TURN_BYTES >> 10
        );
        text
    }

    fn limit(&self, counted: Counted, caches: &[(u32, u64)]) -> String {
        let Self { one_ns, wait_ns, own_ns, indexed_ns, searched_ns, many_ns, ratio, .. } = *self;
        let (least_ns, searches_ns) = (self.least_ns(), self.as_it_searches_ns());
        // Of the core alone; what is behind it is shared with whoever else is on the machine.
        let core = caches.iter().rfind(|(level, _)| *level <= 2);
        let beyond = core.map_or_else(String::new, |(level, len)| {
            let is = if self.bytes > *len as f64 { "more than" } else { "within" };
            format!(", {is} the {} KiB of L{level}", len >> 10)
        });
        format!(
            "the map of {} extents has {:.0} KiB{beyond}: a read of it that waits for the one before takes {wait_ns:.0} ns more than from the core's \
             caches, and of {TURN} at known places {own_ns:.1} each. A lookup in one extent takes {one_ns:.1} ns, and with the latter and nothing \
             else {least_ns:.1}, {:.2} times as long; with each step of a search, as in a map of 100 extents ({searched_ns:.1}), and the index \
             and all extents that it compares, of {TURN} lookups together ({indexed_ns:.1}), {searches_ns:.1}, {:.2} times. It took {many_ns:.1}, \
             {ratio:.2} times (in rounds {} to {}), where {LOOKUP_RATIO_MAX} are demanded{}: {}{}. It takes {:.0} instructions where one \
             extent takes {:.0}, and asks for {:.2} lines that the core's caches have not",
            self.extents,
            self.bytes / 1024.0,
            least_ns / one_ns,
            searches_ns / one_ns,
            self.ratio_in_rounds.0,
            self.ratio_in_rounds.1,
            if ratio <= LOOKUP_RATIO_MAX { ", so it was met while this was made" } else { "" },
            verdict(least_ns / one_ns, searches_ns / one_ns),
            self.rest(),
            counted.instructions,
            counted.instructions_in_one,
            counted.lines,
        )
    }

    /// What is reckoned for by nothing.
    fn rest(&self) -> String {
        let rest_ns = self.many_ns - self.as_it_searches_ns();
        if rest_ns <= 0.0 {
            return String::new();
        }
        format!(
            "; the {rest_ns:.1} ns beyond that are as long as {:.2} reads of which each waits for the one before",
            rest_ns / self.wait_ns
        )
    }
}

/// Whether the bar could be met, by both sums in lookups in one extent.
fn verdict(least: f64, as_it_searches: f64) -> &'static str {
    if as_it_searches <= LOOKUP_RATIO_MAX {
        "by these sums the bar is within reach of the search as it is"
    } else if least <= LOOKUP_RATIO_MAX {
        "by these sums the bar is within reach, but not of the search as it is"
    } else {
        "by these sums the bar is out of reach, unless work goes on while memory is waited for"
    }
}

/// The smallest cache that has room for so much.
fn smallest(bytes: f64, caches: &[(u32, u64)]) -> Option<(u32, u64)> {
    caches.iter().copied().find(|(_, len)| bytes <= *len as f64)
}

/// What one side did in its rounds.
#[derive(Clone, Debug, Default)]
struct Side {
    wall_ns: f64,
    lookups: f64,
    all: usize,
    functions: HashMap<(bool, String), usize>,
}

/// Whether a side looks up, and does not only read; the lookups in one extent are beside more than one, and shown once.
fn is_of_lookups(side: &str) -> bool {
    matches!(side, "turn" | "turn/searched") || side.starts_with("turn: ")
}

/// Those that look up, in the order in which they were measured first.
fn sides(script: &str, windows: &[Window], program: &[&str]) -> Vec<(String, Side)> {
    let mut sides: Vec<(String, Side)> = Vec::new();
    for window in windows.iter().filter(|window| is_of_lookups(&window.side)) {
        let at = sides.iter().position(|(name, _)| *name == window.side).unwrap_or_else(|| {
            sides.push((window.side.clone(), Side::default()));
            sides.len() - 1
        });
        if let Some((_, side)) = sides.get_mut(at) {
            side.wall_ns += window.ended_ns.saturating_sub(window.begun_ns) as f64;
            side.lookups += window.commands;
        }
    }
    each(script, windows, |window, head, chain| {
        let side = sides.iter_mut().find(|(name, _)| *name == window.side);
        if let (Some((_, side)), Some(&(name, in_kernel))) = (side, chain.first())
            && program.iter().any(|begin| head.comm.starts_with(begin))
        {
            side.all += 1;
            *side.functions.entry((in_kernel, name.to_owned())).or_default() += 1;
        }
    });
    sides
}

impl Side {
    fn section(&self) -> String {
        let each_ns = self.wall_ns / self.lookups.max(1.0);
        let mut text =
            format!("{:.0} lookups, {each_ns:.1} ns each with the other data (memset)\n", self.lookups);
        for ((in_kernel, name), count) in most(&self.functions).into_iter().take(SHOWN) {
            let ns = each_ns * count as f64 / self.all.max(1) as f64;
            if ns >= SHOWN_NS_MIN {
                let _ = writeln!(text, "{ns:8.1} {} {name}", if *in_kernel { 'k' } else { '.' });
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Measurement;

    const CACHES: [(u32, u64); 3] = [(1, 32 << 10), (2, 512 << 10), (3, 16 << 20)];
    const COUNTED: Counted = Counted { instructions: 498.4, instructions_in_one: 250.0, lines: 3.45 };

    fn rows(many: f64, searched: f64) -> Vec<Row> {
        let row = |label: &str, ours: f64, peer: f64| {
            let name = format!("scale/lookup/1000-extents/{label}");
            let measured = Measurement {
                name,
                unit: "ns",
                ours: &[ours],
                peer: Some(("peer", &[peer])),
                bar: None,
                method: "made up",
            };
            Row::new(&measured, "here").unwrap()
        };
        vec![
            row("turn", many, 40.0),
            row("turn/searched", searched, 40.0),
            row("turn/own", 25.0, 5.0),
            row("turn/indexed", 45.0, 5.0),
            row("wait", 106.0, 6.0),
            row("bytes", 1024.0 * 20_480.0, 1.0),
            row("bytes/index", 1024.0 * 400.0, 1.0),
        ]
    }

    fn limit_of(rows: &[Row]) -> String {
        profile("", &[], rows, COUNTED, (&[], &CACHES)).0
    }

    #[test]
    fn the_limit_is_the_work_and_the_waits() {
        let limit = limit_of(&rows(150.0, 60.0));
        for part in [
            "the map of 1000 extents has 20480 KiB, more than the 512 KiB of L2",
            "takes 100 ns more than from the core's caches, and of 32 at known places 20.0 each",
            "the latter and nothing else 60.0, 1.50 times as long",
            "(40.0), 100.0, 2.50 times. It took 150.0, 3.75 times (in rounds 3.75 to 3.75), where 3 are demanded: by these sums the bar is within reach of the search as it is",
            "the 50.0 ns beyond that are as long as 0.50 reads",
            "498 instructions where one extent takes 250, and asks for 3.45 lines",
        ] {
            assert!(limit.contains(part), "{part}: {limit}");
        }
    }

    #[test]
    fn what_no_lookup_could_do_is_told_from_what_this_search_cannot() {
        assert_eq!(verdict(1.5, 3.0), "by these sums the bar is within reach of the search as it is");
        assert_eq!(
            verdict(1.5, 3.1),
            "by these sums the bar is within reach, but not of the search as it is"
        );
        assert!(verdict(3.1, 4.0).contains("out of reach"));
        let slow = limit_of(&rows(150.0, 120.0));
        assert!(slow.contains("but not of the search") && !slow.contains("ns beyond that"), "{slow}");
        let met = limit_of(&rows(119.0, 60.0));
        assert!(
            met.contains("2.98 times (in rounds 2.975 to 2.975), where 3 are demanded, so it was met while this was made: "),
            "{met}"
        );
    }

    #[test]
    fn where_a_side_was_not_measured_nothing_is_reckoned() {
        let all = rows(150.0, 60.0);
        for missing in 0..all.len() {
            let mut rows = all.clone();
            rows.remove(missing);
            assert!(limit_of(&rows).starts_with("not told"), "without {}", all[missing].name);
        }
    }

    #[test]
    fn each_level_is_told_which_cache_has_room_for_it() {
        let text = profile("", &[], &rows(150.0, 60.0), COUNTED, (&[], &CACHES)).1;
        assert!(text.contains("400 KiB a word of where lookups begin: fits L2 (512 KiB)"), "{text}");
        assert!(
            text.contains("20080 KiB the extents around its place: larger than each cache that the kernel"),
            "{text}"
        );
    }

    #[test]
    fn samples_of_turns_are_told_as_time_of_a_lookup() {
        let window = |side: &str, begun_ms: u64| Window {
            side: side.to_owned(),
            begun_ns: begun_ms * 1_000_000,
            ended_ns: (begun_ms + 10) * 1_000_000,
            commands: 100_000.0,
            busy_us: None,
        };
        let sample = |comm: &str, ms: u64, name: &str| {
            format!("{comm} 7 0.{ms:03}000000: \n  55d0 {name} (/usr/bin/fastice)\n\n")
        };
        let windows = [window("turn", 0), window("wait", 10), window("turn/own", 20)];
        let script: String = (0..8)
            .map(|ms| sample("bench", ms, if ms < 6 { "memset" } else { "find" }))
            .chain([sample("other", 8, "else"), sample("bench", 12, "wait")])
            .collect();
        let text = profile(&script, &windows, &[], COUNTED, (&["bench"], &CACHES)).1;
        // 100 ns each, three quarters of them in memset.
        assert!(
            text.contains("## turn: samples, nanoseconds a lookup\n100000 lookups, 100.0 ns each"),
            "{text}"
        );
        assert!(text.contains("    75.0 . memset\n    25.0 . find\n"), "{text}");
        assert!(
            !text.contains("else") && !text.contains("## wait") && !text.contains("## turn/own"),
            "{text}"
        );
    }
}
