//! What other processes try against a served file, and what the kernel answers: the hosts notice nothing of it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command};

use fastice::extent::PinStep;

use crate::broken::{clean, events_of, gentle, serve};
use crate::daemon::Daemon;
use crate::disk::{Disk, FILE_LEN};
use crate::load::{Load, units_behind};
use crate::loopfs::{self, Spec};
use crate::modes::{DEFAULT, FROZEN, Mode, READ_ONLY, READERS, READERS_OF_SWAP, SWAP_FILE};
use crate::ops::{ATTEMPTS, Attempt, CHANGES, EXT4, On, PLAIN, Who, XFS, has_file_setattr, has_overlays};
use crate::script::{ORDINARY, Scene};

/// Commands of root that must fail or do nothing. `{f}` is the file, `{d}` its directory, `{m}` the filesystem.
pub(crate) const WITHOUT_EFFECT: &[(&str, On, &str)] = &[
    ("chattr_-i by chattr", On::All, "! chattr -i {f}"),
    ("ficlone_from by cp", On::All, "! cp --reflink=always {f} {d}/copy"),
    ("cp", On::All, "! cp {f} {d}/copy"),
    ("filefrag", On::All, "! filefrag {f} | grep -q extent"),
    ("e4defrag", On::Ext4, "e4defrag {f}; true"),
    ("xfs_fsr", On::Xfs, "xfs_fsr {f}; true"),
    ("mmap_inplace", On::All, "xfs_io -c 'mmap -rw 0 1m' -c 'mwrite -S 0x77 512k 4k' {f}; true"),
    ("dio_inplace", On::All, "xfs_io -d -c 'pwrite -S 0x77 512k 64k' {f}; true"),
    ("losetup", On::All, "! losetup --find --show {f}"),
    ("drop_caches", On::All, "echo 3 > /proc/sys/vm/drop_caches"),
    ("fitrim", On::All, "fstrim {m}"),
    (
        "xfs_free_eofblocks",
        On::Xfs,
        "perl -e 'open(my $d, \"<\", \"{d}\") or die; my $e = pack(\"L6Q13\", 1); ioctl($d, 0x8080583a, $e) or die $!'",
    ),
    ("remount_ro", On::All, "mount -o remount,ro {m} && sleep 0.1; mount -o remount,rw {m}"),
    ("fifreeze_thaw", On::All, "if fsfreeze -f {m}; then sleep 0.1; fsfreeze -u {m}; fi"),
    ("umount", On::All, "! umount {m}"),
    ("rename of the directory", On::All, "mv {d} {d}-away && sleep 0.1; mv {d}-away {d}"),
    ("bind mount over it", On::All, "mount --bind {m}/filler {f} && sleep 0.1; umount {f}"),
    (
        "copy up of an overlay",
        On::All,
        "mkdir -p {m}/up {m}/work {m}/seen; \
         mount -t overlay -o lowerdir={d},upperdir={m}/up,workdir={m}/work overlay {m}/seen || exit 3; \
         touch {m}/seen/file-1 || cat {m}/seen/file-1 >/dev/null; code=$?; umount {m}/seen; [ $code != 0 ]",
    ),
];

/// One of all attempts on `path` by root, which must get its answer.
pub(crate) fn try_one(choice: usize, mode: &Mode, disk: &Disk, daemon: &Daemon, path: &Path) {
    let attempt = &ATTEMPTS[choice % ATTEMPTS.len()];
    let breaks = mode.broken_by.contains(&attempt.name);
    if attempt.on.fits(disk.spec()) && attempt.who != Who::Ordinary && !breaks {
        let outcome = Scene::new(disk, daemon, path).run(attempt.perl, None);
        assert_eq!(outcome, (mode.answer)(attempt.name, Who::Root), "{}", attempt.name);
        clean(&disk.directory());
    }
}

fn shell(text: &str, disk: &Disk) -> Result<String, String> {
    let directory = disk.directory();
    let text = text
        .replace("{f}", &disk.path(1).display().to_string())
        .replace("{d}", &directory.display().to_string())
        .replace("{m}", &disk.lab.fs.root().display().to_string());
    loopfs::run(Command::new("sh").args(["-c", &text]))
}

/// All attempts, and all changes by a descriptor that nobody gets, by root and by an ordinary process.
fn everything_by_everybody(mode: &Mode, scene: &Scene<'_>) {
    let disk = scene.disk;
    let by_path = has_file_setattr();
    let attempt = |name: &str, perl: &str, who: Who| {
        let outcome = scene.run(perl, (who == Who::Ordinary).then_some(ORDINARY));
        assert_eq!(outcome, (mode.answer)(name, who), "{name} by {who:?} on {:?}", disk.spec());
        if !mode.holds_off {
            clean(&disk.directory());
        }
    };
    for who in [Who::Root, Who::Ordinary] {
        let mine = ATTEMPTS
            .iter()
            .chain(mode.attempts)
            .filter(|it| it.who == who || it.who == Who::Anybody && (who == Who::Root || mode.is_shared));
        let breaks = |it: &&Attempt| who == Who::Root && mode.broken_by.contains(&it.name);
        for it in mine
            .filter(|it| it.on.fits(disk.spec()) && !breaks(it) && (by_path || !it.perl.contains("by_path")))
        {
            attempt(it.name, it.perl, who);
        }
        let can_open = who == Who::Root || mode.is_shared;
        for it in CHANGES.iter().filter(|change| can_open && change.on.fits(disk.spec())) {
            attempt(it.name, &format!("$h = opened($f, O_RDWR); {}", it.perl), who);
        }
    }
}

