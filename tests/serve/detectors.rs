//! What watches over pinned files is held up or ends: that counts as a change, and the exports are fenced.
//!
//! A tracer holds one thread of the daemon in a system call, or makes the call fail for which it waits.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fastice::extent::{PinEvent, PinStep, StateDir};
use fastice::initiator::bench::BenchOptions;
use rustix::process::{Pid, Signal, kill_process};

use super::daemon::{Daemon, Lab, any_port, assert_write_refused, eventually, is_immutable};
use super::load::{Load, assert_in_file, options};
use super::loopfs::{self, Spec};

/// How often the guard thread looks whether the watch is late.
const OVERSIGHT: Duration = Duration::from_millis(500);
/// What a busy machine may add to that.
const GRACE: Duration = Duration::from_millis(400);

/// A tracer of one thread; it lets go of it when dropped.
struct Tracer(Child);

impl Tracer {
    /// Does `inject` to the thread `name` of `daemon`, from its next call of `call` on.
    fn of(daemon: &Daemon, name: &str, call: &str, inject: &str) -> Self {
        let thread = thread_of(daemon, name).expect("it runs");
        let inject = format!("inject={call}:{inject}");
        let mut strace = Command::new("strace");
        strace.args(["-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject]);
        strace.args(["-p", &thread.to_string()]).stdin(Stdio::null());
        Self(strace.spawn().expect("strace runs"))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // Killed, it would take the thread with it.
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

fn thread_of(daemon: &Daemon, name: &str) -> Option<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid().as_raw_nonzero())).expect("it lives");
    let mut tasks = tasks.filter_map(Result::ok).map(|task| task.path());
    let is_it =
        |task: &Path| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name);
    let task = tasks.find(|task| is_it(task))?;
    task.file_name()?.to_str()?.parse().ok()
}

struct Served {
    lab: Lab,
    daemon: Daemon,
    path: std::path::PathBuf,
    key: String,
}

/// `None` after saying why not.
fn served(test: &str) -> Option<Served> {
    if Command::new("strace").arg("-V").output().is_err() {
        loopfs::skip(test, "strace is not installed: apt-get install strace");
        return None;
    }
    let lab = Lab::new(test, &Spec::XFS)?;
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let state = StateDir::open(lab.place("state")).expect("a state directory");
    let records = state.records().expect("readable");
    let key = records[0].as_ref().expect("sound").identity.key();
    Some(Served { lab, daemon, path, key })
}

impl Served {
    fn events(&self) -> Vec<PinEvent> {
        let state = StateDir::open(self.lab.place("state")).expect("a state directory");
        state.events(&self.key).expect("readable")
    }

    fn await_step(&self, step: PinStep) -> Vec<PinEvent> {
        let mut events = Vec::new();
        eventually(&format!("{step}"), || {
            events = self.events();
            events.iter().any(|event| event.step == step)
        });
        events
    }

    fn watch(&self) -> serde_json::Value {
        self.lab.json(&["status", "--json"], 0)["targets"][0]["exports"][0]["watch"].clone()
    }
}

#[test]
fn a_watch_that_is_held_up_counts_as_a_change_within_the_bound_that_is_told() {
    let Some(served) = served("late watch") else { return };
    let bound = Duration::from_millis(served.watch()["bound_ms"].as_u64().expect("a bound"));
    let load = Load::start(options(served.daemon.address(), 1, 181));
    let tracer = Tracer::of(&served.daemon, "fastice-watch", "statx", "delay_enter=60s");
    let events = served.await_step(PinStep::Drained);
    let told: Vec<_> = events.iter().map(|event| (event.step, event.detail.as_str())).collect();
    let late = told[1].1;
    assert_eq!(told[1].0, PinStep::Recalled, "{told:?}");
    assert!(late.contains("nobody has looked at the file for longer than was promised"), "{told:?}");
    let ms = late.split(' ').filter_map(|word| word.parse().ok()).next_back();
    let since_the_last_look = Duration::from_millis(ms.expect("how long ago the last look was"));
    println!("bound {bound:?}, recalled {since_the_last_look:?} after the last look: {told:?}");
    assert!(since_the_last_look > bound, "{since_the_last_look:?}");
    assert!(since_the_last_look <= bound + OVERSIGHT + GRACE, "{since_the_last_look:?} > {bound:?}");
    let steps: Vec<_> = told.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps[..4], [PinStep::Pinned, PinStep::Recalled, PinStep::Fenced, PinStep::Drained]);

    // Another thread has looked, the file is as it was; and once the watch goes on, nothing is late any more.
    served.await_step(PinStep::Cleared);
    drop(tracer);
    let checks = || served.watch()["checks"].as_u64().expect("a number");
    let before = checks();
    eventually("the watch goes on", || checks() > before + 5);
    assert_write_refused(&served.path);
    let (report, mut ledger) = load.end().expect("the connection lives");
    assert_eq!(report.verify.faults, 0, "{report:?}");
    served.daemon.stop();
    super::load::units_in_file(&mut ledger, &served.path);
}

/// The thread `name` finds that it cannot wait for anything any more, and ends.
fn a_detector_ends(name: &str, told: &str) {
    let Some(served) = served(&format!("{name} ends")) else { return };
    let address = served.daemon.address();
    let load = Load::start(BenchOptions { reconnect: None, ..options(address, 1, 191) });
    let tracer = Tracer::of(&served.daemon, name, "ppoll", "error=EBADF");
    let events = served.await_step(PinStep::Kept);
    drop(tracer);
    let steps: Vec<_> = events.iter().map(|event| event.step).collect();
    let expected = [PinStep::Pinned, PinStep::Recalled, PinStep::Fenced, PinStep::Drained, PinStep::Kept];
    assert_eq!(steps, expected, "{events:?}");
    assert!(events[1].detail.contains(told), "{events:?}");
    load.is_refused();
    let (report, mut ledger) = load.end().expect("the connection lives");
    assert!(report.errors > 0 && report.verify.faults == 0, "the host is told: {report:?}");
    assert!(is_immutable(&served.path), "what needs no thread of ours goes on to hold it");
    super::load::units_in_file(&mut ledger, &served.path);

    // What is pinned anew has guards that live.
    served.daemon.reload("configuration reloaded");
    assert!(thread_of(&served.daemon, "fastice-guard").is_some(), "{}", served.daemon.log());
    assert!(thread_of(&served.daemon, "fastice-watch").is_some(), "{}", served.daemon.log());
    assert_write_refused(&served.path);
    let load = Load::start(options(address, 1, 192));
    load.goes_on();
    let (_, mut ledger) = load.end_clean();
    served.daemon.stop();
    assert_in_file(&mut ledger, &served.path);
}

#[test]
fn a_watch_that_ends_has_its_files_let_go() {
    a_detector_ends("fastice-watch", "the watch thread has ended");
}

#[test]
fn a_guard_that_ends_has_its_files_let_go() {
    a_detector_ends("fastice-guard", "the guard thread has ended");
}
