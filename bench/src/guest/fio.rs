//! One run of fio, and how busy the machine was for it.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Round, WARM_UP};
use crate::profiles::windows::Begun;
use crate::rest;

/// What is measured.
const JOB: &str = include_str!("../../fio/guest/4k-randread.fio");
/// For fio to begin.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks whether it has.
const LOOK: Duration = Duration::from_millis(20);
/// Reads by which it has: it looks at the disk itself before.
const BEGUN: f64 = 200.0;

/// 4 KiB random reads of a part of a disk.
#[derive(Debug)]
pub(super) struct Job<'d> {
    /// What profiles call the target.
    pub(super) side: &'d str,
    pub(super) disk: &'d Path,
    /// Begin and length of the part, in bytes.
    pub(super) part: (u64, u64),
    /// Commands in flight.
    pub(super) depth: u16,
    /// Where it runs.
    pub(super) cpu: usize,
    /// How long it is measured.
    pub(super) time: Duration,
}

impl Job<'_> {
    /// What the job file leaves open.
    fn variables(&self) -> [(&'static str, String); 7] {
        let (offset, len) = self.part;
        [
            ("DEVICE", self.disk.display().to_string()),
            ("OFFSET", offset.to_string()),
            ("SIZE", len.to_string()),
            ("DEPTH", self.depth.to_string()),
            ("CPU", self.cpu.to_string()),
            ("RAMP", format!("{}ms", WARM_UP.as_millis())),
            ("TIME", format!("{}ms", self.time.as_millis())),
        ]
    }

    /// Runs it. The processors' time is looked at twice meanwhile, some time after it began and before it ends.
    pub(super) fn run(&self) -> Result<Round> {
        let idle = self.reads()?;
        let mut file = tempfile::Builder::new().suffix(".fio").tempfile().context("a file for the job")?;
        file.write_all(JOB.as_bytes()).context("the file of the job")?;
        let mut fio = Command::new("fio");
        fio.arg("--output-format=json").arg(file.path()).envs(self.variables());
        let fio = fio.stdout(Stdio::piped()).spawn().context("fio cannot be started")?;
        // From here on the child is waited for: what fails in between is told after it.
        let seen = self.watch(idle);
        let output = fio.wait_with_output()?;
        ensure!(output.status.success(), "fio ended with {}", output.status);
        let iops = iops(&String::from_utf8_lossy(&output.stdout))?;
        let (busy_us, count) = seen?;
        Ok(Round { iops, cpu_us: busy_us / count })
    }

    /// Microseconds of processors and commands between two looks, both while it is measured.
    fn watch(&self, idle: f64) -> Result<(f64, f64)> {
        let begun = Instant::now();
        // It takes seconds to begin where everything is emulated, and the machine is busy.
        while self.reads()? < idle + BEGUN {
            ensure!(begun.elapsed() < PATIENCE, "fio reads nothing");
            thread::sleep(LOOK);
        }
        thread::sleep(WARM_UP);
        let (window, watch) = (Begun::now(), Instant::now());
        let before = (rest::busy_us()?, self.reads()?);
        thread::sleep(self.time / 2);
        let after = (rest::busy_us()?, self.reads()?);
        ensure!(after.1 > before.1, "the disk did no reads");
        window.end(self.side, (after.1 - before.1) / watch.elapsed().as_secs_f64(), None)?;
        Ok((after.0 - before.0, after.1 - before.1))
    }

    /// Reads of the disk so far (`Documentation/block/stat.rst`).
    fn reads(&self) -> Result<f64> {
        let name = self.disk.file_name().context("the disk has no name")?;
        let text = std::fs::read_to_string(Path::new("/sys/class/block").join(name).join("stat"))?;
        text.split_whitespace().next().and_then(|count| count.parse().ok()).context("stat tells no reads")
    }
}

/// Reads a second, of what fio wrote. Before its JSON it may have written notes.
fn iops(text: &str) -> Result<f64> {
    let begin = text.find('{').context("fio wrote no JSON")?;
    let told: Value = serde_json::from_str(text.get(begin..).unwrap_or_default()).context("fio's JSON")?;
    let job = told.pointer("/jobs/0").context("fio tells of no job")?;
    ensure!(job.get("error").and_then(Value::as_i64) == Some(0), "fio's job failed: {job}");
    let iops = job.pointer("/read/iops").and_then(Value::as_f64).context("fio tells no IOPS")?;
    ensure!(iops > 0.0, "fio read nothing");
    Ok(iops)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_job_if_it_went_well() {
        let text = |error: u32, rate: f64| {
            format!("note: x\n{{\"jobs\": [{{\"error\": {error}, \"read\": {{\"iops\": {rate}}}}}]}}\n")
        };
        assert_eq!(iops(&text(0, 1234.5)).unwrap(), 1234.5);
        for bad in [&text(5, 1.0), &text(0, 0.0), "", "{}", "{\"jobs\": []}", "fio: no such file"] {
            assert!(iops(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn it_reads_only_the_part_and_where_it_is_told() {
        let disk = Path::new("/dev/nvme9n1");
        let job = Job {
            side: "fastice",
            disk,
            part: (4096, 8192),
            depth: 32,
            cpu: 1,
            time: Duration::from_millis(1500),
        };
        let told = job.variables();
        for (name, value) in [
            ("DEVICE", "/dev/nvme9n1"),
            ("OFFSET", "4096"),
            ("SIZE", "8192"),
            ("DEPTH", "32"),
            ("CPU", "1"),
            ("TIME", "1500ms"),
        ] {
            assert!(
                told.iter().any(|(known, told)| *known == name && told == value),
                "{name} is missing from {told:?}"
            );
        }
        let asked = |name: &str| {
            JOB.lines().any(|line| !line.starts_with('#') && line.ends_with(&format!("=${{{name}}}")))
        };
        assert!(told.iter().all(|(name, _)| asked(name)), "the file asks for each");
        let open =
            JOB.lines().filter(|line| !line.starts_with('#')).filter(|line| line.contains("${")).count();
        assert_eq!(open, told.len() + 1, "and for nothing else; the depth stands there twice");
        assert!(JOB.lines().any(|line| line == "rw=randread"), "{JOB}");
    }
}
