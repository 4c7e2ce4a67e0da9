//! Files served by our own NVMe driver, on its model over the loop device that carries the filesystem.
//!
//! The daemon reaches the model as an operator would configure it. Loss, return and lies of a device are told to a target
//! in this process, whose way to the model the test holds in its hand.

use std::fs::{self, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nvme::access::Access;
use async_nvme::{VfioUserAccess, VfioUserOptions};
use fastice::block::nvme::{NvmeWay, Reach, ReachError, Reached};
use fastice::config::Config;
use fastice::control::{DiskError, Running, ServeError, start_reaching};
use fastice::extent::{Mismatch, NoProgress};
use fastice::initiator::bench::BenchOptions;
use fastice::initiator::controller::Controller;
use nvme_model::vfio_user::{Server, ServerOptions, ServerThread};
use nvme_model::{Backing, ControllerOptions, Model, ModelThread, NamespaceOptions, Subsystem};
use nvme_spec::log::LogPageId;

use super::daemon::{FILE_LEN, Lab, any_port, eventually, is_immutable};
use super::load::{Load, assert_in_file, connect_options, options, units_in_file};
use super::loopfs::{self, Spec};

const XFS_4096: Spec = Spec { sector_bytes: 4096, ..Spec::XFS };
const EXT4_PARTITION: Spec = Spec { partition_start: Some(8192), ..Spec::EXT4 };

/// A fragmented file whose blocks differ from each other.
fn telling(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.fragmented(name);
    let file = OpenOptions::new().write(true).open(&path).expect("the file");
    for at in (0..FILE_LEN).step_by(4096) {
        file.write_all_at(&at.to_le_bytes(), at).expect("a disk");
    }
    file.sync_all().expect("a disk");
    path
}

#[test]
fn what_hosts_write_by_the_driver_is_in_the_file() {
    for spec in [Spec::XFS, EXT4_PARTITION, XFS_4096] {
        let Some(lab) = Lab::new("serving by our driver", &spec) else { return };
        let files = [telling(&lab, "one"), telling(&lab, "two")];
        let daemon = lab.serve(&lab.nvme_config(any_port(), &[&files[0], &files[1]]));
        let loads = [1, 2].map(|nsid| Load::start(options(daemon.address(), nsid, u64::from(nsid))));
        loads.iter().for_each(|load| load.reaches(600));
        let ends = loads.map(Load::end_clean);
        let log = daemon.stop();
        assert_eq!(log.matches("the device is the one under the file").count(), 2, "{log}");
        for ((report, mut ledger), file) in ends.into_iter().zip(&files) {
            assert_eq!(report.reconnects, 0, "{report:?}");
            assert_in_file(&mut ledger, file);
            assert!(!is_immutable(file));
        }
    }
}

#[test]
fn a_controller_that_does_not_have_the_disk_is_refused() {
    let Some(lab) = Lab::new("another disk", &Spec::XFS) else { return };
    let file = lab.fragmented("file");
    let other = lab.place("other.img");
    fs::File::create(&other).and_then(|file| file.set_len(512 << 20)).expect("room");
    let text = fs::read_to_string(lab.nvme_config(any_port(), &[&file])).expect("the configuration");
    let device = format!("{:?}", lab.fs.device());
    for (controller, words) in [
        (
            format!("{other:?}"),
            ["no controller of [[nvme]] has the disk loop", "nothing that could be compared"],
        ),
        (
            "\"/nowhere\"".to_owned(),
            ["no controller of [[nvme]] has the disk loop", "cannot stand on /nowhere"],
        ),
    ] {
        let config = lab.place("other.toml");
        fs::write(&config, text.replace(&format!("model = {device}"), &format!("model = {controller}")))
            .expect("a configuration");
        let (status, log) = lab.try_serve(&config).err().expect("refused");
        assert_eq!(status.code(), Some(3), "{log}");
        for word in words {
            assert!(log.contains(word), "{word:?} is missing: {log}");
        }
        assert!(lab.pin().is_none() && !is_immutable(&file), "{log}");
    }
}

/// The identity of the model's first namespace, as an operator vouches for it.
const VOUCHED: &str = "nguid = \"fa571ce0-0000-0000-0000-000000000001\"";

/// A model over the disk of a lab that is reached by a socket, as in another process.
struct OtherProcess {
    socket: PathBuf,
    _serves: ServerThread,
}

impl OtherProcess {
    fn serving(lab: &Lab) -> Self {
        let socket = lab.place("nvme.sock");
        let (model, _) = model_over(Path::new(lab.fs.device()));
        let server = Server::bind(&socket, model, ServerOptions::default()).expect("a socket");
        Self { socket, _serves: server.spawn().expect("a thread") }
    }

    /// A configuration that serves `file` by it, with `identity` beside the way to it.
    fn config(&self, lab: &Lab, file: &Path, identity: &str) -> PathBuf {
        let text = fs::read_to_string(lab.nvme_config(any_port(), &[file])).expect("the configuration");
        let model = format!("model = {:?}", lab.fs.device());
        let config = lab.place("vfio-user.toml");
        let way = format!("vfio_user = {:?}\n{identity}", self.socket);
        fs::write(&config, text.replace(&model, &way)).expect("a configuration");
        config
    }
}

#[test]
fn a_controller_in_another_process_is_driven_where_the_operator_vouches_for_it() {
    let Some(lab) = Lab::new("vfio-user", &Spec::XFS) else { return };
    let file = telling(&lab, "file");
    let other = OtherProcess::serving(&lab);
    // The loop device has no identifiers, so nothing says that the namespace is that disk.
    let (status, log) = lab.try_serve(&other.config(&lab, &file, "")).err().expect("refused");
    assert_eq!(status.code(), Some(3), "{log}");
    assert!(log.contains("name its nguid"), "{log}");
    let daemon = lab.serve(&other.config(&lab, &file, VOUCHED));
    let load = Load::start(options(daemon.address(), 1, 121));
    load.reaches(600);
    let (_, mut ledger) = load.end_clean();
    let log = daemon.stop();
    assert!(log.contains("the word of the configuration"), "{log}");
    assert_in_file(&mut ledger, &file);
}

#[test]
fn after_a_kill_the_controller_is_stilled_before_the_file_is_let_go() {
    let Some(lab) = Lab::new("kill -9 with vfio-user", &Spec::XFS) else { return };
    let file = telling(&lab, "file");
    let other = OtherProcess::serving(&lab);
    let config = other.config(&lab, &file, VOUCHED);
    let daemon = lab.serve(&config);
    let load = Load::start(options(daemon.address(), 1, 131));
    load.reaches(300);
    assert_eq!(lists_of_controllers(&lab), 1);
    daemon.kill();
    // Somebody else gets hold of the controller before it was disabled: the file stays as it is.
    let mut somebody = None;
    eventually("the server has let go of the daemon", || {
        somebody = VfioUserAccess::connect(&other.socket, &VfioUserOptions::default()).ok();
        somebody.is_some()
    });
    let told = lab.fastice(&["unpin"], &[&file], 3).stderr;
    let told = String::from_utf8_lossy(&told);
    assert!(
        told.contains("which is gone, drove vfio-user ") && told.contains("end whoever uses it"),
        "{told}"
    );
    assert!(is_immutable(&file));
    drop(somebody);
    lab.fastice(&["unpin"], &[&file], 0);
    assert!(!is_immutable(&file));
    assert_eq!(lists_of_controllers(&lab), 0);
    let (_, mut ledger) = load.end_clean();
    assert_in_file(&mut ledger, &file);
    // In order, nothing is left to do.
    let daemon = lab.serve(&config);
    assert_eq!(lists_of_controllers(&lab), 1);
    daemon.stop();
    assert_eq!(lists_of_controllers(&lab), 0);
}

fn lists_of_controllers(lab: &Lab) -> usize {
    lab.marks_of_processes("places")
}

/// A place where a test plugs models in and pulls them out.
pub(crate) struct Slot {
    plugged: Mutex<Arc<Model>>,
    is_there: AtomicBool,
    stands_on: (u32, u32),
}

impl Reach for Slot {
    fn reach(&self, way: &NvmeWay) -> Result<Reached, ReachError> {
        if !self.is_there.load(Ordering::Acquire) {
            return Err(ReachError::Absent { way: way.clone() });
        }
        let access: Arc<dyn Access> = self.plugged.lock().expect("no panic").clone();
        Ok(Reached { access, stands_on: Some(self.stands_on) })
    }

    fn list(&self) -> Vec<NvmeWay> {
        vec![NvmeWay::Model("the slot".into())]
    }
}

/// A model over a block device or image, that runs. All of them have the same identity, and so seem to be one device.
pub(crate) fn model_over(path: &Path) -> (Arc<Model>, ModelThread) {
    model_with(path, ControllerOptions::default())
}

fn model_with(path: &Path, options: ControllerOptions) -> (Arc<Model>, ModelThread) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("the device");
    let subsystem = Subsystem::new("SLOT");
    let memory = NamespaceOptions::memory(1, 9, (512 << 20) / 512);
    subsystem
        .add_namespace(NamespaceOptions { backing: Backing::File(file), ..memory })
        .expect("a namespace");
    let model = subsystem.controller(options);
    let thread = model.spawn().expect("a thread");
    (model, thread)
}

