//! The disks under pinned files: found by what they are, proven, opened once, and watched.
//!
//! ```text
//!   DiskIdentity of the frozen map
//!      | uring: by its number of this boot
//!      | nvme: each controller of [[nvme]] is asked for its namespaces      identity, then size and block size
//!      v
//!   device --prove: superblock and file blocks are the same by both ways--> cores may have queues
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};

use async_nvme::{ControllerInfo, NamespaceInfo};

use super::error::DiskError;
use super::event::Event;
use super::proof::{FilesystemOn, prove};
use crate::block::nvme::{
    NvmeChange, NvmeController, NvmeDescription, NvmeDevice, NvmeWay, OnChange, Reach, Standing,
};
use crate::block::{BlockDevice, DeviceInfo, UringDevice, UringOptions};
use crate::chain::Chain;
use crate::config::{DeviceWay, NvmeChoice};
use crate::extent::{
    CommandsHold, DiskIdentity, ExtentError, FrozenMap, HandedOver, IdentityVerdict, NamespaceIdentity,
    PinnedFile, StateDir, Unmounted, is_let_go, stored_pin, take_over, take_unmounted, verify_on_device,
};
use crate::fabrics::{Export, FenceReason, Target};

/// A namespace of a controller: the way to it, and its NSID there.
pub(super) type NvmeKey = (NvmeWay, u32);

/// All disks in use.
pub(super) struct Disks {
    target: Weak<Target>,
    events: Sender<Event>,
    reach: Arc<dyn Reach>,
    /// Knows which controllers are driven, for whoever comes after a kill.
    commands: Arc<CommandsHold>,
    uring: BTreeMap<(u32, u32, bool), Weak<UringDevice>>,
    /// Devices of filesystems that nobody can mount meanwhile.
    unmounted: Vec<Weak<Unmounted>>,
    controllers: BTreeMap<NvmeWay, Weak<NvmeController>>,
    nvme: BTreeMap<NvmeKey, Weak<NvmeDevice>>,
    /// Controllers that were asked; those without a device in use end with [`Disks::settle`].
    asked: Vec<Arc<NvmeController>>,
    /// How many cores open queues.
    cores: usize,
}

impl Disks {
    pub(super) fn new(
        target: &Arc<Target>,
        events: Sender<Event>,
        reach: Arc<dyn Reach>,
        commands: Arc<CommandsHold>,
        cores: usize,
    ) -> Self {
        Self {
            target: Arc::downgrade(target),
            events,
            reach,
            commands,
            uring: BTreeMap::new(),
            unmounted: Vec::new(),
            controllers: BTreeMap::new(),
            nvme: BTreeMap::new(),
            asked: Vec::new(),
            cores,
        }
    }

    /// The whole disk under a pinned file; files of one disk share it.
    ///
    /// # Errors
    /// When it cannot be opened, or no controller has it, or it is not the one that it says it is.
    pub(super) fn open(
        &mut self,
        pinned: &PinnedFile,
        way: DeviceWay,
        read_only: bool,
        choices: &[NvmeChoice],
    ) -> Result<Arc<dyn BlockDevice>, DiskError> {
        let disk = &pinned.map().identity().disk;
        match way {
            DeviceWay::Uring | DeviceWay::Unmounted => self.open_uring(disk, read_only),
            DeviceWay::Nvme | DeviceWay::HandedOver => {
                let device = self.find(disk, choices)?;
                let proof = prove(&device, &pinned.witness()?)?;
                vouch(&device)?;
                proof.log(&device.info().name, pinned.path());
                Ok(device)
            }
        }
    }

    /// The disk under a file that was handed over, and the file itself, taken over by what the disk holds.
    ///
    /// # Errors
    /// As [`Disks::open`], and when the disk does not hold the recorded map.
    pub(super) fn take_over(
        &mut self,
        path: &Path,
        state: &StateDir,
        choices: &[NvmeChoice],
    ) -> Result<(HandedOver, Arc<dyn BlockDevice>), DiskError> {
        let stored = stored_pin(path, state)?;
        // Said before a controller is looked for that the kernel may still have; looked at again under the lock.
        is_let_go(&stored)?;
        let disk = &stored.identity.disk;
        let device = self.find(disk, choices)?;
        let mut filesystem = FilesystemOn::new(&device, disk.partition_start);
        let taken = take_over(&stored, state, &mut filesystem)?;
        vouch(&device)?;
        Ok((taken, device))
    }

