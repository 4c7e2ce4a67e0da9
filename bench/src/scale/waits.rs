//! What the lookups of a turn wait for: the same memory, read with nothing of a lookup around. For a profile of them.
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `scale/lookup/N-extents/turn` | the row that is judged | in a map of one extent |
//! | `.../turn/searched` | the same in a map of 100 extents: each step of a search, and all of its memory in the core's caches | in a map of one extent |
//! | `.../turn/own` | 32 extents are read whose places are known: no lookup fetches less | 32 of the first 64 |
//! | `.../turn/indexed` | by an index of as many words as the map's: the words of 32, and for each the four extents that a search compares | of the first 64 |
//! | `.../wait` | one extent after the other, the place of each told by the one before | among the first 64 |
//! | `.../bytes`, `.../bytes/index` | what the map has in memory, and the index by which lookups begin in it | |
//!
//! All sides are measured in each round, so that they are of one state of the machine. The extents that are read are the map's own, in the pages
//! that they lie in; the index is one of its own, in ordinary pages, and as long as the map's. Sides are noted as [`windows`](crate::profiles::windows).

use std::hint::black_box;

use anyhow::Result;
use fastice::extent::{Extent, FrozenMap};

use super::Plan;
use super::lookup::{
    IN_ONE, IN_TURNS, Random, TURN, TURN_BAR, TURN_METHOD, in_turns, maps, other_data, timed,
};
use crate::clock::Stopwatch;
use crate::profiles::windows::Begun;
use crate::report::{Bar, Measurement, Row};
use crate::rest;

/// Extents of a map that is searched, and that the core's caches have, also behind the other data.
const FEW: u64 = 100;
/// Extents that the core's caches have, of a map of any size.
const FIRST: usize = 64;
const AMONG_FIRST: &str = "the same of the first 64 extents";

/// Extents that a search compares with a place (`WINDOW` of `extent::lookup`).
const AROUND: usize = 4;
/// As there: they are chosen so that they lie in two lines of the cache, of so many bytes.
const LINE_LEN: usize = 64;

/// Extents, and an index of them as the map has one: where to begin, a word for each few.
struct Bare<'m> {
    extents: &'m [Extent],
    index: Vec<u32>,
    /// Extents that a word stands for.
    each: u64,
}

/// One side of a row: nanoseconds of a round.
type Round<'m> = Box<dyn Fn(&mut [u8]) -> Result<f64> + 'm>;

/// A row that is to be.
struct Wanted<'m> {
    name: &'static str,
    ours: Round<'m>,
    peer: (&'static str, Round<'m>),
    bar: Option<Bar>,
    method: &'static str,
}

/// Bytes of what tells where lookups begin in a map.
fn index_len(map: &FrozenMap) -> u64 {
    map.resident_len().get() - size_of_val(map.extents()) as u64
}

impl<'m> Bare<'m> {
    fn new(extents: &'m [Extent], words: u64) -> Result<Self> {
        let each = (extents.len() as u64 / words.max(1)).max(1);
        let index = (0..words).map(|word| u32::try_from(word * each)).collect::<Result<_, _>>()?;
        Ok(Self { extents, index, each })
    }

    fn read(&self, at: usize, sum: &mut u64) {
        if let Some(extent) = self.extents.get(at) {
            *sum ^= extent.file_offset.get() ^ extent.device_offset.get() ^ extent.len.get();
        }
    }

    /// Of extents whose places are known.
    fn own(&self, data: &mut [u8]) -> Result<f64> {
        let (mut random, count) = (Random::new(), self.extents.len() as u64);
        timed(IN_TURNS / TURN as u64, data, || {
            let mut places = [0; TURN];
            for at in &mut places {
                *at = usize::try_from(random.below(count))?;
            }
            let mut sum = 0;
            places.iter().for_each(|&at| self.read(at, &mut sum));
            black_box(sum);
            Ok(())
        })
    }

    /// Of the extents around places that the index tells.
    fn indexed(&self, data: &mut [u8]) -> Result<f64> {
        let (mut random, words) = (Random::new(), self.index.len() as u64);
        timed(IN_TURNS / TURN as u64, data, || {
            let mut places = [0; TURN];
            for at in &mut places {
                let drawn = random.below(words * self.each);
                let word = self.index.get(usize::try_from(drawn / self.each)?).copied().unwrap_or_default();
                let guess = word as usize + usize::try_from(drawn % self.each)?;
                let into_line = guess * size_of::<Extent>() % LINE_LEN;
                *at = guess - usize::from(into_line > 2 * LINE_LEN - AROUND * size_of::<Extent>());
            }
            let mut sum = 0;
            places.iter().for_each(|&at| (at..at + AROUND).for_each(|at| self.read(at, &mut sum)));
            black_box(sum);
            Ok(())
        })
    }

