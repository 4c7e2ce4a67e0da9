//! One thread with one queue.

use super::report::WorkerReport;
use super::verify::Table;
use super::{AtEnd, BenchOptions, Counters, Geometry, Limit, Pattern, Verify};
use crate::initiator::command::{self, Transfer};
use crate::initiator::controller::{ConnectOptions, Controller};
use crate::initiator::error::{ErrorKind, InitiatorError};
use crate::initiator::transport::{Deadline, Done, Queue, SlotId};
use crate::units::Lba;
use nvme_spec::NvmOpcode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Whoever is refused asks again after this, and leaves the processors to others meanwhile.
const ERROR_PAUSE: Duration = Duration::from_millis(1);
/// The longest wait for completions: so often, at least, the clock and `stop` are looked at.
const WAIT: Duration = Duration::from_millis(20);
/// Pause between two tries to connect again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// The units that are a worker's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    first: u64,
    units: u64,
    index: u16,
    /// Units to read or write before the end.
    commands_max: u64,
}

impl Share {
    /// Shares do not overlap where order or content matters; random units without verification are anyone's.
    pub(super) fn new(options: &BenchOptions, geometry: &Geometry, index: u16) -> Self {
        let (queues, position) = (u64::from(options.queues), u64::from(index));
        let commands_max = match options.limit {
            Limit::Duration(_) => u64::MAX,
            Limit::Bytes(len) => {
                let units = len.get().div_ceil(options.unit_len.into());
                units / queues + u64::from(position < units % queues)
            }
        };
        let exclusive = options.verify != Verify::Off || options.pattern == Pattern::Sequential;
        let (first, units) = if exclusive && geometry.units >= queues {
            let each = geometry.units / queues;
            (position * each, if position + 1 == queues { geometry.units - position * each } else { each })
        } else if exclusive {
            // Fewer units than workers: some have none.
            if position < geometry.units { (position, 1) } else { (0, 0) }
        } else {
            (0, geometry.units)
        };
        Self { first, units, index, commands_max }
    }
}

/// A command in flight.
#[derive(Clone, Copy, Debug)]
enum Op {
    Idle,
    Read { unit: u64 },
    Write { unit: u64, generation: u32 },
    Flush,
}

/// What the worker is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The workload.
    Work,
    /// Reading back, with the next unit.
    ReadBack { next: u64 },
    /// Submitting nothing more.
    Drain,
}

/// A thread's state.
pub(super) struct Worker<'a> {
    options: &'a BenchOptions,
    connect: &'a ConnectOptions,
    geometry: Geometry,
    share: Share,
    queue: Queue,
    /// The controller of a queue that was connected anew.
    own_controller: Option<Controller>,
    table: Option<Table>,
    ops: Vec<Op>,
    random: u64,
    next_unit: u64,
    commands: u64,
    writes_since_flush: u32,
    report: WorkerReport,
    at_end: AtEnd,
}

