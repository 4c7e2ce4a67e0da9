//! What passes between a session and its transport: plain types, without behaviour of their own.
//!
//! ```text
//!   transport --- Arrival, Waker ----------------> QueueSession
//!             <-- Begin (IoCommand, Completion) ---
//!             <-- SessionEvent (CloseReason) ------
//! ```

use std::fmt;
use std::net::SocketAddr;

use nvme_spec::{Cid, Status};

use super::export::ExportSlot;
use super::provision::PortId;
use crate::units::{ByteLen, ByteOffset};

/// Makes the core of a session call [`poll`](super::QueueSession::poll) soon. Called from any thread, sometimes under a
/// lock of the target: it must neither block nor call back into the target.
pub trait Waker: Send + Sync {
    /// Wakes the core.
    fn wake(&self);
}

/// Where a connection came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The port it was accepted on.
    pub port: PortId,
    /// The host's end.
    pub peer: SocketAddr,
    /// Our end, as the host addressed it: what a wildcard port is advertised as.
    pub local: SocketAddr,
}

/// What a completion queue entry carries beside CID and SQHD, which the transport fills in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// DW0, command specific.
    pub dw0: u32,
    /// DW1, command specific.
    pub dw1: u32,
    /// The status, phase tag not included.
    pub status: Status,
}

impl Completion {
    /// Success without a value.
    pub const SUCCESS: Self = Self { dw0: 0, dw1: 0, status: Status::SUCCESS };

    /// Success with a value in DW0.
    #[must_use]
    pub const fn with_dw0(dw0: u32) -> Self {
        Self { dw0, ..Self::SUCCESS }
    }

    /// No value, a status.
    #[must_use]
    pub const fn of(status: Status) -> Self {
        Self { dw0: 0, dw1: 0, status }
    }
}

/// What to do about a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Complete it at once.
    Respond(Completion),
    /// Send `data` to the host, then complete it. Never longer than the command's SGL.
    SendData {
        /// The data, whole.
        data: Vec<u8>,
        /// The completion.
        completion: Completion,
    },
    /// Get `len` bytes from the host (see [`data_location`](super::data_location)), then call
    /// [`finish`](super::QueueSession::finish).
    NeedData {
        /// The exact number of bytes; never zero.
        len: u32,
    },
    /// Run it on the export's device.
    Io(IoCommand),
    /// Keep it; it completes by [`SessionEvent::Complete`].
    Park,
    /// Complete it, then end the connection in order.
    RespondThenClose(Completion),
}

/// One I/O command, checked completely: the namespace holds the range, the length fits MDTS and the SGL, a write goes
/// to a namespace that may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoCommand {
    /// The export.
    pub slot: ExportSlot,
    /// What to do.
    pub kind: IoKind,
    /// Where in the namespace it starts; zero for Flush and Dataset Management.
    pub start: ByteOffset,
    /// How much; zero for Flush and Dataset Management.
    pub len: ByteLen,
    /// Force unit access: complete only when the data is on stable storage.
    pub fua: bool,
}

/// What an I/O command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Make every completed write stable.
    Flush,
    /// Write zeroes without data.
    WriteZeroes {
        /// The blocks may be deallocated, as long as they read as zeroes.
        deallocate: bool,
    },
    /// Deallocate ranges, an advice. The ranges are in the data given to [`finish`](super::QueueSession::finish): see
    /// [`dsm_ranges`](super::dsm_ranges). They are checked.
    DatasetManagement {
        /// The number of ranges, 1 to 256.
        ranges: u16,
    },
}

impl IoKind {
    /// Whether it changes blocks.
    #[must_use]
    pub const fn is_write(self) -> bool {
        match self {
            Self::Write | Self::WriteZeroes { .. } | Self::DatasetManagement { .. } => true,
            Self::Read | Self::Flush => false,
        }
    }
}

/// What a session wants between commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// A parked command completes.
    Complete {
        /// Its identifier.
        cid: Cid,
        /// Its completion.
        completion: Completion,
    },
    /// The connection has to end: take no more commands, drain, close, and call [`closed`](super::QueueSession::closed).
    Close(CloseReason),
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The host was silent for longer than the keep alive timeout.
    KeepAliveExpired,
    /// The host did not enable the controller in time, or left a discovery controller without a timeout idle.
    Idle,
    /// The admin queue's connection ended, and the controller with it.
    AdminQueueGone,
    /// The host reset or shut down the controller: its I/O queues end.
    Reset,
    /// A reload took the host off the subsystem's list.
    HostRevoked,
    /// A reload took the subsystem away.
    SubsystemRemoved,
    /// The target is shutting down.
    TargetShutDown,
    /// The Connect command failed.
    ConnectFailed,
    /// The host sent Disconnect.
    Disconnected,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeepAliveExpired => "keep alive timer expired",
            Self::Idle => "idle for too long",
            Self::AdminQueueGone => "admin queue is gone",
            Self::Reset => "controller reset or shut down by the host",
            Self::HostRevoked => "host is no longer allowed",
            Self::SubsystemRemoved => "subsystem is no longer served",
            Self::TargetShutDown => "target is shutting down",
            Self::ConnectFailed => "connect failed",
            Self::Disconnected => "host disconnected",
        })
    }
}
