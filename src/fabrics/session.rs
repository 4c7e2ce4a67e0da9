//! One queue of one host: what a transport connection is to the target.
//!
//! ```text
//!            begin(sqe)            finish(sqe, data)
//!   Fresh --- Connect ---> NeedData --- Connect data ---> Admin | Io | Over
//!   Admin --- registers, admin commands, parked AERs      (admin)
//!   Io    --- typed, checked I/O                          (io)
//!   Over  --- nothing more is taken; poll() says why
//! ```
//!
//! A session lives on one core and is driven by it: `begin` for each command in the order received, `poll` after a
//! wake-up and at [`QueueSession::next_deadline`], and [`QueueSession::closed`] when the connection ended **and
//! everything it had in flight on a device is done**. That last rule is what keeps writes of a lost connection from
//! landing after the host was told that its controller is reset.

use std::sync::Arc;
use std::time::Instant;

use nvme_spec::{Status, SubmissionQueueEntry};

use super::admin::AdminQueue;
use super::ana;
use super::command::CommandError;
use super::connect::{self, ConnectError, Connected};
use super::exchange::{Arrival, Begin, CloseReason, Completion, IoCommand, SessionEvent, Waker};
use super::io::IoQueue;
use super::options::ADMIN_IN_CAPSULE_BYTES;
use super::target::Target;

/// One NVMe queue of one transport connection. Lives on one core.
pub struct QueueSession {
    target: Arc<Target>,
    arrival: Arrival,
    waker: Arc<dyn Waker>,
    head: SqHead,
    queue: Queue,
    /// The transport was told to close.
    told: bool,
}

enum Queue {
    Fresh,
    Admin(Box<AdminQueue>),
    Io(Box<IoQueue>),
    Over(CloseReason),
}

/// SQHD and the queue's size, as Connect set them.
#[derive(Clone, Copy, Debug, Default)]
struct SqHead {
    entries: u16,
    head: u16,
    flow_control_disabled: bool,
}

impl SqHead {
    #[inline]
    fn advance(&mut self) {
        let next = self.head.wrapping_add(1);
        self.head = if next >= self.entries { 0 } else { next };
    }
}

impl QueueSession {
    /// A session for a connection that was just accepted.
    #[must_use]
    pub fn new(target: Arc<Target>, arrival: Arrival, waker: Arc<dyn Waker>) -> Self {
        Self { target, arrival, waker, head: SqHead::default(), queue: Queue::Fresh, told: false }
    }

    /// Takes a read or a write of an I/O queue that is good. `None` for all else, of which nothing is noted yet: it is for
    /// [`QueueSession::begin`].
    ///
    /// Apart from that, and inlined, so that what is found out about a command stays in registers: as a part of a [`Begin`] in a
    /// `Result` it would be copied twice, each time at once after it was written in smaller pieces, for which a processor waits.
    #[inline(always)]
    pub fn begin_transfer(&mut self, sqe: &SubmissionQueueEntry) -> Option<IoCommand> {
        let Queue::Io(io) = &mut self.queue else { return None };
        let command = io.begin_transfer(sqe)?;
        self.head.advance();
        Some(command)
    }

    /// Takes a command. The I/O path (Read, Write, Flush, Write Zeroes) takes no lock and allocates nothing; of a good read or write
    /// [`QueueSession::begin_transfer`] makes less.
    #[inline]
    pub fn begin(&mut self, sqe: &SubmissionQueueEntry, now: Instant) -> Begin {
        self.head.advance();
        let outcome = match &mut self.queue {
            Queue::Io(io) => io.begin(sqe),
            _ => return self.begin_other(sqe, now),
        };
        match outcome {
            Ok(begin) => begin,
            Err(error) => self.fail(sqe, error),
        }
    }

    #[cold]
    fn begin_other(&mut self, sqe: &SubmissionQueueEntry, now: Instant) -> Begin {
        let outcome = match &mut self.queue {
            Queue::Fresh => connect::begin(sqe).map(|len| Begin::NeedData { len }),
            Queue::Admin(admin) => admin.begin(sqe, now),
            Queue::Io(_) | Queue::Over(_) => Err(CommandError::sequence()),
        };
        match outcome {
            Ok(begin) => begin,
            Err(error) if matches!(self.queue, Queue::Fresh) => self.refuse_connect(error.into(), &[]),
            Err(error) => self.fail(sqe, error),
        }
    }

