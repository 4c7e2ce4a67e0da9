//! Goal: pin, unpin, pins and map do and say on a real XFS what the manual says.
//! Method: an XFS on a loop device made for the test, the binary run on its files. Needs root.

#[expect(dead_code, reason = "shared with tests that use more of it")]
#[path = "common/loopfs.rs"]
mod loopfs;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use loopfs::{LoopFs, Spec};
use serde_json::Value;

/// A mounted XFS, and a state directory outside of it.
struct Lab {
    fs: LoopFs,
}

impl Lab {
    /// `None` after saying why not.
    fn new(test: &str) -> Option<Self> {
        Some(Self { fs: loopfs::make_or_skip(test, &Spec { size_mib: 320, ..Spec::XFS })? })
    }

    /// A written file of `mib` MiB.
    fn file(&self, name: &str, mib: usize) -> PathBuf {
        let path = self.fs.path(name);
        let file = File::create(&path).expect("a file");
        file.write_all_at(&vec![0x5a; mib << 20], 0).expect("room");
        file.sync_all().expect("a disk");
        path
    }

    fn command(&self, args: &[&str], files: &[&Path]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastice"));
        command.args(args).args(files).env("FASTICE_STATE_DIR", self.fs.outside()).env_remove("RUST_LOG");
        command
    }

    fn fastice(&self, args: &[&str], files: &[&Path]) -> Output {
        self.command(args, files).output().expect("the binary runs")
    }

