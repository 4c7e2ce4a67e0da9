//! Where a target's core is, by samples of its call chains: `perf record` while a host keeps it busy, and which part of the samples
//! each place has.
//!
//! Places are told by the names of functions: of the kernel by any of the chain, for receiving and sending call the same code; of
//! fastice by the innermost one. What the compiler put into another function counts as that one. Samples are of a clock, for
//! virtual machines show no counters of the processor.
//!
//! What it does not do: install perf, or say anything where it is missing.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::daemon::version_of;

/// Samples a second.
const RATE: &str = "1999";
/// Fewer say nothing.
const SAMPLES_MIN: usize = 100;

/// Where a core may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the kernel, to receive.
    KernelReceive,
    /// In the kernel, to send; on loopback also what the other end has of it.
    KernelSend,
    /// In the kernel, for anything else.
    KernelElse,
    /// In PDUs and connections.
    Parse,
    /// In what commands mean.
    Command,
    /// In maps.
    Lookup,
    /// Between all these: the loop, the ring, the engine.
    Queue,
    /// In the device, and in what copies and clears.
    Device,
    /// Elsewhere in the process, the clock among it.
    Else,
}

impl Place {
    pub(super) const ALL: [Self; 9] = [
        Self::KernelReceive,
        Self::KernelSend,
        Self::KernelElse,
        Self::Parse,
        Self::Command,
        Self::Lookup,
        Self::Queue,
        Self::Device,
        Self::Else,
    ];

    /// In names of rows.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::KernelReceive => "kernel-receive",
            Self::KernelSend => "kernel-send",
            Self::KernelElse => "kernel-else",
            Self::Parse => "parse",
            Self::Command => "command",
            Self::Lookup => "lookup",
            Self::Queue => "queue",
            Self::Device => "device",
            Self::Else => "else",
        }
    }

    pub(super) const fn is_kernel(self) -> bool {
        matches!(self, Self::KernelReceive | Self::KernelSend | Self::KernelElse)
    }

    /// Of a call chain, the innermost function first, each with whether it is the kernel's.
    fn of(chain: &[(&str, bool)]) -> Self {
        const RECEIVE: [&str; 4] = ["tcp_recvmsg", "inet_recvmsg", "sock_recvmsg", "io_recv"];
        const SEND: [&str; 4] = ["tcp_sendmsg", "inet_sendmsg", "sock_sendmsg", "io_send"];
        const OURS: [(&str, Place); 8] = [
            ("fastice::tcp", Place::Parse),
            ("fastice::fabrics", Place::Command),
            ("fastice::extent", Place::Lookup),
            ("fastice::block", Place::Device),
            ("fastice::reactor", Place::Queue),
            ("fastice::ring", Place::Queue),
            ("io_uring::", Place::Queue),
            ("hugepage_alloc::", Place::Queue),
        ];
        let Some(&(innermost, in_kernel)) = chain.first() else { return Self::Else };
        if in_kernel {
            let has = |names: &[&str]| {
                chain.iter().any(|(name, _)| names.iter().any(|part| name.starts_with(part)))
            };
            return match (has(&RECEIVE), has(&SEND)) {
                (_, true) => Self::KernelSend,
                (true, false) => Self::KernelReceive,
                (false, false) => Self::KernelElse,
            };
        }
        if let Some((_, place)) = OURS.iter().find(|(part, _)| innermost.contains(part)) {
            return *place;
        }
        // The C library's memset, memcpy and the like, by whatever name it chose for this processor.
        if innermost.trim_start_matches('_').starts_with("mem") { Self::Device } else { Self::Else }
    }
}

/// The parts of the samples that the places of [`Place::ALL`] have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Parts(pub(super) [f64; Place::ALL.len()]);

/// A recording under way.
#[derive(Debug)]
pub(super) struct Recording {
    child: std::process::Child,
    directory: tempfile::TempDir,
}

impl Recording {
    /// Whether it can be done here.
    pub(super) fn is_possible() -> Result<()> {
        version_of(Path::new("perf")).map(drop)
    }

