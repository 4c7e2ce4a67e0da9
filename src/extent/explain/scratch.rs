//! A directory of scratch files, gone with all that is in it when it is dropped, immutable or not.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::extent::error::ExtentError;
use crate::extent::mode::undo_all;
use crate::extent::survey::open_read;

/// Of one scratch file: some blocks, whatever the block is.
const FILE_LEN: usize = 256 << 10;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A directory that only its owner may enter.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes one in `directory`, whose name begins with `prefix`.
    pub(super) fn in_directory(directory: &Path, prefix: &str) -> Result<Self, ExtentError> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("{prefix}{}-{number}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|source| ExtentError::io("make the scratch directory", &path, source))?;
        Ok(Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a written file of some blocks.
    pub(super) fn file(&self, name: &str) -> Result<PathBuf, ExtentError> {
        let path = self.path.join(name);
        let written = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(&vec![0x5a; FILE_LEN]).and_then(|()| file.sync_all()));
        written.map_err(|source| ExtentError::io("write the scratch file", &path, source))?;
        Ok(path)
    }

    /// Removes all files.
    pub(super) fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if path.is_dir() {
                continue;
            }
            if fs::remove_file(&path).is_err() {
                // A pin that went wrong has left its flag, or its swap area.
                if let Ok(file) = open_read(&path) {
                    undo_all(&file, &path).map_err(io::Error::other)?;
                }
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = self.clear().and_then(|()| fs::remove_dir_all(&self.path)) {
            let path = self.path.display();
            tracing::error!(%path, %error, "cannot remove a scratch directory: `chattr -i` what is in it, then remove it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_files_go_with_their_directory() {
        let place = tempfile::tempdir().expect("a directory");
        let scratch = Scratch::in_directory(place.path(), ".scratch-").expect("a directory");
        let other = Scratch::in_directory(place.path(), ".scratch-").expect("another one");
        let file = scratch.file("file").expect("room");
        assert_eq!(fs::metadata(&file).expect("it is there").len(), FILE_LEN as u64);
        assert!(scratch.file("file").is_err(), "never over what is there");
        drop(scratch);
        assert!(!file.exists() && other.path().exists());
        drop(other);
        assert_eq!(fs::read_dir(place.path()).expect("a directory").count(), 0);
        assert!(Scratch::in_directory(&place.path().join("missing"), "x").is_err());
    }
}
