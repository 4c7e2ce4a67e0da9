//! One round: a side started, kept busy for a while, and stopped.
//!
//! A round is cut into chunks, and the middle one counts: a chunk in which the machine did something else falls out. They
//! are long where only the thread's own time is looked at, and short, for many to be undisturbed, where it is not.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::bare::Bare;
use crate::clock::Stopwatch;
use crate::device::Device;
use crate::load::{Buffers, Load};
use crate::spread::Spread;
use crate::uring::Kernel;

/// Reads before anything is timed: caches and predictors are warm then.
const WARM_UP: usize = 2000;
const CHUNK_INSIDE_NS: f64 = 2e6;
const CHUNK_OUTSIDE_NS: f64 = 1e5;
/// Completions of a chunk of the replayed device alone: about two milliseconds too.
const ALONE_CHUNK: usize = 1 << 19;
/// Fewer reads than this are no chunk; nor are fewer than so many times the depth, for they come in bursts.
const CHUNK_READS_MIN: usize = 64;
const CHUNK_DEPTHS_MIN: usize = 16;
/// The driver's clock is looked at once in so many turns, as a reactor does once a turn for many queues.
const CLOCK_EVERY: usize = 64;
/// Reads that are timed one by one, at most, and after how many of them the controller itself is served.
const READS_TIMED_MAX: usize = 1 << 20;
const SERVE_EVERY: usize = 64;
/// After so many turns for nothing in a row it is looked how long that was, and how long that may be.
const IDLE_TURNS: u32 = 1 << 20;
const SILENCE: Duration = Duration::from_secs(60);

/// What a round came to.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Nanoseconds a read: of the thread's own time for a device that works on its core, of the day else. One at a
    /// time on a device of the second kind: the middle one.
    pub ns: f64,
    /// Reads in all chunks.
    pub reads: usize,
}

/// Something that keeps `depth` reads open on a device `D`.
trait Side<D> {
    /// Gives, lets the device work, takes: how many were complete.
    fn turn(&mut self, device: &mut D) -> Result<usize>;
    /// Whatever else must be done now and then.
    fn serve(&mut self) {}
}

/// What a side works on.
trait Worked {
    /// Whether only the time that the thread ran counts.
    fn is_inside(&self) -> bool;
}

impl Worked for Device {
    fn is_inside(&self) -> bool {
        Self::is_inside(self)
    }
}

/// The kernel's device is the kernel's.
impl Worked for () {
    fn is_inside(&self) -> bool {
        false
    }
}

impl Side<()> for Kernel {
    fn turn(&mut self, (): &mut ()) -> Result<usize> {
        self.fill()?;
        self.reap()
    }
}

struct Ours {
    load: Load,
    turns: usize,
}

impl Side<Device> for Ours {
    #[inline]
    fn turn(&mut self, device: &mut Device) -> Result<usize> {
        self.load.fill();
        device.work();
        self.turns += 1;
        if self.turns == CLOCK_EVERY {
            self.turns = 0;
            self.load.look_at_clock();
        }
        Ok(self.load.reap())
    }

    fn serve(&mut self) {
        self.load.serve();
    }
}

impl Side<Device> for Bare {
    #[inline]
    fn turn(&mut self, device: &mut Device) -> Result<usize> {
        self.fill();
        device.work();
        self.reap()
    }
}

/// One read at a time for `time`: the middle one of their times. A read in which the machine did something else falls
/// out, where a mean of many would not.
fn one_by_one<D, S: Side<D>>(side: &mut S, device: &mut D, time: Duration) -> Result<Round> {
    let mut times = Vec::with_capacity(READS_TIMED_MAX);
    chunk(side, device, CHUNK_READS_MIN)?;
    let whole = Instant::now();
    while times.is_empty() || (whole.elapsed() < time && times.len() < READS_TIMED_MAX) {
        for _ in 0..SERVE_EVERY {
            let begun = Instant::now();
            chunk(side, device, 1)?;
            times.push(begun.elapsed().as_nanos() as f64);
        }
        side.serve();
    }
    let reads = times.len();
    let spread = Spread::of(&times);
    ensure!(spread.is_some(), "no read was timed");
    Ok(Round { ns: spread.map_or(f64::NAN, |spread| spread.median), reads })
}

