//! `bench/REPORT.md` and its plots, made of `bench/report.json`: what was measured, for people.
//!
//! ```text
//!   table      the rows that something is demanded of, then all others
//!   plot       latency against rate, rate against depth and connections: SVG, one file each
//! ```
//!
//! What it does not do: measure. It says nothing that is not in a row.

mod plot;
mod table;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::report::Report;

/// Where plots go, beside the report.
const PLOTS: &str = "plots";

/// Writes the report and its plots into `directory`.
///
/// # Errors
/// When a file cannot be written.
pub fn publish(report: &Report, directory: &Path) -> Result<()> {
    let plots = directory.join(PLOTS);
    fs::create_dir_all(&plots).with_context(|| format!("{} cannot be made", plots.display()))?;
    let mut shown = Vec::new();
    for plot in plot::all(report) {
        let path = plots.join(format!("{}.svg", plot.name));
        let svg = plot.draw()?;
        fs::write(&path, svg).with_context(|| format!("{} cannot be written", path.display()))?;
        shown.push((format!("{PLOTS}/{}.svg", plot.name), plot.title));
    }
    let path = directory.join("REPORT.md");
    fs::write(&path, table::document(report, &shown)).with_context(|| format!("{}", path.display()))
}
