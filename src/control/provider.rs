//! Backings of namespaces: files pinned, devices opened, each once, and kept over reloads as long as they are named.

mod recall;
mod set_aside;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};

use self::recall::Leaving;
use self::set_aside::SetAside;
use super::backings::{Backed, Backings};
use super::disks::Disks;
use super::error::{DiskError, ServeError};
use super::event::Event;
use super::proof::Voucher;
use super::tripwire::Tripwire;
use crate::block::nvme::Reach;
use crate::block::{BlockDevice, MemDevice, MemOptions, NullDevice};
use crate::chain::Chain;
use crate::config::{Backing, Config, DeviceWay, Namespace, NvmeChoice};
use crate::extent::{
    CommandsHold, ExtentError, FrozenMap, GuardMode, HandedOver, LocalReaders, MapIdentity, OnRecall,
    Oversight, PinOptions, PinnedFile, Progress, StateDir, Warden, WatchOptions, WatchReport, pin,
};
use crate::fabrics::{Export, Identity, Target};
use crate::units::{BlockSize, ByteLen};

/// What a file that cannot be had does to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It is left aside, and the others are served.
    SetAside,
    /// Nothing comes of any.
    Fails,
}

/// A file whose blocks are served.
enum Held {
    /// Its filesystem is mounted, and the guards hold its map.
    Pinned { pinned: PinnedFile, tripwire: Arc<Tripwire> },
    /// Its filesystem is not mounted, and cannot be meanwhile.
    HandedOver(HandedOver),
}

impl Held {
    fn map(&self) -> &Arc<FrozenMap> {
        match self {
            Self::Pinned { pinned, .. } => pinned.map(),
            Self::HandedOver(taken) => taken.map(),
        }
    }

    const fn tripwire(&self) -> Option<&Arc<Tripwire>> {
        match self {
            Self::Pinned { tripwire, .. } => Some(tripwire),
            Self::HandedOver(_) => None,
        }
    }

    fn voucher(&self) -> Result<Voucher, ExtentError> {
        Ok(match self {
            Self::Pinned { pinned, .. } => Voucher::Filesystem(pinned.witness()?),
            Self::HandedOver(taken) => Voucher::Device(Arc::clone(taken.map())),
        })
    }
}

/// Pins files and opens devices.
pub(super) struct Provider {
    state: StateDir,
    target: Weak<Target>,
    events: Sender<Event>,
    files: BTreeMap<PathBuf, Held>,
    /// Guards and watches all files; from the first one on.
    warden: Option<Arc<Warden>>,
    watch: WatchOptions,
    /// What the warden and the cores tell each other.
    oversight: Arc<Oversight>,
    disks: Disks,
    /// Files on their way out.
    leaving: Vec<Leaving>,
}

impl Provider {
    pub(super) fn new(
        state: StateDir,
        target: &Arc<Target>,
        events: Sender<Event>,
        reach: Arc<dyn Reach>,
        commands: Arc<CommandsHold>,
        config: &Config,
    ) -> Result<Self, ExtentError> {
        let oversight =
            Oversight::new().map_err(|source| ExtentError::io("guard the files of", state.path(), source))?;
        let oversight = Arc::new(oversight);
        let (files, leaving) = (BTreeMap::new(), Vec::new());
        let disks = Disks::new(target, events.clone(), reach, commands, config.cores.len());
        let watch = WatchOptions { share: config.watch.part(), ..WatchOptions::default() };
        let target = Arc::downgrade(target);
        Ok(Self { state, target, events, files, warden: None, watch, oversight, disks, leaving })
    }

    pub(super) const fn state(&self) -> &StateDir {
        &self.state
    }

    /// Whom a core asks after a pause.
    pub(super) const fn oversight(&self) -> &Arc<Oversight> {
        &self.oversight
    }

    /// How the watch over the file of this map is doing; `None` when it is not watched.
    pub(super) fn watched(&self, map: &Arc<FrozenMap>) -> Option<WatchReport> {
        self.files.values().find_map(|held| match held {
            Held::Pinned { pinned, .. } if Arc::ptr_eq(pinned.map(), map) => pinned.watched(),
            _ => None,
        })
    }

    /// Which guards hold the file of this map; `None` when none does, as its filesystem is not mounted.
    pub(super) fn guard_mode(&self, map: &Arc<FrozenMap>) -> Option<GuardMode> {
        self.files.values().find_map(|held| match held {
            Held::Pinned { pinned, .. } if Arc::ptr_eq(pinned.map(), map) => Some(pinned.guard_mode()),
            _ => None,
        })
    }

