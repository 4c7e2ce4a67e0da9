//! How a controller shall be driven, where it stands, and what its owner is told.

use std::time::Duration;

use crate::error::Error;
use crate::requeue::Requeue;

/// How a controller shall be driven.
#[derive(Clone, Debug)]
pub struct Options {
    /// I/O queue pairs to ask for.
    pub io_queues: u16,
    /// The largest transfer in bytes; longer operations are split. Each command of a queue has a list for this much.
    pub transfer_len_max: u32,
    /// How long an admin command may take.
    pub admin_timeout: Duration,
    /// How long CSTS.RDY is waited for at most, whatever the controller says that it needs (CAP.TO, CRTO).
    pub ready_limit_max: Duration,
    /// How long an I/O command may take before it is aborted.
    pub io_timeout: Duration,
    /// How long an aborted I/O command may still take before the controller is reset.
    pub abort_grace: Duration,
    /// Resets in a row before the controller is given up.
    pub resets_max: u32,
    /// After this long without trouble, resets count from zero again.
    pub settled_after: Duration,
    /// How often CSTS is read while the controller is ready.
    pub status_every: Duration,
    /// Which operations are given to the controller anew after a reset; see [`Requeue`].
    pub requeue: Requeue,
    /// Whether to use shadow doorbells where they are offered: controllers in software do.
    pub shadow_doorbells: bool,
    /// Whether the controller shall have an eventfd to sleep on, see [`crate::Controller::interrupt`].
    pub interrupts: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            io_queues: 16,
            transfer_len_max: 256 << 10,
            admin_timeout: Duration::from_secs(10),
            ready_limit_max: Duration::from_secs(300),
            io_timeout: Duration::from_secs(30),
            abort_grace: Duration::from_secs(5),
            resets_max: 3,
            settled_after: Duration::from_secs(60),
            status_every: Duration::from_millis(100),
            requeue: Requeue::Nothing,
            shadow_doorbells: true,
            interrupts: false,
        }
    }
}

/// Where a controller stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Made, not started.
    Idle,
    /// CC.EN was cleared; CSTS.RDY is not yet 0.
    Disabling,
    /// CC.EN was set; CSTS.RDY is not yet 1.
    Enabling,
    /// Identifying.
    Starting,
    /// In use.
    Ready,
    /// CC.SHN was set; CSTS.SHST does not yet say complete.
    ShuttingDown,
    /// Shut down and disabled.
    Stopped,
    /// Given up; see [`crate::Controller::failure`].
    Failed,
    /// The device is gone.
    Removed,
}

/// Something that its owner may want to know.
#[derive(Clone, Debug)]
pub enum Event {
    /// A reset began, and why.
    Resetting(Error),
    /// The controller is ready (again).
    Ready,
    /// An asynchronous event (Base section 5.1.2): DW0 of its completion.
    Asynchronous(u32),
    /// The namespaces were read anew.
    NamespacesChanged,
    /// The controller is given up, or gone.
    Ended(Error),
}
