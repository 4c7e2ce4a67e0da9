//! Leftovers of runs that ended without a release.

use fastice::extent::{
    ExtentError, ExtentErrorKind, NoProgress, OrphanStanding, PinOptions, PinnedFile, StateDir, orphans, pin,
    read_map, unpin, verify_stored,
};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};

use rustix::fs::inotify;

use super::files::{BOTH, command, open, punch, refused, try_pin, written};
use super::loopfs::{self, Spec};
use super::pin::{assert_ordinary, clear_immutable, pinned, try_default};

#[test]
fn a_dropped_pin_leaves_an_immutable_file_that_unpin_mends() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("leftover", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 64));
        let state = StateDir::open(fs.outside()).unwrap();
        let file = pinned(&fs, &path);
        let checksum = file.map().checksum();
        let error = unpin(&path, &state, true).unwrap_err();
        assert_eq!(error.kind(), ExtentErrorKind::AlreadyPinned, "{error}");
        drop(file);
        refused(&mut command("truncate", &["-s", "0"], &path));
        loopfs::run(&mut command("cat", &[], &path)).unwrap();
        let records = state.records().unwrap();
        let [Ok(record)] = &records[..] else { panic!("{records:?}") };
        assert_eq!((record.path(), record.checksum()), (path.as_path(), Some(checksum)));
        assert_eq!(state.holder(&record.identity.key()).unwrap(), None);
        assert!(verify_stored(record).unwrap().is_sound());
        let report = unpin(&path, &state, false).unwrap();
        assert_eq!((report.immutable_cleared, report.map_was_true), (true, Some(true)));
        assert_ordinary(&fs, &path);
        loopfs::run(&mut command("truncate", &["-s", "0"], &path)).unwrap();
        assert_eq!(unpin(&path, &state, false).unwrap_err().kind(), ExtentErrorKind::State);
    }
}

#[test]
fn the_next_pin_adopts_a_leftover_and_its_release_is_complete() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("adoption", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 64));
        let first = pinned(&fs, &path);
        let (generation, checksum) = (first.map().generation(), first.map().checksum());
        first.keep();
        let second = pinned(&fs, &path);
        assert_eq!(second.map().generation(), generation + 1);
        assert_eq!(second.map().checksum(), checksum);
        assert!(second.verify().unwrap().is_sound());
        second.release().unwrap();
        assert_ordinary(&fs, &path);
        let third = pinned(&fs, &path);
        assert_eq!(third.map().generation(), generation + 2, "the generation outlives the record");
        third.release().unwrap();
    }
}

#[test]
fn a_leftover_whose_file_changed_is_refused_until_forced() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("changed leftover", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 64));
        pinned(&fs, &path).keep();
        clear_immutable(&path);
        let file = open(&path);
        file.set_len(16 * 4096).unwrap();
        file.sync_all().unwrap();
        file.write_all_at(&vec![9; 48 * 4096], 32 * 4096).unwrap();
        file.write_all_at(&vec![9; 16 * 4096], 16 * 4096).unwrap();
        file.set_len(63 * 4096).unwrap();
        drop(file);
        let state = StateDir::open(fs.outside()).unwrap();
        let error = try_default(&fs, &path).unwrap_err();
        assert_eq!(error.kind(), ExtentErrorKind::Changed, "{error}");
        assert!(error.remedy().contains("unpin --force"));
        // The failed attempt left everything as it found it.
        let records = state.records().unwrap();
        assert!(!verify_stored(records[0].as_ref().unwrap()).unwrap().immutable);
        assert_eq!(unpin(&path, &state, false).unwrap_err().kind(), ExtentErrorKind::Changed);
        assert_eq!(unpin(&path, &state, true).unwrap().map_was_true, Some(false));
        pinned(&fs, &path).release().unwrap();
    }
}

#[test]
fn records_without_their_file_or_damaged_go_by_force_only() {
    let Some(fs) = loopfs::make_or_skip("lost file", &Spec::EXT4) else { return };
    let path = fs.path("file");
    let state = StateDir::open(fs.outside()).unwrap();
    drop(written(&path, 16));
    pinned(&fs, &path).keep();
    clear_immutable(&path);
    fs::rename(&path, fs.path("moved")).unwrap();
    assert_eq!(unpin(&path, &state, false).unwrap_err().kind(), ExtentErrorKind::State);
    drop(written(&path, 16));
    assert_eq!(unpin(&path, &state, false).unwrap_err().kind(), ExtentErrorKind::State);
    unpin(&path, &state, true).unwrap();
    assert_eq!(state.records().unwrap().len(), 0);
    // Now a damaged record.
    let file = pinned(&fs, &path);
    let record = state.path().join(format!("{}.json", file.map().identity().key()));
    drop(file);
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"generation\": ", "\"generation\": 1")).unwrap();
    for error in [try_default(&fs, &path).unwrap_err(), unpin(&path, &state, false).unwrap_err()] {
        assert_eq!(error.kind(), ExtentErrorKind::State, "{error}");
        assert!(error.to_string().contains("does not match its own checksum"), "{error}");
    }
    assert!(unpin(&path, &state, true).unwrap().immutable_cleared);
    assert_ordinary(&fs, &path);
}