    /// Whether local processes may read the file of this map; `None` when its filesystem is not mounted.
    pub(super) fn local_readers(&self, map: &Arc<FrozenMap>) -> Option<LocalReaders> {
        self.files.values().find_map(|held| match held {
            Held::Pinned { pinned, .. } if Arc::ptr_eq(pinned.map(), map) => Some(pinned.local_readers()),
            _ => None,
        })
    }

    /// The guards that are held on the file of this map.
    pub(super) fn guards(&self, map: &Arc<FrozenMap>) -> Vec<String> {
        let found = self.files.values().find_map(|held| match held {
            Held::Pinned { pinned, .. } if Arc::ptr_eq(pinned.map(), map) && pinned.watched().is_some() => {
                Some(pinned.guards().iter().map(|guard| guard.name.to_owned()).collect())
            }
            Held::HandedOver(taken) if Arc::ptr_eq(taken.map(), map) && taken.is_held_exclusively() => {
                Some(vec!["unmounted device, held exclusively".to_owned()])
            }
            _ => None,
        });
        found.unwrap_or_default()
    }

    /// The devices that our own driver drives, by the way to their controller and their namespace.
    pub(super) fn nvme_standings(&self) -> Vec<(String, u32, crate::block::nvme::Standing)> {
        self.disks.nvme_standings()
    }

    /// The disks under the files.
    pub(super) fn disks(&mut self) -> &mut Disks {
        &mut self.disks
    }

    /// Backs every namespace of `config`. What `old` already has stays the same object, so that hosts notice nothing.
    ///
    /// # Errors
    /// The first file or device that cannot be had, but for files that `old` had to leave already, and with
    /// [`Unfit::SetAside`] as long as anything can be served. Files pinned for nothing are let go by
    /// [`Provider::release_unnamed`].
    pub(super) fn back(
        &mut self,
        config: &Config,
        old: &Backings,
        unfit: Unfit,
        progress: &mut dyn Progress,
    ) -> Result<Backings, ServeError> {
        let mut aside = Vec::new();
        let backings = self.back_each(config, old, unfit, &mut aside, progress);
        self.disks.settle();
        let backings = backings?;
        if unfit == Unfit::SetAside {
            // One that was pinned, but has no device.
            self.release_unnamed(&backings, std::iter::empty());
        }
        set_aside::tell(&self.state, aside, backings.whole())?;
        Ok(backings)
    }

    fn back_each(
        &mut self,
        config: &Config,
        old: &Backings,
        unfit: Unfit,
        aside: &mut Vec<SetAside>,
        progress: &mut dyn Progress,
    ) -> Result<Backings, ServeError> {
        let mut backings = BTreeMap::new();
        for subsystem in &config.subsystems {
            let nqn = subsystem.nqn.to_string();
            for namespace in &subsystem.namespaces {
                let key = (nqn.clone(), namespace.nsid);
                let before = old.0.get(&key).filter(|backed| backed.namespace == *namespace);
                let whole = before.filter(|backed| backed.fault.is_none()).cloned();
                let backed = match whole {
                    Some(backed) => backed,
                    None => match (self.open(&nqn, namespace, &config.nvme, progress), before, unfit) {
                        (Ok(backed), ..) => backed,
                        // One file that is not mended yet must not stand in the way of all others.
                        (Err(error), Some(left), _) => {
                            let why = Chain(&error).to_string();
                            tracing::error!(nqn, nsid = namespace.nsid, error = why, "it stays fenced");
                            Backed { fault: Some(why), ..left.clone() }
                        }
                        (Err(error), None, Unfit::SetAside)
                            if namespace.is_of_a_file() && error.is_of_one_file() =>
                        {
                            let one = SetAside::new(&self.state, &nqn, namespace, error);
                            let backed = one.backed();
                            aside.push(one);
                            backed
                        }
                        (Err(error), None, _) => return Err(error),
                    },
                };
                backings.insert(key, backed);
            }
        }
        Ok(Backings(backings))
    }

