//! One core: the loop itself.

mod listeners;
mod setup;
mod sockets;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::listeners::Listener;
use self::setup::memory;
use super::activity::{Ledger, TurnTaken, Wake};
use super::engine::IoEngine;
use super::gauges::{CoreGauges, CoreStats};
use super::linger::Linger;
use super::mailbox::{Accepted, Letter, Mailbox};
use super::pause::{CoreFailure, PauseWatch};
use super::polls::SocketPolls;
use super::slab::{Key, Slab};
use super::{Connection, ConnectionFactory, CoreContext, CoreOptions, CoresError, Turn};
use crate::fabrics::ExportSlot;
use crate::ring::{FileRef, Ring, RingClient, Wait};
use crate::stage::{CoreStages, Trace};

/// Turns of ready connections in one turn of the core.
const TURN_BUDGET: usize = 256;
/// Listeners of one core.
const LISTENERS_MAX: usize = 64;
/// What a core does when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Never sleeps: the lowest latency, a whole core busy.
    AlwaysPoll,
    /// Polls for this long after the last work, then sleeps until something happens.
    SleepAfter(Duration),
}

/// A connection and whether it is in the ready list.
struct Seat {
    connection: Box<dyn Connection>,
    ready: bool,
    polled: bool,
    /// As the connection tells, once it does. One that carries none does not count when the next is given to a core.
    carries_io: Option<bool>,
    /// Nothing came since it was found to be in no need of ticks.
    steady: bool,
}

/// How accepted connections are spread.
pub(super) type Spread = Arc<dyn Fn(Accepted) + Send + Sync>;

/// Everything of one core. `!Send`: made and run on its own thread.
pub struct Core {
    cx: CoreContext,
    /// See [`CoreOptions::hold`].
    _hold: Option<FileRef>,
    ring: Ring,
    /// The core's own operations: its bell and its listeners.
    own: RingClient,
    seats: Slab<Seat>,
    ready: VecDeque<Key>,
    /// Those whose sockets the core looks at by itself: all in a turn, or of many some.
    polled: Vec<Key>,
    /// Where in that list the next look begins, or behind its end.
    poll_start: usize,
    listeners: Slab<Listener>,
    /// When a listener wants an accept again; none when each has one.
    accepts_at: Option<Instant>,
    /// Letters that wait for the last command of an export. No turn waits for them: what ends a command wakes the core.
    drains: Vec<(ExportSlot, Box<dyn FnOnce() + Send>)>,
    letters: Vec<Letter>,
    factory: Arc<dyn ConnectionFactory>,
    spread: Spread,
    idle: IdlePolicy,
    linger: Linger,
    stop_at: Option<Instant>,
    next_tick: Instant,
    /// When the next tick is one for all.
    next_review: Instant,
    last_work: Instant,
    /// The mailbox's eventfd, as the ring watches it.
    bell: FileRef,
    bell_armed: bool,
    pause: PauseWatch,
    gauges: Arc<CoreGauges>,
    activity: Ledger,
}

/// Kinds of the core's own operations, in the top byte of their tokens.
const BELL: u8 = 0;
const ACCEPT: u8 = 1;

impl Core {
    /// How often deadlines are looked at by a core that works.
    pub const TICK: Duration = Duration::from_millis(20);
    /// How often by one that has had no work for as long. Keep-alive time-outs are exact to this much.
    pub const TICK_ASLEEP: Duration = Duration::from_millis(100);
    /// How often all connections are looked at, those included that were [steady](Connection::is_steady). To look at one that is
    /// idle costs a dozen lines of memory that no cache has.
    pub const REVIEW: Duration = Duration::from_secs(1);

    /// A core that keeps the connections it accepts, on the calling thread and whatever CPU that runs on: for who
    /// drives it by [`Core::step`], as tests do.
    ///
    /// # Errors
    /// When there is no memory or no io_uring for it.
    pub fn alone(
        options: &CoreOptions,
        mailbox: &Mailbox,
        factory: Arc<dyn ConnectionFactory>,
    ) -> Result<Self, CoresError> {
        let own = mailbox.clone();
        let spread: Spread = Arc::new(move |accepted| own.post(Letter::Adopt(accepted)));
        Self::new(0, options, mailbox.clone(), factory, spread, Arc::default())
    }

