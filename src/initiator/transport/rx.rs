//! The receiving half: a state machine over one large buffer.

use super::slot::SlotState;
use super::{DataFault, Queue};
use crate::initiator::command::{Completion, Transfer};
use crate::initiator::error::InitiatorError;
use crate::tcp::digest::Digest;
use crate::tcp::pdu::{
    self, COMMON_HEADER_LEN, DataHeader, DataPdu, Decoded, HEADER_MAX, PduError, PduHeader, R2t, TERM_REQ_MAX,
};
use nvme_spec::CompletionQueueEntry;
use std::io::{self, ErrorKind as IoErrorKind, IoSliceMut, Read};
use zerocopy::transmute;

/// Bytes of the receive buffer: one receive takes many PDUs.
const BUFFER_LEN: usize = 512 << 10;
/// Data of at least this length that has not arrived yet is received where it belongs, past the buffer.
const DIRECT_LEN_MIN: usize = 16 << 10;
/// Receives in one turn, so that sending gets its share.
const RECEIVES_MAX: usize = 4;

/// Where the receiver is within the stream.
#[derive(Clone, Copy, Debug)]
enum Position {
    Header,
    Padding {
        left: usize,
        then: Body,
    },
    Data(Body),
    DataDigest(Body),
    /// The rest of a TermReq, of no use.
    TermData,
}

/// Data on its way into a slot.
#[derive(Clone, Copy, Debug)]
struct Body {
    slot: u16,
    header: DataHeader,
    /// Bytes of DATAL that are still to come.
    left: usize,
    digest: Digest,
    digested: bool,
}

/// The receive buffer and the position.
pub(super) struct Receive {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    position: Position,
    /// The header decoded last, for a TermReq.
    last_header: [u8; HEADER_MAX],
    last_header_len: usize,
}

