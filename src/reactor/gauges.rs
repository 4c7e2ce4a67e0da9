//! What a core holds at this moment, for other threads to read.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What a core holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CoreStats {
    /// Connections, also those that are ending.
    pub connections: usize,
    /// Commands on devices.
    pub commands: usize,
    /// Bytes of buffers in use.
    pub buffer_bytes: usize,
}

/// The [`CoreStats`] that a core wrote down at its last tick. Never touched between ticks: the I/O path does not know
/// of it.
#[derive(Debug, Default)]
pub struct CoreGauges {
    connections: AtomicUsize,
    commands: AtomicUsize,
    buffer_bytes: AtomicUsize,
}

impl CoreGauges {
    /// The last numbers. Each is right by itself; the three may be of different ticks.
    #[must_use]
    pub fn get(&self) -> CoreStats {
        CoreStats {
            connections: self.connections.load(Ordering::Relaxed),
            commands: self.commands.load(Ordering::Relaxed),
            buffer_bytes: self.buffer_bytes.load(Ordering::Relaxed),
        }
    }

    pub(super) fn set(&self, stats: &CoreStats) {
        self.connections.store(stats.connections, Ordering::Relaxed);
        self.commands.store(stats.commands, Ordering::Relaxed);
        self.buffer_bytes.store(stats.buffer_bytes, Ordering::Relaxed);
    }
}
