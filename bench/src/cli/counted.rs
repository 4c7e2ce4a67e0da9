//! `instructions` and `guard`: what is counted instead of timed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use fastice_bench::guard::figures::Verdict;
use fastice_bench::{count, guard, machine};

use super::{add, say};

#[derive(Debug, Args)]
pub(crate) struct Instructions {
    /// Queue depths
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 128], value_name = "N,N")]
    depths: Vec<u16>,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

/// Counts the driver's at each depth, as rows.
pub(crate) fn instructions(options: &Instructions) -> Result<()> {
    let program = std::env::current_exe().context("which program this is")?;
    add(&options.report, |rows| {
        for &depth in &options.depths {
            let row = count::row(&program, depth, &machine::describe())?;
            say(&row.to_string());
            rows.push(row);
        }
        Ok(())
    })
}

/// The profile by which programs are counted, for its figures do not depend on code elsewhere; and that of this program.
const COUNTED: &str = "counted";
const PROFILE: &str = env!("FASTICE_BENCH_PROFILE");

/// What to do when figures are no longer right.
const ACCEPT: &str =
    "`make accept-instructions` records the new figures; commit them with the change that makes them so";

/// Counts, and compares with what was recorded.
pub(crate) fn check(figures: &Path) -> Result<()> {
    ensure!(
        PROFILE == COUNTED,
        "a build of the profile {PROFILE} is not what is counted: build with --profile {COUNTED}"
    );
    let program = std::env::current_exe().context("which program this is")?;
    let compared = guard::check(&program, figures)?;
    say(compared.to_string().trim_end());
    match compared.verdict() {
        Verdict::Holds if compared.has_shrunk() => say(&format!("less than was recorded: {ACCEPT}")),
        Verdict::Holds => say("the hot path costs what was recorded"),
        Verdict::Broken => bail!(
            "the hot path costs more than was recorded in {}, or other things are counted. If that is meant, {ACCEPT}",
            figures.display()
        ),
        // A test that cannot be done here: see .ci/test.
        Verdict::CannotTell => say(&format!(
            "SKIPPED: hot path: more than was recorded, but this is another build ({}). {ACCEPT}",
            compared.differences.join("; ")
        )),
    }
    Ok(())
}

/// Counts, and records it.
pub(crate) fn accept(figures: &Path) -> Result<()> {
    ensure!(
        PROFILE == COUNTED,
        "a build of the profile {PROFILE} is not what is counted: build with --profile {COUNTED}"
    );
    let program = std::env::current_exe().context("which program this is")?;
    let compared = guard::accept(&program, figures)?;
    say(compared.to_string().trim_end());
    say(&format!("recorded in {}", figures.display()));
    Ok(())
}
