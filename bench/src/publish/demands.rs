//! What is demanded of the target, as the table that people know, with what the rows came to.

use std::fmt::Write as _;

use super::ceiling::Ceiling;
use crate::report::{Report, Row};

/// A line: the work, what it must come to, and the rows that tell.
struct Demand {
    work: &'static str,
    bar: &'static str,
    /// Names of rows; a `*` stands for anything that has a bar. A row that is named whole is shown without one too: it is the price.
    rows: &'static [&'static str],
}

const DEMANDS: [Demand; 14] = [
    Demand {
        work: "4 KiB random read QD1, against SPDK's target: latency p50, p99",
        bar: "at most 0.85",
        rows: &["target/null/randread/qd1/spdk*/p50", "target/null/randread/qd1/spdk*/p99"],
    },
    Demand {
        work: "4 KiB random read, write, 70/30 at QD32 and QD128: IOPS",
        bar: "at least 1.3",
        rows: &[
            "target/null/randread/qd32/spdk*/iops",
            "target/null/randread/qd128/spdk*/iops",
            "target/null/randwrite/qd32/spdk*/iops",
            "target/null/randwrite/qd128/spdk*/iops",
            "target/null/randrw/qd32/spdk*/iops",
            "target/null/randrw/qd128/spdk*/iops",
        ],
    },
    Demand {
        work: "the same: target CPU an I/O",
        bar: "at most 0.8",
        rows: &[
            "target/null/randread/qd32/spdk*/cpu",
            "target/null/randread/qd128/spdk*/cpu",
            "target/null/randwrite/qd32/spdk*/cpu",
            "target/null/randwrite/qd128/spdk*/cpu",
            "target/null/randrw/qd32/spdk*/cpu",
            "target/null/randrw/qd128/spdk*/cpu",
        ],
    },
    Demand {
        work: "128 KiB read and write: MiB/s",
        bar: "at least 1.05",
        rows: &["target/null/randread-128k/qd16/spdk*/rate", "target/null/randwrite-128k/qd16/spdk*/rate"],
    },
    Demand {
        work: "4 KiB read QD32 with header and data digests: IOPS",
        bar: "at least 1.3",
        rows: &["target/null/randread-digests/qd32/spdk*/iops"],
    },
    Demand {
        work: "64 and 256 connections, QD4 each: IOPS; the worst connection's share of the mean",
        bar: "at least 1.3; at least 0.8",
        rows: &[
            "target/null/randread/64x4/spdk*/iops",
            "target/null/randread/256x4/spdk*/iops",
            "target/null/randread/64x4/share",
            "target/null/randread/256x4/share",
        ],
    },
    Demand {
        work: "against a bare responder, 4 KiB QD32 and QD128: IOPS",
        bar: "at least 0.85",
        rows: &[
            "target/null/randread/qd32/iops",
            "target/null/randread/qd128/iops",
            "target/null/randwrite/qd32/iops",
            "target/null/randwrite/qd128/iops",
        ],
    },
    Demand {
        work: "against nvmet-tcp in the guest, fio 4 KiB read QD32 on the same namespace",
        bar: "at least 1.5",
        rows: &["guest/nvme/randread/qd32/iops"],
    },
    Demand {
        work: "pinned file of 1 and of 10,000 extents, against the same blocks without a pin: IOPS",
        bar: "at least 0.97",
        rows: &[
            "target/file-1-extent/randread/*/iops",
            "target/file-10000-extents/randread/*/iops",
            "target/map-1-extent/randread/*/iops",
            "target/map-10000-extents/randread/*/iops",
        ],
    },
    Demand {
        work: "100 connections open and no load: processor time, and keep-alives answered",
        bar: "at most 0.5 %; all",
        rows: &["idle/100-connections/*"],
    },
    Demand {
        work: "100 reads a second, `poll = \"adaptive\"`, against always polling: latency p99. It is met by lingering: \
               that costs `idle/light/cpu`, and `idle/asleep` is where the core sleeps between any two (`linger_us = 0`)",
        bar: "at most 1.5",
        rows: &["idle/light/p99", "idle/light/cpu", "idle/asleep/p99", "idle/asleep/cpu"],
    },
    Demand {
        work: "full load, `poll = \"adaptive\"`, against always polling: IOPS",
        bar: "at least 0.99",
        rows: &["idle/full/iops"],
    },
    Demand {
        work: "start to first I/O; resident memory; an idle connection's; 1,000 connections and namespaces",
        bar: "200 ms; 32 MiB; 64 KiB; all",
        rows: &[
            "scale/start/*",
            "scale/memory/*",
            "scale/connection/*",
            "scale/connections/*",
            "scale/namespaces/*",
        ],
    },
    Demand {
        work: "pin of a file of 1,000,000 extents, against reading its map bare: time",
        bar: "at most 2",
        rows: &["scale/*/1000000-extents/pin"],
    },
];

