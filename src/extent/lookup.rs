//! Lookup: a byte range of the file becomes the device segments that hold it.
//!
//! ```text
//!   file      |..a..|b|....c....|..d..|e|f|....g....|h|      extents
//!             ^               ^               ^              stretches of 2^n bytes, one for 4 to 8 extents
//!   starts    a               c               g              the extent that holds the first byte of each
//! ```
//!
//! Without a hint, the extent of the last hit and the one that follows it are looked at first. Else the starts of the byte's stretch and of the
//! next one tell between which extents it lies, and its place in the stretch where among these: what is wanted is nearly always
//! one of the few around that guess. These are compared without a branch. So whatever the number of extents there is one
//! wait for memory, where a binary search of a million waits a dozen times: the starts of a million fit the cache of a core.
//! Where the guess is wrong, as extents may be of any length, those of the stretch are searched.
//!
//! Who prefetches gets the place of what was fetched as a [`LookupHint`], and gives it to the lookup, which then begins there.
//!
//! A range that crosses extents gives one [`Segment`] an extent. Nothing here is trusted by the data path:
//! [`FrozenMap::check`](super::FrozenMap::check) proves each segment again, by another route.

use zerocopy::FromBytes as _;

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
    pub(super) index: usize,
}

/// Where a lookup is to begin, by the [prefetch](super::FrozenMap::prefetch) of the same byte. Like a cursor it holds only a guess: one for
/// another byte or another map costs time, never a wrong answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupHint(u32);

impl LookupHint {
    /// Nothing is known.
    pub const NONE: Self = Self(u32::MAX);

    /// The window that begins with this extent.
    #[must_use]
    pub(super) fn window(start: usize) -> Self {
        u32::try_from(start).map_or(Self::NONE, Self)
    }
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
    /// The extents must have no gaps, and hold `at..end`; [`FrozenMap`](super::FrozenMap) has checked both.
    pub(super) fn new(
        index: Index<'m>,
        cursor: &'m mut LookupCursor,
        at: u64,
        end: u64,
    ) -> Result<Self, LookupError> {
        if at < end {
            cursor.index =
                index.find(cursor.index, at).ok_or(LookupError::NotInMap { file_offset: ByteOffset(at) })?;
        }
        Ok(Self { extents: index.extents, cursor, at, end })
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

/// The extents of a map, and where to begin to look in them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Index<'m> {
    pub(super) extents: &'m [Extent],
    /// The bytes of what [`starts`] made: most lookups need none of them.
    pub(super) starts: &'m [u8],
    pub(super) stretch_shift: u32,
}

/// Extents around the guess that are looked at.
const WINDOW: usize = 4;
/// A line of the cache, in bytes, of nearly all processors there are.
const LINE_LEN: usize = 64;
/// How far into a line a window may begin, in bytes, that lies in two lines.
const WINDOW_FITS_AT_MOST: usize = 2 * LINE_LEN - WINDOW * size_of::<Extent>();
/// Extents for which there is one stretch, at the most.
const STRETCH_EXTENTS_MAX: u64 = 8;

impl<'m> Index<'m> {
    /// The segment that holds all of `at..end`, if one does: its extent is one that the hint tells, the cursor's guess, or is found. A
    /// range without bytes has none.
    #[inline]
    pub(super) fn whole(
        &self,
        cursor: &mut LookupCursor,
        hint: LookupHint,
        at: u64,
        end: u64,
    ) -> Option<Segment> {
        let hinted = if hint == LookupHint::NONE { None } else { self.within(hint.0 as usize, at) };
        let (index, extent) = match hinted {
            Some(found) => found,
            None => self.extents.get(cursor.index).filter(|extent| extent.holds(at)).map_or_else(
                || self.find(cursor.index, at).and_then(|index| Some((index, self.extents.get(index)?))),
                |extent| Some((cursor.index, extent)),
            )?,
        };
        cursor.index = index;
        (at < end && end <= extent.end()).then_some(())?;
        Some(Segment {
            file_offset: ByteOffset(at),
            device_offset: ByteOffset(extent.device_offset.get().checked_add(at - extent.file_offset.get())?),
            len: ByteLen(end - at),
            extent_index: u32::try_from(index).ok()?,
        })
    }

    /// The index of the extent that holds the byte at `at`: that of `guess`, the next one, or the one that is found. By value, so that
    /// who need not ask has it in registers.
    fn find(self, guess: usize, at: u64) -> Option<usize> {
        let extents = self.extents;
        let holds = |index: usize| extents.get(index).is_some_and(|extent| extent.holds(at));
        if holds(guess) {
            return Some(guess);
        }
        let next = guess.wrapping_add(1);
        if holds(next) {
            return Some(next);
        }
        let (first, last) = self.stretch(at)?;
        let window = self.window_start(self.guess(first, last, at));
        if let Some(found) = window.and_then(|start| self.within(start, at)) {
            return Some(found.0);
        }
        let crowd = extents.get(first..=last)?;
        let found = first + crowd.partition_point(|extent| extent.end() <= at);
        holds(found).then_some(found)
    }

    /// Has the processor fetch what a lookup of the byte at `at` is most likely to look at, and tells where that is.
    pub(super) fn prefetch(&self, at: u64) -> LookupHint {
        let around = || {
            let (first, last) = self.stretch(at)?;
            let start = self.window_start(self.guess(first, last, at))?;
            Some((start, self.extents.get(start..start + WINDOW)?))
        };
        around().map_or(LookupHint::NONE, |(start, window)| {
            hugepage_alloc::prefetch(window);
            LookupHint::window(start)
        })
    }

