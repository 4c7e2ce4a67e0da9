//! The devices behind the trait: mem, null, and uring over a loop device (root; skipped loudly otherwise).
#![expect(clippy::cast_possible_truncation, reason = "offsets within 4 MiB")]

mod block_support;
#[path = "block_support/bytes.rs"]
mod bytes;
#[path = "block_support/loop_device.rs"]
mod loop_device;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use block_support::{pool, ring};
use bytes::{buf_of, bytes_of, pattern};
use fastice::block::{
    BlockDevice, BlockDone, BlockError, BlockErrorKind, BlockOp, BlockOpKind, BlockQueue, FaultOn, MemDevice,
    MemFault, MemOptions, NullDevice, OpToken, OpenError, UringDevice, UringOptions,
};
use fastice::ring::{Ring, RingOptions, Wait};
use fastice::units::{BlockSize, ByteLen, ByteOffset};
use hugepage_alloc::{BufferPool, DmaBuf};
use loop_device::Loop;
use proptest::prelude::*;

const DEVICE_LEN: u64 = 4 << 20;
const WRITE: BlockOpKind = BlockOpKind::Write { fua: false };

fn op(kind: BlockOpKind, offset: u64, len: u64) -> BlockOp {
    BlockOp { token: OpToken(offset ^ len), kind, offset: ByteOffset(offset), len: ByteLen(len), buf: None }
}

fn op_with(kind: BlockOpKind, offset: u64, buf: DmaBuf) -> BlockOp {
    BlockOp { buf: Some(buf.clone()), ..op(kind, offset, buf.len() as u64) }
}

/// A ring, a pool and a queue of one device.
struct Bench {
    ring: Ring,
    pool: BufferPool,
    queue: Box<dyn BlockQueue>,
}

impl Bench {
    fn new(device: &dyn BlockDevice) -> Self {
        let (ring, pool) = (ring(), pool(8));
        ring.register_pool(&pool).expect("the first pool");
        let queue = device.open_queue(&ring, &pool, 16).expect("a queue");
        Self { ring, pool, queue }
    }

    /// Runs one operation to its end.
    fn run(&mut self, op: BlockOp) -> BlockDone {
        let token = op.token;
        self.queue.submit(op).expect("room in the queue");
        self.queue.commit();
        let done = self.finish(1).pop().expect("one completion");
        assert_eq!((done.token, self.queue.outstanding()), (token, 0));
        done
    }

    /// Waits for `count` completions.
    fn finish(&mut self, count: usize) -> Vec<BlockDone> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut done = Vec::with_capacity(count);
        while done.len() < count {
            self.queue.poll(usize::MAX, &mut done);
            assert!(Instant::now() < deadline, "{} of {count} completions", done.len());
            let must_poll = self.queue.must_poll() || done.len() == count;
            self.ring
                .turn(if must_poll { Wait::No } else { Wait::UpTo(Duration::from_millis(50)) })
                .expect("a turn");
        }
        done
    }

    fn write(&mut self, kind: BlockOpKind, offset: u64, bytes: &[u8]) -> Result<(), BlockError> {
        let buf = buf_of(&self.pool, bytes);
        self.run(op_with(kind, offset, buf)).result
    }

    fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, BlockError> {
        let buf = self.pool.alloc(len).expect("room in the pool");
        buf.write_from(0, &vec![0xee; len as usize]);
        let done = self.run(op_with(BlockOpKind::Read, offset, buf));
        done.result.map(|()| bytes_of(&done.buf.expect("a read gives its buffer back")))
    }

    fn error_kind(&mut self, op: BlockOp) -> BlockErrorKind {
        self.run(op).result.expect_err("refused").kind
    }
}

fn image(folder: &Path) -> PathBuf {
    let path = folder.join("image");
    File::create(&path).and_then(|file| file.set_len(DEVICE_LEN)).expect("disk space");
    path
}

