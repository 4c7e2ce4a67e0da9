//! Asynchronous events of one controller (NVM Express Base Specification 2.1, section 5.1.2).
//!
//! ```text
//!   notice --(enabled?)--> Pending --(a request is parked)--> Told --(log page read, RAE clear)--> Idle
//! ```
//!
//! While an event is told and its log page is not read, more of its kind are kept back: the page will show them.

use std::collections::VecDeque;

use nvme_spec::aer::{AsyncEventType, NoticeEvent, config, event_dw0};
use nvme_spec::log::LogPageId;
use nvme_spec::{Cid, Status};

use super::exchange::{Completion, SessionEvent};
use super::options::AER_MAX;

/// How far one kind of event is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Notice {
    #[default]
    Idle,
    Pending,
    Told,
}

/// The events and parked requests of one controller.
#[derive(Debug, Default)]
pub(super) struct Events {
    enabled: u32,
    parked: VecDeque<Cid>,
    aborted: VecDeque<(Cid, Status)>,
    namespace: Notice,
    discovery: Notice,
}

impl Events {
    /// Asynchronous Event Configuration as the host set it.
    pub(super) fn enabled(&self) -> u32 {
        self.enabled
    }

    /// Sets Asynchronous Event Configuration. An event that is pending and no longer wanted is forgotten.
    pub(super) fn enable(&mut self, enabled: u32) {
        self.enabled = enabled;
        if enabled & config::NAMESPACE_ATTRIBUTE == 0 && self.namespace == Notice::Pending {
            self.namespace = Notice::Idle;
        }
        if enabled & config::DISCOVERY_LOG_CHANGE == 0 && self.discovery == Notice::Pending {
            self.discovery = Notice::Idle;
        }
    }

    /// Parks a request; `false` when there are as many as AERL allows.
    pub(super) fn park(&mut self, cid: Cid) -> bool {
        let room = self.parked.len() < AER_MAX;
        if room {
            self.parked.push_back(cid);
        }
        room
    }

    /// Whether [`Events::next`] would give something.
    pub(super) fn is_due(&self) -> bool {
        let pending = self.namespace == Notice::Pending || self.discovery == Notice::Pending;
        pending && !self.parked.is_empty()
    }

    /// Something happened.
    pub(super) fn note(&mut self, namespace: bool, discovery: bool) {
        if namespace && self.enabled & config::NAMESPACE_ATTRIBUTE != 0 && self.namespace == Notice::Idle {
            self.namespace = Notice::Pending;
        }
        if discovery && self.enabled & config::DISCOVERY_LOG_CHANGE != 0 && self.discovery == Notice::Idle {
            self.discovery = Notice::Pending;
        }
    }

    /// The next event to tell.
    pub(super) fn next(&mut self) -> Option<SessionEvent> {
        if !self.is_due() {
            return None;
        }
        let (information, page, notice) = if self.namespace == Notice::Pending {
            let changed = NoticeEvent::NAMESPACE_ATTRIBUTE_CHANGED;
            (changed, LogPageId::CHANGED_NAMESPACES, &mut self.namespace)
        } else {
            (NoticeEvent::DISCOVERY_LOG_CHANGE, LogPageId::DISCOVERY, &mut self.discovery)
        };
        let cid = self.parked.pop_front()?;
        *notice = Notice::Told;
        let dw0 = event_dw0(AsyncEventType::NOTICE, information.0, page.0);
        Some(SessionEvent::Complete { cid, completion: Completion::with_dw0(dw0) })
    }

    /// The next request that was aborted.
    pub(super) fn next_aborted(&mut self) -> Option<SessionEvent> {
        let (cid, status) = self.aborted.pop_front()?;
        Some(SessionEvent::Complete { cid, completion: Completion::of(status) })
    }

    /// A log page was read with Retain Asynchronous Event clear: its event may be told anew. Gives whether it was the
    /// changed namespace list, which the reading empties.
    pub(super) fn acknowledge(&mut self, page: LogPageId) -> bool {
        match page {
            LogPageId::CHANGED_NAMESPACES => self.namespace = Notice::Idle,
            LogPageId::DISCOVERY => self.discovery = Notice::Idle,
            _ => {}
        }
        page == LogPageId::CHANGED_NAMESPACES
    }

    /// Aborts a parked request; `false` when there is none of that identifier.
    pub(super) fn abort(&mut self, cid: Cid) -> bool {
        let Some(at) = self.parked.iter().position(|&parked| parked == cid) else { return false };
        self.parked.remove(at);
        self.aborted.push_back((cid, Status::COMMAND_ABORT_REQUESTED));
        true
    }

    /// Controller Level Reset: nothing is enabled or pending any more, and parked requests end.
    pub(super) fn reset(&mut self) {
        let ended = self.parked.drain(..).map(|cid| (cid, Status::ABORTED_SQ_DELETION));
        self.aborted.extend(ended);
        (self.enabled, self.namespace, self.discovery) = (0, Notice::Idle, Notice::Idle);
    }
}
