//! Commands of a connection: from the capsule to the session and the device.

use hugepage_alloc::DmaBuf;
use nvme_spec::{Status, SubmissionQueueEntry};

use super::TcpConnection;
use super::request::{Index, NoPlace, Purpose, State};
use super::rx::{Incoming, RxState};
use super::tx::Out;
use crate::fabrics::{Begin, Completion, DataLocation, IoCommand, IoKind, data_location};
use crate::probes;
use crate::reactor::CoreContext;
use crate::tcp::pdu::{DataHeader, HeaderPlan, PduError, PduType};

/// Byte offsets in a data PDU's header, for what only a connection can find wrong (TCP section 3.6.2.8).
const FLAGS_OFFSET: u8 = 1;
const CCCID_OFFSET: u8 = 8;
const TTAG_OFFSET: u8 = 10;

impl TcpConnection {
    /// A CapsuleCmd. Its data, if there is any, has not been looked at yet.
    pub(super) fn command(
        &mut self,
        cx: &mut CoreContext,
        plan: &HeaderPlan,
        sqe: &SubmissionQueueEntry,
    ) -> Result<(), PduError> {
        if plan.data_len > 0 {
            // Whatever becomes of the command, the capsule's data has to pass.
            self.expect(Incoming::skip(plan));
        }
        let mut inserted = self.requests.insert(sqe);
        if inserted == Err(NoPlace::CidInUse)
            && let Some(parked) = self.requests.parked(sqe.cid.get())
            && self.session.gives_up_event_request(sqe)
        {
            self.requests.remove(parked);
            inserted = self.requests.insert(sqe);
        }
        let index = match inserted {
            Ok(index) => index,
            Err(NoPlace::CidInUse) => {
                self.counters.duplicate_cids.bump();
                let completion = Completion::of(Status::COMMAND_ID_CONFLICT.with_dnr());
                self.session.refused(sqe, completion.status);
                self.tx.push(Out::Refusal { cid: sqe.cid.get(), completion });
                return Ok(());
            }
            // More commands than queue entries: nothing that is sent can be trusted to belong together.
            Err(NoPlace::QueueOverrun) => return Err(PduError::Sequence { pdu_type: PduType::CAPSULE_CMD }),
        };
        self.requests.at(index).arrived = self.arrived;
        probes::command_begin(sqe);
        if let Some(command) = self.session.begin_transfer(sqe) {
            match command.kind {
                IoKind::Read => self.read(cx, index, command),
                _ => self.want_data(cx, plan, index, Purpose::Device(command)),
            }
            return Ok(());
        }
        match self.session.begin(sqe, cx.now) {
            // A transfer too: its namespace may have been opened between the two looks.
            Begin::Io(command) => match command.kind {
                IoKind::Read => self.read(cx, index, command),
                IoKind::Write => self.want_data(cx, plan, index, Purpose::Device(command)),
                _ => self.start(cx, index, command, None, false),
            },
            Begin::NeedData { .. } => self.want_data(cx, plan, index, Purpose::Session),
            other => self.carry_out(cx, index, other, None),
        }
        Ok(())
    }

    /// Sets what the bytes behind the header are, when there are any.
    fn expect(&mut self, incoming: Incoming) {
        if incoming.lead + incoming.left + incoming.trail > 0 {
            self.rx.state = RxState::Data(incoming);
        }
    }

    /// Gets the data of a command: out of its capsule, or by R2T.
    fn want_data(&mut self, cx: &mut CoreContext, plan: &HeaderPlan, index: Index, purpose: Purpose) {
        let sqe = self.requests.at(index).sqe;
        match data_location(&sqe, self.session.in_capsule_len_max()) {
            Ok(DataLocation::InCapsule { offset, len }) => {
                let (offset, len) = (offset as usize, len as usize);
                if offset + len > plan.data_len {
                    return self.fail(index, Status::DATA_SGL_LENGTH_INVALID.with_dnr());
                }
                // Behind those that wait for a buffer: a large one would never come together otherwise.
                let mine = u32::try_from(len).ok().filter(|_| self.starving.is_empty());
                let buf = mine.and_then(|len| self.alloc(cx, len));
                let request = self.requests.at(index);
                request.state = State::Data(purpose);
                request.owed_since = Some(cx.now);
                match buf {
                    Some(buf) => self.requests.give(index, buf),
                    None => request.shelf = vec![0; len],
                }
                self.rx.state = RxState::Data(Incoming::part(plan, index, offset, len));
            }
            Ok(DataLocation::Transport { len }) => {
                self.requests.at(index).state = State::BufferForData(purpose, len);
                self.feed_one(cx, index);
            }
            Ok(DataLocation::None) => self.fail(index, Status::DATA_SGL_LENGTH_INVALID.with_dnr()),
            Err(status) => self.fail(index, status),
        }
    }

