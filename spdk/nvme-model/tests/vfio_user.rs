//! Goal: the driver drives a model in another thread or process as it drives one beside it, and a server that dies or
//! a client that vanishes costs nobody more than an error. Method: the real driver, the real server, a real socket.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nvme::{
    Access, Arm, Clock, Controller, Done, IoError, IoQueue, Op, OpKind, Options, State, SystemClock,
    VfioUserAccess, VfioUserOptions, block_on,
};
use hugepage_alloc::{BufferPool, DmaBuf, DmaRegion, RegionOptions};
use nvme_model::vfio_user::{Server, ServerOptions, ServerThread};
use nvme_model::{ControllerOptions, Model, NamespaceOptions, Subsystem};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

const WRITE: OpKind = OpKind::Write { fua: false };

fn shared() -> RegionOptions {
    RegionOptions { share: true, ..RegionOptions::ordinary() }
}

/// A server in a thread of this process.
struct InThread {
    model: Arc<Model>,
    server: Option<ServerThread>,
    path: PathBuf,
    _directory: TempDir,
}

impl InThread {
    fn new(options: ServerOptions) -> Self {
        let subsystem = Subsystem::new("SOCKET01");
        subsystem.add_namespace(NamespaceOptions::memory(1, 9, 4096)).unwrap();
        let model =
            subsystem.controller(ControllerOptions { io_queues_max: 4, ..ControllerOptions::default() });
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nvme.sock");
        let server = Server::bind(&path, model.clone(), options).unwrap().spawn().unwrap();
        Self { model, server: Some(server), path, _directory: directory }
    }
}

/// A server in a process of its own.
struct InProcess {
    child: Child,
    path: PathBuf,
    directory: TempDir,
}

impl InProcess {
    fn new(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nvme.sock");
        let child = Self::start(&path, arguments);
        Self { child, path, directory }
    }

    fn start(path: &Path, arguments: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nvme-model-server"));
        let mut child =
            command.arg("--socket").arg(path).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("listening at"), "{line}");
        child
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A driver at the other end.
struct Rig {
    access: Arc<VfioUserAccess>,
    clock: Arc<SystemClock>,
    controller: Controller,
    pool: BufferPool,
}

impl Rig {
    fn connect(path: &Path) -> Self {
        Self::with(path, &VfioUserOptions::default(), Options::default())
    }

    fn with(path: &Path, options: &VfioUserOptions, driver: Options) -> Self {
        let access = Arc::new(VfioUserAccess::connect(path, options).unwrap());
        let clock = Arc::new(SystemClock::default());
        let mut controller = Controller::new(access.clone(), driver, clock.clone()).unwrap();
        block_on(controller.ready(), std::thread::yield_now).unwrap();
        let pool = BufferPool::with_options(8 << 20, &shared()).unwrap();
        Self { access, clock, controller, pool }
    }

    fn queue(&mut self, depth: u16) -> IoQueue {
        let queue = self.controller.queue_ticket(1, depth).unwrap().open(&self.pool).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while !queue.is_ready() {
            assert!(Instant::now() < end, "{:?}", self.controller.state());
            self.controller.poll();
            std::thread::yield_now();
        }
        queue
    }

    fn collect(&mut self, queue: &mut IoQueue) -> Vec<Done> {
        let mut done = Vec::with_capacity(256);
        let end = Instant::now() + Duration::from_secs(30);
        while queue.outstanding() > 0 {
            assert!(Instant::now() < end, "{} of {:?}", queue.outstanding(), self.controller.state());
            queue.ring();
            self.controller.poll();
            queue.poll(self.clock.now(), 64, &mut done);
            std::thread::yield_now();
        }
        done
    }

    fn run(&mut self, queue: &mut IoQueue, op: Op) -> Result<u32, IoError> {
        queue.submit(op).unwrap();
        self.collect(queue).remove(0).result
    }

    fn filled(&self, len: usize, byte: u8) -> DmaBuf {
        let buf = self.pool.alloc(u32::try_from(len).unwrap()).unwrap();
        buf.write_from(0, &vec![byte; len]);
        buf
    }

