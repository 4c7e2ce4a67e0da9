//! The receiving side: from bytes to PDUs to data in buffers.
//!
//! ```text
//!   Header --CapsuleCmd, H2CData with data--> Data --digest negotiated--> Ddgst
//!     '----------------------------------------- | <------------------------ '
//!   Over: nothing is received    Discard: all is thrown away
//! ```
//!
//! One receive takes what the socket has, often many PDUs. Data that is still missing when the bytes run out is
//! received straight into its buffer.

use std::io;

use hugepage_alloc::DmaBuf;
use nvme_spec::SubmissionQueueEntry;
use zerocopy::FromBytes;

use super::request::{Index, Requests};
use super::tx::digest_of;
use crate::ring::RecvBatch;
use crate::tcp::digest::Digest;
use crate::tcp::pdu::{self, COMMON_HEADER_LEN, Decoded, HeaderPlan, PduError, PduRules};

/// Missing data below this is received with everything else and copied: it costs less than a vector entry.
const DIRECT_BYTES_MIN: usize = 2048;

/// Data of a PDU on its way in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    /// Whose data it is; `None` when it is to be thrown away.
    pub(super) request: Option<Index>,
    /// Bytes to skip before: padding in front of the data (not digested).
    pub(super) pad: usize,
    /// Bytes to skip before: data in front of what the command's SGL names (digested).
    pub(super) lead: usize,
    /// Bytes for the buffer.
    pub(super) left: usize,
    /// Bytes to skip behind (digested).
    pub(super) trail: usize,
    /// Where in the buffer the next byte goes.
    pub(super) at: usize,
    digest: Digest,
    pub(super) ddgst: bool,
}

impl Incoming {
    /// All data of the PDU goes into the request's buffer from `at` on.
    pub(super) fn into_request(plan: &HeaderPlan, request: Index, at: usize) -> Self {
        Self { request: Some(request), left: plan.data_len, at, ..Self::skip(plan) }.with_trail(0)
    }

    /// `len` bytes of the data, from `offset` on, go into the request's buffer.
    pub(super) fn part(plan: &HeaderPlan, request: Index, offset: usize, len: usize) -> Self {
        let trail = plan.data_len.saturating_sub(offset + len);
        Self { request: Some(request), lead: offset, left: len, ..Self::skip(plan) }.with_trail(trail)
    }

    /// The data is thrown away.
    pub(super) fn skip(plan: &HeaderPlan) -> Self {
        Self {
            request: None,
            pad: plan.pad_len(),
            lead: 0,
            left: 0,
            trail: plan.data_len,
            at: 0,
            digest: Digest::new(),
            ddgst: plan.ddgst,
        }
    }

    const fn with_trail(mut self, trail: usize) -> Self {
        self.trail = trail;
        self
    }
}

/// What the next byte is.
#[derive(Clone, Copy, Debug)]
pub(super) enum RxState {
    /// The first of a PDU.
    Header,
    /// Data, or what surrounds it.
    Data(Incoming),
    /// The data digest.
    Ddgst(Incoming),
    /// Nobody's business any more; not even received.
    Over,
    /// Nobody's business any more, but received until the peer closes.
    Discard,
}

/// The receiving side.
pub(super) struct Rx {
    /// `None` while it is in flight.
    pub(super) batch: Option<Box<RecvBatch>>,
    pub(super) state: RxState,
    pub(super) rules: PduRules,
    /// The size that the next batch shall have.
    wanted_bytes: usize,
    /// The size that it shall have when receives fill it.
    pub(super) most_bytes: usize,
    /// It was asked back to become small.
    shrinks: bool,
}

/// What the bytes in the batch came to.
pub(super) enum Step {
    /// A header; it stays in the batch until [`Rx::header_done`].
    Header(Decoded),
    /// The header of a [plain command](pdu::plain_command); it stays as well.
    Command(HeaderPlan, SubmissionQueueEntry),
    /// All data of a PDU is there. The flag tells whether its digest fits.
    DataDone(Incoming, bool),
    /// More bytes are needed.
    Starved,
}

impl Rx {
    pub(super) fn new(rules: PduRules, bytes: usize) -> Self {
        Self {
            batch: Some(Box::new(RecvBatch::new(bytes))),
            state: RxState::Header,
            rules,
            wanted_bytes: bytes,
            most_bytes: bytes,
            shrinks: false,
        }
    }

