//! `fastice pins`: the recorded pins, and what has become of them.

use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use serde::Serialize;

use super::StateDirArg;
use super::exit::{Exit, Outcome};
use super::files::{is_denied, named_state, resolved};
use super::out::{JsonFlag, Out, time_of};
use super::served::{Served, served_with};
use crate::config::format_size;
use crate::extent::{
    ExtentError, GuardMode, LocalReaders, Owner, PinEvent, StateDir, StateProblem, StoredIncident, StoredPin,
    Timeline, VerifyReport, is_mounted, verify_stored,
};

/// List the recorded pins and their states, with what ended their grants
#[derive(Clone, Debug, Args)]
pub struct PinsArgs {
    /// Only these files
    pub files: Vec<PathBuf>,
    /// Also show what became of each pin, step by step, and of the pins of files that are not pinned any more
    #[arg(long)]
    pub events: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub state: StateDirArg,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub json: JsonFlag,
}

/// What has become of a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PinState {
    /// A living process holds every guard.
    Guarded,
    /// No process: the immutable flag, and what the guard mode adds to it, keep the map, which is the recorded one.
    Immutable,
    /// No process: the read-only filesystem keeps the map, which is the recorded one.
    ReadOnly,
    /// The map is the recorded one, but a guard is gone: the immutable flag was cleared, or the swap area ended.
    Unguarded,
    /// The living map is not the recorded one.
    Changed,
    /// The filesystem of the recorded path is not mounted.
    Unmounted,
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
            Self::ReadOnly => "read-only",
            Self::Unguarded => "unguarded",
            Self::Changed => "changed",
            Self::Unmounted => "unmounted",
            Self::Missing => "missing",
            Self::Replaced => "replaced",
            Self::Incomplete => "incomplete",
            Self::Unknown => "unknown",
        }
    }
}

/// A file that is asked for.
struct WantedFile {
    path: PathBuf,
    /// Those of its records, by what is at the path now; none when nothing is.
    keys: Vec<String>,
}

impl WantedFile {
    fn of(path: &Path, state: Option<&StateDir>) -> Result<Self, ExtentError> {
        let path = resolved(path);
        let keys = state.map_or(Ok(Vec::new()), |state| state.keys_at(&path))?;
        Ok(Self { path, keys })
    }
}

/// What became of the pins of a file that is not pinned now, as `--json` prints it.
#[derive(Serialize)]
struct Past {
    #[serde(skip)]
    key: String,
    /// Where it was last.
    path: Option<String>,
    events: Vec<PinEvent>,
}

impl Past {
    /// Whether it is the file, or ever was at its path.
    fn is_of(&self, wanted: &WantedFile) -> bool {
        wanted.keys.contains(&self.key)
            || self.events.iter().any(|event| event.path.as_ref() == Some(&wanted.path))
    }
}

/// One recorded pin, as `--json` prints it.
#[derive(Serialize)]
pub(super) struct PinRow {
    #[serde(skip)]
    key: Option<String>,
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
    /// Which guards hold it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) guard: Option<GuardMode>,
    /// Whether local processes may read it while it is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) local_readers: Option<LocalReaders>,
    pub(super) extents: usize,
    /// What the target that serves it says; null when nobody does.
    pub(super) served: Option<Served>,
    /// For what its last grant was ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) incident: Option<StoredIncident>,
    /// With `--events`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) events: Vec<PinEvent>,
}

/// Lists them.
///
/// # Errors
/// When the state directory cannot be read.
pub fn run(args: &PinsArgs) -> Outcome {
    let state = named_state(&args.state.state_dir)?;
    let wanted = args.files.iter().map(|path| WantedFile::of(path, state.as_ref()));
    let wanted = wanted.collect::<Result<Vec<_>, ExtentError>>()?;
    let (rows, past) = match &state {
        Some(state) => {
            let served = served_with(state.path());
            let mut rows = rows_with(state, args.events, &served)?;
            let mut past = if args.events || !wanted.is_empty() { past(state, &rows)? } else { Vec::new() };
            let is_asked_for =
                |is_it: &dyn Fn(&WantedFile) -> bool| wanted.is_empty() || wanted.iter().any(is_it);
            rows.retain(|row| is_asked_for(&|wanted| row.is_of(wanted)));
            past.retain(|past| is_asked_for(&|wanted| past.is_of(wanted)));
            (rows, past)
        }
        None => (Vec::new(), Vec::new()),
    };
    let is_unknown = |wanted: &&WantedFile| {
        !rows.iter().any(|row| row.is_of(wanted)) && !past.iter().any(|past| past.is_of(wanted))
    };
    let mut out = Out::stdout();
    if args.json.json {
        let past: &[Past] = if args.events { &past } else { &[] };
        out.json(&serde_json::json!({ "pins": rows, "not_pinned": past }))?;
    } else {
        if rows.is_empty() && wanted.is_empty() {
            out.line(format!("no pins in {}", args.state.state_dir.display()))?;
        }
        tell(&rows, &mut out)?;
        past.iter().try_for_each(|past| tell_past(past, args.events, &mut out))?;
    }
    out.flush()?;
    match wanted.iter().find(is_unknown) {
        None => Ok(Exit::Ok),
        Some(WantedFile { path, .. }) => {
            Err(ExtentError::State { path: path.clone(), problem: StateProblem::Missing }.into())
        }
    }
}

