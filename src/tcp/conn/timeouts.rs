//! How long a host may take, and what becomes of one that takes longer.

use std::time::Duration;

use super::{Stage, TcpConnection};
use crate::reactor::CoreContext;

/// Time-outs of a connection.
#[derive(Clone, Copy, Debug)]
pub struct TcpTimeouts {
    /// From the TCP connection to the Connect command.
    pub handshake: Duration,
    /// For the data that a host owes, and for a host to take the answers of one batch: memory of others waits.
    pub transfer: Duration,
    /// For commands under way to be answered, once the connection is to end.
    pub ending: Duration,
    /// For the peer to read the last answers and to close, once they are sent.
    pub closing: Duration,
}

impl Default for TcpTimeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            transfer: Duration::from_secs(30),
            ending: Duration::from_secs(5),
            closing: Duration::from_secs(1),
        }
    }
}

impl TcpConnection {
    /// Ends a connection whose host has not said who it is.
    pub(super) fn check_handshake(&mut self, cx: &CoreContext) {
        let Stage::Handshake { deadline } = self.stage else { return };
        if cx.now < deadline {
            return;
        }
        self.counters.handshake_timeouts.bump();
        if self.counters.may_log() {
            tracing::warn!(peer = %self.peer, "connection ended: no Connect command in time");
        }
        self.abort(cx);
    }

    /// Ends a connection whose host neither sends the data that it owes nor takes what it asked for.
    pub(super) fn check_transfers(&mut self, cx: &CoreContext) {
        let oldest = [self.requests.owed_since(), self.tx.in_flight_since()].into_iter().flatten().min();
        let overdue =
            oldest.is_some_and(|since| cx.now.saturating_duration_since(since) >= self.timeouts.transfer);
        if !self.is_open() || !overdue {
            return;
        }
        self.counters.transfer_timeouts.bump();
        if self.counters.may_log() {
            let who = self.session.controller_label();
            tracing::warn!(peer = %self.peer, who, "connection ended: the host let a transfer hang");
        }
        self.abort(cx);
    }
}
