//! A subsystem as it is served: its namespaces, who may connect, and the controllers that hosts hold.
//!
//! ```text
//!   publish ----> table (ArcSwap) + generation ----> each I/O queue caches the table and compares the generation
//!           ----> hosts (ArcSwap)              ----> each Connect
//!   Connect ----> controllers (Mutex; control path only)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use nvme_spec::Nsid;

use super::controller::{Controller, ControllerSeed};
use super::exchange::CloseReason;
use super::export::Export;
use super::options::TargetOptions;
use super::provision::HostPolicy;

/// What a subsystem is for (CNTRLTYPE of its controllers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SubsystemKind {
    /// Namespaces.
    Nvm,
    /// The discovery log.
    Discovery,
}

/// A subsystem as it is served.
pub(super) struct Subsystem {
    pub(super) nqn: Arc<str>,
    pub(super) kind: SubsystemKind,
    pub(super) serial: String,
    pub(super) model: String,
    hosts: ArcSwap<HostPolicy>,
    table: ArcSwap<NamespaceTable>,
    generation: Generation,
    /// The change count of the ANA log, from 1.
    ana_changes: AtomicU64,
    controllers: Mutex<Controllers>,
}

/// A number on a cache line of its own: read by every I/O command, written by reloads only.
#[derive(Default)]
#[repr(align(128))]
struct Generation(AtomicU64);

/// Namespaces by identifier.
#[derive(Default)]
pub(super) struct NamespaceTable {
    exports: Vec<Option<Arc<Export>>>,
}

impl NamespaceTable {
    /// A table of `exports`.
    pub(super) fn new(exports: impl IntoIterator<Item = Arc<Export>>) -> Self {
        let mut table = Self::default();
        for export in exports {
            let index = export.nsid.0.saturating_sub(1) as usize;
            if table.exports.len() <= index {
                table.exports.resize(index + 1, None);
            }
            if let Some(place) = table.exports.get_mut(index) {
                *place = Some(export);
            }
        }
        table
    }

    /// The namespace of an identifier, in one bounds-checked step.
    #[inline]
    pub(super) fn get(&self, nsid: Nsid) -> Option<&Arc<Export>> {
        self.exports.get((nsid.0 as usize).checked_sub(1)?)?.as_ref()
    }

    /// The identifiers under which the two tables hold different exports.
    pub(super) fn difference(&self, other: &Self) -> Vec<Nsid> {
        let identifiers: BTreeSet<Nsid> = self.iter().chain(other.iter()).map(|export| export.nsid).collect();
        let slot = |table: &Self, nsid| table.get(nsid).map(|export| export.slot);
        identifiers.into_iter().filter(|&nsid| slot(self, nsid) != slot(other, nsid)).collect()
    }

    /// The namespaces by ascending identifier.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Export>> {
        self.exports.iter().flatten()
    }
}

/// The controllers of a subsystem by cntlid.
#[derive(Default)]
struct Controllers {
    live: BTreeMap<u16, Arc<Controller>>,
    last: u16,
}

/// Why a subsystem has no room for a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The host is not on the list.
    Host,
    /// A limit is reached; later there may be room.
    Busy,
}

/// The highest cntlid that a dynamic controller may have (NVM Express Base Specification 2.1, section 5.1.13.2.1).
const CNTLID_MAX: u16 = 0xFFEF;

impl Subsystem {
    /// A subsystem that serves nothing yet.
    pub(super) fn new(
        nqn: &str,
        kind: SubsystemKind,
        serial: String,
        model: String,
        hosts: HostPolicy,
    ) -> Arc<Self> {
        Arc::new(Self {
            nqn: nqn.into(),
            kind,
            serial,
            model,
            hosts: ArcSwap::from_pointee(hosts),
            table: ArcSwap::from_pointee(NamespaceTable::default()),
            generation: Generation::default(),
            ana_changes: AtomicU64::new(1),
            controllers: Mutex::new(Controllers::default()),
        })
    }