impl Slot {
    /// Whatever is plugged in says that it is the loop device of the lab.
    pub(crate) fn holding(model: &Arc<Model>, lab: &Lab) -> Arc<Self> {
        let number = fs::metadata(lab.fs.device()).expect("the loop device").rdev();
        let stands_on = (rustix::fs::major(number), rustix::fs::minor(number));
        Arc::new(Self { plugged: Mutex::new(model.clone()), is_there: AtomicBool::new(true), stands_on })
    }

    fn pull(&self) {
        self.is_there.store(false, Ordering::Release);
        self.plugged.lock().expect("no panic").vanish();
    }

    fn plug(&self, model: &Arc<Model>) {
        model.plug_in();
        *self.plugged.lock().expect("no panic") = model.clone();
        self.is_there.store(true, Ordering::Release);
    }
}

pub(crate) fn serve_in_process(lab: &Lab, slot: &Arc<Slot>, files: &[&Path]) -> Result<Running, ServeError> {
    let config = Config::load(&lab.nvme_config(any_port(), files)).expect("a good configuration");
    start_reaching(config, slot.clone(), &mut NoProgress)
}

fn address(running: &Running) -> SocketAddr {
    running.addresses()[0]
}

#[test]
fn a_queue_pair_a_core_is_enough_and_fewer_are_explained() {
    let Some(lab) = Lab::new("few queue pairs", &Spec::XFS) else { return };
    let file = telling(&lab, "file");
    for io_queues_max in [2, 1] {
        let options = ControllerOptions { io_queues_max, ..ControllerOptions::default() };
        let (model, _thread) = model_with(Path::new(lab.fs.device()), options);
        let slot = Slot::holding(&model, &lab);
        match serve_in_process(&lab, &slot, &[&file]) {
            Ok(running) => {
                assert_eq!(io_queues_max, 2);
                let load = Load::start(options_of(&running, 141));
                load.reaches(300);
                let (_, mut ledger) = load.end_clean();
                running.stop(Running::STOP_PATIENCE).expect("an orderly end");
                assert_in_file(&mut ledger, &file);
            }
            Err(ServeError::Device { source, .. }) => {
                assert!(matches!(*source, DiskError::QueuePairs { grants: 1, needs: 2, .. }), "{source}");
                assert_eq!(
                    source.remedy().as_deref(),
                    Some("set cores = 1, or serve fewer of its namespaces")
                );
                assert_eq!(io_queues_max, 1);
            }
            Err(error) => panic!("{error:?}"),
        }
        assert!(!is_immutable(&file));
    }
}

