//! Reading a file that is pinned and served: by its recorded map, from the disk under it, past the page cache.
//!
//! ```text
//!   record (map, disk) --> /dev/<disk>, O_DIRECT: is it that disk?  --> extent by extent --> wherever it shall go
//!   held by the same process, of the same generation, before and after: else what was read may be anything
//! ```
//!
//! For people who need, on the serving host, what hosts wrote: the file itself may not be opened, and what the page cache
//! had of it would be old. It is no snapshot: hosts go on writing while it is read.
//!
//! What it does not do: read files that were handed over, whose disk the kernel does not have.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::device::Sysfs;
use super::error::{ExtentError, StateProblem};
use super::facts::number_of;
use super::progress::Progress;
use super::record::StoredPin;
use super::state::StateDir;
use super::survey::open_read;
use super::verify::{is_mounted, same_file};
use crate::aligned::AlignedBuffer;

/// Bytes read at a time: many device commands deep.
const CHUNK_LEN: usize = 1 << 20;
/// What every disk takes direct reads at least in multiples of: after a read of another length there is no more.
const DIRECT_ALIGNMENT: usize = 512;

/// Reads the file of `pin`, which nobody holds and which is at `path` now, into `to`: by the filesystem, and past the page cache, which may have what local
/// readers read before hosts wrote.
///
/// # Errors
/// [`ExtentError::State`] when another file is at its path; [`ExtentError::Io`] when it cannot be read, or `to` takes no more.
pub fn read_left(pin: &StoredPin, path: &Path, to: &mut dyn Write) -> Result<(), ExtentError> {
    let failed = |error| ExtentError::io("read", path, error);
    let file = open_read(path)?;
    same_file(&pin.identity, &file, path)?;
    let direct = format!("/proc/self/fd/{}", file.as_raw_fd());
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(direct).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut buffer = AlignedBuffer::new(CHUNK_LEN);
    // What is reserved is whole blocks.
    let mut at = pin.identity.reserved.get();
    while at < size {
        // The last block of the file may be cut short by its end.
        let len = direct.read_at(buffer.bytes_mut(), at).map_err(failed)?;
        let read = buffer.bytes().get(..len).unwrap_or_default();
        to.write_all(read).map_err(failed)?;
        if len == 0 || len % DIRECT_ALIGNMENT != 0 {
            break;
        }
        at += len as u64;
    }
    Ok(())
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// All bytes that are served: the file, but for what is reserved.
    Whole,
    /// The pin was let go, fenced or made anew meanwhile: what was read may be of another file.
    LetGo,
}

/// Reads the file of `pin`, which a living process holds and which is at `path`, into `to`.
///
/// # Errors
/// [`ExtentError::State`] without a map, and when another file is at `path` now; [`ExtentError::Io`] when the disk cannot be read,
/// is another one, or `to` takes no more.
pub fn read_pinned(
    pin: &StoredPin,
    path: &Path,
    state: &StateDir,
    to: &mut dyn Write,
    progress: &mut dyn Progress,
) -> Result<ReadOutcome, ExtentError> {
    if is_another_at(pin, path) {
        return Err(ExtentError::State { path: path.to_path_buf(), problem: StateProblem::OtherFile });
    }
    let Some(map) = &pin.map else { return Err(super::pin::no_record(pin.path())) };
    let disk = &pin.identity.disk;
    let failed = |error| ExtentError::io("read by its map", pin.path(), error);
    let device = open_disk(pin).map_err(|error| ExtentError::io("open the disk", &disk.node, error))?;
    let (size, reserved) = (pin.identity.served().get(), pin.identity.reserved.get());
    let block = u64::from(disk.logical_block_size.bytes());
    let mut buffer = AlignedBuffer::new(CHUNK_LEN);
    let mut done = 0;
    progress.stage("reading by the map");
    for extent in &map.extents {
        // What is reserved, at the beginning of the file, is not for readers either.
        let skipped = reserved.saturating_sub(extent.file_offset.get()).min(extent.len.get());
        let at = extent.device_offset.get() + skipped;
        let (mut at, mut left) = (at, (extent.len.get() - skipped).min(size - done));
        while left > 0 {
            let len = left.min(CHUNK_LEN as u64);
            let whole = usize::try_from(len.next_multiple_of(block)).map_err(|_| failed(too_large()))?;
            let chunk = buffer.bytes_mut().get_mut(..whole).ok_or_else(|| failed(too_large()))?;
            device.read_exact_at(chunk, at).map_err(failed)?;
            let wanted = usize::try_from(len).ok().and_then(|len| buffer.bytes().get(..len));
            to.write_all(wanted.ok_or_else(|| failed(too_large()))?).map_err(failed)?;
            (at, left, done) = (at + len, left - len, done + len);
            progress.advance(done, size);
        }
    }
    Ok(if is_still_held(pin, state)? { ReadOutcome::Whole } else { ReadOutcome::LetGo })
}

/// Whether another file is at `path`, as where its directory was moved away and made anew. Of a file whose filesystem is not
/// mounted there only the path is known.
fn is_another_at(pin: &StoredPin, path: &Path) -> bool {
    let identity = &pin.identity;
    let is_it =
        |meta: &Metadata| (meta.ino(), number_of(meta.dev())) == (identity.inode, identity.filesystem.device);
    fs::metadata(path).is_ok_and(|meta| !is_it(&meta)) && is_mounted(pin)
}

fn too_large() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

/// The disk of the map, made sure of by its number and size. Numbers hold for one boot, as the process does that holds
/// the pin.
fn open_disk(pin: &StoredPin) -> io::Result<File> {
    let disk = &pin.identity.disk;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&disk.node)?;
    let is_it = number_of(file.metadata()?.rdev()) == disk.number;
    if !is_it || Sysfs::system().len_of(disk.number)? != Some(disk.size) {
        return Err(io::Error::other("it is not the disk of the map any more"));
    }
    Ok(file)
}

/// Whether the pin is held as it was: by the same process, with the same map, and not fenced for a difference.
fn is_still_held(pin: &StoredPin, state: &StateDir) -> Result<bool, ExtentError> {
    let key = pin.identity.key();
    let now = state.load(&key)?;
    let same = now.is_some_and(|now| now.generation == pin.generation && now.owner == pin.owner);
    Ok(same
        && state.holder(&key)?.is_some_and(|holder| holder == pin.owner)
        && state.incident(&key)?.is_none())
}
