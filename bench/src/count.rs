//! Instructions a read: the same in each run, whatever else the machine does.
//!
//! `valgrind --tool=callgrind` counts only inside [`Load::fill`] and [`Load::reap`]: what a caller spends on the driver,
//! its own loop included, and not the replayed device.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::device::Device;
use crate::load::{Buffers, Load};
use crate::machine;
use crate::report::{Measurement, Row};

/// Reads of a counted run, and of the run that is taken away from it: what starting and stopping cost is in both.
const READS: usize = 20_000;
const READS_BASE: usize = 4_000;
/// Completions at a time.
pub const BATCH: usize = 32;

/// Does `reads` reads on the replayed device, of which `batch` are complete at a time. Looks at no clock, for valgrind's is not this machine's.
///
/// # Errors
/// When something does not work.
pub fn run(depth: u16, reads: usize, batch: usize) -> Result<()> {
    let mut device = Device::replay(batch)?;
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
    let [few, many] = driver(program, depth)?;
    ensure!(many.instructions > few.instructions, "nothing was counted");
    let instructions = (many.instructions - few.instructions) as f64 / (many.ios - few.ios) as f64;
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

/// What a run counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// I/Os that it was told to do.
    pub ios: usize,
    /// Instructions inside the functions.
    pub instructions: u64,
    /// System calls, wherever they were made, without those that the program takes away.
    pub system_calls: u64,
    /// The processor that the program saw.
    pub processor: String,
}

/// Where to count. In names of functions, `*` stands for anything.
#[derive(Clone, Copy, Debug)]
pub struct Where<'a> {
    /// Instructions are counted in these, and in what they call.
    pub inside: &'a [&'a str],
    /// When this one is called, what was counted is forgotten.
    pub from: Option<&'a str>,
}

/// A short and a long run of the driver on the replayed device.
///
/// # Errors
/// As [`run_counted`].
pub fn driver(program: &Path, depth: u16) -> Result<[Counted; 2]> {
    let inside = &["fastice_bench::load::Load::fill*", "fastice_bench::load::Load::reap*"];
    let run = |reads: usize| {
        let arguments = ["count", "--depth", &depth.to_string(), "--reads", &reads.to_string()];
        run_counted(program, Where { inside, from: None }, &arguments, reads)
    };
    Ok([run(READS_BASE)?, run(READS)?])
}

/// Runs this program under valgrind. Its last line is [`told`].
///
/// # Errors
/// When there is no valgrind, the program fails, or nothing was counted.
pub fn run_counted(program: &Path, place: Where<'_>, arguments: &[&str], ios: usize) -> Result<Counted> {
    let directory = tempfile::tempdir()?;
    let profile = directory.path().join("profile");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-systime=yes", "--vgdb=no"])
        .arg(format!("--callgrind-out-file={}", profile.display()))
        .args(place.inside.iter().map(|function| format!("--toggle-collect={function}")))
        .args(place.from.map(|function| format!("--zero-before={function}")))
        .arg(program)
        .args(arguments)
        .output()
        .context("valgrind cannot be run: install it")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the counted run failed: {text}");
    let profile =
        fs::read_to_string(&profile).with_context(|| format!("valgrind counted nothing: {text}"))?;
    let (instructions, system_calls) = summary(&profile).context("valgrind's profile has no summary")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let (others, processor) =
        said.lines().last().and_then(heard).context("it does not tell its processor")?;
    let system_calls = system_calls.checked_sub(others).context("fewer system calls than the host's")?;
    Ok(Counted { ios, instructions, system_calls, processor })
}

/// The last line of a counted program: system calls that were not the target's, and the processor it sees.
#[must_use]
pub fn told(other_calls: u64) -> String {
    format!("{other_calls} other calls on {}", machine::level())
}

fn heard(line: &str) -> Option<(u64, String)> {
    let (other_calls, processor) = line.split_once(" other calls on ")?;
    Some((other_calls.parse().ok()?, processor.to_owned()))
}

/// Instructions and system calls of a profile. Zeros at the end are left out there; its `totals`, which valgrind also prints, are not
/// right for system calls.
fn summary(profile: &str) -> Option<(u64, u64)> {
    let of = |key| profile.lines().find_map(|line| line.strip_prefix(key)).map(str::split_whitespace);
    let (events, mut counts) = (of("events: ")?, of("summary: ")?);
    let counts: Vec<(&str, u64)> = events
        .map(|event| Some((event, counts.next().map_or(Ok(0), str::parse).ok()?)))
        .collect::<Option<_>>()?;
    let count = |wanted| Some(counts.iter().find(|(event, _)| *event == wanted)?.1);
    Some((count("Ir")?, count("sysCount")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_understood() {
        assert_eq!(heard(&told(17)), Some((17, machine::level().to_owned())));
        assert_eq!(heard("something else"), None);
    }

    #[test]
    fn the_counts_are_read_from_valgrinds_profile() {
        let profile =
            |summary| format!("version: 1\nevents: Ir sysCount sysTime\n{summary}\n\ntotals: 7 6 5\n");
        assert_eq!(summary(&profile("summary: 2328536 17 123456")), Some((2_328_536, 17)));
        assert_eq!(summary(&profile("summary: 2328536")), Some((2_328_536, 0)));
        assert_eq!(summary(&profile("")), None);
        assert_eq!(summary("events: Ir\nsummary: 1\n"), None);
    }
}
