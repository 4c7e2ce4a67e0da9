//! NVMe/TCP (NVM Express TCP Transport Specification 1.1): the PDU codec, for target and initiator, and the target's
//! connection.
//!
//! [`TcpFactory`] plugs connections into the reactor: it gives each accepted socket a session of the target and lets
//! its core run it. Not here: what commands mean (`fabrics`), the host's side (`initiator`), TLS.

pub mod congestion;
pub mod conn;
pub mod digest;
pub mod fuzz;
pub mod pdu;

use std::sync::Arc;

use rustix::net::sockopt;

pub use self::conn::{TcpConnection, TcpCounters, TcpStats, TcpTimeouts, fuzz_connection};
pub use self::fuzz::fuzz_pdu;
use crate::fabrics::{Arrival, QueueSession, Target};
use crate::reactor::{Accepted, Connection, ConnectionFactory, CoreContext};
use crate::ring::Socket;

/// Makes NVMe/TCP connections for one target.
pub struct TcpFactory {
    target: Arc<Target>,
    counters: Arc<TcpCounters>,
    timeouts: TcpTimeouts,
}

impl TcpFactory {
    /// A factory whose connections count what goes wrong in `counters`.
    #[must_use]
    pub fn new(target: Arc<Target>, counters: Arc<TcpCounters>, timeouts: TcpTimeouts) -> Self {
        Self { target, counters, timeouts }
    }
}

impl ConnectionFactory for TcpFactory {
    fn adopt(&self, cx: &mut CoreContext, accepted: Accepted) -> Option<Box<dyn Connection>> {
        if self.target.is_shut_down() {
            return None;
        }
        // Small PDUs must not wait for company: batches are made here, not by Nagle.
        if let Err(error) = sockopt::set_tcp_nodelay(&accepted.socket, true) {
            tracing::debug!(peer = %accepted.peer, %error, "TCP_NODELAY refused; the peer is gone already");
            return None;
        }
        let Accepted { socket, peer, local, port } = accepted;
        let arrival = Arrival { port, peer, local };
        let waker = Arc::new(cx.mailbox.clone());
        let session = QueueSession::new(Arc::clone(&self.target), arrival, waker);
        let counters = Arc::clone(&self.counters);
        let socket = Socket::new(socket);
        Some(Box::new(TcpConnection::new(socket, peer, session, counters, self.timeouts, cx.now)))
    }
}
