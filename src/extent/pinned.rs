//! A pinned file: what its guards are, how it is checked, and how it is let go.
//!
//! ```text
//!   keep      what needs this process goes (mark, lease); flag, swap area, freeze and record stay
//!   release   all of it goes: the guards of this process first, then what outlives it, the record last
//! ```
//!
//! What it does not do: pin, see `pin`; undo what a dead process left, see `unpin`.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use super::claim::Claim;
use super::error::ExtentError;
use super::guard::{Baseline, Guard, RecallWatch, WatchReport};
use super::lease;
use super::map::FrozenMap;
use super::mode::frozen::Thawed;
use super::mode::{GuardMode, GuardReport, swap_file};
use super::proof::Witness;
use super::readers::{self, LocalReaders, drop_cache, settle_cache};
use super::state::{PinLock, StateDir};
use super::timeline::PinStep;
use super::undo::change_flag;
use super::verify::{VerifyReport, verify_file};
use super::watch::SecondLook;

/// A pinned file: its guards and its frozen map.
///
/// Dropping it is [`keep`](Self::keep): the immutable flag and the record stay, and [`unpin`](super::unpin) or the
/// next [`pin`](super::pin) deals with them.
#[derive(Debug)]
pub struct PinnedFile {
    pub(super) map: Arc<FrozenMap>,
    pub(super) file: Arc<File>,
    /// `None` once the guards were let go.
    pub(super) guard: Option<Guard>,
    pub(super) lock: Option<PinLock>,
    /// Until everything else is let go.
    pub(super) _claim: Claim,
    pub(super) state: StateDir,
    /// How to let go of what outlives this process.
    pub(super) held: Held,
    pub(super) kept: bool,
    pub(super) update_mtime: bool,
}

/// The guards of a pin that outlive the process, and whose they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) mode: GuardMode,
    pub(super) readers: LocalReaders,
    pub(super) clear_immutable: bool,
    pub(super) header_written: bool,
}

impl PinnedFile {
    /// The frozen map.
    #[must_use]
    pub fn map(&self) -> &Arc<FrozenMap> {
        &self.map
    }

