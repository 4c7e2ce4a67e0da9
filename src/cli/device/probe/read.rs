//! The read test: random places of a namespace, first one read at a time, then many.

use std::time::{Duration, Instant};

use async_nvme::{Clock, Controller, Done, IoQueue, Op, OpKind, RefusedWhy, block_on};
use hdrhistogram::Histogram;
use hugepage_alloc::BufferPool;

use super::failed;
use super::reach::Reached;
use super::report::ReadReport;
use crate::cli::exit::{Exit, Failure};
use crate::initiator::bench::{DirectionReport, latency, rate};

/// Latencies beyond this many nanoseconds count as this: a minute, more than the driver lets a command take.
const LATENCY_NS_MAX: u64 = 60_000_000_000;
/// After the test's time is over: longer than the driver takes to give up a command.
const END_PATIENCE: Duration = Duration::from_secs(90);
/// The controller itself is looked at once in so many turns: it shares this thread with the reads.
const TURNS_A_LOOK: u32 = 64;

/// What a test shall be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Bytes of a read, rounded up to blocks.
    pub(super) len: u64,
    /// Reads in flight in the second part.
    pub(super) depth: u16,
    /// How long each part takes.
    pub(super) time: Duration,
}

/// The rig of a test: everything that a turn of it touches.
struct Rig<'a> {
    controller: &'a mut Controller,
    reached: &'a mut Reached,
    clock: &'a dyn Clock,
    pool: &'a BufferPool,
    queue: IoQueue,
    /// Blocks of a read, and places where one may begin.
    blocks: u64,
    places: u64,
    len: u32,
    random: u64,
}

/// Tests a namespace. Empty when it is smaller than a read.
pub(super) fn test(
    controller: &mut Controller,
    reached: &mut Reached,
    clock: &dyn Clock,
    pool: &BufferPool,
    nsid: u32,
    wanted: Wanted,
) -> Result<Vec<ReadReport>, Failure> {
    let found = controller.namespaces().iter().find(|namespace| namespace.nsid == nsid);
    let Some((block_len, all)) = found.map(|namespace| (u64::from(namespace.block_len()), namespace.blocks))
    else {
        return Ok(Vec::new());
    };
    let blocks = wanted.len.div_ceil(block_len).max(1);
    let places = all / blocks;
    let len = u32::try_from(blocks.saturating_mul(block_len)).unwrap_or(u32::MAX);
    if places == 0 {
        return Ok(Vec::new());
    }
    let ticket = controller.queue_ticket(nsid, wanted.depth).map_err(failed)?;
    let queue = ticket.open(pool).map_err(failed)?;
    block_on(controller.until(|_| queue.is_ready() || queue.is_gone()), || reached.idle()).map_err(failed)?;
    let random = 0x9E37_79B9_7F4A_7C15;
    let mut rig = Rig { controller, reached, clock, pool, queue, blocks, places, len, random };
    let mut reports = vec![rig.run(1, wanted.time)?];
    let depth = u16::try_from(rig.queue.depth()).unwrap_or(u16::MAX).min(wanted.depth);
    if depth > 1 {
        reports.push(rig.run(depth, wanted.time)?);
    }
    let Rig { queue, controller, reached, .. } = rig;
    drop(queue);
    // The controller deletes the queues when it is polled; the next test needs their number.
    let deleted = Instant::now() + END_PATIENCE;
    block_on(controller.until(|one| one.queue_ticket(nsid, 1).is_ok() || Instant::now() > deleted), || {
        reached.idle();
    })
    .map_err(failed)?;
    Ok(reports)
}

impl Rig<'_> {
    /// Reads for `time` with `depth` reads in flight.
    fn run(&mut self, depth: u16, time: Duration) -> Result<ReadReport, Failure> {
        let count = usize::from(depth);
        let mut latencies = histogram()?;
        let mut submitted = vec![Instant::now(); count];
        let mut free: Vec<u64> = (0..u64::from(depth)).collect();
        let mut done: Vec<Done> = Vec::with_capacity(count);
        let begun = Instant::now();
        let (mut ended, mut turn) = (false, 0u32);
        while !ended || free.len() < count {
            ended = ended || begun.elapsed() >= time;
            while !ended && let Some(token) = free.pop() {
                if !self.submit(token)? {
                    free.push(token);
                    break;
                }
                if let Some(at) = usize::try_from(token).ok().and_then(|at| submitted.get_mut(at)) {
                    *at = Instant::now();
                }
            }
            self.queue.ring();
            self.reached.idle();
            if self.queue.poll(self.clock.now(), count, &mut done) == 0 || turn.is_multiple_of(TURNS_A_LOOK) {
                self.controller.poll();
            }
            turn = turn.wrapping_add(1);
            let now = Instant::now();
            for one in done.drain(..) {
                one.result.map_err(read_failed)?;
                let at = usize::try_from(one.token).ok().and_then(|at| submitted.get(at)).copied();
                let took = now.duration_since(at.unwrap_or(now)).as_nanos();
                latencies.saturating_record(u64::try_from(took).unwrap_or(LATENCY_NS_MAX).max(1));
                free.push(one.token);
            }
            if begun.elapsed() > time + END_PATIENCE {
                let text =
                    anyhow::anyhow!("reads were not completed {} s after the test", END_PATIENCE.as_secs());
                return Err(
                    Failure::new(Exit::Failed, text).with_remedy("reset the controller: give it back")
                );
            }
        }
        Ok(self.report(depth, &latencies, begun.elapsed()))
    }

    /// Gives one read to the queue; whether it took it.
    fn submit(&mut self, token: u64) -> Result<bool, Failure> {
        // Xorshift: good enough to wander over a namespace.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let lba = self.random % self.places * self.blocks;
        let Some(buf) = self.pool.alloc(self.len) else { return Ok(false) };
        let op = Op { token, kind: OpKind::Read, lba, blocks: self.blocks, buf: Some(buf) };
        match self.queue.submit(op) {
            Ok(()) => Ok(true),
            Err(refused) => match refused.why {
                // In a reset: it is ready again soon, or gone.
                RefusedWhy::Full | RefusedWhy::NotReady => Ok(false),
                RefusedWhy::Gone => Err(read_failed("the controller is gone, or took no queue")),
                RefusedWhy::Invalid(why) => Err(read_failed(why)),
            },
        }
    }

    fn report(&self, depth: u16, latencies: &Histogram<u64>, elapsed: Duration) -> ReadReport {
        let commands = latencies.len();
        let bytes = commands.saturating_mul(u64::from(self.len));
        let elapsed_s = elapsed.as_secs_f64();
        ReadReport {
            depth,
            read_bytes: self.len,
            elapsed_s,
            reads: DirectionReport {
                commands,
                bytes,
                iops: rate(commands, elapsed_s),
                bytes_per_s: rate(bytes, elapsed_s),
                latency: latency(latencies),
            },
        }
    }
}

fn histogram() -> Result<Histogram<u64>, Failure> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)
        .map_err(|error| Failure::new(Exit::Failed, anyhow::anyhow!("no histogram can be made: {error}")))
}

fn read_failed(why: impl std::fmt::Display) -> Failure {
    let error = anyhow::anyhow!("a read failed: {why}");
    Failure::new(Exit::Failed, error).with_remedy("the SMART log may say more: --seconds 0 reads no data")
}
