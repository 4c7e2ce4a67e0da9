//! Goal: the model over a block device and the filesystem mounted on that device see the same blocks, as two controllers
//! of one namespace do. Method: a file on a loop device, its blocks found by what is in them, written from both sides
//! and read from both sides past the page cache.

#[path = "../../../tests/common/loopfs.rs"]
#[allow(dead_code, reason = "this test needs a part of it")]
#[allow(clippy::allow_attributes, reason = "an expectation would fail when it uses all of it")]
mod loopfs;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use async_nvme::{Clock, Controller, IoQueue, Op, OpKind, Options, SystemClock, block_on};
use hugepage_alloc::{BufferPool, DmaBuf, PoolOptions};
use loopfs::{LoopFs, Spec};
use nvme_model::{ControllerOptions, ModelThread, NamespaceOptions, Subsystem};
use rustix::fs::OFlags;

const BLOCK_LEN: usize = 4096;
const BLOCKS: u64 = 64;
const WRITE: OpKind = OpKind::Write { fua: false };

/// A block that is like no other: its number and a generation, all over it.
fn block(number: u64, generation: u64) -> Vec<u8> {
    let words = [0xFA57_1CE0_5EED_0001_u64, number, generation, !number];
    words.iter().flat_map(|word| word.to_le_bytes()).cycle().take(BLOCK_LEN).collect()
}

/// What `block` put into some bytes.
fn read_block(bytes: &[u8]) -> Option<(u64, u64)> {
    let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at * 8..at * 8 + 8)?.try_into().ok()?));
    let (number, generation) = (word(1)?, word(2)?);
    (bytes == block(number, generation)).then_some((number, generation))
}

/// A file past the page cache, and bytes that are aligned for that from the position returned.
fn direct(path: &Path) -> (File, Vec<u8>, usize) {
    let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap();
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap();
    let bytes = vec![0; 2 * BLOCK_LEN];
    let at = bytes.as_ptr().align_offset(BLOCK_LEN);
    (file, bytes, at)
}

/// The driver, on a model over a block device.
struct Driven {
    queue: IoQueue,
    controller: Controller,
    pool: BufferPool,
    clock: Arc<SystemClock>,
    _running: ModelThread,
}

impl Driven {
    fn over(device: &str) -> Self {
        let file = OpenOptions::new().read(true).write(true).open(device).unwrap();
        let subsystem = Subsystem::new("MOUNTED");
        subsystem.add_namespace(NamespaceOptions::file(1, 9, file).unwrap()).unwrap();
        let model = subsystem.controller(ControllerOptions::default());
        let running = model.spawn().unwrap();
        let clock = Arc::new(SystemClock::default());
        let mut controller = Controller::new(model, Options::default(), clock.clone()).unwrap();
        block_on(controller.ready(), || ()).unwrap();
        let pool = BufferPool::new(&PoolOptions { bytes: 8 << 20, ..PoolOptions::default() }).unwrap();
        let queue = controller.queue_ticket(1, 8).unwrap().open(&pool).unwrap();
        block_on(controller.until(|_| queue.is_ready()), || ()).unwrap();
        Self { queue, controller, pool, clock, _running: running }
    }

    fn run(&mut self, kind: OpKind, lba: u64, blocks: u64, buf: Option<DmaBuf>) -> Option<DmaBuf> {
        self.queue.submit(Op { token: 0, kind, lba, blocks, buf }).unwrap();
        self.queue.ring();
        let mut done = Vec::with_capacity(1);
        while self.queue.poll(self.clock.now(), 1, &mut done) == 0 {
            self.controller.poll();
            std::thread::yield_now();
        }
        let done = done.remove(0);
        done.result.unwrap();
        done.buf
    }

    fn read(&mut self, lba: u64, blocks: u64) -> Vec<u8> {
        let buf = self.pool.alloc(u32::try_from(blocks * 512).unwrap()).unwrap();
        let buf = self.run(OpKind::Read, lba, blocks, Some(buf)).unwrap();
        let mut bytes = vec![0; buf.len()];
        buf.read_into(0, &mut bytes);
        bytes
    }

    fn write(&mut self, lba: u64, bytes: &[u8]) {
        let buf = self.pool.alloc(u32::try_from(bytes.len()).unwrap()).unwrap();
        buf.write_from(0, bytes);
        self.run(WRITE, lba, (bytes.len() / 512) as u64, Some(buf));
    }

    /// Where the blocks of the file are, by what is in them.
    fn find(&mut self) -> BTreeMap<u64, u64> {
        let blocks = self.controller.namespaces()[0].blocks;
        let mut places = BTreeMap::new();
        for lba in (0..blocks).step_by(512) {
            let part = self.read(lba, (blocks - lba).min(512));
            for (at, bytes) in (0u64..).zip(part.chunks_exact(BLOCK_LEN)) {
                if let Some((number, 0)) = read_block(bytes) {
                    places.insert(number, lba + at * 8);
                }
            }
            if places.len() as u64 == BLOCKS {
                break;
            }
        }
        places
    }
}

fn both_sides_see_the_same(filesystem: &LoopFs) {
    let path = filesystem.path("disk.img");
    let mut file = File::create(&path).unwrap();
    (0..BLOCKS).for_each(|number| file.write_all(&block(number, 0)).unwrap());
    file.sync_all().unwrap();
    let mut driven = Driven::over(filesystem.device());
    let places = driven.find();
    assert_eq!(places.len() as u64, BLOCKS, "every block of the file, where the filesystem put it");

    // Written through the model, read through the filesystem.
    for (&number, &lba) in places.iter().filter(|(number, _)| **number % 2 == 0) {
        driven.write(lba, &block(number, 1));
    }
    driven.run(OpKind::Flush, 0, 0, None);
    let (beside, mut bytes, at) = direct(&path);
    for number in 0..BLOCKS {
        let part = &mut bytes[at..at + BLOCK_LEN];
        beside.read_exact_at(part, number * BLOCK_LEN as u64).unwrap();
        assert_eq!(read_block(part), Some((number, u64::from(number % 2 == 0))));
    }

    // Written through the filesystem, past its cache and through it, read through the model.
    for number in 0..BLOCKS {
        let part = &mut bytes[at..at + BLOCK_LEN];
        part.copy_from_slice(&block(number, 2));
        let through = if number % 3 == 0 { &beside } else { &file };
        through.write_all_at(part, number * BLOCK_LEN as u64).unwrap();
    }
    file.sync_all().unwrap();
    for (&number, &lba) in &places {
        assert_eq!(read_block(&driven.read(lba, 8)), Some((number, 2)), "at {lba}");
    }
}

/// As small as each is made.
const XFS: Spec = Spec { size_mib: 320, ..Spec::XFS };
const EXT4: Spec = Spec { size_mib: 32, mkfs: &["-q", "-F", "-b", "4096"], ..Spec::EXT4 };

#[test]
fn a_mounted_xfs_sees_what_the_model_writes() {
    if let Some(filesystem) = loopfs::make_or_skip("a_mounted_xfs_sees_what_the_model_writes", &XFS) {
        both_sides_see_the_same(&filesystem);
    }
}

#[test]
fn a_mounted_ext4_sees_what_the_model_writes() {
    if let Some(filesystem) = loopfs::make_or_skip("a_mounted_ext4_sees_what_the_model_writes", &EXT4) {
        both_sides_see_the_same(&filesystem);
    }
}
