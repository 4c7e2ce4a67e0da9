//! The admin queue: one command at a time, with asynchronous events beside it.

use super::{parse, transfer_of};
use crate::initiator::command::{self, Completion, Transfer};
use crate::initiator::error::InitiatorError;
use crate::initiator::transport::{Deadline, Done, Queue, SlotId};
use nvme_spec::feature::FeatureId;
use nvme_spec::identify::{Cns, IDENTIFY_LEN, NamespaceIdDescriptor, NamespaceIdType};
use nvme_spec::register::Property;
use nvme_spec::{AdminOpcode, Nsid, SubmissionQueueEntry};
use std::collections::VecDeque;
use std::time::Duration;
use zerocopy::FromBytes;

/// Asynchronous Event Requests that this host has outstanding at most.
const EVENT_REQUESTS_MAX: usize = 4;
/// Events kept for [`super::Controller::next_event`]; the oldest goes first.
const EVENTS_MAX: usize = 64;
/// A log page is read in pieces of this size.
const LOG_PIECE_LEN: usize = 4096;

/// The identifiers of a namespace (NVMe Base specification 2.1, section 5.1.13.2.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceIds {
    /// EUI64.
    pub eui64: Option<[u8; 8]>,
    /// NGUID.
    pub nguid: Option<[u8; 16]>,
    /// UUID.
    pub uuid: Option<[u8; 16]>,
    /// CSI: the I/O command set.
    pub csi: Option<u8>,
}

impl NamespaceIds {
    /// Reads a list of descriptors, which ends at NIDT 0 or with the data. Unknown types are passed over.
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, InitiatorError> {
        let wrong = |what: &str| InitiatorError::incompatible(format!("namespace descriptors: {what}"));
        let mut ids = Self::default();
        while let Ok((descriptor, rest)) = NamespaceIdDescriptor::read_from_prefix(bytes) {
            if descriptor.nidt.0 == 0 {
                break;
            }
            let (id, rest) = rest
                .split_at_checked(descriptor.nidl.into())
                .ok_or_else(|| wrong("one is longer than the list"))?;
            bytes = rest;
            match descriptor.nidt {
                NamespaceIdType::EUI64 => {
                    ids.eui64 = Some(id.try_into().map_err(|_| wrong("EUI64 not of 8 bytes"))?)
                }
                NamespaceIdType::NGUID => {
                    ids.nguid = Some(id.try_into().map_err(|_| wrong("NGUID not of 16 bytes"))?)
                }
                NamespaceIdType::UUID => {
                    ids.uuid = Some(id.try_into().map_err(|_| wrong("UUID not of 16 bytes"))?)
                }
                NamespaceIdType::CSI => match id {
                    [csi] => ids.csi = Some(*csi),
                    _ => return Err(wrong("CSI not of 1 byte")),
                },
                _ => {}
            }
        }
        Ok(ids)
    }
}

/// The admin queue and its events.
pub struct AdminQueue {
    queue: Queue,
    event_slots: Vec<SlotId>,
    events: VecDeque<u32>,
}

impl AdminQueue {
    pub(super) fn new(queue: Queue) -> Self {
        Self { queue, event_slots: Vec::with_capacity(EVENT_REQUESTS_MAX), events: VecDeque::new() }
    }

    /// Runs a command to its end, whatever its status.
    pub(super) fn raw(
        &mut self,
        sqe: &SubmissionQueueEntry,
        data_out: &[u8],
        data_in: &mut [u8],
    ) -> Result<Completion, InitiatorError> {
        let Self { queue, event_slots, events } = self;
        let mut rearm = Vec::new();
        let result = raw_on(queue, sqe, data_out, data_in, |queue, done| {
            take_event(queue, event_slots, events, done, &mut rearm);
        });
        self.rearm(&rearm)?;
        result
    }

    /// A command without data that must succeed.
    pub(super) fn simple(
        &mut self,
        what: &str,
        sqe: &SubmissionQueueEntry,
    ) -> Result<Completion, InitiatorError> {
        good(what, self.raw(sqe, &[], &mut [])?)
    }

    /// A command that must succeed and fill `data`.
    pub(super) fn read_command(
        &mut self,
        what: &str,
        sqe: &SubmissionQueueEntry,
        data: &mut [u8],
    ) -> Result<Completion, InitiatorError> {
        good(what, self.raw(sqe, &[], data)?)
    }

    pub(super) fn property_get(
        &mut self,
        property: Property,
        eight_bytes: bool,
    ) -> Result<u64, InitiatorError> {
        Ok(self.simple("Property Get", &command::property_get(property, eight_bytes))?.result)
    }

    pub(super) fn property_set(&mut self, property: Property, value: u32) -> Result<(), InitiatorError> {
        self.simple("Property Set", &command::property_set(property, value)).map(drop)
    }

    pub(super) fn identify<T: FromBytes>(&mut self, cns: Cns, nsid: Nsid) -> Result<Box<T>, InitiatorError> {
        let mut data = vec![0; IDENTIFY_LEN];
        self.read_command("Identify", &command::identify(cns, nsid, 0), &mut data)?;
        parse("Identify data", &data)
    }

    pub(super) fn active_namespaces(&mut self) -> Result<Vec<Nsid>, InitiatorError> {
        let mut all = Vec::new();
        let mut after = Nsid::NONE;
        loop {
            let mut data = vec![0; IDENTIFY_LEN];
            let sqe = command::identify(Cns::ACTIVE_NAMESPACES, after, 0);
            self.read_command("Identify", &sqe, &mut data)?;
            let (entries, _) = data.as_chunks::<4>();
            let page: Vec<_> = entries
                .iter()
                .map(|&entry| Nsid(u32::from_le_bytes(entry)))
                .take_while(|nsid| nsid.0 != 0)
                .collect();
            for &nsid in &page {
                if nsid <= after {
                    return Err(InitiatorError::incompatible(
                        "the list of active namespaces does not ascend",
                    ));
                }
                after = nsid;
                all.push(nsid);
            }
            if page.len() < entries.len() {
                return Ok(all);
            }
        }
    }