fn mem() -> MemDevice {
    MemDevice::new(MemOptions::new(ByteLen(DEVICE_LEN), BlockSize::B512)).expect("4 MiB of memory")
}

/// What every device that stores must do.
fn exercise(device: &dyn BlockDevice) {
    let bench = &mut Bench::new(device);
    let bytes = pattern(1, 128 << 10);
    assert_eq!(bench.write(WRITE, 8192, &bytes), Ok(()));
    assert_eq!(bench.read(8192, 128 << 10), Ok(bytes.clone()));
    assert_eq!(bench.read(8192 + 512, 1024), Ok(bytes[512..1536].to_vec()));
    assert_eq!(bench.read(0, 8192), Ok(vec![0; 8192]), "the neighbours before");
    assert_eq!(bench.read(8192 + (128 << 10), 4096), Ok(vec![0; 4096]), "the neighbours behind");

    let fua = pattern(2, 4096);
    assert_eq!(bench.write(BlockOpKind::Write { fua: true }, 0, &fua), Ok(()));
    assert_eq!(bench.run(op(BlockOpKind::Flush, 0, 0)).result, Ok(()));
    assert_eq!(bench.read(0, 4096), Ok(fua));

    let mut expected = bytes;
    for (at, kind) in [
        (4096, BlockOpKind::WriteZeroes { deallocate: false, fua: false }),
        (16384, BlockOpKind::WriteZeroes { deallocate: false, fua: true }),
        (32768, BlockOpKind::WriteZeroes { deallocate: true, fua: false }),
        (49152, BlockOpKind::WriteZeroes { deallocate: true, fua: true }),
    ] {
        assert_eq!(bench.run(op(kind, 8192 + at, 8192)).result, Ok(()), "{kind:?}");
        expected[at as usize..at as usize + 8192].fill(0);
        assert_eq!(bench.read(8192, 128 << 10), Ok(expected.clone()), "{kind:?}");
    }
    assert_eq!(bench.run(op(BlockOpKind::Deallocate, 8192 + 65536, 4096)).result, Ok(()));

    let end = device.info().len.get();
    assert_eq!(bench.write(WRITE, end - 512, &[7; 512]), Ok(()), "the last block");
    assert_eq!(bench.read(end - 512, 512), Ok(vec![7; 512]));
    refuse(bench, end);
    assert_eq!(bench.pool.stats().bytes_in_use, 0, "every buffer came back");
}

/// What every device must refuse, giving the buffer back.
fn refuse(bench: &mut Bench, end: u64) {
    use BlockErrorKind as Kind;
    for (kind, offset, len, expected) in [
        (BlockOpKind::Read, end, 512, Kind::OutOfRange),
        (WRITE, end - 512, 1024, Kind::OutOfRange),
        (WRITE, u64::MAX - 511, 512, Kind::OutOfRange),
        (BlockOpKind::Read, 100, 512, Kind::InvalidRequest),
        (WRITE, 512, 100, Kind::InvalidRequest),
    ] {
        let buf = bench.pool.alloc(len).expect("room in the pool");
        let done = bench.run(op_with(kind, offset, buf));
        assert_eq!(done.result, Err(BlockError::new(expected)), "{kind:?} {offset} {len}");
        assert!(done.buf.is_some());
    }
    assert_eq!(bench.error_kind(op(BlockOpKind::Read, 0, 512)), Kind::InvalidRequest, "no buffer");
    assert_eq!(bench.error_kind(op(BlockOpKind::Deallocate, end - 4096, 8192)), Kind::OutOfRange);
    let wrong_len = BlockOp { len: ByteLen(1024), ..op_with(WRITE, 0, buf_of(&bench.pool, &[0; 512])) };
    assert_eq!(bench.error_kind(wrong_len), Kind::InvalidRequest);
}

#[test]
fn a_memory_device_stores() {
    exercise(&mem());
}

