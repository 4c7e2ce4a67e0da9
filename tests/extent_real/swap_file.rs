//! Goal: with the swap-file guard no descriptor or mapping, however old, changes the map; what it takes for itself is never
//! served; and whatever step it is left at, the file is given back.
//!
//! Only this process gets past the open-permission mark, so it plays root. Swap areas that a failed test leaves are
//! ended before its filesystem is unmounted: see `loopfs`.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use fastice::extent::{
    Doubt, ExtentErrorKind, GuardMode, Incident, LookupCursor, LookupError, OnRecall, Operation, PinOptions,
    PinnedFile, RecallReason, Segment, attempt, unpin, verify_stored,
};
use fastice::units::{ByteLen, ByteOffset};
use rustix::fs::{FallocateFlags, IFlags};

use super::files::{BOTH, command, open, pattern, state_of, try_pin, written};
use super::loopfs::{self, LoopFs, Spec};
use super::pin::{assert_ordinary, clear_immutable};

const RESERVED: u64 = 8192;
const BLOCKS: u64 = 64;

fn options() -> PinOptions {
    PinOptions { guard: Some(GuardMode::SwapFile), ..PinOptions::default() }
}

/// A file whose reserved bytes are zeros, and all others a pattern.
fn with_room(path: &Path) -> File {
    let file = written(path, BLOCKS);
    file.write_all_at(&[0; 8192], 0).expect("room");
    file.sync_all().expect("a disk");
    chmod(path, 0o600);
    file
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
}

fn is_swap(path: &Path) -> bool {
    fs::read_to_string("/proc/swaps").expect("it is there").contains(path.to_str().expect("a plain name"))
}

/// The owner's bytes are as they were, and the reserved ones are zeros again.
fn assert_given_back(fs: &LoopFs, path: &Path) {
    assert!(!is_swap(path));
    assert_ordinary(fs, path);
    let bytes = fs::read(path).expect("anybody may");
    assert_eq!(bytes.len() as u64, BLOCKS * 4096);
    assert!(bytes[..8192].iter().all(|byte| *byte == 0), "wiped");
    for (block, found) in bytes.chunks_exact(4096).enumerate().skip(2) {
        assert_eq!(found, pattern(block as u64 * 4096), "block {block}");
    }
    File::options().write(true).open(path).expect("it is the owner's").set_len(4096).expect("truncated");
}

fn set_immutable(path: &Path) {
    let file = File::open(path).expect("we may");
    let flags = rustix::fs::ioctl_getflags(&file).expect("flags");
    rustix::fs::ioctl_setflags(&file, flags | IFlags::IMMUTABLE).expect("root may");
}

fn swapoff(path: &Path) -> Result<String, String> {
    loopfs::run(&mut command("swapoff", &[], path))
}

/// What root tries through a descriptor from before the pin, when the flag is gone too.
fn assert_map_cannot_be_changed(fs: &LoopFs, writer: &File, reader: &File) {
    let refused = |what: &str, error: Option<i32>| {
        assert!(matches!(error, Some(libc::ETXTBSY | libc::EPERM)), "{what}: {error:?}");
    };
    refused("write", writer.write_at(&[1; 4096], 16384).err().and_then(|error| error.raw_os_error()));
    refused("truncate", writer.set_len(4096).err().and_then(|error| error.raw_os_error()));
    let keep = FallocateFlags::KEEP_SIZE;
    for (what, flags) in [
        ("punch", FallocateFlags::PUNCH_HOLE | keep),
        ("zero", FallocateFlags::ZERO_RANGE),
        ("collapse", FallocateFlags::COLLAPSE_RANGE),
        ("insert", FallocateFlags::INSERT_RANGE),
    ] {
        let error = rustix::fs::fallocate(writer.as_fd(), flags, 16384, 16384).err();
        refused(what, error.map(rustix::io::Errno::raw_os_error));
    }
    let target = File::create(fs.path("clone")).expect("room");
    let error = rustix::fs::ioctl_ficlone(&target, reader.as_fd()).err().map(rustix::io::Errno::raw_os_error);
    assert!(matches!(error, Some(libc::ETXTBSY | libc::EOPNOTSUPP)), "clone: {error:?}");
}

