//! `bench/report.json`: one row a measurement, and merging new rows into old ones.
//!
//! Each row sets ours beside a peer that ran in turns with it, so that the ratio survives a slow or busy machine; the
//! numbers themselves do not. A later run replaces the rows that it measured, by name, and leaves the others.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::spread::Spread;
use crate::target::calm::DISTURBED;

/// What a row must come to. Written as text, such as `ours <= 300`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bar {
    /// Our median is at most this.
    OursAtMost(f64),
    /// Our median is at least this.
    OursAtLeast(f64),
    /// Our median divided by the peer's is at most this.
    RatioAtMost(f64),
    /// Our median divided by the peer's is at least this.
    RatioAtLeast(f64),
}

impl std::fmt::Display for Bar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OursAtMost(most) => write!(f, "ours <= {most}"),
            Self::OursAtLeast(least) => write!(f, "ours >= {least}"),
            Self::RatioAtMost(most) => write!(f, "ratio <= {most}"),
            Self::RatioAtLeast(least) => write!(f, "ratio >= {least}"),
        }
    }
}

impl Bar {
    /// What was written as text; none of what is no bar.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, number) = text.rsplit_once(' ')?;
        let number = number.parse().ok()?;
        Some(match kind {
            "ours <=" => Self::OursAtMost(number),
            "ours >=" => Self::OursAtLeast(number),
            "ratio <=" => Self::RatioAtMost(number),
            "ratio >=" => Self::RatioAtLeast(number),
            _ => return None,
        })
    }
}

/// One measurement. Numbers are medians of the rounds, in `unit`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured; names the row when a later run replaces it.
    pub name: String,
    /// Of `ours` and `peer`.
    pub unit: String,
    /// Ours.
    pub ours: f64,
    /// Our least round.
    pub ours_min: f64,
    /// Our largest round.
    pub ours_max: f64,
    /// The peer's, from rounds between ours; none when there is nothing to compare with.
    pub peer: Option<f64>,
    /// The peer's least round.
    pub peer_min: Option<f64>,
    /// The peer's largest round.
    pub peer_max: Option<f64>,
    /// What the peer is.
    pub peer_name: Option<String>,
    /// `ours` divided by `peer`: the median of the ratios of neighbouring rounds.
    pub ratio: Option<f64>,
    /// The least such ratio.
    pub ratio_min: Option<f64>,
    /// The largest such ratio.
    pub ratio_max: Option<f64>,
    /// What it must come to, if anything; see [`Bar`].
    pub bar: Option<String>,
    /// Whether it does.
    pub met: Option<bool>,
    /// Rounds of each side.
    pub rounds: usize,
    /// Where it ran: processor and kernel.
    pub machine: String,
    /// How it was measured, in a few words.
    pub method: String,
    /// Which other rows were measured within the same short time: those with the same text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<String>,
}

/// What a row is made of.
#[derive(Clone, Debug)]
pub struct Measurement<'a> {
    /// See [`Row::name`].
    pub name: String,
    /// See [`Row::unit`].
    pub unit: &'a str,
    /// Our rounds, at least one.
    pub ours: &'a [f64],
    /// The peer's name and rounds: each ran next to ours of the same index.
    pub peer: Option<(&'a str, &'a [f64])>,
    /// See [`Row::bar`].
    pub bar: Option<Bar>,
    /// See [`Row::method`].
    pub method: &'a str,
}

