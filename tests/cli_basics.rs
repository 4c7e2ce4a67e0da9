//! Goal: what scripts rely on without any file pinned: exit statuses, JSON shapes, errors on the right stream.
//! Method: run the binary.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn fastice(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fastice"))
        .args(args)
        .env_remove("FASTICE_STATE_DIR")
        .env_remove("FASTICE_CONFIG")
        .env_remove("RUST_LOG")
        .output()
        .expect("the binary runs")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("an exit status, not a signal")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in: {text}"))
}

fn keys(value: &Value) -> Vec<&str> {
    let object = value.as_object().expect("an object");
    let mut keys: Vec<&str> = object.keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// An address on which nobody listens: a port that was free a moment ago.
fn nobody() -> String {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    socket.local_addr().expect("its address").to_string()
}

#[test]
fn help_tells_every_command_and_every_exit_status() {
    let output = fastice(&["--help"]);
    assert_eq!(code(&output), 0);
    let text = stdout(&output);
    for word in [
        "demo",
        "pin",
        "unpin",
        "pins",
        "map",
        "serve",
        "device",
        "discover",
        "bench",
        "doctor",
        "completions",
        "man",
    ] {
        assert!(text.lines().any(|line| line.trim_start().starts_with(word)), "{word}");
    }
    assert!(text.contains("Exit status:") && text.contains("  6  "), "{text}");
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for args in [
        &["thaw"][..],
        &["pin"],
        &["bench", "--rw", "sideways"],
        &["bench", "--address", "x"],
        &["map", "show"],
        &["device"],
        &["device", "bind"],
        &["device", "bind", "nvme0"],
        &["device", "unbind", "--driver", "../x", "0000:00:00.0"],
        &["device", "probe"],
        &["device", "hugepages", "--persist"],
        &["device", "hugepages", "--size", "3MiB"],
        &["device", "hugepages", "--count", "1", "--node", "4000"],
    ] {
        let output = fastice(args);
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
    // The load itself makes no sense: found before anything is connected.
    let args = ["bench", "--address", &nobody(), "--nqn", "nqn.2026-11.a:b", "--rw", "read", "--verify"];
    assert_eq!(code(&fastice(&args)), 2);
}

#[test]
fn a_wrong_configuration_exits_with_2_and_shows_the_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("fastice.toml");
    std::fs::write(&file, "[[listener]]\naddress = \"127.0.0.1:4420\"\nadress = 1\n").expect("a file");
    let output = fastice(&["serve", "--check", "--config", path(&file)]);
    assert_eq!(code(&output), 2);
    let text = stderr(&output);
    assert!(text.contains("fastice.toml:3:1: unknown field `adress`"), "{text}");
    assert!(text.contains(" 3 | adress = 1\n   | ^^^^^^"), "{text}");

    std::fs::write(&file, "[[listener]]\naddress = \"127.0.0.1:4420\"\n").expect("a file");
    let output = fastice(&["serve", "--check", "--config", path(&file)]);
    assert_eq!((code(&output), stdout(&output)), (0, format!("{}: good\n", file.display())));
}

#[test]
fn a_target_that_is_not_there_exits_with_6() {
    let output = fastice(&["discover", &nobody(), "--json"]);
    assert_eq!(code(&output), 6, "{}", stderr(&output));
    assert!(output.stdout.is_empty());
    let error = json(&stderr(&output));
    assert_eq!(keys(&error["error"]), ["causes", "kind", "message", "remedy"]);
    assert_eq!(error["error"]["kind"], "unreachable");

    let output = fastice(&["bench", "--address", &nobody(), "--nqn", "nqn.2026-11.a:b"]);
    assert_eq!(code(&output), 6);
    assert!(stderr(&output).contains("error: ") && stderr(&output).contains("remedy: "));
}

#[test]
fn a_state_directory_that_is_named_and_not_there_is_a_mistake() {
    let dir = tempfile::tempdir().expect("a directory");
    let (state, file) = (dir.path().join("state"), dir.path().join("file"));
    std::fs::write(&file, "").expect("room");
    for command in [
        &["pins"][..],
        &["status"],
        &["top", "--once"],
        &["trace"],
        &["unpin", "--left-behind"],
        &["unpin", "/nonexistent"],
        &["map", "verify", "/nonexistent"],
        &["map", "export", "/nonexistent"],
        &["read", "/nonexistent"],
        &["pin", "--resume", "/nonexistent"],
    ] {
        for (place, what) in [(&state, "does not exist"), (&file, "is no directory")] {
            let output = fastice(&[command, &["--state-dir", path(place)]].concat());
            let told = stderr(&output);
            assert_eq!(code(&output), 2, "{command:?}: {told}");
            assert!(told.contains(what) && told.contains("--state-dir"), "{command:?}: {told}");
        }
    }
    let output = fastice(&["status", "--json", "--state-dir", path(&state)]);
    assert_eq!((code(&output), &json(&stderr(&output))["error"]["kind"]), (2, &"usage".into()));
    assert!(!state.exists(), "looking makes no directory");
}

#[test]
fn an_empty_state_directory_has_no_pins_and_no_targets() {
    let dir = tempfile::tempdir().expect("a directory");
    let with = |command: &[&str]| fastice(&[command, &["--state-dir", path(dir.path())]].concat());
    let output = with(&["pins", "--json"]);
    assert_eq!(code(&output), 0);
    assert_eq!(json(&stdout(&output)), serde_json::json!({ "pins": [], "not_pinned": [] }));
    let output = with(&["status"]);
    assert_eq!(code(&output), 0);
    assert!(stdout(&output).contains("no target runs"), "{}", stdout(&output));
    for command in ["top", "trace"] {
        let output = with(&[command]);
        assert_eq!(code(&output), 0);
        assert!(stdout(&output).contains("no target runs"), "{}", stdout(&output));
    }
    let output = with(&["trace", "--format", "chrome"]);
    assert_eq!(json(&stdout(&output))["traceEvents"], serde_json::json!([]));
    assert!(stderr(&output).contains("no target runs"), "{}", stderr(&output));
    let output = with(&["unpin", "/nonexistent", "--json"]);
    assert_eq!(code(&output), 3, "it is not there");
    let document = json(&stdout(&output));
    assert_eq!(keys(&document), ["errors", "unpinned"]);
    assert_eq!(keys(&document["errors"][0]), ["error", "path"]);
    let output = with(&["map", "verify", "/nonexistent"]);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("/nonexistent is not pinned"), "{}", stderr(&output));
}