    /// Blocks of 512 bytes, each of its own kind, written and read back by one batch each.
    fn write_and_read_back(&mut self, queue: &mut IoQueue, rounds: u8) {
        for round in 0..rounds {
            for kind in [WRITE, OpKind::Read] {
                for block in 0..32u8 {
                    let fill = if kind == WRITE { block ^ round } else { 0xEE };
                    let buf = Some(self.filled(8 * 512, fill));
                    let op = Op { token: block.into(), kind, lba: u64::from(block) * 8, blocks: 8, buf };
                    queue.submit(op).unwrap();
                }
                let done = self.collect(queue);
                assert_eq!(done.len(), 32);
                for ended in done {
                    assert_eq!(ended.result, Ok(0));
                    let mut bytes = vec![0; 8 * 512];
                    ended.buf.unwrap().read_into(0, &mut bytes);
                    let token = u8::try_from(ended.token).unwrap();
                    assert!(bytes.iter().all(|&byte| byte == token ^ round), "{kind:?} {token}");
                }
            }
        }
    }
}

#[test]
fn the_driver_works_across_the_socket_with_either_kind_of_doorbells() {
    for mapped_doorbells in [false, true] {
        let server = InThread::new(ServerOptions { mapped_doorbells, ..ServerOptions::default() });
        let mut rig = Rig::connect(&server.path);
        assert_eq!(rig.access.has_mapped_doorbells(), mapped_doorbells);
        assert_eq!(rig.controller.info().serial, "SOCKET01");
        let mut queue = rig.queue(32);
        rig.write_and_read_back(&mut queue, 8);
        let large = rig.filled(1 << 20, 0x5A);
        assert_eq!(
            rig.run(&mut queue, Op { token: 1, kind: WRITE, lba: 1, blocks: 2048, buf: Some(large) }),
            Ok(0)
        );
        let read = rig.filled(512, 0);
        let op = Op { token: 2, kind: OpKind::Read, lba: 2048, blocks: 1, buf: Some(read.clone()) };
        assert_eq!(rig.run(&mut queue, op), Ok(0));
        let mut bytes = [0; 512];
        read.read_into(0, &mut bytes);
        assert_eq!(bytes, [0x5A; 512]);
        drop(queue);
        block_on(rig.controller.shutdown(), std::thread::yield_now).unwrap();
    }
}

#[test]
fn a_driver_that_sleeps_is_woken_across_the_socket() {
    for mapped_doorbells in [false, true] {
        let server = InThread::new(ServerOptions { mapped_doorbells, ..ServerOptions::default() });
        let mut rig = Rig::connect(&server.path);
        assert!(rig.access.interrupts_max() > 1);
        let ticket = rig.controller.queue_ticket(1, 4).unwrap().with_interrupt().unwrap();
        let mut queue = ticket.open(&rig.pool).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while !queue.is_ready() {
            assert!(Instant::now() < end);
            rig.controller.poll();
            queue.poll(rig.clock.now(), 4, &mut Vec::with_capacity(4));
        }
        for token in 0..20 {
            let op = Op { token, kind: OpKind::Read, lba: token, blocks: 1, buf: Some(rig.filled(512, 1)) };
            queue.submit(op).unwrap();
            queue.ring();
            let mut done = Vec::with_capacity(4);
            while done.is_empty() {
                if matches!(queue.arm().unwrap(), Arm::Sleep { .. }) {
                    let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
                    let bell = queue.interrupt().unwrap();
                    let ready = poll(&mut [PollFd::from_borrowed_fd(bell, PollFlags::IN)], Some(&timeout));
                    assert_eq!(ready, Ok(1), "nobody rang");
                }
                queue.disarm();
                queue.poll(rig.clock.now(), 4, &mut done);
            }
            assert_eq!((done[0].token, done[0].result), (token, Ok(0)));
        }
    }
}

#[test]
fn configuration_space_is_that_of_an_nvme_function() {
    let server = InThread::new(ServerOptions::default());
    let access = VfioUserAccess::connect(&server.path, &VfioUserOptions::default()).unwrap();
    assert_eq!(access.config_read32(0).unwrap(), server.model.config_read32(0).unwrap());
    assert_eq!(access.config_read32(8).unwrap() >> 8, 0x01_08_02);
    assert_eq!(access.config_read32(4).unwrap() & 0b110, 0b110, "memory space and bus master are on");
    assert!(access.config_read32(2).is_err() && access.config_read32(4096).is_err());
    assert_eq!(access.bar_len(), server.model.bar_len());
    let end = u32::try_from(access.bar_len()).unwrap();
    assert_eq!(
        (access.read32(end), access.read32(u32::MAX), access.read32(2)),
        (u32::MAX, u32::MAX, u32::MAX)
    );
    access.write32(end, 1);
    assert_eq!(access.read64(0), server.model.read64(0), "and the connection still stands");
}

#[test]
fn memory_that_is_not_shared_is_refused_with_the_reason() {
    let server = InThread::new(ServerOptions::default());
    let access = VfioUserAccess::connect(&server.path, &VfioUserOptions::default()).unwrap();
    let region = DmaRegion::with_options(1, &RegionOptions::ordinary()).unwrap();
    let error = access.dma_map(&region).unwrap_err().to_string();
    assert!(error.contains("RegionOptions::share"), "{error}");
    let region = DmaRegion::with_options(1, &shared()).unwrap();
    let mapping = access.dma_map(&region).unwrap();
    assert_ne!(mapping.iova(0).unwrap().0, 0);
    access.dma_unmap(&mapping).unwrap();
    assert!(access.dma_unmap(&mapping).is_err(), "twice");
}

#[test]
fn a_revoked_server_reaches_nothing_until_it_is_restored() {
    let server = InThread::new(ServerOptions::default());
    let driver = Options { io_timeout: Duration::from_millis(300), ..Options::default() };
    let mut rig = Rig::with(&server.path, &VfioUserOptions::default(), driver);
    let mut queue = rig.queue(4);
    rig.access.dma_revoke().unwrap();
    let buf = rig.filled(512, 0x11);
    queue.submit(Op { token: 1, kind: OpKind::Read, lba: 0, blocks: 1, buf: Some(buf.clone()) }).unwrap();
    queue.ring();
    // The model cannot fetch the command and fails; the driver resets it once it is let back.
    let end = Instant::now() + Duration::from_secs(10);
    while server.model.read32(0x1C) & 2 == 0 {
        assert!(Instant::now() < end, "the model went on without memory");
        std::thread::yield_now();
    }
    let mut bytes = [0; 512];
    buf.read_into(0, &mut bytes);
    assert_eq!(bytes, [0x11; 512]);
    rig.access.dma_restore().unwrap();
    let done = rig.collect(&mut queue);
    assert!(matches!(done[0].result, Err(IoError::Reset { .. })), "{:?}", done[0].result);
    let end = Instant::now() + Duration::from_secs(10);
    while !queue.is_ready() {
        assert!(Instant::now() < end, "{:?}", rig.controller.state());
        rig.controller.poll();
        queue.poll(rig.clock.now(), 4, &mut Vec::with_capacity(4));
    }
    let mut second = rig.queue(32);
    rig.write_and_read_back(&mut second, 1);
}

#[test]
fn a_reset_by_the_socket_resets_the_model() {
    let server = InThread::new(ServerOptions::default());
    let rig = Rig::connect(&server.path);
    assert_eq!(server.model.read32(0x1C) & 1, 1);
    rig.access.function_reset().unwrap();
    assert_eq!((server.model.read32(0x14), server.model.read32(0x1C)), (0, 0));
    assert_eq!(rig.access.config_read32(4).unwrap() & 0b100, 0b100, "still a bus master");
}

#[test]
fn one_client_after_another_is_served_and_leaves_nothing() {
    let server = InThread::new(ServerOptions::default());
    for _ in 0..3 {
        let mut rig = Rig::connect(&server.path);
        let mut queue = rig.queue(32);
        rig.write_and_read_back(&mut queue, 1);
        let second = VfioUserAccess::connect(&server.path, &VfioUserOptions::default());
        assert!(second.is_err(), "one at a time");
        drop((queue, rig));
        let end = Instant::now() + Duration::from_secs(10);
        while server.model.read32(0x14) != 0 {
            assert!(Instant::now() < end, "the model was not reset behind its client");
            std::thread::yield_now();
        }
    }
}

#[test]
fn two_processes_do_what_one_does() {
    for more in [&[][..], &["--message-doorbells"]] {
        let arguments = [&["--size", "2M", "--block-size", "512", "--queues", "4"], more].concat();
        let server = InProcess::new(&arguments);
        let mut rig = Rig::connect(&server.path);
        let mut queue = rig.queue(32);
        rig.write_and_read_back(&mut queue, 4);
    }
}

#[test]
fn an_image_holds_what_was_written_through_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let server = InProcess::new(&["--image", image.to_str().unwrap(), "--block-size", "4096"]);
    let mut rig = Rig::connect(&server.path);
    assert_eq!(rig.controller.namespaces()[0].blocks, 256);
    let mut queue = rig.queue(4);
    let op = Op { token: 1, kind: WRITE, lba: 3, blocks: 1, buf: Some(rig.filled(4096, 0x77)) };
    assert_eq!(rig.run(&mut queue, op), Ok(0));
    assert_eq!(
        rig.run(&mut queue, Op { token: 2, kind: OpKind::Flush, lba: 0, blocks: 0, buf: None }),
        Ok(0)
    );
    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes[3 * 4096..4 * 4096].iter().all(|&byte| byte == 0x77));
    assert!(bytes[..3 * 4096].iter().all(|&byte| byte == 0));
}

