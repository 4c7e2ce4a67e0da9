//! How long pins take, beside a bare fsync and FIEMAP of the same files.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use fastice::extent::{NoProgress, PinOptions, PinnedFile, StateDir, Warden, WatchOptions, pin};

use super::Plan;
use super::bare::fsync_and_fiemap;
use super::ground::Ground;
use crate::profiles::windows::{Begun, OURS};
use crate::report::{Bar, Measurement, Row};

/// Most that a pin of a large file may take, in bare fsyncs and FIEMAPs of it.
const PIN_RATIO_MAX: f64 = 2.0;
pub(super) const BARE: &str = "bare fsync and FIEMAP of the same";

/// Pins a file as a target does, whose warden has been there before.
pub(super) fn pin_one(path: &Path, warden: &std::sync::Arc<Warden>, state: &StateDir) -> Result<PinnedFile> {
    let options = PinOptions { warden: Some(warden.clone()), ..PinOptions::default() };
    Ok(pin(path, &options, state, &mut NoProgress)?)
}

/// Rounds of both sides in milliseconds, neither always the first.
fn rounds(
    count: usize,
    mut ours: impl FnMut() -> Result<f64>,
    mut bare: impl FnMut() -> Result<f64>,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut our_ms, mut bare_ms) = (Vec::new(), Vec::new());
    for round in 0..count {
        if round % 2 == 0 {
            bare_ms.push(bare()?);
        }
        our_ms.push(ours()?);
        if round % 2 == 1 {
            bare_ms.push(bare()?);
        }
    }
    Ok((our_ms, bare_ms))
}

fn ms_since(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

pub(super) fn one_file(plan: &Plan, rows: &mut Vec<Row>, ground: &Ground, name: &str) -> Result<()> {
    let (state, warden, path) =
        (ground.state()?, Warden::start(WatchOptions::default())?, ground.fragmented_file());
    // Neither side is to be the one that reads the filesystem's own records of the file from the device.
    let extents = fsync_and_fiemap(&path)?;
    // ext4 puts a block beside the last one now and then.
    ensure!(extents >= plan.extents * 99 / 100, "{} has {extents} extents only", path.display());
    let ours = || {
        let (window, begun) = (Begun::now(), Instant::now());
        let pinned = pin_one(&path, &warden, &state)?;
        let ms = ms_since(begun);
        window.end(OURS, 0.0, None)?;
        ensure!(pinned.map().extent_count() as u64 >= plan.extents * 99 / 100, "extents were lost");
        pinned.release()?;
        Ok(ms)
    };
    let bare = || {
        let (window, begun) = (Begun::now(), Instant::now());
        fsync_and_fiemap(&path)?;
        let ms = ms_since(begun);
        window.end(BARE, 0.0, None)?;
        Ok(ms)
    };
    let (ours, bare) = rounds(plan.rounds, ours, bare)?;
    plan.row(
        rows,
        &Measurement {
            name: format!("{name}/pin"),
            unit: "ms",
            ours: &ours,
            peer: Some((BARE, &bare)),
            bar: Some(Bar::RatioAtMost(PIN_RATIO_MAX)),
            method: "time of day from the call to the recorded pin: guards, map, map again, seal, record on disk",
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
    let ours = || {
        let begun = Instant::now();
        let pinned: Result<Vec<_>> = paths.iter().map(|path| pin_one(path, &warden, &state)).collect();
        let ms = ms_since(begun);
        pinned?.into_iter().try_for_each(PinnedFile::release)?;
        Ok(ms)
    };
    let bare = || {
        let begun = Instant::now();
        paths.iter().try_for_each(|path| fsync_and_fiemap(path).map(drop))?;
        Ok(ms_since(begun))
    };
    let (ours, bare) = rounds(plan.rounds.min(3), ours, bare)?;
    plan.row(
        rows,
        &Measurement {
            name: format!("{name}/pin"),
            unit: "ms for all",
            ours: &ours,
            peer: Some((BARE, &bare)),
            bar: None,
            method: "one after the other; records in memory: a disk adds the time of some ten fsyncs a pin, which is all that would \
                     be seen",
        },
    )
}
