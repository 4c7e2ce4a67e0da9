//! The running target: what is served, to whom, and by which controllers.
//!
//! ```text
//!   prepare(specs) -> Plan    nothing changes yet; the caller opens the added exports' device queues on every core
//!   commit(plan) -> Published hosts see the new namespaces, subsystems, ports; removed ones are refused from now on
//! ```
//!
//! Locks, in the order in which they are taken: `publishing`, a subsystem's controllers, a controller's shared state.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::{ArcSwap, Guard};

use super::ana;
use super::controller::{Controller, Host};
use super::exchange::CloseReason;
use super::export::{Export, ExportSlot, FencePolicy, FenceReason};
use super::identity;
use super::options::TargetOptions;
use super::provision::{
    self, DISCOVERY_NQN, HostPolicy, NamespaceSpec, PortId, PortSpec, SubsystemSpec, TargetError,
};
use super::stats::{Counters, TargetStats};
use super::subsystem::{NamespaceTable, Subsystem, SubsystemKind};
use crate::log_pace::LogPace;

/// The running target. Shared by all cores behind an [`Arc`].
pub struct Target {
    options: TargetOptions,
    pub(super) counters: Counters,
    /// Of Connects that are refused.
    pub(super) refusals: LogPace,
    pub(super) started: Instant,
    catalog: ArcSwap<Catalog>,
    discovery: Arc<Subsystem>,
    publishing: Mutex<Publishing>,
    shut_down: AtomicBool,
}

/// What is served, as Connect and the discovery log see it. Replaced as a whole.
pub(super) struct Catalog {
    pub(super) subsystems: BTreeMap<Arc<str>, Arc<Subsystem>>,
    pub(super) ports: BTreeMap<PortId, PortSpec>,
    /// GENCTR of the discovery log.
    pub(super) genctr: u64,
}

/// What only whoever publishes looks at.
#[derive(Default)]
struct Publishing {
    revision: u64,
    /// The slot of the next new export. Only ever grows: see [`ExportSlot`].
    next_slot: u32,
    hosts: BTreeMap<Arc<str>, HostPolicy>,
}

/// A change that was checked but not carried out.
#[derive(Debug)]
pub struct Plan {
    revision: u64,
    subsystems: Vec<PlannedSubsystem>,
    ports: Vec<PortSpec>,
    /// What it will change.
    pub changes: Published,
}

#[derive(Debug)]
struct PlannedSubsystem {
    spec: SubsystemSpec,
    exports: Vec<Arc<Export>>,
}

/// How a change touches exports.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// New ones: open their device queues before [`Target::commit`].
    pub added: Vec<Arc<Export>>,
    /// Those that go: refused from [`Target::commit`] on. Drain them before what lies under them is let go.
    pub removed: Vec<Arc<Export>>,
    /// Those that stay as they are, with their slots.
    pub kept: Vec<Arc<Export>>,
}

impl Target {
    /// A target that serves nothing but an empty discovery log.
    #[must_use]
    pub fn new(options: TargetOptions) -> Arc<Self> {
        let options = options.clamped();
        let discovery = Subsystem::new(
            DISCOVERY_NQN,
            SubsystemKind::Discovery,
            identity::serial_of(DISCOVERY_NQN),
            "fastice discovery".to_owned(),
            HostPolicy::Any,
        );
        Arc::new(Self {
            options,
            counters: Counters::default(),
            refusals: LogPace::default(),
            started: Instant::now(),
            catalog: ArcSwap::from_pointee(Catalog {
                subsystems: BTreeMap::new(),
                ports: BTreeMap::new(),
                genctr: 1,
            }),
            discovery,
            publishing: Mutex::new(Publishing::default()),
            shut_down: AtomicBool::new(false),
        })
    }

    /// What the target allows, every number in its range.
    #[must_use]
    pub fn options(&self) -> &TargetOptions {
        &self.options
    }

