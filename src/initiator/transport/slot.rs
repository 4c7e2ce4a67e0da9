//! The state of one command.

use super::DataFault;
use crate::initiator::command::{Completion, Transfer};
use std::time::{Duration, Instant};

/// When a command in flight becomes an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// After [`Timeouts::command`](super::Timeouts::command).
    Default,
    /// Never: for Asynchronous Event Request.
    Never,
}

/// Where a slot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    /// In the free list.
    Free,
    /// The caller's: before submission and after the end.
    Reserved,
    /// At the controller.
    Busy,
    /// The controller is done with it, but its data is still being sent.
    Ending(Completion),
}

/// One command, and its data.
pub(super) struct Slot {
    pub(super) state: SlotState,
    /// Goes into the upper four bits of the CID.
    pub(super) generation: u16,
    pub(super) opcode: u8,
    pub(super) transfer: Transfer,
    /// Bytes sent or asked for by R2T (to the controller), or received (to the host).
    pub(super) moved: u32,
    /// Pieces of the buffer that wait to be sent.
    pub(super) tx_segments: u32,
    pub(super) fault: Option<DataFault>,
    pub(super) submitted: Instant,
    pub(super) deadline: Option<Instant>,
    pub(super) buffer: Vec<u8>,
}

impl Slot {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            state: SlotState::Free,
            generation: 0,
            opcode: 0,
            transfer: Transfer::None,
            moved: 0,
            tx_segments: 0,
            fault: None,
            submitted: now,
            deadline: None,
            buffer: Vec::new(),
        }
    }

    pub(super) const fn is_busy(&self) -> bool {
        matches!(self.state, SlotState::Busy | SlotState::Ending(_))
    }

    /// Makes the slot busy with a command.
    pub(super) fn begin(&mut self, opcode: u8, transfer: Transfer, deadline: Deadline, timeout: Duration) {
        match transfer {
            Transfer::None => {}
            Transfer::ToController(len) => {
                assert!(self.buffer.len() >= len as usize, "a command sends the data its slot holds");
            }
            Transfer::ToHost(len) => self.buffer.resize(len as usize, 0),
        }
        self.state = SlotState::Busy;
        self.opcode = opcode;
        self.transfer = transfer;
        self.moved = 0;
        self.fault = None;
        self.submitted = Instant::now();
        self.deadline = match deadline {
            Deadline::Default => Some(self.submitted + timeout),
            Deadline::Never => None,
        };
    }

    /// The fault of a command that ends with `completion`.
    pub(super) fn fault_of(&self, completion: Completion) -> Option<DataFault> {
        match self.transfer {
            Transfer::ToHost(len) if completion.status.is_success() && self.moved < len => {
                Some(self.fault.unwrap_or(DataFault::Short { len: self.moved }))
            }
            _ => self.fault,
        }
    }
}
