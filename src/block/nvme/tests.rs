//! The driver's device on the model: operations, resets, loss and return.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_nvme::access::Access;
use hugepage_alloc::{BufferPool, DmaBuf, PoolOptions};
use nvme_model::{
    CommandMatch, ControllerOptions, Fault, FaultAction, Model, ModelThread, NamespaceOptions, Subsystem,
};
use nvme_spec::register::{Cc, Csts, Property};
use nvme_spec::{NvmOpcode, Status};

use super::*;
use crate::block::{BlockDone, BlockErrorKind, BlockOp, BlockOpKind, BlockQueue, OpToken};
use crate::units::{ByteLen, ByteOffset};

const PATIENCE: Duration = Duration::from_secs(20);
const BLOCK: u64 = 512;
const DEPTH: usize = 64;

/// A socket that a model is in, or not.
struct Slot {
    model: Mutex<Arc<Model>>,
    is_there: AtomicBool,
}

impl Reach for Slot {
    fn reach(&self, way: &NvmeWay) -> Result<Reached, ReachError> {
        if !self.is_there.load(Ordering::Acquire) {
            return Err(ReachError::Absent { way: way.clone() });
        }
        let access: Arc<dyn Access> = self.model.lock().expect("no panic").clone();
        Ok(Reached { access, stands_on: None })
    }
}

/// The order is that in which it ends: the device needs a model that works to be shut down.
struct Lab {
    device: Arc<NvmeDevice>,
    pool: BufferPool,
    changes: Arc<Mutex<Vec<NvmeChange>>>,
    subsystem: Subsystem,
    slot: Arc<Slot>,
    model: Arc<Model>,
    _thread: ModelThread,
}

fn model(options: ControllerOptions) -> (Subsystem, Arc<Model>, ModelThread) {
    let subsystem = Subsystem::new("LAB");
    subsystem.add_namespace(NamespaceOptions::memory(1, 9, 4096)).expect("a namespace");
    let model = subsystem.controller(options);
    let thread = model.spawn().expect("a thread");
    (subsystem, model, thread)
}

impl Lab {
    fn new(options: ControllerOptions) -> Self {
        let (subsystem, model, thread) = model(options);
        let slot = Slot { model: Mutex::new(model.clone()), is_there: AtomicBool::new(true) };
        let slot = Arc::new(slot);
        let way = NvmeWay::Model("in memory".into());
        let controller = NvmeController::start(&way, slot.clone()).expect("the model starts");
        let changes = Arc::<Mutex<Vec<NvmeChange>>>::default();
        let heard = Arc::clone(&changes);
        let on_change: OnChange =
            Arc::new(move |_, change| heard.lock().expect("no panic").push(change.clone()));
        let device = controller.device(1, on_change).expect("namespace 1");
        let options = PoolOptions { bytes: 8 << 20, prefer_huge: false, lock: false };
        let pool = BufferPool::new(&options).expect("memory");
        Self { subsystem, slot, model, _thread: thread, changes, device, pool }
    }

    fn proven(options: ControllerOptions) -> (Self, NvmeQueue) {
        let lab = Self::new(options);
        lab.admit();
        let queue = lab.device.open(&lab.pool, DEPTH).expect("a queue");
        (lab, queue)
    }

    fn admit(&self) {
        let Standing::Unproven(epoch) = self.device.standing() else { panic!("{:?}", self.device) };
        self.device.admit(epoch).expect("it is there");
    }

    fn filled(&self, len: u64, byte: u8) -> DmaBuf {
        let buf = self.pool.alloc(u32::try_from(len).expect("small")).expect("room");
        buf.write_from(0, &vec![byte; buf.len()]);
        buf
    }

