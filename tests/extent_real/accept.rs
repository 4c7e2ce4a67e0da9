//! The acceptance rules on real files.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use fastice::extent::{ExtentError, ExtentErrorKind, Violation, accept, read_map, survey};
use fastice::units::{BlockSize, ByteLen, ByteOffset};
use rustix::fs::FallocateFlags;

use super::files::{BOTH, KIB, MIB, command, fallocate, open, punch, written};
use super::loopfs::{self, Spec};
use super::pin::{assert_ordinary, try_default};

#[test]
fn holes_unwritten_and_shared_blocks_and_odd_sizes_are_named_with_their_places() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("layout rules", &spec) else { return };
        let path = fs.path("file");
        let file = written(&path, 64);
        assert_eq!(accept(&path).unwrap(), []);
        // XFS allocates beyond the end while a file grows; a truncation gives that back.
        file.set_len(256 * KIB).unwrap();
        punch(&file, 16 * KIB, 8 * KIB);
        fallocate(&file, FallocateFlags::empty(), 256 * KIB, 64 * KIB);
        file.set_len(320 * KIB + 100).unwrap();
        let found = accept(&path).unwrap();
        let expected = [
            Violation::UnalignedSize { size: ByteLen(320 * KIB + 100), block: BlockSize::B512 },
            Violation::Hole { file_offset: ByteOffset(16 * KIB), len: ByteLen(8 * KIB) },
            Violation::Unwritten { file_offset: ByteOffset(256 * KIB), len: ByteLen(64 * KIB) },
            Violation::Hole { file_offset: ByteOffset(320 * KIB), len: ByteLen(100) },
        ];
        assert_eq!(found, expected, "{}", spec.kind);
        drop(file);
        let error = try_default(&fs, &path).unwrap_err();
        assert_eq!(error.kind(), ExtentErrorKind::NotAccepted);
        assert!(error.to_string().contains("(and 3 more)"), "{error}");
        assert_eq!(error.remedy(), "pin with --prepare, or serve with `prepare = true`");
        assert_ordinary(&fs, &path);
    }
}

#[test]
fn dirty_pages_are_settled_before_the_map_is_judged() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("dirty pages", &spec) else { return };
        let path = fs.path("file");
        let file = open(&path);
        // Buffered into nothing: DELALLOC with no address, until FIEMAP's SYNC.
        file.write_all_at(&vec![7; 256 * 1024], 0).unwrap();
        assert_eq!(accept(&path).unwrap(), [], "{}", spec.kind);
    }
}

#[test]
fn reflinked_blocks_are_refused_and_the_file_is_left_ordinary() {
    let Some(fs) = loopfs::make_or_skip("shared", &Spec::XFS) else { return };
    let path = fs.path("file");
    drop(written(&path, 64));
    loopfs::run(command("cp", &["--reflink=always"], &path).arg(fs.path("copy"))).unwrap();
    let found = accept(&path).unwrap();
    assert_eq!(found, [Violation::Shared { file_offset: ByteOffset(0), len: ByteLen(256 * KIB) }]);
    assert_eq!(try_default(&fs, &path).unwrap_err().kind(), ExtentErrorKind::NotAccepted);
    assert_ordinary(&fs, &path);
}

#[test]
fn inline_data_is_refused() {
    let spec = Spec { mkfs: &["-q", "-F", "-O", "inline_data", "-I", "1024"], ..Spec::EXT4 };
    let Some(fs) = loopfs::make_or_skip("inline", &spec) else { return };
    let path = fs.path("file");
    fs::write(&path, [1; 512]).unwrap();
    let found = accept(&path).unwrap();
    assert!(found.iter().any(|v| matches!(v, Violation::Inline { .. })), "{found:?}");
}

#[test]
fn journaled_data_is_refused_for_a_filesystem_and_by_its_default() {
    let by_mount = Spec { mount: "data=journal", ..Spec::EXT4 };
    let by_default = Spec { tune: &["-o", "journal_data"], ..Spec::EXT4 };
    for spec in [by_mount, by_default] {
        let Some(fs) = loopfs::make_or_skip("data=journal", &spec) else { return };
        let path = fs.path("file");
        drop(written(&path, 16));
        let found = accept(&path).unwrap();
        assert_eq!(found, [Violation::JournaledData { how: "mount option data=journal" }], "{spec:?}");
        assert_eq!(try_default(&fs, &path).unwrap_err().kind(), ExtentErrorKind::NotAccepted);
    }
}

