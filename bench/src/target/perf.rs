//! SPDK's own initiator, `spdk_nvme_perf`, as the host in place of the light one: a whole driver, on the last processor, polling.
//!
//! It measures by itself, in whole seconds, and prints what it got. What it does before and after is not measured by it; the
//! target's account of its processor has that too: some fifty commands in a hundred thousand. To let 256 connections join and
//! leave takes some 30 ms of our target and 130 ms of SPDK's, so with many that account tells little of a command, and is left out.
//!
//! ```text
//!   -P 64 -q 256 -r HOST 1 -r HOST 2 -r HOST 3 -r HOST 4      256 connections, 4 commands on each: 64 queue pairs a host
//! ```
//!
//! Its `-q` is no depth of a queue pair: so many commands it keeps in flight on all `-P` queue pairs of a controller together, and the
//! next one goes to the next queue pair in turn, wherever one completed (`submit_io` and `nvme_submit_io` in its perf.c). So it is
//! given the commands of all of them, and a connection has its depth on average, where the light host has it always. What a single
//! connection got it does not tell.

use std::env;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
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
/// Without its last four digits, which are the host's number.
const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6e1f9d0a-4a3b-4c5e-9d7f-2b8c1a0e";
/// I/O queues of one controller, at most: what fastice gives, where SPDK's target gives 127. More connections are those of several
/// hosts. A program that is given fewer than it asks for fails, and says so.
const QUEUES_MAX: u16 = 64;

/// A program that was found.
#[derive(Clone, Debug)]
pub(super) struct Perf {
    pub(super) program: PathBuf,
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
        // Files, for it says more than a pipe holds: an error for each connection that it ends itself, and histograms.
        let (out, error) = (tempfile::tempfile()?, tempfile::tempfile()?);
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(error.try_clone()?);
        let mut child = command.process_group(0).spawn()?;
        let (stat, begun) = (format!("/proc/{}/schedstat", child.id()), Instant::now());
        let mut ran = Duration::ZERO;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            ran = ran_so_far(&stat).unwrap_or(ran);
            if begun.elapsed() > time + PATIENCE {
                child.kill()?;
                child.wait()?;
                bail!("{NAME} does not end");
            }
            std::thread::sleep(Duration::from_millis(25));
        };
        let (text, error) = (said(out)?, said(error)?);
        let (hosts, _) = hosts_and_queues(case.connections);
        let told = parse(&text, hosts).filter(|_| status.success());
        let told = told.with_context(|| format!("{command:?}: {status}: {text}{error}"))?;
        Ok((told, ran))
    }
}