/// What the mark means.
const LEGEND: &str = "\n`~`: most rounds of this row were disturbed, or the machine changed its state between them; its spread in \
                      bench/REPORT.md says more than this median. Names are those of the rows there: `spdk` is SPDK's target by our light host, \
                      `spdk-perf` the same by SPDK's own initiator for both sides. \
                      `bare`: what a responder that has no work comes to there, by the quotient of two rows; where that misses the bar too, it is \
                      not the target's work that limits; how many it answers at once still may.\n";

/// The table.
pub(super) fn table(report: &Report) -> String {
    let mut text = "| work | ratio | measured | met |\n|---|---|---|---|\n".to_owned();
    for demand in &DEMANDS {
        let found: Vec<&Row> = demand
            .rows
            .iter()
            .flat_map(|wanted| {
                let is_shown = |row: &&Row| row.bar.is_some() || row.name == *wanted;
                report.rows.iter().filter(move |row| is_like(&row.name, wanted)).filter(is_shown)
            })
            .collect();
        let barred = found.iter().filter(|row| row.bar.is_some());
        let measured: Vec<_> = found.iter().map(|row| measured(row) + &ceiling(report, row)).collect();
        let missed: Vec<_> = barred.clone().filter(|row| row.met != Some(true)).collect();
        let beyond =
            missed.iter().filter(|row| Ceiling::of(report, row).is_some_and(|it| !it.is_enough)).count();
        let met = match (barred.count(), missed.len(), beyond) {
            (0, ..) => "not measured".to_owned(),
            (_, 0, _) => "yes".to_owned(),
            (all, missed, 0) => format!("**no**: {missed} of {all} not"),
            (all, missed, beyond) => {
                format!(
                    "**no**: {missed} of {all} not; a responder without work misses {beyond} of these too"
                )
            }
        };
        // A string takes everything.
        let _ = writeln!(text, "| {} | {} | {} | {met} |", demand.work, demand.bar, measured.join("<br>"));
    }
    text.push_str(LEGEND);
    text
}

/// What a row came to, with what tells it from the others of its line.
fn measured(row: &Row) -> String {
    let (number, unit) = match row.ratio {
        // The price of something, in processor time, is no ratio of two prices.
        Some(ratio) if row.bar.is_some() || !row.name.ends_with("/cpu") => (ratio, String::new()),
        _ => (row.ours, format!(" {}", row.unit)),
    };
    let name = row.name.strip_prefix("target/").unwrap_or(&row.name);
    let mark = if row.is_disturbed() { " ~" } else { "" };
    let judged = if row.bar.is_some() { "" } else { " (no bar)" };
    // Three digits, so that what misses its bar by little does not read like it.
    format!("{number:.3}{unit}{mark} {}{judged}", name.strip_prefix("null/").unwrap_or(name))
}

