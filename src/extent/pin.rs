//! Pinning: guards first, then the map, then the guards again.
//!
//! ```text
//!   lock on the file            no other fastice pins it, whatever its state directory (see `claim`)
//!   fsync                       what was written is on the device
//!   open-permission mark        nobody opens the file from now on
//!   record of the intent        so that a crash from here on can be mended
//!   immutable flag              the filesystem refuses every change of data, size, name and flags
//!   write lease                 proof that nobody had it open before
//!   read lease, fsync           whoever gets past all this is heard of, and waits; nothing is dirty, and the flag is durable
//!   FIEMAP with SYNC            the map, accepted by every rule
//!   immutable? lease? map?      all of it again
//!   drop the page cache         reads through the filesystem see what is on the device
//!   frozen map, record          sealed in memory, stored on disk
//! ```
//!
//! With other guards than the default ones (see `mode`) a swap area takes the place of the lease, before the flag, or a
//! read-only filesystem that of the flag; a freeze comes last of all.
//! A failure undoes, last first, what was done so far.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::accept::{Violation, of_file};
use super::claim::{Claim, why_denied};
use super::compare::compare_extents;
use super::error::{ExtentError, IMMUTABLE, StateProblem};
use super::facts::{FileFacts, is_immutable};
use super::find::refuse_copy;
use super::guard::{Guard, OnRecall, Warden};
use super::identity::MapIdentity;
use super::lease;
use super::map::{Extent, FrozenMap, side_by_side};
use super::mode::GuardMode;
use super::mode::frozen::{self, Thawed};
use super::mode::read_only;
use super::mode::swap_file::{self, SwapArea, SwapPlan};
use super::owner::Owner;
use super::pinned::{Held, PinnedFile};
use super::prepare::prepare;
use super::progress::Progress;
use super::readers::{self, LocalReaders};
use super::record::{StoredMap, StoredPin, without_extents};
use super::state::{StagedRecord, StateDir};
use super::survey::{Survey, absolute, fit_extents, open_read, survey_file, survey_start, to_extents};
use super::timeline::PinStep;
use super::undo::{ImmutableFlag, IntentRecord};
use super::unpin::{await_last_owners, compare_map, refuse_if_held};
use super::verify::verify_at_cost;
use super::watch::{WatchOptions, baseline_of};
use crate::units::BlockSize;

/// How to pin.
#[derive(Clone, Default)]
pub struct PinOptions {
    /// Whether to make the file fit to serve first: see [`prepare`].
    pub prepare: bool,
    /// Which guards hold the map. Without it those of the record, if there is one, and else the default ones. The swap-file
    /// guard destroys the first 8 KiB of the file; what they hold is given up by `prepare`.
    pub guard: Option<GuardMode>,
    /// Whether other processes may read the file meanwhile. Without it as its record says, if there is one; else they may not.
    pub local_readers: Option<LocalReaders>,
    /// The block to pad the size to when preparing; the disk's logical block if that is larger.
    pub block_size: Option<BlockSize>,
    /// The pin is to stay when this process lets go of it: `fastice pin`. A pin that once was meant so stays so.
    pub keep: bool,
    /// The map of a leftover pin need not be that of the file any more: it is replaced by the living one, as the next
    /// generation. For the operator who has looked: `fastice pin --resume`.
    pub accept_change: bool,
    /// Whether [`PinnedFile::release`] sets the file's modification time: what hosts write goes past the filesystem, so that
    /// backups would see no change. Not possible on a read-only filesystem.
    pub update_mtime: bool,
    /// Who guards and watches the file. Without one it gets a warden of its own, which costs two threads.
    pub warden: Option<Arc<Warden>>,
    /// What to call when the pin is recalled, beside what [`PinnedFile::recall`] shows. Runs on the guard's thread.
    pub on_recall: Option<OnRecall>,
}

impl std::fmt::Debug for PinOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { prepare, guard, local_readers, block_size, keep, accept_change, update_mtime, .. } = self;
        f.debug_struct("PinOptions")
            .field("prepare", prepare)
            .field("guard", guard)
            .field("local_readers", local_readers)
            .field("block_size", block_size)
            .field("keep", keep)
            .field("accept_change", accept_change)
            .field("update_mtime", update_mtime)
            .field("on_recall", &self.on_recall.is_some())
            .finish_non_exhaustive()
    }
}

