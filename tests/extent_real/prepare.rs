//! `--prepare`: files that cannot be served become files that can, and read as before.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use fastice::extent::{
    ExtentErrorKind, LookupCursor, NoProgress, PinOptions, Progress, StateDir, accept, pin, prepare,
};
use fastice::units::{BlockSize, ByteLen, ByteOffset};
use rustix::fs::FallocateFlags;

use super::files::{BOTH, KIB, MIB, command, fallocate, open, punch, written};
use super::loopfs::{self, Spec};
use super::pin::{assert_ordinary, clear_immutable};

/// Remembers the stages, and that each one gets to its end.
#[derive(Default)]
struct Stages {
    names: Vec<String>,
    last: (u64, u64),
}

impl Progress for Stages {
    fn stage(&mut self, name: &str) {
        assert_eq!(self.last.0, self.last.1, "{:?} did not end", self.names);
        self.names.push(name.to_owned());
        self.last = (0, 0);
    }

    fn advance(&mut self, done: u64, total: u64) {
        assert!(done >= self.last.0 && done <= total);
        self.last = (done, total);
    }
}

#[test]
fn everything_that_can_be_mended_is_and_the_content_stays() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("prepare", &spec) else { return };
        let path = fs.path("file");
        let file = written(&path, 256);
        punch(&file, 64 * KIB, 256 * KIB);
        fallocate(&file, FallocateFlags::empty(), MIB, 3 * MIB);
        file.set_len(9 * MIB + 1000).unwrap();
        file.write_all_at(b"the end", 9 * MIB + 993).unwrap();
        drop(file);
        if spec.kind == "xfs" {
            loopfs::run(command("cp", &["--reflink=always"], &path).arg(fs.path("copy"))).unwrap();
        }
        let mut before = fs::read(&path).unwrap();
        let mut stages = Stages::default();
        let options =
            PinOptions { prepare: true, block_size: Some(BlockSize::B4096), ..PinOptions::default() };
        let state = StateDir::open(fs.outside()).unwrap();
        let pinned =
            pin(&path, &options, &state, &mut stages).unwrap_or_else(|error| panic!("{error} {error:?}"));
        assert!(stages.names.iter().any(|name| name == "writing zeros"), "{:?}", stages.names);
        assert_eq!(stages.names.iter().any(|name| name == "unsharing"), spec.kind == "xfs");
        assert!(pinned.verify().unwrap().is_sound());
        assert_eq!(pinned.map().len(), ByteLen(9 * MIB + 4096));
        before.resize(usize::try_from(9 * MIB + 4096).unwrap(), 0);
        assert!(fs::read(&path).unwrap() == before, "{}: the content changed", spec.kind);
        assert!(on_disk(&pinned) == before, "{}: the disk holds something else", spec.kind);
        pinned.release().unwrap();
    }
}

/// A size that fits the disk's block of 512 bytes, but not the larger one that was asked for.
#[test]
fn a_fit_file_is_padded_to_the_larger_block_that_was_asked_for() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("prepare-block", &spec) else { return };
        let path = fs.path("file");
        let file = written(&path, 256);
        let whole = file.metadata().unwrap().len();
        file.set_len(whole - 512).unwrap();
        drop(file);
        let state = StateDir::open(fs.outside()).unwrap();
        let pin_with = |block_size| {
            let options = PinOptions { prepare: true, block_size, ..PinOptions::default() };
            pin(&path, &options, &state, &mut Stages::default()).unwrap()
        };
        let pinned = pin_with(None);
        assert_eq!(pinned.map().len(), ByteLen(whole - 512));
        pinned.release().unwrap();
        let pinned = pin_with(Some(BlockSize::B4096));
        assert_eq!(pinned.map().len(), ByteLen(whole));
        pinned.release().unwrap();
    }
}

/// What the segments of the map hold, read from the disk directly.
fn on_disk(pinned: &fastice::extent::PinnedFile) -> Vec<u8> {
    let map = pinned.map();
    let mut cursor = LookupCursor::default();
    let mut bytes = Vec::new();
    for segment in map.segments(&mut cursor, ByteOffset(0), map.len()).unwrap() {
        map.check(&segment).unwrap();
        let output = Command::new("dd")
            .args(["iflag=direct,skip_bytes,count_bytes", "status=none", "bs=64k"])
            .arg(format!("if={}", map.identity().disk.node.display()))
            .args([format!("skip={}", segment.device_offset), format!("count={}", segment.len)])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        bytes.extend(output.stdout);
    }
    bytes
}

#[test]
fn a_file_that_is_fit_is_not_touched() {
    let Some(fs) = loopfs::make_or_skip("fit file", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    let changed = |path: &Path| std::os::unix::fs::MetadataExt::ctime_nsec(&fs::metadata(path).unwrap());
    let before = changed(&path);
    let report = prepare(&path, None, &mut NoProgress).unwrap();
    assert_eq!(report, fastice::extent::PrepareReport::default());
    assert_eq!(changed(&path), before);
}

#[test]
fn without_room_the_file_is_left_as_it_was() {
    for spec in BOTH {
        let spec = Spec { size_mib: 400, ..spec };
        let Some(fs) = loopfs::make_or_skip("no space", &spec) else { return };
        let path = fs.path("file");
        let file = written(&path, 16);
        file.set_len(2048 * MIB).unwrap();
        drop(file);
        let blocks = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap());
        let before = (accept(&path).unwrap(), blocks(&path));
        let error = prepare(&path, None, &mut NoProgress).unwrap_err();
        assert_eq!(error.kind(), ExtentErrorKind::NoSpace, "{error}");
        assert!(error.to_string().contains("needs 2147418112 bytes"), "{error}");
        assert_eq!((accept(&path).unwrap(), blocks(&path)), before);
    }
}

#[test]
fn a_file_in_use_or_immutable_is_not_prepared() {
    let Some(fs) = loopfs::make_or_skip("prepare in use", &Spec::EXT4) else { return };
    let path = fs.path("file");
    let file = open(&path);
    file.set_len(MIB).unwrap();
    assert_eq!(prepare(&path, None, &mut NoProgress).unwrap_err().kind(), ExtentErrorKind::InUse);
    drop(file);
    loopfs::run(&mut command("chattr", &["+i"], &path)).unwrap();
    let error = prepare(&path, None, &mut NoProgress).unwrap_err();
    assert_eq!(error.kind(), ExtentErrorKind::Guard, "{error}");
    assert!(error.remedy().contains("chattr -i"), "{}", error.remedy());
    clear_immutable(&path);
    let report = prepare(&path, None, &mut NoProgress).unwrap();
    assert_eq!(report.zeroed, ByteLen(MIB));
    assert_eq!(accept(&path).unwrap(), []);
    assert_ordinary(&fs, &path);
}
