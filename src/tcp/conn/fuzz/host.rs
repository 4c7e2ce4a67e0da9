//! The host of the connection's fuzz target.

#![expect(clippy::cast_possible_truncation, reason = "lengths and blocks of a fuzzed host are small")]

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nvme_spec::fabrics::{ConnectCommand, ConnectData, nqn_field};
use nvme_spec::{CompletionQueueEntry, SglDescriptor, Status, SubmissionQueueEntry};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{BLOCK_BYTES, BLOCKS, ENTRIES, NQN, PATIENCE, World};
use crate::tcp::digest::Digest;
use crate::tcp::pdu::{
    self, COMMON_HEADER_LEN, DataHeader, DataPdu, Digests, HEADER_MAX, IcReq, PduHeader, PduRules, Phase,
    R2t, Receiver,
};

/// Bits of the first byte of an input. The lowest two are the digests.
pub(super) mod knob {
    pub(in super::super) const FLOW_CONTROL: u8 = 1 << 2;
    /// The admin queue is fuzzed, not an I/O queue.
    pub(in super::super) const ADMIN: u8 = 1 << 3;
    /// No ICReq and no Connect: the actions come first.
    pub(in super::super) const UNINTRODUCED: u8 = 1 << 4;
    pub(in super::super) const ALIGNED: u8 = 1 << 5;
}

/// What a host does; the first byte of each action.
pub(super) mod action {
    pub(in super::super) const READ: u8 = 0;
    pub(in super::super) const WRITE: u8 = 1;
    pub(in super::super) const WRITE_IN_CAPSULE: u8 = 2;
    pub(in super::super) const FLUSH: u8 = 3;
    pub(in super::super) const WRITE_ZEROES: u8 = 4;
    pub(in super::super) const DEALLOCATE: u8 = 5;
    pub(in super::super) const ANSWER: u8 = 6;
    pub(in super::super) const ANSWER_IN_PIECES: u8 = 7;
    pub(in super::super) const DELIVER: u8 = 8;
    pub(in super::super) const DELIVER_SOME: u8 = 9;
    pub(in super::super) const STEP: u8 = 10;
    pub(in super::super) const PAUSE: u8 = 11;
    pub(in super::super) const RESUME: u8 = 12;
    pub(in super::super) const WRONG_RANGE: u8 = 13;
    /// From here on: what no good host does.
    pub(in super::super) const RUDE: u8 = 14;
    pub(in super::super) const FLIP: u8 = 14;
    pub(in super::super) const NOISE: u8 = 15;
    pub(in super::super) const STRANGE_COMMAND: u8 = 16;
    pub(in super::super) const SAME_CID: u8 = 17;
    pub(in super::super) const STRAY_DATA: u8 = 18;
    pub(in super::super) const CLOSE: u8 = 19;
    pub(in super::super) const COUNT: u8 = 20;
}

/// What reads of a block give once it was written.
fn pattern(lba: u64, at: usize) -> u8 {
    (lba as u8).wrapping_mul(29) ^ (at as u8) ^ ((at >> 8) as u8).wrapping_mul(3) | 1
}

/// A command that was sent.
#[derive(Clone, Copy)]
struct Sent {
    lba: u64,
    blocks: u16,
    reads: bool,
    /// Its data came.
    got: bool,
    times: u32,
}

/// One queue of a host.
pub(super) struct Host {
    stream: UnixStream,
    knobs: u8,
    rules: PduRules,
    unread: Vec<u8>,
    outbox: VecDeque<u8>,
    asked: VecDeque<R2t>,
    sent: HashMap<u16, Sent>,
    next_cid: u16,
    reading: bool,
    /// The connection is over, by whomever.
    over: bool,
    /// Bytes were sent that are no PDUs: CIDs may be anything.
    noisy: bool,
    /// Something was sent that may rightly stay unanswered, or end the connection.
    rude: bool,
    cntlid: u16,
}

impl Host {
    pub(super) fn new(stream: UnixStream, knobs: u8) -> Self {
        Self {
            stream,
            knobs,
            rules: PduRules { data_len_max: 1 << 20, ..PduRules::initializing(Receiver::Host) },
            unread: Vec::new(),
            outbox: VecDeque::new(),
            asked: VecDeque::new(),
            sent: HashMap::new(),
            next_cid: 0,
            reading: true,
            over: false,
            noisy: knobs & knob::UNINTRODUCED != 0,
            rude: knobs & (knob::UNINTRODUCED | knob::ADMIN) != 0,
            cntlid: 0,
        }
    }

    pub(super) fn cntlid(&self) -> u16 {
        self.cntlid
    }

