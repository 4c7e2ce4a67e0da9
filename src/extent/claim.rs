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
///
/// `/proc/locks` names who took the lock, who may be gone and have left it to a child: so those count who have it now.
fn claimant(inode: u64, device: DeviceNumber, key: &str, own: &Path) -> Option<Claimant> {
    let processes = numbers_in(Path::new("/proc"));
    let claimants: Vec<_> = processes
        .filter(|pid| has_locked(*pid, inode, device))
        .filter_map(|pid| {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let state_dir = state_dir_of(pid, key, own).ok()?;
            Some(Claimant { pid, command: command.trim().to_owned(), state_dir })
        })
        .collect();
    claimants.iter().find(|by| by.state_dir.is_some()).or_else(|| claimants.first()).cloned()
}

/// The names in a directory that are numbers.
fn numbers_in(directory: &Path) -> impl Iterator<Item = u32> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Whether a process has a descriptor by which this inode is locked.
fn has_locked(pid: u32, inode: u64, device: DeviceNumber) -> bool {
    let directory = format!("/proc/{pid}/fdinfo");
    numbers_in(Path::new(&directory)).any(|fd| {
        let info = fs::read_to_string(format!("{directory}/{fd}")).unwrap_or_default();
        let mut locks = info.lines().filter_map(|line| line.strip_prefix("lock:"));
        locks.any(|lock| is_flock_on(lock, inode, device))
    })
}

/// Whether a lock is an flock on this inode, as `proc_pid_fdinfo(5)` tells of it:
/// `1: FLOCK  ADVISORY  WRITE 4711 08:01:131 0 EOF`, the device in hexadecimal.
fn is_flock_on(lock: &str, inode: u64, device: DeviceNumber) -> bool {
    let mut words = lock.split_ascii_whitespace().skip(1);
    let place = format!("{:02x}:{:02x}:{inode}", device.major, device.minor);
    words.next() == Some("FLOCK") && words.nth(3) == Some(place.as_str())
}

/// The state directory in which a process has the lock of the file with this key open. None of a process that could pin
/// nothing, whatever it has open.
fn state_dir_of(pid: u32, key: &str, own: &Path) -> io::Result<Option<PathBuf>> {
    if !may_pin(pid)? {
        return Ok(None);
    }
    // Who has lost the directory has the file all the same.
    let names = [format!("{key}.lock"), format!("{key}.lock (deleted)")];
    let is_lock =
        |path: &PathBuf| path.file_name().is_some_and(|found| names.iter().any(|name| found == &**name));
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    let mut places = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()).filter(is_lock);
    Ok(places.find_map(|path| path.parent().filter(|place| *place != own).map(Path::to_path_buf)))
}

/// Whether a process has what pinning takes, `CAP_SYS_ADMIN`: and that not in a user namespace of its own, where it is worth
/// nothing to the guards.
fn may_pin(pid: u32) -> io::Result<bool> {
    const SYS_ADMIN: u64 = 1 << 21;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or_default();
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user"));
    Ok(effective & SYS_ADMIN != 0 && namespace(&pid.to_string())? == namespace("self")?)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::{Command, Stdio};

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
    fn a_lock_that_a_process_which_is_gone_left_to_another_is_that_of_the_other() {
        let named = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).expect("room");
        // The shell has the descriptor that `flock` locked, and `flock` has ended.
        let script = "exec 9<\"$1\" && flock -x 9 && echo locked && read -r end";
        let mut shell = Command::new("sh");
        shell.args(["-c", script, "sh"]).arg(named.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = shell.spawn().expect("a shell");
        let mut told = [0; 7];
        shell.stdout.take().expect("a pipe").read_exact(&mut told).expect("it is locked");
        let file = Arc::new(File::open(named.path()).expect("ours"));
        let error = Claim::lay(&file, named.path(), "key", Path::new("/own")).expect_err("it is locked");
        let ExtentError::HeldElsewhere { by: Some(by), .. } = &error else { panic!("{error:?}") };
        assert_eq!((by.pid, &by.state_dir), (shell.id(), &None), "{error}");
        let undo = Claim::lay_to_undo(&file, named.path(), "key", Path::new("/own"));
        assert!(undo.expect("it is no fastice").is_none());
        drop(shell.stdin.take());
        shell.wait().expect("it ends");
        Claim::lay(&file, named.path(), "key", Path::new("/own")).expect("it was let go");
    }

    #[test]
    fn only_locks_of_this_kind_on_this_inode_count() {
        let device = DeviceNumber { major: 8, minor: 17 };
        let held = "\t5: FLOCK  ADVISORY  WRITE 4711 08:11:131 0 EOF";
        assert!(is_flock_on(held, 131, device));
        assert!(!is_flock_on(held, 13, device));
        assert!(!is_flock_on(held, 131, DeviceNumber { major: 8, minor: 1 }));
        for other in [
            "\t5: LEASE  ACTIVE    READ 4711 08:11:131 0 EOF",
            "\t5: OFDLCK ADVISORY  WRITE -1 08:11:131 0 EOF",
            "\t5: FLOCK",
            "",
        ] {
            assert!(!is_flock_on(other, 131, device), "{other}");
        }
    }
}