/// Of a row that misses its bar, what a responder without work comes to.
fn ceiling(report: &Report, row: &Row) -> String {
    let ceiling = Ceiling::of(report, row).filter(|_| row.met == Some(false));
    ceiling.map_or_else(String::new, |ceiling| {
        format!(" (bare: {:.3}{})", ceiling.ratio, if ceiling.is_disturbed { " ~" } else { "" })
    })
}

/// Whether a name is like a pattern, in which `*` stands for anything.
fn is_like(name: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => name == pattern,
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            rest.char_indices()
                .map(|(at, _)| at)
                .chain([rest.len()])
                .any(|at| rest.get(at..).is_some_and(|rest| is_like(rest, after)))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Bar, Measurement};

    fn row(name: &str, ours: f64, bar: Option<Bar>) -> Row {
        let measured = Measurement {
            name: name.to_owned(),
            unit: "IOPS",
            ours: &[ours],
            peer: Some(("SPDK", &[1.0])),
            bar,
            method: "made up",
        };
        Row::new(&measured, "here").unwrap()
    }

    #[test]
    fn patterns_match_whole_names() {
        assert!(is_like("a/spdk-perf/p50", "a/spdk*/p50") && is_like("a/spdk/p50", "a/spdk*/p50"));
        assert!(!is_like("a/spdk/p50/x", "a/spdk*/p50") && !is_like("b/a/spdk/p50", "a/spdk*/p50"));
    }

    #[test]
    fn what_a_responder_without_work_misses_too_is_told() {
        let bar = Some(Bar::RatioAtLeast(1.3));
        let mut rows = vec![
            row("target/null/randwrite/qd32/spdk-perf/iops", 1.0, bar),
            row("target/null/randwrite/qd32/spdk-perf/bare/iops", 0.8, None),
            row("target/null/randwrite/qd32/spdk/iops", 1.4, bar),
            row("target/null/randwrite/qd32/iops", 1.2, None),
        ];
        let told = |rows: &[Row]| table(&Report { rows: rows.to_vec(), absent: Vec::new() });
        let text = told(&rows);
        let missed = "1.000 randwrite/qd32/spdk-perf/iops (bare: 1.250)<br>1.400 randwrite/qd32/spdk/iops | \
                      **no**: 1 of 2 not; a responder without work misses 1 of these too |";
        assert!(text.contains(missed), "{text}");
        rows[1] = row("target/null/randwrite/qd32/spdk-perf/bare/iops", 0.7, None);
        assert!(
            told(&rows).contains("(bare: 1.429)<br>1.400 randwrite/qd32/spdk/iops | **no**: 1 of 2 not |")
        );
    }

    #[test]
    fn a_line_is_met_when_all_its_rows_are_and_says_so_when_there_are_none() {
        let bar = Some(Bar::RatioAtLeast(1.3));
        let rows = vec![
            row("target/null/randread/qd32/spdk/iops", 1.4, bar),
            row("target/null/randread/qd32/spdk-perf/iops", 1.2, bar),
            row("target/null/randread-digests/qd32/spdk/iops", 1.5, bar),
            row("target/null/randread/qd128/spdk/iops", 0.9, None),
            row("idle/light/p99", 0.9, Some(Bar::RatioAtMost(1.5))),
            row("idle/asleep/p99", 1.9, None),
        ];
        let text = table(&Report { rows, absent: Vec::new() });
        assert!(
            text.contains(
                "1.400 randread/qd32/spdk/iops<br>1.200 randread/qd32/spdk-perf/iops | **no**: 1 of 2 not |"
            ),
            "{text}"
        );
        assert!(text.contains("| at least 1.3 | 1.500 randread-digests/qd32/spdk/iops | yes |"), "{text}");
        let price = "| at most 1.5 | 0.900 idle/light/p99<br>1.900 idle/asleep/p99 (no bar) | yes |";
        assert!(text.contains(price), "{text}");
        assert_eq!(text.matches("not measured").count(), 11, "{text}");
    }
}
