//! A controller: what its admin queue and its I/O queues, each on a core of its own, have in common.
//!
//! ```text
//!   admin queue session            Controller                     I/O queue sessions
//!   (registers, features,   <----  epoch  (atomic)        ---->   compare it at every command
//!    parked AERs, timers)          shared (mutex)                 enter at Connect, leave when drained
//! ```
//!
//! The epoch is the right of I/O queues to run: it changes when the host resets or shuts the controller down and when
//! the controller ends, and a queue that was connected under another epoch takes no more commands. Queues *leave* only
//! when the transport has drained what they had in flight, and until then the controller does not report that it is
//! reset or shut down, so that a host never reuses blocks under writes of its past.
//!
//! Locks: a subsystem's list of controllers may be held when `shared` is taken, never the other way round.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme_spec::Nsid;

use super::beat::{Beat, Traffic};
use super::error_log::ErrorLog;
use super::events::{Change, Changes};
use super::exchange::{CloseReason, Waker};
use super::export::{Export, FencePolicy};
use super::provision::PortId;
use super::subsystem::Subsystem;
use super::target::ControllerInfo;

/// A host, as its Connects name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) nqn: Box<str>,
    pub(super) id: [u8; 16],
}

/// What a controller is made from.
pub(super) struct ControllerSeed {
    pub(super) host: Host,
    pub(super) port: PortId,
    pub(super) waker: Arc<dyn Waker>,
    pub(super) beat: Arc<Beat>,
    pub(super) io_queues_max: u16,
}

/// What the queues of one controller share.
pub(super) struct Controller {
    epoch: Epoch,
    pub(super) id: u16,
    pub(super) subsystem: Arc<Subsystem>,
    pub(super) host: Host,
    pub(super) port: PortId,
    admin_waker: Arc<dyn Waker>,
    attention: AtomicBool,
    /// The host takes CRD.
    retries_later: AtomicBool,
    /// It shows ANA: fixed when it was made, for what a controller can does not change under its host.
    shows_ana: bool,
    /// The host has read the ANA log.
    knows_ana: AtomicBool,
    shared: Mutex<Shared>,
}

/// On a cache line of its own: read by every I/O command, written at reset only.
#[repr(align(128))]
struct Epoch(AtomicU32);

/// The epoch of a controller that ended.
const EPOCH_ENDED: u32 = 0;

struct Shared {
    ended: Option<CloseReason>,
    admin_open: bool,
    /// I/O queues may be connected: the controller is ready and not shutting down.
    open_for_io: bool,
    io_queues_granted: u16,
    queues: BTreeMap<u16, IoEntry>,
    admin_beat: Arc<Beat>,
    /// What queues that are gone did.
    past: Traffic,
    errors: ErrorLog,
    notices: Notices,
}

struct IoEntry {
    waker: Arc<dyn Waker>,
    beat: Arc<Beat>,
}

/// What happened that a host may want to hear of. Which of it is told, the admin queue decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Notices {
    /// Namespaces that changed since the changed namespace list was read.
    pub(super) changed: BTreeSet<u32>,
    /// What changed since the admin queue looked.
    pub(super) changes: Changes,
}

/// Why an I/O queue cannot join its controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JoinError {
    /// Not enabled, or shutting down, or ended.
    NotReady,
    /// QID 0 or above the number granted.
    Qid,
    /// That queue exists.
    InUse,
}

impl Controller {
    /// A controller that its host has not enabled yet.
    pub(super) fn new(id: u16, subsystem: Arc<Subsystem>, seed: ControllerSeed) -> Self {
        let shows_ana = subsystem.table().iter().any(|export| export.on_fence == FencePolicy::Ana);
        Self {
            epoch: Epoch(AtomicU32::new(1)),
            id,
            subsystem,
            host: seed.host,
            port: seed.port,
            admin_waker: seed.waker,
            attention: AtomicBool::new(false),
            retries_later: AtomicBool::new(false),
            shows_ana,
            knows_ana: AtomicBool::new(false),
            shared: Mutex::new(Shared {
                ended: None,
                admin_open: true,
                open_for_io: false,
                io_queues_granted: seed.io_queues_max,
                queues: BTreeMap::new(),
                admin_beat: seed.beat,
                past: Traffic::default(),
                errors: ErrorLog::default(),
                notices: Notices::default(),
            }),
        }
    }

