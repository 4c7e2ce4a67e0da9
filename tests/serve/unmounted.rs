//! Files of an unmounted filesystem whose disk the kernel keeps: the device is held exclusively while they are served.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::daemon::{FILE_LEN, Lab, any_port, is_immutable};
use super::load::{Load, assert_in_file, options};
use super::loopfs::{self, Spec};

const PARTITION: Spec = Spec { partition_start: Some(8192), ..Spec::EXT4 };

/// The device of the filesystem.
fn node(lab: &Lab, spec: &Spec) -> String {
    lab.fs.device().to_owned() + if spec.partition_start.is_some() { "p1" } else { "" }
}

fn mount(lab: &Lab, spec: &Spec) -> Result<String, String> {
    loopfs::run(Command::new("mount").args(["-t", spec.kind, &node(lab, spec)]).arg(lab.fs.root()))
}

fn config_of(lab: &Lab, files: &[&Path]) -> PathBuf {
    let config = lab.open_config(any_port(), files);
    let text = fs::read_to_string(&config).expect("it is there");
    fs::write(&config, text.replace("file = ", "device = \"unmounted\"\nfile = ")).expect("room");
    config
}

/// What root might do with a device that is not mounted.
fn nobody_gets_the_device(lab: &Lab, spec: &Spec) {
    let node = node(lab, spec);
    assert!(mount(lab, spec).expect_err("it is held").contains("busy"), "mounted");
    let mkfs = if spec.kind == "xfs" { vec!["mkfs.xfs", "-f"] } else { vec!["mkfs.ext4", "-F", "-q"] };
    let check = if spec.kind == "xfs" { vec!["xfs_repair"] } else { vec!["e2fsck", "-f", "-y"] };
    for command in [mkfs, check, vec!["wipefs", "--all"], vec!["swapon"]] {
        let told = loopfs::run(Command::new(command[0]).args(&command[1..]).arg(&node));
        assert!(told.is_err(), "{command:?}: {told:?}");
    }
    let exclusive = OpenOptions::new().write(true).custom_flags(libc::O_EXCL).open(&node);
    assert_eq!(exclusive.expect_err("it is held").raw_os_error(), Some(libc::EBUSY));
}

#[test]
fn an_unmounted_file_is_served_by_the_kernels_disk_which_nobody_mounts() {
    for spec in [Spec::XFS, Spec::EXT4, PARTITION] {
        let Some(lab) = Lab::new("unmounted device", &spec) else { return };
        let files = [lab.fragmented("first"), lab.fragmented("second")];
        let config = config_of(&lab, &[&files[0], &files[1]]);
        lab.fastice(&["pin"], &[&files[0], &files[1]], 0);
        loopfs::unmount(&lab.fs.root()).expect("nothing holds it");
        let daemon = lab.serve(&config);
        let load = |daemon: &super::daemon::Daemon, seed| {
            [1, 2].map(|nsid| Load::start(options(daemon.address(), nsid, seed + u64::from(nsid))))
        };
        let loads = load(&daemon, 810);
        nobody_gets_the_device(&lab, &spec);
        let status = lab.json(&["status", "--json"], 0);
        let guards = &status["targets"][0]["exports"][0]["guards"];
        assert_eq!(guards, &serde_json::json!(["unmounted device, held exclusively"]), "{status}");
        loads.iter().for_each(Load::goes_on);
        for command in ["status", "pins"] {
            let told = String::from_utf8_lossy(&lab.fastice(&[command], &[], 0).stdout).into_owned();
            assert!(told.contains("nothing to watch") && !told.contains("any more"), "{told}");
        }
        let pins = lab.json(&["pins", "--json"], 0);
        assert_eq!(pins["pins"][0]["state"], "guarded", "{pins}");
        let read = lab.fastice(&["read"], &[&files[0]], 0).stdout;
        assert_eq!(read.len() as u64, FILE_LEN, "what hosts see");
        loads.into_iter().for_each(|load| drop(load.end_clean()));
        // The claim goes with the process, and nothing else: the next one takes it again.
        daemon.kill();
        let daemon = lab.serve(&config);
        let mut ledgers = load(&daemon, 820).map(|load| {
            load.goes_on();
            load.end_clean().1
        });
        let log = daemon.stop();
        assert!(log.contains("taken over from the device itself"), "{log}");
        let check = if spec.kind == "xfs" { vec!["xfs_repair", "-n"] } else { vec!["e2fsck", "-n", "-f"] };
        loopfs::run(Command::new(check[0]).args(&check[1..]).arg(node(&lab, &spec))).expect("it is sound");
        mount(&lab, &spec).expect("it is given back");
        for (ledger, file) in ledgers.iter_mut().zip(&files) {
            assert_in_file(ledger, file);
            assert!(is_immutable(file), "it stays pinned");
            let verified = lab.json(&["map", "verify", "--json", &file.display().to_string()], 0);
            assert_eq!(verified["same"], true);
        }
        lab.fastice(&["unpin"], &[&files[0], &files[1]], 0);
        assert!(!is_immutable(&files[0]));
    }
}

