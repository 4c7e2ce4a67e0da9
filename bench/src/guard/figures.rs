//! `bench/instructions.json`: what was recorded, and whether what is counted now has grown beyond it.
//!
//! Figures belong to a build: another compiler makes other instructions of the same source, and valgrind shows programs one of few
//! processors, by which the C library chooses how it copies. Figures of another build are compared all the same; only a growth beyond
//! them then proves nothing.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Percent by which a figure may grow.
pub const GROWTH_MAX_PERCENT: f64 = 3.0;

/// What made the program that is counted, and what it ran on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// The compiler.
    pub rustc: String,
    /// What it compiled for.
    pub target: String,
    /// With what options: the profile's name.
    pub profile: String,
    /// Flags from outside the workspace: none, usually.
    pub rustflags: String,
    /// The processor that valgrind shows the program.
    pub processor: String,
}

impl Build {
    /// Of this program.
    #[must_use]
    pub fn this(processor: &str) -> Self {
        Self {
            rustc: env!("FASTICE_BENCH_RUSTC").to_owned(),
            target: env!("FASTICE_BENCH_TARGET").to_owned(),
            profile: env!("FASTICE_BENCH_PROFILE").to_owned(),
            rustflags: env!("FASTICE_BENCH_RUSTFLAGS").to_owned(),
            processor: processor.to_owned(),
        }
    }

    /// In what it differs from another one.
    #[must_use]
    pub fn differences(&self, recorded: &Self) -> Vec<String> {
        [
            ("compiler", &self.rustc, &recorded.rustc),
            ("target", &self.target, &recorded.target),
            ("profile", &self.profile, &recorded.profile),
            ("RUSTFLAGS", &self.rustflags, &recorded.rustflags),
            ("processor under valgrind", &self.processor, &recorded.processor),
        ]
        .into_iter()
        .filter(|(_, now, then)| now != then)
        .map(|(what, now, then)| format!("{what} {now:?}, recorded with {then:?}"))
        .collect()
    }
}

/// One count.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// What was counted: a path whose last part says of what.
    pub name: String,
    /// How many an I/O.
    pub per_io: f64,
}

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// To which they belong.
    pub build: Build,
    /// All of them.
    pub figures: Vec<Figure>,
}

impl Figures {
    /// What was recorded; none when nothing was.
    ///
    /// # Errors
    /// When the file cannot be read, or is something else.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
        };
        let figures = serde_json::from_str(&text);
        figures.map(Some).with_context(|| format!("{} does not hold recorded figures", path.display()))
    }

    /// Records these, in place of what was.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        let beside = path.with_extension("json.new");
        let written = fs::write(&beside, text).and_then(|()| fs::rename(&beside, path));
        written.with_context(|| format!("{} cannot be written", path.display()))
    }

    /// Sets these beside those that were recorded.
    #[must_use]
    pub fn compare(&self, recorded: &Self) -> Comparison {
        let find =
            |of: &Self, name: &str| of.figures.iter().find(|figure| figure.name == name).map(|f| f.per_io);
        let mut lines: Vec<Line> = self
            .figures
            .iter()
            .map(|figure| Line::new(&figure.name, find(recorded, &figure.name), Some(figure.per_io)))
            .collect();
        let gone = recorded.figures.iter().filter(|figure| find(self, &figure.name).is_none());
        lines.extend(gone.map(|figure| Line::new(&figure.name, Some(figure.per_io), None)));
        Comparison { lines, differences: self.build.differences(&recorded.build) }
    }
}

/// What became of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is what it was, nearly.
    Kept,
    /// It is larger than it may be.
    Grown,
    /// It is so much smaller that what was recorded guards nothing.
    Shrunk,
    /// Nothing was recorded.
    New,
    /// It was recorded, and is not counted.
    Gone,
}

/// One figure then and now.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// See [`Figure::name`].
    pub name: String,
    /// Recorded.
    pub then: Option<f64>,
    /// Counted now.
    pub now: Option<f64>,
}

impl Line {
    fn new(name: &str, then: Option<f64>, now: Option<f64>) -> Self {
        Self { name: name.to_owned(), then, now }
    }

    /// By how much it has grown, in percent; infinitely where nothing became something.
    #[must_use]
    pub fn growth_percent(&self) -> Option<f64> {
        let (then, now) = (self.then?, self.now?);
        Some(if now == then { 0.0 } else { (now - then) / then * 100.0 })
    }

    /// What became of it.
    #[must_use]
    pub fn change(&self) -> Change {
        match (self.then, self.growth_percent()) {
            (None, _) => Change::New,
            (_, None) => Change::Gone,
            // What is no number is no figure that holds.
            (_, Some(growth)) if growth < -GROWTH_MAX_PERCENT => Change::Shrunk,
            (_, Some(growth)) if growth <= GROWTH_MAX_PERCENT => Change::Kept,
            _ => Change::Grown,
        }
    }
}

/// All figures then and now.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// One a figure.
    pub lines: Vec<Line>,
    /// In what the builds differ; nothing when they are comparable.
    pub differences: Vec<String>,
}

/// What it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing has grown.
    Holds,
    /// Something has grown, or the recorded figures are not of the things that are counted.
    Broken,
    /// Something is larger than recorded, which may be the other build's doing.
    CannotTell,
}

