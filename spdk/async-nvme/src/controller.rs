//! The controller: reset, enable, ready, shutdown, and the end, as a state machine that is polled.
//!
//! ```text
//!   Idle --start--> Disabling --RDY 0--> Enabling --RDY 1--> Starting --identified--> Ready --shutdown--> ShuttingDown
//!                    ^   |                                                              |                      |
//!                    |   | late: function reset, once                                   |                   Stopped
//!                    |   v                                                              |
//!                    `-- fatal status, late command, broken protocol -------------------'
//!                        too often, or no way to reset: Failed          registers do not answer: Removed
//! ```
//!
//! Every wait has a deadline from CAP.TO (or CRTO) or the options. Nothing here sleeps or blocks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use nvme_spec::register::{Cap, Cc, Crto, Csts, Property};
use tracing::debug;

use crate::access::Access;
use crate::admin::{AdminCommand, AdminQueue, AdminReply, AdminToken, AdminTrouble, DATA_LEN};
use crate::bell::Bell;
use crate::clock::{Clock, Moment};
use crate::error::Error;
use crate::info::{ControllerInfo, NamespaceInfo};
use crate::jobs::Jobs;
use crate::link::{Shared, state, wish};
use crate::options::{Event, Options, State};
use crate::quirks::Quirks;
use crate::shadow::ShadowPages;
use crate::start::Start;

/// A controller, polled by one thread. Its queue pairs live on others.
#[derive(Debug)]
pub struct Controller {
    pub(crate) shared: Arc<Shared>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) options: Options,
    pub(crate) quirks: Quirks,
    pub(crate) cap: Cap,
    pub(crate) state: State,
    pub(crate) deadline: Moment,
    pub(crate) limit: Duration,
    /// CSTS is not read before (a quirk).
    pub(crate) quiet_until: Moment,
    pub(crate) reset_from_outside: bool,
    pub(crate) stopping: bool,
    pub(crate) admin: AdminQueue,
    pub(crate) start: Option<Start>,
    pub(crate) jobs: Jobs,
    pub(crate) info: ControllerInfo,
    pub(crate) namespaces: Vec<NamespaceInfo>,
    pub(crate) events: VecDeque<Event>,
    /// Event requests that are still to be made, and whether the namespaces are to be read anew.
    pub(crate) events_due: u16,
    pub(crate) rescan_due: bool,
    /// Whether the owner wants the volatile write cache on or off.
    pub(crate) write_cache_wished: Option<bool>,
    /// Kept for the next life.
    pub(crate) shadow_pages: Option<ShadowPages>,
    pub(crate) attached: bool,
    pub(crate) resets: u32,
    pub(crate) ready_since: Moment,
    pub(crate) status_at: Moment,
    pub(crate) failure: Option<Error>,
    /// The device could not be kept from memory.
    pub(crate) stranded: bool,
}

/// A shutdown is given this long at least, and at most, whatever the controller says that it needs.
const SHUTDOWN_LIMIT_MIN: Duration = Duration::from_secs(5);
const SHUTDOWN_LIMIT_MAX: Duration = Duration::from_secs(60);

/// CSTS, `None` when the device is gone. PCI Express has it that what nobody decodes reads as all ones, but some bridges
/// answer with zeros; a controller that is there has a version.
pub(crate) fn read_csts(access: &dyn Access) -> Option<Csts> {
    match access.read32(Property::CSTS.0) {
        u32::MAX => None,
        0 if access.read32(Property::VS.0) == 0 => None,
        bits => Some(Csts::from_bits(bits)),
    }
}

/// CAP of a device that can be driven.
fn read_cap(access: &dyn Access) -> Result<Cap, Error> {
    let name = access.name();
    let bits = access.read64(Property::CAP.0);
    if bits == u64::MAX || read_csts(access).is_none() {
        return Err(Error::Gone { name: name.to_owned() });
    }
    let cap = Cap::from_bits(bits);
    let unsupported = |what: &str| Error::Unsupported { name: name.to_owned(), what: what.to_owned() };
    if !cap.css_nvm() && !cap.css_iocs() {
        return Err(unsupported("it does not offer the NVM command set"));
    }
    if cap.mqes_z() == 0 {
        return Err(unsupported("its queues have one entry (CAP.MQES)"));
    }
    if cap.mpsmin() > 4 {
        return Err(unsupported("its memory pages are larger than 64 KiB (CAP.MPSMIN)"));
    }
    Ok(cap)
}

