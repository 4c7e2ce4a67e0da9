//! Descriptors and mappings from before the pin, which only the swap-file guard suffers: the kernel refuses what is tried
//! through them, as it is a swap area.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use fastice::extent::PinStep;

use crate::broken::{End, bound, break_pin, broken, clean, events_of, gentle, serve};
use crate::daemon::eventually;
use crate::disk::Disk;
use crate::load::{Load, units_behind};
use crate::loopfs::Spec;
use crate::modes::SWAP_FILE;
use crate::ops::{CHANGES, EXT4, Leaves, XFS};
use crate::script::{Outcome, Scene};

/// A process that has mapped the file to write, and closed it.
struct Mapper(Child);

impl Mapper {
    fn of(path: &Path) -> Self {
        let mut xfs_io = Command::new("xfs_io");
        let child =
            xfs_io.arg(path).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("xfs_io runs");
        let mut mapper = Self(child);
        mapper.says("mmap -rw 0 1m\nclose");
        let maps = format!("/proc/{}/maps", mapper.0.id());
        let is_mapped = || {
            let maps = std::fs::read_to_string(&maps).unwrap_or_default();
            maps.contains(path.to_str().expect("plain"))
        };
        eventually("the file is mapped", is_mapped);
        mapper
    }

    fn says(&mut self, commands: &str) {
        let input = self.0.stdin.as_mut().expect("piped");
        input.write_all(format!("{commands}\n").as_bytes()).and_then(|()| input.flush()).expect("it listens");
    }

    /// A store into the second half must end it.
    fn ends_by_a_store(mut self) {
        self.says("mwrite -S 0x77 640k 4k");
        let status = self.0.wait().expect("a child");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status:?}");
    }
}

fn through(file: &File, scene: &Scene<'_>, perl: &str) -> Outcome {
    let perl = format!("open($h, '+<&=', 0) or fail(); {perl}");
    scene.run_with(&perl, None, Stdio::from(file.try_clone().expect("a descriptor")))
}

fn no_change_through_what_was_kept(spec: &Spec) {
    let Some(mut disk) = Disk::new("descriptors from before the pin", spec, 2) else { return };
    let path = disk.path(1);
    let writer =
        |path: &Path| OpenOptions::new().read(true).write(true).open(path).expect("nobody has pinned it");
    let (kept, grown) = (writer(&path), writer(&disk.path(2)));
    let mapper = Mapper::of(&path);
    let daemon = serve(&mut disk, &SWAP_FILE);
    let bound = bound(&disk.lab);
    let key = disk.record(&path).identity.key();
    let seed = 8001;
    disk.expect_run(seed, &path);
    let load = Load::start(gentle(daemon.address(), 1, seed));
    let scene = Scene::new(&disk, &daemon, &path);
    println!(
        "left out: xfs_swapext, for its tool opens the file by path; ftruncate_grow, which on XFS ends the pin: below"
    );
    for change in
        CHANGES.iter().filter(|it| it.on.fits(spec) && !["ftruncate_grow", "xfs_swapext"].contains(&it.name))
    {
        let outcome = through(&kept, &scene, change.perl);
        println!("{}: {}, kept from before: {outcome:?}", spec.kind, change.name);
        let refusals = [libc::ETXTBSY, libc::EPERM, libc::EINVAL, libc::EOPNOTSUPP, libc::EBUSY];
        assert!(
            matches!(outcome, Outcome::Errno(errno) if refusals.contains(&errno)),
            "{}: {outcome:?}",
            change.name
        );
        clean(&disk.directory());
    }
    mapper.ends_by_a_store();
    load.goes_on();
    let steps: Vec<_> = events_of(&disk.lab, &key).into_iter().map(|event| event.step).collect();
    assert_eq!(steps, [PinStep::Pinned], "{}", daemon.log());
    let grow = CHANGES.iter().find(|it| it.name == "ftruncate_grow").expect("it is there");
    if spec.kind == "xfs" {
        let (me, number) = (std::process::id(), grown.as_raw_fd());
        let perl = format!(
            "my $me = told(syscall(&SYS_PIDFD_OPEN, {me}, 0)); \
             my $kept = told(syscall(&SYS_PIDFD_GETFD, $me, {number}, 0)); open($h, '+<&=', $kept) or fail(); {}",
            grow.perl
        );
        let broken = broken("ftruncate_grow_pre", Leaves::Both, End::Held, "");
        break_pin(&mut disk, (&daemon, bound), 2, &broken, &perl);
    } else {
        let scene = Scene::new(&disk, &daemon, &path);
        assert_eq!(through(&kept, &scene, grow.perl), Outcome::Errno(libc::EPERM));
    }
    let (_, mut ledger) = load.end_clean();
    drop((kept, grown));
    daemon.stop();
    assert!(units_behind(&mut ledger, &path, SWAP_FILE.reserved) > 100);
    disk.unpin_all();
    disk.check();
}

#[test]
fn what_was_kept_from_before_changes_no_swap_file_on_xfs_with_reflink() {
    no_change_through_what_was_kept(&XFS);
}

#[test]
fn what_was_kept_from_before_changes_no_swap_file_on_ext4() {
    no_change_through_what_was_kept(&EXT4);
}