#[test]
fn a_server_that_dies_under_io_is_a_device_that_is_gone() {
    let mut server = InProcess::new(&["--size", "2M", "--block-size", "512"]);
    let mut rig = Rig::connect(&server.path);
    let mut queue = rig.queue(64);
    for token in 0..32 {
        let buf = Some(rig.filled(4096, 1));
        queue.submit(Op { token, kind: OpKind::Read, lba: token * 8, blocks: 8, buf }).unwrap();
    }
    server.kill();
    let done = rig.collect(&mut queue);
    assert_eq!(done.len(), 32, "every operation ends");
    // Its process has ended, so every buffer is ours again.
    assert!(
        done.iter().all(|done| done.result == Err(IoError::Gone) && done.buf.is_some()),
        "{:?}",
        done[0].result
    );
    assert_eq!(rig.controller.state(), State::Removed);
    assert_eq!((rig.access.read32(0), rig.access.read64(0x1000)), (u32::MAX, u64::MAX));
    rig.access.dma_revoke().unwrap();
    assert!(rig.access.dma_restore().is_err() && rig.access.function_reset().is_err());
    assert!(rig.access.config_read32(0).is_err());
    drop((queue, rig));

    // What it left behind is no hindrance to the next.
    assert!(server.path.exists());
    server.child = InProcess::start(&server.path, &["--size", "2M", "--block-size", "512"]);
    let mut rig = Rig::connect(&server.path);
    let mut queue = rig.queue(32);
    rig.write_and_read_back(&mut queue, 1);
    assert!(server.directory.path().exists());
}

