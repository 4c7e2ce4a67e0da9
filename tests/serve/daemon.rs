//! A `fastice serve` process, and the filesystem, configuration and state directory that belong to it.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::loopfs::{self, LoopFs, Spec};

/// The subsystem of [`Lab::config`].
pub(crate) const NQN: &str = "nqn.2026-11.io.fastice:serve-test";
/// How long anything that is no load may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The size of [`Lab::fragmented`] files.
pub(crate) const FILE_LEN: u64 = 4 << 20;

/// A filesystem, with a directory outside of it for configuration, state and logs.
pub(crate) struct Lab {
    pub(crate) fs: LoopFs,
    places: PathBuf,
    runs: AtomicU32,
}

impl Lab {
    /// `None` after saying why not.
    pub(crate) fn new(test: &str, spec: &Spec) -> Option<Self> {
        let fs = loopfs::make_or_skip(test, spec)?;
        let places = fs.outside();
        fs::create_dir(&places).expect("a directory for the state");
        Some(Self::with_places_in(fs, &places))
    }

    /// A lab on a filesystem that was made already; configuration, state and logs are in `places`.
    pub(crate) fn with_places_in(fs: LoopFs, places: &Path) -> Self {
        Self { fs, places: places.to_owned(), runs: AtomicU32::new(0) }
    }

    /// A file of [`FILE_LEN`] bytes whose blocks lie among those of another file.
    pub(crate) fn fragmented(&self, name: &str) -> PathBuf {
        let path = self.fs.path(name);
        let (file, decoy) = (create(&path), create(&path.with_extension("decoy")));
        for block in 0..FILE_LEN / 16384 {
            for file in [&file, &decoy] {
                let flags = rustix::fs::FallocateFlags::empty();
                rustix::fs::fallocate(file, flags, block * 16384, 16384).expect("room");
            }
        }
        file.write_all_at(&vec![0x5A; usize::try_from(FILE_LEN).expect("small")], 0).expect("room");
        file.sync_all().expect("a disk");
        path
    }

    pub(crate) fn place(&self, name: &str) -> PathBuf {
        self.places.join(name)
    }

    /// How many marks of processes with this extension the state directory has.
    pub(crate) fn marks_of_processes(&self, extension: &str) -> usize {
        let marks = fs::read_dir(self.place("state/processes")).expect("a target was started");
        let is_one = |path: &Path| path.extension().is_some_and(|found| found == extension);
        marks.filter(|entry| is_one(&entry.as_ref().expect("an entry").path())).count()
    }

    /// A configuration with one subsystem; `head` goes before the listener, `subsystem` after its NQN.
    pub(crate) fn config(&self, head: &str, address: SocketAddr, subsystem: &str) -> PathBuf {
        let text = format!(
            "state_dir = {:?}\ncores = 2\nbuffer_memory = \"8MiB\"\n{head}\n[[listener]]\naddress = \"{address}\"\n\
             [[subsystem]]\nnqn = \"{NQN}\"\n{subsystem}\n",
            self.place("state")
        );
        let path = self.place("fastice.toml");
        fs::write(&path, text).expect("a configuration");
        path
    }

    /// A configuration that serves `files` as namespaces 1, 2, ... to every host.
    pub(crate) fn open_config(&self, address: SocketAddr, files: &[&Path]) -> PathBuf {
        self.config("", address, &format!("allow_any_host = true\n{}", namespaces(files)))
    }

    /// The same by our driver, on its model over the loop device.
    pub(crate) fn nvme_config(&self, address: SocketAddr, files: &[&Path]) -> PathBuf {
        let head = format!("[[nvme]]\nmodel = {:?}\n", self.fs.device());
        let by_driver = namespaces(files).replace("file = ", "device = \"nvme\"\nfile = ");
        self.config(&head, address, &format!("allow_any_host = true\n{by_driver}"))
    }

    /// The same for files whose filesystem is not mounted.
    pub(crate) fn handed_over_config(&self, address: SocketAddr, files: &[&Path]) -> PathBuf {
        let path = self.nvme_config(address, files);
        let text = fs::read_to_string(&path).expect("the configuration");
        fs::write(&path, text.replace("\"nvme\"", "\"handed-over\"")).expect("a configuration");
        path
    }

