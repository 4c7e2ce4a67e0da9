//! The thread that drives one controller: the control core of the driver, apart from all I/O.
//!
//! ```text
//!   reach --> start --> ready: serve questions, watch events  --failed, removed--> devices are lost
//!     ^                   | namespaces as before: devices are back                     |
//!     '---- again, after 1, 2, 4 ... 30 s <--------------------------------------------'
//! ```
//!
//! It sleeps between two looks: a short time while the controller has something to do for it, a longer one otherwise.
//! Nothing on the I/O path waits for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use async_nvme::{
    Clock as _, Controller, Error, Event, IoError, IoQueue, Op, OpKind, Options, State, SystemClock,
};
use hugepage_alloc::{BufferPool, RegionOptions};

use super::controller::{Ask, NvmeDescription};
use super::device::{Epoch, Shared, Standing, await_creation};
use super::reach::{NvmeWay, Reach};
use crate::block::{BlockError, BlockErrorKind, OpenError};

/// Between two looks at a controller that is about something.
const BUSY_LOOK: Duration = Duration::from_micros(50);
/// Between two looks at one that is not.
const IDLE_LOOK: Duration = Duration::from_millis(2);
/// How long a controller is taken to be about something after it was asked for a queue.
const BUSY_FOR: Duration = Duration::from_millis(500);
/// The first pause before a lost controller is looked for, which doubles up to the longest.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(30);
/// How long whoever had the controller before may take to let it go.
const REACH_PATIENCE: Duration = Duration::from_secs(5);
const REACH_PAUSE: Duration = Duration::from_millis(50);
/// How long an orderly end may take before the controller is cut off.
const STOP_PATIENCE: Duration = Duration::from_secs(15);
/// How long the end of a queue pair is waited for. One that takes longer is one that cores have to do without.
const DELETE_PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of buffers for the thread's own reads.
const READ_POOL_BYTES: usize = 2 << 20;

/// What the thread has.
pub(super) struct Keeper {
    way: NvmeWay,
    reach: Arc<dyn Reach>,
    options: Options,
    clock: Arc<SystemClock>,
    controller: Option<Controller>,
    stands_on: Option<(u32, u32)>,
    devices: Vec<Arc<Shared>>,
    /// For reads of the thread's own: a queue pair of each namespace that was read.
    pool: Option<BufferPool>,
    readers: Vec<(u32, IoQueue)>,
    busy_until: Instant,
    retry_at: Instant,
    retry_after: Duration,
}

enum Turn {
    GoOn,
    Stop,
}

impl Keeper {
    pub(super) fn new(way: NvmeWay, reach: Arc<dyn Reach>, options: Options) -> Self {
        let now = Instant::now();
        Self {
            way,
            reach,
            options,
            clock: Arc::default(),
            controller: None,
            stands_on: None,
            devices: Vec::new(),
            pool: None,
            readers: Vec::new(),
            busy_until: now,
            retry_at: now,
            retry_after: RETRY_FIRST,
        }
    }

    /// Runs until it is told to stop. `up` hears once whether the controller has become ready.
    pub(super) fn run(mut self, inbox: &Receiver<Ask>, up: &Sender<Result<(), OpenError>>) {
        let started = self.begin_patiently().and_then(|()| self.await_ready());
        let is_up = started.is_ok();
        // The starter waits for exactly one message.
        let _ = up.send(started);
        if is_up {
            while matches!(self.turn(inbox), Turn::GoOn) {}
        }
        self.stop();
    }

    /// As [`Keeper::begin`], for a controller that somebody else still lets go of.
    fn begin_patiently(&mut self) -> Result<(), OpenError> {
        let deadline = Instant::now() + REACH_PATIENCE;
        loop {
            match self.begin() {
                Err(OpenError::Reach(error)) if error.may_pass() && Instant::now() < deadline => {
                    tracing::debug!(name = %self.way, %error, "not to be had yet");
                    std::thread::sleep(REACH_PAUSE);
                }
                other => return other,
            }
        }
    }

    /// Reaches the controller and starts it.
    fn begin(&mut self) -> Result<(), OpenError> {
        let reached = self.reach.reach(&self.way)?;
        let failed = |source| OpenError::Nvme { name: self.way.to_string(), source };
        let mut controller =
            Controller::new(reached.access, self.options.clone(), self.clock.clone()).map_err(failed)?;
        controller.start();
        (self.controller, self.stands_on) = (Some(controller), reached.stands_on);
        Ok(())
    }

    /// By the controller's own deadlines.
    fn await_ready(&mut self) -> Result<(), OpenError> {
        let name = self.way.to_string();
        let Some(controller) = &mut self.controller else { return Err(OpenError::NvmeSilent { name }) };
        loop {
            match controller.poll() {
                State::Ready => return Ok(()),
                _ if controller.is_over() => {
                    let gone = || Error::Gone { name: name.clone() };
                    let source = controller.failure().cloned().unwrap_or_else(gone);
                    return Err(OpenError::Nvme { name, source });
                }
                _ => std::thread::sleep(BUSY_LOOK),
            }
        }
    }

