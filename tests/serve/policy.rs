//! What a host sees of a fence, over a socket, by the policy of the namespace; and that a resume takes it all back.
//!
//! As in `watch`, the target runs in this process, which alone gets past the open-permission mark.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use fastice::config::Config;
use fastice::control::{Running, start};
use fastice::extent::NoProgress;
use fastice::initiator::command;
use fastice::initiator::controller::Controller;
use fastice::units::Lba;
use nvme_spec::log::LogPageId;
use nvme_spec::{Nsid, NvmOpcode, Status};
use rustix::fs::IFlags;

use super::daemon::{FILE_LEN, Lab, any_port, eventually};
use super::load::connect_options;
use super::loopfs::Spec;

const NAMESPACE: Nsid = Nsid(1);
const NAMESPACE_CHANGED: u32 = 0x0004_0002;
const ANA_CHANGED: u32 = 0x000C_0302;

/// A file served by `on_fence`, and a host.
struct Served {
    lab: Lab,
    path: std::path::PathBuf,
    config: Config,
    running: Running,
    host: Controller,
}

impl Served {
    fn new(test: &str, on_fence: &str) -> Option<Self> {
        let lab = Lab::new(test, &Spec::XFS)?;
        let path = lab.fragmented("file");
        let namespace = format!(
            "allow_any_host = true\n[[subsystem.namespace]]\nfile = {path:?}\non_fence = {on_fence:?}\n"
        );
        let config = Config::load(&lab.config("", any_port(), &namespace)).expect("a good configuration");
        let running = start(config.clone(), &mut NoProgress).expect("served");
        let host = Controller::connect(&connect_options(running.addresses()[0])).expect("a host");
        Some(Self { lab, path, config, running, host })
    }

    /// Breaks the pin, so that it stays fenced.
    fn break_pin(&self) {
        clear_immutable(&self.path);
        eventually("the file is let go", || self.lab.incident(&self.path).is_some());
    }

    /// The operator has looked, and takes the file as it is.
    fn resume(&self) {
        self.lab.fastice(&["pin", "--resume"], &[&self.path], 0);
        self.running.reload(self.config.clone()).expect("reloaded");
    }

    /// A status code of one block.
    fn status_of(&self, opcode: NvmOpcode) -> (Status, bool) {
        let sqe = command::io(opcode, NAMESPACE, Lba(1), 0, false);
        let bytes = usize::try_from(self.host.namespace(NAMESPACE).expect("it").identify().nsze.get());
        let block = usize::try_from(FILE_LEN).expect("small") / bytes.expect("small");
        let (mut data_in, data_out) = (vec![0; block], vec![0x5A; block]);
        let completion = match opcode {
            NvmOpcode::READ => self.host.io_raw(0, &sqe, &[], &mut data_in),
            _ => self.host.io_raw(0, &sqe, &data_out, &mut []),
        };
        let status = completion.expect("the connection lives").status;
        (status.code(), status.dnr())
    }

    fn event(&self) -> Option<u32> {
        self.host.next_event(Duration::from_secs(10)).expect("the host lives")
    }

    /// No event comes, nor is one left.
    fn is_quiet(&self) -> bool {
        self.host.next_event(Duration::from_millis(300)).expect("the host lives").is_none()
    }

    fn log(&self, page: LogPageId, len: usize) -> Vec<u8> {
        self.host.get_log_page(page.0, Nsid::ALL, 0, len).expect("a log page")
    }

    fn nsattr(&self) -> u8 {
        self.host.identify_namespace(NAMESPACE).expect("it is there").nsattr
    }
}

fn clear_immutable(path: &Path) {
    let file = File::open(path).expect("we may");
    let flags = rustix::fs::ioctl_getflags(&file).expect("flags");
    rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE).expect("root may");
}

#[test]
fn by_ana_a_host_that_looks_is_told_of_a_path_until_the_resume() {
    let Some(it) = Served::new("fenced by ANA", "ana") else { return };
    let state = || it.log(LogPageId::ANA, 52)[32];
    assert_eq!(it.host.identify_controller().cmic & 0b1000, 0b1000);
    assert_eq!(state(), 1, "optimized");
    for beyond in [36_884, 1 << 20, u64::MAX - 3] {
        assert!(it.host.get_log_page(LogPageId::ANA.0, Nsid::ALL, beyond, 16).is_err(), "{beyond}");
    }
    assert_eq!(it.status_of(NvmOpcode::WRITE), (Status::SUCCESS, false));
    let other = Controller::connect(&connect_options(it.running.addresses()[0])).expect("another host");

    it.break_pin();
    assert_eq!(it.event(), Some(ANA_CHANGED));
    assert_eq!(state(), 3, "inaccessible");
    for opcode in [NvmOpcode::READ, NvmOpcode::WRITE] {
        assert_eq!(it.status_of(opcode), (Status::ANA_INACCESSIBLE, false));
    }
    let sqe = command::io(NvmOpcode::READ, NAMESPACE, Lba(1), 0, false);
    let told = other.io_raw(0, &sqe, &[], &mut [0; 512]).expect("it lives").status;
    assert_eq!(told.code(), Status::NAMESPACE_NOT_READY, "it has not looked");
    assert!(it.is_quiet());

    it.resume();
    let mut events = [it.event(), it.event()];
    events.sort_unstable();
    assert_eq!(events, [Some(NAMESPACE_CHANGED), Some(ANA_CHANGED)]);
    assert_eq!(state(), 1);
    for opcode in [NvmOpcode::READ, NvmOpcode::WRITE] {
        assert_eq!(it.status_of(opcode), (Status::SUCCESS, false));
    }
    it.running.stop(Running::STOP_PATIENCE).expect("an orderly end");
}

#[test]
fn by_write_protection_writes_end_at_once_until_the_resume() {
    let Some(it) = Served::new("fenced by write protection", "write-protect") else { return };
    assert_eq!((it.host.identify_controller().cmic & 0b1000, it.nsattr()), (0, 0));
    assert_eq!(it.status_of(NvmOpcode::WRITE), (Status::SUCCESS, false));

    it.break_pin();
    assert_eq!(it.event(), Some(NAMESPACE_CHANGED));
    it.log(LogPageId::CHANGED_NAMESPACES, 4096);
    assert_eq!(it.nsattr(), 1);
    assert_eq!(it.status_of(NvmOpcode::WRITE), (Status::NAMESPACE_WRITE_PROTECTED, true));
    assert_eq!(it.status_of(NvmOpcode::READ), (Status::NAMESPACE_NOT_READY, false), "never a wrong block");

    it.resume();
    assert_eq!(it.event(), Some(NAMESPACE_CHANGED));
    assert_eq!(it.nsattr(), 0);
    for opcode in [NvmOpcode::READ, NvmOpcode::WRITE] {
        assert_eq!(it.status_of(opcode), (Status::SUCCESS, false));
    }
    it.running.stop(Running::STOP_PATIENCE).expect("an orderly end");
}
