//! What the threads of a process ran, by their names.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// The processor time so far of all threads of `process`, a number or `self`, whose name begins with one of `names`, by `schedstat`
/// (`proc(5)`).
pub(crate) fn cpu_time_of(process: &str, names: &[&str]) -> Result<Duration> {
    let mut total = Duration::ZERO;
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let task = entry?.path();
        // A thread that has ended meanwhile took its time with it.
        let Ok(name) = fs::read_to_string(task.join("comm")) else { continue };
        if names.iter().any(|wanted| name.starts_with(wanted)) {
            let text = fs::read_to_string(task.join("schedstat"))?;
            let ran_ns = text.split(' ').next().and_then(|ns| ns.parse().ok());
            total += Duration::from_nanos(ran_ns.context("schedstat is not as it was")?);
        }
    }
    Ok(total)
}
