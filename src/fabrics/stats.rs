//! Counters of what hosts did to the target as a whole. Only the control path counts here, so a shared cache line
//! costs nothing; I/O is counted by each queue on its own line (see `beat`).

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident),+ $(,)?) => {
        /// The living counters.
        #[derive(Debug, Default)]
        pub(super) struct Counters { $($(#[$meta])* pub(super) $name: Counter),+ }

        /// What was counted since the target started.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        pub struct TargetStats { $($(#[$meta])* pub $name: u64),+ }

        impl Counters {
            /// The numbers of this moment.
            pub(super) fn snapshot(&self) -> TargetStats {
                TargetStats { $($name: self.$name.get()),+ }
            }
        }
    };
}

/// A number that only grows.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub(super) fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    /// Admin queues connected to I/O controllers.
    admin_connects,
    /// Admin queues connected to discovery controllers.
    discovery_connects,
    /// I/O queues connected.
    io_connects,
    /// Connects refused for their parameters or for a limit.
    connects_rejected,
    /// Connects refused because the host is not on the subsystem's list.
    hosts_refused,
    /// Controllers ended because their keep alive timer expired.
    keep_alive_expired,
    /// Controllers ended because the host did not enable them, or left a discovery controller idle.
    idle_expired,
    /// Controllers ended because a reload took the host off the list or the subsystem away.
    controllers_revoked,
    /// Abort commands.
    aborts,
    /// Asynchronous events sent to hosts.
    events_sent,
    /// Commands that failed with a status of their own fault: bad fields, bad order, bad lengths.
    command_errors,
    /// Failures that the transport reported.
    transport_errors,
}