    /// Begins one of a process, which ends by itself.
    pub(super) fn begin(pid: u32, time: Duration) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (pid, seconds) = (pid.to_string(), time.as_secs_f64().to_string());
        let mut command = Command::new("perf");
        command.args(["record", "-q", "-e", "cpu-clock", "-F", RATE, "-g", "-p", &pid, "-o"]);
        command.arg(directory.path().join("data")).args(["--", "sleep", &seconds]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.process_group(0).spawn()?;
        Ok(Self { child, directory })
    }

    /// What it came to; the error says why to nothing.
    pub(super) fn end(self) -> Result<Parts> {
        let output = self.child.wait_with_output()?;
        ensure!(output.status.success(), "perf record: {}", String::from_utf8_lossy(&output.stderr).trim());
        parts(&script(&self.directory.path().join("data"))?)
    }
}

fn script(data: &Path) -> Result<String> {
    let mut command = Command::new("perf");
    let output = command.args(["script", "--no-inline", "-F", "ip,sym,dso", "-i"]).arg(data).output()?;
    ensure!(output.status.success(), "perf script: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Of what `perf script` prints: a paragraph a sample, a line a function, its address, name and file.
fn parts(text: &str) -> Result<Parts> {
    let mut counts = [0_usize; Place::ALL.len()];
    for sample in text.split("\n\n") {
        let chain: Vec<_> = sample.lines().filter_map(function).collect();
        let place = Place::of(&chain);
        let at = Place::ALL.iter().position(|other| *other == place).filter(|_| !chain.is_empty());
        if let Some(count) = at.and_then(|at| counts.get_mut(at)) {
            *count += 1;
        }
    }
    let all: usize = counts.iter().sum();
    ensure!(all >= SAMPLES_MIN, "{all} samples are too few");
    Ok(Parts(counts.map(|count| count as f64 / all as f64)))
}

/// Of a line, the function's name, and whether it is the kernel's.
fn function(line: &str) -> Option<(&str, bool)> {
    let (address, rest) = line.trim().split_once(' ')?;
    let (name, file) = rest.rsplit_once(" (")?;
    let file = file.trim_end_matches(')');
    let in_upper_half = u64::from_str_radix(address, 16).is_ok_and(|address| address >> 63 == 1);
    Some((name, file.starts_with("[kernel") || in_upper_half))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLES: [(&str, Place); 6] = [
        (
            "ffffffff81a31aa4 rep_movs_alternative ([kernel.kallsyms])\nffffffff81cd65e1 tcp_recvmsg_locked ([kernel.kallsyms])\n",
            Place::KernelReceive,
        ),
        (
            "ffffffff81a31aa4 __pskb_copy ([kernel.kallsyms])\nffffffff81cd65e1 tcp_rcv_established ([kernel.kallsyms])\n\
             ffffffff81cd65e1 tcp_sendmsg ([kernel.kallsyms])\n",
            Place::KernelSend,
        ),
        (
            "ffffffff81a31aa4 entry_SYSCALL_64 ([kernel.kallsyms])\n     55d0a0 main (/x/fastice)\n",
            Place::KernelElse,
        ),
        (
            "     55d0a0 <fastice::tcp::conn::Connection as fastice::reactor::Connection>::event (/x/fastice)\n",
            Place::Parse,
        ),
        ("     55d0a0 fastice::reactor::core::Core::step (/x/fastice)\n", Place::Queue),
        ("     7f00a0 __memset_avx2_unaligned_erms (/lib/libc.so.6)\n", Place::Device),
    ];

    #[test]
    fn a_sample_is_where_its_functions_say() {
        for (text, place) in SAMPLES {
            let chain: Vec<_> = text.lines().filter_map(function).collect();
            assert_eq!(Place::of(&chain), place, "{text}");
        }
    }

    #[test]
    fn parts_are_of_all_samples_and_few_samples_tell_nothing() {
        let text = |count| SAMPLES.map(|(text, _)| format!("\n{text}\n").repeat(count)).concat();
        let Parts(parts) = parts(&text(20)).unwrap();
        assert!((parts.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!((parts[0] - 1.0 / 6.0).abs() < 1e-9, "{parts:?}");
        assert!(super::parts(&text(1)).is_err());
    }
}
