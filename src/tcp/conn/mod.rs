//! One NVMe/TCP connection of the target.
//!
//! ```text
//!   socket --recv--> rx --PDU--> command() --Begin--> QueueSession
//!                                   |  data arrives        |
//!                                   v                      v
//!                              IoEngine  <---- IoCommand --'
//!                                   |
//!                          on_io()  v
//!   socket <--send-- tx <------- Answer
//! ```
//!
//! A command is an entry of the request table from the capsule that brings it to the batch that carries its answer;
//! [`request::State`] says what it waits for. A connection ends in three steps, whoever wants it: it takes no more
//! PDUs ([`Stage::Ending`]), its commands come back from the devices, and only then the session and the socket go.
//! So no write of a lost connection can land after its host was told that the controller is gone.
//!
//! Not here: what commands mean (`fabrics`), how bytes are arranged (`pdu`).

mod commands;
mod counters;
mod ended;
mod fuzz;
mod held;
mod outstanding;
mod request;
mod rx;
mod socket;
mod timeouts;
mod times;
mod tx;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::SubmissionQueueEntry;
use rustix::net::Shutdown;
use zerocopy::FromBytes;

pub use self::counters::{Counter, TcpCounters, TcpStats};
pub use self::fuzz::fuzz_connection;
use self::request::{Index, Requests};
use self::rx::{Rx, RxState, Step};
pub use self::timeouts::TcpTimeouts;
use self::times::Times;
use self::tx::{Out, Tx, TxSize};
use super::pdu::{Digests, IcReq, IcResp, PDA_MAX, PduError, PduHeader, PduRules, Phase, Receiver, TermReq};
use crate::fabrics::{QueueSession, SessionEvent};
use crate::reactor::{Connection, CoreContext, Gather, Heard, IoDone, Key, Polled, Turn};
use crate::ring::{RingDone, RingResource, Socket};
use crate::stage::{Stamp, Who};

/// MAXH2CDATA: data in one H2CData PDU at the most. As large as the largest transfer, so that one R2T and one PDU
/// carry any write.
pub const MAXH2CDATA_BYTES: u32 = 1 << 20;

/// Commands under way before Connect told the queue's size: Connect itself, and properties behind it.
const REQUESTS_BEFORE_CONNECT: u16 = 32;
/// How often hanging transfers are looked for.
const TRANSFER_LOOK: Duration = Duration::from_secs(1);
/// A connection that has received nothing for so long has no use for a large buffer: 2 s.
const IDLE_NS: u64 = 2_000_000_000;
/// Steps of parsing in one turn, so that no connection starves its neighbours: a PDU is one, and the end of its data another. So many that
/// a whole queue of 128 reads is answered by as few sends as they came together.
const PDU_BUDGET: usize = 128;
/// Receive buffers: at first and as an admin queue; of an I/O queue, once more comes at a time; and of one that was busy and is
/// idle: as little as makes no difference for single commands, for all of it is touched then.
const RX_BYTES_SMALL: usize = 16 * 1024;
const RX_BYTES_IO: usize = 256 * 1024;
const RX_BYTES_IDLE: usize = 4 * 1024;
/// Send batches: at first, and of an I/O queue once one was full.
const TX_SMALL: TxSize = TxSize { arena_bytes: 4096, parts: 128, queue: 64, notes: 32 };
const TX_IO: TxSize = TxSize { arena_bytes: 32 * 1024, parts: 512, queue: 256, notes: 128 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Until Connect has succeeded; then [`Stage::Running`].
    Handshake { deadline: Instant },
    /// Commands come and go.
    Running,
    /// No more PDUs are taken; commands on devices are answered as long as there is time.
    Ending { deadline: Instant },
    /// All is said: our half of the socket is closed, and what still comes is thrown away until the peer closes its
    /// half. Closing both with bytes unread would reset the connection, and the last answers or the TermReq would
    /// be lost on the peer's side.
    Closing { deadline: Instant },
    /// The socket is shut down; what the ring and the devices hold comes back.
    Draining,
}

/// How far parsing came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parsed {
    /// What is left is no whole step: more bytes are needed.
    All,
    /// The budget ran out before the bytes did.
    More,
    /// The peer does not take its answers: it gets no further until they are sent.
    Held,
}

