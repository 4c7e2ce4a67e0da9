//! Making a file fit to serve, by the filesystem's own calls, before it is pinned.
//!
//! Holes are allocated, then holes and unwritten ranges are written with zeros, shared blocks are unshared, the size
//! is padded to the block. What the file reads as does not change, but for the zeros of the padding.
//!
//! Nobody else has the file open meanwhile: a write lease is taken first, and opens are denied.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use super::accept::{of_file, violations};
use super::error::{ExtentError, IMMUTABLE};
use super::facts::FileFacts;
use super::fiemap::{self, FiemapFlags, RawExtent};
use super::guard::{Guard, Warden};
use super::lease::{prove, still_unopened};
use super::mode::GuardMode;
use super::progress::Progress;
use super::readers::LocalReaders;
use super::survey::absolute;
use super::watch::WatchOptions;
use crate::units::{BlockSize, ByteLen};

/// How much is written at once, and between two looks at the lease.
const CHUNK_LEN: usize = 1 << 20;
/// How often the layout is mended before we give up: a filesystem may be slow to show what was done.
const ROUNDS: usize = 3;

/// What preparing a file did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrepareReport {
    /// Bytes of holes and unwritten ranges that were written with zeros.
    pub zeroed: ByteLen,
    /// Bytes that were moved to blocks of their own.
    pub unshared: ByteLen,
    /// Bytes that the file grew by.
    pub padded: ByteLen,
}

/// Makes the file at `path` fit to serve. The size is padded to `block`, or to the disk's logical block if that is
/// larger. Does nothing to a file that is fit.
///
/// # Errors
/// [`ExtentError::NotAccepted`] for what cannot be mended, [`ExtentError::InUse`], [`ExtentError::NoSpace`],
/// [`ExtentError::Guard`] when the file is immutable. The content is then as it was.
pub fn prepare(
    path: &Path,
    block: Option<BlockSize>,
    progress: &mut dyn Progress,
) -> Result<PrepareReport, ExtentError> {
    let path = absolute(path)?;
    let file = Arc::new(open_write(&path)?);
    let guard = start_guard(&file, &path).map_err(|source| ExtentError::Guard {
        path: path.clone(),
        guard: "open-permission",
        problem: "cannot be set",
        source: Some(source),
    })?;
    let facts = FileFacts::gather(&file, &path)?;
    refuse_unmendable(&facts)?;
    let _lease = prove(&file, &facts, &guard, LocalReaders::Refuse)?;
    let mut work = Work { file: &file, facts, progress, report: PrepareReport::default() };
    for _ in 0..ROUNDS {
        let records = fiemap::read(&file, &path)?;
        if !work.round(&records, block)? {
            return Ok(work.report);
        }
    }
    let records = fiemap::read(&file, &path)?;
    match violations(&work.facts, &records).into_iter().next() {
        None => Ok(work.report),
        Some(first) => Err(ExtentError::NotAccepted { path, first: Box::new(first), count: 1 }),
    }
}

/// For the moment of the preparing.
fn start_guard(file: &Arc<File>, path: &Path) -> io::Result<Guard> {
    let kind = (GuardMode::Default, LocalReaders::Refuse);
    Guard::start(Warden::start(WatchOptions::default())?, file, path.to_owned(), kind, None)
}

fn open_write(path: &Path) -> Result<File, ExtentError> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|source| {
        if source.raw_os_error() == Some(libc::EPERM) {
            let problem = "it is set already, or the file is pinned, so the file cannot be prepared";
            return ExtentError::Guard { path: path.to_path_buf(), guard: IMMUTABLE, problem, source: None };
        }
        ExtentError::io("open for writing", path, source)
    })
}

fn refuse_unmendable(facts: &FileFacts) -> Result<(), ExtentError> {
    let mut hopeless = of_file(facts).into_iter().filter(|violation| !violation.is_preparable());
    match hopeless.next() {
        None => Ok(()),
        Some(first) => Err(ExtentError::NotAccepted {
            path: facts.path.clone(),
            first: Box::new(first),
            count: 1 + hopeless.count(),
        }),
    }
}

/// A run of bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
}

/// What has to be done to a file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    holes: Vec<Range>,
    unwritten: Vec<Range>,
    shared: Vec<Range>,
    target: u64,
}

