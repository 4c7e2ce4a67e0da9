//! `fastice map`: where a file lies on its device: drawn, compared, exported.

mod draw;
mod view;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use view::View;
pub(super) use view::hex;

use super::StateDirArg;
use super::exit::{Exit, Failure, Outcome};
use super::files::{is_denied, required_record};
use super::out::{JsonFlag, Out};
use super::served::{Served, served_with};
use crate::config::format_size;
use crate::extent::{
    Comparison, Extent, ExtentError, GuardMode, RawExtent, StateProblem, VerifyReport, verify_stored,
};

/// More extents than this are summarised, unless --all asks for each.
const LISTED_MAX: usize = 32;
const LISTED_FIRST: usize = 16;
const LISTED_LAST: usize = 8;

/// Show, verify or export the extent map of a file
#[derive(Clone, Debug, Args)]
pub struct MapArgs {
    #[command(subcommand)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub command: MapCommand,
}

/// What to do with the map.
#[derive(Clone, Debug, Subcommand)]
pub enum MapCommand {
    /// Draw where the file lies, and say what is in the way of pinning it
    Show(ShowArgs),
    /// Compare the map stored by a pin with the living file; exits with 4 when they differ
    Verify(FileArgs),
    /// Print the map stored by a pin, all of it, as JSON
    Export(ExportArgs),
}

/// Arguments of `map show`.
#[derive(Clone, Debug, Args)]
#[expect(missing_docs, reason = "clap would show the documentation of what is flattened")]
pub struct ShowArgs {
    #[command(flatten)]
    pub file: FileArgs,
    /// List every extent, however many there are
    #[arg(long)]
    pub all: bool,
}

/// Arguments of `map verify`.
#[derive(Clone, Debug, Args)]
#[expect(missing_docs, reason = "clap would show the documentation of what is flattened")]
pub struct FileArgs {
    /// The file
    pub file: PathBuf,
    #[command(flatten)]
    pub state: StateDirArg,
    #[command(flatten)]
    pub json: JsonFlag,
}

/// Arguments of `map export`.
#[derive(Clone, Debug, Args)]
#[expect(missing_docs, reason = "clap would show the documentation of what is flattened")]
pub struct ExportArgs {
    /// The pinned file
    pub file: PathBuf,
    #[command(flatten)]
    pub state: StateDirArg,
}

impl MapArgs {
    /// Whether errors are to be JSON too.
    #[must_use]
    pub fn wants_json(&self) -> bool {
        match &self.command {
            MapCommand::Show(args) => args.file.json.json,
            MapCommand::Verify(args) => args.json.json,
            MapCommand::Export(_) => true,
        }
    }
}

/// Runs `fastice map`.
///
/// # Errors
/// When the file cannot be looked at, has no record where one is needed, or differs from it.
pub fn run(args: &MapArgs) -> Outcome {
    let mut out = Out::stdout();
    let exit = match &args.command {
        MapCommand::Show(args) => show(args, &mut out)?,
        MapCommand::Verify(args) => verify(args, &mut out)?,
        MapCommand::Export(args) => {
            let (_, pin) = required_record(&args.state.state_dir, &args.file)?;
            out.json(&View::stored(&pin).document())?;
            Exit::Ok
        }
    };
    out.flush()?;
    Ok(exit)
}

/// The drawing alone, of records as the filesystem told them; device offsets are those of the filesystem's device.
pub(super) fn picture(records: &[RawExtent], columns: usize, colour: bool) -> Vec<String> {
    let extent = |record: &RawExtent| Extent {
        file_offset: record.file_offset,
        device_offset: record.device_offset,
        len: record.len,
    };
    draw::layout(&records.iter().map(extent).collect::<Vec<_>>(), columns, colour)
}

