//! Pins that nobody holds: what a run that died has left, and what operators keep.
//!
//! They are looked at whenever something is about to be served, and listed. What becomes of them is the operator's to say:
//! pinning or serving the file again adopts one, when its map is still that of the file; unpinning releases it.

use std::fmt;
use std::path::PathBuf;

use super::error::{ExtentError, StateProblem};
use super::record::StoredPin;
use super::state::{StateDir, read_record};
use super::verify::verify_stored;
use crate::chain::Chain;

/// A stored pin that no process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// The file; `None` when the record does not say.
    pub path: Option<PathBuf>,
    /// Whether an operator made it, to last; else a run left it behind.
    pub kept: bool,
    /// What it is like now.
    pub standing: OrphanStanding,
}

/// What an orphan is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrphanStanding {
    /// The map is the recorded one, and the guards that need no process hold it.
    Held,
    /// The map is the recorded one, and nothing holds it.
    Unguarded,
    /// The living file has another map, or another size.
    Changed,
    /// The process that pinned it died before the map was frozen.
    Incomplete,
    /// Its filesystem is not mounted, so that nothing is known of its map.
    Unmounted,
    /// The record is damaged, or the file cannot be looked at: why.
    Unknown(String),
}

impl fmt::Display for OrphanStanding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held => f.write_str("its map is the recorded one, and held"),
            Self::Unguarded => f.write_str("its map is the recorded one, but a guard is gone"),
            Self::Changed => f.write_str("ITS MAP IS NOT THE RECORDED ONE"),
            Self::Incomplete => f.write_str("its map was never frozen"),
            Self::Unmounted => f.write_str("its filesystem is not mounted"),
            Self::Unknown(why) => f.write_str(why),
        }
    }
}

/// Looks at every stored pin that nobody holds.
///
/// # Errors
/// When the state directory cannot be read.
pub fn orphans(state: &StateDir) -> Result<Vec<Orphan>, ExtentError> {
    let unknown = |error: &ExtentError| OrphanStanding::Unknown(Chain(error).to_string());
    let mut found = Vec::new();
    for (place, head) in state.heads()? {
        // What is held is its holder's matter, however large its map.
        if let Ok(head) = &head
            && state.holder(&head.identity.key())?.is_some()
        {
            continue;
        }
        // One map at a time.
        match head.and_then(|_| read_record(&place)) {
            Ok(None) => {}
            Ok(Some(pin)) => {
                let standing = standing_of(&pin).unwrap_or_else(|error| unknown(&error));
                found.push(Orphan { path: Some(pin.path().to_owned()), kept: pin.kept, standing });
            }
            Err(error) => found.push(Orphan { path: None, kept: false, standing: unknown(&error) }),
        }
    }
    Ok(found)
}

fn standing_of(pin: &StoredPin) -> Result<OrphanStanding, ExtentError> {
    if pin.map.is_none() {
        return Ok(OrphanStanding::Incomplete);
    }
    let report = match verify_stored(pin) {
        Err(ExtentError::State { problem: StateProblem::NotMounted, .. }) => {
            return Ok(OrphanStanding::Unmounted);
        }
        report => report?,
    };
    Ok(match (report.map_is_true(), report.is_held()) {
        (false, _) => OrphanStanding::Changed,
        (true, true) => OrphanStanding::Held,
        (true, false) => OrphanStanding::Unguarded,
    })
}

/// The files whose pins a run left behind that has ended: neither held by a process nor kept by an operator.
///
/// # Errors
/// When the state directory cannot be read. Records that do not say of which file they are, whole, are passed over.
pub fn left_behind(state: &StateDir) -> Result<Vec<PathBuf>, ExtentError> {
    let mut files = Vec::new();
    for head in state.heads()?.into_iter().filter_map(|(_, head)| head.ok()).filter(|head| !head.kept) {
        if state.holder(&head.identity.key())?.is_none() {
            files.push(head.identity.path);
        }
    }
    Ok(files)
}
