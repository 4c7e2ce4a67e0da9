//! The bytes of a served file can be read on the serving host, as hosts see them.

use std::fs;
use std::process::Command;

use super::daemon::{FILE_LEN, Lab, any_port};
use super::load::{Load, options, units_in_file};
use super::loopfs::{self, Spec};

#[test]
fn what_hosts_wrote_is_read_by_the_map_while_the_file_is_served() {
    let partition = Spec { partition_start: Some(8192), ..Spec::EXT4 };
    for spec in [Spec::XFS, partition] {
        let Some(lab) = Lab::new("read while served", &spec) else { return };
        let path = lab.fragmented("file");
        let before = fs::read(&path).expect("the file");
        let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
        let load = Load::start(options(daemon.address(), 1, 181));
        load.reaches(300);
        load.end_clean();
        let cat = loopfs::run(Command::new("cat").arg(&path));
        assert!(cat.expect_err("it is denied").contains("not permitted"));
        let told = lab.fastice(&["read"], &[&path], 0).stdout;
        let copy = lab.place("copy");
        let output = copy.to_str().expect("text");
        lab.fastice(&["read", "--output", output], &[&path], 0);
        lab.fastice(&["read", "--output", output], &[&path], 1);
        daemon.stop();
        let after = fs::read(&path).expect("the file");
        assert_eq!(u64::try_from(after.len()).expect("small"), FILE_LEN);
        assert!(after != before, "hosts wrote");
        assert!(
            told == after && fs::read(&copy).expect("the copy") == after,
            "read by the map is what the file holds"
        );
    }
}

#[test]
fn what_nobody_serves_is_read_as_any_file_and_what_was_never_pinned_is_not_ours() {
    let Some(lab) = Lab::new("read at rest", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    fs::create_dir(lab.place("state")).expect("a state directory");
    lab.fastice(&["read"], &[&path], 1);
    lab.fastice(&["pin"], &[&path], 0);
    let told = lab.fastice(&["read"], &[&path], 0).stdout;
    assert!(told == fs::read(&path).expect("the file"));
    lab.fastice(&["unpin"], &[&path], 0);
}

#[test]
fn another_file_where_a_served_one_was_pinned_is_not_taken_for_it() {
    let Some(lab) = Lab::new("read another file", &Spec::XFS) else { return };
    let [directory, moved] = ["directory", "moved"].map(|name| lab.fs.path(name));
    fs::create_dir(&directory).expect("room");
    let path = lab.fragmented("directory/file");
    let daemon = lab.serve(&lab.open_config(any_port(), &[&path]));
    fs::rename(&directory, &moved).expect("a directory is not pinned");
    fs::create_dir(&directory).expect("room");
    fs::write(&path, "another").expect("room");
    let refused = lab.fastice(&["read"], &[&path], 1);
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.stdout.is_empty() && told.contains("another file"), "{told}");
    let copy = lab.fs.outside().join("copy");
    lab.fastice(&["read", "--output", copy.to_str().expect("text")], &[&path], 1);
    assert!(!copy.exists(), "nothing was read, and nothing is left of it");
    let served = lab.fastice(&["read"], &[&moved.join("file")], 0).stdout;
    assert_eq!(u64::try_from(served.len()).expect("small"), FILE_LEN);
    daemon.stop();
}

#[test]
fn what_a_killed_target_left_is_read_past_what_local_readers_have_cached() {
    let Some(lab) = Lab::new("read after a kill", &Spec::EXT4) else { return };
    let path = lab.fragmented("file");
    let config = lab.open_config(any_port(), &[&path]);
    let text = fs::read_to_string(&config).expect("it is there");
    fs::write(&config, text.replace("file = ", "local_readers = \"allow\"\nfile = ")).expect("room");
    let daemon = lab.serve(&config);
    loopfs::run(Command::new("cat").arg(&path).stdout(std::process::Stdio::null()))
        .expect("a reader is let in");
    let load = Load::start(options(daemon.address(), 1, 182));
    let (_, mut ledger) = load.end_clean();
    daemon.kill();
    let copy = lab.place("copy");
    fs::write(&copy, lab.fastice(&["read"], &[&path], 0).stdout).expect("room");
    assert_eq!(fs::metadata(&copy).expect("it is there").len(), FILE_LEN);
    assert!(units_in_file(&mut ledger, &copy) > 100, "what was acknowledged is read");
    lab.fastice(&["unpin", "--left-behind"], &[], 0);
}