/// A connection. Made by [`TcpFactory`](super::TcpFactory).
pub struct TcpConnection {
    key: Option<Key>,
    socket: Socket,
    peer: SocketAddr,
    session: QueueSession,
    counters: Arc<TcpCounters>,
    timeouts: TcpTimeouts,
    stage: Stage,
    /// ICReq has been answered.
    initialized: bool,
    digests: Digests,
    rx: Rx,
    tx: Tx,
    requests: Requests,
    /// Requests that wait for a buffer, oldest first.
    starving: VecDeque<Index>,
    /// Commands that the engine has.
    on_device: usize,
    /// Room in the engine that is reserved for this connection.
    reserved: usize,
    /// Room for control data on its way to the session.
    scratch: Vec<u8>,
    /// A TermReq was sent: nothing may follow it.
    terminating: bool,
    /// When transfers are looked at again.
    next_look: Instant,
    /// The core looks at the socket by itself, again and again: no receive is given to the ring.
    polled: bool,
    /// The socket had no room for all answers, and the core tries again at its next look.
    waits_for_room: bool,
    /// All that was received is parsed: more may come.
    receives: bool,
    heard: Heard,
    /// How commands come, and what is done so that they come together.
    gather: Gather,
    /// Since the last answers.
    received_bytes: u32,
    /// When the bytes that are parsed now were received.
    arrived: Stamp,
    times: Times,
}

impl TcpConnection {
    pub(super) fn new(
        socket: Socket,
        peer: SocketAddr,
        session: QueueSession,
        counters: Arc<TcpCounters>,
        timeouts: TcpTimeouts,
        now: Instant,
    ) -> Self {
        let rules = PduRules {
            data_len_max: MAXH2CDATA_BYTES,
            in_capsule_len_max: session.in_capsule_len_max(),
            ..PduRules::initializing(Receiver::Controller)
        };
        counters.connections.bump();
        Self {
            key: None,
            socket,
            peer,
            session,
            counters,
            timeouts,
            stage: Stage::Handshake { deadline: now + timeouts.handshake },
            initialized: false,
            digests: Digests::NONE,
            rx: Rx::new(rules, RX_BYTES_SMALL),
            tx: Tx::new(TX_SMALL),
            requests: Requests::new(REQUESTS_BEFORE_CONNECT),
            starving: VecDeque::with_capacity(usize::from(REQUESTS_BEFORE_CONNECT)),
            on_device: 0,
            reserved: 0,
            scratch: Vec::new(),
            terminating: false,
            next_look: now + TRANSFER_LOOK,
            polled: false,
            waits_for_room: false,
            receives: false,
            heard: Heard::new(Stamp::now()),
            gather: Gather::new(Duration::ZERO),
            received_bytes: 0,
            arrived: Stamp::NONE,
            times: Times::default(),
        }
    }

