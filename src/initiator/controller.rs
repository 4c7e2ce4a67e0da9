//! A controller as this host sees it: an admin queue, I/O queues, and a thread that keeps it alive.
//!
//! Admin commands may come from any thread; they take turns on the admin queue. Asynchronous events are collected
//! and wait for [`Controller::next_event`]. I/O queues are used by [`Namespace`] one command set at a time, or taken
//! out for good by a benchmark ([`Controller::take_io_queue`]).

mod admin;
mod connect;

pub use admin::{AdminQueue, NamespaceIds};

use super::command::{self, Completion, Transfer};
use super::error::{ErrorKind, InitiatorError};
use super::namespace::Namespace;
use super::transport::{Queue, Timeouts};
use crate::tcp::pdu::Digests;
use nvme_spec::fabrics::DISCOVERY_NQN;
use nvme_spec::feature::FeatureId;
use nvme_spec::identify::{Cns, IDENTIFY_LEN, IdentifyController, IdentifyNamespace};
use nvme_spec::register::{Cap, Cc, Csts, Property};
use nvme_spec::{AdminOpcode, Nsid, SubmissionQueueEntry};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Host NQN.
    pub nqn: String,
    /// Host Identifier; of one host always the same.
    pub id: [u8; 16],
}

impl Host {
    /// A host with an identifier of its own, made up now: `nqn.2014-08.org.nvmexpress:uuid:...`.
    #[must_use]
    pub fn random() -> Self {
        let id = uuid::Uuid::new_v4();
        Self { nqn: format!("nqn.2014-08.org.nvmexpress:uuid:{id}"), id: *id.as_bytes() }
    }
}

/// How to connect to a controller.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Address and port of the subsystem's port.
    pub address: SocketAddr,
    /// The subsystem.
    pub subsystem_nqn: String,
    /// Who connects.
    pub host: Host,
    /// I/O queues wanted; the controller may grant fewer. 0 for a discovery controller.
    pub io_queues: u16,
    /// Entries of an I/O queue; one less is in flight at most.
    pub queue_size: u16,
    /// Keep Alive Timeout, 0 for none.
    pub kato_ms: u32,
    /// Whether to use header digests.
    pub header_digest: bool,
    /// Whether to use data digests.
    pub data_digest: bool,
    /// HPDA to ask for: data in C2HData aligned to `(hpda + 1) * 4`.
    pub hpda: u8,
    /// Whether to ask for no SQ flow control, which also permits the controller to leave out good responses to reads.
    pub disable_sq_flow_control: bool,
    /// Deadlines.
    pub timeouts: Timeouts,
}

impl ConnectOptions {
    /// One I/O queue of 128 entries, 5 s of keep alive, no digests: what a Linux host does by default.
    #[must_use]
    pub fn new(address: SocketAddr, subsystem_nqn: impl Into<String>, host: Host) -> Self {
        Self {
            address,
            subsystem_nqn: subsystem_nqn.into(),
            host,
            io_queues: 1,
            queue_size: 128,
            kato_ms: 5000,
            header_digest: false,
            data_digest: false,
            hpda: 0,
            disable_sq_flow_control: true,
            timeouts: Timeouts::default(),
        }
    }

    /// For the discovery controller at `address`.
    #[must_use]
    pub fn discovery(address: SocketAddr, host: Host) -> Self {
        Self { io_queues: 0, ..Self::new(address, DISCOVERY_NQN, host) }
    }

    const fn digests(&self) -> Digests {
        Digests { header: self.header_digest, data: self.data_digest }
    }
}

/// A connected and enabled controller.
pub struct Controller {
    options: ConnectOptions,
    admin: Arc<Mutex<AdminQueue>>,
    io_queues: Vec<Mutex<Option<Queue>>>,
    identity: Box<IdentifyController>,
    cap: Cap,
    version: u32,
    cntlid: u16,
    keeper: Option<Keeper>,
}