fn show(args: &ShowArgs, out: &mut Out) -> Outcome {
    let view = View::of(&args.file.file, &args.file.state.state_dir)?;
    if args.file.json.json {
        out.json(&view.document())?;
        return Ok(Exit::Ok);
    }
    for line in view.head() {
        out.line(line)?;
    }
    let extents = &view.extents;
    if extents.is_empty() {
        out.line("no extents: nothing of it lies on the device")?;
    } else {
        out.line("")?;
        for line in draw::layout(extents, out.columns(), out.colour()) {
            out.line(line)?;
        }
        out.line("")?;
        list(&view, args.all, out)?;
    }
    for line in view.verdict() {
        out.line(line)?;
    }
    Ok(Exit::Ok)
}

/// The table of extents: all, or the first and last and how many there are of which size.
fn list(view: &View, all: bool, out: &mut Out) -> std::io::Result<()> {
    let rows = view.rows();
    let head = ["# ", "file offset ", "device offset ", "length ", "flags"];
    if all || rows.len() <= LISTED_MAX {
        return out.table(head, &rows);
    }
    let tail = rows.len().saturating_sub(LISTED_LAST);
    let gap = ["…"; 5].map(str::to_owned);
    let shown: Vec<_> = rows
        .iter()
        .take(LISTED_FIRST)
        .chain(std::iter::once(&gap))
        .chain(rows.iter().skip(tail))
        .cloned()
        .collect();
    out.table(head, &shown)?;
    out.line("")?;
    out.line(format!("{} extents (--all lists each), by size:", rows.len()))?;
    for line in draw::histogram(&view.extents) {
        out.line(line)?;
    }
    Ok(())
}

/// The answer of `map verify`.
#[derive(Serialize)]
struct Verdict {
    path: String,
    generation: u64,
    same: bool,
    immutable: bool,
    guard: GuardMode,
    guard_holds: bool,
    size_bytes: u64,
    frozen_size_bytes: u64,
    differing_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_difference: Option<FirstDifference>,
}

#[derive(Serialize)]
struct FirstDifference {
    file_offset_bytes: u64,
    len_bytes: u64,
    message: String,
}

fn verify(args: &FileArgs, out: &mut Out) -> Outcome {
    let (state, pin) = required_record(&args.state.state_dir, &args.file)?;
    let report = match verify_stored(&pin) {
        Err(error) if is_denied(&error) || is_away(&error) => {
            let all = served_with(&args.state.state_dir);
            return match Served::of(&all, pin.path()) {
                Some(served) => told_by_its_target(pin.path(), served, args.json.json, out),
                None if is_away(&error) => Err(error.into()),
                None => Err(held(&state, &pin, error)),
            };
        }
        other => other?,
    };
    let VerifyReport { comparison: Comparison { first, differing, .. }, .. } = report;
    let verdict = Verdict {
        path: pin.path().display().to_string(),
        generation: pin.generation,
        same: report.map_is_true(),
        immutable: report.immutable,
        guard: report.guard,
        guard_holds: report.guard_holds,
        size_bytes: report.size.get(),
        frozen_size_bytes: pin.identity.size.get(),
        differing_bytes: differing.get(),
        first_difference: first.map(|difference| FirstDifference {
            file_offset_bytes: difference.file_offset.get(),
            len_bytes: difference.len.get(),
            message: difference.to_string(),
        }),
    };
    if args.json.json {
        out.json(&verdict)?;
    } else {
        describe(&verdict, out)?;
    }
    Ok(if verdict.same { Exit::Ok } else { Exit::Differs })
}

/// Whether the file is not where it was pinned. It may be served all the same, as after `umount -l` or a hand-over.
fn is_away(error: &ExtentError) -> bool {
    use StateProblem::{FileGone, NotMounted, OtherFile};
    matches!(error, ExtentError::State { problem: FileGone | NotMounted | OtherFile, .. })
}

/// The word of the target that serves the file: nobody else can open it.
fn told_by_its_target(path: &Path, served: &Served, json: bool, out: &mut Out) -> Outcome {
    let path = path.display();
    if json {
        let same = served.is_live();
        out.json(&serde_json::json!({
            "path": path.to_string(), "generation": served.generation, "same": same, "served": served
        }))?;
    } else {
        out.line(format!("{path}: only the target that serves it can look at it, and says:"))?;
        for line in served.lines() {
            out.line(format!("    {line}"))?;
        }
    }
    Ok(if served.is_live() { Exit::Ok } else { Exit::Differs })
}

