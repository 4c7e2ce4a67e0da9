//! Goal: no path submits to a device after the guard let go, whatever the order in which threads take their steps.
//!
//! The protocol of recall, fence, drain and release is written down here step by step, each step what one thread does
//! between two points where others may come in, and every interleaving is explored. That the search would find a hole is
//! shown by protocols with one: each must be caught.
//!
//! ```text
//!   watch, guard (threads that recall)   raise the signal -> lock the tripwire -> fence -> unlock -> tell control
//!   control                              fence -> letter to each core -> all answered -> let go, or look again and clear
//!   core                                 see the fence, count the command, submit; answer a letter when nothing is out
//! ```
//!
//! The steps are those of `control::provider` (Tripwire), `control::server` (recalled, looked), `reactor::core`
//! (answer_drains) and `reactor::engine` (start, advance). Two cores and three recalls are enough for every pair of them
//! to meet; more of the same add no kind of meeting.

#[path = "common/explore.rs"]
mod explore;

use std::collections::VecDeque;

use explore::{Model, explore};

const CORES: usize = 2;
const RECALLS: u8 = 3;
/// Commands that each core may still begin.
const COMMANDS: u8 = 3;

/// What is wrong on purpose; `Hole::None` is the protocol as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Hole {
    None,
    /// Control does not wait for the cores.
    NoDrain,
    /// A core answers a letter though commands are out.
    EarlyAnswer,
    /// A core looks at the fence when a command arrives, and not again when its data has.
    OneLook,
    /// Control sends the letters before it fences, and the watch only tells.
    LateFence,
    /// A doubt is cleared without the lock that recalls take.
    UnlockedClear,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Core {
    /// Commands that passed the first look and wait for their data.
    waiting: u8,
    /// A command that passed the last look and is not submitted yet.
    passed: bool,
    /// Commands on the device.
    out: u8,
    left: u8,
    letter: Letter,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Letter {
    #[default]
    None,
    /// In the mailbox, or read and not answered.
    Sent,
    Answered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Recaller {
    Idle,
    /// The signal is raised.
    Raised(u8),
    /// It has the tripwire.
    Armed(u8),
    /// The fence is down.
    Fenced(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Control {
    Idle,
    Heard(u8),
    Fenced(u8),
    Draining(u8),
    Drained(u8),
    /// It has the tripwire, to clear the recall.
    Clearing(u8),
    /// The recall is cleared; the fence is still down.
    Cleared,
    LetGo,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    hole: Hole,
    fenced: bool,
    /// The recall that stands, by its number.
    standing: Option<u8>,
    /// The number that the tripwire keeps.
    tripped: Option<u8>,
    locked: bool,
    recalls: u8,
    recaller: Recaller,
    control: Control,
    /// Messages on their way to the control thread.
    mail: VecDeque<u8>,
    cores: [Core; CORES],
    guarded: bool,
}

impl Model for State {
    fn broken(&self) -> Option<&'static str> {
        let busy = |core: &Core| core.out > 0;
        if !self.guarded && self.cores.iter().any(busy) {
            return Some("a command is on the device after the guard let go");
        }
        let recalling = matches!(self.recaller, Recaller::Raised(_) | Recaller::Armed(_));
        if !recalling && self.standing.is_some() && !self.fenced {
            return Some("a recall stands and hosts are let in");
        }
        None
    }

    fn next(&self) -> Vec<Self> {
        let (hole, mut all) = (self.hole, Vec::new());
        self.recall(hole, &mut all);
        self.control(hole, &mut all);
        for index in 0..CORES {
            self.core(hole, index, &mut all);
        }
        all
    }
}

impl State {
    fn first(hole: Hole) -> Self {
        let core = Core { left: COMMANDS, ..Core::default() };
        Self {
            hole,
            fenced: false,
            standing: None,
            tripped: None,
            locked: false,
            recalls: 0,
            recaller: Recaller::Idle,
            control: Control::Idle,
            mail: VecDeque::new(),
            cores: [core; CORES],
            guarded: true,
        }
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn recall(&self, hole: Hole, all: &mut Vec<Self>) {
        match self.recaller {
            Recaller::Idle if self.recalls < RECALLS && self.standing.is_none() && self.guarded => {
                all.push(self.with(|next| {
                    next.recalls += 1;
                    next.standing = Some(next.recalls);
                    next.recaller = Recaller::Raised(next.recalls);
                }));
            }
            Recaller::Raised(number) if !self.locked => all.push(self.with(|next| {
                next.locked = true;
                next.tripped = Some(number);
                next.recaller = Recaller::Armed(number);
            })),
            Recaller::Armed(number) => all.push(self.with(|next| {
                next.fenced |= hole != Hole::LateFence;
                next.recaller = Recaller::Fenced(number);
            })),
            Recaller::Fenced(number) => all.push(self.with(|next| {
                next.locked = false;
                next.mail.push_back(number);
                next.recaller = Recaller::Idle;
            })),
            _ => {}
        }
    }

    fn control(&self, hole: Hole, all: &mut Vec<Self>) {
        match self.control {
            Control::Idle => {
                if let Some(&number) = self.mail.front() {
                    all.push(self.with(|next| {
                        next.mail.pop_front();
                        next.control = Control::Heard(number);
                    }));
                }
            }
            Control::Heard(number) => all.push(self.with(|next| {
                next.fenced |= hole != Hole::LateFence;
                next.control = Control::Fenced(number);
            })),
            Control::Fenced(number) => all.push(self.with(|next| {
                next.cores.iter_mut().for_each(|core| core.letter = Letter::Sent);
                next.control = Control::Draining(number);
            })),
            Control::Draining(number) => {
                let answered = self.cores.iter().all(|core| core.letter == Letter::Answered);
                if answered || hole == Hole::NoDrain {
                    all.push(self.with(|next| {
                        next.cores.iter_mut().for_each(|core| core.letter = Letter::None);
                        next.fenced |= hole == Hole::LateFence;
                        next.control = Control::Drained(number);
                    }));
                }
            }
            Control::Drained(number) => {
                // The second look found a difference, or nothing.
                all.push(self.with(|next| {
                    next.guarded = false;
                    next.control = Control::LetGo;
                }));
                if hole == Hole::UnlockedClear {
                    all.push(self.with(|next| next.control = Control::Clearing(number)));
                } else if !self.locked {
                    all.push(self.with(|next| {
                        next.locked = true;
                        next.control = Control::Clearing(number);
                    }));
                }
            }
            Control::Clearing(number) => all.push(self.with(|next| {
                let stands = next.tripped == Some(number) && next.standing == Some(number);
                if stands {
                    (next.standing, next.tripped) = (None, None);
                    next.control = Control::Cleared;
                } else {
                    next.locked &= hole == Hole::UnlockedClear;
                    next.control = Control::Idle;
                }
            })),
            Control::Cleared => all.push(self.with(|next| {
                next.fenced = false;
                next.locked &= hole == Hole::UnlockedClear;
                next.control = Control::Idle;
            })),
            Control::LetGo => {}
        }
    }

    fn core(&self, hole: Hole, index: usize, all: &mut Vec<Self>) {
        let core = self.cores[index];
        let with = |change: &dyn Fn(&mut Core)| self.with(|next| change(&mut next.cores[index]));
        // Within a turn of the core: nothing of its own comes between the last look and the submission.
        if core.passed {
            all.push(with(&|core| {
                core.passed = false;
                core.out += 1;
            }));
            return;
        }
        if core.left > 0 && !self.fenced {
            all.push(with(&|core| {
                core.left -= 1;
                core.waiting += 1;
            }));
        }
        if core.waiting > 0 {
            let refused = self.fenced && hole != Hole::OneLook;
            all.push(with(&|core| {
                core.waiting -= 1;
                core.passed = !refused;
            }));
        }
        if core.out > 0 {
            all.push(with(&|core| core.out -= 1));
        }
        if core.letter == Letter::Sent && (core.out == 0 || hole == Hole::EarlyAnswer) {
            all.push(with(&|core| core.letter = Letter::Answered));
        }
    }
}

#[test]
fn nothing_is_on_the_device_after_the_guard_let_go_and_no_recall_is_lost() {
    match explore(State::first(Hole::None)) {
        Ok(states) => {
            println!("{states} states");
            assert!(states > 10_000, "the search has not met everybody: {states} states");
        }
        Err((why, way)) => panic!("{why}: {way:#?}"),
    }
}

#[test]
fn every_hole_is_found() {
    for hole in [Hole::NoDrain, Hole::EarlyAnswer, Hole::OneLook, Hole::LateFence, Hole::UnlockedClear] {
        let (why, way) = explore(State::first(hole)).expect_err("the hole is there");
        println!("{hole:?}: {why}, after {} steps", way.len() - 1);
        assert!(way.len() > 3);
    }
}
