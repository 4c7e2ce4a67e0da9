//! The thread-per-core poll loop: sockets, devices and timers of one core, and nothing that another core touches.
//!
//! ```text
//!           mail (control thread, other cores)
//!             |
//!   +---------v--------------------- one turn ------------------------------+
//!   |  ring.turn()      one system call: submits sends, receives, device    |
//!   |     |             operations of the last turn, takes completions      |
//!   |     v                                                                 |
//!   |  socket completions -> Connection::on_ring                            |
//!   |  sockets of the few that are busy -> Connection::poll  (see polls,    |
//!   |                                                           gather)     |
//!   |  engine.poll()      -> Connection::on_io      (all of a connection)   |
//!   |  ready connections  -> Connection::turn      (budgeted, round robin)  |
//!   |  engine.launch()    lookups and submissions of the commands begun     |
//!   |  every tick         -> Connection::tick      (keep-alive, deadlines)  |
//!   +-----------------------------------------------------------------------+
//!             sleeps in ring.turn() when there was nothing to do for a while
//! ```
//!
//! A core that was stopped for a while makes sure of the files before it goes on: see `pause`. What it does while there is little to do is
//! decided in `polls` (which sockets it reads itself), `linger` (whether it sleeps), `gather` and `trial` (whether it lets commands gather,
//! and how many responses go together).
//!
//! A connection lives on the core that adopted it until it ends. The loop knows connections only by the
//! [`Connection`] trait; what they speak is decided by the [`ConnectionFactory`] that the control part passes in.
//!
//! Not here: protocols (`tcp`, `fabrics`), what is served (`control`).

mod activity;
mod core;
mod cores;
mod engine;
mod gather;
mod gauges;
mod linger;
mod mailbox;
mod pause;
mod places;
mod polls;
mod slab;
mod trial;

use std::time::{Duration, Instant};

use hugepage_alloc::BufferPool;

pub use self::activity::{CoreActivity, Wake};
pub use self::core::{Core, IdlePolicy};
pub use self::cores::{CoreOptions, Cores, CoresError};
pub use self::engine::{IoDone, IoEngine, Timing};
pub use self::gather::Gather;
pub use self::gauges::{CoreGauges, CoreStats};
pub use self::mailbox::{Accepted, Letter, Mailbox};
pub use self::pause::CoreFailure;
pub use self::polls::{Heard, Polled, SocketPolls};
pub use self::slab::{Key, Slab};
use crate::ring::{RingClient, RingDone};
use crate::stage::{CoreStages, Trace};

/// What a connection may use while it runs: everything of its core but the other connections.
pub struct CoreContext {
    /// The core's own socket operations; tokens are made by [`CoreContext::token`].
    pub sockets: RingClient,
    /// Buffers for data between socket and device.
    pub pool: BufferPool,
    /// Commands to devices.
    pub engine: IoEngine,
    /// The time this turn began. Good enough for every deadline.
    pub now: Instant,
    /// Wakes this core: handed to sessions that other threads want to reach.
    pub mailbox: Mailbox,
    /// Which sockets the core reads by itself.
    pub polls: SocketPolls,
    /// For how long a socket is left alone at the most, so that commands come together.
    pub gather: Duration,
    /// Where commands tell how long their stages took.
    pub stages: CoreStages,
    /// The last commands.
    pub trace: Trace,
}

impl CoreContext {
    /// The ring token of an operation `kind` of the connection `key`.
    #[must_use]
    pub fn token(key: Key, kind: u8) -> u64 {
        u64::from(kind) << 56 | key.to_bits()
    }
}

/// What a connection wants after its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing until something completes.
    Wait,
    /// Nothing until something completes, and its socket is to be looked at by [`Connection::poll`] again and again: at every turn
    /// of the core, or in turn with others where many are busy.
    Poll,
    /// Another turn: the budget ran out before the work did.
    Again,
    /// The connection has ended and holds nothing of its own in flight; drop it.
    Finished,
}

/// One transport connection, driven by its core.
pub trait Connection {
    /// Called once, with the key that its completions will carry.
    fn start(&mut self, cx: &mut CoreContext, key: Key);
    /// An operation that it gave to `cx.sockets` has ended.
    fn on_ring(&mut self, cx: &mut CoreContext, kind: u8, done: RingDone);
    /// Commands that it gave to `cx.engine` have ended. It takes their buffers; those that it leaves are dropped.
    fn on_io(&mut self, cx: &mut CoreContext, ended: &mut [IoDone]);
    /// Looks at its socket, after it has asked for that with [`Turn::Poll`] and until it answers [`Polled::Cold`].
    fn poll(&mut self, cx: &mut CoreContext) -> Polled;
    /// Does a bounded amount of work: parses, answers, submits. Called after completions, and again on request.
    fn turn(&mut self, cx: &mut CoreContext) -> Turn;
    /// Looks at deadlines and at what other threads want of it; whether it wants a turn then. Called every [`Core::TICK`] and
    /// after mail; when it is [steady](Connection::is_steady), every [`Core::REVIEW`] and after mail.
    fn tick(&mut self, cx: &mut CoreContext) -> bool;
    /// Whether it carries I/O, or is there to administer; none as long as that is not known. Told once and for all.
    fn carries_io(&self) -> Option<bool>;
    /// Whether it has no deadline for which a [`Core::REVIEW`] more or less matters, as long as nothing comes: transfers that hang are
    /// found by so much later.
    fn is_steady(&self) -> bool;
    /// Asks it to end: take no new commands, finish those under way, say goodbye, and report [`Turn::Finished`].
    fn stop(&mut self, cx: &mut CoreContext);
}

/// Makes a connection out of an accepted socket, on the core that will run it.
pub trait ConnectionFactory: Send + Sync {
    /// The connection, or `None` when the peer is not to be served (the socket is closed then).
    fn adopt(&self, cx: &mut CoreContext, accepted: Accepted) -> Option<Box<dyn Connection>>;
}
