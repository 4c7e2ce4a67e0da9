//! What happens between CSTS.RDY and the state Ready, and at a rescan: one admin command after another.
//!
//! ```text
//!   Controller --> NvmController --> Queues --> Doorbells --> WriteCache --> Events --> List --> Namespace --.
//!                                    (as far as they are wanted)                        ^ more    ^          |
//!   rescan:                                                                  Changes ----'        `- Descriptors
//! ```

use nvme_spec::aer::config;
use nvme_spec::feature::FeatureId;
use nvme_spec::identify::{Cns, IDENTIFY_LEN};
use nvme_spec::log::LogPageId;
use nvme_spec::queue::NumberOfQueues;
use nvme_spec::{AdminOpcode, Status};

use crate::admin::{AdminCommand, AdminReply, AdminToken};
use crate::clock::Moment;
use crate::controller::Controller;
use crate::error::Error;
use crate::events::get_log;
use crate::info::{ControllerInfo, NamespaceInfo};
use crate::options::{Event, State};
use crate::shadow::{Shadow, ShadowPages};

/// Namespaces looked at, at most: a device cannot make us list for ever.
const NAMESPACES_MAX: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Controller,
    NvmController,
    Queues,
    /// Sets shadow doorbells up, where they are offered.
    Doorbells,
    /// Turns the volatile write cache on or off as before.
    WriteCache,
    Events,
    /// The log page of changed namespaces: reading it lets the next change be told.
    Changes,
    /// The list of namespaces above this identifier.
    List(u32),
    /// The namespace at this place in the list.
    Namespace(usize),
    Descriptors(usize),
}

/// The sequence under way.
#[derive(Debug)]
pub(crate) struct Start {
    step: Step,
    token: AdminToken,
    info: ControllerInfo,
    nsids: Vec<u32>,
    namespaces: Vec<NamespaceInfo>,
    rescan: bool,
}

fn identify(what: &'static str, cns: Cns, nsid: u32) -> AdminCommand {
    AdminCommand {
        what,
        opcode: AdminOpcode::IDENTIFY.0,
        nsid,
        cdw10_15: [u32::from(cns.0), 0, 0, 0, 0, 0],
        data_in_len: IDENTIFY_LEN,
        ..Default::default()
    }
}

fn set_feature(what: &'static str, feature: FeatureId, value: u32) -> AdminCommand {
    AdminCommand {
        what,
        opcode: AdminOpcode::SET_FEATURES.0,
        cdw10_15: [u32::from(feature.0), value, 0, 0, 0, 0],
        ..Default::default()
    }
}

impl Start {
    fn nsid(&self, index: usize) -> u32 {
        self.nsids.get(index).copied().unwrap_or(0)
    }
}

impl Controller {
    pub(crate) fn begin_start(&mut self) {
        self.begin_sequence(Step::Controller, false);
    }

    /// Nobody asks any more for the answer of its command.
    pub(crate) fn abandon_start(&mut self) {
        if let Some(start) = self.start.take() {
            self.admin.forget(start.token);
        }
    }

    pub(crate) fn begin_rescan(&mut self) {
        self.begin_sequence(Step::Changes, true);
    }

    fn begin_sequence(&mut self, step: Step, rescan: bool) {
        let now = self.now();
        let (nsids, namespaces) = (Vec::new(), Vec::new());
        let info = if rescan { self.info.clone() } else { ControllerInfo::default() };
        let command = self.step_command(step, 0, &info);
        match self.admin.submit(&command, now, Some(self.options.admin_timeout), false) {
            Ok(token) => self.start = Some(Start { step, token, info, nsids, namespaces, rescan }),
            // No room: later.
            Err(_) if rescan => self.rescan_due = true,
            Err(error) => self.begin_reset(error),
        }
        self.admin.ring(&*self.shared.access);
    }