impl Receive {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER_LEN].into_boxed_slice(),
            start: 0,
            end: 0,
            position: Position::Header,
            last_header: [0; HEADER_MAX],
            last_header_len: 0,
        }
    }

    fn available(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Makes room behind a PDU that arrived in part.
    fn compact(&mut self) {
        if self.start > BUFFER_LEN / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    fn remember(&mut self, len: usize) {
        let len = len.min(HEADER_MAX).min(self.end - self.start);
        self.last_header[..len].copy_from_slice(&self.buffer[self.start..self.start + len]);
        self.last_header_len = len;
    }

    /// The start of the PDU that was found wrong.
    pub(super) fn offending(&self) -> &[u8] {
        &self.last_header[..self.last_header_len.min(TERM_REQ_MAX)]
    }
}

impl Queue {
    /// Receives and handles what there is, without waiting.
    pub(super) fn receive(&mut self) -> Result<(), InitiatorError> {
        for _ in 0..RECEIVES_MAX {
            let (len, room) = match self.receive_once() {
                Ok((0, _)) => {
                    return Err(InitiatorError::closed(io::Error::new(
                        IoErrorKind::UnexpectedEof,
                        format!("the controller closed it with {} commands outstanding", self.in_flight),
                    )));
                }
                Ok(received) => received,
                Err(error) if error.kind() == IoErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == IoErrorKind::Interrupted => continue,
                Err(error) => return Err(InitiatorError::closed(error)),
            };
            self.handle_received()?;
            // A receive that did not fill its room has emptied the socket.
            if len < room {
                break;
            }
        }
        Ok(())
    }

    /// One system call: into the slot that data is expected for, then into the buffer. Gives the bytes received and
    /// the room there was.
    fn receive_once(&mut self) -> io::Result<(usize, usize)> {
        self.rx.compact();
        if let Position::Data(body) = &mut self.rx.position
            && body.left >= DIRECT_LEN_MIN
            && self.rx.start == self.rx.end
            && let Transfer::ToHost(_) = self.slots[usize::from(body.slot)].transfer
        {
            let slot = &mut self.slots[usize::from(body.slot)];
            let at = (body.header.data_offset + body.header.data_len) as usize - body.left;
            let direct = &mut slot.buffer[at..at + body.left];
            let direct_len = direct.len();
            let mut pieces = [IoSliceMut::new(direct), IoSliceMut::new(&mut self.rx.buffer)];
            let len = self.socket.read_vectored(&mut pieces)?;
            let taken = len.min(direct_len);
            if body.digested {
                body.digest.update(&slot.buffer[at..at + taken]);
            }
            body.left -= taken;
            self.rx.start = 0;
            self.rx.end = len - taken;
            return Ok((len, direct_len + BUFFER_LEN));
        }
        let end = self.rx.end;
        let room = &mut self.rx.buffer[end..];
        let room_len = room.len();
        let len = self.socket.read(room)?;
        self.rx.end += len;
        Ok((len, room_len))
    }

    /// Walks through the buffer until more bytes are needed.
    fn handle_received(&mut self) -> Result<(), InitiatorError> {
        loop {
            let advanced = match self.rx.position {
                Position::Header => self.take_header()?,
                Position::Padding { left, then } => self.skip_padding(left, then),
                Position::Data(body) => self.take_data(body),
                Position::DataDigest(body) => self.take_data_digest(body),
                Position::TermData => {
                    let len = self.rx.available().len();
                    self.rx.consume(len);
                    false
                }
            };
            if !advanced {
                return Ok(());
            }
        }
    }

    fn take_header(&mut self) -> Result<bool, InitiatorError> {
        let available = self.rx.available();
        let Some(first8) = available.first_chunk::<COMMON_HEADER_LEN>() else { return Ok(false) };
        let plan = match pdu::header_len_needed(&self.rules, first8) {
            Ok(plan) => plan,
            Err(error) => {
                self.rx.remember(COMMON_HEADER_LEN);
                return Err(InitiatorError::pdu(error));
            }
        };
        if available.len() < plan.header_len() {
            return Ok(false);
        }
        let header = pdu::decode_planned(&plan, available);
        self.rx.remember(plan.header_len());
        let decoded = Decoded { plan, header: header.map_err(InitiatorError::pdu)? };
        self.rx.consume(plan.header_len());
        self.handle_header(&decoded)?;
        Ok(true)
    }

    fn handle_header(&mut self, decoded: &Decoded) -> Result<(), InitiatorError> {
        match &decoded.header {
            PduHeader::IcResp(ic_resp) => self.on_ic_resp(*ic_resp),
            PduHeader::TermReq(pdu) => {
                self.rx.position = Position::TermData;
                Err(InitiatorError::terminated(*pdu))
            }
            PduHeader::CapsuleResp(cqe) => self.on_response(cqe),
            PduHeader::C2hData(header) => self.on_c2h_data(decoded, *header),
            PduHeader::R2t(r2t) => self.on_r2t(*r2t),
            PduHeader::IcReq(_) | PduHeader::CapsuleCmd(_) | PduHeader::H2cData(_) => {
                Err(InitiatorError::pdu(PduError::Sequence { pdu_type: decoded.plan.pdu_type }))
            }
        }
    }

    /// The busy slot of a CID, when its generation fits.
    fn slot_of(&self, cid: u16) -> Result<u16, InitiatorError> {
        let index = cid & 0xFFF;
        match self.slots.get(usize::from(index)) {
            Some(slot) if slot.state == SlotState::Busy && slot.generation == cid >> 12 => Ok(index),
            _ => Err(InitiatorError::protocol(format!(
                "the controller names CID {cid:#06x}, which is not outstanding"
            ))
            .with_source(PduError::InvalidField { offset: 8 })),
        }
    }

    fn on_response(&mut self, cqe: &[u8; 16]) -> Result<(), InitiatorError> {
        let cqe: CompletionQueueEntry = transmute!(*cqe);
        let index = self.slot_of(cqe.cid.get())?;
        let completion = Completion { result: cqe.dw0_1(), status: cqe.status() };
        if let Transfer::ToController(len) = self.slots[usize::from(index)].transfer {
            let moved = self.slots[usize::from(index)].moved;
            if completion.status.is_success() && moved < len {
                return Err(InitiatorError::protocol(format!(
                    "a write of {len} bytes succeeded after {moved} bytes were asked for"
                ))
                .with_source(PduError::Sequence { pdu_type: pdu::PduType::CAPSULE_RESP }));
            }
        }
        self.end(index, completion);
        Ok(())
    }

    fn on_c2h_data(&mut self, decoded: &Decoded, header: DataHeader) -> Result<(), InitiatorError> {
        let index = self.slot_of(header.cccid)?;
        let slot = &self.slots[usize::from(index)];
        let out_of_range = PduError::DataOutOfRange { offset: header.data_offset, len: header.data_len };
        let Transfer::ToHost(asked) = slot.transfer else {
            return Err(InitiatorError::pdu(PduError::Sequence { pdu_type: decoded.plan.pdu_type }));
        };
        // Data of a command comes in order and once: anything else could leave a hole that nobody sees.
        if header.data_offset != slot.moved || asked - slot.moved < header.data_len {
            return Err(InitiatorError::pdu(out_of_range));
        }
        if header.success && !self.options.success_flag {
            return Err(InitiatorError::pdu(PduError::InvalidField { offset: pdu::field::FLAGS }));
        }
        let body = Body {
            slot: index,
            header,
            left: decoded.plan.data_len,
            digest: Digest::new(),
            digested: decoded.plan.ddgst,
        };
        self.rx.position = match decoded.plan.pad_len() {
            0 => Position::Data(body),
            left => Position::Padding { left, then: body },
        };
        Ok(())
    }

    fn skip_padding(&mut self, left: usize, then: Body) -> bool {
        let len = self.rx.available().len().min(left);
        self.rx.consume(len);
        self.rx.position =
            if len == left { Position::Data(then) } else { Position::Padding { left: left - len, then } };
        len == left
    }

    fn take_data(&mut self, mut body: Body) -> bool {
        if body.left != 0 {
            let available = self.rx.available();
            let len = available.len().min(body.left);
            let at = (body.header.data_offset + body.header.data_len) as usize - body.left;
            let piece = &available[..len];
            self.slots[usize::from(body.slot)].buffer[at..at + len].copy_from_slice(piece);
            if body.digested {
                body.digest.update(piece);
            }
            body.left -= len;
            self.rx.consume(len);
        }
        if body.left != 0 {
            self.rx.position = Position::Data(body);
            return false;
        }
        if body.digested {
            self.rx.position = Position::DataDigest(body);
        } else {
            self.data_ends(&body);
        }
        true
    }

    fn take_data_digest(&mut self, body: Body) -> bool {
        let Some(received) = self.rx.available().first_chunk::<{ Digest::LEN }>().copied() else {
            return false;
        };
        self.rx.consume(Digest::LEN);
        if received != body.digest.to_wire() {
            let slot = &mut self.slots[usize::from(body.slot)];
            slot.fault.get_or_insert(DataFault::Digest { data_offset: body.header.data_offset });
        }
        self.data_ends(&body);
        true
    }

    /// The last byte of a C2HData has come.
    fn data_ends(&mut self, body: &Body) {
        self.rx.position = Position::Header;
        self.slots[usize::from(body.slot)].moved += body.header.data_len;
        if body.header.success {
            self.end(body.slot, Completion::default());
        }
    }

    /// Queues the H2CData PDUs that an R2T asks for.
    fn on_r2t(&mut self, r2t: R2t) -> Result<(), InitiatorError> {
        let index = self.slot_of(r2t.cccid)?;
        let slot = &mut self.slots[usize::from(index)];
        let Transfer::ToController(total) = slot.transfer else {
            return Err(InitiatorError::pdu(PduError::Sequence { pdu_type: pdu::PduType::R2T }));
        };
        if r2t.offset != slot.moved || total - slot.moved < r2t.len {
            return Err(InitiatorError::pdu(PduError::DataOutOfRange { offset: r2t.offset, len: r2t.len }));
        }
        if slot.tx_segments != 0 {
            return Err(InitiatorError::pdu(PduError::R2tLimitExceeded { cccid: r2t.cccid }));
        }
        slot.moved += r2t.len;
        let ic_resp = self.ic_resp.ok_or_else(|| InitiatorError::protocol("an R2T before ICResp"))?;
        let end = r2t.offset + r2t.len;
        let mut at = r2t.offset;
        let mut header = [0; HEADER_MAX];
        while at < end {
            let len = (end - at).min(ic_resp.maxh2cdata);
            let last = at + len == end;
            let data = DataPdu {
                cccid: r2t.cccid,
                ttag: r2t.ttag,
                data_offset: at,
                data_len: len,
                last,
                success: false,
            };
            let header_len = pdu::h2c_data(&mut header, self.rules.digests, ic_resp.cpda, &data);
            self.tx.push_bytes(&header[..header_len]);
            self.tx.push_data(index, slot, at as usize..(at + len) as usize, self.rules.digests.data);
            at += len;
        }
        Ok(())
    }
}
