//! What a turn of a core finds at its sockets: completions of the ring, and what it reads by itself.

use super::Core;
use crate::reactor::polls::Polled;
use crate::reactor::slab::Key;

/// Socket completions handed out in one turn.
const RING_BUDGET: usize = 256;
/// Looks at sockets of a turn that has nothing else to do, beyond the first.
const LOOKS_AGAIN: usize = 4;
/// Sockets that are looked at in a turn: what these have is answered before the next are looked at. Were all of many looked at first, their
/// hosts would wait for the answers meanwhile, and the core then for them.
const LOOKS_A_TURN: usize = 8;

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

    /// Looks at each once, or at the next of many. Few begin a little further on each turn: a host whose own round were as long
    /// as ours would else always find the same of its connections just too late.
    fn look_at_sockets(&mut self) -> usize {
        let count = self.polled.len();
        if count == 0 {
            return 0;
        }
        let (mut work, mut is_cold) = (0, false);
        let begin = self.poll_start % count;
        let looks = LOOKS_A_TURN.min(count);
        self.poll_start = begin + if looks < count { looks } else { 1 };
        for at in (begin..count).chain(0..begin).take(looks) {
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::net::{Ipv4Addr, SocketAddr};
    use std::os::fd::OwnedFd;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::fabrics::PortId;
    use crate::reactor::mailbox::{Accepted, Letter, Mailbox};
    use crate::reactor::{Connection, ConnectionFactory, CoreContext, CoreOptions, IdlePolicy, IoDone, Turn};
    use crate::ring::{FileRef, RingDone, Wait};
    use crate::units::ByteLen;

    thread_local! {
        /// Completions that connections of this thread were handed.
        static HANDED_OUT: Rc<Cell<usize>> = Rc::default();
    }

    /// Waits once, until its file is readable.
    struct Waits(Option<OwnedFd>);

    impl Connection for Waits {
        fn start(&mut self, cx: &mut CoreContext, key: Key) {
            let file = FileRef::new(self.0.take().expect("started once"));
            cx.sockets.wait_readable(CoreContext::token(key, 1), &file).expect("room");
        }
        fn on_ring(&mut self, _: &mut CoreContext, _: u8, _: RingDone) {
            HANDED_OUT.with(|count| count.set(count.get() + 1));
        }
        fn on_io(&mut self, _: &mut CoreContext, _: IoDone) {}
        fn poll(&mut self, _: &mut CoreContext) -> Polled {
            Polled::Cold
        }
        fn turn(&mut self, _: &mut CoreContext) -> Turn {
            Turn::Wait
        }
        fn tick(&mut self, _: &mut CoreContext) -> bool {
            false
        }
        fn carries_io(&self) -> Option<bool> {
            None
        }
        fn is_steady(&self) -> bool {
            true
        }
        fn stop(&mut self, _: &mut CoreContext) {}
    }

    struct Adopts;

    impl ConnectionFactory for Adopts {
        fn adopt(&self, _: &mut CoreContext, accepted: Accepted) -> Option<Box<dyn Connection>> {
            Some(Box::new(Waits(Some(accepted.socket))))
        }
    }

    #[test]
    fn a_core_does_not_sleep_on_completions_that_one_turn_had_no_time_for() {
        const MORE: usize = RING_BUDGET + 40;
        let options = CoreOptions {
            buffer_memory: ByteLen(8 << 20),
            share_buffers: false,
            idle: IdlePolicy::SleepAfter(Duration::ZERO),
            linger: Duration::ZERO,
            gather: Duration::ZERO,
            connections_max: MORE,
            hold: None,
            oversight: None,
            stages: Arc::default(),
        };
        let mailbox = Mailbox::new().unwrap();
        let mut core = Core::alone(&options, &mailbox, Arc::new(Adopts)).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        for _ in 0..MORE {
            let socket = event.try_clone().unwrap();
            let accepted = Accepted { socket, peer: nobody, local: nobody, port: PortId(1) };
            mailbox.post(Letter::Adopt(accepted));
        }
        while core.stats().connections < MORE || !core.ready.is_empty() {
            core.step().unwrap();
        }
        // What it asked for is with the kernel.
        core.step().unwrap();
        assert!(matches!(core.wait(), Wait::UpTo(_)), "there is nothing to do");
        rustix::io::write(&event, &1_u64.to_ne_bytes()).unwrap();
        // The kernel may give a few at a time.
        while core.cx.sockets.ready() < MORE {
            core.ring.turn(Wait::No).unwrap();
        }
        core.step().unwrap();
        let handed_out = || HANDED_OUT.with(|count| count.get());
        assert_eq!(handed_out(), RING_BUDGET, "all came at once");
        assert!(core.ready.is_empty(), "nobody else keeps it awake");
        assert_eq!(core.wait(), Wait::No, "{} are left", MORE - RING_BUDGET);
        core.step().unwrap();
        assert_eq!(handed_out(), MORE);
    }
}