impl Comparison {
    /// See [`Verdict`].
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let has = |change| self.lines.iter().any(|line| line.change() == change);
        match () {
            () if self.lines.is_empty() || has(Change::New) || has(Change::Gone) => Verdict::Broken,
            () if !has(Change::Grown) => Verdict::Holds,
            () if self.differences.is_empty() => Verdict::Broken,
            () => Verdict::CannotTell,
        }
    }

    /// Whether something is so much smaller that it should be recorded anew.
    #[must_use]
    pub fn has_shrunk(&self) -> bool {
        self.lines.iter().any(|line| line.change() == Change::Shrunk)
    }
}

/// The table.
impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
        writeln!(f, "{:<width$} {:>10} {:>10} {:>9}", "an I/O", "recorded", "now", "growth")?;
        for line in &self.lines {
            let number =
                |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
            let growth =
                line.growth_percent().map_or_else(|| "-".to_owned(), |growth| format!("{growth:+.2} %"));
            let word = match line.change() {
                Change::Kept => "",
                Change::Grown => "  GROWN",
                Change::Shrunk => "  shrunk",
                Change::New => "  NOT RECORDED",
                Change::Gone => "  NOT COUNTED ANY MORE",
            };
            let (then, now) = (number(line.then), number(line.now));
            writeln!(f, "{:<width$} {then:>10} {now:>10} {growth:>9}{word}", line.name)?;
        }
        self.differences.iter().try_for_each(|difference| writeln!(f, "another build: {difference}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(rows: &[(&str, f64)]) -> Figures {
        let build = Build { rustc: "rustc 1".to_owned(), ..Build::default() };
        let figures = rows.iter().map(|&(name, per_io)| Figure { name: name.to_owned(), per_io }).collect();
        Figures { build, figures }
    }

    fn verdict(now: &Figures, recorded: &Figures) -> Verdict {
        now.compare(recorded).verdict()
    }

    #[test]
    fn a_figure_that_grew_fails_and_one_within_three_percent_passes() {
        let recorded = figures(&[("a", 1000.0), ("b", 500.0)]);
        assert_eq!(verdict(&recorded, &recorded), Verdict::Holds);
        assert_eq!(verdict(&figures(&[("a", 1030.0), ("b", 490.0)]), &recorded), Verdict::Holds);
        let grown = figures(&[("a", 1000.0), ("b", 515.5)]).compare(&recorded);
        assert_eq!(grown.verdict(), Verdict::Broken);
        let table = grown.to_string();
        let line = table.lines().find(|line| line.starts_with("b ")).unwrap();
        assert!(line.ends_with("500.00     515.50   +3.10 %  GROWN"), "{table}");
        assert_eq!(table.matches("GROWN").count(), 1, "{table}");
    }

    #[test]
    fn what_shrank_passes_and_is_told() {
        let comparison = figures(&[("a", 960.0)]).compare(&figures(&[("a", 1000.0)]));
        assert_eq!((comparison.verdict(), comparison.has_shrunk()), (Verdict::Holds, true));
        let comparison = figures(&[("a", 980.0)]).compare(&figures(&[("a", 1000.0)]));
        assert!(!comparison.has_shrunk());
    }

    #[test]
    fn figures_that_are_missing_on_either_side_fail() {
        let (one, two) = (figures(&[("a", 1.0)]), figures(&[("a", 1.0), ("b", 2.0)]));
        assert_eq!(verdict(&one, &two), Verdict::Broken);
        assert_eq!(verdict(&two, &one), Verdict::Broken);
        assert_eq!(verdict(&figures(&[]), &figures(&[])), Verdict::Broken);
        assert!(one.compare(&two).to_string().contains("NOT COUNTED ANY MORE"));
        assert!(two.compare(&one).to_string().contains("NOT RECORDED"));
    }

    #[test]
    fn what_was_nothing_or_is_no_number_fails() {
        let recorded = figures(&[("a", 0.0)]);
        assert_eq!(verdict(&recorded, &recorded), Verdict::Holds);
        assert_eq!(verdict(&figures(&[("a", 0.5)]), &recorded), Verdict::Broken);
        assert_eq!(verdict(&figures(&[("a", f64::NAN)]), &recorded), Verdict::Broken);
    }

    #[test]
    fn growth_beyond_the_figures_of_another_build_proves_nothing_and_is_told() {
        let recorded = figures(&[("a", 1000.0)]);
        let mut now = figures(&[("a", 1020.0)]);
        now.build.rustc = "rustc 2".to_owned();
        assert_eq!(verdict(&now, &recorded), Verdict::Holds);
        now.figures[0].per_io = 1100.0;
        let comparison = now.compare(&recorded);
        assert_eq!(comparison.verdict(), Verdict::CannotTell);
        assert!(comparison.to_string().contains(r#"compiler "rustc 2", recorded with "rustc 1""#));
        // What is counted does not depend on the build.
        now.figures.clear();
        assert_eq!(verdict(&now, &recorded), Verdict::Broken);
    }

    #[test]
    fn figures_are_recorded_whole_and_nothing_else_is_taken_for_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("instructions.json");
        assert_eq!(Figures::load(&path).unwrap(), None);
        let written = figures(&[("a", 1.5)]);
        written.save(&path).unwrap();
        assert_eq!(Figures::load(&path).unwrap(), Some(written));
        fs::write(&path, "{}").unwrap();
        assert!(Figures::load(&path).is_err());
    }
}
