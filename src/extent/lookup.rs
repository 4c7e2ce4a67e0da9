//! Lookup: a byte range of the file becomes the device segments that hold it.
//!
//! Binary search over the sealed extents, after a look at the extent of the last hit and the one that follows it. A
//! range that crosses extents gives one [`Segment`] an extent. Nothing here is trusted by the data path:
//! [`FrozenMap::check`](super::FrozenMap::check) proves each segment again, by another route.

use super::error::LookupError;
use super::map::Extent;
use crate::units::{ByteLen, ByteOffset};

/// A run of bytes of the file and where it lies on the whole disk. Never crosses an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the file.
    pub file_offset: ByteOffset,
    /// Where it begins on the whole disk.
    pub device_offset: ByteOffset,
    /// Its length, never zero.
    pub len: ByteLen,
    /// Which extent of the map it lies in; what [`FrozenMap::check`](super::FrozenMap::check) starts from.
    pub extent_index: u32,
}

/// Remembers the extent of the last lookup. One for each sequential stream (a queue, a connection) pays best; a
/// cursor holds only a guess, so one that was used with another map costs time, never a wrong answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct LookupCursor {
    index: usize,
}

/// The segments of a range, in file order: contiguous, non-empty, covering exactly the range.
#[derive(Debug)]
pub struct Segments<'m> {
    extents: &'m [Extent],
    cursor: &'m mut LookupCursor,
    at: u64,
    end: u64,
}

impl<'m> Segments<'m> {
    /// `extents` must have no gaps, and hold `at..end`; [`FrozenMap`](super::FrozenMap) has checked both.
    pub(super) fn new(
        extents: &'m [Extent],
        cursor: &'m mut LookupCursor,
        at: u64,
        end: u64,
    ) -> Result<Self, LookupError> {
        if at < end {
            cursor.index = find(extents, cursor.index, at)
                .ok_or(LookupError::NotInMap { file_offset: ByteOffset(at) })?;
        }
        Ok(Self { extents, cursor, at, end })
    }

    /// Bytes not yet given out. Zero once the iterator has ended.
    #[must_use]
    pub const fn remaining(&self) -> ByteLen {
        ByteLen(self.end - self.at)
    }
}

impl Iterator for Segments<'_> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        if self.at >= self.end {
            return None;
        }
        let mut index = self.cursor.index;
        let mut extent = self.extents.get(index)?;
        if self.at >= extent.file_offset.get() + extent.len.get() {
            index += 1;
            extent = self.extents.get(index)?;
            self.cursor.index = index;
        }
        let into = self.at - extent.file_offset.get();
        let len = (extent.len.get() - into).min(self.end - self.at);
        let segment = Segment {
            file_offset: ByteOffset(self.at),
            device_offset: ByteOffset(extent.device_offset.get() + into),
            len: ByteLen(len),
            extent_index: u32::try_from(index).ok()?,
        };
        self.at += len;
        Some(segment)
    }
}

/// The index of the extent that holds the byte at `at`: that of `guess`, the next one, or the one a binary search finds.
fn find(extents: &[Extent], guess: usize, at: u64) -> Option<usize> {
    let holds = |index: usize| extents.get(index).is_some_and(|extent| extent.holds(at));
    if holds(guess) {
        return Some(guess);
    }
    let next = guess.wrapping_add(1);
    if holds(next) {
        return Some(next);
    }
    let found = extents.partition_point(|extent| extent.file_offset.get() <= at).checked_sub(1)?;
    holds(found).then_some(found)
}
