//! The Connect command (NVM Express Base Specification 2.1, section 6.3): how a connection becomes a queue.
//!
//! Controllers are dynamic: a host asks for any, and gets one of its own. Connects are the only thing that a stranger
//! can make the target remember, so they are checked in an order that allocates last, and bounded by
//! [`TargetOptions`](super::TargetOptions).

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use nvme_spec::fabrics::{
    ConnectCommand, ConnectData, FabricsCommandType, cattr, invalid_parameter_dw0, nqn_text,
};
use nvme_spec::{AdminOpcode, Cntlid, Status, SubmissionQueueEntry};
use zerocopy::{FromBytes, IntoBytes};

use super::admin::AdminQueue;
use super::beat::Beat;
use super::command::{CommandError, at, check_flags};
use super::controller::{ControllerSeed, Host, JoinError};
use super::exchange::{Arrival, CloseReason, Completion, Waker};
use super::io::IoQueue;
use super::options::ADMIN_IN_CAPSULE_BYTES;
use super::sgl;
use super::stats::Counters;
use super::subsystem::{Refusal, Subsystem, SubsystemKind};
use super::target::Target;

/// Byte offsets of the parameters that a failed Connect names.
mod ipo {
    pub(super) const QID: u16 = 42;
    pub(super) const SQSIZE: u16 = 44;
    pub(super) const HOSTID: u16 = 0;
    pub(super) const CNTLID: u16 = 16;
    pub(super) const SUBNQN: u16 = 256;
    pub(super) const HOSTNQN: u16 = 512;
}

/// A connection that became a queue.
pub(super) struct Connected {
    pub(super) queue: NewQueue,
    pub(super) entries: u16,
    pub(super) flow_control_disabled: bool,
    pub(super) completion: Completion,
}

/// The queue it became.
pub(super) enum NewQueue {
    Admin(Box<AdminQueue>),
    Io(Box<IoQueue>),
}

/// Why a Connect is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectError {
    /// Not a Connect, or not one that can be read.
    Command(CommandError),
    /// A parameter in the command at this byte.
    InCommand(u16),
    /// A parameter in the data at this byte.
    InData(u16),
    /// The host is not on the list, or not the one that the controller belongs to.
    Host,
    /// No room now.
    Busy,
    /// The controller is not ready, or has that queue already.
    Sequence,
}

impl ConnectError {
    /// The status that the host sees.
    pub(super) fn status(&self) -> Status {
        match self {
            Self::Command(error) => error.status,
            Self::InCommand(_) | Self::InData(_) => Status::CONNECT_INVALID_PARAMETERS.with_dnr(),
            Self::Host => Status::CONNECT_INVALID_HOST.with_dnr(),
            Self::Busy => Status::CONNECT_CONTROLLER_BUSY,
            Self::Sequence => Status::COMMAND_SEQUENCE_ERROR.with_dnr(),
        }
    }

    /// The completion: DW0 says where the invalid parameter is.
    pub(super) fn completion(&self) -> Completion {
        let dw0 = match *self {
            Self::InCommand(offset) => invalid_parameter_dw0(false, offset),
            Self::InData(offset) => invalid_parameter_dw0(true, offset),
            Self::Command(_) | Self::Host | Self::Busy | Self::Sequence => 0,
        };
        Completion { dw0, dw1: 0, status: self.status() }
    }

    /// Counts it.
    pub(super) fn count(&self, counters: &Counters) {
        match self {
            Self::Host => counters.hosts_refused.bump(),
            _ => counters.connects_rejected.bump(),
        }
    }
}

impl From<CommandError> for ConnectError {
    fn from(error: CommandError) -> Self {
        Self::Command(error)
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command(error) => write!(f, "{}", error.status),
            Self::InCommand(offset) => write!(f, "invalid parameter at byte {offset} of the command"),
            Self::InData(offset) => write!(f, "invalid parameter at byte {offset} of the data"),
            Self::Host => f.write_str(
                "host not allowed: it is not on the subsystem's list, or not that of the controller",
            ),
            Self::Busy => f.write_str("no room for another controller, or shutting down"),
            Self::Sequence => f.write_str("controller not ready, or queue connected already"),
        }
    }
}

/// Checks a command on a connection that is no queue yet; gives the length of its data.
pub(super) fn begin(sqe: &SubmissionQueueEntry) -> Result<u32, CommandError> {
    check_flags(sqe)?;
    let fctype = FabricsCommandType(sgl::fctype(sqe));
    if sqe.opcode != AdminOpcode::FABRICS.0 || fctype != FabricsCommandType::CONNECT {
        return Err(CommandError::sequence());
    }
    if parse(sqe).recfmt.get() != 0 {
        return Err(CommandError::at(Status::CONNECT_INCOMPATIBLE_FORMAT, at::CDW10));
    }
    let len = sgl::locate(sqe, ADMIN_IN_CAPSULE_BYTES)?.len();
    if len as usize != size_of::<ConnectData>() {
        return Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
    }
    Ok(len)
}

/// The host and the subsystem that a Connect names, where it does in order.
pub(super) fn names(data: &[u8]) -> Option<(&str, &str)> {
    let data = ConnectData::ref_from_bytes(data).ok()?;
    Some((nqn_text(&data.hostnqn).unwrap_or_default(), nqn_text(&data.subnqn).unwrap_or_default()))
}

