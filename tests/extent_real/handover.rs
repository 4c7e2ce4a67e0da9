//! Files whose filesystem is unmounted: the map on the device against the one that the kernel told before.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;

use fastice::extent::ondisk::{self, OnDiskError, ReadAt};
use fastice::extent::{
    Extent, ExtentError, ExtentErrorKind, FiemapFlags, GuardMode, LookupCursor, NoProgress, PinOptions,
    RawExtent, StateDir, StoredPin, compare, pin, read_map, stored_pin, take_over, unpin, verify_stored,
};
use fastice::units::{ByteLen, ByteOffset};
use rustix::fs::FallocateFlags;

use super::files::{BOTH, MIB, fallocate, fragmented, open, pattern, written};
use super::loopfs::{self, LoopFs, Spec};

/// A device node, read directly.
struct Node(File);

impl Node {
    fn open(fs: &LoopFs, spec: &Spec) -> Self {
        Self(File::open(node_path(fs, spec)).unwrap())
    }
}

/// The node of the device that holds the filesystem: the loop device, or its partition.
fn node_path(fs: &LoopFs, spec: &Spec) -> String {
    match spec.partition_start {
        Some(_) => format!("{}p1", fs.device()),
        None => fs.device().to_owned(),
    }
}

fn unmount(fs: &LoopFs) {
    loopfs::unmount(&fs.root()).unwrap();
}

fn mount(fs: &LoopFs, spec: &Spec) {
    let mut command = Command::new("mount");
    loopfs::run(command.args(["-t", spec.kind]).arg(node_path(fs, spec)).arg(fs.root())).unwrap();
}

impl ReadAt for Node {
    fn read_at(&mut self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(target, offset)
    }
}

const PARTITIONED: Spec = Spec { partition_start: Some(8192), ..Spec::XFS };
/// Small blocks make deep trees.
const XFS_SMALL: Spec = Spec { mkfs: &["-q", "-m", "reflink=1", "-b", "size=1024"], ..Spec::XFS };
const EXT4_SMALL: Spec = Spec { mkfs: &["-q", "-F", "-b", "1024", "-O", "^64bit"], ..Spec::EXT4 };

/// Every other block is written; a run at the end is allocated and not written.
fn sparse(fs: &LoopFs, name: &str, blocks: u64, block_len: u64) -> PathBuf {
    let path = fs.path(name);
    let file = open(&path);
    for block in (0..blocks).step_by(2) {
        file.write_all_at(&pattern(block)[..16], block * block_len).unwrap();
        if block % 64 == 0 {
            file.sync_data().unwrap();
        }
    }
    fallocate(&file, FallocateFlags::empty(), blocks * block_len, MIB);
    file.sync_all().unwrap();
    path
}

/// Without what only FIEMAP tells.
fn plain(records: Vec<RawExtent>) -> Vec<RawExtent> {
    let keep = FiemapFlags::UNWRITTEN;
    records.into_iter().map(|r| RawExtent { flags: r.flags & keep, ..r }).collect()
}

#[test]
fn the_device_holds_the_map_that_the_kernel_told() {
    for (spec, block_len) in
        [(Spec::XFS, 4096), (PARTITIONED, 4096), (XFS_SMALL, 1024), (Spec::EXT4, 4096), (EXT4_SMALL, 1024)]
    {
        let Some(fs) = loopfs::make_or_skip("map on the device", &spec) else { return };
        let mut files = Vec::new();
        for blocks in [0, 2, 20, 300, 6000] {
            let path = sparse(&fs, &format!("sparse{blocks}"), blocks, block_len);
            files.push(read_map(&path).unwrap());
        }
        drop(fragmented(&fs.path("full"), 1000, block_len));
        files.push(read_map(&fs.path("full")).unwrap());
        unmount(&fs);
        let mut node = Node::open(&fs, &spec);
        for (identity, told) in files {
            let found = ondisk::read(&mut node, &identity).unwrap();
            assert_eq!(found.size, identity.size);
            assert!(!found.immutable);
            // Records are cut as each likes; what counts is where each block is, and whether it is written.
            let told = plain(told);
            let count = told.len();
            assert!(
                same(&told, &found.extents),
                "{} with {count} extents on {spec:?}",
                identity.path.display()
            );
        }
    }
}

/// Joins records that continue each other.
fn joined(records: &[RawExtent]) -> Vec<RawExtent> {
    let mut all: Vec<RawExtent> = Vec::new();
    for record in records {
        match all.last_mut() {
            Some(last)
                if last.file_end() == record.file_offset.get()
                    && last.device_offset.get() + last.len.get() == record.device_offset.get()
                    && last.flags == record.flags =>
            {
                last.len.0 += record.len.get();
            }
            _ => all.push(*record),
        }
    }
    all
}

