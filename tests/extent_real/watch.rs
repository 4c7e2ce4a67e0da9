//! Goal: whatever happens to a pinned file that the guards do not stop is noticed, told once, and cleared only when it was
//! nothing.
//!
//! Only this process gets past the open-permission mark, so it plays root.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use fastice::extent::{
    Doubt, Incident, NoProgress, OnRecall, PinOptions, PinStep, PinnedFile, RecallReason, StateDir,
    StoredIncident, Warden, WatchOptions, pin,
};
use rustix::fs::IFlags;

use super::files::{BOTH, written};
use super::loopfs::{self, LoopFs, Spec};
use super::pin::clear_immutable;

const PATIENCE: Duration = Duration::from_secs(20);

fn watched(fs: &LoopFs, path: &Path) -> (PinnedFile, Receiver<Incident>) {
    let (send, recalled) = channel();
    let send = std::sync::Mutex::new(send);
    let on_recall: OnRecall = Arc::new(move |incident| {
        // The test may be over.
        let _ = send.lock().expect("no panic").send(incident.clone());
    });
    let options = PinOptions { on_recall: Some(on_recall), ..PinOptions::default() };
    let state = StateDir::open(fs.outside()).expect("a state directory");
    (pin(path, &options, &state, &mut NoProgress).expect("pinned"), recalled)
}

fn doubt_of(recalled: &Receiver<Incident>) -> (Doubt, Incident) {
    let incident = recalled.recv_timeout(PATIENCE).expect("it is noticed");
    match incident.reason {
        RecallReason::Doubt(doubt) => (doubt, incident),
        other => panic!("{other}"),
    }
}

/// Clears the immutable flag and sets it again, faster than anybody looks: only the change time tells.
fn touch(path: &Path) {
    let file = File::open(path).expect("we may");
    let flags = rustix::fs::ioctl_getflags(&file).expect("flags");
    rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE).expect("root may");
    rustix::fs::ioctl_setflags(&file, flags).expect("root may");
}

#[test]
fn a_cleared_flag_is_noticed_and_stands() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("watch the flag", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let (file, recalled) = watched(&fs, &path);
        clear_immutable(&path);
        let (doubt, incident) = doubt_of(&recalled);
        assert_eq!(doubt, Doubt::FlagCleared);
        assert!(!doubt.may_be_cleared());
        assert!(file.second_look().expect("guarded").look().is_err(), "it is still cleared");
        assert!(recalled.recv_timeout(Duration::from_millis(300)).is_err(), "told once");
        assert_eq!(file.recall().and_then(|watch| watch.reason()), Some(incident.reason));
        file.release().expect("released");
    }
}

#[test]
fn a_touched_inode_is_a_doubt_that_a_second_look_clears() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("watch the change time", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let (file, recalled) = watched(&fs, &path);
        for round in 1..4 {
            // Between two looks: the first one comes with the pin, and would see the flag cleared.
            std::thread::sleep(Duration::from_millis(50));
            touch(&path);
            let (doubt, incident) = doubt_of(&recalled);
            assert_eq!((doubt, incident.number), (Doubt::Touched, round), "{}", incident.detail);
            let looked = file.second_look().expect("guarded").look().expect("as it was");
            assert!(!file.clear(incident.number + 1, looked), "another one");
            assert!(file.clear(incident.number, looked));
            assert!(file.recall().is_some_and(|watch| watch.reason().is_none()));
        }
        file.release().expect("released");
    }
}

