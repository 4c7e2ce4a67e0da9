//! `fastice unpin`: undoes a pin that no process holds.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::StateDirArg;
use super::exit::Outcome;
use super::files::named_state;
use super::many::each;
use super::out::{JsonFlag, Out};
use crate::extent::{ExtentError, GuardMode, StateProblem, UnpinReport, left_behind, unpin};

/// Unpin files: clear the immutable flag that fastice set, end a swap area, remove the record
///
/// A file that is being served cannot be unpinned: end `fastice serve`, or take it out of its configuration.
#[derive(Clone, Debug, Args)]
pub struct UnpinArgs {
    /// The files
    #[arg(required_unless_present = "left_behind")]
    pub files: Vec<PathBuf>,
    /// Unpin all that runs of `fastice serve` left behind which did not end in order; not what `fastice pin` made
    #[arg(long, conflicts_with = "files")]
    pub left_behind: bool,
    /// Also when the map has changed, the file is gone or replaced, or the record is damaged
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub state: StateDirArg,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub json: JsonFlag,
}

/// One unpinned file, as `--json` prints it.
#[derive(Serialize)]
struct Unpinned {
    path: String,
    immutable_cleared: bool,
    swap_ended: bool,
    /// Which guards it had; absent when no record told.
    #[serde(skip_serializing_if = "Option::is_none")]
    guard: Option<GuardMode>,
    /// Whether the map was the recorded one to the end; absent when there was none to compare.
    #[serde(skip_serializing_if = "Option::is_none")]
    map_was_true: Option<bool>,
    /// Whether nothing but the record was removed, as the file could not be reached.
    forgotten: bool,
}

/// Unpins the files.
///
/// # Errors
/// When the state directory cannot be used; what is wrong with single files is told, and decides the exit status.
pub fn run(args: &UnpinArgs) -> Outcome {
    let json = args.json.json;
    let state = named_state(&args.state.state_dir)?;
    let mut out = Out::stdout();
    let files = match &state {
        Some(state) if args.left_behind => left_behind(state)?,
        _ => args.files.clone(),
    };
    if files.is_empty() && !json {
        out.line(format!("nothing was left behind in {}", args.state.state_dir.display()))?;
    }
    let results = each(&files, json, |path| {
        let missing = || ExtentError::State { path: path.to_owned(), problem: StateProblem::Missing };
        let report = unpin(path, state.as_ref().ok_or_else(missing)?, args.force)?;
        let UnpinReport { immutable_cleared, swap_ended, guard, map_was_true, forgotten } = report;
        let path = path.display().to_string();
        let unpinned = Unpinned { path, immutable_cleared, swap_ended, guard, map_was_true, forgotten };
        if !json {
            out.line(text(&unpinned))?;
        }
        Ok(unpinned)
    });
    if json {
        out.json(&serde_json::json!({ "unpinned": results.done, "errors": results.errors("path") }))?;
    }
    out.flush()?;
    Ok(results.exit())
}

fn text(unpinned: &Unpinned) -> String {
    if unpinned.forgotten {
        let path = &unpinned.path;
        if unpinned.guard.is_some_and(|guard| !guard.sets_flag()) {
            return format!("{path}: forgotten: the file that was pinned is not there");
        }
        return format!(
            "{path}: forgotten: the file that was pinned is not there. Wherever it is, it may still be immutable: `chattr -i` it"
        );
    }
    let flag = match unpinned.guard {
        _ if unpinned.immutable_cleared => "immutable flag cleared",
        Some(guard) if !guard.sets_flag() => "no flag to clear, as the filesystem is the guard",
        _ => "immutable flag left as it is",
    };
    let swap = if unpinned.swap_ended { ", swap area ended" } else { "" };
    let map = match unpinned.map_was_true {
        Some(true) => "the map was the same to the end",
        Some(false) => "THE MAP HAD CHANGED",
        None => "there was no map to compare",
    };
    format!("{}: unpinned, {flag}{swap}, {map}", unpinned.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_told_of_only_where_there_is_one() {
        let told = |guard, immutable_cleared, forgotten| {
            let (path, map_was_true) = ("/srv/a".to_owned(), Some(true));
            text(&Unpinned { path, immutable_cleared, swap_ended: false, guard, map_was_true, forgotten })
        };
        assert!(told(Some(GuardMode::Default), true, false).contains("immutable flag cleared"));
        assert!(told(Some(GuardMode::Default), false, false).contains("left as it is"));
        assert!(told(Some(GuardMode::ReadOnlyMount), false, false).contains("no flag to clear"));
        assert!(told(Some(GuardMode::Default), false, true).contains("chattr -i"));
        assert!(!told(Some(GuardMode::ReadOnlyMount), false, true).contains("immutable"));
    }
}
