//! The frozen map: the sealed extent list of one file.
//!
//! ```text
//!   extents, ordered by file offset, no gaps       file   0 ........ 8192 .... 20480 ......... len
//!   { file_offset, device_offset, len }            disk   [1064960) [73728 )  [5242880       )
//!   what is served                         namespace           0 .............. len() = size - reserved
//!   24 bytes each, native byte order, in a memfd sealed against write, grow, shrink and unsealing,
//!   mapped read-only: no code of this process, however wrong, can alter it.
//!   Behind them, in the same memory, a number for each 4 to 8 extents by which lookups begin (see `lookup`).
//! ```

use std::sync::Arc;
use std::thread;

use sha2::{Digest as _, Sha256};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::error::{ExtentError, LookupError, MapFault};
use super::identity::MapIdentity;
use super::lookup::{self, Index, LookupCursor, LookupHint, Segment, Segments};
use super::sys::SealedMemory;
use crate::units::{BlockSize, ByteLen, ByteOffset};

/// From so many on a thread that puts a map into huge pages is worth it.
const EXTENTS_MANY: usize = 50_000;

/// A run of file blocks that is contiguous on the device.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct Extent {
    /// Where it begins in the file.
    pub file_offset: ByteOffset,
    /// Where it begins on the WHOLE disk: the partition start is already added.
    pub device_offset: ByteOffset,
    /// Its length.
    pub len: ByteLen,
}

const _: () = assert!(size_of::<Extent>() == 24);

impl Extent {
    /// Where it ends in the file. A valid map fits 64 bits.
    pub(super) const fn end(&self) -> u64 {
        self.file_offset.0.saturating_add(self.len.0)
    }

    /// Whether the byte of the file at `at` lies in this extent.
    pub(super) const fn holds(&self, at: u64) -> bool {
        match at.checked_sub(self.file_offset.0) {
            Some(into) => into < self.len.0,
            None => false,
        }
    }
}

/// The sealed extent list of one file, with the identity of file, filesystem and device, a generation and a checksum.
///
/// Immutable and shareable between threads. That the map is still true is not its business but that of the pin.
#[derive(Debug)]
pub struct FrozenMap {
    lookups: Lookups,
    identity: MapIdentity,
    generation: u64,
    checksum: [u8; 32],
}

/// What each lookup needs, in one line of the cache.
#[derive(Debug)]
#[repr(align(64))]
struct Lookups {
    /// The extents, and behind them where lookups begin.
    memory: SealedMemory,
    count: usize,
    /// What is reserved at the beginning of the file, and what is served behind it, in bytes: as the identity has them.
    reserved: u64,
    served: u64,
    /// The bits of an offset that are zero where a logical block begins.
    block_mask: u64,
    stretch_shift: u32,
}

const _: () = assert!(size_of::<Lookups>() == 64);

/// Extents that lie in the first-level cache while they are in use, with room for all else: 1.5 KiB.
const CACHED_EXTENTS_MAX: usize = 64;

impl FrozenMap {
    /// Seals `extents` as the map of the file of `identity`.
    ///
    /// # Errors
    /// [`ExtentError::Map`] when the extents are not ordered, leave a gap between 0 and the size, are not aligned to
    /// the logical block, overlap on the device or leave the partition; [`ExtentError::Io`] when memory cannot be
    /// sealed.
    pub fn from_extents(
        identity: MapIdentity,
        generation: u64,
        extents: impl IntoIterator<Item = Extent>,
    ) -> Result<Self, ExtentError> {
        let extents: Vec<Extent> = extents.into_iter().collect();
        let stretch_shift = lookup::stretch_shift(identity.size.get(), extents.len());
        let seal = || {
            validate(&identity, &extents)
                .map_err(|fault| ExtentError::Map { path: identity.path.clone(), fault })?;
            let starts = lookup::starts(&extents, stretch_shift);
            SealedMemory::seal(&[extents.as_bytes(), starts.as_bytes()])
                .map_err(|source| ExtentError::io("seal the extent map of", &identity.path, source))
        };
        let checksum = || checksum_of(&identity, &extents);
        let (memory, checksum) = side_by_side(extents.len() > EXTENTS_MANY, seal, checksum);
        let lookups = Lookups {
            memory: memory?,
            count: extents.len(),
            reserved: identity.reserved.get(),
            served: identity.served().get(),
            block_mask: u64::from(identity.disk.logical_block_size.bytes()) - 1,
            stretch_shift,
        };
        Ok(Self { lookups, identity, generation, checksum })
    }

