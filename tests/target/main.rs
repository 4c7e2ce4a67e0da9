//! The whole target in one process, against our own host and against raw sockets, on loopback.

#![expect(
    clippy::cast_possible_truncation,
    reason = "patterns, and lengths that the tests choose themselves"
)]
#![expect(clippy::print_stdout, reason = "tells the case of a table that failed")]

mod basic;
mod gather;
mod hostile_commands;
mod hostile_connections;
mod hostile_pdu;
mod rude;
mod stages;
mod support;
