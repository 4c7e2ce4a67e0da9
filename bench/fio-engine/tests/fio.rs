//! Goal: fio drives a target by the engine: data comes back as it was written, errors are told and end the job.
//! Method: fio itself, with the engine that build.sh made, against a target in this process. Skipped where either is missing.

mod common;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{LEN, NQN, TestTarget};
use serde_json::Value;

/// A run of some tenths of a second takes no longer, on a busy machine either.
const PATIENCE: Duration = Duration::from_secs(60);

/// The engine: the one that the variable names, else that of this build, else the released one.
fn engine() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("FASTICE_FIO_ENGINE") {
        return Ok(PathBuf::from(path));
    }
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let profile = program.ancestors().nth(2).ok_or("this test lies in no build directory")?;
    let places =
        [profile.join("libfastice_fio.so"), profile.with_file_name("release").join("libfastice_fio.so")];
    let found = places.iter().find(|path| path.exists());
    found.cloned().ok_or_else(|| format!("there is no {}: run make fio-engine", places[0].display()))
}

/// fio with the engine, when there are both.
struct Fio {
    engine: PathBuf,
    target: TestTarget,
    directory: tempfile::TempDir,
}

impl Fio {
    /// `None` after saying why not.
    fn find(test: &str) -> Option<Self> {
        let found = match Command::new("fio").arg("--version").output() {
            Err(error) => Err(format!("there is no fio: {error}")),
            Ok(_) => engine(),
        };
        match found {
            Ok(engine) => {
                let directory = tempfile::tempdir().unwrap();
                Some(Self { engine, target: TestTarget::start(), directory })
            }
            Err(why) => {
                eprintln!("SKIPPED: fio engine {test}: {why}");
                None
            }
        }
    }

    fn reach(&self) -> String {
        let address = self.target.address();
        format!(
            "ioengine=external:{}\ntraddr={}\ntrsvcid={}\nsubnqn={NQN}\n",
            self.engine.display(),
            address.ip(),
            address.port()
        )
    }

    /// Runs jobs, by the engine unless they say otherwise, and gives what fio said.
    fn run(&self, job: &str) -> Output {
        let path = self.directory.path().join("job.fio");
        std::fs::write(&path, format!("[global]\n{}{job}", self.reach())).unwrap();
        self.run_file(&path)
    }

    fn run_file(&self, path: &Path) -> Output {
        let address = self.target.address();
        let begun = Instant::now();
        let output = Command::new("timeout")
            .args(["--kill-after=5", &PATIENCE.as_secs().to_string(), "fio", "--output-format=json"])
            .arg(path)
            .current_dir(self.directory.path())
            .env("ENGINE", &self.engine)
            .env("TRADDR", address.ip().to_string())
            .env("TRSVCID", address.port().to_string())
            .env("SUBNQN", NQN)
            .output()
            .unwrap();
        assert!(begun.elapsed() < PATIENCE, "fio ends by itself: {}", said(&output));
        output
    }