impl Plan {
    fn of(records: &[RawExtent], size: u64, block: u64) -> Self {
        let target = size.checked_next_multiple_of(block).unwrap_or(size);
        let mut plan = Self { target, ..Self::default() };
        let mut covered = 0;
        for record in records {
            let start = record.file_offset.get().min(target);
            let end = record.file_end().min(target);
            push(&mut plan.holes, covered, start);
            if record.flags.contains(FiemapFlags::UNWRITTEN) {
                push(&mut plan.unwritten, start, end);
            }
            if record.flags.contains(FiemapFlags::SHARED) {
                push(&mut plan.shared, start, end.min(size));
            }
            covered = end;
        }
        push(&mut plan.holes, covered, target);
        plan
    }

    fn is_done(&self, size: u64) -> bool {
        self.target == size && self.holes.is_empty() && self.unwritten.is_empty() && self.shared.is_empty()
    }
}

fn push(ranges: &mut Vec<Range>, start: u64, end: u64) {
    if start < end {
        ranges.push(Range { start, end });
    }
}

fn total(ranges: &[Range]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

struct Work<'a> {
    file: &'a File,
    facts: FileFacts,
    progress: &'a mut dyn Progress,
    report: PrepareReport,
}

impl Work<'_> {
    /// Mends what `records` show; `false` when there was nothing to mend.
    fn round(&mut self, records: &[RawExtent], block: Option<BlockSize>) -> Result<bool, ExtentError> {
        let size = self.facts.size.get();
        let logical = self.facts.disk.as_ref().map_or(512, |disk| disk.logical_block_size.bytes());
        let block = block.map_or(logical, |block| block.bytes().max(logical));
        let plan = Plan::of(records, size, block.into());
        if plan.is_done(size) {
            return Ok(false);
        }
        self.refuse_without_room(&plan)?;
        self.allocate(&plan.holes)?;
        self.unshare(&plan.shared)?;
        self.write_zeros(&plan, size)?;
        self.progress.stage("flushing");
        self.file.sync_all().map_err(|error| self.io("flush", error))?;
        self.facts = FileFacts::gather(self.file, &self.facts.path)?;
        self.report.zeroed.0 += total(&plan.holes) + total(&plan.unwritten);
        self.report.unshared.0 += total(&plan.shared);
        self.report.padded.0 += plan.target - size;
        Ok(true)
    }

    fn refuse_without_room(&self, plan: &Plan) -> Result<(), ExtentError> {
        let needed = ByteLen(total(&plan.holes).saturating_add(total(&plan.shared)));
        let available = self.available()?;
        if needed > available {
            return Err(ExtentError::NoSpace { path: self.facts.path.clone(), needed, available });
        }
        Ok(())
    }

    fn available(&self) -> Result<ByteLen, ExtentError> {
        let room =
            rustix::fs::fstatvfs(self.file).map_err(|error| self.io("stat the filesystem of", error))?;
        Ok(ByteLen(room.f_bfree.saturating_mul(room.f_frsize)))
    }

    /// Allocates the holes before anything is written, so that a lack of space shows while nothing has changed. What
    /// was allocated is given back then.
    fn allocate(&self, holes: &[Range]) -> Result<(), ExtentError> {
        for (at, hole) in holes.iter().enumerate() {
            if let Err(error) = self.fallocate(FallocateFlags::KEEP_SIZE, *hole) {
                for hole in holes.get(..=at).unwrap_or_default() {
                    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    if let Err(error) = self.fallocate(punch, *hole) {
                        tracing::warn!(path = %self.facts.path.display(), %error, "cannot give back space");
                    }
                }
                return Err(self.no_space(error, "allocate", holes));
            }
        }
        Ok(())
    }

    fn unshare(&mut self, shared: &[Range]) -> Result<(), ExtentError> {
        if shared.is_empty() {
            return Ok(());
        }
        self.progress.stage("unsharing");
        let all = total(shared);
        let mut done = 0;
        for range in shared {
            // In pieces, so that no single call copies for minutes without a look at the lease.
            for piece in pieces(*range, 64 * CHUNK_LEN as u64) {
                still_unopened(self.file, &self.facts)?;
                if let Err(error) = self.fallocate(FallocateFlags::UNSHARE_RANGE, piece) {
                    return Err(self.no_space(error, "unshare", shared));
                }
                done += piece.end - piece.start;
                self.progress.advance(done, all);
            }
        }
        Ok(())
    }

    fn write_zeros(&mut self, plan: &Plan, size: u64) -> Result<(), ExtentError> {
        let zeros = vec![0; CHUNK_LEN];
        // The padding lies partly in the last block, which may be allocated: write all of it, which grows the file.
        let padding = Range { start: size, end: plan.target };
        let below = |range: &Range| Range { start: range.start, end: range.end.min(size) };
        let inside =
            plan.holes.iter().chain(&plan.unwritten).map(below).filter(|range| range.start < range.end);
        let ranges: Vec<Range> = inside.chain((padding.start < padding.end).then_some(padding)).collect();
        let all = total(&ranges);
        let mut done = 0;
        self.progress.stage("writing zeros");
        for piece in ranges.iter().flat_map(|range| pieces(*range, CHUNK_LEN as u64)) {
            if done % (CHUNK_LEN as u64) == 0 || piece.end - piece.start == CHUNK_LEN as u64 {
                still_unopened(self.file, &self.facts)?;
            }
            let len = usize::try_from(piece.end - piece.start).unwrap_or(CHUNK_LEN);
            let zeros = zeros.get(..len).unwrap_or(&zeros);
            if let Err(error) = self.file.write_all_at(zeros, piece.start) {
                return Err(self.no_space(error, "write zeros into", &[piece]));
            }
            done += len as u64;
            self.progress.advance(done, all);
        }
        Ok(())
    }

    fn fallocate(&self, flags: FallocateFlags, range: Range) -> io::Result<()> {
        Ok(rustix::fs::fallocate(self.file.as_fd(), flags, range.start, range.end - range.start)?)
    }

    fn no_space(&self, error: io::Error, action: &'static str, ranges: &[Range]) -> ExtentError {
        if error.kind() == io::ErrorKind::StorageFull {
            let available = self.available().unwrap_or_default();
            return ExtentError::NoSpace {
                path: self.facts.path.clone(),
                needed: ByteLen(total(ranges)),
                available,
            };
        }
        self.io(action, error)
    }

    fn io(&self, action: &'static str, error: impl Into<io::Error>) -> ExtentError {
        ExtentError::io(action, &self.facts.path, error)
    }
}