    /// A core with its ring and buffers, made on the thread that will run it. `cpu` is for messages.
    pub(super) fn new(
        cpu: usize,
        options: &CoreOptions,
        mailbox: Mailbox,
        factory: Arc<dyn ConnectionFactory>,
        spread: Spread,
        gauges: Arc<CoreGauges>,
    ) -> Result<Self, CoresError> {
        let CoreOptions { idle, gather, connections_max, .. } = *options;
        let (ring, pool) = memory(cpu, options)?;
        let hold = match &options.hold {
            Some(hold) => {
                let copy = hold.try_clone().map_err(|source| CoresError::Thread { cpu, source })?;
                // The first file of the ring: the table has room for it.
                Some(ring.register_file(copy))
            }
            None => None,
        };
        let bell = mailbox.bell().try_clone_to_owned();
        let bell = FileRef::new(bell.map_err(|source| CoresError::Thread { cpu, source })?);
        let now = Instant::now();
        let sockets = ring.client(connections_max * 3);
        let own = ring.client(LISTENERS_MAX + 1);
        let engine = IoEngine::new(ring.clone(), pool.clone());
        let stages = CoreStages::new(Arc::clone(&options.stages));
        let idle_time = match idle {
            IdlePolicy::AlwaysPoll => None,
            IdlePolicy::SleepAfter(idle) => Some(idle),
        };
        let polls = SocketPolls::new(idle_time, connections_max);
        let mut seats = Slab::default();
        seats.reserve(connections_max);
        let mut listeners = Slab::default();
        listeners.reserve(LISTENERS_MAX);
        Ok(Self {
            cx: CoreContext {
                sockets,
                pool,
                engine,
                now,
                mailbox,
                polls,
                gather,
                stages,
                trace: Trace::default(),
            },
            _hold: hold,
            ring,
            own,
            seats,
            ready: VecDeque::with_capacity(connections_max),
            polled: Vec::with_capacity(connections_max),
            poll_start: 0,
            listeners,
            accepts_at: None,
            drains: Vec::new(),
            letters: Vec::new(),
            factory,
            spread,
            idle,
            linger: Linger::new(options.linger),
            stop_at: None,
            next_tick: now,
            next_review: now,
            last_work: now,
            bell,
            bell_armed: false,
            pause: PauseWatch::new(options.oversight.clone()),
            gauges,
            activity: Ledger::new(),
        })
    }

    /// Runs until it was asked to stop and has nothing left, or its deadline has passed. True when nothing was left:
    /// no device operation of this core can still change anything.
    ///
    /// # Errors
    /// When the ring itself fails, or the core was stopped and a file is not what it was: nothing can be served on this core
    /// any more.
    pub fn run(mut self) -> Result<bool, CoreFailure> {
        loop {
            if let Err(failure) = self.step() {
                if failure.forbids_submission() {
                    // Dropping the ring or a device queue would submit what is queued. The kernel takes both apart with the
                    // process.
                    std::mem::forget(self);
                }
                return Err(failure);
            }
            if let Some(clean) = self.stopped() {
                return Ok(clean);
            }
        }
    }

    /// One turn of the loop, which sleeps only when there is nothing to do, and not beyond the next tick. Returns how
    /// much was done.
    ///
    /// # Errors
    /// As [`Core::run`].
    pub fn step(&mut self) -> Result<usize, CoreFailure> {
        self.arm();
        let wait = self.wait();
        let submits = self.pause.look(&self.cx.engine)?;
        let mut work = self.ring.turn(wait)?;
        self.cx.engine.disarm();
        let now = self.pause.look(&self.cx.engine)?;
        self.cx.now = now.instant();
        self.cx.stages.turn(now);
        self.cx.engine.turned(submits, now);
        let own = self.own_completions();
        let sockets = self.socket_completions() + self.polled_sockets(own);
        let devices = self.device_completions();
        work += own + sockets + devices;
        self.cx.engine.handled(work);
        work += self.take_turns();
        self.cx.engine.launch();
        // What a device answers at once leaves with what this turn submits, not a turn later.
        let answered = self.device_completions();
        let has_commands = devices + answered > 0;
        self.linger.turn(now, has_commands);
        if has_commands {
            // Set while it was idle, the next look may be further away. Keep-alives alone do not make it look more often.
            self.next_tick = self.next_tick.min(self.cx.now + Self::TICK);
        }
        if answered > 0 {
            work += answered + self.take_turns();
            self.cx.engine.launch();
        }
        let slept = matches!(wait, Wait::UpTo(_)).then(|| self.woken_by(own, sockets, devices));
        self.activity.turn(TurnTaken { submits, now, slept, has_work: work > 0 });
        if self.cx.now >= self.next_tick {
            self.tick();
        }
        self.answer_drains();
        if work > 0 {
            self.last_work = self.cx.now;
        }
        Ok(work)
    }

