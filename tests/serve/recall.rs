//! Root breaks a pin while hosts write: the export is fenced before the opener gets in, and all else goes on.
//!
//! The mark denies whoever opens the file, so root takes a copy of the daemon's own descriptor to clear the immutable
//! flag, and truncates by path, which opens nothing. Only the lease stands in the way then.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fastice::initiator::bench::BenchOptions;
use rustix::fs::IFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::daemon::{Daemon, FILE_LEN, Lab, any_port, create, eventually, is_immutable};
use super::load::{Load, assert_in_file, options};
use super::loopfs::{self, Spec};

/// How long an opener may wait: far less than the 45 seconds after which the kernel would let it in.
const LET_GO_MAX: Duration = Duration::from_secs(15);

/// Clears the immutable flag of `path` through the descriptor that process `pid` has of it.
pub(crate) fn clear_immutable_behind(pid: Pid, path: &Path) {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("root reads it");
    let entry = entries
        .map(|entry| entry.expect("an entry"))
        .find(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target == path))
        .expect("the daemon has the file open");
    let number: i32 = entry.file_name().to_str().and_then(|text| text.parse().ok()).expect("a number");
    let process = pidfd_open(pid, PidfdFlags::empty()).expect("the daemon lives");
    let file = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).expect("root may");
    let flags = rustix::fs::ioctl_getflags(&file).expect("flags");
    rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE).expect("root may");
}

/// truncate(2): by path, without opening the file; how long it took.
pub(crate) fn truncate(path: &Path, len: u64) -> Duration {
    let started = Instant::now();
    let script = "truncate($ARGV[0], $ARGV[1]) or die \"truncate: $!\\n\"";
    let mut perl = Command::new("perl");
    loopfs::run(perl.args(["-e", script]).arg(path).arg(len.to_string())).expect("it gets in at last");
    started.elapsed()
}

fn assert_recalled(lab: &Lab, daemon: &Daemon, path: &Path, took: Duration) {
    assert!(took < LET_GO_MAX, "let go after {took:?}: {}", daemon.log());
    let end = "drained and let go";
    eventually("the end is logged", || daemon.log().contains(end));
    let log = daemon.log();
    let at = |word: &str| log.find(word).unwrap_or_else(|| panic!("{word:?} is missing: {log}"));
    assert!(at("export fenced") < at("pin recalled"));
    assert!(log.contains(&path.display().to_string()), "{log}");
    assert!(!is_immutable(path));
    assert!(at("pin recalled") < at(end), "{log}");
    // The watch may see the cleared flag before the kernel breaks the lease.
    let incident = lab.incident(path).expect("it is written down");
    let why = incident["reason"].as_str().expect("a text");
    assert!(why.contains("flag") || why.contains("lease break"), "{incident}");
}

#[test]
fn nothing_is_written_to_blocks_that_are_given_to_another_file() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("recall by truncation", &spec) else { return };
        let (first, second) = (lab.fragmented("first"), lab.fragmented("second"));
        let daemon = lab.serve(&lab.open_config(any_port(), &[&first, &second]));
        let bystander = Load::start(options(daemon.address(), 2, 51));
        let victim = Load::start(BenchOptions { reconnect: None, ..options(daemon.address(), 1, 52) });

        clear_immutable_behind(daemon.pid(), &first);
        let took = truncate(&first, 0);
        // The freed blocks go to another file at once, while the host still tries to write the old ones.
        let thief = create(&lab.fs.path("thief"));
        let loot = vec![0xC3; 2 * usize::try_from(FILE_LEN).expect("small")];
        thief.write_all_at(&loot, 0).expect("room");
        thief.sync_all().expect("a disk");
        bystander.goes_on();
        assert_recalled(&lab, &daemon, &first, took);

        victim.is_refused();
        let (report, _) = victim.end().expect("the connection lives");
        assert_eq!(report.verify.faults, 0, "errors, never wrong data: {report:?}");
        assert!(report.errors > 0, "{report:?}");
        println!("{}: let in after {took:?}; the host saw {:?}", spec.kind, report.first_error);
        rustix::fs::fadvise(&thief, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
        let mut found = vec![0; loot.len()];
        thief.read_exact_at(&mut found, 0).expect("the file is read");
        assert!(found == loot, "a host wrote into a file that is not its own");
        // Nobody serves the blocks that the file has now without having been asked to.
        daemon.reload("configuration reloaded");
        assert!(daemon.log().contains("it stays fenced"), "{}", daemon.log());
        let status = lab.json(&["status", "--json"], 0);
        let grants: Vec<_> = [0, 1].map(|at| status["targets"][0]["exports"][at]["grant"].clone()).into();
        assert_eq!(grants, ["fenced", "live"], "{status}");
        let (report, mut ledger) = bystander.end_clean();
        assert_eq!(report.reconnects, 0);
        daemon.stop();
        assert_in_file(&mut ledger, &second);
        lab.fastice(&["unpin", "--force"], &[&first], 0);
    }
}

