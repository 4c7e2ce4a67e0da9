//! `fastice pins`: the recorded pins, and what has become of them.

use std::io;

use clap::Args;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use serde::Serialize;

use super::StateDirArg;
use super::exit::{Exit, Outcome};
use super::files::existing_state;
use super::out::{JsonFlag, Out};
use crate::config::format_size;
use crate::extent::{ExtentError, Owner, StateDir, StateProblem, StoredPin, VerifyReport, verify_stored};

/// List the recorded pins and their states
#[derive(Clone, Debug, Args)]
#[expect(missing_docs, reason = "clap would show the documentation of what is flattened")]
pub struct PinsArgs {
    #[command(flatten)]
    pub state: StateDirArg,
    #[command(flatten)]
    pub json: JsonFlag,
}

/// What has become of a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PinState {
    /// A living process holds every guard.
    Guarded,
    /// No process: the immutable flag keeps the map, which is the recorded one.
    Immutable,
    /// The map is the recorded one, but nothing keeps it: the immutable flag was cleared.
    Unguarded,
    /// The living map is not the recorded one.
    Changed,
    /// Nothing is at the recorded path.
    Missing,
    /// Another file is at the recorded path.
    Replaced,
    /// The pinning process died before the map was frozen.
    Incomplete,
    /// The record cannot be read, or the file cannot be looked at.
    Unknown,
}

impl PinState {
    /// The word that tables and `--json` use.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Guarded => "guarded",
            Self::Immutable => "immutable",
            Self::Unguarded => "unguarded",
            Self::Changed => "changed",
            Self::Missing => "missing",
            Self::Replaced => "replaced",
            Self::Incomplete => "incomplete",
            Self::Unknown => "unknown",
        }
    }
}

/// One recorded pin, as `--json` prints it.
#[derive(Serialize)]
pub(super) struct PinRow {
    pub(super) path: Option<String>,
    pub(super) state: PinState,
    pub(super) detail: String,
    /// The process that holds the guards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pid: Option<u32>,
    /// Whether `fastice pin` made it, to last until `fastice unpin`; else it is what a run of `serve` left behind.
    pub(super) kept: bool,
    /// Whether the host was booted since the file was pinned.
    pub(super) rebooted: bool,
    pub(super) generation: u64,
    pub(super) size_bytes: u64,
    pub(super) extents: usize,
}

/// Lists them.
///
/// # Errors
/// When the state directory cannot be read.
pub fn run(args: &PinsArgs) -> Outcome {
    let rows = match existing_state(&args.state.state_dir)? {
        Some(state) => rows(&state)?,
        None => Vec::new(),
    };
    let mut out = Out::stdout();
    if args.json.json {
        out.json(&serde_json::json!({ "pins": rows }))?;
    } else if rows.is_empty() {
        out.line(format!("no pins in {}", args.state.state_dir.display()))?;
    } else {
        let cells = |row: &PinRow| {
            [
                row.state.word().to_owned(),
                row.generation.to_string(),
                row.extents.to_string(),
                format_size(row.size_bytes),
                row.path.clone().unwrap_or_else(|| "?".to_owned()),
                row.detail.clone(),
            ]
        };
        let rows: Vec<_> = rows.iter().map(cells).collect();
        out.table(["state", "generation ", "extents ", "size ", "file", ""], &rows)?;
    }
    out.flush()?;
    Ok(Exit::Ok)
}

/// Every record with the state of its file.
pub(super) fn rows(state: &StateDir) -> Result<Vec<PinRow>, ExtentError> {
    Ok(state.records()?.into_iter().map(|record| row(state, record)).collect())
}

fn row(state: &StateDir, record: Result<StoredPin, ExtentError>) -> PinRow {
    let pin = match record {
        Ok(pin) => pin,
        Err(error) => {
            return PinRow {
                path: None,
                state: PinState::Unknown,
                detail: with_source(&error),
                pid: None,
                kept: false,
                rebooted: false,
                generation: 0,
                size_bytes: 0,
                extents: 0,
            };
        }
    };
    let holder = state.holder(&pin.identity.key()).ok().flatten();
    let (word, detail) = judge(&pin, holder.as_ref());
    PinRow {
        path: Some(pin.path().display().to_string()),
        state: word,
        detail,
        pid: holder.map(|owner| owner.pid),
        kept: pin.kept,
        rebooted: pin.owner.boot_id != Owner::this_process().boot_id,
        generation: pin.generation,
        size_bytes: pin.identity.size.get(),
        extents: pin.map.as_ref().map_or(0, |map| map.extents.len()),
    }
}

fn judge(pin: &StoredPin, holder: Option<&Owner>) -> (PinState, String) {
    if let Some(owner) = holder {
        return judge_held(pin, owner);
    }
    if pin.map.is_none() {
        let text = format!("process {} ended while pinning: unpin it", pin.owner.pid);
        return (PinState::Incomplete, text);
    }
    match verify_stored(pin) {
        Ok(report) => judge_report(pin, &report),
        Err(ExtentError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            (PinState::Missing, "no file at this path: unpin --force forgets it".to_owned())
        }
        Err(ExtentError::State { problem: StateProblem::OtherFile, .. }) => {
            (PinState::Replaced, "another file at this path: unpin --force forgets the old one".to_owned())
        }
        Err(error) => (PinState::Unknown, with_source(&error)),
    }
}

/// A held file cannot be opened, but its name and flag can be looked at: both may have been taken by system calls
/// that open nothing (`file_setattr(2)` of Linux 6.17, then `unlink(2)`).
fn judge_held(pin: &StoredPin, owner: &Owner) -> (PinState, String) {
    let (path, by) = (pin.path(), format!("by process {}", owner.pid));
    if pin.map.is_none() {
        return (PinState::Guarded, by);
    }
    let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::INO);
    match stat {
        Ok(stat) if stat.stx_ino != pin.identity.inode => {
            (PinState::Replaced, format!("held {by}, but another file is at this path"))
        }
        Ok(stat) if !stat.stx_attributes.contains(StatxAttributes::IMMUTABLE) => {
            (PinState::Unguarded, format!("held {by}, but somebody cleared the immutable flag: restart it"))
        }
        Err(rustix::io::Errno::NOENT) => {
            let remedy = "have a host save its data before that process ends";
            (PinState::Missing, format!("held {by}, but its name was removed: {remedy}"))
        }
        Ok(_) | Err(_) => (PinState::Guarded, by),
    }
}

fn judge_report(pin: &StoredPin, report: &VerifyReport) -> (PinState, String) {
    if !report.map_is_true() {
        let first = report.comparison.first.map_or_else(
            || format!("its size is now {} bytes", report.size),
            |difference| format!("first {difference}"),
        );
        return (PinState::Changed, first);
    }
    if report.immutable {
        let why = if pin.kept { "kept until unpinned" } else { "left by a run that did not end in order" };
        (PinState::Immutable, why.to_owned())
    } else {
        (PinState::Unguarded, "the immutable flag is gone: pin it again".to_owned())
    }
}

fn with_source(error: &ExtentError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}
