//! A pin outlives the daemon's death as an immutable file, and everybody deals with it.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::process::Command;

use super::daemon::{Lab, PATIENCE, any_port, assert_write_refused, is_immutable};
use super::load::{Load, assert_in_file, options};
use super::loopfs::{self, Spec};

#[test]
fn it_stays_immutable_is_reported_adopted_and_released() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("leftover pin", &spec) else { return };
        let path = lab.fragmented("file");
        let config = lab.open_config(any_port(), &[&path]);
        let daemon = lab.serve(&config);
        let pin = lab.pin().expect("a record");
        assert_eq!((pin["state"].as_str(), pin["kept"].as_bool()), (Some("guarded"), Some(false)), "{pin}");
        assert_eq!(pin["pid"].as_i64(), Some(daemon.pid().as_raw_nonzero().get().into()));
        let generation = pin["generation"].as_u64().expect("a number");
        daemon.kill();

        assert!(is_immutable(&path));
        assert_write_refused(&path);
        let pin = lab.pin().expect("a record");
        assert_eq!(pin["state"], "immutable", "{pin}");
        assert!(pin["detail"].as_str().is_some_and(|text| text.contains("did not end in order")), "{pin}");
        let (status, told) = lab.doctor_pins();
        assert_eq!(status, "warn", "{told}");
        assert!(told.contains(&format!("fastice unpin {}", path.display())), "{told}");

        let daemon = lab.serve(&config);
        let pin = lab.pin().expect("a record");
        assert_eq!(pin["state"], "guarded", "{pin}");
        assert!(pin["generation"].as_u64() > Some(generation), "a grant of its own: {pin}");
        let load = Load::start(options(daemon.address(), 1, 7));
        let (_, mut ledger) = load.end_clean();
        daemon.stop();
        assert!(!is_immutable(&path) && lab.pin().is_none());
        assert_eq!(lab.doctor_pins().0, "ok");
        assert_in_file(&mut ledger, &path);
        OpenOptions::new().write(true).open(&path).expect("the file is writable again");
    }
}

#[test]
fn a_pin_of_the_operator_is_kept_whatever_end_the_daemon_takes() {
    let Some(lab) = Lab::new("kept pin", &Spec::EXT4) else { return };
    let path = lab.fragmented("file");
    lab.fastice(&["pin"], &[&path], 0);
    let config = lab.open_config(any_port(), &[&path]);
    lab.serve(&config).stop();
    let kept = || {
        let pin = lab.pin().expect("a record");
        assert_eq!((pin["state"].as_str(), pin["kept"].as_bool()), (Some("immutable"), Some(true)), "{pin}");
        assert!(is_immutable(&path));
        assert_write_refused(&path);
        assert_eq!(lab.doctor_pins().0, "ok");
    };
    kept();
    lab.serve(&config).kill();
    kept();
    lab.serve(&config).stop();
    kept();
    lab.fastice(&["unpin"], &[&path], 0);
    assert!(!is_immutable(&path) && lab.pin().is_none());
}

#[test]
fn orphans_are_told_of_before_anything_is_served_and_released_at_once() {
    let Some(lab) = Lab::new("orphans", &Spec::XFS) else { return };
    let (left, changed, kept) = (lab.fragmented("left"), lab.fragmented("changed"), lab.fragmented("kept"));
    lab.fastice(&["pin"], &[&kept], 0);
    lab.serve(&lab.open_config(any_port(), &[&left, &changed, &kept])).kill();
    loopfs::run(Command::new("chattr").arg("-i").arg(&changed)).expect("chattr");
    let file = OpenOptions::new().write(true).open(&changed).expect("the flag is gone");
    file.set_len(4096).expect("shorter");
    drop(file);

    let other = lab.fragmented("other");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&other]));
    let log = daemon.stop();
    let line = |path: &std::path::Path| {
        let name = path.display().to_string();
        let lines = log.lines().filter(|line| line.contains(&name));
        lines
            .map(str::to_owned)
            .find(|line| line.contains("a pin that"))
            .unwrap_or_else(|| panic!("{name}: {log}"))
    };
    assert!(line(&left).contains("nobody holds") && line(&left).contains("the recorded one, and held"));
    assert!(line(&changed).contains("NOT THE RECORDED ONE"));
    assert!(line(&kept).contains("kept and not served"));
    assert!(is_immutable(&left), "telling changes nothing");

    // The changed one is for somebody to look at first.
    let told = lab.command(&["unpin", "--left-behind", "--json"]).output().expect("the binary runs");
    assert_ne!(told.status.code(), Some(0));
    assert!(!is_immutable(&left) && is_immutable(&kept));
    lab.fastice(&["unpin", "--left-behind", "--force"], &[], 0);
    let pin = lab.pin().expect("that of the operator");
    assert_eq!(pin["path"].as_str(), kept.to_str());
    let told = lab.fastice(&["unpin", "--left-behind"], &[], 0).stdout;
    assert!(String::from_utf8_lossy(&told).contains("nothing was left behind"));
    lab.fastice(&["unpin"], &[&kept], 0);
}

