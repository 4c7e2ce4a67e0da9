//! A pinned file, the program that pins it, and a tracer that kills the program where it is told to.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::loopfs::{self, LoopFs, Spec};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The calls by which files, flags, leases, locks and marks change.
pub(crate) const CHANGES: &[&str] = &[
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
/// Those of them that change what a disk holds, or make it hold it.
pub(crate) const STATE_CHANGES: &[&str] = &["fsync", "rename", "unlink", "ioctl"];
const SIGKILL: i32 = 9;
const BLOCKS: u64 = 64;

pub(crate) struct Lab {
    pub(crate) fs: LoopFs,
    pub(crate) file: PathBuf,
    state: PathBuf,
    content: Vec<u8>,
    /// How many bytes at the beginning a guard may have for itself until the file is given back.
    reserved: usize,
    /// Whether the filesystem is frozen for the pin.
    pub(crate) freezes: bool,
    map: Value,
}

impl Lab {
    /// A file of many extents, with the state directory outside of its filesystem.
    pub(crate) fn new(test: &str, spec: &Spec) -> Option<Self> {
        let fs = loopfs::make_or_skip(test, spec)?;
        fs::create_dir_all(fs.outside()).expect("a directory for the state");
        let state = fs.outside().join("state");
        Self::on(test, fs, state)
    }

    pub(crate) fn on(test: &str, fs: LoopFs, state: PathBuf) -> Option<Self> {
        if Command::new("strace").arg("-V").output().is_err() {
            loopfs::skip(test, "strace is not installed: apt-get install strace");
            return None;
        }
        assert!(fs.device().starts_with("/dev/"), "{}", fs.device());
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
        let mut lab = Self { fs, file, state, content, reserved: 0, freezes: false, map: Value::Null };
        lab.map = lab.living_map();
        Some(lab)
    }

    /// The same for a file that the swap-file guard may have.
    pub(crate) fn for_swap(test: &str, spec: &Spec) -> Option<Self> {
        let mut lab = Self::new(test, spec)?;
        let file = OpenOptions::new().write(true).open(&lab.file).expect("it is the owner's");
        file.write_all_at(&[0; 8192], 0).expect("in place");
        file.sync_all().expect("a disk");
        fs::set_permissions(&lab.file, fs::Permissions::from_mode(0o600)).expect("ours");
        lab.content = fs::read(&lab.file).expect("the file");
        lab.reserved = 8192;
        lab.map = lab.living_map();
        Some(lab)
    }

    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    pub(crate) fn fastice(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastice"));
        command.args(arguments).env("FASTICE_STATE_DIR", self.state()).env_remove("RUST_LOG");
        command
    }

    /// The same, killed at the entry of the `count`-th call of `call`.
    pub(crate) fn killed(&self, call: &str, count: u32, arguments: &[&str]) -> Command {
        let mut command = Command::new("strace");
        let inject = format!("inject={call}:signal=KILL:when={count}");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject]);
        command.arg(env!("CARGO_BIN_EXE_fastice")).args(arguments);
        command.env("FASTICE_STATE_DIR", self.state()).env_remove("RUST_LOG");
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        command
    }

    pub(crate) fn name(&self) -> &str {
        self.file.to_str().expect("text")
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.fastice(arguments).output().expect("the binary runs");
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"))
    }

    fn living_map(&self) -> Value {
        let map = self.json(&["map", "show", "--json", self.name()]);
        map["extents"].clone()
    }

    pub(crate) fn pins(&self) -> Vec<Value> {
        // The process was killed before it made the directory; to name one that is not there is an error.
        if !self.state().exists() {
            return Vec::new();
        }
        self.json(&["pins", "--json"])["pins"].as_array().cloned().expect("an array")
    }

    fn is_immutable(&self) -> bool {
        let listed = loopfs::run(Command::new("lsattr").arg(&self.file)).expect("lsattr");
        listed.split(' ').next().expect("flags").contains('i')
    }

    /// Whatever happened: nothing is lost, nothing is immutable without a record that says so, and the operator gets
    /// the file back.
    pub(crate) fn mend(&self, at: &str) {
        let content = || fs::read(&self.file).expect("nobody denies it");
        assert!(content()[self.reserved..] == self.content[self.reserved..], "{at}: the content changed");
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
        if self.freezes {
            // Before anything waits for ever.
            let fsfreeze = |how: &str| loopfs::run(Command::new("fsfreeze").arg(how).arg(self.fs.root()));
            assert!(fsfreeze("--freeze").and_then(|_| fsfreeze("--unfreeze")).is_ok(), "{at}: left frozen");
        }
        let swaps = fs::read_to_string("/proc/swaps").expect("it is there");
        assert!(!swaps.contains(self.name()), "{at}: left a swap area");
        assert!(content() == self.content, "{at}: what the guard had is not given back");
        let file = OpenOptions::new().write(true).open(&self.file).expect("it is the owner's");
        file.write_all_at(&self.content[..4096], 0).expect("in place");
        assert_eq!(self.living_map(), self.map, "{at}");
    }

    /// Kills the command at every point of these calls; `prepare` comes before each, `then` after, and the mending last.
    /// How many points there were.
    pub(crate) fn every_point(
        &self,
        calls: &[&str],
        arguments: &[&str],
        prepare: impl Fn(&Self),
        then: impl Fn(),
    ) -> u32 {
        let mut points = 0;
        for call in calls {
            for count in 1.. {
                prepare(self);
                let output = self.killed(call, count, arguments).output().expect("strace runs");
                then();
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
pub(crate) fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(SIGKILL) || status.code() == Some(128 + SIGKILL)
}