    /// The first and the last extent of the stretch of the byte at `at`.
    fn stretch(&self, at: u64) -> Option<(usize, usize)> {
        let starts = <[u32]>::ref_from_bytes(self.starts).ok()?;
        let stretch = usize::try_from(at.wrapping_shr(self.stretch_shift)).ok()?;
        let first = *starts.get(stretch)? as usize;
        let last = starts.get(stretch + 1).map_or(self.extents.len().checked_sub(1)?, |last| *last as usize);
        Some((first, last))
    }

    /// Where the window around `guess` begins; `None` in a map that has no room for one. Of the two that have it in their middle it is the
    /// one that lies in fewer lines of the cache, so that what [`prefetch`](Self::prefetch) asks for is all of it. Only the last of a map
    /// lies where there is room.
    fn window_start(&self, guess: usize) -> Option<usize> {
        let most = self.extents.len().checked_sub(WINDOW)?;
        let start = guess.saturating_sub(WINDOW / 2 - 1);
        // The extents begin with a page, and the first of all lies at the beginning of a line: so nothing wraps.
        let into_line = start.wrapping_mul(size_of::<Extent>()) % LINE_LEN;
        Some(start.wrapping_sub(usize::from(into_line > WINDOW_FITS_AT_MOST)).min(most))
    }

    /// Where `at` would be if all of `first..=last`, which hold its stretch, were of one length. Whatever it is, no extent is taken that does
    /// not hold the byte: so nothing here is checked.
    fn guess(&self, first: usize, last: usize, at: u64) -> usize {
        // How far it lies into its stretch, in parts of 2^-64 of the stretch.
        let into = at.wrapping_shl(self.stretch_shift.wrapping_neg());
        let further = (last.wrapping_sub(first) as u128 * u128::from(into)) >> u64::BITS;
        first.wrapping_add(usize::try_from(further).unwrap_or(0))
    }

    /// The extent that holds the byte at `at`, if it is in the window that begins at `start`.
    #[inline]
    fn within(&self, start: usize, at: u64) -> Option<(usize, &'m Extent)> {
        let window: &'m [Extent; WINDOW] = self.extents.get(start..)?.first_chunk()?;
        // Of each: a branch that depends on memory would be waited for, and mispredicted. Starts alone, a load each: the last that has begun
        // is the only one that may hold it.
        let begun: usize = window.iter().map(|extent| usize::from(extent.file_offset.get() <= at)).sum();
        let last = begun.checked_sub(1)?;
        window.get(last).filter(|extent| extent.holds(at)).map(|extent| (start + last, extent))
    }
}

/// How long stretches are, as a power of two, of which there is one for 4 to 8 of `count` extents in a map of `size` bytes.
pub(super) fn stretch_shift(size: u64, count: usize) -> u32 {
    let most = (count as u64).div_ceil(STRETCH_EXTENTS_MAX / 2);
    let last = size.saturating_sub(1);
    (0..u64::BITS).find(|shift| last >> shift < most).unwrap_or(u64::BITS - 1)
}

/// For each stretch the extent that holds its first byte. The extents must begin at 0 and have no gaps; there are less than
/// 2^32 of them.
pub(super) fn starts(extents: &[Extent], stretch_shift: u32) -> Vec<u32> {
    let mut starts = Vec::new();
    for (index, extent) in (0..).zip(extents) {
        let stretches = ((extent.end() - 1) >> stretch_shift) + 1;
        let ends_before = usize::try_from(stretches).unwrap_or(usize::MAX);
        if ends_before > starts.len() {
            starts.resize(ends_before, index);
        }
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Extents of 4096 bytes each, one after the other.
    fn even(count: usize) -> Vec<Extent> {
        let extent = |index| Extent {
            file_offset: ByteOffset(4096 * index),
            device_offset: ByteOffset(8192 * index),
            len: ByteLen(4096),
        };
        (0..count as u64).map(extent).collect()
    }

    #[test]
    fn a_window_lies_in_two_lines_and_has_what_is_guessed() {
        use zerocopy::IntoBytes as _;
        for count in [WINDOW, WINDOW + 1, 9, 10, 11, 500] {
            let extents = even(count);
            let stretch_shift = stretch_shift(4096 * count as u64, count);
            let starts = starts(&extents, stretch_shift);
            let index = Index { extents: &extents, starts: starts.as_bytes(), stretch_shift };
            for (guess, extent) in extents.iter().enumerate() {
                let start = index.window_start(guess).unwrap();
                assert!((start..(start + WINDOW).min(count)).contains(&guess), "{guess} of {count}: {start}");
                let last = (start + WINDOW) * size_of::<Extent>() - 1;
                let lines = last / LINE_LEN - start * size_of::<Extent>() / LINE_LEN + 1;
                assert!(lines <= 2 || start + WINDOW == count, "{guess} of {count}: {start}");
                // In an even map nothing is searched for: the hint has it.
                let at = 4096 * guess as u64 + 4095;
                let LookupHint(hint) = index.prefetch(at);
                assert_eq!(index.within(hint as usize, at), Some((guess, extent)), "of {count}");
            }
        }
        assert_eq!(
            Index { extents: &even(WINDOW - 1), starts: &[], stretch_shift: 12 }.window_start(0),
            None
        );
    }
}
