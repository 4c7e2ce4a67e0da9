//! What the target promises of fences and slots, on a device in memory.

use std::sync::Arc;

use hugepage_alloc::PoolOptions;
use nvme_spec::Nsid;

use super::*;
use crate::block::{MemDevice, MemOptions};
use crate::fabrics::{
    FenceReason, HostPolicy, Identity, NamespaceSpec, SubsystemSpec, Target, TargetOptions,
};
use crate::ring::RingOptions;
use crate::units::{BlockSize, ByteLen, ByteOffset};

const LEN: ByteLen = ByteLen(1 << 20);
const BLOCK: u32 = 512;

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
        let device = MemDevice::new(MemOptions::new(LEN, BlockSize::B512)).expect("memory");
        let namespace = NamespaceSpec {
            nsid: Nsid(nsid),
            map: None,
            device: Arc::new(device),
            read_only: false,
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
        while let Some(done) = self.engine.next_done() {
            ends.push((done.request, done.status));
        }
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
    let (export, _) = lab.publish(1);
    lab.engine.open(Arc::clone(&export)).expect("a queue");
    let depth = u32::try_from(DEVICE_QUEUE_DEPTH).expect("small");
    lab.engine.reserve(DEVICE_QUEUE_DEPTH + 2);
    for request in 0..depth + 2 {
        lab.start(request, export.slot, IoKind::Write);
    }
    lab.target.fence(&export, FenceReason::MapInDoubt);
    let ends = lab.ends();
    assert_eq!(ends.len(), DEVICE_QUEUE_DEPTH + 2);
    for (request, status) in ends {
        let expected = if request < depth { Status::SUCCESS } else { Status::NAMESPACE_NOT_READY };
        assert_eq!(status, expected, "command {request}");
    }
    assert_eq!(lab.engine.in_flight(export.slot), 0);
}
