//! What the target promises of fences and slots, on a device in memory.

use std::sync::{Arc, Mutex};

use hugepage_alloc::PoolOptions;
use nvme_spec::Nsid;

use super::*;
use crate::block::{BlockOp, DeviceInfo, FaultOn, MemDevice, MemFault, MemOptions, NullDevice};
use crate::extent::{
    DeviceNumber, DiskIdentity, Extent, FilesystemIdentity, FilesystemKind, FrozenMap, MapIdentity,
};
use crate::fabrics::{
    FencePolicy, FenceReason, HostPolicy, Identity, IoKind, NamespaceSpec, SubsystemSpec, Target,
    TargetOptions, of_block_error,
};
use crate::ring::RingOptions;
use crate::units::{BlockSize, ByteLen, ByteOffset};

const LEN: ByteLen = ByteLen(1 << 20);
const BLOCK: u32 = 512;

/// A device that does all at once.
fn memory() -> MemDevice {
    MemDevice::new(MemOptions::new(LEN, BlockSize::B512)).expect("memory")
}

/// The same as one whose queue is asked for what has ended.
fn polled_memory() -> Watched {
    Watched { device: memory(), calls: Calls::default() }
}

struct Lab {
    target: Arc<Target>,
    pool: BufferPool,
    engine: IoEngine,
    owner: Key,
}

impl Lab {
    fn new() -> Self {
        let pool = PoolOptions { bytes: 16 << 20, prefer_huge: false, lock: false };
        let pool = BufferPool::new(&pool).expect("memory");
        let ring = Ring::new(&RingOptions::default()).expect("io_uring");
        let mut owners = Slab::default();
        owners.reserve(1);
        let owner = owners.insert(()).expect("reserved");
        let engine = IoEngine::new(ring, pool.clone());
        Self { target: Target::new(TargetOptions::default()), pool, engine, owner }
    }

    /// What a reload to one namespace in memory adds and takes away.
    fn publish(&self, nsid: u32) -> (Arc<Export>, Option<Arc<Export>>) {
        self.publish_on(nsid, Arc::new(memory()))
    }

    /// The same of all of a device.
    fn publish_on(&self, nsid: u32, device: Arc<dyn BlockDevice>) -> (Arc<Export>, Option<Arc<Export>>) {
        let namespace = NamespaceSpec {
            nsid: Nsid(nsid),
            map: None,
            device,
            read_only: false,
            on_fence: FencePolicy::NotReady,
            block_size: BlockSize::B512,
            len: LEN,
            identity: Identity::named("memory"),
        };
        let subsystem = SubsystemSpec {
            nqn: "nqn.2026-11.com.example:engine".to_owned(),
            serial: "1".to_owned(),
            model: "1".to_owned(),
            hosts: HostPolicy::Any,
            namespaces: vec![namespace],
        };
        let mut published = self.target.publish(vec![subsystem], vec![]).expect("a good configuration");
        (published.added.remove(0), published.removed.pop())
    }

    fn start(&mut self, request: u32, slot: ExportSlot, kind: IoKind) {
        let command = IoCommand { slot, kind, start: ByteOffset(0), len: ByteLen(BLOCK.into()), fua: false };
        let buf = self.pool.alloc(BLOCK).expect("room in the pool");
        self.engine.start(self.owner, request, command, Some(buf));
    }

    fn ends(&mut self) -> Vec<(u32, Status)> {
        let mut ends = Vec::new();
        while self.engine.jobs() > 0 {
            self.engine.poll();
        }
        ends.extend(self.engine.take_done().into_vec().into_iter().map(|done| (done.request, done.status)));
        ends.sort_by_key(|(request, _)| *request);
        ends
    }
}

#[test]
fn data_that_arrives_after_its_export_went_reaches_no_other_export() {
    let mut lab = Lab::new();
    lab.engine.reserve(1);
    let (first, _) = lab.publish(1);
    lab.engine.open(Arc::clone(&first)).expect("a queue");
    // A host is asked for the data of a write to the first export now, and takes its time.
    let (second, removed) = lab.publish(2);
    assert!(lab.engine.close(removed.expect("the first").slot), "nothing is in flight");
    lab.engine.open(second).expect("a queue");
    lab.start(7, first.slot, IoKind::Write);
    assert_eq!(lab.ends(), [(7, Status::INVALID_NAMESPACE.with_dnr())]);
}

