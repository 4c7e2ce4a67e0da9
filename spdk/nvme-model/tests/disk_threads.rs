//! Goal: a controller whose commands wait for a disk on threads of their own loses none, doubles none, lets no buffer go
//! early, and writes nothing after a reset. Method: batches of blocks that say what they are, over an image, with resets and
//! removals between.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use async_nvme::{Clock, Controller, Done, IoError, IoQueue, Op, OpKind, Options, SystemClock, block_on};
use hugepage_alloc::{BufferPool, DmaBuf, PoolOptions};
use nvme_model::{ControllerOptions, Model, ModelThread, NamespaceOptions, Subsystem};

const DEPTH: u16 = 64;
const BLOCK_LEN: usize = 4096;
const BLOCKS: u64 = 1024;
const WRITE: OpKind = OpKind::Write { fua: false };

struct Driven {
    queue: IoQueue,
    controller: Controller,
    pool: BufferPool,
    clock: Arc<SystemClock>,
    model: Arc<Model>,
    image: File,
    _running: ModelThread,
}

fn block(number: u64, generation: u64) -> Vec<u8> {
    let words = [number, generation, !number];
    words.iter().flat_map(|word| word.to_le_bytes()).cycle().take(BLOCK_LEN).collect()
}

impl Driven {
    fn new() -> Self {
        let image = tempfile::tempfile().unwrap();
        image.set_len(BLOCKS * BLOCK_LEN as u64).unwrap();
        let subsystem = Subsystem::new("DISK");
        subsystem.add_namespace(NamespaceOptions::file(1, 12, image.try_clone().unwrap()).unwrap()).unwrap();
        let options = ControllerOptions { disk_threads: 4, ..ControllerOptions::default() };
        let model = subsystem.controller(options);
        let running = model.spawn().unwrap();
        let clock = Arc::new(SystemClock::default());
        let mut controller = Controller::new(model.clone(), Options::default(), clock.clone()).unwrap();
        block_on(controller.ready(), || ()).unwrap();
        let pool = BufferPool::new(&PoolOptions { bytes: 8 << 20, prefer_huge: false, lock: false }).unwrap();
        let queue = controller.queue_ticket(1, DEPTH).unwrap().open(&pool).unwrap();
        block_on(controller.until(|_| queue.is_ready()), || ()).unwrap();
        Self { queue, controller, pool, clock, model, image, _running: running }
    }

    fn buf(&self, bytes: &[u8]) -> DmaBuf {
        let buf = self.pool.alloc(u32::try_from(bytes.len()).unwrap()).unwrap();
        buf.write_from(0, bytes);
        buf
    }

    /// Gives a batch to the device; it is not done when this returns.
    fn submit(&mut self, kind: OpKind, generation: u64, first: u64) {
        for token in first..first + u64::from(DEPTH) {
            let content = if kind == OpKind::Read { vec![0xEE; BLOCK_LEN] } else { block(token, generation) };
            let buf = Some(self.buf(&content));
            self.queue.submit(Op { token, kind, lba: token, blocks: 1, buf }).unwrap();
        }
        self.queue.ring();
    }

    fn collect(&mut self) -> Vec<Done> {
        let mut all: Vec<Done> = Vec::new();
        let mut some = Vec::with_capacity(DEPTH.into());
        while self.queue.outstanding() > 0 {
            self.controller.poll();
            self.queue.poll(self.clock.now(), usize::from(DEPTH), &mut some);
            for done in &some {
                let early = done.buf.as_ref().is_some_and(|buf| self.model.may_touch(buf));
                assert!(!early, "the buffer of {} came back too early", done.token);
            }
            all.append(&mut some);
            std::thread::yield_now();
        }
        all.sort_by_key(|done| done.token);
        all
    }

    fn in_image(&self, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_LEN];
        self.image.read_exact_at(&mut bytes, number * BLOCK_LEN as u64).unwrap();
        bytes
    }
}

#[test]
fn every_command_is_done_once_and_with_its_own_data() {
    let mut driven = Driven::new();
    for round in 0..8 {
        let first = round * u64::from(DEPTH);
        driven.submit(WRITE, 7, first);
        let done = driven.collect();
        assert!(done.iter().zip(first..).all(|(done, token)| done.token == token && done.result.is_ok()));
        driven.queue.submit(Op { token: 1, kind: OpKind::Flush, lba: 0, blocks: 0, buf: None }).unwrap();
        driven.queue.ring();
        assert!(driven.collect().remove(0).result.is_ok());
        driven.submit(OpKind::Read, 0, first);
        for done in driven.collect() {
            let mut bytes = vec![0; BLOCK_LEN];
            done.buf.unwrap().read_into(0, &mut bytes);
            assert!(done.result.is_ok() && bytes == block(done.token, 7), "block {}", done.token);
            assert!(driven.in_image(done.token) == bytes);
        }
    }
}

#[test]
fn nothing_is_written_after_a_reset_or_a_removal() {
    let mut driven = Driven::new();
    for generation in 1..6 {
        driven.submit(WRITE, generation, 0);
        driven.model.fail();
        let done = driven.collect();
        // What came back with an error may have been written or not, but not any more from now on.
        let before: Vec<Vec<u8>> = (0..u64::from(DEPTH)).map(|number| driven.in_image(number)).collect();
        block_on(driven.controller.ready(), || ()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        for done in &done {
            let at = usize::try_from(done.token).unwrap();
            assert!(driven.in_image(done.token) == before[at], "block {at} was written later");
            match done.result {
                Ok(_) => assert!(before[at] == block(done.token, generation)),
                Err(error) => assert!(matches!(error, IoError::Reset { .. }), "{error}"),
            }
        }
        while !driven.queue.is_ready() {
            driven.controller.poll();
            driven.queue.poll(driven.clock.now(), 0, &mut Vec::new());
        }
        if generation == 2 {
            // Resets count from zero again only after a while.
            driven = Driven::new();
        }
    }
    driven.submit(OpKind::Read, 0, 0);
    driven.model.vanish();
    let gone = driven.collect();
    assert!(gone.iter().all(|done| done.result == Err(IoError::Gone) || done.result.is_ok()));
}
