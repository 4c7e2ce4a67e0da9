//! Starts the driver on the model and prints what the controller says of itself.
//!
//! Run: `cargo run -p async-nvme --example identify`
#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::sync::Arc;

use async_nvme::{Controller, Options, SystemClock, block_on};
use nvme_model::{ControllerOptions, NamespaceOptions, Subsystem};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let subsystem = Subsystem::new("EXAMPLE1");
    subsystem.add_namespace(NamespaceOptions::memory(1, 12, 1 << 14))?;
    subsystem
        .add_namespace(NamespaceOptions { metadata_bytes: 8, ..NamespaceOptions::memory(2, 9, 1 << 12) })?;
    let model = subsystem.controller(ControllerOptions::default());
    // The model does nothing by itself: it is stepped while the driver waits.
    let step = || _ = model.step();

    let mut controller =
        Controller::new(model.clone(), Options::default(), Arc::new(SystemClock::default()))?;
    block_on(controller.ready(), step)?;
    let info = controller.info();
    println!("{} {} (firmware {}), controller {}", info.model, info.serial, info.firmware, info.cntlid);
    println!("{} i/o queue pairs, transfers to {} bytes", info.io_queues, info.transfer_len_max);
    for namespace in controller.namespaces() {
        let (nsid, blocks, len) = (namespace.nsid, namespace.blocks, namespace.block_len());
        println!(
            "namespace {nsid}: {blocks} blocks of {len} bytes: {}",
            namespace.refusal.unwrap_or("usable")
        );
    }
    let smart = block_on(controller.smart(), step)?;
    println!("temperature {} K, spare {} %", smart.composite_temperature, smart.available_spare);
    block_on(controller.shutdown(), step)?;
    Ok(())
}