#[test]
fn a_map_that_changed_while_nobody_held_it_is_refused_and_the_difference_named() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("changed leftover", &spec) else { return };
        let path = lab.fragmented("file");
        let config = lab.open_config(any_port(), &[&path]);
        lab.serve(&config).kill();
        let chattr = |flag: &str| loopfs::run(Command::new("chattr").arg(flag).arg(&path)).expect("chattr");
        chattr("-i");
        let file = OpenOptions::new().read(true).write(true).open(&path).expect("the flag is gone");
        // The blocks from 1 MiB on move: those of the decoy are freed meanwhile, so that the filesystem has a choice.
        let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, hole, 1 << 20, 65536).expect("punched");
        std::fs::write(lab.fs.path("thief"), vec![1; 1 << 20]).expect("room");
        rustix::fs::sync();
        file.write_all_at(&[2; 65536], 1 << 20).expect("room");
        file.sync_all().expect("a disk");
        drop(file);
        chattr("+i");

        let pin = lab.pin().expect("a record");
        assert_eq!(pin["state"], "changed", "{pin}");
        let (status, told) = lab.doctor_pins();
        assert!(status == "warn" && told.contains("unpin --force"), "{told}");
        let (status, log) = lab.try_serve(&config).err().expect("the old map is never served");
        assert_eq!(status.code(), Some(4), "{log}");
        let path_shown = path.display().to_string();
        for word in ["changed", "1048576", path_shown.as_str(), "unpin --force"] {
            assert!(log.contains(word), "{word:?} is missing: {log}");
        }
        assert!(is_immutable(&path), "the refusal leaves things as they were");
        assert_eq!(lab.pin().expect("a record")["state"], "changed");
        lab.fastice(&["unpin"], &[&path], 4);
        lab.fastice(&["unpin", "--force"], &[&path], 0);
        lab.serve(&config).stop();
    }
}

#[test]
fn a_second_daemon_is_refused_and_the_first_notices_nothing() {
    let Some(lab) = Lab::new("two daemons", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let config = lab.open_config(any_port(), &[&path]);
    let mut daemon = lab.serve(&config);
    let load = Load::start(options(daemon.address(), 1, 3));
    let pid = daemon.pid().as_raw_nonzero();
    for _ in 0..3 {
        let (status, log) = lab.try_serve(&config).err().expect("the file is held");
        assert_eq!(status.code(), Some(3), "{log}");
        assert!(log.contains(&format!("process {pid}")), "{log}");
    }
    // With a state directory of its own, the second has only the kernel to tell it.
    let text = std::fs::read_to_string(&config).expect("the configuration");
    let other = lab.place("other.toml");
    let elsewhere = lab.place("other-state").display().to_string();
    std::fs::write(&other, text.replace(&lab.place("state").display().to_string(), &elsewhere))
        .expect("room");
    let (status, log) = lab.try_serve(&other).err().expect("the file is held");
    assert!(matches!(status.code(), Some(3 | 5)), "{status}: {log}");
    assert!(log.contains(path.to_str().expect("a path")), "{log}");
    lab.fastice(&["unpin"], &[&path], 3);
    lab.fastice(&["unpin", "--force"], &[&path], 3);
    assert_write_refused(&path);
    assert_eq!(lab.pin().expect("a record")["state"], "guarded");
    load.goes_on();
    let (report, mut ledger) = load.end_clean();
    assert_eq!(report.reconnects, 0);
    assert!(!daemon.has_ended());
    daemon.signal(rustix::process::Signal::INT);
    assert_eq!(daemon.ends_within(PATIENCE).code(), Some(0), "{}", daemon.log());
    assert_in_file(&mut ledger, &path);
}