/// What a worker leaves.
pub(super) struct Outcome {
    pub(super) report: WorkerReport,
    /// The first unit of its share, and what the units of it must hold; only with [`AtEnd::HandOver`].
    pub(super) share: Option<(u64, Table)>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        options: &'a BenchOptions,
        connect: &'a ConnectOptions,
        geometry: Geometry,
        share: Share,
        queue: Queue,
        at_end: AtEnd,
    ) -> Self {
        let table = match options.verify {
            Verify::Off => None,
            Verify::AfterWrites | Verify::OnRead => {
                Some(Table::new(options.seed, geometry.block_size, share.units))
            }
        };
        Self {
            options,
            connect,
            geometry,
            share,
            ops: vec![Op::Idle; queue.depth()],
            queue,
            own_controller: None,
            table,
            random: options.seed ^ u64::from(share.index).wrapping_mul(0xD134_2543_DE82_EF95),
            next_unit: 0,
            commands: 0,
            writes_since_flush: 0,
            report: WorkerReport::new(),
            at_end,
        }
    }

    /// The whole life of the thread. `ended` is set by the first worker that fails, so that the others stop too.
    pub(super) fn run(
        mut self,
        started: Instant,
        stop: &AtomicBool,
        ended: &AtomicBool,
        counters: &Counters,
    ) -> Result<Outcome, InitiatorError> {
        if self.share.units == 0 {
            return Ok(Outcome { report: self.report, share: None });
        }
        let deadline = match self.options.limit {
            Limit::Duration(duration) => Some(started + duration),
            Limit::Bytes(_) => None,
        };
        let over = || {
            stop.load(Ordering::Relaxed)
                || ended.load(Ordering::Relaxed)
                || deadline.is_some_and(|at| Instant::now() >= at)
        };
        let result = self.stage(Stage::Work, &over, counters).and_then(|()| {
            self.report.elapsed = started.elapsed();
            if self.table.is_some() && self.at_end == AtEnd::ReadBack {
                self.stage(Stage::ReadBack { next: 0 }, &|| ended.load(Ordering::Relaxed), counters)?;
            }
            Ok(())
        });
        if let Err(error) = result {
            ended.store(true, Ordering::Relaxed);
            return Err(error);
        }
        self.report.verify.units_in_doubt = self.table.as_ref().map_or(0, Table::uncertain_count);
        let hand_over = self.at_end == AtEnd::HandOver;
        let share = self.table.filter(|_| hand_over).map(|table| (self.share.first, table));
        Ok(Outcome { report: self.report, share })
    }

    /// Submits and completes until the stage is over and nothing is in flight.
    fn stage(
        &mut self,
        mut stage: Stage,
        over: &dyn Fn() -> bool,
        counters: &Counters,
    ) -> Result<(), InitiatorError> {
        let reading_back = stage != Stage::Work;
        loop {
            if stage != Stage::Drain && over() {
                stage = Stage::Drain;
            }
            while stage != Stage::Drain
                && let Some(slot) = self.queue.reserve()
            {
                if !self.submit_next(slot, &mut stage) {
                    self.queue.release(slot);
                    break;
                }
            }
            if self.queue.in_flight() == 0 && stage == Stage::Drain {
                return Ok(());
            }
            let errors = self.report.errors;
            match self.queue.poll(WAIT) {
                Ok(()) => {
                    self.complete(reading_back, counters);
                    if self.report.errors > errors {
                        std::thread::sleep(ERROR_PAUSE);
                    }
                }
                Err(error) => {
                    // What completed before the end counts.
                    self.complete(reading_back, counters);
                    let unread = self.lose(&error, reading_back)?;
                    if !self.reconnect(over)? {
                        return Ok(());
                    }
                    // Units whose reading back was lost are read once more: from the lowest on.
                    if let (Some(unit), true) = (unread, reading_back) {
                        stage = Stage::ReadBack { next: unit };
                    }
                }
            }
        }
    }

    /// Submits one command into `slot`; `false` when there is none to submit now.
    fn submit_next(&mut self, slot: SlotId, stage: &mut Stage) -> bool {
        match stage {
            Stage::Drain => false,
            Stage::ReadBack { next } => {
                let Some(table) = &mut self.table else { return false };
                while *next < self.share.units && !table.is_known(*next) {
                    *next += 1;
                }
                if *next >= self.share.units {
                    *stage = Stage::Drain;
                    return false;
                }
                let unit = *next;
                *next += 1;
                self.submit_read(slot, unit);
                true
            }
            Stage::Work => {
                if self.commands >= self.share.commands_max {
                    *stage = Stage::Drain;
                    return false;
                }
                self.submit_work(slot)
            }
        }
    }

    fn submit_work(&mut self, slot: SlotId) -> bool {
        let interval = self.options.flush_interval;
        if interval != 0 && self.writes_since_flush >= interval {
            self.writes_since_flush = 0;
            self.ops[slot.index()] = Op::Flush;
            let sqe = command::command(NvmOpcode::FLUSH.0, self.options.nsid);
            self.queue.submit(slot, &sqe, Transfer::None, Deadline::Default);
            return true;
        }
        let Some(unit) = self.choose_unit() else { return false };
        self.commands += 1;
        let percent = u64::from(self.options.read_percent);
        let reads = percent == 100 || (percent != 0 && self.next_random() % 100 < percent);
        if reads {
            self.submit_read(slot, unit)
        } else {
            self.submit_write(slot, unit)
        }
        true
    }

    fn submit_read(&mut self, slot: SlotId, unit: u64) {
        self.ops[slot.index()] = Op::Read { unit };
        self.submit_io(slot, NvmOpcode::READ, unit, Transfer::ToHost(self.options.unit_len));
    }

    fn submit_write(&mut self, slot: SlotId, unit: u64) {
        let lba = self.lba_of(unit);
        let data = self.queue.buffer_mut(slot, self.options.unit_len as usize);
        let generation = match &mut self.table {
            Some(table) => table.fill(data, lba),
            None => {
                // Content that differs from block to block, so that nothing on the way can save the work.
                data[..8].copy_from_slice(&(self.random ^ lba.get()).to_le_bytes());
                0
            }
        };
        self.writes_since_flush += 1;
        self.ops[slot.index()] = Op::Write { unit, generation };
        self.submit_io(slot, NvmOpcode::WRITE, unit, Transfer::ToController(self.options.unit_len));
    }

    fn submit_io(&mut self, slot: SlotId, opcode: NvmOpcode, unit: u64, transfer: Transfer) {
        let nlb_z = u16::try_from(self.geometry.blocks_per_unit - 1).unwrap_or(u16::MAX);
        let fua = self.options.fua && opcode == NvmOpcode::WRITE;
        let sqe = command::io(opcode, self.options.nsid, self.lba_of(unit), nlb_z, fua);
        self.queue.submit(slot, &sqe, transfer, Deadline::Default);
    }

    fn lba_of(&self, unit: u64) -> Lba {
        self.geometry.lba_of(self.share.first + unit)
    }

    /// The next unit, taken in the table; `None` when all are in flight.
    fn choose_unit(&mut self) -> Option<u64> {
        let units = self.share.units;
        let mut unit = match self.options.pattern {
            Pattern::Sequential => self.next_unit,
            // The high half of a product is an even choice without a division.
            Pattern::Random => ((u128::from(self.next_random()) * u128::from(units)) >> 64) as u64,
        };
        if let Some(table) = &mut self.table {
            let mut tried = 0;
            while !table.take(unit) {
                tried += 1;
                unit = if unit + 1 == units { 0 } else { unit + 1 };
                if tried == units {
                    return None;
                }
            }
        }
        self.next_unit = if unit + 1 == units { 0 } else { unit + 1 };
        Some(unit)
    }

    /// SplitMix64.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.random;
        word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ word >> 31
    }

    /// Takes all commands that have ended.
    fn complete(&mut self, reading_back: bool, counters: &Counters) {
        let now = Instant::now();
        let (mut reads, mut writes) = (0, 0);
        while let Some(done) = self.queue.pop_done() {
            let op = std::mem::replace(&mut self.ops[done.slot.index()], Op::Idle);
            let latency = now.saturating_duration_since(done.submitted);
            let latency_ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
            match op {
                Op::Idle => {}
                Op::Flush => match done.check("Flush") {
                    Ok(_) => self.report.flushes += 1,
                    Err(error) => self.report.error(&error),
                },
                Op::Read { unit } => {
                    reads += 1;
                    self.read_ended(&done, unit, reading_back, latency_ns);
                }
                Op::Write { unit, generation } => {
                    writes += 1;
                    self.write_ended(&done, unit, generation, latency_ns);
                }
            }
            self.queue.release(done.slot);
        }
        let add = |counter: &AtomicU64, more: u64| {
            // One writer: no need for an atomic addition.
            counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        };
        add(if reading_back { &counters.verified } else { &counters.reads }, reads);
        add(&counters.writes, writes);
        counters.errors.store(self.report.errors, Ordering::Relaxed);
    }

    fn read_ended(&mut self, done: &Done, unit: u64, reading_back: bool, latency_ns: u64) {
        let lba = self.lba_of(unit);
        match done.check("Read") {
            Err(error) => self.report.error(&error),
            Ok(_) => {
                if !reading_back {
                    self.report.reads.saturating_record(latency_ns);
                }
                if let Some(table) = &mut self.table
                    && table.is_known(unit)
                {
                    match table.check(unit, self.queue.buffer(done.slot), lba) {
                        Ok(blocks) => self.report.verify.blocks_checked += blocks,
                        Err((lba, fault)) => self.report.fault(|| format!("block {lba}: {fault}")),
                    }
                }
            }
        }
        if let (Some(table), false) = (&mut self.table, reading_back) {
            table.give_back(unit);
        }
    }

    fn write_ended(&mut self, done: &Done, unit: u64, generation: u32, latency_ns: u64) {
        let result = done.check("Write");
        if let Some(table) = &mut self.table {
            match &result {
                Ok(_) => table.acknowledge(unit, generation),
                Err(_) => table.doubt(unit, generation),
            }
        }
        match result {
            Ok(_) => self.report.writes.saturating_record(latency_ns),
            Err(error) => self.report.error(&error),
        }
    }

    /// After the queue died: what was in flight is in doubt. Gives the lowest unit of which a read was lost; the error
    /// itself when the run ends with it.
    fn lose(&mut self, error: &InitiatorError, reading_back: bool) -> Result<Option<u64>, InitiatorError> {
        let lost = matches!(error.kind(), ErrorKind::Closed | ErrorKind::Timeout | ErrorKind::Terminated);
        if self.options.reconnect.is_none() || !lost {
            return Err(error.again());
        }
        let mut unread = None;
        for op in &mut self.ops {
            match (std::mem::replace(op, Op::Idle), &mut self.table) {
                (Op::Write { unit, generation }, Some(table)) => table.doubt(unit, generation),
                (Op::Read { unit }, Some(table)) => {
                    if !reading_back {
                        table.give_back(unit);
                    }
                    unread = Some(unread.map_or(unit, |lowest: u64| lowest.min(unit)));
                }
                _ => {}
            }
        }
        Ok(unread)
    }

    /// Connects anew as long as the options allow. A run that was stopped meanwhile still has to read back, so only
    /// the patience ends this, unless nothing is read back: `false` then.
    fn reconnect(&mut self, over: &dyn Fn() -> bool) -> Result<bool, InitiatorError> {
        let options = ConnectOptions { io_queues: 1, ..self.connect.clone() };
        let give_up_at = Instant::now() + self.options.reconnect.unwrap_or_default();
        loop {
            if self.at_end == AtEnd::HandOver && over() {
                return Ok(false);
            }
            self.own_controller = None;
            match Controller::connect(&options) {
                Ok(controller) => {
                    if let Some(queue) = controller.take_io_queue(0) {
                        self.ops.resize(queue.depth(), Op::Idle);
                        self.queue = queue;
                        self.own_controller = Some(controller);
                        self.report.reconnects += 1;
                        return Ok(true);
                    }
                }
                Err(again) if Instant::now() >= give_up_at => return Err(again),
                Err(_) => {}
            }
            std::thread::sleep(RECONNECT_PAUSE);
        }
    }
}
