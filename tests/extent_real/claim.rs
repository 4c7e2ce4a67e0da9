//! A file is pinned by one fastice at a time, whatever their state directories: also where the guards themselves would be granted
//! to both.

use std::fs::{self, File, Permissions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use fastice::extent::{
    ExtentError, ExtentErrorKind, GuardMode, LocalReaders, NoProgress, PinOptions, PinnedFile, StateDir, pin,
    unpin,
};

use super::files::{Ended, command, written};
use super::loopfs::{self, LoopFs, Spec};

/// The state directories of two who know nothing of each other.
fn two_states(fs: &LoopFs) -> [StateDir; 2] {
    ["one", "other"].map(|name| StateDir::open(fs.outside().join(name)).expect("room"))
}

fn pin_in(state: &StateDir, path: &Path, options: &PinOptions) -> Result<PinnedFile, ExtentError> {
    pin(path, options, state, &mut NoProgress)
}

/// The error names the process and its state directory, and what to do.
fn assert_held_by(error: &ExtentError, pid: u32, state: &StateDir) {
    assert_eq!(error.kind(), ExtentErrorKind::InUse, "{error}");
    let place = state.path().to_str().expect("a plain name");
    let (told, process) = (error.to_string(), format!("pinned by process {pid} "));
    assert!(told.contains(&process) && told.contains(place), "{told}");
    assert!(error.remedy().contains(&format!("--state-dir {place}")), "{}", error.remedy());
}

#[test]
fn where_readers_are_let_in_a_second_fastice_is_not() {
    let Some(fs) = loopfs::make_or_skip("two state directories, readers", &Spec::EXT4) else { return };
    let path = fs.path("file");
    drop(written(&path, 64));
    let [one, other] = two_states(&fs);
    let allowing = PinOptions { local_readers: Some(LocalReaders::Allow), ..PinOptions::default() };
    let first = pin_in(&one, &path, &allowing).expect("nobody has it");
    for options in [allowing.clone(), PinOptions::default()] {
        let error = pin_in(&other, &path, &options).expect_err("it is pinned");
        assert_held_by(&error, std::process::id(), &one);
    }
    assert_eq!(other.records().expect("readable").len(), 0);
    assert!(first.verify().expect("it answers").is_sound(), "the attempts did no harm");
    first.keep();
    // The flag is that of the first, and stays.
    let second = pin_in(&other, &path, &allowing).expect("the first has let go");
    let error = unpin(&path, &one, true).expect_err("whose record it has, and not the file");
    assert_held_by(&error, std::process::id(), &other);
    assert!(second.verify().expect("it answers").is_sound());
    second.release().expect("given back");
    assert!(unpin(&path, &one, false).expect("nobody holds it").immutable_cleared);
}

#[test]
fn a_swap_area_is_not_ended_under_whoever_serves_it() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(fs) = loopfs::make_or_skip("two state directories, swap", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 64));
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("ours");
        let [one, other] = two_states(&fs);
        let swap = PinOptions { guard: Some(GuardMode::SwapFile), prepare: true, ..PinOptions::default() };
        let first = pin_in(&one, &path, &swap).expect("nobody has it");
        let error = pin_in(&other, &path, &swap).expect_err("it is pinned");
        assert_held_by(&error, std::process::id(), &one);
        let error = unpin(&path, &other, true).expect_err("it is pinned");
        assert_held_by(&error, std::process::id(), &one);
        assert!(first.verify().expect("it answers").is_sound(), "the area is there, and the flag");
        first.release().expect("given back");
    }
}

#[test]
fn who_denies_the_open_is_named_and_a_record_is_not_forgotten_under_it() {
    let Some(fs) = loopfs::make_or_skip("two state directories, denied", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 64));
    let [one, other] = two_states(&fs);
    pin_in(&other, &path, &PinOptions::default()).expect("nobody has it").keep();
    let mut child = Command::new(env!("CARGO_BIN_EXE_fastice"))
        .args(["pin", "--hold", "--state-dir"])
        .args([one.path(), &path])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let pid = child.id();
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let child = Ended(child);
    assert!(lines.any(|line| line.is_ok_and(|line| line.contains("holding all guards"))));
    let error = pin_in(&other, &path, &PinOptions::default()).expect_err("it is pinned");
    assert_held_by(&error, pid, &one);
    for force in [false, true] {
        let error = unpin(&path, &other, force).expect_err("it is pinned");
        assert_held_by(&error, pid, &one);
    }
    drop(child);
    // What it left is taken over by whoever has its record.
    pin_in(&one, &path, &PinOptions::default()).expect("adopted").release().expect("given back");
    unpin(&path, &other, false).expect("nobody holds it");
}

#[test]
fn a_lock_of_somebody_else_is_in_the_way_of_a_pin_and_not_of_its_end() {
    let Some(fs) = loopfs::make_or_skip("a file that is locked", &Spec::EXT4) else { return };
    let path = fs.path("file");
    drop(written(&path, 64));
    let [one, _] = two_states(&fs);
    let allowing = PinOptions { local_readers: Some(LocalReaders::Allow), ..PinOptions::default() };
    pin_in(&one, &path, &allowing).expect("nobody has it").keep();
    let mut locker = command("flock", &["--shared", "--no-fork"], &path);
    let mut locker = locker
        .args(["sh", "-c", "echo locked; exec sleep 60"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("flock runs");
    let mut lines = BufReader::new(locker.stdout.take().expect("piped")).lines();
    let locker = Ended(locker);
    assert_eq!(lines.next().expect("a line").expect("text"), "locked");
    let error = pin_in(&one, &path, &allowing).expect_err("it is locked");
    let told = format!("locked (flock) by process {} ", locker.0.id());
    assert!(error.to_string().contains(&told) && error.remedy().contains("unlock"), "{error}");
    assert!(unpin(&path, &one, false).expect("no fastice has it").immutable_cleared);
    drop(locker);
    drop(File::options().write(true).open(&path).expect("it is the owner's"));
}
