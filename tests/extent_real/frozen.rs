//! Goal: a frozen filesystem stays so as long as a pin wants it, whatever becomes of the process, and no longer.
//!
//! Nothing here may stay frozen: `loopfs` thaws what a failed test has left before it unmounts.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use fastice::extent::{
    Doubt, GuardMode, NoProgress, OnRecall, PinOptions, RecallReason, StateDir, pin, unpin, verify_stored,
};

use super::files::{BOTH, command, state_of, try_pin, written};
use super::loopfs::{self, LoopFs, Spec};
use super::pin::assert_ordinary;

fn options() -> PinOptions {
    PinOptions { guard: Some(GuardMode::FrozenFilesystem), ..PinOptions::default() }
}

fn fsfreeze(fs: &LoopFs, how: &str) -> Result<String, String> {
    loopfs::run(&mut command("fsfreeze", &[how], &fs.root()))
}

fn is_frozen(fs: &LoopFs) -> bool {
    match fsfreeze(fs, "--freeze") {
        Ok(_) => {
            fsfreeze(fs, "--unfreeze").expect("just frozen");
            false
        }
        Err(error) => {
            assert!(error.contains("busy"), "{error}");
            true
        }
    }
}

/// Nothing waits any more.
fn assert_thawed(fs: &LoopFs) {
    assert!(!is_frozen(fs));
    fs::write(fs.path("anything"), "some bytes").expect("room");
    let marks = fs::read_dir(fs.outside()).expect("the state directory");
    let left = marks.flatten().filter(|entry| entry.path().extension().is_some_and(|end| end == "frozen"));
    assert_eq!(left.count(), 0, "no mark says that it is frozen");
}

fn writer(fs: &LoopFs) -> Child {
    command("touch", &[], &fs.path("elsewhere")).spawn().expect("it runs")
}

fn ends(child: &mut Child) {
    let begun = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(20), "a writer waits for ever");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn writers_wait_until_the_last_pin_of_the_filesystem_ends() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("frozen pin", &spec) else { return };
        let (first, second) = (fs.path("first"), fs.path("second"));
        drop((written(&first, 16), written(&second, 16)));
        let one = try_pin(&fs, &first, &options()).expect("pinned");
        assert!(is_frozen(&fs) && one.verify().expect("an answer").is_sound());
        let mut waiting = writer(&fs);
        std::thread::sleep(Duration::from_millis(300));
        assert!(waiting.try_wait().expect("a child").is_none(), "it waits");
        // The second one has to thaw it for a moment, which the watch over the first knows of.
        let two = try_pin(&fs, &second, &options()).expect("pinned too");
        ends(&mut waiting);
        std::thread::sleep(Duration::from_millis(400));
        for file in [&one, &two] {
            assert!(file.verify().expect("an answer").is_sound());
            assert!(file.recall().is_some_and(|recall| recall.reason().is_none()));
        }
        let other = fs.path("other");
        one.release().expect("released");
        assert!(is_frozen(&fs), "the second one wants it");
        assert!(two.verify().expect("an answer").is_sound());
        two.release().expect("released");
        assert_ordinary(&fs, &first);
        assert_ordinary(&fs, &second);
        assert_thawed(&fs);
        drop(written(&other, 1));
    }
}

#[test]
fn a_thaw_by_somebody_else_is_noticed() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("frozen, thawed", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let (send, recalled) = channel();
        let send = std::sync::Mutex::new(send);
        let on_recall: OnRecall = Arc::new(move |incident| {
            // The test may be over.
            let _ = send.lock().expect("no panic").send(incident.clone());
        });
        let file =
            try_pin(&fs, &path, &PinOptions { on_recall: Some(on_recall), ..options() }).expect("pinned");
        assert!(recalled.recv_timeout(Duration::from_millis(300)).is_err(), "nothing is wrong yet");
        let begun = Instant::now();
        fsfreeze(&fs, "--unfreeze").expect("root may");
        let incident = recalled.recv_timeout(Duration::from_secs(20)).expect("noticed");
        assert_eq!(incident.reason, RecallReason::Doubt(Doubt::Thawed));
        assert!(incident.noticed.saturating_duration_since(begun) < Duration::from_secs(5));
        assert!(!file.verify().expect("an answer").guard_holds);
        file.second_look().expect("guarded").look().expect_err("it is still thawed");
        file.keep();
        assert!(!is_frozen(&fs), "a look leaves nothing frozen");
        unpin(&path, &state_of(&fs), false).expect("unpinned");
        assert_ordinary(&fs, &path);
        assert_thawed(&fs);
    }
}

