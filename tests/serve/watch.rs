//! What nobody holds up is noticed by the watch: fenced at once, let in again when it was nothing, abandoned when it was.
//!
//! The target runs in this process, which alone gets past the open-permission mark, and so plays root.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use fastice::config::Config;
use fastice::control::{Running, start};
use fastice::extent::NoProgress;
use fastice::initiator::bench::BenchOptions;
use fastice::initiator::controller::Controller;
use rustix::fs::IFlags;
use serde_json::Value;

use super::daemon::{Lab, any_port, eventually, is_immutable};
use super::load::{Load, assert_in_file, connect_options, options};
use super::loopfs::Spec;

pub(crate) fn set_flags(path: &Path, change: impl Fn(IFlags) -> IFlags) {
    let file = File::open(path).expect("we may");
    let flags = rustix::fs::ioctl_getflags(&file).expect("flags");
    rustix::fs::ioctl_setflags(&file, change(flags)).expect("root may");
}

pub(crate) fn is_ready(host: &Controller) -> bool {
    let cns = nvme_spec::identify::Cns::INDEPENDENT_NAMESPACE;
    host.identify_raw(cns, nvme_spec::Nsid(1), 0).expect("an answer")[14] == 1
}

/// The events of the only pin, by their names.
pub(crate) fn steps(lab: &Lab) -> Vec<String> {
    steps_in(&lab.json(&["pins", "--events", "--json"], 0)["pins"][0])
}

/// The events of the pin of a file.
pub(crate) fn steps_of(lab: &Lab, path: &Path) -> Vec<String> {
    let pins = lab.json(&["pins", "--events", "--json"], 0);
    let rows = pins["pins"].as_array().expect("an array");
    rows.iter().find(|row| row["path"].as_str() == path.to_str()).map(steps_in).unwrap_or_default()
}

fn steps_in(pin: &Value) -> Vec<String> {
    let events = pin["events"].as_array().cloned().unwrap_or_default();
    events.iter().filter_map(|event| event["step"].as_str()).map(str::to_owned).collect()
}

#[test]
fn a_touch_is_fenced_looked_at_and_served_again() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("touched while served", &spec) else { return };
        let path = lab.fragmented("file");
        let config = Config::load(&lab.open_config(any_port(), &[&path])).expect("a good configuration");
        let running = start(config, &mut NoProgress).expect("served");
        let address = running.addresses()[0];
        for round in 1..=3 {
            let load = Load::start(BenchOptions { reconnect: None, ..options(address, 1, 150 + round) });
            load.goes_on();
            // To what they are: the change time tells of it, and at no moment is the file anything else.
            set_flags(&path, |flags| flags | IFlags::IMMUTABLE);
            let count = usize::try_from(round).expect("small");
            eventually("it is cleared", || {
                steps(&lab).iter().filter(|step| *step == "cleared").count() == count
            });
            let (report, _) = load.end().expect("the connection lives");
            assert_eq!(report.verify.faults, 0, "{report:?}");
            let again = Load::start(options(address, 1, 160 + round));
            let (_, mut ledger) = again.end_clean();
            assert_in_file(&mut ledger, &path);
        }
        let status = lab.json(&["status", "--json"], 0);
        let target = &status["targets"][0];
        assert_eq!(
            (&target["fences"]["count"], &target["fences"]["cleared"]),
            (&3.into(), &3.into()),
            "{target}"
        );
        let export = &target["exports"][0];
        assert_eq!((&export["grant"], export["path"].as_str()), (&"live".into(), path.to_str()), "{target}");
        assert!(
            export["watch"]["checks"].as_u64() > Some(3) && export["watch"]["bound_ms"].as_u64() > Some(0)
        );
        let told = lab.fastice(&["status"], &[], 0).stdout;
        assert!(String::from_utf8_lossy(&told).contains("3 fence(s), 3 cleared"), "{told:?}");
        let steps = steps(&lab);
        assert_eq!(steps[..5], ["pinned", "recalled", "fenced", "drained", "cleared"], "{steps:?}");
        running.stop(Running::STOP_PATIENCE).expect("an orderly end");
        assert!(!is_immutable(&path));
        assert_eq!(lab.json(&["status", "--json"], 0)["targets"].as_array().map(Vec::len), Some(0));
    }
}

#[test]
fn a_cleared_flag_ends_the_grant_until_the_operator_resumes_it() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("flag cleared while served", &spec) else { return };
        let path = lab.fragmented("file");
        let file = lab.open_config(any_port(), &[&path]);
        let config = Config::load(&file).expect("a good configuration");
        let running = start(config.clone(), &mut NoProgress).expect("served");
        let host = Controller::connect(&connect_options(running.addresses()[0])).expect("a host");
        assert!(is_ready(&host));
        set_flags(&path, |flags| flags - IFlags::IMMUTABLE);
        eventually("the export is fenced", || !is_ready(&host));
        assert!(
            host.next_event(Duration::from_secs(10)).expect("the host lives").is_some(),
            "and that is told"
        );
        eventually("the file is let go", || steps(&lab).last().is_some_and(|step| step == "kept"));
        let incident = lab.incident(&path).expect("it is written down");
        assert!(
            incident["reason"].as_str().is_some_and(|reason| reason.contains("immutable flag")),
            "{incident}"
        );
        assert!(!is_ready(&host), "nothing resumes by itself");

        // The operator has looked; what is there now is what hosts shall see.
        let first = generation(&lab);
        lab.fastice(&["pin", "--resume"], &[&path], 0);
        assert!(generation(&lab) > first && lab.incident(&path).is_none());
        running.reload(config).expect("reloaded");
        eventually("it is served again", || is_ready(&host));
        let load = Load::start(options(running.addresses()[0], 1, 171));
        let (_, mut ledger) = load.end_clean();
        assert_in_file(&mut ledger, &path);
        host.shutdown().expect("the host goes");
        running.stop(Running::STOP_PATIENCE).expect("an orderly end");
        assert!(!is_immutable(&path), "serve had pinned it, and so it ends with it");
    }
}

fn generation(lab: &Lab) -> u64 {
    let pin: Value = lab.pin().expect("a pin");
    pin["generation"].as_u64().expect("a number")
}

#[test]
fn a_resume_of_what_was_never_pinned_is_refused() {
    let Some(lab) = Lab::new("resume nothing", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    lab.fastice(&["pin", "--resume"], &[&path], 2);
    std::fs::create_dir(lab.place("state")).expect("a state directory");
    lab.fastice(&["pin", "--resume"], &[&path], 1);
    assert!(!is_immutable(&path));
}
