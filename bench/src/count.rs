//! Instructions a read: the same in each run, whatever else the machine does.
//!
//! `valgrind --tool=callgrind` counts only inside [`Load::fill`] and [`Load::reap`]: what a caller spends on the driver,
//! its own loop included, and not the replayed device.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::device::Device;
use crate::load::{Buffers, Load};
use crate::report::{Measurement, Row};

/// Reads of a counted run, and of the run that is taken away from it: what starting and stopping cost is in both.
const READS: usize = 20_000;
const READS_BASE: usize = 4_000;
const BATCH: usize = 32;

/// Does `reads` reads on the replayed device. Looks at no clock, for valgrind's is not this machine's.
///
/// # Errors
/// When something does not work.
pub fn run(depth: u16, reads: usize) -> Result<()> {
    let mut device = Device::replay(BATCH)?;
    let (access, nsid) = (device.access(), device.nsid());
    let mut load = Load::start(access, nsid, depth, Buffers::Reused, &mut || device.idle())?;
    device.opened()?;
    let mut done = 0;
    while done < reads {
        load.fill();
        device.work();
        done += load.reap();
    }
    load.finish(&mut || device.idle())
}

/// The row for a depth.
///
/// # Errors
/// When there is no valgrind, or it did not count.
pub fn row(program: &Path, depth: u16, machine: &str) -> Result<Row> {
    let (many, few) = (counted(program, depth, READS)?, counted(program, depth, READS_BASE)?);
    ensure!(many > few, "nothing was counted");
    let instructions = (many - few) as f64 / (READS - READS_BASE) as f64;
    let measured = Measurement {
        name: format!("driver/replay/qd{depth}/instructions"),
        unit: "instructions a read",
        ours: &[instructions],
        peer: None,
        bar: None,
        method: "valgrind --tool=callgrind, inside the caller's submit and poll loop; x86-64",
    };
    Row::new(&measured, machine).context("nothing was counted")
}

/// Instructions of a run inside the two functions.
fn counted(program: &Path, depth: u16, reads: usize) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .args(["--toggle-collect=fastice_bench::load::Load::fill*"])
        .args(["--toggle-collect=fastice_bench::load::Load::reap*"])
        .arg(program)
        .args(["count", "--depth", &depth.to_string(), "--reads", &reads.to_string()])
        .output()
        .context("valgrind cannot be run: install it")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the counted run failed: {text}");
    collected(&text).with_context(|| format!("valgrind counted nothing: {text}"))
}

fn collected(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.split_once("Collected :"))?.1;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_read_from_valgrinds_summary() {
        assert_eq!(collected("==7== Events    : Ir\n==7== Collected : 2328536\n==7==\n"), Some(2_328_536));
        assert_eq!(collected("==7== Segmentation fault\n"), None);
    }
}
