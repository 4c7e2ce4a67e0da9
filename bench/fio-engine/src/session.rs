//! A job's connection: commands go out, their ends come back with the tags that they were given.
//!
//! ```text
//!   submit(tag) ... submit(tag) -> send -> reap: (tag, data or failure), (tag, ...)
//! ```
//!
//! Each command that was taken ends once, in [`Session::reap`], also when the connection breaks: then with what broke it.

use std::time::Duration;

use fastice::initiator::command::{self, Transfer};
use fastice::initiator::controller::{ConnectOptions, Controller};
use fastice::initiator::error::InitiatorError;
use fastice::initiator::transport::{DEPTH_MAX, DataFault, Deadline, Done, Queue};
use fastice::units::{BlockSize, Lba};
use libc::c_int;
use nvme_spec::identify::{nsattr, oncs};
use nvme_spec::nvm::{DatasetManagementRange, dsm};
use nvme_spec::{Nsid, NvmOpcode, Status, SubmissionQueueEntry};
use zerocopy::IntoBytes;

use crate::errno;

/// How long a wait goes on before it is looked whether the controller is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What a job of fio asks for.
#[derive(Clone, Debug)]
pub struct Job {
    /// The target, and how to connect. `io_queues` and `queue_size` follow from the depth, unless the latter is larger.
    pub connect: ConnectOptions,
    /// The namespace.
    pub nsid: Nsid,
    /// Commands in flight at most.
    pub depth: usize,
    /// Whether to ask the socket again and again instead of sleeping until something comes.
    pub busy_poll: bool,
}

/// What fio wants to know of a namespace before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes.
    pub len: u64,
    /// Of a logical block, in bytes.
    pub block_size: BlockSize,
    /// Bytes that one command may carry at most.
    pub transfer_len_max: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether there is Dataset Management, which is what a trim becomes.
    pub deallocates: bool,
}

/// Why something cannot be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For fio.
    pub errno: c_int,
    /// The status of the completion, when there was one.
    pub status: Option<Status>,
    /// For people.
    pub message: String,
}

impl Failure {
    /// With a message of its own.
    pub(crate) fn new(errno: c_int, message: impl Into<String>) -> Self {
        Self { errno, status: None, message: message.into() }
    }
}

impl From<&InitiatorError> for Failure {
    fn from(error: &InitiatorError) -> Self {
        let mut message = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        if error.status().is_some_and(|status| status.code() == Status::CONNECT_INVALID_HOST) {
            message.push_str("; the target does not allow this host: see hostnqn");
        }
        Self { errno: errno::of_error(error), status: error.status(), message }
    }
}

impl From<InitiatorError> for Failure {
    fn from(error: InitiatorError) -> Self {
        Self::from(&error)
    }
}

/// What one command does.
#[derive(Clone, Copy, Debug)]
pub enum Work<'a> {
    /// Reads so many bytes.
    Read(u32),
    /// Writes.
    Write {
        /// What.
        data: &'a [u8],
        /// To the medium, before it completes.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Dataset Management, attribute Deallocate, of so many bytes.
    Deallocate(u64),
}

/// Whether a command was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It will end in [`Session::reap`].
    Yes,
    /// As many as may be are in flight.
    Busy,
}

/// How a command ended: with its buffer, which after a read is what was read; or the errno, and the status if there was one.
pub type Ending<'a> = Result<&'a [u8], (c_int, Option<Status>)>;

/// Reads the geometry of a namespace, by a connection that is closed again.
///
/// # Errors
/// No connection, no such namespace, or one with metadata.
pub fn geometry(job: &Job) -> Result<Geometry, Failure> {
    let controller = Controller::connect(&ConnectOptions { io_queues: 0, ..job.connect.clone() })?;
    let geometry = geometry_of(&controller, job.nsid)?;
    controller.shutdown()?;
    Ok(geometry)
}

fn geometry_of(controller: &Controller, nsid: Nsid) -> Result<Geometry, Failure> {
    let namespace = controller.namespace(nsid)?;
    let block_size = namespace.block_size();
    let len = block_size.len_of(namespace.blocks());
    let len = len.ok_or_else(|| Failure::new(libc::EFBIG, "the namespace has more than 2^64 bytes"))?;
    Ok(Geometry {
        len: len.get(),
        block_size,
        // A Read or Write counts its blocks in 16 bits.
        transfer_len_max: controller.transfer_len_max().min(block_size.bytes().saturating_mul(1 << 16)),
        read_only: namespace.identify().nsattr & nsattr::WRITE_PROTECTED != 0,
        deallocates: controller.identify_controller().oncs.get() & oncs::DATASET_MANAGEMENT != 0,
    })
}

