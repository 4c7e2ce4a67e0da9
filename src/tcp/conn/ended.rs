//! Commands that have ended: when they passed their stages, and their answers.

use nvme_spec::Nsid;

use super::request::{Index, State};
use super::times::{CellIndex, Common, Passed};
use super::tx::{Answer, Out};
use super::{Stage, TcpConnection};
use crate::fabrics::Completion;
use crate::reactor::{CoreContext, IoDone, Timing};

impl TcpConnection {
    /// A command is back from its device.
    #[inline]
    pub(super) fn ended(&mut self, cx: &mut CoreContext, done: &mut IoDone) {
        self.on_device -= 1;
        let Ok(index) = Index::try_from(done.request) else { return };
        if !done.status.is_success() {
            let sqe = self.requests.at(index).sqe;
            self.session.note_error(&sqe, done.status, None);
        }
        let answers = matches!(self.requests.at(index).state, State::Device { reads: true })
            && done.status.is_success();
        if !answers {
            done.buf = None;
        }
        if self.stage == Stage::Draining || self.terminating {
            return self.requests.remove(index);
        }
        let common = self.common(cx, index, done.timing);
        let is_last = self.times.joins(&common) || self.passed_alone(cx, common);
        let completion = Completion::of(done.status);
        let Self { tx, requests, session, digests, times, .. } = self;
        // Most share it with the one before: it stays where it lies.
        let arrived;
        let passed = if is_last {
            times.last()
        } else {
            arrived = Passed::arrived(common.arrived);
            &arrived
        };
        if tx.takes_now() {
            let answer = Answer { index, completion, buf: &mut done.buf, passed };
            return tx.answer(answer, requests, session, *digests, &mut cx.trace);
        }
        let passed = *passed;
        self.requests.at(index).buf = done.buf.take();
        self.answer_later(index, completion, passed);
    }

    /// What a command that is back from its device, at this moment of the engine, may have in common with others.
    #[inline]
    fn common(&mut self, cx: &CoreContext, index: Index, timing: Timing) -> Common {
        let request = self.requests.at(index);
        Common { timing, arrived: request.arrived, done: cx.engine.now(), nsid: request.sqe.nsid() }
    }

    /// Begins a group, of a command that came to its device; whether it did.
    #[inline(never)]
    fn passed_alone(&mut self, cx: &CoreContext, common: Common) -> bool {
        if common.timing.is_none() {
            return false;
        }
        let cell = self.times.cell(common.nsid).unwrap_or_else(|| self.new_cell(cx, common.nsid));
        let stamps = cx.engine.stamps(common.timing);
        self.times.begin(common, cell, stamps);
        true
    }

    /// Where commands of this connection to a namespace are counted, when the first of them has ended.
    #[cold]
    fn new_cell(&mut self, cx: &CoreContext, nsid: Nsid) -> CellIndex {
        let cell = match self.session.names() {
            Some((host, subsystem)) => cx.stages.cell(host, subsystem, nsid.0),
            None => cx.stages.others(),
        };
        self.times.add(nsid, cell)
    }

    /// A command ends that came to no device.
    pub(super) fn answer(&mut self, index: Index, completion: Completion) {
        let arrived = self.requests.at(index).arrived;
        self.answer_later(index, completion, Passed::arrived(arrived));
    }

    fn answer_later(&mut self, index: Index, completion: Completion, passed: Passed) {
        let request = self.requests.at(index);
        (request.state, request.passed) = (State::Answer(completion), passed);
        self.tx.push(Out::Answer(index));
    }
}
