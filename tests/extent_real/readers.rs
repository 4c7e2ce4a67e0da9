//! Local readers of a pinned file: where they are let in, what they see, and what keeps a file from being given back.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use fastice::extent::{
    ExtentError, ExtentErrorKind, GuardMode, Holder, LocalReaders, NoProgress, PinOptions, PinnedFile,
    RecallReason, StateDir, pin, unpin,
};
use rustix::fs::{Advice, StatxAttributes, StatxFlags};

use super::files::{BOTH, Ended, command, pattern, refused, written};
use super::loopfs::{self, LoopFs, Spec};
use super::pin::clear_immutable;

const PLAIN: Spec = Spec { mkfs: &["-q", "-m", "reflink=0,rmapbt=0"], ..Spec::XFS };
/// Beside the default guards.
const FIT: [Spec; 1] = [Spec::EXT4];
const BLOCKS: u64 = 64;

fn pin_with(fs: &LoopFs, path: &Path, options: &PinOptions) -> Result<PinnedFile, ExtentError> {
    let state = StateDir::open(fs.outside()).expect("room");
    pin(path, options, &state, &mut NoProgress)
}

fn allowing() -> PinOptions {
    PinOptions { local_readers: Some(LocalReaders::Allow), ..PinOptions::default() }
}

/// What a host does: writes a block of the file, past the filesystem.
fn write_as_host(file: &PinnedFile, block: u64, byte: u8) {
    write_to_disk(&place_of(file, block), byte);
}

/// The disk, and where on it a block of the file lies.
fn place_of(file: &PinnedFile, block: u64) -> (PathBuf, u64) {
    let extent = file.map().extents().iter().find(|extent| {
        let start = extent.file_offset.get();
        (start..start + extent.len.get()).contains(&(block * 4096))
    });
    let extent = extent.expect("a block of the file");
    let place = extent.device_offset.get() + block * 4096 - extent.file_offset.get();
    (file.map().identity().disk.node.clone(), place)
}

fn write_to_disk((disk, place): &(PathBuf, u64), byte: u8) {
    let write = format!("pwrite -S {byte} -b 4096 {place} 4096");
    loopfs::run(&mut command("xfs_io", &["-d", "-c", &write], disk)).expect("the disk may be written");
}

fn block(bytes: &[u8], number: u64) -> &[u8] {
    let at = usize::try_from(number * 4096).expect("small");
    &bytes[at..at + 4096]
}

fn cat(path: &Path) -> Vec<u8> {
    let output = Command::new("cat").arg(path).output().expect("cat runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn read_block(file: &File, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, number * 4096).expect("readable");
    bytes
}

fn is_immutable(path: &Path) -> bool {
    let stat =
        rustix::fs::statx(rustix::fs::CWD, path, rustix::fs::AtFlags::empty(), StatxFlags::BASIC_STATS);
    stat.expect("it is there").stx_attributes.contains(StatxAttributes::IMMUTABLE)
}

#[test]
fn a_reader_sees_nothing_older_than_its_open_and_direct_reads_the_disk() {
    for spec in FIT {
        let Some(fs) = loopfs::make_or_skip("local readers", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, BLOCKS));
        let file = pin_with(&fs, &path, &allowing()).expect("nothing can be shared here");
        assert_eq!(file.local_readers(), LocalReaders::Allow);
        assert_eq!(block(&cat(&path), 5), pattern(5 * 4096));
        refused(&mut command("xfs_io", &["-c", "pwrite 0 4k"], &path));
        refused(&mut command("truncate", &["-s", "0"], &path));
        refused(&mut command("mv", &["-T", path.to_str().expect("plain")], &fs.path("other")));

        // This process is not asked about, so nothing is dropped for it.
        let reader = File::open(&path).expect("ours");
        assert_eq!(read_block(&reader, 5), pattern(5 * 4096));
        write_as_host(&file, 5, 0xa1);
        assert_eq!(read_block(&reader, 5), pattern(5 * 4096), "what was read once stays");
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).expect("ours");
        let seen = direct_block(&direct, 5);
        assert!(seen.iter().all(|byte| *byte == 0xa1), "direct I/O reads the disk");
        assert!(
            block(&cat(&path), 5).iter().all(|byte| *byte == 0xa1),
            "the open has dropped what was cached"
        );
        assert!(read_block(&reader, 5).iter().all(|byte| *byte == 0xa1));
        write_as_host(&file, 5, 0xa2);
        rustix::fs::fadvise(&reader, 0, None, Advice::DontNeed).expect("advice");
        assert!(read_block(&reader, 5).iter().all(|byte| *byte == 0xa2), "and so does the advice");

        let report = file.verify().expect("it answers");
        assert!(report.is_sound(), "readers do no harm: {report:?}");
        // Old again, and nobody has it mapped.
        write_as_host(&file, 5, 0xa3);
        file.release().expect("the old block is dropped");
        assert!(read_block(&reader, 5).iter().all(|byte| *byte == 0xa3));
        assert!(!is_immutable(&path));
    }
}