/// The thread that sends Keep Alive and collects events.
struct Keeper {
    stop: Arc<(Mutex<bool>, Condvar)>,
    lost: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// A lock that outlives a panic of another thread: the queue behind it tells itself whether it is alive.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Controller {
    /// Connects, enables, identifies, and opens the I/O queues.
    ///
    /// # Errors
    /// Whatever fails first; nothing stays connected then.
    pub fn connect(options: &ConnectOptions) -> Result<Self, InitiatorError> {
        let (mut admin, cntlid) = connect::admin_queue(options)?;
        let (cap, version) = connect::enable(&mut admin, options)?;
        let identity: Box<IdentifyController> = admin.identify(Cns::CONTROLLER, Nsid::NONE)?;
        if identity.cntlid.get() != cntlid {
            return Err(InitiatorError::incompatible(format!(
                "Connect gave controller {cntlid:#x}, Identify says {:#x}",
                identity.cntlid.get()
            )));
        }
        let io_queues = connect::io_queues(&mut admin, options, &identity, cap, cntlid)?;
        let aen = identity.oaes.get();
        admin.start_events(aen, identity.aerl_z)?;
        let admin = Arc::new(Mutex::new(admin));
        let keeper = Keeper::start(&admin, options.kato_ms);
        Ok(Self {
            options: options.clone(),
            admin,
            io_queues: io_queues.into_iter().map(|queue| Mutex::new(Some(queue))).collect(),
            identity,
            cap,
            version,
            cntlid,
            keeper: Some(keeper),
        })
    }

    /// How this controller was connected.
    #[must_use]
    pub const fn options(&self) -> &ConnectOptions {
        &self.options
    }

    /// Identify Controller as it was when connecting.
    #[must_use]
    pub fn identify_controller(&self) -> &IdentifyController {
        &self.identity
    }

    /// CAP.
    #[must_use]
    pub const fn cap(&self) -> Cap {
        self.cap
    }

    /// VS.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// CNTLID.
    #[must_use]
    pub const fn cntlid(&self) -> u16 {
        self.cntlid
    }

    /// The largest transfer of a command in bytes: MDTS, and never more than 1 MiB.
    #[must_use]
    pub fn transfer_len_max(&self) -> u32 {
        const OWN_MAX: u32 = 1 << 20;
        match self.identity.mdts {
            0 => OWN_MAX,
            mdts => {
                let shift = 12 + u32::from(self.cap.mpsmin()) + u32::from(mdts);
                1u32.checked_shl(shift).map_or(OWN_MAX, |len| len.min(OWN_MAX))
            }
        }
    }

