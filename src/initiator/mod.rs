//! Our own NVMe/TCP host: for the demo, the benchmark and the tests. It needs no kernel module and no privilege.
//!
//! ```text
//!   bench          one thread a queue; latencies, verification       discovery   the log, read in one piece
//!     |                                                                  |
//!   namespace      blocks by LBA     controller      connect, enable, admin commands, keep alive, events
//!     |                                  |
//!   transport      one queue over one TCP connection: capsules, R2T, data, digests, deadlines
//!     |
//!   command        submission queue entries      error      kinds, status, source
//!
//!   raw            a connection for tests that sends whatever it is given
//! ```
//!
//! The interface blocks; what runs at once, runs in threads or as several commands of one queue. Not here: TLS,
//! authentication, multipath, metadata, more than the NVM command set, and reconnecting by itself (the benchmark
//! does that when told to).

pub mod bench;
pub mod command;
pub mod controller;
pub mod discovery;
pub mod error;
mod host;
pub mod namespace;
pub mod raw;
pub mod transport;