    /// The JSON on standard output of a command that exits with `code`.
    fn json(&self, args: &[&str], files: &[&Path], code: i32) -> Value {
        let output = self.fastice(args, files);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {told}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    fn state_of(&self, path: &Path) -> String {
        let pins = self.json(&["pins", "--json"], &[], 0);
        let rows = pins["pins"].as_array().expect("an array");
        let row = rows.iter().find(|row| row["path"].as_str() == path.to_str()).expect("a row");
        row["state"].as_str().expect("a word").to_owned()
    }
}

/// Runs a program that must succeed.
fn run(command: &mut Command) {
    loopfs::run(command).expect("it succeeds");
}

/// Whether root can open the file for writing.
fn writable(path: &Path) -> bool {
    File::options().write(true).open(path).is_ok()
}

/// `pin --hold` in the background, ended by SIGINT.
struct Held(Child);

impl Held {
    fn end(mut self) -> i32 {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
        self.0.wait().expect("our child").code().expect("an exit status")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Already gone when the test went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pin_remains_and_is_undone() {
    let Some(lab) = Lab::new("a_pin_remains_and_is_undone") else { return };
    let file = lab.file("a.img", 4);
    let pinned = lab.json(&["pin", "--json"], &[&file], 0);
    assert_eq!(pinned["held"], false);
    let pin = &pinned["pins"][0];
    assert_eq!((&pin["path"], &pin["size_bytes"]), (&file.to_str().into(), &(4 << 20).into()));
    let remains: Vec<bool> =
        pin["guards"].as_array().expect("guards").iter().map(|g| g["remains"] == true).collect();
    assert_eq!(remains, [false, true, false], "the immutable flag alone outlives the process");
    assert!(!writable(&file));
    assert_eq!(lab.state_of(&file), "immutable");
    let verdict = lab.json(&["map", "verify", "--json"], &[&file], 0);
    assert_eq!((&verdict["same"], &verdict["differing_bytes"]), (&true.into(), &0.into()));

    let unpinned = lab.json(&["unpin", "--json"], &[&file], 0);
    assert_eq!(unpinned["unpinned"][0]["immutable_cleared"], true);
    assert_eq!(unpinned["unpinned"][0]["map_was_true"], true);
    assert!(writable(&file));
    assert_eq!(lab.fastice(&["unpin"], &[&file]).status.code(), Some(1), "there is no pin any more");
}

#[test]
fn unfit_files_are_refused_and_the_others_pinned() {
    let Some(lab) = Lab::new("unfit_files_are_refused_and_the_others_pinned") else { return };
    let good = lab.file("good.img", 1);
    let hole = lab.fs.path("hole.img");
    File::create(&hole).and_then(|file| file.set_len(1 << 20)).expect("a file");
    let result = lab.json(&["pin", "--json"], &[&hole, &good], 3);
    assert_eq!(result["pins"].as_array().map(Vec::len), Some(1));
    assert_eq!(result["errors"][0]["error"]["remedy"], "pin with --prepare, or serve with `prepare = true`");
    assert!(writable(&hole));

    let shown = lab.json(&["map", "show", "--json"], &[&hole], 0);
    assert_eq!((&shown["fit"], &shown["violations"][0]["name"]), (&false.into(), &"hole".into()));
    lab.json(&["pin", "--prepare", "--json"], &[&hole], 0);
    assert_eq!(lab.state_of(&hole), "immutable");
}

#[test]
fn a_changed_map_is_told_with_4() {
    let Some(lab) = Lab::new("a_changed_map_is_told_with_4") else { return };
    let file = lab.file("a.img", 4);
    lab.json(&["pin", "--json"], &[&file], 0);
    run(Command::new("chattr").arg("-i").arg(&file));
    assert_eq!(lab.state_of(&file), "unguarded");
    run(Command::new("fallocate").args(["-p", "-o", "1MiB", "-l", "64KiB"]).arg(&file));
    let verdict = lab.json(&["map", "verify", "--json"], &[&file], 4);
    assert_eq!(verdict["first_difference"]["file_offset_bytes"], 1 << 20);
    assert_eq!(verdict["differing_bytes"], 64 << 10);
    assert_eq!(lab.state_of(&file), "changed");
    lab.json(&["unpin", "--json"], &[&file], 4);
    lab.json(&["unpin", "--force", "--json"], &[&file], 0);

    let gone = lab.file("b.img", 1);
    lab.json(&["pin", "--json"], &[&gone], 0);
    run(Command::new("chattr").arg("-i").arg(&gone));
    fs::remove_file(&gone).expect("it is not immutable");
    assert_eq!(lab.state_of(&gone), "missing");
    lab.json(&["unpin", "--force", "--json"], &[&gone], 0);
}

#[test]
fn a_held_pin_lets_nobody_in_and_can_still_be_shown() {
    let Some(lab) = Lab::new("a_held_pin_lets_nobody_in_and_can_still_be_shown") else { return };
    let file = lab.file("a.img", 2);
    fs::create_dir(lab.fs.outside()).expect("looked at before the pin would make it");
    let mut command = lab.command(&["pin", "--hold", "--json"], &[&file]);
    let held = Held(command.stdout(Stdio::null()).spawn().expect("the binary runs"));
    let started = Instant::now();
    // Not by opening the file: the pin is to prove that nobody has it open.
    while lab.json(&["pins", "--json"], &[], 0)["pins"][0]["extents"].as_u64().unwrap_or(0) == 0 {
        assert!(started.elapsed() < Duration::from_secs(20), "the map is not recorded");
        std::thread::sleep(Duration::from_millis(10));
    }
    File::open(&file).expect_err("the file is guarded");
    assert_eq!(lab.state_of(&file), "guarded");
    let shown = lab.json(&["map", "show", "--json"], &[&file], 0);
    assert_eq!(shown["source"], "stored");
    assert_eq!(lab.json(&["map", "export"], &[&file], 0)["extents"], shown["extents"]);
    assert_eq!(lab.fastice(&["map", "verify"], &[&file]).status.code(), Some(3));
    assert_eq!(
        lab.fastice(&["unpin", "--force"], &[&file]).status.code(),
        Some(3),
        "never under a living process"
    );
    assert_eq!(held.end(), 0);
    assert_eq!(lab.state_of(&file), "immutable");
    assert!(File::open(&file).is_ok());
}

#[test]
fn doctor_finds_pins_that_nothing_keeps() {
    let Some(lab) = Lab::new("doctor_finds_pins_that_nothing_keeps") else { return };
    let file = lab.file("a.img", 1);
    lab.json(&["pin", "--json"], &[&file], 0);
    run(Command::new("chattr").arg("-i").arg(&file));
    let output = lab.fastice(&["doctor", "--json"], &[]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("an array");
    let pins = checks.iter().find(|check| check["id"] == "pins").expect("a check");
    assert_eq!(pins["status"], "warn");
    let remedy = pins["remedy"].as_str().expect("a remedy");
    assert!(remedy.contains(&format!("fastice unpin {}", file.display())), "{remedy}");
}

/// What a command says on standard error that exits with `code`.
fn told(lab: &Lab, args: &[&str], files: &[&Path], code: i32) -> String {
    let output = lab.fastice(args, files);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {told}");
    told
}

#[test]
fn what_became_of_a_file_is_told_by_its_path_after_its_unpin_too() {
    let Some(lab) = Lab::new("events by path") else { return };
    let (file, other) = (lab.file("a.img", 1), lab.file("b.img", 1));
    lab.json(&["pin", "--json"], &[&file, &other], 0);
    lab.json(&["unpin", "--json"], &[&file], 0);
    let all = lab.json(&["pins", "--events", "--json"], &[], 0);
    assert_eq!(all["pins"].as_array().map(Vec::len), Some(1));
    let past = &all["not_pinned"][0];
    assert_eq!(past["path"].as_str(), file.to_str());
    let steps: Vec<_> = past["events"]
        .as_array()
        .expect("events")
        .iter()
        .filter_map(|event| event["step"].as_str())
        .collect();
    assert_eq!(steps, ["pinned", "kept", "unpinned"]);

    let text = lab.fastice(&["pins", "--events"], &[&file]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("a.img: not pinned now") && text.contains("unpinned"), "{text}");
    assert!(!text.contains("b.img"), "only what was asked for: {text}");
    let text = lab.fastice(&["pins"], &[&file]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("not pinned now; --events shows"), "{text:?}");
    assert!(told(&lab, &["pins"], &[&lab.fs.path("never")], 1).contains("is not pinned"));
    lab.json(&["unpin", "--json"], &[&other], 0);
}

#[test]
fn a_damaged_record_is_told_of_by_the_path_of_its_file() {
    let Some(lab) = Lab::new("damaged record") else { return };
    let file = lab.file("a.img", 1);
    lab.json(&["pin", "--json"], &[&file], 0);
    let entries = fs::read_dir(lab.fs.outside()).expect("a directory");
    let mut paths = entries.map(|entry| entry.expect("an entry").path());
    let record = paths.find(|path| path.extension().is_some_and(|it| it == "json")).expect("a record");
    fs::write(&record, "{").expect("room");
    assert_eq!(lab.state_of(&file), "unknown");
    assert!(told(&lab, &["map", "verify"], &[&file], 1).contains("unpin --force"));
    lab.json(&["unpin", "--force", "--json"], &[&file], 0);
    let past = lab.json(&["pins", "--events", "--json"], &[&file], 0);
    let last = past["not_pinned"][0]["events"].as_array().and_then(|events| events.last()).expect("events");
    assert_eq!(last["detail"], "by force: the record was damaged");
    assert!(writable(&file));
}

#[test]
fn a_pin_whose_filesystem_is_not_mounted_is_not_taken_for_a_file_that_is_gone() {
    let Some(lab) = Lab::new("unmounted") else { return };
    let file = lab.file("a.img", 1);
    let mut holder = lab.command(&["pin", "--hold"], &[&file]);
    let mut holder = Held(holder.stdout(Stdio::piped()).spawn().expect("the binary runs"));
    let mut lines = BufReader::new(holder.0.stdout.take().expect("a pipe")).lines();
    assert!(lines.any(|line| line.is_ok_and(|line| line.contains("holding all guards"))));
    run(Command::new("umount").arg("--lazy").arg(lab.fs.root()));
    assert_eq!(lab.state_of(&file), "guarded", "held, and away");
    assert!(told(&lab, &["unpin", "--force"], &[&file], 3).contains("already pinned"));
    assert_eq!(holder.end(), 0);

    assert_eq!(lab.state_of(&file), "unmounted");
    for args in [&["map", "verify"][..], &["unpin"]] {
        let told = told(&lab, args, &[&file], 1);
        assert!(told.contains("not mounted there") && told.contains("mount it"), "{told}");
    }
    let doctor = lab.fastice(&["doctor", "--json"], &[]);
    let doctor: Value = serde_json::from_slice(&doctor.stdout).expect("JSON");
    let checks = doctor["checks"].as_array().expect("an array");
    let pins = checks.iter().find(|check| check["id"] == "pins").expect("the check of pins");
    assert!(!pins.to_string().contains("--force"), "{pins}");
    assert!(pins.to_string().contains("not mounted"), "{pins}");
    run(Command::new("mount").arg(lab.fs.device()).arg(lab.fs.root()));
    assert_eq!(lab.state_of(&file), "immutable");
    lab.json(&["unpin", "--json"], &[&file], 0);
}

#[test]
fn a_copy_of_what_hosts_wrote_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let Some(lab) = Lab::new("mode of a copy") else { return };
    let file = lab.file("a.img", 1);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("our own");
    lab.json(&["pin", "--json"], &[&file], 0);
    let copy = lab.fs.outside().join("copy");
    // Whatever the umask lets through.
    let script = format!("umask 0; exec \"$@\" --output {}", copy.display());
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_fastice"), "read"]).arg(&file);
    run(shell.env("FASTICE_STATE_DIR", lab.fs.outside()));
    let mode = fs::metadata(&copy).expect("the copy").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "{mode:o}");
    let again = told(&lab, &["read", "--output", copy.to_str().expect("text")], &[&file], 1);
    assert!(again.contains("choose another path"), "{again}");
    lab.json(&["unpin", "--json"], &[&file], 0);
}

#[test]
fn who_may_not_look_is_not_told_that_nothing_is_there() {
    use std::os::unix::process::CommandExt as _;
    let Some(lab) = Lab::new("status without permission") else { return };
    let file = lab.file("a.img", 1);
    lab.json(&["pin", "--json"], &[&file], 0);
    let place = tempfile::tempdir().expect("a directory");
    let binary = place.path().join("fastice");
    fs::copy(env!("CARGO_BIN_EXE_fastice"), &binary).expect("room");
    for open in [place.path(), lab.fs.root().parent().expect("a parent")] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(open, mode).expect("our own");
    }
    let is_refused = |args: &[&str]| {
        let mut command = Command::new(&binary);
        command.args(args).env("FASTICE_STATE_DIR", lab.fs.outside()).uid(65534).gid(65534);
        let output = command.output().expect("the binary runs");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(5), "{args:?}: {told}");
        assert!(told.contains("run as root") && output.stdout.is_empty(), "{args:?}: {told}");
    };
    let path = file.to_str().expect("text");
    for args in [&["status"][..], &["pins"], &["pins", path]] {
        is_refused(args);
    }
    // The directory may be looked at, and what is in it not.
    let open = |path: &Path, mode| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("our own");
    };
    open(&lab.fs.outside(), 0o755);
    for entry in fs::read_dir(lab.fs.outside()).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_file() {
            open(&path, 0o600);
        }
    }
    for args in [&["pins"][..], &["pins", path]] {
        is_refused(args);
    }
    lab.json(&["unpin", "--json"], &[&file], 0);
}