    fn eventually(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "not in time: {what}: {:?}", self.device);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn op(token: u64, kind: BlockOpKind, block: u64, blocks: u64, buf: Option<DmaBuf>) -> BlockOp {
    let (offset, len) = (ByteOffset(block * BLOCK), ByteLen(blocks * BLOCK));
    BlockOp { token: OpToken(token), kind, offset, len, buf }
}

fn collect(queue: &mut NvmeQueue, count: usize) -> Vec<BlockDone> {
    let mut done = Vec::with_capacity(DEPTH);
    let deadline = Instant::now() + PATIENCE;
    while done.len() < count {
        queue.commit();
        queue.poll(DEPTH, &mut done);
        assert!(Instant::now() < deadline, "{} of {count}: {queue:?}", done.len());
    }
    done.sort_by_key(|done| done.token.0);
    done
}

fn run(queue: &mut NvmeQueue, op: BlockOp) -> BlockDone {
    queue.submit(op).expect("room");
    collect(queue, 1).remove(0)
}

fn first_byte(done: &BlockDone) -> u8 {
    let mut byte = [0];
    done.buf.as_ref().expect("a buffer").read_into(0, &mut byte);
    byte[0]
}

const WRITE: BlockOpKind = BlockOpKind::Write { fua: false };

#[test]
fn operations_do_what_they_say() {
    let (lab, mut queue) = Lab::proven(ControllerOptions::default());
    for (fua, byte) in [(false, 1), (true, 2)] {
        let write = op(7, BlockOpKind::Write { fua }, 10, 8, Some(lab.filled(8 * BLOCK, byte)));
        let done = run(&mut queue, write);
        assert_eq!((done.token, done.result), (OpToken(7), Ok(())));
        let done = run(&mut queue, op(8, BlockOpKind::Read, 17, 1, Some(lab.filled(BLOCK, 9))));
        assert_eq!((done.result, first_byte(&done)), (Ok(()), byte));
    }
    assert_eq!(run(&mut queue, op(9, BlockOpKind::Flush, 0, 0, None)).result, Ok(()));
    for kind in [BlockOpKind::WriteZeroes { deallocate: false, fua: true }, BlockOpKind::Deallocate] {
        run(&mut queue, op(1, WRITE, 0, 8, Some(lab.filled(8 * BLOCK, 5))));
        assert_eq!(run(&mut queue, op(2, kind, 2, 4, None)).result, Ok(()));
        for (block, expected) in [(1, 5), (2, 0), (5, 0), (6, 5)] {
            let done = run(&mut queue, op(3, BlockOpKind::Read, block, 1, Some(lab.filled(BLOCK, 9))));
            assert_eq!(first_byte(&done), expected, "{kind:?}, block {block}");
        }
    }
    assert_eq!(queue.outstanding(), 0);
    assert!(!queue.must_poll());
}

#[test]
fn a_batch_is_one_doorbell_and_comes_back_whole() {
    let (lab, mut queue) = Lab::proven(ControllerOptions::default());
    let before = queue.stats();
    for token in 0..DEPTH as u64 {
        let buf = Some(lab.filled(BLOCK, u8::try_from(token).expect("small")));
        queue.submit(op(token, WRITE, token * 3, 1, buf)).expect("room");
    }
    assert!(queue.submit(op(99, BlockOpKind::Flush, 0, 0, None)).is_err(), "full");
    assert!(queue.must_poll());
    queue.commit();
    queue.commit();
    assert_eq!(queue.stats().doorbells - before.doorbells, 1);
    let done = collect(&mut queue, DEPTH);
    assert!(done.iter().zip(0..).all(|(done, token)| done.token.0 == token && done.result == Ok(())));
    assert_eq!(queue.stats().commands - before.commands, DEPTH as u64);
}

#[test]
fn what_the_device_refuses_keeps_its_meaning() {
    let (lab, mut queue) = Lab::proven(ControllerOptions::default());
    for (opcode, status, expected) in [
        (NvmOpcode::READ, Status::UNRECOVERED_READ_ERROR, BlockErrorKind::Media),
        (NvmOpcode::WRITE, Status::WRITE_FAULT, BlockErrorKind::WriteFault),
        (NvmOpcode::WRITE, Status::CAPACITY_EXCEEDED, BlockErrorKind::NoSpace),
        (NvmOpcode::FLUSH, Status::INTERNAL_ERROR, BlockErrorKind::Internal),
    ] {
        let fault = Fault::once(CommandMatch::io(opcode.0), FaultAction::Status(status));
        lab.model.add_fault(fault);
        let kind = match opcode {
            NvmOpcode::READ => BlockOpKind::Read,
            NvmOpcode::WRITE => WRITE,
            _ => BlockOpKind::Flush,
        };
        let done = run(&mut queue, op(1, kind, 0, 1, Some(lab.filled(BLOCK, 1))));
        assert_eq!(done.result.expect_err("a fault").kind, expected, "{status}");
        assert!(done.buf.is_some());
    }
}

#[test]
fn what_is_no_operation_ends_before_the_device() {
    let (lab, mut queue) = Lab::proven(ControllerOptions { oncs: 0, ..ControllerOptions::default() });
    let commands = queue.stats().commands;
    for (bad, expected) in [
        (op(1, BlockOpKind::Read, 4096, 1, Some(lab.filled(BLOCK, 0))), Err(BlockErrorKind::OutOfRange)),
        (op(2, WRITE, 0, 2, Some(lab.filled(BLOCK, 0))), Err(BlockErrorKind::InvalidRequest)),
        (op(3, BlockOpKind::Deallocate, 0, 1, None), Ok(())),
        (
            op(4, BlockOpKind::WriteZeroes { deallocate: true, fua: false }, 0, 1, None),
            Err(BlockErrorKind::NotSupported),
        ),
    ] {
        let done = run(&mut queue, bad);
        assert_eq!(done.result.map_err(|error| error.kind), expected, "{:?}", done.token);
    }
    assert_eq!(queue.stats().commands, commands);
}

#[test]
fn a_reset_under_load_shows_only_in_latency() {
    let (lab, mut queue) = Lab::proven(ControllerOptions::default());
    let mut written = 0;
    for round in 0..4u8 {
        for token in 0..DEPTH as u64 {
            let buf = Some(lab.filled(BLOCK, round + 1));
            queue.submit(op(token, WRITE, token, 1, buf)).expect("room");
        }
        queue.commit();
        if round % 2 == 0 {
            lab.model.fail();
        }
        let done = collect(&mut queue, DEPTH);
        assert!(done.iter().all(|done| done.result == Ok(())), "{done:?}");
        written += done.len();
        let read = run(&mut queue, op(1, BlockOpKind::Read, 63, 1, Some(lab.filled(BLOCK, 0))));
        assert_eq!(first_byte(&read), round + 1);
    }
    assert_eq!(written, 4 * DEPTH);
    assert!(lab.changes.lock().expect("no panic").is_empty(), "nobody is told of a reset");
}

#[test]
fn nothing_reaches_a_device_that_nobody_vouches_for() {
    let lab = Lab::new(ControllerOptions::default());
    assert_eq!(lab.device.open(&lab.pool, DEPTH).expect_err("not yet").kind, BlockErrorKind::Gone);
    let deadline = Instant::now() + PATIENCE;
    let bytes = lab.device.read(ByteOffset(BLOCK), ByteLen(8 * BLOCK), deadline).expect("a look is allowed");
    assert_eq!(bytes, vec![0; 8 * 512]);
    for (at, len) in [(1, BLOCK), (0, 0), (0, 4 << 20), (4096 * BLOCK, BLOCK), (u64::MAX - 511, BLOCK)] {
        let error = lab.device.read(ByteOffset(at), ByteLen(len), deadline).expect_err("no range");
        assert_eq!(error.kind, BlockErrorKind::InvalidRequest, "{len} at {at}");
    }
    lab.admit();
    assert!(lab.device.open(&lab.pool, DEPTH).is_ok());
    let Standing::Proven(epoch) = lab.device.standing() else { panic!("{:?}", lab.device) };
    assert!(lab.device.admit(epoch).is_err(), "once");
}

#[test]
fn a_lost_device_ends_everything_and_serves_again_when_vouched_for() {
    let (lab, mut queue) = Lab::proven(ControllerOptions::default());
    run(&mut queue, op(1, WRITE, 5, 1, Some(lab.filled(BLOCK, 77))));
    lab.model.add_fault(Fault::always(CommandMatch::any_io(), FaultAction::Drop));
    for token in 0..3 {
        queue.submit(op(token, WRITE, token, 1, Some(lab.filled(BLOCK, 1)))).expect("room");
    }
    queue.commit();
    lab.slot.is_there.store(false, Ordering::Release);
    lab.model.vanish();
    let done = collect(&mut queue, 3);
    assert!(done.iter().all(|done| done.result == Err(BlockErrorKind::Gone.into())), "{done:?}");
    assert!(done.iter().all(|done| done.buf.is_some()));
    lab.eventually("the loss is told", || lab.device.standing() == Standing::Lost);
    assert!(matches!(lab.changes.lock().expect("no panic")[..], [NvmeChange::Lost { .. }]));
    let late = run(&mut queue, op(9, BlockOpKind::Read, 5, 1, Some(lab.filled(BLOCK, 0))));
    assert_eq!(late.result, Err(BlockErrorKind::Gone.into()));

    lab.model.clear_faults();
    lab.model.plug_in();
    lab.slot.is_there.store(true, Ordering::Release);
    lab.eventually("it is back", || matches!(lab.device.standing(), Standing::Unproven(_)));
    let unproven = run(&mut queue, op(9, BlockOpKind::Read, 5, 1, Some(lab.filled(BLOCK, 0))));
    assert_eq!(unproven.result, Err(BlockErrorKind::Gone.into()), "not before somebody vouches");
    lab.admit();
    let read = run(&mut queue, op(9, BlockOpKind::Read, 5, 1, Some(lab.filled(BLOCK, 0))));
    assert_eq!((read.result, first_byte(&read)), (Ok(()), 77));
    assert!(matches!(
        lab.changes.lock().expect("no panic")[..],
        [NvmeChange::Lost { .. }, NvmeChange::Back(_)]
    ));
}

#[test]
fn another_device_in_its_place_is_not_taken_for_it() {
    let other = Subsystem::new("LAB");
    let options = NamespaceOptions { nguid: [9; 16], ..NamespaceOptions::memory(1, 9, 4096) };
    other.add_namespace(options).expect("a namespace");
    let impostor = other.controller(ControllerOptions::default());
    let _thread = impostor.spawn().expect("a thread");
    let (lab, _queue) = Lab::proven(ControllerOptions::default());
    lab.slot.is_there.store(false, Ordering::Release);
    lab.model.vanish();
    lab.eventually("the loss", || lab.device.standing() == Standing::Lost);
    *lab.slot.model.lock().expect("no panic") = impostor.clone();
    lab.slot.is_there.store(true, Ordering::Release);
    lab.eventually("the other one was looked at", || impostor.commands_done() > 5);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(lab.device.standing(), Standing::Lost);
}

#[test]
fn a_namespace_that_goes_is_lost_and_one_that_comes_back_is_found() {
    let (lab, mut queue) = Lab::proven(ControllerOptions::default());
    assert!(lab.subsystem.remove_namespace(1));
    lab.eventually("the loss", || lab.device.standing() == Standing::Lost);
    lab.subsystem.add_namespace(NamespaceOptions::memory(1, 9, 4096)).expect("a namespace");
    lab.eventually("the return", || matches!(lab.device.standing(), Standing::Unproven(_)));
    lab.admit();
    let done = run(&mut queue, op(1, WRITE, 5, 1, Some(lab.filled(BLOCK, 7))));
    assert_eq!(done.result, Ok(()));
}

#[test]
fn ways_that_are_not_there_say_so() {
    let way = NvmeWay::Model("/nowhere".into());
    let error = NvmeController::start(&way, Arc::new(SystemReach)).expect_err("no such file");
    assert_eq!(error.to_string(), "the model cannot stand on /nowhere");
}

/// A way that is closed for a while.
struct Busy(Mutex<u32>, Arc<Slot>);

impl Reach for Busy {
    fn reach(&self, way: &NvmeWay) -> Result<Reached, ReachError> {
        let mut left = self.0.lock().expect("no panic");
        if *left > 0 {
            *left -= 1;
            let what = "IOMMU group 4".to_owned();
            return Err(ReachError::Vfio(async_nvme::vfio::OpenError::Busy { what }));
        }
        self.1.reach(way)
    }
}

#[test]
fn a_controller_that_its_last_user_still_lets_go_of_is_waited_for() {
    let (_subsystem, model, _thread) = model(ControllerOptions::default());
    let slot = Slot { model: Mutex::new(model), is_there: AtomicBool::new(true) };
    let way = NvmeWay::Model("in memory".into());
    let busy = Arc::new(Busy(Mutex::new(3), Arc::new(slot)));
    let controller = NvmeController::start(&way, busy).expect("it is free in the end");
    assert!(controller.describe().is_some());
}

#[test]
fn what_is_not_there_is_still_and_a_place_is_read_as_it_was_written() {
    let (lab, _queue) = Lab::proven(ControllerOptions::default());
    lab.slot.is_there.store(false, Ordering::Release);
    let address = "0000:3b:00.0".parse().expect("an address");
    for way in [
        NvmeWay::Pci(address),
        NvmeWay::PciWithoutIommu(address),
        NvmeWay::VfioUser("/run/a controller".into()),
    ] {
        let place = way.place().expect("it outlives us");
        assert_eq!(NvmeWay::from_place(&place), Some(way.clone()), "{place}");
        still(&way, &*lab.slot).expect("nothing there");
    }
    assert_eq!(NvmeWay::Model("/dev/loop0".into()).place(), None);
    for place in ["", "pci", "pci nonsense", "moon 0000:3b:00.0"] {
        assert_eq!(NvmeWay::from_place(place), None);
    }
    still(&NvmeWay::VfioUser("/nowhere/socket".into()), &SystemReach).expect("no server, no commands");
    still(&NvmeWay::Pci("ffff:1f:1f.7".parse().expect("an address")), &SystemReach)
        .expect("no such function");
}

#[test]
fn a_controller_that_somebody_left_enabled_is_disabled() {
    let (_subsystem, model, _thread) = model(ControllerOptions::default());
    let slot = Slot { model: Mutex::new(model.clone()), is_there: AtomicBool::new(true) };
    // Queues in memory that is long gone.
    model.write32(Property::AQA.0, 0x000F_000F);
    model.write64(Property::ASQ.0, 0x1000);
    model.write64(Property::ACQ.0, 0x2000);
    model.write32(Property::CC.0, Cc::new().with_iosqes(6).with_iocqes(4).with_en(true).into_bits());
    let is_ready = || Csts::from_bits(model.read32(Property::CSTS.0)).rdy();
    let deadline = Instant::now() + PATIENCE;
    while !is_ready() {
        assert!(Instant::now() < deadline, "it is enabled");
        std::thread::yield_now();
    }
    still(&NvmeWay::VfioUser("/run/nvme0".into()), &slot).expect("it stops");
    assert!(!is_ready() && !Cc::from_bits(model.read32(Property::CC.0)).en());
}
