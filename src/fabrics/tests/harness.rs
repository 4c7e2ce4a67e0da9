//! A host without a transport: it makes submission queue entries and hands them to sessions.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use nvme_spec::fabrics::{ConnectCommand, ConnectData, nqn_field};
use nvme_spec::{Cntlid, Nsid, SglDescriptor, Status, SubmissionQueueEntry};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::super::*;
use crate::block::{BlockDevice, NullDevice};
use crate::units::{BlockSize, ByteLen};

pub(super) const NQN: &str = "nqn.2026-11.com.example:disk";
pub(super) const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555";
pub(super) const LEN: u64 = 1 << 24;

/// Counts wake-ups.
#[derive(Default)]
pub(super) struct Wakes(AtomicUsize);

impl Waker for Wakes {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Wakes {
    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

pub(super) fn device() -> Arc<dyn BlockDevice> {
    Arc::new(NullDevice::new(ByteLen(LEN), BlockSize::B512).unwrap())
}

pub(super) fn namespace(nsid: u32) -> NamespaceSpec {
    namespace_on(nsid, device())
}

pub(super) fn namespace_on(nsid: u32, device: Arc<dyn BlockDevice>) -> NamespaceSpec {
    NamespaceSpec {
        nsid: Nsid(nsid),
        map: None,
        device,
        read_only: false,
        on_fence: FencePolicy::NotReady,
        block_size: BlockSize::B512,
        len: ByteLen(LEN),
        identity: Identity::named("null"),
    }
}

pub(super) fn subsystem(namespaces: Vec<NamespaceSpec>) -> SubsystemSpec {
    SubsystemSpec {
        nqn: NQN.to_owned(),
        serial: serial_of(NQN),
        model: "fastice".to_owned(),
        hosts: HostPolicy::Any,
        namespaces,
    }
}

pub(super) fn ports() -> Vec<PortSpec> {
    let port = |id, listen: &str, discovery_only| PortSpec {
        id: PortId(id),
        listen: listen.parse().unwrap(),
        advertise: None,
        discovery_only,
    };
    vec![port(1, "0.0.0.0:4420", false), port(2, "0.0.0.0:8009", true)]
}

pub(super) fn only(hosts: &[&str]) -> HostPolicy {
    HostPolicy::List(hosts.iter().map(|host| (*host).to_owned()).collect::<BTreeSet<_>>())
}

/// A target with one subsystem of namespaces 1 and 3, the latter read-only.
pub(super) fn target() -> Arc<Target> {
    let target = Target::new(TargetOptions::default());
    let read_only = NamespaceSpec { read_only: true, ..namespace(3) };
    target.publish(vec![subsystem(vec![namespace(1), read_only])], ports()).unwrap();
    target
}

/// One host's side of one queue.
pub(super) struct Queue {
    pub(super) session: QueueSession,
    pub(super) wakes: Arc<Wakes>,
    pub(super) now: Instant,
    cid: u16,
}

impl Queue {
    pub(super) fn on_port(target: &Arc<Target>, port: u16) -> Self {
        let wakes = Arc::new(Wakes::default());
        let address = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let arrival =
            Arrival { port: PortId(port), peer: address("10.0.0.9:40000"), local: address("10.0.0.1:4420") };
        let waker: Arc<dyn Waker> = wakes.clone();
        let session = QueueSession::new(Arc::clone(target), arrival, waker);
        Self { session, wakes, now: Instant::now(), cid: 0 }
    }

    pub(super) fn new(target: &Arc<Target>) -> Self {
        Self::on_port(target, 1)
    }

    pub(super) fn begin(&mut self, mut sqe: SubmissionQueueEntry) -> Begin {
        self.cid = self.cid.wrapping_add(1);
        sqe.cid = U16::new(self.cid);
        let sqhd = self.session.sqhd();
        if let Some(command) = self.session.begin_transfer(&sqe) {
            return Begin::Io(command);
        }
        assert_eq!(self.session.sqhd(), sqhd, "it is none yet");
        let begin = self.session.begin(&sqe, self.now);
        let is_transfer = matches!(begin, Begin::Io(IoCommand { kind: IoKind::Read | IoKind::Write, .. }));
        assert!(!is_transfer, "a good one is told at first: {begin:?}");
        begin
    }

