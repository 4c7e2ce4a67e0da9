//! Goal: no path submits to a device after the guard let go, whatever the order in which threads take their steps, and no
//! recall is forgotten, whatever becomes of others.
//!
//! The protocol of recall, fence, drain and release is written down here step by step, each step what one thread does
//! between two points where others may come in, and every interleaving is explored. That the search would find a hole is
//! shown by protocols with one: each must be caught.
//!
//! ```text
//!   watch, guard (threads that recall)   raise the signal -> lock the tripwire -> fence -> unlock -> tell control
//!   control, an event at a time          a recall: fence -> letter to each core, unless that is under way
//!                                        the last answer for a file: let go, or have it looked at again
//!                                        a look: let go, or lock the tripwire and clear
//!   core                                 see the fence, count the command, submit; answer a letter when nothing is out
//! ```
//!
//! The steps are those of `control::tripwire`, `control::server::recall`, `control::drains`, `reactor::core` (answer_drains)
//! and `reactor::engine` (start, advance). One file is tried with more recalls and commands; two with fewer, and with a device
//! that never gives a command of the first one back. More of the same add no kind of meeting.

#[path = "common/explore.rs"]
mod explore;

use std::collections::VecDeque;

use explore::{Model, explore};

const CORES: usize = 2;
const FILES: usize = 2;
/// The threads that recall.
const WATCH: usize = 0;
const GUARD: usize = 1;

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
    /// An answer counts for any file that is being drained.
    AnyAnswer,
    /// Control hears of nothing while a file is being drained.
    OneAfterAnother,
    /// A recall that is told of late takes the place of a later one.
    OldReplaces,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Core {
    /// Commands of each file that may still begin.
    left: [u8; FILES],
    /// Commands that passed the first look and wait for their data.
    waiting: [u8; FILES],
    /// The file of a command that passed the last look and is not submitted yet.
    passed: Option<usize>,
    /// Commands on the device.
    out: [u8; FILES],
    /// Letters in the mailbox, or read and not answered.
    letters: [bool; FILES],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Recall {
    number: u8,
    /// A second look cannot clear it.
    is_grave: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Recaller {
    #[default]
    Idle,
    /// The signal is raised.
    Raised(Recall),
    /// It has the tripwire.
    Armed(Recall),
    /// The fence is down.
    Fenced(Recall),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Ending {
    #[default]
    None,
    Draining(Recall),
    Looking(Recall),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct File {
    fenced: bool,
    /// The recall that stands.
    standing: Option<Recall>,
    /// The number that the tripwire keeps.
    tripped: Option<u8>,
    locked: bool,
    raised: u8,
    /// What each thread may still recall for.
    may_raise: [u8; 2],
    recallers: [Recaller; 2],
    ending: Ending,
    /// How many cores owe an answer.
    owed: u8,
    guarded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Mail {
    Recalled(usize, Recall),
    Answer(usize),
    Looked(usize, u8),
}

/// Where the control thread is in dealing with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Control {
    Idle,
    Heard(usize, Recall),
    Fenced(usize, Recall),
    /// It has the tripwire, to clear the recall.
    Clearing(usize, u8),
    /// The recall is cleared; the fence is still down.
    Cleared(usize),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    hole: Hole,
    /// The device never gives back commands of the first file.
    stuck: bool,
    files: [File; FILES],
    control: Control,
    /// Messages on their way to the control thread.
    mail: VecDeque<Mail>,
    cores: [Core; CORES],
}

impl Model for State {
    fn broken(&self) -> Option<&'static str> {
        for (index, file) in self.files.iter().enumerate() {
            if !file.guarded && self.cores.iter().any(|core| core.out[index] > 0) {
                return Some("a command is on the device after the guard let go");
            }
            let recalling =
                file.recallers.iter().any(|it| matches!(it, Recaller::Raised(_) | Recaller::Armed(_)));
            if !recalling && file.guarded && file.standing.is_some() && !file.fenced {
                return Some("a recall stands and hosts are let in");
            }
            let is_stuck = index == 0 && self.stuck;
            if file.guarded && file.standing.is_some() && !is_stuck && self.next().is_empty() {
                return Some("a recall is forgotten");
            }
        }
        None
    }

    fn next(&self) -> Vec<Self> {
        let mut all = Vec::new();
        for file in 0..FILES {
            for thread in [WATCH, GUARD] {
                self.recall(file, thread, &mut all);
            }
        }
        self.control(&mut all);
        for core in 0..CORES {
            self.core_submits(core, &mut all);
        }
        all
    }
}

impl State {
    /// `may_raise` and `commands` of each file.
    fn first(hole: Hole, stuck: bool, may_raise: [[u8; 2]; FILES], commands: [u8; FILES]) -> Self {
        let file = |may_raise| File {
            fenced: false,
            standing: None,
            tripped: None,
            locked: false,
            raised: 0,
            may_raise,
            recallers: [Recaller::Idle; 2],
            ending: Ending::None,
            owed: 0,
            guarded: true,
        };
        let core = Core { left: commands, ..Core::default() };
        Self {
            hole,
            stuck,
            files: may_raise.map(file),
            control: Control::Idle,
            mail: VecDeque::new(),
            cores: [core; CORES],
        }
    }

    /// Three recalls of one file, three commands of each core.
    fn one_file(hole: Hole) -> Self {
        Self::first(hole, false, [[2, 1], [0, 0]], [3, 0])
    }

    /// Two files; those of the first may be stuck.
    fn two_files(hole: Hole, stuck: bool) -> Self {
        Self::first(hole, stuck, [[0, 1], [1, 1]], [1, 1])
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn recall(&self, index: usize, thread: usize, all: &mut Vec<Self>) {
        let file = self.files[index];
        let with = |change: &dyn Fn(&mut File)| self.with(|next| change(&mut next.files[index]));
        match file.recallers[thread] {
            Recaller::Idle if file.may_raise[thread] > 0 && file.guarded => {
                let is_grave = thread == GUARD;
                // Only what is graver is raised on top of what stands.
                if file.standing.is_some_and(|standing| standing.is_grave || !is_grave) {
                    return;
                }
                let recall = Recall { number: file.raised + 1, is_grave };
                all.push(with(&|file| {
                    file.raised += 1;
                    file.may_raise[thread] -= 1;
                    file.standing = Some(recall);
                    file.recallers[thread] = Recaller::Raised(recall);
                }));
            }
            Recaller::Raised(recall) if !file.locked => all.push(with(&|file| {
                file.locked = true;
                file.tripped = file.tripped.max(Some(recall.number));
                file.recallers[thread] = Recaller::Armed(recall);
            })),
            Recaller::Armed(recall) => all.push(with(&|file| {
                file.fenced |= self.hole != Hole::LateFence;
                file.recallers[thread] = Recaller::Fenced(recall);
            })),
            Recaller::Fenced(recall) => all.push(self.with(|next| {
                next.files[index].locked = false;
                next.files[index].recallers[thread] = Recaller::Idle;
                next.mail.push_back(Mail::Recalled(index, recall));
            })),
            _ => {}
        }
    }

    fn control(&self, all: &mut Vec<Self>) {
        match self.control {
            Control::Idle => self.next_event(all),
            Control::Heard(index, recall) => all.push(self.with(|next| {
                next.files[index].fenced |= self.hole != Hole::LateFence;
                next.control = Control::Fenced(index, recall);
            })),
            Control::Fenced(index, recall) => all.push(self.with(|next| {
                next.cores.iter_mut().for_each(|core| core.letters[index] = true);
                next.files[index].owed = 2;
                next.files[index].ending = Ending::Draining(recall);
                next.control = Control::Idle;
                if self.hole == Hole::NoDrain {
                    next.drained(index);
                }
            })),
            Control::Clearing(index, number) => all.push(self.with(|next| {
                let file = &mut next.files[index];
                let stands = file.tripped == Some(number)
                    && file.standing.is_some_and(|standing| standing.number == number);
                if stands {
                    (file.standing, file.tripped, file.ending) = (None, None, Ending::None);
                    next.control = Control::Cleared(index);
                } else {
                    file.locked &= self.hole == Hole::UnlockedClear;
                    next.control = Control::Idle;
                }
            })),
            Control::Cleared(index) => all.push(self.with(|next| {
                let file = &mut next.files[index];
                file.fenced = false;
                file.locked &= self.hole == Hole::UnlockedClear;
                next.control = Control::Idle;
            })),
        }
    }

    /// The control thread takes the next event.
    fn next_event(&self, all: &mut Vec<Self>) {
        let is_draining = |file: &File| matches!(file.ending, Ending::Draining(_));
        let position = match self.hole {
            // As a control thread that waits for answers: they reach it, and nothing else does.
            Hole::OneAfterAnother if self.files.iter().any(is_draining) => {
                self.mail.iter().position(|mail| matches!(mail, Mail::Answer(_)))
            }
            _ => (!self.mail.is_empty()).then_some(0),
        };
        let Some(mail) = position.and_then(|at| self.mail.get(at).copied()) else { return };
        let taken = |change: &dyn Fn(&mut Self)| {
            self.with(|next| {
                next.mail.remove(position.unwrap_or(0));
                change(next);
            })
        };
        match mail {
            Mail::Recalled(index, recall) => all.push(taken(&|next| next.hear(index, recall))),
            Mail::Answer(index) => all.push(taken(&|next| {
                let any = next.files.iter().position(is_draining);
                let index = if self.hole == Hole::AnyAnswer { any.unwrap_or(index) } else { index };
                let file = &mut next.files[index];
                file.owed = file.owed.saturating_sub(1);
                if file.owed == 0 && is_draining(file) {
                    next.drained(index);
                }
            })),
            Mail::Looked(index, number) => {
                let file = self.files[index];
                if !file.guarded || file.ending == Ending::None {
                    return all.push(taken(&|_| {}));
                }
                // The look found a difference, or nothing.
                all.push(taken(&|next| next.let_go(index)));
                if self.hole == Hole::UnlockedClear {
                    all.push(taken(&|next| next.control = Control::Clearing(index, number)));
                } else if !file.locked {
                    all.push(taken(&|next| {
                        next.files[index].locked = true;
                        next.control = Control::Clearing(index, number);
                    }));
                }
            }
        }
    }

    /// A recall reaches the control thread.
    fn hear(&mut self, index: usize, recall: Recall) {
        let file = &mut self.files[index];
        if !file.guarded {
            return;
        }
        let is_older = |than: Recall| recall.number < than.number && self.hole != Hole::OldReplaces;
        match file.ending {
            Ending::None => self.control = Control::Heard(index, recall),
            Ending::Draining(stands) | Ending::Looking(stands) if is_older(stands) => {}
            Ending::Draining(_) => file.ending = Ending::Draining(recall),
            Ending::Looking(_) => {
                file.ending = Ending::Draining(recall);
                self.drained(index);
            }
        }
    }

    /// No command of the file is out, as far as the control thread knows.
    fn drained(&mut self, index: usize) {
        let Ending::Draining(recall) = self.files[index].ending else { return };
        self.files[index].fenced |= self.hole == Hole::LateFence;
        if recall.is_grave {
            return self.let_go(index);
        }
        self.files[index].ending = Ending::Looking(recall);
        self.mail.push_back(Mail::Looked(index, recall.number));
    }

    fn let_go(&mut self, index: usize) {
        self.files[index].guarded = false;
        self.files[index].ending = Ending::None;
    }

    fn core_submits(&self, index: usize, all: &mut Vec<Self>) {
        let core = self.cores[index];
        let with = |change: &dyn Fn(&mut Core)| self.with(|next| change(&mut next.cores[index]));
        // Within a turn of the core: nothing of its own comes between the last look and the submission.
        if let Some(file) = core.passed {
            all.push(with(&|core| {
                core.passed = None;
                core.out[file] += 1;
            }));
            return;
        }
        for file in 0..FILES {
            let fenced = self.files[file].fenced;
            if core.left[file] > 0 && !fenced {
                all.push(with(&|core| {
                    core.left[file] -= 1;
                    core.waiting[file] += 1;
                }));
            }
            if core.waiting[file] > 0 {
                let refused = fenced && self.hole != Hole::OneLook;
                all.push(with(&|core| {
                    core.waiting[file] -= 1;
                    core.passed = (!refused).then_some(file);
                }));
            }
            if core.out[file] > 0 && !(self.stuck && file == 0) {
                all.push(with(&|core| core.out[file] -= 1));
            }
            if core.letters[file] && (core.out[file] == 0 || self.hole == Hole::EarlyAnswer) {
                all.push(self.with(|next| {
                    next.cores[index].letters[file] = false;
                    next.mail.push_back(Mail::Answer(file));
                }));
            }
        }
    }
}

fn assert_sound(first: State) -> usize {
    match explore(first) {
        Ok(states) => states,
        Err((why, way)) => panic!("{why}: {way:#?}"),
    }
}

#[test]
fn nothing_is_on_the_device_after_the_guard_let_go_and_no_recall_is_lost() {
    let states = assert_sound(State::one_file(Hole::None));
    println!("{states} states");
    assert!(states > 10_000, "the search has not met everybody: {states} states");
}

#[test]
fn nor_with_two_files_whether_the_device_gives_the_commands_of_one_back_or_not() {
    for stuck in [false, true] {
        let states = assert_sound(State::two_files(Hole::None, stuck));
        println!("stuck: {stuck}, {states} states");
        assert!(states > 10_000, "the search has not met everybody: {states} states");
    }
}

#[test]
fn every_hole_is_found() {
    let one_file = [
        Hole::NoDrain,
        Hole::EarlyAnswer,
        Hole::OneLook,
        Hole::LateFence,
        Hole::UnlockedClear,
        Hole::OldReplaces,
    ];
    let one_file = one_file.map(|hole| (hole, State::one_file(hole)));
    let two_files = [
        (Hole::AnyAnswer, State::two_files(Hole::AnyAnswer, false)),
        (Hole::OneAfterAnother, State::two_files(Hole::OneAfterAnother, true)),
    ];
    for (hole, first) in one_file.into_iter().chain(two_files) {
        let Err((why, way)) = explore(first) else { panic!("{hole:?} is not found") };
        println!("{hole:?}: {why}, after {} steps", way.len() - 1);
        assert!(way.len() > 3);
    }
}