#[test]
fn a_server_that_hangs_is_given_up_but_its_memory_is_not_reused() {
    let server = InProcess::new(&["--size", "2M", "--block-size", "512"]);
    let options = VfioUserOptions { message_deadline: Duration::from_secs(1) };
    let mut rig = Rig::with(&server.path, &options, Options::default());
    let mut queue = rig.queue(4);
    let pid = rustix::process::Pid::from_child(&server.child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    queue
        .submit(Op { token: 1, kind: OpKind::Read, lba: 0, blocks: 1, buf: Some(rig.filled(512, 1)) })
        .unwrap();
    queue.ring();
    let end = Instant::now() + Duration::from_secs(20);
    while !matches!(rig.controller.state(), State::Removed | State::Failed) {
        assert!(Instant::now() < end, "{:?}", rig.controller.state());
        rig.controller.poll();
    }
    assert_eq!(rig.access.read32(0), u32::MAX);
    let error = rig.access.dma_revoke().unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("may still write"), "{source}");
    // When it has ended, nothing is left to fear.
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while rig.access.dma_revoke().is_err() {
        assert!(Instant::now() < end, "its end was not seen");
        std::thread::yield_now();
    }
}

#[test]
fn a_server_in_this_process_that_ends_leaves_memory_in_doubt() {
    let mut server = InThread::new(ServerOptions::default());
    let mut rig = Rig::connect(&server.path);
    let _queue = rig.queue(4);
    server.server = None;
    assert_eq!(rig.access.read32(0x1C), u32::MAX);
    assert!(rig.access.dma_revoke().is_err(), "its process, which is ours, has not ended");
}

#[test]
fn a_socket_in_use_is_not_taken_over() {
    let server = InThread::new(ServerOptions::default());
    let error = Server::bind(&server.path, server.model.clone(), ServerOptions::default()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    let nobody = server.path.with_file_name("nobody.sock");
    let error = VfioUserAccess::connect(&nobody, &VfioUserOptions::default()).unwrap_err();
    assert!(error.to_string().contains("nobody.sock"), "{error}");
}
