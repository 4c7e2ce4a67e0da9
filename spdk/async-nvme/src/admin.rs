//! The admin queue: a page of data for each command, answers fetched by token.

use std::collections::VecDeque;
use std::time::Duration;

use nvme_spec::{AdminOpcode, Status, SubmissionQueueEntry};

use crate::access::{Access, DmaMapping};
use crate::clock::Moment;
use crate::error::Error;
use crate::prp;
use crate::ring::{Layout, Rings};
use crate::shadow::Shadow;

/// Commands that may be open at once, how many of them are kept for the driver itself, and the bytes of data of each.
const SLOTS: u16 = 31;
const SLOTS_KEPT: usize = 8;
pub(crate) const DATA_LEN: usize = 4096;

/// An admin command: fields by their names in the specification. The identifier and data pointer are filled in.
#[derive(Clone, Debug, Default)]
pub struct AdminCommand {
    /// What to call it in messages.
    pub what: &'static str,
    /// OPC.
    pub opcode: u8,
    /// NSID.
    pub nsid: u32,
    /// CDW10 to CDW15.
    pub cdw10_15: [u32; 6],
    /// Data for the controller, at most 4096 bytes.
    pub data_out: Vec<u8>,
    /// Bytes of data wanted from the controller, at most 4096.
    pub data_in_len: usize,
}

impl AdminCommand {
    /// Bytes of data, either way.
    pub(crate) fn data_len(&self) -> usize {
        self.data_out.len().max(self.data_in_len)
    }
}

/// What an admin command came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdminReply {
    /// DW0.
    pub dw0: u32,
    /// The data, as much as was wanted.
    pub data: Vec<u8>,
}

/// Names an open admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminToken {
    slot: u16,
    generation: u8,
}

