//! `absent`, `merge`, `publish`, `readme` and `show`: what is done with a report that is there.

use std::path::Path;

use anyhow::{Result, ensure};
use fastice_bench::publish as published;
use fastice_bench::report::Report;

use super::say;

/// Names a peer that is not here.
pub(crate) fn absent(peer: &str, why: &str, path: &Path) -> Result<()> {
    let mut report = Report::load(path)?;
    report.name_absent(peer, why);
    Ok(report.save(path)?)
}

/// Puts the rows of one report into another.
pub(crate) fn merge(from: &Path, into: &Path) -> Result<()> {
    let rows = if from == Path::new("-") {
        Report::read(std::io::stdin().lock(), from)?.rows
    } else {
        ensure!(from.exists(), "{} does not exist", from.display());
        Report::load(from)?.rows
    };
    ensure!(!rows.is_empty(), "{} has no rows", from.display());
    let mut report = Report::load(into)?;
    report.merge(rows);
    Ok(report.save(into)?)
}

/// Writes what is told of the report beside it.
pub(crate) fn publish(path: &Path) -> Result<()> {
    ensure!(path.exists(), "{} does not exist", path.display());
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    published::publish(&Report::load(path)?, directory.unwrap_or(Path::new(".")))
}

/// Writes the README's part that is made of the report.
pub(crate) fn update(report: &Path, readme: &Path) -> Result<()> {
    ensure!(report.exists(), "{} does not exist", report.display());
    published::readme::update(&Report::load(report)?, readme)
}

/// Prints the report.
pub(crate) fn show(path: &Path) -> Result<()> {
    ensure!(path.exists(), "{} does not exist", path.display());
    for row in Report::load(path)?.rows {
        say(&row.to_string());
    }
    Ok(())
}