/// One job's controller and queue; `T` names its commands.
pub struct Session<T> {
    queue: Queue,
    controller: Controller,
    nsid: Nsid,
    geometry: Geometry,
    busy_poll: bool,
    /// What is in flight, by slot.
    tags: Vec<Option<T>>,
    in_flight: usize,
    /// What ended the connection; told until somebody asks.
    broken: Option<Failure>,
    untold: bool,
}

impl<T: Copy> Session<T> {
    /// Connects: the admin queue and one I/O queue.
    ///
    /// # Errors
    /// No connection, no such namespace, or a controller whose queues are too short for the depth.
    pub fn open(job: &Job) -> Result<Self, Failure> {
        let entries = job.depth.saturating_add(1).max(usize::from(job.connect.queue_size));
        let entries = u16::try_from(entries).ok().filter(|_| (1..=DEPTH_MAX).contains(&job.depth));
        let too_deep = |max: usize| {
            Failure::new(libc::EINVAL, format!("iodepth={} is too much here: at most {max}", job.depth))
        };
        let queue_size = entries.ok_or_else(|| too_deep(DEPTH_MAX))?;
        let connect = ConnectOptions { io_queues: 1, queue_size, ..job.connect.clone() };
        let controller = Controller::connect(&connect)?;
        let geometry = geometry_of(&controller, job.nsid)?;
        let no_queue = || Failure::new(libc::EBUSY, "the controller grants no I/O queue");
        let queue = controller.take_io_queue(0).ok_or_else(no_queue)?;
        if queue.depth() < job.depth {
            return Err(too_deep(queue.depth()));
        }
        Ok(Self {
            tags: std::iter::repeat_with(|| None).take(queue.depth()).collect(),
            queue,
            controller,
            nsid: job.nsid,
            geometry,
            busy_poll: job.busy_poll,
            in_flight: 0,
            broken: None,
            untold: false,
        })
    }

    /// The namespace, as it was when connecting.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Takes a command at byte `offset`; [`Self::send`] or [`Self::reap`] sends it. Data to write is copied here.
    ///
    /// # Errors
    /// The connection is broken, or the command cannot be made: no whole blocks, or more than a command may carry.
    pub fn submit(&mut self, offset: u64, work: Work<'_>, tag: T) -> Result<Taken, Failure> {
        if let Some(failure) = &self.broken {
            return Err(failure.clone());
        }
        let made = self.command(offset, work)?;
        let Some(slot) = self.queue.reserve() else { return Ok(Taken::Busy) };
        if let Transfer::ToController(len) = made.transfer {
            self.queue.buffer_mut(slot, len as usize).copy_from_slice(made.data());
        }
        self.queue.submit(slot, &made.sqe, made.transfer, Deadline::Default);
        if let Some(place) = self.tags.get_mut(slot.index()) {
            *place = Some(tag);
        }
        self.in_flight += 1;
        Ok(Taken::Yes)
    }

    /// Sends what was taken, as far as the socket has room. What goes wrong is the end of all commands in flight.
    pub fn send(&mut self) {
        if self.broken.is_none()
            && let Err(error) = self.queue.flush()
        {
            self.breaks(Failure::from(error));
        }
    }