    /// A file of a filesystem that is not mounted, taken over by what its device holds, which is held exclusively from then on.
    ///
    /// # Errors
    /// When the device is mounted or somebody else's, or does not hold the recorded map.
    pub(super) fn take_unmounted(&mut self, path: &Path, state: &StateDir) -> Result<HandedOver, DiskError> {
        let stored = stored_pin(path, state)?;
        self.unmounted.retain(|held| held.strong_count() > 0);
        let held = self.unmounted.iter().filter_map(Weak::upgrade).find(|held| held.is_of(&stored));
        let held = match held {
            Some(held) => held,
            None => {
                let held = Arc::new(Unmounted::hold(&stored)?);
                self.unmounted.push(Arc::downgrade(&held));
                held
            }
        };
        Ok(take_unmounted(&stored, state, &held)?)
    }

    /// The whole disk under an unmounted file, by the kernel.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn of_unmounted(
        &mut self,
        map: &FrozenMap,
        read_only: bool,
    ) -> Result<Arc<dyn BlockDevice>, DiskError> {
        self.open_uring(&map.identity().disk, read_only)
    }

    /// The disk under a file that was taken over before.
    ///
    /// # Errors
    /// As [`Disks::take_over`].
    pub(super) fn of_taken(
        &mut self,
        map: &FrozenMap,
        choices: &[NvmeChoice],
    ) -> Result<Arc<dyn BlockDevice>, DiskError> {
        let disk = &map.identity().disk;
        let device = self.find(disk, choices)?;
        verify_on_device(map, &mut FilesystemOn::new(&device, disk.partition_start))?;
        vouch(&device)?;
        Ok(device)
    }

    fn open_uring(
        &mut self,
        disk: &DiskIdentity,
        read_only: bool,
    ) -> Result<Arc<dyn BlockDevice>, DiskError> {
        let key = (disk.number.major, disk.number.minor, read_only);
        if let Some(open) = self.uring.get(&key).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let options = UringOptions { major: key.0, minor: key.1, read_only };
        let device = Arc::new(UringDevice::open(&options)?);
        self.uring.insert(key, Arc::downgrade(&device));
        Ok(device)
    }

    /// The namespace that is `disk`, on the first controller that has it.
    fn find(&mut self, disk: &DiskIdentity, choices: &[NvmeChoice]) -> Result<Arc<NvmeDevice>, DiskError> {
        let mut tried = Vec::new();
        let (mut unbound, mut is_forbidden) = (Vec::new(), false);
        for (way, choice) in self.candidates(choices) {
            let way = &way;
            let controller = match self.controller(way) {
                Ok(controller) => controller,
                Err(error) => {
                    tried.push(Chain(&error).to_string());
                    unbound.extend(error.unbound());
                    is_forbidden |= error.is_forbidden();
                    continue;
                }
            };
            let Some(description) = controller.describe() else {
                tried.push(format!("{way} is lost"));
                continue;
            };
            for namespace in &description.namespaces {
                match same(disk, choice, &description, namespace) {
                    Ok(by) => {
                        check_shape(disk, way, namespace)?;
                        tracing::info!(disk = %disk.name, %way, nsid = namespace.nsid, by, "found the disk");
                        return self.device(&controller, way, namespace.nsid);
                    }
                    Err(why) => tried.push(format!("namespace {} of {way}: {why}", namespace.nsid)),
                }
            }
            if description.namespaces.is_empty() {
                tried.push(format!("{way} has no namespaces"));
            }
        }
        if tried.is_empty() {
            tried.push("no controller is bound to vfio-pci".to_owned());
        }
        Err(DiskError::NotFound {
            disk: disk.name.clone(),
            told: disk.namespace().to_string(),
            tried: tried.join("; "),
            unbound,
            is_forbidden,
        })
    }

    /// The controllers to look at: those that are named by their place, then, for each identity without a place, all that
    /// user space has and nobody named. One that another process drives is left alone; any other is reset by the asking.
    fn candidates<'a>(&self, choices: &'a [NvmeChoice]) -> Vec<(NvmeWay, &'a NvmeChoice)> {
        let named = choices.iter().filter_map(|choice| Some((choice.way.clone()?, choice)));
        let mut all: Vec<_> = named.collect();
        let is_named =
            |way: &NvmeWay| choices.iter().flat_map(|it| &it.way).any(|named| named.is_same_place(way));
        let mut unnamed = choices.iter().filter(|choice| choice.way.is_none()).peekable();
        if unnamed.peek().is_some() {
            let others: Vec<_> = self.reach.list().into_iter().filter(|way| !is_named(way)).collect();
            all.extend(unnamed.flat_map(|choice| others.iter().map(move |way| (way.clone(), choice))));
        }
        all
    }

    /// The controller at the end of `way`, started. That it is driven is written down before it can be told to write.
    fn controller(&mut self, way: &NvmeWay) -> Result<Arc<NvmeController>, DiskError> {
        let known = self.controllers.get(way).and_then(Weak::upgrade);
        let controller = match known {
            Some(known) => known,
            None => {
                let started = NvmeController::start(way, Arc::clone(&self.reach))?;
                self.controllers.insert(way.clone(), Arc::downgrade(&started));
                self.taken(way)?;
                started
            }
        };
        self.asked.push(Arc::clone(&controller));
        Ok(controller)
    }

    fn device(
        &mut self,
        controller: &Arc<NvmeController>,
        way: &NvmeWay,
        nsid: u32,
    ) -> Result<Arc<NvmeDevice>, DiskError> {
        let key = (way.clone(), nsid);
        if let Some(open) = self.nvme.get(&key).and_then(Weak::upgrade) {
            return Ok(open);
        }
        self.check_queue_pairs(controller, way)?;
        let device = controller.device(nsid, self.on_change(key.clone()))?;
        self.nvme.insert(key, Arc::downgrade(&device));
        Ok(device)
    }

    /// Each core has a queue pair of each namespace.
    fn check_queue_pairs(&self, controller: &NvmeController, way: &NvmeWay) -> Result<(), DiskError> {
        let in_use =
            self.nvme.iter().filter(|((at, _), device)| at == way && device.strong_count() > 0).count();
        let needs = (in_use + 1).saturating_mul(self.cores);
        let grants = controller.describe().map_or(0, |description| description.controller.io_queues.into());
        if needs <= grants {
            return Ok(());
        }
        let namespaces = in_use + 1;
        Err(DiskError::QueuePairs { way: way.to_string(), grants, needs, namespaces })
    }

    /// Fences first and tells the control thread second: no command starts after a loss was noticed.
    fn on_change(&self, key: NvmeKey) -> OnChange {
        let (target, events) = (self.target.clone(), self.events.clone());
        let events = std::sync::Mutex::new(events);
        Arc::new(move |info, change| {
            if let (NvmeChange::Lost { .. }, Some(target)) = (change, target.upgrade()) {
                for export in exports_on(&target, info) {
                    target.fence(&export, FenceReason::DeviceFailed);
                }
            }
            let event = Event::Device { key: key.clone(), change: change.clone() };
            // The control thread is gone only when everything is being let go anyway.
            let _ = events.lock().unwrap_or_else(std::sync::PoisonError::into_inner).send(event);
        })
    }

    /// The device of a key, if it is in use.
    pub(super) fn nvme(&self, key: &NvmeKey) -> Option<Arc<NvmeDevice>> {
        self.nvme.get(key).and_then(Weak::upgrade)
    }

    /// All devices of our driver that are in use.
    pub(super) fn nvme_standings(&self) -> Vec<(String, u32, Standing)> {
        let living = self.nvme.iter().filter_map(|(key, device)| Some((key, device.upgrade()?)));
        living.map(|((way, nsid), device)| (way.to_string(), *nsid, device.standing())).collect()
    }

    pub(super) fn nvme_in_use(&self) -> Vec<Arc<NvmeDevice>> {
        self.nvme.values().filter_map(Weak::upgrade).collect()
    }

    /// Lets go of controllers that no device in use needs.
    pub(super) fn settle(&mut self) {
        self.asked.clear();
        self.controllers.retain(|_, controller| controller.strong_count() > 0);
        self.nvme.retain(|_, device| device.strong_count() > 0);
        self.uring.retain(|_, device| device.strong_count() > 0);
        let driven: BTreeSet<_> = self.controllers.keys().filter_map(NvmeWay::place).collect();
        // One too many on the list may cost a later owner a reset.
        if let Err(error) = self.commands.driven().keep_only(&driven) {
            tracing::warn!(%error, "the list of controllers cannot be brought up to date");
        }
    }

    /// Writes down that a controller was taken, or taken again after it was lost. Nothing was written to it since.
    ///
    /// # Errors
    /// When the state directory cannot be written.
    pub(super) fn taken(&self, way: &NvmeWay) -> Result<(), ExtentError> {
        way.place().map_or(Ok(()), |place| self.commands.driven().take(place))
    }

    /// Shuts all controllers down in order. Nothing may be under way.
    pub(super) fn shut_down(&mut self) {
        self.asked.clear();
        for controller in std::mem::take(&mut self.controllers).into_values() {
            if let Some(controller) = controller.upgrade() {
                controller.shut_down();
            }
        }
    }
}

