//! SPDK's own initiator, `spdk_nvme_perf`, as the host in place of the light one: a whole driver, on the last processor, polling.
//!
//! It measures by itself, in whole seconds, and prints what it got. What it does before and after is not measured by it; the
//! target's account of its processor has that too: some fifty commands in a hundred thousand.

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::NQN;
use super::cases::Case;
use super::daemon::on_path;
use super::work::Kind;
use crate::server::both_ends;

/// What rows call it.
pub(super) const NAME: &str = "SPDK's spdk_nvme_perf";
/// Where the program is, when it is not found by `PATH`.
const PROGRAM: &str = "FASTICE_BENCH_SPDK_NVME_PERF";
/// Beyond the time of its measurement.
const PATIENCE: Duration = Duration::from_secs(20);
const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6e1f9d0a-4a3b-4c5e-9d7f-2b8c1a0e3f55";

/// A program that was found.
#[derive(Clone, Debug)]
pub(super) struct Perf {
    program: PathBuf,
}

/// What it printed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Told {
    pub(super) iops: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

impl Perf {
    /// Finds it; the error says why not.
    pub(super) fn find() -> Result<Self> {
        let program = match env::var_os(PROGRAM) {
            Some(program) => PathBuf::from(program),
            None => on_path("spdk_nvme_perf")
                .with_context(|| format!("it is not on PATH, nor named by {PROGRAM}"))?,
        };
        ensure!(program.is_file(), "{} is no program", program.display());
        Ok(Self { program })
    }

    /// For how long it measures, when it is asked for so much: whole seconds.
    pub(super) fn time(asked: Duration) -> Duration {
        Duration::from_secs(asked.as_secs().max(1))
    }

    /// Loads the target at `address`; what it got, and how much processor time it took.
    pub(super) fn measure(
        &self,
        address: SocketAddr,
        case: &Case,
        time: Duration,
    ) -> Result<(Told, Duration)> {
        let (_, [_, last]) = both_ends()?;
        let mut command = Command::new(&self.program);
        command.args(arguments(address, case, last, Self::time(time)));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (stat, begun) = (format!("/proc/{}/schedstat", child.id()), Instant::now());
        let mut ran = Duration::ZERO;
        // It says less than a pipe holds: what it says can be read when it has ended.
        while child.try_wait()?.is_none() {
            ran = ran_so_far(&stat).unwrap_or(ran);
            if begun.elapsed() > time + PATIENCE {
                child.kill()?;
                child.wait()?;
                bail!("{NAME} does not end");
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        let output = child.wait_with_output()?;
        let (text, error) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let told = parse(&text).filter(|_| output.status.success());
        let told = told.with_context(|| format!("{command:?}: {}: {text}{error}", output.status))?;
        Ok((told, ran))
    }
}

/// The processor time of its first thread, which is the one that polls, by `schedstat` (`proc(5)`).
fn ran_so_far(stat: &str) -> Option<Duration> {
    fs::read_to_string(stat).ok()?.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

fn arguments(address: SocketAddr, case: &Case, processor: usize, time: Duration) -> Vec<String> {
    let target = format!(
        "trtype:TCP adrfam:IPv4 traddr:{} trsvcid:{} hostnqn:{HOST_NQN} subnqn:{NQN}",
        address.ip(),
        address.port()
    );
    let mut arguments: Vec<String> = ["--no-huge", "-s", "512", "-L"].map(str::to_owned).into();
    let pattern = match case.work.kind {
        Kind::Read => "randread",
        Kind::Write => "randwrite",
        Kind::Mixed => "randrw",
    };
    let each = [
        ("-c", format!("{:#x}", 1_u64 << processor)),
        ("-q", case.depth.to_string()),
        ("-o", case.work.len.to_string()),
        ("-t", time.as_secs().to_string()),
        ("-P", case.connections.to_string()),
        ("-w", pattern.to_owned()),
        ("-r", target),
    ];
    arguments.extend(each.into_iter().flat_map(|(option, value)| [option.to_owned(), value]));
    if case.work.kind == Kind::Mixed {
        arguments.extend(["-M", "70"].map(str::to_owned));
    }
    if case.work.digests {
        arguments.extend(["-H", "-I"].map(str::to_owned));
    }
    arguments
}

/// The totals, and the latencies of half and of 99 of 100 commands.
fn parse(text: &str) -> Option<Told> {
    let total = text.lines().find(|line| line.starts_with("Total"))?;
    let iops = total.split_once(':')?.1.split_whitespace().next()?.parse().ok()?;
    let latency = |part: &str| -> Option<f64> {
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix(part))?;
        line.trim_start_matches([' ', ':']).strip_suffix("us")?.parse().ok()
    };
    Some(Told { iops, p50_us: latency("50.00000%")?, p99_us: latency("99.00000%")? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Served;
    use crate::target::work::Work;

    const TEXT: &str = "\
Initialization complete. Launching workers.
========================================================
Device Information                       :       IOPS      MiB/s    Average        min        max
TCP (addr:127.0.0.1 subnqn:nqn) NSID 1 from core  1:  568466.43    2220.57      56.27      27.22    5924.51
========================================================
Total                                    :  568466.43    2220.57      56.27      27.22    5924.51

Summary latency data for TCP (addr:127.0.0.1 subnqn:nqn) NSID 1 from core 1:
=================================================================================
 25.00000% :    48.121us
 50.00000% :    54.432us
 99.00000% :   112.020us
 99.50000% :   130.164us
";

    #[test]
    fn what_it_prints_is_read() {
        let told = Told { iops: 568_466.43, p50_us: 54.432, p99_us: 112.02 };
        assert_eq!(parse(TEXT), Some(told));
        assert_eq!(parse("No valid NVMe controllers found"), None);
        assert_eq!(parse(&TEXT.replace("99.00000%", "98.00000%")), None);
    }

    #[test]
    fn it_is_told_to_do_what_the_light_host_does() {
        let work = Work { digests: true, ..Work::small(Kind::Mixed) };
        let case = Case::new(Served::Null, work, 1, 32);
        let address = "127.0.0.1:4420".parse().unwrap();
        let told = arguments(address, &case, 3, Duration::from_secs(2)).join(" ");
        for part in [
            "-c 0x8",
            "-q 32",
            "-o 4096",
            "-t 2",
            "-w randrw",
            "-M 70",
            "-H",
            "-I",
            "trsvcid:4420",
            "hostnqn:nqn.",
        ] {
            assert!(told.contains(part), "{part} is missing from {told}");
        }
    }
}
