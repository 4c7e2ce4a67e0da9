//! What it costs to watch pinned files, and how often they are looked at for that.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use fastice::extent::{PinnedFile, Warden, WatchOptions, WatchReport};

use super::Plan;
use super::bare::fsync_and_fiemap;
use super::ground::Ground;
use super::pin::{BARE, pin_one};
use crate::clock::Stopwatch;
use crate::report::{Bar, Measurement, Row};
use crate::threads::cpu_time_of;

/// Most that watching may take by default, in per cent of a core.
const SHARE_PERCENT_MAX: f64 = 1.0;
/// With ten times the default share, intervals of a large file are over in seconds.
const FASTER: f64 = 10.0;
const THREADS: [&str; 2] = ["fastice-guard", "fastice-watch"];
/// How long many files are watched.
const WINDOW: Duration = Duration::from_secs(8);
/// When a look that does not come is given up.
const PATIENCE: Duration = Duration::from_secs(60);

fn watched(pinned: &PinnedFile) -> Result<WatchReport> {
    pinned.watched().context("the file is not guarded")
}

/// Waits for the next look at the map.
fn next_look(pinned: &PinnedFile) -> Result<()> {
    let (before, begun) = (watched(pinned)?.checks, Instant::now());
    while watched(pinned)?.checks == before {
        ensure!(begun.elapsed() < PATIENCE, "the watch does not look");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Per cent of a core that the threads of a warden took while `wait` waited.
fn share_percent(wait: impl FnOnce() -> Result<()>) -> Result<f64> {
    let (begun, cpu) = (Instant::now(), cpu_time_of("self", &THREADS)?);
    wait()?;
    let took = cpu_time_of("self", &THREADS)?.saturating_sub(cpu);
    Ok(took.as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0)
}

pub(super) fn one_file(plan: &Plan, rows: &mut Vec<Row>, ground: &Ground, name: &str) -> Result<()> {
    let path = ground.fragmented_file();
    let state = ground.quick_state()?;
    let usual = WatchOptions::default();
    let faster = WatchOptions { share: usual.share * FASTER, ..usual };
    let warden = Warden::start(faster)?;
    let pinned = pin_one(&path, &warden, &state)?;
    // Whole intervals only, each from the end of a look to the end of the next.
    next_look(&pinned)?;
    let shares = (0..plan.rounds.min(2)).map(|_| share_percent(|| next_look(&pinned)));
    let shares = shares.collect::<Result<Vec<_>>>()?;
    pinned.release()?;
    // With its watch, which may be looking at the file, and so has it open.
    drop(warden);
    let warden = Warden::start(usual)?;
    let pinned = pin_one(&path, &warden, &state)?;
    let look = pinned.second_look().context("the file is not guarded")?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        let watch = Stopwatch::start();
        look.look().map_err(|differs| anyhow!("the file changed: {differs}"))?;
        ours.push(watch.cpu_ns() / 1e6);
        let watch = Stopwatch::start();
        // The same thread of the same process may open a file that it has pinned.
        fsync_and_fiemap(&path)?;
        bare.push(watch.cpu_ns() / 1e6);
    }
    let report = watched(&pinned)?;
    pinned.release()?;
    look_rows(plan, rows, name, &ours, Some((BARE, &bare)))?;
    interval_row(plan, rows, name, &[report.interval])?;
    let allowed = vec![faster.share * 100.0; shares.len()];
    plan.row(
        rows,
        &Measurement {
            name: format!("{name}/watch/share"),
            unit: "% of a core",
            ours: &shares,
            peer: Some(("the share that it was given: ten times the default", &allowed)),
            bar: Some(Bar::RatioAtMost(1.0)),
            method: "processor time of the guard and the watch thread, from the end of a look at the map to the end of the next",
        },
    )
}

pub(super) fn many_files(
    plan: &Plan,
    rows: &mut Vec<Row>,
    ground: &Ground,
    paths: &[PathBuf],
    name: &str,
) -> Result<()> {
    let (state, warden) = (ground.quick_state()?, Warden::start(WatchOptions::default())?);
    let pinned: Vec<_> = paths.iter().map(|path| pin_one(path, &warden, &state)).collect::<Result<_>>()?;
    let share = share_percent(|| {
        thread::sleep(WINDOW);
        Ok(())
    })?;
    let reports: Vec<_> = pinned.iter().map(watched).collect::<Result<_>>()?;
    pinned.into_iter().try_for_each(PinnedFile::release)?;
    let costs: Vec<f64> = reports.iter().map(|report| report.cost.as_secs_f64() * 1e3).collect();
    look_rows(plan, rows, name, &costs, None)?;
    let intervals: Vec<_> = reports.iter().map(|report| report.interval).collect();
    interval_row(plan, rows, name, &intervals)?;
    plan.row(
        rows,
        &Measurement {
            name: format!("{name}/watch/share"),
            unit: "% of a core",
            ours: &[share],
            peer: None,
            bar: Some(Bar::OursAtMost(SHARE_PERCENT_MAX)),
            method: "processor time of the guard and the watch thread in 8 s, all files watched, quick looks included",
        },
    )
}

fn look_rows(
    plan: &Plan,
    rows: &mut Vec<Row>,
    name: &str,
    ours: &[f64],
    peer: Option<(&str, &[f64])>,
) -> Result<()> {
    plan.row(
        rows,
        &Measurement {
            name: format!("{name}/watch/look"),
            unit: "ms of processor time",
            ours,
            peer,
            bar: None,
            method: "one look: inode, lease, disk, map against the frozen one",
        },
    )
}

fn interval_row(plan: &Plan, rows: &mut Vec<Row>, name: &str, intervals: &[Duration]) -> Result<()> {
    let seconds: Vec<f64> = intervals.iter().map(Duration::as_secs_f64).collect();
    plan.row(
        rows,
        &Measurement {
            name: format!("{name}/watch/interval"),
            unit: "s",
            ours: &seconds,
            peer: None,
            bar: None,
            method: "between two looks at the map of a file, as the watch chose for the default share of 1 %",
        },
    )
}