/// The exports that stand on a device.
pub(super) fn exports_on(target: &Target, info: &DeviceInfo) -> Vec<Arc<Export>> {
    let mut exports = target.exports();
    exports.retain(|export| std::ptr::eq(export.device.info(), info));
    exports
}

/// Lets cores have queues of a device that was proven just now.
fn vouch(device: &NvmeDevice) -> Result<(), DiskError> {
    match device.standing() {
        Standing::Unproven(epoch) => device.admit(epoch).map_err(|source| lost(device, source)),
        Standing::Proven(_) => Ok(()),
        Standing::Lost => Err(lost(device, crate::block::BlockErrorKind::Gone.into())),
    }
}

fn lost(device: &NvmeDevice, source: crate::block::BlockError) -> DiskError {
    DiskError::Read { device: device.info().name.clone(), source }
}

/// By what a namespace is the disk, or why it is not, or not known to be.
fn same(
    disk: &DiskIdentity,
    choice: &NvmeChoice,
    description: &NvmeDescription,
    namespace: &NamespaceInfo,
) -> Result<&'static str, String> {
    let found = identity_of(&description.controller, namespace);
    let asked = &choice.identity;
    for (name, fits) in [
        ("nguid", asked.nguid.is_none() || asked.nguid == found.nguid),
        ("eui64", asked.eui64.is_none() || asked.eui64 == found.eui64),
        ("serial", asked.serial.is_none() || asked.serial == found.serial),
        ("nsid", asked.nsid.is_none() || asked.nsid == found.nsid),
    ] {
        if !fits {
            return Err(format!("it has another {name} than the configuration says"));
        }
    }
    if let Some(stands_on) = description.stands_on {
        return if stands_on == (disk.number.major, disk.number.minor) {
            Ok("the block device under the model")
        } else {
            Err(format!("it stands on block device {}:{}, not on {}", stands_on.0, stands_on.1, disk.number))
        };
    }
    match disk.namespace().compare(&found) {
        IdentityVerdict::Same(by) => Ok(by),
        IdentityVerdict::Different(what) => Err(format!("another {what} ({found})")),
        IdentityVerdict::Unknown if !asked.is_empty() => Ok("the word of the configuration"),
        IdentityVerdict::Unknown => {
            Err(format!("nothing that could be compared ({found}); name its nguid, eui64 or serial and nsid"))
        }
    }
}

