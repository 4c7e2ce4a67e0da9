//! What becomes of a pinned file that is recalled, once nobody uses its blocks any more.
//!
//! ```text
//!   look_again   second-look thread: is it as it was?        --> Event::Looked
//!   let_go       let-go thread: incident, then the guards    --> Event::LetGo
//! ```
//!
//! A thread a file, because a disk that is in trouble may not answer, and the openers of others do not wait for it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Held, Provider};
use crate::control::event::Event;
use crate::control::tripwire::Tripwire;
use crate::extent::{Baseline, Incident, PinStep, PinnedFile, StateDir, StoredIncident};
use crate::fabrics::Export;

/// How often is looked whether files have left, when the target ends.
const LEAVING_LOOK: Duration = Duration::from_millis(2);

/// A file that a thread is letting go of.
pub(super) struct Leaving {
    path: PathBuf,
    thread: JoinHandle<()>,
}

impl Provider {
    /// The file, if it is still held by this very pin.
    fn held_by(&self, wire: &Tripwire) -> Option<&PinnedFile> {
        match self.files.get(wire.path())? {
            Held::Pinned { pinned, tripwire } if tripwire.pin() == wire.pin() => Some(pinned),
            _ => None,
        }
    }

    /// Whether a file is still held by the pin that is recalled: it may have been let go since, and even pinned anew.
    pub(in crate::control) fn holds(&self, wire: &Tripwire) -> bool {
        self.held_by(wire).is_some()
    }

    /// Has a file that is in doubt, fenced and drained, looked at again. The result arrives as [`Event::Looked`].
    pub(in crate::control) fn look_again(&self, wire: &Arc<Tripwire>, incident: &Incident) {
        let Some(look) = self.held_by(wire).and_then(PinnedFile::second_look) else { return };
        let (wire, incident, events) = (Arc::clone(wire), incident.clone(), self.events.clone());
        let looking = thread::Builder::new().name("second-look".to_owned()).spawn(move || {
            let looked = look.look();
            // The control thread is gone only when everything is being let go anyway.
            let _ = events.send(Event::Looked { wire, incident, looked });
        });
        if let Err(error) = looking {
            tracing::error!(%error, "no thread to look at a file again: it stays fenced");
        }
    }

    /// Serves a file again whose doubt was cleared, unless it is recalled anew.
    pub(in crate::control) fn clear(&self, wire: &Tripwire, number: u64, looked: Baseline) -> bool {
        self.held_by(wire).is_some_and(|pinned| wire.clear(number, || pinned.clear(number, looked)))
    }

    /// Lets go of a file that is not what it was, or that somebody wants, and is drained: the record stays, with what is
    /// wrong. Its end arrives as [`Event::LetGo`].
    pub(in crate::control) fn let_go(&mut self, wire: &Arc<Tripwire>, incident: &Incident) {
        if !self.holds(wire) {
            return;
        }
        let Some(Held::Pinned { pinned, .. }) = self.files.remove(wire.path()) else { return };
        let path = wire.path().to_owned();
        let (told, state, events) = (path.clone(), self.state.clone(), self.events.clone());
        // Whoever takes it lets go: the thread, or, when there is none to be had, this one.
        let work = Arc::new(Mutex::new(Some(pinned)));
        let (theirs, incident) = (Arc::clone(&work), incident.clone());
        let body = move |work: &Mutex<Option<PinnedFile>>| {
            let pinned = work.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(pinned) = pinned {
                abandon(pinned, &state, &incident);
                // As above.
                let _ = events.send(Event::LetGo { path: told.clone() });
            }
        };
        let ours = body.clone();
        match thread::Builder::new().name("let-go".to_owned()).spawn(move || body(&theirs)) {
            Ok(thread) => self.leaving.push(Leaving { path, thread }),
            Err(error) => {
                tracing::warn!(%error, "no thread to let go of a file: the control thread does it");
                ours(&work);
            }
        }
    }

    /// A file is let go.
    pub(in crate::control) fn left(&mut self, path: &Path) {
        self.leaving.retain(|leaving| leaving.path != path);
    }

    /// Whether files are being let go: they cannot be pinned anew before.
    pub(in crate::control) fn is_letting_go(&mut self) -> bool {
        self.leaving.retain(|leaving| !leaving.thread.is_finished());
        !self.leaving.is_empty()
    }

    /// Waits until no file is being let go, at most until `deadline`.
    pub(in crate::control) fn await_leaving(&mut self, deadline: Instant) {
        while self.is_letting_go() && Instant::now() < deadline {
            thread::sleep(LEAVING_LOOK);
        }
    }

    /// Adds to the events of a file, also when it was let go since.
    pub(in crate::control) fn note(&self, wire: &Tripwire, step: PinStep, detail: impl Into<String>) {
        if let Some(map) = wire.map() {
            let identity = map.identity();
            self.state.note(&identity.key(), &identity.path, map.generation(), step, detail);
        }
    }

    /// Fences whatever stands on a recalled file, which has happened already but for a file that is recalled while it is being
    /// pinned; and says what that is.
    pub(in crate::control) fn fence(&self, wire: &Tripwire) -> Vec<Arc<Export>> {
        wire.fence_all()
    }
}

fn abandon(pinned: PinnedFile, state: &StateDir, incident: &Incident) {
    let (key, generation) = (pinned.map().identity().key(), pinned.map().generation());
    let stored = StoredIncident::new(incident, generation);
    if let Err(error) = state.store_incident(&key, &stored) {
        tracing::error!(path = %pinned.path().display(), %error, "what is wrong with a pin is not written down");
    }
    pinned.keep();
}
