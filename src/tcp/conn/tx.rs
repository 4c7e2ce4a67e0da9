//! What a connection has to send: a queue of answers, turned into vectored sends, one in flight while the next fills.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use hugepage_alloc::DmaBuf;

use super::held::HeldResponses;
use super::request::{Index, Requests, State};
use super::times::{Notes, Passed};
use crate::fabrics::{Completion, QueueSession};
use crate::probes;
use crate::ring::SendBatch;
use crate::stage::{Trace, Who};
use crate::tcp::digest::Digest;
use crate::tcp::pdu::{self, DataPdu, Digests, HEADER_MAX, IcResp, R2t, TERM_REQ_MAX, TermReq};

/// Arena that the longest answer takes: a data header with its padding, a digest, a response. And parts, with the responses that are
/// held before it.
const ANSWER_BYTES_MAX: usize = 3 * HEADER_MAX;
const ANSWER_PARTS_MAX: usize = 4;
/// Data is hashed in pieces of this size, copied out of memory that a device may share.
const DIGEST_PIECE: usize = 4096;

/// One thing to be sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Out {
    /// ICResp.
    IcResp(IcResp),
    /// The answer of a request in [`State::Answer`]; the request ends with it.
    Answer(Index),
    /// Ask for the data of a request.
    R2t(Index),
    /// A completion without a request: a command that got no place.
    Refusal { cid: u16, completion: Completion },
}

/// What a command ends with.
pub(super) struct Answer<'a> {
    pub(super) index: Index,
    pub(super) completion: Completion,
    /// Data for the host, which is taken.
    pub(super) buf: &'a mut Option<DmaBuf>,
    pub(super) passed: &'a Passed,
}

/// The sending side.
pub(super) struct Tx {
    queue: VecDeque<Out>,
    filling: Box<SendBatch>,
    /// Responses that follow the data in it.
    held: HeldResponses,
    /// Of the commands whose answers it has.
    notes: Notes,
    /// The other batch; `None` while it is in flight.
    spare: Option<Box<SendBatch>>,
    /// Of the batch in flight.
    flying: Notes,
    /// What is in flight: since when, and how many bytes.
    flight: Option<(Instant, usize)>,
    size: TxSize,
    /// The size for who has more to say than goes into a batch.
    most: TxSize,
    pub(super) hpda: u8,
    /// Where headers are written, each whole.
    header: [u8; HEADER_MAX],
    /// Whose answers they are, once that is known.
    pub(super) who: Option<Rc<Who>>,
}

/// How large the sending side is.
#[derive(Clone, Copy, Debug)]
pub(super) struct TxSize {
    pub(super) arena_bytes: usize,
    pub(super) parts: usize,
    pub(super) queue: usize,
    /// Entries of the notes of a batch.
    pub(super) notes: usize,
}

impl TxSize {
    fn batch(self) -> Box<SendBatch> {
        Box::new(SendBatch::with_capacity(self.arena_bytes, self.parts))
    }
}

impl Tx {
    pub(super) fn new(size: TxSize) -> Self {
        Self {
            queue: VecDeque::with_capacity(size.queue),
            filling: size.batch(),
            held: HeldResponses::default(),
            notes: Notes::with_capacity(size.notes),
            spare: Some(size.batch()),
            flying: Notes::with_capacity(size.notes),
            flight: None,
            size,
            most: size,
            hpda: 0,
            header: [0; HEADER_MAX],
            who: None,
        }
    }

    /// Makes room for a queue of another size. Batches become as large when one is full: most connections never fill one.
    pub(super) fn resize(&mut self, size: TxSize) {
        self.most = size;
        self.queue.reserve(size.queue.saturating_sub(self.queue.len()));
    }

    /// Makes room for responses that are held, of a host that gets them. Now, for a small piece of the heap that is taken under load lies
    /// behind the large buffers of that time, and keeps their memory when they are given back.
    pub(super) fn reserve_held(&mut self) {
        self.held.reserve();
    }