/// Keeps a side busy for `time`.
fn busy<D: Worked, S: Side<D>>(side: &mut S, device: &mut D, depth: u16, time: Duration) -> Result<Round> {
    let inside = device.is_inside();
    let chunk_ns = if inside { CHUNK_INSIDE_NS } else { CHUNK_OUTSIDE_NS };
    let reads_min = CHUNK_READS_MIN.max(usize::from(depth) * CHUNK_DEPTHS_MIN);
    // How many reads a chunk takes is found out by the warm-up.
    chunk(side, device, CHUNK_READS_MIN)?;
    let watch = Stopwatch::start();
    let mut reads = 0;
    while reads < WARM_UP && watch.wall_ns() < chunk_ns {
        reads += chunk(side, device, CHUNK_READS_MIN)?;
    }
    let ns = if inside { watch.cpu_ns() } else { watch.wall_ns() };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let chunk_reads = ((chunk_ns * reads as f64 / ns.max(1.0)) as usize).max(reads_min);
    let whole = Stopwatch::start();
    let mut chunks = Vec::new();
    let mut reads = 0;
    while chunks.is_empty() || whole.wall_ns() < time.as_secs_f64() * 1e9 {
        let watch = Stopwatch::start();
        let count = chunk(side, device, chunk_reads)?;
        let ns = if inside { watch.cpu_ns() } else { watch.wall_ns() };
        chunks.push(ns / count as f64);
        reads += count;
        side.serve();
    }
    let spread = Spread::of(&chunks);
    ensure!(spread.is_some(), "no chunk was timed");
    Ok(Round { ns: spread.map_or(f64::NAN, |spread| spread.median), reads })
}

#[inline(never)]
fn chunk<D, S: Side<D>>(side: &mut S, device: &mut D, reads: usize) -> Result<usize> {
    let mut done = 0;
    // A device that stops answering ends the round.
    let mut silent_since = None;
    let mut idle = 0u32;
    while done < reads {
        let count = side.turn(device)?;
        done += count;
        idle = if count == 0 { idle + 1 } else { 0 };
        if idle == IDLE_TURNS {
            side.serve();
            let since = *silent_since.get_or_insert_with(Instant::now);
            ensure!(since.elapsed() < SILENCE, "the device does not answer");
            idle = 0;
        }
    }
    Ok(done)
}

/// A round of the driver.
///
/// # Errors
/// When the device does not do as it should, or a read failed.
pub fn ours(device: &mut Device, depth: u16, buffers: Buffers, time: Duration) -> Result<Round> {
    let (access, nsid) = (device.access(), device.nsid());
    let load = Load::start(access, nsid, depth, buffers, &mut || device.idle())?;
    device.opened()?;
    let mut side = Ours { load, turns: 0 };
    let alone = depth == 1 && !device.is_inside();
    let round =
        if alone { one_by_one(&mut side, device, time)? } else { busy(&mut side, device, depth, time)? };
    ensure!(side.load.failed() == 0, "{} reads failed", side.load.failed());
    side.load.finish(&mut || device.idle())?;
    device.closed();
    Ok(round)
}

/// Writes all of the device's namespace. Its contents are lost.
///
/// # Errors
/// When the device does not do as it should.
pub fn write_all(device: &mut Device) -> Result<()> {
    let (access, nsid) = (device.access(), device.nsid());
    let mut load = Load::start(access, nsid, 1, Buffers::Pooled, &mut || device.idle())?;
    load.write_all(&mut || device.idle())?;
    load.finish(&mut || device.idle())
}

/// A round of the device alone.
///
/// # Errors
/// When the device does not do as it should, or a read failed.
pub fn bare(device: &mut Device, depth: u16, time: Duration) -> Result<Round> {
    let (access, nsid) = (device.access(), device.nsid());
    let mut bare = Bare::start(access, nsid, depth, &mut || device.idle())?;
    device.opened()?;
    let alone = depth == 1 && !device.is_inside();
    let round =
        if alone { one_by_one(&mut bare, device, time)? } else { busy(&mut bare, device, depth, time)? };
    bare.finish(&mut || device.idle())?;
    device.closed();
    Ok(round)
}

/// A round of the replayed device alone, over a queue pair that nobody uses: nanoseconds a completion.
///
/// # Errors
/// When the device does not do as it should.
pub fn replay_alone(depth: u16, time: Duration) -> Result<f64> {
    let mut device = Device::replay(1)?;
    let (access, nsid) = (device.access(), device.nsid());
    let bare = Bare::start(access, nsid, depth, &mut || device.idle())?;
    device.opened()?;
    let mut chunks = Vec::new();
    let whole = Stopwatch::start();
    while chunks.is_empty() || whole.wall_ns() < time.as_secs_f64() * 1e9 {
        let watch = Stopwatch::start();
        device.complete_alone(ALONE_CHUNK);
        chunks.push(watch.cpu_ns() / ALONE_CHUNK as f64);
    }
    device.closed();
    bare.finish(&mut || device.idle())?;
    Ok(Spread::of(&chunks).map_or(f64::NAN, |spread| spread.median))
}

/// A round of the kernel's driver.
///
/// # Errors
/// When a read failed, or the kernel cannot do it.
pub fn kernel(path: &Path, depth: u16, polled: bool, time: Duration) -> Result<Round> {
    let mut side = Kernel::start(path, depth, polled)?;
    let round = if depth == 1 {
        one_by_one(&mut side, &mut (), time)?
    } else {
        busy(&mut side, &mut (), depth, time)?
    };
    side.finish()?;
    Ok(round)
}