#[test]
fn a_pin_is_made_to_its_end_though_nobody_reads_of_it() {
    let Some(lab) = Lab::new("closed output") else { return };
    let files = ["a.img", "b.img"].map(|name| lab.file(name, 1));
    let unread = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = lab.command(args, &[&files[0], &files[1]]);
        let output = command.stdout(writer).stderr(Stdio::piped()).output().expect("the binary runs");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), told.as_str()), (Some(0), ""), "{args:?}");
    };
    for args in [&["pin"][..], &["pin", "--json"]] {
        unread(args);
        for file in &files {
            assert_eq!(lab.state_of(file), "immutable");
            let told = lab.json(&["pins", "--events", "--json"], &[file], 0);
            let events = told["pins"][0]["events"].as_array().expect("events");
            assert_eq!(events.last().expect("an event")["step"], "kept", "{told}");
        }
        unread(&["unpin"]);
        assert!(files.iter().all(|file| writable(file)));
    }
    // What is wrong is told all the same.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = lab.command(&["pins"], &[&lab.fs.path("never")]);
    let status = command.stdout(writer).stderr(Stdio::null()).status().expect("the binary runs");
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_file_that_is_not_there_is_refused_as_one_that_is_not_fit() {
    let Some(lab) = Lab::new("missing files") else { return };
    let (missing, directory) = (lab.fs.path("missing"), lab.fs.path("directory"));
    fs::create_dir(&directory).expect("room");
    for args in [&["pin"][..], &["pin", "--explain"], &["pin", "--prepare"]] {
        for path in [&missing, &directory] {
            told(&lab, args, &[path], 3);
        }
        assert!(told(&lab, args, &[&missing], 3).contains("check the path"));
    }
    told(&lab, &["pin"], &[&lab.file("plain", 1).join("below")], 3);
}