fn options_of(running: &Running, seed: u64) -> BenchOptions {
    options(address(running), 1, seed)
}

#[test]
fn an_identity_without_a_place_finds_its_controller() {
    let Some(lab) = Lab::new("by identity", &Spec::XFS) else { return };
    let file = telling(&lab, "file");
    let (model, _thread) = model_over(Path::new(lab.fs.device()));
    let slot = Slot::holding(&model, &lab);
    let path = lab.nvme_config(any_port(), &[&file]);
    let text = fs::read_to_string(&path).expect("the configuration");
    let serve = |identity: &str| {
        fs::write(&path, text.replace(&format!("model = {:?}", lab.fs.device()), identity)).expect("room");
        start_reaching(Config::load(&path).expect("a good configuration"), slot.clone(), &mut NoProgress)
    };
    let running = serve("serial = \"SLOT\"\nnsid = 1").expect("found");
    running.stop(Running::STOP_PATIENCE).expect("an orderly end");
    match serve("serial = \"OTHER\"").err() {
        Some(ServeError::Device { source, .. }) => {
            assert!(source.to_string().contains("another serial than the configuration says"), "{source}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_that_lies_is_refused_before_anything_is_written_to_it() {
    let Some(lab) = Lab::new("a lying device", &Spec::XFS) else { return };
    let file = lab.fragmented("file");
    // A copy of the disk, equal in all but the contents of the file; and a disk without any filesystem.
    let (copy, blank) = (lab.place("copy.img"), lab.place("blank.img"));
    rustix::fs::sync();
    fs::copy(lab.fs.root().with_file_name("image"), &copy).expect("room");
    fs::File::create(&blank).and_then(|blank| blank.set_len(512 << 20)).expect("room");
    let direct = OpenOptions::new().write(true).open(&file).expect("the file");
    direct.write_all_at(&vec![0xA5; usize::try_from(FILE_LEN).expect("small")], 0).expect("room");
    direct.sync_all().expect("a disk");
    drop(direct);
    for (path, is_expected) in [
        (&copy, (|why| matches!(why, Mismatch::OtherBytes { .. })) as fn(&Mismatch) -> bool),
        (&blank, |why| matches!(why, Mismatch::NoSuperblock { .. })),
    ] {
        let before = fs::read(path).expect("the image");
        let (model, _thread) = model_over(path);
        let slot = Slot::holding(&model, &lab);
        match serve_in_process(&lab, &slot, &[&file]) {
            Err(ServeError::Device { source, .. }) => match *source {
                DiskError::Mismatch { source, .. } => assert!(is_expected(&source), "{source}"),
                other => panic!("{other:?}"),
            },
            Err(error) => panic!("{error:?}"),
            Ok(_) => panic!("served"),
        }
        assert!(lab.pin().is_none() && !is_immutable(&file));
        assert!(fs::read(path).expect("the image") == before, "the device was written to");
    }
}

#[test]
fn a_lost_device_fences_its_exports_and_serves_them_again_when_it_is_back() {
    let Some(lab) = Lab::new("loss and return", &Spec::XFS) else { return };
    let files = [lab.fragmented("one"), lab.fragmented("two")];
    let (model, _thread) = model_over(Path::new(lab.fs.device()));
    let slot = Slot::holding(&model, &lab);
    let running = serve_in_process(&lab, &slot, &[&files[0], &files[1]]).expect("served");
    let host = Controller::connect(&connect_options(address(&running))).expect("a host");
    let is_ready = || {
        let cns = nvme_spec::identify::Cns::INDEPENDENT_NAMESPACE;
        host.identify_raw(cns, nvme_spec::Nsid(1), 0).expect("an answer")[14] == 1
    };
    // Reading the list of changed namespaces lets the next event come.
    let told = || {
        let event = host.next_event(Duration::from_secs(10)).expect("the host lives");
        let list = host.get_log_page(LogPageId::CHANGED_NAMESPACES.0, nvme_spec::Nsid(u32::MAX), 0, 4096);
        event.is_some() && list.is_ok_and(|list| list[..4] == [1, 0, 0, 0])
    };
    assert!(is_ready());
    for round in 0..2 {
        let load = Load::start(BenchOptions { reconnect: None, ..options(address(&running), 1, 81 + round) });
        load.goes_on();
        load.goes_on();
        slot.pull();
        eventually("the export is fenced", || !is_ready());
        assert!(told(), "the loss is told to the hosts");
        load.is_refused();
        let (report, mut ledger) = load.end().expect("the connection lives");
        assert!(report.errors > 0 && report.verify.faults == 0, "{report:?}");
        let cat = loopfs::run(Command::new("cat").arg(&files[0]));
        assert!(cat.expect_err("the file stays pinned").contains("not permitted"));
        // This process pins the file, and so may look at it.
        assert!(units_in_file(&mut ledger, &files[0]) > 0);

        slot.plug(&model);
        eventually("the export is served again", is_ready);
        assert!(told(), "and that is told");
        let again = Load::start(options(address(&running), 2, 91 + round));
        let (report, _) = again.end_clean();
        assert_eq!(report.reconnects, 0, "{report:?}");
    }
    host.shutdown().expect("the host goes");
    running.stop(Running::STOP_PATIENCE).expect("an orderly end");
    assert!(!is_immutable(&files[0]));
}

#[test]
fn another_device_in_place_of_a_lost_one_is_never_served() {
    let Some(lab) = Lab::new("exchange", &Spec::XFS) else { return };
    let file = lab.fragmented("file");
    let copy = lab.place("copy.img");
    rustix::fs::sync();
    fs::copy(lab.fs.root().with_file_name("image"), &copy).expect("room");
    let (impostor, _impostor_runs) = model_over(&copy);
    let (model, _thread) = model_over(Path::new(lab.fs.device()));
    let slot = Slot::holding(&model, &lab);
    let running = serve_in_process(&lab, &slot, &[&file]).expect("served");
    let load = Load::start(options(address(&running), 1, 99));
    load.goes_on();
    let (_, mut ledger) = load.end_clean();
    let before = fs::read(&copy).expect("the image");
    slot.pull();
    slot.plug(&impostor);
    eventually("the impostor is looked at", || impostor.commands_done() > 0);
    std::thread::sleep(Duration::from_millis(1500));
    let refused = Load::begin(BenchOptions { reconnect: None, ..options(address(&running), 1, 100) });
    refused.is_refused();
    let (report, _) = refused.end().expect("the connection lives");
    assert!(report.errors > 0 && report.writes.commands == 0, "{report:?}");
    running.stop(Running::STOP_PATIENCE).expect("an orderly end");
    assert!(fs::read(&copy).expect("the image") == before, "the impostor was written to");
    assert!(units_in_file(&mut ledger, &file) > 0);
}

#[test]
fn a_reset_under_load_is_no_error_to_any_host() {
    let Some(lab) = Lab::new("resets under load", &Spec::XFS) else { return };
    let file = lab.fragmented("file");
    let (model, _thread) = model_over(Path::new(lab.fs.device()));
    let slot = Slot::holding(&model, &lab);
    let running = serve_in_process(&lab, &slot, &[&file]).expect("served");
    let load = Load::start(BenchOptions { reconnect: None, ..options(address(&running), 1, 111) });
    for _ in 0..2 {
        model.fail();
        load.goes_on();
        load.goes_on();
    }
    let (report, mut ledger) = load.end_clean();
    assert_eq!(report.errors, 0, "{report:?}");
    running.stop(Running::STOP_PATIENCE).expect("an orderly end");
    assert_in_file(&mut ledger, &file);
}
