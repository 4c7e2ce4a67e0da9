//! What `Access` promises, tried on a real controller through a real kernel. It only reads.
//!
//! Without the PCI address of a controller bound to vfio-pci in `ASYNC_NVME_VFIO` it is skipped: it takes the
//! controller from whoever else might want it.

use std::error::Error as _;
use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nvme::vfio::{OpenError, PciAddress, Sysfs, Vfio, VfioOptions};
use async_nvme::{
    Access, AccessError, Clock, Controller, Done, IoError, IoQueue, Op, OpKind, Options, State, SystemClock,
    block_on,
};
use hugepage_alloc::{BufferPool, DmaBuf, DmaRegion, PoolOptions};
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;

const NAME: &str = "a_real_controller_keeps_to_what_access_promises";
/// Says to a child that it shall be killed while it reads.
const DIE: &str = "ASYNC_NVME_VFIO_DIE";
const CAP: u32 = 0;
const CSTS: u32 = 0x1C;

/// A controller and a queue of its first usable namespace.
struct Rig {
    access: Arc<Vfio>,
    controller: Controller,
    queue: IoQueue,
    pool: BufferPool,
    clock: Arc<SystemClock>,
    block_len: u32,
}

impl Rig {
    fn new(address: PciAddress) -> Self {
        Self::on(Arc::new(Vfio::open(address, &VfioOptions::default()).unwrap()))
    }

    fn on(access: Arc<Vfio>) -> Self {
        let clock = Arc::new(SystemClock::default());
        let mut controller = Controller::new(access.clone(), Options::default(), clock.clone()).unwrap();
        block_on(controller.ready(), std::hint::spin_loop).unwrap();
        let pool = BufferPool::new(&PoolOptions { bytes: 4 << 20, ..PoolOptions::default() }).unwrap();
        let usable = controller.namespaces().iter().find(|one| one.refusal.is_none()).cloned().unwrap();
        let mut queue = controller.queue_ticket(usable.nsid, 64).unwrap().open(&pool).unwrap();
        block_on(controller.until(|_| queue.is_ready()), std::hint::spin_loop).unwrap();
        let block_len = usable.block_len();
        assert!(queue.outstanding() == 0 && usable.blocks >= 64);
        queue.ring();
        Self { access, controller, queue, pool, clock, block_len }
    }

    /// Submits reads of one block each into buffers of 0xA5; clones of the buffers.
    fn submit(&mut self, count: u64) -> Vec<DmaBuf> {
        let submit = |token| {
            let buf = self.pool.alloc(self.block_len).unwrap();
            buf.write_from(0, &vec![0xA5; self.block_len as usize]);
            let op = Op { token, kind: OpKind::Read, lba: token, blocks: 1, buf: Some(buf.clone()) };
            self.queue.submit(op).unwrap();
            buf
        };
        let buffers = (0..count).map(submit).collect();
        self.queue.ring();
        buffers
    }

    /// Polls the queue alone, for so long or until nothing is open.
    fn poll_for(&mut self, time: Duration) -> Vec<Done> {
        let (start, mut done) = (Instant::now(), Vec::with_capacity(64));
        while start.elapsed() < time && self.queue.outstanding() > 0 {
            self.queue.poll(self.clock.now(), 64, &mut done);
            std::thread::yield_now();
        }
        done
    }

    fn reads_work(&mut self) {
        self.submit(32);
        let done = self.poll_for(Duration::from_secs(5));
        assert_eq!(done.len(), 32, "CSTS {:#x}, {:?}", self.access.read32(CSTS), self.queue.stats());
        assert!(done.iter().all(|one| one.result.is_ok()), "{done:?}");
    }
}

fn is_untouched(buf: &DmaBuf) -> bool {
    let mut bytes = vec![0; buf.len()];
    buf.read_into(0, &mut bytes);
    bytes.iter().all(|&byte| byte == 0xA5)
}

