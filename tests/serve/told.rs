//! What an operator is told of an export that was fenced: by `status`, by `pins`, and by the metrics, file by file.

use fastice::config::Config;
use fastice::control::{Running, start};
use fastice::extent::NoProgress;
use rustix::fs::IFlags;

use super::daemon::{Lab, any_port, eventually};
use super::loopfs::Spec;
use super::metrics::scrape;
use super::watch::set_flags;

#[test]
fn a_fenced_export_tells_since_when_why_and_what_hosts_see_of_it() {
    let Some(lab) = Lab::new("a fence is told", &Spec::XFS) else { return };
    let (broken, touched) = (lab.fragmented("broken"), lab.fragmented("touched"));
    let head = "[metrics]\nlisten = \"127.0.0.1:0\"\n";
    let namespaces = format!(
        "allow_any_host = true\n[[subsystem.namespace]]\nfile = {broken:?}\non_fence = \"write-protect\"\n\
         [[subsystem.namespace]]\nfile = {touched:?}\n"
    );
    let config = Config::load(&lab.config(head, any_port(), &namespaces)).expect("a good configuration");
    let running = start(config, &mut NoProgress).expect("served");
    let status = lab.json(&["status", "--json"], 0);
    let export = &status["targets"][0]["exports"][0];
    assert_eq!((&export["on_fence"], &export["guard"]), (&"write-protect".into(), &"default".into()));
    assert_eq!(export["recalls"]["doubts"], 0, "{export}");
    assert!(
        export.get("problem").is_none()
            && export.get("fenced_since_ms").is_none()
            && export.get("reason").is_none(),
        "{export}"
    );

    set_flags(&broken, |flags| flags - IFlags::IMMUTABLE);
    // To what they are: a second look finds nothing.
    set_flags(&touched, |flags| flags | IFlags::IMMUTABLE);
    let exports = || lab.json(&["status", "--json"], 0)["targets"][0]["exports"].clone();
    eventually("one is let go, and one cleared", || {
        let exports = exports();
        exports[0]["problem"].is_string() && exports[1]["recalls"]["cleared"] == 1
    });
    let exports = exports();
    let (broken_export, touched_export) = (&exports[0], &exports[1]);
    assert_eq!(broken_export["grant"], "fenced", "{exports}");
    assert_eq!(broken_export["reason"], "map-in-doubt", "a word for scripts: {exports}");
    assert!(broken_export["fenced_since_ms"].as_u64() > Some(1_700_000_000_000), "{exports}");
    let recalls = &broken_export["recalls"];
    assert_eq!((&recalls["doubts"], &recalls["cleared"]), (&1.into(), &0.into()), "{exports}");
    assert_eq!(recalls["last"]["reason"], "flag-cleared", "{exports}");
    assert_eq!(
        (&touched_export["grant"], &touched_export["on_fence"]),
        (&"live".into(), &"not-ready".into())
    );
    assert_eq!(touched_export["recalls"]["last"]["reason"], "touched", "{exports}");
    assert_eq!(lab.incident(&broken).expect("it is written down")["kind"], "flag-cleared");

    let told = lab.fastice(&["status"], &[], 0).stdout;
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(!told.contains("MapInDoubt") && told.contains("write-protect"), "{told}");
    for part in
        ["fenced since 2", "the immutable flag of the file was cleared", "not served, and held by nobody: "]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    let pins = lab.fastice(&["pins"], &[], 0).stdout;
    assert!(String::from_utf8_lossy(&pins).contains("fenced since 2"), "{pins:?}");

    let address = lab.json(&["status", "--json"], 0)["targets"][0]["metrics"].clone();
    let address = address.as_str().expect("an address").to_owned();
    for (name, of_broken, of_touched) in [
        ("fastice_pin_recalls_total", 0, 0),
        ("fastice_pin_doubts_total", 1, 1),
        ("fastice_pin_doubts_cleared_total", 0, 1),
        ("fastice_pin_not_drained_total", 0, 0),
    ] {
        let is_told = |path: &std::path::Path, value: u32| {
            let ends = format!("path=\"{}\"}} {value}", path.display());
            scrape(&address).lines().any(|line| line.starts_with(name) && line.ends_with(&ends))
        };
        eventually(name, || is_told(&broken, of_broken) && is_told(&touched, of_touched));
    }
    running.stop(Running::STOP_PATIENCE).expect("an orderly end");
    lab.fastice(&["unpin"], &[&broken], 0);
}