    /// Checks what is to be served from now on, without changing anything that hosts see. An export stays the same, slot and all,
    /// when its subsystem, identifier, device, map, geometry, identity and access are the same.
    ///
    /// # Errors
    /// The first rule that the subsystems and ports break.
    pub fn prepare(&self, subsystems: Vec<SubsystemSpec>, ports: Vec<PortSpec>) -> Result<Plan, TargetError> {
        provision::check(&subsystems, &ports)?;
        let mut publishing = self.publishing();
        let catalog = self.catalog.load();
        let mut changes = Published::default();
        let mut planned = Vec::with_capacity(subsystems.len());
        for spec in subsystems {
            let living = catalog.subsystems.get(spec.nqn.as_str());
            if living.is_some_and(|living| living.serial != spec.serial || living.model != spec.model) {
                return Err(TargetError::IdentityChanged(spec.nqn));
            }
            let table = living.map(|living| living.table());
            let exports = plan_exports(&spec, table.as_deref(), &mut publishing.next_slot, &mut changes)?;
            planned.push(PlannedSubsystem { spec, exports });
        }
        let stays: BTreeSet<ExportSlot> = changes.kept.iter().map(|export| export.slot).collect();
        changes.removed = exports_of(&catalog).filter(|export| !stays.contains(&export.slot)).collect();
        Ok(Plan { revision: publishing.revision, subsystems: planned, ports, changes })
    }

    /// Carries out a plan: hosts see the new state, are told of what changed if they asked for that, and lose their
    /// controllers when they or the subsystem are no longer there.
    ///
    /// # Errors
    /// [`TargetError::StalePlan`] when another plan was carried out since this one was prepared.
    pub fn commit(&self, plan: Plan) -> Result<Published, TargetError> {
        let mut publishing = self.publishing();
        if plan.revision != publishing.revision {
            return Err(TargetError::StalePlan);
        }
        let old = self.catalog.load_full();
        let viewers = self.discovery.controllers();
        let before: Vec<_> = viewers.iter().map(|viewer| old.names_for(&viewer.host.nqn)).collect();

        let mut next = Catalog {
            subsystems: BTreeMap::new(),
            ports: plan.ports.into_iter().map(|port| (port.id, port)).collect(),
            genctr: old.genctr,
        };
        let mut hosts = BTreeMap::new();
        for PlannedSubsystem { spec, exports } in plan.subsystems {
            let subsystem = self.serve(&old, &spec, exports);
            hosts.insert(Arc::clone(&subsystem.nqn), spec.hosts);
            next.subsystems.insert(Arc::clone(&subsystem.nqn), subsystem);
        }
        let ports_changed = next.ports != old.ports;
        if ports_changed || hosts != publishing.hosts {
            next.genctr = next.genctr.wrapping_add(1);
        }
        publishing.revision += 1;
        publishing.hosts = hosts;
        self.catalog.store(Arc::new(next));

        let now = self.catalog.load_full();
        for (nqn, gone) in old.subsystems.iter().filter(|(nqn, _)| !now.subsystems.contains_key(*nqn)) {
            tracing::info!(subsystem = %nqn, "no longer served");
            self.revoked(gone.end_all(CloseReason::SubsystemRemoved));
            gone.set_table(NamespaceTable::default());
        }
        plan.changes.removed.iter().for_each(|export| export.remove());
        for (viewer, before) in viewers.iter().zip(before) {
            if ports_changed || before != now.names_for(&viewer.host.nqn) {
                viewer.note_discovery();
            }
        }
        Ok(plan.changes)
    }

    /// [`Target::prepare`] and [`Target::commit`] in one, for whoever opens device queues on demand.
    ///
    /// # Errors
    /// As [`Target::prepare`].
    pub fn publish(
        &self,
        subsystems: Vec<SubsystemSpec>,
        ports: Vec<PortSpec>,
    ) -> Result<Published, TargetError> {
        let plan = self.prepare(subsystems, ports)?;
        self.commit(plan)
    }

    /// The exports served now.
    #[must_use]
    pub fn exports(&self) -> Vec<Arc<Export>> {
        exports_of(&self.catalog.load()).collect()
    }

    /// Refuses new commands to an export, and tells the hosts, both as its [`FencePolicy`] says. A
    /// core that hears of it afterwards, by a message, has stopped starting them.
    pub fn fence(&self, export: &Export, reason: FenceReason) {
        let was_live = export.fence(reason);
        if was_live {
            tracing::warn!(subsystem = %export.subsystem, nsid = export.nsid.0, reason = reason.word(), "export fenced: {reason}");
            self.tell_changed(export);
        }
    }