#[test]
fn a_killed_process_leaves_it_frozen_until_it_is_unpinned() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("frozen, killed", &spec) else { return };
        let (path, other) = (fs.path("file"), fs.path("other"));
        drop((written(&path, 16), written(&other, 16)));
        let mut child = Command::new(env!("CARGO_BIN_EXE_fastice"))
            .args(["pin", "--hold", "--guard", "frozen-filesystem", "--state-dir"])
            .args([&fs.outside(), &path])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        assert!(lines.any(|line| line.expect("text").contains("holding all guards")));
        // While that process watches, nobody else may thaw it, nor write to it with other guards.
        let error = try_pin(&fs, &other, &options()).expect_err("it would be taken for a break");
        assert!(error.to_string().contains("another process"), "{error}");
        let error = try_pin(&fs, &other, &PinOptions::default()).expect_err("the flag could not be set");
        assert!(error.to_string().contains("frozen for files that are pinned with"), "{error}");
        child.kill().expect("it lives");
        child.wait().expect("it ends");
        assert!(is_frozen(&fs));
        let state = state_of(&fs);
        let record = state.records().expect("readable").remove(0).expect("whole");
        assert!(verify_stored(&record).expect("an answer").is_held());
        let adopted = try_pin(&fs, &path, &PinOptions::default()).expect("adopted");
        assert!(adopted.guard_mode() == GuardMode::FrozenFilesystem && is_frozen(&fs));
        adopted.keep();
        assert!(is_frozen(&fs));
        assert!(unpin(&path, &state, false).expect("unpinned").immutable_cleared);
        assert_ordinary(&fs, &path);
        assert_thawed(&fs);
    }
}

#[test]
fn whatever_step_a_crash_left_it_at_it_is_thawed() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("frozen, crash steps", &spec) else { return };
        let (path, state) = (fs.path("file"), state_of(&fs));
        drop(written(&path, 16));
        let keep = || try_pin(&fs, &path, &options()).expect("pinned").keep();
        // Thawed, and the rest still there; the flag is cleared too.
        for step in 1..=2 {
            keep();
            fsfreeze(&fs, "--unfreeze").expect("root may");
            if step == 2 {
                loopfs::run(&mut command("chattr", &["-i"], &path)).expect("root may");
            }
            unpin(&path, &state, false).expect("unpinned");
            assert_ordinary(&fs, &path);
            assert_thawed(&fs);
        }
        // The record is damaged.
        keep();
        let key = state.records().expect("readable").remove(0).expect("whole").identity.key();
        fs::write(state.path().join(format!("{key}.json")), "{").expect("room");
        unpin(&path, &state, true).expect("by force");
        assert_ordinary(&fs, &path);
        assert_thawed(&fs);
    }
}

#[test]
fn what_must_not_be_frozen_or_is_already_is_refused() {
    let Some(fs) = loopfs::make_or_skip("frozen, refused", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    let inside = StateDir::open(fs.path("state")).expect("a directory");
    let error = pin(&path, &options(), &inside, &mut NoProgress).expect_err("it could not be written");
    assert!(error.to_string().contains("state directory"), "{error}");
    let log = fs::File::create(fs.path("log")).expect("room");
    let error = try_pin(&fs, &path, &options()).expect_err("this process writes there");
    assert!(error.to_string().contains("its log"), "{error}");
    drop(log);
    fsfreeze(&fs, "--freeze").expect("root may");
    let refused = try_pin(&fs, &path, &options());
    fsfreeze(&fs, "--unfreeze").expect("it still is");
    let error = refused.expect_err("it is somebody else's");
    assert!(error.to_string().contains("somebody else"), "{error}");
    assert_ordinary(&fs, &path);
}

#[test]
fn a_filesystem_is_frozen_for_all_pins_on_it_or_for_none() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("frozen, mixed", &spec) else { return };
        let (first, second) = (fs.path("first"), fs.path("second"));
        drop((written(&first, 16), written(&second, 16)));
        // What is pinned without it could not be let go while it is frozen.
        let plain = try_pin(&fs, &first, &PinOptions::default()).expect("pinned");
        let error = try_pin(&fs, &second, &options()).expect_err("the other one is in the way");
        assert!(error.to_string().contains("pinned without it"), "{error}");
        assert!(error.remedy().contains("unpin those first"), "{}", error.remedy());
        plain.release().expect("it does not wait");
        assert_thawed(&fs);

        let frozen = try_pin(&fs, &second, &options()).expect("pinned");
        let error = try_pin(&fs, &first, &PinOptions::default()).expect_err("it is frozen");
        let text = error.to_string();
        assert!(text.contains("with the default guard"), "what was asked for is named: {text}");
        assert!(error.remedy().contains("frozen-filesystem guard too"), "{}", error.remedy());
        frozen.release().expect("released");
        assert_thawed(&fs);
        assert_ordinary(&fs, &first);
        assert_ordinary(&fs, &second);
    }
}