    /// What it holds at this moment.
    #[must_use]
    pub fn stats(&self) -> CoreStats {
        CoreStats {
            connections: self.seats.len(),
            commands: self.cx.engine.jobs(),
            buffer_bytes: self.cx.pool.stats().bytes_in_use,
        }
    }

    /// What ended a sleep, by what was found then.
    const fn woken_by(&self, own: usize, sockets: usize, devices: usize) -> Wake {
        match (sockets, devices, own) {
            (1.., _, _) => Wake::Socket,
            (0, 1.., _) => Wake::Device,
            // Armed before each turn, and not any more when it rang.
            (0, 0, 1..) if !self.bell_armed => Wake::Mail,
            (0, 0, 1..) => Wake::Accept,
            (0, 0, 0) => Wake::Timer,
        }
    }

    /// How long the ring may sleep: not at all while there is work or the polling time runs. What the ring has given and the turn
    /// before had no time for is work that the ring knows nothing of.
    fn wait(&mut self) -> Wait {
        if !self.ready.is_empty() || !self.polled.is_empty() || self.cx.sockets.ready() > 0 {
            return Wait::No;
        }
        match self.idle {
            IdlePolicy::AlwaysPoll => Wait::No,
            IdlePolicy::SleepAfter(idle) if self.cx.now.duration_since(self.last_work) < idle => Wait::No,
            IdlePolicy::SleepAfter(_) if self.linger.goes_on() || !self.cx.engine.arm() => Wait::No,
            IdlePolicy::SleepAfter(_) => Wait::UpTo(self.next_tick.saturating_duration_since(self.cx.now)),
        }
    }

    /// Keeps the bell and the listeners watched.
    fn arm(&mut self) {
        if !self.bell_armed {
            self.bell_armed = self.own.wait_readable(u64::from(BELL) << 56, &self.bell).is_ok();
        }
        if self.accepts_at.is_some_and(|at| self.cx.now >= at) {
            self.accept();
        }
    }

    fn own_completions(&mut self) -> usize {
        let mut work = 0;
        while let Some(done) = self.own.pop() {
            work += 1;
            if done.token >> 56 == u64::from(BELL) {
                self.bell_armed = false;
                self.read_mail();
                continue;
            }
            self.accepted(done);
        }
        work
    }

    fn read_mail(&mut self) {
        let mut letters = std::mem::take(&mut self.letters);
        self.cx.mailbox.clone().collect(&mut letters);
        for letter in letters.drain(..) {
            self.open_letter(letter);
        }
        self.letters = letters;
        // A bell without a letter: some session has news from another thread.
        (self.next_tick, self.next_review) = (self.cx.now, self.cx.now);
    }

    fn open_letter(&mut self, letter: Letter) {
        match letter {
            Letter::Adopt(accepted) => self.adopt(accepted),
            Letter::Listen { listener, port } => self.listen(listener, port),
            Letter::Unlisten(port) => self.unlisten(Some(port)),
            Letter::Open { exports, reply } => {
                let opened = exports.into_iter().try_for_each(|export| {
                    let nsid = export.nsid;
                    self.cx.engine.open(export).map_err(|error| format!("namespace {nsid}: {error}"))
                });
                // The asker may have given up waiting; nobody is left to tell then.
                let _ = reply.send(opened);
            }
            Letter::Drain { slot, answer } => self.drains.push((slot, answer)),
            Letter::Close(slot) => {
                if !self.cx.engine.close(slot) {
                    tracing::error!(slot = slot.0, "export closed before it was drained; kept");
                }
            }
            // The asker may have given up waiting.
            Letter::Trace { reply } => drop(reply.send(self.cx.trace.copy(self.gauges.cpu()))),
            Letter::Stop { deadline } => self.begin_stop(deadline),
        }
    }

    fn adopt(&mut self, accepted: Accepted) {
        if self.stop_at.is_some() {
            return self.cx.mailbox.let_go();
        }
        let peer = accepted.peer;
        let Some(connection) = self.factory.clone().adopt(&mut self.cx, accepted) else {
            return self.cx.mailbox.let_go();
        };
        let Ok(key) = self.seats.insert(Seat {
            connection,
            ready: false,
            polled: false,
            carries_io: None,
            steady: false,
        }) else {
            tracing::warn!(%peer, "connection refused: this core serves as many as it may");
            return self.cx.mailbox.let_go();
        };
        if let Some(seat) = self.seats.get_mut(key) {
            seat.connection.start(&mut self.cx, key);
            Self::mark_ready(&mut self.ready, seat, key);
        }
    }

