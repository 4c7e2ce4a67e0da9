//! A host without manners: every PDU of it can be wrong, and what the target says to that is looked at.

use std::net::SocketAddr;
use std::time::Duration;

use fastice::initiator::command::{self, command};
use fastice::initiator::raw::{RawConnection, RawEvent, RawPdu};
use fastice::tcp::TcpStats;
use fastice::tcp::digest::crc32c;
use fastice::tcp::pdu::{self, DataPdu, Digests, FatalErrorStatus, HEADER_MAX, PduHeader, R2t, TermReq};
use fastice::units::Lba;
use nvme_spec::fabrics::{ConnectData, nqn_field};
use nvme_spec::register::Property;
use nvme_spec::{CompletionQueueEntry, Nsid, NvmOpcode, Qid, SglDescriptor, Status, SubmissionQueueEntry};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::support::{NQN, TestTarget, connect, eventually};

/// How long an answer may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// The namespace that can be written, and the one that cannot.
pub(crate) const WRITABLE: Nsid = Nsid(1);
pub(crate) const READ_ONLY: Nsid = Nsid(2);
/// A host's name and identifier, for those who need no other.
pub(crate) const HOST: &str = "nqn.2026-11.io.fastice:rude-host";
pub(crate) const HOST_ID: [u8; 16] = [7; 16];

/// A subsystem whose data nobody cares for.
pub(crate) const NOISE_NQN: &str = "nqn.2026-11.io.fastice:noise";

/// A target with a writable and a read-only namespace of 16 MiB, and little memory for buffers.
pub(crate) fn rude_target() -> TestTarget {
    TestTarget::start(&format!(
        r#"
        buffer_memory = "8MiB"
        [[listener]]
        address = "127.0.0.1:0"
        [[subsystem]]
        nqn = "{NQN}"
        allow_any_host = true
        [[subsystem.namespace]]
        nsid = 1
        memory = "16MiB"
        [[subsystem.namespace]]
        nsid = 2
        memory = "16MiB"
        read_only = true
        [[subsystem]]
        nqn = "{NOISE_NQN}"
        allow_any_host = true
        [[subsystem.namespace]]
        nsid = 1
        memory = "16MiB"
        "#
    ))
}

/// A connection that has introduced itself.
pub(crate) fn introduced(address: SocketAddr, digests: Digests) -> RawConnection {
    let mut raw = RawConnection::connect(address).expect("a connection");
    raw.initialize(digests).expect("an ICResp");
    raw
}

/// The command with its CID and SGL descriptor.
pub(crate) fn with(command: &SubmissionQueueEntry, cid: u16, dptr: SglDescriptor) -> [u8; 64] {
    let sqe = SubmissionQueueEntry { flags: 0x40, cid: cid.into(), dptr, ..*command };
    sqe.as_bytes().try_into().expect("64 bytes")
}

/// A read or write of `blocks` blocks of 4096 bytes, its data in PDUs of its own.
pub(crate) fn transfer(opcode: NvmOpcode, nsid: Nsid, cid: u16, lba: u64, blocks: u16) -> [u8; 64] {
    let io = command::io(opcode, nsid, Lba(lba), blocks - 1, false);
    with(&io, cid, SglDescriptor::transport(u32::from(blocks) * 4096))
}

/// A write whose data is in its capsule.
pub(crate) fn write_in_capsule(nsid: Nsid, cid: u16, lba: u64, len: u32) -> [u8; 64] {
    let blocks = u16::try_from(len / 4096).expect("a few blocks");
    let io = command::io(NvmOpcode::WRITE, nsid, Lba(lba), blocks - 1, false);
    with(&io, cid, SglDescriptor::in_capsule(0, len))
}

/// A Flush.
pub(crate) fn flush(nsid: Nsid, cid: u16) -> [u8; 64] {
    with(&command(NvmOpcode::FLUSH.0, nsid), cid, SglDescriptor::transport(0))
}

/// A CapsuleCmd with its data, as bytes.
pub(crate) fn capsule(digests: Digests, sqe: &[u8; 64], data: &[u8]) -> Vec<u8> {
    let mut header = [0; HEADER_MAX];
    let data_len = u32::try_from(data.len()).expect("little data");
    let len = pdu::capsule_cmd(&mut header, digests, 0, sqe, data_len);
    with_data(&header[..len], digests, data)
}

