//! Memory between processes: what a file is good for, and which files are refused.

use std::fs::File;
use std::os::fd::OwnedFd;

use hugepage_alloc::{Backing, DmaRegion, PeerFileError, RegionOptions};
use rustix::fs::{MemfdFlags, SealFlags};

const MIB: usize = 1 << 20;

fn shared() -> DmaRegion {
    let options = RegionOptions { share: true, ..RegionOptions::ordinary() };
    DmaRegion::with_options(4 * MIB, &options).expect("a little memory")
}

fn file_of(region: &DmaRegion) -> OwnedFd {
    region.file().expect("asked for").0.try_clone_to_owned().expect("a descriptor")
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let file =
        rustix::fs::memfd_create(c"test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
    rustix::fs::ftruncate(&file, len).expect("a little memory");
    rustix::fs::fcntl_add_seals(&file, seals).expect("seals");
    file
}

#[test]
fn both_ends_see_what_the_other_writes() {
    let ours = shared();
    assert_eq!(ours.as_ptr().addr() % (2 << 20), 0);
    let theirs = DmaRegion::from_file(file_of(&ours), MIB as u64, 8192, true).expect("a part of it");
    assert_eq!((theirs.len(), theirs.backing()), (8192, Backing::Peer));
    assert!(!theirs.is_same(&ours));
    assert!(ours.store_u64s(MIB + 8, [7]));
    assert_eq!(theirs.load_u64(8), Some(7));
    assert!(theirs.write(4096, b"answer"));
    let mut bytes = [0; 6];
    assert!(ours.read(MIB + 4096, &mut bytes));
    assert_eq!(&bytes, b"answer");
    assert!(!theirs.write(8190, b"end"), "behind its part");
}

#[test]
fn a_region_to_be_read_only_is_not_written() {
    let ours = shared();
    let theirs = DmaRegion::from_file(file_of(&ours), 0, 4096, false).expect("a part of it");
    assert!(!theirs.is_writable());
    assert!(!theirs.write(0, &[1]) && !theirs.zero(0, 8) && !theirs.store_u32(0, 1));
    assert!(!theirs.store_u64s(0, [1]));
    assert_eq!(theirs.load_u64(0), Some(0));
}

#[test]
fn the_file_cannot_be_cut_off() {
    let ours = shared();
    let file = file_of(&ours);
    assert!(rustix::fs::ftruncate(&file, 0).is_err());
    assert!(rustix::fs::ftruncate(&file, 8 << 20).is_err());
    assert!(rustix::fs::fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).is_err(), "the seals are sealed");
}

#[test]
fn memory_that_is_not_shared_has_no_file() {
    let region = DmaRegion::with_options(1, &RegionOptions::ordinary()).expect("a little memory");
    assert!(region.file().is_none());
}

#[test]
fn files_that_could_be_cut_off_are_refused() {
    let not_sealed = |file: OwnedFd| {
        let refused = DmaRegion::from_file(file, 0, 4096, true);
        assert!(matches!(refused, Err(PeerFileError::NotSealed)), "{refused:?}");
    };
    not_sealed(memfd(8192, SealFlags::GROW));
    let disk_file = tempfile::tempfile().expect("a file");
    disk_file.set_len(8192).expect("room");
    not_sealed(disk_file.into());
    not_sealed(File::open("/dev/zero").expect("a device").into());
    not_sealed(File::open("/proc/self/exe").expect("a file").into());
}

#[test]
fn ranges_that_leave_the_file_are_refused() {
    let refused = |offset, len| {
        let result = DmaRegion::from_file(memfd(8192, SealFlags::SHRINK), offset, len, true);
        matches!(result, Err(PeerFileError::Range { .. }))
    };
    assert!(refused(0, 0));
    assert!(refused(0, 12288));
    assert!(refused(8192, 4096));
    assert!(refused(1, 4096));
    assert!(refused(0, 100));
    assert!(refused(u64::MAX - 4095, 4096));
    assert!(refused(0, usize::MAX));
    assert!(DmaRegion::from_file(memfd(8192, SealFlags::SHRINK), 4096, 4096, true).is_ok());
}

#[test]
fn a_file_without_the_right_to_write_is_refused_for_writing() {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd(8192, SealFlags::SHRINK)));
    assert!(File::open(path).is_err(), "the memfd above is closed");
    let file = memfd(8192, SealFlags::SHRINK);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let only_read: OwnedFd = File::open(path).expect("our own file").into();
    let again = only_read.try_clone().expect("a descriptor");
    assert!(matches!(DmaRegion::from_file(only_read, 0, 4096, true), Err(PeerFileError::Map(_))));
    assert!(DmaRegion::from_file(again, 0, 4096, false).is_ok());
}