    /// Which namespace table is current. A queue whose cached number differs takes the table anew. Acquire: whoever
    /// sees a number sees the table stored before it.
    #[inline]
    pub(super) fn generation(&self) -> u64 {
        self.generation.0.load(Ordering::Acquire)
    }

    /// The namespaces of now.
    pub(super) fn table(&self) -> Arc<NamespaceTable> {
        self.table.load_full()
    }

    /// Replaces the namespaces.
    pub(super) fn set_table(&self, table: NamespaceTable) {
        self.table.store(Arc::new(table));
        self.generation.0.fetch_add(1, Ordering::AcqRel);
    }

    /// The change count of the ANA log.
    pub(super) fn ana_changes(&self) -> u64 {
        self.ana_changes.load(Ordering::Acquire)
    }

    /// The ANA states of `exports` changed, or their groups came.
    pub(super) fn note_ana_changes<'a>(&self, exports: impl IntoIterator<Item = &'a Export>) {
        let count = self.ana_changes.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        exports.into_iter().for_each(|export| export.note_ana_change(count));
    }

    /// Whether a host may connect.
    pub(super) fn allows(&self, host: &str) -> bool {
        self.hosts.load().allows(host)
    }

    /// Who may connect now.
    pub(super) fn hosts(&self) -> Arc<HostPolicy> {
        self.hosts.load_full()
    }

    /// Replaces the list of hosts and ends the controllers of hosts that are not on it; gives their number.
    pub(super) fn set_hosts(&self, hosts: HostPolicy) -> usize {
        self.hosts.store(Arc::new(hosts));
        let revoked: Vec<_> =
            self.controllers().into_iter().filter(|controller| !self.allows(&controller.host.nqn)).collect();
        for controller in &revoked {
            controller.end(CloseReason::HostRevoked);
        }
        revoked.len()
    }

    /// Ends every controller; gives their number.
    pub(super) fn end_all(&self, reason: CloseReason) -> usize {
        let all = self.controllers();
        for controller in &all {
            controller.end(reason);
        }
        all.len()
    }

    /// Makes a controller for a host, with a cntlid that was not used for as long as possible.
    pub(super) fn admit(
        self: &Arc<Self>,
        seed: ControllerSeed,
        options: &TargetOptions,
    ) -> Result<Arc<Controller>, Refusal> {
        let mut controllers = self.lock();
        // Under the lock: a reload that takes the host off the list either is seen here, or finds the controller.
        if !self.allows(&seed.host.nqn) {
            return Err(Refusal::Host);
        }
        let of_host = controllers.live.values().filter(|other| other.host.nqn == seed.host.nqn).count();
        if controllers.live.len() >= options.controllers_max || of_host >= options.controllers_per_host_max {
            return Err(Refusal::Busy);
        }
        let id = controllers.free_id().ok_or(Refusal::Busy)?;
        let controller = Arc::new(Controller::new(id, Arc::clone(self), seed));
        controllers.live.insert(id, Arc::clone(&controller));
        controllers.last = id;
        Ok(controller)
    }

    /// The controller of a cntlid, ended or not.
    pub(super) fn controller(&self, id: u16) -> Option<Arc<Controller>> {
        self.lock().live.get(&id).cloned()
    }

    /// Forgets a controller whose last queue is gone.
    pub(super) fn forget(&self, id: u16) {
        self.lock().live.remove(&id);
    }

    /// All controllers.
    pub(super) fn controllers(&self) -> Vec<Arc<Controller>> {
        self.lock().live.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Controllers> {
        self.controllers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Controllers {
    /// The next free cntlid after the last one given, round and round from 1.
    fn free_id(&self) -> Option<u16> {
        let after = self.last.saturating_add(1)..=CNTLID_MAX;
        let before = 1..=self.last.min(CNTLID_MAX);
        after.chain(before).find(|id| !self.live.contains_key(id))
    }
}
