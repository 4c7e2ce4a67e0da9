//! A small NVMe/TCP target that plays its part message by message over loopback TCP, and misbehaves on demand.
//!
//! One namespace in memory, a thread a connection. It is made for testing the initiator and nothing else: what it
//! does not know it answers with Invalid Field, and it trusts the codec that the initiator uses too. The byte layout
//! itself is pinned by the golden bytes in the codec's own tests.

#[path = "scripted_admin.rs"]
mod scripted_admin;

use fastice::tcp::digest::crc32c;
use fastice::tcp::pdu::{
    self, DataPdu, Digests, HEADER_MAX, IcResp, PduHeader, PduRules, Phase, R2t, Receiver, TERM_REQ_MAX,
    TermReq,
};
use nvme_spec::register::Cc;
use nvme_spec::{AdminOpcode, CompletionQueueEntry, NvmOpcode, Status, SubmissionQueueEntry};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use zerocopy::{IntoBytes, transmute};

/// Bytes of a logical block.
pub(crate) const BLOCK_LEN: usize = 512;
/// CNTLID that Connect gives.
pub(crate) const CNTLID: u16 = 7;

/// What goes wrong, at the read or write number `at` (from zero) of the target's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Answers a read with a data digest off by one bit.
    WrongDataDigest,
    /// Answers with a header digest off by one bit.
    WrongHeaderDigest,
    /// Answers with a C2HTermReq and closes.
    TermReq,
    /// Sends half a response and closes.
    TruncatedPdu,
    /// Closes without a word.
    Close,
    /// Says nothing more on this connection.
    Silence,
    /// Completes a CID that is not outstanding.
    UnknownCid,
    /// Completes the command twice.
    DoubleCompletion,
    /// Sends read data beyond what was asked for.
    DataOutOfRange,
    /// Skips the first four bytes of read data.
    DataWithHole,
    /// Completes a read with success after half of its data.
    ShortData,
    /// Asks for more data than the write has.
    R2tOutOfRange,
    /// Sends a PDU type that does not exist.
    UnknownPduType,
    /// Fails the command.
    Status(Status),
    /// Acknowledges a write and does not do it.
    LostWrite,
    /// Does a write one block further.
    MisplacedWrite,
    /// Does only the first half of a write.
    TornWrite,
}

/// How the target plays.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Behaviour {
    /// Digests granted; `None` grants what is asked for.
    pub(crate) digests: Option<Digests>,
    pub(crate) cpda: u8,
    pub(crate) maxh2cdata: u32,
    /// In-capsule data of I/O commands.
    pub(crate) in_capsule_len: u32,
    /// The most data of a C2HData.
    pub(crate) c2h_len_max: usize,
    /// The most data an R2T asks for.
    pub(crate) r2t_len_max: u32,
    /// Leaves out good responses to reads.
    pub(crate) success_flag: bool,
    pub(crate) mdts: u8,
    pub(crate) io_queues: u16,
    pub(crate) blocks: u64,
    pub(crate) fault: Fault,
    /// The read or write that the fault hits.
    pub(crate) fault_at: u32,
    /// Changes of the discovery log while it is read.
    pub(crate) discovery_changes: u32,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            digests: None,
            cpda: 0,
            maxh2cdata: 1 << 20,
            in_capsule_len: 8192,
            c2h_len_max: usize::MAX,
            r2t_len_max: u32::MAX,
            success_flag: false,
            mdts: 0,
            io_queues: 8,
            blocks: 8192,
            fault: Fault::None,
            fault_at: 0,
            discovery_changes: 0,
        }
    }
}

/// What the target has seen.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) term_reqs: Mutex<Vec<TermReq>>,
    pub(crate) keep_alives: AtomicU32,
    pub(crate) flushes: AtomicU32,
    pub(crate) h2c_data: Mutex<Vec<u32>>,
    pub(crate) io_commands: AtomicU32,
    pub(crate) shut_down: AtomicBool,
    pub(crate) connections: AtomicU32,
}

/// State shared by the connections.
struct Shared {
    behaviour: Behaviour,
    media: Mutex<Vec<u8>>,
    seen: Seen,
    stopping: AtomicBool,
    genctr: AtomicU32,
    genctr_reads: AtomicU32,
}

