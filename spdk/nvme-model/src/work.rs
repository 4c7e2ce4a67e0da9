//! The way of a command through the controller: fetched, struck by a fault or not, executed, completed.

use nvme_spec::aer::{AsyncEventType, NoticeEvent, config, event_dw0};
use nvme_spec::command::DataDirection;
use nvme_spec::{CompletionQueueEntry, NvmOpcode, Status, SubmissionQueueEntry};
use zerocopy::{IntoBytes, transmute};

use crate::controller::Controller;
use crate::disk::{Disk, Ended, Work};
use crate::fault::{FaultAction, split_mix};
use crate::memory::Segment;
use crate::queues::Torn;

/// A completion that is reordered comes at the latest after this many steps.
const REORDER_STEPS: u64 = 16;

/// What a command came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: Status,
    pub(crate) dw0: u32,
    pub(crate) dw1: u32,
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        Self { status, ..Self::default() }
    }
}

impl<T: Into<Self>> From<Result<T, Status>> for Outcome {
    fn from(result: Result<T, Status>) -> Self {
        result.map_or_else(Self::from, Into::into)
    }
}

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self::default()
    }
}

/// The value of a feature, or a number of queues: DW0.
impl From<u32> for Outcome {
    fn from(dw0: u32) -> Self {
        Self { dw0, ..Self::default() }
    }
}

/// A command that was fetched and is not completed.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) sqid: u16,
    pub(crate) sqe: SubmissionQueueEntry,
    due: Due,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Never,
    At(u64),
    /// When another command of the queue was completed, or at the step.
    AfterNext(u64),
    /// Executed, but the completion queue was full.
    Done(Outcome),
}

impl Controller {
    /// One step: state machine, late completions, then up to `burst` commands of each queue. Returns whether
    /// anything happened.
    pub(crate) fn step(&mut self) -> bool {
        if self.gone {
            return false;
        }
        self.now_steps += 1;
        let mut busy = self.advance_state();
        if !self.csts.rdy() || self.csts.cfs() {
            return busy;
        }
        busy |= self.mend_torn();
        self.scribble();
        busy |= self.release_held();
        busy |= self.reap();
        let qids: Vec<u16> = self.sqs.keys().copied().collect();
        for qid in qids {
            for _ in 0..self.options.burst {
                if !self.fetch(qid) {
                    break;
                }
                busy = true;
            }
        }
        self.notice_namespaces();
        busy | self.report_events()
    }

    /// Takes and runs one command; whether there was one that could be taken.
    fn fetch(&mut self, qid: u16) -> bool {
        if self.csts.cfs() || self.gone {
            return false;
        }
        let Some(cqid) = self.sqs.get(&qid).map(|queue| queue.cqid) else { return false };
        if !self.has_command(qid) || !self.has_room(cqid) {
            return false;
        }
        let Some(queue) = self.sqs.get_mut(&qid) else { return false };
        let at = queue.base + u64::from(queue.head) * 64;
        queue.head = (queue.head + 1) % queue.entries;
        let mut sqe = SubmissionQueueEntry::default();
        if !self.iommu.read(at, sqe.as_mut_bytes()) {
            self.fail();
            return true;
        }
        match self.faults.strike(qid, &sqe) {
            None => self.run(qid, sqe),
            Some(action) => self.run_struck(qid, sqe, action),
        }
        true
    }

    fn run(&mut self, sqid: u16, sqe: SubmissionQueueEntry) {
        let outcome = if sqid == 0 || self.disk.is_none() {
            self.execute(sqid, &sqe)
        } else {
            self.commands_done += 1;
            self.begin_io(sqid, &sqe)
        };
        if let Some(outcome) = outcome {
            self.complete(sqid, sqe, outcome);
        }
    }

    /// Executes a command now; `None` for one that is completed by an event.
    fn execute(&mut self, sqid: u16, sqe: &SubmissionQueueEntry) -> Option<Outcome> {
        self.commands_done += 1;
        if sqid == 0 { self.execute_admin(sqe) } else { Some(self.execute_io(sqe)) }
    }

