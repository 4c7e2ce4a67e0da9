//! kill -9 at any moment under verified write load loses no acknowledged write.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use fastice::initiator::bench;
use fastice::initiator::controller::ConnectOptions;

use super::daemon::{Lab, any_port, assert_write_refused, eventually};
use super::load::{Load, assert_in_file, options, seed};
use super::loopfs::{self, LoopFs, Spec};

const KILLS: u32 = 5;

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut word = *state;
    word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ word >> 31
}

/// Writes a configuration for files.
type Configure = fn(&Lab, SocketAddr, &[&Path]) -> PathBuf;

/// Kills the daemon some times under load, restarts it, kills it a last time, and looks into the file itself.
fn kill_and_look(test: &str, spec: &Spec, fua: bool, digests: bool, configure: Configure) {
    let Some(lab) = Lab::new(test, spec) else { return };
    println!("{test}: on {}", lab.fs.device());
    let path = lab.fragmented("file");
    let seed = seed(test);
    let mut daemon = lab.serve(&configure(&lab, any_port(), &[&path]));
    let config = configure(&lab, daemon.address(), &[&path]);
    let base = options(daemon.address(), 1, seed);
    let connect = ConnectOptions { header_digest: digests, data_digest: digests, ..base.connect.clone() };
    let load = Load::start(bench::BenchOptions { fua, connect, ..base });
    let mut random = seed;
    for _ in 0..KILLS {
        thread::sleep(Duration::from_millis(next(&mut random) % 400));
        daemon.kill();
        thread::sleep(Duration::from_millis(next(&mut random) % 100));
        daemon = lab.serve(&config);
        load.goes_on();
    }
    thread::sleep(Duration::from_millis(next(&mut random) % 400));
    daemon.kill();
    let (report, mut ledger) = load.end_clean();
    assert!(report.reconnects >= u64::from(KILLS), "{report:?}");
    assert!(report.verify.blocks_checked > 0 && report.flushes > 0, "{report:?}");
    lab.fastice(&["unpin"], &[&path], 0);
    assert_in_file(&mut ledger, &path);
}

#[test]
fn on_xfs_with_flushes() {
    kill_and_look("kill -9 on XFS", &Spec::XFS, false, false, Lab::open_config);
}

#[test]
fn on_xfs_by_our_driver() {
    kill_and_look("kill -9 of our driver", &Spec::XFS, false, false, Lab::nvme_config);
}

#[test]
fn on_ext4_with_fua_and_digests() {
    kill_and_look("kill -9 on ext4", &Spec::EXT4, true, true, Lab::open_config);
}

#[test]
fn all_is_read_back_from_the_successor() {
    let Some(lab) = Lab::new("read back after kill -9", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let seed = seed("read back after kill -9");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let config = lab.open_config(daemon.address(), &[&path]);
    let base = options(daemon.address(), 1, seed);
    let writes_only = bench::BenchOptions {
        read_percent: 0,
        verify: bench::Verify::AfterWrites,
        limit: bench::Limit::Duration(Duration::from_secs(2)),
        ..base
    };
    let run = thread::spawn(move || {
        let stop = std::sync::atomic::AtomicBool::new(false);
        bench::run(&writes_only, &stop, |_| {})
    });
    thread::sleep(Duration::from_millis(300 + seed % 500));
    daemon.kill();
    let daemon = lab.serve(&config);
    let waiting = Instant::now();
    let report = run.join().expect("no panic").expect("the run ends well");
    assert!(report.is_clean(), "{report:?} after {:?}", waiting.elapsed());
    assert!(report.reconnects > 0 && report.verify.blocks_checked > 100, "{report:?}");
    daemon.stop();
}

/// A filesystem whose every modification waits, until this is dropped.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(root: &'a Path) -> Self {
        loopfs::run(Command::new("fsfreeze").arg("--freeze").arg(root)).expect("frozen");
        Self(root)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        loopfs::run(Command::new("fsfreeze").arg("--unfreeze").arg(self.0)).expect("thawed");
    }
}

/// The disk under the file is an image on another filesystem; freezing that one stops the disk.
#[test]
fn a_pin_is_not_touched_before_the_last_write_of_the_dead_has_landed() {
    const TEST: &str = "writes of the dead";
    let Some(under) = loopfs::make_or_skip(TEST, &Spec { size_mib: 1024, ..Spec::EXT4 }) else { return };
    // What is asked of the state directory must not wait for the frozen disk.
    let away = tempfile::tempdir().expect("a directory");
    let lab = match LoopFs::make_in(&under.root(), &Spec { size_mib: 320, ..Spec::XFS }) {
        Ok(fs) => Lab::with_places_in(fs, away.path()),
        Err(reason) => return loopfs::skip(TEST, &reason),
    };
    let path = lab.fragmented("file");
    let config = lab.open_config(any_port(), &[&path]);
    let daemon = lab.serve(&config);
    // Without flushes: one that waits keeps the whole process from dying.
    let writes = bench::BenchOptions { flush_interval: 0, ..options(daemon.address(), 1, 81) };
    let load = Load::start(writes);
    {
        let root = under.root();
        let _frozen = Frozen::new(&root);
        // Long enough for every slot of the load to hold a command that does not come back.
        thread::sleep(Duration::from_millis(300));
        daemon.kill();
        assert_write_refused(&path);
        let output = lab.fastice(&["unpin"], &[&path], 3);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.contains("still on the device"), "{told}");
        let (status, log) = lab.try_serve(&config).err().expect("refused");
        assert!(status.code() == Some(3) && log.contains("still on the device"), "{log}");
        assert_write_refused(&path);
    }
    let (_, mut ledger) = load.end_clean();
    lab.fastice(&["unpin"], &[&path], 0);
    assert_in_file(&mut ledger, &path);
    assert!(lab.marks_of_processes("commands") > 0, "a killed process sweeps nothing");
    eventually("its mark is swept", || {
        lab.serve(&config).stop();
        lab.marks_of_processes("commands") == 0
    });
}
