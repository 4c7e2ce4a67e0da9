//! Asynchronous events (Base section 5.1.2): asked for, told to the owner, cleared, and acted on when the namespaces
//! changed.
//!
//! A controller reports no second event of a type until the log page that belongs to it was read without Retain
//! Asynchronous Event, so each event is followed by such a read. The owner reads the same page by itself if it wants to
//! know more ([`Controller::smart`], [`Controller::error_log`]).

use nvme_spec::AdminOpcode;
use nvme_spec::log::LogPageId;
use nvme_spec::queue::GetLogCdw10;

use crate::admin::AdminCommand;
use crate::clock::Moment;
use crate::controller::Controller;
use crate::options::{Event, State};

/// Event requests that are open at a time, at most.
const REQUESTS_MAX: u16 = 4;

/// The first `len` bytes (a multiple of 4, at most 4096) of a log page from `offset`. With `retain` it clears no event.
pub(crate) fn get_log(page: LogPageId, nsid: u32, offset: u64, len: usize, retain: bool) -> AdminCommand {
    let numdl_z = u16::try_from(len / 4).unwrap_or(1024).saturating_sub(1);
    let cdw10 = GetLogCdw10::new().with_lid(page.0).with_rae(retain).with_numdl_z(numdl_z);
    let [low, high] = [offset & 0xFFFF_FFFF, offset >> 32].map(|half| u32::try_from(half).unwrap_or(0));
    AdminCommand {
        what: "Get Log Page",
        opcode: AdminOpcode::GET_LOG_PAGE.0,
        nsid,
        cdw10_15: [cdw10.into_bits(), 0, low, high, 0, 0],
        data_in_len: len,
        ..Default::default()
    }
}

impl Controller {
    /// How many event requests the controller may have open.
    pub(crate) fn begin_events(&mut self) {
        self.events_due = self.info.event_requests_max.min(REQUESTS_MAX);
        self.rescan_due = false;
    }

    /// Reports asynchronous events, clears them, and asks for the next ones.
    pub(crate) fn poll_events(&mut self, now: Moment) {
        while let Some(dw0) = self.admin.events.pop_front() {
            self.events_due += 1;
            self.tell(Event::Asynchronous(dw0));
            if is_namespace_change(dw0) {
                // The rescan reads the log page of the changes first.
                self.rescan_due = true;
            } else {
                self.clear_event(dw0, now);
            }
        }
        while self.events_due > 0 && self.admin.submit_event_request(now).is_ok() {
            self.events_due -= 1;
        }
        if self.rescan_due && self.start.is_none() {
            self.rescan_due = false;
            self.begin_rescan();
        }
    }

    /// Reads the log page that belongs to an event, so that there can be another one. The answer is not looked at.
    fn clear_event(&mut self, dw0: u32, now: Moment) {
        let [_, _, page, _] = dw0.to_le_bytes();
        let len = match LogPageId(page) {
            LogPageId::ERROR_INFORMATION => 64,
            LogPageId::SMART_HEALTH | LogPageId::FIRMWARE_SLOT => 512,
            _ => return,
        };
        let command = get_log(LogPageId(page), u32::MAX, 0, len, false);
        let limit = self.options.admin_timeout;
        let _ = self.admin.submit(&command, now, Some(limit), true);
    }

    /// Reads the namespaces anew.
    pub fn rescan(&mut self) {
        if self.state == State::Ready {
            self.rescan_due = true;
            self.shared.call_controller();
        }
    }
}

/// Type notice, information 00h: Attached Namespace Attribute Changed.
const fn is_namespace_change(dw0: u32) -> bool {
    dw0 & 0xFF07 == 0x0002
}
