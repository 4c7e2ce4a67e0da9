//! One queue of this host: a TCP connection with its commands in flight.
//!
//! ```text
//!   reserve -> slot, buffer_mut(slot) -> submit(slot, ..) -> poll -> pop_done -> release(slot)
//!                                           |                 ^
//!                                     tx: one sendmsg for   rx: one recvmsg for many PDUs,
//!                                         many capsules         large data straight into the slot
//! ```
//!
//! A [`Queue`] belongs to one thread; nothing in it locks, and after the slots' buffers have reached their size
//! nothing allocates. Every wait has a deadline. A queue that saw an error of the protocol, of the socket or of a
//! deadline is dead: it gives that error from then on. A wrong data digest and a wrong status are errors of one
//! command only.

mod rx;
mod slot;
mod tx;

use super::command::{self, Completion, Transfer};
use super::error::{ErrorKind, InitiatorError};
use crate::tcp::pdu::{
    self, Digests, HEADER_MAX, IcReq, IcResp, PduError, PduRules, Phase, Receiver, TermReq,
};
use nvme_spec::SubmissionQueueEntry;
use rustix::event::{PollFd, PollFlags, Timespec};
pub use slot::Deadline;
use slot::{Slot, SlotState};
use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// In-capsule data that every controller takes in admin and fabrics commands (NVMe/TCP Transport specification 1.1,
/// section 3.3.2.1).
pub const ADMIN_IN_CAPSULE_LEN_MAX: u32 = 8192;
/// The most commands in flight on one queue: the CID has 12 bits for the slot and 4 to recognise stale ones.
pub const DEPTH_MAX: usize = 4096;
/// How often the deadlines of commands in flight are looked at.
const DEADLINE_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// How long this host waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For the TCP connection.
    pub tcp_connect: Duration,
    /// For ICResp.
    pub initialize: Duration,
    /// For the completion of a command.
    pub command: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_connect: Duration::from_secs(5),
            initialize: Duration::from_secs(10),
            command: Duration::from_secs(30),
        }
    }
}

/// What a [`Queue`] is made with.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// Commands in flight at most; 1 to [`DEPTH_MAX`].
    pub depth: usize,
    /// The digests to ask for; a controller that does not grant exactly these is not worked with.
    pub digests: Digests,
    /// HPDA to ask for.
    pub hpda: u8,
    /// Whether a C2HData may stand for the completion. To be set when Connect asks for no SQ flow control.
    pub success_flag: bool,
    /// Deadlines.
    pub timeouts: Timeouts,
}

/// Names a command in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(u16);

impl SlotId {
    /// The position in a table of [`Queue::depth`] entries.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What is wrong with a command although the connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFault {
    /// A data digest did not fit its data.
    Digest {
        /// DATAO of the PDU.
        data_offset: u32,
    },
    /// The command succeeded with less data than was asked for.
    Short {
        /// Bytes that came.
        len: u32,
    },
}

/// A command that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Which.
    pub slot: SlotId,
    /// What the controller says.
    pub completion: Completion,
    /// What is wrong with the data, if anything.
    pub fault: Option<DataFault>,
    /// When it was submitted.
    pub submitted: Instant,
}

impl Done {
    /// The completion of a good end.
    ///
    /// # Errors
    /// [`ErrorKind::Status`] and [`ErrorKind::DataDigest`], named by `what`; [`ErrorKind::Protocol`] for missing data.
    pub fn check(&self, what: &str) -> Result<Completion, InitiatorError> {
        if !self.completion.status.is_success() {
            return Err(InitiatorError::status_of(what, self.completion.status));
        }
        match self.fault {
            None => Ok(self.completion),
            Some(DataFault::Digest { data_offset }) => Err(InitiatorError::new(
                ErrorKind::DataDigest,
                format!("{what}: wrong data digest of the data at offset {data_offset}"),
            )),
            Some(DataFault::Short { len }) => {
                Err(InitiatorError::protocol(format!("{what}: succeeded with only {len} bytes of data")))
            }
        }
    }
}