#[test]
fn what_was_acknowledged_before_the_recall_is_in_the_file_and_a_reload_serves_it_again() {
    let Some(lab) = Lab::new("recall and reload", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let load = Load::start(BenchOptions { reconnect: None, ..options(daemon.address(), 1, 61) });
    clear_immutable_behind(daemon.pid(), &path);
    // To the same length: the map stays, but the daemon cannot know.
    let took = truncate(&path, FILE_LEN);
    assert_recalled(&lab, &daemon, &path, took);
    let (report, mut ledger) = load.end().expect("the connection lives");
    assert!(report.verify.faults == 0 && report.errors > 0, "{report:?}");
    assert_in_file(&mut ledger, &path);
    // Whoever wanted the file is done with it.
    assert!(File::open(&path).is_ok());
    daemon.reload("configuration reloaded");
    let again = Load::start(options(daemon.address(), 1, 62));
    let (_, mut ledger) = again.end_clean();
    assert_eq!(denied(&path), Some(libc::EPERM), "pinned again");
    daemon.stop();
    assert_in_file(&mut ledger, &path);
}

fn denied(path: &Path) -> Option<i32> {
    File::open(path).err().as_ref().and_then(io::Error::raw_os_error)
}

#[test]
fn fifty_files_that_are_wanted_at_once_are_let_go_side_by_side() {
    const FILES: usize = 50;
    let Some(lab) = Lab::new("fifty recalls", &Spec::XFS) else { return };
    let files: Vec<_> = (0..FILES).map(|number| lab.fs.path(&format!("file-{number}"))).collect();
    for path in &files {
        let file = create(path);
        file.write_all_at(&[0x5A; 65536], 0).expect("room");
        file.sync_all().expect("a disk");
    }
    let paths: Vec<&Path> = files.iter().map(AsRef::as_ref).collect();
    let daemon = lab.serve(&lab.open_config(any_port(), &paths));
    paths.iter().for_each(|path| clear_immutable_behind(daemon.pid(), path));
    let took = std::thread::scope(|scope| {
        let openers: Vec<_> = paths.iter().map(|path| scope.spawn(|| truncate(path, 4096))).collect();
        openers.into_iter().map(|opener| opener.join().expect("it gets in")).max()
    });
    assert!(took < Some(LET_GO_MAX), "the last one after {took:?}: {}", daemon.log());
    eventually("all are let go", || daemon.log().matches("drained and let go").count() == FILES);
    for path in &paths {
        assert!(lab.incident(path).is_some(), "{}", path.display());
    }
    let fences = lab.json(&["status", "--json"], 0)["targets"][0]["fences"].clone();
    assert_eq!((&fences["count"], &fences["not_drained"]), (&FILES.into(), &0.into()), "{fences}");
    daemon.stop();
    lab.fastice(&["unpin", "--force"], &paths, 0);
}
