//! Random lookups in a map of many extents, beside the same lookups in a map of one.
//!
//! A lookup is what the data path does for a command: the segment that holds all of a range, proven by `FrozenMap::check`. Ranges are one
//! block at random places, so that no guess of a cursor is ever right. Extents have 1 to 15 blocks and lie at random places.
//!
//! `turn` is a turn of the data path (`reactor::engine`): 32 commands begin, which prefetches, and then are looked up, after
//! 128 KiB of other data went through the core's caches; only the prefetches and lookups are timed. `loop` is nothing but
//! lookups, one after the other, each of which waits for memory: a device answers in a hundred times that.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context as _, Result};
use fastice::extent::{
    DeviceNumber, DiskIdentity, Extent, FilesystemIdentity, FilesystemKind, FrozenMap, LookupCursor,
    LookupHint, MapIdentity,
};
use fastice::units::{BlockSize, ByteLen, ByteOffset};

use super::Plan;
use crate::clock::Stopwatch;
use crate::report::{Bar, Measurement, Row};
use crate::spread::Spread;

/// Most that a lookup among many may cost, in lookups in a single extent.
pub(crate) const LOOKUP_RATIO_MAX: f64 = 3.0;
/// What is demanded of the row `turn`, what its peer is, and how it is measured.
pub(super) const TURN_BAR: Bar = Bar::RatioAtMost(LOOKUP_RATIO_MAX);
pub(super) const IN_ONE: &str = "the same in a map of one extent";
pub(super) const TURN_METHOD: &str = "the same as the data path does it: 32 commands of a turn, first prefetch of each, then segment and \
     check of each, after 128 KiB of other data went through the caches; only this is timed";
pub(crate) const BLOCK: u64 = 4096;
/// Where the filesystem begins on the disk.
const PARTITION: u64 = 1 << 20;
/// Lookups of a turn.
pub(crate) const TURN: usize = 32;
/// What goes through the caches in a turn: 4 KiB a command.
pub(crate) const TURN_BYTES: usize = 128 << 10;
/// Lookups of a round.
const LOOKUPS: u64 = 1 << 20;
/// Of these, as many in turns.
pub(super) const IN_TURNS: u64 = LOOKUPS / 4;
const ROUNDS_MIN: usize = 7;

/// A sequence that nobody guesses and everybody repeats (xorshift64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }

    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// What comes from now on depends on this as well.
    pub(super) const fn stir(&mut self, word: u64) {
        self.0 ^= word;
    }

    /// Below `end`.
    pub(crate) const fn below(&mut self, end: u64) -> u64 {
        ((self.next() as u128 * end as u128) >> 64) as u64
    }
}

fn identity(size: u64) -> MapIdentity {
    let disk_len = ByteLen(size * 4 + PARTITION);
    MapIdentity {
        path: "/a/file".into(),
        inode: 1,
        inode_generation: 1,
        size: ByteLen(size),
        reserved: ByteLen(0),
        filesystem: FilesystemIdentity {
            kind: FilesystemKind::Xfs,
            uuid: [1; 16],
            block_size: 4096,
            device: DeviceNumber { major: 259, minor: 1 },
        },
        disk: DiskIdentity {
            number: DeviceNumber { major: 259, minor: 0 },
            name: "nvme0n1".to_owned(),
            node: "/dev/nvme0n1".into(),
            size: disk_len,
            logical_block_size: BlockSize::B512,
            partition_start: ByteOffset(PARTITION),
            partition_len: ByteLen(size * 4),
            serial: None,
            wwid: None,
            model: None,
            nguid: None,
            eui64: None,
            uuid: None,
            nsid: None,
        },
    }
}

/// `count` extents of 1 to 15 blocks, their order on the disk shuffled; or one of the same length as all of them.
pub(crate) fn maps(count: u64) -> Result<(FrozenMap, FrozenMap)> {
    let mut random = Random::new();
    let lens: Vec<u64> = (0..count).map(|_| (1 + random.below(15)) * BLOCK).collect();
    let size: u64 = lens.iter().sum();
    let mut order: Vec<usize> = (0..lens.len()).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, usize::try_from(random.below(at as u64 + 1))?);
    }
    let mut places = vec![0; lens.len()];
    let mut free = PARTITION + BLOCK;
    for index in order {
        places[index] = free;
        // A block of somebody else between any two.
        free += lens[index] + BLOCK;
    }
    let mut file_offset = 0;
    let extents = lens.iter().zip(&places).map(|(&len, &device_offset)| {
        let extent = Extent {
            file_offset: ByteOffset(file_offset),
            device_offset: ByteOffset(device_offset),
            len: ByteLen(len),
        };
        file_offset += len;
        extent
    });
    let many = FrozenMap::from_extents(identity(size), 1, extents)?;
    // As it is for a file that is served.
    many.collapse();
    let whole = Extent {
        file_offset: ByteOffset(0),
        device_offset: ByteOffset(PARTITION + BLOCK),
        len: ByteLen(size),
    };
    Ok((many, FrozenMap::from_extents(identity(size), 1, [whole])?))
}

