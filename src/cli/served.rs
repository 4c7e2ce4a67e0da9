//! What the running targets say of the pinned files that they serve.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::out::time_of;
use crate::config::DeviceWay;
use crate::control::{RecallStatus, WatchStatus, ask_all};
use crate::fabrics::{FencePolicy, FenceReason};

/// A pinned file that a running target serves, by the target's own word.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Served {
    #[serde(skip)]
    path: PathBuf,
    /// The target's process.
    pub(super) pid: u32,
    /// How the device under it is reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) device: Option<DeviceWay>,
    /// `live`, `fenced` or `removed`.
    pub(super) grant: String,
    /// Why it is fenced: the word of a [`FenceReason`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
    /// Since when it is fenced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fenced_since_ms: Option<u64>,
    /// What hosts see of a fence.
    pub(super) on_fence: FencePolicy,
    /// Why nobody holds the file any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) problem: Option<String>,
    /// How often it was recalled since the target runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) recalls: Option<RecallStatus>,
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
                device: export.device,
                grant: export.grant,
                reason: export.reason,
                fenced_since_ms: export.fenced_since_ms,
                on_fence: export.on_fence,
                problem: export.problem,
                recalls: export.recalls,
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

    /// What keeps the file as it is where its filesystem is not mounted, and there is nothing to watch.
    fn without_filesystem(&self) -> Option<&'static str> {
        match self.device? {
            _ if self.problem.is_some() => None,
            DeviceWay::Unmounted => Some(
                "nothing to watch: its filesystem is not mounted, and cannot be while the device is held exclusively; what root \
                 writes to the device is seen by nobody",
            ),
            DeviceWay::HandedOver => Some(
                "nothing to watch: its filesystem is not mounted, and cannot be while the kernel has not got the controller",
            ),
            DeviceWay::Uring | DeviceWay::Nvme => None,
        }
    }

    /// For people, a line each.
    pub(super) fn lines(&self) -> Vec<String> {
        let Self { pid, grant, generation, extents, .. } = self;
        let mut lines =
            vec![format!("served by process {pid}: {grant}, generation {generation}, {extents} extents")];
        lines.push(format!("hosts see a fence as: {}", self.on_fence));
        lines.extend(fenced(self.fenced_since_ms, self.reason.as_deref()));
        lines.extend(recalled(self.recalls.as_ref()));
        lines.extend(not_held(self.problem.as_deref()));
        let without_filesystem = self.without_filesystem();
        lines.push(match (self.guards.as_slice(), without_filesystem) {
            ([], None) => "guards: none any more".to_owned(),
            ([], Some(_)) => "guards: none of the kernel, which has not got the controller".to_owned(),
            (guards, _) => format!("guards: {}", guards.join(", ")),
        });
        lines.push(match &self.watch {
            None => without_filesystem.unwrap_or("not watched any more").to_owned(),
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

/// What is to be known of a file that is named, and not held: it was let go, or could not be served at the start.
pub(super) fn not_held(problem: Option<&str>) -> Option<String> {
    let problem = problem?;
    Some(format!(
        "not served, and held by nobody: {problem}; when that is mended, a reload (SIGHUP) serves it"
    ))
}

/// Since when an export is fenced, and why.
pub(super) fn fenced(since_ms: Option<u64>, reason: Option<&str>) -> Option<String> {
    let reason = reason?;
    let since = since_ms.map(|since| format!(" since {}", time_of(since))).unwrap_or_default();
    // A newer target may have reasons that nobody here knows.
    let why = FenceReason::of_word(reason).map_or_else(|| reason.to_owned(), |known| known.to_string());
    Some(format!("fenced{since}: {why}"))
}

/// How often a file was recalled, and for what the last time; nothing when it never was.
pub(super) fn recalled(recalls: Option<&RecallStatus>) -> Vec<String> {
    let Some(RecallStatus { recalls, doubts, cleared, not_drained, last: Some(last) }) = recalls else {
        return Vec::new();
    };
    let detail = if last.detail.is_empty() { String::new() } else { format!(": {}", last.detail) };
    vec![
        format!("last recalled at {}: {}{detail}", time_of(last.at_ms), last.text),
        format!(
            "{recalls} recall(s), {doubts} doubt(s) of which {cleared} were cleared, {not_drained} not drained in time"
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Served without its filesystem.
    fn unmounted(device: DeviceWay, guards: &[&str], problem: Option<&str>) -> Served {
        Served {
            path: PathBuf::from("/srv/a"),
            pid: 7,
            device: Some(device),
            grant: "live".to_owned(),
            reason: None,
            fenced_since_ms: None,
            on_fence: FencePolicy::default(),
            problem: problem.map(str::to_owned),
            recalls: None,
            generation: 1,
            extents: 1,
            guards: guards.iter().map(|guard| (*guard).to_owned()).collect(),
            watch: None,
        }
    }

    #[test]
    fn without_a_filesystem_there_is_nothing_to_watch() {
        let told =
            unmounted(DeviceWay::Unmounted, &["unmounted device, held exclusively"], None).lines().join("\n");
        assert!(
            told.contains("guards: unmounted device") && told.contains("nothing to watch: its filesystem"),
            "{told}"
        );
        assert!(!told.contains("any more"), "{told}");
        let told = unmounted(DeviceWay::HandedOver, &[], None).lines().join("\n");
        assert!(told.contains("nothing to watch") && !told.contains("any more"), "{told}");
        for let_go in
            [unmounted(DeviceWay::Uring, &[], None), unmounted(DeviceWay::Unmounted, &[], Some("gone"))]
        {
            let told = let_go.lines().join("\n");
            assert!(told.contains("none any more") && told.contains("not watched any more"), "{told}");
        }
    }

    #[test]
    fn a_fence_is_told_in_words_for_people() {
        let told = fenced(Some(0), Some("map-in-doubt")).expect("it is fenced");
        assert_eq!(
            told,
            "fenced since 1970-01-01T00:00:00.000Z: the file was recalled, or its map is in doubt"
        );
        assert_eq!(fenced(None, Some("of-tomorrow")).as_deref(), Some("fenced: of-tomorrow"));
        assert_eq!(fenced(Some(0), None), None, "it is not");
    }
}
