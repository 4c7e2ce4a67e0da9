//! `fastice device`: the NVMe controllers of this host, and how they change hands.
//!
//! ```text
//!   list ------> inventory: pci (async_nvme::vfio::sysfs), nvme, usage, record
//!                    |
//!   bind ------> take --.
//!                        >-- handover: steps in sysfs, through kernel
//!   unbind ----> give --'
//!   probe -----> the driver itself: identify, logs, a read test
//!   hugepages -> memory for its buffers
//! ```
//!
//! All of `/sys`, `/proc` and `/dev` is read below a root (`host`), and changed through a trait (`kernel`), so that
//! the tests have hosts and kernels of their own. A controller is taken only when nothing that is used would lose its
//! last path; what it was before is recorded first, durably, so that it can be given back after a crash at any step.
//!
//! What it does not do: unmount, stop or move anything that is in the way, keep a binding over a reboot, or look into
//! other drivers than `nvme` and VFIO.

mod error;
mod give;
mod handover;
pub(super) mod host;
pub(super) mod hugepages;
pub(super) mod inventory;
mod kernel;
mod list;
mod nvme;
mod probe;
pub(super) mod record;
mod switch;
mod take;
mod usage;

#[cfg(test)]
pub(super) mod fake;
#[cfg(test)]
mod tests;

use clap::{Args, Subcommand};

use super::exit::Outcome;

/// Show, take and give back NVMe controllers
#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    #[command(subcommand)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub command: DeviceCommand,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
#[expect(missing_docs, reason = "the documentation of each is that of its arguments, which clap shows")]
pub enum DeviceCommand {
    List(list::ListArgs),
    Bind(switch::BindArgs),
    Unbind(switch::UnbindArgs),
    Probe(probe::ProbeArgs),
    Hugepages(hugepages::HugepagesArgs),
}

impl DeviceArgs {
    /// Whether errors are to be JSON too.
    #[must_use]
    pub fn wants_json(&self) -> bool {
        match &self.command {
            DeviceCommand::List(args) => args.json.json,
            DeviceCommand::Bind(args) => args.json.json,
            DeviceCommand::Unbind(args) => args.json.json,
            DeviceCommand::Probe(args) => args.json.json,
            DeviceCommand::Hugepages(args) => args.json.json,
        }
    }
}

/// Runs `fastice device`.
///
/// # Errors
/// What the subcommand's own documentation says.
pub fn run(args: &DeviceArgs) -> Outcome {
    match &args.command {
        DeviceCommand::List(args) => list::run(args),
        DeviceCommand::Bind(args) => switch::bind(args),
        DeviceCommand::Unbind(args) => switch::unbind(args),
        DeviceCommand::Probe(args) => probe::run(args),
        DeviceCommand::Hugepages(args) => hugepages::run(args),
    }
}
