//! Small files that survive a crash whole, and locks that end with their process.
//!
//! A file is replaced by writing a new one, fsync, rename, fsync of the directory: a crash leaves the old content or
//! the new, never a part. Callers say what the files mean; nothing here does.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// Writes `path` anew, so that a crash leaves the old content or the new. The file is for its owner only.
///
/// # Errors
/// When it cannot be written; unless only the last sync failed, the old content is then still there.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    Staged::write(path, write)?.commit()
}

/// A new content of a file, durable beside the old one. Dropped, it is gone.
#[derive(Debug)]
pub(crate) struct Staged {
    temporary: PathBuf,
    path: PathBuf,
}

impl Staged {
    /// Writes it.
    ///
    /// # Errors
    /// When it cannot be written; nothing of it is left then.
    pub(crate) fn write(
        path: &Path,
        write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        let staged = Self { temporary: PathBuf::from(temporary), path: path.to_path_buf() };
        let mut new = OpenOptions::new();
        let file = new.write(true).create(true).truncate(true).mode(0o600).open(&staged.temporary)?;
        let mut writer = BufWriter::with_capacity(1 << 18, file);
        write(&mut writer)?;
        writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        Ok(staged)
    }

    /// Puts it in the place of the old content.
    ///
    /// # Errors
    /// Unless only the last sync failed, the old content is then still there.
    pub(crate) fn commit(mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.path)?;
        // From here on the name may be that of somebody else's new content.
        self.temporary = PathBuf::new();
        sync_parent(&self.path)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.temporary.as_os_str().is_empty() {
            // What cannot be removed is overwritten by the next one.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Removes a file, durably. One that is not there is as good as removed.
///
/// # Errors
/// When it cannot be removed, or its directory not be synced.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_parent(path),
    }
}

/// Makes the names in the directory of `path` durable.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// Opens a lock file, and makes it when it is missing.
///
/// # Errors
/// When that is not allowed.
pub(crate) fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// A locked file. Dropped, it is unlocked at once, and not only when the last copy of the descriptor is closed, which
/// a child that is just being started may have for a moment longer.
#[derive(Debug)]
pub(crate) struct Locked(pub(crate) File);

impl Drop for Locked {
    fn drop(&mut self) {
        if let Err(error) = rustix::fs::flock(&self.0, FlockOperation::Unlock) {
            tracing::warn!(%error, "cannot unlock a file of the state directory");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_content_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("record");
        replace(&path, |file| file.write_all(b"old")).expect("written");
        let failed = replace(&path, |file| {
            file.write_all(b"new")?;
            Err(io::Error::other("the disk is full"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).expect("a file"), b"old");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
        replace(&path, |file| file.write_all(b"new")).expect("written");
        assert_eq!(fs::read(&path).expect("a file"), b"new");
        remove(&path).expect("removed");
        remove(&path).expect("as good as removed");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }
}
