//! What holds the blocks of a namespace.
//!
//! A block device is read and written past the page cache (`O_DIRECT`): a filesystem that is mounted on it does so too, and
//! would neither see what lies in the cache of the device nor be seen there. An image is read and written as any program
//! does, or past the cache where it is asked for. A flush is `fdatasync`, which reaches the disk behind either.
//!
//! What goes past the cache must be aligned, in memory too. The controller's own buffer is ([`Bounce`]).

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, ioctl_blksszget, statx};

/// What holds the blocks of a namespace.
#[derive(Debug)]
pub enum Backing {
    /// Memory, zeros at first; lost with the namespace.
    Memory,
    /// A file or a block device of at least the namespace's size. A block device is used past the page cache.
    File(File),
    /// A file that is used past the page cache: one that others use so too, such as the image of a loop device with
    /// direct I/O.
    DirectFile(File),
}

/// Memory alignment that does for all of them.
const ALIGN: usize = 4096;

/// Bytes whose address is a multiple of 4096.
#[derive(Default)]
pub(crate) struct Bounce {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl fmt::Debug for Bounce {
    /// Without the bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bounce({})", self.len)
    }
}

impl Bounce {
    pub(crate) fn of(len: usize) -> Self {
        let mut bounce = Self::default();
        bounce.resize(len);
        bounce
    }

    /// Makes it `len` bytes long; what is in them is not defined.
    pub(crate) fn resize(&mut self, len: usize) {
        if self.bytes.len() < self.start + len || self.bytes.is_empty() {
            self.bytes = vec![0; len + ALIGN];
            let address = self.bytes.as_ptr().addr();
            self.start = address.next_multiple_of(ALIGN) - address;
        }
        self.len = len;
    }
}

impl Deref for Bounce {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

impl DerefMut for Bounce {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}

/// A backing that was looked at.
pub(crate) enum Store {
    Memory(Mutex<Vec<u8>>),
    File { file: File, direct: bool },
}

impl fmt::Debug for Store {
    /// Without the blocks.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(_) => f.write_str("Memory"),
            Self::File { file, direct } => {
                f.debug_struct("File").field("file", file).field("direct", direct).finish()
            }
        }
    }
}

impl Store {
    /// For `bytes` bytes in blocks of `block_len`.
    pub(crate) fn new(backing: Backing, bytes: usize, block_len: u64) -> Result<Self, &'static str> {
        let (mut file, wanted) = match backing {
            Backing::Memory => return Ok(Self::Memory(Mutex::new(vec![0; bytes]))),
            Backing::File(file) => (file, false),
            Backing::DirectFile(file) => (file, true),
        };
        let kind = file.metadata().map_err(|_| "its backing cannot be looked at")?.file_type();
        let device = kind.is_block_device();
        // The length of a block device shows only where its end is.
        let len = file.seek(SeekFrom::End(0)).map_err(|_| "its backing has no end")?;
        if len < bytes as u64 {
            return Err("its backing is shorter than the namespace");
        }
        let direct = wanted || device;
        if direct {
            let flags = fcntl_getfl(&file).map_err(|_| "its backing cannot be looked at")?;
            fcntl_setfl(&file, flags | OFlags::DIRECT)
                .map_err(|_| "its backing takes no direct I/O (O_DIRECT)")?;
            if direct_alignment(&file, device) > block_len {
                return Err(
                    "its blocks are smaller than those of its backing, which direct I/O cannot write",
                );
            }
        }
        Ok(Self::File { file, direct })
    }

    /// Fills `data` from position `at`; the caller has checked the range.
    pub(crate) fn read(&self, at: u64, data: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File { file, direct: true } if !is_aligned(data) => {
                let mut bounce = Bounce::of(data.len());
                file.read_exact_at(&mut bounce, at)?;
                data.copy_from_slice(&bounce);
                Ok(())
            }
            Self::File { file, .. } => file.read_exact_at(data, at),
            Self::Memory(memory) => {
                let memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                let source = range(at, data.len()).and_then(|range| memory.get(range));
                data.copy_from_slice(source.ok_or(io::ErrorKind::InvalidInput)?);
                Ok(())
            }
        }
    }

    /// Writes `data` to position `at`; the caller has checked the range.
    pub(crate) fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        match self {
            Self::File { file, direct: true } if !is_aligned(data) => {
                let mut bounce = Bounce::of(data.len());
                bounce.copy_from_slice(data);
                file.write_all_at(&bounce, at)
            }
            Self::File { file, .. } => file.write_all_at(data, at),
            Self::Memory(memory) => {
                let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                let target = range(at, data.len()).and_then(|range| memory.get_mut(range));
                target.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
                Ok(())
            }
        }
    }

    /// Makes durable what was written.
    pub(crate) fn flush(&self) -> io::Result<()> {
        match self {
            Self::File { file, .. } => file.sync_data(),
            Self::Memory(_) => Ok(()),
        }
    }
}

/// The alignment of positions and lengths that direct I/O asks for, in bytes.
fn direct_alignment(file: &File, device: bool) -> u64 {
    if device {
        return ioctl_blksszget(file).map_or(ALIGN as u64, u64::from);
    }
    let told = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .map(|stat| u64::from(stat.stx_dio_offset_align))
        .filter(|&align| align > 0);
    // Kernels and filesystems that do not tell: 512 does on most, and where it does not, I/O fails with an error.
    told.unwrap_or(512)
}

fn is_aligned(data: &[u8]) -> bool {
    data.as_ptr().addr().is_multiple_of(ALIGN)
}

fn range(at: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let at = usize::try_from(at).ok()?;
    Some(at..at.checked_add(len)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounce_buffer_is_aligned_at_every_length() {
        let mut bounce = Bounce::default();
        assert!(bounce.is_empty());
        for len in [512, 4096, 100_000, 512, 1 << 20, 0, 65536] {
            bounce.resize(len);
            assert_eq!(bounce.len(), len);
            assert!(is_aligned(&bounce));
        }
    }

    #[test]
    fn a_file_holds_what_was_written_past_the_cache_or_not() {
        let dir = std::env::current_dir().unwrap();
        for direct in [false, true] {
            let file = tempfile::tempfile_in(&dir).unwrap();
            file.set_len(1 << 20).unwrap();
            let backing = if direct { Backing::DirectFile(file) } else { Backing::File(file) };
            let store = match Store::new(backing, 1 << 20, 4096) {
                Ok(store) => store,
                Err(why) => {
                    eprintln!("SKIPPED: a_file_holds_what_was_written_past_the_cache_or_not: {why}");
                    continue;
                }
            };
            let data: Vec<u8> = (0..8192u32).map(|at| at.to_le_bytes()[0]).collect();
            // One byte off, so that it has to be copied.
            let mut odd = vec![0; 8193];
            odd[1..].copy_from_slice(&data);
            store.write(4096, &odd[1..]).unwrap();
            let mut back = vec![0; 8193];
            store.read(4096, &mut back[1..]).unwrap();
            assert_eq!(back[1..], data);
            let mut bounce = Bounce::of(8192);
            store.read(4096, &mut bounce).unwrap();
            assert_eq!(*bounce, data);
            store.flush().unwrap();
            assert!(store.read(1 << 20, &mut bounce).is_err());
        }
    }

    #[test]
    fn a_backing_that_does_not_hold_the_namespace_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let why = Store::new(Backing::File(file), 8192, 512).unwrap_err();
        assert!(why.contains("shorter"), "{why}");
    }
}
