//! `fastice pin --explain`: what a pin of a file would hold off on this filesystem and kernel; and the hidden command by
//! which another process tries it.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::exit::{Exit, Failure, Outcome};
use super::files::{existing_state, is_denied, record_of};
use super::many::each;
use super::out::Out;
use super::sys::StopSignals;
use crate::config::format_size;
use crate::extent::{
    Finding, GuardMode, LocalReaders, Operation, Outlook, Probe, SharedHole, WatchOptions, WatchPlan,
    attempt, outlook, probe,
};

/// The name of the hidden command.
pub(super) const PROBE: &str = "__probe";

/// Obstacles that are told to people; a sparse file has thousands.
const TOLD_MAX: usize = 10;

/// Try one operation on a file, and print what became of it: for `fastice pin --explain`, on its scratch file
#[derive(Clone, Debug, Args)]
pub struct ProbeArgs {
    /// The operation
    #[arg(value_parser = operation)]
    pub operation: Operation,
    /// The file
    pub file: PathBuf,
}

fn operation(name: &str) -> Result<Operation, String> {
    Operation::from_name(name).ok_or_else(|| "there is no such operation".to_owned())
}

/// Tries it.
///
/// # Errors
/// When standard output cannot be written.
pub(super) fn run_probe(args: &ProbeArgs) -> Outcome {
    let mut out = Out::stdout();
    out.json(&attempt(args.operation, &args.file))?;
    out.flush()?;
    Ok(Exit::Ok)
}

/// One file, as `--json` prints it.
#[derive(Serialize)]
struct Explained {
    path: String,
    kernel: String,
    /// The guards that it is told of.
    guard: GuardMode,
    local_readers: LocalReaders,
    /// `None` when the file cannot be opened, as another process guards it.
    #[serde(flatten)]
    file: Option<FileDocument>,
    can_be_pinned: bool,
    in_the_way: Vec<Obstacle>,
    reflink: Option<bool>,
    shared_hole: SharedHole,
    not_probed: Option<String>,
    operations: Vec<OperationDocument>,
}

#[derive(Serialize)]
struct FileDocument {
    size_bytes: u64,
    extents: usize,
    filesystem: String,
    mount_options: Option<String>,
    watch: Option<WatchDocument>,
}

#[derive(Serialize)]
struct WatchDocument {
    quick_interval_ms: f64,
    interval_ms: f64,
    bound_ms: f64,
    cost_us: f64,
    share: f64,
}

#[derive(Serialize)]
struct Obstacle {
    name: &'static str,
    message: String,
    remedy: String,
}

#[derive(Serialize)]
struct OperationDocument {
    name: &'static str,
    what: &'static str,
    verdict: &'static str,
    probed: bool,
    call: Option<String>,
    errno: Option<i32>,
    by: Option<&'static str>,
    noticed_after_ms: Option<f64>,
    text: String,
}

/// Explains what a pin of each file would do.
///
/// # Errors
/// When there is no terminal to write to; what is wrong with single files is told, and decides the exit status.
pub(super) fn run(
    files: &[PathBuf],
    kind: (GuardMode, LocalReaders),
    state_dir: &Path,
    json: bool,
) -> Outcome {
    // Before any thread starts: Ctrl-C ends the attempts, and the scratch files go all the same.
    let signals = StopSignals::take()?;
    let asked = Cell::new(false);
    let stop = || {
        asked.set(asked.get() || signals.asked().is_some());
        asked.get()
    };
    let mut out = Out::stdout();
    let results = each(files, json, |path| {
        let document = explain(path, kind, state_dir, &stop)?;
        if !json {
            tell(&document, &mut out)?;
            out.flush()?;
        }
        Ok(document)
    });
    if json {
        out.json(&serde_json::json!({ "explained": results.done, "errors": results.errors("path") }))?;
    }
    out.flush()?;
    Ok(if asked.get() { Exit::Failed } else { results.exit() })
}

