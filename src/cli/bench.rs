//! `fastice bench`: how fast a namespace is, and whether it gives back what was written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};
use nvme_spec::Nsid;

use super::exit::{Exit, Failure, Outcome};
use super::out::{JsonFlag, Out};
use super::peer::{HostArgs, PORT_IO, resolve};
use super::progress::{Progress, Unit};
use super::sys::StopSignals;
use crate::config::{Nqn, SizeError, parse_size};
use crate::initiator::bench::{self, BenchOptions, BenchReport, DirectionReport, Limit, Pattern, Verify};
use crate::initiator::controller::ConnectOptions;
use crate::units::{ByteLen, ByteOffset};

/// Load a namespace with reads and writes, by our own initiator
///
/// Needs no kernel module and no privilege. WRITES DESTROY what the namespace holds. With --verify every block
/// written says what it is, and a read that gives another block ends with exit status 4.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Address of the target, with or without port [default port: 4420]
    #[arg(long, visible_alias = "addr", value_name = "ADDRESS")]
    pub address: String,
    /// The subsystem
    #[arg(long, value_name = "NQN")]
    pub nqn: Nqn,
    /// The namespace
    #[arg(long, default_value_t = 1, value_name = "NSID", value_parser = clap::value_parser!(u32).range(1..=0xFFFF_FFFE))]
    pub nsid: u32,
    /// What to do
    #[arg(long, value_enum, default_value_t = Workload::Randread)]
    pub rw: Workload,
    /// Percent of reads, for rw and randrw
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(1..=99))]
    pub rwmix: u8,
    /// Bytes of each read or write
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = size)]
    pub bs: ByteLen,
    /// Commands in flight on each queue
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub iodepth: u16,
    /// Queues, each with a thread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: u16,
    /// Seconds to run
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub runtime: u64,
    /// End after this many bytes instead of a time
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "runtime")]
    pub bytes: Option<ByteLen>,
    /// How much of the namespace to use [default: all behind the offset]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub size: Option<ByteLen>,
    /// Where on the namespace to begin
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size)]
    pub offset: ByteLen,
    /// Check the data: what was written is read back, and with mixed loads every read is checked
    #[arg(long)]
    pub verify: bool,
    /// Makes a run repeatable: the order of blocks and their content
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write with Force Unit Access
    #[arg(long)]
    pub fua: bool,
    /// A Flush after so many writes of a queue; 0 for none
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub flush_every: u32,
    /// When the connection breaks, try for so long to connect again
    #[arg(long, value_name = "SECONDS")]
    pub reconnect: Option<u64>,
    /// Header digests
    #[arg(long)]
    pub hdr_digest: bool,
    /// Data digests
    #[arg(long)]
    pub data_digest: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub host: HostArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub json: JsonFlag,
}

/// Workloads, by the names of fio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
    /// Random reads
    Randread,
    /// Random writes
    Randwrite,
    /// Sequential reads and writes
    Rw,
    /// Random reads and writes
    Randrw,
}

impl Workload {
    const fn pattern(self) -> Pattern {
        match self {
            Self::Read | Self::Write | Self::Rw => Pattern::Sequential,
            Self::Randread | Self::Randwrite | Self::Randrw => Pattern::Random,
        }
    }

    const fn read_percent(self, mix: u8) -> u8 {
        match self {
            Self::Read | Self::Randread => 100,
            Self::Write | Self::Randwrite => 0,
            Self::Rw | Self::Randrw => mix,
        }
    }
}

fn size(text: &str) -> Result<ByteLen, SizeError> {
    parse_size(text)
}

/// Runs the load and prints the report.
///
/// # Errors
/// When the target cannot be reached, or the options do not fit it.
pub fn run(args: &BenchArgs) -> Outcome {
    let options = options(args)?;
    // Before any thread starts. Ctrl-C ends the load, not the report.
    let signals = StopSignals::take()?;
    let stop = AtomicBool::new(false);
    let total = args.bytes.map_or(args.runtime, ByteLen::get);
    let unit = if args.bytes.is_some() { Unit::Bytes } else { Unit::Seconds };
    let bar = Progress::start("running", total, unit, args.json.json);
    let report = bench::run(&options, &stop, |progress| {
        if signals.asked().is_some() {
            stop.store(true, Ordering::Relaxed);
        }
        let commands = progress.reads.saturating_add(progress.writes);
        let bytes = commands.saturating_mul(u64::from(progress.unit_len));
        bar.set(if args.bytes.is_some() { bytes } else { progress.elapsed.as_secs() });
    })?;
    bar.finish();
    let mut out = Out::stdout();
    if args.json.json {
        out.json(&report)?;
    } else {
        print(&report, &mut out)?;
    }
    out.flush()?;
    Ok(match (report.verify.faults, report.errors) {
        (0, 0) => Exit::Ok,
        (0, _) => Exit::Failed,
        _ => Exit::Differs,
    })
}