/// One NVMe/TCP connection; see the module's description.
pub struct Queue {
    socket: TcpStream,
    options: QueueOptions,
    rules: PduRules,
    ic_resp: Option<IcResp>,
    in_capsule_len_max: u32,
    slots: Vec<Slot>,
    free: Vec<u16>,
    done: VecDeque<Done>,
    in_flight: usize,
    tx: tx::SendQueue,
    rx: rx::Receive,
    deadlines_checked: Instant,
    dead: Option<InitiatorError>,
}

impl Queue {
    /// Connects to `address` and exchanges ICReq and ICResp.
    ///
    /// # Errors
    /// [`ErrorKind::Connect`], [`ErrorKind::Timeout`], and whatever a wrong or missing ICResp is.
    pub fn connect(address: SocketAddr, options: QueueOptions) -> Result<Self, InitiatorError> {
        if options.depth == 0 || options.depth > DEPTH_MAX {
            return Err(InitiatorError::invalid(format!(
                "a queue depth of {} (1 to {DEPTH_MAX})",
                options.depth
            )));
        }
        let socket = TcpStream::connect_timeout(&address, options.timeouts.tcp_connect).map_err(|error| {
            InitiatorError::new(ErrorKind::Connect, format!("cannot connect to {address}")).with_source(error)
        })?;
        socket
            .set_nodelay(true)
            .and_then(|()| socket.set_nonblocking(true))
            .map_err(InitiatorError::closed)?;
        let now = Instant::now();
        let depth = u16::try_from(options.depth).unwrap_or(u16::MAX);
        let mut queue = Self {
            socket,
            options,
            rules: PduRules::initializing(Receiver::Host),
            ic_resp: None,
            in_capsule_len_max: ADMIN_IN_CAPSULE_LEN_MAX,
            slots: (0..options.depth).map(|_| Slot::new(now)).collect(),
            free: (0..depth).rev().collect(),
            done: VecDeque::with_capacity(options.depth),
            in_flight: 0,
            tx: tx::SendQueue::new(options.depth),
            rx: rx::Receive::new(),
            deadlines_checked: now,
            dead: None,
        };
        queue.rules.pda = options.hpda;
        queue.initialize()?;
        Ok(queue)
    }

