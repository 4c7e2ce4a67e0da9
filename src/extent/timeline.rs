//! What became of a pin, step by step, and what is wrong with it now: kept in the state directory, over restarts.
//!
//! ```text
//!   KEY.events      a line of JSON an event: pinned, recalled, fenced, drained, released, kept, cleared, unpinned
//!   KEY.incident    the difference for which the last grant was ended, or none was given; gone with the next pin of the file
//! ```
//!
//! Events are for people and scripts, and nothing depends on them: one that cannot be written is a warning. The
//! incident is written before the guards let go, so that whoever finds the pin later finds why, too.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::compare::{Difference, Place};
use super::error::{ExtentError, StateProblem};
use super::guard::Incident;
use super::record::StoredPin;
use super::state::{StateDir, files_in, replace};
use crate::durable;

/// The extension of files with events.
const EVENTS: &str = "events";
/// Above this a list of events is cut to its younger half.
const EVENTS_LEN_MAX: u64 = 256 << 10;

/// One step of a pin's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PinStep {
    /// The map was frozen, or found to be the stored one.
    Pinned,
    /// Its blocks were taken over from the device, with the filesystem not mounted.
    TakenOver,
    /// The guards or the watch want it back.
    Recalled,
    /// New commands are refused.
    Fenced,
    /// No command is on the device any more.
    Drained,
    /// Commands did not come back in time.
    NotDrained,
    /// A second look found the file as it was: served again.
    Cleared,
    /// Let go; the file is its owner's again.
    Released,
    /// Guards gone; the record, and the immutable flag if it is still set, stay.
    Kept,
    /// A start could not serve it, and left it aside.
    NotServed,
    /// The operator undid the pin.
    Unpinned,
}

impl fmt::Display for PinStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pinned => "pinned",
            Self::TakenOver => "taken over",
            Self::Recalled => "recalled",
            Self::Fenced => "fenced",
            Self::Drained => "drained",
            Self::NotDrained => "not drained",
            Self::Cleared => "cleared",
            Self::Released => "released",
            Self::Kept => "kept",
            Self::NotServed => "not served",
            Self::Unpinned => "unpinned",
        })
    }
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinEvent {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Of which freeze of the file.
    pub generation: u64,
    /// What happened.
    pub step: PinStep,
    /// Where the file was; none in an event of an older release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// More of it, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// All that is known of what became of one file's pins. It stays when the file is not pinned any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// The key of its record, when there is one.
    pub key: String,
    /// Where the file was last; none when all its events are of an older release.
    pub path: Option<PathBuf>,
    /// The oldest first.
    pub events: Vec<PinEvent>,
}

/// Blocks that are elsewhere now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedBlocks {
    /// Where in the file, in bytes.
    pub file_offset: u64,
    /// How many bytes.
    pub len: u64,
    /// Where on the disk they were, in bytes.
    pub frozen: Option<u64>,
    /// Where on the disk they are; `None` for a hole.
    pub living: Option<u64>,
    /// What the filesystem says of them, if anything forbids to serve them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flags: Option<String>,
}

impl From<&Difference> for MovedBlocks {
    fn from(difference: &Difference) -> Self {
        let offset = |place: &Place| match place {
            Place::Hole => None,
            Place::At(offset) | Place::Flagged(offset, _) => Some(offset.get()),
        };
        let flags = match &difference.living {
            Place::Flagged(_, flags) => {
                Some(flags.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(" "))
            }
            _ => None,
        };
        let (frozen, living) = (offset(&difference.frozen), offset(&difference.living));
        Self { file_offset: difference.file_offset.get(), len: difference.len.get(), frozen, living, flags }
    }
}

/// The kind of an incident that no recall made: a start could not serve the file.
const NOT_SERVED: &str = "not-served";

/// The difference for which a grant was ended, or none was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredIncident {
    /// When it was noticed, in milliseconds since 1970.
    pub at_ms: u64,
    /// Which freeze of the file was served.
    pub generation: u64,
    /// Why: a stable word ([`RecallReason::word`](super::RecallReason::word)); empty in one of an older release.
    #[serde(default)]
    pub kind: String,
    /// Why, for people.
    pub reason: String,
    /// More of it.
    pub detail: String,
    /// The first blocks that are elsewhere.
    pub blocks: Vec<MovedBlocks>,
}

