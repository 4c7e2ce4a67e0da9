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
        let passed = self.passed(cx, index, done.timing);
        let completion = Completion::of(done.status);
        if self.tx.takes_now() {
            let Self { tx, requests, session, digests, .. } = self;
            let answer = Answer { index, completion, buf: &mut done.buf, passed: &passed };
            return tx.answer(answer, requests, session, *digests, &mut cx.trace);
        }
        self.requests.at(index).buf = done.buf.take();
        self.answer_later(index, completion, passed);
    }

    /// A command is back from its device, at this moment of the engine: when it passed its stages.
    #[inline]
    fn passed(&mut self, cx: &CoreContext, index: Index, timing: Timing) -> Passed {
        let request = self.requests.at(index);
        let common =
            Common { timing, arrived: request.arrived, done: cx.engine.now(), nsid: request.sqe.nsid() };
        match self.times.joins(&common) {
            Some(passed) => *passed,
            None if timing.is_none() => Passed::arrived(common.arrived),
            None => self.passed_alone(cx, common),
        }
    }

    #[inline(never)]
    fn passed_alone(&mut self, cx: &CoreContext, common: Common) -> Passed {
        let cell = self.times.cell(common.nsid).unwrap_or_else(|| self.new_cell(cx, common.nsid));
        let stamps = cx.engine.stamps(common.timing);
        self.times.begin(common, cell, stamps)
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
