//! `fastice status`: what the targets that run on this host are doing.

use std::io;

use clap::Args;

use super::StateDirArg;
use super::exit::{Exit, Failure, Outcome};
use super::files::named_state;
use super::out::{JsonFlag, Out};
use super::pins::guard_and_readers;
use super::served::{fenced, not_held, recalled};
use crate::config::{DeviceWay, format_size};
use crate::control::{CoreStatus, ExportStatus, LatencyStatus, Status, ask_all};
use crate::stage::Stage;

/// Show the running targets: exports, hosts, how their files are watched, how long fences took
#[derive(Clone, Debug, Args)]
#[expect(missing_docs, reason = "clap would show the documentation of what is flattened")]
pub struct StatusArgs {
    #[command(flatten)]
    pub state: StateDirArg,
    #[command(flatten)]
    pub json: JsonFlag,
}

/// Asks and shows.
///
/// # Errors
/// When the state directory does not exist, or a target that runs does not answer.
pub fn run(args: &StatusArgs) -> Outcome {
    // A directory that may not be read is no sign that nothing runs.
    if let Some(state) = named_state(&args.state.state_dir)? {
        state.records_are_readable()?;
    }
    let (targets, silent): (Vec<_>, Vec<_>) =
        ask_all(&args.state.state_dir).into_iter().partition(Result::is_ok);
    let targets: Vec<Status> = targets.into_iter().flatten().collect();
    let silent: Vec<io::Error> = silent.into_iter().filter_map(Result::err).collect();
    let mut out = Out::stdout();
    if args.json.json {
        let errors: Vec<String> = silent.iter().map(ToString::to_string).collect();
        out.json(&serde_json::json!({ "targets": targets, "errors": errors }))?;
    } else if targets.is_empty() && silent.is_empty() {
        out.line(format!("no target runs with the state directory {}", args.state.state_dir.display()))?;
    }
    if !args.json.json {
        for target in &targets {
            tell(target, &mut out)?;
        }
    }
    out.flush()?;
    match silent.first() {
        None => Ok(Exit::Ok),
        Some(first) => Err(silence(first)),
    }
}

/// A target runs and does not say what it does.
pub(super) fn silence(error: &io::Error) -> Failure {
    let (exit, remedy) = match error.kind() {
        io::ErrorKind::PermissionDenied => (Exit::Permission, "run as root, or as the user that it runs as"),
        io::ErrorKind::TimedOut | io::ErrorKind::ConnectionRefused => (
            Exit::Unreachable,
            "it hangs, is stopped, or is draining: look into its log, and at its state in `ps`",
        ),
        _ => (Exit::Failed, "it may be draining: try again; look into its log"),
    };
    Failure::new(exit, anyhow::anyhow!("a target does not answer: {error}")).with_remedy(remedy)
}

fn tell(target: &Status, out: &mut Out) -> io::Result<()> {
    let Status { version, pid, uptime_s, addresses, fences, .. } = target;
    out.line(format!("process {pid}, fastice {version}, up {uptime_s} s, at {}", addresses.join(", ")))?;
    let rows: Vec<_> = target.exports.iter().map(cells).collect();
    out.table(
        ["grant", "nsid ", "generation ", "extents ", "guard", "on fence", "looked at", "file", "subsystem"],
        &rows,
    )?;
    target.exports.iter().try_for_each(|export| tell_more(export, out))?;
    if !target.hosts.is_empty() {
        let cells = |host: &crate::control::HostStatus| {
            [
                host.cntlid.to_string(),
                host.io_queues.to_string(),
                host.commands.to_string(),
                format_size(host.read_bytes),
                format_size(host.written_bytes),
                host.host.clone(),
            ]
        };
        let rows: Vec<_> = target.hosts.iter().map(cells).collect();
        out.line("")?;
        out.table(["controller", "queues ", "commands ", "read ", "written ", "host"], &rows)?;
    }
    latencies(&target.latencies, out)?;
    cores(&target.cores, out)?;
    if fences.count > 0 {
        out.line(format!(
            "\n{} fence(s), {} cleared, {} not drained in time; drained after {} us (median), {} us (p99), {} us (worst) \
             from when the cause was noticed",
            fences.count,
            fences.cleared,
            fences.not_drained,
            fences.drained_p50_us,
            fences.drained_p99_us,
            fences.drained_max_us
        ))?;
        let since = &fences.since_change;
        if since.count > 0 {
            out.line(format!(
                "{} of which the change time of the inode tells: drained after {} us (median), {} us (p99), {} us (worst) \
                 from the change",
                since.count, since.p50_us, since.p99_us, since.max_us
            ))?;
        }
    }
    Ok(())
}

