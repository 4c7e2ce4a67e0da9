//! Admin commands (Base section 5).

use nvme_spec::feature::{FeatureId, FeatureSelect, capability};
use nvme_spec::identify::IDENTIFY_LEN;
use nvme_spec::queue::{AbortCdw10, CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11, NumberOfQueues};
use nvme_spec::{AdminOpcode, Status, SubmissionQueueEntry};

use crate::controller::Controller;
use crate::logs::log_len;
use crate::memory::prps;
use crate::queues::{CompletionQueue, ShadowBuffers, SubmissionQueue};
use crate::work::Outcome;

/// Asynchronous Event Requests that wait at most: AERL plus one.
const EVENT_REQUESTS_MAX: usize = 4;
/// Command specific 00h and 0Ch (Base section 5.2): Completion Queue Invalid, Invalid Queue Deletion.
const COMPLETION_QUEUE_INVALID: Status = Status::new(1, 0x00);
const INVALID_QUEUE_DELETION: Status = Status::new(1, 0x0C);
/// Command specific 08h: Invalid Interrupt Vector.
const INVALID_INTERRUPT_VECTOR: Status = Status::new(1, 0x08);

impl Controller {
    /// `None` for a command that completes later.
    pub(crate) fn execute_admin(&mut self, sqe: &SubmissionQueueEntry) -> Option<Outcome> {
        if sqe.fuse() != 0 || sqe.psdt() != 0 {
            return Some(Status::INVALID_FIELD.with_dnr().into());
        }
        let outcome = match AdminOpcode(sqe.opcode) {
            AdminOpcode::IDENTIFY => self.identify(sqe).and_then(|data| self.give(sqe, &data)).into(),
            AdminOpcode::CREATE_IO_CQ => self.create_cq(sqe).into(),
            AdminOpcode::CREATE_IO_SQ => self.create_sq(sqe).into(),
            AdminOpcode::DELETE_IO_SQ => self.delete_sq(sqe).into(),
            AdminOpcode::DELETE_IO_CQ => self.delete_cq(sqe).into(),
            AdminOpcode::SET_FEATURES => self.set_features(sqe).into(),
            AdminOpcode::GET_FEATURES => self.get_features(sqe).into(),
            AdminOpcode::GET_LOG_PAGE => self.get_log(sqe).into(),
            AdminOpcode::ABORT => self.abort(sqe),
            AdminOpcode::DOORBELL_BUFFER_CONFIG if self.options.shadow_doorbells => {
                self.doorbell_buffers(sqe).into()
            }
            AdminOpcode::KEEP_ALIVE => Outcome::default(),
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                if self.event_requests.len() < EVENT_REQUESTS_MAX {
                    self.event_requests.push_back(sqe.cid.get());
                    return None;
                }
                Status::ASYNC_EVENT_LIMIT_EXCEEDED.with_dnr().into()
            }
            _ => Status::INVALID_OPCODE.with_dnr().into(),
        };
        Some(outcome)
    }

    /// Puts data into the buffer of an admin command.
    pub(crate) fn give(&self, sqe: &SubmissionQueueEntry, data: &[u8]) -> Result<(), Status> {
        let segments = self.iommu.segments(sqe, data.len(), self.page(), None)?;
        self.iommu.scatter(&segments, data)
    }

    fn check_queue(&self, cdw10: CreateQueueCdw10, granted: u16, prp1: u64) -> Result<u32, Status> {
        if cdw10.qid() == 0 || cdw10.qid() > granted {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
        }
        if cdw10.qsize_z() == 0 || cdw10.qsize_z() > self.options.mqes_z {
            return Err(Status::INVALID_QUEUE_SIZE.with_dnr());
        }
        if !prp1.is_multiple_of(self.page() as u64) {
            return Err(Status::PRP_OFFSET_INVALID.with_dnr());
        }
        Ok(u32::from(cdw10.qsize_z()) + 1)
    }

    fn granted(&self) -> (u16, u16) {
        self.features.granted_queues.unwrap_or((1, 1))
    }

    fn create_cq(&mut self, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        let cdw10 = CreateQueueCdw10::from_bits(sqe.cdw10.get());
        let cdw11 = CreateCqCdw11::from_bits(sqe.cdw11.get());
        let (prp1, _) = prps(sqe);
        let entries = self.check_queue(cdw10, self.granted().1, prp1)?;
        if self.cqs.contains_key(&cdw10.qid()) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
        }
        if !cdw11.pc() {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        // A vector above the first is none before interrupts are on (QEMU's controllers are as strict).
        let is_off = cdw11.iv() > 0 && !self.interrupts_on;
        if cdw11.ien() && (cdw11.iv() >= self.options.vectors || is_off) {
            return Err(INVALID_INTERRUPT_VECTOR.with_dnr());
        }
        let vector = cdw11.ien().then_some(cdw11.iv());
        self.cqs.insert(cdw10.qid(), CompletionQueue::new(prp1, entries, vector));
        Ok(())
    }

    fn create_sq(&mut self, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        let cdw10 = CreateQueueCdw10::from_bits(sqe.cdw10.get());
        let cdw11 = CreateSqCdw11::from_bits(sqe.cdw11.get());
        let (prp1, _) = prps(sqe);
        let entries = self.check_queue(cdw10, self.granted().0, prp1)?;
        if self.sqs.contains_key(&cdw10.qid()) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
        }
        if cdw11.cqid() == 0 || !self.cqs.contains_key(&cdw11.cqid()) {
            return Err(COMPLETION_QUEUE_INVALID.with_dnr());
        }
        if !cdw11.pc() {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        self.sqs.insert(cdw10.qid(), SubmissionQueue::new(prp1, entries, cdw11.cqid()));
        Ok(())
    }

    fn delete_sq(&mut self, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        let qid = CreateQueueCdw10::from_bits(sqe.cdw10.get()).qid();
        self.await_disk();
        if qid == 0 || self.sqs.remove(&qid).is_none() {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
        }
        self.held.retain(|held| held.sqid != qid);
        Ok(())
    }

    fn delete_cq(&mut self, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        let qid = CreateQueueCdw10::from_bits(sqe.cdw10.get()).qid();
        if qid == 0 || !self.cqs.contains_key(&qid) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
        }
        if self.sqs.values().any(|queue| queue.cqid == qid) {
            return Err(INVALID_QUEUE_DELETION.with_dnr());
        }
        self.cqs.remove(&qid);
        Ok(())
    }

    fn set_features(&mut self, sqe: &SubmissionQueueEntry) -> Result<u32, Status> {
        if sqe.cdw10.get() >> 31 != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE.with_dnr());
        }
        let value = sqe.cdw11.get();
        match FeatureId(sqe.cdw10.to_bytes()[0]) {
            FeatureId::NUMBER_OF_QUEUES => return self.set_queues(NumberOfQueues::from_bits(value)),
            FeatureId::VOLATILE_WRITE_CACHE if self.options.volatile_write_cache => {
                self.features.write_cache_off = value & 1 == 0;
            }
            FeatureId::ASYNC_EVENT_CONFIG => self.features.async_event_config = value,
            FeatureId::ARBITRATION => self.features.arbitration = value,
            FeatureId::INTERRUPT_COALESCING => self.features.interrupt_coalescing = value,
            FeatureId::ERROR_RECOVERY => self.features.error_recovery = value,
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        }
        Ok(0)
    }

    fn set_queues(&mut self, wanted: NumberOfQueues) -> Result<u32, Status> {
        if self.sqs.len() > 1 || self.cqs.len() > 1 {
            return Err(Status::COMMAND_SEQUENCE_ERROR.with_dnr());
        }
        if wanted.nsq_z() == u16::MAX || wanted.ncq_z() == u16::MAX {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let most = self.options.io_queues_max.max(1);
        let (submission, completion) = ((wanted.nsq_z() + 1).min(most), (wanted.ncq_z() + 1).min(most));
        self.features.granted_queues = Some((submission, completion));
        Ok(NumberOfQueues::new().with_nsq_z(submission - 1).with_ncq_z(completion - 1).into_bits())
    }

    fn get_features(&self, sqe: &SubmissionQueueEntry) -> Result<u32, Status> {
        let select = FeatureSelect(sqe.cdw10.to_bytes()[1] & 7);
        let (submission, completion) = self.granted();
        let queues = NumberOfQueues::new().with_nsq_z(submission - 1).with_ncq_z(completion - 1).into_bits();
        let value = match FeatureId(sqe.cdw10.to_bytes()[0]) {
            FeatureId::NUMBER_OF_QUEUES => queues,
            FeatureId::VOLATILE_WRITE_CACHE if self.options.volatile_write_cache => {
                u32::from(!self.features.write_cache_off)
            }
            FeatureId::ASYNC_EVENT_CONFIG => self.features.async_event_config,
            FeatureId::ARBITRATION => self.features.arbitration,
            FeatureId::INTERRUPT_COALESCING => self.features.interrupt_coalescing,
            FeatureId::ERROR_RECOVERY => self.features.error_recovery,
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        };
        match select {
            FeatureSelect::CURRENT => Ok(value),
            FeatureSelect::DEFAULT => Ok(0),
            FeatureSelect::SUPPORTED_CAPABILITIES => Ok(capability::CHANGEABLE),
            _ => Err(Status::INVALID_FIELD.with_dnr()),
        }
    }

    /// Bytes that a command of those with data brings.
    pub(crate) fn admin_data_len(&self, sqe: &SubmissionQueueEntry) -> Option<usize> {
        match AdminOpcode(sqe.opcode) {
            AdminOpcode::IDENTIFY => Some(IDENTIFY_LEN),
            AdminOpcode::GET_LOG_PAGE => usize::try_from(log_len(sqe)).ok().filter(|&len| len <= 1 << 20),
            _ => None,
        }
    }

    fn doorbell_buffers(&mut self, sqe: &SubmissionQueueEntry) -> Result<(), Status> {
        let (doorbells, events) = prps(sqe);
        let page = self.page();
        let fits = |at: u64| at.is_multiple_of(page as u64) && self.iommu.holds(at, page);
        if !fits(doorbells) || !fits(events) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        self.set_shadow(ShadowBuffers { doorbells, events });
        Ok(())
    }

    fn abort(&mut self, sqe: &SubmissionQueueEntry) -> Outcome {
        let cdw10 = AbortCdw10::from_bits(sqe.cdw10.get());
        let aborted = self.abort_held(cdw10.sqid(), cdw10.cid());
        // DW0 bit 0 is set when it was not aborted.
        u32::from(!aborted).into()
    }
}
