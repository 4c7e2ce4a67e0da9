//! Shows what controller is behind a vfio-user socket, and reads its first block.
//!
//! Run: `cargo run -p nvme-model --bin nvme-model-server -- --socket /tmp/nvme.sock --size 64M`, and beside it
//! `cargo run -p async-nvme --example vfio_user -- /tmp/nvme.sock`
#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::path::PathBuf;
use std::sync::Arc;

use async_nvme::{
    Clock, Controller, Op, OpKind, Options, SystemClock, VfioUserAccess, VfioUserOptions, block_on,
};
use hugepage_alloc::{BufferPool, RegionOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = PathBuf::from(std::env::args_os().nth(1).ok_or("name the socket")?);
    let access = Arc::new(VfioUserAccess::connect(&path, &VfioUserOptions::default())?);
    println!("doorbells in shared memory: {}", access.has_mapped_doorbells());
    let clock = Arc::new(SystemClock::default());
    let mut controller = Controller::new(access, Options::default(), clock.clone())?;
    block_on(controller.ready(), std::thread::yield_now)?;
    let info = controller.info();
    println!("{} {} firmware {}", info.model, info.serial, info.firmware);
    for namespace in controller.namespaces() {
        println!("namespace {}: {} blocks of {}", namespace.nsid, namespace.blocks, namespace.block_len());
    }

    let block_len = controller.namespaces().first().ok_or("no namespace")?.block_len();
    let nsid = controller.namespaces()[0].nsid;
    // Buffers must be shared, for the device is another process.
    let pool = BufferPool::with_options(2 << 20, &RegionOptions { share: true, ..RegionOptions::default() })?;
    let mut queue = controller.queue_ticket(nsid, 2)?.open(&pool)?;
    block_on(controller.until(|_| queue.is_ready()), std::thread::yield_now)?;
    let buf = pool.alloc(block_len).ok_or("the pool is empty")?;
    let read = Op { token: 0, kind: OpKind::Read, lba: 0, blocks: 1, buf: Some(buf) };
    queue.submit(read).map_err(|refused| format!("refused: {:?}", refused.why))?;
    queue.ring();
    let mut done = Vec::with_capacity(1);
    while queue.outstanding() > 0 {
        controller.poll();
        queue.poll(clock.now(), 1, &mut done);
    }
    done[0].result?;
    println!("block 0 read");
    drop(queue);
    block_on(controller.shutdown(), std::thread::yield_now)?;
    Ok(())
}