impl StoredIncident {
    /// Of the freeze `generation`.
    #[must_use]
    pub fn new(incident: &Incident, generation: u64) -> Self {
        Self {
            at_ms: unix_ms(incident.at),
            generation,
            kind: incident.reason.word().to_owned(),
            reason: incident.reason.to_string(),
            detail: incident.detail.clone(),
            blocks: incident.differences.iter().map(MovedBlocks::from).collect(),
        }
    }
}

impl StateDir {
    /// Writes down why the file of a stored pin is not served, for whoever looks at it later. What stands already says more,
    /// and stays; and so does what is another process's to say, who holds the pin.
    pub fn note_not_served(&self, pin: &StoredPin, why: &str, difference: Option<&Difference>) {
        let key = pin.identity.key();
        let Ok(Ok(_lock)) = self.lock_pin(&key) else { return };
        if !matches!(self.head(&key), Ok(Some(_))) {
            return;
        }
        self.note(&key, pin.path(), pin.generation, PinStep::NotServed, why);
        if !matches!(self.incident(&key), Ok(None)) {
            return;
        }
        let incident = StoredIncident {
            kind: NOT_SERVED.to_owned(),
            at_ms: unix_ms(SystemTime::now()),
            generation: pin.generation,
            reason: "a start could not serve the file".to_owned(),
            detail: why.to_owned(),
            blocks: difference.into_iter().map(MovedBlocks::from).collect(),
        };
        if let Err(error) = self.store_incident(&key, &incident) {
            tracing::error!(path = %pin.path().display(), %error, "what is wrong with a pin is not written down");
        }
    }
}

fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl StateDir {
    /// Adds to the events of the pin with this key, of the file at `path`.
    pub fn note(&self, key: &str, path: &Path, generation: u64, step: PinStep, detail: impl Into<String>) {
        let (at_ms, path) = (unix_ms(SystemTime::now()), Some(path.to_owned()));
        let event = PinEvent { at_ms, generation, step, path, detail: detail.into() };
        if let Err(error) = self.append(key, &event) {
            tracing::warn!(path = %self.events_path(key).display(), %error, "an event of a pin is not written down");
        }
    }

    fn append(&self, key: &str, event: &PinEvent) -> io::Result<()> {
        let path = self.events_path(key);
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
        // One write a line: lines of two processes do not mix.
        file.write_all(&line)?;
        if file.metadata()?.len() > EVENTS_LEN_MAX {
            let text = fs::read(&path)?;
            let younger = text.get(text.len() / 2..).unwrap_or_default();
            let begin = younger.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            durable::replace(&path, |file| file.write_all(younger.get(begin..).unwrap_or_default()))?;
        }
        Ok(())
    }

    /// The events of the pin with this key, the oldest first; lines that cannot be read are passed over.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn events(&self, key: &str) -> Result<Vec<PinEvent>, ExtentError> {
        let path = self.events_path(key);
        match fs::read(&path) {
            Ok(bytes) => Ok(bytes
                .split(|byte| *byte == b'\n')
                .filter_map(|line| serde_json::from_slice(line).ok())
                .collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(ExtentError::io("read", &path, error)),
        }
    }

    /// The events of all files that ever were pinned here, in the order of their keys.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when the directory cannot be read; events that cannot are passed over.
    pub fn timelines(&self) -> Result<Vec<Timeline>, ExtentError> {
        let paths = files_in(self.path(), EVENTS)?;
        let keys = paths.iter().filter_map(|path| path.file_stem()?.to_str().map(str::to_owned));
        let timeline = |key: String| {
            let events = self.events(&key).unwrap_or_default();
            let path = events.iter().rev().find_map(|event| event.path.clone());
            Timeline { key, path, events }
        };
        Ok(keys.map(timeline).filter(|timeline| !timeline.events.is_empty()).collect())
    }

    /// Writes down for what the grant of a pin was ended.
    ///
    /// # Errors
    /// [`ExtentError::Io`].
    pub fn store_incident(&self, key: &str, incident: &StoredIncident) -> Result<(), ExtentError> {
        replace(&self.incident_path(key), |file| {
            serde_json::to_writer_pretty(&mut *file, incident)?;
            file.write_all(b"\n")
        })
    }

    /// For what the last grant of a pin was ended, if that stands.
    ///
    /// # Errors
    /// [`ExtentError::State`], [`ExtentError::Io`].
    pub fn incident(&self, key: &str) -> Result<Option<StoredIncident>, ExtentError> {
        let path = self.incident_path(key);
        match fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(incident) => Ok(Some(incident)),
                Err(error) => Err(ExtentError::State { path, problem: StateProblem::Malformed(error) }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ExtentError::io("read", &path, error)),
        }
    }

    pub(super) fn clear_incident(&self, key: &str) -> Result<(), ExtentError> {
        let path = self.incident_path(key);
        durable::remove(&path).map_err(|error| ExtentError::io("remove", &path, error))
    }

    fn events_path(&self, key: &str) -> PathBuf {
        self.path().join(format!("{key}.{EVENTS}"))
    }

    fn incident_path(&self, key: &str) -> PathBuf {
        self.path().join(format!("{key}.incident"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::extent::FiemapFlags;
    use crate::extent::guard::{Doubt, RecallReason};
    use crate::units::{ByteLen, ByteOffset};

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let state = StateDir::open(dir.path()).expect("a state directory");
        (dir, state)
    }

    #[test]
    fn events_are_kept_in_order_and_cut_when_there_are_too_many() {
        let (_dir, state) = state();
        let file = Path::new("/srv/k");
        assert!(state.events("k").expect("none").is_empty());
        state.note("k", file, 1, PinStep::Pinned, "");
        state.note("k", file, 1, PinStep::Fenced, "because");
        fs::write(state.path().join("other.events"), "nonsense\n").expect("room");
        let events = state.events("k").expect("events");
        assert_eq!(
            events.iter().map(|event| event.step).collect::<Vec<_>>(),
            [PinStep::Pinned, PinStep::Fenced]
        );
        assert_eq!(events[1].detail, "because");
        assert!(state.events("other").expect("nonsense").is_empty());
        let detail = "x".repeat(1000);
        (0..600).for_each(|generation| state.note("k", file, generation, PinStep::Pinned, detail.clone()));
        let events = state.events("k").expect("events");
        assert!(events.len() < 300, "{}", events.len());
        assert_eq!(events.last().map(|event| event.generation), Some(599));
    }

    #[test]
    fn what_became_of_a_file_is_found_without_its_record() {
        let (_dir, state) = state();
        // As releases wrote it that knew no paths.
        let old = "{\"at_ms\":1,\"generation\":1,\"step\":\"pinned\"}\n";
        fs::write(state.path().join("a.events"), old).expect("room");
        state.note("b", Path::new("/srv/old"), 1, PinStep::Pinned, "");
        state.note("b", Path::new("/srv/new"), 1, PinStep::Unpinned, "");
        fs::write(state.path().join("c.events"), "nonsense\n").expect("room");
        let timelines = state.timelines().expect("a directory");
        let told: Vec<_> =
            timelines.iter().map(|it| (it.key.as_str(), it.path.as_deref(), it.events.len())).collect();
        assert_eq!(told, [("a", None, 1), ("b", Some(Path::new("/srv/new")), 2)]);
    }

    #[test]
    fn an_incident_stands_until_it_is_cleared() {
        let (_dir, state) = state();
        let difference = |living| Difference {
            file_offset: ByteOffset(8192),
            len: ByteLen(4096),
            frozen: Place::At(ByteOffset(65536)),
            living,
        };
        let incident = Incident {
            number: 1,
            reason: RecallReason::Doubt(Doubt::MapMoved),
            detail: "4096 bytes".to_owned(),
            differences: vec![
                difference(Place::Hole),
                difference(Place::Flagged(ByteOffset(65536), FiemapFlags::SHARED)),
            ],
            at: UNIX_EPOCH,
            noticed: Instant::now(),
            changed: None,
        };
        let stored = StoredIncident::new(&incident, 7);
        assert_eq!(stored.blocks[0].living, None);
        assert_eq!(stored.blocks[1].flags.as_deref(), Some("SHARED"));
        state.store_incident("k", &stored).expect("room");
        assert_eq!(state.incident("k").expect("readable"), Some(stored));
        state.clear_incident("k").expect("gone");
        assert_eq!(state.incident("k").expect("readable"), None);
        fs::write(state.path().join("k.incident"), "{").expect("room");
        assert!(matches!(state.incident("k"), Err(ExtentError::State { .. })));
    }
}