    pub(super) fn push(&mut self, out: Out) {
        self.queue.push_back(out);
    }

    /// Things that wait to be put into a batch.
    pub(super) fn backlog(&self) -> usize {
        self.queue.len()
    }

    /// Whether nothing waits and nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.filling.is_empty() && self.spare.is_some()
    }

    /// Whether something waits that could be sent now.
    pub(super) fn has_more(&self) -> bool {
        self.spare.is_some() && !(self.queue.is_empty() && self.filling.is_empty())
    }

    /// Whether a send is in flight.
    pub(super) fn in_flight(&self) -> bool {
        self.spare.is_none()
    }

    /// Bytes of answers that the peer has not taken yet.
    pub(super) fn bytes_len(&self) -> usize {
        self.filling.bytes_len() + self.held.bytes().len() + self.flight.map_or(0, |(_, bytes)| bytes)
    }

    /// Since when a batch is in flight.
    pub(super) fn in_flight_since(&self) -> Option<Instant> {
        self.flight.map(|(since, _)| since)
    }

    /// The commands whose answers are in the batch in flight.
    pub(super) const fn flying(&self) -> &Notes {
        &self.flying
    }

    /// Forgets everything that is not in flight.
    pub(super) fn discard(&mut self) {
        self.queue.clear();
        self.filling.clear();
        self.held.clear();
        self.notes.clear();
    }

    /// A TermReq: nothing that waits goes out before or after it, but a batch of which the peer has a part already: that is finished
    /// first, for else it would lie within a PDU. False where it has no room behind it.
    pub(super) fn terminate(&mut self, term: TermReq, offending: &[u8]) -> bool {
        if self.filling.is_begun() {
            self.queue.clear();
            self.held.clear();
        } else {
            self.discard();
        }
        let mut out = [0; TERM_REQ_MAX];
        let len = pdu::c2h_term_req(&mut out, term, offending);
        self.filling.push_bytes(out.get(..len).unwrap_or_default())
    }

    /// So many responses shall be held together.
    #[inline]
    pub(super) fn hold_responses(&mut self, most: u64) {
        self.held.set_most(most);
    }

    /// Puts answers into the batch as long as there is room.
    pub(super) fn fill(
        &mut self,
        requests: &mut Requests,
        session: &QueueSession,
        digests: Digests,
        trace: &mut Trace,
    ) {
        while self.has_room() {
            let Some(out) = self.queue.pop_front() else { break };
            match out {
                Out::IcResp(ic_resp) => {
                    let len = pdu::ic_resp(&mut self.header, &ic_resp);
                    self.push_header(len);
                }
                Out::R2t(index) => {
                    let request = requests.at(index);
                    let (cccid, len) = (request.sqe.cid.get(), request.expected());
                    let r2t = R2t { cccid, ttag: index, offset: 0, len };
                    let len = pdu::r2t(&mut self.header, digests, &r2t);
                    self.push_header(len);
                }
                Out::Refusal { cid, completion } => self.response(cid, completion, session, digests),
                Out::Answer(index) => self.queued(index, requests, session, digests, trace),
            }
        }
        if !self.queue.is_empty() && self.size.arena_bytes < self.most.arena_bytes {
            // Each batch is exchanged when it comes back.
            self.size = self.most;
        }
    }

    /// Whether the batch has room for one more answer.
    #[inline]
    fn has_room(&self) -> bool {
        self.filling.arena_room() >= ANSWER_BYTES_MAX + self.held.bytes().len()
            && self.filling.parts_room() >= ANSWER_PARTS_MAX
            && !self.notes.is_full()
    }

    /// Whether an answer may go into the batch past the queue: nothing waits there.
    #[inline]
    pub(super) fn takes_now(&self) -> bool {
        self.queue.is_empty() && self.has_room()
    }

    /// An answer from the queue.
    fn queued(
        &mut self,
        index: Index,
        requests: &mut Requests,
        session: &QueueSession,
        digests: Digests,
        trace: &mut Trace,
    ) {
        let request = requests.at(index);
        let (mut buf, passed) = (request.buf.take(), request.passed);
        let State::Answer(completion) = request.state else { return };
        self.answer(
            Answer { index, completion, buf: &mut buf, passed: &passed },
            requests,
            session,
            digests,
            trace,
        );
    }

    /// Puts an answer into the batch, which has room. Its request ends.
    #[inline]
    pub(super) fn answer(
        &mut self,
        answer: Answer<'_>,
        requests: &mut Requests,
        session: &QueueSession,
        digests: Digests,
        trace: &mut Trace,
    ) {
        let Answer { index, completion, buf, passed } = answer;
        let sqe = &requests.at(index).sqe;
        let cid = sqe.cid.get();
        let group = self.notes.note(passed, trace, self.who.as_ref());
        trace.command(group, sqe, completion.status);
        probes::command_answered(sqe, completion.status, passed.stamps.arrived.ns());
        requests.remove(index);
        let data_len = buf.as_ref().map_or(0, DmaBuf::len);
        let is_held = self.held.takes(data_len);
        if !is_held {
            // Those before it are not to wait for its data as well.
            self.release_held();
        }
        if buf.is_some() {
            // Without SQ flow control the host has no use for SQHD, and the last data PDU may stand for the
            // completion (TCP section 3.3.2.1).
            let answered = session.is_flow_control_disabled() && completion == Completion::SUCCESS;
            self.data(cid, buf, answered, digests);
            if answered {
                return;
            }
        }
        if !is_held {
            self.response(cid, completion, session, digests);
            return;
        }
        let cqe = cqe_of(cid, completion, session);
        let is_enough = if digests.header {
            let len = pdu::capsule_resp(&mut self.header, digests, &bytes_of(cqe));
            self.held.hold(self.header.get(..len).unwrap_or_default(), data_len)
        } else {
            self.held.hold(&pdu::plain_capsule_resp(cqe), data_len)
        };
        if is_enough {
            self.release_held();
        }
    }

    #[inline]
    fn data(&mut self, cccid: u16, buf: &mut Option<DmaBuf>, success: bool, digests: Digests) {
        let Some(Ok(data_len)) = buf.as_ref().map(|buf| u32::try_from(buf.len())) else { return };
        if digests == Digests::NONE && self.hpda == 0 {
            let pushed = self.filling.push_array(&pdu::plain_c2h_data(cccid, data_len, success));
            debug_assert!(pushed, "room was checked");
            let pushed = self.filling.push_taken(buf);
            debug_assert!(pushed, "room was checked");
            return;
        }
        let data = DataPdu { cccid, ttag: 0, data_offset: 0, data_len, last: true, success };
        let len = pdu::c2h_data(&mut self.header, digests, self.hpda, &data);
        self.push_header(len);
        let digest = buf.as_ref().filter(|_| digests.data);
        let digest = digest.map(|buf| digest_of(buf, 0, buf.len(), Digest::new()));
        let pushed = self.filling.push_taken(buf);
        debug_assert!(pushed, "room was checked");
        if let Some(digest) = digest {
            let pushed = self.filling.push_bytes(&digest.to_wire());
            debug_assert!(pushed, "room was checked");
        }
    }

    /// Behind those that are held: SQHD never goes back.
    fn response(&mut self, cid: u16, completion: Completion, session: &QueueSession, digests: Digests) {
        self.release_held();
        let cqe = cqe_of(cid, completion, session);
        if digests.header {
            let len = pdu::capsule_resp(&mut self.header, digests, &bytes_of(cqe));
            return self.push_header(len);
        }
        let pushed = self.filling.push_array(&pdu::plain_capsule_resp(cqe));
        debug_assert!(pushed, "room was checked");
    }

    /// Puts the responses that are held into the batch: room was kept for them.
    fn release_held(&mut self) {
        if !self.held.bytes().is_empty() {
            let pushed = self.filling.push_bytes(self.held.bytes());
            debug_assert!(pushed, "room was kept");
            self.held.clear();
        }
    }

    /// Copies the header that was written last into the batch; whoever asks for an answer made sure that there is room.
    fn push_header(&mut self, len: usize) {
        let pushed = self.filling.push_bytes(self.header.get(..len).unwrap_or_default());
        debug_assert!(pushed, "room was checked");
    }

    /// The next batch to send, when there is one and none is in flight.
    pub(super) fn take_batch(&mut self, now: Instant) -> Option<Box<SendBatch>> {
        if self.filling.is_empty() {
            return None;
        }
        let spare = self.spare.take()?;
        self.release_held();
        self.flight = Some((now, self.filling.bytes_len()));
        self.notes.complete();
        std::mem::swap(&mut self.notes, &mut self.flying);
        Some(std::mem::replace(&mut self.filling, spare))
    }

    /// A batch that was taken could not be handed to the ring: it is the next one again.
    pub(super) fn put_back(&mut self, batch: Box<SendBatch>) {
        self.flight = None;
        std::mem::swap(&mut self.notes, &mut self.flying);
        self.spare = Some(std::mem::replace(&mut self.filling, batch));
    }

    /// A batch comes back, sent or not.
    pub(super) fn give_back(&mut self, mut batch: Box<SendBatch>) {
        batch.clear();
        self.flying.clear();
        self.flight = None;
        if batch.arena_room() < self.size.arena_bytes {
            batch = self.size.batch();
            self.flying = Notes::with_capacity(self.size.notes);
        }
        self.spare = Some(batch);
    }
}

