//! Orderly ends under load.

use std::time::{Duration, Instant};

use fastice::initiator::bench::BenchOptions;
use rustix::process::Signal;

use super::daemon::{Lab, any_port, is_immutable};
use super::load::{Load, assert_in_file, options};
use super::loopfs::Spec;

/// How long the end of a healthy daemon may take, far less than its patience with a device that hangs.
const END_MAX: Duration = Duration::from_secs(8);

#[test]
fn a_signal_drains_closes_and_releases() {
    let both = [Signal::TERM, Signal::TERM];
    for (spec, signals) in [(Spec::XFS, &both[..1]), (Spec::EXT4, &both[..]), (Spec::XFS, &[Signal::INT])] {
        let Some(lab) = Lab::new("orderly end", &spec) else { return };
        let path = lab.fragmented("file");
        let mut daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
        let load = Load::start(options(daemon.address(), 1, 11));
        let started = Instant::now();
        for &signal in signals {
            // The second one may come when all is over.
            let _ = rustix::process::kill_process(daemon.pid(), signal);
        }
        let status = daemon.ends_within(END_MAX);
        assert_eq!(status.code(), Some(0), "{signals:?}: {}", daemon.log());
        let log = daemon.log();
        assert!(log.contains("stopped") && !log.contains("ERROR"), "{log}");
        println!("{signals:?}: ended after {:?}", started.elapsed());
        assert!(!is_immutable(&path) && lab.pin().is_none());
        // The host saw its connections close, and no command fail.
        let (report, mut ledger) = load.end().expect("the load ends well");
        assert_eq!(report.verify.faults, 0, "{report:?}");
        println!("{signals:?}: {} errors, first {:?}", report.errors, report.first_error);
        assert_in_file(&mut ledger, &path);
    }
}

#[test]
fn a_host_without_patience_hears_that_the_connection_was_closed() {
    let Some(lab) = Lab::new("close at the end", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let load = Load::start(BenchOptions { reconnect: None, ..options(daemon.address(), 1, 5) });
    daemon.stop();
    let error = load.end().expect_err("the connection is gone");
    println!("{error}");
    use fastice::initiator::error::ErrorKind;
    assert!(matches!(error.kind(), ErrorKind::Closed | ErrorKind::Terminated), "{error}");
}

#[test]
fn the_successor_goes_on_where_the_first_ended() {
    let Some(lab) = Lab::new("hand-over", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let mut daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let config = lab.open_config(daemon.address(), &[&path]);
    let load = Load::start(options(daemon.address(), 1, 17));
    for _ in 0..3 {
        daemon.stop();
        daemon = lab.serve(&config);
        load.goes_on();
    }
    let (report, mut ledger) = load.end().expect("the load ends well");
    assert_eq!(report.verify.faults, 0, "{report:?}");
    assert!(report.reconnects >= 3, "{report:?}");
    daemon.stop();
    assert_in_file(&mut ledger, &path);
}

#[test]
fn the_modification_time_tells_of_what_hosts_wrote_where_that_is_asked_for() {
    for (asked, pinned_before) in [(true, false), (false, false), (true, true)] {
        let Some(lab) = Lab::new("modification time", &Spec::XFS) else { return };
        let path = lab.fragmented("file");
        let before = std::fs::metadata(&path).and_then(|meta| meta.modified()).expect("a time");
        let config = lab.open_config(any_port(), &[&path]);
        let text = std::fs::read_to_string(&config).expect("the configuration");
        std::fs::write(&config, text.replace("file = ", &format!("update_mtime = {asked}\nfile = ")))
            .expect("room");
        if pinned_before {
            lab.fastice(&["pin"], &[&path], 0);
        }
        let daemon = lab.serve(&config);
        let load = Load::start(options(daemon.address(), 1, 191));
        load.end_clean();
        let during = std::fs::metadata(&path).and_then(|meta| meta.modified()).expect("a time");
        assert_eq!(during, before);
        daemon.stop();
        if pinned_before {
            // The pin stays, and with it the flag: the time is set when that goes.
            lab.fastice(&["unpin"], &[&path], 0);
        }
        let after = std::fs::metadata(&path).and_then(|meta| meta.modified()).expect("a time");
        assert_eq!(after > before, asked);
    }
}