    fn turn(&mut self, inbox: &Receiver<Ask>) -> Turn {
        match inbox.recv_timeout(self.pause()) {
            Ok(Ask::Stop) | Err(RecvTimeoutError::Disconnected) => return Turn::Stop,
            Ok(ask) => self.answer(ask),
            Err(RecvTimeoutError::Timeout) => {}
        }
        // Whoever let a device go has dropped its half.
        self.devices.retain(|device| Arc::strong_count(device) > 1);
        match &mut self.controller {
            Some(controller) => {
                controller.poll();
                self.hear();
                self.look_at_seats();
            }
            None if Instant::now() >= self.retry_at => self.retry(),
            None => {}
        }
        Turn::GoOn
    }

    fn pause(&self) -> Duration {
        let now = Instant::now();
        match &self.controller {
            None => self.retry_at.saturating_duration_since(now),
            Some(controller) if controller.state() != State::Ready || now < self.busy_until => BUSY_LOOK,
            Some(_) => IDLE_LOOK,
        }
    }

    fn answer(&mut self, ask: Ask) {
        // Whoever asked may have lost patience; then there is nobody to tell.
        match ask {
            Ask::Describe(reply) => drop(reply.send(self.description())),
            Ask::Watch(device) => {
                self.devices.push(device);
                self.compare();
            }
            Ask::Ticket { nsid, depth, reply } => drop(reply.send(self.ticket(nsid, depth))),
            Ask::Admit { device, epoch, reply } => drop(reply.send(self.admit(&device, epoch))),
            Ask::Read { nsid, lba, blocks, len, deadline, reply } => {
                drop(reply.send(self.read(nsid, lba, blocks, len, deadline)));
            }
            Ask::Stop => {}
        }
    }

    fn description(&self) -> Option<NvmeDescription> {
        let controller = self.controller.as_ref().filter(|controller| !controller.is_over())?;
        Some(NvmeDescription {
            controller: controller.info().clone(),
            namespaces: controller.namespaces().to_vec(),
            stands_on: self.stands_on,
        })
    }

    fn ticket(&mut self, nsid: u32, depth: u16) -> Result<async_nvme::QueueTicket, BlockError> {
        self.busy_until = Instant::now() + BUSY_FOR;
        let controller = self.controller.as_mut().ok_or(BlockErrorKind::Gone)?;
        controller.queue_ticket(nsid, depth).map_err(|error| {
            tracing::error!(name = %self.way, %error, "no queue pair to be had");
            BlockErrorKind::Internal.into()
        })
    }

    /// Gives all cores new queue pairs.
    fn admit(&mut self, device: &Shared, epoch: Epoch) -> Result<(), BlockError> {
        if device.standing() != Standing::Unproven(epoch) {
            return Err(BlockErrorKind::Gone.into());
        }
        // Proven, it is read no more: the queue pair goes to a core, if the controller has no other.
        self.let_reader_go(device.namespace.nsid);
        for seat in device.seats() {
            seat.put_ticket(self.ticket(device.namespace.nsid, seat.depth)?);
        }
        device.prove();
        Ok(())
    }

    /// Ends the thread's own queue pair of a namespace, and waits until the controller has.
    fn let_reader_go(&mut self, nsid: u32) {
        let before = self.readers.len();
        self.readers.retain(|(known, _)| *known != nsid);
        if self.readers.len() == before {
            return;
        }
        let deadline = Instant::now() + DELETE_PATIENCE;
        while Instant::now() < deadline && self.controller.as_ref().is_some_and(Controller::has_queues_to_end)
        {
            if let Some(controller) = &mut self.controller {
                controller.poll();
            }
            std::thread::sleep(BUSY_LOOK);
        }
    }

    /// Reads by the thread's own queue pair of the namespace.
    fn read(
        &mut self,
        nsid: u32,
        lba: u64,
        blocks: u64,
        len: u32,
        deadline: Instant,
    ) -> Result<Vec<u8>, BlockError> {
        if !self.readers.iter().any(|(known, _)| *known == nsid) {
            self.open_reader(nsid)?;
        }
        let Some(pool) = &self.pool else { return Err(BlockErrorKind::Internal.into()) };
        let buf = pool.alloc(len).ok_or(BlockErrorKind::Internal)?;
        let Some((_, reader)) = self.readers.iter_mut().find(|(known, _)| *known == nsid) else {
            return Err(BlockErrorKind::Internal.into());
        };
        let op = Op { token: 0, kind: OpKind::Read, lba, blocks, buf: Some(buf) };
        reader.submit(op).map_err(|_| BlockErrorKind::Gone)?;
        reader.ring();
        let mut done = Vec::with_capacity(1);
        while reader.poll(self.clock.now(), 1, &mut done) == 0 {
            if Instant::now() >= deadline {
                // The operation stays the queue's, with its buffer; the next read takes another queue.
                self.readers.retain(|(known, _)| *known != nsid);
                return Err(BlockErrorKind::TimedOut.into());
            }
            if let Some(controller) = &mut self.controller {
                controller.poll();
            }
            std::thread::sleep(BUSY_LOOK);
        }
        let Some(done) = done.pop() else { return Err(BlockErrorKind::Internal.into()) };
        match (done.result, done.buf) {
            (Ok(_), Some(buf)) => {
                let mut bytes = vec![0; buf.len()];
                buf.read_into(0, &mut bytes);
                Ok(bytes)
            }
            (Err(IoError::Status(status)), _) => Err(BlockError::from_status(status, false)),
            (Err(IoError::Reset { .. }), _) => Err(BlockErrorKind::Aborted.into()),
            _ => Err(BlockErrorKind::Gone.into()),
        }
    }

