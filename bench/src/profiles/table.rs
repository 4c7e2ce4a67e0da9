//! Which profile explains which rows, and how it is made: `bench/profiles/table`, a line each.
//!
//! | column | |
//! |---|---|
//! | name | of the file that is made, without `.txt` |
//! | kind | how it is made: see `bench/profile.sh` |
//! | what | the case that is run; `-` where the kind says all |
//! | depth | its depth |
//! | rows | how the names of the rows begin, with commas between |

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::report::Report;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// All of it, as it stands there, with single blanks.
    pub text: String,
    rows: Vec<String>,
}

/// All lines of a file.
///
/// # Errors
/// When it cannot be read, or one has not five columns.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| Line::of(line).with_context(|| format!("{}: {line:?}", path.display()))).collect()
}

impl Line {
    fn of(line: &str) -> Option<Self> {
        let words: Vec<_> = line.split_whitespace().collect();
        let [_name, _kind, _what, _depth, rows] = words.as_slice() else { return None };
        let rows = rows.split(',').map(str::to_owned).collect();
        Some(Self { text: words.join(" "), rows })
    }

    /// Whether it explains a row.
    #[must_use]
    pub fn explains(&self, row: &str) -> bool {
        self.rows.iter().any(|begin| row.starts_with(begin.as_str()))
    }
}

/// The lines that explain a row that is not met, and such rows as none does.
#[must_use]
pub fn unmet<'l>(lines: &'l [Line], report: &Report) -> (Vec<&'l Line>, Vec<String>) {
    let unmet: Vec<_> =
        report.rows.iter().filter(|row| row.met == Some(false)).map(|row| &row.name).collect();
    let wanted = lines.iter().filter(|line| unmet.iter().any(|name| line.explains(name))).collect();
    let bare = unmet.into_iter().filter(|name| !lines.iter().any(|line| line.explains(name)));
    (wanted, bare.cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Bar, Measurement, Row};

    fn bench(file: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
    }

    #[test]
    fn what_is_not_met_finds_its_line_or_is_told() {
        let row = |name: &str, ours| {
            let bar = Some(Bar::OursAtLeast(1.0));
            let name = name.to_owned();
            Row::new(
                &Measurement { name, unit: "x", ours: &[ours], peer: None, bar, method: "made up" },
                "here",
            )
            .unwrap()
        };
        let lines = ["a target null/a 1 target/a/,target/b/", "c target null/c 32 target/c/"]
            .map(|line| Line::of(line).unwrap());
        let rows = vec![row("target/b/p50", 0.5), row("target/c/iops", 2.0), row("target/d", 0.5)];
        let (wanted, bare) = unmet(&lines, &Report { rows, absent: Vec::new() });
        assert_eq!(wanted, [&lines[0]]);
        assert_eq!(bare, ["target/d"]);
        assert_eq!(Line::of("four columns are few"), None);
    }

    #[test]
    fn each_row_with_a_bar_beside_a_peer_has_a_line() {
        let lines = read(&bench("profiles/table")).unwrap();
        let report = Report::load(&bench("report.json")).unwrap();
        let bare: Vec<_> = (report.rows.iter())
            .filter(|row| row.bar.is_some() && (row.ratio.is_some() || row.met == Some(false)))
            // Not of a target or a driver at work.
            .filter(|row| !row.name.starts_with("scale/"))
            .filter(|row| !lines.iter().any(|line| line.explains(&row.name)))
            .map(|row| &row.name)
            .collect();
        assert!(bare.is_empty(), "{bare:?}");
    }

    #[test]
    fn each_profile_that_is_there_says_what_the_table_says() {
        let lines = read(&bench("profiles/table")).unwrap();
        for entry in std::fs::read_dir(bench("profiles")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "txt") {
                continue;
            }
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned() + " ";
            let line =
                lines.iter().find(|line| line.text.starts_with(&name)).unwrap_or_else(|| panic!("{name}"));
            let text = std::fs::read_to_string(&path).unwrap();
            let rows = format!("\n# rows: {}\n", line.rows.join(", "));
            assert!(text.contains(&rows), "{} lacks {rows:?}", path.display());
        }
    }
}