/// One lookup of a block, as for a command.
fn lookup(map: &FrozenMap, cursor: &mut LookupCursor, hint: LookupHint, at: u64) -> Result<()> {
    let segment = map
        .segment(cursor, hint, ByteOffset(at), ByteLen(BLOCK))
        .context("a block that the map does not have")?;
    map.check(&segment)?;
    black_box(segment.device_offset);
    Ok(())
}

/// Nanoseconds a lookup, of nothing but lookups.
fn in_a_loop(map: &FrozenMap) -> Result<f64> {
    let (mut random, mut cursor, blocks) = (Random::new(), LookupCursor::default(), map.len().get() / BLOCK);
    let begun = Stopwatch::start();
    for _ in 0..LOOKUPS {
        lookup(map, &mut cursor, LookupHint::NONE, random.below(blocks) * BLOCK)?;
    }
    Ok(begun.cpu_ns() / LOOKUPS as f64)
}

/// Nanoseconds a lookup, in turns that move data too.
pub(crate) fn in_turns(map: &FrozenMap, data: &mut [u8]) -> Result<f64> {
    let (mut random, mut cursor, blocks) = (Random::new(), LookupCursor::default(), map.len().get() / BLOCK);
    timed(IN_TURNS / TURN as u64, data, || turn(map, &mut cursor, &mut random, blocks))
}

/// What is timed of a turn: its commands begin, then each is looked up. A function of its own, which what counts instructions finds.
#[inline(never)]
fn turn(map: &FrozenMap, cursor: &mut LookupCursor, random: &mut Random, blocks: u64) -> Result<()> {
    let mut begun = [(0, LookupHint::NONE); TURN];
    for (at, hint) in &mut begun {
        *at = random.below(blocks) * BLOCK;
        *hint = map.prefetch(ByteOffset(*at));
    }
    for (at, hint) in begun {
        lookup(map, cursor, hint, at)?;
    }
    Ok(())
}

/// Nanoseconds of so many turns in parts of a command, each after other data went through the caches.
pub(super) fn timed(turns: u64, data: &mut [u8], mut turn: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut ns = Vec::new();
    for number in 0..turns {
        let mut chunks = data.chunks_exact_mut(TURN_BYTES);
        let count = chunks.len().max(1);
        if let Some(chunk) = chunks.nth(usize::try_from(number)? % count) {
            chunk.fill(u8::try_from(number % 251)?);
            black_box(chunk);
        }
        let begun = Instant::now();
        turn()?;
        ns.push(begun.elapsed().as_secs_f64() * 1e9);
    }
    // A turn in which the core was taken away does not count.
    Ok(Spread::of(&ns).map_or(f64::NAN, |spread| spread.median) / TURN as f64)
}

/// As large as the buffers of a core.
pub(super) fn other_data() -> Vec<u8> {
    vec![0; 64 * TURN_BYTES]
}

/// Turns of `lookups` in a map of so many extents, for a tool that counts inside the function `turn`.
///
/// # Errors
/// When a lookup fails.
pub fn count(extents: u64, lookups: u64) -> Result<()> {
    let (map, _) = maps(extents)?;
    let (mut random, mut cursor, blocks) = (Random::new(), LookupCursor::default(), map.len().get() / BLOCK);
    let turns = lookups.div_ceil(TURN as u64);
    timed(turns, &mut other_data(), || turn(&map, &mut cursor, &mut random, blocks)).map(drop)
}

pub(super) fn rows(plan: &Plan, rows: &mut Vec<Row>) -> Result<()> {
    let (many, one) = maps(plan.extents)?;
    let mut data = other_data();
    let mut measure = |name: &str, method, bar, round: &mut dyn FnMut(&FrozenMap) -> Result<f64>| {
        let (mut ours, mut single) = (Vec::new(), Vec::new());
        for _ in 0..plan.rounds.max(ROUNDS_MIN) {
            ours.push(round(&many)?);
            single.push(round(&one)?);
        }
        plan.row(
            rows,
            &Measurement {
                name: format!("scale/lookup/{}-extents/{name}", plan.extents),
                unit: "ns",
                ours: &ours,
                peer: Some((IN_ONE, &single)),
                bar,
                method,
            },
        )
    };
    measure(
        "loop",
        "segment and check of one block at random places, one after the other, each waiting for memory; extents of 1 to 15 \
         blocks",
        None,
        &mut in_a_loop,
    )?;
    measure("turn", TURN_METHOD, Some(TURN_BAR), &mut |map| in_turns(map, &mut data))
}
