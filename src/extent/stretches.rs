//! A file cut into stretches, which several threads look at side by side: for the moment in which a file is pinned.
//!
//! ```text
//!   file      |---0---|---1---|---2---|---3---|---4---|---5---|---6---|---7--> whatever lies behind the end
//!   thread a      0       1               3       4               6
//!   thread b              '-- 2 --'               '-- 5 --'           7        each takes the next one that is left
//! ```
//!
//! There are several for each thread: one that has its processor taken away for a while then leaves its share to the others,
//! where with halves all would wait for the later one.

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::error::ExtentError;
use super::fiemap::{PAGE_RECORDS, RawExtent};
use crate::units::{ByteLen, ByteOffset};

/// Stretches shorter than this are not worth a thread: about what two pages of small extents cover.
const STRETCH_LEN_MIN: u64 = 8 << 20;
/// Threads that look at one file.
const THREADS_MAX: usize = 4;
/// Stretches for each of them.
const STRETCHES_A_THREAD: usize = 8;

/// A stretch of a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    /// Where it begins.
    pub(super) start: u64,
    /// Where it ends; `u64::MAX` for the end of the file and whatever lies behind it.
    pub(super) end: u64,
}

impl Stretch {
    /// All of a file.
    pub(super) const WHOLE: Self = Self { start: 0, end: u64::MAX };

    /// What of `record` lies in it.
    pub(super) fn clip(self, record: RawExtent) -> Option<RawExtent> {
        let start = record.file_offset.get().max(self.start);
        let end = record.file_end().min(self.end);
        let into = start - record.file_offset.get();
        let len = end.checked_sub(start).filter(|len| *len > 0)?;
        Some(RawExtent {
            file_offset: ByteOffset(start),
            device_offset: ByteOffset(record.device_offset.get() + into),
            len: ByteLen(len),
            flags: record.flags,
        })
    }
}

/// Does `work` for every stretch of a file of `size` bytes and about `extents` extents, by several threads when that pays, once its
/// dirty pages are written. The results in file order, or a failure: the first in the file of those that were seen.
pub(super) fn in_stretches<T: Send>(
    file: BorrowedFd<'_>,
    path: &Path,
    size: ByteLen,
    extents: usize,
    work: &(dyn Fn(Stretch) -> Result<T, ExtentError> + Sync),
) -> Result<Vec<T>, ExtentError> {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX);
    let threads = if extents > PAGE_RECORDS as usize { processors } else { 1 };
    let most = if threads > 1 { threads * STRETCHES_A_THREAD } else { 1 };
    let stretches = stretches(size.get(), most);
    if stretches.len() > 1 {
        // Only the page at offset 0 is asked for with SYNC, and the stretches do not wait for each other.
        rustix::fs::fdatasync(file).map_err(|error| ExtentError::io("flush", path, error))?;
    }
    let threads = threads.min(stretches.len());
    let next = AtomicUsize::new(0);
    let share = || -> Vec<(usize, Result<T, ExtentError>)> {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(stretch) = stretches.get(at) else { return done };
            let result = work(*stretch);
            if result.is_err() {
                // Nothing that is left can change that.
                next.store(stretches.len(), Ordering::Relaxed);
            }
            done.push((at, result));
        }
    };
    let mut done = thread::scope(|scope| {
        // Without another thread this one does it all.
        let others: Vec<_> =
            (1..threads).filter_map(|_| thread::Builder::new().spawn_scoped(scope, share).ok()).collect();
        let mut done = share();
        for thread in others {
            let gone = |_| std::io::Error::other("a thread ended before its time");
            let ended = thread.join().map_err(gone);
            done.extend(ended.map_err(|error| ExtentError::io("read the extent map of", path, error))?);
        }
        Ok::<_, ExtentError>(done)
    })?;
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

/// At most `most` stretches of a file, none of them short unless it is the only one.
fn stretches(size: u64, most: usize) -> Vec<Stretch> {
    let count = (size / STRETCH_LEN_MIN).clamp(1, most as u64);
    // Cut at blocks of any filesystem.
    let len = (size / count) & !0xFFFF;
    let cuts: Vec<u64> = (0..count).map(|number| number * len).chain([u64::MAX]).collect();
    cuts.windows(2).filter_map(|cut| Some(Stretch { start: *cut.first()?, end: *cut.last()? })).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;
    use std::sync::Mutex;

    use super::super::fiemap::FiemapFlags;
    use super::*;

    #[test]
    fn stretches_cover_a_file_without_gap_and_records_are_clipped_to_them() {
        for (size, most, expected) in [(0, 4, 1), (4096, 4, 1), (16 << 20, 4, 2), (1 << 30, 3, 3)] {
            let stretches = stretches(size, most);
            assert_eq!(stretches.len(), expected, "{size}");
            assert_eq!((stretches[0].start, stretches[expected - 1].end), (0, u64::MAX));
            assert!(stretches.windows(2).all(|pair| pair[0].end == pair[1].start), "{stretches:?}");
        }
        let record = |start: u64, len| RawExtent {
            file_offset: ByteOffset(start),
            device_offset: ByteOffset(start + 1000),
            len: ByteLen(len),
            flags: FiemapFlags::SHARED,
        };
        let stretch = Stretch { start: 100, end: 200 };
        assert_eq!(stretch.clip(record(50, 100)), Some(record(100, 50)));
        assert_eq!(stretch.clip(record(150, 100)), Some(record(150, 50)));
        assert_eq!(stretch.clip(record(0, 1000)), Some(record(100, 100)));
        assert_eq!(stretch.clip(record(0, 100)), None);
        assert_eq!(stretch.clip(record(200, 1)), None);
    }

    #[test]
    fn every_stretch_is_worked_on_once_and_told_in_order_whoever_did_it() {
        let file = File::open("/proc/self/exe").unwrap();
        let size = ByteLen(1 << 30);
        let seen = Mutex::new(Vec::new());
        let starts = in_stretches(file.as_fd(), Path::new("f"), size, usize::MAX, &|stretch| {
            seen.lock().unwrap().push(stretch.start);
            thread::sleep(std::time::Duration::from_millis(stretch.start % 3));
            Ok(stretch.start)
        })
        .unwrap();
        assert!(starts.is_sorted_by(|one, next| one < next), "{starts:?}");
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, starts);
    }

    #[test]
    fn a_failure_of_one_stretch_is_the_failure_of_all() {
        let file = File::open("/proc/self/exe").unwrap();
        let size = ByteLen(1 << 30);
        let result = in_stretches(file.as_fd(), Path::new("f"), size, usize::MAX, &|stretch| {
            if stretch.end < u64::MAX {
                return Ok(());
            }
            Err(ExtentError::io("read", Path::new("f"), std::io::Error::other("torn")))
        });
        assert!(matches!(result, Err(ExtentError::Io { .. })));
    }
}
