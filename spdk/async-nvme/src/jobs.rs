//! The controller's side of its queue pairs: creates them, deletes them, aborts their late commands.

use std::sync::Arc;

use nvme_spec::queue::{AbortCdw10, CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11};
use nvme_spec::{AdminOpcode, Status};

use crate::admin::{AdminCommand, AdminQueue, AdminToken};
use crate::clock::Moment;
use crate::controller::Controller;
use crate::error::Error;
use crate::limits::Limits;
use crate::link::{Link, state};
use crate::prp;
use crate::queue::QueueSettings;
use crate::ticket::{QidLease, QueueTicket};

/// QPRIO: medium (Base section 5.2.2).
const QPRIO_MEDIUM: u8 = 0b10;

/// How far a queue pair is on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    CreateCq,
    CreateSq,
    DeleteSq,
    DeleteCq,
}

/// One creation or deletion at a time.
#[derive(Debug)]
struct Job {
    link: Arc<Link>,
    step: Step,
    token: AdminToken,
}

#[derive(Debug, Default)]
pub(crate) struct Jobs {
    current: Option<Job>,
    /// Queue pairs that the device has.
    created: Vec<u16>,
    /// Identifiers given out with a ticket.
    qids: Vec<u16>,
    aborts: Vec<AdminToken>,
    /// Links may wait for a creation or deletion, or for an abort.
    look: bool,
    look_for_aborts: bool,
}

impl Jobs {
    fn take_qid(&mut self, most: u16, returned: &[u16]) -> Option<u16> {
        self.qids.retain(|qid| !returned.contains(qid));
        let qid = (1..=most).find(|qid| !self.qids.contains(qid))?;
        self.qids.push(qid);
        Some(qid)
    }

    /// The device lost all queues. Nobody asks any more for the answers of these commands.
    pub(crate) fn forget_device(&mut self, admin: &mut AdminQueue) {
        let current = self.current.take().map(|job| job.token);
        current.into_iter().chain(self.aborts.drain(..)).for_each(|token| admin.forget(token));
        self.created.clear();
        self.look = true;
    }
}

/// The command of a step, and the address that it names.
fn command(step: Step, link: &Link) -> (AdminCommand, u64) {
    let cdw10 = CreateQueueCdw10::new().with_qid(link.qid);
    let size = cdw10.with_qsize_z(link.entries - 1);
    let vector = link.vector.unwrap_or(0);
    let cq = CreateCqCdw11::new().with_pc(true).with_ien(link.vector.is_some()).with_iv(vector);
    let sq = CreateSqCdw11::new().with_pc(true).with_qprio(link.priority).with_cqid(link.qid);
    let (what, opcode, cdw10, cdw11, prp1) = match step {
        Step::CreateCq => {
            ("Create I/O Completion Queue", AdminOpcode::CREATE_IO_CQ, size, cq.into_bits(), link.cq.0)
        }
        Step::CreateSq => {
            ("Create I/O Submission Queue", AdminOpcode::CREATE_IO_SQ, size, sq.into_bits(), link.sq.0)
        }
        Step::DeleteSq => ("Delete I/O Submission Queue", AdminOpcode::DELETE_IO_SQ, cdw10, 0, 0),
        Step::DeleteCq => ("Delete I/O Completion Queue", AdminOpcode::DELETE_IO_CQ, cdw10, 0, 0),
    };
    let cdw10_15 = [cdw10.into_bits(), cdw11, 0, 0, 0, 0];
    (AdminCommand { what, opcode: opcode.0, cdw10_15, ..Default::default() }, prp1)
}