/// Carries a Connect out.
pub(super) fn connect(
    target: &Arc<Target>,
    arrival: &Arrival,
    waker: &Arc<dyn Waker>,
    sqe: &SubmissionQueueEntry,
    data: &[u8],
    now: Instant,
) -> Result<Connected, ConnectError> {
    begin(sqe)?;
    let command = parse(sqe);
    let data = ConnectData::ref_from_bytes(data)
        .map_err(|_| CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH))?;
    if target.is_shut_down() {
        return Err(ConnectError::Busy);
    }
    let subnqn = nqn_text(&data.subnqn).ok_or(ConnectError::InData(ipo::SUBNQN))?;
    let hostnqn = nqn_text(&data.hostnqn).ok_or(ConnectError::InData(ipo::HOSTNQN))?;
    if data.hostid == [0; 16] {
        return Err(ConnectError::InData(ipo::HOSTID));
    }
    let subsystem = target.find(subnqn, arrival.port).ok_or(ConnectError::InData(ipo::SUBNQN))?;
    if !subsystem.allows(hostnqn) {
        return Err(ConnectError::Host);
    }
    let entries_z = command.sqsize_z.get();
    if entries_z == 0 || entries_z >= target.options().queue_entries_max {
        return Err(ConnectError::InCommand(ipo::SQSIZE));
    }
    let request = Request { target, arrival, waker, subsystem, now, cntlid: Cntlid(data.cntlid.get()) };
    let host = Host { nqn: hostnqn.into(), id: data.hostid };
    let (queue, cntlid) = match command.qid.get() {
        0 => request.admin(host, command.kato_ms.get())?,
        qid => request.io(&host, qid)?,
    };
    Ok(Connected {
        queue,
        entries: entries_z + 1,
        flow_control_disabled: command.cattr & cattr::DISABLE_SQ_FLOW_CONTROL != 0,
        completion: Completion::with_dw0(u32::from(cntlid)),
    })
}

struct Request<'a> {
    target: &'a Arc<Target>,
    arrival: &'a Arrival,
    waker: &'a Arc<dyn Waker>,
    subsystem: Arc<Subsystem>,
    now: Instant,
    cntlid: Cntlid,
}

impl Request<'_> {
    /// A new controller and its admin queue.
    fn admin(&self, host: Host, kato_ms: u32) -> Result<(NewQueue, u16), ConnectError> {
        if self.cntlid != Cntlid::DYNAMIC {
            return Err(ConnectError::InData(ipo::CNTLID));
        }
        let beat = Arc::new(Beat::default());
        let seed = ControllerSeed {
            host,
            port: self.arrival.port,
            waker: Arc::clone(self.waker),
            beat: Arc::clone(&beat),
            io_queues_max: self.target.options().io_queues_max,
        };
        let controller =
            self.subsystem.admit(seed, self.target.options()).map_err(|refusal| match refusal {
                Refusal::Host => ConnectError::Host,
                Refusal::Busy => ConnectError::Busy,
            })?;
        if !self.target.serves(&self.subsystem) {
            // A reload or the shutdown came in between and may not have seen the new controller.
            controller.leave_admin(CloseReason::SubsystemRemoved);
            return Err(ConnectError::Busy);
        }
        match self.subsystem.kind {
            SubsystemKind::Nvm => self.target.counters.admin_connects.bump(),
            SubsystemKind::Discovery => self.target.counters.discovery_connects.bump(),
        }
        tracing::info!(
            host = %controller.host.nqn, subsystem = %self.subsystem.nqn, cntlid = controller.id,
            peer = %self.arrival.peer, kato_ms, "controller connected"
        );
        let cntlid = controller.id;
        let target = Arc::clone(self.target);
        let admin = AdminQueue::new(target, controller, *self.arrival, beat, kato_ms, self.now);
        Ok((NewQueue::Admin(Box::new(admin)), cntlid))
    }

    /// An I/O queue of a controller that the same host holds.
    fn io(&self, host: &Host, qid: u16) -> Result<(NewQueue, u16), ConnectError> {
        if self.subsystem.kind == SubsystemKind::Discovery {
            return Err(ConnectError::InCommand(ipo::QID));
        }
        let controller = self.subsystem.controller(self.cntlid.0).ok_or(ConnectError::InData(ipo::CNTLID))?;
        if controller.host.nqn != host.nqn {
            return Err(ConnectError::Host);
        }
        if controller.host.id != host.id {
            return Err(ConnectError::InData(ipo::HOSTID));
        }
        if controller.port != self.arrival.port {
            // All queues of an association come in on one port (section 3.3.2.2).
            return Err(ConnectError::InData(ipo::CNTLID));
        }
        let beat = Arc::new(Beat::default());
        let epoch = controller.join(qid, self.waker, &beat).map_err(|error| match error {
            JoinError::NotReady | JoinError::InUse => ConnectError::Sequence,
            JoinError::Qid => ConnectError::InCommand(ipo::QID),
        })?;
        self.target.counters.io_connects.bump();
        let cntlid = controller.id;
        let in_capsule_bytes = self.target.options().in_capsule_bytes;
        let queue = IoQueue::new(controller, qid, epoch, beat, in_capsule_bytes);
        Ok((NewQueue::Io(Box::new(queue)), cntlid))
    }
}

fn parse(sqe: &SubmissionQueueEntry) -> ConnectCommand {
    // Both are 64 bytes without padding or invalid values.
    ConnectCommand::read_from_bytes(sqe.as_bytes()).unwrap_or_default()
}
