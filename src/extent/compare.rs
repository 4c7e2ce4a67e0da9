//! Whether two extent maps put every byte of a file in the same place.
//!
//! Filesystems merge and split records at will, and list blocks beyond the end of the file. So maps are not compared
//! record by record but place by place, and only up to the size.

use std::fmt;

use super::fiemap::{FiemapFlags, RawExtent};
use super::map::Extent;
use super::stretches::Stretch;
use crate::units::{ByteLen, ByteOffset};

/// Where bytes of the file lie on the whole disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    Hole,
    /// At this offset of the whole disk, free of any flag that matters.
    At(ByteOffset),
    /// At this offset, and flagged by the filesystem in a way that forbids to serve it.
    Flagged(ByteOffset, FiemapFlags),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hole => f.write_str("nowhere"),
            Self::At(offset) => write!(f, "at device offset {offset}"),
            Self::Flagged(offset, flags) => {
                write!(f, "at device offset {offset}, flagged ")?;
                bitflags::parser::to_writer(flags, f)
            }
        }
    }
}

/// A run of bytes that two maps put in different places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where the run begins in the file.
    pub file_offset: ByteOffset,
    /// Its length, up to the end of the record of either map.
    pub len: ByteLen,
    /// Where the frozen or stored map has it.
    pub frozen: Place,
    /// Where the living file has it.
    pub living: Place,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file_offset, len, frozen, living } = self;
        write!(f, "{len} bytes at file offset {file_offset} were {frozen} and are now {living}")
    }
}

/// The outcome of a comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// The first difference in file order; `None` when the maps are equal.
    pub first: Option<Difference>,
    /// How many bytes of the file are in different places.
    pub differing: ByteLen,
}

impl Comparison {
    /// Whether every byte is in the same place.
    #[must_use]
    pub const fn is_equal(&self) -> bool {
        self.first.is_none()
    }
}

/// Compares what was `frozen` with the `living` records of the file, for the bytes below `size`. Both must be in file
/// order without overlap. `partition_start` is added to the living addresses.
#[must_use]
pub fn compare(
    frozen: &[Extent],
    living: &[RawExtent],
    partition_start: ByteOffset,
    size: ByteLen,
) -> Comparison {
    let all = Stretch { start: 0, end: size.get() };
    compare_within(all, frozen, living.iter().copied(), partition_start, &mut |_| {})
}

/// The same of two maps that both have addresses of the whole disk.
#[must_use]
pub(super) fn compare_extents(frozen: &[Extent], living: &[Extent], size: ByteLen) -> Comparison {
    let living = living.iter().map(|&Extent { file_offset, device_offset, len }| RawExtent {
        file_offset,
        device_offset,
        len,
        flags: FiemapFlags::empty(),
    });
    let all = Stretch { start: 0, end: size.get() };
    compare_within(all, frozen, living, ByteOffset(0), &mut |_| {})
}

/// As [`compare`], for the bytes of `stretch` only, with living records that may be read while they are compared. Tells
/// of each difference.
pub(super) fn compare_within(
    stretch: Stretch,
    frozen: &[Extent],
    living: impl Iterator<Item = RawExtent>,
    partition_start: ByteOffset,
    keep: &mut dyn FnMut(Difference),
) -> Comparison {
    // Extents that end before it are nobody's business.
    let skip = frozen.partition_point(|extent| extent.file_offset.get() + extent.len.get() <= stretch.start);
    let frozen = frozen.get(skip..).unwrap_or_default();
    let (frozen, living) = runs_of(frozen, living, partition_start);
    walk(Runs::new(frozen), Runs::new(living), stretch, keep)
}

impl Comparison {
    /// What was found here and, further on in the file, there.
    pub(super) fn and(self, further: Self) -> Self {
        Self {
            first: self.first.or(further.first),
            differing: ByteLen(self.differing.get() + further.differing.get()),
        }
    }
}

/// As [`compare`]: the differences themselves, the first `max` of them. Nothing is kept of `living`.
#[must_use]
pub(super) fn differences(
    frozen: &[Extent],
    living: impl Iterator<Item = RawExtent>,
    partition_start: ByteOffset,
    size: ByteLen,
    max: usize,
) -> Vec<Difference> {
    let mut all = Vec::new();
    let mut keep = |difference| {
        if all.len() < max {
            all.push(difference);
        }
    };
    let whole = Stretch { start: 0, end: size.get() };
    compare_within(whole, frozen, living, partition_start, &mut keep);
    all
}

/// Both maps as runs of the same kind.
fn runs_of(
    frozen: &[Extent],
    living: impl Iterator<Item = RawExtent>,
    partition_start: ByteOffset,
) -> (impl Iterator<Item = Run>, impl Iterator<Item = Run>) {
    let frozen = frozen.iter().map(|extent| Run {
        start: extent.file_offset.get(),
        end: extent.file_offset.get().saturating_add(extent.len.get()),
        at: Some(extent.device_offset.get()),
        flags: FiemapFlags::empty(),
    });
    let living = living.map(move |record| Run {
        start: record.file_offset.get(),
        end: record.file_offset.get().saturating_add(record.len.get()),
        at: record.device_offset.get().checked_add(partition_start.get()),
        flags: record.flags.difference(FiemapFlags::HARMLESS),
    });
    (frozen, living)
}

fn walk(
    mut frozen: Runs<impl Iterator<Item = Run>>,
    mut living: Runs<impl Iterator<Item = Run>>,
    stretch: Stretch,
    keep: &mut dyn FnMut(Difference),
) -> Comparison {
    let mut result = Comparison::default();
    let mut at = stretch.start;
    while at < stretch.end {
        let (was, was_end) = frozen.place(at);
        let (is, is_end) = living.place(at);
        let end = was_end.min(is_end).min(stretch.end);
        if was != is {
            let len = ByteLen(end - at);
            result.differing = ByteLen(result.differing.get() + len.get());
            let difference = Difference { file_offset: ByteOffset(at), len, frozen: was, living: is };
            result.first = result.first.or(Some(difference));
            keep(difference);
        }
        at = end;
    }
    result
}

struct Run {
    start: u64,
    end: u64,
    at: Option<u64>,
    flags: FiemapFlags,
}

/// Runs, asked for the place of ever higher offsets.
struct Runs<I> {
    rest: I,
    current: Option<Run>,
}

impl<I: Iterator<Item = Run>> Runs<I> {
    fn new(mut rest: I) -> Self {
        let current = rest.next();
        Self { rest, current }
    }

    /// The place of offset `at`, and where the run or hole with that place ends: always behind `at`.
    fn place(&mut self, at: u64) -> (Place, u64) {
        while self.current.as_ref().is_some_and(|run| run.end <= at) {
            self.current = self.rest.next();
        }
        match &self.current {
            None => (Place::Hole, u64::MAX),
            Some(run) if at < run.start => (Place::Hole, run.start),
            Some(run) => {
                let offset = run.at.and_then(|start| start.checked_add(at - run.start));
                let place = match offset {
                    // An address beyond 64 bits is no place; UNKNOWN says so.
                    None => Place::Flagged(ByteOffset(u64::MAX), run.flags | FiemapFlags::UNKNOWN),
                    Some(offset) if run.flags.is_empty() => Place::At(ByteOffset(offset)),
                    Some(offset) => Place::Flagged(ByteOffset(offset), run.flags),
                };
                (place, run.end)
            }
        }
    }
}
