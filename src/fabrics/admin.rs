//! Admin queues: registers, admin commands, parked Asynchronous Event Requests, and the timers of the controller
//! (NVM Express Base Specification 2.1, section 5).
//!
//! ```text
//!   begin --+-- Fabrics: Property Get, Property Set         (registers)
//!           +-- Identify (identify)    Get Log Page (logs)   Get, Set Features (features)
//!           +-- Asynchronous Event Request (events)          Keep Alive, Abort (here)
//!   poll ---+-- what other cores called for: notices, drained I/O queues, the end
//!           +-- the keep alive and idle timers (clock)
//! ```

use std::sync::Arc;
use std::time::Instant;

use nvme_spec::fabrics::{FabricsCommandType, PropertyGetCommand, PropertySetCommand};
use nvme_spec::log::LogPageId;
use nvme_spec::{AdminOpcode, Cid, Status, SubmissionQueueEntry};
use zerocopy::{FromBytes, IntoBytes};

use super::beat::Beat;
use super::clock::{Clock, Waiting};
use super::command::{CommandError, at, check_flags};
use super::controller::Controller;
use super::events::Events;
use super::exchange::{Arrival, Begin, CloseReason, Completion, SessionEvent};
use super::features::{self, Features};
use super::options::ADMIN_IN_CAPSULE_BYTES;
use super::registers::{CcEffect, Registers};
use super::subsystem::SubsystemKind;
use super::target::Target;
use super::{identify, logs, sgl};

/// The admin queue of one controller.
pub(super) struct AdminQueue {
    target: Arc<Target>,
    controller: Arc<Controller>,
    arrival: Arrival,
    beat: Arc<Beat>,
    registers: Registers,
    features: Features,
    clock: Clock,
    events: Events,
    ended: Option<CloseReason>,
}

impl AdminQueue {
    /// The admin queue of a controller that is not enabled yet.
    pub(super) fn new(
        target: Arc<Target>,
        controller: Arc<Controller>,
        arrival: Arrival,
        beat: Arc<Beat>,
        kato_ms: u32,
        now: Instant,
    ) -> Self {
        let discovery = controller.subsystem.kind == SubsystemKind::Discovery;
        let registers = Registers::new(discovery, target.options().queue_entries_max);
        let clock = Clock::new(kato_ms, discovery, now);
        Self {
            target,
            controller,
            arrival,
            beat,
            registers,
            features: Features::default(),
            clock,
            events: Events::default(),
            ended: None,
        }
    }