#[test]
fn all_records_of_a_path_are_forgotten_at_once() {
    let Some(fs) = loopfs::make_or_skip("several lost files", &Spec::EXT4) else { return };
    let path = fs.path("file");
    let state = StateDir::open(fs.outside()).unwrap();
    for moved in ["first", "second"] {
        drop(written(&path, 16));
        pinned(&fs, &path).keep();
        clear_immutable(&path);
        fs::rename(&path, fs.path(moved)).unwrap();
    }
    assert_eq!(state.records().unwrap().len(), 2);
    assert!(unpin(&path, &state, true).unwrap().forgotten);
    assert_eq!(state.records().unwrap().len(), 0);
}

#[test]
fn a_run_that_died_between_record_and_map_is_mended() {
    let Some(fs) = loopfs::make_or_skip("interrupted", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    let state = StateDir::open(fs.outside()).unwrap();
    pinned(&fs, &path).keep();
    // What a process killed while pinning leaves: the intent without a map, with the flag set or not.
    let mut intent = state.records().unwrap().remove(0).unwrap();
    intent.map = None;
    for set in [true, false] {
        state.store(&intent).unwrap();
        if !set {
            clear_immutable(&path);
        }
        let report = unpin(&path, &state, false).unwrap();
        assert_eq!((report.immutable_cleared, report.map_was_true), (set, None));
        assert_ordinary(&fs, &path);
    }
    state.store(&intent).unwrap();
    pinned(&fs, &path).release().unwrap();
    assert_ordinary(&fs, &path);
}

#[test]
fn a_killed_process_leaves_a_pin_that_is_mended() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("killed process", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 64));
        let mut child = Command::new(env!("CARGO_BIN_EXE_fastice"))
            .args(["pin", "--hold", "--state-dir"])
            .args([&fs.outside(), &path])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("pinned")));
        let state = StateDir::open(fs.outside()).unwrap();
        // While it lives: nobody opens the file, and both pin and unpin name the process.
        assert_eq!(fs::read(&path).unwrap_err().raw_os_error(), Some(libc::EPERM));
        for error in [try_default(&fs, &path).unwrap_err(), unpin(&path, &state, true).unwrap_err()] {
            assert_eq!(error.kind(), ExtentErrorKind::AlreadyPinned);
            assert!(error.to_string().contains(&format!("process {}", child.id())), "{error}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(fs::read(&path).unwrap().len(), 64 * 4096);
        refused(&mut command("truncate", &["-s", "0"], &path));
        let adopted = pinned(&fs, &path);
        assert_eq!(adopted.map().generation(), 2);
        adopted.keep();
        assert!(unpin(&path, &state, false).unwrap().immutable_cleared);
        assert_ordinary(&fs, &path);
    }
}

/// Whoever pins or lets go of one file has no business in the records of others: there may be thousands, with maps of
/// millions of extents.
#[test]
fn pinning_and_unpinning_open_no_record_of_another_file() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("records of others", &spec) else { return };
        let state = StateDir::open(fs.outside()).unwrap();
        let others = ["held", "kept", "damaged"].map(|name| {
            let path = fs.path(name);
            drop(written(&path, 16));
            let file = pinned(&fs, &path);
            let record = state.path().join(format!("{}.json", file.map().identity().key()));
            (path, file, record)
        });
        let [(_, held, held_record), (_, kept, kept_record), (_, damaged, damaged_record)] = others;
        kept.keep();
        damaged.keep();
        fs::write(&damaged_record, "nonsense").unwrap();
        let opens = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        for record in [&held_record, &kept_record, &damaged_record] {
            inotify::add_watch(&opens, record, inotify::WatchFlags::OPEN).unwrap();
        }
        let opened = || !matches!(rustix::io::read(&opens, &mut [0; 4096]), Err(rustix::io::Errno::AGAIN));
        let path = fs.path("file");
        drop(written(&path, 16));
        pinned(&fs, &path).release().unwrap();
        pinned(&fs, &path).keep();
        unpin(&path, &state, false).unwrap();
        assert!(!opened(), "{}", spec.kind);
        // It is held, whatever its own record is like.
        fs::write(&held_record, "nonsense").unwrap();
        assert!(opened(), "such opens are seen");
        for force in [false, true] {
            let error = unpin(&fs.path("held"), &state, force).unwrap_err();
            assert_eq!(error.kind(), ExtentErrorKind::AlreadyPinned, "{error}");
        }
        assert_eq!(try_default(&fs, &fs.path("held")).unwrap_err().kind(), ExtentErrorKind::AlreadyPinned);
        assert_eq!(unpin(&fs.path("damaged"), &state, false).unwrap_err().kind(), ExtentErrorKind::State);
        held.release().unwrap();
        let left = ["kept", "damaged"].map(|name| fs.path(name));
        for path in &left {
            unpin(path, &state, true).unwrap();
        }
        left.iter().for_each(|path| assert_ordinary(&fs, path));
    }
}