#[test]
fn a_memory_device_is_one_for_all_queues() {
    let device = mem();
    let bytes = pattern(3, 4096);
    Bench::new(&device).write(WRITE, 4096, &bytes).expect("written");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| Bench::new(&device).read(4096, 4096));
        assert_eq!(thread.join().expect("no panic"), Ok(bytes));
    });
}

#[test]
fn a_memory_device_fails_as_told() {
    let fault = |on, range, kind, count| MemFault { on, range, kind, count };
    let faults = vec![
        fault(FaultOn::Read, 4096..8192, BlockErrorKind::Media, u32::MAX),
        fault(FaultOn::Write, 0..u64::MAX, BlockErrorKind::NoSpace, 2),
        fault(FaultOn::Flush, 0..0, BlockErrorKind::TimedOut, 1),
        fault(FaultOn::Deallocate, 0..512, BlockErrorKind::NotSupported, 1),
    ];
    let options = MemOptions { faults, ..MemOptions::new(ByteLen(DEVICE_LEN), BlockSize::B512) };
    let device = MemDevice::new(options).expect("4 MiB of memory");
    let bench = &mut Bench::new(&device);
    assert_eq!(bench.read(4096 + 512, 512), Err(BlockErrorKind::Media.into()));
    assert_eq!(bench.read(0, 4096), Ok(vec![0; 4096]));
    assert_eq!(bench.read(0, 4096 + 512), Err(BlockErrorKind::Media.into()));
    assert_eq!(bench.write(WRITE, 0, &[1; 512]), Err(BlockErrorKind::NoSpace.into()));
    assert_eq!(Bench::new(&device).write(WRITE, 0, &[2; 512]), Err(BlockErrorKind::NoSpace.into()));
    assert_eq!(bench.read(0, 512), Ok(vec![0; 512]), "a failed write writes nothing");
    assert_eq!(bench.write(WRITE, 0, &[3; 512]), Ok(()), "used up");
    assert_eq!(bench.error_kind(op(BlockOpKind::Flush, 0, 0)), BlockErrorKind::TimedOut);
    assert_eq!(bench.error_kind(op(BlockOpKind::Deallocate, 0, 4096)), BlockErrorKind::NotSupported);
    assert_eq!(bench.read(4096, 512), Err(BlockErrorKind::Media.into()), "never used up");
}

#[test]
fn a_slow_memory_device_takes_its_time() {
    let latency = Some(Duration::from_millis(40));
    let options = MemOptions { latency, ..MemOptions::new(ByteLen(DEVICE_LEN), BlockSize::B512) };
    let bench = &mut Bench::new(&MemDevice::new(options).expect("4 MiB of memory"));
    let before = Instant::now();
    assert!(bench.queue.submit(op(BlockOpKind::Flush, 0, 0)).is_ok());
    assert_eq!((bench.queue.poll(1, &mut Vec::with_capacity(1)), bench.queue.outstanding()), (0, 1));
    assert!(bench.queue.must_poll());
    bench.finish(1);
    assert!(before.elapsed() >= Duration::from_millis(40));
}

#[test]
fn a_read_only_memory_device_can_be_read() {
    let options = MemOptions { read_only: true, ..MemOptions::new(ByteLen(DEVICE_LEN), BlockSize::B4096) };
    let bench = &mut Bench::new(&MemDevice::new(options).expect("4 MiB of memory"));
    assert_eq!(bench.read(0, 4096), Ok(vec![0; 4096]));
    assert_eq!(bench.write(WRITE, 0, &[1; 4096]), Err(BlockErrorKind::ReadOnly.into()));
}

#[test]
fn a_null_device_shows_nobody_elses_data() {
    let device = NullDevice::new(ByteLen(DEVICE_LEN), BlockSize::B512).expect("a size");
    let bench = &mut Bench::new(&device);
    assert_eq!(bench.write(WRITE, 0, &[5; 4096]), Ok(()));
    // With and without the pool's zeroes, which are shorter than the last one.
    for len in [512, 4096, 256 << 10, 512 << 10] {
        assert_eq!(bench.read(0, len), Ok(vec![0; len as usize]));
    }
    refuse(bench, DEVICE_LEN);
}

