//! What can go wrong, on the control path ([`Error`]) and with an operation ([`IoError`]).

use std::sync::Arc;

use hugepage_alloc::AllocError;
use nvme_spec::Status;

use crate::access::AccessError;

/// Why something on the control path failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The registers do not answer: the device was removed, or its link is down.
    #[error("{name} is gone: nothing answers at its registers")]
    Gone {
        /// The name of the access.
        name: String,
    },
    /// CSTS did not follow in time.
    #[error("{name} did not {what} within {limit_ms} ms")]
    Late {
        /// The name of the access.
        name: String,
        /// What it should have done.
        what: &'static str,
        /// How long it was given.
        limit_ms: u64,
    },
    /// CSTS.CFS: the controller says that it cannot go on.
    #[error("{name} reports a fatal error (CSTS.CFS)")]
    Fatal {
        /// The name of the access.
        name: String,
    },
    /// CSTS.RDY is 0 although the driver had not disabled the controller.
    #[error("{name} was disabled behind the driver's back: by a reset of its function, or by itself")]
    Disabled {
        /// The name of the access.
        name: String,
    },
    /// The controller broke the protocol, so nothing it says can be trusted until it is reset.
    #[error("{name} broke the protocol: {what}")]
    Violation {
        /// The name of the access.
        name: String,
        /// How.
        what: &'static str,
    },
    /// The controller is one that this driver cannot drive.
    #[error("{name} cannot be driven: {what}")]
    Unsupported {
        /// The name of the access.
        name: String,
        /// What it has or lacks.
        what: String,
    },
    /// A namespace is one that this driver does not use.
    #[error("namespace {nsid} of {name} cannot be used: {what}")]
    Namespace {
        /// The name of the access.
        name: String,
        /// The namespace.
        nsid: u32,
        /// Why, and what to do.
        what: String,
    },
    /// A command failed.
    #[error("{command} of {name} failed: {status}")]
    Status {
        /// The name of the access.
        name: String,
        /// What was asked for.
        command: &'static str,
        /// The controller's answer.
        status: Status,
    },
    /// A command was not answered in time.
    #[error("{command} of {name} was not answered in time")]
    Timeout {
        /// The name of the access.
        name: String,
        /// What was asked for.
        command: &'static str,
    },
    /// The controller was reset while the command was under way; whether it was executed is not known.
    #[error("{name} was reset")]
    Reset {
        /// The name of the access.
        name: String,
    },
    /// An operation was not answered in time, nor when aborted.
    #[error("an i/o command of {name} was neither completed nor aborted in time")]
    IoTimeout {
        /// The name of the access.
        name: String,
    },
    /// The controller is not in a state for that.
    #[error("{name} is not ready")]
    NotReady {
        /// The name of the access.
        name: String,
    },
    /// Too many at once: queues, or admin commands.
    #[error("{name} has no free {what}")]
    Exhausted {
        /// The name of the access.
        name: String,
        /// What there are no more of.
        what: &'static str,
    },
    /// An admin command with more data than one page.
    #[error(
        "an admin command with {bytes} bytes of data: at most 4096 are possible, read the rest by offset"
    )]
    TooLarge {
        /// How many.
        bytes: usize,
    },
    /// Memory could not be had.
    #[error("no memory for the queues of {name}")]
    Memory {
        /// The name of the access.
        name: String,
        /// The cause.
        #[source]
        source: Arc<AllocError>,
    },
    /// An eventfd could not be had.
    #[error("no eventfd for {name}: raise the limit of open files")]
    Eventfd {
        /// The name of the access.
        name: String,
        /// The cause.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// The way to the device refused.
    #[error("the way to {name} failed")]
    Access {
        /// The name of the access.
        name: String,
        /// The cause.
        #[source]
        source: Arc<AccessError>,
    },
}

/// How an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The controller said so.
    #[error("{0}")]
    Status(Status),
    /// The controller was reset. When `reached_device` is false no part of it was ever given to the device, so that
    /// it can be submitted again whatever it is.
    #[error("the controller was reset")]
    Reset {
        /// Whether the device may have executed any of it.
        reached_device: bool,
    },
    /// The device is gone or has failed for good. It can no longer reach memory.
    #[error("the device is gone")]
    Gone,
    /// The device failed, and could not be kept from memory: the buffer is not given back, because the device might
    /// still write to it.
    #[error("the device failed and could not be cut off from memory")]
    Stranded,
}
