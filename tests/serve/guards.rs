//! Files that are served with other guards than the default ones: hosts see what they shall, and are fenced when the guard is
//! broken.
//!
//! Where the target runs in this process, it alone gets past the open-permission mark, and so plays root.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fastice::config::Config;
use fastice::control::{Running, start};
use fastice::extent::{NoProgress, Operation, attempt};
use fastice::initiator::bench::{BenchOptions, Ledger};
use fastice::initiator::controller::Controller;
use fastice::units::Lba;
use nvme_spec::Nsid;

use super::daemon::{FILE_LEN, Lab, PATIENCE, any_port, eventually, is_immutable};
use super::load::{Load, connect_options, options};
use super::loopfs::{self, Spec};
use super::watch::{is_ready, set_flags, steps};
use rustix::fs::IFlags;

/// What the swap-file guard takes for itself.
const RESERVED: u64 = 8192;

/// The configuration of one file with this guard.
fn config_of(lab: &Lab, guard: &str, path: &Path) -> PathBuf {
    let config = lab.open_config(any_port(), &[path]);
    let text = fs::read_to_string(&config).expect("it is there");
    fs::write(&config, text.replace("file = ", &format!("guard = {guard:?}\nfile = "))).expect("room");
    config
}

/// A file that the swap-file guard may have: each block tells its place, and the reserved ones are zeros.
fn numbered(lab: &Lab) -> PathBuf {
    let path = lab.fragmented("file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("ours");
    let file = OpenOptions::new().write(true).open(&path).expect("ours");
    for at in (0..FILE_LEN).step_by(4096) {
        file.write_all_at(&block_at(at), at).expect("room");
    }
    file.sync_all().expect("a disk");
    path
}

fn block_at(at: u64) -> Vec<u8> {
    if at < RESERVED {
        return vec![0; 4096];
    }
    at.to_le_bytes().iter().copied().cycle().take(4096).collect()
}

fn is_swap(path: &Path) -> bool {
    fs::read_to_string("/proc/swaps").expect("it is there").contains(path.to_str().expect("a plain name"))
}

/// Every acknowledged write must be in the file, so far behind where the host wrote it.
fn assert_in_file_behind(ledger: &mut Ledger, path: &Path, shift: u64) {
    let file = File::open(path).expect("the file is free");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
    let audit = ledger.audit(|offset, data| file.read_exact_at(data, offset.get() + shift));
    let audit = audit.expect("the file is read");
    assert!(audit.faults == 0 && audit.units_checked > 100, "{audit:?}");
}

/// The file is let go with its difference. What is under way is drained first, for which a busy disk may need a while.
fn assert_let_go(lab: &Lab) {
    let begun = Instant::now();
    while steps(lab).last().is_none_or(|step| step != "kept") {
        assert!(begun.elapsed() < 3 * PATIENCE, "not let go: {:?}", steps(lab));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_swap_file_is_served_from_byte_8192_on_and_survives_a_kill() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("served with the swap-file guard", &spec) else { return };
        let path = numbered(&lab);
        let config = config_of(&lab, "swap-file", &path);
        let daemon = lab.serve(&config);
        let host = Controller::connect(&connect_options(daemon.address())).expect("a host");
        let namespace = host.namespace(Nsid(1)).expect("the namespace");
        let block_len = FILE_LEN / 512;
        assert_eq!(namespace.blocks().get() + RESERVED / 512, block_len, "the reserve is not a part of it");
        let mut first = vec![0; 4096];
        namespace.read(Lba(0), &mut first).expect("read");
        assert_eq!(first, block_at(RESERVED), "byte 0 is byte 8192 of the file");
        let last = Lba(namespace.blocks().get() - 8);
        namespace.read(last, &mut first).expect("read");
        assert_eq!(first, block_at(FILE_LEN - 4096));
        namespace.read(Lba(last.0 + 8), &mut first).expect_err("nothing is behind it");
        host.shutdown().expect("the host goes");

        let load = Load::start(options(daemon.address(), 1, 301));
        load.reaches(300);
        let (_, mut ledger) = load.end_clean();
        let told = lab.fastice(&["read"], &[&path], 0).stdout;
        assert_eq!(told.len() as u64, FILE_LEN - RESERVED);
        assert_eq!(lab.pin().expect("a pin")["guard"], "swap-file");
        let status = lab.json(&["status", "--json"], 0);
        assert_eq!(status["targets"][0]["exports"][0]["guard"], "swap-file", "{status}");
        daemon.kill();
        assert!(is_swap(&path) && is_immutable(&path));
        assert!(File::open(&path).is_ok(), "the mark went with the process");
        assert_in_file_behind(&mut ledger, &path, RESERVED);
        let bytes = fs::read(&path).expect("readable");
        assert!(
            told == bytes[usize::try_from(RESERVED).expect("small")..],
            "what hosts see is what the file holds behind the reserve"
        );

        let again = lab.serve(&config);
        let load = Load::start(options(again.address(), 1, 302));
        let (_, mut ledger) = load.end_clean();
        again.stop();
        assert!(!is_swap(&path) && !is_immutable(&path) && lab.pin().is_none(), "given back");
        assert_in_file_behind(&mut ledger, &path, RESERVED);
        assert!(fs::read(&path).expect("readable")[..8192].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_swapoff_fences_and_the_owner_gets_the_file_back() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("swapoff while served", &spec) else { return };
        let path = numbered(&lab);
        let config = Config::load(&config_of(&lab, "swap-file", &path)).expect("a good configuration");
        let running = start(config, &mut NoProgress).expect("served");
        let host = Controller::connect(&connect_options(running.addresses()[0])).expect("a host");
        assert!(is_ready(&host));
        let load = Load::start(BenchOptions { reconnect: None, ..options(running.addresses()[0], 1, 303) });
        load.goes_on();
        set_flags(&path, |flags| flags - IFlags::IMMUTABLE);
        assert_eq!(attempt(Operation::SwapOff, &path).failed, None, "root may");
        eventually("the export is fenced", || !is_ready(&host));
        assert_let_go(&lab);
        load.is_refused();
        let (report, mut ledger) = load.end().expect("the connection lives");
        assert!(report.verify.faults == 0 && report.errors > 0, "{report:?}");
        assert_in_file_behind(&mut ledger, &path, RESERVED);
        let incident = lab.incident(&path).expect("it is written down");
        let reason = incident["reason"].as_str().expect("text");
        assert!(reason.contains("swap") || reason.contains("immutable flag"), "{incident}");
        host.shutdown().expect("the host goes");
        running.stop(Running::STOP_PATIENCE).expect("an orderly end");
        assert_eq!(lab.pin().expect("it stays")["state"], "unguarded");
        lab.fastice(&["unpin"], &[&path], 0);
        assert!(!is_swap(&path) && fs::read(&path).expect("readable")[..8192].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_read_only_filesystem_is_served_and_a_remount_fences() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("served from a read-only filesystem", &spec) else { return };
        let path = lab.fragmented("file");
        let remount = |how: &str| {
            let mut mount = Command::new("mount");
            loopfs::run(mount.args(["-o", &format!("remount,{how}")]).arg(lab.fs.root())).expect("root may");
        };
        remount("ro");
        let config = Config::load(&config_of(&lab, "read-only-mount", &path)).expect("a good configuration");
        let running = start(config, &mut NoProgress).expect("served");
        let address = running.addresses()[0];
        let host = Controller::connect(&connect_options(address)).expect("a host");
        assert!(is_ready(&host));
        // Hosts write all the same.
        let load = Load::start(options(address, 1, 311));
        load.reaches(300);
        let (_, mut ledger) = load.end_clean();
        assert_in_file_behind(&mut ledger, &path, 0);
        assert!(is_ready(&host));
        remount("rw");
        eventually("the export is fenced", || !is_ready(&host));
        assert_let_go(&lab);
        let incident = lab.incident(&path).expect("it is written down");
        assert!(incident["reason"].as_str().is_some_and(|reason| reason.contains("remounted")), "{incident}");
        host.shutdown().expect("the host goes");
        running.stop(Running::STOP_PATIENCE).expect("an orderly end");
        assert_eq!(lab.pin().expect("it stays")["state"], "unguarded");
        lab.fastice(&["unpin"], &[&path], 0);
        assert!(lab.pin().is_none() && !is_immutable(&path));
    }
}

#[test]
fn a_frozen_filesystem_is_served_and_a_thaw_fences() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("served from a frozen filesystem", &spec) else { return };
        let paths = [lab.fragmented("first"), lab.fragmented("second")];
        let fsfreeze = |how: &str| loopfs::run(Command::new("fsfreeze").arg(how).arg(lab.fs.root()));
        let config = lab.open_config(any_port(), &[&paths[0], &paths[1]]);
        let text = fs::read_to_string(&config).expect("it is there");
        fs::write(&config, text.replace("file = ", "guard = \"frozen-filesystem\"\nfile = ")).expect("room");
        // In order: both are served, written to, and let go.
        let daemon = lab.serve(&config);
        let loads = [1, 2].map(|nsid| Load::start(options(daemon.address(), nsid, 320 + u64::from(nsid))));
        loads.iter().for_each(Load::goes_on);
        assert!(fsfreeze("--freeze").is_err(), "it is frozen");
        let mut ledgers = loads.map(|load| load.end_clean().1);
        daemon.stop();
        for (ledger, path) in ledgers.iter_mut().zip(&paths) {
            assert!(!is_immutable(path));
            assert_in_file_behind(ledger, path, 0);
            OpenOptions::new().write(true).open(path).expect("thawed").sync_all().expect("a disk");
        }
        // A kill leaves all as it is; the next start goes on, and a thaw fences both.
        lab.serve(&config).kill();
        assert!(fsfreeze("--freeze").is_err() && is_immutable(&paths[0]));
        let daemon = lab.serve(&config);
        let host = Controller::connect(&connect_options(daemon.address())).expect("a host");
        assert!(is_ready(&host));
        fsfreeze("--unfreeze").expect("root may");
        eventually("the export is fenced", || !is_ready(&host));
        for path in &paths {
            eventually("it is written down", || lab.incident(path).is_some());
            let incident = lab.incident(path).expect("it is");
            assert!(
                incident["reason"].as_str().is_some_and(|reason| reason.contains("thawed")),
                "{incident}"
            );
        }
        host.shutdown().expect("the host goes");
        daemon.stop();
        lab.fastice(&["unpin"], &[&paths[0], &paths[1]], 0);
        assert!(!is_immutable(&paths[1]) && fsfreeze("--unfreeze").is_err(), "nothing is frozen");
    }
}