    /// Whether the batch is in flight and larger than `most`, for a connection that is idle: it is to be cancelled then, and
    /// comes back to be exchanged for one of `bytes`.
    pub(super) const fn shrink(&mut self, most: usize, bytes: usize) -> bool {
        let shrinks = self.batch.is_none() && self.wanted_bytes > most;
        if shrinks {
            (self.wanted_bytes, self.shrinks) = (bytes, true);
        }
        shrinks
    }

    /// Whether a receive ended because of [`Rx::shrink`], and not of the connection. Asked once.
    pub(super) fn has_shrunk(&mut self, error: &io::Error) -> bool {
        std::mem::take(&mut self.shrinks) && error.raw_os_error() == Some(libc::ECANCELED)
    }

    /// Takes the next step with the bytes that are there.
    pub(super) fn step(&mut self, requests: &mut Requests) -> Result<Step, PduError> {
        let Some(batch) = &mut self.batch else { return Ok(Step::Starved) };
        match self.state {
            RxState::Header => {
                let bytes = batch.filled();
                if let Some((plan, sqe)) = pdu::plain_command(&self.rules, bytes)
                    && let Ok(sqe) = SubmissionQueueEntry::read_from_bytes(sqe)
                {
                    return Ok(Step::Command(plan, sqe));
                }
                let Some((first8, _)) = bytes.split_first_chunk::<COMMON_HEADER_LEN>() else {
                    return Ok(Step::Starved);
                };
                let plan = pdu::header_len_needed(&self.rules, first8)?;
                if bytes.len() < plan.header_len() {
                    return Ok(Step::Starved);
                }
                let header = pdu::decode_planned(&plan, bytes)?;
                Ok(Step::Header(Decoded { plan, header }))
            }
            RxState::Data(mut incoming) => {
                let done = take_data(batch, &mut incoming, requests);
                if !done {
                    self.state = RxState::Data(incoming);
                    return Ok(Step::Starved);
                }
                if incoming.ddgst {
                    self.state = RxState::Ddgst(incoming);
                    return self.step(requests);
                }
                self.state = RxState::Header;
                Ok(Step::DataDone(incoming, true))
            }
            RxState::Ddgst(incoming) => {
                let Some(received) = batch.filled().first_chunk::<{ Digest::LEN }>() else {
                    return Ok(Step::Starved);
                };
                let fits = *received == incoming.digest.to_wire();
                batch.consume(Digest::LEN);
                self.state = RxState::Header;
                Ok(Step::DataDone(incoming, fits))
            }
            RxState::Over | RxState::Discard => Ok(Step::Starved),
        }
    }

    /// Throws away what was received, when it is nobody's business.
    pub(super) fn discard(&mut self) {
        if let (RxState::Discard, Some(batch)) = (self.state, &mut self.batch) {
            batch.consume(batch.filled().len());
        }
    }

    /// The header that was reported last is dealt with: its bytes go.
    pub(super) fn header_done(&mut self, plan: &HeaderPlan) {
        if let Some(batch) = &mut self.batch {
            batch.consume(plan.header_len());
        }
    }

    /// The PDU that is being read, as far as it is there: for a TermReq.
    pub(super) fn offending(&self) -> &[u8] {
        self.batch.as_ref().map_or(&[], |batch| batch.filled())
    }

    /// The batch, ready to receive more; `None` when it is in flight already or nothing more is wanted.
    pub(super) fn take_batch(&mut self, requests: &mut Requests) -> Option<Box<RecvBatch>> {
        if matches!(self.state, RxState::Over) {
            return None;
        }
        let mut batch = self.batch.take()?;
        if batch.capacity() != self.wanted_bytes && batch.filled().is_empty() {
            batch = Box::new(RecvBatch::new(self.wanted_bytes));
        }
        let half = batch.capacity() / 2;
        batch.compact(half);
        let direct = match &self.state {
            RxState::Data(incoming) => missing(incoming, requests),
            _ => None,
        };
        batch.set_direct(direct);
        Some(batch)
    }

    /// A batch that was taken received nothing.
    pub(super) fn put_back(&mut self, mut batch: Box<RecvBatch>) {
        batch.set_direct(None);
        self.batch = Some(batch);
    }

    /// A receive has ended with `count` bytes.
    pub(super) fn received(&mut self, mut batch: Box<RecvBatch>, count: u32, requests: &mut Requests) {
        let direct_len = batch.complete(count).direct_len;
        batch.set_direct(None);
        if batch.free_space() == 0 {
            // More was there than it could take.
            self.wanted_bytes = self.most_bytes;
        }
        if let RxState::Data(incoming) = &mut self.state
            && direct_len > 0
        {
            if incoming.ddgst
                && let Some(buf) = buffer(incoming, requests)
            {
                incoming.digest = digest_of(buf, incoming.at, direct_len, incoming.digest);
            }
            incoming.at += direct_len;
            incoming.left = incoming.left.saturating_sub(direct_len);
        }
        self.batch = Some(batch);
    }
}

