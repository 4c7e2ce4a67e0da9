//! Faults as data: which command, what goes wrong, how often.

use std::fmt;

use nvme_spec::{Qid, Status, SubmissionQueueEntry};

/// Which commands a fault hits. What is `None` matches everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandMatch {
    /// The submission queue.
    pub qid: Option<Qid>,
    /// Any queue but the admin queue.
    pub io_only: bool,
    /// The opcode.
    pub opcode: Option<u8>,
}

impl CommandMatch {
    /// An admin command with this opcode.
    #[must_use]
    pub const fn admin(opcode: u8) -> Self {
        Self { qid: Some(Qid::ADMIN), io_only: false, opcode: Some(opcode) }
    }

    /// An I/O command with this opcode, on any queue.
    #[must_use]
    pub const fn io(opcode: u8) -> Self {
        Self { qid: None, io_only: true, opcode: Some(opcode) }
    }

    /// Any I/O command.
    #[must_use]
    pub const fn any_io() -> Self {
        Self { qid: None, io_only: true, opcode: None }
    }

    fn matches(self, qid: u16, sqe: &SubmissionQueueEntry) -> bool {
        self.qid.is_none_or(|wanted| wanted.0 == qid)
            && (!self.io_only || qid != 0)
            && self.opcode.is_none_or(|wanted| wanted == sqe.opcode)
    }
}

/// What goes wrong with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// It is executed and completed this many steps later; until then its data may still be moved.
    Delay {
        /// Steps.
        steps: u32,
    },
    /// It is never completed; only Abort or a reset ends it. Until then the model writes garbage into the buffer
    /// of a Read at every step, as a controller might that has merely lost the completion.
    Drop,
    /// It fails with this status and is not executed.
    Status(Status),
    /// It is executed, and completed twice.
    DuplicateCid,
    /// It is executed; the completion carries the identifier of no command. The command itself stays open as with
    /// [`FaultAction::Drop`].
    UnknownCid,
    /// The completion's status and phase are visible a step before its identifier.
    TornPhaseFirst,
    /// The completion's identifier, status and phase are visible a step before its result.
    TornResultLast,
    /// It is completed after the next command of its queue, or after 16 steps.
    Reorder,
    /// The completion names a submission queue head that the queue does not have.
    BadSqHead,
    /// The controller sets CSTS.CFS and stops. The command stays open.
    Fatal,
    /// The device is removed: all registers read as ones, nothing moves any more.
    Vanish,
    /// It is executed, and the data that it brings are nonsense. What Identify and log pages say is then anything.
    Garbage,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which commands.
    pub matches: CommandMatch,
    /// What happens to them.
    pub action: FaultAction,
    /// Matching commands that pass unharmed first.
    pub skip: u32,
    /// How often; `u32::MAX` for always.
    pub times: u32,
}

impl Fault {
    /// The next matching command, once.
    #[must_use]
    pub const fn once(matches: CommandMatch, action: FaultAction) -> Self {
        Self { matches, action, skip: 0, times: 1 }
    }

    /// Every matching command.
    #[must_use]
    pub const fn always(matches: CommandMatch, action: FaultAction) -> Self {
        Self { matches, action, skip: 0, times: u32::MAX }
    }
}

/// Faults that strike at random, the same ones for the same seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RandomFaults {
    /// Where the random numbers start.
    pub seed: u64,
    /// How many of a thousand commands are hit.
    pub per_mille: u16,
    /// Which commands may be hit.
    pub matches: CommandMatch,
    /// What may happen, each as likely as the others.
    pub actions: Vec<FaultAction>,
}

/// What is wrong with the registers, as long as it is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegisterFaults {
    /// CSTS.RDY never becomes 1.
    pub never_ready: bool,
    /// CSTS.RDY never becomes 0, and the controller goes on with what it has.
    pub never_disabled: bool,
    /// CSTS.CFS is set when the controller is enabled.
    pub fatal_on_enable: bool,
    /// CSTS.SHST never says complete.
    pub never_shut_down: bool,
    /// A function reset fails.
    pub function_reset_fails: bool,
    /// Cutting the device off from memory fails.
    pub revoke_fails: bool,
    /// No interrupt reaches anybody.
    pub interrupts_lost: bool,
    /// With shadow doorbells: EventIdx asks for a doorbell too late.
    pub event_idx_wrong: bool,
    /// All registers read as zeros and writes are lost, as with a function that was removed behind some bridges.
    pub reads_zeros: bool,
}

/// Decides for each command whether something goes wrong with it, asked before all other faults.
pub type FaultHook = Box<dyn FnMut(Qid, &SubmissionQueueEntry) -> Option<FaultAction> + Send>;

/// All faults of a controller.
#[derive(Default)]
pub(crate) struct Faults {
    pub(crate) registers: RegisterFaults,
    hook: Option<FaultHook>,
    list: Vec<Fault>,
    random: Option<RandomFaults>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("registers", &self.registers)
            .field("hook", &self.hook.is_some())
            .field("list", &self.list)
            .field("random", &self.random)
            .finish()
    }
}

impl Faults {
    pub(crate) fn add(&mut self, fault: Fault) {
        self.list.push(fault);
    }

    pub(crate) fn set_hook(&mut self, hook: Option<FaultHook>) {
        self.hook = hook;
    }

    pub(crate) fn set_random(&mut self, random: Option<RandomFaults>) {
        self.random = random;
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// What happens to this command.
    pub(crate) fn strike(&mut self, qid: u16, sqe: &SubmissionQueueEntry) -> Option<FaultAction> {
        if let Some(action) = self.hook.as_mut().and_then(|hook| hook(Qid(qid), sqe)) {
            return Some(action);
        }
        for fault in &mut self.list {
            if fault.times == 0 || !fault.matches.matches(qid, sqe) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            if fault.times != u32::MAX {
                fault.times -= 1;
            }
            return Some(fault.action);
        }
        let random = self.random.as_mut()?;
        if !random.matches.matches(qid, sqe) {
            return None;
        }
        let number = split_mix(&mut random.seed);
        if number % 1000 >= u64::from(random.per_mille) {
            return None;
        }
        let choice = (number >> 32) as usize % random.actions.len().max(1);
        random.actions.get(choice).copied()
    }
}

/// The next number of the sequence (splitmix64).
pub(crate) const fn split_mix(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
