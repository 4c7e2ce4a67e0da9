//! Goal: `pin --explain` tells what this kernel really does with a pin, on XFS with and without shared blocks and on ext4,
//! and leaves nothing behind.
//! Method: filesystems on loop devices made for the test, the binary run on a file of theirs. Needs root.

#[expect(dead_code, reason = "shared with tests that use more of it")]
#[path = "common/loopfs.rs"]
mod loopfs;

#[path = "common/documented.rs"]
mod documented;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use loopfs::{LoopFs, Spec};
use serde_json::Value;

const XFS_NO_REFLINK: Spec = Spec { mkfs: &["-q", "-m", "reflink=0,rmapbt=0"], size_mib: 320, ..Spec::XFS };
const EPERM: i64 = libc::EPERM as i64;

/// A mounted filesystem, and a place for temporary files of the binary that is looked at afterwards.
struct Lab {
    fs: LoopFs,
    temporary: tempfile::TempDir,
}

impl Lab {
    /// `None` after saying why not.
    fn new(test: &str, spec: &Spec) -> Option<Self> {
        let fs = loopfs::make_or_skip(test, &Spec { size_mib: 320, ..spec.clone() })?;
        Some(Self { fs, temporary: tempfile::tempdir().expect("a directory") })
    }

    /// A written file of 1 MiB.
    fn file(&self) -> PathBuf {
        let path = self.fs.path("a.img");
        let file = File::create(&path).expect("a file");
        file.write_all_at(&vec![0x5a; 1 << 20], 0).expect("room");
        file.sync_all().expect("a disk");
        path
    }

    fn command(&self, args: &[&str], file: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastice"));
        command.args(args).arg(file).env("FASTICE_STATE_DIR", self.fs.outside()).env_remove("RUST_LOG");
        command.env("TMPDIR", self.temporary.path());
        command
    }

    /// The document of the one file.
    fn explain(&self, file: &Path) -> Value {
        let output = self.command(&["pin", "--explain", "--json"], file).output().expect("the binary runs");
        document(&output)
    }

    /// The document of the one file, with more options.
    fn explain_with(&self, more: &[&str], file: &Path) -> Value {
        let args = [&["pin", "--explain", "--json"], more].concat();
        document(&self.command(&args, file).output().expect("the binary runs"))
    }

    /// Nothing is left but the file, which is as it was.
    fn assert_clean(&self, file: &Path) {
        let names = |path: &Path| -> Vec<String> {
            let entries = fs::read_dir(path).expect("a directory");
            let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
            let names = entries.map(name).map(|name| name.to_string_lossy().into_owned());
            names.filter(|name| name != "lost+found").collect()
        };
        assert_eq!(names(&self.fs.root()), ["a.img"]);
        assert_eq!(names(self.temporary.path()), Vec::<String>::new());
        assert!(!self.fs.outside().exists(), "looking makes no state directory");
        assert!(File::options().write(true).open(file).is_ok(), "the file is not pinned");
    }
}

fn document(output: &Output) -> Value {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{told}");
    let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (all["explained"].as_array().map(Vec::len), &all["errors"]),
        (Some(1), &serde_json::json!([]))
    );
    all["explained"][0].clone()
}

fn operation<'a>(document: &'a Value, name: &str) -> &'a Value {
    let all = document["operations"].as_array().expect("an array");
    all.iter().find(|operation| operation["name"] == name).unwrap_or_else(|| panic!("no {name}"))
}

