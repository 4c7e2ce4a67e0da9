//! Goal: killed at any system call that changes something, pin, serve and unpin leave the old state or the new one, and a
//! second try by the operator always ends with a file that is his own, with every block where it was.
//!
//! A tracer kills the program at the entry of its n-th call of a kind, for every n until it gets through: between two
//! such calls nothing outside of the process changes.

#[path = "common/loopfs.rs"]
mod loopfs;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use loopfs::{LoopFs, Spec};
use rustix::fs::IFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
/// The calls by which files, flags, leases, locks and marks change.
const CHANGES: &[&str] = &[
    "write",
    "fsync",
    "rename",
    "unlink",
    "ioctl",
    "fcntl",
    "flock",
    "fanotify_mark",
    "fadvise64",
    "ftruncate",
];
const SIGKILL: i32 = 9;
const BLOCKS: u64 = 64;

struct Lab {
    fs: LoopFs,
    file: PathBuf,
    content: Vec<u8>,
    map: Value,
}

impl Lab {
    fn new(test: &str, spec: &Spec) -> Option<Self> {
        if Command::new("strace").arg("-V").output().is_err() {
            loopfs::skip(test, "strace is not installed: apt-get install strace");
            return None;
        }
        let fs = loopfs::make_or_skip(test, spec)?;
        assert!(fs.device().starts_with("/dev/"), "{}", fs.device());
        fs::create_dir_all(fs.outside()).expect("a directory for the state");
        let file = fs.path("file");
        let (target, decoy) =
            (File::create(&file).expect("room"), File::create(fs.path("decoy")).expect("room"));
        for block in 0..BLOCKS {
            target.write_all_at(&[u8::try_from(block).expect("small"); 4096], block * 4096).expect("room");
            target.sync_all().expect("a disk");
            decoy.write_all_at(&[0xDD; 4096], block * 4096).expect("room");
            decoy.sync_all().expect("a disk");
        }
        let content = fs::read(&file).expect("the file");
        let mut lab = Self { fs, file, content, map: Value::Null };
        lab.map = lab.living_map();
        Some(lab)
    }

    fn state(&self) -> PathBuf {
        self.fs.outside().join("state")
    }

    fn fastice(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastice"));
        command.args(arguments).env("FASTICE_STATE_DIR", self.state()).env_remove("RUST_LOG");
        command
    }

    /// The same, killed at the entry of the `count`-th call of `call`.
    fn killed(&self, call: &str, count: u32, arguments: &[&str]) -> Command {
        let mut command = Command::new("strace");
        let inject = format!("inject={call}:signal=KILL:when={count}");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject]);
        command.arg(env!("CARGO_BIN_EXE_fastice")).args(arguments);
        command.env("FASTICE_STATE_DIR", self.state()).env_remove("RUST_LOG");
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        command
    }

    fn name(&self) -> &str {
        self.file.to_str().expect("text")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.fastice(arguments).output().expect("the binary runs");
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"))
    }

    fn living_map(&self) -> Value {
        let map = self.json(&["map", "show", "--json", self.name()]);
        map["extents"].clone()
    }

    fn pins(&self) -> Vec<Value> {
        self.json(&["pins", "--json"])["pins"].as_array().cloned().expect("an array")
    }

    fn is_immutable(&self) -> bool {
        let listed = loopfs::run(Command::new("lsattr").arg(&self.file)).expect("lsattr");
        listed.split(' ').next().expect("flags").contains('i')
    }

    /// Whatever happened: nothing is lost, nothing is immutable without a record that says so, and the operator gets
    /// the file back.
    fn mend(&self, at: &str) {
        assert!(fs::read(&self.file).expect("nobody denies it") == self.content, "{at}: the content changed");
        let pins = self.pins();
        assert!(pins.len() < 2, "{at}: {pins:?}");
        if let Some(pin) = pins.first() {
            let state = pin["state"].as_str().expect("a state");
            assert!(["immutable", "unguarded", "incomplete"].contains(&state), "{at}: {pin}");
            let output = self.fastice(&["unpin", self.name()]).output().expect("the binary runs");
            assert!(output.status.success(), "{at}: {output:?}");
        }
        assert!(!self.is_immutable(), "{at}: left immutable, and no record says by whom: {pins:?}");
        assert!(self.pins().is_empty(), "{at}");
        let file = OpenOptions::new().write(true).open(&self.file).expect("it is the owner's");
        file.write_all_at(&self.content[..4096], 0).expect("in place");
        assert_eq!(self.living_map(), self.map, "{at}");
    }

    /// Kills the command at every point, and mends after each; `prepare` comes before each. How many there were.
    fn every_point(&self, arguments: &[&str], prepare: impl Fn(&Self)) -> u32 {
        let mut points = 0;
        for call in CHANGES {
            for count in 1.. {
                prepare(self);
                let output = self.killed(call, count, arguments).output().expect("strace runs");
                self.mend(&format!("{arguments:?} at {call} {count}"));
                if !was_killed(output.status) {
                    assert!(output.status.success(), "{arguments:?}: {output:?}");
                    break;
                }
                points += 1;
            }
        }
        points
    }
}

