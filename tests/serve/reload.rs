//! SIGHUP under load: what can change live, does, and nobody else notices.

use std::fs;
use std::path::Path;

use fastice::initiator::bench::BenchOptions;
use fastice::initiator::controller::{ConnectOptions, Controller, Host};
use fastice::units::Lba;
use nvme_spec::Nsid;

use super::daemon::{Lab, NQN, any_port, assert_write_refused, eventually, is_immutable, namespaces};
use super::load::{Load, assert_in_file, options};
use super::loopfs::Spec;

#[test]
fn namespaces_come_and_go_beside_a_load() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("namespaces by SIGHUP", &spec) else { return };
        let (first, second) = (lab.fragmented("first"), lab.fragmented("second"));
        let daemon = lab.serve(&lab.open_config(any_port(), &[&first]));
        let load = Load::start(options(daemon.address(), 1, 21));
        let host = Controller::connect(&load_options(&daemon.address())).expect("connected");
        assert!(host.namespace(Nsid(2)).is_err());
        for round in 0..3 {
            lab.open_config(daemon.address(), &[&first, &second]);
            daemon.reload("configuration reloaded");
            assert_write_refused(&second);
            let namespace = host.namespace(Nsid(2)).expect("the new namespace");
            namespace.write(Lba(0), &[round; 4096], true).expect("a write");
            let other = Load::start(BenchOptions { reconnect: None, ..options(daemon.address(), 2, 22) });
            other.reaches(400);
            lab.open_config(daemon.address(), &[&first]);
            daemon.reload("configuration reloaded");
            assert!(!is_immutable(&second), "released: {}", daemon.log());
            let (report, mut ledger) = other.end().expect("its connection lives");
            assert_eq!(report.verify.faults, 0, "{report:?}");
            assert!(report.errors > 0, "commands of a namespace that is gone fail: {report:?}");
            assert_in_file(&mut ledger, &second);
            assert!(namespace.flush().is_err() && host.namespace(Nsid(2)).is_err());
            load.goes_on();
        }
        let (report, mut ledger) = load.end_clean();
        assert_eq!(report.reconnects, 0);
        daemon.stop();
        assert_in_file(&mut ledger, &first);
    }
}

fn load_options(address: &std::net::SocketAddr) -> ConnectOptions {
    ConnectOptions::new(*address, NQN, Host::random())
}

#[test]
fn a_host_that_is_no_longer_allowed_is_cut_off() {
    let Some(lab) = Lab::new("hosts by SIGHUP", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let (friend, stranger) = (Host::random(), Host::random());
    let allow = |hosts: &[&Host], address| {
        let names: Vec<&str> = hosts.iter().map(|host| host.nqn.as_str()).collect();
        lab.config("", address, &format!("hosts = {names:?}\n{}", namespaces(&[&path])))
    };
    let daemon = lab.serve(&allow(&[&friend], any_port()));
    let address = daemon.address();
    let connect = |host: &Host| ConnectOptions::new(address, NQN, host.clone());
    let load = Load::start(BenchOptions { connect: connect(&friend), ..options(address, 1, 31) });
    assert!(Controller::connect(&connect(&stranger)).is_err(), "not on the list");

    allow(&[&friend, &stranger], address);
    daemon.reload("configuration reloaded");
    let guest = Controller::connect(&connect(&stranger)).expect("on the list now");
    let patience = None;
    let cut = Load::start(BenchOptions {
        connect: connect(&stranger),
        reconnect: patience,
        read_percent: 100,
        ..options(address, 1, 32)
    });
    guest.namespace(Nsid(1)).expect("the namespace").flush().expect("served");

    allow(&[&friend], address);
    daemon.reload("configuration reloaded");
    eventually("the host is cut off", || guest.namespace(Nsid(1)).is_err());
    // Other cores may cut it off a moment later.
    cut.is_cut_off();
    let error = cut.end().expect_err("its connections are gone, too");
    println!("cut off: {error}");
    assert!(Controller::connect(&connect(&stranger)).is_err(), "not on the list any more");
    load.goes_on();
    let (report, mut ledger) = load.end_clean();
    assert_eq!(report.reconnects, 0, "the other host noticed nothing");
    daemon.stop();
    assert_in_file(&mut ledger, &path);
}

#[test]
fn a_broken_configuration_changes_nothing_and_is_named_with_its_line() {
    let Some(lab) = Lab::new("broken configuration", &Spec::EXT4) else { return };
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let load = Load::start(options(daemon.address(), 1, 41));
    let config = lab.open_config(daemon.address(), &[&path]);
    let good = fs::read_to_string(&config).expect("the configuration");
    let unfit = lab.fs.path("unfit");
    fs::File::create(&unfit).and_then(|file| file.set_len(1 << 20)).expect("a hole");
    let beyond = |file: &Path| format!("{good}[[subsystem.namespace]]\nnsid = 9\nfile = {file:?}\n");
    let missing = lab.fs.path("missing");
    let line = good.lines().count() + 1;
    let broken = [
        (format!("{good}colour = 7\n"), vec!["colour".to_owned(), format!("{line}")]),
        (format!("{good}= =\n"), vec![format!("{line}")]),
        (beyond(&unfit), vec!["hole".to_owned(), "unfit".to_owned()]),
        (beyond(&missing), vec!["missing".to_owned()]),
    ];
    for (text, words) in broken {
        fs::write(&config, &text).expect("room");
        let before = daemon.log().len();
        daemon.reload("the configuration stays as it was");
        let told = daemon.log().split_off(before);
        for word in words {
            assert!(told.contains(&word), "{word:?} is missing: {told}");
        }
        load.goes_on();
    }
    assert!(!is_immutable(&unfit));
    fs::remove_file(&config).expect("it is there");
    daemon.reload("the configuration stays as it was");
    fs::write(&config, &good).expect("room");
    daemon.reload("configuration reloaded");
    assert_write_refused(&path);
    let (report, mut ledger) = load.end_clean();
    assert_eq!(report.reconnects, 0);
    daemon.stop();
    assert_in_file(&mut ledger, &path);
}

#[test]
fn the_log_level_changes_live_and_what_cannot_is_told() {
    let Some(lab) = Lab::new("log level", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    let denied = || {
        fs::File::open(&path).expect_err("the file is pinned");
        daemon.log().matches("denied an open").count()
    };
    assert_eq!(denied(), 0, "a matter of debugging");
    let all = format!("allow_any_host = true\n{}", namespaces(&[&path]));
    lab.config("log = \"debug\"\nidle_after_us = 77", daemon.address(), &all);
    daemon.reload("configuration reloaded");
    eventually("debug messages", || denied() > 0);
    eventually("what takes effect later is told", || daemon.log().contains("takes effect at the next start"));
    lab.config("log = \"error\"", daemon.address(), &all);
    daemon.signal(rustix::process::Signal::HUP);
    eventually("no more debug messages", || {
        let before = denied();
        std::thread::sleep(std::time::Duration::from_millis(50));
        denied() == before
    });
    daemon.stop();
}