    /// Sends ICReq and waits for ICResp.
    fn initialize(&mut self) -> Result<(), InitiatorError> {
        let mut header = [0; HEADER_MAX];
        let ic_req = IcReq { hpda: self.options.hpda, digests: self.options.digests, maxr2t_z: 0 };
        let len = pdu::ic_req(&mut header, &ic_req);
        self.tx.push_bytes(&header[..len]);
        let deadline = Instant::now() + self.options.timeouts.initialize;
        while self.ic_resp.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.die(InitiatorError::timeout("no ICResp within the deadline")));
            }
            self.turn(left.min(DEADLINE_CHECK_INTERVAL))?;
        }
        Ok(())
    }

    /// Takes ICResp into force; called in the middle of receiving, so that the next PDU meets the new rules.
    fn on_ic_resp(&mut self, ic_resp: IcResp) -> Result<(), InitiatorError> {
        if ic_resp.digests != self.options.digests {
            return Err(InitiatorError::incompatible(format!(
                "asked for digests {:?}, the controller gives {:?}",
                self.options.digests, ic_resp.digests
            )));
        }
        self.rules.phase = Phase::Running;
        self.rules.digests = ic_resp.digests;
        self.ic_resp = Some(ic_resp);
        Ok(())
    }

    /// What the controller said at the start: alignment, digests, MAXH2CDATA.
    #[must_use]
    pub fn ic_resp(&self) -> IcResp {
        self.ic_resp.unwrap_or(IcResp { cpda: 0, digests: Digests::NONE, maxh2cdata: pdu::MAXH2CDATA_MIN })
    }

    /// Commands in flight at most.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Commands submitted and not yet ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The most data that goes inside a command capsule; more waits for an R2T.
    #[must_use]
    pub fn in_capsule_len_max(&self) -> u32 {
        self.in_capsule_len_max
    }

    /// Sets [`Self::in_capsule_len_max`]: `IOCCSZ * 16 - 64` for an I/O queue.
    pub fn set_in_capsule_len_max(&mut self, len: u32) {
        self.in_capsule_len_max = len;
    }

    /// A free slot, if any; to be given to [`Self::submit`] or [`Self::release`].
    pub fn reserve(&mut self) -> Option<SlotId> {
        let index = self.free.pop()?;
        self.slots[usize::from(index)].state = SlotState::Reserved;
        Some(SlotId(index))
    }

    /// The data of a command, made `len` bytes long; new bytes are zero, others what they were.
    pub fn buffer_mut(&mut self, slot: SlotId, len: usize) -> &mut [u8] {
        let slot = &mut self.slots[slot.index()];
        debug_assert!(!slot.is_busy(), "the data of a command in flight is not the caller's");
        slot.buffer.resize(len, 0);
        &mut slot.buffer
    }

    /// The data of a command that ended.
    #[must_use]
    pub fn buffer(&self, slot: SlotId) -> &[u8] {
        &self.slots[slot.index()].buffer
    }

    /// Gives a slot back.
    ///
    /// # Panics
    /// When the command is still in flight.
    pub fn release(&mut self, slot: SlotId) {
        let index = slot.0;
        let slot = &mut self.slots[slot.index()];
        assert!(slot.state == SlotState::Reserved, "a slot is given back once, after its command ended");
        slot.state = SlotState::Free;
        self.free.push(index);
    }

    /// Queues a command; [`Self::flush`] or [`Self::poll`] sends it. Data to the controller is that of
    /// [`Self::buffer_mut`]. `deadline` is the default one, or none for a command that may stay for ever.
    ///
    /// # Panics
    /// When the slot is not reserved, or holds less data than `transfer` says.
    pub fn submit(
        &mut self,
        slot: SlotId,
        command: &SubmissionQueueEntry,
        transfer: Transfer,
        deadline: Deadline,
    ) {
        let generation = {
            let state = &mut self.slots[slot.index()];
            assert!(state.state == SlotState::Reserved, "a command needs a reserved slot");
            state.begin(command.opcode, transfer, deadline, self.options.timeouts.command);
            state.generation
        };
        let cid = slot.0 | generation << 12;
        self.in_flight += 1;
        let (len, in_capsule) = match transfer {
            Transfer::None => (0, false),
            Transfer::ToController(len) => (len, len <= self.in_capsule_len_max),
            Transfer::ToHost(len) => (len, false),
        };
        let sqe = command::finish(command, cid, len, in_capsule);
        let digests = self.rules.digests;
        let mut header = [0; HEADER_MAX];
        let in_capsule_len = if in_capsule { len } else { 0 };
        let header_len = pdu::capsule_cmd(&mut header, digests, self.ic_resp().cpda, &sqe, in_capsule_len);
        self.tx.push_bytes(&header[..header_len]);
        if in_capsule_len != 0 {
            let state = &mut self.slots[slot.index()];
            self.tx.push_data(slot.0, state, 0..in_capsule_len as usize, digests.data);
            state.moved = in_capsule_len;
        }
    }

    /// Sends what can be sent without waiting.
    ///
    /// # Errors
    /// What killed the queue.
    pub fn flush(&mut self) -> Result<(), InitiatorError> {
        self.alive()?;
        match self.tx.flush(&self.socket, &mut self.slots) {
            Ok(()) => {
                self.deliver_after_send();
                Ok(())
            }
            Err(error) => {
                // The peer may have said why before it closed: what it sent is worth more than EPIPE.
                if let Err(better) = self.receive() {
                    return Err(self.die(better));
                }
                Err(self.die(InitiatorError::closed(error)))
            }
        }
    }

    /// Sends what is queued, and receives until at least one command has ended or `wait` is over.
    ///
    /// # Errors
    /// What killed the queue: also a command that missed its deadline.
    pub fn poll(&mut self, wait: Duration) -> Result<(), InitiatorError> {
        self.turn(Duration::ZERO)?;
        if !self.done.is_empty() || wait.is_zero() {
            return Ok(());
        }
        let end = Instant::now() + wait;
        while self.done.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.turn(left.min(DEADLINE_CHECK_INTERVAL))?;
        }
        Ok(())
    }

    /// The next command that ended; its slot stays reserved until it is released or submitted again.
    pub fn pop_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// Runs one command to its end; meant for queues on which one command runs at a time, or whose other commands
    /// `others` takes.
    ///
    /// # Errors
    /// What killed the queue.
    pub fn finish(
        &mut self,
        slot: SlotId,
        mut others: impl FnMut(&mut Self, Done),
    ) -> Result<Done, InitiatorError> {
        loop {
            while let Some(done) = self.pop_done() {
                if done.slot == slot {
                    return Ok(done);
                }
                others(self, done);
            }
            self.poll(DEADLINE_CHECK_INTERVAL)?;
        }
    }

    /// Whether the queue can still be used.
    ///
    /// # Errors
    /// What killed it.
    pub fn alive(&self) -> Result<(), InitiatorError> {
        self.dead.as_ref().map_or(Ok(()), |error| Err(error.again()))
    }

    /// One flush, at most one wait, one round of receiving, and the deadlines.
    fn turn(&mut self, wait: Duration) -> Result<(), InitiatorError> {
        self.flush()?;
        if !wait.is_zero() {
            self.wait_for_socket(wait)?;
            if !self.tx.is_empty() {
                self.flush()?;
            }
        }
        if let Err(error) = self.receive() {
            return Err(self.die(error));
        }
        if !self.tx.is_empty() {
            self.flush()?;
        }
        self.check_deadlines()
    }

    fn wait_for_socket(&mut self, wait: Duration) -> Result<(), InitiatorError> {
        let mut events = PollFlags::IN;
        if !self.tx.is_empty() {
            events |= PollFlags::OUT;
        }
        let timeout =
            Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: i64::from(wait.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(&self.socket, events)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(self.die(InitiatorError::closed(errno.into()))),
        }
    }

    fn check_deadlines(&mut self) -> Result<(), InitiatorError> {
        let now = Instant::now();
        if now.saturating_duration_since(self.deadlines_checked) < DEADLINE_CHECK_INTERVAL {
            return Ok(());
        }
        self.deadlines_checked = now;
        let late =
            self.slots.iter().position(|slot| slot.is_busy() && slot.deadline.is_some_and(|at| at <= now));
        let Some(index) = late else { return Ok(()) };
        let opcode = self.slots[index].opcode;
        Err(self.die(InitiatorError::timeout(format!(
            "no completion of opcode {opcode:#04x} (slot {index}) within its deadline"
        ))))
    }

    /// Marks the queue dead; tells the controller when it broke the protocol.
    fn die(&mut self, error: InitiatorError) -> InitiatorError {
        if self.dead.is_none() {
            let pdu_error =
                std::error::Error::source(&error).and_then(|source| source.downcast_ref::<PduError>());
            if let Some(fes) = pdu_error.and_then(PduError::fes) {
                let fei = pdu_error.map_or(0, PduError::fei);
                self.tx.terminate(&self.socket, TermReq { fes, fei }, self.rx.offending());
            }
            // The other side learns now, not when the last owner of this queue goes.
            let _ = self.socket.shutdown(std::net::Shutdown::Write);
            self.dead = Some(error.again());
        }
        error
    }

    /// A command has ended. It is delivered once none of its data waits to be sent.
    fn end(&mut self, index: u16, completion: Completion) {
        let slot = &mut self.slots[usize::from(index)];
        if slot.tx_segments != 0 {
            slot.state = SlotState::Ending(completion);
            self.tx.ending += 1;
            return;
        }
        slot.state = SlotState::Reserved;
        slot.generation = (slot.generation + 1) & 0xF;
        self.in_flight -= 1;
        let fault = slot.fault_of(completion);
        self.done.push_back(Done { slot: SlotId(index), completion, fault, submitted: slot.submitted });
    }

    /// Delivers the commands that ended before the last of their data had left.
    fn deliver_after_send(&mut self) {
        if self.tx.ending == 0 {
            return;
        }
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if let (SlotState::Ending(completion), 0) = (slot.state, slot.tx_segments) {
                self.tx.ending -= 1;
                #[expect(clippy::cast_possible_truncation, reason = "at most DEPTH_MAX slots")]
                self.end(index as u16, completion);
            }
        }
    }
}