/// What keeps the map as it is when no process does.
const fn guarded_by(verdict: &Verdict) -> &'static str {
    let has_flag = verdict.immutable && verdict.guard.sets_flag();
    match (verdict.guard, verdict.guard_holds, has_flag) {
        (GuardMode::SwapFile, true, true) => "the swap area and the immutable flag guard it",
        (GuardMode::SwapFile, true, false) => "the swap area alone guards it",
        (GuardMode::FrozenFilesystem, true, true) => "the frozen filesystem and the immutable flag guard it",
        (GuardMode::FrozenFilesystem, true, false) => "the frozen filesystem alone guards it",
        (GuardMode::ReadOnlyMount, true, _) => "the read-only filesystem alone guards it",
        (_, _, true) => "the immutable flag alone guards it",
        (_, _, false) => "nothing guards it",
    }
}

fn describe(verdict: &Verdict, out: &mut Out) -> std::io::Result<()> {
    let path = &verdict.path;
    if verdict.same {
        let size = format_size(verdict.size_bytes);
        out.line(format!("{path}: every block of {size} lies where generation {} says", verdict.generation))?;
        out.line(format!("{path}: nobody serves it and nobody watches it; {}", guarded_by(verdict)))?;
    }
    if verdict.size_bytes != verdict.frozen_size_bytes {
        let (now, then) = (verdict.size_bytes, verdict.frozen_size_bytes);
        out.line(format!("{path}: DIFFERS: has {now} bytes, had {then} when it was pinned"))?;
    }
    if let Some(first) = &verdict.first_difference {
        let differing = format_size(verdict.differing_bytes);
        out.line(format!("{path}: DIFFERS in {differing}, first: {}", first.message))?;
    }
    if !verdict.immutable && verdict.guard.sets_flag() {
        out.line(format!("{path}: its immutable flag is gone: nothing keeps the map as it is"))?;
    }
    if !verdict.guard_holds {
        out.line(format!("{path}: {}", verdict.guard.gone()))?;
    }
    Ok(())
}

/// Why a file cannot be verified from outside: who holds its pin opens it for nobody.
fn held(state: &crate::extent::StateDir, pin: &crate::extent::StoredPin, error: ExtentError) -> Failure {
    match state.holder(&pin.identity.key()) {
        Ok(Some(owner)) => {
            let path = pin.path().display();
            let text =
                format!("{path} is pinned by {owner}, which lets nobody open it and tells nothing of it");
            let remedy = "that process verifies the map itself; to verify from outside, end it first";
            Failure::new(Exit::Refused, anyhow::Error::new(error).context(text)).with_remedy(remedy)
        }
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_guards_a_map_is_told_for_every_guard() {
        let told = |guard, guard_holds, immutable| {
            guarded_by(&Verdict {
                path: "/srv/a".to_owned(),
                generation: 1,
                same: true,
                immutable,
                guard,
                guard_holds,
                size_bytes: 4096,
                frozen_size_bytes: 4096,
                differing_bytes: 0,
                first_difference: None,
            })
        };
        for guard in GuardMode::ALL {
            let (all, none) = (told(guard, true, true), told(guard, false, false));
            assert_eq!(none, "nothing guards it", "{guard}");
            assert_eq!(all.contains("immutable flag"), guard.sets_flag(), "{guard}: {all}");
            // A flag on a read-only filesystem is somebody else's.
            let flag_alone = told(guard, false, true);
            assert_eq!(flag_alone == "the immutable flag alone guards it", guard.sets_flag(), "{guard}");
        }
        assert_eq!(told(GuardMode::Default, true, false), "nothing guards it", "it has no other");
        for (guard, word) in [
            (GuardMode::SwapFile, "swap area"),
            (GuardMode::ReadOnlyMount, "read-only filesystem"),
            (GuardMode::FrozenFilesystem, "frozen filesystem"),
        ] {
            assert_eq!(told(guard, true, false), format!("the {word} alone guards it"));
            assert!(told(guard, true, true).starts_with(&format!("the {word} ")));
        }
    }
}