    /// Of one read after the other, each of which waits for the one before.
    fn one_by_one(&self) -> Result<f64> {
        let (mut random, count) = (Random::new(), self.extents.len() as u64);
        let begun = Stopwatch::start();
        for _ in 0..IN_TURNS {
            let mut word = 0;
            self.read(usize::try_from(random.below(count))?, &mut word);
            random.stir(word);
        }
        black_box(random.below(count));
        Ok(begun.cpu_ns() / IN_TURNS as f64)
    }
}

/// The rows of the table above.
pub(super) fn rows(plan: &Plan, rows: &mut Vec<Row>) -> Result<()> {
    if !plan.rest.is_zero()
        && let Err(busy) = rest::wait(plan.rest, || false)
    {
        (plan.tell)(&format!("before the lookups: {busy}"));
    }
    let (many, one) = maps(plan.extents)?;
    let (few, _) = maps(FEW)?;
    let bare = Bare::new(many.extents(), index_len(&many) / size_of::<u32>() as u64)?;
    let first = many.extents().get(..FIRST).unwrap_or(many.extents());
    let first = Bare::new(first, (first.len() as u64 / bare.each).max(1))?;
    let turns = |map| -> Round<'_> { Box::new(move |data: &mut [u8]| in_turns(map, data)) };
    let reads = |name, read: fn(&Bare<'_>, &mut [u8]) -> Result<f64>, method| {
        let round = |bare| -> Round<'_> { Box::new(move |data: &mut [u8]| read(bare, data)) };
        Wanted { name, ours: round(&bare), peer: (AMONG_FIRST, round(&first)), bar: None, method }
    };
    let wanted = [
        Wanted {
            name: "turn",
            ours: turns(&many),
            peer: (IN_ONE, turns(&one)),
            bar: Some(TURN_BAR),
            method: TURN_METHOD,
        },
        Wanted {
            name: "turn/searched",
            ours: turns(&few),
            peer: (IN_ONE, turns(&one)),
            bar: None,
            method: "the same among 100 extents: all steps of a search, in a map that the core's caches have",
        },
        reads(
            "turn/own",
            |bare, data| bare.own(data),
            "32 extents are read, at places that are known, after 128 KiB of other data went through the caches",
        ),
        reads(
            "turn/indexed",
            |bare, data| bare.indexed(data),
            "the same of four extents, as a search compares them, their places told by an index of as many words as the map's",
        ),
        reads(
            "wait",
            |bare, _| bare.one_by_one(),
            "extents are read one after the other, and each tells where the next one is",
        ),
    ];
    measure(plan, rows, &wanted)?;
    for (name, bytes) in [("bytes", many.resident_len().get()), ("bytes/index", index_len(&many))] {
        let (method, ours) = ("the sealed map, and where lookups begin in it", &[bytes as f64]);
        let name = name_of(plan, name);
        plan.row(rows, &Measurement { name, unit: "bytes", ours, peer: None, bar: None, method })?;
    }
    Ok(())
}

fn name_of(plan: &Plan, name: &str) -> String {
    format!("scale/lookup/{}-extents/{name}", plan.extents)
}

/// All sides in each round.
fn measure(plan: &Plan, rows: &mut Vec<Row>, wanted: &[Wanted<'_>]) -> Result<()> {
    let mut data = other_data();
    let mut round = |side: &str, round: &Round<'_>| -> Result<f64> {
        let (begun, watch) = (Begun::now(), Stopwatch::start());
        let ns = round(&mut data)?;
        // Of all its time, in which other data went through the caches as well.
        begun.end(side, IN_TURNS as f64 * 1e9 / watch.wall_ns(), None)?;
        Ok(ns)
    };
    let mut taken: Vec<(Vec<f64>, Vec<f64>)> = wanted.iter().map(|_| Default::default()).collect();
    for _ in 0..plan.rounds {
        for (row, (ours, peer)) in wanted.iter().zip(&mut taken) {
            ours.push(round(row.name, &row.ours)?);
            peer.push(round(&format!("{}: {}", row.name, row.peer.0), &row.peer.1)?);
        }
    }
    for (row, (ours, peer)) in wanted.iter().zip(&taken) {
        let measured = Measurement {
            name: name_of(plan, row.name),
            unit: "ns",
            ours,
            peer: Some((row.peer.0, peer)),
            bar: row.bar,
            method: row.method,
        };
        plan.row(rows, &measured)?;
    }
    Ok(())
}
