//! `bench/REPORT.md` and its plots, made of `bench/report.json`: what was measured, for people.
//!
//! ```text
//!   table      the rows that something is demanded of, then all others
//!   demands    the table of what is demanded of the target, also for README.md (readme)
//!   shortfalls what is not met, with the profiles that show why
//!   ceiling    what a responder without work comes to, where a bar is missed
//!   growth     costs against connections, namespaces, extents and cores, and models fitted to them
//!   plot       latency against rate, rate against depth and connections, cost by stage: SVG, one file each
//! ```
//!
//! What it does not do: measure. It says nothing that is not in a row.

mod ceiling;
mod demands;
mod draw;
mod growth;
mod plot;
pub mod readme;
mod shortfalls;
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
    // What is not drawn any more would be taken for this report's.
    if plots.is_dir() {
        fs::remove_dir_all(&plots).with_context(|| format!("{} cannot be emptied", plots.display()))?;
    }
    fs::create_dir_all(&plots).with_context(|| format!("{} cannot be made", plots.display()))?;
    let mut shown = Vec::new();
    for plot in plot::all(report).into_iter().chain(growth::plots(report)) {
        let path = plots.join(format!("{}.svg", plot.name));
        let svg = plot.draw()?;
        fs::write(&path, svg).with_context(|| format!("{} cannot be written", path.display()))?;
        shown.push((format!("{PLOTS}/{}.svg", plot.name), plot.title));
    }
    let path = directory.join("REPORT.md");
    let shortfalls = shortfalls::section(report, &shortfalls::profiles(directory)?);
    let text = table::document(report, &shown, &shortfalls) + &growth::text(report);
    fs::write(&path, text).with_context(|| format!("{}", path.display()))
}
