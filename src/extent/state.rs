//! The state directory: the records of pins, which survive the process that made them.
//!
//! ```text
//!   lock               held for the moment in which pins are made, adopted or released
//!   KEY.json           the record of one file (see `record`); KEY names file and filesystem, not the path
//!   KEY.lock           held (flock) by the process that holds the pin, and naming it
//!   KEY.generation     the generation last given to the file; stays when the record goes
//!   KEY.events, KEY.incident  what became of it, and what is wrong with it (see `timeline`)
//!   processes/         of each process that serves, as few as there are of those:
//!     PID-START-N.commands  held while it may have commands on devices (see `commands`)
//!     PID-START-N.places    the controllers that it drives itself (see `places`)
//! ```
//!
//! There may be thousands of records, and each may have a map of a million extents. So whoever pins or lets go of one file
//! finds what it needs by names (see `find`), and where all records have to be looked at, only their heads are read.
//!
//! A record is replaced by writing a new file, fsync, rename, fsync of the directory: a crash leaves the old or the
//! new one. Whether a pin is held is told by the lock, which the kernel drops with the process, however it ends.

use std::fs::{self, DirBuilder, File};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::error::{ExtentError, StateProblem};
use super::map::Extent;
use super::owner::Owner;
use super::places::Still;
use super::record::{self, RecordHead, StoredPin};
use crate::durable::{self, Locked, Staged};

/// The largest record that is read: room for some 30 million extents.
const RECORD_LEN_MAX: u64 = 1 << 30;

const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// The directory that keeps the records of pins.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    still: Option<Arc<dyn Still>>,
}