fn buffer<'r>(incoming: &Incoming, requests: &'r mut Requests) -> Option<&'r DmaBuf> {
    requests.at(incoming.request?).buf.as_ref()
}

/// The part of the buffer that the next bytes of the stream belong to, when it pays to receive it directly.
fn missing(incoming: &Incoming, requests: &mut Requests) -> Option<DmaBuf> {
    if incoming.pad > 0 || incoming.lead > 0 || incoming.left < DIRECT_BYTES_MIN {
        return None;
    }
    buffer(incoming, requests)?.try_slice(incoming.at, incoming.left)
}

/// Moves what is there to where it belongs; true when all data of the PDU has passed.
fn take_data(batch: &mut RecvBatch, incoming: &mut Incoming, requests: &mut Requests) -> bool {
    let pad = incoming.pad.min(batch.filled().len());
    batch.consume(pad);
    incoming.pad -= pad;
    if incoming.pad > 0 {
        return false;
    }
    incoming.lead -= pass(batch, incoming.lead, incoming.ddgst, &mut incoming.digest);
    if incoming.lead > 0 {
        return false;
    }
    if incoming.left > 0 {
        let bytes = batch.filled();
        let bytes = bytes.get(..incoming.left.min(bytes.len())).unwrap_or_default();
        if let Some(index) = incoming.request {
            requests.at(index).store(incoming.at, bytes);
        }
        let count = bytes.len();
        incoming.left -= pass(batch, count, incoming.ddgst, &mut incoming.digest);
        incoming.at += count;
        if incoming.left > 0 {
            return false;
        }
    }
    incoming.trail -= pass(batch, incoming.trail, incoming.ddgst, &mut incoming.digest);
    incoming.trail == 0
}

/// Consumes up to `wanted` bytes, digested if need be; returns how many.
fn pass(batch: &mut RecvBatch, wanted: usize, ddgst: bool, digest: &mut Digest) -> usize {
    let bytes = batch.filled();
    let count = wanted.min(bytes.len());
    if ddgst {
        digest.update(bytes.get(..count).unwrap_or_default());
    }
    batch.consume(count);
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::pdu::Receiver;

    const SMALL: usize = 16;
    const LARGE: usize = 64;

    #[test]
    fn a_batch_grows_when_it_was_filled_and_shrinks_when_it_is_cancelled() {
        let mut requests = Requests::new(1);
        let mut rx = Rx::new(PduRules::initializing(Receiver::Controller), SMALL);
        (rx.most_bytes, rx.state) = (LARGE, RxState::Discard);
        assert!(!rx.shrink(SMALL, SMALL), "it is not in flight");
        let batch = rx.take_batch(&mut requests).expect("a batch");
        rx.received(batch, 10, &mut requests);
        rx.discard();
        let batch = rx.take_batch(&mut requests).expect("a batch");
        assert_eq!(batch.capacity(), SMALL, "it was not full");
        assert!(!rx.shrink(SMALL, SMALL), "it is small");
        rx.received(batch, 16, &mut requests);
        rx.discard();
        let batch = rx.take_batch(&mut requests).expect("a batch");
        assert_eq!(batch.capacity(), LARGE);

        let cancelled = io::Error::from_raw_os_error(libc::ECANCELED);
        assert!(!rx.has_shrunk(&cancelled), "nobody asked for it");
        assert!(rx.shrink(SMALL, SMALL));
        assert!(!rx.shrink(SMALL, SMALL), "asked for once");
        assert!(rx.has_shrunk(&cancelled));
        assert!(!rx.has_shrunk(&cancelled), "told once");
        rx.received(batch, 0, &mut requests);
        assert_eq!(rx.take_batch(&mut requests).expect("a batch").capacity(), SMALL);
    }

    #[test]
    fn a_connection_that_breaks_while_it_shrinks_has_broken() {
        let mut requests = Requests::new(1);
        let mut rx = Rx::new(PduRules::initializing(Receiver::Controller), LARGE);
        let _in_flight = rx.take_batch(&mut requests);
        assert!(rx.shrink(SMALL, SMALL));
        assert!(!rx.has_shrunk(&io::Error::from_raw_os_error(libc::ECONNRESET)));
    }
}