#[test]
fn no_descriptor_changes_the_map_and_the_flag_is_not_what_holds_it() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("swap-file pin", &spec) else { return };
        let path = fs.path("file");
        let writer = with_room(&path);
        let reader = File::open(&path).expect("a second descriptor");
        let file = try_pin(&fs, &path, &options()).expect("pinned, though it is open elsewhere");
        assert!(is_swap(&path));
        let report = file.verify().expect("an answer");
        assert!(report.is_sound() && report.lease_held.is_none(), "{report:?}");
        assert_eq!(
            file.guards().iter().map(|guard| guard.name).collect::<Vec<_>>(),
            ["open-permission mark", "swap area", "immutable flag"]
        );
        assert!(fs::read_to_string("/proc/swaps").expect("swaps").lines().any(|line| {
            line.starts_with(path.to_str().expect("plain"))
                && line.split_ascii_whitespace().nth(2) == Some("4")
        }));
        // Another process is kept out, and swapoff too.
        assert!(loopfs::run(&mut command("cat", &[], &path)).is_err() && swapoff(&path).is_err());
        assert!(loopfs::run(&mut command("umount", &[], &fs.root())).is_err());
        assert_map_cannot_be_changed(&fs, &writer, &reader);
        clear_immutable(&path);
        assert_map_cannot_be_changed(&fs, &writer, &reader);
        let report = file.verify().expect("an answer");
        assert!(report.map_is_true() && report.guard_holds && !report.is_sound(), "{report:?}");
        file.release().expect("released");
        drop((writer, reader));
        assert_given_back(&fs, &path);
    }
}

#[test]
fn what_is_served_begins_behind_what_the_guard_needs() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("swap-file reserve", &spec) else { return };
        let path = fs.path("file");
        drop(with_room(&path));
        let file = try_pin(&fs, &path, &options()).expect("pinned");
        let map = Arc::clone(file.map());
        assert_eq!(map.len(), ByteLen(BLOCKS * 4096 - RESERVED));
        let device = File::open(fs.device()).expect("root may");
        let mut cursor = LookupCursor::default();
        for segment in map.segments(&mut cursor, ByteOffset(0), map.len()).expect("in the map") {
            map.check(&segment).expect("true");
            assert!(segment.file_offset.get() >= RESERVED);
            let mut found = [0; 4096];
            device.read_exact_at(&mut found, segment.device_offset.get()).expect("the disk");
            assert_eq!(found[..], pattern(segment.file_offset.get()));
        }
        let whole = map.extents()[0];
        let header = Segment {
            file_offset: ByteOffset(0),
            device_offset: whole.device_offset,
            len: ByteLen(4096),
            extent_index: 0,
        };
        assert!(matches!(map.check(&header), Err(LookupError::Disagrees { .. })));
        let samples = file.witness().expect("a witness").samples(std::time::Instant::now()).expect("samples");
        for sample in &samples {
            let mut found = vec![0; usize::try_from(sample.len.get()).expect("small")];
            device.read_exact_at(&mut found, sample.device_offset.get()).expect("the disk");
            sample.check(&found).expect("the same by both ways");
        }
        file.release().expect("released");
        assert_given_back(&fs, &path);
    }
}

#[test]
fn data_in_the_reserved_bytes_is_given_up_by_the_operator_only() {
    let Some(fs) = loopfs::make_or_skip("swap-file consent", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, BLOCKS));
    let error = try_pin(&fs, &path, &options()).expect_err("everybody may read it");
    assert!(error.to_string().contains("chmod 600"), "{error}");
    chmod(&path, 0o600);
    let before = fs::read(&path).expect("readable");
    let error = try_pin(&fs, &path, &options()).expect_err("data is there");
    assert_eq!(error.kind(), ExtentErrorKind::Guard);
    assert!(error.to_string().contains("hold data"), "{error}");
    assert_eq!(fs::read(&path).expect("readable"), before);
    assert!(!is_swap(&path));
    assert_ordinary(&fs, &path);
    let consent = PinOptions { prepare: true, ..options() };
    try_pin(&fs, &path, &consent).expect("pinned").release().expect("released");
    assert_given_back(&fs, &path);

    let small = fs.path("small");
    drop(written(&small, 2));
    chmod(&small, 0o600);
    let error = try_pin(&fs, &small, &consent).expect_err("nothing would be left");
    assert!(error.to_string().contains("8192"), "{error}");
    // A swap area of somebody else is none of ours.
    let other = fs.path("other");
    drop(written(&other, BLOCKS));
    chmod(&other, 0o600);
    loopfs::run(&mut command("mkswap", &[], &other)).expect("mkswap");
    loopfs::run(&mut command("swapon", &[], &other)).expect("swapon");
    let error = try_pin(&fs, &other, &consent).expect_err("it is in use");
    assert_eq!(error.kind(), ExtentErrorKind::NotAccepted, "{error}");
    assert!(is_swap(&other));
    assert!(unpin(&other, &state_of(&fs), true).is_err() && is_swap(&other));
    swapoff(&other).expect("swapoff");
}

