//! A namespace as a block device, and whether it may be used now.
//!
//! ```text
//!            vouched for            lost                      back                 vouched for again
//!   Unproven ----------> Proven(1) -----> Lost ... Lost ----> Unproven(2) -------------> Proven(2)
//!             admit(1)                          (the controller is looked for)  admit(2)
//! ```
//!
//! Cores get queues only of a device that somebody vouches for: that it is the one under the pinned files. Who that is,
//! and by what proof, is not known here; the proof itself reads by [`NvmeDevice::read`].

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_nvme::{Clock as _, IoQueue, NamespaceInfo, QueueTicket, SystemClock};
use hugepage_alloc::{BUFFER_LEN_MAX, BufferPool};

use super::controller::NvmeController;
use super::queue::{NvmeQueue, open_pair};
use super::sleeper::Sleeper;
use crate::block::{BlockDevice, BlockError, BlockErrorKind, BlockQueue, DeviceInfo};
use crate::ring::Ring;
use crate::units::{BlockSize, ByteLen, ByteOffset};

/// How long the controller may take to create a queue pair.
const CREATE_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at whether it has.
const CREATE_LOOK: Duration = Duration::from_micros(50);

/// Which appearance of a device is meant: counts from 1, one more each time it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub(super) u32);

/// Whether a device may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is there, and nobody has vouched for it yet.
    Unproven(Epoch),
    /// It is in use.
    Proven(Epoch),
    /// It failed or is gone.
    Lost,
}

/// What became of a device.
#[derive(Clone, Debug)]
pub enum NvmeChange {
    /// It failed or is gone: all operations end with errors from now on.
    Lost {
        /// Why, for the log.
        why: String,
    },
    /// It, or one that says so, is there again. Nothing reaches it before [`NvmeDevice::admit`].
    Back(Epoch),
}

/// What to call when a device is lost or back. Runs on the thread of the controller: to be short.
pub type OnChange = Arc<dyn Fn(&DeviceInfo, &NvmeChange) + Send + Sync>;

/// What a device and the thread of its controller share.
pub(super) struct Shared {
    pub(super) info: Arc<DeviceInfo>,
    /// The namespace as it was found first: it must be the same when it is back.
    pub(super) namespace: NamespaceInfo,
    /// The controller's serial number, likewise.
    pub(super) serial: String,
    standing: AtomicU64,
    seats: Mutex<Vec<Weak<Seat>>>,
    on_change: OnChange,
}

const LOST: u64 = 0;
const UNPROVEN: u64 = 1;
const PROVEN: u64 = 2;

impl Shared {
    pub(super) fn new(
        info: DeviceInfo,
        namespace: NamespaceInfo,
        serial: String,
        on_change: OnChange,
    ) -> Self {
        let standing = AtomicU64::new(1 << 32 | UNPROVEN);
        let (info, seats) = (Arc::new(info), Mutex::default());
        Self { info, namespace, serial, standing, seats, on_change }
    }

    pub(super) fn standing(&self) -> Standing {
        let word = self.standing.load(Ordering::Acquire);
        let epoch = Epoch((word >> 32) as u32);
        match word & u64::from(u32::MAX) {
            UNPROVEN => Standing::Unproven(epoch),
            PROVEN => Standing::Proven(epoch),
            _ => Standing::Lost,
        }
    }

    fn set(&self, state: u64, next_epoch: bool) -> Epoch {
        let epoch = (self.standing.load(Ordering::Acquire) >> 32) + u64::from(next_epoch);
        self.standing.store(epoch << 32 | state, Ordering::Release);
        Epoch(u32::try_from(epoch).unwrap_or(u32::MAX))
    }

    /// The controller's thread alone changes the standing.
    pub(super) fn lose(&self, why: &str) {
        if self.standing() == Standing::Lost {
            return;
        }
        self.set(LOST, false);
        self.seats().iter().for_each(|seat| seat.clear_ticket());
        (self.on_change)(&self.info, &NvmeChange::Lost { why: why.to_owned() });
    }

    /// Ends its use, by whoever had it.
    pub(super) fn retire(&self) {
        self.set(LOST, false);
    }