    /// Takes back one reason to refuse commands to an export. When it was the last one, commands are let in again, and
    /// the hosts are told.
    pub fn unfence(&self, export: &Export, reason: FenceReason) {
        if export.unfence(reason) {
            tracing::info!(subsystem = %export.subsystem, nsid = export.nsid.0, "export open again");
            self.tell_changed(export);
        }
    }

    /// Hosts that look find whether the namespace is ready (NSTAT.NRDY), accessible (the ANA log) or write protected
    /// (NSATTR).
    fn tell_changed(&self, export: &Export) {
        let catalog = self.catalog.load();
        let Some(subsystem) = catalog.subsystems.get(&export.subsystem) else { return };
        if export.on_fence == FencePolicy::Ana {
            subsystem.note_ana_changes([export]);
        }
        subsystem.controllers().iter().for_each(|controller| controller.note_fence(export));
    }

    /// Takes no Connects any more and ends every controller: each session sees [`CloseReason::TargetShutDown`].
    pub fn shut_down(&self) {
        self.shut_down.store(true, Ordering::SeqCst);
        let catalog = self.catalog.load();
        for subsystem in catalog.subsystems.values().chain([&self.discovery]) {
            subsystem.end_all(CloseReason::TargetShutDown);
        }
    }

    /// Whether [`Target::shut_down`] was called.
    #[must_use]
    pub fn is_shut_down(&self) -> bool {
        self.shut_down.load(Ordering::SeqCst)
    }

    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> TargetStats {
        self.counters.snapshot()
    }

    /// Who is connected: a line for each controller.
    #[must_use]
    pub fn controllers(&self) -> Vec<ControllerInfo> {
        let catalog = self.catalog.load();
        let subsystems = catalog.subsystems.values().chain([&self.discovery]);
        subsystems.flat_map(|subsystem| subsystem.controllers()).map(|it| it.info()).collect()
    }

    /// What is served.
    pub(super) fn catalog(&self) -> Guard<Arc<Catalog>> {
        self.catalog.load()
    }

    /// The subsystem that a Connect on `port` names.
    pub(super) fn find(&self, nqn: &str, port: PortId) -> Option<Arc<Subsystem>> {
        if nqn == DISCOVERY_NQN {
            return Some(Arc::clone(&self.discovery));
        }
        let catalog = self.catalog.load();
        if catalog.ports.get(&port).is_some_and(|port| port.discovery_only) {
            return None;
        }
        catalog.subsystems.get(nqn).cloned()
    }

    /// Whether a subsystem is still served: for a Connect that raced with a reload or the shutdown.
    pub(super) fn serves(&self, subsystem: &Arc<Subsystem>) -> bool {
        let found = match subsystem.kind {
            SubsystemKind::Discovery => true,
            SubsystemKind::Nvm => {
                let catalog = self.catalog.load();
                catalog.subsystems.get(&subsystem.nqn).is_some_and(|living| Arc::ptr_eq(living, subsystem))
            }
        };
        found && !self.is_shut_down()
    }

    /// Brings a subsystem, new or living, to what `spec` says.
    fn serve(&self, old: &Catalog, spec: &SubsystemSpec, exports: Vec<Arc<Export>>) -> Arc<Subsystem> {
        let Some(living) = old.subsystems.get(spec.nqn.as_str()) else {
            let subsystem = Subsystem::new(
                &spec.nqn,
                SubsystemKind::Nvm,
                spec.serial.clone(),
                spec.model.clone(),
                spec.hosts.clone(),
            );
            subsystem.set_table(NamespaceTable::new(exports));
            return subsystem;
        };
        let before = living.table();
        let after = NamespaceTable::new(exports);
        let changed = before.difference(&after);
        // Hosts that go are gone before the new namespaces come, and hosts that come see nothing of the old ones.
        self.revoked(living.set_hosts(living.hosts().and(&spec.hosts)));
        if !changed.is_empty() {
            living.note_ana_changes(changed.iter().filter_map(|&nsid| after.get(nsid)).map(AsRef::as_ref));
            living.set_table(after);
        }
        living.set_hosts(spec.hosts.clone());
        if !changed.is_empty() {
            let now = living.table();
            let state = |table: &NamespaceTable, nsid| table.get(nsid).map(|export| ana::state_of(export));
            let other_states = changed.iter().any(|&nsid| match (state(&before, nsid), state(&now, nsid)) {
                (Some(before), Some(now)) => before != now,
                // That it came or went is told by the event of the namespace.
                _ => false,
            });
            for controller in living.controllers() {
                controller.note_namespaces(changed.iter().copied());
                if other_states && controller.shows_ana() {
                    controller.note_ana();
                }
            }
        }
        Arc::clone(living)
    }