    /// The binary, with the state directory of this lab.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastice"));
        command.args(arguments).env("FASTICE_STATE_DIR", self.place("state")).env_remove("RUST_LOG");
        command
    }

    /// What a subcommand on `files` gives; it must end with `code`.
    pub(crate) fn fastice(&self, arguments: &[&str], files: &[&Path], code: i32) -> Output {
        let output = self.command(arguments).args(files).output().expect("the binary runs");
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {told}");
        output
    }

    /// The JSON on standard output of a subcommand that ends with `code`.
    pub(crate) fn json(&self, arguments: &[&str], code: i32) -> Value {
        let output = self.fastice(arguments, &[], code);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    /// The only recorded pin; `None` when there is none.
    pub(crate) fn pin(&self) -> Option<Value> {
        let mut pins = self.json(&["pins", "--json"], 0);
        let rows = pins["pins"].as_array_mut().expect("an array");
        assert!(rows.len() < 2, "{rows:?}");
        rows.pop()
    }

    /// What is wrong with the pin of a file, as `fastice pins` shows it.
    pub(crate) fn incident(&self, path: &Path) -> Option<Value> {
        let pins = self.json(&["pins", "--json"], 0);
        let rows = pins["pins"].as_array().expect("an array");
        let row = rows.iter().find(|row| row["path"].as_str() == path.to_str())?;
        row.get("incident").cloned()
    }

    /// What `doctor` says of leftover pins: its status, and all its text. Other findings are about the machine.
    pub(crate) fn doctor_pins(&self) -> (String, String) {
        let output = self.command(&["doctor", "--json"]).output().expect("the binary runs");
        let told: Value = serde_json::from_slice(&output.stdout).expect("a document");
        let checks = told["checks"].as_array().expect("an array");
        let check = checks.iter().find(|check| check["id"] == "pins").expect("the check of pins");
        (check["status"].as_str().expect("a word").to_owned(), check.to_string())
    }

    /// Starts `serve`, and returns when hosts can connect.
    pub(crate) fn serve(&self, config: &Path) -> Daemon {
        match self.try_serve(config) {
            Ok(daemon) => daemon,
            Err((status, log)) => panic!("serve ended at once with {status}: {log}"),
        }
    }

    /// Starts `serve`; its status and log when it ends before hosts can connect.
    pub(crate) fn try_serve(&self, config: &Path) -> Result<Daemon, (ExitStatus, String)> {
        let run = self.runs.fetch_add(1, Ordering::Relaxed);
        let log = self.place(&format!("serve-{run}.log"));
        let mut command = self.command(&["serve", "--config"]);
        command.arg(config).stdout(Stdio::piped()).stderr(File::create(&log).expect("a log"));
        let mut child = command.spawn().expect("the binary runs");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut daemon = Daemon { child, log, addresses: Vec::new() };
        let (send, ready) = mpsc::channel();
        // Ends with the process, whose standard output it reads; the receiver may be gone by then.
        thread::spawn(move || send.send(lines.next().and_then(Result::ok)));
        match ready.recv_timeout(PATIENCE) {
            Ok(Some(line)) => {
                let told = line.strip_prefix("ready: ").expect("the ready line");
                daemon.addresses = told.split(' ').map(|text| text.parse().expect("an address")).collect();
                Ok(daemon)
            }
            Ok(None) => Err((daemon.ends_within(PATIENCE), daemon.log())),
            Err(_) => panic!("neither ready nor ended: {}", daemon.log()),
        }
    }
}

/// Namespaces 1, 2, ... of `files`.
pub(crate) fn namespaces(files: &[&Path]) -> String {
    (1..)
        .zip(files)
        .map(|(nsid, file)| format!("[[subsystem.namespace]]\nnsid = {nsid}\nfile = {file:?}\n"))
        .collect()
}

/// An address of this host with a port that the kernel chooses.
pub(crate) fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// A new file, open for reading and writing.
pub(crate) fn create(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).expect("a file")
}

/// Whether `path` has the immutable flag.
pub(crate) fn is_immutable(path: &Path) -> bool {
    let listed = loopfs::run(Command::new("lsattr").arg(path)).expect("lsattr");
    listed.split(' ').next().expect("flags").contains('i')
}

/// Opening `path` for writing must fail with EPERM.
pub(crate) fn assert_write_refused(path: &Path) {
    let error = OpenOptions::new().write(true).open(path).expect_err("the file is pinned");
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A `fastice serve` process; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
    addresses: Vec<SocketAddr>,
}

impl Daemon {
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// All that it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("a log")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the daemon lives");
    }

    /// SIGKILL, and its end.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("the daemon lives");
        self.child.wait().expect("it ends");
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    pub(crate) fn ends_within(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "not ended within {patience:?}: {}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGTERM must end it well; the log of its whole life.
    pub(crate) fn stop(mut self) -> String {
        self.signal(Signal::TERM);
        let status = self.ends_within(PATIENCE);
        assert_eq!(status.code(), Some(0), "{}", self.log());
        self.log()
    }

    /// SIGHUP, and waits until the log has one more line with `word`.
    pub(crate) fn reload(&self, word: &str) {
        let seen = self.log().matches(word).count();
        self.signal(Signal::HUP);
        let begun = Instant::now();
        while self.log().matches(word).count() <= seen {
            assert!(begun.elapsed() < PATIENCE, "{word:?} is not in the log after SIGHUP: {}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
