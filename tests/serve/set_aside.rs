//! A start with files that cannot be served: the others are, and nobody can miss what is not.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fastice::initiator::controller::Controller;
use fastice::units::Lba;
use nvme_spec::Nsid;
use serde_json::Value;

use super::daemon::{FILE_LEN, Lab, PATIENCE, any_port, create, eventually, is_immutable, namespaces};
use super::load::{Load, assert_in_file, connect_options, options};
use super::loopfs::{self, Spec};

/// Three files that were pinned to last: one is as it was, one has moved, one is not there; and one of which nothing is known.
struct Host {
    lab: Lab,
    good: PathBuf,
    moved: PathBuf,
    gone: PathBuf,
    unknown: PathBuf,
}

impl Host {
    fn after_a_reboot(test: &str) -> Option<Self> {
        let lab = Lab::new(test, &Spec::XFS)?;
        let [good, moved, gone] = ["good", "moved", "gone"].map(|name| lab.fragmented(name));
        let unknown = lab.fs.path("unknown");
        lab.fastice(&["pin"], &[&good, &moved, &gone], 0);
        let chattr = |flag: &str, path: &Path| {
            loopfs::run(Command::new("chattr").arg(flag).arg(path)).expect("chattr");
        };
        chattr("-i", &moved);
        let file = OpenOptions::new().read(true).write(true).open(&moved).expect("the flag is gone");
        let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, hole, 1 << 20, 65536).expect("punched");
        fs::write(lab.fs.path("thief"), vec![1; 1 << 20]).expect("room");
        rustix::fs::sync();
        file.write_all_at(&[2; 65536], 1 << 20).expect("room");
        file.sync_all().expect("a disk");
        chattr("-i", &gone);
        fs::rename(&gone, lab.fs.path("elsewhere")).expect("the flag is gone");
        Some(Self { lab, good, moved, gone, unknown })
    }

    /// The files as namespaces 1 to 4.
    fn config(&self, head: &str, address: std::net::SocketAddr) -> PathBuf {
        let files: [&Path; 4] = [&self.good, &self.moved, &self.gone, &self.unknown];
        let all = namespaces(&files).replace("nsid = 3\n", "nsid = 3\non_fence = \"write-protect\"\n");
        self.lab.config(head, address, &format!("allow_any_host = true\n{all}"))
    }

    fn exports(&self) -> Vec<Value> {
        let status = self.lab.json(&["status", "--json"], 0);
        status["targets"][0]["exports"].as_array().cloned().expect("exports")
    }

    fn grants(&self) -> Vec<String> {
        self.exports().iter().map(|it| it["grant"].as_str().expect("a word").to_owned()).collect()
    }
}

fn nguid(host: &Controller, nsid: u32) -> [u8; 16] {
    host.identify_namespace(Nsid(nsid)).expect("it is there").nguid
}