    fn step_command(&self, step: Step, nsid: u32, info: &ControllerInfo) -> AdminCommand {
        match step {
            Step::Controller => identify("Identify Controller", Cns::CONTROLLER, 0),
            Step::NvmController => identify("Identify Controller (NVM)", Cns::IO_CONTROLLER, 0),
            Step::Queues => {
                let wanted_z = self.options.io_queues.clamp(1, u16::MAX - 1) - 1;
                let value = NumberOfQueues::new().with_nsq_z(wanted_z).with_ncq_z(wanted_z).into_bits();
                set_feature("Set Features (Number of Queues)", FeatureId::NUMBER_OF_QUEUES, value)
            }
            Step::Doorbells => AdminCommand {
                what: "Doorbell Buffer Config",
                opcode: AdminOpcode::DOORBELL_BUFFER_CONFIG.0,
                ..Default::default()
            },
            Step::WriteCache => set_feature(
                "Set Features (Volatile Write Cache)",
                FeatureId::VOLATILE_WRITE_CACHE,
                self.write_cache_wished.unwrap_or(true).into(),
            ),
            Step::Changes => get_log(LogPageId::CHANGED_NAMESPACES, u32::MAX, 0, IDENTIFY_LEN, false),
            Step::Events => {
                let notices = config::NAMESPACE_ATTRIBUTE | config::FIRMWARE_ACTIVATION;
                let value = config::SMART_CRITICAL & 0x1F | info.oaes & notices;
                set_feature(
                    "Set Features (Asynchronous Event Configuration)",
                    FeatureId::ASYNC_EVENT_CONFIG,
                    value,
                )
            }
            Step::List(after) => {
                identify("Identify (Active Namespace ID list)", Cns::ACTIVE_NAMESPACES, after)
            }
            Step::Namespace(_) => identify("Identify Namespace", Cns::NAMESPACE, nsid),
            Step::Descriptors(_) => {
                identify("Identify (Namespace Identification Descriptors)", Cns::NAMESPACE_DESCRIPTORS, nsid)
            }
        }
    }

    /// Goes on with the sequence when its command was answered.
    pub(crate) fn poll_start(&mut self, now: Moment) {
        let Some(start) = &self.start else { return };
        let Some(result) = self.admin.take(start.token) else { return };
        let Some(mut start) = self.start.take() else { return };
        match self.next_step(&mut start, result) {
            Err(error) if start.rescan => self.tell_rescan_failed(&error),
            Err(error) => self.begin_reset(error),
            Ok(None) => self.finish_start(start, now),
            Ok(Some(step)) => {
                let nsid = match step {
                    Step::Namespace(index) | Step::Descriptors(index) => start.nsid(index),
                    _ => 0,
                };
                let command = self.step_command(step, nsid, &start.info);
                let pointers = if step == Step::Doorbells { self.shadow_addresses() } else { (0, 0) };
                let limit = self.options.admin_timeout;
                match self.admin.submit_at(&command, pointers, now, Some(limit), false) {
                    Ok(token) => self.start = Some(Start { step, token, ..start }),
                    Err(error) if start.rescan => self.tell_rescan_failed(&error),
                    Err(error) => self.begin_reset(error),
                }
            }
        }
    }

    fn tell_rescan_failed(&self, error: &Error) {
        tracing::warn!(name = self.shared.access.name(), %error, "reading the namespaces anew failed");
    }

    fn finish_start(&mut self, start: Start, now: Moment) {
        let changed = self.namespaces != start.namespaces;
        self.namespaces = start.namespaces;
        if start.rescan {
            if changed {
                self.tell(Event::NamespacesChanged);
            }
            if let Some(nsid) = self.changed_under_queue() {
                // Its blocks may be other blocks now. Only a reset is sure to stop what is under way.
                let what = "it changed while it was in use; open it anew".to_owned();
                self.begin_reset(Error::Namespace { name: self.name(), nsid, what });
            }
        } else {
            self.info = start.info;
            self.become_ready(now);
        }
    }

    /// Books an answer: the step after it, or `None` at the end.
    fn next_step(
        &mut self,
        start: &mut Start,
        result: Result<AdminReply, Error>,
    ) -> Result<Option<Step>, Error> {
        let page_min = self.shared.page as u64;
        match start.step {
            Step::Controller => {
                let limit = self.options.transfer_len_max.clamp(4096, 2 << 20);
                start.info = ControllerInfo::parse(&result?.data, page_min, limit, self.quirks)
                    .ok_or_else(|| self.unsupported("its Identify data is too short"))?;
                Ok(Some(if self.quirks.old_identify_only { Step::Queues } else { Step::NvmController }))
            }
            Step::NvmController => {
                // Controllers before NVMe 2.0 need not know it; then there are no such limits.
                if let Ok(reply) = result {
                    start.info.add_nvm(&reply.data, page_min);
                }
                Ok(Some(Step::Queues))
            }
            Step::Queues => {
                let granted = NumberOfQueues::from_bits(result?.dw0);
                let most = granted.nsq_z().min(granted.ncq_z()).saturating_add(1);
                start.info.io_queues = most.min(self.options.io_queues.max(1));
                let shadow = start.info.shadow_doorbells && self.options.shadow_doorbells;
                let doorbells = shadow && self.prepare_shadow();
                Ok(Some(if doorbells { Step::Doorbells } else { self.after_doorbells(&start.info) }))
            }
            Step::Doorbells => {
                // Without them it goes on by registers, as before.
                self.finish_shadow(result.is_ok());
                Ok(Some(self.after_doorbells(&start.info)))
            }
            // Whoever turned it off relies on that.
            Step::WriteCache => result.map(|_| Some(Step::Events)),
            // Without the list everything is looked at all the same.
            Step::Changes => Ok(Some(Step::List(0))),
            // Events are a help, not a need.
            Step::Events => Ok(Some(Step::List(0))),
            Step::List(after) => {
                let more = add_to_list(&mut start.nsids, after, &result?.data);
                let next = start.nsids.last().copied().filter(|_| more).map(Step::List);
                Ok(next.or_else(|| (!start.nsids.is_empty()).then_some(Step::Namespace(0))))
            }
            Step::Namespace(index) => {
                let parsed = match result {
                    Ok(reply) => NamespaceInfo::parse(start.nsid(index), &reply.data, self.quirks),
                    // It may have been removed since it was listed.
                    Err(Error::Status { status, .. }) if is_not_there(status) => None,
                    Err(error) => return Err(error),
                };
                let found = parsed.is_some();
                start.namespaces.extend(parsed);
                if found && !self.quirks.old_identify_only && !self.quirks.no_descriptors {
                    return Ok(Some(Step::Descriptors(index)));
                }
                Ok(after(start, index))
            }
            Step::Descriptors(index) => {
                match (result, start.namespaces.last_mut()) {
                    (Ok(reply), Some(last)) => last.add_descriptors(&reply.data, self.quirks),
                    // Controllers before NVMe 1.3 do not know them.
                    (Err(Error::Status { status, .. }), _) if is_not_there(status) => {}
                    (Err(error), _) => return Err(error),
                    (Ok(_), None) => {}
                }
                Ok(after(start, index))
            }
        }
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::Unsupported { name: self.name(), what: what.to_owned() }
    }