    pub(super) fn come_back(&self) {
        let epoch = self.set(UNPROVEN, true);
        (self.on_change)(&self.info, &NvmeChange::Back(epoch));
    }

    pub(super) fn prove(&self) {
        self.set(PROVEN, false);
    }

    /// The queues that cores have open.
    pub(super) fn seats(&self) -> Vec<Arc<Seat>> {
        let mut seats = self.lock_seats();
        seats.retain(|seat| seat.strong_count() > 0);
        seats.iter().filter_map(Weak::upgrade).collect()
    }

    fn lock_seats(&self) -> MutexGuard<'_, Vec<Weak<Seat>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one core's queue, where it finds the ticket for a new queue pair when the device is back.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) depth: u16,
    /// The controller would not create the queue pair: nothing goes on by itself.
    pub(super) broken: AtomicBool,
    fresh: AtomicBool,
    ticket: Mutex<Option<QueueTicket>>,
}

impl Seat {
    const fn new(depth: u16) -> Self {
        let (broken, fresh) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { depth, broken, fresh, ticket: Mutex::new(None) }
    }

    /// Puts the ticket of a device that is back.
    pub(super) fn put_ticket(&self, ticket: QueueTicket) {
        *self.ticket.lock().unwrap_or_else(PoisonError::into_inner) = Some(ticket);
        self.broken.store(false, Ordering::Release);
        self.fresh.store(true, Ordering::Release);
    }

