//! How long a host may take.

use std::time::Duration;

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
