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
use crate::ops::{EXT4, XFS};
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
    let mut thief = Thief::of(disk);
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
    let daemon = serve(&disk, &DEFAULT);
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