impl StateDir {
    /// Opens the directory, and makes it, for its owner only, when it is missing.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ExtentError> {
        let path = path.as_ref();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|e| ExtentError::io("create the state directory", path, e))?;
        let path =
            fs::canonicalize(path).map_err(|e| ExtentError::io("find the state directory", path, e))?;
        Ok(Self { path, still: None })
    }

    /// The same directory, whose controllers of dead processes are stilled by `still`. Without it a file whose last
    /// owner drove a controller itself cannot be pinned or unpinned after that owner was killed.
    #[must_use]
    pub fn stilling_by(self, still: Arc<dyn Still>) -> Self {
        Self { still: Some(still), ..self }
    }

    pub(super) fn still(&self) -> Option<&dyn Still> {
        self.still.as_deref()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All records, each of them whole or with what is wrong with it, in the order of their keys.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when the directory cannot be read.
    pub fn records(&self) -> Result<Vec<Result<StoredPin, ExtentError>>, ExtentError> {
        Ok(self.record_paths()?.iter().filter_map(|path| read_record(path).transpose()).collect())
    }

    /// What all records say beside their extents, and where they are: for finding some of them. Of a whole head the map may be
    /// damaged all the same, which loading the record tells.
    pub(super) fn heads(&self) -> Result<Vec<FoundHead>, ExtentError> {
        let head = |path: PathBuf| Some((read_head(&path).transpose()?, path));
        Ok(self.record_paths()?.into_iter().filter_map(head).map(|(head, path)| (path, head)).collect())
    }

    fn record_paths(&self) -> Result<Vec<PathBuf>, ExtentError> {
        files_in(&self.path, "json")
    }

    /// Where processes that may have commands on devices say so.
    pub(super) fn processes(&self) -> PathBuf {
        self.path.join("processes")
    }

    /// Whether this process may look at what is in the directory.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when not.
    pub fn records_are_readable(&self) -> Result<(), ExtentError> {
        let io = |source| ExtentError::io("read the state directory", &self.path, source);
        fs::read_dir(&self.path).map(drop).map_err(io)
    }

    /// The record with this key; `None` when there is none.
    ///
    /// # Errors
    /// [`ExtentError::State`] when it is damaged or of another version, [`ExtentError::Io`].
    pub fn load(&self, key: &str) -> Result<Option<StoredPin>, ExtentError> {
        read_record(&self.file(key, "json"))
    }

    /// What the record with this key says beside its extents; `None` when there is none.
    pub(super) fn head(&self, key: &str) -> Result<Option<RecordHead>, ExtentError> {
        read_head(&self.file(key, "json"))
    }

    /// Writes a record, in place of one of the same file.
    ///
    /// # Errors
    /// [`ExtentError::Io`]; the old record is then still there.
    pub fn store(&self, pin: &StoredPin) -> Result<(), ExtentError> {
        let extents = pin.map.as_ref().map_or(&[][..], |map| &map.extents);
        self.stage(&record::without_extents(pin), extents)?.commit()
    }

    /// Writes the record of a pin, whose map has these extents, beside the one of the same file, and durably: to be
    /// [committed](StagedRecord::commit).
    pub(super) fn stage(&self, pin: &StoredPin, extents: &[Extent]) -> Result<StagedRecord, ExtentError> {
        let key = pin.identity.key();
        if self.last_generation(&key)?.is_none_or(|last| last < pin.generation) {
            replace(&self.file(&key, "generation"), |file| writeln!(file, "{}", pin.generation))?;
        }
        let path = self.file(&key, "json");
        match Staged::write(&path, |file| record::write_with(pin, extents, file)) {
            Ok(staged) => Ok(StagedRecord { staged, path }),
            Err(error) => Err(ExtentError::io("write", &path, error)),
        }
    }

    /// Removes a record. Its file's generation is kept.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn remove(&self, key: &str) -> Result<(), ExtentError> {
        let path = self.file(key, "json");
        durable::remove(&path).map_err(|error| ExtentError::io("remove the stored pin", &path, error))
    }

    /// Whether a living process holds the pin with this key, and which.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn holder(&self, key: &str) -> Result<Option<Owner>, ExtentError> {
        let path = self.file(key, "lock");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ExtentError::io("open the lock", &path, error)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {
                drop(Locked(file));
                Ok(None)
            }
            Err(rustix::io::Errno::AGAIN) => Ok(Some(lock_owner(&path))),
            Err(error) => Err(ExtentError::io("ask for the lock", &path, error)),
        }
    }

    /// The generation that the next freeze of the file with this key gets.
    pub(super) fn next_generation(&self, key: &str) -> Result<u64, ExtentError> {
        Ok(self.last_generation(key)?.unwrap_or(0).saturating_add(1))
    }

    fn last_generation(&self, key: &str) -> Result<Option<u64>, ExtentError> {
        let path = self.file(key, "generation");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|error| ExtentError::State { path, problem: StateProblem::Malformed(error) }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ExtentError::io("read", &path, error)),
        }
    }

    /// Waits until no other thread or process makes, adopts or releases pins here.
    pub(super) fn lock(&self) -> Result<StateLock, ExtentError> {
        let path = self.path.join("lock");
        let file = open_lock(&path)?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(|error| ExtentError::io("lock", &path, error))?;
        Ok(StateLock { _file: Locked(file) })
    }

    /// Takes the lock that says who holds a pin; `Err` with that process when it is held.
    pub(super) fn lock_pin(&self, key: &str) -> Result<Result<PinLock, Owner>, ExtentError> {
        let path = self.file(key, "lock");
        let mut file = open_lock(&path)?;
        let mut attempt = 0;
        while let Err(error) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::AGAIN {
                return Err(ExtentError::io("lock", &path, error));
            }
            // Whoever only asks for the holder has the lock for a moment, too.
            if attempt == LOCK_ATTEMPTS {
                return Ok(Err(lock_owner(&path)));
            }
            attempt += 1;
            thread::sleep(LOCK_PAUSE);
        }
        let io = |error| ExtentError::io("write", &path, error);
        file.set_len(0).map_err(io)?;
        let owner = serde_json::to_vec(&Owner::this_process()).map_err(|error| io(error.into()))?;
        file.write_all(&owner).map_err(io)?;
        Ok(Ok(PinLock { _file: Locked(file), path }))
    }

    fn file(&self, key: &str, extension: &str) -> PathBuf {
        self.path.join(format!("{key}.{extension}"))
    }
}