#[test]
fn a_real_controller_keeps_to_what_access_promises() {
    let Ok(address) = std::env::var("ASYNC_NVME_VFIO") else {
        eprintln!("SKIPPED: {NAME}: ASYNC_NVME_VFIO names no controller");
        return;
    };
    let address = address.parse().unwrap();
    if std::env::var_os(DIE).is_some() {
        die(address);
    }
    registers_and_configuration_space(address);
    one_opening_only(address);
    interrupts(address);
    content(address);
    cutting_off(address);
    left_running(address);
    wanted_back(address);
    memory_limit(address);
}

fn registers_and_configuration_space(address: PciAddress) {
    let function = Sysfs::default().function(address).unwrap();
    let access = Vfio::open(address, &VfioOptions::default()).unwrap();
    assert_eq!(access.name(), address.to_string());
    assert_eq!(access.config_read32(0).unwrap() & 0xFFFF, u32::from(function.vendor));
    assert_eq!(access.config_read32(8).unwrap() >> 8, function.class);
    let cap = access.read64(CAP);
    assert_eq!(cap, u64::from(access.read32(CAP)) | u64::from(access.read32(CAP + 4)) << 32);
    assert!(cap != 0 && cap != u64::MAX);
    assert_eq!(access.read32(u32::try_from(access.bar_len()).unwrap()), u32::MAX);
    access.function_reset().unwrap();
    assert_eq!(access.read64(CAP), cap, "answers after a reset");
    assert_eq!(access.read32(CSTS) & 1, 0);
    assert!(!access.is_gone());
    eprintln!("registers, configuration space, reset: as promised");
}

fn one_opening_only(address: PciAddress) {
    let first = Vfio::open(address, &VfioOptions::default()).unwrap();
    let error = Vfio::open(address, &VfioOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Busy { .. }), "{error}");
    drop(first);
    eprintln!("second opening: {error}");
}

/// The admin completion queue has vector 0 and its interrupts are always on. QEMU signals only queues that were made
/// after the first vector was attached.
fn interrupts(address: PciAddress) {
    let access = Arc::new(Vfio::open(address, &VfioOptions::default()).unwrap());
    let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let taken = || rustix::io::read(&signal, &mut [0; 8]).is_ok();
    access.interrupt_attach(0, signal.as_fd()).unwrap();
    let mut rig = Rig::on(access);
    let command_signals = |rig: &mut Rig, wait: Duration| {
        std::thread::sleep(Duration::from_millis(20));
        let _ = taken();
        block_on(rig.controller.smart(), std::hint::spin_loop).unwrap();
        let start = Instant::now();
        while start.elapsed() < wait {
            if taken() {
                return true;
            }
            std::thread::yield_now();
        }
        false
    };
    assert!(command_signals(&mut rig, Duration::from_secs(2)), "no interrupt came");
    rig.access.interrupt_detach(0).unwrap();
    assert!(!command_signals(&mut rig, Duration::from_millis(100)), "the vector is masked");
    rig.access.interrupt_attach(0, signal.as_fd()).unwrap();
    assert!(command_signals(&mut rig, Duration::from_secs(2)), "no interrupt came again");
    rig.access.function_reset().unwrap();
    let last = rig.access.interrupts_max();
    let error = rig.access.interrupt_attach(last, signal.as_fd()).unwrap_err();
    assert!(matches!(error, AccessError::NoSuch { .. }), "{error}");
    eprintln!("{last} interrupt vectors; attached, detached, attached again: as promised");
}

/// The first blocks hold what the file says that `ASYNC_NVME_VFIO_CONTENT` names.
fn content(address: PciAddress) {
    let Some(path) = std::env::var_os("ASYNC_NVME_VFIO_CONTENT") else {
        eprintln!("SKIPPED: content: ASYNC_NVME_VFIO_CONTENT names no file");
        return;
    };
    let expected = std::fs::read(path).unwrap();
    let mut rig = Rig::new(address);
    let blocks = 60.min(expected.len() / rig.block_len as usize);
    let buffers = rig.submit(blocks as u64);
    assert_eq!(rig.poll_for(Duration::from_secs(5)).len(), blocks);
    let mut block = vec![0; rig.block_len as usize];
    for (buf, expected) in buffers.iter().zip(expected.chunks_exact(block.len())) {
        buf.read_into(0, &mut block);
        assert_eq!(block, expected);
    }
    eprintln!("{blocks} blocks of {} bytes hold what the file holds", block.len());
}

