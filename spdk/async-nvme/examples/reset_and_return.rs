//! Lets a controller crash under I/O and be pulled out and put back, and shows what becomes of the operations.
//!
//! Run: `cargo run -p async-nvme --example reset_and_return`
#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::sync::Arc;

use async_nvme::{
    Clock, Controller, Done, IoQueue, Op, OpKind, Options, Requeue, State, SystemClock, block_on,
};
use hugepage_alloc::{BufferPool, PoolOptions};
use nvme_model::{CommandMatch, ControllerOptions, Fault, FaultAction, Model, NamespaceOptions, Subsystem};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let subsystem = Subsystem::new("EXAMPLE4");
    subsystem.add_namespace(NamespaceOptions::memory(1, 12, 1 << 10))?;
    let model = subsystem.controller(ControllerOptions::default());
    let clock = Arc::new(SystemClock::default());
    // Reads and writes that a reset interrupts are given to the controller anew.
    let options = Options { requeue: Requeue::Idempotent, ..Options::default() };
    let mut controller = Controller::new(model.clone(), options, clock.clone())?;
    block_on(controller.ready(), || _ = model.step())?;
    let pool = BufferPool::new(&PoolOptions { bytes: 2 << 20, ..PoolOptions::default() })?;
    let mut queue = open(&mut controller, &pool, &model)?;

    // The third command brings the controller down.
    model.add_fault(Fault { skip: 2, ..Fault::once(CommandMatch::any_io(), FaultAction::Fatal) });
    let done = run(&mut controller, &mut queue, &pool, &model, &*clock)?;
    let ended: Vec<_> = done.iter().map(|done| done.result).collect();
    let stats = queue.stats();
    println!("after a crash: {ended:?}, {} given anew, {} reset", stats.requeued, stats.resets);

    // Pulled out: everything ends. Put back: the same controller, a new queue pair.
    model.vanish();
    let done = run(&mut controller, &mut queue, &pool, &model, &*clock)?;
    println!("after its removal: {:?}", done.iter().map(|done| done.result).collect::<Vec<_>>());
    while controller.poll() != State::Removed {}
    model.plug_in();
    controller.restart()?;
    block_on(controller.ready(), || _ = model.step())?;
    drop(queue);
    let mut queue = open(&mut controller, &pool, &model)?;
    let done = run(&mut controller, &mut queue, &pool, &model, &*clock)?;
    println!("after its return: {:?}", done.iter().map(|done| done.result).collect::<Vec<_>>());
    drop(queue);
    block_on(controller.shutdown(), || _ = model.step())?;
    Ok(())
}

fn open(
    controller: &mut Controller,
    pool: &BufferPool,
    model: &Model,
) -> Result<IoQueue, Box<dyn std::error::Error>> {
    let queue = controller.queue_ticket(1, 8)?.open(pool)?;
    block_on(controller.until(|_| queue.is_ready()), || _ = model.step())?;
    Ok(queue)
}

/// Four writes, until each has come back.
fn run(
    controller: &mut Controller,
    queue: &mut IoQueue,
    pool: &BufferPool,
    model: &Model,
    clock: &dyn Clock,
) -> Result<Vec<Done>, Box<dyn std::error::Error>> {
    for token in 0..4 {
        let buf = pool.alloc(4096).ok_or("the pool is too small")?;
        let op = Op { token, kind: OpKind::Write { fua: false }, lba: token, blocks: 1, buf: Some(buf) };
        queue.submit(op).map_err(|refused| format!("refused: {:?}", refused.why))?;
    }
    queue.ring();
    let mut done = Vec::with_capacity(4);
    while done.len() < 4 {
        model.step();
        controller.poll();
        queue.poll(clock.now(), 4, &mut done);
    }
    Ok(done)
}