fn explain(
    path: &Path,
    kind: (GuardMode, LocalReaders),
    state_dir: &Path,
    stop: &dyn Fn() -> bool,
) -> Result<Explained, Failure> {
    let (outlook, in_the_way) = match outlook(path, kind, state_dir) {
        Ok(outlook) => {
            let in_the_way = obstacles(&outlook, kind);
            (Some(outlook), in_the_way)
        }
        Err(error) if is_denied(&error) => match held(path, state_dir)? {
            Some(obstacle) => (None, vec![obstacle]),
            None => return Err(error.into()),
        },
        Err(error) => return Err(error.into()),
    };
    let probed = probe(path, kind, &another_process, stop)?;
    Ok(Explained {
        path: path.display().to_string(),
        guard: kind.0,
        local_readers: kind.1,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        file: outlook.map(describe),
        can_be_pinned: in_the_way.is_empty(),
        in_the_way,
        reflink: probed.reflink,
        shared_hole: probed.shared_hole(),
        operations: operations(&probed),
        not_probed: probed.not_probed,
    })
}

/// This program itself, as it may be the only one that is installed.
fn another_process(operation: Operation, path: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(PROBE).arg(operation.name()).arg(path);
    command
}

/// Every reason why the file cannot be pinned now.
fn obstacles(outlook: &Outlook, (guard, readers): (GuardMode, LocalReaders)) -> Vec<Obstacle> {
    let violations = outlook.survey.violations.iter().map(|violation| Obstacle {
        name: violation.name(),
        message: violation.to_string(),
        remedy: violation.remedy(),
    });
    let holders = outlook.holders.iter().map(|holder| Obstacle {
        name: "in-use",
        message: format!("{holder} has it open"),
        remedy: "end whoever has it open, or have it close the file".to_owned(),
    });
    // With the swap-file guard the kernel refuses what others try through their descriptors.
    // Beside readers only writers are in the way, and who is one is told by the lease.
    let holders = holders.filter(|_| guard != GuardMode::SwapFile && readers == LocalReaders::Refuse);
    let refused = outlook.refused.iter().map(|(message, remedy)| Obstacle {
        name: "guard",
        message: message.clone(),
        remedy: remedy.clone(),
    });
    violations.chain(refused).chain(holders).collect()
}

/// The process that guards the file, and lets nobody open it.
fn held(path: &Path, state_dir: &Path) -> Result<Option<Obstacle>, Failure> {
    let Some(state) = existing_state(state_dir)? else { return Ok(None) };
    let Some(pin) = record_of(&state, path)? else { return Ok(None) };
    let Some(owner) = state.holder(&pin.identity.key())? else { return Ok(None) };
    Ok(Some(Obstacle {
        name: "pinned",
        message: format!("it is pinned by {owner}, which lets nobody open it"),
        remedy: "see `fastice pins`".to_owned(),
    }))
}

fn describe(outlook: Outlook) -> FileDocument {
    FileDocument {
        size_bytes: outlook.survey.facts.size.get(),
        extents: outlook.survey.records.len(),
        filesystem: outlook.survey.facts.filesystem_name,
        mount_options: outlook.mount_options,
        watch: outlook.watch.map(|WatchPlan { quick_interval, interval, bound, cost }| WatchDocument {
            quick_interval_ms: ms(quick_interval),
            interval_ms: ms(interval),
            bound_ms: ms(bound),
            cost_us: ms(cost) * 1e3,
            share: WatchOptions::default().share,
        }),
    }
}

fn operations(probe: &Probe) -> Vec<OperationDocument> {
    let document = |finding: &Finding| OperationDocument {
        name: finding.operation.name(),
        what: finding.operation.what(),
        verdict: finding.verdict.name(),
        probed: finding.probed,
        call: finding.failed.as_ref().map(|failed| failed.call.clone()),
        errno: finding.failed.as_ref().map(|failed| failed.errno),
        by: finding.by,
        noticed_after_ms: finding.noticed_after.map(ms),
        text: finding.text.clone(),
    };
    probe.findings.iter().map(document).collect()
}