    /// Whether queues of `epoch` may run: the one load that each I/O command pays for reset.
    #[inline]
    pub(super) fn is_current(&self, epoch: u32) -> bool {
        self.epoch.0.load(Ordering::Acquire) == epoch
    }

    /// Why the controller ended, if it did.
    pub(super) fn ended(&self) -> Option<CloseReason> {
        self.lock().ended
    }

    /// Ends the controller for good: all its sessions will see [`CloseReason`]. Only the first reason counts; gives
    /// whether this was it.
    pub(super) fn end(&self, reason: CloseReason) -> bool {
        let mut shared = self.lock();
        if shared.ended.is_some() {
            return false;
        }
        shared.ended = Some(reason);
        shared.open_for_io = false;
        self.epoch.0.store(EPOCH_ENDED, Ordering::Release);
        shared.wake_io();
        drop(shared);
        self.call_admin();
        true
    }

    /// Ends the I/O queues of now, for a reset or shutdown.
    pub(super) fn end_io(&self) {
        let mut shared = self.lock();
        shared.open_for_io = false;
        if shared.ended.is_none() {
            let next = self.epoch.0.load(Ordering::Acquire).checked_add(1).unwrap_or(1);
            self.epoch.0.store(next, Ordering::Release);
        }
        shared.wake_io();
    }

    /// Lets I/O queues connect.
    pub(super) fn open_for_io(&self) {
        let mut shared = self.lock();
        shared.open_for_io = shared.ended.is_none();
    }

    /// Whether no I/O queue has anything in flight any more.
    pub(super) fn is_drained(&self) -> bool {
        self.lock().queues.is_empty()
    }

    /// Whether the controller ended but still has I/O queues that drain.
    pub(super) fn is_dying(&self) -> bool {
        let shared = self.lock();
        shared.ended.is_some() && !shared.queues.is_empty()
    }

    /// Whether any I/O queue exists.
    pub(super) fn has_io_queues(&self) -> bool {
        !self.is_drained()
    }

    /// Sets how many I/O queues the host may connect.
    pub(super) fn grant_io_queues(&self, count: u16) {
        self.lock().io_queues_granted = count;
    }

    /// How many I/O queues the host may connect.
    pub(super) fn io_queues_granted(&self) -> u16 {
        self.lock().io_queues_granted
    }

    /// Adds an I/O queue; gives the epoch it lives in.
    pub(super) fn join(&self, qid: u16, waker: &Arc<dyn Waker>, beat: &Arc<Beat>) -> Result<u32, JoinError> {
        let mut shared = self.lock();
        if !shared.open_for_io {
            return Err(JoinError::NotReady);
        }
        if qid == 0 || qid > shared.io_queues_granted {
            return Err(JoinError::Qid);
        }
        if shared.queues.contains_key(&qid) {
            return Err(JoinError::InUse);
        }
        shared.queues.insert(qid, IoEntry { waker: Arc::clone(waker), beat: Arc::clone(beat) });
        Ok(self.epoch.0.load(Ordering::Acquire))
    }

    /// An I/O queue is drained and gone.
    pub(super) fn leave(&self, qid: u16) {
        let mut shared = self.lock();
        if let Some(entry) = shared.queues.remove(&qid) {
            entry.beat.add_to(&mut shared.past);
        }
        let over = !shared.admin_open && shared.queues.is_empty();
        drop(shared);
        // The admin queue may wait for the last of them to report reset or shutdown as done.
        self.call_admin();
        if over {
            self.subsystem.forget(self.id);
        }
    }

    /// The admin queue is gone: so is the controller, once its I/O queues are.
    pub(super) fn leave_admin(&self, reason: CloseReason) {
        self.end(reason);
        let mut shared = self.lock();
        shared.admin_open = false;
        let over = shared.queues.is_empty();
        drop(shared);
        if over {
            self.subsystem.forget(self.id);
        }
    }

    /// Commands of all I/O queues so far: changes tell that the host lives.
    pub(super) fn io_commands(&self) -> u64 {
        let shared = self.lock();
        let living = shared.queues.values().map(|entry| entry.beat.commands());
        living.fold(shared.past.commands, u64::wrapping_add)
    }