/// Events kept at most; the oldest goes first.
const EVENTS_MAX: usize = 64;

impl Controller {
    /// Looks at the device and makes the admin queue. Nothing is written to the device yet.
    ///
    /// # Errors
    /// When the device is gone, is one that cannot be driven, or memory cannot be had or mapped.
    pub fn new(access: Arc<dyn Access>, options: Options, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let name = access.name().to_owned();
        let unsupported = |what: &str| Error::Unsupported { name: name.clone(), what: what.to_owned() };
        let cap = read_cap(&*access)?;
        let id = access.config_read32(0).unwrap_or(u32::MAX).to_le_bytes();
        let quirks = Quirks::of(u16::from_le_bytes([id[0], id[1]]), u16::from_le_bytes([id[2], id[3]]));
        if let Some(why) = quirks.refusal {
            return Err(unsupported(why));
        }
        let page = 4096usize << cap.mpsmin();
        let failed = |source| Error::Eventfd { name: name.clone(), source: Arc::new(source) };
        let bell = options.interrupts.then(Bell::new).transpose().map_err(failed)?;
        let shared = Arc::new(Shared::new(access, cap.dstrd(), page, quirks.address_bits, bell));
        let layout = AdminQueue::layout(page, cap.mqes_z());
        let mapping = shared.queue_memory(layout.total_len)?;
        let admin = AdminQueue::new(name.clone(), mapping, layout, cap.dstrd())
            .ok_or_else(|| unsupported("the admin queue does not fit its memory"))?;
        Ok(Self {
            shared,
            clock,
            options,
            quirks,
            cap,
            state: State::Idle,
            deadline: Moment::default(),
            limit: Duration::ZERO,
            quiet_until: Moment::default(),
            reset_from_outside: false,
            stopping: false,
            admin,
            start: None,
            jobs: Jobs::default(),
            info: ControllerInfo::default(),
            namespaces: Vec::new(),
            events: VecDeque::with_capacity(EVENTS_MAX),
            events_due: 0,
            rescan_due: false,
            write_cache_wished: None,
            shadow_pages: None,
            attached: false,
            resets: 0,
            ready_since: Moment::default(),
            status_at: Moment::default(),
            failure: None,
            stranded: false,
        })
    }

    /// Where the controller stands.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Why it failed or was given up.
    #[must_use]
    pub const fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    /// What the controller is; empty until it was ready once.
    #[must_use]
    pub const fn info(&self) -> &ControllerInfo {
        &self.info
    }

    /// Its active namespaces, also those that cannot be used (see [`NamespaceInfo::refusal`]).
    #[must_use]
    pub fn namespaces(&self) -> &[NamespaceInfo] {
        &self.namespaces
    }

