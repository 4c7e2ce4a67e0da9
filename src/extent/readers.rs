//! Local readers of a pinned file: refused, or let in; and what the page cache holds of it then.
//!
//! ```text
//!   hosts  ------------------------->  disk          what they write is there, and nowhere else
//!   reader --> page cache --(miss)-->  disk          a block that is cached is as old as the reading of it
//!
//!   open of a reader     the cache is dropped: what is read from then on is no older than the open
//!   end of the pin       dropped again, and what stays in it (somebody has mapped it) is compared with the disk
//! ```
//!
//! Readers are let in only where nothing but reading can come of their descriptors: a filesystem that shares blocks between
//! files would make a clone through any of them, and remote writes would be in the clone too. The swap area refuses that as
//! well. Writers are kept out all the same, by the flag and the lease.
//!
//! A stale block that stays cached after the pin is a danger: a local write to a part of it would put the rest of it back on
//! the disk, over what hosts wrote. So a file is given back only when none is; and when somebody with the power to do so takes
//! it, the immutable flag is set once more before the lease goes, as long as any block is cached. ext4 refuses writes to an
//! immutable file also through a descriptor that was open before (`ext4_write_checks`); XFS does not, and there only a swap area
//! is good enough.
//!
//! What it does not do: keep the cache true while hosts write. `fastice read` and direct I/O go past it.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::Advice;
use serde::{Deserialize, Serialize};

use super::error::ExtentError;
use super::facts::{FileFacts, is_immutable};
use super::holders;
use super::identity::FilesystemKind;
use super::mode::GuardMode;
use super::sys;
use super::undo::change_flag;
use crate::aligned::AlignedBuffer;

/// The name in errors.
pub(super) const LOCAL_READERS: &str = "local-readers";
/// Compared at a time, and the least that is looked at whether it is cached.
const CHUNK_LEN: u64 = 1 << 20;
/// How long a reader that has a page in hand at this moment may hold on to it.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

/// Whether other processes of this host may open a pinned file for reading.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum LocalReaders {
    /// They may not: they would read what was in the page cache before hosts wrote
    #[default]
    Refuse,
    /// They may, and what they read may be old: see the manual
    Allow,
}

impl LocalReaders {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Refuse, Self::Allow];

    /// The name in configurations, records and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Allow => "allow",
        }
    }
}

impl fmt::Display for LocalReaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why readers cannot be let in to this file, held by these guards.
pub(super) fn obstacle(
    readers: LocalReaders,
    mode: GuardMode,
    file: &File,
    facts: &FileFacts,
) -> Option<ExtentError> {
    if readers == LocalReaders::Refuse {
        return None;
    }
    let refuse = |problem, source| {
        Some(ExtentError::Guard { path: facts.path.clone(), guard: LOCAL_READERS, problem, source })
    };
    match (facts.filesystem, mode) {
        (_, GuardMode::SwapFile) | (Some(FilesystemKind::Ext4), GuardMode::Default) => {}
        (Some(FilesystemKind::Ext4), _) => {
            return refuse(
                "only the default guards and the swap-file guard keep out a writer that root lets in beside old blocks which a \
                 reader has mapped",
                None,
            );
        }
        _ => {
            return refuse(
                "XFS lets whoever reads it clone it (reflink), and a writer that root lets in write beside old blocks which a \
                 reader has mapped; `fastice read` reads for them, and the swap-file guard forbids both",
                None,
            );
        }
    }
    match sys::cached_pages(file.as_fd(), 0, 0) {
        Ok(_) => None,
        Err(error) => {
            refuse("the kernel does not tell what it has cached (Linux 6.5 and later do)", Some(error))
        }
    }
}

/// Drops what the page cache holds of the file, but for what somebody has mapped or is reading at this moment.
pub(super) fn drop_cache(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
}

/// Before a pinned file is given back: drops what is cached of it, and makes sure that what stays is what the disk holds.
/// Nobody may write the blocks any more.
pub(super) fn settle_cache(file: &File, facts_of: &Path, len: u64) -> Result<(), ExtentError> {
    let failed = |error| ExtentError::io("look for old blocks in the page cache of", facts_of, error);
    let begun = Instant::now();
    loop {
        drop_cache(file).map_err(|error| ExtentError::io("drop the page cache of", facts_of, error))?;
        let stale = match first_stale(file, len) {
            Ok(None) => return Ok(()),
            Ok(Some(stale)) => stale,
            // Before Linux 6.5 nobody can tell; then no readers were let in.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        if begun.elapsed() >= PATIENCE {
            let holders = holders::of_file(file).map_err(failed)?;
            return Err(ExtentError::StaleCache { path: facts_of.to_path_buf(), offset: stale, holders });
        }
        thread::sleep(PAUSE);
    }
}

