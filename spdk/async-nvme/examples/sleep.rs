//! Reads blocks one after another, and sleeps on an eventfd while each is under way.
//!
//! Run: `cargo run -p async-nvme --example sleep`
#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::sync::Arc;
use std::time::Duration;

use async_nvme::{Arm, Clock, Controller, Moment, Op, OpKind, Options, SystemClock, block_on};
use hugepage_alloc::{BufferPool, PoolOptions};
use nvme_model::{ControllerOptions, NamespaceOptions, Subsystem};
use rustix::event::{PollFd, PollFlags, poll};

const READS: u64 = 1000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let subsystem = Subsystem::new("EXAMPLE3");
    subsystem.add_namespace(NamespaceOptions::memory(1, 12, 1 << 14))?;
    // With shadow doorbells: a controller in software is told only when it asked for it.
    let options = ControllerOptions { shadow_doorbells: true, ..ControllerOptions::default() };
    let model = subsystem.controller(options);
    let _running = model.spawn()?;
    let clock = Arc::new(SystemClock::default());
    let mut controller = Controller::new(model, Options::default(), clock.clone())?;
    block_on(controller.ready(), || ())?;

    let pool = BufferPool::new(&PoolOptions { bytes: 2 << 20, ..PoolOptions::default() })?;
    let mut queue = controller.queue_ticket(1, 4)?.with_interrupt()?.open(&pool)?;
    block_on(controller.until(|_| queue.is_ready()), || ())?;

    let mut done = Vec::with_capacity(4);
    let mut sleeps = 0;
    for token in 0..READS {
        let buf = pool.alloc(4096).ok_or("the pool is too small")?;
        let op = Op { token, kind: OpKind::Read, lba: token, blocks: 1, buf: Some(buf) };
        queue.submit(op).map_err(|refused| format!("refused: {:?}", refused.why))?;
        queue.ring();
        while queue.poll(clock.now(), 4, &mut done) == 0 {
            // What is complete by now makes this Busy; what is completed later makes the eventfd readable.
            if let Arm::Sleep { until } = queue.arm()? {
                let eventfd = queue.interrupt().ok_or("it was opened with one")?;
                let limit = until.map(|until| left(until, clock.now()).try_into()).transpose()?;
                poll(&mut [PollFd::new(&eventfd, PollFlags::IN)], limit.as_ref())?;
                sleeps += 1;
            }
        }
        queue.disarm();
        done.remove(0).result?;
    }
    let stats = queue.stats();
    println!("{READS} reads, {sleeps} sleeps, {} polls, {} doorbells", stats.polls, stats.doorbells);
    drop(queue);
    block_on(controller.shutdown(), || ())?;
    Ok(())
}

fn left(until: Moment, now: Moment) -> Duration {
    Duration::from_nanos(until.0.saturating_sub(now.0))
}
