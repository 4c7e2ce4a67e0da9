//! What is not met, each with the profiles that show why: `profiles/*.txt` beside the report.
//!
//! A profile says in lines that begin with `# rows:` which rows it is of: names, or how they begin, with commas between. A line that
//! begins with `# limit:` says what they cannot get beyond.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::ceiling::Ceiling;
use crate::profiles::LIMIT;
use crate::report::{Report, Row};

/// Where profiles are, beside the report.
const PROFILES: &str = "profiles";
const ROWS: &str = "# rows:";
/// What a limit says, and what it does not.
const HEAD: &str = "\
What a responder that has no work comes to was measured, beside ours; against SPDK's target it is the quotient of two medians (`~`: one of
them disturbed). It answers at once; ours gathers where that pays, and may come to more. Where it misses the bar as well, the target's work is not
what limits. A limit is reckoned, from a profile: what remains when our own code takes no time, or the target none at all. Where that is beyond the
bar, the bar may be within reach and was not reached: what is between the two is in the profile. Rows by SPDK's initiator have profiles of its
processor too: where it has work for nearly all of its time, it is the bottleneck; where it has not, it and the target wait for one another by
turns, and its limit is what it would come to if it never waited. Profiles are of rounds of their own, which sampling slows down, and which may be of
another state of the machine than the row's: those of more than one command at a time say how their sides compare in them.
";

/// A profile: its path from the report, how the names of its rows begin, and what is their limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Profile {
    path: String,
    rows: Vec<String>,
    limit: Option<String>,
}

/// All that are there.
pub(super) fn profiles(directory: &Path) -> Result<Vec<Profile>> {
    let place = directory.join(PROFILES);
    let mut profiles = Vec::new();
    let Ok(entries) = fs::read_dir(&place) else { return Ok(profiles) };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "txt") {
            let text = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let text = String::from_utf8_lossy(&text);
            let limit = text.lines().find_map(|line| line.strip_prefix(LIMIT)).map(str::to_owned);
            profiles.push(Profile { path: format!("{PROFILES}/{name}"), rows: rows(&text), limit });
        }
    }
    profiles.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(profiles)
}

fn rows(text: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix(ROWS));
    let names = lines.flat_map(|line| line.split(',')).map(str::trim);
    names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The section; empty where all is met.
pub(super) fn section(report: &Report, profiles: &[Profile]) -> String {
    let mut text = String::new();
    for row in report.rows.iter().filter(|row| row.met == Some(false)) {
        let of_it = profiles
            .iter()
            .filter(|profile| profile.rows.iter().any(|begin| row.name.starts_with(begin.as_str())));
        let link = |profile: &Profile| {
            let limit = profile.limit.as_ref().map_or_else(String::new, |limit| format!(" (limit: {limit})"));
            format!("[{}]({}){limit}", profile.path, profile.path)
        };
        let links: Vec<_> = of_it.map(link).collect();
        let why = if links.is_empty() { "no profile yet".to_owned() } else { links.join(", ") };
        let mark = if row.is_disturbed() { " ~" } else { "" };
        let (bar, number) = (row.bar.as_deref().unwrap_or_default(), row.ratio.unwrap_or(row.ours));
        let ceiling =
            Ceiling::of(report, row).map_or_else(String::new, |ceiling| told(report, row, &ceiling));
        // A string takes everything.
        let _ = writeln!(text, "* `{}`: {number}{mark} where {bar} is demanded; {ceiling}{why}", row.name);
    }
    if text.is_empty() { text } else { format!("\n## Shortfalls\n\n{HEAD}\n{text}") }
}