/// Pins the file at `path`, and records the pin in `state`.
///
/// A leftover record of the file, of a process that is gone, is adopted: its map must be that of the living file.
///
/// # Errors
/// Any [`ExtentError`]; the guards set so far are then undone.
pub fn pin(
    path: &Path,
    options: &PinOptions,
    state: &StateDir,
    progress: &mut dyn Progress,
) -> Result<PinnedFile, ExtentError> {
    let path = absolute(path)?;
    refuse_if_held(&path, state)?;
    await_last_owners(&path, state)?;
    if options.prepare && needs_preparing(&path, options, state)? {
        prepare(&path, options.block_size, progress)?;
    }
    progress.stage("pinning");
    let _alone = state.lock()?;
    let file = Arc::new(open_read(&path).map_err(|error| why_denied(error, state.path()))?);
    // The whole map is read when the guards are set. What forbids to serve a file is mostly seen at its beginning.
    let mut before = survey_start(&file, &path)?;
    // Whether it is to be one is told by the record.
    let is_our_swap = before.facts.swap && swap_file::is_ours(&file);
    before.violations.retain(|violation| !is_our_swap || *violation != Violation::Swap);
    if !before.violations.is_empty() {
        refuse_if_changed(&file, &before, options, state)?;
    }
    refuse_violations(&path, before.violations)?;
    let identity = before.facts.identity().map_err(|first| refusal(&path, first, 1))?;
    let key = identity.key();
    let lock = match state.lock_pin(&key)? {
        Ok(lock) => lock,
        Err(owner) => return Err(ExtentError::AlreadyPinned { path, owner: Box::new(owner) }),
    };
    let claim = Claim::lay(&file, &path, &key, state.path())?;
    let previous = state.load(&key)?;
    if let Some(previous) = &previous {
        refuse_copy(previous, &identity)?;
        state.await_commands_of(&previous.owner, &path)?;
    }
    let mode = mode_of(&path, options.guard, previous.as_ref().map(|previous| previous.guard))?;
    if is_our_swap && mode != GuardMode::SwapFile {
        let problem =
            "the file is a swap area of fastice without a record: pin it so, or `fastice unpin --force` it";
        return Err(ExtentError::Guard { path, guard: swap_file::SWAP_FILE, problem, source: None });
    }
    let readers = options.local_readers.or(previous.as_ref().map(|previous| previous.local_readers));
    let readers = readers.unwrap_or_default();
    if let Some(obstacle) = readers::obstacle(readers, mode, &file, &before.facts) {
        return Err(obstacle);
    }
    let attempt = Attempt { file: &file, facts: &before.facts, state, options, mode, readers };
    let kept = options.keep || previous.as_ref().is_some_and(|previous| previous.kept);
    let (guard, map, held) = attempt.run(identity, previous, progress)?;
    tracing::info!(path = %path.display(), generation = map.generation(), extents = map.extent_count(), "pinned");
    let state = state.clone();
    Ok(PinnedFile {
        map,
        file,
        guard: Some(guard),
        lock: Some(lock),
        _claim: claim,
        state,
        held,
        kept,
        update_mtime: options.update_mtime,
    })
}

/// What is wrong with guards that are not those of the record.
pub(super) const OTHER_GUARDS: &str = "it is pinned with other guards";

/// The guards that are asked for, which must be those of a record that there is.
pub(super) fn mode_of(
    path: &Path,
    asked: Option<GuardMode>,
    recorded: Option<GuardMode>,
) -> Result<GuardMode, ExtentError> {
    match (asked, recorded) {
        (Some(asked), Some(recorded)) if asked != recorded => Err(ExtentError::Guard {
            path: path.to_path_buf(),
            guard: asked.name(),
            problem: OTHER_GUARDS,
            source: None,
        }),
        _ => Ok(asked.or(recorded).unwrap_or_default()),
    }
}

