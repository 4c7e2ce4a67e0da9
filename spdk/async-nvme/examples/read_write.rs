//! Writes a batch of blocks through the driver to the model, reads them back, and compares.
//!
//! Run: `cargo run -p async-nvme --example read_write`
#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::sync::Arc;

use async_nvme::{Clock, Controller, Done, IoQueue, Op, OpKind, Options, SystemClock, block_on};
use hugepage_alloc::{BufferPool, PoolOptions};
use nvme_model::{ControllerOptions, Model, NamespaceOptions, Subsystem};

const DEPTH: u16 = 32;
const BLOCK_LEN: u32 = 4096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let subsystem = Subsystem::new("EXAMPLE2");
    subsystem.add_namespace(NamespaceOptions::memory(1, 12, 1 << 14))?;
    let model = subsystem.controller(ControllerOptions::default());
    let clock = Arc::new(SystemClock::default());
    let mut controller = Controller::new(model.clone(), Options::default(), clock.clone())?;
    block_on(controller.ready(), || _ = model.step())?;

    let pool = BufferPool::new(&PoolOptions { bytes: 4 << 20, ..PoolOptions::default() })?;
    let mut queue = controller.queue_ticket(1, DEPTH)?.open(&pool)?;
    block_on(controller.until(|_| queue.is_ready()), || _ = model.step())?;

    batch(&mut queue, &pool, &model, &*clock, OpKind::Write { fua: false })?;
    let read = batch(&mut queue, &pool, &model, &*clock, OpKind::Read)?;
    for done in &read {
        let mut block = [0; BLOCK_LEN as usize];
        done.buf.as_ref().ok_or("a buffer is missing")?.read_into(0, &mut block);
        assert!(block.iter().all(|&byte| u64::from(byte) == done.token), "block {} differs", done.token);
    }
    let stats = queue.stats();
    println!("{} blocks written, read back and equal", read.len());
    println!("{} commands, {} doorbells", stats.commands, stats.doorbells);
    drop(queue);
    block_on(controller.shutdown(), || _ = model.step())?;
    Ok(())
}

/// One operation for each block, one doorbell for all.
fn batch(
    queue: &mut IoQueue,
    pool: &BufferPool,
    model: &Model,
    clock: &dyn Clock,
    kind: OpKind,
) -> Result<Vec<Done>, Box<dyn std::error::Error>> {
    for number in 0..u8::try_from(DEPTH)? {
        let buf = pool.alloc(BLOCK_LEN).ok_or("the pool is too small")?;
        let fill = if kind == OpKind::Read { 0xFF } else { number };
        buf.write_from(0, &[fill; BLOCK_LEN as usize]);
        let op = Op { token: number.into(), kind, lba: u64::from(number) * 7, blocks: 1, buf: Some(buf) };
        queue.submit(op).map_err(|refused| format!("refused: {:?}", refused.why))?;
    }
    queue.ring();
    let mut done = Vec::with_capacity(usize::from(DEPTH));
    while queue.outstanding() > 0 {
        model.step();
        queue.poll(clock.now(), usize::from(DEPTH), &mut done);
    }
    for ended in &done {
        ended.result?;
    }
    Ok(done)
}
