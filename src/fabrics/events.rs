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

/// What hosts can be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// A namespace came, went, or is another one.
    Namespace,
    /// The ANA state of a namespace.
    Ana,
    /// The discovery log.
    Discovery,
}

impl Change {
    const ALL: [Self; 3] = [Self::Namespace, Self::Ana, Self::Discovery];

    /// Its bit of Asynchronous Event Configuration.
    const fn enable_bit(self) -> u32 {
        match self {
            Self::Namespace => config::NAMESPACE_ATTRIBUTE,
            Self::Ana => config::ANA_CHANGE,
            Self::Discovery => config::DISCOVERY_LOG_CHANGE,
        }
    }

    /// What the event says, and the log page that shows it.
    const fn event(self) -> (NoticeEvent, LogPageId) {
        match self {
            Self::Namespace => (NoticeEvent::NAMESPACE_ATTRIBUTE_CHANGED, LogPageId::CHANGED_NAMESPACES),
            Self::Ana => (NoticeEvent::ANA_CHANGE, LogPageId::ANA),
            Self::Discovery => (NoticeEvent::DISCOVERY_LOG_CHANGE, LogPageId::DISCOVERY),
        }
    }
}

/// A set of [`Change`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changes(u8);

impl Changes {
    /// Adds one.
    pub(super) fn add(&mut self, change: Change) {
        self.0 |= 1 << change as u8;
    }

    /// Whether `change` is one of them.
    pub(super) const fn has(self, change: Change) -> bool {
        self.0 & 1 << change as u8 != 0
    }
}

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
    /// By the number of the [`Change`].
    notices: [Notice; Change::ALL.len()],
}

impl Events {
    /// Asynchronous Event Configuration as the host set it.
    pub(super) fn enabled(&self) -> u32 {
        self.enabled
    }

    /// Sets Asynchronous Event Configuration. An event that is pending and no longer wanted is forgotten.
    pub(super) fn enable(&mut self, enabled: u32) {
        self.enabled = enabled;
        for (change, notice) in Change::ALL.into_iter().zip(&mut self.notices) {
            if enabled & change.enable_bit() == 0 && *notice == Notice::Pending {
                *notice = Notice::Idle;
            }
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
        self.notices.contains(&Notice::Pending) && !self.parked.is_empty()
    }

    /// Something happened.
    pub(super) fn note(&mut self, changes: Changes) {
        for (change, notice) in Change::ALL.into_iter().zip(&mut self.notices) {
            let is_wanted = self.enabled & change.enable_bit() != 0;
            if changes.has(change) && is_wanted && *notice == Notice::Idle {
                *notice = Notice::Pending;
            }
        }
    }

    /// The next event to tell.
    pub(super) fn next(&mut self) -> Option<SessionEvent> {
        let mut notices = Change::ALL.into_iter().zip(&mut self.notices);
        let (change, notice) = notices.find(|(_, notice)| **notice == Notice::Pending)?;
        let (information, page) = change.event();
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
        for (change, notice) in Change::ALL.into_iter().zip(&mut self.notices) {
            if change.event().1 == page {
                *notice = Notice::Idle;
            }
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

    /// The host has forgotten a parked request, or one that a reset has ended and that is not answered yet: it will never
    /// complete. `false` when there is none of that identifier.
    pub(super) fn forget(&mut self, cid: Cid) -> bool {
        let before = self.parked.len() + self.aborted.len();
        self.parked.retain(|&parked| parked != cid);
        self.aborted.retain(|&(aborted, _)| aborted != cid);
        self.parked.len() + self.aborted.len() < before
    }

    /// Controller Level Reset: nothing is enabled or pending any more, and parked requests end.
    pub(super) fn reset(&mut self) {
        let ended = self.parked.drain(..).map(|cid| (cid, Status::ABORTED_SQ_DELETION));
        self.aborted.extend(ended);
        self.enabled = 0;
        self.notices = <[Notice; Change::ALL.len()]>::default();
    }
}