    const fn after_doorbells(&self, info: &ControllerInfo) -> Step {
        match self.write_cache_wished {
            Some(_) if info.volatile_write_cache => Step::WriteCache,
            _ => Step::Events,
        }
    }

    /// Gets shadow doorbells ready; whether there is memory for them.
    fn prepare_shadow(&mut self) -> bool {
        let (page, dstrd) = (self.shared.page, self.shared.dstrd);
        if self.shadow_pages.is_none() {
            let memory = self.shared.queue_memory(ShadowPages::len(page)).ok();
            self.shadow_pages = memory.map(|mapping| ShadowPages::new(mapping, page, dstrd));
        }
        let Some(pages) = &self.shadow_pages else { return false };
        pages.clear();
        self.admin.set_shadow(pages.of_queue(0).map(Shadow::with_registers));
        true
    }

    /// PRP1 and PRP2 of Doorbell Buffer Config.
    fn shadow_addresses(&self) -> (u64, u64) {
        let addresses = self.shadow_pages.as_ref().and_then(ShadowPages::addresses);
        addresses.map_or((0, 0), |(shadow, event)| (shadow.0, event.0))
    }

    /// The controller has answered to them.
    fn finish_shadow(&mut self, granted: bool) {
        if granted {
            self.shared.set_shadow(self.shadow_pages.clone());
        } else {
            self.admin.set_shadow(None);
        }
    }

    /// Whether it is on its way to Ready.
    #[must_use]
    pub const fn is_starting(&self) -> bool {
        matches!(self.state, State::Disabling | State::Enabling | State::Starting)
    }
}

/// Whether a status says that the device has no such thing, rather than that it failed to tell.
fn is_not_there(status: Status) -> bool {
    matches!(status.code(), Status::INVALID_NAMESPACE | Status::INVALID_FIELD | Status::INVALID_OPCODE)
}

fn after(start: &Start, index: usize) -> Option<Step> {
    (index + 1 < start.nsids.len()).then_some(Step::Namespace(index + 1))
}

/// Adds a page of the list; whether there may be more. What does not rise is not believed.
fn add_to_list(nsids: &mut Vec<u32>, after: u32, data: &[u8]) -> bool {
    let mut last = after;
    for entry in data.as_chunks::<4>().0 {
        let nsid = u32::from_le_bytes(*entry);
        if nsid <= last || nsid >= 0xFFFF_FFFE || nsids.len() >= NAMESPACES_MAX {
            return false;
        }
        nsids.push(nsid);
        last = nsid;
    }
    nsids.len() < NAMESPACES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_ends_where_it_stops_rising() {
        let page = |ids: &[u32]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
        let mut nsids = Vec::new();
        assert!(!add_to_list(&mut nsids, 0, &page(&[1, 5, 0])));
        assert_eq!(nsids, [1, 5]);
        assert!(!add_to_list(&mut nsids, 5, &page(&[5, 6])), "not above 5");
        assert!(add_to_list(&mut nsids, 5, &page(&[6, 9])));
        assert!(!add_to_list(&mut nsids, 9, &page(&[u32::MAX])));
        let rising: Vec<u32> = (10..5000).collect();
        assert!(!add_to_list(&mut nsids, 9, &page(&rising)));
        assert_eq!(nsids.len(), NAMESPACES_MAX);
    }
}