/// What became of the pins of files that are not among `rows`.
fn past(state: &StateDir, rows: &[PinRow]) -> Result<Vec<Past>, ExtentError> {
    let is_past = |timeline: &Timeline| !rows.iter().any(|row| row.key.as_ref() == Some(&timeline.key));
    let past = |timeline: Timeline| Past {
        key: timeline.key,
        path: timeline.path.map(|path| path.display().to_string()),
        events: timeline.events,
    };
    Ok(state.timelines()?.into_iter().filter(is_past).map(past).collect())
}

fn tell(rows: &[PinRow], out: &mut Out) -> io::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let cells = |row: &PinRow| {
        [
            row.state.word().to_owned(),
            guard_and_readers(row.guard, row.local_readers),
            row.generation.to_string(),
            row.extents.to_string(),
            format_size(row.size_bytes),
            row.path.clone().unwrap_or_else(|| "?".to_owned()),
            row.detail.clone(),
        ]
    };
    let table: Vec<_> = rows.iter().map(cells).collect();
    out.table(["state", "guard", "generation ", "extents ", "size ", "file", ""], &table)?;
    rows.iter().try_for_each(|row| tell_more(row, out))
}

/// Of a file that is not pinned: that it is not, and what became of its pins.
fn tell_past(past: &Past, events: bool, out: &mut Out) -> io::Result<()> {
    let path = past.path.as_deref().unwrap_or("a file whose path is not known any more");
    if !events {
        return out.line(format!("{path}: not pinned now; --events shows what became of its pins"));
    }
    out.line(format!("\n{path}: not pinned now; what became of its pins:"))?;
    tell_events(&past.events, out)
}

/// The guard, and whether readers are let in, in one cell.
pub(super) fn guard_and_readers(guard: Option<GuardMode>, readers: Option<LocalReaders>) -> String {
    match (guard, readers) {
        (None, _) => "-".to_owned(),
        (Some(guard), Some(LocalReaders::Allow)) => format!("{guard}, readers let in"),
        (Some(guard), _) => guard.to_string(),
    }
}

/// What is wrong with a pin, and what became of it.
fn tell_more(row: &PinRow, out: &mut Out) -> io::Result<()> {
    let path = row.path.as_deref().unwrap_or("?");
    match &row.served {
        Some(served) => {
            out.line(format!("\n{path}"))?;
            served.lines().iter().try_for_each(|line| out.line(format!("    {line}")))?;
        }
        None if row.path.is_some() => out.line(format!("\n{path}: {}", row.not_served()))?,
        None => {}
    }
    if let Some(incident) = &row.incident {
        out.line(format!("\n{path}: its grant ended at {}: {}", time_of(incident.at_ms), incident.reason))?;
        if !incident.detail.is_empty() {
            out.line(format!("    {}", incident.detail))?;
        }
        for block in &incident.blocks {
            let place =
                |at: Option<u64>| at.map_or_else(|| "nowhere".to_owned(), |at| format!("device byte {at}"));
            let (was, is) = (place(block.frozen), place(block.living));
            let flags = block.flags.as_ref().map(|flags| format!(" ({flags})")).unwrap_or_default();
            let (offset, len) = (block.file_offset, block.len);
            out.line(format!("    file byte {offset}, {len} bytes: was at {was}, is at {is}{flags}"))?;
        }
    }
    if !row.events.is_empty() {
        out.line(format!("\n{path}"))?;
    }
    tell_events(&row.events, out)
}

fn tell_events(events: &[PinEvent], out: &mut Out) -> io::Result<()> {
    for event in events {
        let (at, generation, step) = (time_of(event.at_ms), event.generation, event.step);
        let detail = if event.detail.is_empty() { String::new() } else { format!(", {}", event.detail) };
        out.line(format!("    {at}  generation {generation}  {step}{detail}"))?;
    }
    Ok(())
}

/// Every record with the state of its file.
pub(super) fn rows(state: &StateDir) -> Result<Vec<PinRow>, ExtentError> {
    rows_with(state, false, &[])
}

