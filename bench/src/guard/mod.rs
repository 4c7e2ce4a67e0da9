//! The hot path costs no more instructions than were recorded: `make test` fails when a figure grows by more than 3 %.
//!
//! ```text
//!   figures   bench/instructions.json, and the comparison with it
//!     ^
//!   guard     counts each row twice, with few and with many I/Os: the difference is what the I/Os cost
//!     | valgrind --tool=callgrind, itself and the program once more
//!   served    the target's core and its host on one thread       count   the driver on a replayed device
//! ```
//!
//! Counts are the same in each run, whatever else the machine does, but for a tick of the core now and then: nothing happens at the
//! same time as something else. What a system call does in the kernel is not counted, but how many there are is: reading the clock is
//! one of them, for valgrind hides the page by which it otherwise is none.
//!
//! Not here: time, cache misses, devices, digests, writes whose data comes later (R2T).

mod device;
pub mod figures;
mod host;
pub mod served;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};

use self::figures::{Build, Comparison, Figure, Figures};
use self::served::{Direction, Served};
use crate::count::{self, Counted, Where};

/// Rounds of the shorter run, in which all comes to its habits, and of the longer one.
const ROUNDS: [usize; 2] = [100, 600];
/// The same at depth 1, where a round is one I/O.
const ROUNDS_SINGLE: [usize; 2] = [400, 2400];

/// What is counted for figures of one name.
#[derive(Clone, Copy, Debug)]
enum Subject {
    Target {
        served: Served,
        work: Direction,
    },
    /// The driver alone.
    Driver,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    subject: Subject,
    depth: u16,
}

impl Row {
    fn all() -> Vec<Self> {
        let mut rows = Vec::new();
        for served in [Served::Null, Served::OneExtent, Served::ManyExtents] {
            for work in [Direction::Read, Direction::Write] {
                rows.extend([1, 32].map(|depth| Self { subject: Subject::Target { served, work }, depth }));
            }
        }
        rows.extend([1, 32, 128].map(|depth| Self { subject: Subject::Driver, depth }));
        rows
    }

    /// Counts, and gives the processor as well that the program saw.
    fn count(self, program: &Path) -> Result<(Vec<Figure>, String)> {
        let Self { subject, depth } = self;
        let at_depth = depth.to_string();
        let (name, few, many) = match subject {
            Subject::Target { served, work } => {
                let place = Where { inside: &[served::TURN], from: Some(served::CONVERSE) };
                let run = |rounds: usize| {
                    let arguments = [
                        "count-target",
                        served.name(),
                        &work.name(),
                        "--depth",
                        &at_depth,
                        "--rounds",
                        &rounds.to_string(),
                    ];
                    count::run_counted(program, place, &arguments, rounds * usize::from(depth))
                };
                let [few, many] = if depth == 1 { ROUNDS_SINGLE } else { ROUNDS };
                (format!("target/{}/{}", served.name(), work.name()), run(few)?, run(many)?)
            }
            Subject::Driver => {
                let [few, many] = count::driver(program, depth)?;
                ("driver/replay/read".to_owned(), few, many)
            }
        };
        let per_io = |of: fn(&Counted) -> u64| -> Result<f64> {
            let (few_events, many_events) = (of(&few), of(&many));
            let events = many_events.checked_sub(few_events).context("the longer run counted less")?;
            ensure!(many.ios > few.ios, "the longer run is not the longer one");
            Ok(events as f64 / (many.ios - few.ios) as f64)
        };
        let instructions = per_io(|counted| counted.instructions)?;
        ensure!(instructions > 0.0, "{name}: nothing was counted");
        let figure = |what, per_io: f64, scale: f64| Figure {
            name: format!("{name}/qd{depth}/{what}"),
            per_io: (per_io * scale).round() / scale,
        };
        let mut figures = vec![figure("instructions", instructions, 10.0)];
        if matches!(subject, Subject::Target { .. }) {
            figures.push(figure("system-calls", per_io(|counted| counted.system_calls)?, 1000.0));
        }
        Ok((figures, many.processor))
    }
}

/// Counts everything, on all processors.
///
/// # Errors
/// When valgrind or a counted program fails.
pub fn count_all(program: &Path) -> Result<Figures> {
    let rows = Row::all();
    let next = AtomicUsize::new(0);
    let workers = thread::available_parallelism().map_or(1, usize::from).min(rows.len());
    let work = || -> Result<Vec<(usize, Vec<Figure>, String)>> {
        let mut counted = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(row) = rows.get(index) else { return Ok(counted) };
            let (figures, processor) = row.count(program).with_context(|| format!("{row:?}"))?;
            counted.push((index, figures, processor));
        }
    };
    let results: Vec<Result<_>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| {
            worker.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a counting thread panicked")))
        };
        workers.into_iter().map(join).collect()
    });
    let mut counted = results.into_iter().collect::<Result<Vec<_>>>()?.concat();
    counted.sort_by_key(|(index, ..)| *index);
    let processor = counted.first().map(|(_, _, processor)| processor.clone()).unwrap_or_default();
    let figures = counted.into_iter().flat_map(|(_, figures, _)| figures).collect();
    Ok(Figures { build: Build::this(&processor), figures })
}

/// Counts, and compares with what was recorded.
///
/// # Errors
/// When nothing was recorded or counted.
pub fn check(program: &Path, recorded: &Path) -> Result<Comparison> {
    let recorded = Figures::load(recorded)?
        .with_context(|| format!("{} is not there: nothing was recorded", recorded.display()))?;
    Ok(count_all(program)?.compare(&recorded))
}

/// Counts, and records that; gives the comparison with what was recorded before.
///
/// # Errors
/// When nothing was counted, or it cannot be recorded.
pub fn accept(program: &Path, into: &Path) -> Result<Comparison> {
    let before = Figures::load(into)?;
    let now = count_all(program)?;
    let before = before.unwrap_or_else(|| Figures { build: now.build.clone(), figures: Vec::new() });
    now.save(into)?;
    Ok(now.compare(&before))
}
