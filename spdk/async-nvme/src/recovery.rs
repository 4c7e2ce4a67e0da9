//! The controller's ways out of trouble: disable and enable, a reset from outside, and the end.
//!
//! The rule behind all of them: buffers are let go only when the controller has confirmed that it stopped (CSTS.RDY is
//! 0), or was reset from outside, or was cut off from memory.

use std::sync::Arc;

use nvme_spec::register::{Cc, Property, css};
use tracing::warn;

use crate::controller::Controller;
use crate::error::Error;
use crate::link::state;
use crate::options::{Event, State};

impl Controller {
    /// Resets because of `error`; gives up when that was tried too often.
    pub(crate) fn begin_reset(&mut self, error: Error) {
        if self.is_over() || self.state == State::Idle {
            return;
        }
        warn!(name = self.shared.access.name(), %error, "controller is reset");
        let settled =
            self.state == State::Ready && self.now() >= self.ready_since.after(self.options.settled_after);
        self.resets = if settled { 1 } else { self.resets + 1 };
        if self.resets > self.options.resets_max {
            self.end(State::Failed, error);
            return;
        }
        self.tell(Event::Resetting(error));
        self.disable();
    }

    pub(crate) fn disable(&mut self) {
        self.hold_links();
        self.abandon_start();
        self.rescan_due = false;
        self.reset_from_outside = false;
        // It ends with the reset; no queue pair is created before it is set up anew.
        self.shared.set_shadow(None);
        let cc = self.shared.access.read32(Property::CC.0);
        self.shared.access.write32(Property::CC.0, Cc::from_bits(cc).with_en(false).with_shn(0).into_bits());
        self.enter(State::Disabling, self.ready_limit());
        self.quiet_until = self.now().after(self.quirks.delay_before_ready.unwrap_or_default());
    }

    /// CSTS.RDY does not become 0: from outside, then.
    pub(crate) fn disable_late(&mut self) {
        let error = self.late("stop");
        if self.reset_from_outside || self.shared.access.function_reset().is_err() {
            self.end(State::Failed, error);
            return;
        }
        self.reset_from_outside = true;
        self.enter(State::Disabling, self.ready_limit());
    }

    /// CSTS.RDY is 0: the controller has no queues and writes nothing any more.
    pub(crate) fn disabled(&mut self) {
        let error = Error::Reset { name: self.name() };
        self.admin.fail_all(&error);
        self.jobs.forget_device(&mut self.admin);
        let _ = self.shared.take_wish();
        if self.stopping {
            self.shared.set_closed(true);
            self.settle_links(state::GONE);
            self.state = State::Stopped;
            return;
        }
        self.settle_links(state::LOST);
        if let Err(source) = self.shared.access.dma_restore() {
            self.end(State::Failed, Error::Access { name: self.name(), source: Arc::new(source) });
            return;
        }
        self.enable();
    }

    fn enable(&mut self) {
        let Some((asq, acq)) = self.admin.addresses() else {
            let error = Error::Exhausted { name: self.name(), what: "address for the admin queue" };
            self.end(State::Failed, error);
            return;
        };
        let access = &self.shared.access;
        let size_z = u32::from(self.admin.entries()) - 1;
        access.write32(Property::AQA.0, size_z | size_z << 16);
        access.write64(Property::ASQ.0, asq);
        access.write64(Property::ACQ.0, acq);
        let sets = if self.cap.css_nvm() { css::NVM } else { css::ALL };
        let cc = Cc::new().with_css(sets).with_mps(self.cap.mpsmin());
        let cc = cc.with_iosqes(6).with_iocqes(4).with_en(true);
        access.write32(Property::CC.0, cc.into_bits());
        self.enter(State::Enabling, self.ready_limit());
        self.quiet_until = self.now().after(self.quirks.delay_before_ready.unwrap_or_default());
    }

    /// The end: makes sure that the device cannot write any more, then lets all buffers go. When that cannot be made
    /// sure of, they are kept for ever.
    pub(crate) fn end(&mut self, end: State, error: Error) {
        self.hold_links();
        let reset = end != State::Removed && self.shared.access.function_reset().is_ok();
        let safe = reset || self.shared.access.dma_revoke().is_ok();
        self.stranded = !safe;
        self.shared.set_closed(true);
        self.settle_links(if safe { state::GONE } else { state::STRANDED });
        self.admin.fail_all(&error);
        self.abandon_start();
        self.jobs.forget_device(&mut self.admin);
        self.state = end;
        warn!(name = self.shared.access.name(), %error, safe, "controller is given up");
        self.failure = Some(error.clone());
        self.tell(Event::Ended(error));
    }
}