fn same(one: &[RawExtent], other: &[RawExtent]) -> bool {
    joined(one) == joined(other)
}

/// A pinned file of an unmounted filesystem, with its record.
fn handed_over(spec: &Spec) -> Option<(LoopFs, StateDir, StoredPin)> {
    let fs = loopfs::make_or_skip("handover", spec)?;
    let path = fs.path("file");
    drop(written(&path, 256));
    drop(fragmented(&fs.path("other"), 100, 4096));
    let state = StateDir::open(fs.outside()).unwrap();
    let options = PinOptions { keep: true, ..PinOptions::default() };
    pin(&path, &options, &state, &mut NoProgress).unwrap().keep();
    unmount(&fs);
    let stored = stored_pin(&path, &state).unwrap();
    Some((fs, state, stored))
}

#[test]
fn an_unmounted_file_is_taken_over_once_and_given_back_whole() {
    for spec in [Spec::XFS, Spec::EXT4, PARTITIONED] {
        let Some((fs, state, stored)) = handed_over(&spec) else { return };
        let mut node = Node::open(&fs, &spec);
        let taken = take_over(&stored, &state, &mut node).unwrap();
        assert_eq!(taken.map().generation(), stored.generation);
        assert_eq!(Some(taken.map().checksum()), stored.checksum());
        let error = take_over(&stored, &state, &mut node).unwrap_err();
        assert_eq!(error.kind(), ExtentErrorKind::AlreadyPinned, "{error}");
        drop(taken);
        // A killed target leaves it as it was: the next one takes it over again.
        drop(take_over(&stored, &state, &mut node).unwrap());
        mount(&fs, &spec);
        let error = take_over(&stored, &state, &mut node).unwrap_err();
        assert!(matches!(error, ExtentError::KernelHasIt { .. }), "{error}");
        assert!(verify_stored(&stored).unwrap().is_sound());
        unpin(stored.path(), &state, false).unwrap();
        assert_eq!(stored_pin(&fs.path("file"), &state).unwrap_err().kind(), ExtentErrorKind::State);
    }
}

