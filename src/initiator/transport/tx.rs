//! The sending half: headers in an arena, data where it lies, one `sendmsg` for as much as fits.

use super::slot::Slot;
use crate::tcp::digest;
use crate::tcp::pdu::{self, TERM_REQ_MAX, TermReq};
use rustix::net::{SendAncillaryBuffer, SendFlags};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::ops::Range;

/// Pieces in one `sendmsg`.
const IOV_MAX: usize = 256;
/// Sent bytes that the arena keeps before it is worth moving the rest to its front.
const ARENA_CUT_MIN: usize = 32 << 10;

/// A piece of the stream.
#[derive(Clone, Debug)]
enum Segment {
    /// Bytes of the arena.
    Arena(Range<usize>),
    /// Bytes of a slot's buffer.
    Data { slot: u16, range: Range<usize> },
}

/// What waits to be sent.
pub(super) struct SendQueue {
    arena: Vec<u8>,
    /// Bytes that were cut off the front of the arena since it was last empty: the ranges count from there.
    arena_base: usize,
    segments: VecDeque<Segment>,
    /// Commands that ended while their data is in `segments`.
    pub(super) ending: usize,
}

impl SendQueue {
    pub(super) fn new(depth: usize) -> Self {
        Self {
            arena: Vec::with_capacity(depth * 128 + 2 * ARENA_CUT_MIN),
            arena_base: 0,
            segments: VecDeque::with_capacity(depth * 3 + 16),
            ending: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Appends a copy of `bytes`.
    pub(super) fn push_bytes(&mut self, bytes: &[u8]) {
        let start = self.arena_base + self.arena.len();
        let end = start + bytes.len();
        self.arena.extend_from_slice(bytes);
        match self.segments.back_mut() {
            Some(Segment::Arena(range)) if range.end == start => range.end = end,
            _ => self.segments.push_back(Segment::Arena(start..end)),
        }
    }

    /// Appends a piece of a slot's buffer, and its digest when there is one.
    pub(super) fn push_data(&mut self, index: u16, slot: &mut Slot, range: Range<usize>, digested: bool) {
        let crc = if digested { Some(digest::crc32c(0, &slot.buffer[range.clone()])) } else { None };
        slot.tx_segments += 1;
        self.segments.push_back(Segment::Data { slot: index, range });
        if let Some(crc) = crc {
            self.push_bytes(&crc.to_le_bytes());
        }
    }

    /// Sends until all is gone or the socket takes no more.
    pub(super) fn flush(&mut self, socket: &TcpStream, slots: &mut [Slot]) -> io::Result<()> {
        while !self.segments.is_empty() {
            let sent = {
                let mut pieces = [IoSlice::new(&[]); IOV_MAX];
                let mut count = 0;
                for (piece, segment) in pieces.iter_mut().zip(&self.segments) {
                    *piece = IoSlice::new(match segment {
                        Segment::Arena(range) => {
                            &self.arena[range.start - self.arena_base..range.end - self.arena_base]
                        }
                        Segment::Data { slot, range } => &slots[usize::from(*slot)].buffer[range.clone()],
                    });
                    count += 1;
                }
                let mut ancillary = SendAncillaryBuffer::default();
                match rustix::net::sendmsg(socket, &pieces[..count], &mut ancillary, SendFlags::NOSIGNAL) {
                    Ok(sent) => sent,
                    Err(rustix::io::Errno::AGAIN) => return Ok(()),
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(errno) => return Err(errno.into()),
                }
            };
            self.advance(sent, slots);
        }
        Ok(())
    }

    /// Takes `sent` bytes off the front.
    fn advance(&mut self, mut sent: usize, slots: &mut [Slot]) {
        while let Some(segment) = self.segments.front_mut() {
            let (Segment::Arena(range) | Segment::Data { range, .. }) = segment;
            if sent < range.len() {
                range.start += sent;
                return self.cut_arena();
            }
            sent -= range.len();
            if let Some(Segment::Data { slot, .. }) = self.segments.pop_front() {
                slots[usize::from(slot)].tx_segments -= 1;
            }
        }
        self.arena.clear();
        self.arena_base = 0;
    }

    /// Drops what was sent from the front of the arena, so that a queue which is never idle does not grow.
    fn cut_arena(&mut self) {
        let unsent = self.segments.iter().find_map(|segment| match segment {
            Segment::Arena(range) => Some(range.start - self.arena_base),
            Segment::Data { .. } => None,
        });
        let sent = unsent.unwrap_or(self.arena.len());
        if sent >= ARENA_CUT_MIN && sent >= self.arena.len() / 2 {
            self.arena.drain(..sent);
            self.arena_base += sent;
        }
    }

    /// Tries to send a TermReq in place of all that waits. Nothing is sent when a PDU has gone out in part.
    pub(super) fn terminate(&mut self, socket: &TcpStream, pdu: TermReq, offending: &[u8]) {
        if !self.segments.is_empty() {
            return;
        }
        let mut out = [0; TERM_REQ_MAX];
        let len = pdu::h2c_term_req(&mut out, pdu, offending);
        // Best effort: the connection ends either way.
        let _ = rustix::net::send(socket, &out[..len], SendFlags::NOSIGNAL);
    }
}