#[test]
fn a_device_of_odd_size_is_refused() {
    for bytes in [0, 513] {
        let options = MemOptions::new(ByteLen(bytes), BlockSize::B512);
        assert!(matches!(MemDevice::new(options), Err(OpenError::BadSize { .. })));
        assert!(NullDevice::new(ByteLen(bytes), BlockSize::B512).is_err());
    }
}

#[test]
fn a_queue_keeps_its_depth_and_the_callers_room() {
    let bench = &mut Bench::new(&mem());
    for number in 0..16 {
        bench.queue.submit(op(BlockOpKind::Flush, number, 0)).expect("16 deep");
    }
    let refused = bench.queue.submit(op(BlockOpKind::Flush, 99, 0)).expect_err("full");
    assert_eq!(refused.token, OpToken(99));
    let mut done = Vec::with_capacity(10);
    let room = done.capacity();
    assert_eq!(bench.queue.poll(3, &mut done), 3);
    assert_eq!(bench.queue.poll(usize::MAX, &mut done), room - 3, "no more than fits");
    assert_eq!((done.capacity(), bench.queue.outstanding()), (room, 16 - room));
}

#[test]
fn a_loop_device_stores() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(disk) = Loop::attach(&image(folder.path()), &[]) else { return };
    let device = UringDevice::open(&disk.options(false)).expect("the loop device");
    let info = device.info();
    assert_eq!((info.len, info.logical_block_size), (ByteLen(DEVICE_LEN), BlockSize::B512));
    assert_eq!((info.name.as_str(), info.read_only), (disk.node.to_str().expect("a path"), false));
    assert!(info.deallocate, "a loop device over a file can punch holes");
    exercise(&device);
}

#[test]
fn what_is_flushed_is_in_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = image(folder.path());
    let Some(disk) = Loop::attach(&path, &[]) else { return };
    let device = UringDevice::open(&disk.options(false)).expect("the loop device");
    let bench = &mut Bench::new(&device);
    let bytes = pattern(5, 8192);
    assert_eq!(bench.write(WRITE, 4096, &bytes), Ok(()));
    assert_eq!(bench.run(op(BlockOpKind::Flush, 0, 0)).result, Ok(()));
    let file = std::fs::read(&path).expect("the image");
    assert_eq!(file[4096..12288], bytes);
}

#[test]
fn a_read_only_loop_device_can_be_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = image(folder.path());
    for (arguments, read_only) in [(&["--read-only"][..], false), (&[][..], true)] {
        let Some(disk) = Loop::attach(&path, arguments) else { return };
        let device = UringDevice::open(&disk.options(read_only)).expect("the loop device");
        assert!(device.info().read_only);
        let bench = &mut Bench::new(&device);
        assert_eq!(bench.read(0, 4096), Ok(vec![0; 4096]));
        assert_eq!(bench.write(WRITE, 0, &[1; 4096]), Err(BlockErrorKind::ReadOnly.into()));
        assert_eq!(bench.error_kind(op(BlockOpKind::Deallocate, 0, 4096)), BlockErrorKind::ReadOnly);
    }
}

#[test]
fn a_partition_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(disk) = Loop::attach(&image(folder.path()), &["--partscan"]) else { return };
    let added = Command::new("addpart").arg(&disk.node).args(["1", "1024", "2048"]).status();
    let name = format!("{}p1", disk.node.file_name().and_then(|name| name.to_str()).expect("a name"));
    let Ok(number) = std::fs::read_to_string(format!("/sys/class/block/{name}/dev")) else {
        eprintln!("SKIPPED: a_partition_is_refused: no partitions on loop devices here ({added:?})");
        return;
    };
    let (major, minor) = number.trim().split_once(':').expect("major:minor");
    let (major, minor) = (major.parse().expect("a number"), minor.parse().expect("a number"));
    let error = UringDevice::open(&UringOptions { major, minor, read_only: false }).expect_err("a partition");
    assert!(matches!(error, OpenError::Partition { .. }), "{error}");
    drop(disk);
}