/// What is the same everywhere.
fn assert_guarded(document: &Value) {
    let verdict = |name: &str| {
        let operation = operation(document, name);
        (operation["verdict"].clone(), operation["probed"].clone())
    };
    assert_eq!(document["not_probed"], Value::Null);
    for (name, call) in [
        ("open-read", "open"),
        ("open-write", "open"),
        ("truncate", "truncate"),
        ("unlink", "unlink"),
        ("rename", "rename"),
        ("link", "link"),
        ("chmod", "chmod"),
        ("setxattr", "setxattr"),
        ("utimes", "utimensat"),
        ("clone-from", "open"),
        ("clear-flag", "open"),
    ] {
        let tried = operation(document, name);
        assert_eq!(verdict(name), ("refused".into(), true.into()), "{tried}");
        assert_eq!((tried["errno"].as_i64(), tried["call"].as_str()), (Some(EPERM), Some(call)), "{tried}");
    }
    assert_eq!(verdict("opened-before"), ("refused".into(), true.into()));
    let delayed = operation(document, "truncate-unflagged");
    assert_eq!(verdict("truncate-unflagged"), ("delayed".into(), true.into()), "{delayed}");
    assert_eq!((&delayed["by"], &delayed["errno"]), (&"lease".into(), &Value::Null), "{delayed}");
    let attributes = operation(document, "file-setattr");
    if attributes["errno"].as_i64() == Some(libc::ENOSYS.into()) {
        assert_eq!(verdict("file-setattr"), ("impossible".into(), true.into()));
    } else {
        assert_eq!(verdict("file-setattr"), ("detected".into(), true.into()), "{attributes}");
        assert_eq!(attributes["by"], "statx, every 100 ms");
        let after = attributes["noticed_after_ms"].as_f64().expect("it was noticed");
        // The interval, and what a busy machine adds.
        assert!(after < 5000.0, "{after}");
    }
    for name in ["stolen-mapping", "kill", "raw-device", "offline"] {
        assert_eq!(verdict(name), ("out-of-reach".into(), false.into()));
    }
    assert_eq!(verdict("unmount"), ("refused".into(), false.into()));
}

/// What is said of a file that can be pinned, of one block after another.
fn assert_fit(document: &Value, filesystem: &str) {
    assert_eq!((&document["can_be_pinned"], &document["in_the_way"]), (&true.into(), &serde_json::json!([])));
    assert_eq!((&document["filesystem"], &document["size_bytes"]), (&filesystem.into(), &(1 << 20).into()));
    assert!(document["extents"].as_u64().is_some_and(|count| count >= 1));
    assert!(document["mount_options"].as_str().is_some_and(|options| options.contains("rw")));
    let watch = &document["watch"];
    let number = |name: &str| watch[name].as_f64().expect("a number");
    assert_eq!(number("quick_interval_ms"), 100.0);
    assert!(number("interval_ms") >= 100.0 && number("cost_us") > 0.0, "{watch}");
    // Twice the interval and the grace of a busy host.
    assert!((number("bound_ms") - 2.0 * number("interval_ms") - 2000.0).abs() < 0.1, "{watch}");
}