    /// Takes the data of a command for which [`QueueSession::begin`] gave [`Begin::NeedData`]. `data` has exactly that
    /// length; another length is answered with Data SGL Length Invalid.
    pub fn finish(&mut self, sqe: &SubmissionQueueEntry, data: &[u8], now: Instant) -> Begin {
        let outcome = match &mut self.queue {
            Queue::Fresh => return self.connect(sqe, data, now),
            Queue::Admin(admin) => admin.finish(sqe, data),
            Queue::Io(io) => io.finish(sqe, data),
            Queue::Over(_) => Err(CommandError::sequence()),
        };
        match outcome {
            Ok(begin) => begin,
            Err(error) => self.fail(sqe, error),
        }
    }

    /// What the session wants now; call until `None`. Cheap when there is nothing.
    pub fn poll(&mut self, now: Instant) -> Option<SessionEvent> {
        let ended = match &mut self.queue {
            Queue::Fresh if self.target.is_shut_down() => CloseReason::TargetShutDown,
            Queue::Fresh => return None,
            Queue::Admin(admin) => match admin.poll(now)? {
                SessionEvent::Close(reason) => reason,
                complete @ SessionEvent::Complete { .. } => return Some(complete),
            },
            Queue::Io(io) => io.ended()?,
            Queue::Over(reason) => *reason,
        };
        // Told once. The queue is not left yet: what it has in flight is drained first, see `closed`.
        (!std::mem::replace(&mut self.told, true)).then_some(SessionEvent::Close(ended))
    }

