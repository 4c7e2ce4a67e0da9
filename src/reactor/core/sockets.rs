//! What a turn of a core finds at its sockets: completions of the ring, and what it reads by itself.

use super::Core;
use crate::reactor::polls::Polled;
use crate::reactor::slab::Key;

/// Socket completions handed out in one turn.
const RING_BUDGET: usize = 256;
/// Looks at sockets of a turn that has nothing else to do, beyond the first.
const LOOKS_AGAIN: usize = 4;
/// Turns after which all that are polled have been the first.
const POLL_STEPS: usize = 8;

impl Core {
    /// Hands out what the ring has for connections.
    pub(super) fn socket_completions(&mut self) -> usize {
        for work in 0..RING_BUDGET {
            let Some(done) = self.cx.sockets.pop() else { return work };
            let key = Key::from_bits(done.token);
            let kind = (done.token >> 56) as u8;
            if let Some(seat) = self.seats.get_mut(key) {
                seat.connection.on_ring(&mut self.cx, kind, done);
                Self::mark_ready(&mut self.ready, seat, key);
            }
        }
        RING_BUDGET
    }

    /// Looks at the sockets that the core reads by itself: several times when there is nothing, nor anything else to do (`own`
    /// completions of the core's own), for most of a turn is not looking, and what comes then waits for the rest of it.
    pub(super) fn polled_sockets(&mut self, own: usize) -> usize {
        let mut work = self.look_at_sockets();
        let is_waiting = own == 0 && self.ready.is_empty() && self.cx.engine.jobs() == 0;
        // Of many, looks in vain decide whether they go on: each counts once a turn.
        if is_waiting && !self.polled.is_empty() && self.cx.polls.are_few() {
            for _ in 0..LOOKS_AGAIN / self.polled.len() {
                if work > 0 {
                    break;
                }
                work = self.look_at_sockets();
            }
        }
        work
    }

    /// Looks at each once. Each turn begins a little further on: a host whose own round were as long
    /// as ours would else always find the same of its connections just too late.
    fn look_at_sockets(&mut self) -> usize {
        let count = self.polled.len();
        if count == 0 {
            return 0;
        }
        self.poll_start = (self.poll_start + count / POLL_STEPS + 1) % count;
        let (mut work, mut is_cold) = (0, false);
        for at in (self.poll_start..count).chain(0..self.poll_start) {
            let Some(key) = self.polled.get(at).copied() else { break };
            let Some(seat) = self.seats.get_mut(key) else {
                is_cold = true;
                continue;
            };
            let polled = seat.connection.poll(&mut self.cx);
            seat.polled = polled != Polled::Cold;
            is_cold |= !seat.polled;
            if polled != Polled::Nothing {
                Self::mark_ready(&mut self.ready, seat, key);
            }
            work += usize::from(polled == Polled::Data);
        }
        if is_cold {
            let seats = &self.seats;
            self.polled.retain(|key| seats.get(*key).is_some_and(|seat| seat.polled));
        }
        self.cx.polls.set_polled(self.polled.len());
        work
    }
}