/// Where a record is, and its head, or what is wrong with it.
pub(super) type FoundHead = (PathBuf, Result<RecordHead, ExtentError>);

/// A record that is written, and does not count yet. Dropped, it is gone.
#[derive(Debug)]
pub(super) struct StagedRecord {
    staged: Staged,
    path: PathBuf,
}

impl StagedRecord {
    /// Puts it in the place of the old one.
    pub(super) fn commit(self) -> Result<(), ExtentError> {
        self.staged.commit().map_err(|error| ExtentError::io("write", &self.path, error))
    }
}

/// Writes `path` anew, so that a crash leaves the old content or the new.
pub(super) fn replace(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), ExtentError> {
    durable::replace(path, write).map_err(|error| ExtentError::io("write", path, error))
}

pub(super) fn open_lock(path: &Path) -> Result<File, ExtentError> {
    durable::open_lock(path).map_err(|error| ExtentError::io("open the lock", path, error))
}

/// Who wrote a lock file; a process of id 0 when that cannot be read.
fn lock_owner(path: &Path) -> Owner {
    let bytes = fs::read(path).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or(Owner { pid: 0, start_time_ticks: 0, boot_id: String::new() })
}

/// The files of a directory with this extension, in order. A directory that is not there has none.
pub(super) fn files_in(directory: &Path, extension: &str) -> Result<Vec<PathBuf>, ExtentError> {
    let io = |error| ExtentError::io("read the state directory", directory, error);
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io)?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let name = entry.map_err(io)?.file_name();
        if Path::new(&name).extension().is_some_and(|found| found == extension) {
            paths.push(directory.join(name));
        }
    }
    paths.sort();
    Ok(paths)
}

/// Reads a record up to its extents; all of it where that does not tell.
fn read_head(path: &Path) -> Result<Option<RecordHead>, ExtentError> {
    let io = |error| ExtentError::io("read the stored pin", path, error);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let mut beginning = Vec::with_capacity(record::HEAD_LEN_MAX);
    let mut file = io::Read::take(file, record::HEAD_LEN_MAX as u64);
    io::Read::read_to_end(&mut file, &mut beginning).map_err(io)?;
    match record::parse_head(&beginning) {
        Some(head) => {
            head.map(Some).map_err(|problem| ExtentError::State { path: path.to_path_buf(), problem })
        }
        None => Ok(read_record(path)?.map(RecordHead::from)),
    }
}

/// Reads a record, and proves that it is whole.
pub(super) fn read_record(path: &Path) -> Result<Option<StoredPin>, ExtentError> {
    let state = |problem| ExtentError::State { path: path.to_path_buf(), problem };
    let io = |error| ExtentError::io("read the stored pin", path, error);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    if file.metadata().map_err(io)?.len() > RECORD_LEN_MAX {
        return Err(state(StateProblem::TooLarge { limit: RECORD_LEN_MAX }));
    }
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, RECORD_LEN_MAX), &mut bytes).map_err(io)?;
    record::parse(&bytes).map(Some).map_err(state)
}

/// Held for the moment in which pins are made, adopted or released.
#[derive(Debug)]
pub(super) struct StateLock {
    _file: Locked,
}

/// Held as long as a pin is.
#[derive(Debug)]
pub(super) struct PinLock {
    _file: Locked,
    path: PathBuf,
}

impl PinLock {
    /// Drops the lock and its file. To be called under the [`StateLock`], so that nobody waits for the old file.
    pub(super) fn remove(self, _under: &StateLock) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a lock file");
        }
    }
}
