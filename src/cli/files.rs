//! What the commands on files share: how errors of `extent` end a command, and which record is whose.

use std::io;
use std::path::{Path, PathBuf};

use super::exit::{Exit, Failure};
use super::progress::{Progress, Unit};
use crate::config::DEFAULT_STATE_DIR;
use crate::control::open_state;
use crate::extent::{ExtentError, ExtentErrorKind, StateDir, StateProblem, StoredPin};

impl From<ExtentError> for Failure {
    fn from(error: ExtentError) -> Self {
        let remedy = error.remedy();
        Self::new(exit_of(&error), error).with_remedy(remedy)
    }
}

/// The exit status that an error of `extent` ends a command with.
pub(super) fn exit_of(error: &ExtentError) -> Exit {
    let forbidden = |source: &io::Error| source.kind() == io::ErrorKind::PermissionDenied;
    match error {
        ExtentError::Io { source, .. } | ExtentError::Guard { source: Some(source), .. }
            if forbidden(source) =>
        {
            Exit::Permission
        }
        ExtentError::Io { source, .. } if is_missing(source) => Exit::Refused,
        _ => match error.kind() {
            ExtentErrorKind::NotAccepted
            | ExtentErrorKind::InUse
            | ExtentErrorKind::AlreadyPinned
            | ExtentErrorKind::Guard
            | ExtentErrorKind::Map
            | ExtentErrorKind::NoSpace => Exit::Refused,
            ExtentErrorKind::Changed => Exit::Differs,
            _ => Exit::Failed,
        },
    }
}

/// Whether there is nothing at the path.
fn is_missing(source: &io::Error) -> bool {
    matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Whether the system forbade to open the file, as the guard of a pin does.
pub(super) fn is_denied(error: &ExtentError) -> bool {
    matches!(error, ExtentError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
}

/// The state directory when it exists; looking at pins makes no directories.
pub(super) fn existing_state(path: &Path) -> Result<Option<StateDir>, Failure> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(Some(open_state(path)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ExtentError::Io { action: "read", path: path.to_owned(), source }.into()),
    }
}

/// The same, for commands to which a directory that was named, and is not there, is a mistake. `None` when the default one is
/// not there: then nothing was ever pinned on this host.
pub(super) fn named_state(path: &Path) -> Result<Option<StateDir>, Failure> {
    let wrong = |what: &str| {
        let error = anyhow::anyhow!("the state directory {} {what}", path.display());
        let remedy = format!(
            "name with --state-dir, or FASTICE_STATE_DIR, the `state_dir` of the configuration that is served; \
             by default it is {DEFAULT_STATE_DIR}"
        );
        Err(Failure::new(Exit::Usage, error).with_remedy(remedy))
    };
    match std::fs::metadata(path) {
        Ok(meta) if !meta.is_dir() => wrong("is no directory"),
        Err(error) if error.kind() == io::ErrorKind::NotFound && path != Path::new(DEFAULT_STATE_DIR) => {
            wrong("does not exist")
        }
        _ => existing_state(path),
    }
}

/// The path as records have it.
pub(super) fn resolved(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned())
}

/// The record of the file at `path`: see [`StateDir::record_at`].
pub(super) fn record_of(state: &StateDir, path: &Path) -> Result<Option<StoredPin>, ExtentError> {
    state.record_at(&resolved(path))
}

/// The record of the file at `path`; an error with its remedy when there is none.
pub(super) fn required_record(state_dir: &Path, path: &Path) -> Result<(StateDir, StoredPin), Failure> {
    let missing = || ExtentError::State { path: path.to_owned(), problem: StateProblem::Missing };
    let state = named_state(state_dir)?.ok_or_else(missing)?;
    let Some(pin) = record_of(&state, path)? else {
        // One that cannot be read may be that of this file.
        let damaged = state.records()?.into_iter().find_map(Result::err);
        return Err(damaged.unwrap_or_else(missing).into());
    };
    Ok((state, pin))
}

/// Shows the stages of a pin as bars or lines.
pub(super) struct Stages {
    file: String,
    quiet: bool,
    current: Option<(String, Option<Progress>)>,
}

impl Stages {
    /// Of the file at `path`; `quiet` with `--json`.
    pub(super) fn of(path: &Path, quiet: bool) -> Self {
        Self { file: path.display().to_string(), quiet, current: None }
    }
}

impl crate::extent::Progress for Stages {
    fn stage(&mut self, name: &str) {
        self.current = Some((format!("{}: {name}", self.file), None));
    }

    /// A stage without bytes to count is over before anybody could read of it: bars begin with the first count.
    fn advance(&mut self, done: u64, total: u64) {
        let quiet = self.quiet;
        let Some((title, bar)) = &mut self.current else { return };
        bar.get_or_insert_with(|| Progress::start(title.clone(), total, Unit::Bytes, quiet)).set(done);
        if done >= total
            && let Some((_, Some(bar))) = self.current.take()
        {
            bar.finish();
        }
    }
}