    /// Completes what is back from the disk; whether there was anything.
    fn reap(&mut self) -> bool {
        let mut reaped = false;
        while let Some(ended) = self.disk.as_mut().and_then(Disk::next_ended) {
            reaped = true;
            self.land(ended);
        }
        reaped
    }

    /// Waits until nothing is at the disk, and completes it.
    pub(crate) fn await_disk(&mut self) {
        while let Some(ended) = self.disk.as_mut().and_then(Disk::await_ended) {
            self.land(ended);
        }
    }

    fn land(&mut self, ended: Ended) {
        let Ended { sqid, sqe, work, data, mut result } = ended;
        if result.is_ok() && work == Work::Read {
            let segments = self.iommu.segments(&sqe, data.len(), self.page(), self.sgl_granularity());
            result = segments.and_then(|segments| self.iommu.scatter(&segments, &data));
        }
        if let Some(disk) = &mut self.disk {
            disk.take_back(data);
        }
        self.complete(sqid, sqe, result.into());
    }

    fn run_struck(&mut self, sqid: u16, sqe: SubmissionQueueEntry, action: FaultAction) {
        let now = self.now_steps;
        let hold = |due| Held { sqid, sqe, due };
        match action {
            FaultAction::Delay { steps } => self.held.push(hold(Due::At(now + u64::from(steps)))),
            FaultAction::Drop => self.held.push(hold(Due::Never)),
            FaultAction::Reorder => self.held.push(hold(Due::AfterNext(now + REORDER_STEPS))),
            FaultAction::Status(status) => self.complete(sqid, sqe, status.into()),
            FaultAction::DuplicateCid => {
                let Some(outcome) = self.execute(sqid, &sqe) else { return };
                self.complete(sqid, sqe, outcome);
                self.complete(sqid, sqe, outcome);
            }
            FaultAction::UnknownCid => {
                let outcome = self.execute(sqid, &sqe).unwrap_or_default();
                let mut cqe = self.entry(sqid, &sqe, outcome);
                cqe.cid.set(sqe.cid.get() ^ 0x5A5A);
                self.post(sqid, cqe, None);
                self.held.push(hold(Due::Never));
            }
            FaultAction::TornPhaseFirst | FaultAction::TornResultLast => {
                let Some(outcome) = self.execute(sqid, &sqe) else { return };
                let cqe = self.entry(sqid, &sqe, outcome);
                self.post(sqid, cqe, Some(action));
            }
            FaultAction::BadSqHead => {
                let outcome = self.execute(sqid, &sqe).unwrap_or_default();
                let mut cqe = self.entry(sqid, &sqe, outcome);
                cqe.sqhd.set(0xFFF0);
                self.post(sqid, cqe, None);
            }
            FaultAction::Fatal => {
                self.held.push(hold(Due::Never));
                self.fail();
            }
            FaultAction::Vanish => self.vanish(),
            FaultAction::Garbage => {
                let Some(outcome) = self.execute(sqid, &sqe) else { return };
                self.spoil_data(sqid, &sqe);
                self.complete(sqid, sqe, outcome);
            }
        }
    }

    fn entry(&self, sqid: u16, sqe: &SubmissionQueueEntry, outcome: Outcome) -> CompletionQueueEntry {
        let head = self.sqs.get(&sqid).map_or(0, |queue| queue.head);
        CompletionQueueEntry {
            dw0: outcome.dw0.into(),
            dw1: outcome.dw1.into(),
            sqhd: u16::try_from(head).unwrap_or(0).into(),
            sqid: sqid.into(),
            cid: sqe.cid,
            status: outcome.status.to_wire().into(),
        }
    }

    pub(crate) fn complete(&mut self, sqid: u16, sqe: SubmissionQueueEntry, outcome: Outcome) {
        self.log_error(sqid, &sqe, outcome.status);
        self.complete_logged(sqid, sqe, outcome);
    }

    fn complete_logged(&mut self, sqid: u16, sqe: SubmissionQueueEntry, outcome: Outcome) {
        let cqe = self.entry(sqid, &sqe, outcome);
        if !self.post(sqid, cqe, None) {
            self.held.push(Held { sqid, sqe, due: Due::Done(outcome) });
        }
    }

