//! What a pin under way has done, and undoes by itself when a later step fails.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::IFlags;

use super::error::{ExtentError, IMMUTABLE};
use super::facts::is_immutable;
use super::record::StoredPin;
use super::state::StateDir;
use crate::chain::Chain;

/// The record of a pin that is being made. Dropped, it puts back what was there before.
pub(super) struct IntentRecord<'a> {
    state: &'a StateDir,
    key: String,
    previous: Option<StoredPin>,
    armed: bool,
}

impl<'a> IntentRecord<'a> {
    pub(super) fn store(
        state: &'a StateDir,
        intent: &StoredPin,
        previous: Option<StoredPin>,
    ) -> Result<Self, ExtentError> {
        state.store(intent)?;
        Ok(Self { state, key: intent.identity.key(), previous, armed: true })
    }

    pub(super) fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for IntentRecord<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let undone = match &self.previous {
            Some(previous) => self.state.store(previous),
            None => self.state.remove(&self.key),
        };
        if let Err(error) = undone {
            tracing::error!(error = %Chain(&error), "cannot undo the record of a failed pin");
        }
    }
}

/// The immutable flag of a file that is being pinned. Dropped, it is cleared if it was set here.
pub(super) struct ImmutableFlag<'a> {
    file: &'a File,
    path: PathBuf,
    armed: bool,
}

impl<'a> ImmutableFlag<'a> {
    pub(super) fn set(file: &'a File, path: &Path) -> Result<Self, ExtentError> {
        let failed = |problem, source| ExtentError::Guard {
            path: path.to_path_buf(),
            guard: IMMUTABLE,
            problem,
            source,
        };
        if is_immutable(file, path)? {
            return Ok(Self { file, path: path.to_path_buf(), armed: false });
        }
        change_flag(file, true).map_err(|source| failed("cannot be set", Some(source)))?;
        let flag = Self { file, path: path.to_path_buf(), armed: true };
        if is_immutable(file, path)? {
            Ok(flag)
        } else {
            Err(failed("the filesystem does not keep it", None))
        }
    }

    pub(super) fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for ImmutableFlag<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = change_flag(self.file, false)
        {
            tracing::error!(path = %self.path.display(), %error, "cannot clear the immutable flag of a failed pin");
        }
    }
}

/// Sets or clears the immutable flag, and leaves the others.
pub(super) fn change_flag(file: &File, immutable: bool) -> io::Result<()> {
    let mut flags = rustix::fs::ioctl_getflags(file)?;
    flags.set(IFlags::IMMUTABLE, immutable);
    Ok(rustix::fs::ioctl_setflags(file, flags)?)
}
