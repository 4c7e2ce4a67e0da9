//! Bytes in and out of a connection's socket.
//!
//! ```text
//!   send      at once, by one plain system call; what the socket has no room for: busy: it is tried again at every look
//!                                                                                   else: to the ring, which waits for room
//!   receive   busy: the core looks again and again     silent, or many that are seldom heard: a receive waits in the ring
//! ```
//!
//! A busy socket may be left alone for a moment: see [`Gather`](crate::reactor::Gather).
//!
//! Not here: which sockets the core reads by itself ([`SocketPolls`](crate::reactor::SocketPolls)), what the bytes mean.

use std::io::ErrorKind;

use super::{Stage, TcpConnection};
use crate::reactor::{CoreContext, Polled};
use crate::ring::{RecvBatch, SendBatch};
use crate::stage::Stamp;

/// Batches that are sent in one turn.
const SENDS_MAX: usize = 4;
/// Kinds of ring operations.
pub(super) const RECV: u8 = 1;
const SEND: u8 = 2;

impl TcpConnection {
    /// Sends when there is something and nothing is being sent. False when the ring had no room.
    pub(super) fn send(&mut self, cx: &mut CoreContext) -> bool {
        let Some(key) = self.key else { return true };
        self.waits_for_room = false;
        for _ in 0..SENDS_MAX {
            self.tx.fill(&mut self.requests, &self.session, self.digests, &mut cx.trace);
            let Some(mut batch) = self.tx.take_batch(cx.now) else { return true };
            // At once, for the socket nearly always has room.
            let result = self.socket.send_now(&mut batch);
            let sent = result.as_ref().map_or(0, |sent| *sent as usize);
            if sent == batch.bytes_len() {
                self.times.count(self.tx.flying(), Stamp::now(), &mut cx.trace);
                let bytes = u64::from(std::mem::take(&mut self.received_bytes)) + sent as u64;
                self.gather.answered(self.tx.flying().commands(), bytes, cx.now);
                self.tx.hold_responses(self.gather.together(self.requests.outstanding()));
                self.tx.give_back(batch);
                continue;
            }
            batch.advance(sent);
            let waits = result.map_or_else(|error| error.kind() == ErrorKind::WouldBlock, |_| true);
            if waits && self.polled {
                // A host that is busy takes what there is in a moment: sooner than the ring would be told and asked.
                self.tx.put_back(batch);
                self.waits_for_room = true;
                return true;
            }
            // The ring sends it when the socket has room; and tells what is wrong, if something is.
            if let Err(full) = cx.sockets.send(CoreContext::token(key, SEND), &self.socket, batch) {
                self.tx.put_back(full.0);
                return false;
            }
        }
        // What is left is for the next turn, so that others have theirs.
        !self.tx.has_more()
    }

    /// Receives when nothing is being received. False when the ring had no room.
    pub(super) fn receive(&mut self, cx: &mut CoreContext) -> bool {
        let Some(key) = self.key else { return true };
        let Some(batch) = self.rx.take_batch(&mut self.requests) else { return true };
        if let Err(full) = cx.sockets.recv(CoreContext::token(key, RECV), &self.socket, batch) {
            self.rx.batch = Some(full.0);
            return false;
        }
        true
    }

    /// Whether the core itself shall read the socket from now on.
    pub(super) fn takes_poll(&self, cx: &CoreContext) -> bool {
        self.stage == Stage::Running
            && self.session.is_io()
            && self.rx.batch.is_some()
            && cx.polls.has_place(&self.heard, cx.stages.now())
    }

    pub(super) fn received(
        &mut self,
        cx: &mut CoreContext,
        batch: Box<RecvBatch>,
        result: std::io::Result<u32>,
    ) {
        match result {
            Err(error) if self.rx.has_shrunk(&error) => {
                self.counters.shrunk.bump();
                self.rx.received(batch, 0, &mut self.requests);
            }
            Ok(0) | Err(_) => {
                self.rx.received(batch, 0, &mut self.requests);
                if self.is_open() && result.is_err() {
                    self.counters.broken.bump();
                }
                self.abort(cx);
            }
            Ok(count) => {
                cx.polls.heard(&mut self.heard, cx.stages.now());
                self.arrived = cx.stages.now();
                self.received_bytes = self.received_bytes.saturating_add(count);
                self.rx.received(batch, count, &mut self.requests);
            }
        }
    }

    pub(super) fn sent(
        &mut self,
        cx: &mut CoreContext,
        mut batch: Box<SendBatch>,
        result: std::io::Result<u32>,
    ) {
        match result {
            Ok(count) if (count as usize) < batch.bytes_len() && self.stage != Stage::Draining => {
                batch.advance(count as usize);
                let Some(key) = self.key else { return };
                if let Err(full) = cx.sockets.send(CoreContext::token(key, SEND), &self.socket, batch) {
                    self.tx.give_back(full.0);
                    self.abort(cx);
                }
            }
            Ok(_) => {
                self.times.count(self.tx.flying(), cx.stages.now(), &mut cx.trace);
                self.tx.give_back(batch);
            }
            Err(_) => {
                self.tx.give_back(batch);
                self.abort(cx);
            }
        }
    }

    /// Looks at a socket that the core reads by itself.
    pub(super) fn look(&mut self, cx: &mut CoreContext) -> Polled {
        let goes_on = cx.polls.goes_on(&self.heard, cx.stages.now());
        if goes_on && self.waits_for_room && self.stage != Stage::Draining {
            let has_sent_all = self.send(cx);
            if !has_sent_all || !(self.waits_for_room || self.receives) {
                // There is more to send, which takes a turn; or it was held until its answers are taken.
                return Polled::Data;
            }
        }
        if goes_on && !self.receives {
            cx.polls.held(&mut self.heard);
            return Polled::Nothing;
        }
        if goes_on && self.gather.holds(cx.now) {
            return Polled::Nothing;
        }
        match self.rx.take_batch(&mut self.requests) {
            Some(mut batch) if goes_on => {
                cx.polls.look();
                match self.socket.recv_now(&mut batch) {
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                        cx.polls.missed(&mut self.heard);
                        if let Some(until) = self.gather.missed(cx.now) {
                            let wait = until.saturating_duration_since(cx.now);
                            cx.polls.left_alone(&mut self.heard, cx.stages.now().after(wait));
                            self.counters.gathers.bump();
                        }
                        self.rx.put_back(batch);
                        return Polled::Nothing;
                    }
                    result => {
                        self.received(cx, batch, result);
                        return Polled::Data;
                    }
                }
            }
            Some(batch) => self.rx.put_back(batch),
            None => {}
        }
        (self.polled, self.waits_for_room) = (false, false);
        Polled::Cold
    }
}