    /// Writes an entry to the queue's completion queue; false when that is full.
    fn post(&mut self, sqid: u16, mut cqe: CompletionQueueEntry, torn: Option<FaultAction>) -> bool {
        let Some(cqid) = self.sqs.get(&sqid).map(|queue| queue.cqid) else { return true };
        if !self.has_room(cqid) {
            return false;
        }
        let Some(queue) = self.cqs.get_mut(&cqid) else { return true };
        cqe.status.set(cqe.status.get() & !1 | u16::from(queue.phase));
        let at = queue.base + u64::from(queue.tail) * 16;
        let words: [u64; 2] = transmute!(cqe);
        let status_word = (words[1] >> 32) as u32;
        let written = match torn {
            Some(FaultAction::TornPhaseFirst) => {
                queue.torn = Some(Torn { at, words });
                let old = self.iommu.load_u32(at + 12).unwrap_or(0);
                // The identifier is still that of the entry before.
                self.iommu.store_u32(at + 12, status_word & 0xFFFF_0000 | old & 0xFFFF)
            }
            Some(_) => {
                queue.torn = Some(Torn { at, words });
                self.iommu.store_u32(at + 12, status_word)
            }
            None => self.iommu.store_u64(at, words[0]) && self.iommu.store_u64(at + 8, words[1]),
        };
        queue.tail += 1;
        if queue.tail == queue.entries {
            queue.tail = 0;
            queue.phase = !queue.phase;
        }
        let vector = queue.vector.filter(|_| queue.torn.is_none());
        if !written {
            self.csts.set_cfs(true);
        }
        self.interrupt(vector);
        true
    }

    fn mend_torn(&mut self) -> bool {
        let mut mended = Vec::new();
        for queue in self.cqs.values_mut() {
            if let Some(Torn { at, words }) = queue.torn.take()
                && self.iommu.store_u64(at, words[0])
                && self.iommu.store_u64(at + 8, words[1])
            {
                mended.push(queue.vector);
            }
        }
        mended.iter().for_each(|&vector| self.interrupt(vector));
        !mended.is_empty()
    }

    fn release_held(&mut self) -> bool {
        let now = self.now_steps;
        let mut released = false;
        // Those of before this step only: what is held anew waits for the next one.
        for held in std::mem::take(&mut self.held) {
            match held.due {
                Due::Never => self.held.push(held),
                Due::At(step) if step <= now => {
                    released = true;
                    self.run(held.sqid, held.sqe);
                }
                Due::AfterNext(step) if step <= now || self.has_passed(&held) => {
                    released = true;
                    self.run(held.sqid, held.sqe);
                }
                Due::Done(outcome) => {
                    released = true;
                    self.complete_logged(held.sqid, held.sqe, outcome);
                }
                Due::At(_) | Due::AfterNext(_) => self.held.push(held),
            }
        }
        released || self.held.iter().any(|held| held.due != Due::Never)
    }

    /// Whether the queue's later commands were all fetched: then one of them was completed before this one.
    fn has_passed(&self, held: &Held) -> bool {
        let Due::AfterNext(step) = held.due else { return false };
        let since = self.now_steps + REORDER_STEPS - step;
        since > 1 && self.sqs.get(&held.sqid).is_none_or(|queue| queue.head == queue.tail)
    }

    /// Dropped reads go on writing: whoever gave their buffers away early will notice.
    fn scribble(&mut self) {
        for held in &self.held {
            if held.due == Due::Never && held.sqid != 0 && NvmOpcode(held.sqe.opcode) == NvmOpcode::READ {
                for segment in self.data_of(&held.sqe) {
                    let _ = self.iommu.write(segment.iova, &[0xDB, 0xAD]);
                }
            }
        }
    }

    /// The memory that a command that moves blocks, or source ranges, may move data to or from.
    fn data_of(&self, sqe: &SubmissionQueueEntry) -> Vec<Segment> {
        let Some(len) = self.data_len(sqe) else { return Vec::new() };
        self.iommu.segments(sqe, len, self.page(), self.sgl_granularity()).unwrap_or_default()
    }

