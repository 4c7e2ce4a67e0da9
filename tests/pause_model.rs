//! Goal: a process that is stopped for longer than the kernel waits for a lease submits nothing to blocks that were given
//! away meanwhile, whatever it was doing when it was stopped, and in whatever order its threads go on.
//!
//! ```text
//!   kernel   an opener waits for the lease; while the process is stopped, it may get in
//!   guard    the signal -> recall -> fence
//!   watch    asked by a core: look at the file -> recall, fence -> say so, when no recall waits to be told
//!   core     look at the clock: away? then ask, wait; recalled with commands under way? then end. Submit. Begin.
//! ```
//!
//! The steps are those of `reactor::pause`, `extent::guard::oversight`, `extent::watch` and `extent::guard`. A core's look
//! at the clock and its system call are one step here: in the code they are some microseconds apart. That the running
//! process lets go in time is the business of `fence_model.rs`.

#[path = "common/explore.rs"]
mod explore;

use explore::{Model, explore};

const CORES: usize = 2;
const STOPS: u8 = 2;
/// Commands that each core may still begin.
const COMMANDS: u8 = 2;

/// What is wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Hole {
    None,
    /// A core does not look at the clock before it submits.
    NoLook,
    /// A core that was away asks, and does not wait for the answer.
    NoProof,
    /// A look that began before the stop counts.
    OldProof,
    /// The watch passes over a recalled file whose fence is not down yet.
    UnsettledProof,
    /// A core that finds a recall goes on with what it has queued.
    GoesOn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Opener {
    None,
    Waits,
    /// The blocks may be somebody else's.
    In,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Watch {
    Idle,
    /// A look that began after so many stops, and has not come to the file yet.
    Looking(u8),
    /// It found the lease broken, and recalls.
    Recalling(u8),
    Looked(u8),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Core {
    left: u8,
    /// Commands that the next system call submits.
    queued: u8,
    /// It was stopped, and has not looked at the clock since.
    away: bool,
    ended: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    hole: Hole,
    stopped: bool,
    stops: u8,
    opener: Opener,
    /// The kernel's signal, not yet heard.
    signal: bool,
    recalled: bool,
    fenced: bool,
    watch: Watch,
    wanted: u8,
    proven: u8,
    cores: [Core; CORES],
    /// A command was submitted when the opener was in.
    wrong: bool,
}

impl State {
    fn first(hole: Hole) -> Self {
        let core = Core { left: COMMANDS, ..Core::default() };
        Self {
            hole,
            stopped: false,
            stops: 0,
            opener: Opener::None,
            signal: false,
            recalled: false,
            fenced: false,
            watch: Watch::Idle,
            wanted: 0,
            proven: 0,
            cores: [core; CORES],
            wrong: false,
        }
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn kernel(&self, all: &mut Vec<Self>) {
        if self.opener == Opener::None {
            all.push(self.with(|next| (next.opener, next.signal) = (Opener::Waits, true)));
        }
        if self.stopped {
            if self.opener == Opener::Waits {
                all.push(self.with(|next| next.opener = Opener::In));
            }
            all.push(self.with(|next| next.stopped = false));
        } else if self.stops < STOPS {
            all.push(self.with(|next| {
                next.stopped = true;
                next.stops += 1;
                next.cores.iter_mut().for_each(|core| core.away = true);
            }));
        }
    }

    fn guard(&self, all: &mut Vec<Self>) {
        if self.signal {
            all.push(self.with(|next| (next.signal, next.recalled) = (false, true)));
        } else if self.recalled && !self.fenced && !matches!(self.watch, Watch::Recalling(_)) {
            all.push(self.with(|next| next.fenced = true));
        }
    }

    fn watch(&self, all: &mut Vec<Self>) {
        match self.watch {
            Watch::Idle if self.wanted > self.proven => {
                all.push(self.with(|next| next.watch = Watch::Looking(next.stops)));
            }
            Watch::Looking(begun) => all.push(self.with(|next| {
                let whole = next.opener == Opener::None;
                next.watch =
                    if whole || next.recalled { Watch::Looked(begun) } else { Watch::Recalling(begun) };
            })),
            Watch::Recalling(begun) => all.push(self.with(|next| {
                (next.recalled, next.fenced) = (true, true);
                next.watch = Watch::Looked(begun);
            })),
            Watch::Looked(begun) => all.push(self.with(|next| {
                next.watch = Watch::Idle;
                let is_settled = !next.recalled || next.fenced || next.hole == Hole::UnsettledProof;
                if is_settled {
                    next.proven = next.proven.max(begun);
                }
            })),
            Watch::Idle => {}
        }
    }

    fn core(&self, index: usize, all: &mut Vec<Self>) {
        let core = self.cores[index];
        if core.ended {
            return;
        }
        if core.away && self.wanted < self.stops {
            all.push(self.with(|next| next.wanted = next.stops));
        }
        let newest = self.proven >= self.stops || (self.hole == Hole::OldProof && self.proven > 0);
        if core.away && (newest || self.hole == Hole::NoProof) {
            all.push(self.with(|next| {
                let recalled = next.fenced && core.queued > 0 && next.hole != Hole::GoesOn;
                (next.cores[index].away, next.cores[index].ended) = (false, recalled);
            }));
        }
        if core.queued > 0 && (!core.away || self.hole == Hole::NoLook) {
            all.push(self.with(|next| {
                next.cores[index].queued = 0;
                next.wrong |= next.opener == Opener::In;
            }));
        }
        if core.left > 0 && !core.away && !self.fenced {
            all.push(self.with(|next| {
                next.cores[index].left -= 1;
                next.cores[index].queued += 1;
            }));
        }
    }
}

impl Model for State {
    fn broken(&self) -> Option<&'static str> {
        self.wrong.then_some("a command went to blocks that were given away")
    }

    fn next(&self) -> Vec<Self> {
        let mut all = Vec::new();
        self.kernel(&mut all);
        if !self.stopped {
            self.guard(&mut all);
            self.watch(&mut all);
            (0..CORES).for_each(|index| self.core(index, &mut all));
        }
        all
    }
}

#[test]
fn a_process_that_was_stopped_submits_nothing_to_blocks_that_were_given_away() {
    match explore(State::first(Hole::None)) {
        Ok(states) => {
            println!("{states} states");
            assert!(states > 1000, "the search has not met everybody: {states} states");
        }
        Err((why, way)) => panic!("{why}: {way:#?}"),
    }
}

#[test]
fn every_hole_is_found() {
    for hole in [Hole::NoLook, Hole::NoProof, Hole::OldProof, Hole::UnsettledProof, Hole::GoesOn] {
        let (why, way) = explore(State::first(hole)).expect_err("the hole is there");
        println!("{hole:?}: {why}, after {} steps", way.len() - 1);
        assert!(way.len() > 3);
    }
}