    pub(super) fn get_log_page(
        &mut self,
        lid: u8,
        nsid: Nsid,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, InitiatorError> {
        if !len.is_multiple_of(4) || !offset.is_multiple_of(4) || len == 0 {
            return Err(InitiatorError::invalid("log pages are read in multiples of four bytes"));
        }
        let mut data = vec![0; len];
        let mut at = offset;
        for piece in data.chunks_mut(LOG_PIECE_LEN) {
            let piece_len = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            let sqe = command::get_log_page(lid, nsid, at, piece_len, false);
            self.read_command("Get Log Page", &sqe, piece)?;
            at += u64::from(piece_len);
        }
        Ok(data)
    }

    pub(super) fn set_features(
        &mut self,
        fid: FeatureId,
        nsid: Nsid,
        cdw11: u32,
        data: &[u8],
    ) -> Result<Completion, InitiatorError> {
        let sqe = SubmissionQueueEntry {
            cdw10: u32::from(fid.0).into(),
            cdw11: cdw11.into(),
            ..command::command(AdminOpcode::SET_FEATURES.0, nsid)
        };
        good("Set Features", self.raw(&sqe, data, &mut [])?)
    }

    /// Asks for the events that the controller can give, and leaves requests with it.
    pub(super) fn start_events(&mut self, oaes: u32, aerl_z: u8) -> Result<(), InitiatorError> {
        if oaes != 0 {
            self.set_features(FeatureId::ASYNC_EVENT_CONFIG, Nsid::NONE, oaes, &[])?;
        }
        for _ in 0..EVENT_REQUESTS_MAX.min(usize::from(aerl_z) + 1) {
            let Some(slot) = self.queue.reserve() else { break };
            self.event_slots.push(slot);
            self.request_event(slot);
        }
        self.queue.flush()
    }

    fn request_event(&mut self, slot: SlotId) {
        let sqe = command::command(AdminOpcode::ASYNC_EVENT_REQUEST.0, Nsid::NONE);
        self.queue.submit(slot, &sqe, Transfer::None, Deadline::Never);
    }

    fn rearm(&mut self, slots: &[SlotId]) -> Result<(), InitiatorError> {
        for &slot in slots {
            self.request_event(slot);
        }
        if slots.is_empty() { Ok(()) } else { self.queue.flush() }
    }

    /// Takes an event that has come, or comes within `wait`.
    pub(super) fn poll_event(&mut self, wait: Duration) -> Result<Option<u32>, InitiatorError> {
        if self.events.is_empty() {
            let mut rearm = Vec::new();
            self.queue.poll(wait)?;
            while let Some(done) = self.queue.pop_done() {
                take_event(&mut self.queue, &mut self.event_slots, &mut self.events, done, &mut rearm);
            }
            self.rearm(&rearm)?;
        }
        Ok(self.events.pop_front())
    }

    /// Sends Keep Alive when `wanted`, and takes the events that have come.
    pub(super) fn keep_alive(&mut self, wanted: bool) -> Result<(), InitiatorError> {
        if wanted {
            self.simple("Keep Alive", &command::command(AdminOpcode::KEEP_ALIVE.0, Nsid::NONE))?;
        } else {
            self.queue.poll(Duration::ZERO)?;
        }
        Ok(())
    }
}

/// Handles the end of a command that is no one's: an event, which is kept, or a request that the controller refuses,
/// which is not repeated.
fn take_event(
    queue: &mut Queue,
    event_slots: &mut Vec<SlotId>,
    events: &mut VecDeque<u32>,
    done: Done,
    rearm: &mut Vec<SlotId>,
) {
    if done.completion.status.is_success() {
        if events.len() == EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(done.completion.result32());
        rearm.push(done.slot);
    } else {
        event_slots.retain(|&slot| slot != done.slot);
        queue.release(done.slot);
    }
}

/// Runs one command on a queue, whatever its status; `others` takes ends of other commands.
pub(super) fn raw_on(
    queue: &mut Queue,
    sqe: &SubmissionQueueEntry,
    data_out: &[u8],
    data_in: &mut [u8],
    others: impl FnMut(&mut Queue, Done),
) -> Result<Completion, InitiatorError> {
    let transfer = transfer_of(data_out, data_in)?;
    let slot = queue.reserve().ok_or_else(|| InitiatorError::invalid("all slots of the queue are in use"))?;
    if let Transfer::ToController(_) = transfer {
        queue.buffer_mut(slot, data_out.len()).copy_from_slice(data_out);
    }
    queue.submit(slot, sqe, transfer, Deadline::Default);
    let done = queue.finish(slot, others)?;
    let result = if done.completion.status.is_success() {
        if let (Transfer::ToHost(_), Some(data)) = (transfer, queue.buffer(slot).get(..data_in.len())) {
            data_in.copy_from_slice(data);
        }
        done.check("the command")
    } else {
        Ok(done.completion)
    };
    queue.release(slot);
    result
}

/// Turns a bad status into an error.
pub(super) fn good(what: &str, completion: Completion) -> Result<Completion, InitiatorError> {
    if completion.status.is_success() {
        Ok(completion)
    } else {
        Err(InitiatorError::status_of(what, completion.status))
    }
}