    fn open_reader(&mut self, nsid: u32) -> Result<(), BlockError> {
        let way = self.way.clone();
        let failed = |error: String| {
            tracing::error!(name = %way, error, "no queue to read by");
            BlockError::new(BlockErrorKind::Internal)
        };
        // The controller may be another process.
        let shared = RegionOptions { share: true, ..RegionOptions::default() };
        let pool = match self.pool.clone() {
            Some(pool) => pool,
            None => BufferPool::with_options(READ_POOL_BYTES, &shared)
                .map_err(|error| failed(error.to_string()))?,
        };
        self.pool = Some(pool.clone());
        let mut reader = self.ticket(nsid, 1)?.open(&pool).map_err(|error| failed(error.to_string()))?;
        let info =
            self.devices.iter().find(|device| device.namespace.nsid == nsid).map(|it| Arc::clone(&it.info));
        let info = info.ok_or(BlockErrorKind::Gone)?;
        let controller = &mut self.controller;
        await_creation(&mut reader, &info, || {
            if let Some(controller) = controller {
                controller.poll();
            }
        })?;
        self.readers.push((nsid, reader));
        Ok(())
    }

    /// Acts on what the controller reports.
    fn hear(&mut self) {
        let mut looked_anew = false;
        while let Some(event) = self.controller.as_mut().and_then(Controller::take_event) {
            match event {
                Event::Resetting(error) => {
                    tracing::warn!(name = %self.way, %error, "reset; commands wait for its end");
                    self.busy_until = Instant::now() + BUSY_FOR;
                }
                Event::Ready | Event::NamespacesChanged => {
                    self.busy_until = Instant::now() + BUSY_FOR;
                    self.retry_after = RETRY_FIRST;
                    looked_anew = true;
                }
                Event::Asynchronous(dw0) => tracing::warn!(name = %self.way, dw0, "asynchronous event"),
                Event::Ended(error) => return self.lose_all(&error.to_string()),
            }
        }
        if looked_anew {
            self.compare();
        }
    }

    /// Whether the devices are still, or again, what they were.
    fn compare(&self) {
        let Some(controller) = self.controller.as_ref().filter(|it| it.state() == State::Ready) else {
            return;
        };
        for device in &self.devices {
            let is_there = controller.info().serial == device.serial
                && controller.namespaces().iter().any(|namespace| namespace.is_same(&device.namespace));
            match (device.standing(), is_there) {
                (Standing::Lost, true) => device.come_back(),
                (Standing::Unproven(_) | Standing::Proven(_), false) => {
                    device.lose("the namespace is gone, or has another identity, size or format");
                }
                _ => {}
            }
        }
    }

    /// A core without a queue pair cannot serve: the device counts as lost, and is back when it gives queues again.
    fn look_at_seats(&mut self) {
        let mut broken = self.devices.iter().filter(|device| {
            let is_in_use = matches!(device.standing(), Standing::Proven(_));
            is_in_use && device.seats().iter().any(|seat| seat.broken.load(Ordering::Acquire))
        });
        if broken.next().is_none() {
            return;
        }
        // Only a new start makes sure that no core has a queue pair of before.
        self.lose_all("the controller refused a queue");
    }

    fn lose_all(&mut self, why: &str) {
        self.devices.iter().for_each(|device| device.lose(why));
        self.readers.clear();
        self.controller = None;
        self.retry_at = Instant::now() + self.retry_after;
        self.retry_after = (self.retry_after * 2).min(RETRY_LAST);
    }

    /// Looks for a controller that was lost.
    fn retry(&mut self) {
        if let Err(error) = self.begin() {
            tracing::debug!(name = %self.way, error = &error as &dyn std::error::Error, "not there yet");
            self.retry_at = Instant::now() + self.retry_after;
            self.retry_after = (self.retry_after * 2).min(RETRY_LAST);
        }
    }

    fn stop(&mut self) {
        self.devices.iter().for_each(|device| device.retire());
        self.readers.clear();
        let Some(mut controller) = self.controller.take() else { return };
        controller.begin_shutdown();
        let deadline = Instant::now() + STOP_PATIENCE;
        while !controller.is_over() && Instant::now() < deadline {
            controller.poll();
            std::thread::sleep(BUSY_LOOK);
        }
        if controller.state() != State::Stopped {
            tracing::warn!(name = %self.way, state = ?controller.state(), "not shut down in order");
        }
    }
}

impl Drop for Keeper {
    /// Also when the thread panics: nobody is left then to look after the controller, which is cut off.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.devices.iter().for_each(|device| device.lose("the thread of the controller panicked"));
        }
    }
}
