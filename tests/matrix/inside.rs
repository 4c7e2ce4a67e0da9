//! The target runs in this process, which alone gets past the open-permission mark, and opens the file for writing: only the
//! lease stands in the way then, and holds it up until nothing is on the device any more.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

use fastice::config::Config;
use fastice::control::{Running, start};
use fastice::extent::NoProgress;
use rustix::fs::IFlags;

use crate::broken::{End, Victim, assert_fenced_by, clean};
use crate::daemon::any_port;
use crate::disk::Disk;
use crate::loopfs::Spec;
use crate::ops::{CHANGES, Change, EXT4, Leaves, ONE_OF_EACH_KIND, On, PLAIN, XFS};
use crate::script::{Outcome, Scene};
use crate::thief::Thief;

/// The open itself is the change.
const TRUNCATED: Change = Change {
    name: "open_trunc",
    on: On::All,
    perl: "truncate($h, L);",
    leaves: Leaves::Nothing,
    copies: false,
    may_fail: None,
    must_fail: false,
};

fn clear_flag(path: &Path) {
    let file = File::open(path).expect("we may");
    let flags = rustix::fs::ioctl_getflags(&file).expect("flags");
    rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE).expect("root may");
}

fn change_it(disk: &mut Disk, running: &Running, number: usize, change: &Change) {
    let victim = Victim::start(disk, running.addresses()[0], number, 500_000 + 1000 * number as u64);
    let (path, what) = (victim.path.clone(), format!("{}, inside: {}", disk.spec().kind, change.name));
    let refused = OpenOptions::new().write(true).open(&path).expect_err("it is immutable");
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{what}");
    clear_flag(&path);
    let truncates = if change.name == TRUNCATED.name { libc::O_TRUNC } else { 0 };
    let writer = OpenOptions::new().read(true).write(true).custom_flags(truncates).open(&path);
    let (writer, let_in) = (writer.expect("let in at last"), SystemTime::now());
    let perl = format!("open($h, '+<&=', 0) or fail(); {}", change.perl);
    let scene = Scene::inside(disk, &path);
    let outcome = scene.run_with(&perl, None, Stdio::from(writer));
    assert_eq!(outcome, Outcome::Done, "{what}");
    let mut thief = Thief::waiting_on(disk, End::Before);
    thief.grow();
    let events = victim.await_end(&disk.lab, End::Before);
    assert_fenced_by(&what, &events, let_in);
    let outlived = thief.assert_alone(&what, End::Before, || victim.end_hosts(&what));
    outlived.check(disk, &what, End::Before, change);
    assert_eq!(disk.strays(), [], "{what}");
    drop(thief);
    clean(&disk.directory());
}

fn a_writer_waits(name: &str, spec: &Spec) {
    // What changes do is the matter of `broken`.
    let is_chosen = |change: &&Change| ONE_OF_EACH_KIND.contains(&change.name) && change.on.fits(spec);
    let chosen = CHANGES.iter().filter(is_chosen);
    let changes: Vec<_> = [&TRUNCATED].into_iter().chain(chosen).collect();
    let Some(mut disk) = Disk::new(name, spec, changes.len()) else { return };
    let paths = disk.paths();
    let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let config = Config::load(&disk.lab.open_config(any_port(), &paths)).expect("a good configuration");
    let running = start(config, &mut NoProgress).expect("served");
    for (number, change) in (1..).zip(changes) {
        change_it(&mut disk, &running, number, change);
    }
    running.stop(Running::STOP_PATIENCE).expect("an orderly end");
    disk.check();
}

#[test]
fn a_writer_past_the_mark_waits_on_xfs_with_reflink() {
    a_writer_waits("inside on XFS with reflink", &XFS);
}

#[test]
fn a_writer_past_the_mark_waits_on_xfs_without_reflink() {
    a_writer_waits("inside on XFS without reflink", &PLAIN);
}

#[test]
fn a_writer_past_the_mark_waits_on_ext4() {
    a_writer_waits("inside on ext4", &EXT4);
}