impl Controller {
    /// The right to open a queue pair for a namespace, with at most `depth` operations at a time; fewer when the
    /// controller's queues are shorter.
    ///
    /// # Errors
    /// When the controller was never ready, has no such namespace or no more queues, or when the namespace is one
    /// that cannot be used.
    pub fn queue_ticket(&mut self, nsid: u32, depth: u16) -> Result<QueueTicket, Error> {
        let name = self.name();
        if self.info.io_queues == 0 || self.is_over() {
            return Err(Error::NotReady { name });
        }
        let namespace = self.namespaces.iter().find(|namespace| namespace.nsid == nsid);
        let refuse = |what: &str| Error::Namespace { name: name.clone(), nsid, what: what.to_owned() };
        let namespace = namespace.ok_or_else(|| refuse("there is no such active namespace"))?;
        if let Some(why) = namespace.refusal {
            return Err(refuse(why));
        }
        let page = self.shared.page;
        let list_len =
            prp::list_len(self.info.transfer_len_max as usize, page).max(self.quirks.list_align.into());
        let limits = Limits::new(&self.info, namespace, page, list_len);
        let namespace = namespace.clone();
        let qid = self
            .jobs
            .take_qid(self.info.io_queues, &self.shared.returned())
            .ok_or(Error::Exhausted { name, what: "queue pair: ask for more in the options" })?;
        let depth_max = self.quirks.depth_max.unwrap_or(u16::MAX).min(self.cap.mqes_z());
        Ok(QueueTicket {
            shared: self.shared.clone(),
            qid: QidLease::new(self.shared.clone(), qid),
            depth: depth.clamp(1, depth_max),
            namespace,
            settings: QueueSettings {
                limits,
                io_timeout: self.options.io_timeout,
                abort_grace: self.options.abort_grace,
                requeue: self.options.requeue,
            },
            list_len,
            priority: if self.quirks.medium_priority { QPRIO_MEDIUM } else { 0 },
            // Vector 0 is the admin queue's.
            vector: (qid < self.shared.access.interrupts_max()).then_some(qid),
            bell: None,
        })
    }

    /// Whether queue pairs that were dropped are still being deleted: their identifiers are free when they are not.
    #[must_use]
    pub fn has_queues_to_end(&self) -> bool {
        self.shared.links().iter().any(|link| link.state() == state::CLOSING)
    }

    /// Serves the queue pairs. Only in state Ready.
    pub(crate) fn poll_jobs(&mut self, now: Moment) {
        if self.shared.take_attention() {
            self.jobs.look = true;
            self.jobs.look_for_aborts = true;
        }
        self.finish_job(now);
        if self.jobs.look && self.jobs.current.is_none() {
            self.next_job(now);
        }
        if self.jobs.look_for_aborts || !self.jobs.aborts.is_empty() {
            self.serve_aborts(now);
        }
    }

    fn finish_job(&mut self, now: Moment) {
        let Some(job) = &self.jobs.current else { return };
        let Some(result) = self.admin.take(job.token) else { return };
        let Some(Job { link, step, .. }) = self.jobs.current.take() else { return };
        match (step, result) {
            (Step::CreateCq, Ok(_)) => self.begin_job(&link, Step::CreateSq, now),
            (Step::CreateSq, Ok(_)) => {
                self.jobs.created.push(link.qid);
                link.advance_by_controller(state::CREATING, state::LIVE);
            }
            (Step::CreateCq, Err(error)) => refuse(&link, &error),
            (Step::CreateSq, Err(error)) => {
                refuse(&link, &error);
                self.begin_job(&link, Step::DeleteCq, now);
            }
            (Step::DeleteSq, Ok(_)) => self.begin_job(&link, Step::DeleteCq, now),
            (Step::DeleteCq, Ok(_)) => {
                if link.state() == state::CLOSING {
                    self.closed(&link);
                }
            }
            // A device that does not delete its queue might go on writing to it: reset.
            (Step::DeleteSq | Step::DeleteCq, Err(error)) => self.begin_reset(error),
        }
    }

    fn begin_job(&mut self, link: &Arc<Link>, step: Step, now: Moment) {
        if matches!(step, Step::DeleteSq | Step::DeleteCq) {
            self.jobs.created.retain(|&qid| qid != link.qid);
        }
        if step == Step::CreateCq
            && let Some(shadow) = self.shared.shadow_of(link)
        {
            // The device has no queue of this identifier now.
            shadow.clear();
        }
        let limit = self.options.admin_timeout;
        let (command, prp1) = command(step, link);
        match self.admin.submit_at(&command, (prp1, 0), now, Some(limit), false) {
            Ok(token) => self.jobs.current = Some(Job { link: link.clone(), step, token }),
            // No free slot between two steps: only a reset tells for sure what the device has.
            Err(error) => self.begin_reset(error),
        }
    }