/// What a program that has ended wrote into this file.
fn said(mut file: File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// How many hosts, and queue pairs of each: as few hosts as there can be, all with as many.
fn hosts_and_queues(connections: u16) -> (u16, u16) {
    let fits = |hosts: &u16| connections.is_multiple_of(*hosts) && connections / hosts <= QUEUES_MAX;
    let hosts = (1..=connections).find(fits).unwrap_or(1);
    (hosts, connections / hosts)
}

/// The processor time of its first thread, which is the one that polls, by `schedstat` (`proc(5)`).
fn ran_so_far(stat: &str) -> Option<Duration> {
    fs::read_to_string(stat).ok()?.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

fn arguments(address: SocketAddr, case: &Case, processor: usize, time: Duration) -> Vec<String> {
    let (hosts, queues) = hosts_and_queues(case.connections);
    // Each with a name of its own: one that has joined under the same name would be given its controller again.
    let targets = (1..=hosts).flat_map(|host| {
        let (ip, port) = (address.ip(), address.port());
        let target = format!(
            "trtype:TCP adrfam:IPv4 traddr:{ip} trsvcid:{port} hostnqn:{HOST_NQN}{host:04x} subnqn:{NQN}"
        );
        ["-r".to_owned(), target]
    });
    let mut arguments: Vec<String> = ["--no-huge", "-s", "512", "-LL"].map(str::to_owned).into();
    let pattern = match case.work.kind {
        Kind::Read => "randread",
        Kind::Write => "randwrite",
        Kind::Mixed => "randrw",
    };
    let each = [
        ("-c", format!("{:#x}", 1_u64 << processor)),
        ("-q", (u32::from(case.depth) * u32::from(queues)).to_string()),
        ("-o", case.work.len.to_string()),
        ("-t", time.as_secs().to_string()),
        ("-P", queues.to_string()),
        ("-w", pattern.to_owned()),
    ];
    arguments.extend(each.into_iter().flat_map(|(option, value)| [option.to_owned(), value]));
    arguments.extend(targets);
    if case.work.kind == Kind::Mixed {
        arguments.extend(["-M", "70"].map(str::to_owned));
    }
    if case.work.digests {
        arguments.extend(["-H", "-I"].map(str::to_owned));
    }
    arguments
}

/// The totals, and the latencies of half and of 99 of 100 commands. It sums up latencies of each controller alone, so these are
/// of all histograms together. None where it does not tell of so many controllers.
fn parse(text: &str, controllers: u16) -> Option<Told> {
    let total = text.lines().find(|line| line.starts_with("Total"))?;
    let iops = total.split_once(':')?.1.split_whitespace().next()?.parse().ok()?;
    let histograms = text.lines().filter(|line| line.starts_with("Latency histogram for")).count();
    if histograms != usize::from(controllers) {
        return None;
    }
    let mut buckets: Vec<_> = text.lines().filter_map(bucket).collect();
    buckets.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    let all = buckets.iter().map(|(_, count)| count).sum::<u64>() as f64;
    let latency = |part: f64| {
        let mut so_far = 0;
        let mut up_to = buckets.iter().map(|(end, count)| {
            so_far += count;
            (*end, so_far as f64)
        });
        up_to.find(|(_, so_far)| *so_far >= part * all).map(|(end, _)| end)
    };
    Some(Told { iops, p50_us: latency(0.5)?, p99_us: latency(0.99)? })
}

/// A line of a histogram, `54.310 - 54.432: 50.0012% ( 5172)`: where it ends, in microseconds, and how many commands it has.
fn bucket(line: &str) -> Option<(f64, u64)> {
    let (range, rest) = line.split_once(':')?;
    let (_, end) = range.split_once(" - ")?;
    let (_, count) = rest.strip_suffix(')')?.split_once('(')?;
    Some((end.trim().parse().ok()?, count.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

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

Latency histogram for TCP (addr:127.0.0.1 subnqn:nqn) NSID 1 from core 1:
==============================================================================
       Range in us     Cumulative    IO count
   27.216 -    27.338:   25.0000%  (       50)
   54.310 -    54.432:   98.0000%  (      146)
  111.776 -   112.020:  100.0000%  (        4)

";

    #[test]
    fn what_it_prints_is_read() {
        let told = Told { iops: 568_466.43, p50_us: 54.432, p99_us: 112.02 };
        assert_eq!(parse(TEXT, 1), Some(told));
        assert_eq!(parse("No valid NVMe controllers found", 1), None);
        assert_eq!(parse(TEXT, 2), None);
        assert_eq!(parse(&TEXT.replace("Latency histogram", "No histogram"), 1), None);
    }

    #[test]
    fn latencies_are_those_of_all_controllers() {
        // Another one whose commands all took longer: half of all commands are those of the first.
        let other = "\
Latency histogram for TCP (addr:127.0.0.1 subnqn:nqn) NSID 1 from core 1:
  130.000 -   130.164:   99.0000%  (      198)
 1300.000 -  1301.000:  100.0000%  (        2)
";
        let told = parse(&format!("{TEXT}{other}"), 2).unwrap();
        assert_eq!((told.p50_us, told.p99_us), (112.02, 130.164));
    }

    #[test]
    fn each_connection_has_its_depth_and_no_controller_more_queues_than_there_are() {
        assert_eq!([1, 64, 65, 256].map(hosts_and_queues), [(1, 1), (1, 64), (5, 13), (4, 64)]);
        let address = "127.0.0.1:4420".parse().unwrap();
        for (connections, hosts) in [(64, 1), (256, 4)] {
            let case = Case::new(Served::Null, Work::small(Kind::Read), connections, 4);
            let told = arguments(address, &case, 1, Duration::from_secs(1));
            let text = told.join(" ");
            assert!(text.contains("-q 256 ") && text.contains("-P 64 "), "{text}");
            let targets: HashSet<_> = told.iter().filter(|part| part.starts_with("trtype:TCP")).collect();
            assert_eq!(targets.len(), hosts, "{text}");
        }
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