    fn fail(&mut self, index: Index, status: Status) {
        let sqe = self.requests.at(index).sqe;
        self.session.note_error(&sqe, status, None);
        self.answer(index, Completion::of(status));
    }

    /// A buffer, if there is one and this connection has not more than its share: as much as is left for all others.
    /// So a host that asks for data and never reads it, or announces data and never sends it, cannot take the pool
    /// from the others; and who holds nothing may always have one.
    fn alloc(&self, cx: &CoreContext, len: u32) -> Option<DmaBuf> {
        let held = self.requests.held_bytes() + self.tx.bytes_len();
        if held > 0 && held.saturating_add(len as usize) > cx.pool.bytes_free() {
            return None;
        }
        cx.pool.alloc(len)
    }

    /// Does what the session decided. `data` is what the command brought along.
    fn carry_out(&mut self, cx: &mut CoreContext, index: Index, begin: Begin, data: Option<DmaBuf>) {
        match begin {
            Begin::Respond(completion) => {
                let unconnected = matches!(self.stage, super::Stage::Handshake { .. });
                if unconnected && self.session.is_connected() {
                    self.connected(cx);
                }
                self.answer(index, completion);
            }
            Begin::SendData { data, completion } => {
                self.requests.at(index).state = State::BufferForAnswer(data, completion);
                self.feed_one(cx, index);
            }
            Begin::Io(command) => self.start(cx, index, command, data, false),
            Begin::Park => self.requests.at(index).state = State::Parked,
            Begin::RespondThenClose(completion) => {
                self.answer(index, completion);
                self.end(cx);
            }
            // The session asks for data once, and `command` and `data_arrived` deal with it.
            Begin::NeedData { .. } => self.fail(index, Status::INTERNAL_ERROR),
        }
    }

    /// Hands a read to the engine, with a buffer that its device lends or one of the pool, or waits for one of these.
    ///
    /// All that may fail is done before there is a buffer: it goes from registers to its place in the engine's list then
    /// (`reactor::engine::flight`).
    #[inline]
    fn read(&mut self, cx: &mut CoreContext, index: Index, command: IoCommand) {
        let (Some(key), true) = (self.key, self.starving.is_empty()) else {
            return self.wait_to_read(cx, index, command);
        };
        let len = u32::try_from(command.len.0).unwrap_or(u32::MAX);
        self.requests.at(index).state = State::Device { reads: true };
        self.on_device += 1;
        // What is lent is none of the pool's, but others are not to wait longer for its sake: answers of this connection count as held.
        if let Some(lent) = cx.engine.lend(command.slot, command.len) {
            return cx.engine.start(key, u32::from(index), command, Some(lent));
        }
        if len > 0
            && let Some(buf) = self.alloc(cx, len)
        {
            self.requests.charge(index, len);
            return cx.engine.start(key, u32::from(index), command, Some(buf));
        }
        self.on_device -= 1;
        self.wait_to_read(cx, index, command);
    }

    #[cold]
    fn wait_to_read(&mut self, cx: &mut CoreContext, index: Index, command: IoCommand) {
        self.requests.at(index).state = State::BufferForRead(command);
        self.feed_one(cx, index);
    }

    /// Hands a command to the engine.
    // Where it is called, so that what is in registers goes from there to the engine's list: see `reactor::engine::flight`.
    #[inline(always)]
    fn start(
        &mut self,
        cx: &mut CoreContext,
        index: Index,
        command: IoCommand,
        buf: Option<DmaBuf>,
        reads: bool,
    ) {
        let Some(key) = self.key else { return };
        let request = self.requests.at(index);
        request.state = State::Device { reads };
        self.on_device += 1;
        cx.engine.start(key, u32::from(index), command, buf);
    }

    /// Serves those that wait for buffers, oldest first.
    pub(super) fn feed(&mut self, cx: &mut CoreContext) {
        for _ in 0..self.starving.len() {
            let Some(index) = self.starving.pop_front() else { break };
            if !self.try_feed(cx, index) {
                // Whoever waits longest stays first.
                self.starving.push_front(index);
                break;
            }
        }
    }

    fn feed_one(&mut self, cx: &mut CoreContext, index: Index) {
        if !self.starving.is_empty() || !self.try_feed(cx, index) {
            self.starving.push_back(index);
        }
    }