    /// Whether commands are taken.
    fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Handshake { .. } | Stage::Running)
    }

    /// Parses what has arrived, within the budget.
    fn parse(&mut self, cx: &mut CoreContext) -> Parsed {
        if !self.is_open() {
            self.rx.discard();
            return Parsed::All;
        }
        for _ in 0..PDU_BUDGET {
            if !self.is_open() {
                return Parsed::All;
            }
            if self.tx.backlog() > self.requests.capacity() * 2 {
                return Parsed::Held;
            }
            // Where it lies: what was just written in pieces is not to be copied as a whole, which would wait for all of them.
            match &self.rx.step(&mut self.requests) {
                Ok(Step::Starved) => return Parsed::All,
                Ok(Step::Command(plan, sqe)) => match self.command(cx, plan, sqe) {
                    Ok(()) => self.rx.header_done(plan),
                    Err(error) => self.protocol_error(cx, &error),
                },
                Ok(Step::Header(decoded)) => match self.header(cx, decoded) {
                    Ok(()) => self.rx.header_done(&decoded.plan),
                    Err(error) => self.protocol_error(cx, &error),
                },
                Ok(Step::DataDone(incoming, fits)) => {
                    if let Some(index) = incoming.request {
                        self.data_arrived(cx, index, incoming.at, *fits);
                    }
                }
                Err(error) => self.protocol_error(cx, error),
            }
        }
        Parsed::More
    }

    fn header(&mut self, cx: &mut CoreContext, decoded: &super::pdu::Decoded) -> Result<(), PduError> {
        match decoded.header {
            PduHeader::IcReq(ic_req) => {
                self.initialize(ic_req);
                Ok(())
            }
            // 64 bytes are 64 bytes; the error exists for the type only.
            PduHeader::CapsuleCmd(sqe) => match SubmissionQueueEntry::read_from_bytes(&sqe) {
                Ok(sqe) => self.command(cx, &decoded.plan, &sqe),
                Err(_) => Err(PduError::Sequence { pdu_type: decoded.plan.pdu_type }),
            },
            PduHeader::H2cData(data) => self.data_header(&decoded.plan, data),
            PduHeader::TermReq(term) => {
                self.terminated(cx, term);
                Ok(())
            }
            // The rules name the controller as the receiver: the decoder lets nothing else through.
            PduHeader::IcResp(_) | PduHeader::CapsuleResp(_) | PduHeader::C2hData(_) | PduHeader::R2t(_) => {
                Err(PduError::Sequence { pdu_type: decoded.plan.pdu_type })
            }
        }
    }

    fn initialize(&mut self, ic_req: IcReq) {
        self.initialized = true;
        self.digests = ic_req.digests;
        self.tx.hpda = ic_req.hpda.min(PDA_MAX);
        self.rx.rules.phase = Phase::Running;
        self.rx.rules.digests = ic_req.digests;
        self.tx.push(Out::IcResp(IcResp { cpda: 0, digests: ic_req.digests, maxh2cdata: MAXH2CDATA_BYTES }));
    }

    fn terminated(&mut self, cx: &mut CoreContext, term: TermReq) {
        self.counters.term_reqs_received.bump();
        if self.counters.may_log() {
            let who = self.session.controller_label();
            tracing::warn!(peer = %self.peer, who, fes = ?term.fes, fei = term.fei, "host terminated the connection");
        }
        self.abort(cx);
    }

    /// The peer broke the protocol: says so, and ends the connection.
    fn protocol_error(&mut self, cx: &mut CoreContext, error: &PduError) {
        self.counters.protocol_errors.bump();
        if matches!(error, PduError::HeaderDigest { .. }) {
            self.counters.header_digest_errors.bump();
        }
        if self.counters.may_log() {
            let who = self.session.controller_label();
            tracing::warn!(peer = %self.peer, who, %error, "connection ended: the host broke the protocol");
        }
        let Some(fes) = error.fes() else { return self.abort(cx) };
        if !self.tx.terminate(TermReq { fes, fei: error.fei() }, self.rx.offending()) {
            return self.abort(cx);
        }
        self.counters.term_reqs_sent.bump();
        self.terminating = true;
        self.starving.clear();
        self.end(cx);
    }

    /// Begins the orderly end: what is under way is answered, nothing new is taken.
    fn end(&mut self, cx: &CoreContext) {
        if self.is_open() {
            self.stage = Stage::Ending { deadline: cx.now + self.timeouts.ending };
            self.rx.state = RxState::Over;
        }
    }

    /// Ends at once: the peer is gone or not worth an answer.
    fn abort(&mut self, _cx: &CoreContext) {
        if self.stage != Stage::Draining {
            self.stage = Stage::Draining;
            self.rx.state = RxState::Over;
            self.tx.discard();
            self.starving.clear();
            // Brings receives and sends in flight back. Fails only when the peer was faster.
            let _ = rustix::net::shutdown(self.socket.as_fd(), Shutdown::Both);
        }
    }

    /// Moves an ending connection on.
    fn wind_up(&mut self, cx: &CoreContext) {
        match self.stage {
            Stage::Ending { deadline } if self.on_device == 0 && self.tx.is_idle() => {
                let deadline = deadline.min(cx.now + self.timeouts.closing);
                self.stage = Stage::Closing { deadline };
                self.rx.state = RxState::Discard;
                self.rx.discard();
                // Nothing is on a device: the controller need not wait for the peer.
                self.session.closed();
                // Fails only when the peer was faster.
                let _ = rustix::net::shutdown(self.socket.as_fd(), Shutdown::Write);
            }
            Stage::Ending { deadline } | Stage::Closing { deadline } if cx.now >= deadline => self.abort(cx),
            _ => {}
        }
    }

    fn is_finished(&self) -> bool {
        self.stage == Stage::Draining
            && self.on_device == 0
            && self.rx.batch.is_some()
            && !self.tx.in_flight()
    }

    /// Gives the large receive buffer back when nothing was received for a while.
    fn shrink_idle(&mut self, cx: &CoreContext) {
        let is_idle = cx.stages.now().ns_since(self.arrived) >= IDLE_NS;
        if let Some(key) = self.key
            && is_idle
            && self.stage == Stage::Running
            && self.rx.shrink(RX_BYTES_SMALL, RX_BYTES_IDLE)
        {
            cx.sockets.cancel(CoreContext::token(key, socket::RECV));
        }
    }

    /// What other threads and the clock want of the session.
    fn session_events(&mut self, cx: &mut CoreContext) {
        while let Some(event) = self.session.poll(cx.now) {
            match event {
                SessionEvent::Complete { cid, completion } => {
                    if let Some(index) = self.requests.parked(cid.get()) {
                        self.answer(index, completion);
                    }
                }
                SessionEvent::Close(reason) => {
                    if self.counters.may_log() {
                        let who = self.session.controller_label();
                        tracing::info!(peer = %self.peer, who, %reason, "connection ended");
                    }
                    return self.end(cx);
                }
            }
        }
    }

    /// Sizes everything for the queue, once Connect has told how large it is.
    fn connected(&mut self, cx: &mut CoreContext) {
        self.stage = Stage::Running;
        if let (Some((host, subsystem)), Some((cntlid, qid))) = (self.session.names(), self.session.numbers())
        {
            let who = Who { host: host.to_owned(), subsystem: subsystem.to_owned(), cntlid, qid };
            self.tx.who = Some(Rc::new(who));
        }
        let entries = self.session.sq_size();
        self.requests.grow(entries);
        self.starving.reserve(usize::from(entries));
        self.rx.rules.in_capsule_len_max = self.session.in_capsule_len_max();
        if self.session.is_io() {
            self.reserved = usize::from(entries);
            cx.engine.reserve(self.reserved);
            self.gather = Gather::new(cx.gather);
            self.rx.most_bytes = RX_BYTES_IO;
            self.tx.resize(TxSize { queue: usize::from(entries) * 2, ..TX_IO });
            if !self.session.is_flow_control_disabled() {
                self.tx.reserve_held();
                self.requests.count_outstanding();
            }
        }
    }
}