#[test]
fn on_xfs_clones_are_refused_and_one_that_gets_past_is_seen_in_the_map() {
    let test = "on_xfs_clones_are_refused_and_one_that_gets_past_is_seen_in_the_map";
    let Some(lab) = Lab::new(test, &Spec::XFS) else { return };
    let file = lab.file();
    let document = lab.explain(&file);
    let all = serde_json::json!({ "explained": [document], "errors": [] });
    let values = ["none", "closed", "open", "unknown", "name", "message", "remedy"];
    documented::assert_documented("pin --explain", &[], &[&all], &values);
    assert_fit(&document, "xfs");
    assert_guarded(&document);
    assert_eq!((&document["reflink"], &document["shared_hole"]), (&true.into(), &"closed".into()));
    let clone = operation(&document, "clone-within");
    assert_eq!((&clone["verdict"], &clone["probed"]), (&"detected".into(), &true.into()), "{clone}");
    assert_eq!(clone["by"], "FIEMAP, at the watch interval");
    lab.assert_clean(&file);

    let text = lab.command(&["pin", "--explain"], &file).output().expect("the binary runs");
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    for part in [
        "can be pinned now",
        "refused",
        "delayed",
        "detected",
        "out-of-reach",
        "not probed",
        "EPERM from open",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    lab.assert_clean(&file);
}

#[test]
fn without_shared_blocks_there_is_no_clone() {
    for (name, spec) in [("xfs", XFS_NO_REFLINK), ("ext4", Spec::EXT4)] {
        let test = format!("without_shared_blocks_there_is_no_clone ({name})");
        let Some(lab) = Lab::new(&test, &spec) else { return };
        let file = lab.file();
        let document = lab.explain(&file);
        assert_fit(&document, name);
        assert_guarded(&document);
        assert_eq!((&document["reflink"], &document["shared_hole"]), (&false.into(), &"none".into()));
        assert_eq!(operation(&document, "clone-within")["verdict"], "impossible");
        lab.assert_clean(&file);
    }
}

#[test]
fn what_is_in_the_way_of_a_pin_is_told_and_the_rest_still_tried() {
    let Some(lab) = Lab::new("what_is_in_the_way_of_a_pin_is_told_and_the_rest_still_tried", &Spec::EXT4)
    else {
        return;
    };
    let file = lab.file();
    let user = File::options().write(true).open(&file).expect("the file");
    user.set_len((1 << 20) + (64 << 10)).expect("room");
    let document = lab.explain(&file);
    assert_guarded(&document);
    assert_eq!(document["can_be_pinned"], false);
    let all = document["in_the_way"].as_array().expect("an array");
    let names: Vec<_> = all.iter().filter_map(|obstacle| obstacle["name"].as_str()).collect();
    assert_eq!(names, ["hole", "in-use"]);
    let told = all[1]["message"].as_str().expect("a text");
    assert!(told.contains(&std::process::id().to_string()), "{told}");
    drop(user);
    lab.assert_clean(&file);
}

#[test]
fn who_may_not_pin_is_told_what_is_known() {
    let Some(lab) = Lab::new("who_may_not_pin_is_told_what_is_known", &Spec::XFS) else { return };
    let file = lab.file();
    let open_to_all = |path: &Path| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("our own directory");
    };
    [lab.fs.root().parent().expect("a parent"), &lab.fs.root(), &file, lab.temporary.path()]
        .into_iter()
        .for_each(open_to_all);
    // The binary may lie where only root gets to.
    let binary = lab.temporary.path().join("fastice");
    fs::copy(env!("CARGO_BIN_EXE_fastice"), &binary).expect("room");
    let mut command = Command::new(&binary);
    command.args(["pin", "--explain", "--json"]).arg(&file).env("FASTICE_STATE_DIR", lab.fs.outside());
    command.env("TMPDIR", lab.temporary.path()).uid(65534).gid(65534);
    let output = command.output().expect("the binary runs");
    fs::remove_file(&binary).expect("our own");
    let document = document(&output);
    let why = document["not_probed"].as_str().expect("a reason");
    assert!(why.contains("root"), "{why}");
    assert_eq!((&document["reflink"], &document["shared_hole"]), (&true.into(), &"unknown".into()));
    let all = document["operations"].as_array().expect("an array");
    assert!(all.iter().all(|operation| operation["probed"] == false));
    assert_eq!(operation(&document, "open-read")["verdict"], "refused");
    lab.assert_clean(&file);
}

#[test]
fn of_a_guarded_file_it_tells_who_guards_it() {
    let Some(lab) = Lab::new("of_a_guarded_file_it_tells_who_guards_it", &Spec::XFS) else { return };
    let file = lab.file();
    let mut command = lab.command(&["pin", "--hold"], &file);
    let mut holder = command.stdout(Stdio::piped()).spawn().expect("the binary runs");
    // What it says last, when all guards are held.
    let mut lines = BufReader::new(holder.stdout.take().expect("a pipe")).lines();
    let held = lines.any(|line| line.is_ok_and(|line| line.contains("holding all guards")));
    assert!(held, "it ended without holding the file");
    let document = lab.explain(&file);
    let pid = rustix::process::Pid::from_child(&holder);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    assert_eq!(holder.wait().expect("our child").code(), Some(0));
    assert_guarded(&document);
    assert_eq!((&document["can_be_pinned"], &document["size_bytes"]), (&false.into(), &Value::Null));
    let told = &document["in_the_way"][0];
    assert_eq!(told["name"], "pinned");
    let by = format!("process {}", pid.as_raw_nonzero());
    assert!(told["message"].as_str().is_some_and(|message| message.contains(&by)), "{told}");
    let undone = lab.command(&["unpin"], &file).status().expect("the binary runs");
    assert_eq!(undone.code(), Some(0));
    fs::remove_dir_all(lab.fs.outside()).expect("our own");
    lab.assert_clean(&file);
}