#[test]
fn a_killed_process_leaves_the_guard_and_the_next_one_takes_it_up() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("swap-file, killed", &spec) else { return };
        let path = fs.path("file");
        let writer = with_room(&path);
        let mut child = Command::new(env!("CARGO_BIN_EXE_fastice"))
            .args(["pin", "--hold", "--guard", "swap-file", "--state-dir"])
            .args([&fs.outside(), &path])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        assert!(lines.any(|line| line.expect("text").contains("served from byte 8192")));
        child.kill().expect("it lives");
        child.wait().expect("it ends");
        assert!(is_swap(&path));
        let error = writer.set_len(0).expect_err("also without any process");
        assert!(matches!(error.raw_os_error(), Some(libc::ETXTBSY | libc::EPERM)), "{error}");
        assert!(swapoff(&path).is_err(), "the flag is in its way");
        let state = state_of(&fs);
        let record = || state.records().expect("readable").remove(0).expect("whole");
        assert!(record().header_written && record().guard == GuardMode::SwapFile);
        assert!(verify_stored(&record()).expect("an answer").is_held());
        // Without asking for a guard: the record says which.
        let adopted = try_pin(&fs, &path, &PinOptions::default()).expect("adopted");
        assert_eq!((adopted.guard_mode(), adopted.map().generation()), (GuardMode::SwapFile, 2));
        assert!(adopted.verify().expect("an answer").is_sound());
        adopted.keep();
        let other = PinOptions { guard: Some(GuardMode::Default), ..PinOptions::default() };
        let error = try_pin(&fs, &path, &other).expect_err("another guard");
        assert!(error.to_string().contains("other guards"), "{error}");
        let report = unpin(&path, &state, false).expect("unpinned");
        assert_eq!(
            (report.immutable_cleared, report.swap_ended, report.map_was_true),
            (true, true, Some(true))
        );
        drop(writer);
        assert_given_back(&fs, &path);
    }
}

#[test]
fn whatever_step_a_crash_left_it_at_unpin_and_pin_go_on_from_there() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("swap-file, crash steps", &spec) else { return };
        let state = state_of(&fs);
        let kept = |name: &str| -> PathBuf {
            let path = fs.path(name);
            drop(with_room(&path));
            try_pin(&fs, &path, &options()).expect("pinned").keep();
            path
        };
        // Of an unpin: the flag is cleared; the area is ended too; the second page is wiped too.
        for step in 1..=3 {
            let path = kept(&format!("unpin-{step}"));
            clear_immutable(&path);
            if step > 1 {
                swapoff(&path).expect("nothing in its way");
            }
            if step > 2 {
                open(&path).write_all_at(&[0; 4096], 4096).expect("ours");
            }
            let report = unpin(&path, &state, false).expect("unpinned");
            assert_eq!((report.immutable_cleared, report.swap_ended), (false, step == 1));
            assert_given_back(&fs, &path);
        }
        // Of a pin: the record is there, and nothing else; or the header as well.
        let record = {
            let path = kept("pin");
            let record = state.records().expect("readable").remove(0).expect("whole");
            unpin(&path, &state, false).expect("unpinned");
            fastice::extent::StoredPin { map: None, ..record }
        };
        let path = fs.path("pin");
        for _ in 0..2 {
            drop(with_room(&path));
            let record = fastice::extent::StoredPin { generation: record.generation + 1, ..record.clone() };
            state.store(&record).expect("stored");
            assert_eq!(unpin(&path, &state, false).expect("unpinned").map_was_true, None);
            assert_given_back(&fs, &path);
        }
        drop(with_room(&path));
        state.store(&record).expect("stored");
        try_pin(&fs, &path, &PinOptions::default()).expect("pinned").release().expect("released");
        assert_given_back(&fs, &path);
    }
}