#[test]
fn a_device_that_cannot_write_says_so() {
    /// Unmounts a folder when dropped.
    struct Mount(PathBuf);
    impl Drop for Mount {
        fn drop(&mut self) {
            // The kernel takes a ring apart after its descriptor is closed, and only then lets go of the loop
            // device, and that of the image on this mount.
            let unmounted = (0..200).any(|_| {
                let output = Command::new("umount").arg(&self.0).output().expect("umount");
                output.status.success() || {
                    std::thread::sleep(Duration::from_millis(25));
                    false
                }
            });
            assert!(unmounted, "{} stays mounted", self.0.display());
        }
    }
    let folder = tempfile::tempdir().expect("a folder");
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1M", "tmpfs"]).arg(folder.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a_device_that_cannot_write_says_so: tmpfs cannot be mounted; run as root");
        return;
    }
    let _mount = Mount(folder.path().to_owned());
    // A sparse image of 4 MiB in 1 MiB of space.
    let Some(disk) = Loop::attach(&image(folder.path()), &[]) else { return };
    let device = UringDevice::open(&disk.options(false)).expect("the loop device");
    let bench = &mut Bench::new(&device);
    let results: Vec<_> = (0..4)
        .map(|mib| bench.write(BlockOpKind::Write { fua: true }, mib << 20, &pattern(mib, 1 << 20)))
        .collect();
    let error = results.into_iter().find_map(Result::err).expect("4 MiB do not fit into 1 MiB");
    assert!(matches!(error.kind, BlockErrorKind::WriteFault | BlockErrorKind::NoSpace), "{error}");
    assert!(error.cause.is_some());
    assert_eq!(bench.pool.stats().bytes_in_use, 0);
}

#[test]
fn a_queue_deeper_than_its_ring_waits_for_room() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(disk) = Loop::attach(&image(folder.path()), &[]) else { return };
    let device = UringDevice::open(&disk.options(false)).expect("the loop device");
    let ring = Ring::new(&RingOptions { sq_entries: 2, slots: 3, files: 0, ..RingOptions::default() })
        .expect("a ring");
    let pool = pool(4);
    let queue = device.open_queue(&ring, &pool, 16).expect("a queue");
    let mut bench = Bench { ring, pool, queue };
    for number in 0..16u8 {
        let buf = buf_of(&bench.pool, &[number; 4096]);
        bench.queue.submit(op_with(WRITE, u64::from(number) * 4096, buf)).expect("16 deep");
    }
    bench.queue.commit();
    assert!(bench.queue.submit(op(BlockOpKind::Flush, 0, 0)).is_err(), "full");
    assert!(bench.finish(16).iter().all(|done| done.result == Ok(())));
    for number in 0..16u8 {
        assert_eq!(bench.read(u64::from(number) * 4096, 4096), Ok(vec![number; 4096]));
    }
}

#[test]
fn a_dropped_queue_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(disk) = Loop::attach(&image(folder.path()), &[]) else { return };
    let device = UringDevice::open(&disk.options(false)).expect("the loop device");
    let Bench { ring, pool, mut queue } = Bench::new(&device);
    for number in 0..16 {
        let buf = pool.alloc(65536).expect("room in the pool");
        queue.submit(op_with(BlockOpKind::Read, number * 65536, buf)).expect("16 deep");
    }
    ring.turn(Wait::No).expect("a turn");
    drop((queue, device));
    let deadline = Instant::now() + Duration::from_secs(20);
    while ring.in_flight() > 0 {
        assert!(Instant::now() < deadline);
        ring.turn(Wait::UpTo(Duration::from_millis(50))).expect("a turn");
    }
    assert_eq!(pool.stats().bytes_in_use, 0);
}