#[test]
fn ctrl_c_leaves_nothing_behind() {
    let Some(lab) = Lab::new("ctrl_c_leaves_nothing_behind", &Spec::XFS) else { return };
    let file = lab.file();
    let mut command = lab.command(&["pin", "--explain", "--json"], &file);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the binary runs");
    let started = Instant::now();
    // Its records are the last thing that it makes before it pins.
    while fs::read_dir(lab.temporary.path()).expect("a directory").count() == 0 {
        assert!(started.elapsed() < Duration::from_secs(20), "it does not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    let code = child.wait().expect("our child").code();
    let output = child.wait_with_output().expect("its output");
    assert_eq!(code, Some(1));
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(told["explained"][0]["not_probed"], "it was interrupted");
    lab.assert_clean(&file);
}

#[test]
fn with_the_swap_file_guard_no_descriptor_from_before_is_let_through() {
    for (name, spec) in [("xfs", Spec::XFS), ("ext4", Spec::EXT4)] {
        let Some(lab) = Lab::new("with_the_swap_file_guard_no_descriptor_is_let_through", &spec) else {
            return;
        };
        let file = lab.file();
        // Somebody has it open, which is in the way of the default guards only.
        let user = File::options().write(true).open(&file).expect("the file");
        let explain = || {
            let args = ["pin", "--explain", "--guard", "swap-file", "--json"];
            document(&lab.command(&args, &file).output().expect("the binary runs"))
        };
        let told = explain();
        assert_eq!(
            (&told["can_be_pinned"], &told["in_the_way"][0]["name"]),
            (&false.into(), &"guard".into())
        );
        user.write_all_at(&[0; 8192], 0).expect("in place");
        user.sync_all().expect("a disk");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&file, mode).expect("our own");
        let document = explain();
        assert_fit(&document, name);
        assert_eq!((&document["guard"], &document["not_probed"]), (&"swap-file".into(), &Value::Null));
        for (operation_name, call, errno) in [
            ("open-write", "open", libc::EPERM),
            ("unlink", "unlink", libc::EPERM),
            ("swapoff", "swapoff", libc::EPERM),
            ("truncate-unflagged", "truncate", libc::ETXTBSY),
        ] {
            let tried = operation(&document, operation_name);
            assert_eq!((&tried["verdict"], &tried["probed"]), (&"refused".into(), &true.into()), "{tried}");
            let told = (tried["call"].as_str(), tried["errno"].as_i64());
            assert_eq!(told, (Some(call), Some(errno.into())), "{tried}");
        }
        let before = operation(&document, "opened-before");
        assert_eq!(
            (&before["verdict"], &before["call"]),
            (&"refused".into(), &"ftruncate".into()),
            "{before}"
        );
        let within = operation(&document, "clone-within");
        let expected = if name == "xfs" { ("refused", "swap area") } else { ("impossible", "") };
        assert_eq!(
            (within["verdict"].as_str(), within["by"].as_str().unwrap_or("")),
            (Some(expected.0), expected.1)
        );
        let swaps = fs::read_to_string("/proc/swaps").expect("it is there");
        assert!(!swaps.contains(lab.fs.root().to_str().expect("plain")), "{swaps}");
        drop(user);
        lab.assert_clean(&file);
    }
}

/// Of each operation: verdict, errno (0: none), and by what.
fn assert_verdicts(document: &Value, expected: &[(&str, &str, i32, &str)]) {
    assert_eq!(document["not_probed"], Value::Null);
    for (name, verdict, errno, by) in expected {
        let told = operation(document, name);
        let found = (told["verdict"].as_str(), told["errno"].as_i64().unwrap_or(0), told["probed"].as_bool());
        assert_eq!(found, (Some(*verdict), i64::from(*errno), Some(true)), "{told}");
        assert_eq!(told["by"].as_str().unwrap_or(""), *by, "{told}");
    }
}

#[test]
fn a_frozen_filesystem_is_tried_on_one_of_its_own_and_holds_changes_off() {
    for (name, spec) in [("xfs", Spec::XFS), ("ext4", Spec::EXT4)] {
        let test = format!("a_frozen_filesystem_is_tried_on_one_of_its_own ({name})");
        let Some(lab) = Lab::new(&test, &spec) else { return };
        let file = lab.file();
        let document = lab.explain_with(&["--guard", "frozen-filesystem"], &file);
        let (frozen, mark) = ("frozen filesystem", "open-permission mark");
        assert_verdicts(
            &document,
            &[
                ("open-read", "refused", libc::EPERM, mark),
                ("open-write", "refused", libc::EPERM, "open-permission mark, immutable flag"),
                ("truncate", "refused", libc::EPERM, "immutable flag"),
                ("clear-flag", "refused", libc::EPERM, mark),
                ("opened-before", "refused", 0, "write lease at the pin"),
                ("unmount", "refused", libc::EBUSY, frozen),
                ("truncate-unflagged", "delayed", 0, frozen),
                ("write-elsewhere", "delayed", 0, frozen),
                ("thaw", "detected", 0, "FIFREEZE, every 100 ms"),
            ],
        );
        // What becomes of these when it is thawed is a race with the end of the pin.
        for name in ["unlink", "rename", "link", "chmod", "setxattr", "utimes"] {
            let told = operation(&document, name);
            assert_eq!((&told["verdict"], &told["by"]), (&"delayed".into(), &frozen.into()), "{told}");
        }
        let within = operation(&document, "clone-within");
        assert_eq!(within["verdict"], if name == "xfs" { "delayed" } else { "impossible" }, "{within}");
        assert_eq!(document["reflink"], name == "xfs");
        // Its own filesystem was never frozen.
        File::create(lab.fs.path("still")).expect("it can be written");
        fs::remove_file(lab.fs.path("still")).expect("ours");
        lab.assert_clean(&file);
    }
}

#[test]
fn a_read_only_mount_is_tried_on_one_of_its_own_and_refuses_changes() {
    for (name, spec) in [("xfs", Spec::XFS), ("ext4", Spec::EXT4)] {
        let test = format!("a_read_only_mount_is_tried_on_one_of_its_own ({name})");
        let Some(lab) = Lab::new(&test, &spec) else { return };
        let file = lab.file();
        let document = lab.explain_with(&["--guard", "read-only-mount"], &file);
        assert_eq!(document["can_be_pinned"], false, "it is mounted read-write");
        let read_only = "read-only filesystem";
        let mut expected = vec![
            ("open-read", "refused", libc::EPERM, "open-permission mark"),
            ("open-write", "refused", libc::EROFS, "open-permission mark, read-only filesystem"),
            ("clear-flag", "refused", libc::EPERM, "open-permission mark"),
            ("opened-before", "refused", libc::EBUSY, read_only),
            ("unmount", "refused", libc::EBUSY, ""),
            ("remount", "detected", 0, "/proc/self/mountinfo, every 100 ms"),
        ];
        expected.extend(
            ["truncate", "unlink", "rename", "link", "chmod", "setxattr", "utimes"]
                .map(|name| (name, "refused", libc::EROFS, read_only)),
        );
        assert_verdicts(&document, &expected);
        lab.assert_clean(&file);
    }
}

#[test]
fn readers_are_let_in_where_nothing_but_reading_comes_of_it() {
    {
        let Some(lab) = Lab::new("readers_are_let_in", &Spec::EXT4) else { return };
        let file = lab.file();
        let document = lab.explain_with(&["--local-readers", "allow"], &file);
        assert_fit(&document, "ext4");
        assert_eq!(document["local_readers"], "allow");
        assert_verdicts(
            &document,
            &[
                ("open-read", "allowed", 0, ""),
                ("open-write", "refused", libc::EPERM, "immutable flag"),
                ("truncate", "refused", libc::EPERM, "immutable flag"),
                ("clone-from", "impossible", libc::EOPNOTSUPP, ""),
                ("clear-flag", "detected", 0, "statx, every 100 ms"),
                ("opened-before", "refused", 0, "write lease at the pin"),
                ("truncate-unflagged", "delayed", 0, "lease"),
            ],
        );
        lab.assert_clean(&file);
    }
    // On XFS only where the swap area forbids clones.
    let Some(lab) = Lab::new("readers_are_refused_where_they_could_clone", &Spec::XFS) else { return };
    let file = lab.file();
    let document = lab.explain_with(&["--local-readers", "allow"], &file);
    let refused = &document["in_the_way"][0];
    assert_eq!((&document["can_be_pinned"], &refused["name"]), (&false.into(), &"guard".into()));
    assert!(refused["message"].as_str().is_some_and(|told| told.contains("reflink")), "{refused}");
    assert_eq!(document["shared_hole"], "unknown");
    let document = lab.explain_with(&["--local-readers", "allow", "--guard", "swap-file"], &file);
    assert_verdicts(
        &document,
        &[
            ("open-read", "allowed", 0, ""),
            ("clone-from", "refused", libc::ETXTBSY, "swap area"),
            ("clone-within", "refused", libc::ETXTBSY, "swap area"),
            ("clear-flag", "detected", 0, "statx, every 100 ms"),
            ("swapoff", "refused", libc::EPERM, "immutable flag"),
        ],
    );
    assert_eq!(document["shared_hole"], "closed");
    lab.assert_clean(&file);
}

#[test]
fn a_loop_device_is_warned_of_once() {
    let Some(lab) = Lab::new("a_loop_device_is_warned_of_once", &Spec::XFS) else { return };
    let file = lab.file();
    let args = ["pin", "--explain", "--guard", "swap-file", "--json"];
    let output = lab.command(&args, &file).output().expect("the binary runs");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(told.matches("on a loop device").count(), 1, "{told}");
    assert!(!told.contains(".fastice-explain"), "what scratch files are called says nothing: {told}");
    lab.assert_clean(&file);
}

#[test]
fn on_a_read_only_filesystem_no_clone_is_told_of_as_if_one_could_be_made() {
    let Some(lab) = Lab::new("explained read-only", &Spec::XFS) else { return };
    let file = lab.file();
    let remount = |how: &str| loopfs::run(Command::new("mount").args(["-o", how]).arg(lab.fs.root()));
    remount("remount,ro").expect("nobody writes");
    let output = lab.command(&["pin", "--explain", "--guard", "read-only-mount"], &file).output();
    let output = output.expect("the binary runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("can be pinned now"), "{text}");
    let clone = text.lines().find(|line| line.starts_with("FICLONE from it")).expect("the operation");
    assert!(clone.contains("read-only filesystem") && !clone.contains("immutable flag"), "{clone}");
    remount("remount,rw").expect("root may");
    lab.assert_clean(&file);
}

#[test]
fn what_is_no_file_is_said_to_be_none() {
    let Some(lab) = Lab::new("explained directory", &Spec::EXT4) else { return };
    let file = lab.file();
    let output = lab.command(&["pin", "--explain"], &lab.fs.root()).output().expect("the binary runs");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{told}");
    assert!(told.contains("it is a directory") && told.contains("name a regular file"), "{told}");
    lab.assert_clean(&file);
}
