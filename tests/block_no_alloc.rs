//! After the start, ring and devices allocate nothing: counted by the allocator itself.
#![expect(unsafe_code, reason = "an allocator that counts")]

mod block_support;
#[path = "block_support/loop_device.rs"]
mod loop_device;
#[path = "block_support/next_done.rs"]
mod next_done;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::unix::net::UnixStream;

use block_support::{pool, ring};
use fastice::block::nvme::{NvmeController, NvmeWay, Reach, ReachError, Reached, Standing};
use fastice::block::{
    BlockDevice, BlockOp, BlockOpKind, BlockQueue, MemDevice, MemOptions, NullDevice, OpToken, UringDevice,
};
use fastice::ring::{RecvBatch, Ring, RingClient, RingResource, SendBatch, Socket, Wait};
use fastice::units::{BlockSize, ByteLen, ByteOffset};
use hugepage_alloc::BufferPool;
use loop_device::Loop;
use next_done::next_done;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

fn count() {
    ALLOCATIONS.with(|count| count.set(count.get() + 1));
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`; the memory came from the system's allocator.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`; the memory came from the system's allocator.
        unsafe { System.realloc(memory, layout, new_len) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often `f` allocates, once it ran a while.
fn allocations(mut f: impl FnMut()) -> u64 {
    for _ in 0..100 {
        f();
    }
    let before = ALLOCATIONS.get();
    for _ in 0..1000 {
        f();
    }
    ALLOCATIONS.get() - before
}

#[test]
fn the_counter_counts() {
    assert!(allocations(|| drop(std::hint::black_box(Box::new(1)))) >= 1000);
}

/// What a target does all day: a message in with its payload, the payload to the device and back, a message out.
struct Target {
    ring: Ring,
    pool: BufferPool,
    client: RingClient,
    ours: Socket,
    peer_client: RingClient,
    theirs: Socket,
    queue: Box<dyn BlockQueue>,
    batches: Option<(Box<SendBatch>, Box<RecvBatch>)>,
}

impl Target {
    fn new(device: &dyn BlockDevice) -> Self {
        let (ring, pool) = (ring(), pool(8));
        ring.register_pool(&pool).expect("the first pool");
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        Self {
            client: ring.client(8),
            peer_client: ring.client(8),
            ours: ring.register_socket(ours.into()),
            theirs: Socket::new(theirs.into()),
            queue: device.open_queue(&ring, &pool, 8).expect("a queue"),
            batches: Some((Box::new(SendBatch::with_capacity(256, 8)), Box::new(RecvBatch::new(4096)))),
            ring,
            pool,
        }
    }

    fn round(&mut self) {
        let (mut send, mut recv) = self.batches.take().expect("both came back");
        let payload = self.pool.alloc(4096).expect("room");
        assert!(send.push_bytes(&[7; 24]) && send.push_buf(payload.slice(0, 2048)) && send.push_buf(payload));
        let direct = self.pool.alloc(4096).expect("room");
        recv.set_direct(Some(direct.clone()));
        self.client.recv(1, &self.ours, recv).expect("room");
        self.peer_client.send(2, &self.theirs, send).expect("room");
        let RingResource::Send(mut send) = next_done(&self.ring, &self.peer_client).resource else {
            panic!()
        };
        let done = next_done(&self.ring, &self.client);
        let RingResource::Recv(mut recv) = done.resource else { panic!() };
        let split = recv.complete(done.result.expect("bytes"));
        assert_eq!((split.direct_len, split.rx_len), (4096, 24 + 2048));
        recv.consume(split.rx_len);
        let sent = send.bytes_len();
        send.advance(sent);
        self.batches = Some((send, recv));
        self.device_round(direct);
    }

    fn device_round(&mut self, buf: hugepage_alloc::DmaBuf) {
        let op = |kind, buf| BlockOp {
            token: OpToken(3),
            kind,
            offset: ByteOffset(8192),
            len: ByteLen(4096),
            buf: Some(buf),
        };
        self.queue.submit(op(BlockOpKind::Write { fua: false }, buf.clone())).expect("room");
        self.queue.submit(op(BlockOpKind::Read, buf)).expect("room");
        self.queue.commit();
    }
}

fn check_device(device: &dyn BlockDevice) {
    let mut target = Target::new(device);
    let mut done = Vec::with_capacity(8);
    let count = allocations(|| {
        target.round();
        while target.queue.outstanding() > 0 {
            target.queue.poll(8, &mut done);
            let wait = if target.queue.must_poll() || target.queue.outstanding() == 0 {
                Wait::No
            } else {
                Wait::UpTo(std::time::Duration::from_secs(1))
            };
            target.ring.turn(wait).expect("a turn");
        }
        assert!(done.drain(..).all(|done| done.result == Ok(())));
    });
    assert_eq!(count, 0);
}

#[test]
fn the_steady_state_over_memory_allocates_nothing() {
    let options = MemOptions::new(ByteLen(1 << 20), BlockSize::B4096);
    check_device(&MemDevice::new(options).expect("1 MiB of memory"));
}

#[test]
fn the_steady_state_over_null_allocates_nothing() {
    check_device(&NullDevice::new(ByteLen(1 << 20), BlockSize::B4096).expect("a size"));
}

/// Hands out a model.
struct ToModel(std::sync::Arc<nvme_model::Model>);

impl Reach for ToModel {
    fn reach(&self, _: &NvmeWay) -> Result<Reached, ReachError> {
        Ok(Reached { access: self.0.clone(), stands_on: None })
    }
}

#[test]
fn the_steady_state_over_the_nvme_driver_allocates_nothing() {
    let subsystem = nvme_model::Subsystem::new("NO-ALLOC");
    let namespace = nvme_model::NamespaceOptions::memory(1, 12, 256);
    subsystem.add_namespace(namespace).expect("a namespace");
    let model = subsystem.controller(nvme_model::ControllerOptions::default());
    let _runs = model.spawn().expect("a thread");
    let way = NvmeWay::Model("in memory".into());
    let controller = NvmeController::start(&way, std::sync::Arc::new(ToModel(model))).expect("a controller");
    let device = controller.device(1, std::sync::Arc::new(|_, _| {})).expect("namespace 1");
    let Standing::Unproven(epoch) = device.standing() else { panic!("{device:?}") };
    device.admit(epoch).expect("it is there");
    check_device(&*device);
}

#[test]
fn the_steady_state_over_a_loop_device_allocates_nothing() {
    let image = tempfile::NamedTempFile::new().expect("a temporary file");
    image.as_file().set_len(1 << 20).expect("disk space");
    let Some(disk) = Loop::attach(image.path(), &[]) else { return };
    check_device(&UringDevice::open(&disk.options(false)).expect("the loop device"));
}