fn rows_with(state: &StateDir, events: bool, served: &[Served]) -> Result<Vec<PinRow>, ExtentError> {
    let mut records = state.records()?;
    // What this user may not read says nothing, neither of the pin nor of who holds it.
    if let Some(denied) = records.iter().position(|record| record.as_ref().is_err_and(is_denied)) {
        return records.swap_remove(denied).map(|_| Vec::new());
    }
    Ok(records.into_iter().map(|record| row(state, record, events, served)).collect())
}

fn row(state: &StateDir, record: Result<StoredPin, ExtentError>, events: bool, served: &[Served]) -> PinRow {
    let pin = match record {
        Ok(pin) => pin,
        Err(error) => {
            let key = record_key(&error);
            let told = key.as_ref().and_then(|key| state.events(key).ok()).unwrap_or_default();
            let path = told.iter().rev().find_map(|event| event.path.as_ref());
            return PinRow {
                path: path.map(|path| path.display().to_string()),
                key,
                state: PinState::Unknown,
                detail: with_source(&error),
                pid: None,
                kept: false,
                rebooted: false,
                generation: 0,
                size_bytes: 0,
                guard: None,
                local_readers: None,
                extents: 0,
                served: None,
                incident: None,
                events: if events { told } else { Vec::new() },
            };
        }
    };
    let key = pin.identity.key();
    let holder = state.holder(&key).ok().flatten();
    let (word, detail) = judge(&pin, holder.as_ref());
    // What cannot be read of these is no reason to show nothing.
    let incident = state.incident(&key).ok().flatten();
    let events = if events { state.events(&key).unwrap_or_default() } else { Vec::new() };
    PinRow {
        path: Some(pin.path().display().to_string()),
        key: Some(key),
        state: word,
        detail,
        pid: holder.map(|owner| owner.pid),
        kept: pin.kept,
        rebooted: pin.owner.boot_id != Owner::this_process().boot_id,
        generation: pin.generation,
        size_bytes: pin.identity.size.get(),
        guard: Some(pin.guard),
        local_readers: Some(pin.local_readers),
        extents: pin.map.as_ref().map_or(0, |map| map.extents.len()),
        served: Served::of(served, pin.path()).cloned(),
        incident,
        events,
    }
}

impl PinRow {
    /// What is known of who serves it, when no target with this state directory says that it does. One that holds it may have no time to
    /// answer, and a file that cannot be looked at may be served with another state directory.
    fn not_served(&self) -> String {
        let silence = "no target with this state directory says that it serves it";
        match (self.pid, self.state) {
            (Some(pid), _) => format!("process {pid} holds it, but {silence}"),
            (None, PinState::Unknown) => silence.to_owned(),
            (None, _) => "nobody serves it".to_owned(),
        }
    }

    /// Whether it is the pin of the file, by whatever path that is reached, or of one that was at its path.
    fn is_of(&self, wanted: &WantedFile) -> bool {
        self.key.as_ref().is_some_and(|key| wanted.keys.contains(key))
            || self.path.as_deref().is_some_and(|known| Path::new(known) == wanted.path)
    }
}

/// The key of a record that cannot be used: what became of its file says where that was.
fn record_key(error: &ExtentError) -> Option<String> {
    match error {
        ExtentError::State { path, .. } | ExtentError::Io { path, .. } => {
            path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned)
        }
        _ => None,
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
        Err(ExtentError::State { problem: StateProblem::FileGone, .. }) => {
            (PinState::Missing, "no file at this path: unpin --force forgets it".to_owned())
        }
        Err(ExtentError::State { problem: StateProblem::NotMounted, .. }) => (
            PinState::Unmounted,
            "its filesystem is not mounted: nothing is known of its map before it is".to_owned(),
        ),
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
        _ if !is_mounted(pin) => (PinState::Guarded, format!("{by}, its filesystem is not mounted there")),
        Ok(stat) if stat.stx_ino != pin.identity.inode => {
            (PinState::Replaced, format!("held {by}, but another file is at this path"))
        }
        Ok(stat) if pin.guard.sets_flag() && !stat.stx_attributes.contains(StatxAttributes::IMMUTABLE) => {
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
            |difference| format!("first difference: {difference}"),
        );
        return (PinState::Changed, first);
    }
    if report.is_held() {
        let why = if pin.kept { "kept until unpinned" } else { "left by a run that did not end in order" };
        (if report.guard.sets_flag() { PinState::Immutable } else { PinState::ReadOnly }, why.to_owned())
    } else {
        let gone = if report.guard_holds {
            "the immutable flag is gone: pin it again, or unpin it".to_owned()
        } else {
            report.guard.gone().to_owned()
        };
        (PinState::Unguarded, gone)
    }
}

fn with_source(error: &ExtentError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}
