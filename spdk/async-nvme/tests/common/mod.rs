//! A driver on a model, stepped by hand, with a clock that moves a millisecond a turn.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::allow_attributes, reason = "an expectation would fail in files that use all of it")]

use std::sync::Arc;
use std::time::Duration;

use async_nvme::{
    Clock, Controller, Done, IoError, IoQueue, ManualClock, Op, OpKind, Options, QueueTicket, State, block_on,
};
use hugepage_alloc::{BufferPool, DmaBuf, PoolOptions};
use nvme_model::{ControllerOptions, Model, NamespaceOptions, Subsystem};

pub(crate) struct Rig {
    pub(crate) subsystem: Subsystem,
    pub(crate) model: Arc<Model>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) controller: Controller,
    pub(crate) pool: BufferPool,
}

pub(crate) fn pool() -> BufferPool {
    BufferPool::new(&PoolOptions { bytes: 8 << 20, prefer_huge: false, lock: false }).unwrap()
}

impl Rig {
    pub(crate) fn new(namespace: NamespaceOptions, options: ControllerOptions) -> Self {
        let subsystem = Subsystem::new("TEST0001");
        subsystem.add_namespace(namespace).unwrap();
        Self::over(&subsystem, options, Options::default())
    }

    pub(crate) fn over(subsystem: &Subsystem, options: ControllerOptions, driver: Options) -> Self {
        let model = subsystem.controller(options);
        let clock = Arc::new(ManualClock::default());
        let controller = Controller::new(model.clone(), driver, clock.clone()).unwrap();
        Self { subsystem: subsystem.clone(), model, clock, controller, pool: pool() }
    }

    /// 1024 blocks of 512 bytes, ready.
    pub(crate) fn ready() -> Self {
        let mut rig = Self::new(NamespaceOptions::memory(1, 9, 1024), ControllerOptions::default());
        rig.start().unwrap();
        rig
    }

    pub(crate) fn start(&mut self) -> Result<(), async_nvme::Error> {
        let (model, clock) = (self.model.clone(), self.clock.clone());
        block_on(self.controller.ready(), || {
            model.step();
            clock.advance(Duration::from_millis(1));
        })
    }

    pub(crate) fn turn(&mut self) {
        self.model.step();
        self.controller.poll();
        self.clock.advance(Duration::from_millis(1));
    }

    pub(crate) fn queue(&mut self, depth: u16) -> IoQueue {
        let ticket = self.controller.queue_ticket(1, depth).unwrap();
        self.opened(ticket)
    }

    pub(crate) fn opened(&mut self, ticket: QueueTicket) -> IoQueue {
        let queue = ticket.open(&self.pool).unwrap();
        for _ in 0..100 {
            if queue.is_ready() {
                return queue;
            }
            self.turn();
        }
        panic!("the queue pair was not created: {:?}", queue.refused_with());
    }

    /// Turns until `count` operations have come back, at most `limit_ms`. No buffer may be the model's any more.
    pub(crate) fn collect(&mut self, queue: &mut IoQueue, count: usize, limit_ms: u64) -> Vec<Done> {
        let mut all = Vec::new();
        let mut some = Vec::with_capacity(64);
        let end = self.clock.now().after(Duration::from_millis(limit_ms));
        while all.len() < count {
            assert!(self.clock.now() < end, "{} of {count} after {limit_ms} ms", all.len());
            queue.ring();
            self.turn();
            queue.poll(self.clock.now(), 64, &mut some);
            for done in &some {
                let early = done.buf.as_ref().is_some_and(|buf| self.model.may_touch(buf));
                assert!(!early, "the buffer of {} came back too early", done.token);
            }
            all.append(&mut some);
        }
        all
    }

    pub(crate) fn run(&mut self, queue: &mut IoQueue, op: Op) -> Result<u32, IoError> {
        queue.submit(op).unwrap();
        self.collect(queue, 1, 120_000).remove(0).result
    }

    /// Turns until the controller is in `state`.
    pub(crate) fn until(&mut self, state: State, limit_ms: u64) {
        for _ in 0..limit_ms {
            if self.controller.state() == state {
                return;
            }
            self.turn();
        }
        panic!("{:?} instead of {state:?} after {limit_ms} ms", self.controller.state());
    }

    pub(crate) fn filled(&self, len: usize, byte: u8) -> DmaBuf {
        let buf = self.pool.alloc(u32::try_from(len).unwrap()).unwrap();
        buf.write_from(0, &vec![byte; len]);
        buf
    }
}

pub(crate) fn op(token: u64, kind: OpKind, lba: u64, blocks: u64, buf: Option<DmaBuf>) -> Op {
    Op { token, kind, lba, blocks, buf }
}

pub(crate) fn bytes(buf: &DmaBuf) -> Vec<u8> {
    let mut bytes = vec![0; buf.len()];
    buf.read_into(0, &mut bytes);
    bytes
}
