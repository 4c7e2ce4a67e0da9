//! The steps of the demo, and what is said about each.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nvme_spec::Nsid;

use super::blocks::{self, BLOCK_BYTES};
use super::lab::{Lab, Target, run};
use super::{DemoArgs, DemoDevice};
use crate::cli::map;
use crate::cli::out::Out;
use crate::cli::sys::{StopSignals, Wake};
use crate::config::format_size;
use crate::extent::{RawExtent, survey};
use crate::initiator::bench::{self, BenchOptions, Limit, Verify};
use crate::initiator::controller::{ConnectOptions, Controller, Host};
use crate::units::Lba;

const FILE_BYTES: u64 = 64 << 20;
const CHUNK_BYTES: usize = 1 << 20;
const NQN: &str = "nqn.2026-11.io.fastice:demo";
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How long each of the races takes.
const RACE: Duration = Duration::from_secs(3);
const INTERRUPTED: &str = "interrupted; everything is being cleaned up";

/// One run of the demo.
struct Story<'a> {
    out: &'a mut Out,
    signals: &'a StopSignals,
    step: u32,
    started: Instant,
}

/// Tells the story from its beginning to its end.
pub(super) fn tell(args: &DemoArgs, signals: &StopSignals, out: &mut Out) -> anyhow::Result<()> {
    let mut story = Story { out, signals, step: 0, started: Instant::now() };
    story.step("A filesystem, and a file in many pieces")?;
    let mut lab = Lab::set_up(&args.dir)?;
    lab.write_fragmented(FILE_BYTES)?;
    let before = story.look(&lab)?;

    story.step("Pin it and serve it: `fastice serve` on loopback")?;
    story.say(driver(args.device, lab.loop_device()))?;
    let (mut target, stdout) = Target::start(&lab, NQN, args.device)?;
    let controller = story.connect(&target, stdout)?;

    story.step("How fast: two queues, 32 commands in flight on each")?;
    story.race(controller.options().address)?;

    story.step("Write and verify every block over NVMe/TCP")?;
    let seed = seed();
    story.write_and_verify(&controller, seed)?;

    story.step("Try to break the map while it is served")?;
    story.attack(&lab)?;
    story.verify(&controller, seed, "read again over NVMe/TCP")?;
    controller.shutdown().context("cannot disconnect")?;

    story.step("Let go, and look at the same bytes through the filesystem")?;
    let took = target.stop()?;
    story.say(format!("the target drained, released the file and ended in {:.1} s", took.as_secs_f64()))?;
    let count = lab.recognise(seed, false)?;
    story.say(format!("{count} blocks recognised in the file, by direct I/O"))?;
    let count = lab.recognise(seed, true)?;
    story.say(format!("{count} blocks recognised in the file, through the page cache"))?;
    story.compare(&lab, &before)?;
    run(Command::new("truncate").args(["-s", "4096"]).arg(lab.file()))
        .context("the file is still held after its release")?;
    story.say("$ truncate -s 4096 disk.img: done; it is an ordinary file again")?;
    lab.unmount()?;
    run(Command::new("xfs_repair").arg("-n").arg(lab.image())).context("the filesystem is damaged")?;
    story.say("xfs_repair finds nothing to repair")?;
    drop(lab);
    let seconds = story.started.elapsed().as_secs_f64();
    story.out.line(format!("\nDone in {seconds:.1} s; everything is cleaned up."))?;
    Ok(())
}

/// Which driver moves the data, in words.
fn driver(device: DemoDevice, disk: &str) -> String {
    match device {
        DemoDevice::Nvme => format!(
            "driver: async-nvme, ours, in user space, on an NVMe controller in software over {disk}; XFS stays mounted"
        ),
        DemoDevice::Uring => {
            format!("driver: the kernel's, by io_uring and direct I/O on {disk}; XFS stays mounted")
        }
    }
}

fn options(address: SocketAddr) -> ConnectOptions {
    let mut options = ConnectOptions::new(address, NQN, Host::random());
    options.io_queues = 2;
    options.header_digest = true;
    options.data_digest = true;
    options
}