#[derive(Clone, Debug)]
struct Deed {
    kind: BlockOpKind,
    block: u64,
    blocks: u64,
    seed: u64,
}

const MODEL_BLOCKS: u64 = 256;

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let kind = prop_oneof![
        4 => Just(BlockOpKind::Read),
        4 => any::<bool>().prop_map(|fua| BlockOpKind::Write { fua }),
        1 => Just(BlockOpKind::Flush),
        2 => any::<(bool, bool)>().prop_map(|(deallocate, fua)| BlockOpKind::WriteZeroes { deallocate, fua }),
        1 => Just(BlockOpKind::Deallocate),
    ];
    // Some leave the device's end.
    let deed = (kind, 0..MODEL_BLOCKS + 4, 1u64..40, any::<u64>())
        .prop_map(|(kind, block, blocks, seed)| Deed { kind, block, blocks, seed });
    prop::collection::vec(deed, 1..60)
}

/// Does it to the device and to `model`, and compares.
fn check_deed(bench: &mut Bench, model: &mut [u8], deed: &Deed) -> Result<(), TestCaseError> {
    let (offset, len) = (deed.block * 512, deed.blocks * 512);
    let range = offset as usize..(offset + len) as usize;
    let is_inside = range.end <= model.len();
    let result = match deed.kind {
        BlockOpKind::Read => match bench.read(offset, len as u32) {
            Ok(bytes) => {
                prop_assert!(is_inside && bytes == model[range], "{:?} differs", deed);
                Ok(())
            }
            Err(error) => Err(error),
        },
        BlockOpKind::Write { .. } => {
            let bytes = pattern(deed.seed, len as usize);
            if is_inside {
                model[range].copy_from_slice(&bytes);
            }
            bench.write(deed.kind, offset, &bytes)
        }
        BlockOpKind::Flush => {
            prop_assert_eq!(bench.run(op(deed.kind, 0, 0)).result, Ok(()));
            return Ok(());
        }
        BlockOpKind::WriteZeroes { .. } | BlockOpKind::Deallocate => {
            if is_inside {
                model[range].fill(0);
            }
            bench.run(op(deed.kind, offset, len)).result
        }
    };
    let expected = if is_inside { Ok(()) } else { Err(BlockError::new(BlockErrorKind::OutOfRange)) };
    prop_assert_eq!(result, expected);
    Ok(())
}

fn check_against_model(bench: &mut Bench, deeds: &[Deed]) -> Result<(), TestCaseError> {
    let len = MODEL_BLOCKS * 512;
    bench.run(op(BlockOpKind::WriteZeroes { deallocate: false, fua: false }, 0, len)).result.expect("zeroed");
    let mut model = vec![0; len as usize];
    for deed in deeds {
        check_deed(bench, &mut model, deed)?;
    }
    prop_assert_eq!(bench.read(0, len as u32), Ok(model));
    Ok(())
}

/// Runs random operations on a device of `MODEL_BLOCKS` blocks.
fn run_model(device: &dyn BlockDevice, cases: u32) {
    let bench = std::cell::RefCell::new(Bench::new(device));
    let mut runner =
        proptest::test_runner::TestRunner::new(ProptestConfig { cases, ..ProptestConfig::default() });
    runner
        .run(&deeds(), |deeds| check_against_model(&mut bench.borrow_mut(), &deeds))
        .expect("no difference");
}

#[test]
fn a_memory_device_does_as_the_model_does() {
    let options = MemOptions::new(ByteLen(MODEL_BLOCKS * 512), BlockSize::B512);
    run_model(&MemDevice::new(options).expect("memory"), 150);
}

#[test]
fn a_loop_device_does_as_the_model_does() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = image(folder.path());
    File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(MODEL_BLOCKS * 512))
        .expect("disk space");
    let Some(disk) = Loop::attach(&path, &[]) else { return };
    run_model(&UringDevice::open(&disk.options(false)).expect("the loop device"), 20);
}
