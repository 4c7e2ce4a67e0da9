//! Files of an unmounted filesystem, served by our own driver: on its model over the loop device that carries it.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::daemon::{Lab, any_port, is_immutable};
use super::load::{Load, assert_in_file, options};
use super::loopfs::{self, Spec};

const PARTITION: Spec = Spec { partition_start: Some(8192), ..Spec::EXT4 };

fn unmount(lab: &Lab) {
    loopfs::unmount(&lab.fs.root()).expect("nothing holds it");
}

fn mount(lab: &Lab, spec: &Spec) {
    let node = lab.fs.device().to_owned() + if spec.partition_start.is_some() { "p1" } else { "" };
    let mut command = Command::new("mount");
    loopfs::run(command.args(["-t", spec.kind, &node]).arg(lab.fs.root())).expect("a whole filesystem");
}

/// Checks the unmounted filesystem with its own tool.
fn check(lab: &Lab, spec: &Spec) {
    let node = lab.fs.device().to_owned() + if spec.partition_start.is_some() { "p1" } else { "" };
    let mut command = match spec.kind {
        "xfs" => Command::new("xfs_repair"),
        _ => Command::new("e2fsck"),
    };
    let arguments: &[&str] = if spec.kind == "xfs" { &["-n"] } else { &["-n", "-f"] };
    loopfs::run(command.args(arguments).arg(node)).expect("a clean filesystem");
}

/// A pinned file of a filesystem that is unmounted.
fn handed_over(test: &str, spec: &Spec) -> Option<(Lab, PathBuf)> {
    let lab = Lab::new(test, spec)?;
    let file = lab.fragmented("file");
    lab.fastice(&["pin"], &[&file], 0);
    unmount(&lab);
    Some((lab, file))
}

#[test]
fn an_unmounted_file_is_served_given_back_and_whole() {
    for spec in [Spec::XFS, Spec::EXT4, PARTITION] {
        let Some((lab, file)) = handed_over("handed-over mode", &spec) else { return };
        let config = lab.handed_over_config(any_port(), &[&file]);
        let daemon = lab.serve(&config);
        let load = Load::start(options(daemon.address(), 1, 7));
        std::thread::sleep(Duration::from_millis(500));
        let (report, mut ledger) = load.end_clean();
        assert_eq!(report.reconnects, 0, "{report:?}");
        let log = daemon.stop();
        assert!(log.contains("taken over from the device itself"), "{log}");
        check(&lab, &spec);
        mount(&lab, &spec);
        assert_in_file(&mut ledger, &file);
        assert!(is_immutable(&file), "it stays pinned");
        assert_eq!(lab.json(&["map", "verify", "--json", &file.display().to_string()], 0)["same"], true);
        let (status, log) = lab.try_serve(&config).err().expect("it is mounted");
        assert!(status.code() == Some(3) && log.contains("the filesystem is mounted"), "{log}");
        lab.fastice(&["unpin"], &[&file], 0);
        assert!(!is_immutable(&file));
    }
}

#[test]
fn a_killed_target_is_followed_by_another_that_takes_over() {
    let Some((lab, file)) = handed_over("handed over, killed", &Spec::XFS) else { return };
    let config = lab.handed_over_config(any_port(), &[&file]);
    let daemon = lab.serve(&config);
    let address = daemon.address();
    daemon.kill();
    let again = lab.handed_over_config(address, &[&file]);
    let daemon = lab.serve(&again);
    let (_, mut ledger) = {
        let load = Load::start(options(daemon.address(), 1, 9));
        std::thread::sleep(Duration::from_millis(200));
        load.end_clean()
    };
    daemon.stop();
    mount(&lab, &Spec::XFS);
    assert_in_file(&mut ledger, &file);
}

fn refusal(lab: &Lab, file: &Path, exit: i32) -> String {
    let config = lab.handed_over_config(any_port(), &[file]);
    let (status, log) = lab.try_serve(&config).err().expect("refused");
    assert_eq!(status.code(), Some(exit), "{log}");
    log
}

#[test]
fn what_is_not_recorded_or_not_what_was_recorded_is_not_served() {
    let Some((lab, file)) = handed_over("handed over, changed", &Spec::XFS) else { return };
    let log = refusal(&lab, &file.with_file_name("another"), 3);
    assert!(log.contains("another is not pinned: there is no record of it"), "{log}");
    mount(&lab, &Spec::XFS);
    loopfs::run(Command::new("chattr").arg("-i").arg(&file)).expect("root");
    let other = fs::OpenOptions::new().write(true).open(&file).expect("an ordinary file");
    other.set_len(4096).and_then(|()| other.write_all_at(&[1; 4096], 8192)).expect("room");
    drop(other);
    unmount(&lab);
    let log = refusal(&lab, &file, 4);
    assert!(log.contains("the size of"), "{log}");
}