    /// Introduces itself, connects an admin queue, and enables the controller.
    pub(super) fn become_admin(&mut self, world: &mut World) {
        self.introduce(world);
        self.cntlid = self.connect(world, 0, 0xFFFF, 32);
        let enable = SubmissionQueueEntry {
            opcode: 0x7F,
            cdw11: 0x14.into(),
            cdw12: 0x0046_0001.into(),
            ..Default::default()
        };
        self.command(enable, SglDescriptor::default(), &[], 0, 0);
        self.settle(world, "Property Set");
    }

    /// Introduces itself and connects an I/O queue.
    pub(super) fn become_io(&mut self, world: &mut World, cntlid: u16) {
        self.introduce(world);
        self.connect(world, 1, cntlid, ENTRIES);
    }

    fn introduce(&mut self, world: &mut World) {
        let digests = Digests { header: self.knobs & 1 != 0, data: self.knobs & 2 != 0 };
        let hpda = if self.knobs & knob::ALIGNED == 0 { 0 } else { self.knobs >> 6 };
        let mut header = [0; HEADER_MAX];
        let len = pdu::ic_req(&mut header, &IcReq { hpda, digests, maxr2t_z: 0 });
        self.outbox.extend(&header[..len]);
        let deadline = Instant::now() + PATIENCE;
        while self.rules.phase == Phase::Initializing {
            assert!(Instant::now() < deadline, "no ICResp");
            self.deliver(usize::MAX);
            world.step();
            self.receive();
        }
    }

    fn connect(&mut self, world: &mut World, qid: u16, cntlid: u16, entries: u16) -> u16 {
        let mut data = ConnectData::new_zeroed();
        data.hostid = [1; 16];
        data.cntlid = cntlid.into();
        data.subnqn = nqn_field(NQN).expect("an NQN");
        data.hostnqn = nqn_field("nqn.2026-11.io.fastice:fuzz-host").expect("an NQN");
        let command = ConnectCommand {
            opcode: 0x7F,
            fctype: 1,
            qid: qid.into(),
            sqsize_z: (entries - 1).into(),
            cattr: if self.knobs & knob::FLOW_CONTROL == 0 { 4 } else { 0 },
            ..Default::default()
        };
        let sqe = SubmissionQueueEntry::read_from_bytes(command.as_bytes()).expect("64 bytes");
        self.command(sqe, SglDescriptor::in_capsule(0, 1024), data.as_bytes(), 0, 0);
        self.settle(world, "Connect");
        self.cntlid
    }

    /// Does what the input says, and reads what came.
    pub(super) fn act(&mut self, world: &mut World, bytes: &[u8]) {
        let (what, a, b) = match *bytes {
            [what, a, b] => (what % action::COUNT, a, b),
            [what, a] => (what % action::COUNT, a, 0),
            [what] => (what % action::COUNT, 0, 0),
            _ => return,
        };
        match what {
            action::DELIVER => self.deliver(usize::MAX),
            action::DELIVER_SOME => self.deliver(1 + usize::from(a) * usize::from(b % 16 + 1)),
            action::STEP => (0..=a % 8).for_each(|_| world.step()),
            action::PAUSE => self.reading = false,
            action::RESUME => self.reading = true,
            action::ANSWER => self.answer(1 << 20),
            action::ANSWER_IN_PIECES => self.answer((usize::from(a) * 64 + 4) & !3),
            // Rude things are rare: one in four of the random ones.
            action::RUDE.. if b % 4 == 0 || a == 0xFF => self.rude(what, a, b),
            action::RUDE.. => self.good(what % action::ANSWER, a, b),
            _ => self.good(what, a, b),
        }
        if what >= action::DELIVER || self.outbox.len() > 1 << 20 {
            world.step();
        }
        self.receive();
    }

    /// A command of a good host, as long as its queue has room.
    fn good(&mut self, what: u8, a: u8, b: u8) {
        if self.sent.len() + 2 > usize::from(ENTRIES) {
            return;
        }
        // Mostly short, sometimes a quarter of a megabyte.
        let blocks = if b % 8 == 7 { u16::from(b) / 4 + 1 } else { u16::from(b) % 4 + 1 };
        let lba = u64::from(a) * 2 % (BLOCKS - u64::from(blocks));
        let bytes = usize::from(blocks) * BLOCK_BYTES;
        let transport = SglDescriptor::transport(bytes as u32);
        let io = |opcode: u8| SubmissionQueueEntry {
            opcode,
            nsid: 1.into(),
            cdw10: (lba as u32).into(),
            cdw12: u32::from(blocks - 1).into(),
            ..Default::default()
        };
        match what {
            action::READ => self.command(io(2), transport, &[], lba, blocks),
            action::WRITE => self.command(io(1), transport, &[], lba, blocks),
            action::WRITE_IN_CAPSULE if bytes <= 16384 && self.knobs & knob::ADMIN == 0 => {
                let data = written(lba, bytes);
                self.command(io(1), SglDescriptor::in_capsule(0, bytes as u32), &data, lba, blocks);
            }
            action::FLUSH => self.command(io(0), SglDescriptor::default(), &[], 0, 0),
            action::WRITE_ZEROES => self.command(io(8), SglDescriptor::default(), &[], 0, 0),
            action::DEALLOCATE => {
                let mut ranges = [0; 16];
                ranges[4] = blocks as u8;
                ranges[8..16].copy_from_slice(&lba.to_le_bytes());
                let sqe = SubmissionQueueEntry { cdw10: 0.into(), cdw11: 4.into(), cdw12: 0.into(), ..io(9) };
                self.command(sqe, SglDescriptor::in_capsule(0, 16), &ranges, 0, 0);
            }
            action::WRONG_RANGE => {
                let sqe = SubmissionQueueEntry { cdw10: (BLOCKS as u32).into(), ..io(1 + a % 2) };
                self.command(sqe, transport, &[], 0, 0);
            }
            _ => {}
        }
    }

