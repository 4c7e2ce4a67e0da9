//! What a core holds at this moment, and what it did so far, for other threads to read.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::activity::{CoreActivity, Wake};

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

/// The [`CoreStats`] and the [`CoreActivity`] that a core wrote down at its last tick. Never touched between ticks: the I/O
/// path does not know of it.
#[derive(Debug, Default)]
pub struct CoreGauges {
    cpu: usize,
    connections: AtomicUsize,
    commands: AtomicUsize,
    buffer_bytes: AtomicUsize,
    busy_ns: AtomicU64,
    polling_ns: AtomicU64,
    asleep_ns: AtomicU64,
    begins_of_work: AtomicU64,
    begins_of_polling: AtomicU64,
    wakes: [AtomicU64; Wake::ALL.len()],
}

impl CoreGauges {
    /// Of the core that runs on this CPU.
    #[must_use]
    pub fn new(cpu: usize) -> Self {
        Self { cpu, ..Self::default() }
    }

    /// The CPU that the core runs on.
    #[must_use]
    pub const fn cpu(&self) -> usize {
        self.cpu
    }

    /// The last numbers. Each is right by itself; the three may be of different ticks.
    #[must_use]
    pub fn get(&self) -> CoreStats {
        CoreStats {
            connections: self.connections.load(Ordering::Relaxed),
            commands: self.commands.load(Ordering::Relaxed),
            buffer_bytes: self.buffer_bytes.load(Ordering::Relaxed),
        }
    }

    /// What it did up to its last tick, in the same sense.
    #[must_use]
    pub fn activity(&self) -> CoreActivity {
        CoreActivity {
            busy_ns: self.busy_ns.load(Ordering::Relaxed),
            polling_ns: self.polling_ns.load(Ordering::Relaxed),
            asleep_ns: self.asleep_ns.load(Ordering::Relaxed),
            begins_of_work: self.begins_of_work.load(Ordering::Relaxed),
            begins_of_polling: self.begins_of_polling.load(Ordering::Relaxed),
            wakes: std::array::from_fn(|at| self.wakes[at].load(Ordering::Relaxed)),
        }
    }

    pub(super) fn set(&self, stats: &CoreStats, activity: &CoreActivity) {
        self.connections.store(stats.connections, Ordering::Relaxed);
        self.commands.store(stats.commands, Ordering::Relaxed);
        self.buffer_bytes.store(stats.buffer_bytes, Ordering::Relaxed);
        self.busy_ns.store(activity.busy_ns, Ordering::Relaxed);
        self.polling_ns.store(activity.polling_ns, Ordering::Relaxed);
        self.asleep_ns.store(activity.asleep_ns, Ordering::Relaxed);
        self.begins_of_work.store(activity.begins_of_work, Ordering::Relaxed);
        self.begins_of_polling.store(activity.begins_of_polling, Ordering::Relaxed);
        for (told, wakes) in self.wakes.iter().zip(activity.wakes) {
            told.store(wakes, Ordering::Relaxed);
        }
    }
}
