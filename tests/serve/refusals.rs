//! What `serve` refuses: with which status, and in which words.

use std::fs::{self, File, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::daemon::{FILE_LEN, Lab, NQN, any_port, create, is_immutable, namespaces};
use super::load::{Load, assert_in_file, options};
use super::loopfs::{self, Spec};

/// `serve` must end with `code` and say all of `words`; nothing may be left pinned.
fn refused(lab: &Lab, config: &Path, code: i32, words: &[&str]) {
    let (status, log) = lab.try_serve(config).err().expect("refused");
    assert_eq!(status.code(), Some(code), "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} is missing: {log}");
    }
    assert!(lab.pin().is_none(), "{log}");
}

#[test]
fn a_file_in_use_is_refused_and_its_user_named() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("file in use", &spec) else { return };
        let path = lab.fragmented("file");
        let config = lab.open_config(any_port(), &[&path]);
        let mut user = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::from(File::open(&path).expect("the file")))
            .spawn()
            .expect("sleep runs");
        let named = format!("process {} (sleep)", user.id());
        refused(&lab, &config, 3, &[&named, path.to_str().expect("a path")]);
        assert!(!is_immutable(&path));
        user.kill().expect("it sleeps");
        user.wait().expect("it ends");
        lab.serve(&config).stop();
    }
}

#[test]
fn a_congestion_control_that_the_kernel_lacks_is_refused_and_one_that_it_has_serves() {
    let Some(lab) = Lab::new("congestion control", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let config = lab.open_config(any_port(), &[&path]);
    let text = fs::read_to_string(&config).expect("the configuration");
    let choose = |name: &str| {
        let listener = format!("[[listener]]\ncongestion_control = \"{name}\"\n");
        fs::write(&config, text.replace("[[listener]]\n", &listener)).expect("it can be written");
    };
    choose("nosuch");
    let words = ["congestion control `nosuch`", "remedy: ", "modprobe tcp_nosuch"];
    refused(&lab, &config, 2, &words);
    let checked = lab.command(&["serve", "--check", "--config"]).arg(&config).output().expect("it runs");
    let told = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.code() == Some(2) && words.iter().all(|word| told.contains(word)), "{told}");
    choose("reno");
    let daemon = lab.serve(&config);
    let (_, mut ledger) = Load::start(options(daemon.address(), 1, 73)).end_clean();
    choose("nosuch");
    daemon.reload("the configuration stays as it was");
    assert!(words.iter().all(|word| daemon.log().contains(word)), "{}", daemon.log());
    daemon.stop();
    assert_in_file(&mut ledger, &path);
}

#[test]
fn a_host_that_is_not_on_the_list_is_named_in_the_log_but_not_each_time_it_tries() {
    let Some(lab) = Lab::new("stranger", &Spec::XFS) else { return };
    let path = lab.fragmented("file");
    let subsystem = format!("hosts = [\"nqn.2026-11.com.example:friend\"]\n{}", namespaces(&[&path]));
    let daemon = lab.serve(&lab.config("", any_port(), &subsystem));
    let address = daemon.address().to_string();
    let stranger = "nqn.2026-11.com.example:stranger";
    let tries = ["bench", "--address", &address, "--nqn", NQN, "--host-nqn", stranger, "--runtime", "1"];
    let begun = Instant::now();
    let told: Vec<_> = (0..5).map(|_| lab.command(&tries).output().expect("it runs")).collect();
    assert!(told.iter().all(|told| told.status.code() == Some(6)), "{told:?}");
    let log = daemon.stop();
    let refusals: Vec<_> = log.lines().filter(|line| line.contains("connect refused")).collect();
    let [first, ..] = refusals.as_slice() else { panic!("{log}") };
    assert!(first.contains("host not allowed") && first.contains(stranger) && first.contains(NQN), "{first}");
    assert!(refusals.len() as u64 <= begun.elapsed().as_secs() + 1, "one a second: {log}");
}

#[test]
fn holes_and_unwritten_ranges_are_refused_or_filled_when_told_so() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("unfit files", &spec) else { return };
        let (hollow, preallocated) = (lab.fs.path("hollow"), lab.fs.path("preallocated"));
        create(&hollow).set_len(FILE_LEN).expect("a hole");
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(create(&preallocated), flags, 0, FILE_LEN).expect("room");
        for (path, word) in [(&hollow, "hole"), (&preallocated, "unwritten")] {
            let config = lab.open_config(any_port(), &[path]);
            refused(&lab, &config, 3, &[word, "prepare", path.to_str().expect("a path")]);
            assert!(!is_immutable(path));
            let prepared = format!("allow_any_host = true\n{}prepare = true\n", namespaces(&[path]));
            let daemon = lab.serve(&lab.config("", any_port(), &prepared));
            let (_, mut ledger) = Load::start(options(daemon.address(), 1, 71)).end_clean();
            daemon.stop();
            assert_in_file(&mut ledger, path);
        }
    }
}

