//! The checks of the matrix find what they look for: a wrong block is planted in each place where there must be none, and a
//! lost write in a file.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use fastice::initiator::bench::verify::fill_block;
use fastice::units::Lba;

use crate::broken::{End, serve};
use crate::disk::{Disk, SECTOR, Wrong};
use crate::load::{Load, options, units_in_file};
use crate::loopfs::Spec;
use crate::modes::DEFAULT;
use crate::ops::{ATTEMPTS, CHANGES, EXT4, SWAP_ATTEMPTS, XFS, has_file_setattr, has_overlays};
use crate::refused::WITHOUT_EFFECT;
use crate::thief::Thief;

const RUN: u64 = 4711;

/// What a remote host of that run writes to a block.
fn remote(run: u64, block: u64) -> Vec<u8> {
    let mut sector = vec![0; SECTOR];
    fill_block(&mut sector, run, Lba(block), 1);
    sector
}

fn write_at(path: &Path, at: u64, data: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("nobody denies it");
    file.write_all_at(data, at).and_then(|()| file.sync_all()).expect("room");
}

/// Puts `sector` at `offset` of the raw disk: what is found then. Puts back what was there.
fn planted(disk: &Disk, offset: u64, sector: &[u8]) -> Vec<Wrong> {
    let mut was = vec![0; SECTOR];
    File::open(disk.image()).and_then(|image| image.read_exact_at(&mut was, offset)).expect("the image");
    write_at(&disk.image(), offset, sector);
    let wrongs = disk.wrongs();
    write_at(&disk.image(), offset, &was);
    assert_eq!(disk.wrongs(), []);
    wrongs
}

/// Where byte `at` of the file at `path` is on the disk.
fn on_disk(disk: &Disk, path: &Path, at: u64) -> u64 {
    let extents = disk.extents(path);
    let home =
        extents.iter().find(|(file, _, len)| (*file..file + len).contains(&at)).expect("it has blocks");
    home.1 + (at - home.0)
}

fn wrong_blocks_are_found(spec: &Spec) {
    let Some(mut disk) = Disk::new("planted blocks", spec, 2) else { return };
    let (path, neighbour) = (disk.path(1), disk.neighbour(1));
    disk.lab.fastice(&["pin"], &[&path], 0);
    disk.expect_run(RUN, &path);
    disk.lab.fastice(&["unpin"], &[&path], 0);
    assert_eq!(disk.wrongs(), []);

    // At home, and one sector beside it.
    let (offset, block) = (on_disk(&disk, &path, 65536), 65536 / SECTOR as u64);
    assert_eq!(planted(&disk, offset, &remote(RUN, block)), []);
    let stray = |offset, run, block| Wrong::Stray { offset, run, block };
    assert_eq!(planted(&disk, offset, &remote(RUN, block + 1)), [stray(offset, RUN, block + 1)]);
    // Of a run that nobody knows.
    assert_eq!(planted(&disk, offset, &remote(RUN + 1, block)), [stray(offset, RUN + 1, block)]);
    // In another file of hosts.
    let other = on_disk(&disk, &disk.path(2), 65536);
    assert_eq!(planted(&disk, other, &remote(RUN, block)), [stray(other, RUN, block)]);
    // In blocks that nobody was given, whoever wrote them.
    let filler = on_disk(&disk, &disk.lab.fs.path("filler"), 1 << 20);
    assert_eq!(planted(&disk, filler, &remote(RUN, block)), [stray(filler, RUN, block)]);
    assert_eq!(planted(&disk, filler, &[7; SECTOR]), [Wrong::Filler { offset: filler }]);
    // In a neighbour: seen on the disk and in the file. What no host wrote, too.
    let at = 5 * SECTOR as u64;
    let beside = on_disk(&disk, &neighbour, at);
    let changed = |remote| Wrong::Changed { file: neighbour.clone(), offset: at, remote };
    assert_eq!(planted(&disk, beside, &remote(RUN, block)), [stray(beside, RUN, block), changed(true)]);
    assert_eq!(planted(&disk, beside, &[7; SECTOR]), [changed(false)]);
    // In the last block of the disk.
    let last = (spec.size_mib << 20) - SECTOR as u64;
    assert!(planted(&disk, last, &remote(RUN, block)).contains(&stray(last, RUN, block)));
    assert!(disk.strays().is_empty());

    blocks_of_the_thief_are_found(&disk);
    write_at(&neighbour, at, &[7; SECTOR]);
    assert!(panics(|| disk.check()), "the last look finds it, too");
}

