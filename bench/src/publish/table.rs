//! The rows as tables.

use std::fmt::Write as _;

use super::demands;
use crate::machine;
use crate::report::{Report, Row};

const HEAD: &str = "\
# What was measured

Made by `make bench` of `report.json`; [README.md](README.md) says how each row is measured. Sides take turns, and a ratio is that of
neighbouring rounds: the median, with its least and its largest. **Trust ratios, not numbers.**
";

/// What the name of a machine does not tell by itself.
const CONGESTION: &str = "\
\nTCP by what: the congestion control that the kernel gives to whoever chooses none, which are the peers and the hosts. Where it is BBR, fastice
and the bare responder have Reno, as fastice has by default (`congestion_control`).
";

/// Who runs where in rows that do not say it themselves, by how their names begin.
const PLACES: [(&str, &str); 5] = [
    (
        "driver/",
        "driver and caller are one thread, wherever the scheduler has it; a model in a process of its own is on the last processor",
    ),
    (
        "scale/",
        "pins take all processors; a target that is started is on the first one, and its host on the last",
    ),
    ("idle/", "the target on the first processor, its hosts on the last"),
    ("growth/", "the target on the first processor, its hosts on the last"),
    ("guest/", "in the guest: target and the kernel's initiator on its first processor, fio on its second"),
];

/// The whole document. `plots` are paths and titles.
pub(super) fn document(report: &Report, plots: &[(String, String)], shortfalls: &str) -> String {
    let mut text = HEAD.to_owned();
    text.push('\n');
    counted(&mut text, report, |row| &row.machine);
    if report.rows.iter().any(|row| row.machine.contains(machine::CONGESTION)) {
        text.push_str(CONGESTION);
    }
    text.push_str("\n## The target\n\n");
    text.push_str(&demands::table(report));
    text.push_str("\nWho was where:\n\n");
    counted(&mut text, report, |row| {
        let is_told = row.method.starts_with("target on processor");
        row.method.split(';').next().filter(|_| is_told).unwrap_or_default()
    });
    for (begin, place) in PLACES {
        let count = report.rows.iter().filter(|row| row.name.starts_with(begin)).count();
        if count > 0 {
            put(&mut text, format_args!("* {count} rows of `{begin}`: {place}\n"));
        }
    }
    text.push_str(shortfalls);
    text.push('\n');
    for absent in &report.absent {
        put(&mut text, format_args!("* Absent, so not compared with: {absent}\n"));
    }
    let (barred, others): (Vec<_>, Vec<_>) = report.rows.iter().partition(|row| row.bar.is_some());
    let met: Vec<_> = barred.iter().filter(|row| row.met == Some(true)).collect();
    let disturbed = met.iter().filter(|row| row.is_disturbed()).count();
    put(
        &mut text,
        format_args!(
            "\n## What is demanded\n\n{} of {} met, {disturbed} of them marked `~`.\n\n",
            met.len(),
            barred.len()
        ),
    );
    rows(&mut text, &barred);
    if !plots.is_empty() {
        text.push_str("\n## Plots\n");
        for (path, title) in plots {
            put(&mut text, format_args!("\n![{title}]({path})\n"));
        }
    }
    text.push_str("\n## All else\n\n");
    rows(&mut text, &others);
    text
}

fn put(text: &mut String, what: std::fmt::Arguments<'_>) {
    // A string takes everything.
    let _ = text.write_fmt(what);
}

/// What rows say of themselves, each once, with how many say it.
fn counted(text: &mut String, report: &Report, of: impl Fn(&Row) -> &str) {
    let mut seen: Vec<(&str, usize)> = Vec::new();
    for said in report.rows.iter().map(of).filter(|said| !said.is_empty()) {
        match seen.iter_mut().find(|(other, _)| *other == said) {
            Some((_, count)) => *count += 1,
            None => seen.push((said, 1)),
        }
    }
    for (said, count) in seen {
        put(text, format_args!("* {count} rows: {said}\n"));
    }
}

fn rows(text: &mut String, rows: &[&Row]) {
    text.push_str("| row | ours | peer | ratio | bar | met | of |\n|---|---|---|---|---|---|---|\n");
    for row in rows {
        let spread = |median: f64, min: Option<f64>, max: Option<f64>| match (min, max) {
            (Some(min), Some(max)) if min < max => format!("{median} ({min} to {max})"),
            _ => median.to_string(),
        };
        let ours = spread(row.ours, Some(row.ours_min), Some(row.ours_max));
        let peer = row.peer.map_or(String::new(), |peer| {
            let name = row.peer_name.as_deref().unwrap_or_default();
            format!("{} {name}", spread(peer, row.peer_min, row.peer_max))
        });
        let ratio = row.ratio.map_or(String::new(), |ratio| spread(ratio, row.ratio_min, row.ratio_max));
        let mark = if row.is_disturbed() { " ~" } else { "" };
        let met = match row.met {
            None => String::new(),
            Some(true) => format!("yes{mark}"),
            Some(false) => format!("**no**{mark}"),
        };
        put(
            text,
            format_args!(
                "| `{}` | {ours} {} | {peer} | {ratio} | {} | {met} | {} |\n",
                row.name,
                row.unit,
                row.bar.as_deref().unwrap_or_default(),
                row.method
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Bar, Measurement};

    #[test]
    fn what_is_missed_is_told_first_and_the_absent_are_named() {
        let measured = |name: &str, bar| Measurement {
            name: name.to_owned(),
            unit: "us",
            ours: &[2.0, 3.0],
            peer: Some(("the peer", &[1.0, 2.0])),
            bar,
            method: "target on processor 0; made up",
        };
        let rows = [measured("plain", None), measured("judged", Some(Bar::RatioAtMost(1.0)))];
        let rows = rows.iter().map(|measured| Row::new(measured, "here").unwrap()).collect();
        let report = Report { rows, absent: vec!["somebody".to_owned()] };
        let text = document(&report, &[("plots/a.svg".to_owned(), "A".to_owned())], "\n## Shortfalls\n");
        assert!(text.contains("0 of 1 met, 0 of them"), "{text}");
        assert!(text.contains("| `judged` | 2.5 (2 to 3) us | 1.5 (1 to 2) the peer | 1.75 (1.5 to 2) | ratio <= 1 | **no** |"), "{text}");
        assert!(text.contains("not compared with: somebody") && text.contains("![A](plots/a.svg)"), "{text}");
        assert!(text.find("judged") < text.find("plain") && text.contains("## Shortfalls"));
        assert!(
            text.contains("* 2 rows: here") && text.contains("* 2 rows: target on processor 0\n"),
            "{text}"
        );
    }
}