/// An H2CData with its data, as bytes.
pub(crate) fn h2c_data(digests: Digests, header: &DataPdu, data: &[u8]) -> Vec<u8> {
    let mut bytes = [0; HEADER_MAX];
    let len = pdu::h2c_data(&mut bytes, digests, 0, header);
    with_data(&bytes[..len], digests, data)
}

fn with_data(header: &[u8], digests: Digests, data: &[u8]) -> Vec<u8> {
    let mut bytes = header.to_vec();
    bytes.extend_from_slice(data);
    if digests.data && !data.is_empty() {
        bytes.extend_from_slice(&crc32c(0, data).to_le_bytes());
    }
    bytes
}

/// What an R2T asked for, answered in one PDU.
pub(crate) fn answer_to(r2t: &R2t) -> DataPdu {
    DataPdu {
        cccid: r2t.cccid,
        ttag: r2t.ttag,
        data_offset: r2t.offset,
        data_len: r2t.len,
        last: true,
        success: false,
    }
}

/// The next PDU.
pub(crate) fn pdu_of(raw: &mut RawConnection) -> RawPdu {
    match raw.read_pdu(PATIENCE).expect("a good PDU") {
        RawEvent::Pdu(pdu) => pdu,
        other => panic!("{other:?} in place of a PDU"),
    }
}

/// The next PDU, which must be an R2T.
pub(crate) fn r2t_of(raw: &mut RawConnection) -> R2t {
    match pdu_of(raw).header {
        PduHeader::R2t(r2t) => r2t,
        other => panic!("{other:?} in place of an R2T"),
    }
}

/// The next PDU, which must be a completion: CID, status without DNR and More, DW0.
pub(crate) fn completion_of(raw: &mut RawConnection) -> (u16, Status, u32) {
    let pdu = pdu_of(raw);
    completion_in(&pdu).unwrap_or_else(|| panic!("{pdu:?} in place of a completion"))
}

/// The completion in a PDU, if it is one.
pub(crate) fn completion_in(pdu: &RawPdu) -> Option<(u16, Status, u32)> {
    let PduHeader::CapsuleResp(bytes) = pdu.header else { return None };
    let cqe = CompletionQueueEntry::read_from_bytes(&bytes).expect("16 bytes");
    Some((cqe.cid.get(), Status(cqe.status.get() >> 1).code(), cqe.dw0.get()))
}

/// Sends a capsule; its completion must have this status.
pub(crate) fn expect_status(raw: &mut RawConnection, sqe: &[u8; 64], data: &[u8], status: Status) {
    raw.send_capsule(sqe, data).expect("sent");
    let cid = u16::from_le_bytes([sqe[2], sqe[3]]);
    let (answered, got, _) = completion_of(raw);
    assert_eq!((answered, got), (cid, status), "{got} in place of {status}");
}

/// A read of `blocks` blocks that succeeds: its data.
pub(crate) fn read(raw: &mut RawConnection, nsid: Nsid, lba: u64, blocks: u16) -> Vec<u8> {
    raw.send_capsule(&transfer(NvmOpcode::READ, nsid, 0x7EAD, lba, blocks), &[]).expect("sent");
    let pdu = pdu_of(raw);
    assert!(matches!(pdu.header, PduHeader::C2hData(header) if header.cccid == 0x7EAD), "{pdu:?}");
    assert!(pdu.data_digest_good);
    assert_eq!(completion_of(raw).1, Status::SUCCESS);
    pdu.data
}

/// A TermReq must come, and nothing after it.
pub(crate) fn expect_term(raw: &mut RawConnection, fes: FatalErrorStatus, fei: u32) {
    let pdu = pdu_of(raw);
    assert_eq!(pdu.header, PduHeader::TermReq(TermReq { fes, fei }), "the wrong TermReq");
    expect_closed(raw);
}

/// The connection must be closed by the target, without a word.
pub(crate) fn expect_closed(raw: &mut RawConnection) {
    let event = raw.read_pdu(PATIENCE).expect("an end");
    assert_eq!(event, RawEvent::Closed);
}