fn identity_of(controller: &ControllerInfo, namespace: &NamespaceInfo) -> NamespaceIdentity {
    NamespaceIdentity {
        nguid: namespace.nguid,
        eui64: namespace.eui64,
        uuid: namespace.uuid,
        serial: Some(controller.serial.clone()).filter(|serial| !serial.is_empty()),
        nsid: Some(namespace.nsid),
    }
}

/// The addresses of the map are bytes of the kernel's disk: both must cut it the same way.
fn check_shape(disk: &DiskIdentity, way: &NvmeWay, namespace: &NamespaceInfo) -> Result<(), DiskError> {
    let bytes = namespace.blocks.checked_mul(namespace.block_len().into());
    if bytes == Some(disk.size.get()) && namespace.block_len() == disk.logical_block_size.bytes() {
        return Ok(());
    }
    Err(DiskError::Shape {
        disk: disk.name.clone(),
        disk_len: disk.size,
        disk_block: disk.logical_block_size,
        namespace: format!("namespace {} of {way}", namespace.nsid),
        blocks: namespace.blocks,
        block_len: namespace.block_len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::DeviceNumber;
    use crate::units::{BlockSize, ByteLen, ByteOffset};

    fn disk() -> DiskIdentity {
        DiskIdentity {
            number: DeviceNumber { major: 259, minor: 0 },
            name: "nvme0n1".to_owned(),
            node: "/dev/nvme0n1".into(),
            size: ByteLen(1 << 20),
            logical_block_size: BlockSize::B512,
            partition_start: ByteOffset(0),
            partition_len: ByteLen(1 << 20),
            serial: Some("S1".to_owned()),
            wwid: None,
            model: None,
            nguid: Some("01010101-0101-0101-0101-010101010101".to_owned()),
            eui64: None,
            uuid: None,
            nsid: Some(1),
        }
    }

    fn namespace() -> NamespaceInfo {
        NamespaceInfo { nsid: 1, blocks: 2048, block_shift: 9, nguid: Some([1; 16]), ..Default::default() }
    }

    fn description(stands_on: Option<(u32, u32)>) -> NvmeDescription {
        let controller = ControllerInfo { serial: "S1".to_owned(), ..Default::default() };
        NvmeDescription { controller, namespaces: vec![namespace()], stands_on }
    }

    fn choice(identity: NamespaceIdentity) -> NvmeChoice {
        NvmeChoice { way: Some(NvmeWay::Model("/dev/loop0".into())), identity }
    }

    #[test]
    fn identity_decides_and_not_the_place() {
        let any = choice(NamespaceIdentity::default());
        assert_eq!(same(&disk(), &any, &description(None), &namespace()), Ok("NGUID"));
        let other = NamespaceInfo { nguid: Some([2; 16]), ..namespace() };
        let why = same(&disk(), &any, &description(None), &other).expect_err("another one");
        assert!(why.starts_with("another NGUID"), "{why}");
    }

    #[test]
    fn a_model_is_known_by_what_it_stands_on() {
        let any = choice(NamespaceIdentity::default());
        assert!(same(&disk(), &any, &description(Some((259, 0))), &NamespaceInfo::default()).is_ok());
        let why = same(&disk(), &any, &description(Some((7, 3))), &namespace()).expect_err("another disk");
        assert_eq!(why, "it stands on block device 7:3, not on 259:0");
    }

    #[test]
    fn the_operator_vouches_only_where_nothing_speaks_against() {
        let nguid = choice(NamespaceIdentity { nguid: Some([1; 16]), ..Default::default() });
        let plain = DiskIdentity { nguid: None, nsid: None, serial: None, ..disk() };
        let why = same(&plain, &choice(NamespaceIdentity::default()), &description(None), &namespace());
        assert!(why.expect_err("nothing to compare").starts_with("nothing that could be compared"));
        assert_eq!(
            same(&plain, &nguid, &description(None), &namespace()),
            Ok("the word of the configuration")
        );
        let other = NamespaceInfo { nguid: Some([2; 16]), ..namespace() };
        let why = same(&plain, &nguid, &description(None), &other).expect_err("not that one");
        assert_eq!(why, "it has another nguid than the configuration says");
        let wrong = choice(NamespaceIdentity { nguid: Some([2; 16]), ..Default::default() });
        assert!(same(&disk(), &wrong, &description(None), &other).is_err(), "the disk says otherwise");
    }

    #[test]
    fn size_and_block_size_must_agree() {
        let way = NvmeWay::Model("/dev/loop0".into());
        assert!(check_shape(&disk(), &way, &namespace()).is_ok());
        for (blocks, block_shift) in [(2047, 9), (256, 12), (u64::MAX, 9)] {
            let other = NamespaceInfo { blocks, block_shift, ..namespace() };
            let error = check_shape(&disk(), &way, &other).expect_err("another shape");
            assert!(matches!(error, DiskError::Shape { .. }), "{error}");
        }
    }
}