#[test]
fn addresses_keys_and_files_that_are_wrong_are_named() {
    let Some(lab) = Lab::new("wrong configurations", &Spec::EXT4) else { return };
    let path = lab.fragmented("file");
    let taken = TcpListener::bind(any_port()).expect("a port");
    let address = taken.local_addr().expect("its address");
    refused(&lab, &lab.open_config(address, &[&path]), 1, &[&address.to_string(), "ss -ltnp"]);
    assert!(!is_immutable(&path), "nothing is pinned for a target that cannot listen");

    let all = format!("allow_any_host = true\n{}", namespaces(&[&path]));
    let config = lab.config("colour = 7", any_port(), &all);
    let line =
        fs::read_to_string(&config).expect("it is there").lines().position(|line| line == "colour = 7");
    let line = format!("{}", line.expect("the line") + 1);
    refused(&lab, &config, 2, &["colour", &line, "fastice.toml"]);

    refused(&lab, &lab.open_config(any_port(), &[&lab.fs.path("absent")]), 3, &["absent"]);
    refused(&lab, &lab.place("absent.toml"), 2, &["absent.toml"]);
    // The second file is bad: who is strict has the first let go again.
    let bad = lab.fs.path("bad");
    create(&bad).set_len(FILE_LEN).expect("a hole");
    let both = format!("allow_any_host = true\n{}", namespaces(&[&path, &bad]));
    refused(&lab, &lab.config("strict = true", any_port(), &both), 3, &["bad", "hole"]);
    assert!(!is_immutable(&path));
    fs::OpenOptions::new().write(true).open(&path).expect("writable");
}

#[test]
fn whoever_is_not_root_is_told_so() {
    const TEST: &str = "not root";
    let Some(lab) = Lab::new(TEST, &Spec::XFS) else { return };
    if Command::new("setpriv").arg("--version").output().is_err() {
        return loopfs::skip(TEST, "no setpriv");
    }
    let path = lab.fragmented("file");
    fs::set_permissions(&path, Permissions::from_mode(0o666)).expect("a mode");
    let config = lab.open_config(any_port(), &[&path]);
    let open = |place: &Path, mode| fs::set_permissions(place, Permissions::from_mode(mode)).expect("a mode");
    open(lab.fs.outside().parent().expect("the directory of the lab"), 0o755);
    open(&lab.fs.outside(), 0o777);
    // Where it was built, others may not look.
    let binary = lab.place("fastice");
    fs::copy(env!("CARGO_BIN_EXE_fastice"), &binary).expect("room");
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&binary)
        .args(["serve", "--config"]);
    let output = command.arg(&config).env_remove("RUST_LOG").output().expect("it runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{told}");
    assert!(told.contains("root"), "{told}");
    assert!(!is_immutable(&path));
}

/// Both `serve --check` and `serve` itself must refuse a configuration, with these words.
fn refused_and_foreseen(lab: &Lab, config: &Path, foreseen: &str, refused: &str) {
    let path = config.to_str().expect("text");
    let told = lab.fastice(&["serve", "--check", "--config", path], &[], 3).stderr;
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(told.contains(foreseen) && told.contains("remedy: "), "{told}");
    let (status, log) = lab.try_serve(config).err().expect("it is refused");
    assert_eq!(status.code(), Some(3), "{log}");
    assert!(log.contains(refused), "{log}");
}

#[test]
fn guards_that_cannot_be_had_together_are_foreseen_by_a_check() {
    for spec in [Spec::XFS, Spec::EXT4] {
        let Some(lab) = Lab::new("guards together", &spec) else { return };
        let (first, second) = (lab.fragmented("first"), lab.fragmented("second"));
        let namespace =
            |path: &Path, more: &str| format!("[[subsystem.namespace]]\nfile = {path:?}\n{more}\n");
        let frozen = "guard = \"frozen-filesystem\"";
        let of = |namespaces: &[String]| {
            lab.config(
                "strict = true",
                any_port(),
                &format!("allow_any_host = true\n{}", namespaces.concat()),
            )
        };
        let would_be = "would be frozen for other files";
        let config = of(&[namespace(&first, frozen), namespace(&second, "")]);
        refused_and_foreseen(&lab, &config, would_be, "frozen for files that are pinned with the frozen");
        // The other way round it would wait for ever when it ends.
        let config = of(&[namespace(&second, ""), namespace(&first, frozen)]);
        refused_and_foreseen(&lab, &config, would_be, "pinned without it");
        assert!(!is_immutable(&first) && !is_immutable(&second));

        // What is recorded counts.
        lab.fastice(&["pin"], &[&second], 0);
        let config = of(&[namespace(&first, frozen)]);
        refused_and_foreseen(&lab, &config, "pinned without it", "pinned without it");
        let config = of(&[namespace(&second, "guard = \"read-only-mount\"\non_fence = \"ana\"")]);
        refused_and_foreseen(
            &lab,
            &config,
            "it is pinned with other guards",
            "it is pinned with other guards",
        );
        lab.fastice(&["unpin"], &[&second], 0);
        refused_and_foreseen(&lab, &config, "not mounted read-only", "not mounted read-only");

        let config = of(&[namespace(&first, frozen), namespace(&lab.fs.path("missing"), "")]);
        lab.fastice(&["serve", "--check", "--config", config.to_str().expect("text")], &[], 0);
        let config = of(&[namespace(&first, frozen), namespace(&second, frozen)]);
        let daemon = lab.serve(&config);
        // It is served: what cannot be opened has what it has.
        lab.fastice(&["serve", "--check", "--config", config.to_str().expect("text")], &[], 0);
        daemon.stop();
    }
}