#[test]
fn what_lies_on_no_disk_is_refused_with_3() {
    let dir = tempfile::tempdir().expect("a directory");
    let output = fastice(&["pin", "--json", "--state-dir", path(dir.path()), "/proc/version"]);
    assert_eq!(code(&output), 3, "{}", stderr(&output));
    let document = json(&stdout(&output));
    assert_eq!(keys(&document), ["errors", "held", "pins"]);
    assert_eq!(document["errors"][0]["error"]["kind"], "refused");
    assert!(output.stderr.is_empty(), "{}", stderr(&output));
}

#[test]
fn doctor_says_what_it_checked() {
    let output = fastice(&["doctor", "--json"]);
    let report = json(&stdout(&output));
    assert_eq!(keys(&report), ["checks", "healthy"]);
    assert_eq!(report["healthy"] == true, code(&output) == 0);
    let checks = report["checks"].as_array().expect("an array");
    let ids: Vec<&str> = checks.iter().filter_map(|check| check["id"].as_str()).collect();
    for id in [
        "kernel",
        "io-uring",
        "hugepages-2m",
        "memlock",
        "xfs",
        "ext4",
        "fanotify",
        "capabilities",
        "pins",
        "nvme",
        "iommu",
        "vfio-pci",
        "taken",
    ] {
        assert!(ids.contains(&id), "{id} is not in {ids:?}");
    }
}