/// Another pattern in every run, so that old blocks are not taken for new ones.
fn seed() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    since.as_nanos().try_into().unwrap_or(u64::MAX)
}

impl Story<'_> {
    fn step(&mut self, title: &str) -> anyhow::Result<()> {
        self.go_on()?;
        self.step = self.step.saturating_add(1);
        let bold = if self.out.colour() { ("\u{1b}[1m", "\u{1b}[0m") } else { ("", "") };
        self.out.line(format!("\n{}{}. {title}{}", bold.0, self.step, bold.1))?;
        self.out.flush()?;
        Ok(())
    }

    fn say(&mut self, text: impl AsRef<str>) -> anyhow::Result<()> {
        self.out.line(format!("   {}", text.as_ref()))?;
        self.out.flush()?;
        Ok(())
    }

    /// An error when the user asked us to end.
    fn go_on(&self) -> anyhow::Result<()> {
        if self.signals.asked().is_some() {
            bail!(INTERRUPTED);
        }
        Ok(())
    }

    fn look(&mut self, lab: &Lab) -> anyhow::Result<Vec<RawExtent>> {
        let survey = survey(&lab.file())?;
        let size = format_size(survey.facts.size.get());
        self.say(format!("{}: {size} in {} extents on XFS", lab.file().display(), survey.records.len()))?;
        for line in map::picture(&survey.records, self.out.columns().saturating_sub(3), self.out.colour()) {
            self.say(line)?;
        }
        if survey.records.len() < 16 {
            bail!("the filesystem put the file together: only {} extents", survey.records.len());
        }
        Ok(survey.records)
    }

    /// Waits until the target is ready, and connects.
    fn connect(&mut self, target: &Target, stdout: ChildStdout) -> anyhow::Result<Controller> {
        let started = Instant::now();
        match self.signals.wait(&[stdout.as_fd()], Some(READY_WITHIN))? {
            Wake::Readable(_) => {}
            Wake::Asked(_) => bail!(INTERRUPTED),
            Wake::Timeout => bail!("the target was not ready within {} s", READY_WITHIN.as_secs()),
        }
        let address = target.ready_line(stdout)?;
        let took = started.elapsed().as_secs_f64();
        self.say(format!("pinned, frozen, and ready on {address} after {took:.2} s"))?;
        if let Some(proof) = target.proof() {
            self.say(proof)?;
        }
        let options = options(address);
        let controller = Controller::connect(&options).context("cannot connect to the target")?;
        let queues = controller.io_queue_count();
        self.say(format!("our initiator connected to {NQN}: {queues} queues, header and data digests"))?;
        Ok(controller)
    }

    /// Small random blocks, as fast as they go.
    fn race(&mut self, address: SocketAddr) -> anyhow::Result<()> {
        for (name, read_percent) in
            [("random 4 KiB reads", 100), ("random 4 KiB reads and writes, verified", 50)]
        {
            let mut race = BenchOptions::new(options(address), Nsid(1));
            race.queues = 2;
            race.read_percent = read_percent;
            race.limit = Limit::Duration(RACE);
            race.connect.header_digest = false;
            race.connect.data_digest = false;
            if read_percent < 100 {
                race.verify = Verify::OnRead;
            }
            let stop = AtomicBool::new(false);
            let report = bench::run(&race, &stop, |_| {
                if self.signals.asked().is_some() {
                    stop.store(true, Ordering::Relaxed);
                }
            })?;
            if stop.load(Ordering::Relaxed) {
                bail!(INTERRUPTED);
            }
            if !report.is_clean() {
                let first = report.first_error.or_else(|| report.verify.first_faults.first().cloned());
                bail!("{name}: {}", first.unwrap_or_default());
            }
            let iops = report.reads.iops + report.writes.iops;
            #[expect(clippy::cast_precision_loss, reason = "for people")]
            let p99 = report.reads.latency.p99_ns as f64 / 1e3;
            let checked = match report.verify.blocks_checked {
                0 => String::new(),
                blocks => format!(", {blocks} blocks verified"),
            };
            self.say(format!("{name}: {iops:.0} IOPS, reads p99 {p99:.0} us{checked}"))?;
        }
        Ok(())
    }

    fn write_and_verify(&mut self, controller: &Controller, seed: u64) -> anyhow::Result<()> {
        let namespace = controller.namespace(Nsid(1))?;
        let (blocks, size) = (namespace.blocks().get(), namespace.block_size().bytes());
        if size as usize != BLOCK_BYTES || blocks != FILE_BYTES / BLOCK_BYTES as u64 {
            bail!("the namespace has {blocks} blocks of {size}: not the size of the file");
        }
        let mut chunk = vec![0; CHUNK_BYTES];
        let started = Instant::now();
        for at in (0..blocks).step_by(CHUNK_BYTES / BLOCK_BYTES) {
            self.go_on()?;
            blocks::fill(&mut chunk, seed, at);
            namespace.write(Lba(at), &chunk, false)?;
        }
        namespace.flush()?;
        self.rate("written and flushed", started.elapsed())?;
        self.verify(controller, seed, "read and verified")
    }

    fn verify(&mut self, controller: &Controller, seed: u64, what: &str) -> anyhow::Result<()> {
        let namespace = controller.namespace(Nsid(1))?;
        let mut chunk = vec![0; CHUNK_BYTES];
        let started = Instant::now();
        for at in (0..namespace.blocks().get()).step_by(CHUNK_BYTES / BLOCK_BYTES) {
            self.go_on()?;
            namespace.read(Lba(at), &mut chunk)?;
            if let Some(wrong) = blocks::first_wrong(&chunk, seed, at) {
                bail!("block {wrong} read over the network is not what was written");
            }
        }
        self.rate(what, started.elapsed())
    }

    fn rate(&mut self, what: &str, took: Duration) -> anyhow::Result<()> {
        let seconds = took.as_secs_f64().max(1e-6);
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let rate = FILE_BYTES as f64 / f64::from(1 << 20) / seconds;
        self.say(format!("{}: {what} in {seconds:.2} s, {rate:.0} MiB/s", format_size(FILE_BYTES)))
    }

    /// Everything that would change the map, tried by root. All must be refused.
    fn attack(&mut self, lab: &Lab) -> anyhow::Result<()> {
        const ATTACKS: [&[&str]; 7] = [
            &["truncate", "-s", "4096", "disk.img"],
            &["fallocate", "--punch-hole", "--offset", "0", "--length", "1MiB", "disk.img"],
            &["dd", "if=/dev/zero", "of=disk.img", "bs=4k", "count=1", "conv=notrunc"],
            &["cp", "--reflink=always", "disk.img", "copy.img"],
            &["chattr", "-i", "disk.img"],
            &["mv", "disk.img", "moved.img"],
            &["rm", "-f", "disk.img"],
        ];
        for attack in ATTACKS {
            self.go_on()?;
            let [program, arguments @ ..] = attack else { continue };
            let output = Command::new(program)
                .args(arguments)
                .current_dir(lab.mount_point())
                .env("LC_ALL", "C")
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot run {program}"))?;
            let line = attack.join(" ");
            if output.status.success() {
                bail!("`{line}` was not refused");
            }
            let words = String::from_utf8_lossy(&output.stderr);
            let why = words.lines().next().and_then(|line| line.rsplit(": ").next()).unwrap_or("refused");
            self.say(format!("$ {line:<68} {why}"))?;
        }
        Ok(())
    }

    /// The map is still the one of the beginning.
    fn compare(&mut self, lab: &Lab, before: &[RawExtent]) -> anyhow::Result<()> {
        let after = survey(&lab.file())?.records;
        if after != before {
            bail!("the extent map is not the one of the beginning");
        }
        self.say(format!("all {} extents lie where they lay before", after.len()))
    }
}
