//! The last commands of a core, one by one: what each was, whose, and when it passed its stages.
//!
//! ```text
//!   commands  [ opcode, nsid, cid, status, CDW10 to 12, group ]  one a command, written when its answer is put into a batch
//!                                                    |
//!   groups    [ stamps, who, sent ] <----------------'           one for all that went together, as histograms count them
//! ```
//!
//! Both are rings of fixed size, which belong to their core alone: no lock, no atomic. Whoever wants to see them asks the core by
//! a letter, which it answers between two turns of its loop, when nothing is half written: a [`TraceCopy`] is what the core had at
//! one moment. An answer that was not sent then has no time of sending.
//!
//! A group is never overwritten before its commands: there are as many, and each has a command at least.

use std::rc::Rc;

use hugepage_alloc::prefetch;
use nvme_spec::{Status, SubmissionQueueEntry};
use zerocopy::little_endian::{U16, U32};

use super::{Stamp, Stamps};

/// Commands that a core remembers.
pub const TRACED_MAX: usize = 4096;

/// Whose commands they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Who {
    /// The host's NQN.
    pub host: String,
    /// The subsystem's NQN.
    pub subsystem: String,
    /// The controller that the host has there.
    pub cntlid: u16,
    /// The queue of this controller: a connection.
    pub qid: u16,
}

/// The number of a group; it comes again after 2^32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupNumber(u32);

/// A command, as its submission queue entry and its completion have it. What is copied lies as it does there: that takes few
/// instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct Traced {
    /// OPC.
    pub opcode: u8,
    /// FUSE, PSDT.
    pub flags: u8,
    /// CID.
    pub cid: U16,
    /// NSID; FCTYPE in its first byte for Fabrics commands.
    pub nsid: U32,
    /// CDW10, and in CDW11 the upper half: of most I/O commands the first block.
    pub cdw10: U32,
    /// CDW11.
    pub cdw11: U32,
    /// CDW12: of most I/O commands with the number of blocks less one.
    pub cdw12: U32,
    group: GroupNumber,
    /// The status that it ended with.
    pub status: Status,
}

impl Traced {
    /// CDW11:CDW10 as one number: SLBA of I/O commands.
    #[must_use]
    pub const fn cdw10_11(&self) -> u64 {
        (self.cdw11.get() as u64) << 32 | self.cdw10.get() as u64
    }
}

#[derive(Debug, Default)]
struct Group {
    stamps: Stamps,
    sent: Stamp,
    number: GroupNumber,
    who: Option<Rc<Who>>,
}

/// The rings of a core.
#[derive(Debug)]
pub struct Trace {
    commands: Box<[Traced; TRACED_MAX]>,
    groups: Box<[Group; TRACED_MAX]>,
    /// Commands and groups so far.
    next_command: usize,
    next_group: u32,
}

/// Without a way over the stack.
fn ring<T: Default>() -> Box<[T; TRACED_MAX]> {
    let all: Vec<T> = std::iter::repeat_with(T::default).take(TRACED_MAX).collect();
    let Ok(ring) = all.into_boxed_slice().try_into() else { unreachable!("as long as it was made") };
    ring
}

impl Default for Trace {
    fn default() -> Self {
        Self { commands: ring(), groups: ring(), next_command: 0, next_group: 0 }
    }
}

impl Trace {
    /// Commands follow that share these stamps; of those that came to no device all but the first are none.
    #[inline]
    pub fn group(&mut self, stamps: &Stamps, who: Option<&Rc<Who>>) -> GroupNumber {
        let number = GroupNumber(self.next_group);
        self.next_group = self.next_group.wrapping_add(1);
        self.groups[number.place()] =
            Group { stamps: *stamps, sent: Stamp::NONE, number, who: who.map(Rc::clone) };
        number
    }

    /// A command of a group ended.
    #[inline]
    pub fn command(&mut self, group: GroupNumber, sqe: &SubmissionQueueEntry, status: Status) {
        let place = self.next_command % TRACED_MAX;
        self.next_command = self.next_command.wrapping_add(1);
        let SubmissionQueueEntry { opcode, flags, cid, nsid, cdw10, cdw11, cdw12, .. } = *sqe;
        self.commands[place] = Traced { opcode, flags, cid, nsid, cdw10, cdw11, cdw12, group, status };
    }

    /// The answers of a group were sent.
    #[inline]
    pub fn sent(&mut self, group: GroupNumber, at: Stamp) {
        let it = &mut self.groups[group.place()];
        if it.number == group {
            it.sent = at;
        }
    }

    /// Has the next places fetched. They were written a whole ring ago, further away than the nearest caches reach: without this, a command
    /// that comes alone waits for them.
    #[inline]
    pub fn ahead(&self) {
        let group = GroupNumber(self.next_group).place();
        prefetch(self.groups.get(group..=group).unwrap_or_default());
        let command = self.next_command % TRACED_MAX;
        prefetch(self.commands.get(command..=command).unwrap_or_default());
    }

    /// What is in it, the oldest command first. Allocates; some tenths of a millisecond.
    #[cold]
    #[must_use]
    pub fn copy(&self, cpu: usize) -> TraceCopy {
        let mut copy =
            TraceCopy { cpu, at: Stamp::now(), ended: self.next_command as u64, ..TraceCopy::default() };
        let held = self.next_command.min(TRACED_MAX);
        let numbers = self.next_command - held..self.next_command;
        copy.commands = numbers.map(|number| self.commands[number % TRACED_MAX]).collect();
        let mut places = std::collections::HashMap::new();
        copy.groups.reserve_exact(TRACED_MAX);
        for Group { stamps, sent, number, who } in self.groups.iter() {
            let who = who.as_ref().map(|who| {
                *places.entry(Rc::as_ptr(who)).or_insert_with(|| {
                    copy.who.push(Who::clone(who));
                    copy.who.len() - 1
                })
            });
            copy.groups.push(GroupCopy { stamps: *stamps, sent: *sent, number: *number, who });
        }
        copy
    }
}