/// By a process, for this one has no aligned memory.
fn direct_block(file: &File, number: u64) -> Vec<u8> {
    let input = file.try_clone().expect("a descriptor");
    let mut dd = Command::new("dd");
    dd.args(["bs=4096", "count=1", "status=none", &format!("skip={number}"), "iflag=direct"]);
    let output = dd.stdin(input).output().expect("dd runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A process that has mapped the file, and read of it; ended when dropped.
struct Mapper(Child, Option<ChildStdin>);

impl Mapper {
    fn of(path: &Path) -> Self {
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "xfs_io", "-r"]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("xfs_io runs");
        let mut input = child.stdin.take().expect("piped");
        input.write_all(b"mmap -r 0 256k\nmread -v 20480 16\n").expect("it listens");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        assert!(lines.any(|line| line.is_ok_and(|line| line.contains("00005000:"))), "it has read the block");
        Self(child, Some(input))
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.1 = None;
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_file_with_old_blocks_that_somebody_has_mapped_is_not_given_back() {
    for spec in FIT {
        let Some(fs) = loopfs::make_or_skip("old blocks", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, BLOCKS));
        let file = pin_with(&fs, &path, &allowing()).expect("nothing can be shared here");
        let mapper = Mapper::of(&path);
        write_as_host(&file, 5, 0xb1);
        let error = file.release().expect_err("an old block is cached");
        assert_eq!(error.kind(), ExtentErrorKind::InUse, "{error}");
        let ExtentError::StaleCache { offset, holders, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*offset / 4096, 5, "{error}");
        let pid = mapper.0.id();
        let is_it = |holder: &Holder| matches!(holder, Holder::Process { pid: found, .. } if *found == pid);
        assert!(holders.iter().any(is_it), "{error}");
        // Nobody can write beside the old byte, and put it back.
        assert!(is_immutable(&path));
        let state = StateDir::open(fs.outside()).expect("room");
        let again = unpin(&path, &state, false).expect_err("still");
        assert_eq!(again.kind(), ExtentErrorKind::InUse, "{again}");
        drop(mapper);
        let report = unpin(&path, &state, false).expect("nobody has it mapped any more");
        assert!(report.immutable_cleared && report.map_was_true == Some(true), "{report:?}");
        assert!(block(&cat(&path), 5).iter().all(|byte| *byte == 0xb1));
        loopfs::run(&mut command("xfs_io", &["-c", "pwrite -S 1 20480 1", "-c", "fsync"], &path))
            .expect("its own");
        assert!(block(&cat(&path), 5)[1..].iter().all(|byte| *byte == 0xb1), "nothing old came back");
    }
}

#[test]
fn who_takes_the_file_from_a_reader_that_has_it_mapped_cannot_write_beside_old_blocks() {
    let Some(fs) = loopfs::make_or_skip("old blocks, taken", &Spec::EXT4) else { return };
    let path = fs.path("file");
    drop(written(&path, BLOCKS));
    let file = pin_with(&fs, &path, &allowing()).expect("nothing can be shared here");
    let mapper = Mapper::of(&path);
    write_as_host(&file, 5, 0xc1);
    // Root takes the flag away, and writes a single byte: its open waits for the lease.
    loopfs::run(&mut command("chattr", &["-i"], &path)).expect("root may");
    let mut writer = command("xfs_io", &["-c", "pwrite -S 1 20480 1", "-c", "fsync"], &path);
    let writer = writer.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("xfs_io runs");
    let recall = file.recall().expect("it is guarded");
    let deadline = Instant::now() + Duration::from_secs(20);
    while recall.reason().is_none() {
        assert!(Instant::now() < deadline, "nobody noticed");
        std::thread::sleep(Duration::from_millis(5));
    }
    file.keep();
    let told = writer.wait_with_output().expect("it ends");
    let told = String::from_utf8_lossy(&told.stderr);
    assert!(told.contains("not permitted"), "{told}");
    assert!(is_immutable(&path));
    drop(mapper);
    let state = StateDir::open(fs.outside()).expect("room");
    unpin(&path, &state, false).expect("nobody has it mapped any more");
    assert!(block(&cat(&path), 5).iter().all(|byte| *byte == 0xc1), "nothing old came back");
    assert!(!is_immutable(&path));
}

/// Another process that has mapped the file through a descriptor of this one, which the mark lets pass; as root has who steals one.
fn mapped_by_our_descriptor(path: &Path) -> Ended {
    let script = format!(
        "$| = 1; my $at = syscall({}, 0, {}, 1, 1, 0, 0); die \"mmap: $!\" if $at == -1; \
         unpack('P1', pack('Q', $at + 20480)); print \"mapped\\n\"; sleep 600;",
        libc::SYS_mmap,
        BLOCKS * 4096
    );
    let mut perl = Command::new("perl");
    perl.args(["-e", &script]).stdin(File::open(path).expect("ours")).stdout(Stdio::piped());
    let mut child = perl.spawn().expect("perl runs");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let child = Ended(child);
    assert_eq!(lines.next().expect("a line").expect("text"), "mapped");
    child
}

#[test]
fn beside_a_stolen_mapping_the_default_pin_is_immutable_again_before_anybody_is_let_in() {
    let Some(fs) = loopfs::make_or_skip("old blocks, stolen", &Spec::EXT4) else { return };
    let path = fs.path("file");
    drop(written(&path, BLOCKS));
    let file = pin_with(&fs, &path, &PinOptions::default()).expect("nobody has it");
    let thief = mapped_by_our_descriptor(&path);
    write_as_host(&file, 5, 0xd1);
    clear_immutable(&path);
    // Only this process gets past the mark, so it plays root: its open waits for the lease.
    let to_open = path.clone();
    let writer = std::thread::spawn(move || {
        let file = OpenOptions::new().write(true).open(to_open).expect("it was writable when it was asked");
        file.write_at(&[1], 20480).and_then(|_| file.sync_all())
    });
    let recall = file.recall().expect("it is guarded");
    let deadline = Instant::now() + Duration::from_secs(20);
    while recall.reason() != Some(RecallReason::LeaseBreak) {
        assert!(Instant::now() < deadline, "nobody noticed: {:?}", recall.reason());
        std::thread::sleep(Duration::from_millis(5));
    }
    file.keep();
    let written = writer.join().expect("it ends");
    assert_eq!(written.expect_err("it is immutable again").raw_os_error(), Some(libc::EPERM));
    assert!(is_immutable(&path));
    drop(thief);
    let state = StateDir::open(fs.outside()).expect("room");
    unpin(&path, &state, false).expect("nobody has it mapped any more");
    assert!(block(&cat(&path), 5).iter().all(|byte| *byte == 0xd1), "nothing old came back");
}

#[test]
fn after_a_forced_unpin_reads_see_what_hosts_wrote() {
    for (spec, damaged) in BOTH.into_iter().flat_map(|spec| [(spec.clone(), false), (spec, true)]) {
        let Some(fs) = loopfs::make_or_skip("the cache after a forced unpin", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, BLOCKS));
        let file = pin_with(&fs, &path, &PinOptions::default()).expect("nobody has it");
        let (place, key) = (place_of(&file, 5), file.map().identity().key());
        file.keep();
        assert_eq!(block(&cat(&path), 5), pattern(5 * 4096));
        write_to_disk(&place, 0xe1);
        assert_eq!(block(&cat(&path), 5), pattern(5 * 4096), "it is cached");
        let state = StateDir::open(fs.outside()).expect("room");
        if damaged {
            std::fs::write(state.path().join(format!("{key}.json")), "{").expect("room");
        }
        unpin(&path, &state, true).expect("by force");
        assert!(
            block(&cat(&path), 5).iter().all(|byte| *byte == 0xe1),
            "damaged {damaged}: old blocks are cached"
        );
        assert!(!is_immutable(&path));
    }
}

#[test]
fn where_more_than_reading_could_come_of_it_they_are_not_let_in() {
    let Some(fs) = loopfs::make_or_skip("readers on XFS without reflink", &PLAIN) else { return };
    let path = fs.path("file");
    drop(written(&path, BLOCKS));
    let error = pin_with(&fs, &path, &allowing()).expect_err("XFS lets writers in beside a mapping");
    assert_eq!(error.kind(), ExtentErrorKind::Guard);
    assert!(error.to_string().contains("beside old blocks"), "{error}");
    drop(fs);
    let Some(fs) = loopfs::make_or_skip("readers on reflink", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, BLOCKS));
    let error = pin_with(&fs, &path, &allowing()).expect_err("anybody could clone it");
    assert_eq!(error.kind(), ExtentErrorKind::Guard);
    assert!(error.to_string().contains("reflink") && error.remedy().contains("local_readers"), "{error}");
    assert!(!is_immutable(&path));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("ours");
    let swap = PinOptions { guard: Some(GuardMode::SwapFile), prepare: true, ..allowing() };
    let file = pin_with(&fs, &path, &swap).expect("the swap area forbids clones");
    assert_eq!(block(&cat(&path), 5), pattern(5 * 4096));
    let clone = Command::new("cp")
        .arg("--reflink=always")
        .args([&path, &fs.path("clone")])
        .output()
        .expect("cp runs");
    let told = String::from_utf8_lossy(&clone.stderr);
    assert!(!clone.status.success() && told.contains("Text file busy"), "{told}");
    assert!(file.verify().expect("it answers").is_sound());
    file.release().expect("given back");
}