    /// The same, without a look whether it is a good transfer.
    pub(super) fn begin_at_length(&mut self, sqe: &SubmissionQueueEntry) -> Begin {
        self.session.begin(sqe, self.now)
    }

    /// The identifier of the command sent last.
    pub(super) fn cid(&self) -> u16 {
        self.cid
    }

    pub(super) fn respond(&mut self, sqe: SubmissionQueueEntry) -> Completion {
        match self.begin(sqe) {
            Begin::Respond(completion) => completion,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn status(&mut self, sqe: SubmissionQueueEntry) -> (Status, bool) {
        let status = self.respond(sqe).status;
        (status.code(), status.dnr())
    }

    pub(super) fn data(&mut self, sqe: SubmissionQueueEntry) -> Vec<u8> {
        match self.begin(sqe) {
            Begin::SendData { data, completion } => {
                assert_eq!(completion, Completion::SUCCESS);
                assert_eq!(data.len(), sqe.dptr.length.get() as usize);
                data
            }
            other => panic!("{other:?}"),
        }
    }

    /// Sends a command with data; gives what comes of the data.
    pub(super) fn send(&mut self, sqe: SubmissionQueueEntry, data: &[u8]) -> Begin {
        match self.begin(sqe) {
            Begin::NeedData { len } => {
                assert_eq!(len as usize, data.len());
                self.session.finish(&sqe, data, self.now)
            }
            other => other,
        }
    }

    pub(super) fn connect(&mut self, connect: &Connect) -> Completion {
        match self.send(connect.command(), connect.data().as_bytes()) {
            Begin::Respond(completion) => completion,
            Begin::RespondThenClose(completion) => {
                assert!(!completion.status.is_success());
                completion
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn property_get(&mut self, offset: u32, is_eight_bytes: bool) -> u64 {
        let completion = self.respond(property(4, offset, u8::from(is_eight_bytes), 0));
        assert_eq!(completion.status, Status::SUCCESS);
        u64::from(completion.dw1) << 32 | u64::from(completion.dw0)
    }

    pub(super) fn csts(&mut self) -> u64 {
        self.property_get(0x1C, false)
    }

    pub(super) fn set_cc(&mut self, value: u64) -> Completion {
        self.respond(property(0, 0x14, 0, value))
    }

    pub(super) fn events(&mut self) -> Vec<SessionEvent> {
        std::iter::from_fn(|| self.session.poll(self.now)).collect()
    }

    pub(super) fn close_reason(&mut self) -> Option<CloseReason> {
        self.events().into_iter().find_map(|event| match event {
            SessionEvent::Close(reason) => Some(reason),
            SessionEvent::Complete { .. } => None,
        })
    }
}

/// The parameters of a Connect.
#[derive(Clone)]
pub(super) struct Connect {
    pub(super) subnqn: String,
    pub(super) hostnqn: String,
    pub(super) hostid: [u8; 16],
    pub(super) cntlid: u16,
    pub(super) qid: u16,
    pub(super) sqsize_z: u16,
    pub(super) cattr: u8,
    pub(super) kato_ms: u32,
    pub(super) recfmt: u16,
}

impl Connect {
    pub(super) fn admin() -> Self {
        Self {
            subnqn: NQN.to_owned(),
            hostnqn: HOST.to_owned(),
            hostid: [5; 16],
            cntlid: Cntlid::DYNAMIC.0,
            qid: 0,
            sqsize_z: 31,
            cattr: 0,
            kato_ms: 5000,
            recfmt: 0,
        }
    }

    pub(super) fn discovery() -> Self {
        Self { subnqn: DISCOVERY_NQN.to_owned(), ..Self::admin() }
    }

    pub(super) fn io(cntlid: u16, qid: u16) -> Self {
        Self { cntlid, qid, sqsize_z: 127, kato_ms: 0, ..Self::admin() }
    }

    pub(super) fn command(&self) -> SubmissionQueueEntry {
        let command = ConnectCommand {
            opcode: 0x7F,
            flags: 0x40,
            fctype: 1,
            sgl1: SglDescriptor::in_capsule(0, 1024),
            recfmt: U16::new(self.recfmt),
            qid: U16::new(self.qid),
            sqsize_z: U16::new(self.sqsize_z),
            cattr: self.cattr,
            kato_ms: U32::new(self.kato_ms),
            ..Default::default()
        };
        SubmissionQueueEntry::read_from_bytes(command.as_bytes()).unwrap()
    }

    pub(super) fn data(&self) -> ConnectData {
        let mut data = ConnectData::new_zeroed();
        data.hostid = self.hostid;
        data.cntlid = U16::new(self.cntlid);
        data.subnqn = nqn_field(&self.subnqn).unwrap();
        data.hostnqn = nqn_field(&self.hostnqn).unwrap();
        data
    }
}

/// Property Set (0) or Get (4).
pub(super) fn property(fctype: u32, offset: u32, attrib: u8, value: u64) -> SubmissionQueueEntry {
    let [low, high] = [value & 0xFFFF_FFFF, value >> 32].map(|half| U32::new(u32::try_from(half).unwrap()));
    SubmissionQueueEntry {
        opcode: 0x7F,
        flags: 0x40,
        nsid: U32::new(fctype),
        dptr: SglDescriptor::transport(0),
        cdw10: U32::new(attrib.into()),
        cdw11: U32::new(offset),
        cdw12: low,
        cdw13: high,
        ..Default::default()
    }
}

/// A command with a transport SGL of `len` bytes.
pub(super) fn command(opcode: u8, nsid: u32, len: u32, cdws: [u32; 3]) -> SubmissionQueueEntry {
    let [cdw10, cdw11, cdw12] = cdws.map(U32::new);
    SubmissionQueueEntry {
        opcode,
        flags: 0x40,
        nsid: U32::new(nsid),
        dptr: SglDescriptor::transport(len),
        cdw10,
        cdw11,
        cdw12,
        ..Default::default()
    }
}

pub(super) fn identify(cns: u32, nsid: u32) -> SubmissionQueueEntry {
    command(0x06, nsid, 4096, [cns, 0, 0])
}

/// Get Log Page of `len` bytes from `offset`, RAE as given.
pub(super) fn log(page: u32, len: u32, offset: u32, retain: bool) -> SubmissionQueueEntry {
    let dwords_z = len / 4 - 1;
    let cdw10 = page | u32::from(retain) << 15 | (dwords_z & 0xFFFF) << 16;
    command(0x02, 0xFFFF_FFFF, len, [cdw10, dwords_z >> 16, offset])
}

/// Read, Write or Write Zeroes of `blocks` blocks of 512 bytes.
pub(super) fn io(opcode: u8, nsid: u32, slba: u64, blocks: u32) -> SubmissionQueueEntry {
    let len = if opcode == 0x08 { 0 } else { blocks * 512 };
    let low = u32::try_from(slba & 0xFFFF_FFFF).unwrap();
    command(opcode, nsid, len, [low, u32::try_from(slba >> 32).unwrap(), blocks - 1])
}

pub(super) const ENABLE: u64 = 0x0046_0001;

/// An admin queue whose controller is enabled and ready; gives its cntlid too.
pub(super) fn ready(target: &Arc<Target>) -> (Queue, u16) {
    ready_as(target, &Connect::admin())
}

pub(super) fn ready_as(target: &Arc<Target>, connect: &Connect) -> (Queue, u16) {
    let mut admin = Queue::new(target);
    let completion = admin.connect(connect);
    assert_eq!(completion.status, Status::SUCCESS);
    assert_eq!(admin.set_cc(ENABLE), Completion::SUCCESS);
    assert_eq!(admin.csts(), 1);
    (admin, u16::try_from(completion.dw0).unwrap())
}

pub(super) fn io_queue(target: &Arc<Target>, cntlid: u16, qid: u16) -> Queue {
    let mut queue = Queue::new(target);
    assert_eq!(queue.connect(&Connect::io(cntlid, qid)).status, Status::SUCCESS);
    queue
}
