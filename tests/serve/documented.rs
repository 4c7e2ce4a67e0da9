//! The fields that the manual names are those that the commands print, while a target serves one file and has let go of another.

use std::fs::File;

use fastice::config::Config;
use fastice::control::{Running, start};
use fastice::extent::NoProgress;
use fastice::initiator::controller::Controller;
use fastice::units::Lba;
use nvme_spec::Nsid;
use serde_json::Value;

use super::daemon::{Lab, any_port, eventually};
use super::documented_names::assert_documented;
use super::load::connect_options;
use super::loopfs::Spec;

/// Makes the blocks of `path` those of another file too, which only the map shows.
fn share(lab: &Lab, path: &std::path::Path) {
    let (source, copy) = (File::open(path).expect("we may"), lab.fs.path("copy"));
    rustix::fs::ioctl_ficlone(File::create(copy).expect("room"), source).expect("XFS shares blocks");
}

#[test]
fn what_a_target_is_asked_for_is_told_as_the_manual_says() {
    let Some(lab) = Lab::new("documented fields", &Spec::XFS) else { return };
    let (broken, whole) = (lab.fragmented("broken"), lab.fragmented("whole"));
    let head = "[metrics]\nlisten = \"127.0.0.1:0\"\n";
    let namespaces: String =
        [&broken, &whole].map(|path| format!("[[subsystem.namespace]]\nfile = {path:?}\n")).concat();
    let file = lab.config(head, any_port(), &format!("allow_any_host = true\n{namespaces}"));
    let running = start(Config::load(&file).expect("a good configuration"), &mut NoProgress).expect("served");
    let host = Controller::connect(&connect_options(running.addresses()[0])).expect("a host");
    // So that there are times to tell of.
    let namespace = host.namespace(Nsid(2)).expect("the whole file");
    namespace.read(Lba(0), &mut [0; 4096]).expect("a read");
    share(&lab, &broken);
    let status = || lab.json(&["status", "--json"], 0);
    eventually("the file is let go", || {
        lab.incident(&broken).is_some() && status()["targets"][0]["exports"][0]["problem"].is_string()
    });
    let of_devices = ["devices", "device", "state"];
    let words =
        ["live", "fenced", "removed", "hidden", "map-in-doubt", "device-failed", "not-served", "operator"];
    assert_documented("status", &[], &[&status()], &[&of_devices[..], &words[..]].concat());

    let pins = lab.json(&["pins", "--events", "--json"], 0);
    assert_documented("pins", &["status"], &[&pins], &["--events", "path"]);
    let served = lab.json(&["map", "verify", "--json", whole.to_str().expect("text")], 0);
    host.shutdown().expect("the host goes");
    running.stop(Running::STOP_PATIENCE).expect("an orderly end");

    let differs = lab.json(&["map", "verify", "--json", broken.to_str().expect("text")], 4);
    assert_documented("map verify", &["pins", "status"], &[&served, &differs], &[]);
    let stored = lab.json(&["map", "export", broken.to_str().expect("text")], 0);
    let shown = lab.json(&["map", "show", "--json", broken.to_str().expect("text")], 0);
    let without_identity = |mut document: Value| {
        document["identity"] = Value::Null;
        document
    };
    let maps = [without_identity(stored), without_identity(shown)];
    let elsewhere = ["living", "stored", "map export", "name", "message", "flags"];
    assert_documented("map show", &[], &[&maps[0], &maps[1]], &elsewhere);
    let unpinned = lab.json(&["unpin", "--force", "--json", broken.to_str().expect("text")], 0);
    let refused = lab.json(&["unpin", "--json", broken.to_str().expect("text")], 1);
    assert_documented("unpin", &["pin"], &[&unpinned, &refused["unpinned"]], &["errors"]);
    let pinned = lab.json(&["pin", "--json", whole.to_str().expect("text")], 0);
    assert_documented("pin", &[], &[&pinned], &[]);
    lab.json(&["unpin", "--json", whole.to_str().expect("text")], 0);
    let past = lab.json(&["pins", "--events", "--json", whole.to_str().expect("text")], 0);
    let told = &past["not_pinned"][0];
    assert_eq!((told["path"].as_str(), past["pins"].as_array().map(Vec::len)), (whole.to_str(), Some(0)));
    let last = told["events"].as_array().and_then(|events| events.last()).expect("events");
    assert_eq!((&last["step"], last["path"].as_str()), (&"unpinned".into(), whole.to_str()), "{past}");
}