impl Row {
    /// Sums the rounds up. `None` when there is no round of ours, or none of a peer that is named.
    #[must_use]
    pub fn new(measured: &Measurement<'_>, machine: &str) -> Option<Self> {
        let ours = Spread::of(measured.ours)?;
        let peer = match measured.peer {
            Some((name, rounds)) => {
                let ratios: Vec<f64> =
                    measured.ours.iter().zip(rounds).map(|(ours, peer)| ours / peer).collect();
                Some((name, Spread::of(rounds)?, Spread::of(&ratios)?))
            }
            None => None,
        };
        let ratio = peer.map(|(_, _, ratio)| ratio);
        let met = measured.bar.and_then(|bar| match bar {
            Bar::OursAtMost(most) => Some(ours.median <= most),
            Bar::OursAtLeast(least) => Some(ours.median >= least),
            Bar::RatioAtMost(most) => ratio.map(|ratio| ratio.median <= most),
            Bar::RatioAtLeast(least) => ratio.map(|ratio| ratio.median >= least),
        });
        Some(Self {
            name: measured.name.clone(),
            unit: measured.unit.to_owned(),
            ours: rounded(ours.median),
            ours_min: rounded(ours.min),
            ours_max: rounded(ours.max),
            peer: peer.map(|(_, peer, _)| rounded(peer.median)),
            peer_min: peer.map(|(_, peer, _)| rounded(peer.min)),
            peer_max: peer.map(|(_, peer, _)| rounded(peer.max)),
            peer_name: peer.map(|(name, _, _)| name.to_owned()),
            ratio: ratio.map(|ratio| rounded(ratio.median)),
            ratio_min: ratio.map(|ratio| rounded(ratio.min)),
            ratio_max: ratio.map(|ratio| rounded(ratio.max)),
            bar: measured.bar.map(|bar| bar.to_string()),
            met,
            rounds: measured.ours.len(),
            machine: machine.to_owned(),
            method: measured.method.to_owned(),
            window: None,
        })
    }
}

impl Row {
    /// Whether its rounds were of several states of the machine, or disturbed: then the spread says more than the median.
    #[must_use]
    pub fn is_disturbed(&self) -> bool {
        self.method.contains(DISTURBED)
    }
}

/// One line.
impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:<42} {:>9} ({} to {}) {}",
            self.name, self.ours, self.ours_min, self.ours_max, self.unit
        )?;
        if let (Some(peer), Some(ratio)) = (self.peer, self.ratio) {
            let (least, most) = (self.ratio_min.unwrap_or(ratio), self.ratio_max.unwrap_or(ratio));
            write!(f, " | peer {peer} | ratio {ratio} ({least} to {most})")?;
        }
        if let (Some(bar), Some(met)) = (&self.bar, self.met) {
            write!(f, " | {bar}: {}", if met { "met" } else { "NOT MET" })?;
        }
        Ok(())
    }
}

/// Four digits that count: more would only claim what is not known.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    // Exponents of a double are small numbers.
    #[expect(clippy::cast_possible_truncation, reason = "at most 308")]
    let digits = 3 - value.abs().log10().floor() as i32;
    let scale = 10f64.powi(digits.max(0));
    (value * scale).round() / scale
}

/// The file as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// All rows, sorted by name.
    pub rows: Vec<Row>,
    /// Peers that the last run did not find, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub absent: Vec<String>,
}

/// Why a report cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file cannot be read, or written.
    #[error("{path}: cannot be {what}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is no report.
    #[error("{path} is no report: mend it or move it away")]
    NoReport {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
}

impl Report {
    /// Reads a report; an empty one when there is no file.
    ///
    /// # Errors
    /// When there is a file, and it cannot be read or is no report.
    pub fn load(path: &Path) -> Result<Self, ReportError> {
        match fs::File::open(path) {
            Ok(file) => Self::read(file, path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ReportError::Io { path: path.to_owned(), what: "read", source }),
        }
    }

    /// Reads a report from anywhere; `name` is for messages.
    ///
    /// # Errors
    /// When it cannot be read, or is no report.
    pub fn read(mut from: impl io::Read, name: &Path) -> Result<Self, ReportError> {
        let mut text = String::new();
        from.read_to_string(&mut text).map_err(|source| ReportError::Io {
            path: name.to_owned(),
            what: "read",
            source,
        })?;
        serde_json::from_str(&text).map_err(|source| ReportError::NoReport { path: name.to_owned(), source })
    }

    /// Says that a peer is absent, instead of what was said of it before.
    pub fn name_absent(&mut self, peer: &str, why: &str) {
        self.absent.retain(|line| !line.starts_with(peer));
        self.absent.push(format!("{peer}: {why}"));
    }

    /// Puts rows in, each in the place of the one of its name. A peer that has rows is not absent.
    pub fn merge(&mut self, rows: impl IntoIterator<Item = Row>) {
        for row in rows {
            let peer = row.peer_name.as_deref().unwrap_or_default();
            self.absent.retain(|line| line.split_once(':').is_none_or(|(name, _)| !peer.starts_with(name)));
            match self.rows.iter_mut().find(|old| old.name == row.name) {
                Some(old) => *old = row,
                None => self.rows.push(row),
            }
        }
        self.rows.sort_by_key(|row| natural(&row.name));
    }

