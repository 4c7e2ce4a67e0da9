//! Guards of a whole filesystem are lifted by root, by a thaw or a remount, and then the pin is broken: what is left of the
//! guards holds the file until that is noticed.
//!
//! A file each, for what lifts the guard of one lifts it of all.

use crate::broken::{Break, End, bound, break_it, broken, serve};
use crate::disk::Disk;
use crate::loopfs::{self, Spec};
use crate::modes::{FROZEN, Mode, READ_ONLY};
use crate::ops::{EXT4, Leaves, PLAIN, XFS};

/// The descriptor is taken first: after the thaw the server may notice it, and let go, before that could be done.
const THAWED: &str = "my $s = stolen(); system('fsfreeze', '--unfreeze', \"$dir/..\") == 0 or die;";
const REMOUNTED: &str = "system('mount', '-o', 'remount,rw', \"$dir/..\") == 0 or die;";

/// Behind a freeze are the default guards.
const THAWS: &[Break] = &[
    broken("fithaw", Leaves::Both, End::Held, ""),
    broken(
        "truncate_shrink, thawed",
        Leaves::First,
        End::Before,
        "clear_flag($s); close $s; truncate($f, H) or fail();",
    ),
    broken(
        "fa_punch, thawed",
        Leaves::First,
        End::Before,
        "clear_flag($s); close $s; $h = broken_in($f, O_RDWR); fallocated(3, H, Q);",
    ),
    broken("unlink, thawed", Leaves::Nothing, End::Held, "clear_flag($s); close $s; unlink($f) or fail();"),
];

/// Behind a read-only superblock are the mark and the lease, and no flag.
const REMOUNTS: &[Break] = &[
    broken("remount_rw", Leaves::Both, End::Held, ""),
    broken("truncate_shrink, remounted", Leaves::First, End::Before, "truncate($f, H) or fail();"),
    broken(
        "fa_punch, remounted",
        Leaves::First,
        End::Before,
        "$h = broken_in($f, O_RDWR); fallocated(3, H, Q);",
    ),
    broken("unlink, remounted", Leaves::Nothing, End::Held, "unlink($f) or fail();"),
];

fn every_break_is_met(mode: &Mode, spec: &Spec, lifted: &str, breaks: &[Break]) {
    for broken in breaks {
        let Some(mut disk) = Disk::new(mode.name, spec, 1) else { return };
        if let Some(options) = mode.remount {
            let mut mount = std::process::Command::new("mount");
            mount.args(["-o", &format!("remount,{options}")]).arg(disk.lab.fs.root());
            loopfs::run(&mut mount).expect("root may");
        }
        let daemon = serve(&mut disk, mode);
        let bound = bound(&disk.lab);
        let perl = format!("{lifted} {}", broken.change.perl);
        break_it(&mut disk, (&daemon, bound), 1, broken, &perl, true);
        daemon.stop();
        disk.unpin_all();
        disk.check();
    }
}

#[test]
fn every_break_after_a_thaw_is_met_on_xfs_with_reflink() {
    every_break_is_met(&FROZEN, &XFS, THAWED, THAWS);
}

#[test]
fn every_break_after_a_thaw_is_met_on_ext4() {
    every_break_is_met(&FROZEN, &EXT4, THAWED, THAWS);
}

#[test]
fn every_break_after_a_remount_is_met_on_xfs_without_reflink() {
    every_break_is_met(&READ_ONLY, &PLAIN, REMOUNTED, REMOUNTS);
}

#[test]
fn every_break_after_a_remount_is_met_on_ext4() {
    every_break_is_met(&READ_ONLY, &EXT4, REMOUNTED, REMOUNTS);
}