    fn open(
        &mut self,
        nqn: &str,
        namespace: &Namespace,
        choices: &[NvmeChoice],
        progress: &mut dyn Progress,
    ) -> Result<Backed, ServeError> {
        let device_error = |source| {
            let (nqn, source) = (nqn.to_owned(), Box::new(source));
            ServeError::Device { nqn, nsid: namespace.nsid, source }
        };
        let open_error = |source| device_error(DiskError::Open(source));
        let block_size = namespace.block_size.unwrap_or(BlockSize::B4096);
        let (device, map, identity): (Arc<dyn BlockDevice>, _, _) = match &namespace.backing {
            Backing::File { path, device: DeviceWay::HandedOver, .. } => {
                let (map, device) = self.take_over(path, choices).map_err(device_error)?;
                let name = name_of(map.identity());
                (device, Some(map), name)
            }
            Backing::File { path, device: DeviceWay::Unmounted, .. } => {
                let (map, device) = self.take_unmounted(path, namespace.read_only).map_err(device_error)?;
                let name = name_of(map.identity());
                (device, Some(map), name)
            }
            Backing::File { path, prepare, device, update_mtime, guard, local_readers } => {
                let wanted = PinOptions {
                    prepare: *prepare,
                    guard: *guard,
                    local_readers: *local_readers,
                    block_size: namespace.block_size,
                    update_mtime: *update_mtime && !namespace.read_only,
                    ..PinOptions::default()
                };
                let map = self.pin(path, wanted, progress)?;
                let name = name_of(map.identity());
                let device = self.disk(path, *device, namespace.read_only, choices).map_err(device_error)?;
                (device, Some(map), name)
            }
            Backing::Memory { len } => {
                let device = MemDevice::new(MemOptions::new(*len, block_size)).map_err(open_error)?;
                (Arc::new(device), None, Identity::named("memory"))
            }
            Backing::Null { len } => {
                let device = NullDevice::new(*len, block_size).map_err(open_error)?;
                (Arc::new(device), None, Identity::named("null"))
            }
        };
        Ok(Backed::whole(namespace, device, map, identity))
    }

    fn pin(
        &mut self,
        path: &Path,
        wanted: PinOptions,
        progress: &mut dyn Progress,
    ) -> Result<Arc<FrozenMap>, ServeError> {
        if let Some(held) = self.files.get(path) {
            let other = match held {
                Held::Pinned { pinned, .. } => {
                    let guard = wanted.guard.filter(|guard| *guard != pinned.guard_mode());
                    let readers = wanted.local_readers.filter(|readers| *readers != pinned.local_readers());
                    guard.map(GuardMode::name).or_else(|| readers.map(|_| "local-readers"))
                }
                Held::HandedOver(_) => None,
            };
            let problem =
                "it is served with other guards: take it out of the configuration, reload, and add it again";
            return match other {
                Some(guard) => {
                    let path = path.to_owned();
                    Err(ExtentError::Guard { path, guard, problem, source: None }.into())
                }
                None => Ok(Arc::clone(held.map())),
            };
        }
        let tripwire = Tripwire::new(path.to_owned(), self.target.clone(), self.events.clone());
        let wire = Arc::clone(&tripwire);
        let on_recall: OnRecall = Arc::new(move |incident| wire.trip(incident));
        let warden = Some(self.warden(path)?);
        let options = PinOptions { warden, on_recall: Some(on_recall), ..wanted };
        let pinned = pin(path, &options, &self.state, progress)?;
        let map = Arc::clone(pinned.map());
        tripwire.holds(&map);
        self.files.insert(path.to_owned(), Held::Pinned { pinned, tripwire });
        Ok(map)
    }

    fn warden(&mut self, path: &Path) -> Result<Arc<Warden>, ExtentError> {
        if let Some(warden) = self.warden.as_ref().filter(|warden| warden.is_whole()) {
            return Ok(Arc::clone(warden));
        }
        let warden = Warden::start_with(self.watch, Arc::clone(&self.oversight)).map_err(|source| {
            ExtentError::Guard {
                path: path.to_owned(),
                guard: "open-permission",
                problem: "cannot be set",
                source: Some(source),
            }
        })?;
        self.warden = Some(Arc::clone(&warden));
        Ok(warden)
    }

    /// A file that was handed over, and its disk.
    fn take_over(
        &mut self,
        path: &Path,
        choices: &[NvmeChoice],
    ) -> Result<(Arc<FrozenMap>, Arc<dyn BlockDevice>), DiskError> {
        if let Some(Held::HandedOver(taken)) = self.files.get(path) {
            // The namespace changed; the file is ours already.
            let map = Arc::clone(taken.map());
            let device = self.disks.of_taken(&map, choices)?;
            return Ok((map, device));
        }
        let (taken, device) = self.disks.take_over(path, &self.state, choices)?;
        let map = Arc::clone(taken.map());
        self.files.insert(path.to_owned(), Held::HandedOver(taken));
        Ok((map, device))
    }