/// What a responder without work comes to, in words. Where it misses the bar too, it is not the target that limits, and processor time a
/// command decides.
fn told(report: &Report, row: &Row, ceiling: &Ceiling) -> String {
    let Ceiling { ratio, ours, row: bare, is_enough, is_disturbed } = ceiling;
    let mark = if *is_disturbed { " ~" } else { "" };
    let mut text = format!(
        "a responder that has no work comes to {ratio:.3}{mark} by the same host, and ours to {ours:.3} of that (`{bare}`)"
    );
    if !is_enough {
        // Of single commands nobody is the bottleneck: each waits for all.
        let is_light = row.name.contains("/spdk/") || row.name.contains("/qd1/");
        text += ": it misses the bar too, ";
        text += match (row.name.starts_with("guest/"), is_light) {
            (true, _) => "initiator, network or the emulated device limit",
            (false, true) => "host and kernel limit",
            (false, false) => "**initiator and kernel limit**, not the target's work",
        };
        let cpu = row.name.rsplit_once('/').map(|(place, _)| format!("{place}/cpu"));
        let cpu = report.rows.iter().find(|row| Some(&row.name) == cpu.as_ref());
        if let Some((ratio, is_met)) = cpu.and_then(|cpu| Some((cpu.ratio?, cpu.met?))) {
            let met = if is_met { "met" } else { "not met" };
            text +=
                &format!(", so the target's processor time a command decides: {ratio} of the peer's, {met}");
        }
    }
    text + "; "
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Bar, Measurement};

    #[test]
    fn a_shortfall_links_the_profiles_of_its_row() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join(PROFILES)).unwrap();
        let path = directory.path().join("profiles/read.txt");
        fs::write(
            path,
            "# made by perf\n# rows: target/null/randread, target/null/randrw/qd32/\n# limit: half of it\n50 % tcp_sendmsg\n",
        )
        .unwrap();
        let profiles = profiles(directory.path()).unwrap();
        let row = |name: &str, ours| {
            let bar = Some(Bar::OursAtLeast(1.0));
            let measured = Measurement {
                name: name.to_owned(),
                unit: "x",
                ours: &[ours],
                peer: None,
                bar,
                method: "made up",
            };
            Row::new(&measured, "here").unwrap()
        };
        let rows = vec![
            row("target/null/randread/qd32/spdk/iops", 0.5),
            row("target/null/randwrite/qd1/p50", 0.5),
            row("met", 2.0),
        ];
        let text = section(&Report { rows, absent: Vec::new() }, &profiles);
        assert!(text.contains("`target/null/randread/qd32/spdk/iops`: 0.5 where ours >= 1 is demanded; [profiles/read.txt](profiles/read.txt) (limit: half of it)"), "{text}");
        assert!(
            text.contains("`target/null/randwrite/qd1/p50`: 0.5 where ours >= 1 is demanded; no profile yet"),
            "{text}"
        );
        assert!(!text.contains("`met`"), "{text}");
        assert_eq!(section(&Report::default(), &[]), "");
    }

    #[test]
    fn where_the_initiator_limits_it_says_so_and_what_decides_then() {
        let row = |name: &str, ours, bar| {
            let (name, peer) =
                (format!("target/null/randwrite/qd32/spdk-perf/{name}"), Some(("peer", &[1.0][..])));
            let measured = Measurement { name, unit: "x", ours: &[ours], peer, bar, method: "made up" };
            Row::new(&measured, "here").unwrap()
        };
        let section_with = |bare, cpu| {
            let rows = vec![
                row("iops", 1.0, Some(Bar::RatioAtLeast(1.3))),
                row("bare/iops", bare, None),
                row("cpu", cpu, Some(Bar::RatioAtMost(0.8))),
            ];
            section(&Report { rows, absent: Vec::new() }, &[])
        };
        let text = section_with(0.8, 0.75);
        assert!(text.contains("comes to 1.250 by the same host, and ours to 0.800 of that (`target/null/randwrite/qd32/spdk-perf/bare/iops`): it misses the bar too, **initiator and kernel limit**, not the target's work, so the target's processor time a command decides: 0.75 of the peer's, met; "), "{text}");
        assert!(section_with(0.8, 0.9).contains("decides: 0.9 of the peer's, not met; "));
        let within = section_with(0.7, 0.75);
        assert!(
            within.contains("comes to 1.429") && !within.contains("initiator and kernel limit"),
            "{within}"
        );
    }

    #[test]
    fn where_there_are_no_profiles_there_are_none() {
        assert_eq!(profiles(Path::new("/nonexistent")).unwrap(), []);
    }
}