/// Connect data.
pub(crate) fn connect_data(cntlid: u16, subnqn: &str, hostnqn: &str, hostid: [u8; 16]) -> ConnectData {
    let mut data = ConnectData::new_zeroed();
    data.hostid = hostid;
    data.cntlid = cntlid.into();
    data.subnqn = nqn_field(subnqn).expect("an NQN");
    data.hostnqn = nqn_field(hostnqn).expect("an NQN");
    data
}

/// Sends a Connect; gives its status and DW0.
pub(crate) fn try_connect(
    raw: &mut RawConnection,
    qid: u16,
    entries: u16,
    data: &ConnectData,
) -> (Status, u32) {
    let sqe = with(&command::connect(Qid(qid), entries, 0, 15_000), 0, SglDescriptor::in_capsule(0, 1024));
    raw.send_capsule(&sqe, data.as_bytes()).expect("sent");
    let (_, status, dw0) = completion_of(raw);
    (status, dw0)
}

/// A rude host with an enabled controller.
pub(crate) struct RudeHost {
    pub(crate) admin: RawConnection,
    pub(crate) cntlid: u16,
    address: SocketAddr,
    nqn: &'static str,
}

impl RudeHost {
    /// Connects an admin queue and enables the controller.
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::connect_to(address, NQN)
    }

    /// As [`RudeHost::connect`], to a subsystem.
    pub(crate) fn connect_to(address: SocketAddr, nqn: &'static str) -> Self {
        let mut host = Self::admin_queue(address, nqn);
        host.enable();
        host
    }

    /// Connects an admin queue only.
    pub(crate) fn connect_disabled(address: SocketAddr) -> Self {
        Self::admin_queue(address, NQN)
    }

    fn admin_queue(address: SocketAddr, nqn: &'static str) -> Self {
        let mut admin = introduced(address, Digests::NONE);
        let (status, dw0) = try_connect(&mut admin, 0, 32, &connect_data(0xFFFF, nqn, HOST, HOST_ID));
        assert_eq!(status, Status::SUCCESS);
        Self { admin, cntlid: u16::try_from(dw0 & 0xFFFF).expect("16 bits"), address, nqn }
    }

    /// Sets CC.EN and waits for CSTS.RDY.
    pub(crate) fn enable(&mut self) {
        let set = with(&command::property_set(Property::CC, 0x0046_0001), 1, SglDescriptor::default());
        expect_status(&mut self.admin, &set, &[], Status::SUCCESS);
        eventually("CSTS.RDY", || {
            let get = with(&command::property_get(Property::CSTS, false), 2, SglDescriptor::default());
            self.admin.send_capsule(&get, &[]).expect("sent");
            completion_of(&mut self.admin).2 & 1 != 0
        });
    }

    /// An I/O queue of this controller.
    pub(crate) fn queue(&self, qid: u16, entries: u16, digests: Digests) -> RawConnection {
        let mut raw = introduced(self.address, digests);
        let data = connect_data(self.cntlid, self.nqn, HOST, HOST_ID);
        let (status, _) = try_connect(&mut raw, qid, entries, &data);
        assert_eq!(status, Status::SUCCESS);
        raw
    }
}

/// The counters of connections.
pub(crate) fn tcp_stats(target: &TestTarget) -> TcpStats {
    target.running.stats().1
}

/// A polite host is served, and its data is right.
pub(crate) fn expect_service(target: &TestTarget) {
    let controller = connect(target);
    let namespace = controller.namespace(WRITABLE).expect("the namespace");
    let data: Vec<u8> = (0..64 * 1024u32).map(|at| (at / 7 + at) as u8).collect();
    namespace.write(Lba(2048), &data, true).expect("write");
    let mut back = vec![0; data.len()];
    namespace.read(Lba(2048), &mut back).expect("read");
    assert!(data == back, "what was read is not what was written");
    controller.shutdown().expect("shutdown");
}

/// A polite host is served, and when all are gone the target holds nothing.
pub(crate) fn expect_no_leak(target: &TestTarget) {
    expect_service(target);
    eventually("every connection has ended", || {
        let stats = tcp_stats(target);
        stats.connections == stats.connections_ended
    });
    eventually("the cores hold nothing", || {
        let stats = target.running.core_stats();
        stats.iter().all(|core| (core.connections, core.commands, core.buffer_bytes) == (0, 0, 0))
    });
    assert!(!target.running.has_ended());
}
