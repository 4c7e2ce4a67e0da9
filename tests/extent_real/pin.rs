//! The default pin: what it refuses, what it hears, what it leaves.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use fastice::extent::{
    ExtentError, ExtentErrorKind, Holder, NoProgress, PinOptions, PinnedFile, RecallReason, StateDir, pin,
};
use fastice::units::{ByteLen, ByteOffset};

use super::files::{BOTH, command, open, refused, try_pin, written};
use super::loopfs::{self, LoopFs, Spec};

pub(crate) fn pinned(fs: &LoopFs, path: &Path) -> PinnedFile {
    try_default(fs, path).unwrap_or_else(|error| panic!("{error} ({error:?})"))
}

pub(crate) fn try_default(fs: &LoopFs, path: &Path) -> Result<PinnedFile, ExtentError> {
    try_pin(fs, path, &PinOptions::default())
}

#[test]
fn every_mutation_is_refused_under_the_pin_and_allowed_after_its_release() {
    let no_reflink = Spec { mkfs: &["-q", "-m", "reflink=0,rmapbt=0"], ..Spec::XFS };
    for spec in BOTH.into_iter().chain([no_reflink]) {
        let Some(fs) = loopfs::make_or_skip("mutations refused", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 256));
        let before = fs::read(&path).unwrap();
        let file = pinned(&fs, &path);
        let report = file.verify().unwrap();
        assert!(report.is_sound(), "{report:?}");
        for mut mutation in mutations(&path) {
            refused(&mut mutation);
        }
        assert!(file.verify().unwrap().is_sound());
        assert!(!file.lease_broken());
        file.release().unwrap();
        assert_eq!(fs::read(&path).unwrap(), before, "{}", spec.kind);
        loopfs::run(&mut command("truncate", &["-s", "4096"], &path)).unwrap();
        loopfs::run(&mut command("mv", &["-T", path.to_str().unwrap()], &fs.path("other"))).unwrap();
    }
}

#[test]
fn who_tries_to_open_the_file_again_and_again_does_not_keep_it_from_being_pinned() {
    const PINS: usize = 20;
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("opened while it is pinned", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 64));
        let script = "while true; do true < \"$1\"; sleep 0.003; done 2>/dev/null";
        let mut opener = Command::new("sh").args(["-c", script, "sh"]).arg(&path).spawn().expect("a shell");
        let pins: Vec<_> = (0..PINS)
            .map(|_| try_default(&fs, &path).and_then(PinnedFile::release).map_err(|error| error.to_string()))
            .collect();
        opener.kill().expect("it runs");
        opener.wait().expect("it ends");
        // Now and then an open meets the very moment of the proof.
        let failed: Vec<_> = pins.iter().filter_map(|pin| pin.as_ref().err()).collect();
        assert!(failed.len() <= PINS / 5, "{} of {PINS}: {failed:?}", failed.len());
    }
}

#[test]
fn readers_after_the_release_see_what_hosts_wrote_and_not_the_cache_of_before() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("page cache", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let file = pinned(&fs, &path);
        let mut cached = vec![0; 4096];
        file.file().read_exact_at(&mut cached, 0).unwrap();
        let place = file.map().extents()[0].device_offset.get();
        let disk = &file.map().identity().disk.node;
        let pattern = Command::new("xfs_io")
            .args(["-d", "-c", &format!("pwrite -S 0xa7 -b 4096 {place} 4096")])
            .arg(disk)
            .output()
            .unwrap();
        assert!(pattern.status.success(), "{pattern:?}");
        file.release().unwrap();
        let now = fs::read(&path).unwrap();
        assert!(now[..4096].iter().all(|byte| *byte == 0xA7), "{}: stale data after the release", spec.kind);
    }
}

fn mutations(path: &Path) -> Vec<Command> {
    let copy = path.with_extension("copy");
    let mut rename = command("mv", &["-T"], path);
    rename.arg(&copy);
    let mut link = command("ln", &[], path);
    link.arg(&copy);
    let mut reflink = command("cp", &["--reflink=always"], path);
    reflink.arg(&copy);
    let mut over = Command::new("mv");
    let decoy = path.with_extension("decoy");
    fs::write(&decoy, "decoy").unwrap();
    over.arg("-T").arg(decoy).arg(path);
    vec![
        command("truncate", &["-s", "4096"], path),
        command("truncate", &["-s", "16M"], path),
        command("xfs_io", &["-c", "fpunch 0 4096"], path),
        command("xfs_io", &["-c", "pwrite 0 4096"], path),
        command("xfs_io", &["-f", "-c", "truncate 0"], path),
        command("fallocate", &["-l", "4096", "-p", "-o", "0"], path),
        command("fallocate", &["-l", "16M"], path),
        command("unlink", &[], path),
        command("chattr", &["-i"], path),
        command("chattr", &["+a"], path),
        command("chmod", &["600"], path),
        command("cat", &[], path),
        rename,
        link,
        reflink,
        over,
    ]
}