#[test]
fn an_area_without_its_record_is_known_by_its_header() {
    let Some(fs) = loopfs::make_or_skip("swap-file, no record", &Spec::EXT4) else { return };
    let (path, state) = (fs.path("file"), state_of(&fs));
    drop(with_room(&path));
    let key = {
        let file = try_pin(&fs, &path, &options()).expect("pinned");
        let key = file.map().identity().key();
        file.keep();
        key
    };
    state.remove(&key).expect("the operator did");
    let error = try_pin(&fs, &path, &PinOptions::default()).expect_err("it is a swap area");
    assert!(error.to_string().contains("swap area of fastice"), "{error}");
    assert_eq!(unpin(&path, &state, false).expect_err("no record").kind(), ExtentErrorKind::State);
    let report = unpin(&path, &state, true).expect("by force");
    assert!(report.immutable_cleared && report.swap_ended);
    assert_given_back(&fs, &path);
}

#[test]
fn after_a_reboot_the_flag_is_there_and_the_area_is_set_again() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("swap-file, reboot", &spec) else { return };
        let (path, state) = (fs.path("file"), state_of(&fs));
        drop(with_room(&path));
        try_pin(&fs, &path, &options()).expect("pinned").keep();
        // A reboot takes the area away and leaves the rest.
        clear_immutable(&path);
        swapoff(&path).expect("nothing in its way");
        set_immutable(&path);
        let record = state.records().expect("readable").remove(0).expect("whole");
        let report = verify_stored(&record).expect("an answer");
        assert!(report.map_is_true() && report.immutable && !report.is_held(), "{report:?}");
        let file = try_pin(&fs, &path, &PinOptions::default()).expect("pinned again");
        assert!(is_swap(&path) && file.verify().expect("an answer").is_sound());
        file.release().expect("released");
        assert_given_back(&fs, &path);
    }
}

/// The pin of a new file, and what it is recalled for.
fn watched(fs: &LoopFs, path: &Path) -> (PinnedFile, Receiver<Incident>) {
    drop(with_room(path));
    let (send, recalled) = channel();
    let send = std::sync::Mutex::new(send);
    let on_recall: OnRecall = Arc::new(move |incident| {
        // The test may be over.
        let _ = send.lock().expect("no panic").send(incident.clone());
    });
    let options = PinOptions { on_recall: Some(on_recall), ..options() };
    (try_pin(fs, path, &options).expect("pinned"), recalled)
}

#[test]
fn a_swapoff_behind_our_back_is_noticed_at_once() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("swap-file, swapoff", &spec) else { return };
        let path = fs.path("file");
        let (file, recalled) = watched(&fs, &path);
        assert!(swapoff(&path).is_err(), "mark and flag are in the way of other processes");
        assert!(recalled.recv_timeout(Duration::from_millis(250)).is_err(), "nothing is wrong yet");
        clear_immutable(&path);
        let ended = attempt(Operation::SwapOff, &path);
        assert_eq!(ended.failed, None, "this one gets past it");
        // The flag had to be cleared first, and a look may have come just then.
        let incident = recalled.recv_timeout(Duration::from_secs(20)).expect("noticed");
        let RecallReason::Doubt(doubt) = incident.reason else { panic!("{incident:?}") };
        assert!(matches!(doubt, Doubt::SwapOff | Doubt::FlagCleared) && !doubt.may_be_cleared(), "{doubt:?}");
        let report = file.verify().expect("an answer");
        assert!(!report.guard_holds && !report.is_sound(), "{report:?}");
        // With the flag set again it is the swap area alone that is missed.
        set_immutable(&path);
        let again = file.second_look().expect("guarded").look().expect_err("it stays so");
        assert!(again.contains("swapoff"), "{again}");
        file.release().expect("released");
        assert_given_back(&fs, &path);
    }
}