/// By the tracer, which then ends likewise.
fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(SIGKILL) || status.code() == Some(128 + SIGKILL)
}

#[test]
fn pin_is_killed_at_every_step() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("pin killed", &spec) else { return };
        let points = lab.every_point(&["pin", lab.name()], |_| {});
        println!("{}: {points} points", spec.kind);
        assert!(points > 20, "{points}");
    }
}

#[test]
fn unpin_is_killed_at_every_step() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("unpin killed", &spec) else { return };
        let points = lab.every_point(&["unpin", lab.name()], |lab| {
            let output = lab.fastice(&["pin", lab.name()]).output().expect("the binary runs");
            assert!(output.status.success(), "{output:?}");
        });
        println!("{}: {points} points", spec.kind);
        assert!(points > 8, "{points}");
    }
}

/// Waits for the first line, does something, then has the traced process end in order; how it ended.
fn until_ready_then_end(mut tracer: Child, then: &dyn Fn(i32)) -> ExitStatus {
    let stdout = tracer.stdout.take().expect("piped");
    let mut line = String::new();
    // Nothing comes when it was killed before.
    let read = BufReader::new(stdout).read_line(&mut line).unwrap_or(0);
    if read > 0 {
        let children = format!("/proc/{0}/task/{0}/children", tracer.id());
        let children = fs::read_to_string(children).unwrap_or_default();
        for child in children.split_whitespace() {
            then(child.parse().expect("a process"));
            // It may have been killed meanwhile.
            let _ = Command::new("kill").args(["-TERM", child]).stderr(Stdio::null()).status();
        }
    }
    let started = Instant::now();
    loop {
        if let Some(status) = tracer.try_wait().expect("a child") {
            return status;
        }
        assert!(started.elapsed() < PATIENCE, "serve does not end: {line}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Clears the immutable flag of the file through the descriptor that the process has of it: the watch will notice.
fn clear_immutable_behind(lab: &Lab, pid: i32) {
    let Some(pid) = Pid::from_raw(pid) else { return };
    // It may have been killed meanwhile, at each step.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target == lab.file)
            && let Some(number) = entry.file_name().to_str().and_then(|text| text.parse().ok())
            && let Ok(file) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())
            && let Ok(flags) = rustix::fs::ioctl_getflags(&file)
        {
            let _ = rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE);
            return;
        }
    }
}

/// Kills serve at every point of these calls, and mends after each.
fn serve_at_every_point(test: &str, calls: &[&str], then: &dyn Fn(&Lab, i32)) -> u32 {
    let Some(lab) = Lab::new(test, &Spec::XFS) else { return u32::MAX };
    let config = lab.fs.outside().join("fastice.toml");
    let text = format!(
        "state_dir = {:?}\ncores = 1\nbuffer_memory = \"8MiB\"\n[[listener]]\naddress = \"127.0.0.1:0\"\n[[subsystem]]\nnqn = \
         \"nqn.2026-11.io.fastice:crash\"\nallow_any_host = true\n[[subsystem.namespace]]\nnsid = 1\nfile = {:?}\n",
        lab.state(),
        lab.file
    );
    File::create(&config).and_then(|mut file| file.write_all(text.as_bytes())).expect("room");
    let arguments = ["serve", "--config", config.to_str().expect("text")];
    let mut points = 0;
    for call in calls {
        for count in 1..400 {
            let tracer = lab.killed(call, count, &arguments).spawn().expect("strace runs");
            let status = until_ready_then_end(tracer, &|pid| then(&lab, pid));
            lab.mend(&format!("{test}: {call} {count}"));
            if !was_killed(status) {
                assert!(status.success(), "{status}");
                break;
            }
            points += 1;
        }
    }
    points
}

#[test]
fn serve_is_killed_at_every_step_of_its_beginning_and_end() {
    // Without `write`, which is mostly the log: each point costs a start.
    let calls = ["fsync", "rename", "unlink", "ioctl", "fcntl", "flock", "fanotify_mark", "fadvise64"];
    let points = serve_at_every_point("serve killed", &calls, &|_, _| {});
    println!("{points} points");
    assert!(points > 20, "{points}");
}

#[test]
fn serve_is_killed_at_every_step_of_a_fence() {
    // Without the calls that the watch makes again and again.
    let calls = ["fsync", "rename", "unlink", "fanotify_mark", "fadvise64"];
    let points = serve_at_every_point("fence killed", &calls, &|lab, pid| {
        clear_immutable_behind(lab, pid);
        // Until it is abandoned, or the process is gone.
        let started = Instant::now();
        let is_over = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let is_gone = stat.is_empty() || stat.contains(") Z ");
            is_gone || lab.pins().first().is_none_or(|pin| pin.get("incident").is_some())
        };
        while !is_over() {
            assert!(started.elapsed() < PATIENCE, "the watch does not notice");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    println!("{points} points");
    assert!(points > 10, "{points}");
}
