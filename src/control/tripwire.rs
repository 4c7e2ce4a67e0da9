//! What a recall has to reach at once, from the guard's thread: the fences of a file's exports.
//!
//! ```text
//!   guard thread: trip    number of the recall -> fence every export -> tell the control thread
//!   control thread: arm   before hosts see an export: it is fenced from the beginning while a recall stands
//!                   clear the recall that stands is cleared -> hosts are let in; a new one waits meanwhile, and fences after
//! ```

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::event::Event;
use crate::extent::{FrozenMap, Incident};
use crate::fabrics::{Export, FenceReason, Target};
use crate::probes;

/// Which pin of a file: one that was let go and made again is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PinId(u64);

/// The wire of one pin.
pub(super) struct Tripwire {
    pin: PinId,
    path: PathBuf,
    /// Set when the pin is whole.
    map: OnceLock<Arc<FrozenMap>>,
    target: Weak<Target>,
    armed: Mutex<Armed>,
    events: Sender<Event>,
}

#[derive(Default)]
struct Armed {
    /// All that stand on the file, until they are drained and gone.
    exports: Vec<Arc<Export>>,
    /// The number of the recall that stands, if one does.
    recall: Option<u64>,
}

impl Tripwire {
    pub(super) fn new(path: PathBuf, target: Weak<Target>, events: Sender<Event>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let pin = PinId(NEXT.fetch_add(1, Ordering::Relaxed));
        Arc::new(Self { pin, path, map: OnceLock::new(), target, armed: Mutex::default(), events })
    }

    pub(super) const fn pin(&self) -> PinId {
        self.pin
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The map that is held; `None` while the file is being pinned, and for good when that failed.
    pub(super) fn map(&self) -> Option<&Arc<FrozenMap>> {
        self.map.get()
    }

    /// The file is pinned.
    pub(super) fn holds(&self, map: &Arc<FrozenMap>) {
        // Set once in the life of a pin.
        let _ = self.map.set(Arc::clone(map));
    }

    fn lock(&self) -> MutexGuard<'_, Armed> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fences first and tells the control thread second: no command starts after this returns.
    pub(super) fn trip(self: &Arc<Self>, incident: &Incident) {
        let mut armed = self.lock();
        // Another thread may have told of a later one already.
        armed.recall = armed.recall.max(Some(incident.number));
        self.fence(&armed.exports);
        drop(armed);
        probes::pin_recalled(self.path.as_os_str().as_bytes(), incident.reason.word());
        // The control thread is gone only when everything is being let go anyway.
        let _ = self.events.send(Event::Recalled { wire: Arc::clone(self), incident: incident.clone() });
    }

    /// Lets hosts in again when the recall `number` still stands, and `clear` says that it is cleared. A new recall waits
    /// meanwhile, and fences after that.
    pub(super) fn clear(&self, number: u64, clear: impl FnOnce() -> bool) -> bool {
        let mut armed = self.lock();
        if armed.recall != Some(number) || !clear() {
            return false;
        }
        armed.recall = None;
        if let Some(target) = self.target.upgrade() {
            armed.exports.iter().for_each(|export| target.unfence(export, FenceReason::MapInDoubt));
        }
        true
    }

    /// Before hosts see the export.
    pub(super) fn arm(&self, export: &Arc<Export>) {
        let mut armed = self.lock();
        armed.exports.push(Arc::clone(export));
        if armed.recall.is_some() {
            export.fence(FenceReason::MapInDoubt);
        }
    }

    /// The export is gone, and no command of it is on a device.
    pub(super) fn disarm(&self, export: &Export) {
        self.lock().exports.retain(|armed| armed.slot != export.slot);
    }

    /// Fences whatever stands on the file, once more, and says what that is.
    pub(super) fn fence_all(&self) -> Vec<Arc<Export>> {
        let armed = self.lock();
        self.fence(&armed.exports);
        armed.exports.clone()
    }

    fn fence(&self, exports: &[Arc<Export>]) {
        if let Some(target) = self.target.upgrade() {
            exports.iter().for_each(|export| target.fence(export, FenceReason::MapInDoubt));
        }
    }
}