#[test]
fn truncate_by_path_from_this_very_process_is_refused_too() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("truncate by path", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let file = pinned(&fs, &path);
        let opened = OpenOptions::new().write(true).open(&path).unwrap_err();
        assert_eq!(opened.raw_os_error(), Some(libc::EPERM));
        assert_eq!(fs::remove_file(&path).unwrap_err().raw_os_error(), Some(libc::EPERM));
        // Our own reads are allowed: the proof of the device reads the file through the filesystem.
        assert_eq!(fs::read(&path).unwrap().len(), 16 * 4096);
        file.release().unwrap();
    }
}

#[test]
fn a_file_that_another_process_has_open_is_refused_and_the_process_named() {
    for (how, reads) in [("<", true), (">>", false)] {
        let Some(fs) = loopfs::make_or_skip("file in use", &Spec::XFS) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let script = format!("exec 3{how}\"$0\"; echo ready; exec sleep 60");
        let mut child =
            Command::new("sh").args(["-c", &script]).arg(&path).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let error = try_default(&fs, &path).unwrap_err();
        let pid = child.id();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(error.kind(), ExtentErrorKind::InUse, "reads {reads}: {error}");
        assert!(error.to_string().contains(&format!("process {pid} (sleep)")), "{error}");
        let ExtentError::InUse { holders, .. } = &error else { unreachable!() };
        assert!(matches!(holders[..], [Holder::Process { .. }]), "{holders:?}");
        assert_ordinary(&fs, &path);
        pinned(&fs, &path).release().unwrap();
    }
}

#[test]
fn a_loop_device_and_a_second_descriptor_of_our_own_are_users_too() {
    let Some(fs) = loopfs::make_or_skip("kernel users", &Spec::EXT4) else { return };
    let path = fs.path("file");
    drop(written(&path, 256));
    let device = loopfs::run(&mut command("losetup", &["--find", "--show"], &path)).unwrap();
    let device = device.trim();
    let error = try_default(&fs, &path);
    loopfs::run(Command::new("losetup").args(["--detach", device])).unwrap();
    let error = error.unwrap_err();
    assert!(error.to_string().contains(&format!("loop device {device}")), "{error}");
    // This process has it open itself, beside the descriptor of the pin.
    let own = open(&path);
    let error = try_default(&fs, &path).unwrap_err();
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    drop(own);
    assert_ordinary(&fs, &path);
}

/// Neither immutable nor recorded nor marked.
pub(crate) fn assert_ordinary(fs: &LoopFs, path: &Path) {
    let listed = loopfs::run(&mut command("lsattr", &[], path)).unwrap();
    assert!(!listed.split(' ').next().unwrap().contains('i'), "{listed}");
    assert_eq!(StateDir::open(fs.outside()).unwrap().records().unwrap().len(), 0);
}

#[test]
fn a_second_pin_names_the_process_that_holds_the_first() {
    let Some(fs) = loopfs::make_or_skip("second pin", &Spec::EXT4) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    let first = pinned(&fs, &path);
    let error = try_default(&fs, &path).unwrap_err();
    assert_eq!(error.kind(), ExtentErrorKind::AlreadyPinned);
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    assert!(first.verify().unwrap().is_sound());
    first.release().unwrap();
    assert_ordinary(&fs, &path);
}

#[test]
fn a_lease_break_recalls_within_milliseconds_and_waits_for_the_release() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("lease break", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let (send, recalled) = mpsc::channel();
        let options = PinOptions {
            on_recall: Some(std::sync::Arc::new(move |incident| {
                send.send((incident.reason, Instant::now())).unwrap()
            })),
            ..PinOptions::default()
        };
        let state = StateDir::open(fs.outside()).unwrap();
        let file = pin(&path, &options, &state, &mut NoProgress).unwrap();
        let watch = file.recall().unwrap();
        assert_eq!(watch.reason(), None);
        // Root clears the flag behind our back. Only this process gets past the open-permission mark, so it plays root.
        clear_immutable(&path);
        assert!(!file.verify().unwrap().immutable);
        let start = Instant::now();
        let try_open = || OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        assert_eq!(try_open().unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        // The watch may have seen the flag first.
        let next = || recalled.recv_timeout(Duration::from_secs(5)).unwrap();
        let (mut reason, mut when) = next();
        if matches!(reason, RecallReason::Doubt(_)) {
            (reason, when) = next();
        }
        assert_eq!(reason, RecallReason::LeaseBreak);
        assert!(when - start < Duration::from_millis(500), "{:?}", when - start);
        assert_eq!(watch.reason(), Some(RecallReason::LeaseBreak));
        let mut poll = [rustix::event::PollFd::new(&watch, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut poll, Some(&rustix::time::Timespec::default())).unwrap(), 1);
        assert!(file.lease_broken());
        assert!(!file.verify().unwrap().is_sound());
        assert_eq!(try_open().unwrap_err().raw_os_error(), Some(libc::EAGAIN), "the writer must still wait");
        file.release().unwrap();
        drop(try_open().unwrap());
        assert_ordinary(&fs, &path);
    }
}

