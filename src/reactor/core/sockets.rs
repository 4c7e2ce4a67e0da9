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
        // Of many, looks in vain decide whether they go on: each counts once a round.
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
        let begin = if self.poll_start < count { self.poll_start } else { 0 };
        let looks = LOOKS_A_TURN.min(count);
        self.poll_start = begin + if looks < count { looks } else { 1 };
        if self.poll_start >= count {
            self.poll_start -= count;
        }
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
            self.forget_cold();
        }
        self.cx.polls.set_polled(self.polled.len());
        work
    }

    /// Takes those off the list that are not looked at any more. The next look begins at the same one as if they had stayed.
    fn forget_cold(&mut self) {
        let (seats, begin) = (&self.seats, self.poll_start);
        let (mut at, mut gone_before) = (0, 0);
        self.polled.retain(|key| {
            let stays = seats.get(*key).is_some_and(|seat| seat.polled);
            gone_before += usize::from(!stays && at < begin);
            at += 1;
            stays
        });
        self.poll_start -= gone_before;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
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

    thread_local! {
        /// How often each of the connections was looked at, in the order in which they came, and which are to be cold.
        static LOOKS: RefCell<Vec<usize>> = RefCell::default();
        static COLD: RefCell<Vec<usize>> = RefCell::default();
    }

    /// Waits once, until its file is readable.
    struct Waits(Option<OwnedFd>, usize);

    impl Connection for Waits {
        fn start(&mut self, cx: &mut CoreContext, key: Key) {
            let file = FileRef::new(self.0.take().expect("started once"));
            cx.sockets.wait_readable(CoreContext::token(key, 1), &file).expect("room");
        }
        fn on_ring(&mut self, _: &mut CoreContext, _: u8, _: RingDone) {
            HANDED_OUT.with(|count| count.set(count.get() + 1));
        }
        fn on_io(&mut self, _: &mut CoreContext, _: &mut [IoDone]) {}
        fn poll(&mut self, _: &mut CoreContext) -> Polled {
            LOOKS.with_borrow_mut(|looks| looks[self.1] += 1);
            let is_cold = COLD.with_borrow(|cold| cold.contains(&self.1));
            if is_cold { Polled::Cold } else { Polled::Nothing }
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
            let number = LOOKS.with_borrow_mut(|looks| {
                looks.push(0);
                looks.len() - 1
            });
            Some(Box::new(Waits(Some(accepted.socket), number)))
        }
    }

    /// A core with so many connections, all of one file, which wait.
    fn core_with(connections: usize) -> (Core, OwnedFd) {
        let options = CoreOptions {
            buffer_memory: ByteLen(8 << 20),
            share_buffers: false,
            idle: IdlePolicy::SleepAfter(Duration::ZERO),
            linger: Duration::ZERO,
            gather: Duration::ZERO,
            connections_max: connections,
            hold: None,
            oversight: None,
            stages: Arc::default(),
        };
        let mailbox = Mailbox::new().unwrap();
        let mut core = Core::alone(&options, &mailbox, Arc::new(Adopts)).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        for _ in 0..connections {
            let socket = event.try_clone().unwrap();
            let accepted = Accepted { socket, peer: nobody, local: nobody, port: PortId(1) };
            mailbox.post(Letter::Adopt(accepted));
        }
        while core.stats().connections < connections || !core.ready.is_empty() {
            core.step().unwrap();
        }
        (core, event)
    }

    /// The keys of all, in the order in which they came: whose it is shows when it is looked at alone.
    fn keys_of(core: &mut Core) -> Vec<Key> {
        let keys: Vec<_> = (0..core.seats.slots()).filter_map(|slot| core.seats.key_at(slot)).collect();
        let mut numbered: Vec<_> = keys
            .into_iter()
            .map(|key| {
                core.polled = vec![key];
                (looked_at(core, 1).iter().position(|looks| *looks == 1).unwrap(), key)
            })
            .collect();
        core.polled.clear();
        numbered.sort_unstable_by_key(|(number, _)| *number);
        numbered.into_iter().map(|(_, key)| key).collect()
    }

    /// Of all that are polled, how often each was looked at in so many turns.
    fn looked_at(core: &mut Core, turns: usize) -> Vec<usize> {
        LOOKS.with_borrow_mut(|looks| looks.fill(0));
        for _ in 0..turns {
            assert_eq!(core.look_at_sockets(), 0, "there is nothing at any");
        }
        LOOKS.with_borrow(Clone::clone)
    }

    #[test]
    fn many_are_looked_at_in_turn_and_none_is_passed_over_when_others_go() {
        const COUNT: usize = 3 * LOOKS_A_TURN + 1;
        let (mut core, _event) = core_with(COUNT);
        let keys = keys_of(&mut core);
        for key in &keys {
            core.seats.get_mut(*key).unwrap().polled = true;
        }
        core.polled.extend(keys);
        let looks = looked_at(&mut core, COUNT);
        assert!(looks.iter().all(|count| *count == LOOKS_A_TURN), "each has its share: {looks:?}");
        assert_eq!(looked_at(&mut core, 1).iter().sum::<usize>(), LOOKS_A_TURN, "of a turn, some");
        // The turn after it begins behind those that were first, of which most go.
        COLD.with_borrow_mut(|cold| cold.extend(0..5));
        core.poll_start = 0;
        let first = looked_at(&mut core, 1);
        assert_eq!(first[..LOOKS_A_TURN], [1; LOOKS_A_TURN]);
        assert_eq!(core.polled.len(), COUNT - 5);
        let rest = looked_at(&mut core, 2);
        let (next, later) = rest[LOOKS_A_TURN..].split_at(2 * LOOKS_A_TURN);
        assert!(next.iter().all(|count| *count == 1) && later == [0], "{rest:?}");
        // All at once go, wherever it is.
        COLD.with_borrow_mut(|cold| *cold = (0..COUNT).collect());
        looked_at(&mut core, COUNT);
        assert!(core.polled.is_empty());
        looked_at(&mut core, 1);
        // Few are looked at in each turn.
        COLD.with_borrow_mut(Vec::clear);
        let few = keys_of(&mut core)[..3].to_vec();
        for key in &few {
            core.seats.get_mut(*key).unwrap().polled = true;
        }
        core.polled.extend(few);
        assert_eq!(looked_at(&mut core, 7).iter().filter(|count| **count == 7).count(), 3);
    }

    #[test]
    fn a_core_does_not_sleep_on_completions_that_one_turn_had_no_time_for() {
        const MORE: usize = RING_BUDGET + 40;
        let (mut core, event) = core_with(MORE);
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