    /// Whose map it is.
    #[must_use]
    pub fn identity(&self) -> &MapIdentity {
        &self.identity
    }

    /// Which freeze of this file it is: grows by one with each.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// SHA-256 over the identity (without path and what a reboot changes) and all extents. Two freezes of an unchanged
    /// file have the same checksum.
    #[must_use]
    pub fn checksum(&self) -> [u8; 32] {
        self.checksum
    }

    /// How many bytes can be served: those of the file, but for what is [`reserved`](MapIdentity::reserved) at its
    /// beginning.
    #[must_use]
    pub fn len(&self) -> ByteLen {
        self.identity.served()
    }

    /// Whether there is nothing to serve. Never true: an empty file is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len().get() == 0
    }

    /// Where a byte of the file is in what is served; `None` for a reserved one.
    #[must_use]
    pub fn served_offset(&self, file_offset: ByteOffset) -> Option<ByteOffset> {
        file_offset.get().checked_sub(self.identity.reserved.get()).map(ByteOffset)
    }

    /// The logical block size of the disk.
    #[must_use]
    pub fn logical_block_size(&self) -> BlockSize {
        self.identity.disk.logical_block_size
    }

    /// How many extents there are.
    #[must_use]
    pub fn extent_count(&self) -> usize {
        self.extents().len()
    }

    /// The sealed extents, in file order.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        self.index().extents
    }

    /// The memory that the map takes as long as it lives, beside its identity: the extents, and where lookups begin.
    #[must_use]
    pub fn resident_len(&self) -> ByteLen {
        ByteLen(self.lookups.memory.bytes().len() as u64)
    }

    /// For whoever uses it from now on. A large map is put into huge pages meanwhile, by a thread of its own: see
    /// [`collapse`](Self::collapse).
    #[must_use]
    pub fn shared(self) -> Arc<Self> {
        let map = Arc::new(self);
        if map.extent_count() > EXTENTS_MANY {
            let theirs = Arc::clone(&map);
            // Without a thread it stays where it is.
            let _ = thread::Builder::new().name("map-pages".to_owned()).spawn(move || theirs.collapse());
        }
        map
    }

    /// Puts a large map into huge pages, where the kernel can: lookups wait for less then. Not on the way of anything, as it takes
    /// its time; the map can be used meanwhile.
    pub fn collapse(&self) {
        self.lookups.memory.collapse();
    }

    /// Has the processor fetch what a lookup of the byte at `at` of what is served will look at. Does nothing where there
    /// is no such byte. What it gives is for [`segment`](Self::segment) of the same byte, which then need not find the place again.
    /// Looking up many of them in a turn of the loop then waits for memory once, and not once each. Of a map of few
    /// extents nothing is fetched: the processor has them.
    #[inline]
    pub fn prefetch(&self, at: ByteOffset) -> LookupHint {
        if !self.is_large() {
            return LookupHint::NONE;
        }
        self.index().prefetch(self.lookups.reserved.saturating_add(at.get()))
    }

    /// Whether a lookup may have to wait for memory.
    #[inline]
    #[must_use]
    pub const fn is_large(&self) -> bool {
        self.lookups.count > CACHED_EXTENTS_MAX
    }

    #[inline]
    fn index(&self) -> Index<'_> {
        // The memory was written from whole extents and is page aligned, so the cast never fails; an empty list
        // would make every lookup fail, which is the safe answer.
        let Lookups { memory, count, stretch_shift, .. } = &self.lookups;
        let (extents, starts) =
            <[Extent]>::ref_from_prefix_with_elems(memory.bytes(), *count).unwrap_or_default();
        Index { extents, starts, stretch_shift: *stretch_shift }
    }

    /// Where `len` bytes of what is served, from `range_start` in it, begin and end in the file.
    #[inline]
    fn in_file(&self, range_start: ByteOffset, len: ByteLen) -> Result<(u64, u64), LookupError> {
        let Lookups { reserved, served, block_mask, .. } = self.lookups;
        let end = range_start
            .get()
            .checked_add(len.get())
            .filter(|end| *end <= served)
            .ok_or(LookupError::OutOfRange { file_offset: range_start, len, map_len: self.len() })?;
        if (range_start.get() | len.get()) & block_mask != 0 {
            return Err(LookupError::Misaligned { file_offset: range_start, len });
        }
        // The range ends within the file, so neither sum overflows.
        Ok((reserved + range_start.get(), reserved + end))
    }

    /// The one segment that holds all of `len` bytes of what is served, from `range_start` in it: what most commands need, and
    /// nothing else. `None` where [`segments`](Self::segments) has more than one to give, or none, and tells why. The hint is
    /// what [`prefetch`](Self::prefetch) gave for `range_start`, if it was called.
    #[inline]
    #[must_use]
    pub fn segment(
        &self,
        cursor: &mut LookupCursor,
        hint: LookupHint,
        range_start: ByteOffset,
        len: ByteLen,
    ) -> Option<Segment> {
        let (start, end) = self.in_file(range_start, len).ok()?;
        self.index().whole(cursor, hint, start, end)
    }

    /// The device segments that hold `len` bytes of what is served, from `range_start` in it: the first byte that is
    /// served is at 0, and at [`reserved`](MapIdentity::reserved) in the file, which is where the segments count from.
    /// O(log n), O(1) when `cursor` guesses right, allocates nothing.
    ///
    /// # Errors
    /// [`LookupError::OutOfRange`] and [`LookupError::Misaligned`] for ranges that the map cannot serve.
    pub fn segments<'m>(
        &'m self,
        cursor: &'m mut LookupCursor,
        range_start: ByteOffset,
        len: ByteLen,
    ) -> Result<Segments<'m>, LookupError> {
        let (start, end) = self.in_file(range_start, len)?;
        Segments::new(self.index(), cursor, start, end)
    }

    /// Proves from the sealed extents alone that `segment` is what the map says. O(1); shares no code with the lookup.
    ///
    /// To be called, in release builds too, for every segment that goes to a device.
    ///
    /// # Errors
    /// [`LookupError::Disagrees`] when the segment is empty, is not aligned, does not lie in the extent it names, lies
    /// elsewhere on the device, or begins in what is reserved.
    pub fn check(&self, segment: &Segment) -> Result<(), LookupError> {
        let disagrees = LookupError::Disagrees { segment: *segment };
        let Some(extent) = usize::try_from(segment.extent_index).ok().and_then(|at| self.extents().get(at))
        else {
            return Err(disagrees);
        };
        let Some(into_file) = segment.file_offset.get().checked_sub(extent.file_offset.get()) else {
            return Err(disagrees);
        };
        let Some(into_device) = segment.device_offset.get().checked_sub(extent.device_offset.get()) else {
            return Err(disagrees);
        };
        let fits = into_file.checked_add(segment.len.get()).is_some_and(|end| end <= extent.len.get());
        let mask = u64::from(self.logical_block_size().bytes()) - 1;
        let aligned =
            (segment.file_offset.get() | segment.device_offset.get() | segment.len.get()) & mask == 0;
        let is_served = segment.file_offset.get() >= self.identity.reserved.get();
        if into_file == into_device && fits && aligned && is_served && segment.len.get() != 0 {
            Ok(())
        } else {
            Err(disagrees)
        }
    }
}