#[test]
fn doctor_says_why_a_configuration_is_not_read() {
    let output = fastice(&["doctor", "--json", "--config", "/nowhere/fastice.toml"]);
    let report = json(&stdout(&output));
    let checks = report["checks"].as_array().expect("an array");
    let check = checks.iter().find(|check| check["id"] == "config").expect("of the configuration");
    assert_eq!(check["status"], "fail");
    let text = check.to_string();
    assert!(text.contains("No such file") && text.contains("--config"), "{text}");
}

#[test]
fn devices_are_listed_and_what_is_none_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state");
    let output = fastice(&["device", "list", "--json", "--state-dir", path(&state)]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(keys(&json(&stdout(&output))), ["controllers"]);
    let bind = ["device", "bind", "--json", "--state-dir", path(&state), "fffe:1f:1f.7", "--dry-run"];
    for bind in [&bind[..], &bind[..6]] {
        let output = fastice(bind);
        assert_eq!(code(&output), 3, "{}", stderr(&output));
        let document = json(&stdout(&output));
        assert_eq!(keys(&document), ["bound", "dry_run", "errors"]);
        assert_eq!(document["errors"][0]["address"], "fffe:1f:1f.7");
        assert_eq!(document["errors"][0]["error"]["kind"], "refused");
        assert!(!state.exists(), "looking makes no state directory");
    }
    let output = fastice(&["device", "unbind", "--json", "--state-dir", path(&state), "fffe:1f:1f.7"]);
    assert_eq!((code(&output), keys(&json(&stdout(&output)))), (3, vec!["errors", "unbound"]));
    let output = fastice(&["device", "hugepages", "--json"]);
    assert_eq!((code(&output), keys(&json(&stdout(&output)))), (0, vec!["pools", "remedy", "reservation"]));
}

#[test]
fn a_probe_of_the_model_reads_an_image_and_leaves_it_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image");
    std::fs::write(&image, vec![7; 1 << 20]).expect("a file");
    let output = fastice(&["device", "probe", "--model", path(&image), "--json"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let report = json(&stdout(&output));
    assert_eq!((&report["access"], &report["namespaces"][0]["nsid"]), (&"model".into(), &1.into()));
    assert!(report["namespaces"][0]["reads"][1]["reads"]["iops"].as_f64().expect("a number") > 0.0);
    assert!(std::fs::read(&image).expect("a file").iter().all(|&byte| byte == 7));
    let output = fastice(&["device", "probe", "--model", "/nonexistent", "--json"]);
    assert_eq!((code(&output), output.stdout.len()), (1, 0));
    assert!(json(&stderr(&output))["error"]["remedy"].is_string());
    let output = fastice(&["device", "probe", "fffe:1f:1f.7"]);
    assert_eq!(code(&output), 3, "{}", stderr(&output));
}

#[test]
fn completions_and_manual_pages_come_out() {
    for shell in ["bash", "zsh", "fish"] {
        let output = fastice(&["completions", shell]);
        let text = stdout(&output);
        assert!(code(&output) == 0 && text.contains("unpin") && text.contains("hugepages"), "{shell}");
    }
    assert!(stdout(&fastice(&["man"])).contains(".TH fastice 1"));
    let dir = tempfile::tempdir().expect("a directory");
    assert_eq!(code(&fastice(&["man", path(dir.path())])), 0);
    for page in [
        "fastice.1",
        "fastice-serve.1",
        "fastice-map-show.1",
        "fastice-device-bind.1",
        "fastice-device-probe.1",
    ] {
        assert!(dir.path().join(page).exists(), "{page}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let shell = format!("{} --help | head -1", env!("CARGO_BIN_EXE_fastice"));
    let script = format!(
        "set -o pipefail; {shell} >/dev/null; {} completions bash | head -1 >/dev/null",
        env!("CARGO_BIN_EXE_fastice")
    );
    let output = Command::new("bash").args(["-c", &script]).output().expect("bash");
    assert!(output.status.success(), "{}", stderr(&output));
}