#[test]
fn blocks_that_are_shared_by_a_clone_are_noticed_by_the_map_alone() {
    let Some(fs) = loopfs::make_or_skip("watch the map", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    let (file, recalled) = watched(&fs, &path);
    let report = file.watched().expect("watched");
    assert!(report.bound > report.interval && report.last_check_ago < PATIENCE, "{report:?}");
    let clone = File::create(fs.path("clone")).expect("room");
    rustix::fs::ioctl_ficlone(&clone, File::open(&path).expect("we may").as_fd()).expect("reflink");
    let (doubt, incident) = doubt_of(&recalled);
    assert_eq!(doubt, Doubt::MapMoved);
    let stored = StoredIncident::new(&incident, file.map().generation());
    assert_eq!(stored.blocks[0].flags.as_deref(), Some("SHARED"), "{stored:?}");
    assert_eq!(stored.blocks[0].frozen, stored.blocks[0].living, "they did not move");
    assert!(file.second_look().expect("guarded").look().is_err());
    file.note(PinStep::Fenced, "by the test");
    let (state, key) = (file.state().clone(), file.map().identity().key());
    state.store_incident(&key, &stored).expect("room");
    file.keep();
    assert_eq!(state.incident(&key).expect("readable"), Some(stored));

    // Only on purpose is it pinned with another map; and a shared one is not fit at all.
    let resume = PinOptions { accept_change: true, ..PinOptions::default() };
    assert!(pin(&path, &resume, &state, &mut NoProgress).is_err(), "it is shared");
    drop(clone);
    std::fs::remove_file(fs.path("clone")).expect("removed");
    // XFS says so some time later.
    let started = Instant::now();
    let file = loop {
        match pin(&path, &resume, &state, &mut NoProgress) {
            Ok(file) => break file,
            Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    assert_eq!((file.map().generation() > 1, state.incident(&key).expect("readable")), (true, None));
    file.release().expect("released");
    let steps: Vec<_> = state.events(&key).expect("events").into_iter().map(|event| event.step).collect();
    assert_eq!(steps, [PinStep::Pinned, PinStep::Fenced, PinStep::Kept, PinStep::Pinned, PinStep::Released]);
}

#[test]
fn a_changed_map_is_taken_only_when_it_is_asked_for() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("resume", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let (file, _) = watched(&fs, &path);
        let (state, first) = (file.state().clone(), file.map().generation());
        file.keep();
        clear_immutable(&path);
        drop(written(&path, 24));
        pin(&path, &PinOptions::default(), &state, &mut NoProgress).expect_err("another size");
        let resume = PinOptions { accept_change: true, ..PinOptions::default() };
        let file = pin(&path, &resume, &state, &mut NoProgress).expect("as it is now");
        assert!(file.map().generation() > first && file.verify().expect("readable").is_sound());
        file.release().expect("released");
    }
}

#[test]
fn one_warden_guards_more_files_than_the_kernel_gives_fanotify_groups() {
    let Some(fs) = loopfs::make_or_skip("many files", &Spec::XFS) else { return };
    let state = StateDir::open(fs.outside()).expect("a state directory");
    let options = PinOptions {
        warden: Some(Warden::start(WatchOptions::default()).expect("threads")),
        ..PinOptions::default()
    };
    let mut pins = Vec::new();
    for number in 0..160 {
        let path = fs.path(&format!("file-{number}"));
        drop(written(&path, 1));
        pins.push(pin(&path, &options, &state, &mut NoProgress).expect("pinned"));
    }
    let denied = |number: usize| {
        let cat = loopfs::run(std::process::Command::new("cat").arg(fs.path(&format!("file-{number}"))));
        cat.is_err_and(|error| error.contains("not permitted"))
    };
    assert!(denied(0) && denied(159));
    // Each by itself.
    clear_immutable(pins[7].path());
    let recalled = |file: &PinnedFile| file.recall().is_some_and(|watch| watch.reason().is_some());
    let started = Instant::now();
    while !recalled(&pins[7]) {
        assert!(started.elapsed() < PATIENCE, "not noticed");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(pins.iter().filter(|file| recalled(file)).count(), 1);
    let kept = pins.split_off(80);
    pins.into_iter().for_each(|file| file.release().expect("released"));
    assert!(!denied(0) && denied(159));
    kept.into_iter().for_each(|file| file.release().expect("released"));
}