    /// Gives a request its buffer and moves it on; false when there is none now.
    fn try_feed(&mut self, cx: &mut CoreContext, index: Index) -> bool {
        let len = match &self.requests.at(index).state {
            State::BufferForData(_, len) => *len,
            State::BufferForShelf(_) => self.requests.at(index).expected(),
            State::BufferForRead(command) => u32::try_from(command.len.0).unwrap_or(u32::MAX),
            State::BufferForAnswer(data, _) => u32::try_from(data.len()).unwrap_or(u32::MAX),
            _ => return true,
        };
        if len == 0 {
            self.without_data(index);
            return true;
        }
        let Some(buf) = self.alloc(cx, len) else { return false };
        self.requests.give(index, buf);
        let request = self.requests.at(index);
        match std::mem::replace(&mut request.state, State::Parked) {
            State::BufferForData(purpose, _) => {
                request.state = State::Data(purpose);
                request.owed_since = Some(cx.now);
                request.asked = true;
                self.tx.push(Out::R2t(index));
            }
            State::BufferForShelf(purpose) => {
                let shelf = std::mem::take(&mut request.shelf);
                request.store(0, &shelf);
                self.data_is_there(cx, index, purpose);
            }
            State::BufferForRead(command) => {
                let buf = request.buf.take();
                self.start(cx, index, command, buf, true);
            }
            State::BufferForAnswer(data, completion) => {
                request.store(0, &data);
                self.answer(index, completion);
            }
            // Looked at above; put back as it was.
            other => request.state = other,
        }
        true
    }

    /// An answer that turned out to be empty (clipped to a zero-length SGL) is only its completion.
    fn without_data(&mut self, index: Index) {
        match self.requests.at(index).state {
            State::BufferForAnswer(_, completion) => self.answer(index, completion),
            _ => self.fail(index, Status::DATA_SGL_LENGTH_INVALID.with_dnr()),
        }
    }

    /// The header of an H2CData: must continue the data of a command that asked for it.
    pub(super) fn data_header(&mut self, plan: &HeaderPlan, data: DataHeader) -> Result<(), PduError> {
        let Some(request) = self.requests.get(data.ttag) else {
            return Err(PduError::InvalidField { offset: TTAG_OFFSET });
        };
        let expected = request.expected();
        if !request.asked || !matches!(request.state, State::Data(_)) || request.received >= expected {
            return Err(PduError::InvalidField { offset: TTAG_OFFSET });
        }
        if request.sqe.cid.get() != data.cccid {
            return Err(PduError::InvalidField { offset: CCCID_OFFSET });
        }
        let out_of_range = PduError::DataOutOfRange { offset: data.data_offset, len: data.data_len };
        let end = data.data_offset.checked_add(data.data_len).ok_or(out_of_range)?;
        if data.data_offset != request.received || end > expected {
            return Err(out_of_range);
        }
        if data.last != (end == expected) {
            return Err(PduError::InvalidField { offset: FLAGS_OFFSET });
        }
        let at = request.received as usize;
        self.expect(Incoming::into_request(plan, data.ttag, at));
        Ok(())
    }

    /// Data of a command has come, up to `end` of its buffer.
    pub(super) fn data_arrived(&mut self, cx: &mut CoreContext, index: Index, end: usize, fits: bool) {
        let request = self.requests.at(index);
        request.spoilt |= !fits;
        request.received = u32::try_from(end).unwrap_or(u32::MAX);
        if request.received < request.expected() {
            return;
        }
        let State::Data(purpose) = request.state else { return };
        if request.spoilt {
            // The host sends the command again (TCP section 3.3.1.2).
            request.buf = None;
            self.counters.data_digest_errors.bump();
            return self.fail(index, Status::TRANSIENT_TRANSPORT_ERROR);
        }
        if request.buf.is_none() {
            request.state = State::BufferForShelf(purpose);
            return self.feed_one(cx, index);
        }
        self.data_is_there(cx, index, purpose);
    }

    /// All data of a command is in its buffer.
    fn data_is_there(&mut self, cx: &mut CoreContext, index: Index, purpose: Purpose) {
        let request = self.requests.at(index);
        let buf = request.buf.take();
        match purpose {
            Purpose::Device(command) => self.start(cx, index, command, buf, false),
            Purpose::Session => {
                let Some(buf) = buf else { return self.fail(index, Status::INTERNAL_ERROR) };
                let sqe = request.sqe;
                let mut scratch = std::mem::take(&mut self.scratch);
                scratch.clear();
                scratch.resize(buf.len(), 0);
                buf.read_into(0, &mut scratch);
                let begin = self.session.finish(&sqe, &scratch, cx.now);
                self.scratch = scratch;
                self.carry_out(cx, index, begin, Some(buf));
            }
        }
    }
}
