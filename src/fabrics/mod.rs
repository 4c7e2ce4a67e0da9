//! The NVMe-oF target, whatever the transport: subsystems, controllers, commands.
//!
//! ```text
//!   control --- prepare, commit, fence ---> Target ---> Subsystem (namespace table, hosts, controllers)
//!                                                           |
//!   transport --- begin, finish, poll ---> QueueSession ----+---> Controller (epoch, queues, errors, notices)
//!                     |                     |        |
//!                     |                   admin      io
//!                     v                 (registers,  (checked IoCommand: export slot, byte range)
//!          Respond, SendData,            identify,
//!          NeedData, Park, Io            logs, features, events, clock)
//! ```
//!
//! One [`QueueSession`] stands for one transport connection, lives on one core and is called by it. What queues of
//! several cores share is in the controller and the subsystem, behind locks that only the control path takes; the I/O
//! path reads two atomic numbers and its cached namespace table. I/O is not carried out here: `begin_transfer` (of a good read or
//! write) or [`Begin::Io`] (of all else) hands out a command that is checked completely, and whoever drives the devices completes it, with [`of_block_error`] and
//! [`of_lookup_error`] for the status of what fails.
//!
//! What it does not do: sockets, PDUs, digests, TLS, in-band authentication, reservations, more than one path to a
//! namespace, formats with metadata, fused commands, Compare, Copy, Verify.
//!
//! Sources: NVM Express Base Specification 2.1, NVM Command Set Specification 1.1, NVM Express TCP Transport
//! Specification 1.1.

mod admin;
mod ana;
mod beat;
mod clock;
mod command;
mod connect;
mod controller;
mod discovery;
mod error_log;
mod events;
mod exchange;
mod export;
mod features;
mod fuzz;
mod identify;
mod identity;
mod io;
mod logs;
mod options;
mod provision;
mod registers;
mod session;
mod sgl;
mod stats;
mod status;
mod subsystem;
mod target;
#[cfg(test)]
mod tests;

pub use exchange::{Arrival, Begin, CloseReason, Completion, IoCommand, IoKind, SessionEvent, Waker};
pub use export::{Export, ExportSlot, FencePolicy, FenceReason, Grant};
pub use fuzz::fuzz_commands;
pub use identity::{Identity, serial_of};
pub use io::dsm_ranges;
pub use options::{ADMIN_IN_CAPSULE_BYTES, NSID_MAX, TRANSFER_BYTES_MAX, TargetOptions};
pub use provision::{
    DISCOVERY_NQN, HostPolicy, NQN_BYTES_MAX, NamespaceSpec, PortId, PortSpec, SubsystemSpec, TargetError,
};
pub use session::QueueSession;
pub use sgl::{DataLocation, data_location};
pub use stats::TargetStats;
pub use status::{of_block_error, of_lookup_error};
pub use target::{ControllerInfo, Plan, Published, Target};
