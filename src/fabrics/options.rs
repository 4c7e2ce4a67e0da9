//! What one target allows and promises to every host: the limits, in one place.

use std::time::Duration;

/// MDTS: the largest transfer of one command as a power of two of the smallest memory page, 4 KiB (NVM Express Base
/// Specification 2.1, section 5.1.13.2.1): 1 MiB.
pub(super) const MDTS: u8 = 8;
/// The largest transfer of one command in bytes, as [`MDTS`] says it.
pub const TRANSFER_BYTES_MAX: u32 = 4096 << MDTS;
/// The highest namespace identifier (NN and MNAN).
pub const NSID_MAX: u32 = 1024;
/// Asynchronous Event Requests that one controller holds.
pub(super) const AER_MAX: usize = 4;
/// ACL as a count: Abort commands that may be outstanding. Each is carried out at once.
pub(super) const ABORT_MAX: u8 = 4;
/// Entries of the Error Information log of one controller.
pub(super) const ERROR_LOG_ENTRIES: usize = 64;
/// KAS: the granularity of the keep alive timer, in units of 100 ms: one second.
pub(super) const KAS: u16 = 10;
/// In-capsule data of an admin queue and of a queue that is not connected yet (NVM Express TCP Transport
/// Specification 1.1, section 3.3.1.1): the most that hosts send.
pub const ADMIN_IN_CAPSULE_BYTES: u32 = 8192;
/// CAP.TO and CRTO: how long enabling and disabling may take, in units of 500 ms.
pub(super) const READY_TIMEOUT_500MS: u8 = 30;
/// How long a controller may stay without CC.EN, and a discovery controller that was connected without a keep alive
/// timeout without a command, before its connection ends.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// The version that VS and VER report: 2.0.0.
pub(super) const VERSION: u32 = 0x0002_0000;

/// What a target allows. [`TargetOptions::default`] fits stock Linux hosts.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// I/O queues of one controller, 1 to 64.
    pub io_queues_max: u16,
    /// Entries of one queue, 128 to 4096: CAP.MQES + 1.
    pub queue_entries_max: u16,
    /// In-capsule data of an I/O command in bytes, a multiple of 16 from 0 to 1 MiB.
    pub in_capsule_bytes: u32,
    /// Controllers of one subsystem, 1 to 65519 (cntlid 1 to FFEFh).
    pub controllers_max: usize,
    /// Controllers of one host on one subsystem: bounds what a flood of Connects can hold.
    pub controllers_per_host_max: usize,
    /// The firmware revision that hosts see: up to 8 ASCII characters.
    pub firmware: String,
}

impl Default for TargetOptions {
    fn default() -> Self {
        Self {
            io_queues_max: 64,
            queue_entries_max: 1024,
            in_capsule_bytes: 16 * 1024,
            controllers_max: 2048,
            controllers_per_host_max: 128,
            firmware: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl TargetOptions {
    /// The options with every number brought into its documented range.
    #[must_use]
    pub(super) fn clamped(mut self) -> Self {
        self.io_queues_max = self.io_queues_max.clamp(1, 64);
        self.queue_entries_max = self.queue_entries_max.clamp(128, 4096);
        self.in_capsule_bytes = self.in_capsule_bytes.min(1 << 20) & !15;
        self.controllers_max = self.controllers_max.clamp(1, 0xFFEF);
        self.controllers_per_host_max = self.controllers_per_host_max.max(1);
        self
    }
}