/// What can be wrong with the admin queue as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AdminTrouble {
    Violation(&'static str),
    Timeout(&'static str),
}

#[derive(Debug, Default)]
enum SlotState {
    #[default]
    Free,
    Open {
        deadline: Option<Moment>,
        data_in_len: usize,
        /// Nobody asks for the answer.
        forgotten: bool,
    },
    Done(Result<AdminReply, Error>),
}

#[derive(Debug, Default)]
struct Slot {
    generation: u8,
    what: &'static str,
    state: SlotState,
}

#[derive(Debug)]
pub(crate) struct AdminQueue {
    name: String,
    mapping: DmaMapping,
    rings: Rings,
    slots: Vec<Slot>,
    /// DW0 of asynchronous events not yet looked at.
    pub(crate) events: VecDeque<u32>,
}

impl AdminQueue {
    pub(crate) fn layout(page: usize, mqes_z: u16) -> Layout {
        Layout::new((SLOTS + 1).min(mqes_z.saturating_add(1)), page, DATA_LEN)
    }

    pub(crate) fn new(name: String, mapping: DmaMapping, layout: Layout, dstrd: u8) -> Option<Self> {
        let rings = Rings::new(&mapping, layout, 0, dstrd)?;
        let mut slots = Vec::new();
        slots.resize_with(usize::from(layout.entries - 1), Slot::default);
        Some(Self { name, mapping, rings, slots, events: VecDeque::with_capacity(8) })
    }

    pub(crate) fn addresses(&self) -> Option<(u64, u64)> {
        Rings::addresses(&self.mapping, &self.rings.layout).map(|(sq, cq)| (sq.0, cq.0))
    }

    pub(crate) const fn entries(&self) -> u16 {
        self.rings.layout.entries
    }

    /// Gives a command to the ring. One without `limit` may stay open for ever.
    pub(crate) fn submit(
        &mut self,
        command: &AdminCommand,
        now: Moment,
        limit: Option<Duration>,
        forgotten: bool,
    ) -> Result<AdminToken, Error> {
        self.submit_at(command, (0, 0), now, limit, forgotten)
    }

    /// Like [`AdminQueue::submit`]; without data, the pointers are PRP1 and PRP2.
    pub(crate) fn submit_at(
        &mut self,
        command: &AdminCommand,
        pointers: (u64, u64),
        now: Moment,
        limit: Option<Duration>,
        forgotten: bool,
    ) -> Result<AdminToken, Error> {
        let bytes = command.data_len();
        if bytes > DATA_LEN {
            return Err(Error::TooLarge { bytes });
        }
        let exhausted = || Error::Exhausted { name: self.name.clone(), what: "admin command" };
        let free = self.slots.iter().position(|slot| matches!(slot.state, SlotState::Free));
        let index = free.ok_or_else(exhausted)?;
        let number = u16::try_from(index).map_err(|_| exhausted())?;
        let list_at = self.rings.layout.list_at(number);
        let page = || (self.mapping.iova(list_at).map_or(0, |iova| iova.0), 0);
        let (prp1, prp2) = if bytes > 0 { page() } else { pointers };
        if bytes > 0 {
            let ready = self.rings.region().zero(list_at, DATA_LEN)
                && self.rings.region().write(list_at, &command.data_out);
            debug_assert!(ready, "the data page lies in the region");
        }
        let Some(slot) = self.slots.get_mut(index) else { return Err(exhausted()) };
        // Generations go from 1 to 255, so that an entry of zeros is nobody's.
        slot.generation = slot.generation.checked_add(1).unwrap_or(1);
        slot.what = command.what;
        slot.state = SlotState::Open {
            deadline: limit.map(|limit| now.after(limit)),
            data_in_len: command.data_in_len,
            forgotten,
        };
        let [cdw10, cdw11, cdw12, cdw13, cdw14, cdw15] = command.cdw10_15.map(Into::into);
        let cid = u16::from(slot.generation) << 8 | number;
        let token = AdminToken { slot: number, generation: slot.generation };
        self.rings.push_entry(SubmissionQueueEntry {
            opcode: command.opcode,
            cid: cid.into(),
            nsid: command.nsid.into(),
            dptr: prp::pointers(prp1, prp2),
            cdw10,
            cdw11,
            cdw12,
            cdw13,
            cdw14,
            cdw15,
            ..Default::default()
        });
        Ok(token)
    }

    pub(crate) fn submit_event_request(&mut self, now: Moment) -> Result<(), Error> {
        let command = AdminCommand {
            what: "Asynchronous Event Request",
            opcode: AdminOpcode::ASYNC_EVENT_REQUEST.0,
            ..Default::default()
        };
        self.submit(&command, now, None, true).map(|_| ())
    }

    /// Shadow doorbells from now on; until the controller is reset, or none.
    pub(crate) fn set_shadow(&mut self, shadow: Option<Shadow>) {
        self.rings.set_shadow(shadow);
    }

    /// Whether a poll would find something to do.
    pub(crate) fn is_due(&self) -> bool {
        self.rings.has_completion() || !self.rings.is_rung() || !self.events.is_empty()
    }

    /// When the first of the open commands is late.
    pub(crate) fn deadline(&self) -> Option<Moment> {
        let deadlines = self.slots.iter().filter_map(|slot| match slot.state {
            SlotState::Open { deadline, .. } => deadline,
            _ => None,
        });
        deadlines.min()
    }

    pub(crate) fn ring(&mut self, access: &dyn Access) {
        self.rings.ring_submissions(access);
    }

    /// Takes what the controller has completed, and looks for what is late.
    pub(crate) fn poll(&mut self, access: &dyn Access, now: Moment) -> Result<bool, AdminTrouble> {
        let mut any = false;
        // At most a ring full a turn, whatever the device does.
        for _ in 0..self.rings.layout.entries {
            let Some(cqe) = self.rings.pop() else { break };
            any = true;
            if !self.rings.is_plausible(&cqe) {
                return Err(AdminTrouble::Violation("a completion of another queue"));
            }
            self.complete(cqe.cid.get(), cqe.status(), cqe.dw0.get())?;
        }
        self.rings.ring_completions(access);
        for slot in &self.slots {
            if let SlotState::Open { deadline: Some(deadline), .. } = slot.state
                && now >= deadline
            {
                return Err(AdminTrouble::Timeout(slot.what));
            }
        }
        Ok(any)
    }

    fn complete(&mut self, cid: u16, status: Status, dw0: u32) -> Result<(), AdminTrouble> {
        let unknown = AdminTrouble::Violation("a completion of no open admin command");
        let [number, generation] = cid.to_le_bytes();
        let list_at = self.rings.layout.list_at(u16::from(number));
        let slot = self.slots.get_mut(usize::from(number)).ok_or(unknown)?;
        let SlotState::Open { deadline, data_in_len, forgotten } = slot.state else { return Err(unknown) };
        if slot.generation != generation {
            return Err(unknown);
        }
        if forgotten {
            slot.state = SlotState::Free;
            // Only event requests have no deadline.
            if deadline.is_none() && status.is_success() && self.events.len() < self.events.capacity() {
                self.events.push_back(dw0);
            }
            return Ok(());
        }
        let result = if status.is_success() {
            let mut data = vec![0; data_in_len];
            let read = self.rings.region().read(list_at, &mut data);
            debug_assert!(read, "the data page lies in the region");
            Ok(AdminReply { dw0, data })
        } else {
            Err(Error::Status { name: self.name.clone(), command: slot.what, status })
        };
        slot.state = SlotState::Done(result);
        Ok(())
    }

    /// The answer, once. `None` while there is none. A token of an answer taken before is answered by an error.
    pub(crate) fn take(&mut self, token: AdminToken) -> Option<Result<AdminReply, Error>> {
        let stale = || Error::Exhausted { name: self.name.clone(), what: "answer for this token" };
        let slot = self.slots.get_mut(usize::from(token.slot)).filter(|s| s.generation == token.generation);
        let Some(slot) = slot else { return Some(Err(stale())) };
        match std::mem::take(&mut slot.state) {
            SlotState::Done(result) => Some(result),
            SlotState::Free => Some(Err(stale())),
            open @ SlotState::Open { .. } => {
                slot.state = open;
                None
            }
        }
    }

    /// Nobody will ask for this answer any more.
    pub(crate) fn forget(&mut self, token: AdminToken) {
        let slot = self.slots.get_mut(usize::from(token.slot)).filter(|s| s.generation == token.generation);
        let Some(slot) = slot else { return };
        match &mut slot.state {
            SlotState::Open { forgotten, .. } => *forgotten = true,
            state => *state = SlotState::Free,
        }
    }

    /// Ends all open commands. Only when the controller can no longer write.
    pub(crate) fn fail_all(&mut self, error: &Error) {
        for slot in &mut self.slots {
            if let SlotState::Open { forgotten, .. } = slot.state {
                slot.state = if forgotten { SlotState::Free } else { SlotState::Done(Err(error.clone())) };
            }
        }
        self.events.clear();
        self.rings.restart();
    }

    /// Whether the owner may give a command, and the driver still has slots for its own.
    pub(crate) fn has_room_for_owner(&self) -> bool {
        let free = self.slots.iter().filter(|slot| matches!(slot.state, SlotState::Free)).count();
        free > SLOTS_KEPT.min(self.slots.len() / 4)
    }

    /// Whether any slot is free for a command of the driver's own.
    pub(crate) fn has_room(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot.state, SlotState::Free))
    }
}