    fn next_job(&mut self, now: Moment) {
        if !self.admin.has_room() {
            return;
        }
        let links = self.shared.links();
        let closing = links.iter().find(|link| link.state() == state::CLOSING).cloned();
        let wanted = links.iter().find(|link| link.state() == state::WANTED).cloned();
        drop(links);
        if let Some(link) = closing {
            if self.jobs.created.contains(&link.qid) {
                self.begin_job(&link, Step::DeleteSq, now);
            } else {
                self.closed(&link);
            }
        } else if let Some(link) = wanted
            && link.advance(state::WANTED, state::CREATING)
        {
            if !self.is_as_before(&link) {
                link.refuse(Status::INVALID_NAMESPACE);
                return;
            }
            self.begin_job(&link, Step::CreateCq, now);
        } else {
            self.jobs.look = false;
        }
    }

    /// Whether the namespace of a queue pair, and what its commands may be, still is what it was when that was asked for.
    fn is_as_before(&self, link: &Link) -> bool {
        self.namespaces.iter().any(|namespace| {
            let limits = || Limits::new(&self.info, namespace, self.shared.page, link.list_len);
            namespace.is_same(&link.namespace) && limits() == link.limits
        })
    }

    /// A namespace that has a queue pair and is no longer what it was.
    pub(crate) fn changed_under_queue(&self) -> Option<u32> {
        let links = self.shared.links();
        let live = links.iter().filter(|link| link.state() == state::LIVE);
        live.map(|link| &**link).find(|link| !self.is_as_before(link)).map(|link| link.namespace.nsid)
    }

    /// The device has no such queue any more: its memory and identifier are free.
    fn closed(&mut self, link: &Arc<Link>) {
        link.set_closed();
        self.shared.unmap(&link.mapping);
        self.shared.links().retain(|other| !Arc::ptr_eq(other, link));
        self.jobs.qids.retain(|&qid| qid != link.qid);
    }

    fn serve_aborts(&mut self, now: Moment) {
        let mut open = std::mem::take(&mut self.jobs.aborts);
        // Whether a command was aborted shows in its own completion, or in that it stays away.
        open.retain(|&token| self.admin.take(token).is_none());
        self.jobs.aborts = open;
        let links: Vec<Arc<Link>> = if self.jobs.aborts.len() < usize::from(self.info.aborts_max) {
            self.shared.links().iter().filter(|link| link.state() == state::LIVE).cloned().collect()
        } else {
            return;
        };
        self.jobs.look_for_aborts = false;
        for link in links {
            if self.jobs.aborts.len() >= usize::from(self.info.aborts_max) || !self.admin.has_room() {
                self.jobs.look_for_aborts = true;
                return;
            }
            let Some(cid) = link.take_abort() else { continue };
            let cdw10 = AbortCdw10::new().with_sqid(link.qid).with_cid(cid);
            let abort = AdminCommand {
                what: "Abort",
                opcode: AdminOpcode::ABORT.0,
                cdw10_15: [cdw10.into_bits(), 0, 0, 0, 0, 0],
                ..Default::default()
            };
            let limit = self.options.admin_timeout;
            if let Ok(token) = self.admin.submit(&abort, now, Some(limit), false) {
                self.jobs.aborts.push(token);
            }
        }
    }

    /// No queue may submit, and none may let buffers go.
    pub(crate) fn hold_links(&self) {
        for link in self.shared.links().iter() {
            for from in [state::CREATING, state::LIVE] {
                let _ = link.advance(from, state::HOLD);
            }
        }
    }

    /// The device cannot write to any queue: they are lost, or gone for good, or stranded.
    pub(crate) fn settle_links(&self, to: u8) {
        for link in self.shared.links().iter() {
            let froms: &[u8] = match to {
                state::LOST => &[state::HOLD],
                _ => &[state::WANTED, state::CREATING, state::LIVE, state::HOLD, state::LOST],
            };
            for &from in froms {
                // What is lost is safe, also where the others are stranded.
                let safe = to == state::STRANDED && matches!(from, state::LOST | state::WANTED);
                link.advance_by_controller(from, if safe { state::GONE } else { to });
            }
        }
    }
}

fn refuse(link: &Link, error: &Error) {
    let status = match error {
        Error::Status { status, .. } => *status,
        _ => Status::INTERNAL_ERROR,
    };
    link.refuse(status);
}