    fn mark_ready(ready: &mut VecDeque<Key>, seat: &mut Seat, key: Key) {
        seat.steady = false;
        if !seat.ready {
            seat.ready = true;
            ready.push_back(key);
        }
    }

    fn device_completions(&mut self) -> usize {
        let mut work = self.cx.engine.poll();
        if !self.cx.engine.has_done() {
            return work;
        }
        let mut ended = self.cx.engine.take_done();
        work += ended.len();
        // Most have neighbours of the same connection.
        for mine in ended.as_mut_slice().chunk_by_mut(|one, next| one.owner == next.owner) {
            let Some(key) = mine.first().map(|first| first.owner) else { continue };
            if let Some(seat) = self.seats.get_mut(key) {
                seat.connection.on_io(&mut self.cx, mine);
                Self::mark_ready(&mut self.ready, seat, key);
            }
        }
        self.cx.engine.give_back(ended);
        work
    }

    /// Gives each connection that was ready at the start one turn.
    fn take_turns(&mut self) -> usize {
        let turns = self.ready.len().min(TURN_BUDGET);
        for _ in 0..turns {
            let Some(key) = self.ready.pop_front() else { break };
            let Some(seat) = self.seats.get_mut(key) else { continue };
            seat.ready = false;
            match seat.connection.turn(&mut self.cx) {
                Turn::Wait => {}
                Turn::Poll => {
                    if !seat.polled {
                        seat.polled = true;
                        self.polled.push(key);
                        self.cx.polls.set_polled(self.polled.len());
                    }
                }
                Turn::Again => Self::mark_ready(&mut self.ready, seat, key),
                Turn::Finished => {
                    if seat.carries_io != Some(false) {
                        self.cx.mailbox.let_go();
                    }
                    self.seats.remove(key);
                    continue;
                }
            }
            if seat.carries_io.is_none() {
                seat.carries_io = seat.connection.carries_io();
                if seat.carries_io == Some(false) {
                    self.cx.mailbox.let_go();
                }
            }
        }
        turns
    }

    fn tick(&mut self) {
        let is_idle = self.cx.now.saturating_duration_since(self.last_work) >= Self::TICK_ASLEEP;
        self.next_tick = self.cx.now + if is_idle { Self::TICK_ASLEEP } else { Self::TICK };
        self.cx.polls.tick();
        let is_review = self.cx.now >= self.next_review;
        if is_review {
            self.next_review = self.cx.now + Self::REVIEW;
        }
        for index in 0..self.seats.slots() {
            let Some(key) = self.seats.key_at(index) else { continue };
            // A turn for nothing would count as work, of which an idle core has none.
            if let Some(seat) = self.seats.get_mut(key)
                && (is_review || !seat.steady)
            {
                let wants_turn = seat.connection.tick(&mut self.cx);
                seat.steady = seat.connection.is_steady();
                if wants_turn {
                    Self::mark_ready(&mut self.ready, seat, key);
                }
            }
        }
        self.gauges.set(&self.stats(), self.activity.counted());
    }

    fn answer_drains(&mut self) {
        let engine = &self.cx.engine;
        for (_, answer) in self.drains.extract_if(.., |(slot, _)| engine.in_flight(*slot) == 0) {
            answer();
        }
    }

    fn begin_stop(&mut self, deadline: Instant) {
        self.stop_at = Some(deadline);
        self.unlisten(None);
        for index in 0..self.seats.slots() {
            let Some(key) = self.seats.key_at(index) else { continue };
            if let Some(seat) = self.seats.get_mut(key) {
                seat.connection.stop(&mut self.cx);
                Self::mark_ready(&mut self.ready, seat, key);
            }
        }
    }

    /// Whether to leave the loop, and if so whether nothing is left behind.
    fn stopped(&self) -> Option<bool> {
        let deadline = self.stop_at?;
        let (connections, commands) = (self.seats.len(), self.cx.engine.jobs());
        if connections == 0 && commands == 0 {
            return Some(true);
        }
        if self.cx.now < deadline {
            return None;
        }
        tracing::warn!(connections, commands, "stopping at the deadline with work under way");
        Some(commands == 0)
    }
}