#[test]
fn the_others_are_served_and_what_is_mended_comes_back_under_its_name() {
    let Some(it) = Host::after_a_reboot("a start without some files") else { return };
    let daemon = it.lab.serve(&it.config("", any_port()));
    for word in [
        "SERVING 1 OF 4 NAMESPACES",
        "NOT SERVED: hosts see it fenced",
        "hosts do not see it",
        "pin --resume",
    ] {
        assert!(daemon.log().contains(word), "{word:?} is missing: {}", daemon.log());
    }
    for path in [&it.moved, &it.gone, &it.unknown] {
        assert!(daemon.log().contains(path.to_str().expect("a path")), "{}", daemon.log());
    }
    assert_eq!(it.grants(), ["live", "fenced", "fenced", "hidden"]);
    for export in &it.exports()[1..] {
        assert!(export["problem"].as_str().is_some_and(|why| !why.is_empty()), "{export}");
    }
    let told = it.lab.fastice(&["status"], &[], 0).stdout;
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(told.contains("not served, and held by nobody: the extent map of"), "{told}");
    assert!(told.contains("its file could not be served when the target started"), "{told}");
    assert!(!told.contains("recalled"), "nobody did: {told}");
    assert_eq!(it.exports()[2]["reason"], "not-served");
    let incident = it.lab.incident(&it.moved).expect("it is written down");
    assert_eq!(incident["blocks"][0]["file_offset"], 1 << 20, "{incident}");
    assert!(it.lab.incident(&it.gone).is_some() && it.lab.incident(&it.good).is_none());

    // What hosts see.
    let host = Controller::connect(&connect_options(daemon.address())).expect("a host");
    assert_eq!(host.active_namespaces().expect("a list"), [Nsid(1), Nsid(2), Nsid(3)]);
    let moved = host.namespace(Nsid(2)).expect("it is shown");
    assert_eq!(moved.identify().nsze.get() * 512, FILE_LEN);
    assert!(moved.write(Lba(0), &[7; 4096], true).is_err() && moved.read(Lba(0), &mut [0; 4096]).is_err());
    assert_eq!(host.identify_namespace(Nsid(3)).expect("it is shown").nsattr, 1, "write protected");
    let before = nguid(&host, 2);
    let load = Load::start(options(daemon.address(), 1, 201));

    // One is mended, one comes back, and of the last one somebody makes a file.
    it.lab.fastice(&["pin", "--resume"], &[&it.moved], 0);
    fs::rename(it.lab.fs.path("elsewhere"), &it.gone).expect("back");
    create(&it.unknown).write_all_at(&vec![3; usize::try_from(FILE_LEN).expect("small")], 0).expect("room");
    it.config("", daemon.address());
    daemon.reload("configuration reloaded");
    assert_eq!(it.grants(), ["live"; 4], "{}", daemon.log());
    assert!(it.lab.incident(&it.moved).is_none() && it.lab.incident(&it.gone).is_none());
    assert_eq!(nguid(&host, 2), before, "a host knows it again");
    let loads = [2, 3, 4].map(|nsid| Load::start(options(daemon.address(), nsid, 210 + u64::from(nsid))));
    let ends = loads.map(Load::end_clean).into_iter().chain([load.end_clean()]);
    let ends: Vec<_> = ends.collect();
    daemon.stop();
    for ((_, mut ledger), file) in ends.into_iter().zip([&it.moved, &it.gone, &it.unknown, &it.good]) {
        assert_in_file(&mut ledger, file);
    }
    it.lab.fastice(&["unpin"], &[&it.good, &it.moved, &it.gone], 0);
}

#[test]
fn a_strict_start_fails_and_so_does_one_with_nothing_to_serve() {
    let Some(it) = Host::after_a_reboot("a strict start") else { return };
    let refused = |config: &Path, code| {
        let (status, log) = it.lab.try_serve(config).err().expect("refused");
        assert_eq!(status.code(), Some(code), "{log}");
        assert!(it.lab.incident(&it.moved).is_none(), "nothing is changed: {log}");
        log
    };
    assert!(refused(&it.config("strict = true", any_port()), 4).contains("the extent map of"));
    let output = it.lab.command(&["serve", "--strict", "--config"]).arg(it.config("", any_port())).output();
    assert_eq!(output.expect("the binary runs").status.code(), Some(4));
    let config = it.lab.open_config(any_port(), &[&it.moved, &it.unknown]);
    let log = refused(&config, 4);
    assert!(log.contains("unknown") && log.contains("moved"), "each is told: {log}");
    assert!(log.contains("the target ends; start it again"), "{log}");
    assert!(!log.contains("hosts see") && !log.contains("a reload"), "there is no target to reload: {log}");
    assert!(is_immutable(&it.good));
}

#[test]
fn the_service_manager_is_told_how_many_are_served() {
    let Some(it) = Host::after_a_reboot("a service manager") else { return };
    let socket = it.lab.place("notify.sock");
    let manager = UnixDatagram::bind(&socket).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a patience");
    let hears = || {
        let mut text = [0; 4096];
        let len = manager.recv(&mut text).expect("it is told");
        String::from_utf8_lossy(&text[..len]).into_owned()
    };
    let config = it.config("", any_port());
    let mut serve = it.lab.command(&["serve", "--config"]);
    serve.arg(&config).env("NOTIFY_SOCKET", &socket).stdout(Stdio::null()).stderr(Stdio::null());
    let mut daemon = serve.spawn().expect("the binary runs");
    let told = hears();
    assert!(told.contains("READY=1") && told.contains("STATUS=SERVING 1 OF 4 NAMESPACES"), "{told}");
    it.lab.fastice(&["pin", "--resume"], &[&it.moved], 0);
    let pid = rustix::process::Pid::from_child(&daemon);
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).expect("it lives");
    let told = hears();
    assert!(told.contains("STATUS=SERVING 2 OF 4 NAMESPACES"), "{told}");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it lives");
    assert!(hears().contains("STOPPING=1"));
    eventually("it ends", || daemon.try_wait().expect("a child").is_some());
    manager.set_read_timeout(Some(Duration::from_millis(1))).expect("a patience");
    assert!(manager.recv(&mut [0; 64]).is_err(), "no more than that");
}
