//! What went wrong on connections, counted for all cores together: none of it is on the I/O path.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::log_pace::LogPace;

macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident,)*) => {
        /// Events of all NVMe/TCP connections since the start.
        #[derive(Debug, Default)]
        pub struct TcpCounters {
            $($(#[$meta])* pub $name: Counter,)*
            pace: LogPace,
        }

        /// A snapshot of [`TcpCounters`].
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        pub struct TcpStats {
            $($(#[$meta])* pub $name: u64,)*
        }

        impl TcpCounters {
            /// The values now.
            #[must_use]
            pub fn snapshot(&self) -> TcpStats {
                TcpStats { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Connections adopted by a core.
    connections,
    /// Connections that ended.
    connections_ended,
    /// PDUs that broke the protocol; each ended its connection.
    protocol_errors,
    /// Header digests that did not fit; each ended its connection.
    header_digest_errors,
    /// Data digests that did not fit; each failed its command.
    data_digest_errors,
    /// Commands whose CID was in use.
    duplicate_cids,
    /// C2HTermReq sent.
    term_reqs_sent,
    /// H2CTermReq received.
    term_reqs_received,
    /// Connections that did not introduce themselves in time.
    handshake_timeouts,
    /// Connections whose host let a transfer hang.
    transfer_timeouts,
    /// Connections that the peer or the network broke off.
    broken,
    /// How often a socket was left alone so that more commands come together: see [`Gather`](crate::reactor::Gather).
    gathers,
    /// How often a connection that was idle gave its large receive buffer back.
    shrunk,
}

/// One event's count.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How many so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl TcpCounters {
    /// Whether a message that a peer can provoke may be logged now: one each second for all connections. Whoever
    /// floods us fills the counters, not the log.
    #[must_use]
    pub fn may_log(&self) -> bool {
        self.pace.may_log()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_once_and_counted_whole() {
        let counters = TcpCounters::default();
        let logged = (0..1000)
            .filter(|_| {
                counters.protocol_errors.bump();
                counters.may_log()
            })
            .count();
        assert_eq!(logged, 1);
        assert_eq!(counters.snapshot().protocol_errors, 1000);
    }
}