/// The results of both, one of them by a thread of its own when that is worth it and there can be one.
pub(super) fn side_by_side<A, B: Send>(
    is_worth_it: bool,
    one: impl FnOnce() -> A,
    other: impl Fn() -> B + Sync,
) -> (A, B) {
    thread::scope(|scope| {
        let beside = is_worth_it.then(|| thread::Builder::new().spawn_scoped(scope, &other).ok()).flatten();
        let one = one();
        let beside = beside.and_then(|thread| thread.join().ok());
        (one, beside.unwrap_or_else(&other))
    })
}

/// The checksum described at [`FrozenMap::checksum`].
pub(super) fn checksum_of(identity: &MapIdentity, extents: &[Extent]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    identity.hash_into(&mut hasher);
    hasher.update((extents.len() as u64).to_le_bytes());
    if cfg!(target_endian = "little") {
        // The same bytes, of a million extents in one piece.
        hasher.update(extents.as_bytes());
        return hasher.finalize().into();
    }
    for extent in extents {
        hasher.update(extent.file_offset.get().to_le_bytes());
        hasher.update(extent.device_offset.get().to_le_bytes());
        hasher.update(extent.len.get().to_le_bytes());
    }
    hasher.finalize().into()
}

/// Everything that must hold of an extent list, wherever it came from.
pub(super) fn validate(identity: &MapIdentity, extents: &[Extent]) -> Result<(), MapFault> {
    let disk = &identity.disk;
    let block = u64::from(disk.logical_block_size.bytes());
    if extents.is_empty() || identity.size.get() == 0 {
        return Err(MapFault::Empty);
    }
    let reserved = identity.reserved.get();
    if !reserved.is_multiple_of(block) || reserved >= identity.size.get() {
        return Err(MapFault::Reserved { reserved: identity.reserved, size: identity.size });
    }
    if u32::try_from(extents.len()).is_err() {
        return Err(MapFault::TooMany { count: extents.len() });
    }
    let start = disk.partition_start.get();
    let end = start
        .checked_add(disk.partition_len.get())
        .filter(|end| *end <= disk.size.get())
        .ok_or(MapFault::PartitionOutsideDisk)?;
    let mut expected = 0_u64;
    for extent in extents {
        let at = extent.file_offset;
        if at.get() != expected {
            return Err(if at.get() > expected {
                MapFault::Gap { file_offset: ByteOffset(expected) }
            } else {
                MapFault::OverlapInFile { file_offset: at }
            });
        }
        if (extent.device_offset.get() | extent.len.get()) % block != 0 || extent.len.get() == 0 {
            return Err(MapFault::Misaligned {
                file_offset: at,
                device_offset: extent.device_offset,
                len: extent.len,
            });
        }
        let device_end = extent.device_offset.get().checked_add(extent.len.get());
        if extent.device_offset.get() < start || device_end.is_none_or(|device_end| device_end > end) {
            return Err(MapFault::OutsideDevice { file_offset: at, device_offset: extent.device_offset });
        }
        expected = expected.checked_add(extent.len.get()).ok_or(MapFault::Overflow { file_offset: at })?;
    }
    if expected != identity.size.get() {
        return Err(MapFault::WrongLength { mapped: ByteLen(expected), size: identity.size });
    }
    check_device_overlap(extents)
}

/// No block of the device may be mapped twice.
fn check_device_overlap(extents: &[Extent]) -> Result<(), MapFault> {
    let overlap = |low: &Extent, high: &Extent| {
        let overlaps = high.device_offset.get() - low.device_offset.get() < low.len.get();
        overlaps.then_some(MapFault::OverlapOnDevice {
            device_offset: high.device_offset,
            file_offsets: [low.file_offset, high.file_offset],
        })
    };
    let found = |ordered: &[Extent]| {
        ordered.windows(2).find_map(|pair| if let [low, high] = pair { overlap(low, high) } else { None })
    };
    // Files are often laid out from the beginning of the disk to its end, however many pieces they have.
    let fault = if extents.is_sorted_by_key(|extent| extent.device_offset) {
        found(extents)
    } else {
        let mut by_device = extents.to_vec();
        by_device.sort_unstable_by_key(|extent| extent.device_offset);
        found(&by_device)
    };
    fault.map_or(Ok(()), Err)
}
