//! `guest`: the target beside the kernel's, with the kernel's initiator and fio.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use fastice_bench::{guest, machine};

use super::{add, say};

#[derive(Debug, Args)]
pub(crate) struct Guest {
    /// A file to serve, on the disk in one piece
    #[arg(long)]
    file: PathBuf,
    /// Where it begins on the disk, in bytes
    #[arg(long, value_name = "BYTES")]
    offset: u64,
    /// The kernel's disk of the namespace
    #[arg(long, value_name = "DEVICE")]
    disk: PathBuf,
    /// Another controller of the same namespace, bound to vfio-pci
    #[arg(long, value_name = "ADDRESS")]
    pci: String,
    /// The processor of our one core
    #[arg(long, default_value_t = 0, value_name = "CPU")]
    core: usize,
    /// The processor of fio
    #[arg(long, default_value_t = 1, value_name = "CPU")]
    fio_cpu: usize,
    /// I/O queues of the initiator; the kernel has the first one on processor 0
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    io_queues: u16,
    /// Our core polls always, instead of while there is work
    #[arg(long)]
    poll_always: bool,
    /// Only cases whose name holds this: nvme, uring or null
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Rounds of each side; an odd number has a middle one
    #[arg(long, default_value_t = 7, value_name = "N")]
    rounds: usize,
    /// Milliseconds of a round
    #[arg(long, default_value_t = 2000, value_name = "MS")]
    round_ms: u64,
    /// Where the rows go, into what is there
    #[arg(long, default_value = "bench/report.json", value_name = "FILE")]
    report: PathBuf,
}

/// Measures both targets.
pub(crate) fn run(options: &Guest) -> Result<()> {
    let plan = guest::Plan {
        file: options.file.clone(),
        offset: options.offset,
        disk: options.disk.clone(),
        pci: options.pci.clone(),
        core: options.core,
        fio_cpu: options.fio_cpu,
        io_queues: options.io_queues,
        is_polling: options.poll_always,
        only: options.only.clone(),
        rounds: options.rounds,
        time: Duration::from_millis(options.round_ms),
        machine: machine::describe(),
        tell: say,
    };
    add(&options.report, |rows| plan.run(rows))
}