fn options(args: &BenchArgs) -> Result<BenchOptions, Failure> {
    let usage = |text: &str| Failure::new(Exit::Usage, anyhow::anyhow!("{text}"));
    let mut connect =
        ConnectOptions::new(resolve(&args.address, PORT_IO)?, args.nqn.as_str(), args.host.host());
    connect.header_digest = args.hdr_digest;
    connect.data_digest = args.data_digest;
    let read_percent = args.rw.read_percent(args.rwmix);
    let verify = match (args.verify, read_percent) {
        (false, _) => Verify::Off,
        (true, 0) => Verify::AfterWrites,
        (true, 100) => {
            return Err(usage("--verify checks what the same run wrote: use it with a load that writes"));
        }
        (true, _) => Verify::OnRead,
    };
    if read_percent == 100 && (args.fua || args.flush_every > 0) {
        return Err(usage("--fua and --flush-every need a load that writes"));
    }
    Ok(BenchOptions {
        connect,
        nsid: Nsid(args.nsid),
        pattern: args.rw.pattern(),
        read_percent,
        unit_len: u32::try_from(args.bs.get()).map_err(|_| usage("--bs is too large"))?,
        depth: args.iodepth,
        queues: args.queues,
        limit: args.bytes.map_or(Limit::Duration(Duration::from_secs(args.runtime)), Limit::Bytes),
        start: ByteOffset(args.offset.get()),
        span: args.size,
        seed: args.seed,
        verify,
        fua: args.fua,
        flush_interval: args.flush_every,
        reconnect: args.reconnect.map(Duration::from_secs),
    })
}

fn print(report: &BenchReport, out: &mut Out) -> std::io::Result<()> {
    let (queues, depth, elapsed) = (report.queues, report.depth, report.elapsed_s);
    out.line(format!(
        "{queues} queue(s), {depth} in flight on each, {} bytes, {elapsed:.1} s",
        report.unit_len
    ))?;
    let lines = [("read", &report.reads), ("write", &report.writes)];
    let rows: Vec<_> =
        lines.iter().filter(|(_, one)| one.commands > 0).map(|(name, one)| row(name, one)).collect();
    if !rows.is_empty() {
        out.table(
            ["", "IOPS ", "MiB/s ", "mean us ", "p50 ", "p90 ", "p99 ", "p99.9 ", "p99.99 ", "max "],
            &rows,
        )?;
    }
    if report.flushes > 0 {
        out.line(format!("{} flushes", report.flushes))?;
    }
    if report.reconnects > 0 {
        out.line(format!("connected anew {} time(s)", report.reconnects))?;
    }
    if report.errors > 0 {
        let first = report.first_error.as_deref().unwrap_or_default();
        out.line(format!("{} COMMANDS FAILED, first: {first}", report.errors))?;
    }
    let verify = &report.verify;
    if report.verify_mode != Verify::Off {
        let doubt = match verify.units_in_doubt {
            0 => String::new(),
            units => format!(", {units} could hold either of two writes"),
        };
        out.line(format!("verified: {} blocks, {} faults{doubt}", verify.blocks_checked, verify.faults))?;
        for fault in &verify.first_faults {
            out.line(format!("  {fault}"))?;
        }
    }
    Ok(())
}

fn row(name: &str, one: &DirectionReport) -> [String; 10] {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let us = |ns: u64| format!("{:.0}", ns as f64 / 1e3);
    let latency = &one.latency;
    [
        name.to_owned(),
        format!("{:.0}", one.iops),
        format!("{:.1}", one.bytes_per_s / f64::from(1 << 20)),
        format!("{:.0}", latency.mean_ns / 1e3),
        us(latency.p50_ns),
        us(latency.p90_ns),
        us(latency.p99_ns),
        us(latency.p999_ns),
        us(latency.p9999_ns),
        us(latency.max_ns),
    ]
}