#[test]
fn a_slot_that_is_taken_is_given_to_nobody_else() {
    let mut lab = Lab::new();
    let (first, _) = lab.publish(1);
    lab.engine.open(Arc::clone(&first)).expect("a queue");
    lab.engine.open(Arc::clone(&first)).expect("the same again");
    // Another target counts from the start as well.
    let (impostor, _) = Lab::new().publish(1);
    assert_eq!(impostor.slot, first.slot);
    assert!(lab.engine.open(impostor).is_err());
}

#[test]
fn commands_that_wait_for_the_device_see_the_fence() {
    let mut lab = Lab::new();
    let (export, _) = lab.publish_on(1, Arc::new(polled_memory()));
    lab.engine.open(Arc::clone(&export)).expect("a queue");
    let depth = u32::try_from(DEVICE_QUEUE_DEPTH).expect("small");
    lab.engine.reserve(DEVICE_QUEUE_DEPTH + 2);
    for request in 0..depth + 2 {
        lab.start(request, export.slot, IoKind::Write);
    }
    lab.engine.launch();
    lab.target.fence(&export, FenceReason::MapInDoubt);
    let ends = lab.ends();
    assert_eq!(ends.len(), DEVICE_QUEUE_DEPTH + 2);
    for (request, status) in ends {
        let expected = if request < depth { Status::SUCCESS } else { Status::NAMESPACE_NOT_READY };
        assert_eq!(status.code(), expected, "command {request}");
    }
    assert_eq!(lab.engine.in_flight(export.slot), 0);
}

#[test]
fn commands_of_a_turn_see_a_fence_that_falls_before_they_are_launched() {
    let mut lab = Lab::new();
    let (export, _) = lab.publish(1);
    lab.engine.open(Arc::clone(&export)).expect("a queue");
    lab.engine.reserve(2);
    lab.start(1, export.slot, IoKind::Write);
    assert_eq!(lab.engine.in_flight(export.slot), 1, "a drain waits for it");
    assert!(!lab.engine.arm(), "there is something to do");
    lab.target.fence(&export, FenceReason::MapInDoubt);
    let ends = lab.ends();
    assert_eq!(
        ends.iter().map(|(_, status)| status.code()).collect::<Vec<_>>(),
        [Status::NAMESPACE_NOT_READY]
    );
    assert_eq!(lab.engine.in_flight(export.slot), 0);
}