fn nobody_gets_in(mode: &Mode, spec: &Spec) {
    let Some(mut disk) = Disk::new(mode.name, spec, 1) else { return };
    let path = disk.path(1);
    // An ordinary process may reach the file, as far as its mode goes.
    let open_to_all = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("root may");
    };
    open_to_all(disk.lab.fs.root().parent().expect("a place"), 0o711);
    open_to_all(&disk.directory(), 0o777);
    if mode.is_shared {
        open_to_all(&path, 0o666);
    }
    if let Some(options) = mode.remount {
        shell(&format!("mount -o remount,{options} {{m}}"), &disk).expect("root may");
    }
    if mode.holds_off {
        fs::write(disk.directory().join("spare"), vec![b'D'; usize::try_from(FILE_LEN).expect("small")])
            .expect("room");
        open_to_all(&disk.directory().join("spare"), 0o666);
    }
    let daemon = serve(&mut disk, mode);
    let reader = mode.namespace.contains("local_readers").then(|| Reader::of(&path));
    let key = disk.record(&path).identity.key();
    let seed = 7001;
    disk.expect_run(seed, &path);
    let load = Load::start(gentle(daemon.address(), 1, seed));
    let scene = Scene::new(&disk, &daemon, &path);
    let scene = if mode.holds_off { scene.that_holds_off() } else { scene };
    everything_by_everybody(mode, &scene);
    load.goes_on();
    for (what, _, text) in WITHOUT_EFFECT.iter().chain(mode.commands).filter(|(_, on, _)| on.fits(spec)) {
        if mode.minds.contains(what) || text.contains("overlay") && !has_overlays() {
            continue;
        }
        let outcome = shell(text, &disk);
        assert!(outcome.is_ok(), "{what} on {spec:?}: {outcome:?}: {}", daemon.log());
        if !mode.holds_off {
            clean(&disk.directory());
        }
        let opened = Scene::new(&disk, &daemon, &path).run("opened($f, O_RDONLY);", None);
        assert_eq!(opened, (mode.answer)("open_rdonly", Who::Root), "after {what} on {spec:?}");
    }
    load.goes_on();
    let steps: Vec<_> = events_of(&disk.lab, &key).into_iter().map(|event| event.step).collect();
    assert_eq!(steps, [PinStep::Pinned], "{spec:?}: {}", daemon.log());
    let (_, mut ledger) = load.end_clean();
    if mode.holds_off {
        // What waits goes on when the pin ends: all is judged before.
        daemon.kill();
        assert!(units_behind(&mut ledger, &path, mode.reserved) > 100);
        assert_eq!(disk.wrongs(), []);
        let held = {
            disk.lab.fastice(&["unpin"], &[&path], 0);
            scene.await_held()
        };
        println!("{spec:?}: {} attempts were held off, and ended so: {held:?}", held.len());
        assert!(!held.is_empty());
    } else {
        let mut reader = reader;
        reader.iter_mut().for_each(Reader::assert_let_in);
        // Whoever reads does not keep it from being let go; at that very moment an open may be denied.
        daemon.stop();
        drop(reader);
        assert!(units_behind(&mut ledger, &path, mode.reserved) > 100);
    }
    disk.check();
}

/// A process that reads the file from beginning to end, again and again. Ended when dropped.
struct Reader(Child);

impl Reader {
    fn of(path: &Path) -> Self {
        let mut sh = Command::new("sh");
        // From its directory, which is renamed meanwhile.
        let (directory, name) = (path.parent().expect("a directory"), path.file_name().expect("a name"));
        sh.args(["-c", "while cat \"$0\" > /dev/null; do :; done"]).arg(name).current_dir(directory);
        Self(sh.spawn().expect("sh runs"))
    }

    fn assert_let_in(&mut self) {
        assert!(self.0.try_wait().expect("a child").is_none(), "a reader was refused");
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nobody_gets_at_a_served_file_on_xfs_with_reflink() {
    nobody_gets_in(&DEFAULT, &XFS);
}

#[test]
fn nobody_gets_at_a_served_file_on_xfs_without_reflink() {
    nobody_gets_in(&DEFAULT, &PLAIN);
}

#[test]
fn nobody_gets_at_a_served_file_on_ext4() {
    nobody_gets_in(&DEFAULT, &EXT4);
}

#[test]
fn nobody_gets_at_a_served_swap_file_on_xfs_with_reflink() {
    nobody_gets_in(&SWAP_FILE, &XFS);
}

#[test]
fn nobody_gets_at_a_served_swap_file_on_ext4() {
    nobody_gets_in(&SWAP_FILE, &EXT4);
}

#[test]
fn nobody_gets_at_a_served_file_of_a_read_only_xfs() {
    nobody_gets_in(&READ_ONLY, &XFS);
}

#[test]
fn nobody_gets_at_a_served_file_of_a_read_only_ext4() {
    nobody_gets_in(&READ_ONLY, &EXT4);
}

#[test]
fn nobody_gets_at_a_served_file_of_a_frozen_xfs_with_reflink() {
    nobody_gets_in(&FROZEN, &XFS);
}

#[test]
fn nobody_gets_at_a_served_file_of_a_frozen_xfs_without_reflink() {
    nobody_gets_in(&FROZEN, &PLAIN);
}

#[test]
fn nobody_gets_at_a_served_file_of_a_frozen_ext4() {
    nobody_gets_in(&FROZEN, &EXT4);
}

#[test]
fn readers_do_no_more_than_read_a_served_file_on_ext4() {
    nobody_gets_in(&READERS, &EXT4);
}

#[test]
fn readers_do_no_more_than_read_a_served_swap_file_on_xfs_with_reflink() {
    nobody_gets_in(&READERS_OF_SWAP, &XFS);
}