/// Milliseconds, to the microsecond.
fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn tell(explained: &Explained, out: &mut Out) -> std::io::Result<()> {
    let Explained { path, kernel, guard, local_readers, file, in_the_way, .. } = explained;
    if let Some(file) = file {
        let (size, count) = (format_size(file.size_bytes), file.extents);
        let options = file.mount_options.as_deref().unwrap_or("options not known");
        out.line(format!(
            "{path}: {size} in {count} extent(s), on {} ({options}), Linux {kernel}",
            file.filesystem
        ))?;
    } else {
        out.line(format!("{path}: cannot be looked at, Linux {kernel}"))?;
    }
    let readers = match local_readers {
        LocalReaders::Refuse => "local readers refused",
        LocalReaders::Allow => {
            "LOCAL READERS LET IN: what the page cache has of the file is as old as its reading (see `fastice help pin`)"
        }
    };
    out.line(format!("  with the {guard} guard, {readers}"))?;
    out.line(if in_the_way.is_empty() { "  can be pinned now" } else { "  cannot be pinned now:" })?;
    for Obstacle { message, remedy, .. } in in_the_way.iter().take(TOLD_MAX) {
        out.line(format!("    {message}: {remedy}"))?;
    }
    if let Some(more @ 1..) = in_the_way.len().checked_sub(TOLD_MAX) {
        out.line(format!("    and {more} more (--json has all)"))?;
    }
    if let Some(watch) = file.as_ref().and_then(|file| file.watch.as_ref()) {
        let WatchDocument { quick_interval_ms, interval_ms, bound_ms, cost_us, share } = watch;
        out.line(format!(
            "  watched alone, with {} % of a processor: inode every {quick_interval_ms:.0} ms, map every \
             {interval_ms:.0} ms (a look takes {cost_us:.0} µs);\n  what only the map shows is noticed within {bound_ms:.0} ms",
            share * 100.0
        ))?;
    }
    out.line(format!("  {}", shared_hole(explained.shared_hole, *guard)))?;
    if let Some(why) = &explained.not_probed {
        out.line(format!("  NOT PROBED, so told as it is known: {why}"))?;
    }
    out.line("")?;
    let row = |operation: &OperationDocument| {
        let probed = if operation.probed { "yes" } else { "not probed" };
        [operation.what, operation.verdict, probed, &how(operation)].map(str::to_owned)
    };
    let rows: Vec<_> = explained.operations.iter().map(row).collect();
    out.table(["what another process tries", "verdict", "seen here", "how"], &rows)
}

const fn shared_hole(hole: SharedHole, guard: GuardMode) -> &'static str {
    match hole {
        SharedHole::None if matches!(guard, GuardMode::ReadOnlyMount) => {
            "no clones: nothing can be made on a read-only filesystem"
        }
        SharedHole::None => "no clones: this filesystem shares no blocks between files",
        SharedHole::Closed => {
            "clones from the file: refused while it is served; the map is watched for SHARED"
        }
        SharedHole::Open => "CLONES FROM THE FILE GO THROUGH: only the watch over the map sees them",
        SharedHole::Unknown => "clones from the file: not probed",
    }
}

/// What was seen of it, in one cell.
fn how(operation: &OperationDocument) -> String {
    let mut parts = Vec::new();
    if let (Some(errno), Some(call)) = (operation.errno, &operation.call) {
        parts.push(format!("{} from {call}", errno_name(errno)));
    }
    if let Some(by) = operation.by {
        parts.push(match operation.noticed_after_ms {
            Some(after) => format!("{by}: after {after:.0} ms"),
            None => by.to_owned(),
        });
    }
    if !operation.text.is_empty() {
        parts.push(operation.text.clone());
    }
    parts.join("; ")
}

fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::EACCES => "EACCES",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::ENOSYS => "ENOSYS",
        libc::EROFS => "EROFS",
        libc::ETXTBSY => "ETXTBSY",
        libc::EBUSY => "EBUSY",
        libc::EAGAIN => "EAGAIN",
        libc::ENOSPC => "ENOSPC",
        libc::ENOENT => "ENOENT",
        _ => return format!("errno {errno}"),
    };
    name.to_owned()
}