    fn rude(&mut self, what: u8, a: u8, b: u8) {
        self.rude = true;
        match what {
            action::FLIP => {
                self.noisy = true;
                let at = usize::from(a) + usize::from(b) * 4;
                if let Some(byte) = self.outbox.get_mut(at) {
                    *byte ^= 1 << (b >> 2 & 7);
                }
            }
            action::NOISE => {
                self.noisy = true;
                self.outbox.extend((0..a).map(|at| at.wrapping_mul(b | 1).rotate_left(3)));
            }
            action::STRANGE_COMMAND => {
                // The data, if it is asked for, is what a good host would send: nothing strange is written.
                let sqe = SubmissionQueueEntry { opcode: a, nsid: u32::from(b).into(), ..Default::default() };
                let dptr = SglDescriptor::of(b >> 4, b & 15, u64::from(a), u32::from(a) * 64);
                self.noisy |= a == 1;
                self.command(sqe, dptr, &[], 0, 0);
            }
            action::SAME_CID => {
                self.next_cid = self.next_cid.wrapping_sub(1);
                self.good(a % action::ANSWER, a, b);
            }
            action::STRAY_DATA => {
                self.noisy = true;
                let r2t = R2t { cccid: a.into(), ttag: (b >> 2).into(), offset: 0, len: 4096 };
                self.data(&r2t, 0, &[0xEE; 4096], true);
            }
            action::CLOSE => {
                let how = if a & 1 == 0 { Shutdown::Write } else { Shutdown::Both };
                // Fails only when the target was faster.
                let _ = self.stream.shutdown(how);
            }
            _ => {}
        }
    }

    /// Puts a command into the outbox.
    fn command(
        &mut self,
        sqe: SubmissionQueueEntry,
        dptr: SglDescriptor,
        data: &[u8],
        lba: u64,
        blocks: u16,
    ) {
        let cid = self.next_cid;
        self.next_cid = cid.wrapping_add(1);
        let sqe = SubmissionQueueEntry { flags: 0x40, cid: cid.into(), dptr, ..sqe };
        let mut header = [0; HEADER_MAX];
        let bytes: [u8; 64] = sqe.as_bytes().try_into().expect("64 bytes");
        let len = pdu::capsule_cmd(&mut header, self.rules.digests, 0, &bytes, data.len() as u32);
        self.outbox.extend(&header[..len]);
        self.payload(data);
        let sent = Sent { lba, blocks, reads: sqe.opcode == 2, got: false, times: 0 };
        self.sent.entry(cid).or_insert(sent).times += 1;
    }

    fn payload(&mut self, data: &[u8]) {
        self.outbox.extend(data);
        if self.rules.digests.data && !data.is_empty() {
            let mut digest = Digest::new();
            digest.update(data);
            self.outbox.extend(digest.to_wire());
        }
    }

    /// Answers the oldest R2T, in pieces of `piece_len` bytes.
    fn answer(&mut self, piece_len: usize) {
        let Some(r2t) = self.asked.pop_front() else { return };
        let lba = self.sent.get(&r2t.cccid).map_or(0, |sent| sent.lba);
        let data = written(lba, r2t.len as usize);
        let mut at = 0;
        for piece in data.chunks(piece_len) {
            at += piece.len();
            self.data(&r2t, at - piece.len(), piece, at == data.len());
        }
    }

    fn data(&mut self, r2t: &R2t, at: usize, piece: &[u8], last: bool) {
        let header = DataPdu {
            cccid: r2t.cccid,
            ttag: r2t.ttag,
            data_offset: r2t.offset + at as u32,
            data_len: piece.len() as u32,
            last,
            success: false,
        };
        let mut bytes = [0; HEADER_MAX];
        let len = pdu::h2c_data(&mut bytes, self.rules.digests, 0, &header);
        self.outbox.extend(&bytes[..len]);
        self.payload(piece);
    }