    /// A file of a filesystem that is not mounted, and its disk.
    fn take_unmounted(
        &mut self,
        path: &Path,
        read_only: bool,
    ) -> Result<(Arc<FrozenMap>, Arc<dyn BlockDevice>), DiskError> {
        let map = match self.files.get(path) {
            // The namespace changed; the file is ours already.
            Some(Held::HandedOver(taken)) => Arc::clone(taken.map()),
            _ => {
                let taken = self.disks.take_unmounted(path, &self.state)?;
                let map = Arc::clone(taken.map());
                self.files.insert(path.to_owned(), Held::HandedOver(taken));
                map
            }
        };
        let device = self.disks.of_unmounted(&map, read_only)?;
        Ok((map, device))
    }

    /// The disk under a file that was just pinned.
    fn disk(
        &mut self,
        path: &Path,
        way: DeviceWay,
        read_only: bool,
        choices: &[NvmeChoice],
    ) -> Result<Arc<dyn BlockDevice>, DiskError> {
        let Some(Held::Pinned { pinned, .. }) = self.files.get(path) else {
            let gone = std::io::ErrorKind::NotFound;
            return Err(ExtentError::io("find the pin of", path, gone).into());
        };
        self.disks.open(pinned, way, read_only, choices)
    }

    /// Who can say whether the maps of `exports`, and the blocks under them, are still what they were.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub(super) fn vouchers(&self, exports: &[Arc<Export>]) -> Result<Vec<Voucher>, ExtentError> {
        let held = |map: &Arc<FrozenMap>| self.files.values().find(|held| Arc::ptr_eq(held.map(), map));
        let maps = exports.iter().filter_map(|export| export.map.as_ref());
        maps.filter_map(held).map(Held::voucher).collect()
    }

    /// From now on a recall of a file fences these exports at once. To be called before hosts see them.
    pub(super) fn arm(&self, exports: &[Arc<Export>]) {
        exports.iter().for_each(|export| self.wires_of(export).for_each(|wire| wire.arm(export)));
    }

    /// The export is gone, and drained.
    pub(super) fn disarm(&self, export: &Export) {
        self.wires_of(export).for_each(|wire| wire.disarm(export));
    }

    fn wires_of(&self, export: &Export) -> impl Iterator<Item = &Arc<Tripwire>> {
        let map = export.map.clone();
        let is_under = move |held: &&Held| map.as_ref().is_some_and(|map| Arc::ptr_eq(held.map(), map));
        self.files.values().filter(is_under).filter_map(Held::tripwire)
    }

    /// Lets go of files that no namespace names any more, but for those under exports that are not drained yet.
    pub(super) fn release_unnamed<'a>(
        &mut self,
        backings: &Backings,
        undrained: impl Iterator<Item = &'a Arc<Export>>,
    ) {
        let busy: Vec<_> = undrained.filter_map(|export| export.map.as_ref()).collect();
        let is_gone = |path: &Path, held: &Held| {
            !backings.names(path) && !busy.iter().any(|map| Arc::ptr_eq(held.map(), map))
        };
        let gone = self.files.iter().filter(|(path, held)| is_gone(path, held));
        for path in gone.map(|(path, _)| path.clone()).collect::<Vec<_>>() {
            self.release(&path);
        }
    }

    /// Lets go of a file whose export is drained: releases a pin that `serve` made, keeps one that the operator made,
    /// and one that was handed over.
    pub(super) fn release(&mut self, path: &Path) {
        let Some(Held::Pinned { pinned, .. }) = self.files.remove(path) else { return };
        if pinned.was_kept() {
            return pinned.keep();
        }
        if let Err(error) = pinned.release() {
            let path = path.display();
            tracing::error!(%path, %error, "the pin could not be released; run `fastice unpin`");
        }
    }

    /// Lets go of all files, in order.
    pub(super) fn release_all(&mut self) {
        for path in self.files.keys().cloned().collect::<Vec<_>>() {
            self.release(&path);
        }
    }

    /// Lets go of nothing, because a device may still write: guards and locks stay until the process ends, and the
    /// kernel closes them only when it has taken the rings apart; immutable flags and records stay beyond that.
    pub(super) fn keep_all(&mut self) {
        for (path, held) in std::mem::take(&mut self.files) {
            tracing::warn!(path = %path.display(), "pin kept");
            std::mem::forget(held);
        }
    }

    /// How many bytes all pinned files have, for the ready message.
    pub(super) fn pinned_len(&self) -> ByteLen {
        ByteLen(self.files.values().map(|held| held.map().len().0).sum())
    }
}

/// What hosts know the namespace of a file by.
fn name_of(identity: &MapIdentity) -> Identity {
    Identity::of_file(&identity.filesystem.uuid, identity.inode, identity.inode_generation)
        .from_byte(identity.reserved.get())
}