    /// Takes away a ticket that nobody used before the device was lost again.
    pub(super) fn clear_ticket(&self) {
        self.fresh.store(false, Ordering::Release);
        *self.ticket.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn has_ticket(&self) -> bool {
        self.fresh.load(Ordering::Acquire)
    }

    pub(super) fn take_ticket(&self) -> Option<QueueTicket> {
        if !self.fresh.swap(false, Ordering::AcqRel) {
            return None;
        }
        self.ticket.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A namespace of a controller that our driver drives.
pub struct NvmeDevice {
    shared: Arc<Shared>,
    controller: Arc<NvmeController>,
}

impl NvmeDevice {
    pub(super) const fn new(shared: Arc<Shared>, controller: Arc<NvmeController>) -> Self {
        Self { shared, controller }
    }

    /// The namespace as the controller describes it.
    #[must_use]
    pub fn namespace(&self) -> &NamespaceInfo {
        &self.shared.namespace
    }

    /// Whether it may be used now.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.shared.standing()
    }

    /// Vouches for the device of this appearance: cores get queues from now on.
    ///
    /// # Errors
    /// [`BlockErrorKind::Gone`] when it was lost meanwhile.
    pub fn admit(&self, epoch: Epoch) -> Result<(), BlockError> {
        self.controller.admit(Arc::clone(&self.shared), epoch)
    }

    /// Reads at once, by a queue of the controller's own thread, proven or not. For a few blocks: it waits.
    ///
    /// # Errors
    /// That of the device, [`BlockErrorKind::TimedOut`] at `deadline`, [`BlockErrorKind::InvalidRequest`] for more than
    /// 2 MiB or a range that is not the device's.
    pub fn read(&self, at: ByteOffset, len: ByteLen, deadline: Instant) -> Result<Vec<u8>, BlockError> {
        let shift = u32::from(self.shared.namespace.block_shift);
        let blocks = len.get() >> shift;
        let is_whole = blocks << shift == len.get() && self.shared.info.logical_block_size.is_aligned(at);
        let is_inside = at.checked_add(len.get()).is_some_and(|end| end.get() <= self.shared.info.len.get());
        if blocks == 0 || !is_whole || !is_inside || len.get() > BUFFER_LEN_MAX as u64 {
            return Err(BlockErrorKind::InvalidRequest.into());
        }
        self.controller.read(self.shared.namespace.nsid, at.get() >> shift, blocks, shift, deadline)
    }

    /// A queue for the calling thread, for at most `depth` operations at a time, that can only be polled.
    ///
    /// # Errors
    /// [`BlockErrorKind::Gone`] when nobody has vouched for the device, or it is lost; [`BlockErrorKind::Internal`] when
    /// the controller has no more queues. The log says more.
    pub fn open(&self, pool: &BufferPool, depth: usize) -> Result<NvmeQueue, BlockError> {
        self.open_with(None, pool, depth)
    }

    fn open_with(
        &self,
        sleeper: Option<Sleeper>,
        pool: &BufferPool,
        depth: usize,
    ) -> Result<NvmeQueue, BlockError> {
        if !matches!(self.standing(), Standing::Proven(_)) {
            return Err(BlockErrorKind::Gone.into());
        }
        let depth = u16::try_from(depth).unwrap_or(u16::MAX);
        let seat = Arc::new(Seat::new(depth));
        // First of all: a device that is lost and back meanwhile has a ticket for it then.
        self.shared.lock_seats().push(Arc::downgrade(&seat));
        let ticket = self.controller.ticket(self.shared.namespace.nsid, depth)?;
        let failed = |error: async_nvme::Error| {
            tracing::error!(device = self.shared.info.name, %error, "no queue can be opened");
            BlockError::new(BlockErrorKind::Internal)
        };
        let mut pair = open_pair(ticket, pool, sleeper.is_some()).map_err(failed)?;
        await_creation(&mut pair, &self.shared.info, || {})?;
        Ok(NvmeQueue::new(Arc::clone(&self.shared.info), seat, pool.clone(), sleeper, pair))
    }
}

/// Waits until the controller has created a queue pair; `idle` is called between two looks.
pub(super) fn await_creation(
    pair: &mut IoQueue,
    info: &DeviceInfo,
    mut idle: impl FnMut(),
) -> Result<(), BlockError> {
    let clock = SystemClock::default();
    let deadline = Instant::now() + CREATE_PATIENCE;
    while !pair.is_ready() {
        if let Some(status) = pair.refused_with() {
            tracing::error!(device = info.name, %status, "the controller refused a queue");
            return Err(BlockError::from_status(status, true));
        }
        if pair.is_gone() {
            return Err(BlockErrorKind::Gone.into());
        }
        if Instant::now() >= deadline {
            return Err(BlockErrorKind::TimedOut.into());
        }
        // Nothing is open in it; but a reset meanwhile has to be lived through.
        pair.poll(clock.now(), 0, &mut Vec::new());
        idle();
        std::thread::sleep(CREATE_LOOK);
    }
    Ok(())
}

impl BlockDevice for NvmeDevice {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    /// The ring is for sleeping only: registers are written and memory is read without it.
    fn open_queue(
        &self,
        ring: &Ring,
        pool: &BufferPool,
        depth: usize,
    ) -> Result<Box<dyn BlockQueue>, BlockError> {
        Ok(Box::new(self.open_with(Some(Sleeper::new(ring)), pool, depth)?))
    }
}

impl fmt::Debug for NvmeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NvmeDevice")
            .field("info", &self.shared.info)
            .field("standing", &self.standing())
            .finish_non_exhaustive()
    }
}

/// What the block layer is told of a namespace.
pub(super) fn describe(
    name: &str,
    controller: &async_nvme::ControllerInfo,
    namespace: &NamespaceInfo,
    stands_on: Option<(u32, u32)>,
) -> Option<DeviceInfo> {
    use nvme_spec::identify::oncs;
    let block_size = BlockSize::new(namespace.block_len())?;
    Some(DeviceInfo {
        name: format!("{name}, namespace {}", namespace.nsid),
        dev: stands_on,
        logical_block_size: block_size,
        physical_block_bytes: block_size.bytes(),
        len: ByteLen(namespace.blocks.checked_mul(block_size.bytes().into())?),
        volatile_write_cache: controller.volatile_write_cache,
        write_zeroes: !namespace.read_only && controller.offers(oncs::WRITE_ZEROES),
        deallocate: !namespace.read_only && controller.offers(oncs::DATASET_MANAGEMENT),
        transfer_len_max: ByteLen(BUFFER_LEN_MAX as u64),
        read_only: namespace.read_only,
    })
}