    /// Sends up to `count` bytes, as many as the socket takes.
    fn deliver(&mut self, count: usize) {
        let mut left = count.min(self.outbox.len());
        while left > 0 && !self.over {
            let (front, _) = self.outbox.as_slices();
            match self.stream.write(&front[..left.min(front.len())]) {
                Ok(sent) => {
                    self.outbox.drain(..sent);
                    left -= sent;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.outbox.clear(),
            }
            left = left.min(self.outbox.len());
        }
    }

    /// Reads what there is and checks it.
    fn receive(&mut self) {
        let mut piece = [0; 65536];
        while self.reading && !self.over {
            match self.stream.read(&mut piece) {
                Ok(0) => self.over = true,
                Ok(count) => self.unread.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.over = true,
            }
        }
        while let Some(first8) = self.unread.first_chunk::<COMMON_HEADER_LEN>() {
            let plan = pdu::header_len_needed(&self.rules, first8).expect("the target sends good PDUs");
            if self.unread.len() < plan.total_len() {
                break;
            }
            let decoded = pdu::decode_header(&self.rules, &self.unread).expect("the target sends good PDUs");
            let bytes: Vec<u8> = self.unread.drain(..plan.total_len()).collect();
            self.take(&decoded.header, &bytes[plan.data_offset..plan.data_offset + plan.data_len]);
        }
    }

    fn take(&mut self, header: &PduHeader, data: &[u8]) {
        match header {
            PduHeader::IcResp(ic_resp) => {
                self.rules.phase = Phase::Running;
                self.rules.digests = ic_resp.digests;
            }
            PduHeader::R2t(r2t) => self.asked.push_back(*r2t),
            PduHeader::C2hData(header) => self.take_data(header, data),
            PduHeader::CapsuleResp(bytes) => {
                let cqe = CompletionQueueEntry::read_from_bytes(bytes).expect("16 bytes");
                let status = Status(cqe.status.get() >> 1);
                if self.cntlid == 0 && status.is_success() {
                    self.cntlid = cqe.dw0.get() as u16;
                }
                let sent = self.sent.get(&cqe.cid.get());
                let lacks = status.is_success() && sent.is_some_and(|sent| sent.reads && !sent.got);
                assert!(self.rude || !lacks, "a read is answered before its data is there");
                self.completed(cqe.cid.get());
            }
            PduHeader::TermReq(term) => assert!(self.rude, "a good host was terminated: {term:?}"),
            other => panic!("the target sent {other:?}"),
        }
    }

    fn take_data(&mut self, header: &DataHeader, data: &[u8]) {
        if !self.rude {
            self.verify(header, data);
        }
        if let Some(sent) = self.sent.get_mut(&header.cccid) {
            sent.got = true;
        }
        if header.success {
            self.completed(header.cccid);
        }
    }

    fn verify(&self, header: &DataHeader, data: &[u8]) {
        let Some(sent) = self.sent.get(&header.cccid).filter(|sent| sent.reads) else {
            panic!("data for command {}, which reads nothing", header.cccid)
        };
        assert_eq!(data.len(), usize::from(sent.blocks) * BLOCK_BYTES, "not as much data as was asked for");
        for (lba, block) in (sent.lba..).zip(data.chunks(BLOCK_BYTES)) {
            let written = block.iter().enumerate().all(|(at, &byte)| byte == pattern(lba, at));
            let zero = block.iter().all(|&byte| byte == 0);
            assert!(zero || written, "a read gave bytes that were never written there");
        }
    }

    fn completed(&mut self, cid: u16) {
        let Some(sent) = self.sent.get_mut(&cid) else {
            assert!(self.noisy, "command {cid} was completed twice, or was never sent");
            return;
        };
        sent.times -= 1;
        if sent.times == 0 {
            self.sent.remove(&cid);
        }
    }

    /// Everything that was sent is answered.
    fn settle(&mut self, world: &mut World, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.sent.is_empty() {
            assert!(!self.over, "the target closed the connection of a good host: {what}");
            assert!(Instant::now() < deadline, "{} commands are never answered: {what}", self.sent.len());
            self.deliver(usize::MAX);
            world.step();
            self.receive();
            self.answer(1 << 20);
        }
    }

    /// A good host gets all its answers; a rude one takes what there is.
    pub(super) fn finish(&mut self, world: &mut World) {
        self.reading = true;
        if !self.rude {
            return self.settle(world, "the end");
        }
        for _ in 0..64 {
            self.deliver(usize::MAX);
            world.step();
            self.receive();
        }
    }
}

/// What a good host writes from `lba` on.
fn written(lba: u64, len: usize) -> Vec<u8> {
    (0..len).map(|at| pattern(lba + (at / BLOCK_BYTES) as u64, at % BLOCK_BYTES)).collect()
}