    /// The path under which the file was pinned.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.map.identity().path
    }

    /// What each guard refuses, delays or only detects.
    #[must_use]
    pub fn guards(&self) -> Vec<GuardReport> {
        self.held.mode.guards(self.held.readers)
    }

    /// Whether other processes may read it.
    #[must_use]
    pub const fn local_readers(&self) -> LocalReaders {
        self.held.readers
    }

    /// Which guards it has.
    #[must_use]
    pub const fn guard_mode(&self) -> GuardMode {
        self.held.mode
    }

    /// Whether the operator asked for this pin by itself ([`PinOptions::keep`], now or in the record that was
    /// adopted): whoever serves the file then keeps it.
    #[must_use]
    pub fn was_kept(&self) -> bool {
        self.kept
    }

    /// The pinned file, open for reading only: to compare what the filesystem and the device say of its blocks.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Somebody who can compare the file, and its map, with what another way to its device reads.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when there are no more descriptors.
    pub fn witness(&self) -> Result<Witness, ExtentError> {
        let file = self
            .file
            .try_clone()
            .map_err(|source| ExtentError::io("copy the descriptor of", self.path(), source))?;
        Ok(Witness::new(file, Arc::clone(&self.map)))
    }

    /// Reads the living map, and looks at every guard.
    ///
    /// # Errors
    /// [`ExtentError::Io`] when the filesystem does not answer, which is no reason to trust the map.
    pub fn verify(&self) -> Result<VerifyReport, ExtentError> {
        let identity = self.map.identity();
        let report = verify_file(identity, self.map.extents(), &self.file)?.under(
            self.held.mode,
            &self.file,
            identity,
        )?;
        let recalled = self.guard.as_ref().and_then(|guard| guard.watch().reason());
        let lease_held = self.held.mode.takes_lease().then(|| lease::is_held(&self.file));
        Ok(VerifyReport { lease_held, recalled, ..report })
    }

    /// Whether the lease is being, or was, broken. Never without one.
    #[must_use]
    pub fn lease_broken(&self) -> bool {
        self.held.mode.takes_lease() && !lease::is_held(&self.file)
    }

    /// Sees the recall of this pin, also after the pin is gone. After a recall: stop new I/O, drain, fence, then
    /// [`keep`](Self::keep) or [`release`](Self::release), within `/proc/sys/fs/lease-break-time` seconds.
    #[must_use]
    pub fn recall(&self) -> Option<RecallWatch> {
        self.guard.as_ref().map(|guard| guard.watch().clone())
    }

    /// How the watch over the file is doing; `None` when it is not guarded any more.
    #[must_use]
    pub fn watched(&self) -> Option<WatchReport> {
        self.guard.as_ref().map(|guard| guard.post().watch.report())
    }

    /// Somebody who can look at the file again after a doubt, on another thread. `None` when it is not guarded any more.
    #[must_use]
    pub fn second_look(&self) -> Option<SecondLook> {
        self.guard.as_ref().map(|guard| SecondLook(Arc::clone(guard.post())))
    }

    /// A doubt was cleared by a second look, whose result this is. Whether that doubt was still the recall that stands:
    /// if not, nothing is cleared. Nobody may use the blocks in between.
    #[must_use]
    pub fn clear(&self, number: u64, looked: Baseline) -> bool {
        self.guard.as_ref().is_some_and(|guard| guard.clear(number, looked))
    }

    /// Lets go of what needs this process (mark and lease) and leaves immutable flag and record.
    ///
    /// Where somebody has blocks of the file mapped, by whatever way, the immutable flag is set anew if it was cleared: a local write beside an old block would put that back over what hosts wrote.
    pub fn keep(mut self) {
        let detail = self.keep_writers_out();
        self.note(PinStep::Kept, detail);
        self.let_go();
    }

    /// What there is to tell of it.
    fn keep_writers_out(&self) -> &'static str {
        // The area refuses writes until it is ended, by `unpin`; on a read-only filesystem nobody writes.
        if matches!(self.held.mode, GuardMode::SwapFile | GuardMode::ReadOnlyMount) {
            return "";
        }
        let path = self.path().display();
        match readers::keep_writers_out(&self.file, self.path()) {
            Ok(false) => "",
            Ok(true) => {
                tracing::warn!(%path, "somebody has it mapped: it is immutable again, until `fastice unpin`");
                "somebody has it mapped, so that it is immutable again: end that, then `fastice unpin`"
            }
            Err(error) => {
                tracing::error!(%path, %error, "somebody has it mapped, and it cannot be made immutable: a local write puts \
                                                old blocks back over what hosts wrote");
                "somebody has it mapped, and it could not be made immutable: a local write puts old blocks back"
            }
        }
    }

    /// The state directory of the pin.
    #[must_use]
    pub fn state(&self) -> &StateDir {
        &self.state
    }

    /// Adds to the events of the pin.
    pub fn note(&self, step: PinStep, detail: impl Into<String>) {
        self.state.note(&self.map.identity().key(), self.path(), self.map.generation(), step, detail);
    }

    /// Lets go of everything: clears the immutable flag if fastice set it, drops the guards, removes the record.
    ///
    /// # Errors
    /// The first failure. What needs this process is let go all the same; the record stays if the flag could not be
    /// cleared, or was not as a local reader keeps old blocks in the page cache, for [`unpin`](super::unpin).
    pub fn release(mut self) -> Result<(), ExtentError> {
        // Nobody may use the blocks any more, so that whoever waits for the lease need not wait for a busy disk as well:
        // what follows flushes. Until the record is gone the lock keeps all others of our kind away.
        self.let_go_of_guards();
        let alone = self.state.lock()?;
        let path = self.path().to_path_buf();
        let identity = self.map.identity().clone();
        let (file, state) = (Arc::clone(&self.file), self.state.clone());
        let is_frozen = self.held.mode == GuardMode::FrozenFilesystem;
        if self.held.readers == LocalReaders::Allow || !self.held.mode.takes_lease() {
            // Else nobody had it open.
            settle_cache(&file, &path, identity.size.get())?;
        }
        // Frozen again at the end, when other pins want that.
        let thawed = is_frozen.then(|| Thawed::begin(&file, &path, &state, &identity, true)).transpose()?;
        if self.held.clear_immutable {
            change_flag(&self.file, false)
                .and_then(|()| self.file.sync_all())
                .map_err(|error| ExtentError::io("clear the immutable flag of", &path, error))?;
        }
        if self.held.mode == GuardMode::SwapFile {
            swap_file::end(&self.file, &path, self.held.header_written)?;
        }
        if self.update_mtime && self.held.mode != GuardMode::ReadOnlyMount {
            // Not while the flag is set. Without it the file is as good; a backup by time misses it.
            if let Err(error) = set_modified_now(&self.file) {
                tracing::warn!(path = %path.display(), %error, "the modification time is not set");
            }
        }
        self.state.remove(&self.map.identity().key())?;
        drop(thawed);
        if let Some(lock) = self.lock.take() {
            lock.remove(&alone);
        }
        self.note(PinStep::Released, "");
        tracing::info!(path = %path.display(), "released");
        Ok(())
    }

    fn let_go(&mut self) {
        self.let_go_of_guards();
        self.lock = None;
    }

    fn let_go_of_guards(&mut self) {
        if let Some(guard) = self.guard.take() {
            // Whatever this process read through the filesystem meanwhile is older than what hosts wrote since.
            if let Err(error) = drop_cache(&self.file) {
                let path = self.path().display();
                tracing::error!(%path, %error, "cannot drop the page cache: readers may see old data until it goes");
            }
            lease::drop_lease(&guard);
            drop(guard);
        }
    }
}

impl Drop for PinnedFile {
    fn drop(&mut self) {
        if self.guard.is_some() {
            let path = self.path().display();
            tracing::warn!(%path, "pin left behind: the file stays immutable, see `fastice unpin`");
            self.let_go();
        }
    }
}

pub(super) fn set_modified_now(file: &File) -> io::Result<()> {
    let stamp = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    let times = Timestamps { last_access: stamp(UTIME_OMIT), last_modification: stamp(UTIME_NOW) };
    rustix::fs::futimens(file, &times)?;
    file.sync_all()
}
