//! Goal: on a read-only filesystem a file is pinned without a flag, what root does about that is noticed, and the file is
//! given back as it was.
//!
//! Only this process gets past the open-permission mark, so it plays root.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use fastice::extent::{
    Doubt, ExtentError, ExtentErrorKind, GuardMode, NoProgress, OnRecall, PinOptions, RecallReason, StateDir,
    pin, unpin, verify_stored,
};

use super::files::{BOTH, command, state_of, try_pin, written};
use super::loopfs::{self, LoopFs, Spec};
use super::pin::assert_ordinary;

fn options() -> PinOptions {
    PinOptions { guard: Some(GuardMode::ReadOnlyMount), ..PinOptions::default() }
}

fn remount(fs: &LoopFs, options: &str) {
    let options = format!("remount,{options}");
    loopfs::run(&mut command("mount", &["-o", &options], &fs.root())).expect("root may");
}

#[test]
fn a_file_on_a_read_only_filesystem_is_pinned_without_a_flag() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("read-only pin", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let error = try_pin(&fs, &path, &options()).expect_err("it can be written");
        assert!(error.to_string().contains("not mounted read-only"), "{error}");
        remount(&fs, "ro");
        let error = try_pin(&fs, &path, &PinOptions::default()).expect_err("no flag can be set");
        assert_eq!(error.kind(), ExtentErrorKind::Guard, "{error}");
        let reader = File::open(&path).expect("readable");
        assert_eq!(try_pin(&fs, &path, &options()).expect_err("in use").kind(), ExtentErrorKind::InUse);
        drop(reader);
        let file = try_pin(&fs, &path, &options()).expect("pinned");
        let report = file.verify().expect("an answer");
        assert!(report.is_sound() && !report.immutable && report.lease_held == Some(true), "{report:?}");
        for (refused, why) in [
            (command("cat", &[], &path), "not permitted"),
            (command("truncate", &["-s", "0"], &path), "ead-only"),
            (command("chattr", &["+i"], &path), "not permitted"),
            (command("unlink", &[], &path), "ead-only"),
            (command("chmod", &["600"], &path), "ead-only"),
            (command("umount", &[], &fs.root()), "busy"),
        ] {
            let mut refused = refused;
            let error = loopfs::run(&mut refused).expect_err("refused");
            // The mark is asked before the filesystem where a file is opened.
            assert!(error.contains(why) || error.contains("not permitted"), "{error}");
        }
        let error = OpenOptions::new().write(true).open(&path).expect_err("for this process too");
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        assert!(file.verify().expect("an answer").is_sound());
        file.release().expect("released");
        assert_ordinary(&fs, &path);
        assert_eq!(fs::read(&path).expect("anybody may").len(), 16 * 4096);
    }
}

#[test]
fn a_remount_is_noticed_and_stands_until_it_is_undone() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("read-only, remounted", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        remount(&fs, "ro");
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
        remount(&fs, "rw");
        let incident = recalled.recv_timeout(Duration::from_secs(20)).expect("noticed");
        assert_eq!(incident.reason, RecallReason::Doubt(Doubt::Writable));
        assert!(incident.noticed.saturating_duration_since(begun) < Duration::from_secs(5));
        let report = file.verify().expect("an answer");
        assert!(!report.guard_holds && !report.is_sound(), "{report:?}");
        file.second_look().expect("guarded").look().expect_err("it can still be written");
        // A mount of its own that is read-only is not enough.
        remount(&fs, "bind,ro");
        assert!(!file.verify().expect("an answer").guard_holds);
        file.keep();
        let error = try_pin(&fs, &path, &PinOptions::default()).expect_err("the record says how");
        assert!(error.to_string().contains("not mounted read-only"), "{error}");
        remount(&fs, "bind,rw");
        remount(&fs, "ro");
        let file = try_pin(&fs, &path, &PinOptions::default()).expect("as the record says");
        assert_eq!((file.guard_mode(), file.map().generation()), (GuardMode::ReadOnlyMount, 2));
        file.release().expect("released");
        assert_ordinary(&fs, &path);
    }
}

#[test]
fn a_killed_process_leaves_a_record_that_is_verified_adopted_and_let_go() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("read-only, killed", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        remount(&fs, "ro");
        let mut child = Command::new(env!("CARGO_BIN_EXE_fastice"))
            .args(["pin", "--hold", "--guard", "read-only-mount", "--state-dir"])
            .args([&fs.outside(), &path])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        assert!(lines.any(|line| line.expect("text").contains("holding all guards")));
        child.kill().expect("it lives");
        child.wait().expect("it ends");
        let state = state_of(&fs);
        let record = state.records().expect("readable").remove(0).expect("whole");
        assert!(verify_stored(&record).expect("an answer").is_held());
        let pins = Command::new(env!("CARGO_BIN_EXE_fastice"))
            .args(["pins", "--json", "--state-dir"])
            .arg(fs.outside())
            .output()
            .expect("the binary runs");
        let told = String::from_utf8_lossy(&pins.stdout);
        assert!(
            told.contains("\"state\": \"read-only\"") || told.contains("\"state\":\"read-only\""),
            "{told}"
        );
        try_pin(&fs, &path, &PinOptions::default()).expect("adopted").keep();
        // Somebody may make it writable, and even set a flag of his own, before it is let go.
        remount(&fs, "rw");
        loopfs::run(&mut command("chattr", &["+i"], &path)).expect("root may");
        assert!(!verify_stored(&record).expect("an answer").is_held());
        let report = unpin(&path, &state, false).expect("unpinned");
        assert_eq!(
            (report.immutable_cleared, report.map_was_true),
            (false, Some(true)),
            "it is not our flag"
        );
        loopfs::run(&mut command("chattr", &["-i"], &path)).expect("root may");
        assert_ordinary(&fs, &path);
    }
}

#[test]
fn a_mount_without_its_log_and_a_state_directory_on_it_are_refused() {
    let Some(fs) = loopfs::make_or_skip("read-only, refused", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    let inside = StateDir::open(fs.path("state")).expect("a directory");
    remount(&fs, "ro");
    let error = pin(&path, &options(), &inside, &mut NoProgress).expect_err("it could not be written");
    assert!(matches!(error, ExtentError::Guard { .. } | ExtentError::Io { .. }), "{error}");
    loopfs::unmount(&fs.root()).expect("nobody uses it");
    let mut mount = Command::new("mount");
    mount.args(["-o", "ro,norecovery", fs.device()]).arg(fs.root());
    loopfs::run(&mut mount).expect("root may");
    let error = try_pin(&fs, &path, &options()).expect_err("its log may hold changes");
    assert!(error.to_string().contains("without its log"), "{error}");
}