#[test]
fn a_held_file_that_is_out_of_reach_keeps_its_record_and_one_that_is_away_says_so() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("unmounted lazily", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let state = StateDir::open(fs.outside()).unwrap();
        let file = pinned(&fs, &path);
        loopfs::run(Command::new("umount").arg("--lazy").arg(fs.root())).unwrap();
        for force in [false, true] {
            let error = unpin(&path, &state, force).unwrap_err();
            assert_eq!(error.kind(), ExtentErrorKind::AlreadyPinned, "{error}");
        }
        let record = state.record_at(&path).unwrap().expect("the record of what is served stays");
        file.keep();
        let away = |error: ExtentError| {
            assert!(error.to_string().contains("not mounted"), "{error}");
            assert!(error.remedy().contains("mount it"), "{}", error.remedy());
        };
        away(unpin(&path, &state, false).unwrap_err());
        away(verify_stored(&record).unwrap_err());
        let told: Vec<_> = orphans(&state).unwrap().into_iter().map(|orphan| orphan.standing).collect();
        assert_eq!(told, [OrphanStanding::Unmounted]);
        assert!(unpin(&path, &state, true).unwrap().forgotten);
        // As the command says then: the flag is left.
        loopfs::run(Command::new("mount").arg(fs.device()).arg(fs.root())).unwrap();
        refused(&mut command("truncate", &["-s", "0"], &path));
        clear_immutable(&path);
        assert_ordinary(&fs, &path);
    }
}

#[test]
fn a_hole_in_a_file_that_was_pinned_is_a_change_and_is_not_filled_unasked() {
    let Some(fs) = loopfs::make_or_skip("punched leftover", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    let state = StateDir::open(fs.outside()).unwrap();
    pinned(&fs, &path).keep();
    clear_immutable(&path);
    punch(&open(&path), 8192, 8192);
    let options = |prepare, accept_change| PinOptions { prepare, accept_change, ..PinOptions::default() };
    for prepare in [false, true] {
        let error = try_pin(&fs, &path, &options(prepare, false)).unwrap_err();
        assert_eq!(error.kind(), ExtentErrorKind::Changed, "{error}");
    }
    let (_, living) = read_map(&path).unwrap();
    assert_eq!(living.len(), 2, "the hole is still there: {living:?}");
    let error = try_pin(&fs, &path, &options(false, true)).unwrap_err();
    assert_eq!(error.kind(), ExtentErrorKind::NotAccepted, "accepted as it is, it has to be fit: {error}");
    try_pin(&fs, &path, &options(true, true)).unwrap().keep();
    unpin(&path, &state, false).unwrap();
    assert_ordinary(&fs, &path);
}

#[test]
fn a_copy_of_the_filesystem_does_not_take_the_record_of_the_original() {
    let [Some(fs), Some(copy)] = [(); 2].map(|()| loopfs::make_or_skip("copied filesystem", &Spec::EXT4))
    else {
        return;
    };
    let path = fs.path("file");
    drop(written(&path, 64));
    let state = StateDir::open(fs.outside()).unwrap();
    pinned(&fs, &path).keep();
    loopfs::run(Command::new("sync").arg("-f").arg(&path)).unwrap();
    loopfs::unmount(&copy.root()).unwrap();
    let [from, to] =
        [("if", fs.device()), ("of", copy.device())].map(|(name, node)| format!("{name}={node}"));
    loopfs::run(Command::new("dd").args([from.as_str(), to.as_str(), "bs=1M", "conv=fsync", "status=none"]))
        .unwrap();
    loopfs::run(Command::new("mount").args(["-t", "ext4", copy.device()]).arg(copy.root())).unwrap();
    let copied = copy.path("file");
    for force in [false, true] {
        let error = unpin(&copied, &state, force).unwrap_err();
        assert_eq!(error.kind(), ExtentErrorKind::State);
        assert!(error.to_string().contains("mounted too") && error.remedy().contains("UUID"), "{error}");
    }
    assert!(state.record_at(&copied).unwrap().is_none());
    let error = try_pin_in(&state, &copied).unwrap_err();
    assert!(error.to_string().contains("mounted too"), "{error}");
    let record = state.record_at(&path).unwrap().expect("it is still there");
    assert!(verify_stored(&record).unwrap().map_is_true());
    assert!(unpin(&path, &state, false).unwrap().immutable_cleared);
}

fn try_pin_in(state: &StateDir, path: &std::path::Path) -> Result<PinnedFile, ExtentError> {
    pin(path, &PinOptions::default(), state, &mut NoProgress)
}