#[test]
fn the_choice_is_recorded_and_the_proof_is_the_one_that_it_needs() {
    for spec in FIT {
        let Some(fs) = loopfs::make_or_skip("recorded readers", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, BLOCKS));
        let by_default = PinOptions::default();
        let mut reader =
            Command::new("sleep").arg("600").stdin(File::open(&path).expect("ours")).spawn().expect("sleep");
        let refused_to = pin_with(&fs, &path, &by_default).expect_err("somebody has it open");
        assert_eq!(refused_to.kind(), ExtentErrorKind::InUse);
        let file = pin_with(&fs, &path, &allowing()).expect("a reader is not in the way");
        file.keep();
        assert!(is_immutable(&path));
        let again = pin_with(&fs, &path, &by_default).expect("adopted");
        assert_eq!(again.local_readers(), LocalReaders::Allow, "as its record says");
        assert_eq!(block(&cat(&path), 5), pattern(5 * 4096));
        again.keep();
        let refuse = PinOptions { local_readers: Some(LocalReaders::Refuse), ..PinOptions::default() };
        let refused_to = pin_with(&fs, &path, &refuse).expect_err("the reader is still there");
        assert_eq!(refused_to.kind(), ExtentErrorKind::InUse);
        reader.kill().expect("ours");
        reader.wait().expect("ours");
        let alone = pin_with(&fs, &path, &refuse).expect("nobody has it open");
        refused(&mut command("cat", &[], &path));
        alone.release().expect("given back");
        let writer = OpenOptions::new().write(true).open(&path).expect("nobody has pinned it");
        let mut holder = Command::new("sleep").arg("600").stdin(writer).spawn().expect("sleep");
        let refused_to = pin_with(&fs, &path, &allowing()).expect_err("a writer is in the way");
        assert_eq!(refused_to.kind(), ExtentErrorKind::InUse);
        assert!(!is_immutable(&path));
        holder.kill().expect("ours");
        holder.wait().expect("ours");
    }
}