    fn revoked(&self, count: usize) {
        (0..count).for_each(|_| self.counters.controllers_revoked.bump());
    }

    fn publishing(&self) -> MutexGuard<'_, Publishing> {
        self.publishing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A controller as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ControllerInfo {
    /// The subsystem's NQN.
    pub subsystem: String,
    /// The controller's identifier.
    pub cntlid: u16,
    /// The host's NQN.
    pub host: String,
    /// The port it came in on.
    pub port: u16,
    /// I/O queues connected.
    pub io_queues: usize,
    /// Commands of all queues.
    pub commands: u64,
    /// Bytes that reads asked for.
    pub read_bytes: u64,
    /// Bytes that writes brought.
    pub written_bytes: u64,
}

impl Catalog {
    /// The subsystems that a host may connect to, in the order of their names.
    pub(super) fn subsystems_for(&self, host: &str) -> impl Iterator<Item = &Arc<Subsystem>> {
        self.subsystems.values().filter(move |subsystem| subsystem.allows(host))
    }

    fn names_for(&self, host: &str) -> Vec<Arc<str>> {
        self.subsystems_for(host).map(|subsystem| Arc::clone(&subsystem.nqn)).collect()
    }
}

impl Subsystem {
    /// Whether an earlier controller of this host still has writes in flight that a new one must not overtake.
    pub(super) fn has_dying_predecessor(&self, of: &Controller) -> bool {
        let same = |host: &Host| host.nqn == of.host.nqn || host.id == of.host.id;
        self.controllers().iter().any(|other| other.id != of.id && same(&other.host) && other.is_dying())
    }
}

fn exports_of(catalog: &Catalog) -> impl Iterator<Item = Arc<Export>> {
    let tables: Vec<_> = catalog.subsystems.values().map(|subsystem| subsystem.table()).collect();
    tables.into_iter().flat_map(|table| table.iter().cloned().collect::<Vec<_>>())
}

/// The exports of a subsystem: those that stay, and new ones in slots of their own.
fn plan_exports(
    spec: &SubsystemSpec,
    living: Option<&NamespaceTable>,
    next_slot: &mut u32,
    changes: &mut Published,
) -> Result<Vec<Arc<Export>>, TargetError> {
    let nqn: Arc<str> = spec.nqn.as_str().into();
    let mut exports = Vec::with_capacity(spec.namespaces.len());
    for namespace in &spec.namespaces {
        let wanted = new_export(&nqn, namespace, ExportSlot(0));
        let export = match living.and_then(|table| table.get(namespace.nsid)) {
            Some(living) if living.is_same_as(&wanted) => {
                changes.kept.push(Arc::clone(living));
                Arc::clone(living)
            }
            _ => {
                let slot = ExportSlot(*next_slot);
                *next_slot = next_slot.checked_add(1).ok_or(TargetError::SlotsExhausted)?;
                let export = Arc::new(Export { slot, ..wanted });
                changes.added.push(Arc::clone(&export));
                export
            }
        };
        exports.push(export);
    }
    Ok(exports)
}

fn new_export(subsystem: &Arc<str>, spec: &NamespaceSpec, slot: ExportSlot) -> Export {
    Export {
        slot,
        subsystem: Arc::clone(subsystem),
        nsid: spec.nsid,
        map: spec.map.clone(),
        device: Arc::clone(&spec.device),
        read_only: spec.read_only,
        on_fence: spec.on_fence,
        block_size: spec.block_size,
        len: spec.len,
        nguid: identity::nguid(subsystem, spec.nsid, &spec.identity),
        eui64: identity::eui64(subsystem, spec.nsid, &spec.identity),
        grant: AtomicU8::new(0),
        ana_changed: AtomicU64::new(1),
        fenced_at_ms: AtomicU64::new(0),
    }
}