fn pieces(range: Range, len: u64) -> impl Iterator<Item = Range> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let piece = Range { start: at, end: range.end.min(at.saturating_add(len)) };
        at = piece.end;
        (piece.start < piece.end).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ByteOffset;

    fn record(start: u64, len: u64, flags: FiemapFlags) -> RawExtent {
        RawExtent {
            file_offset: ByteOffset(start),
            device_offset: ByteOffset(1 << 30),
            len: ByteLen(len),
            flags,
        }
    }

    #[test]
    fn the_plan_names_holes_unwritten_and_shared_and_pads() {
        let records = [
            record(4096, 4096, FiemapFlags::UNWRITTEN),
            record(8192, 4096, FiemapFlags::SHARED),
            record(16384, 4096, FiemapFlags::LAST),
        ];
        let plan = Plan::of(&records, 20_000, 8192);
        assert_eq!(plan.target, 24_576);
        let range = |start, end| Range { start, end };
        assert_eq!(plan.holes, [range(0, 4096), range(12_288, 16_384), range(20_480, 24_576)]);
        assert_eq!(plan.unwritten, [range(4096, 8192)]);
        assert_eq!(plan.shared, [range(8192, 12_288)]);
        assert!(!plan.is_done(20_000));
    }

    #[test]
    fn blocks_beyond_the_size_are_left_alone() {
        let records = [record(0, 4096, FiemapFlags::empty()), record(4096, 65_536, FiemapFlags::UNWRITTEN)];
        assert!(Plan::of(&records, 4096, 512).is_done(4096));
    }

    #[test]
    fn pieces_cover_a_range_exactly() {
        let range = Range { start: 3, end: 10 };
        let ends: Vec<u64> = pieces(range, 3).map(|piece| piece.end).collect();
        assert_eq!(ends, [6, 9, 10]);
        assert_eq!(pieces(Range { start: 3, end: 3 }, 3).count(), 0);
    }
}