/// Whether something of the file can be mended, or its size is no multiple of the block that was asked for, which may
/// be larger than that of the disk.
fn needs_preparing(path: &Path, options: &PinOptions, state: &StateDir) -> Result<bool, ExtentError> {
    let file = open_read(path).map_err(|error| why_denied(error, state.path()))?;
    let survey = survey_file(&file, path)?;
    let needs = is_to_be_prepared(&survey, options.block_size);
    if let (true, Some(identity)) = (needs, survey.identity()) {
        refuse_if_changed(&file, &survey, options, state)?;
        frozen::forget_stale_mark(state, &identity)?;
        if frozen::is_marked(state, &identity) {
            return Err(frozen::not_prepared(path));
        }
    }
    Ok(needs)
}

/// A file that was fit when it was pinned, and is not now, was changed: that is what is wrong with it, and nothing is to be
/// mended unasked.
fn refuse_if_changed(
    file: &File,
    survey: &Survey,
    options: &PinOptions,
    state: &StateDir,
) -> Result<(), ExtentError> {
    let Some(identity) = survey.identity().filter(|_| !options.accept_change) else { return Ok(()) };
    let Some(record) = state.load(&identity.key())? else { return Ok(()) };
    compare_map(&record, file, false).map(|_| ())
}

/// The same of a file that was looked at.
pub(super) fn is_to_be_prepared(survey: &Survey, block: Option<BlockSize>) -> bool {
    let ends_in_a_block = block.is_none_or(|block| block.blocks_in(survey.facts.size).is_some());
    !ends_in_a_block || survey.violations.iter().any(Violation::is_preparable)
}

fn refuse_violations(path: &Path, violations: Vec<Violation>) -> Result<(), ExtentError> {
    let count = violations.len();
    violations.into_iter().next().map_or(Ok(()), |first| Err(refusal(path, first, count)))
}

fn refusal(path: &Path, first: Violation, count: usize) -> ExtentError {
    ExtentError::NotAccepted { path: path.to_path_buf(), first: Box::new(first), count }
}

/// One attempt to pin an open file that has been surveyed.
struct Attempt<'a> {
    file: &'a Arc<File>,
    facts: &'a FileFacts,
    state: &'a StateDir,
    options: &'a PinOptions,
    mode: GuardMode,
    readers: LocalReaders,
}