/// What a start says that can serve nothing.
fn refusal(lab: &Lab, config: &Path, exit: i32) -> String {
    let (status, log) = lab.try_serve(config).err().expect("refused");
    assert_eq!(status.code(), Some(exit), "{log}");
    log
}

#[test]
fn what_is_mounted_somebody_elses_or_changed_is_not_served_as_unmounted() {
    for spec in [Spec::XFS, PARTITION] {
        let Some(lab) = Lab::new("unmounted device, refused", &spec) else { return };
        let file = lab.fragmented("file");
        let config = config_of(&lab, &[&file]);
        lab.fastice(&["pin"], &[&file], 0);
        let log = refusal(&lab, &config, 3);
        assert!(log.contains("is mounted, or somebody else has it exclusively"), "{log}");
        loopfs::unmount(&lab.fs.root()).expect("nothing holds it");
        let somebody = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(node(&lab, &spec));
        let log = refusal(&lab, &config, 3);
        assert!(log.contains("somebody else has it exclusively"), "{log}");
        drop(somebody.expect("nobody has it"));
        mount(&lab, &spec).expect("nobody has it");
        loopfs::run(Command::new("chattr").arg("-i").arg(&file)).expect("root");
        let log = refuse_unmounted(&lab, &config, 3);
        assert!(log.contains("not immutable on the device"), "{log}");
        mount(&lab, &spec).expect("nobody has it");
        let other = OpenOptions::new().write(true).open(&file).expect("an ordinary file");
        other.set_len(4096).and_then(|()| other.write_all_at(&[1; 4096], 8192)).expect("room");
        drop(other);
        let log = refuse_unmounted(&lab, &config, 4);
        assert!(log.contains("the size of"), "{log}");
    }
}

fn refuse_unmounted(lab: &Lab, config: &Path, exit: i32) -> String {
    loopfs::unmount(&lab.fs.root()).expect("nothing holds it");
    refusal(lab, config, exit)
}

#[test]
fn a_filesystem_that_was_not_unmounted_in_order_is_not_served() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("unmounted device, journal to be replayed", &spec) else { return };
        let file = lab.fragmented("file");
        let config = config_of(&lab, &[&file]);
        lab.fastice(&["pin"], &[&file], 0);
        // What the journal has, and the device not yet, may be anything: that another file has the blocks, too.
        let shut_down = ["-x", "-c", "shutdown -f"];
        loopfs::run(Command::new("xfs_io").args(shut_down).arg(lab.fs.root())).expect("as a power failure");
        let log = refuse_unmounted(&lab, &config, 3);
        assert!(log.contains("was not unmounted in order"), "{log}");
        mount(&lab, &spec).expect("the journal is replayed");
        loopfs::unmount(&lab.fs.root()).expect("nothing holds it");
        lab.serve(&config).stop();
        mount(&lab, &spec).expect("it is given back");
        lab.fastice(&["unpin"], &[&file], 0);
    }
}
