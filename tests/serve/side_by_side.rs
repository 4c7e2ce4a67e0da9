//! Several files are recalled at once, and the device keeps a command of one of them: each goes its own way.
//!
//! The target runs in this process, which alone gets past the open-permission mark, and drives a model of a controller that
//! loses a command until it is reset.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastice::config::Config;
use fastice::control::Running;
use fastice::initiator::controller::Controller;
use fastice::units::Lba;
use nvme_model::{CommandMatch, Fault, FaultAction, Model, ModelThread};
use nvme_spec::{Nsid, NvmOpcode};
use rustix::fs::IFlags;
use serde_json::Value;

use super::daemon::{FILE_LEN, Lab, any_port, eventually};
use super::load::connect_options;
use super::loopfs::Spec;
use super::nvme::{Slot, model_over, serve_in_process};
use super::recall::truncate;
use super::watch::{set_flags, steps_of};

/// Far less than half of the 45 s for which the kernel waits for a lease: what a stuck drain may take.
const SOON: Duration = Duration::from_secs(5);

struct Served {
    lab: Lab,
    files: Vec<PathBuf>,
    model: Arc<Model>,
    _steps: ModelThread,
    running: Running,
    /// A host whose write to the first file the device keeps.
    stuck: JoinHandle<()>,
}

impl Served {
    fn with_a_command_that_the_device_keeps(test: &str, files: usize) -> Option<Self> {
        let lab = Lab::new(test, &Spec::XFS)?;
        let files: Vec<_> = (0..files).map(|number| lab.fragmented(&format!("file-{number}"))).collect();
        let (model, steps) = model_over(Path::new(lab.fs.device()));
        let slot = Slot::holding(&model, &lab);
        let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
        let running = serve_in_process(&lab, &slot, &paths).expect("served");
        model.add_fault(Fault::once(CommandMatch::io(NvmOpcode::WRITE.0), FaultAction::Drop));
        let host = Controller::connect(&connect_options(running.addresses()[0])).expect("a host");
        let stuck = std::thread::spawn(move || {
            // Whether it comes to an end with an error or without is the device's business.
            let _ = host.namespace(Nsid(1)).expect("the first file").write(Lba(0), &[0x77; 4096], true);
        });
        eventually("the device has the write", || {
            running.core_stats().iter().map(|core| core.commands).sum::<usize>() == 1
        });
        Some(Self { lab, files, model, _steps: steps, running, stuck })
    }

    fn status(&self) -> Value {
        let begun = Instant::now();
        let status = self.lab.json(&["status", "--json"], 0);
        assert!(begun.elapsed() < SOON, "whoever asks does not wait for a device: {:?}", begun.elapsed());
        status["targets"][0].clone()
    }

    fn steps(&self, file: usize) -> Vec<String> {
        steps_of(&self.lab, &self.files[file])
    }

    fn config(&self) -> Config {
        let paths: Vec<&Path> = self.files.iter().map(PathBuf::as_path).collect();
        Config::load(&self.lab.nvme_config(any_port(), &paths)).expect("a good configuration")
    }

    /// The reset brings back what the device kept.
    fn reset(&self) {
        self.model.fail();
    }
}

#[test]
fn a_command_that_the_device_keeps_holds_up_no_other_file_and_nobody_who_asks() {
    let Some(it) = Served::with_a_command_that_the_device_keeps("recalls side by side", 6) else { return };
    let begun = Instant::now();
    it.files.iter().for_each(|path| set_flags(path, |flags| flags - IFlags::IMMUTABLE));
    eventually("all are fenced", || {
        let exports = it.status()["exports"].as_array().cloned().unwrap_or_default();
        exports.len() == it.files.len() && exports.iter().all(|export| export["grant"] == "fenced")
    });
    for file in 1..it.files.len() {
        eventually("it is let go", || it.steps(file).last().is_some_and(|step| step == "kept"));
    }
    assert!(begun.elapsed() < SOON, "the others do not wait: {:?}", begun.elapsed());
    assert_eq!(it.steps(0), ["pinned", "recalled", "fenced"], "its command is on the device");

    // Their maps are the recorded ones: a reload serves them again, while the first one is still being drained.
    let begun = Instant::now();
    it.running.reload(it.config()).expect("reloaded");
    assert!(begun.elapsed() < SOON, "a reload does not wait: {:?}", begun.elapsed());
    let grants: Vec<_> =
        it.status()["exports"].as_array().expect("exports").iter().map(|it| it["grant"].clone()).collect();
    assert_eq!(grants[0], "fenced");
    assert!(grants[1..].iter().all(|grant| grant == "live"), "{grants:?}");

    it.reset();
    eventually("the first one is let go", || it.steps(0).last().is_some_and(|step| step == "kept"));
    assert_eq!(it.steps(0), ["pinned", "recalled", "fenced", "drained", "kept"]);
    let fences = it.status()["fences"].clone();
    assert_eq!((&fences["count"], &fences["not_drained"]), (&6.into(), &0.into()), "{fences}");
    it.stuck.join().expect("the host");
    it.running.stop(Running::STOP_PATIENCE).expect("an orderly end");
}

#[test]
fn a_lease_break_on_top_of_a_doubt_ends_the_grant_once() {
    let Some(it) = Served::with_a_command_that_the_device_keeps("one fence", 1) else { return };
    // To what they are: a doubt that a second look would clear.
    set_flags(&it.files[0], |flags| flags | IFlags::IMMUTABLE);
    eventually("it is in doubt", || it.steps(0).last().is_some_and(|step| step == "fenced"));
    set_flags(&it.files[0], |flags| flags - IFlags::IMMUTABLE);
    let path = it.files[0].clone();
    let opener = std::thread::spawn(move || truncate(&path, FILE_LEN));
    eventually("the lease is broken", || it.steps(0).iter().filter(|step| *step == "recalled").count() == 2);
    assert!(!opener.is_finished(), "its command is on the device");
    it.reset();
    let took = opener.join().expect("it gets in");
    assert!(took < 2 * SOON, "{took:?}");
    eventually("it is let go", || it.steps(0).last().is_some_and(|step| step == "kept"));
    assert_eq!(it.steps(0), ["pinned", "recalled", "fenced", "recalled", "drained", "kept"]);
    let incident = it.lab.incident(&it.files[0]).expect("it is written down");
    assert!(incident["reason"].as_str().is_some_and(|why| why.contains("lease break")), "{incident}");
    let fences = it.status()["fences"].clone();
    assert_eq!((&fences["count"], &fences["not_drained"]), (&1.into(), &0.into()), "{fences}");
    it.stuck.join().expect("the host");
    it.running.stop(Running::STOP_PATIENCE).expect("an orderly end");
}
