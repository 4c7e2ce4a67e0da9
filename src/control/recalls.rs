//! How often each file was recalled, since this target runs, and for what the last time.
//!
//! What it does not do: outlive the target. What has to is in the state directory: the events of the file, and what ended its
//! grant.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::extent::{Incident, RecallReason};

/// The recalls of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecallStatus {
    /// How often somebody broke the lease, or the guard failed.
    pub recalls: u64,
    /// How often the watch found, or feared, a difference.
    pub doubts: u64,
    /// How many of the doubts a second look cleared.
    pub cleared: u64,
    /// How often commands did not come back in time.
    pub not_drained: u64,
    /// The last of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<LastRecall>,
}

/// For what a file was recalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRecall {
    /// When it was noticed, in milliseconds since 1970.
    pub at_ms: u64,
    /// A stable word: `lease-break`, `map-moved`, ...
    pub reason: String,
    /// The same for people.
    pub text: String,
    /// More of it, for people; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl From<&Incident> for LastRecall {
    fn from(incident: &Incident) -> Self {
        let since = incident.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            at_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            reason: incident.reason.word().to_owned(),
            text: incident.reason.to_string(),
            detail: incident.detail.clone(),
        }
    }
}

/// Counts the recalls of all files: as many as the configurations of this target have named.
#[derive(Debug, Default)]
pub(super) struct Recalls(BTreeMap<PathBuf, RecallStatus>);

impl Recalls {
    fn file(&mut self, path: &Path) -> &mut RecallStatus {
        self.0.entry(path.to_owned()).or_default()
    }

    pub(super) fn recalled(&mut self, path: &Path, incident: &Incident) {
        let file = self.file(path);
        match incident.reason {
            RecallReason::Doubt(_) => file.doubts += 1,
            _ => file.recalls += 1,
        }
        file.last = Some(incident.into());
    }

    /// A second look found that the doubt stands: what it found says more.
    pub(super) fn stands(&mut self, path: &Path, incident: &Incident) {
        self.file(path).last = Some(incident.into());
    }

    pub(super) fn cleared(&mut self, path: &Path) {
        self.file(path).cleared += 1;
    }

    pub(super) fn not_drained(&mut self, path: &Path) {
        self.file(path).not_drained += 1;
    }

    pub(super) fn of(&self, path: &Path) -> RecallStatus {
        self.0.get(path).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Instant, SystemTime};

    use super::*;
    use crate::extent::Doubt;

    fn incident(reason: RecallReason) -> Incident {
        let (detail, differences) = ("because".to_owned(), Vec::new());
        let (at, noticed) = (SystemTime::now(), Instant::now());
        Incident { number: 1, reason, detail, differences, at, noticed, changed: None }
    }

    #[test]
    fn recalls_and_doubts_are_counted_file_by_file() {
        let mut recalls = Recalls::default();
        let (a, b) = (Path::new("/srv/a"), Path::new("/srv/b"));
        recalls.recalled(a, &incident(RecallReason::Doubt(Doubt::Touched)));
        recalls.cleared(a);
        recalls.recalled(a, &incident(RecallReason::LeaseBreak));
        recalls.not_drained(a);
        recalls.recalled(b, &incident(RecallReason::GuardFailed));
        let file = recalls.of(a);
        assert_eq!((file.recalls, file.doubts, file.cleared, file.not_drained), (1, 1, 1, 1));
        let last = file.last.expect("it was recalled");
        assert_eq!((last.reason.as_str(), last.detail.as_str()), ("lease-break", "because"));
        assert_eq!((recalls.of(b).recalls, recalls.of(b).doubts), (1, 0));
        assert_eq!(recalls.of(Path::new("/srv/c")), RecallStatus::default());
    }
}