/// A bind mount, gone when dropped.
struct Bound(PathBuf);

impl Bound {
    fn new(from: &Path, to: PathBuf) -> Self {
        run(Command::new("mount").arg("--bind").args([from, &to]));
        Self(to)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = loopfs::unmount(&self.0);
    }
}

#[test]
fn a_pin_is_found_by_whatever_path_leads_to_the_file() {
    let Some(lab) = Lab::new("pins by another path") else { return };
    let (file, other) = (lab.file("a.img", 1), lab.file("b.img", 1));
    let hard = lab.fs.path("hard");
    fs::hard_link(&file, &hard).expect("not pinned yet");
    lab.json(&["pin", "--json"], &[&file, &other], 0);
    let place = tempfile::tempdir().expect("a directory");
    let [by_directory, by_file] = ["directory", "file"].map(|name| place.path().join(name));
    fs::create_dir(&by_directory).expect("room");
    File::create(&by_file).expect("room");
    let _bound = [Bound::new(&lab.fs.root(), by_directory.clone()), Bound::new(&file, by_file.clone())];
    for path in [&file, &hard, &by_directory.join("a.img"), &by_file] {
        let pins = lab.json(&["pins", "--json"], &[path], 0);
        let rows = pins["pins"].as_array().expect("an array");
        let paths: Vec<_> = rows.iter().filter_map(|row| row["path"].as_str()).collect();
        assert_eq!(paths, [file.to_str().expect("text")], "{}", path.display());
    }
    // One that is not there is found by its path, and so is what is known of it by another one.
    run(Command::new("chattr").arg("-i").args([&file, &other]));
    fs::remove_file(&other).expect("not immutable");
    let gone = lab.json(&["pins", "--json"], &[&other], 0);
    assert_eq!(gone["pins"][0]["state"], "missing", "{gone}");
    lab.json(&["unpin", "--force", "--json"], &[&file, &other], 0);
    let past = lab.json(&["pins", "--events", "--json"], &[&hard], 0);
    assert_eq!(past["not_pinned"][0]["path"].as_str(), file.to_str(), "{past}");
}

#[test]
fn several_are_unpinned_by_force_in_one_go() {
    let Some(lab) = Lab::new("force for several") else { return };
    let files = ["a.img", "b.img", "c.img"].map(|name| lab.file(name, 1));
    let paths = files.each_ref().map(PathBuf::as_path);
    lab.json(&["pin", "--json"], &paths, 0);
    run(Command::new("chattr").arg("-i").args([&files[0], &files[1]]));
    fs::remove_file(&files[0]).expect("not immutable");
    run(Command::new("fallocate").args(["-p", "-o", "64KiB", "-l", "64KiB"]).arg(&files[1]));
    let unpinned = lab.json(&["unpin", "--force", "--json"], &paths, 0);
    let all = unpinned["unpinned"].as_array().expect("an array");
    let of = |field: &str| all.iter().map(|one| one[field].clone()).collect::<Vec<_>>();
    assert_eq!(of("forgotten"), [true, false, false], "{unpinned}");
    assert_eq!(of("map_was_true"), [false, false, true], "{unpinned}");
    assert_eq!(lab.json(&["pins", "--json"], &[], 0)["pins"].as_array().map(Vec::len), Some(0));
}
