//! fastice serves pinned extents of XFS and ext4 files to remote hosts over NVMe-oF.
//!
//! ```text
//!   cli                 one file a subcommand
//!    |
//!   control   config    the running target: start, reload, drain        | the TOML file, checked
//!    |
//!   tcp   initiator     the NVMe/TCP transport of the target            | our own host
//!    |        |
//!   reactor   |         the poll loop of a core
//!    |        |
//!   fabrics   |         subsystems, controllers, commands; knows no transport
//!    |        |
//!   block   extent      devices behind one trait                         | pins, frozen maps, lookup
//!    |        |
//!   ring    units       io_uring with operations that own their buffers | newtypes
//!   stage   probes      where the time of a command goes, in histograms    | places for tracers to attach
//!   aligned   durable   chain   log_pace   memory at a boundary | files that survive a crash; errors on one line; no flood of messages
//!    |
//!   spdk/async-nvme, spdk/nvme-model      our NVMe driver, and a controller in software for demo and tests
//!    |
//!   spdk/nvme-spec, spdk/hugepage-alloc
//! ```
//!
//! Arrows go down only. `docs/ARCHITECTURE.md` follows a write through the house and gives a reading order.

mod aligned;
pub mod block;
mod chain;
pub mod cli;
pub mod config;
pub mod control;
mod durable;
pub mod extent;
pub mod fabrics;
pub mod initiator;
mod log_pace;
mod probes;
pub mod reactor;
pub mod ring;
pub mod stage;
pub mod tcp;
pub mod units;