/// The completion queue entry of a command (NVM Express Base Specification 2.1, section 4.2). As words, for it is written at once.
#[inline]
fn cqe_of(cid: u16, completion: Completion, session: &QueueSession) -> [u64; 2] {
    let status = session.told(completion.status);
    cqe_words(cid, Completion { status, ..completion }, session.sqhd())
}

#[inline]
fn cqe_words(cid: u16, Completion { dw0, dw1, status }: Completion, sqhd: u16) -> [u64; 2] {
    let ids = u64::from(sqhd) | u64::from(cid) << 32 | u64::from(status.to_wire()) << 48;
    [u64::from(dw0) | u64::from(dw1) << 32, ids]
}

fn bytes_of([low, high]: [u64; 2]) -> [u8; 16] {
    (u128::from(low) | u128::from(high) << 64).to_le_bytes()
}

/// Continues a digest over part of a buffer, without ever forming a reference into it. Never part of its callers: the piece would lie in
/// the frames of those that reckon no digest too, which are a page long then and have to be probed.
#[inline(never)]
pub(super) fn digest_of(buf: &DmaBuf, at: usize, len: usize, mut digest: Digest) -> Digest {
    let mut piece = [0; DIGEST_PIECE];
    let mut done = 0;
    while done < len {
        let step = (len - done).min(DIGEST_PIECE);
        let piece = &mut piece[..step];
        buf.read_into(at + done, piece);
        digest.update(piece);
        done += step;
    }
    digest
}

#[cfg(test)]
mod tests {
    use nvme_spec::{CompletionQueueEntry, Status};
    use zerocopy::FromBytes as _;

    use super::*;

    #[test]
    fn an_entry_made_of_words_is_the_entry() {
        let status = Status::LBA_OUT_OF_RANGE.with_dnr();
        let completion = Completion { dw0: 0x0102_0304, dw1: 0x0506_0708, status };
        let bytes = bytes_of(cqe_words(0x0A0B, completion, 0x0C0D));
        let expected = CompletionQueueEntry {
            dw0: completion.dw0.into(),
            dw1: completion.dw1.into(),
            sqhd: 0x0C0D.into(),
            sqid: 0.into(),
            cid: 0x0A0B.into(),
            status: status.to_wire().into(),
        };
        assert_eq!(CompletionQueueEntry::read_from_bytes(&bytes), Ok(expected));
    }
}