#[test]
fn what_is_reserved_is_reserved_without_the_filesystem_too() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("handover of a swap file", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 256));
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&path, mode).unwrap();
        let state = StateDir::open(fs.outside()).unwrap();
        let guard = Some(GuardMode::SwapFile);
        let options = PinOptions { guard, keep: true, prepare: true, ..PinOptions::default() };
        pin(&path, &options, &state, &mut NoProgress).unwrap().keep();
        // As after a reboot: the swap area is gone, and the flag is there.
        for (program, arguments) in [("chattr", &["-i"][..]), ("swapoff", &[]), ("chattr", &["+i"])] {
            loopfs::run(Command::new(program).args(arguments).arg(&path)).unwrap();
        }
        unmount(&fs);
        let stored = stored_pin(&path, &state).unwrap();
        let taken = take_over(&stored, &state, &mut Node::open(&fs, &spec)).unwrap();
        assert_eq!(taken.map().len().get(), 254 * 4096);
        let mut cursor = LookupCursor::default();
        let first = taken.map().segments(&mut cursor, ByteOffset(0), ByteLen(4096)).unwrap().next().unwrap();
        assert_eq!(first.file_offset, ByteOffset(8192));
        drop(taken);
        mount(&fs, &spec);
        assert!(unpin(&path, &state, false).unwrap().immutable_cleared);
        assert!(fs::read(&path).unwrap()[..8192].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_file_that_was_changed_behind_the_record_is_not_taken_over() {
    for spec in BOTH {
        let Some((fs, state, stored)) = handed_over(&spec) else { return };
        let refusal = |fs: &LoopFs| take_over(&stored, &state, &mut Node::open(fs, &spec)).unwrap_err();
        mount(&fs, &spec);
        loopfs::run(Command::new("chattr").arg("-i").arg(fs.path("file"))).unwrap();
        unmount(&fs);
        let error = refusal(&fs);
        assert!(
            matches!(&error, ExtentError::OnDisk { source, .. } if matches!(**source, OnDiskError::NotImmutable)),
            "{error}"
        );
        mount(&fs, &spec);
        let file = OpenOptions::new().write(true).open(fs.path("file")).unwrap();
        super::files::punch(&file, 8192, 4096);
        drop(file);
        unmount(&fs);
        assert!(matches!(refusal(&fs), ExtentError::Changed { .. }));
        mount(&fs, &spec);
        fs::remove_file(fs.path("file")).unwrap();
        unmount(&fs);
        let error = refusal(&fs);
        assert!(
            matches!(&error, ExtentError::OnDisk { source, .. }
                if matches!(**source, OnDiskError::OtherFile { .. } | OnDiskError::Damaged { .. })),
            "{error}"
        );
    }
}

#[test]
fn an_inode_that_no_name_leads_to_is_not_the_pinned_file() {
    let Some((fs, state, stored)) = handed_over(&Spec::XFS) else { return };
    // Where the inode lies: `0x... (BYTE)`.
    let ask = format!("convert inode {} byte", stored.identity.inode);
    let told = loopfs::run(Command::new("xfs_db").args(["-r", "-c", &ask, fs.device()])).unwrap();
    let at: u64 = told.split(['(', ')']).nth(1).unwrap().parse().unwrap();
    let node = OpenOptions::new().read(true).write(true).open(fs.device()).unwrap();
    let mut magic = [0; 2];
    node.read_exact_at(&mut magic, at).unwrap();
    assert_eq!(&magic, b"IN", "an inode is there");
    let link_count = |count: u32| node.write_all_at(&count.to_be_bytes(), at + 16).unwrap();
    link_count(0);
    let error = take_over(&stored, &state, &mut Node::open(&fs, &Spec::XFS)).unwrap_err();
    assert!(
        matches!(&error, ExtentError::OnDisk { source, .. } if matches!(**source, OnDiskError::OtherFile { .. })),
        "{error}"
    );
    link_count(1);
    drop(take_over(&stored, &state, &mut Node::open(&fs, &Spec::XFS)).unwrap());
}

#[test]
fn another_filesystem_and_an_unclean_one_are_not_taken_over() {
    for spec in BOTH {
        let Some((fs, state, stored)) = handed_over(&spec) else { return };
        let uuid_at = if spec.kind == "xfs" { 32 } else { 1024 + 104 };
        let node = OpenOptions::new().read(true).write(true).open(node_path(&fs, &spec)).unwrap();
        let refusal = |at: u64, bytes: &[u8]| {
            let mut before = vec![0; bytes.len()];
            node.read_exact_at(&mut before, at).unwrap();
            node.write_all_at(bytes, at).unwrap();
            let error = take_over(&stored, &state, &mut Node::open(&fs, &spec)).unwrap_err();
            node.write_all_at(&before, at).unwrap();
            match error {
                ExtentError::OnDisk { source, .. } => *source,
                error => panic!("{error}"),
            }
        };
        assert!(matches!(refusal(uuid_at, &[7; 16]), OnDiskError::OtherFilesystem { .. }));
        if spec.kind == "ext4" {
            // s_state: mounted, or not unmounted in order.
            assert!(matches!(refusal(1024 + 58, &[0, 0]), OnDiskError::Unclean));
        }
        take_over(&stored, &state, &mut Node::open(&fs, &spec)).unwrap();
    }
}

/// Remembers what was read, changes some of it.
struct Mangled {
    node: Node,
    seed: u64,
    one_in: u64,
}

impl ReadAt for Mangled {
    fn read_at(&mut self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        self.node.read_at(offset, target)?;
        for byte in target {
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            if self.seed.is_multiple_of(self.one_in) {
                *byte = self.seed.to_le_bytes()[5];
            }
        }
        Ok(())
    }
}

#[test]
fn mangled_metadata_is_refused_or_tells_another_map_and_never_panics() {
    for (spec, block_len) in [(XFS_SMALL, 1024), (EXT4_SMALL, 1024)] {
        let Some(fs) = loopfs::make_or_skip("mangled metadata", &spec) else { return };
        let (identity, told) = read_map(&sparse(&fs, "file", 6000, block_len)).unwrap();
        unmount(&fs);
        let frozen = as_frozen(&told);
        let (mut refused, mut same) = (0, 0);
        for seed in 1..400u64 {
            let node = Node::open(&fs, &spec);
            let one_in = [200, 1000, 5000, 50_000][usize::try_from(seed % 4).unwrap()];
            let mut mangled = Mangled { node, seed: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15), one_in };
            match ondisk::read(&mut mangled, &identity) {
                Err(_) => refused += 1,
                Ok(found) => {
                    let comparison = compare(&frozen, &found.extents, ByteOffset(0), identity.size);
                    same += u32::from(comparison.is_equal());
                }
            }
        }
        assert!(refused > 100, "{refused} refused, {same} the same");
    }
}

fn as_frozen(records: &[RawExtent]) -> Vec<Extent> {
    let frozen =
        |r: &RawExtent| Extent { file_offset: r.file_offset, device_offset: r.device_offset, len: r.len };
    records.iter().map(frozen).collect()
}
