//! `fastice top` beside a daemon that serves, as text and on a terminal.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use super::daemon::{Lab, NQN, any_port};
use super::load::{Load, options};
use super::loopfs::Spec;

#[test]
fn one_picture_shows_what_hosts_do() {
    let Some(lab) = Lab::new("top", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let picture = || {
        let output = lab.fastice(&["top", "--interval", "0.5"], &[], 0);
        String::from_utf8(output.stdout).expect("text")
    };
    let rate = |text: &str| {
        let line = text.lines().find(|line| line.contains("commands/s, read")).expect("rates").to_owned();
        line.split(' ').next().and_then(|number| number.parse::<u64>().ok()).expect("a number")
    };
    let idle = picture();
    assert_eq!(rate(&idle), 0, "{idle}");

    let load = Load::start(options(daemon.address(), 1, 11));
    let text = picture();
    let line = |words: &[&str]| text.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(rate(&text) > 0, "{text}");
    assert!(line(&["process", &daemon.address().to_string()]), "{text}");
    assert!(line(&["1", "live", path.to_str().expect("text"), NQN]), "{text}");
    assert!(line(&["total", "receive", "parse", "lookup", "queue", "device", "send"]), "{text}");
    let p50 = text.lines().find(|line| line.starts_with("p50")).expect("percentiles");
    let times: Vec<f64> = p50.split_whitespace().skip(1).map(|word| word.parse().expect("a time")).collect();
    assert!(times.len() == 7 && times[0] > 0.0 && times[1..].iter().all(|time| *time <= times[0]), "{text}");
    assert!(
        line(&["2", "KiB/s", "nqn.2014-08.org.nvmexpress:uuid"]) || line(&["2", "MiB/s", "nqn."]),
        "{text}"
    );
    assert_eq!(text.lines().filter(|line| line.contains(" %")).count(), 2, "two cores: {text}");
    load.end_clean();
    daemon.stop();
}

#[test]
fn a_target_that_ends_within_the_interval_is_no_success() {
    let Some(lab) = Lab::new("top-ends", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    thread::scope(|scope| {
        let top = scope.spawn(|| lab.fastice(&["top", "--once", "--interval", "6"], &[], 6));
        // By then it has looked once.
        thread::sleep(Duration::from_secs(2));
        daemon.stop();
        let output = top.join().expect("status 6");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("ended while it was looked at") && told.contains("remedy"), "{told}");
    });
}

/// Part of every picture, in one piece: words are drawn one by one.
const DRAWN: &str = "receive";

/// What `script` saw of a shell command on a terminal of its own, which was given `keys` once it had shown a picture; `None` after
/// saying why not.
fn on_a_terminal(command: &str, keys: &str) -> Option<String> {
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("SKIPPED: fastice top on a terminal: there is no `script` (util-linux)");
        return None;
    }
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", command, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script runs");
    let mut stdin = script.stdin.take().expect("a pipe");
    let mut stdout = script.stdout.take().expect("a pipe");
    let (mut seen, mut piece, mut typed) = (Vec::new(), [0; 4096], false);
    // Ends with the command, which a signal ends if no key does.
    while let Some(len) = stdout.read(&mut piece).ok().filter(|len| *len > 0) {
        seen.extend_from_slice(&piece[..len]);
        if !typed && String::from_utf8_lossy(&seen).contains(DRAWN) {
            stdin.write_all(keys.as_bytes()).expect("it reads");
            typed = true;
        }
    }
    script.wait().expect("it ends");
    Some(String::from_utf8_lossy(&seen).into_owned())
}

#[test]
fn the_terminal_is_given_back_however_the_live_view_ends() {
    let state = tempfile::tempdir().expect("a directory");
    let top =
        format!("{} top --state-dir {}", env!("CARGO_BIN_EXE_fastice"), state.path().to_str().expect("text"));
    for (how, command, keys, code) in [
        ("by its key", format!("timeout --foreground 20 {top}"), "sq", 0),
        ("by a signal", format!("timeout --foreground --signal TERM 2 {top}"), "", 124),
        ("by a signal of the terminal's end", format!("timeout --foreground --signal HUP 2 {top}"), "", 124),
    ] {
        let command = format!("stty rows 30 cols 100; stty -g; {command}; echo code=$?; stty -g");
        let Some(seen) = on_a_terminal(&command, keys) else { return };
        let lines: Vec<&str> = seen.lines().collect();
        let (first, last) = (lines.first().expect("settings"), lines.last().expect("settings"));
        assert!(first.contains(':') && first == last, "{how}: {first} {last}");
        let (entered, left) = (seen.rfind("\u{1b}[?1049h"), seen.rfind("\u{1b}[?1049l"));
        assert!(entered.is_some() && left > entered, "{how}: {seen:?}");
        assert!(seen.contains(DRAWN) && seen.contains("quit"), "{how}: {seen:?}");
        assert!(seen.contains(&format!("code={code}")), "{how}: {seen:?}");
    }
}