/// A running target; it stops when dropped.
pub(crate) struct ScriptedTarget {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl ScriptedTarget {
    pub(crate) fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("its address");
        let media = vec![0; usize::try_from(behaviour.blocks).expect("a small namespace") * BLOCK_LEN];
        let shared = Arc::new(Shared {
            behaviour,
            media: Mutex::new(media),
            seen: Seen::default(),
            stopping: AtomicBool::new(false),
            genctr: AtomicU32::new(1),
            genctr_reads: AtomicU32::new(0),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for stream in listener.incoming() {
                    if shared.stopping.load(Ordering::Acquire) {
                        return;
                    }
                    let Ok(stream) = stream else { continue };
                    shared.seen.connections.fetch_add(1, Ordering::Relaxed);
                    let shared = Arc::clone(&shared);
                    std::thread::spawn(move || Connection::new(stream, shared).serve());
                }
            }
        });
        Self { address, shared, thread: Some(thread) }
    }

    pub(crate) fn seen(&self) -> &Seen {
        &self.shared.seen
    }

    /// The medium.
    pub(crate) fn media(&self) -> Vec<u8> {
        self.shared.media.lock().expect("no panic in the target").clone()
    }
}

impl Drop for ScriptedTarget {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A write that waits for data.
struct Pending {
    sqe: SubmissionQueueEntry,
    data: Vec<u8>,
    received: u32,
    asked: u32,
}

struct Connection {
    stream: TcpStream,
    shared: Arc<Shared>,
    rules: PduRules,
    hpda: u8,
    unread: Vec<u8>,
    qid: u16,
    pending: VecDeque<Pending>,
    events: Vec<u16>,
    cc: Cc,
}

/// The connection is over.
struct Over;

impl From<std::io::Error> for Over {
    fn from(_: std::io::Error) -> Self {
        Self
    }
}

impl Connection {
    fn new(stream: TcpStream, shared: Arc<Shared>) -> Self {
        let _ = stream.set_nodelay(true);
        Self {
            stream,
            shared,
            rules: PduRules { in_capsule_len_max: 1 << 20, ..PduRules::initializing(Receiver::Controller) },
            hpda: 0,
            unread: Vec::new(),
            qid: u16::MAX,
            pending: VecDeque::new(),
            events: Vec::new(),
            cc: Cc::new(),
        }
    }

