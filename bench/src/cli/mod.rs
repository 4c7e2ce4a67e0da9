//! What the subcommands do, and the options of those that have many. Parsing and dispatch are in `main.rs`; what is measured is in the
//! library.

pub(crate) mod counted;
pub(crate) mod driver;
pub(crate) mod guest;
pub(crate) mod profiles;
pub(crate) mod report;
pub(crate) mod scale;
pub(crate) mod target;

use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use fastice_bench::report::{Report, Row};

/// A line on standard output.
pub(crate) fn say(line: &str) {
    // A reader that went away is no reason to stop.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// The report that rows are to go into: that it cannot be written is told before hours of work, not behind them.
fn for_rows(path: &Path) -> Result<Report> {
    let report = Report::load(path)?;
    Report::may_be_saved(path)?;
    Ok(report)
}

/// Measures, and puts the rows into the report. A report that cannot be read is told of before hours of work.
fn add(path: &Path, measure: impl FnOnce(&mut Vec<Row>) -> Result<()>) -> Result<()> {
    let mut report = for_rows(path)?;
    let mut rows = Vec::new();
    measure(&mut rows)?;
    report.merge(rows);
    Ok(report.save(path)?)
}