impl Attempt<'_> {
    /// Sets the guards and freezes the map. The order of the local variables is the order of the steps; when one
    /// fails, Rust drops the earlier ones, last first, and each undoes itself.
    fn run(
        &self,
        identity: MapIdentity,
        previous: Option<StoredPin>,
        progress: &mut dyn Progress,
    ) -> Result<(Guard, Arc<FrozenMap>, Held), ExtentError> {
        let intent_key = identity.key();
        let thawed = self.make_way(&identity)?;
        let generation = self.state.next_generation(&intent_key)?;
        self.sync()?;
        let guard = self
            .start_guard()
            .map_err(|source| self.guard_error("open-permission", "cannot be set", Some(source)))?;
        let foreign = is_immutable(self.file, self.path())?
            && previous.as_ref().is_none_or(|previous| previous.immutable_was_set_before);
        let was = |what: fn(&StoredPin) -> bool| previous.as_ref().is_some_and(what);
        let (kept, options) = (self.options.keep || was(|pin| pin.kept), self.options);
        let swap = self.plan_swap()?;
        let header_written = swap.is_some_and(|swap| swap.write_header) || was(|pin| pin.header_written);
        // A leftover map stays recorded, with the identity it is the map of, until it is known to be true.
        let (frozen, map) = match &previous {
            Some(StoredPin { identity, map: Some(map), .. }) => (identity.clone(), Some(map.clone())),
            _ => (MapIdentity { reserved: self.mode.reserved(), ..identity }, None),
        };
        let intent = StoredPin {
            identity: frozen,
            generation,
            owner: Owner::this_process(),
            immutable_was_set_before: foreign,
            kept,
            guard: self.mode,
            local_readers: self.readers,
            header_written,
            update_mtime: options.update_mtime || was(|pin| pin.update_mtime),
            map,
        };
        let record = IntentRecord::store(self.state, &intent, previous)?;
        if self.mode == GuardMode::FrozenFilesystem {
            frozen::refuse_foreign(self.file, self.path(), self.state, &intent.identity)?;
        }
        let swap = swap.map(|swap| swap.carry_out(self.file, self.path(), foreign)).transpose()?;
        let sets_flag = self.mode.sets_flag();
        let flag = sets_flag.then(|| ImmutableFlag::set(self.file, self.path())).transpose()?;
        let prove = || lease::prove(self.file, self.facts, &guard, self.readers);
        let lease = self.mode.takes_lease().then(prove).transpose()?;
        if lease.is_some() {
            // At once: the kernel opens the file for the guard to ask about an open, and that breaks a write lease.
            lease::downgrade(&guard, self.facts)?;
        }
        self.sync()?;
        progress.stage("reading the extent map");
        let (identity, extents) = self.read_extents()?;
        if let Some(stored) = intent.map.as_ref().filter(|_| !self.options.accept_change) {
            self.refuse_changed(stored, &intent.identity, &identity, &extents)?;
        }
        let map = FrozenMap::from_extents(identity, generation, extents)?;
        let baseline = baseline_of(self.file, self.path())?;
        progress.stage("checking the guards");
        let (cost, staged) = self.check_and_stage(&map, &guard, &intent)?;
        readers::drop_cache(self.file)
            .map_err(|error| ExtentError::io("drop the page cache of", self.path(), error))?;
        progress.stage("recording the pin");
        staged.commit()?;
        // From here on nothing of this writes to the filesystem.
        thawed.map(Thawed::freeze).transpose()?;
        // The map is the living one: whatever ended an earlier grant is over.
        self.state.clear_incident(&intent_key)?;
        record.disarm();
        swap.into_iter().for_each(SwapArea::disarm);
        flag.into_iter().for_each(ImmutableFlag::disarm);
        lease.into_iter().for_each(lease::LeaseHold::disarm);
        let extents = format!("{} extents", map.extent_count());
        self.state.note(&intent_key, self.path(), generation, PinStep::Pinned, extents);
        let map = map.shared();
        guard.watch_over(&map, baseline, cost);
        Ok((guard, map, self.held(foreign, header_written)))
    }

    /// What outlives this process, and whose it is.
    const fn held(&self, flag_is_foreign: bool, header_written: bool) -> Held {
        let clear_immutable = self.mode.sets_flag() && !flag_is_foreign;
        Held { mode: self.mode, readers: self.readers, clear_immutable, header_written }
    }

    /// Refuses a filesystem on which the guards that are asked for are none. Thaws it if fastice has frozen it and is to
    /// freeze it again; refuses one that it has frozen for others.
    fn make_way(&self, identity: &MapIdentity) -> Result<Option<Thawed<'_>>, ExtentError> {
        if self.mode == GuardMode::ReadOnlyMount {
            read_only::refuse_unfit(self.facts, Some(self.state.path()))?;
        }
        frozen::forget_stale_mark(self.state, identity)?;
        if self.mode != GuardMode::FrozenFilesystem {
            return match frozen::is_marked(self.state, identity) {
                true => Err(frozen::for_others(self.path(), self.mode)),
                false => Ok(None),
            };
        }
        frozen::refuse_unfit(self.facts, Some(self.state.path()))?;
        frozen::refuse_mixed(self.state, self.path(), identity)?;
        Thawed::begin(self.file, self.path(), self.state, identity, false).map(Some)
    }

    /// What has to be done for a swap area; `None` when there shall be none.
    fn plan_swap(&self) -> Result<Option<SwapPlan>, ExtentError> {
        let plan = || SwapPlan::make(self.file, self.facts, self.options.prepare);
        (self.mode == GuardMode::SwapFile).then(plan).transpose()
    }

    /// The extents of a file that is fit, and whose they are.
    fn read_extents(&self) -> Result<(MapIdentity, Vec<Extent>), ExtentError> {
        let identity_of = |facts: &FileFacts| {
            let identity = facts.identity().map_err(|first| refusal(self.path(), first, 1))?;
            Ok::<_, ExtentError>(MapIdentity { reserved: self.mode.reserved(), ..identity })
        };
        let facts = FileFacts::gather(self.file, self.path())?;
        if self.refuse_unfit(of_file(&facts)).is_ok()
            && let Some(extents) = fit_extents(self.file, self.path(), &facts)?
        {
            return Ok((identity_of(&facts)?, extents));
        }
        // Something tells against it: all that does is said.
        let Survey { facts, records, violations } = survey_file(self.file, self.path())?;
        self.refuse_unfit(violations)?;
        let identity = identity_of(&facts)?;
        let extents = to_extents(&records, identity.disk.partition_start, identity.size);
        Ok((identity, extents))
    }

    /// Refuses what is not fit, but for what the guards themselves have made of it.
    fn refuse_unfit(&self, mut violations: Vec<Violation>) -> Result<(), ExtentError> {
        violations.retain(|found| self.mode != GuardMode::SwapFile || *found != Violation::Swap);
        refuse_violations(self.path(), violations)
    }

    fn start_guard(&self) -> io::Result<Guard> {
        let warden = match &self.options.warden {
            Some(warden) => Arc::clone(warden),
            None => Warden::start(WatchOptions::default())?,
        };
        let kind = (self.mode, self.readers);
        Guard::start(warden, self.file, self.facts.path.clone(), kind, self.options.on_recall.clone())
    }

    fn path(&self) -> &Path {
        &self.facts.path
    }

    fn sync(&self) -> Result<(), ExtentError> {
        self.file.sync_all().map_err(|error| ExtentError::io("flush", self.path(), error))
    }

    fn guard_error(
        &self,
        guard: &'static str,
        problem: &'static str,
        source: Option<io::Error>,
    ) -> ExtentError {
        ExtentError::Guard { path: self.path().to_path_buf(), guard, problem, source }
    }

    /// Checks the guards and the map again. The record is written beside the old one meanwhile, and takes its place only when
    /// all was found whole. Also what the look at the map cost in processor time.
    fn check_and_stage(
        &self,
        map: &FrozenMap,
        guard: &Guard,
        intent: &StoredPin,
    ) -> Result<(Duration, StagedRecord), ExtentError> {
        let stage = || {
            let head = StoredMap { checksum: map.checksum(), extents: Vec::new() };
            let pin =
                StoredPin { identity: map.identity().clone(), map: Some(head), ..without_extents(intent) };
            self.state.stage(&pin, map.extents())
        };
        let (checked, staged) = side_by_side(true, || self.check_again(map, guard), stage);
        let cost = checked?;
        Ok((cost, staged?))
    }

    /// A leftover record's map must be that of the file; its size too.
    fn refuse_changed(
        &self,
        stored: &StoredMap,
        frozen: &MapIdentity,
        living: &MapIdentity,
        extents: &[Extent],
    ) -> Result<(), ExtentError> {
        let path = self.path().to_path_buf();
        if frozen.size != living.size {
            return Err(ExtentError::Resized { path, frozen: frozen.size, living: living.size });
        }
        match compare_extents(&stored.extents, extents, living.size).first {
            None => Ok(()),
            Some(difference) => Err(ExtentError::Changed { path, difference }),
        }
    }

    /// Whether the guards were in place all the while the map was read, and the map is still the same.
    /// What the look at the map cost in processor time.
    fn check_again(&self, map: &FrozenMap, guard: &Guard) -> Result<Duration, ExtentError> {
        if self.mode.sets_flag() && !is_immutable(self.file, self.path())? {
            return Err(self.guard_error(IMMUTABLE, "it was cleared meanwhile", None));
        }
        let (report, cost) = verify_at_cost(map.identity(), map.extents(), self.file)?;
        let report = report.under(self.mode, self.file, map.identity())?;
        // The freeze comes last.
        if !report.guard_holds && self.mode != GuardMode::FrozenFilesystem {
            return Err(self.guard_error(self.mode.name(), "it was taken away meanwhile", None));
        }
        if let Some(difference) = report.comparison.first {
            return Err(ExtentError::Changed { path: self.path().to_path_buf(), difference });
        }
        if !report.size_is_frozen {
            let path = self.path().to_path_buf();
            return Err(ExtentError::Resized { path, frozen: map.identity().size, living: report.size });
        }
        if (self.mode.takes_lease() && !lease::is_held(self.file)) || guard.watch().reason().is_some() {
            return Err(self.guard_error("lease", "it was broken meanwhile", None));
        }
        Ok(cost)
    }
}

/// What [`StateProblem::Missing`] is an error of.
pub(super) fn no_record(path: &Path) -> ExtentError {
    ExtentError::State { path: path.to_path_buf(), problem: StateProblem::Missing }
}