fn panics(check: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(check)).is_err()
}

fn blocks_of_the_thief_are_found(disk: &Disk) {
    let mut thief = Thief::waiting_on(disk, End::Before);
    thief.grow();
    let path = disk.lab.fs.path("thief");
    thief.assert_alone("nobody writes", End::Before, || ());
    write_at(&path, 65536, &remote(RUN, 1));
    assert_eq!(thief.damage(), [(65536, true)]);
    assert!(panics(|| thief.assert_alone("a host wrote", End::Before, || ())));
    assert!(panics(|| thief.assert_alone("a host wrote", End::Held, || ())));
    thief.assert_alone("told, and mended", End::Noticed, || ());
    let late = || write_at(&path, 65536, &remote(RUN, 1));
    assert!(panics(|| thief.assert_alone("a host goes on", End::Noticed, late)));
}

#[test]
fn a_planted_block_is_found_wherever_it_is_on_xfs() {
    wrong_blocks_are_found(&XFS);
}

#[test]
fn a_planted_block_is_found_wherever_it_is_on_ext4() {
    wrong_blocks_are_found(&EXT4);
}

#[test]
fn a_lost_write_is_found() {
    let Some(mut disk) = Disk::new("lost writes", &XFS, 1) else { return };
    let path = disk.path(1);
    let daemon = serve(&mut disk, &DEFAULT);
    disk.expect_run(RUN, &path);
    let load = Load::start(options(daemon.address(), 1, RUN));
    load.reaches(2000);
    let (_, mut ledger) = load.end_clean();
    daemon.stop();
    let units = units_in_file(&mut ledger, &path);
    assert!(units > 200, "{units}");
    // As it was before any host wrote; and as a host wrote it before it wrote again.
    let block = 40 * 4096 / SECTOR as u64;
    for lost in [vec![0x5A; SECTOR], remote(RUN, block)] {
        let mut was = vec![0; SECTOR];
        let at = block * SECTOR as u64;
        File::open(&path).and_then(|file| file.read_exact_at(&mut was, at)).expect("the file");
        assert_ne!(was, lost);
        write_at(&path, at, &lost);
        assert!(panics(|| {
            units_in_file(&mut ledger, &path);
        }));
        write_at(&path, at, &was);
        assert_eq!(units_in_file(&mut ledger, &path), units);
    }
    disk.check();
}

/// The operations of which it was measured, without any pin, whether they change a map. `_new`: by a descriptor that was opened
/// after the pin; `_pre` and `_ropre`: by one from before it.
const MEASURED: &str = "chattr_+a chattr_+j chattr_-e chattr_-i chattr_-i_ropre chattr_-i_then_punch chmod \
    copyrange_into_new copyrange_into_pre dedupe_from dedupe_from_ropre dedupe_into_pre dedupe_into_rdonly \
    dedupe_into_ropre dio_inplace_new dio_inplace_pre drop_caches ext4_moveext_new ext4_moveext_pre ext4_swapboot_new \
    ext4_swapboot_pre fa_alloc_new fa_alloc_pre fa_collapse_new fa_collapse_pre fa_insert_new fa_insert_pre fa_keep_new \
    fa_keep_pre fa_punch_new fa_punch_pre fa_unshare_new fa_unshare_pre fa_writezeroes_new fa_writezeroes_pre fa_zero_new \
    fa_zero_pre ficlone_from ficlone_from_ropre ficlonerange_into_new ficlonerange_into_pre fifreeze_thaw fithaw fitrim \
    fssetx_extsize ftruncate_grow_pre ftruncate_shrink_pre hardlink mmap_hole_pre mmap_hot_pre mmap_inplace_new \
    mmap_inplace_pre mmap_unwritten_pre odirect_read open_rdonly open_rw_only open_trunc read_ropre remount_ro remount_rw rename \
    rename_over reopen_proc_ropre setxattr setxattr_big swapoff_then_punch truncate_grow truncate_same truncate_shrink umount \
    unlink utimes write_extend_new write_extend_pre write_hole_new write_hole_pre write_inplace_new write_inplace_pre \
    write_unwritten_new write_unwritten_pre xfs_exchrange_new xfs_exchrange_pre xfs_free_eofblocks xfs_swapext_new \
    xfs_swapext_pre xfs_unresvsp_new xfs_unresvsp_pre";