    /// Tries whether a report can be written there, and writes none: to be asked before hours of work.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn may_be_saved(path: &Path) -> Result<(), ReportError> {
        let beside = path.with_extension("json.new");
        let tried = fs::File::create(&beside).and_then(|_| fs::remove_file(&beside));
        tried.map_err(|source| ReportError::Io { path: path.to_owned(), what: "written", source })
    }

    /// Writes the report beside the old one, then over it, so that a reader never sees half of it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), ReportError> {
        let failed = |source| ReportError::Io { path: path.to_owned(), what: "written", source };
        let mut text = serde_json::to_string_pretty(self).map_err(|error| failed(error.into()))?;
        text.push('\n');
        let beside = path.with_extension("json.new");
        fs::write(&beside, text).map_err(failed)?;
        fs::rename(&beside, path).map_err(failed)
    }
}

/// A key by which `qd32` stands before `qd128`: runs of digits as numbers.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (text, after) = rest.split_at(letters);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(digits);
        key.push((text.to_owned(), number.parse().unwrap_or(u64::MAX)));
        rest = after;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, ours: f64) -> Row {
        let measured = Measurement {
            name: name.to_owned(),
            unit: "us",
            ours: &[ours, ours * 2.0],
            peer: Some(("peer", &[ours * 2.0, ours * 2.0])),
            bar: Some(Bar::RatioAtMost(0.8)),
            method: "made up",
        };
        Row::new(&measured, "here").unwrap()
    }

    #[test]
    fn a_row_compares_neighbouring_rounds() {
        let row = row("a", 4.0);
        assert_eq!((row.ours, row.ours_min, row.ours_max), (6.0, 4.0, 8.0));
        assert_eq!((row.ratio, row.ratio_min, row.ratio_max), (Some(0.75), Some(0.5), Some(1.0)));
        assert_eq!((row.bar.as_deref(), row.met), (Some("ratio <= 0.8"), Some(true)));
    }

    #[test]
    fn later_rows_replace_those_of_their_name_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        let mut report = Report::load(&path).unwrap();
        assert_eq!(report, Report::default());
        report.merge([row("qd128", 1.0), row("qd32", 2.0), row("other", 3.0)]);
        report.save(&path).unwrap();
        let mut report = Report::load(&path).unwrap();
        report.merge([row("qd32", 9.0)]);
        report.save(&path).unwrap();
        let report = Report::load(&path).unwrap();
        let seen: Vec<_> = report.rows.iter().map(|row| (row.name.as_str(), row.ours_min)).collect();
        assert_eq!(seen, [("other", 3.0), ("qd32", 9.0), ("qd128", 1.0)]);
    }

    #[test]
    fn a_peer_is_absent_until_it_has_rows() {
        let mut report = Report::default();
        report.name_absent("one", "not found");
        report.name_absent("two", "not found");
        report.name_absent("two", "too old");
        assert_eq!(report.absent, ["one: not found", "two: too old"]);
        let peer = Some(("two, version 3", &[1.0][..]));
        let measured = Measurement {
            name: "x".to_owned(),
            unit: "us",
            ours: &[1.0],
            peer,
            bar: None,
            method: "made up",
        };
        report.merge(Row::new(&measured, "here"));
        assert_eq!(report.absent, ["one: not found"]);
    }

    #[test]
    fn what_is_no_report_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        fs::write(&path, "[]").unwrap();
        assert!(matches!(Report::load(&path), Err(ReportError::NoReport { .. })));
    }

    #[test]
    fn a_bar_is_read_as_it_is_written() {
        for bar in
            [Bar::OursAtMost(300.0), Bar::OursAtLeast(0.8), Bar::RatioAtMost(0.85), Bar::RatioAtLeast(1.3)]
        {
            assert_eq!(Bar::parse(&bar.to_string()), Some(bar));
        }
        for text in ["", "ours", "ours < 3", "ratio <= much"] {
            assert_eq!(Bar::parse(text), None, "{text}");
        }
    }

    #[test]
    fn numbers_claim_four_digits() {
        assert_eq!(rounded(123.456), 123.5);
        assert_eq!(rounded(0.012_345_6), 0.01235);
        assert_eq!(rounded(1_234_567.8), 1_234_568.0);
        assert_eq!(rounded(0.0), 0.0);
    }
}