    pub(super) fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// When [`AdminQueue::poll`] has to look at the timers.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        if self.ended.is_some() { None } else { self.clock.deadline() }
    }

    /// The connection is gone, and the controller with it.
    pub(super) fn leave(self) {
        self.controller.leave_admin(CloseReason::AdminQueueGone);
    }

    /// Takes a command.
    pub(super) fn begin(&mut self, sqe: &SubmissionQueueEntry, now: Instant) -> Result<Begin, CommandError> {
        self.beat.command();
        check_flags(sqe)?;
        if self.controller.ended().is_some() {
            return Err(CommandError::retryable(Status::ABORTED_SQ_DELETION));
        }
        if sqe.opcode == AdminOpcode::FABRICS.0 {
            return self.fabrics(sqe, now);
        }
        if !self.registers.is_ready() {
            return Err(CommandError::sequence());
        }
        match AdminOpcode(sqe.opcode) {
            AdminOpcode::IDENTIFY => self.identify(sqe),
            AdminOpcode::GET_LOG_PAGE => self.get_log_page(sqe),
            AdminOpcode::GET_FEATURES => self.get_features(sqe),
            AdminOpcode::SET_FEATURES => self.set_features(sqe, now),
            AdminOpcode::ASYNC_EVENT_REQUEST => self.async_event_request(sqe),
            AdminOpcode::KEEP_ALIVE => Ok(Begin::Respond(Completion::SUCCESS)),
            AdminOpcode::ABORT if !self.is_discovery() => Ok(self.abort(sqe)),
            _ => Err(CommandError::opcode()),
        }
    }

    /// Takes the data of a Set Features command.
    pub(super) fn finish(&mut self, sqe: &SubmissionQueueEntry, data: &[u8]) -> Result<Begin, CommandError> {
        if AdminOpcode(sqe.opcode) != AdminOpcode::SET_FEATURES || !self.registers.is_ready() {
            return Err(CommandError::sequence());
        }
        features::set_data(&mut self.features, sqe, data)?;
        self.controller.set_retries_later(self.features.retries_later());
        Ok(Begin::Respond(Completion::SUCCESS))
    }

    /// What the queue wants now.
    pub(super) fn poll(&mut self, now: Instant) -> Option<SessionEvent> {
        if self.ended.is_none() && self.controller.take_attention() {
            self.look(now);
        }
        if let Some(event) = self.events.next() {
            self.target.counters.events_sent.bump();
            return Some(event);
        }
        if let Some(event) = self.events.next_aborted() {
            return Some(event);
        }
        self.tick(now);
        self.ended.map(SessionEvent::Close)
    }

    /// Takes in what other cores did.
    fn look(&mut self, now: Instant) {
        self.ended = self.controller.ended();
        self.advance(now);
        let changes = self.controller.take_notices();
        self.events.note(changes);
    }

    /// Ends the controller when its time is up.
    fn tick(&mut self, now: Instant) {
        let controller = &self.controller;
        let beat = &self.beat;
        let commands = || controller.io_commands().wrapping_add(beat.commands());
        if self.ended.is_some() || !self.clock.expired(commands, now) {
            return;
        }
        let (reason, counter) = if self.clock.is_keep_alive() {
            (CloseReason::KeepAliveExpired, &self.target.counters.keep_alive_expired)
        } else {
            (CloseReason::Idle, &self.target.counters.idle_expired)
        };
        if self.controller.end(reason) {
            counter.bump();
            tracing::warn!(
                controller = %self.controller.label(0), kato_ms = self.clock.kato_ms(), "{reason}"
            );
        }
        self.ended = self.controller.ended();
    }

    fn commands(&self) -> u64 {
        self.controller.io_commands().wrapping_add(self.beat.commands())
    }

    fn is_discovery(&self) -> bool {
        self.controller.subsystem.kind == SubsystemKind::Discovery
    }

    /// Lets the registers follow what is in flight.
    fn advance(&mut self, now: Instant) {
        let past = self.registers.is_enabled()
            && !self.registers.is_ready()
            && self.controller.subsystem.has_dying_predecessor(&self.controller);
        if self.registers.advance(self.controller.is_drained(), past) {
            self.controller.open_for_io();
        }
        let waiting = if self.registers.is_enabled() { Waiting::Life } else { Waiting::Enable };
        self.clock.wait_for(waiting, self.commands(), now);
    }

    fn fabrics(&mut self, sqe: &SubmissionQueueEntry, now: Instant) -> Result<Begin, CommandError> {
        self.advance(now);
        match FabricsCommandType(sgl::fctype(sqe)) {
            FabricsCommandType::PROPERTY_GET => {
                let get = PropertyGetCommand::read_from_bytes(sqe.as_bytes()).unwrap_or_default();
                let value = self.registers.get(get.attrib, get.ofst.get())?;
                let [dw0, dw1] = [value & 0xFFFF_FFFF, value >> 32].map(|half| half.try_into().unwrap_or(0));
                Ok(Begin::Respond(Completion { dw0, dw1, status: Status::SUCCESS }))
            }
            FabricsCommandType::PROPERTY_SET => {
                let set = PropertySetCommand::read_from_bytes(sqe.as_bytes()).unwrap_or_default();
                let effect = self.registers.set(set.attrib, set.ofst.get(), set.value.get())?;
                self.carry_out(effect);
                self.advance(now);
                Ok(Begin::Respond(Completion::SUCCESS))
            }
            FabricsCommandType::CONNECT => Err(CommandError::sequence()),
            // Disconnect is for I/O queues (section 6.4).
            FabricsCommandType::DISCONNECT => Err(CommandError::fatal(Status::DISCONNECT_INVALID_QUEUE_TYPE)),
            // No authentication was asked for, and none is supported.
            _ => Err(CommandError::field(at::FCTYPE)),
        }
    }

    fn carry_out(&mut self, effect: CcEffect) {
        match effect {
            CcEffect::None | CcEffect::Enable => {}
            CcEffect::ShutDown => {
                tracing::info!(controller = %self.controller.label(0), "shut down by the host");
                self.controller.end_io();
            }
            CcEffect::Reset => {
                tracing::debug!(controller = %self.controller.label(0), "reset by the host");
                self.controller.end_io();
                self.controller.grant_io_queues(self.target.options().io_queues_max);
                self.controller.take_notices();
                self.controller.changed_namespaces(true);
                self.features = Features::default();
                self.controller.set_retries_later(false);
                self.controller.set_knows_ana(false);
                self.events.reset();
                // Parked requests complete in the next poll.
                self.controller.call_admin();
            }
        }
    }

    fn identify(&self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        let page = if self.is_discovery() {
            identify::discovery(&self.target, &self.controller, sqe)?
        } else {
            identify::nvm(&self.target, &self.controller, sqe)?
        };
        reply(sqe, page)
    }

    fn get_log_page(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        let request = logs::Request::parse(sqe)?;
        let page = logs::page(&self.target, &self.controller, &self.arrival, &request)?;
        let part = request.part_of(page)?;
        let begin = reply(sqe, part)?;
        if request.page == LogPageId::ANA {
            self.controller.set_knows_ana(true);
        }
        if !request.retain_event && self.events.acknowledge(request.page) {
            self.controller.changed_namespaces(true);
        }
        Ok(begin)
    }

    fn get_features(&self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        let context = features::Context {
            controller: &self.controller,
            kato_ms: self.clock.kato_ms(),
            events: self.events.enabled(),
            io_queues: self.controller.io_queues_granted(),
            io_queues_max: self.target.options().io_queues_max,
        };
        match features::get(&self.features, &context, sqe)? {
            features::Value::Dword(dw0) => Ok(Begin::Respond(Completion::with_dw0(dw0))),
            features::Value::Data(data) => {
                if location_len(sqe)? < data.len() {
                    return Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
                }
                Ok(Begin::SendData { data, completion: Completion::SUCCESS })
            }
        }
    }

    fn set_features(&mut self, sqe: &SubmissionQueueEntry, now: Instant) -> Result<Begin, CommandError> {
        let max = self.target.options().io_queues_max;
        Ok(match features::set(&mut self.features, &self.controller, max, sqe)? {
            features::Change::Done(dw0) => Begin::Respond(Completion::with_dw0(dw0)),
            features::Change::KeepAlive { kato_ms } => {
                self.clock.set_kato_ms(kato_ms, self.commands(), now);
                Begin::Respond(Completion::SUCCESS)
            }
            features::Change::Events { enabled } => {
                self.events.enable(enabled);
                Begin::Respond(Completion::SUCCESS)
            }
            features::Change::Data { len } => {
                if location_len(sqe)? != len as usize {
                    return Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
                }
                Begin::NeedData { len }
            }
        })
    }

    fn async_event_request(&mut self, sqe: &SubmissionQueueEntry) -> Result<Begin, CommandError> {
        if !self.events.park(sqe.cid()) {
            return Err(CommandError::fatal(Status::ASYNC_EVENT_LIMIT_EXCEEDED));
        }
        if self.events.is_due() {
            self.controller.call_admin();
        }
        Ok(Begin::Park)
    }

    /// The host uses the identifier of a parked request for a register: see [`QueueSession::gives_up_event_request`].
    ///
    /// [`QueueSession::gives_up_event_request`]: super::QueueSession::gives_up_event_request
    pub(super) fn gives_up_event_request(&mut self, sqe: &SubmissionQueueEntry) -> bool {
        let is_register = sqe.opcode == AdminOpcode::FABRICS.0
            && matches!(
                FabricsCommandType(sgl::fctype(sqe)),
                FabricsCommandType::PROPERTY_GET | FabricsCommandType::PROPERTY_SET
            );
        is_register && self.events.forget(sqe.cid())
    }

    /// Abort (section 5.1.1) reaches parked requests only: everything else is on its way already.
    fn abort(&mut self, sqe: &SubmissionQueueEntry) -> Begin {
        self.target.counters.aborts.bump();
        let [sqid_low, sqid_high, cid_low, cid_high] = sqe.cdw10.get().to_le_bytes();
        let sqid = u16::from_le_bytes([sqid_low, sqid_high]);
        let cid = Cid(u16::from_le_bytes([cid_low, cid_high]));
        let aborted = sqid == 0 && self.events.abort(cid);
        if aborted {
            self.controller.call_admin();
        }
        Begin::Respond(Completion::with_dw0(u32::from(!aborted)))
    }
}

/// Sends `data`, which is as long as the command says, or refuses an SGL of another length.
fn reply(sqe: &SubmissionQueueEntry, data: Vec<u8>) -> Result<Begin, CommandError> {
    if location_len(sqe)? != data.len() {
        return Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
    }
    Ok(Begin::SendData { data, completion: Completion::SUCCESS })
}

fn location_len(sqe: &SubmissionQueueEntry) -> Result<usize, CommandError> {
    Ok(sgl::locate(sqe, ADMIN_IN_CAPSULE_BYTES)?.len() as usize)
}