/// Where an operation is that has no entry of its name, or why there is none.
fn place_of(name: &str) -> Option<&'static str> {
    if ["write_hole_new", "write_unwritten_new"].contains(&name) {
        return Some("left out: a file with such blocks is not pinned");
    }
    if ["write_hole_pre", "write_unwritten_pre", "mmap_hole_pre", "mmap_unwritten_pre"].contains(&name) {
        return Some("left out: a file with such blocks is not pinned, nor one that is open for writing");
    }
    let from_before = ["_pre", "_ropre"].into_iter().find_map(|end| name.strip_suffix(end));
    if let Some(first) = from_before {
        let is_kept = name.ends_with("_pre") && CHANGES.iter().any(|it| it.name == first);
        return Some(match (is_kept, first) {
            // Its tool opens the file by path.
            (_, "xfs_swapext") => "before: refuses the pin",
            (_, "ftruncate_grow") => "before: refuses the pin; kept: refused, or on XFS the end of the pin",
            (true, _) | (_, "mmap_inplace" | "mmap_hot") => {
                "before: refuses the pin; kept: refused by the swap area"
            }
            _ => "before: refuses the pin",
        });
    }
    if let Some(first) = name.strip_suffix("_then_punch") {
        let is_tried = ATTEMPTS.iter().chain(SWAP_ATTEMPTS).any(|it| it.name == first);
        return is_tried.then_some("broken: fa_punch, when it was let go");
    }
    let lifted = ["fithaw", "remount_rw"].contains(&name);
    lifted.then_some("lifted")
}

#[test]
fn every_operation_that_was_measured_has_its_place() {
    let attempts = ATTEMPTS
        .iter()
        .chain(SWAP_ATTEMPTS)
        .map(|it| (it.name, it.on, "refused, by root and an ordinary process"));
    let changes = CHANGES.iter().map(|it| (it.name, it.on, "refused; broken, when it was let go"));
    let commands = WITHOUT_EFFECT.iter().map(|it| (it.0, it.1, "refused, by root's commands"));
    let tried: Vec<_> = attempts.chain(changes).chain(commands).collect();
    let mut missing = Vec::new();
    println!("where each operation is tried, of {} that were measured:", MEASURED.split_whitespace().count());
    for name in MEASURED.split_whitespace() {
        let entry = tried.iter().find(|it| it.0 == name.trim_end_matches("_new"));
        match (place_of(name), entry) {
            (Some(place), _) => println!("  {name}: {place}"),
            (None, Some((_, on, place))) => println!("  {name}: {place} (on {on:?})"),
            (None, None) => missing.push(name),
        }
    }
    let unknown = [(has_file_setattr(), "file_setattr"), (has_overlays(), "copies up of overlays")];
    for (_, what) in unknown.into_iter().filter(|(is_known, _)| !is_known) {
        println!("  left out: {what}, which this kernel does not have");
    }
    println!(
        "  left out: a mapping by the server's descriptor, which on XFS brings back what is older in it than on the disk; on ext4 that \
         is refused (tests/extent_real/readers.rs)"
    );
    assert!(missing.is_empty(), "{missing:?}");
}