/// Clears the immutable flag from within this process.
pub(crate) fn clear_immutable(path: &Path) {
    let file = fs::File::open(path).unwrap();
    let flags = rustix::fs::ioctl_getflags(&file).unwrap();
    rustix::fs::ioctl_setflags(&file, flags - rustix::fs::IFlags::IMMUTABLE).unwrap();
}

#[test]
fn openers_that_wait_go_on_when_the_pin_ends() {
    let Some(fs) = loopfs::make_or_skip("many openers", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    let file = pinned(&fs, &path);
    let script = "i=0; while [ $i -lt 300 ]; do cat \"$0\" >/dev/null 2>&1; i=$((i+1)); done";
    let mut openers: Vec<_> =
        (0..3).map(|_| command("sh", &["-c", script], &path).spawn().unwrap()).collect();
    std::thread::sleep(Duration::from_millis(100));
    assert!(file.verify().unwrap().is_sound());
    file.release().unwrap();
    for opener in &mut openers {
        assert!(opener.wait().unwrap().success());
    }
    assert_eq!(fs::read(&path).unwrap().len(), 16 * 4096);
}

#[test]
fn a_file_that_was_immutable_before_stays_so() {
    let Some(fs) = loopfs::make_or_skip("foreign immutable", &Spec::EXT4) else { return };
    let path = fs.path("file");
    drop(written(&path, 16));
    loopfs::run(&mut command("chattr", &["+i"], &path)).unwrap();
    let file = pinned(&fs, &path);
    assert!(file.verify().unwrap().is_sound());
    file.release().unwrap();
    refused(&mut command("unlink", &[], &path));
    loopfs::run(&mut command("chattr", &["-i"], &path)).unwrap();
}

#[test]
fn the_map_says_where_the_bytes_lie_on_the_whole_disk() {
    let partitioned = Spec { partition_start: Some(4096), ..Spec::XFS };
    let partitioned_ext4 = Spec { partition_start: Some(2056), ..Spec::EXT4 };
    for spec in BOTH.into_iter().chain([partitioned, partitioned_ext4]) {
        let Some(fs) = loopfs::make_or_skip("bytes on the disk", &spec) else { return };
        let path = fs.path("file");
        drop(super::files::fragmented(&path, 64, 4096));
        drop(written(&path, 64));
        let file = pinned(&fs, &path);
        let identity = file.map().identity();
        assert_eq!(identity.disk.partition_start.get(), spec.partition_start.unwrap_or(0) * 512);
        assert_eq!(identity.disk.node, Path::new(fs.device()));
        assert_eq!(identity.filesystem.kind.name(), spec.kind);
        let told = loopfs::run(Command::new("blkid").args(["-o", "value", "-s", "UUID"]).arg(
            match spec.partition_start {
                None => fs.device().to_owned(),
                Some(_) => format!("{}p1", fs.device()),
            },
        ));
        let uuid = uuid::Uuid::from_bytes(identity.filesystem.uuid).to_string();
        assert_eq!(told.unwrap().trim(), uuid);
        assert_bytes_on_disk(&file, 64);
        file.release().unwrap();
    }
}

/// Reads each block of the file from the disk, past the filesystem and the page cache.
fn assert_bytes_on_disk(file: &PinnedFile, blocks: u64) {
    let mut cursor = fastice::extent::LookupCursor::default();
    for block in 0..blocks {
        let segments: Vec<_> =
            file.map().segments(&mut cursor, ByteOffset(block * 4096), ByteLen(4096)).unwrap().collect();
        let mut found = Vec::new();
        for segment in &segments {
            file.map().check(segment).unwrap();
            found.extend(read_direct(&file.map().identity().disk.node, segment.device_offset, segment.len));
        }
        assert_eq!(found, super::files::pattern(block * 4096), "block {block} in {segments:?}");
    }
}

fn read_direct(node: &Path, offset: ByteOffset, len: ByteLen) -> Vec<u8> {
    let output = Command::new("dd")
        .args(["iflag=direct,skip_bytes,count_bytes", "status=none", "bs=512"])
        .arg(format!("if={}", node.display()))
        .args([format!("skip={offset}"), format!("count={len}")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}
