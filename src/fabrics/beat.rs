//! The counters of one queue, on cache lines of its own, written by its core only.

use std::sync::atomic::{AtomicU64, Ordering};

/// What one queue did. The owner adds with plain loads and stores (no locked instruction); others only read.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Beat {
    commands: AtomicU64,
    read_commands: AtomicU64,
    write_commands: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

/// The sums of some queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    pub(super) commands: u64,
    pub(super) read_commands: u64,
    pub(super) write_commands: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
}

impl Beat {
    /// Counts a command of any kind: the sign of life that keeps the keep alive timer from expiring (TBKAS).
    #[inline]
    pub(super) fn command(&self) {
        add(&self.commands, 1);
    }

    /// Counts a read that is about to start.
    #[inline]
    pub(super) fn read(&self, bytes: u64) {
        add(&self.read_commands, 1);
        add(&self.read_bytes, bytes);
    }

    /// Counts a write that is about to start.
    #[inline]
    pub(super) fn write(&self, bytes: u64) {
        add(&self.write_commands, 1);
        add(&self.written_bytes, bytes);
    }

    /// The number of commands so far.
    pub(super) fn commands(&self) -> u64 {
        self.commands.load(Ordering::Relaxed)
    }

    /// Adds what was counted to `sum`.
    pub(super) fn add_to(&self, sum: &mut Traffic) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        sum.commands = sum.commands.wrapping_add(load(&self.commands));
        sum.read_commands = sum.read_commands.wrapping_add(load(&self.read_commands));
        sum.write_commands = sum.write_commands.wrapping_add(load(&self.write_commands));
        sum.read_bytes = sum.read_bytes.wrapping_add(load(&self.read_bytes));
        sum.written_bytes = sum.written_bytes.wrapping_add(load(&self.written_bytes));
    }
}

/// Single-writer addition.
#[inline]
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}