    fn data_len(&self, sqe: &SubmissionQueueEntry) -> Option<usize> {
        match NvmOpcode(sqe.opcode) {
            NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::COMPARE => {
                let namespace = self.shared.namespace(sqe.nsid.get())?;
                let blocks = u64::from(sqe.cdw12.get() & 0xFFFF) + 1;
                usize::try_from(namespace.bytes(blocks)).ok()
            }
            NvmOpcode::COPY => Some((sqe.cdw12.get() as usize & 0xFF) * 32 + 32),
            NvmOpcode::DATASET_MANAGEMENT => Some((sqe.cdw10.get() as usize & 0xFF) * 16 + 16),
            _ => None,
        }
    }

    /// Host addresses and lengths that commands fetched or ready to be fetched may still touch.
    pub(crate) fn may_touch(&self) -> Vec<(usize, usize)> {
        let mut open: Vec<SubmissionQueueEntry> = Vec::new();
        if self.csts.rdy() && !self.gone {
            // What only waits for room in the completion queue has moved its data.
            let moving = |held: &&Held| held.sqid != 0 && !matches!(held.due, Due::Done(_));
            open.extend(self.held.iter().filter(moving).map(|held| held.sqe));
            open.extend(self.disk.iter().flat_map(Disk::under_way));
            for (&qid, queue) in self.sqs.iter().filter(|(qid, _)| **qid != 0) {
                let (mut at, tail) = (queue.head, self.newest_tail(qid));
                while at != tail {
                    let mut sqe = SubmissionQueueEntry::default();
                    if self.iommu.read(queue.base + u64::from(at) * 64, sqe.as_mut_bytes()) {
                        open.push(sqe);
                    }
                    at = (at + 1) % queue.entries;
                }
            }
        }
        let segments = open.iter().flat_map(|sqe| self.data_of(sqe));
        segments.filter_map(|part| Some((self.iommu.host_address(part)?, part.len))).collect()
    }

    /// Fills what a command brought with nonsense.
    fn spoil_data(&mut self, sqid: u16, sqe: &SubmissionQueueEntry) {
        let len = if sqid == 0 { self.admin_data_len(sqe) } else { self.data_len(sqe) };
        let brings = DataDirection::of(sqe.opcode) == DataDirection::ControllerToHost;
        let Some(len) = len.filter(|_| brings) else { return };
        let mut seed = self.now_steps << 16 | u64::from(sqe.cid.get());
        let noise: Vec<u8> =
            std::iter::repeat_with(|| split_mix(&mut seed).to_le_bytes()).flatten().take(len).collect();
        if let Ok(segments) = self.iommu.segments(sqe, len, self.page(), self.sgl_granularity()) {
            let _ = self.iommu.scatter(&segments, &noise);
        }
    }

    /// Ends a held command for Abort; whether there was one.
    pub(crate) fn abort_held(&mut self, sqid: u16, cid: u16) -> bool {
        let found = self.held.iter().position(|held| {
            held.sqid == sqid && held.sqe.cid.get() == cid && !matches!(held.due, Due::Done(_))
        });
        let Some(index) = found else { return false };
        let held = self.held.swap_remove(index);
        self.complete(sqid, held.sqe, Status::COMMAND_ABORT_REQUESTED.into());
        true
    }

    fn notice_namespaces(&mut self) {
        let generation = self.shared.generation();
        if generation != self.namespaces_seen {
            self.namespaces_seen = generation;
            if self.features.async_event_config & config::NAMESPACE_ATTRIBUTE != 0 {
                let notice = NoticeEvent::NAMESPACE_ATTRIBUTE_CHANGED.0;
                self.raise(event_dw0(AsyncEventType::NOTICE, notice, 0x04));
            }
        }
    }

    /// Reports events whose type is not masked; each masks its type until its log page is read.
    fn report_events(&mut self) -> bool {
        let mut reported = false;
        while let Some(index) = self.events.iter().position(|dw0| !self.is_masked(*dw0)) {
            let Some(cid) = self.event_requests.pop_front() else { break };
            let Some(dw0) = self.events.remove(index) else { break };
            self.masked.push(dw0);
            let sqe = SubmissionQueueEntry { cid: cid.into(), ..Default::default() };
            self.complete(0, sqe, dw0.into());
            reported = true;
        }
        reported
    }
}