/// Counts what reaches the queue of a device.
#[derive(Clone, Default)]
struct Calls(Arc<Mutex<Vec<&'static str>>>);

impl Calls {
    fn note(&self, call: &'static str) {
        self.0.lock().expect("no panic").push(call);
    }
}

struct Watched {
    device: MemDevice,
    calls: Calls,
}

struct WatchedQueue {
    queue: Box<dyn BlockQueue>,
    calls: Calls,
}

impl BlockDevice for Watched {
    fn info(&self) -> &DeviceInfo {
        self.device.info()
    }

    fn open_queue(
        &self,
        ring: &Ring,
        pool: &BufferPool,
        depth: usize,
    ) -> Result<Box<dyn BlockQueue>, BlockError> {
        let queue = self.device.open_queue(ring, pool, depth)?;
        Ok(Box::new(WatchedQueue { queue, calls: self.calls.clone() }))
    }
}

impl BlockQueue for WatchedQueue {
    fn submit(&mut self, op: BlockOp) -> Result<(), BlockOp> {
        self.calls.note("submit");
        self.queue.submit(op)
    }

    fn commit(&mut self) {
        self.calls.note("commit");
        self.queue.commit();
    }

    fn poll(&mut self, budget: usize, done: &mut Vec<BlockDone>) -> usize {
        self.queue.poll(budget, done)
    }

    fn outstanding(&self) -> usize {
        self.queue.outstanding()
    }

    fn must_poll(&self) -> bool {
        self.queue.must_poll()
    }
}

/// A file of single blocks that lie backwards on its disk.
fn scattered(blocks: u64) -> FrozenMap {
    let block = u64::from(BLOCK);
    let disk = DiskIdentity {
        number: DeviceNumber::default(),
        name: "mem".to_owned(),
        node: "/dev/mem".into(),
        size: LEN,
        logical_block_size: BlockSize::B512,
        partition_start: ByteOffset(0),
        partition_len: LEN,
        serial: None,
        wwid: None,
        model: None,
        nguid: None,
        eui64: None,
        uuid: None,
        nsid: None,
    };
    let filesystem = FilesystemIdentity {
        kind: FilesystemKind::Xfs,
        uuid: [1; 16],
        block_size: BLOCK,
        device: DeviceNumber::default(),
    };
    let identity = MapIdentity {
        path: "/scattered".into(),
        inode: 1,
        inode_generation: 1,
        size: ByteLen(blocks * block),
        reserved: ByteLen(0),
        filesystem,
        disk,
    };
    let extents = (0..blocks).map(|at| Extent {
        file_offset: ByteOffset(at * block),
        device_offset: ByteOffset((blocks - at) * 2 * block),
        len: ByteLen(block),
    });
    FrozenMap::from_extents(identity, 1, extents).expect("a good map")
}

/// An export of a map of [`scattered`] blocks on a device, open in the lab's engine.
fn scattered_on(lab: &mut Lab, device: Arc<dyn BlockDevice>, blocks: u64) -> Arc<Export> {
    lab.engine.reserve(1);
    let namespace = NamespaceSpec {
        nsid: Nsid(1),
        map: Some(Arc::new(scattered(blocks))),
        device,
        read_only: false,
        on_fence: FencePolicy::NotReady,
        block_size: BlockSize::B512,
        len: ByteLen(blocks * u64::from(BLOCK)),
        identity: Identity::named("scattered"),
    };
    let subsystem = SubsystemSpec {
        nqn: "nqn.2026-11.com.example:engine".to_owned(),
        serial: "1".to_owned(),
        model: "1".to_owned(),
        hosts: HostPolicy::Any,
        namespaces: vec![namespace],
    };
    let export = lab.target.publish(vec![subsystem], vec![]).expect("a good configuration").added.remove(0);
    lab.engine.open(Arc::clone(&export)).expect("a queue");
    export
}

/// Begins a read of some blocks of an export, into a buffer with somebody's old bytes.
fn read_scattered(lab: &mut Lab, export: &Export, start: u64, blocks: u64) {
    let (start, len) = (ByteOffset(start * u64::from(BLOCK)), ByteLen(blocks * u64::from(BLOCK)));
    let command = IoCommand { slot: export.slot, kind: IoKind::Read, start, len, fua: false };
    let buf = lab.pool.alloc(u32::try_from(len.0).expect("small")).expect("room");
    buf.write_from(0, &vec![0xA5; buf.len()]);
    lab.engine.start(lab.owner, 1, command, Some(buf));
    lab.engine.poll();
}

#[test]
fn a_range_over_many_extents_is_one_batch() {
    const BLOCKS: u64 = 256;
    let mut lab = Lab::new();
    let device = memory();
    let calls = Calls::default();
    let export = scattered_on(&mut lab, Arc::new(Watched { device, calls: calls.clone() }), BLOCKS);
    read_scattered(&mut lab, &export, 0, BLOCKS);
    let (calls, before_commit) = {
        let calls = calls.0.lock().expect("no panic");
        (calls.clone(), calls.iter().take_while(|call| **call == "submit").count())
    };
    assert_eq!(before_commit, usize::try_from(BLOCKS).expect("small"), "all extents, then one commit");
    assert_eq!(calls.iter().filter(|call| **call == "commit").count(), 1);
    assert_eq!(lab.ends(), [(1, Status::SUCCESS)]);
}

#[test]
fn old_bytes_are_shown_to_nobody_however_many_extents_a_read_crosses() {
    let mut lab = Lab::new();
    let null = NullDevice::new(LEN, BlockSize::B512).expect("a size");
    let devices: [Arc<dyn BlockDevice>; 3] = [Arc::new(memory()), Arc::new(polled_memory()), Arc::new(null)];
    for device in devices {
        let export = scattered_on(&mut lab, device, 256);
        for (start, blocks) in [(0, 1), (3, 2), (0, 256)] {
            read_scattered(&mut lab, &export, start, blocks);
            let done = lab.engine.take_done().into_vec().pop().expect("it ended");
            assert_eq!(done.status, Status::SUCCESS);
            let buf = done.buf.expect("its data");
            let mut bytes = vec![1; buf.len()];
            buf.read_into(0, &mut bytes);
            assert_eq!(
                bytes,
                vec![0; usize::try_from(blocks).expect("small") * 512],
                "{blocks} from {start} on"
            );
        }
    }
}

#[test]
fn what_a_device_does_at_once_has_ended_when_it_is_launched() {
    let mut lab = Lab::new();
    lab.engine.reserve(1);
    for (device, at_once) in [(Arc::new(memory()) as Arc<dyn BlockDevice>, 1), (Arc::new(polled_memory()), 0)]
    {
        let (export, _) = lab.publish_on(1 + at_once, device);
        lab.engine.open(Arc::clone(&export)).expect("a queue");
        lab.start(1, export.slot, IoKind::Write);
        lab.engine.launch();
        assert_eq!(lab.engine.done.len(), usize::try_from(at_once).expect("small"));
        assert_eq!(lab.ends(), [(1, Status::SUCCESS)]);
        assert_eq!(lab.engine.in_flight(export.slot), 0);
    }
}

#[test]
fn a_fault_of_a_device_that_does_all_at_once_is_told() {
    let mut lab = Lab::new();
    lab.engine.reserve(1);
    let mut options = MemOptions::new(LEN, BlockSize::B512);
    let range = 0..u64::from(BLOCK);
    options.faults.push(MemFault { on: FaultOn::Write, range, kind: BlockErrorKind::WriteFault, count: 1 });
    let (export, _) = lab.publish_on(1, Arc::new(MemDevice::new(options).expect("memory")));
    lab.engine.open(Arc::clone(&export)).expect("a queue");
    for expected in [of_block_error(BlockErrorKind::WriteFault), Status::SUCCESS] {
        lab.start(1, export.slot, IoKind::Write);
        assert_eq!(lab.ends(), [(1, expected)]);
    }
}

#[test]
fn a_lent_buffer_takes_nothing_from_the_pool_and_reads_as_zeros() {
    let mut lab = Lab::new();
    let null = Arc::new(NullDevice::new(LEN, BlockSize::B512).expect("a size"));
    let export = scattered_on(&mut lab, null, 256);
    let (memory, _) = Lab::new().publish(1);
    let free = lab.pool.bytes_free();
    for (start, blocks) in [(0, 1), (3, 2), (0, 16)] {
        let (start, len) = (ByteOffset(start * u64::from(BLOCK)), ByteLen(blocks * u64::from(BLOCK)));
        let buf = lab.engine.lend(export.slot, len).expect("the null device has all that reads give");
        assert_eq!(buf.len() as u64, len.0);
        let command = IoCommand { slot: export.slot, kind: IoKind::Read, start, len, fua: false };
        lab.engine.start(lab.owner, 1, command, Some(buf));
        lab.engine.poll();
        let done = lab.engine.take_done().into_vec().pop().expect("it ended");
        assert_eq!((done.status, lab.pool.bytes_free()), (Status::SUCCESS, free));
        let mut bytes = vec![1; usize::try_from(len.0).expect("small")];
        done.buf.expect("its data").read_into(0, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0), "{blocks} from {start:?} on");
    }
    assert!(lab.engine.lend(export.slot, ByteLen(16 << 10)).is_none(), "no longer ones");
    let mut other = Lab::new();
    other.engine.open(Arc::clone(&memory)).expect("a queue");
    assert!(other.engine.lend(memory.slot, ByteLen(512)).is_none(), "memory reads as what was written");
}