impl GroupNumber {
    const fn place(self) -> usize {
        self.0 as usize % TRACED_MAX
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GroupCopy {
    stamps: Stamps,
    sent: Stamp,
    number: GroupNumber,
    who: Option<usize>,
}

/// What a core remembered at one moment, for another thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceCopy {
    /// The CPU of the core.
    pub cpu: usize,
    /// When it was made.
    pub at: Stamp,
    /// Commands that the core has answered so far.
    pub ended: u64,
    /// Whose commands there are.
    pub who: Vec<Who>,
    commands: Vec<Traced>,
    groups: Vec<GroupCopy>,
}

/// A command of a copy, with all that is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TracedCommand {
    /// What it was.
    pub command: Traced,
    /// Where in [`TraceCopy::who`] it is told whose it was; none before Connect.
    pub who: Option<usize>,
    /// When it passed its stages.
    pub stamps: Stamps,
    /// When its answer was sent; none when it was not yet, or never was.
    pub sent: Stamp,
}

impl TraceCopy {
    /// Its commands, in the order in which their answers were made.
    pub fn commands(&self) -> impl Iterator<Item = TracedCommand> {
        self.commands.iter().filter_map(|command| {
            let group = self.groups.get(command.group.place()).filter(|it| it.number == command.group)?;
            let GroupCopy { stamps, sent, who, .. } = *group;
            Some(TracedCommand { command: *command, who, stamps, sent })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sqe(number: u64) -> SubmissionQueueEntry {
        let low = u16::try_from(number).expect("few");
        SubmissionQueueEntry {
            opcode: 2,
            cid: low.into(),
            nsid: 7.into(),
            cdw10: u32::from(low).into(),
            cdw12: 15.into(),
            ..Default::default()
        }
    }

    fn who(qid: u16) -> Rc<Who> {
        Rc::new(Who { host: "host".to_owned(), subsystem: "subsystem".to_owned(), cntlid: 1, qid })
    }

    fn at(ns: u64) -> Stamps {
        Stamps { arrived: Stamp::from_ns(ns), ..Stamps::NONE }
    }

    #[test]
    fn commands_are_told_in_their_order_with_the_stamps_of_their_group() {
        let mut trace = Trace::default();
        assert_eq!(trace.copy(0).commands().count(), 0);
        let (one, two) = (who(1), who(2));
        let first = trace.group(&at(10), Some(&one));
        let second = trace.group(&at(20), Some(&two));
        trace.command(first, &sqe(1), Status::SUCCESS);
        trace.command(second, &sqe(2), Status::INVALID_FIELD);
        trace.command(first, &sqe(3), Status::SUCCESS);
        trace.sent(first, Stamp::from_ns(99));
        let copy = trace.copy(5);
        let all: Vec<_> = copy.commands().collect();
        assert_eq!((copy.cpu, copy.ended, copy.who.len()), (5, 3, 2));
        let told = |it: &TracedCommand| {
            let qid = it.who.map(|who| copy.who[who].qid);
            (it.command.cdw10_11(), it.stamps.arrived.ns(), it.sent.ns(), qid)
        };
        assert_eq!(
            all.iter().map(told).collect::<Vec<_>>(),
            [(1, 10, 99, Some(1)), (2, 20, 0, Some(2)), (3, 10, 99, Some(1))]
        );
        assert_eq!(
            (all[1].command.status, all[1].command.nsid.get(), all[1].command.cdw12.get()),
            (Status::INVALID_FIELD, 7, 15)
        );
    }

    #[test]
    fn the_last_ones_stay_and_what_is_sent_late_marks_nobody_else() {
        let mut trace = Trace::default();
        let host = who(1);
        let total = 3 * TRACED_MAX as u64 + 5;
        let mut groups = Vec::new();
        for number in 0..total {
            // Two commands a group.
            if number % 2 == 0 {
                groups.push(trace.group(&at(number), Some(&host)));
            }
            trace.command(*groups.last().expect("one"), &sqe(number), Status::SUCCESS);
        }
        trace.sent(groups[0], Stamp::from_ns(1));
        let copy = trace.copy(0);
        let all: Vec<_> = copy.commands().collect();
        assert_eq!((all.len(), copy.ended, copy.who.len()), (TRACED_MAX, total, 1));
        assert_eq!(all[0].command.cdw10_11(), total - TRACED_MAX as u64);
        assert!(all.iter().all(|it| it.sent.is_none()));
        assert!(all.iter().all(|it| it.stamps.arrived.ns() == it.command.cdw10_11() / 2 * 2));
    }

    #[test]
    fn numbers_of_groups_may_begin_anew() {
        let mut trace = Trace { next_group: u32::MAX, ..Trace::default() };
        for number in 0..4 {
            let group = trace.group(&at(number), None);
            trace.command(group, &sqe(number), Status::SUCCESS);
            trace.sent(group, Stamp::from_ns(number + 100));
        }
        let sent: Vec<_> = trace.copy(0).commands().map(|it| it.sent.ns()).collect();
        assert_eq!(sent, [100, 101, 102, 103]);
    }
}
