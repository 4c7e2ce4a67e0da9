//! What the running targets say of the pinned files that they serve.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::control::{WatchStatus, ask_all};

/// A pinned file that a running target serves, by the target's own word.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Served {
    #[serde(skip)]
    path: PathBuf,
    /// The target's process.
    pub(super) pid: u32,
    /// `live`, `fenced` or `removed`.
    pub(super) grant: String,
    /// Why it is fenced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
    /// Which freeze of the file is served.
    pub(super) generation: u64,
    /// Extents of its map.
    pub(super) extents: usize,
    /// The guards that the target holds.
    pub(super) guards: Vec<String>,
    /// How the watch over it is doing; none when it is not watched any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) watch: Option<WatchStatus>,
}

/// What is served with this state directory. A target that does not answer counts as none.
pub(super) fn served_with(state_dir: &Path) -> Vec<Served> {
    let targets = ask_all(state_dir).into_iter().flatten();
    let served = targets.flat_map(|target| {
        let pid = target.pid;
        target.exports.into_iter().filter_map(move |export| {
            Some(Served {
                path: export.path?,
                pid,
                grant: export.grant,
                reason: export.reason,
                generation: export.generation?,
                extents: export.extents?,
                guards: export.guards,
                watch: export.watch,
            })
        })
    });
    served.collect()
}

impl Served {
    /// The one of this file.
    pub(super) fn of<'s>(all: &'s [Self], path: &Path) -> Option<&'s Self> {
        all.iter().find(|served| served.path == path)
    }

    /// Whether hosts may use it.
    pub(super) fn is_live(&self) -> bool {
        self.grant == "live"
    }

    /// For people, a line each.
    pub(super) fn lines(&self) -> Vec<String> {
        let Self { pid, grant, generation, extents, .. } = self;
        let why = self.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        let mut lines = vec![format!(
            "served by process {pid}: {grant}{why}, generation {generation}, {extents} extents"
        )];
        lines.push(match self.guards.as_slice() {
            [] => "guards: none any more".to_owned(),
            guards => format!("guards: {}", guards.join(", ")),
        });
        lines.push(match &self.watch {
            None => "not watched any more".to_owned(),
            Some(watch) => {
                let WatchStatus { checks, last_check_ago_ms, interval_ms, bound_ms, cost_us } = watch;
                format!(
                    "map found as frozen {last_check_ago_ms} ms ago, {checks} times in all; looked at every {interval_ms} ms \
                     for {cost_us} us of a processor; fenced when not for {bound_ms} ms"
                )
            }
        });
        lines
    }
}