#[test]
fn what_nobody_took_of_ends_is_dropped_and_what_ended_meanwhile_is_kept() {
    let mut lab = Lab::new();
    lab.engine.reserve(2);
    let (export, _) = lab.publish(1);
    lab.engine.open(Arc::clone(&export)).expect("a queue");
    let free = lab.pool.bytes_free();
    lab.start(1, export.slot, IoKind::Read);
    while lab.engine.jobs() > 0 {
        lab.engine.poll();
    }
    let done = lab.engine.take_done();
    assert_eq!(done.len(), 1);
    lab.start(2, ExportSlot(99), IoKind::Read);
    assert!(lab.pool.bytes_free() < free, "both have a buffer");
    lab.engine.give_back(done);
    assert_eq!(lab.ends(), [(2, Status::INVALID_NAMESPACE.with_dnr())]);
    assert_eq!(lab.pool.bytes_free(), free);
}

#[test]
fn commands_beyond_what_there_is_room_for_are_interrupted_and_all_others_run() {
    let mut lab = Lab::new();
    lab.engine.reserve(2);
    let (export, _) = lab.publish(1);
    lab.engine.open(Arc::clone(&export)).expect("a queue");
    // Room is made for at least as many.
    const MANY: u32 = 64;
    for request in 0..MANY {
        lab.start(request, export.slot, IoKind::Read);
    }
    let begun = lab.engine.in_flight(export.slot);
    assert!((2..MANY).contains(&begun), "{begun}");
    let ends = lab.ends();
    let interrupted = ends.iter().filter(|(_, status)| *status == Status::COMMAND_INTERRUPTED).count();
    assert_eq!((ends.len(), interrupted), (MANY as usize, (MANY - begun) as usize));
    assert_eq!(lab.engine.in_flight(export.slot), 0);
}