    /// The same, which must go well: the jobs of the report.
    fn good(&self, job: &str) -> Vec<Value> {
        jobs(&self.run(job))
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn jobs(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", said(output));
    // fio's warnings stand before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let report = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(report).unwrap_or_else(|error| panic!("{error}: {text}"));
    let jobs = report["jobs"].as_array().unwrap().clone();
    assert!(jobs.iter().all(|job| job["error"] == 0), "{text}");
    jobs
}

fn ios(job: &Value, direction: &str) -> u64 {
    job[direction]["total_ios"].as_u64().unwrap()
}

#[test]
fn blocks_of_many_sizes_are_verified_with_and_without_digests() {
    let Some(fio) = Fio::find("verify") else { return };
    for digests in [0, 1] {
        let done = fio.good(&format!(
            "hdr_digest={digests}\ndata_digest={digests}\n[v]\nrw=randwrite\nbsrange=4k-256k\nbs_unaligned=0\nsize=100%\n\
             iodepth=16\niodepth_batch_submit=4\niodepth_batch_complete_max=16\nfsync=32\nverify=crc32c\nverify_fatal=1\n\
             do_verify=1\n"
        ));
        assert!(ios(&done[0], "write") > 100 && ios(&done[0], "read") > 100, "{}", done[0]);
        assert!(done[0]["sync"]["total_ios"].as_u64().unwrap() > 0, "{}", done[0]["sync"]);
        assert_eq!(done[0]["write"]["io_bytes"].as_u64().unwrap(), LEN, "the size is the namespace's");
    }
}

#[test]
fn what_another_wrote_over_is_found() {
    let Some(fio) = Fio::find("verify finds") else { return };
    let work = "rw=write\nbs=4k\nsize=1m\niodepth=4\nverify=crc32c\nverify_fatal=1\n";
    fio.good(&format!("[w]\n{work}do_verify=0\n"));
    fio.good("[over]\nrw=write\nbs=4k\noffset=512k\nsize=4k\nzero_buffers=1\n");
    let output = fio.run(&format!("[v]\n{work}verify_only=1\n"));
    assert!(!output.status.success() && said(&output).contains("verify"), "{}", said(&output));
}

#[test]
fn several_jobs_are_connections_of_their_own_as_threads_and_as_processes() {
    let Some(fio) = Fio::find("jobs") else { return };
    for (thread, depth, poll) in [(1, 1, 0), (1, 32, 1), (0, 128, 0)] {
        let done = fio.good(&format!(
            "nsid=2\nthread={thread}\niodepth={depth}\nhipri={poll}\n[r]\nrw=randread\nbs=4k\nnumjobs=4\ntime_based=1\nruntime=300ms\n"
        ));
        assert_eq!(done.len(), 4);
        for job in &done {
            assert!(ios(job, "read") > 0, "{job}");
            assert!(job["read"]["clat_ns"]["mean"].as_f64().unwrap() > 0.0, "{job}");
        }
    }
}

#[test]
fn trims_and_synchronous_writes_are_done() {
    let Some(fio) = Fio::find("trim") else { return };
    let done = fio.good("[t]\nrw=randtrim\nbs=64k\nsize=4m\niodepth=8\n[w]\nstonewall\nrw=write\nsync=dsync\nbs=4k\nsize=1m\n");
    assert_eq!(ios(&done[0], "trim"), 64);
    assert_eq!(ios(&done[1], "write"), 256);
}

#[test]
fn what_cannot_work_is_told_before_the_job_begins() {
    let Some(fio) = Fio::find("refusals") else { return };
    for (job, why) in [
        ("nsid=9\n[x]\nrw=read\nbs=4k\n", "namespace 9"),
        ("[x]\nrw=read\nbs=4k\nsubnqn=nqn.2026-11.io.fastice:other\n", "Connect failed"),
        ("[x]\nrw=read\nbs=1000\n", "blocks of"),
        ("[x]\nrw=read\nbs=16m\n", "carries at most"),
        ("[x]\nrw=read\nbs=4k\niodepth=5000\n", "iodepth=5000"),
        ("[x]\nrw=read\nbs=4k\nhostid=nonsense\n", "hostid is no UUID"),
        ("[x]\nrw=read\nbs=4k\nfilename=a:b\n", "one namespace"),
        ("[x]\nrw=read\nbs=4k\ntrsvcid=1\n", "cannot connect"),
    ] {
        let output = fio.run(job);
        assert!(!output.status.success() && said(&output).contains(why), "{job}: {}", said(&output));
    }
}

#[test]
fn a_target_that_goes_away_ends_the_job_with_the_reason() {
    let Some(mut fio) = Fio::find("target away") else { return };
    let path = fio.directory.path().join("long.fio");
    let job = "[x]\nrw=randread\nbs=4k\niodepth=16\nthread=1\ntime_based=1\nruntime=50\n";
    std::fs::write(&path, format!("[global]\n{}{job}", fio.reach())).unwrap();
    let mut command = Command::new("fio");
    command.arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let begun = Instant::now();
    while fio.target.running.stats().0.io_connects == 0 {
        assert!(begun.elapsed() < PATIENCE, "fio connects");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(200));
    let begun = Instant::now();
    fio.target = TestTarget::start();
    let output = child.wait_with_output().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(30), "fio ends soon");
    let said = said(&output);
    // A target that stops in order answers with aborts what it has not begun, when it has the time.
    let broke = said.contains("the connection broke") && said.contains("Connection reset by peer");
    let aborted = said.contains("NVMe status: Command Abort") && said.contains("canceled");
    assert!(!output.status.success() && (broke || aborted), "{said}");
}

#[test]
fn the_job_files_for_users_run() {
    let Some(fio) = Fio::find("job files") else { return };
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fio/engine");
    for entry in std::fs::read_dir(files).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        // Shorter, and with fewer connections, but otherwise as they are.
        let short = text.replace("runtime=30", "runtime=100ms").replace("ramp_time=3", "ramp_time=0");
        let short = short.replace("numjobs=64", "numjobs=8").replace("numjobs=128", "numjobs=16");
        let copy = fio.directory.path().join(path.file_name().unwrap());
        std::fs::write(&copy, short).unwrap();
    }
    for entry in std::fs::read_dir(fio.directory.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "fio") {
            let done = jobs(&fio.run_file(&path));
            assert!(done.iter().all(|job| ios(job, "read") + ios(job, "write") > 0), "{path:?}");
        }
    }
}