    /// Whether the keep-alive thread found the controller gone.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| keeper.lost.load(Ordering::Acquire))
    }

    /// Identify Namespace.
    ///
    /// # Errors
    /// As [`Self::admin_raw`].
    pub fn identify_namespace(&self, nsid: Nsid) -> Result<Box<IdentifyNamespace>, InitiatorError> {
        lock(&self.admin).identify(Cns::NAMESPACE, nsid)
    }

    /// Any Identify data structure as bytes.
    ///
    /// # Errors
    /// As [`Self::admin_raw`].
    pub fn identify_raw(&self, cns: Cns, nsid: Nsid, csi: u8) -> Result<Vec<u8>, InitiatorError> {
        let mut data = vec![0; IDENTIFY_LEN];
        lock(&self.admin).read_command("Identify", &command::identify(cns, nsid, csi), &mut data)?;
        Ok(data)
    }

    /// The active namespaces, in ascending order.
    ///
    /// # Errors
    /// As [`Self::admin_raw`]; [`ErrorKind::Incompatible`] for a list that does not ascend.
    pub fn active_namespaces(&self) -> Result<Vec<Nsid>, InitiatorError> {
        lock(&self.admin).active_namespaces()
    }

    /// The identifiers of a namespace, from its Namespace Identification Descriptors.
    ///
    /// # Errors
    /// As [`Self::admin_raw`]; [`ErrorKind::Incompatible`] for descriptors of wrong length.
    pub fn descriptors(&self, nsid: Nsid) -> Result<NamespaceIds, InitiatorError> {
        let data = self.identify_raw(Cns::NAMESPACE_DESCRIPTORS, nsid, 0)?;
        NamespaceIds::parse(&data)
    }

    /// Get Log Page: `len` bytes from `offset` on, in pieces of 4 KiB.
    ///
    /// # Errors
    /// As [`Self::admin_raw`]; [`ErrorKind::InvalidArgument`] when `len` or `offset` is no multiple of four.
    pub fn get_log_page(
        &self,
        lid: u8,
        nsid: Nsid,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, InitiatorError> {
        lock(&self.admin).get_log_page(lid, nsid, offset, len)
    }

    /// Get Features; gives dword 0 of the completion. `data` receives what the feature has, and may be empty.
    ///
    /// # Errors
    /// As [`Self::admin_raw`].
    pub fn get_features(&self, fid: FeatureId, nsid: Nsid, data: &mut [u8]) -> Result<u32, InitiatorError> {
        let sqe = SubmissionQueueEntry {
            cdw10: u32::from(fid.0).into(),
            ..command::command(AdminOpcode::GET_FEATURES.0, nsid)
        };
        Ok(lock(&self.admin).read_command("Get Features", &sqe, data)?.result32())
    }

    /// Set Features; gives dword 0 of the completion.
    ///
    /// # Errors
    /// As [`Self::admin_raw`].
    pub fn set_features(
        &self,
        fid: FeatureId,
        nsid: Nsid,
        cdw11: u32,
        data: &[u8],
    ) -> Result<u32, InitiatorError> {
        Ok(lock(&self.admin).set_features(fid, nsid, cdw11, data)?.result32())
    }

    /// Property Get of 4 bytes, or of 8.
    ///
    /// # Errors
    /// As [`Self::admin_raw`].
    pub fn property(&self, property: Property, eight_bytes: bool) -> Result<u64, InitiatorError> {
        lock(&self.admin).property_get(property, eight_bytes)
    }

    /// Any admin command. CID, PSDT and the SGL are set here, everything else is sent as it is. Gives the completion
    /// whatever its status.
    ///
    /// # Errors
    /// The admin queue is dead or dies, or data came damaged; [`ErrorKind::InvalidArgument`] for data both ways.
    pub fn admin_raw(
        &self,
        sqe: &SubmissionQueueEntry,
        data_out: &[u8],
        data_in: &mut [u8],
    ) -> Result<Completion, InitiatorError> {
        lock(&self.admin).raw(sqe, data_out, data_in)
    }

    /// Any command on the I/O queue `index`; as [`Self::admin_raw`].
    ///
    /// # Errors
    /// As [`Self::admin_raw`]; [`ErrorKind::InvalidArgument`] when the queue was taken or never was.
    pub fn io_raw(
        &self,
        index: usize,
        sqe: &SubmissionQueueEntry,
        data_out: &[u8],
        data_in: &mut [u8],
    ) -> Result<Completion, InitiatorError> {
        self.with_io_queue(index, |queue| admin::raw_on(queue, sqe, data_out, data_in, |_, _| {}))
    }

    /// The next asynchronous event, or none within `wait`: dword 0 of its completion.
    ///
    /// # Errors
    /// The admin queue is dead or dies.
    pub fn next_event(&self, wait: Duration) -> Result<Option<u32>, InitiatorError> {
        let deadline = Instant::now() + wait;
        loop {
            if let Some(event) = lock(&self.admin).poll_event(Duration::from_millis(10))? {
                return Ok(Some(event));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            // Others want the admin queue too, and a lock that is taken again at once may never reach them.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Open I/O queues.
    #[must_use]
    pub fn io_queue_count(&self) -> usize {
        self.io_queues.len()
    }

    /// Takes the I/O queue `index` out, for a thread of its own. What uses the controller's queues by itself then
    /// does without it.
    pub fn take_io_queue(&self, index: usize) -> Option<Queue> {
        self.io_queues.get(index).and_then(|queue| lock(queue).take())
    }

    /// A namespace, for I/O.
    ///
    /// # Errors
    /// As [`Self::admin_raw`]; [`ErrorKind::Incompatible`] for a format this host does not do: metadata, or a block
    /// size outside of 512 to 65536.
    pub fn namespace(&self, nsid: Nsid) -> Result<Namespace<'_>, InitiatorError> {
        Namespace::new(self, nsid)
    }

    /// Runs `f` on an I/O queue that is free, or on the first.
    pub(crate) fn with_any_io_queue<T>(
        &self,
        f: impl FnOnce(&mut Queue) -> Result<T, InitiatorError>,
    ) -> Result<T, InitiatorError> {
        for mutex in &self.io_queues {
            if let Ok(mut guard) = mutex.try_lock()
                && let Some(queue) = guard.as_mut()
            {
                return f(queue);
            }
        }
        let index = self.io_queues.iter().position(|mutex| lock(mutex).is_some()).unwrap_or(0);
        self.with_io_queue(index, f)
    }

    fn with_io_queue<T>(
        &self,
        index: usize,
        f: impl FnOnce(&mut Queue) -> Result<T, InitiatorError>,
    ) -> Result<T, InitiatorError> {
        let missing = || InitiatorError::invalid(format!("no I/O queue {index} here"));
        let mutex = self.io_queues.get(index).ok_or_else(missing)?;
        f(lock(mutex).as_mut().ok_or_else(missing)?)
    }

    /// Shuts the controller down in order: CC.SHN, and waiting for CSTS.SHST; then closes all connections.
    ///
    /// # Errors
    /// The admin queue is dead or dies, or the shutdown takes longer than a command may.
    pub fn shutdown(mut self) -> Result<(), InitiatorError> {
        self.stop_keeper();
        for queue in &self.io_queues {
            lock(queue).take();
        }
        let mut admin = lock(&self.admin);
        let cc = Cc::from_bits(low_half(admin.property_get(Property::CC, false)?)).with_shn(0b01);
        admin.property_set(Property::CC, cc.into_bits())?;
        let deadline = Instant::now() + self.options.timeouts.command;
        loop {
            let csts = Csts::from_bits(low_half(admin.property_get(Property::CSTS, false)?));
            if csts.shst() == 0b10 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(InitiatorError::timeout("the controller does not finish its shutdown"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn stop_keeper(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            keeper.stop();
        }
    }
}

/// The value of a 4-byte property.
#[expect(clippy::cast_possible_truncation, reason = "4-byte properties have no upper half")]
const fn low_half(value: u64) -> u32 {
    value as u32
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.stop_keeper();
    }
}

impl Keeper {
    /// Half of the timeout between two Keep Alives, so that one may be late.
    fn start(admin: &Arc<Mutex<AdminQueue>>, kato_ms: u32) -> Self {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let lost = Arc::new(AtomicBool::new(false));
        let interval = match kato_ms {
            0 => Duration::from_secs(1),
            ms => Duration::from_millis(u64::from(ms) / 2).max(Duration::from_millis(1)),
        };
        let thread = std::thread::spawn({
            let (admin, stop, lost) = (Arc::clone(admin), Arc::clone(&stop), Arc::clone(&lost));
            move || {
                loop {
                    let (mutex, condvar) = &*stop;
                    let guard = lock(mutex);
                    let (stopped, _) = condvar
                        .wait_timeout_while(guard, interval, |stopped| !*stopped)
                        .unwrap_or_else(PoisonError::into_inner);
                    if *stopped {
                        return;
                    }
                    drop(stopped);
                    if let Err(error) = lock(&admin).keep_alive(kato_ms != 0) {
                        tracing::warn!(%error, kind = ?error.kind(), "controller lost");
                        lost.store(true, Ordering::Release);
                        return;
                    }
                }
            }
        });
        Self { stop, lost, thread }
    }

    fn stop(self) {
        let (mutex, condvar) = &*self.stop;
        *lock(mutex) = true;
        condvar.notify_all();
        // A panic of the thread was reported where it happened.
        let _ = self.thread.join();
    }
}

/// Parses a fixed structure out of bytes that a controller sent.
pub(crate) fn parse<T: FromBytes>(what: &str, bytes: &[u8]) -> Result<Box<T>, InitiatorError> {
    T::read_from_prefix(bytes)
        .map(|(value, _)| Box::new(value))
        .map_err(|_| InitiatorError::new(ErrorKind::Incompatible, format!("{what} is too short")))
}

/// Data both ways is not something this host does.
pub(crate) fn transfer_of(data_out: &[u8], data_in: &[u8]) -> Result<Transfer, InitiatorError> {
    let len = |bytes: &[u8]| {
        u32::try_from(bytes.len())
            .map_err(|_| InitiatorError::invalid("more than 4 GiB of data for one command"))
    };
    match (data_out.is_empty(), data_in.is_empty()) {
        (true, true) => Ok(Transfer::None),
        (false, true) => Ok(Transfer::ToController(len(data_out)?)),
        (true, false) => Ok(Transfer::ToHost(len(data_in)?)),
        (false, false) => Err(InitiatorError::invalid("data goes one way in a command")),
    }
}
