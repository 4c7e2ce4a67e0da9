//! `fastice device probe`: what our own driver finds behind a controller, and how fast it reads.
//!
//! ```text
//!   reach    PCI address (VFIO) | socket (vfio-user) | image (model, in process)  ->  Access
//!   mod      reset, identify, logs                                                   admin queue
//!   read     random reads, one at a time and many                                    one I/O queue a namespace
//!   report   what comes out: JSON, or lines
//! ```
//!
//! Only reads: the commands given are Identify, Get Log Page, Get and Set Features of the driver's own start (none of
//! them saved), queue creation, and Read. The controller is reset by it, at the start and at the end.

mod reach;
mod read;
mod report;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nvme::vfio::PciAddress;
use async_nvme::{Controller, Options, SystemClock, block_on};
use clap::Args;
use hugepage_alloc::{BufferPool, RegionOptions};
use reach::Reached;
use report::{ControllerReport, FirmwareReport, NamespaceReport, ProbeReport, SmartReport};

use crate::cli::exit::{Exit, Failure, Outcome};
use crate::cli::out::{JsonFlag, Out};
use crate::config::parse_size;
use crate::units::ByteLen;

/// The largest read that the test makes.
const READ_LEN_MAX: u64 = 1 << 20;
/// Namespaces that are read from; the rest is only described.
const NAMESPACES_READ_MAX: usize = 16;

/// Reset and identify a controller with fastice's own driver, read its logs, and test how fast it reads
///
/// Nothing is written to it. A controller of this host must have been taken: `fastice device bind`.
#[derive(Clone, Debug, Args)]
pub struct ProbeArgs {
    /// The PCI address of a controller that is with VFIO
    #[arg(value_name = "PCI", required_unless_present_any = ["model", "vfio_user"])]
    pub address: Option<PciAddress>,
    /// A controller in another process, behind this vfio-user socket
    #[arg(long, value_name = "SOCKET", conflicts_with = "address")]
    pub vfio_user: Option<PathBuf>,
    /// The software controller of fastice, in process, over this image or block device
    #[arg(long, value_name = "PATH", conflicts_with_all = ["address", "vfio_user"])]
    pub model: Option<PathBuf>,
    /// Unsafe: drive a controller that no IOMMU keeps from memory
    #[arg(long, conflicts_with_all = ["model", "vfio_user"])]
    pub no_iommu: bool,
    /// How long each read test takes; 0 reads nothing
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=3600))]
    pub seconds: u64,
    /// Bytes of each read
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse_size)]
    pub read_size: ByteLen,
    /// Reads in flight in the second test; in the first there is one
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub depth: u16,
    #[command(flatten)]
    pub json: JsonFlag,
}

/// Probes the controller and prints what was found.
///
/// # Errors
/// When it cannot be reached or started, or a read fails.
pub(super) fn run(args: &ProbeArgs) -> Outcome {
    if args.read_size.get() == 0 || args.read_size.get() > READ_LEN_MAX {
        return Err(Failure::new(Exit::Usage, anyhow::anyhow!("--read-size is 1 to {READ_LEN_MAX} bytes")));
    }
    let report = probe(args, reach::reach(args)?)?;
    let mut out = Out::stdout();
    if args.json.json {
        out.json(&report)?;
    } else {
        report::print(&report, &mut out)?;
    }
    out.flush()?;
    Ok(Exit::Ok)
}

/// The whole probe of a controller that was reached.
fn probe(args: &ProbeArgs, mut reached: Reached) -> Result<ProbeReport, Failure> {
    let clock = Arc::new(SystemClock::default());
    let options = Options { io_queues: 1, ..Options::default() };
    let begun = Instant::now();
    let mut controller = Controller::new(reached.access.clone(), options, clock.clone()).map_err(failed)?;
    block_on(controller.ready(), || reached.idle()).map_err(failed)?;
    let ready_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut missing = Vec::new();
    // Logs that a controller does not have are no reason to stop: they are told as missing.
    let smart = block_on(controller.smart(), || reached.idle());
    let smart = smart.map_err(|error| missing.push(error.to_string())).ok();
    let firmware = block_on(controller.firmware_slots(), || reached.idle());
    let firmware = firmware.map_err(|error| missing.push(error.to_string())).ok();
    let errors = block_on(controller.error_log(), || reached.idle());
    let errors = errors.map_err(|error| missing.push(error.to_string())).unwrap_or_default();
    let mut namespaces: Vec<NamespaceReport> =
        controller.namespaces().iter().map(NamespaceReport::of).collect();
    let mut memory = None;
    if args.seconds > 0 {
        let pool = pool(args)?;
        memory = Some(pool.notice().map_or_else(|| pool.backing().to_string(), str::to_owned));
        let wanted = read::Wanted {
            len: args.read_size.get(),
            depth: args.depth,
            time: Duration::from_secs(args.seconds),
        };
        let usable = namespaces.iter_mut().filter(|namespace| namespace.refusal.is_none());
        for namespace in usable.take(NAMESPACES_READ_MAX) {
            namespace.reads =
                read::test(&mut controller, &mut reached, &*clock, &pool, namespace.nsid, wanted)?;
        }
    }
    let report = ProbeReport {
        access: reached.way,
        name: reached.name.clone(),
        ready_ms,
        controller: ControllerReport::of(controller.info()),
        namespaces,
        smart: smart.as_ref().map(SmartReport::of),
        firmware: firmware.as_ref().map(FirmwareReport::of),
        errors: errors.iter().map(report::ErrorReport::of).collect(),
        missing,
        memory,
    };
    block_on(controller.shutdown(), || reached.idle()).map_err(failed)?;
    Ok(report)
}

/// Buffers for the reads in flight. Shared, for the device may be another process.
fn pool(args: &ProbeArgs) -> Result<BufferPool, Failure> {
    let buffer_len = args.read_size.get().max(4096).next_power_of_two();
    let bytes = buffer_len.saturating_mul(u64::from(args.depth) * 4);
    let options = RegionOptions { share: true, ..RegionOptions::default() };
    BufferPool::with_options(usize::try_from(bytes).unwrap_or(usize::MAX), &options).map_err(|error| {
        Failure::new(Exit::Failed, error)
            .with_remedy("ask for less with --depth or --read-size, or free memory")
    })
}

/// An error of the driver.
fn failed(error: async_nvme::Error) -> Failure {
    let remedy = match &error {
        async_nvme::Error::Gone { .. } => "look whether it is still plugged in: lspci, and the kernel log",
        async_nvme::Error::Memory { .. } | async_nvme::Error::Access { .. } => {
            "fastice device hugepages --count 64, and raise the locked memory limit: ulimit -l unlimited"
        }
        async_nvme::Error::Unsupported { .. } => {
            "this controller needs another driver: fastice device unbind"
        }
        _ => {
            "try again; if it lasts, the controller is in trouble: give it back and look at it with nvme-cli"
        }
    };
    Failure::new(Exit::Failed, error).with_remedy(remedy)
}

#[cfg(test)]
mod tests;