    /// Gives up to `max` commands that have ended to `ended`, and waits until there are `min`, or as many as are in flight.
    /// Every wait ends: by the deadline of a command at the latest.
    pub fn reap(&mut self, min: usize, max: usize, mut ended: impl FnMut(T, Ending<'_>)) -> usize {
        let mut count = 0;
        let mut looked = false;
        loop {
            while count < max
                && let Some(done) = self.queue.pop_done()
            {
                if let Some(tag) = self.take(&done) {
                    ended(tag, ending(&self.queue, &done));
                    count += 1;
                }
                self.queue.release(done.slot);
            }
            if self.broken.is_some() {
                return count + self.reap_lost(max - count, ended);
            }
            if self.in_flight == 0 || count == max || (count >= min && (looked || count > 0)) {
                return count;
            }
            looked = true;
            let wait = if count >= min || self.busy_poll { Duration::ZERO } else { LOOK_INTERVAL };
            if let Err(error) = self.queue.poll(wait) {
                self.breaks(Failure::from(error));
            } else if self.controller.is_lost() {
                self.breaks(Failure::new(
                    libc::ENOTCONN,
                    "the controller does not answer Keep Alive any more",
                ));
            }
        }
    }

    /// Why the connection broke; told once.
    pub fn take_news(&mut self) -> Option<&Failure> {
        if std::mem::take(&mut self.untold) { self.broken.as_ref() } else { None }
    }

    /// Ends it in order, when it still stands.
    ///
    /// # Errors
    /// The controller does not shut down; it is left then.
    pub fn close(self) -> Result<(), Failure> {
        let Self { queue, controller, broken, .. } = self;
        drop(queue);
        if broken.is_none() {
            controller.shutdown()?;
        }
        Ok(())
    }

    fn take(&mut self, done: &Done) -> Option<T> {
        let tag = self.tags.get_mut(done.slot.index())?.take()?;
        self.in_flight -= 1;
        Some(tag)
    }

    /// Commands of a connection that is gone.
    fn reap_lost(&mut self, max: usize, mut ended: impl FnMut(T, Ending<'_>)) -> usize {
        let errno = self.broken.as_ref().map_or(libc::EIO, |failure| failure.errno);
        let lost = self.tags.iter_mut().filter_map(Option::take).take(max);
        let count = lost.map(|tag| ended(tag, Err((errno, None)))).count();
        self.in_flight -= count;
        count
    }

    fn breaks(&mut self, failure: Failure) {
        self.untold = true;
        self.broken = Some(failure);
    }

    fn command<'a>(&self, offset: u64, work: Work<'a>) -> Result<Made<'a>, Failure> {
        let made = |sqe, transfer, data| Ok(Made { sqe, transfer, data });
        match work {
            Work::Flush => {
                made(command::command(NvmOpcode::FLUSH.0, self.nsid), Transfer::None, Data::Lent(&[]))
            }
            Work::Read(len) => {
                made(self.io(NvmOpcode::READ, offset, len, false)?, Transfer::ToHost(len), Data::Lent(&[]))
            }
            Work::Write { data, fua } => {
                let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
                let sqe = self.io(NvmOpcode::WRITE, offset, len, fua)?;
                made(sqe, Transfer::ToController(len), Data::Lent(data))
            }
            Work::Deallocate(len) => {
                let (lba, blocks) = self.blocks(offset, len)?;
                let too_long = || Failure::new(libc::EINVAL, format!("a trim of {len} bytes is too long"));
                let length = u32::try_from(blocks).map_err(|_| too_long())?;
                let range = DatasetManagementRange {
                    context_attributes: 0.into(),
                    length: length.into(),
                    slba: lba.get().into(),
                };
                let sqe = SubmissionQueueEntry {
                    cdw11: dsm::AD.into(),
                    ..command::command(NvmOpcode::DATASET_MANAGEMENT.0, self.nsid)
                };
                let mut bytes = [0; RANGE_LEN];
                bytes.copy_from_slice(range.as_bytes());
                let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                made(sqe, Transfer::ToController(len), Data::Range(bytes))
            }
        }
    }

    fn io(
        &self,
        opcode: NvmOpcode,
        offset: u64,
        len: u32,
        fua: bool,
    ) -> Result<SubmissionQueueEntry, Failure> {
        let (lba, blocks) = self.blocks(offset, len.into())?;
        let max = self.geometry.transfer_len_max;
        match u16::try_from(blocks - 1) {
            Ok(nlb_z) if len <= max => Ok(command::io(opcode, self.nsid, lba, nlb_z, fua)),
            _ => Err(Failure::new(
                libc::EINVAL,
                format!("{len} bytes are more than a command may carry: {max}"),
            )),
        }
    }

    /// The blocks of a range of bytes: at least one.
    fn blocks(&self, offset: u64, len: u64) -> Result<(Lba, u64), Failure> {
        let block = u64::from(self.geometry.block_size.bytes());
        if len == 0 || !len.is_multiple_of(block) || !offset.is_multiple_of(block) {
            let what = format!("{len} bytes at {offset} are not whole blocks of {block} bytes");
            return Err(Failure::new(libc::EINVAL, what));
        }
        Ok((Lba(offset / block), len / block))
    }
}

const RANGE_LEN: usize = size_of::<DatasetManagementRange>();

/// A command, and what it sends.
struct Made<'a> {
    sqe: SubmissionQueueEntry,
    transfer: Transfer,
    data: Data<'a>,
}

enum Data<'a> {
    Lent(&'a [u8]),
    Range([u8; RANGE_LEN]),
}

impl Made<'_> {
    fn data(&self) -> &[u8] {
        match &self.data {
            Data::Lent(data) => data,
            Data::Range(bytes) => bytes,
        }
    }
}

fn ending<'a>(queue: &'a Queue, done: &Done) -> Ending<'a> {
    let status = done.completion.status;
    if !status.is_success() {
        return Err((errno::of_status(status), Some(status)));
    }
    match done.fault {
        None => Ok(queue.buffer(done.slot)),
        Some(DataFault::Digest { .. }) => Err((libc::EBADMSG, None)),
        Some(DataFault::Short { .. }) => Err((libc::EPROTO, None)),
    }
}
