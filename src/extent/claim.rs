//! The claim on a pinned file: that no other fastice has it, whatever state directory that one keeps.
//!
//! ```text
//!   KEY.lock              in the state directory: between processes that share it
//!   flock on the file     between all others, in whatever container or mount namespace they are
//! ```
//!
//! The default guards keep a second one away by themselves: it cannot open the file, nor have the proof by lease. Where local
//! readers are let in, and where a swap area takes the place of the lease, both would get all their guards, and the end of
//! the one would take away those of the other. So everybody who pins a file, or undoes a pin, has it locked meanwhile.
//!
//! The lock belongs to the open file: it ends with the process, however that ends, and stays through everything that becomes of
//! flags, swap areas, freezes and mounts. A file whose filesystem is not mounted is not open; there the device is held
//! exclusively instead (see `unmounted` and `handover`).
//!
//! What it does not do: keep anybody from the file who does not ask for the lock.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::error::{Claimant, ExtentError};
use super::facts::number_of;
use super::find::key_at;
use super::identity::DeviceNumber;

/// How often, and at which distance, the lock is asked for: a process that just ended may have it for some milliseconds.
const ATTEMPTS: u32 = 25;
const PAUSE: Duration = Duration::from_millis(8);

/// Held as long as nobody else may pin the file, or undo a pin of it. Dropped, it is let go at once, and not only when the
/// last copy of the descriptor is closed, which a child that is just being started may have for a moment longer.
#[derive(Debug)]
pub(super) struct Claim(Arc<File>);

impl Claim {
    /// Lays claim on the file with this key. `own` is the state directory of whoever does.
    ///
    /// # Errors
    /// [`ExtentError::HeldElsewhere`]; [`ExtentError::Io`].
    pub(super) fn lay(file: &Arc<File>, path: &Path, key: &str, own: &Path) -> Result<Self, ExtentError> {
        for attempt in 1..=ATTEMPTS {
            match rustix::fs::flock(&**file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(Arc::clone(file))),
                Err(rustix::io::Errno::AGAIN) if attempt < ATTEMPTS => thread::sleep(PAUSE),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(ExtentError::io("lock the pinned file", path, error)),
            }
        }
        let meta = file.metadata().map_err(|error| ExtentError::io("stat", path, error))?;
        let by = claimant(meta.ino(), number_of(meta.dev()), key, own);
        Err(ExtentError::HeldElsewhere { path: path.to_path_buf(), by })
    }

    /// The same for undoing a pin, which a lock of somebody who is seen to be no fastice does not stand in the way of: as long as
    /// that one has it, no fastice pins the file either.
    ///
    /// # Errors
    /// As [`Claim::lay`].
    pub(super) fn lay_to_undo(
        file: &Arc<File>,
        path: &Path,
        key: &str,
        own: &Path,
    ) -> Result<Option<Self>, ExtentError> {
        match Self::lay(file, path, key, own) {
            Err(ExtentError::HeldElsewhere { by: Some(Claimant { state_dir: None, .. }), .. }) => Ok(None),
            claim => claim.map(Some),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Err(error) = rustix::fs::flock(&*self.0, FlockOperation::Unlock) {
            tracing::warn!(%error, "cannot unlock a file that was pinned");
        }
    }
}

/// The error of an open that was denied: who holds the file with another state directory than `own`, if anybody is seen to.
pub(super) fn why_denied(error: ExtentError, own: &Path) -> ExtentError {
    match error {
        ExtentError::Io { source, path, action } if source.kind() == io::ErrorKind::PermissionDenied => {
            match holder_at(&path, own) {
                Some(by) => ExtentError::HeldElsewhere { path, by: Some(by) },
                None => ExtentError::Io { source, path, action },
            }
        }
        error => error,
    }
}

/// Who holds the file at `path` with another state directory than `own`, found without opening it.
fn holder_at(path: &Path, own: &Path) -> Option<Claimant> {
    let meta = fs::metadata(path).ok()?;
    let by = claimant(meta.ino(), number_of(meta.dev()), &key_at(path)?, own)?;
    by.state_dir.is_some().then_some(by)
}

/// Who has locked the inode; if it is a fastice, with which state directory. `None` when this process may not see that.
fn claimant(inode: u64, device: DeviceNumber, key: &str, own: &Path) -> Option<Claimant> {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let pid = locks.lines().find_map(|line| locker(line, inode, device))?;
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
    Some(Claimant { pid, command, state_dir: state_dir_of(pid, key, own).ok()? })
}

/// Whose lock a line of `/proc/locks` tells of, if it is an flock on this inode that is held:
/// `1: FLOCK  ADVISORY  WRITE 4711 08:01:131 0 EOF`, the device in hexadecimal.
fn locker(line: &str, inode: u64, device: DeviceNumber) -> Option<u32> {
    let mut words = line.split_ascii_whitespace().skip(1);
    // One that waits has an arrow here.
    if words.next()? != "FLOCK" {
        return None;
    }
    let pid = words.nth(2)?.parse().ok()?;
    let place = format!("{:02x}:{:02x}:{inode}", device.major, device.minor);
    (words.next()? == place).then_some(pid)
}

/// The state directory in which a process has the lock of the file with this key open.
fn state_dir_of(pid: u32, key: &str, own: &Path) -> io::Result<Option<PathBuf>> {
    let name = format!("{key}.lock");
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    let open = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let mut places = open.filter(|path| path.file_name().is_some_and(|found| found == name.as_str()));
    Ok(places.find_map(|path| path.parent().filter(|place| *place != own).map(Path::to_path_buf)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_locked_a_file_is_named_and_a_claim_ends_when_it_is_dropped() {
        let named = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).expect("room");
        let open = || Arc::new(File::open(named.path()).expect("ours"));
        let (first, second, own) = (open(), open(), Path::new("/own"));
        let claim = Claim::lay(&first, named.path(), "key", own).expect("nobody has it");
        // As a child has one that is just being started.
        let copy = first.try_clone().expect("a descriptor");
        let error = Claim::lay(&second, named.path(), "key", own).expect_err("it is claimed");
        let ExtentError::HeldElsewhere { by: Some(by), .. } = &error else { panic!("{error:?}") };
        assert_eq!((by.pid, &by.state_dir), (std::process::id(), &None), "{error}");
        assert!(error.to_string().contains("locked (flock) by process"), "{error}");
        drop(claim);
        Claim::lay(&second, named.path(), "key", own).expect("it was let go");
        drop(copy);
    }

    #[test]
    fn only_locks_of_this_kind_that_are_held_count() {
        let device = DeviceNumber { major: 8, minor: 17 };
        let held = "5: FLOCK  ADVISORY  WRITE 4711 08:11:131 0 EOF";
        assert_eq!(locker(held, 131, device), Some(4711));
        assert_eq!(locker(held, 13, device), None);
        assert_eq!(locker(held, 131, DeviceNumber { major: 8, minor: 1 }), None);
        for other in [
            "5: -> FLOCK  ADVISORY  WRITE 4711 08:11:131 0 EOF",
            "5: LEASE  ACTIVE    READ 4711 08:11:131 0 EOF",
            "5: OFDLCK ADVISORY  WRITE -1 08:11:131 0 EOF",
            "5: FLOCK",
            "",
        ] {
            assert_eq!(locker(other, 131, device), None, "{other}");
        }
    }
}
