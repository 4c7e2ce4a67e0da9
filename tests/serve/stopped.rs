//! The target is stopped, as by a debugger, for longer than the kernel waits for a lease; meanwhile root takes the file.
//! When it goes on, its sockets are full of writes to blocks that are another file's now.
//!
//! The kernel's patience is one for the whole system, so that these tests run alone (`.config/nextest.toml`).

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fastice::extent::{Extent, StateDir};
use fastice::initiator::bench::BenchOptions;
use rustix::process::Signal;

use super::daemon::{Daemon, FILE_LEN, Lab, PATIENCE, any_port, create, eventually};
use super::load::{Load, options};
use super::loopfs::Spec;
use super::recall::{clear_immutable_behind, truncate};

const BREAK_TIME: &str = "/proc/sys/fs/lease-break-time";

/// A short patience of the kernel with holders of leases; the old one comes back with the end of the test.
struct ShortPatience(String);

impl ShortPatience {
    fn of_a_second() -> Self {
        let before = fs::read_to_string(BREAK_TIME).expect("the kernel tells");
        fs::write(BREAK_TIME, "1").expect("root may");
        Self(before)
    }
}

impl Drop for ShortPatience {
    fn drop(&mut self) {
        fs::write(BREAK_TIME, self.0.trim()).expect("root may");
    }
}

/// What the device holds where the pinned file of `lab` has its blocks by the record.
fn old_blocks(lab: &Lab, extents: &[Extent]) -> Vec<Vec<u8>> {
    let device = fs::File::open(lab.fs.device()).expect("root reads it");
    // What hosts write goes past the page cache of the device.
    rustix::fs::fadvise(&device, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
    let read = |extent: &Extent| {
        let mut data = vec![0; usize::try_from(extent.len.get()).expect("small")];
        device.read_exact_at(&mut data, extent.device_offset.get()).expect("the device is read");
        data
    };
    extents.iter().map(read).collect()
}

fn extents_of(lab: &Lab) -> Vec<Extent> {
    let state = StateDir::open(lab.place("state")).expect("it is there");
    let mut records = state.records().expect("records");
    let pin = records.pop().expect("one").expect("whole");
    pin.map.expect("frozen").extents
}

/// Truncates the pinned file behind the stopped daemon, and fills the freed blocks with another file's bytes.
fn rob(lab: &Lab, daemon: &Daemon, file: &Path) {
    clear_immutable_behind(daemon.pid(), file);
    let took = truncate(file, 0);
    assert!(took > Duration::from_millis(500), "the lease was in the way: {took:?}");
    let thief = create(&lab.fs.path("thief"));
    thief.write_all_at(&vec![0xC3; 2 * usize::try_from(FILE_LEN).expect("small")], 0).expect("room");
    thief.sync_all().expect("a disk");
    rustix::fs::syncfs(&thief).expect("a disk");
}

/// After the end of the stop: either the export is fenced, or the whole target ends, as commands were queued.
fn goes_on(mut daemon: Daemon) -> &'static str {
    daemon.signal(Signal::CONT);
    let (fenced, ended) = ("export fenced", "none of them is submitted any more");
    eventually("it notices", || daemon.log().contains(fenced));
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline && !daemon.log().contains(ended) {
        thread::sleep(Duration::from_millis(20));
    }
    if daemon.log().contains(ended) {
        let status = daemon.ends_within(PATIENCE);
        assert_ne!(status.code(), Some(0), "{}", daemon.log());
        return "ended";
    }
    assert!(!daemon.has_ended(), "{}", daemon.log());
    daemon.signal(Signal::TERM);
    let _ = daemon.ends_within(PATIENCE);
    "fenced"
}

#[test]
fn a_target_that_was_stopped_writes_nothing_to_blocks_that_the_kernel_gave_away() {
    let _patience = ShortPatience::of_a_second();
    for (round, spec) in [Spec::XFS, Spec::EXT4, Spec::XFS].iter().enumerate() {
        let Some(lab) = Lab::new("stopped target", spec) else { return };
        let file = lab.fragmented("file");
        let daemon = lab.serve(&lab.open_config(any_port(), &[&file]));
        let seed = 71 + u64::try_from(round).expect("small");
        let hosts = [0, 10].map(|more| {
            Load::start(BenchOptions {
                reconnect: None,
                depth: 64,
                read_percent: 0,
                ..options(daemon.address(), 1, seed + more)
            })
        });
        daemon.signal(Signal::STOP);
        let extents = extents_of(&lab);
        rob(&lab, &daemon, &file);
        let before = old_blocks(&lab, &extents);
        let how = goes_on(daemon);
        println!("{}: {how}", spec.kind);
        for host in hosts {
            // It may have lost its connection, or met errors; what counts is on the disk.
            let _ = host.end();
        }
        let after = old_blocks(&lab, &extents);
        let wrong = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert_eq!(
            wrong,
            0,
            "a host wrote into {wrong} of {} extents that are not its own any more",
            after.len()
        );
    }
}

#[test]
fn a_target_that_was_stopped_goes_on_when_nobody_took_the_file() {
    let Some(lab) = Lab::new("stopped and whole", &Spec::XFS) else { return };
    let file = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&file]));
    let host = Load::start(BenchOptions { reconnect: None, ..options(daemon.address(), 1, 91) });
    daemon.signal(Signal::STOP);
    // Longer than a look at the file may be due for.
    thread::sleep(Duration::from_secs(4));
    daemon.signal(Signal::CONT);
    eventually("the cores make sure", || daemon.log().contains("looked at before it goes on"));
    host.goes_on();
    let (report, _) = host.end_clean();
    assert_eq!(report.errors, 0, "nobody took a file: {report:?}");
    let log = daemon.stop();
    assert!(!log.contains("export fenced"), "a stop alone is no difference: {log}");
}
