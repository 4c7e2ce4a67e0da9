//! `driver`: the NVMe driver beside the bare loop, and beside the kernel's.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use fastice_bench::chosen::Chosen;
use fastice_bench::machine;
use fastice_bench::suite::{KernelPeer, Plan};

use super::{add, say};

#[derive(Debug, Args)]
pub(crate) struct Driver {
    /// What to drive: replay (costs nothing: the driver alone), model (in this process), vfio-user (the model in another
    /// process), vfio-user:SOCKET, vfio:PCI-ADDRESS. The last two are only read
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [Chosen::Replay, Chosen::Model, Chosen::VfioUser],
        value_name = "DEVICE",
    )]
    device: Vec<Chosen>,
    /// The namespace to read, of a device outside
    #[arg(long, default_value_t = 1, value_name = "NSID", value_parser = clap::value_parser!(u32).range(1..=0xFFFF_FFFE))]
    nsid: u32,
    /// Queue depths
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 128], value_name = "N,N")]
    depths: Vec<u16>,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 7, value_name = "N")]
    rounds: usize,
    /// Milliseconds of a round
    #[arg(long, default_value_t = 100, value_name = "MS")]
    round_ms: u64,
    /// The kernel's block device on the namespace of the device outside, to compare with
    #[arg(long, value_name = "DEVICE")]
    kernel: Option<PathBuf>,
    /// Take the kernel's completions by interrupt, where its driver has no poll queues
    #[arg(long, requires = "kernel")]
    kernel_interrupts: bool,
    /// This processor is emulated: do not judge what the driver adds to a latency
    #[arg(long)]
    emulated: bool,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

/// Measures each device that was chosen.
pub(crate) fn run(options: &Driver) -> Result<()> {
    let plan = Plan {
        depths: options.depths.clone(),
        rounds: options.rounds,
        time: Duration::from_millis(options.round_ms),
        emulated: options.emulated,
        machine: machine::describe(),
        tell: say,
    };
    plan.check()?;
    ensure!(
        options.kernel.is_none() || options.device.iter().any(Chosen::is_outside),
        "the kernel's driver can be compared with on a device outside only"
    );
    let kernel = options.kernel.as_ref();
    let kernel = kernel.map(|path| KernelPeer { path: path.clone(), polled: !options.kernel_interrupts });
    add(&options.report, |rows| {
        for device in &options.device {
            match device {
                Chosen::Replay => plan.replay(rows)?,
                Chosen::Model => plan.model(rows)?,
                outside => {
                    let mut opened = outside.open_outside(options.nsid)?;
                    plan.outside(rows, &mut opened.device, kernel.as_ref())?;
                }
            }
        }
        Ok(())
    })
}