impl Drop for TcpConnection {
    /// Wherever it is dropped: at its end, for lack of a seat, or with its core.
    fn drop(&mut self) {
        self.counters.connections_ended.bump();
    }
}

impl Connection for TcpConnection {
    fn start(&mut self, _cx: &mut CoreContext, key: Key) {
        self.key = Some(key);
    }

    fn on_ring(&mut self, cx: &mut CoreContext, _kind: u8, done: RingDone) {
        match done.resource {
            RingResource::Recv(batch) => self.received(cx, batch, done.result),
            RingResource::Send(batch) => self.sent(cx, batch, done.result),
            RingResource::Buffer(_) | RingResource::Accepted(_) | RingResource::None => {}
        }
    }

    fn on_io(&mut self, cx: &mut CoreContext, ended: &mut [IoDone]) {
        for done in ended {
            self.ended(cx, done);
        }
    }

    fn turn(&mut self, cx: &mut CoreContext) -> Turn {
        if self.is_open() {
            self.feed(cx);
        }
        let parsed = self.parse(cx);
        self.wind_up(cx);
        let mut again = self.is_open() && !self.starving.is_empty();
        if self.stage != Stage::Draining {
            // What can be sent goes first, for somebody waits for it.
            again |= !self.send(cx);
            // Bytes that are not parsed yet stay here: a receive would take them along, and they would wait for more to
            // come from a host that waits for their answer.
            self.receives = parsed == Parsed::All;
            again |= match parsed {
                Parsed::All => false,
                Parsed::More => true,
                // A send in the ring comes back when the peer has taken it; one that is done does not.
                Parsed::Held => !self.tx.in_flight() && !self.waits_for_room,
            };
            if self.receives && !self.polled {
                // Who has another turn anyway decides then: the core hears of it by the end of a turn only.
                self.polled = !again && self.takes_poll(cx);
                again |= !self.polled && !self.receive(cx);
            }
        }
        if self.is_finished() {
            self.session.closed();
            cx.engine.unreserve(self.reserved);
            return Turn::Finished;
        }
        match (again, self.polled) {
            (true, _) => Turn::Again,
            (false, true) => Turn::Poll,
            (false, false) => Turn::Wait,
        }
    }

    fn poll(&mut self, cx: &mut CoreContext) -> Polled {
        self.look(cx)
    }

    fn tick(&mut self, cx: &mut CoreContext) -> bool {
        if self.is_open() {
            self.session_events(cx);
        }
        self.check_handshake(cx);
        if cx.now >= self.next_look {
            self.next_look = cx.now + TRANSFER_LOOK;
            self.check_transfers(cx);
            self.shrink_idle(cx);
        }
        self.wind_up(cx);
        // All else that moves it on comes by a completion.
        !self.is_open() || self.tx.backlog() > 0
    }

    fn carries_io(&self) -> Option<bool> {
        (self.stage == Stage::Running).then(|| self.session.is_io())
    }

    /// An I/O queue that waits for commands: keep-alives are the admin queue's, and who wants its end rings the bell.
    fn is_steady(&self) -> bool {
        self.stage == Stage::Running && self.session.is_io()
    }

    fn stop(&mut self, cx: &mut CoreContext) {
        self.end(cx);
    }
}