fn cutting_off(address: PciAddress) {
    let mut rig = Rig::new(address);
    rig.reads_work();
    rig.submit(32);
    rig.access.dma_revoke().unwrap();
    // What was completed before is seen now; from here on nothing may come.
    let before = rig.poll_for(Duration::from_millis(200)).len();
    let buffers = rig.submit(16);
    assert!(rig.poll_for(Duration::from_millis(300)).is_empty(), "a completion reached memory");
    assert!(buffers.iter().all(is_untouched), "data reached memory");
    rig.access.dma_restore().unwrap();
    // The controller could not fetch its commands, and says so; the driver resets it.
    rig.controller.reset();
    let start = Instant::now();
    let mut done = Vec::with_capacity(64);
    while !(rig.controller.state() == State::Ready && rig.queue.is_ready()) {
        rig.controller.poll();
        rig.queue.poll(rig.clock.now(), 64, &mut done);
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", rig.controller.state());
    }
    assert_eq!(before + done.len(), 48);
    assert!(done.iter().all(|one| matches!(one.result, Err(IoError::Reset { .. }))), "{done:?}");
    rig.reads_work();
    eprintln!(
        "cut off with 32 reads open: {before} had ended, 16 more did nothing; restored, and reads work"
    );
}

/// A user that is killed while the controller works, and the next one.
fn left_running(address: PciAddress) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    let status = child.args(["--exact", NAME]).env(DIE, "1").status().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    Rig::new(address).reads_work();
    eprintln!("a process was killed with reads open, and the next one works");
}

fn die(address: PciAddress) {
    let mut rig = Rig::new(address);
    rig.submit(64);
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
}

/// The host unbinds the function while it is in use, and gets it.
fn wanted_back(address: PciAddress) {
    let driver = "/sys/bus/pci/drivers/vfio-pci";
    let mut rig = Rig::new(address);
    rig.submit(32);
    let unbind = std::thread::spawn(move || std::fs::write(format!("{driver}/unbind"), address.to_string()));
    let start = Instant::now();
    while rig.controller.poll() != State::Removed {
        assert!(start.elapsed() < Duration::from_secs(5), "nobody said that it is wanted back");
    }
    assert!(rig.access.is_gone() && !unbind.is_finished());
    let noticed = start.elapsed();
    let ended = rig.poll_for(Duration::from_secs(1));
    assert!(ended.iter().all(|one| matches!(one.result, Ok(_) | Err(IoError::Gone))), "{ended:?}");
    drop(rig);
    unbind.join().unwrap().unwrap();
    eprintln!(
        "unbound while in use: noticed after {} ms, let go after {} ms",
        ms(noticed),
        ms(start.elapsed())
    );
    assert!(matches!(Vfio::open(address, &VfioOptions::default()), Err(OpenError::NotBound { .. })));
    std::fs::write(format!("{driver}/bind"), address.to_string()).unwrap();
    Rig::new(address).reads_work();
}

const fn ms(time: Duration) -> u128 {
    time.as_millis()
}

/// Last, for what it gives up is not got back.
fn memory_limit(address: PciAddress) {
    let access = Vfio::open(address, &VfioOptions::default()).unwrap();
    let region = DmaRegion::map(4 << 20, false, false).unwrap();
    access.dma_unmap(&access.dma_map(&region).unwrap()).unwrap();
    let limit = Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
    rustix::process::setrlimit(Resource::Memlock, limit).unwrap();
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    rustix::thread::set_capabilities(None, sets).unwrap();
    let error = access.dma_map(&region).unwrap_err();
    let why = error.source().unwrap().to_string();
    assert!(why.contains("4096 KiB more") && why.contains("limit on locked memory of 1024 KiB"), "{why}");
    eprintln!("{error}: {why}");
}