    /// When [`QueueSession::poll`] has to be called at the latest, if nothing wakes the core before: the keep alive
    /// and idle deadlines.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        match &self.queue {
            Queue::Admin(admin) => admin.next_deadline(),
            Queue::Fresh | Queue::Io(_) | Queue::Over(_) => None,
        }
    }

    /// The connection ended, and nothing that it had in flight touches a device any more. An admin queue takes its
    /// controller with it, and the controller's I/O queues will see [`SessionEvent::Close`]. Dropping the session does
    /// the same.
    pub fn closed(&mut self) {
        self.told = true;
        match std::mem::replace(&mut self.queue, Queue::Over(CloseReason::Disconnected)) {
            Queue::Admin(admin) => admin.leave(),
            Queue::Io(io) => io.leave(),
            Queue::Fresh | Queue::Over(_) => {}
        }
    }

    /// SQHD for the next completion: FFFFh while SQ flow control is disabled (NVM Express Base Specification 2.1,
    /// section 6.3, "Connect").
    #[must_use]
    #[inline]
    pub fn sqhd(&self) -> u16 {
        if self.head.flow_control_disabled { 0xFFFF } else { self.head.head }
    }

    /// Whether the host asked to disable SQ flow control: completions of reads may then be left out (NVM Express
    /// TCP Transport Specification 1.1, section 3.3.2.1, SUCCESS flag).
    #[must_use]
    pub fn is_flow_control_disabled(&self) -> bool {
        self.head.flow_control_disabled
    }

    /// The number of entries of the queue, or 1 before Connect. A host has one command fewer than that outstanding.
    #[must_use]
    pub fn sq_size(&self) -> u16 {
        self.head.entries.max(1)
    }

    /// Whether Connect succeeded.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self.queue, Queue::Admin(_) | Queue::Io(_))
    }

    /// Whether this is an I/O queue.
    #[must_use]
    pub fn is_io(&self) -> bool {
        matches!(self.queue, Queue::Io(_))
    }

    /// The most in-capsule data, in bytes, that a command may carry now.
    #[must_use]
    pub fn in_capsule_len_max(&self) -> u32 {
        match &self.queue {
            Queue::Io(_) => self.target.options().in_capsule_bytes,
            _ => ADMIN_IN_CAPSULE_BYTES,
        }
    }

    /// Whether a command may have the identifier of a parked Asynchronous Event Request, which is forgotten then and never
    /// completes. SPDK's initiator gives up its event requests before it shuts the controller down, without a word to it, and uses
    /// their identifiers for the registers that it needs for that (`nvme_ctrlr.c`, 26.09-pre): as conflicts they would keep it
    /// from shutting down in order.
    pub fn gives_up_event_request(&mut self, sqe: &SubmissionQueueEntry) -> bool {
        match &mut self.queue {
            Queue::Admin(admin) => admin.gives_up_event_request(sqe),
            _ => false,
        }
    }

    /// Records a command that the transport answers with `status` without asking [`QueueSession::begin`]. It took an
    /// entry of the queue all the same.
    pub fn refused(&mut self, sqe: &SubmissionQueueEntry, status: Status) {
        self.head.advance();
        self.note_error(sqe, status, None);
    }

    /// Records a command that failed outside the session, on the device or in the transport, in the controller's Error
    /// Information log. `location` is the byte of the submission queue entry at fault, when there is one.
    pub fn note_error(&mut self, sqe: &SubmissionQueueEntry, status: Status, location: Option<u16>) {
        self.target.counters.transport_errors.bump();
        self.log_error(sqe, status, location);
    }

    /// The status as the host takes it: without CRD, which is reserved, unless it has asked for that, and not of a path
    /// (ANA) unless it has looked at its paths.
    #[must_use]
    pub fn told(&self, status: Status) -> Status {
        if status.crd() == 0 {
            return status;
        }
        let Queue::Io(io) = &self.queue else { return status.with_crd(0) };
        let status = ana::told(status, io.controller().knows_ana());
        if io.controller().retries_later() { status } else { status.with_crd(0) }
    }

    /// Who this is, for log lines.
    #[must_use]
    pub fn controller_label(&self) -> String {
        match &self.queue {
            Queue::Admin(admin) => admin.controller().label(0),
            Queue::Io(io) => io.controller().label(io.qid()),
            Queue::Fresh | Queue::Over(_) => format!("{} (not connected)", self.arrival.peer),
        }
    }

    /// The host's NQN and the subsystem's, once connected.
    #[must_use]
    pub fn names(&self) -> Option<(&str, &str)> {
        let controller = match &self.queue {
            Queue::Admin(admin) => admin.controller(),
            Queue::Io(io) => io.controller(),
            Queue::Fresh | Queue::Over(_) => return None,
        };
        Some((&controller.host.nqn, &controller.subsystem.nqn))
    }

    /// The controller and its queue, once connected.
    #[must_use]
    pub fn numbers(&self) -> Option<(u16, u16)> {
        match &self.queue {
            Queue::Admin(admin) => Some((admin.controller().id, 0)),
            Queue::Io(io) => Some((io.controller().id, io.qid())),
            Queue::Fresh | Queue::Over(_) => None,
        }
    }

    #[cold]
    fn connect(&mut self, sqe: &SubmissionQueueEntry, data: &[u8], now: Instant) -> Begin {
        match connect::connect(&self.target, &self.arrival, &self.waker, sqe, data, now) {
            Ok(Connected { queue, entries, flow_control_disabled, completion }) => {
                // Connect itself took the first entry.
                self.head = SqHead { entries, head: u16::from(entries > 1), flow_control_disabled };
                self.queue = match queue {
                    connect::NewQueue::Admin(admin) => Queue::Admin(admin),
                    connect::NewQueue::Io(io) => Queue::Io(io),
                };
                Begin::Respond(completion)
            }
            Err(error) => self.refuse_connect(error, data),
        }
    }

    /// `data` is what came with it, if anything did.
    fn refuse_connect(&mut self, error: ConnectError, data: &[u8]) -> Begin {
        error.count(&self.target.counters);
        if self.target.refusals.may_log() {
            let (host, subsystem) = connect::names(data).unwrap_or_default();
            tracing::warn!(peer = %self.arrival.peer, host, subsystem, "connect refused: {error}");
        }
        self.queue = Queue::Over(CloseReason::ConnectFailed);
        Begin::RespondThenClose(error.completion())
    }

    #[cold]
    fn fail(&mut self, sqe: &SubmissionQueueEntry, error: CommandError) -> Begin {
        self.target.counters.command_errors.bump();
        self.log_error(sqe, error.status, error.location);
        Begin::Respond(Completion::of(error.status))
    }

    fn log_error(&self, sqe: &SubmissionQueueEntry, status: Status, location: Option<u16>) {
        let (controller, qid) = match &self.queue {
            Queue::Admin(admin) => (admin.controller(), 0),
            Queue::Io(io) => (io.controller(), io.qid()),
            Queue::Fresh | Queue::Over(_) => return,
        };
        controller.with_errors(|errors| errors.push(qid, sqe, status, location));
    }
}

impl Drop for QueueSession {
    fn drop(&mut self) {
        self.closed();
    }
}