    /// The next event, if there is one.
    #[must_use]
    pub fn take_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(crate) fn tell(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    pub(crate) fn name(&self) -> String {
        self.shared.name()
    }

    pub(crate) fn now(&self) -> Moment {
        self.clock.now()
    }

    /// Begins with a reset of the controller, whatever state it was left in. Poll until it is ready.
    pub fn start(&mut self) {
        if self.state == State::Idle {
            self.disable();
        }
    }

    /// Starts a controller that is over anew: one that was shut down, that failed and was mended, or that is back after
    /// its removal (hot-add) behind the same access. Queue pairs of before are gone for good and are opened anew.
    /// Nothing is taken over from before: it may be another device, so its owner looks at [`Controller::info`] and
    /// [`Controller::namespaces`] again.
    ///
    /// An access that ends with the removal, as that of a PCI function does, needs a new access and a new controller.
    ///
    /// # Errors
    /// When it is not over, is still gone, can no longer be driven, or could not be cut off from memory.
    pub fn restart(&mut self) -> Result<(), Error> {
        if !self.is_over() || self.stranded {
            return Err(Error::NotReady { name: self.name() });
        }
        let cap = read_cap(&*self.shared.access)?;
        let same = (cap.mpsmin(), cap.dstrd()) == (self.cap.mpsmin(), self.cap.dstrd());
        if !same || cap.mqes_z() < self.admin.entries() - 1 {
            let what =
                "its memory page, doorbell stride or queue size changed: make a new controller".to_owned();
            return Err(Error::Unsupported { name: self.name(), what });
        }
        self.cap = cap;
        (self.info, self.namespaces) = (ControllerInfo::default(), Vec::new());
        (self.failure, self.stopping, self.resets) = (None, false, 0);
        self.shared.set_closed(false);
        self.disable();
        Ok(())
    }

    /// Resets the controller. Operations under way end with [`crate::IoError::Reset`], or are given to it anew where
    /// [`Options::requeue`] says so. It does not count among the resets after which a controller is given up.
    pub fn reset(&mut self) {
        if self.is_over() || self.state == State::Idle {
            return;
        }
        let error = Error::Reset { name: self.name() };
        self.tell(Event::Resetting(error));
        self.disable();
    }

    /// Begins an orderly end: CC.SHN, then disable. Operations under way end when the controller is disabled.
    pub fn begin_shutdown(&mut self) {
        match self.state {
            State::Ready | State::Starting => {
                let cc = Cc::from_bits(self.shared.access.read32(Property::CC.0));
                self.hold_links();
                self.shared.access.write32(Property::CC.0, cc.with_shn(0b01).into_bits());
                let told = Duration::from_micros(self.info.shutdown_us.into()).min(SHUTDOWN_LIMIT_MAX);
                self.enter(State::ShuttingDown, self.ready_limit().max(told).max(SHUTDOWN_LIMIT_MIN));
                self.stopping = true;
            }
            State::Disabling | State::Enabling => self.stopping = true,
            State::Idle => self.state = State::Stopped,
            _ => {}
        }
    }

    /// Gives an admin command to the controller, to be asked for with [`Controller::take_admin`].
    ///
    /// # Errors
    /// When the controller is not ready, too many are open, or the data is too much for one command.
    pub fn submit_admin(&mut self, command: &AdminCommand) -> Result<AdminToken, Error> {
        if self.state != State::Ready {
            return Err(Error::NotReady { name: self.name() });
        }
        let bytes = command.data_len();
        if bytes > DATA_LEN {
            return Err(Error::TooLarge { bytes });
        }
        if !self.admin.has_room_for_owner() {
            return Err(Error::Exhausted { name: self.name(), what: "admin command" });
        }
        let (now, limit) = (self.now(), self.options.admin_timeout);
        let token = self.admin.submit(command, now, Some(limit), false)?;
        self.admin.ring(&*self.shared.access);
        Ok(token)
    }

    /// The answer to an admin command, once; `None` while there is none.
    pub fn take_admin(&mut self, token: AdminToken) -> Option<Result<AdminReply, Error>> {
        self.admin.take(token)
    }

    /// Whether it will never be ready (again), unless it is started anew.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.state, State::Stopped | State::Failed | State::Removed)
    }

    /// Does what is due, and returns at once: where the controller stands now.
    pub fn poll(&mut self) -> State {
        let now = self.now();
        match self.state {
            State::Idle | State::Stopped | State::Failed | State::Removed => {}
            State::Disabling | State::Enabling | State::ShuttingDown => {
                if now >= self.quiet_until {
                    self.watch_status(now);
                }
            }
            State::Starting | State::Ready => self.work(now),
        }
        self.state
    }