/// How long commands took since the target runs, and how long in half of them each stage.
fn latencies(all: &[LatencyStatus], out: &mut Out) -> io::Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    let rows: Vec<_> = all.iter().map(latency_cells).collect();
    out.line("\ncommands: median, 99 of 100, and the median of each stage, in microseconds")?;
    out.table(
        [
            "nsid ",
            "commands ",
            "p50 ",
            "p99 ",
            "receive ",
            "parse ",
            "lookup ",
            "queue ",
            "device ",
            "send ",
            "host",
            "subsystem",
        ],
        &rows,
    )
}

fn latency_cells(latency: &LatencyStatus) -> [String; 12] {
    let LatencyStatus { subsystem, nsid, host, total, stages } = latency;
    let others = || "(others)".to_owned();
    let stage =
        |stage: Stage| stages.get(stage.word()).map_or_else(|| "-".to_owned(), |times| us(times.p50_ns));
    let [receive, parse, lookup, queue, device, send] = Stage::ALL.map(stage);
    [
        nsid.map_or_else(|| "-".to_owned(), |nsid| nsid.to_string()),
        total.count.to_string(),
        us(total.p50_ns),
        us(total.p99_ns),
        receive,
        parse,
        lookup,
        queue,
        device,
        send,
        host.clone().unwrap_or_else(others),
        subsystem.clone().unwrap_or_else(others),
    ]
}

/// Nanoseconds as microseconds with a digit behind the point.
pub(super) fn us(ns: u64) -> String {
    format!("{}.{}", ns / 1000, ns % 1000 / 100)
}

fn cores(all: &[CoreStatus], out: &mut Out) -> io::Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    let cells = |core: &CoreStatus| {
        let all_us = core.busy_us.saturating_add(core.polling_us).saturating_add(core.asleep_us).max(1);
        let share = |us: u64| format!("{} %", us.saturating_mul(100) / all_us);
        let sleeps = core.wakes.values().fold(0_u64, |sum, count| sum.saturating_add(*count));
        [
            core.cpu.to_string(),
            core.connections.to_string(),
            core.commands.to_string(),
            format_size(core.buffer_bytes.try_into().unwrap_or(u64::MAX)),
            share(core.busy_us),
            share(core.polling_us),
            share(core.asleep_us),
            sleeps.to_string(),
        ]
    };
    let rows: Vec<_> = all.iter().map(cells).collect();
    out.line("")?;
    let head =
        ["core ", "connections ", "on devices ", "buffers ", "busy ", "polling ", "asleep ", "sleeps "];
    out.table(head, &rows)
}

/// Of an export that is fenced, or was: since when, why, and what holds the file now.
fn tell_more(export: &ExportStatus, out: &mut Out) -> io::Result<()> {
    let mut lines: Vec<String> =
        fenced(export.fenced_since_ms, export.reason.as_deref()).into_iter().collect();
    lines.extend(recalled(export.recalls.as_ref()));
    lines.extend(not_held(export.problem.as_deref()));
    if lines.is_empty() {
        return Ok(());
    }
    let name = export.path.as_ref().map_or_else(
        || format!("namespace {} of {}", export.nsid, export.subsystem),
        |path| path.display().to_string(),
    );
    out.line(format!("\n{name}"))?;
    lines.iter().try_for_each(|line| out.line(format!("    {line}")))
}

fn cells(export: &ExportStatus) -> [String; 9] {
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let with = || guard_and_readers(export.guard, export.local_readers);
    [
        export.grant.clone(),
        export.nsid.to_string(),
        number(export.generation),
        number(export.extents.and_then(|extents| u64::try_from(extents).ok())),
        export.problem.as_ref().map_or_else(with, |_| "none".to_owned()),
        export.path.as_ref().map_or_else(|| "-".to_owned(), |_| export.on_fence.to_string()),
        looked_at(export),
        export.path.as_ref().map_or_else(|| "-".to_owned(), |path| path.display().to_string()),
        export.subsystem.clone(),
    ]
}

/// When a file was looked at, or why nobody looks.
fn looked_at(export: &ExportStatus) -> String {
    match (&export.watch, export.device) {
        (Some(watch), _) => watched(watch),
        (None, Some(DeviceWay::Unmounted | DeviceWay::HandedOver)) if export.problem.is_none() => {
            "not mounted, nothing to watch".to_owned()
        }
        (None, _) => "-".to_owned(),
    }
}

/// How the watch over a file is doing, in a few words.
pub(super) fn watched(watch: &crate::control::WatchStatus) -> String {
    let crate::control::WatchStatus { last_check_ago_ms, interval_ms, bound_ms, .. } = watch;
    format!("{last_check_ago_ms} ms ago, every {interval_ms} ms, bound {bound_ms} ms")
}