    /// What all queues did since the controller exists.
    pub(super) fn traffic(&self) -> Traffic {
        let shared = self.lock();
        let mut sum = shared.past;
        shared.admin_beat.add_to(&mut sum);
        shared.queues.values().for_each(|entry| entry.beat.add_to(&mut sum));
        sum
    }

    /// What an operator sees of it.
    pub(super) fn info(&self) -> ControllerInfo {
        let traffic = self.traffic();
        ControllerInfo {
            subsystem: self.subsystem.nqn.to_string(),
            cntlid: self.id,
            host: self.host.nqn.to_string(),
            port: self.port.0,
            io_queues: self.lock().queues.len(),
            commands: traffic.commands,
            read_bytes: traffic.read_bytes,
            written_bytes: traffic.written_bytes,
        }
    }

    /// The controller's queue `qid`, for log lines.
    pub(super) fn label(&self, qid: u16) -> String {
        format!("{} cntlid {} qid {qid}", self.host.nqn, self.id)
    }

    /// Runs `with` on the Error Information log.
    pub(super) fn with_errors<T>(&self, with: impl FnOnce(&mut ErrorLog) -> T) -> T {
        with(&mut self.lock().errors)
    }

    /// Tells the host, if it wants to hear it, that namespaces changed.
    pub(super) fn note_namespaces(&self, nsids: impl IntoIterator<Item = Nsid>) {
        let mut shared = self.lock();
        shared.notices.changed.extend(nsids.into_iter().map(|nsid| nsid.0));
        shared.notices.changes.add(Change::Namespace);
        drop(shared);
        self.call_admin();
    }

    /// Tells the host, if it wants to hear it, that a fence of `export` fell or was taken back.
    pub(super) fn note_fence(&self, export: &Export) {
        if self.shows_ana && export.on_fence == FencePolicy::Ana {
            self.note_ana();
        } else {
            self.note_namespaces([export.nsid]);
        }
    }

    /// Tells the host, if it wants to hear it, that the ANA state of a namespace changed.
    pub(super) fn note_ana(&self) {
        self.lock().notices.changes.add(Change::Ana);
        self.call_admin();
    }

    /// Tells the host, if it wants to hear it, that the discovery log changed.
    pub(super) fn note_discovery(&self) {
        self.lock().notices.changes.add(Change::Discovery);
        self.call_admin();
    }

    /// What changed since the last call.
    pub(super) fn take_notices(&self) -> Changes {
        std::mem::take(&mut self.lock().notices.changes)
    }

    /// The changed namespaces, which are forgotten when `clear`.
    pub(super) fn changed_namespaces(&self, clear: bool) -> Vec<u32> {
        let notices = &mut self.lock().notices;
        let changed = notices.changed.iter().copied().collect();
        if clear {
            notices.changed.clear();
        }
        changed
    }

    /// Whether the host takes a delay with the word to try again (Host Behavior Support, ACRE).
    pub(super) fn set_retries_later(&self, retries_later: bool) {
        self.retries_later.store(retries_later, Ordering::Relaxed);
    }

    pub(super) fn retries_later(&self) -> bool {
        self.retries_later.load(Ordering::Relaxed)
    }

    /// Whether it reports asymmetric namespace access.
    pub(super) const fn shows_ana(&self) -> bool {
        self.shows_ana
    }

    /// Whether the host has read the ANA log since it was enabled, and so knows what a path status is.
    pub(super) fn set_knows_ana(&self, knows_ana: bool) {
        self.knows_ana.store(knows_ana, Ordering::Relaxed);
    }

    pub(super) fn knows_ana(&self) -> bool {
        self.knows_ana.load(Ordering::Relaxed)
    }

    /// Whether something happened that the admin queue has to look at; asked at every poll, so without the lock.
    pub(super) fn take_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed) && self.attention.swap(false, Ordering::AcqRel)
    }

    /// Makes the admin queue's core look.
    pub(super) fn call_admin(&self) {
        self.attention.store(true, Ordering::Release);
        self.admin_waker.wake();
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn wake_io(&self) {
        for entry in self.queues.values() {
            entry.waker.wake();
        }
    }
}