    fn work(&mut self, now: Moment) {
        if now >= self.status_at || self.state == State::Starting {
            self.status_at = now.after(self.options.status_every);
            let csts = self.csts();
            if self.look_at(csts) {
                return;
            }
        }
        let trouble = match self.admin.poll(&*self.shared.access, now) {
            Ok(_) => None,
            Err(AdminTrouble::Violation(what)) => Some(Error::Violation { name: self.name(), what }),
            Err(AdminTrouble::Timeout(command)) => Some(Error::Timeout { name: self.name(), command }),
        };
        let wished = match self.shared.take_wish() {
            wish::TIMEOUT => Some(Error::IoTimeout { name: self.name() }),
            wish::VIOLATION => {
                Some(Error::Violation { name: self.name(), what: "a completion of no open i/o command" })
            }
            _ => None,
        };
        if let Some(error) = trouble.or(wished) {
            self.begin_reset(error);
            return;
        }
        self.poll_start(now);
        if self.state == State::Ready {
            self.poll_jobs(now);
            self.poll_events(now);
        }
        self.admin.ring(&*self.shared.access);
    }

    /// Becomes ready: called when everything is identified.
    pub(crate) fn become_ready(&mut self, now: Moment) {
        self.state = State::Ready;
        self.ready_since = now;
        debug!(name = self.shared.access.name(), queues = self.info.io_queues, "controller is ready");
        self.tell(Event::Ready);
        self.begin_events();
    }

    /// CSTS, `None` when the device is gone.
    fn csts(&self) -> Option<Csts> {
        read_csts(&*self.shared.access)
    }

    /// Acts on a device that is gone, has failed or was disabled by others, while it should be at work; whether it was.
    pub(crate) fn look_at(&mut self, csts: Option<Csts>) -> bool {
        match csts {
            None => {
                self.end(State::Removed, Error::Gone { name: self.name() });
                true
            }
            Some(csts) if csts.cfs() => {
                let error = Error::Fatal { name: self.name() };
                self.begin_reset(error);
                true
            }
            // Somebody reset the function, or it restarted by itself: it has no queues any more, and will never answer.
            Some(csts) if !csts.rdy() => {
                let error = Error::Disabled { name: self.name() };
                self.begin_reset(error);
                true
            }
            Some(_) => false,
        }
    }

    fn watch_status(&mut self, now: Moment) {
        let Some(csts) = self.csts() else {
            self.end(State::Removed, Error::Gone { name: self.name() });
            return;
        };
        match self.state {
            State::Disabling if !csts.rdy() => self.disabled(),
            State::Disabling if now >= self.deadline => self.disable_late(),
            State::Enabling if csts.cfs() => {
                let error = Error::Fatal { name: self.name() };
                self.begin_reset(error);
            }
            State::Enabling if csts.rdy() => {
                self.state = State::Starting;
                self.begin_start();
            }
            State::Enabling if now >= self.deadline => {
                let error = self.late("become ready");
                self.begin_reset(error);
            }
            // A shutdown that is not confirmed ends in a disable all the same.
            State::ShuttingDown if csts.shst() == 0b10 || csts.cfs() || now >= self.deadline => {
                self.disable()
            }
            _ => {}
        }
    }

    pub(crate) fn late(&self, what: &'static str) -> Error {
        Error::Late {
            name: self.name(),
            what,
            limit_ms: u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX),
        }
    }

    pub(crate) fn enter(&mut self, state: State, limit: Duration) {
        self.state = state;
        self.limit = limit;
        self.deadline = self.now().after(limit);
    }

    /// The worst time for CSTS.RDY to follow CC.EN: CAP.TO, or CRTO.CRWMT where that says more.
    pub(crate) fn ready_limit(&self) -> Duration {
        let mut units = u32::from(self.cap.to()).max(1);
        if self.cap.crwms() {
            let crto = self.shared.access.read32(Property::CRTO.0);
            if crto != u32::MAX {
                units = units.max(u32::from(Crto::from_bits(crto).crwmt()));
            }
        }
        (Duration::from_millis(500) * units).min(self.options.ready_limit_max)
    }
}

impl Drop for Controller {
    /// A controller that is dropped in use is cut off from memory at once; shut it down first to spare it that.
    fn drop(&mut self) {
        if !self.is_over() && self.state != State::Idle {
            self.end(State::Failed, Error::NotReady { name: self.name() });
        }
        self.disarm();
        self.shared.set_closed(true);
        self.settle_links(state::GONE);
        if !self.stranded {
            self.shared.unmap_all();
        }
    }
}