#[test]
fn encrypted_files_are_refused_though_their_map_shows_nothing() {
    let spec = Spec { mkfs: &["-q", "-F", "-O", "encrypt"], ..Spec::EXT4 };
    let Some(fs) = loopfs::make_or_skip("encryption", &spec) else { return };
    let directory = fs.path("secret");
    fs::create_dir(&directory).unwrap();
    if let Err(reason) = encrypt(&directory) {
        return loopfs::skip("encryption", &reason);
    }
    let path = directory.join("file");
    drop(written(&path, 16));
    let found = accept(&path).unwrap();
    assert!(found.contains(&Violation::Encrypted), "{found:?}");
}

/// Gives a directory a version 1 encryption policy with a key of zeros in the session keyring, by e4crypt.
fn encrypt(directory: &Path) -> Result<(), String> {
    let key = "echo fastice | e4crypt add_key -S 0x01020304 \"$0\"";
    loopfs::run(Command::new("sh").args(["-c", key]).arg(directory)).map(drop)
}

#[test]
fn other_filesystems_and_other_things_than_files_are_refused() {
    let tmpfs = tempfile::tempdir_in("/dev/shm");
    if let Ok(directory) = &tmpfs {
        let path = directory.path().join("file");
        fs::write(&path, [1; 4096]).unwrap();
        let found = accept(&path).unwrap();
        assert_eq!(found, [Violation::Filesystem { name: "tmpfs".to_owned() }]);
        let error = read_map(&path).unwrap_err();
        assert!(error.remedy().contains("XFS or ext4"), "{error}");
    } else {
        loopfs::skip("tmpfs", "no /dev/shm");
    }
    let found = survey(Path::new("/")).unwrap().violations;
    assert!(found.contains(&Violation::NotRegular { what: "a directory" }), "{found:?}");
    assert_eq!(accept(Path::new("/dev/null")).unwrap_err().kind(), ExtentErrorKind::NotAccepted);
    let error = accept(Path::new("/no/such/file")).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ExtentErrorKind::Io, "cannot find /no/such/file")
    );
    assert_eq!(error.remedy(), "check the path, and whether its filesystem is mounted");
}

#[test]
fn btrfs_and_ext3_are_refused() {
    let others = [Spec { kind: "btrfs", mkfs: &["-q"], ..Spec::EXT4 }, Spec { kind: "ext3", ..Spec::EXT4 }];
    for spec in others {
        let Some(fs) = loopfs::make_or_skip(spec.kind, &spec) else { continue };
        let path = fs.path("file");
        drop(written(&path, 16));
        let error = try_default(&fs, &path).unwrap_err();
        let ExtentError::NotAccepted { first, .. } = &error else { panic!("{error}") };
        assert_eq!(**first, Violation::Filesystem { name: spec.kind.to_owned() });
    }
}

#[test]
fn empty_files_are_refused_and_blocks_beyond_the_end_do_not_count() {
    for spec in BOTH {
        let Some(fs) = loopfs::make_or_skip("sizes", &spec) else { return };
        let empty = fs.path("empty");
        drop(open(&empty));
        assert_eq!(accept(&empty).unwrap(), [Violation::Empty]);
        let path = fs.path("file");
        let file = written(&path, 16);
        fallocate(&file, FallocateFlags::KEEP_SIZE, 64 * KIB, MIB);
        assert_eq!(accept(&path).unwrap(), []);
        file.set_len(64 * KIB - 512).unwrap();
        drop(file);
        let pinned = super::pin::pinned(&fs, &path);
        assert_eq!(pinned.map().len(), ByteLen(64 * KIB - 512));
        assert!(pinned.verify().unwrap().is_sound());
        pinned.release().unwrap();
    }
}

#[test]
fn an_active_swap_file_is_refused_and_named() {
    let Some(fs) = loopfs::make_or_skip("swap", &Spec::EXT4) else { return };
    let path = fs.path("swap file");
    drop(written(&path, 64));
    loopfs::run(&mut command("chmod", &["600"], &path)).unwrap();
    loopfs::run(&mut command("mkswap", &[], &path)).unwrap();
    if let Err(reason) = loopfs::run(&mut command("swapon", &["--priority", "0"], &path)) {
        return loopfs::skip("swap", &reason);
    }
    let found = accept(&path);
    let refused = try_default(&fs, &path);
    loopfs::run(&mut command("swapoff", &[], &path)).unwrap();
    assert_eq!(found.unwrap(), [Violation::Swap]);
    assert_eq!(refused.unwrap_err().kind(), ExtentErrorKind::NotAccepted);
    assert_eq!(accept(&path).unwrap(), []);
}