/// Before a file is let go that somebody else takes: drops what is cached of it. When something stays, whatever it is, and the
/// file is not immutable, it is made so once more. Whether that was necessary.
///
/// # Errors
/// When the flag cannot be set.
pub(super) fn keep_writers_out(file: &File, path: &Path) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        drop_cache(file)?;
        match sys::cached_pages(file.as_fd(), 0, 0) {
            Ok(0) => return Ok(false),
            // Before Linux 6.5 nobody can tell; then no readers were let in.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return Ok(false),
            _ => {}
        }
        if is_immutable(file, path).unwrap_or(false) {
            return Ok(false);
        }
        if begun.elapsed() >= PATIENCE {
            break;
        }
        thread::sleep(PAUSE);
    }
    change_flag(file, true)?;
    Ok(true)
}

/// Where the first cached block of the file is that is not what the disk holds.
fn first_stale(file: &File, len: u64) -> io::Result<Option<u64>> {
    if sys::cached_pages(file.as_fd(), 0, 0)? == 0 {
        return Ok(None);
    }
    // The mark lets this process pass.
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(own)?;
    let mut buffers = [0; 2].map(|_: u8| AlignedBuffer::new(usize::try_from(CHUNK_LEN).unwrap_or_default()));
    let mut ranges = vec![(0, len)];
    while let Some((at, len)) = ranges.pop() {
        if len == 0 || sys::cached_pages(file.as_fd(), at, len)? == 0 {
            continue;
        }
        if len > CHUNK_LEN {
            let first = (len / 2).next_multiple_of(CHUNK_LEN);
            ranges.extend([(at + first, len - first), (at, first)]);
            continue;
        }
        if let Some(stale) = compare_chunk(file, &direct, &mut buffers, at, len)? {
            return Ok(Some(stale));
        }
    }
    Ok(None)
}

fn compare_chunk(
    file: &File,
    direct: &File,
    buffers: &mut [AlignedBuffer; 2],
    at: u64,
    len: u64,
) -> io::Result<Option<u64>> {
    let [cached, on_disk] = buffers;
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
    let cached = cached.bytes_mut().get_mut(..len).ok_or_else(too_long)?;
    file.read_exact_at(cached, at)?;
    let on_disk = on_disk.bytes_mut().get_mut(..len).ok_or_else(too_long)?;
    direct.read_exact_at(on_disk, at)?;
    let differs = cached.iter().zip(on_disk.iter()).position(|(cached, on_disk)| cached != on_disk);
    Ok(differs.map(|differs| at + differs as u64))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use clap::ValueEnum as _;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_has_one_name_everywhere() {
        for readers in LocalReaders::ALL {
            let json = serde_json::to_string(&readers).expect("a word");
            assert_eq!(json, format!("\"{readers}\""));
            assert_eq!(serde_json::from_str::<LocalReaders>(&json).expect("the same"), readers);
            assert_eq!(LocalReaders::from_str(readers.name(), false), Ok(readers));
        }
        assert_eq!(LocalReaders::default(), LocalReaders::Refuse);
    }

    /// A file beside the build, where direct I/O is possible, if it is.
    fn file_of(len: usize) -> Option<tempfile::NamedTempFile> {
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).expect("room");
        file.write_all(&vec![7; len]).expect("room");
        file.as_file().sync_all().expect("a disk");
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file.path());
        match (direct, sys::cached_pages(file.as_file().as_fd(), 0, 0)) {
            (Ok(_), Ok(_)) => Some(file),
            found => {
                let _ = writeln!(io::stderr(), "SKIPPED: cached blocks: {found:?}");
                None
            }
        }
    }

    #[test]
    fn what_is_cached_and_true_is_not_stale() {
        let Some(file) = file_of(3 << 20) else { return };
        let mut bytes = vec![0; 3 << 20];
        file.as_file().read_exact_at(&mut bytes, 0).expect("readable");
        assert!(sys::cached_pages(file.as_file().as_fd(), 0, 0).expect("Linux 6.5") > 0);
        assert_eq!(first_stale(file.as_file(), 3 << 20).expect("readable"), None);
        settle_cache(file.as_file(), file.path(), 3 << 20).expect("nothing is stale");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn a_difference_is_found_where_it_is(at in 0..(1_usize << 20), other in 1_u8..=255) {
            let Some([file, disk]) = file_of(1 << 20).zip(file_of(1 << 20)).map(|(a, b)| [a, b]) else { return Ok(()) };
            file.as_file().write_all_at(&[7 ^ other], at as u64).expect("room");
            file.as_file().sync_all().expect("a disk");
            let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(disk.path()).expect("it may be");
            let mut buffers = [0; 2].map(|_: u8| AlignedBuffer::new(1 << 20));
            let found = compare_chunk(file.as_file(), &direct, &mut buffers, 0, 1 << 20).expect("readable");
            prop_assert_eq!(found, Some(at as u64));
        }
    }
}