    fn serve(mut self) {
        while let Ok((header, data)) = self.next_pdu() {
            let handled = match header {
                PduHeader::IcReq(request) => {
                    self.hpda = request.hpda;
                    self.initialize(request.digests)
                }
                PduHeader::CapsuleCmd(bytes) => self.command(transmute!(bytes), data),
                PduHeader::H2cData(header) => self.data(header, &data),
                PduHeader::TermReq(pdu) => {
                    self.shared.seen.term_reqs.lock().expect("no panic").push(pdu);
                    Err(Over)
                }
                _ => Err(Over),
            };
            if handled.is_err() {
                break;
            }
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn next_pdu(&mut self) -> Result<(PduHeader, Vec<u8>), Over> {
        loop {
            if let Some(first8) = self.unread.first_chunk::<8>() {
                let plan = pdu::header_len_needed(&self.rules, first8).map_err(|_| Over)?;
                if self.unread.len() >= plan.total_len() {
                    let decoded = pdu::decode_header(&self.rules, &self.unread).map_err(|_| Over)?;
                    let bytes: Vec<u8> = self.unread.drain(..plan.total_len()).collect();
                    let (data, ddgst) = bytes[plan.data_offset..].split_at(plan.data_len);
                    assert!(
                        !plan.ddgst || ddgst == crc32c(0, data).to_le_bytes(),
                        "the host's data digest is wrong"
                    );
                    return Ok((decoded.header, data.to_vec()));
                }
            }
            let mut piece = [0; 65536];
            match self.stream.read(&mut piece)? {
                0 => return Err(Over),
                len => self.unread.extend_from_slice(&piece[..len]),
            }
        }
    }

    fn initialize(&mut self, asked: Digests) -> Result<(), Over> {
        let behaviour = self.shared.behaviour;
        let digests = behaviour.digests.unwrap_or(asked);
        let mut out = [0; HEADER_MAX];
        let ic_resp = IcResp { cpda: behaviour.cpda, digests, maxh2cdata: behaviour.maxh2cdata };
        let len = pdu::ic_resp(&mut out, &ic_resp);
        self.stream.write_all(&out[..len])?;
        self.rules.phase = Phase::Running;
        self.rules.digests = digests;
        self.rules.pda = behaviour.cpda;
        self.rules.data_len_max = behaviour.maxh2cdata;
        Ok(())
    }

    fn command(&mut self, sqe: SubmissionQueueEntry, data: Vec<u8>) -> Result<(), Over> {
        if sqe.opcode == AdminOpcode::FABRICS.0 {
            return self.fabrics(sqe);
        }
        if self.qid == 0 { self.admin(&sqe) } else { self.io(sqe, data) }
    }

    fn io(&mut self, sqe: SubmissionQueueEntry, data: Vec<u8>) -> Result<(), Over> {
        let moves = matches!(NvmOpcode(sqe.opcode), NvmOpcode::READ | NvmOpcode::WRITE);
        let behaviour = self.shared.behaviour;
        let number =
            if moves { self.shared.seen.io_commands.fetch_add(1, Ordering::Relaxed) } else { u32::MAX };
        let fault = if number == behaviour.fault_at { behaviour.fault } else { Fault::None };
        self.misbehave(fault, &sqe)?;
        if let Fault::Status(status) = fault {
            return self.respond(&sqe, 0, status);
        }
        let start = usize::try_from(sqe.cdw10_11()).expect("64 bits") * BLOCK_LEN;
        let len = ((sqe.cdw12.get() & 0xFFFF) as usize + 1) * BLOCK_LEN;
        match NvmOpcode(sqe.opcode) {
            NvmOpcode::READ => {
                let data = {
                    let media = self.shared.media.lock().expect("no panic");
                    media.get(start..start + len).map(<[u8]>::to_vec)
                };
                match data {
                    Some(data) => self.send_data(&sqe, &data, fault),
                    None => self.respond(&sqe, 0, Status::LBA_OUT_OF_RANGE.with_dnr()),
                }
            }
            NvmOpcode::WRITE if data.len() == len => self.write(&sqe, &data, fault),
            NvmOpcode::WRITE if data.is_empty() => {
                self.pending.push_back(Pending { sqe, data: vec![0; len], received: 0, asked: 0 });
                self.ask(self.pending.len() - 1, fault)
            }
            NvmOpcode::FLUSH => {
                self.shared.seen.flushes.fetch_add(1, Ordering::Relaxed);
                self.respond(&sqe, 0, Status::SUCCESS)
            }
            NvmOpcode::WRITE_ZEROES => {
                self.shared.media.lock().expect("no panic")[start..start + len].fill(0);
                self.respond(&sqe, 0, Status::SUCCESS)
            }
            NvmOpcode::DATASET_MANAGEMENT if data.len() == 16 => self.respond(&sqe, 0, Status::SUCCESS),
            _ => self.respond(&sqe, 0, Status::INVALID_FIELD.with_dnr()),
        }
    }

    /// The faults that do not depend on what the command is.
    fn misbehave(&mut self, fault: Fault, sqe: &SubmissionQueueEntry) -> Result<(), Over> {
        match fault {
            Fault::TermReq => {
                let mut out = [0; TERM_REQ_MAX];
                let term_req = TermReq { fes: pdu::FatalErrorStatus::INVALID_PDU_HEADER_FIELD, fei: 4 };
                let len = pdu::c2h_term_req(&mut out, term_req, sqe.as_bytes());
                self.stream.write_all(&out[..len])?;
                Err(Over)
            }
            Fault::Close => Err(Over),
            Fault::Silence => {
                std::thread::sleep(Duration::from_secs(2));
                Err(Over)
            }
            Fault::UnknownCid => self.complete(sqe.cid.get() ^ 0x8003, 0, Status::SUCCESS),
            Fault::DoubleCompletion => self.respond(sqe, 0, Status::INTERNAL_ERROR),
            Fault::UnknownPduType => Ok(self.stream.write_all(&[0x0B, 0, 24, 0, 24, 0, 0, 0])?),
            Fault::TruncatedPdu | Fault::WrongHeaderDigest => {
                let mut out = [0; HEADER_MAX];
                let mut len = pdu::capsule_resp(&mut out, self.rules.digests, &[0; 16]);
                out[len - 1] ^= 1;
                if fault == Fault::TruncatedPdu {
                    len = 12;
                }
                self.stream.write_all(&out[..len])?;
                if fault == Fault::TruncatedPdu { Err(Over) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }

    fn write(&mut self, sqe: &SubmissionQueueEntry, data: &[u8], fault: Fault) -> Result<(), Over> {
        let mut at = usize::try_from(sqe.cdw10_11()).expect("64 bits") * BLOCK_LEN;
        let mut len = data.len();
        match fault {
            Fault::LostWrite => len = 0,
            Fault::MisplacedWrite => at += BLOCK_LEN,
            Fault::TornWrite => len /= 2,
            _ => {}
        }
        let done = match self.shared.media.lock().expect("no panic").get_mut(at..at + len) {
            Some(place) => {
                place.copy_from_slice(&data[..len]);
                true
            }
            None => false,
        };
        self.respond(sqe, 0, if done { Status::SUCCESS } else { Status::LBA_OUT_OF_RANGE.with_dnr() })
    }

    /// Sends an R2T for what a write still lacks.
    fn ask(&mut self, index: usize, fault: Fault) -> Result<(), Over> {
        let digests = self.rules.digests;
        let limit = self.shared.behaviour.r2t_len_max;
        let pending = &mut self.pending[index];
        let total = u32::try_from(pending.data.len()).expect("small");
        let mut len = (total - pending.received).min(limit);
        pending.asked = pending.received + len;
        if fault == Fault::R2tOutOfRange {
            len += 4;
        }
        let r2t = R2t { cccid: pending.sqe.cid.get(), ttag: 0x55, offset: pending.received, len };
        let mut out = [0; HEADER_MAX];
        let header_len = pdu::r2t(&mut out, digests, &r2t);
        Ok(self.stream.write_all(&out[..header_len])?)
    }

    fn data(&mut self, header: pdu::DataHeader, data: &[u8]) -> Result<(), Over> {
        self.shared.seen.h2c_data.lock().expect("no panic").push(header.data_len);
        let index = self
            .pending
            .iter()
            .position(|pending| pending.sqe.cid.get() == header.cccid)
            .expect("data for a command that asked for it");
        let pending = &mut self.pending[index];
        assert_eq!((header.ttag, header.data_offset), (0x55, pending.received), "in order, with the tag");
        let at = header.data_offset as usize;
        pending.data[at..at + data.len()].copy_from_slice(data);
        pending.received += header.data_len;
        assert!(pending.received <= pending.asked, "no more than was asked for");
        assert_eq!(header.last, pending.received == pending.asked, "LAST marks the end of the R2T");
        if pending.received as usize == pending.data.len() {
            let pending = self.pending.remove(index).expect("it is there");
            return self.write(&pending.sqe, &pending.data, Fault::None);
        }
        if header.last { self.ask(index, Fault::None) } else { Ok(()) }
    }

    /// Sends data to the host, and the completion.
    fn send_data(&mut self, sqe: &SubmissionQueueEntry, data: &[u8], fault: Fault) -> Result<(), Over> {
        let digests = self.rules.digests;
        let data = if fault == Fault::ShortData { &data[..data.len() / 2] } else { data };
        let mut offset = match fault {
            Fault::DataOutOfRange => data.len(),
            Fault::DataWithHole => 4,
            _ => 0,
        };
        let pieces = data.chunks(self.shared.behaviour.c2h_len_max.min(data.len()));
        let count = pieces.len();
        let mut bytes = Vec::with_capacity(data.len() + 64);
        for (index, piece) in pieces.enumerate() {
            let last = index + 1 == count;
            let header = DataPdu {
                cccid: sqe.cid.get(),
                ttag: 0,
                data_offset: u32::try_from(offset).expect("small"),
                data_len: u32::try_from(piece.len()).expect("small"),
                last,
                success: last && self.shared.behaviour.success_flag && self.qid != 0,
            };
            let mut out = [0; HEADER_MAX];
            let len = pdu::c2h_data(&mut out, digests, self.hpda, &header);
            bytes.extend_from_slice(&out[..len]);
            bytes.extend_from_slice(piece);
            if digests.data {
                let flip = u32::from(fault == Fault::WrongDataDigest);
                bytes.extend_from_slice(&(crc32c(0, piece) ^ flip).to_le_bytes());
            }
            offset += piece.len();
        }
        self.stream.write_all(&bytes)?;
        if self.shared.behaviour.success_flag && self.qid != 0 {
            return Ok(());
        }
        self.respond(sqe, 0, Status::SUCCESS)
    }

    fn respond(&mut self, sqe: &SubmissionQueueEntry, result: u64, status: Status) -> Result<(), Over> {
        self.complete(sqe.cid.get(), result, status)
    }

    fn complete(&mut self, cid: u16, result: u64, status: Status) -> Result<(), Over> {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        let cqe = CompletionQueueEntry {
            dw0: (result as u32).into(),
            dw1: ((result >> 32) as u32).into(),
            cid: cid.into(),
            status: status.to_wire().into(),
            ..Default::default()
        };
        let mut out = [0; HEADER_MAX];
        let len = pdu::capsule_resp(&mut out, self.rules.digests, &transmute!(cqe));
        Ok(self.stream.write_all(&out[..len])?)
    }
}
