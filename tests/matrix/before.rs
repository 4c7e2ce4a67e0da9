//! Who has the file open before the pin could change it past every guard: the pin is refused, and leaves no trace. So there
//! is nobody who could do what the facts call `_pre` and `_ropre`.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::daemon::{Lab, eventually, is_immutable};
use crate::disk::Disk;
use crate::loopfs::{Spec, run};
use crate::ops::{EXT4, PLAIN, XFS, has_overlays};

/// A process that holds something until it is dropped.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Another process that has inherited this descriptor.
fn held(file: File) -> Holder {
    Holder(Command::new("sleep").arg("60").stdin(file).spawn().expect("sleep runs"))
}

/// Another process that has mapped the file, and closed it.
fn mapped(path: &Path, open: &[&str], map: &str) -> Holder {
    let mut xfs_io = Command::new("xfs_io");
    xfs_io.args(open).arg(path).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut holder = Holder(xfs_io.spawn().expect("xfs_io runs"));
    let commands = format!("{map}\nclose\n");
    holder.0.stdin.as_mut().expect("piped").write_all(commands.as_bytes()).expect("it listens");
    let pid = holder.0.id();
    let is_mapped = || {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let is_open = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|target| target == path);
        maps.contains(&path.display().to_string()) && !is_open
    };
    eventually("the file is mapped and closed", is_mapped);
    holder
}

/// What holds an open file without a process of ours; undone when dropped.
struct Undo(Command);

impl Drop for Undo {
    fn drop(&mut self) {
        run(&mut self.0).expect("undone");
    }
}

fn attached(path: &Path, more: &[&str]) -> Undo {
    let device =
        run(Command::new("losetup").args(more).args(["--find", "--show"]).arg(path)).expect("losetup");
    let mut undo = Command::new("losetup");
    undo.args(["--detach", device.trim()]);
    Undo(undo)
}

fn open(path: &Path, options: &mut OpenOptions) -> File {
    options.open(path).expect("nobody has pinned it")
}

fn assert_refused(lab: &Lab, path: &Path, what: &str) {
    let output = lab.command(&["pin"]).arg(path).output().expect("the binary runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{what}: pinned");
    assert!(told.contains("open"), "{what}: refused for another reason: {told}");
    assert!(!is_immutable(path), "{what}: the flag was left");
    assert!(lab.pin().is_none(), "{what}: the record was left");
}

fn no_pin_beside(name: &str, spec: &Spec) {
    let Some(disk) = Disk::new(name, spec, 1) else { return };
    let (lab, path) = (&disk.lab, disk.path(1));
    let with = |options: &mut OpenOptions| held(open(&path, options));
    let openers: [(&str, &dyn Fn() -> Holder); 7] = [
        ("a reader", &|| with(OpenOptions::new().read(true))),
        ("a direct reader", &|| with(OpenOptions::new().read(true).custom_flags(libc::O_DIRECT))),
        ("a writer", &|| with(OpenOptions::new().write(true))),
        ("an appender", &|| with(OpenOptions::new().append(true))),
        ("one who reads and writes", &|| with(OpenOptions::new().read(true).write(true))),
        ("a shared writable mapping", &|| mapped(&path, &[], "mmap -rw 0 1m")),
        ("a mapping to read", &|| mapped(&path, &["-r"], "mmap -r 0 1m")),
    ];
    for (what, opener) in openers {
        let holder = opener();
        assert_refused(lab, &path, what);
        drop(holder);
    }
    for (what, more) in [("a loop device", &[][..]), ("a loop device to read", &["--read-only"][..])] {
        let device = attached(&path, more);
        assert_refused(lab, &path, what);
        drop(device);
        // The kernel lets go of the file a moment after it was told to.
        eventually("the loop device is gone", || !busy(lab, &path));
    }
    overlay_is_an_opener(&disk, &path);
    // Whoever has but a name of it can do nothing with that.
    let name_only = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).expect("a name");
    lab.fastice(&["pin"], &[&path], 0);
    let refused = OpenOptions::new().write(true).open(&path).expect_err("it is pinned");
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    lab.fastice(&["unpin"], &[&path], 0);
    drop(name_only);
    disk.check();
}

/// Whether the pin is refused; what it does when not is undone.
fn busy(lab: &Lab, path: &Path) -> bool {
    let pinned = lab.command(&["pin"]).arg(path).output().expect("the binary runs").status.success();
    if pinned {
        lab.fastice(&["unpin"], &[path], 0);
    }
    !pinned
}

fn overlay_is_an_opener(disk: &Disk, path: &Path) {
    if !has_overlays() {
        return;
    }
    let root = disk.lab.fs.root();
    let [upper, work, seen] = ["up", "work", "seen"].map(|name| root.join(name));
    for directory in [&upper, &work, &seen] {
        std::fs::create_dir_all(directory).expect("room");
    }
    let (lower, upper, work) = (disk.directory(), upper.display(), work.display());
    let options = format!("lowerdir={},upperdir={upper},workdir={work}", lower.display());
    let mut mount = Command::new("mount");
    run(mount.args(["-t", "overlay", "overlay", "-o", &options]).arg(&seen)).expect("mounted");
    let mut undo = Command::new("umount");
    undo.arg(&seen);
    let mounted = Undo(undo);
    let reader = held(open(&seen.join(path.file_name().expect("a name")), OpenOptions::new().read(true)));
    assert_refused(&disk.lab, path, "a reader through an overlay");
    drop(reader);
    drop(mounted);
}

#[test]
fn who_has_the_file_open_keeps_it_from_being_pinned_on_xfs_with_reflink() {
    no_pin_beside("opened before on XFS", &XFS);
}

#[test]
fn who_has_the_file_open_keeps_it_from_being_pinned_on_xfs_without_reflink() {
    no_pin_beside("opened before, no reflink", &PLAIN);
}

#[test]
fn who_has_the_file_open_keeps_it_from_being_pinned_on_ext4() {
    no_pin_beside("opened before on ext4", &EXT4);
}
