//! Drives a real controller through VFIO: resets and identifies it, then reads from each of its namespaces. It never
//! writes.
//!
//! The function must be bound to vfio-pci; whatever the controller holds must not be mounted through it.
//!
//! Run: `cargo run --release -p async-nvme --example vfio_identify -- 0000:03:00.0`, with `--group`,
//! `--device-file` or `--unsafe-without-iommu` for one certain way.
#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nvme::vfio::{OpenError, PciAddress, Sysfs, UnsafeNoIommuVfio, Vfio, VfioOptions, Via};
use async_nvme::{
    Access, Clock, Controller, Done, IoQueue, NamespaceInfo, Op, OpKind, Options, SystemClock, block_on,
};
use hugepage_alloc::physical::UnsafeWithoutIommu;
use hugepage_alloc::{BufferPool, PoolOptions};

/// How long each read test takes.
const TEST_FOR: Duration = Duration::from_secs(1);
const READ_LEN: u32 = 4096;
const DEPTH_MAX: u16 = 128;

/// How the controller shall be reached.
enum How {
    Guarded(Via),
    /// It can then write to any memory of the host. Never on a machine that matters.
    WithoutIommu,
}

fn main() -> ExitCode {
    match chosen().and_then(|(address, how)| run(address, &how)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            let mut cause = error.source();
            while let Some(one) = cause {
                println!("because: {one}");
                cause = one.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn chosen() -> Result<(PciAddress, How), Box<dyn Error>> {
    let (mut address, mut how) = (None, How::Guarded(Via::Best));
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--group" => how = How::Guarded(Via::Group),
            "--device-file" => how = How::Guarded(Via::DeviceFile),
            "--unsafe-without-iommu" => how = How::WithoutIommu,
            text => address = Some(text.parse()?),
        }
    }
    if address.is_none() {
        for one in Sysfs::default().nvme_controllers()? {
            println!("{}: {}", one.address, one.driver.as_deref().unwrap_or("no driver"));
        }
    }
    Ok((address.ok_or("name a controller by its PCI address")?, how))
}

fn open(address: PciAddress, how: &How) -> Result<Arc<dyn Access>, OpenError> {
    match how {
        How::Guarded(via) => {
            let options = VfioOptions { via: *via, ..VfioOptions::default() };
            Ok(Arc::new(Vfio::open(address, &options)?))
        }
        How::WithoutIommu => {
            let sure = UnsafeWithoutIommu::accept_that_the_device_can_write_anywhere();
            Ok(Arc::new(UnsafeNoIommuVfio::open(address, &Sysfs::default(), sure)?))
        }
    }
}

fn run(address: PciAddress, how: &How) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let access = open(address, how)?;
    println!(
        "{address}: opened in {:.1} ms, BAR 0 of {} bytes, {} interrupt vectors",
        ms(start),
        access.bar_len(),
        access.interrupts_max()
    );
    let start = Instant::now();
    access.function_reset()?;
    println!("function reset in {:.1} ms", ms(start));

    let clock = Arc::new(SystemClock::default());
    let start = Instant::now();
    let mut controller = Controller::new(access, Options::default(), clock.clone())?;
    block_on(controller.ready(), std::hint::spin_loop)?;
    println!("ready and identified in {:.1} ms", ms(start));
    let info = controller.info();
    println!("{} {} (firmware {}), controller {}", info.model, info.serial, info.firmware, info.cntlid);
    println!("{} i/o queue pairs, transfers to {} bytes", info.io_queues, info.transfer_len_max);

    let pool = BufferPool::new(&PoolOptions { bytes: 4 << 20, ..PoolOptions::default() })?;
    for namespace in controller.namespaces().to_vec() {
        let (nsid, blocks, len) = (namespace.nsid, namespace.blocks, namespace.block_len());
        if let Some(why) = namespace.refusal {
            println!("namespace {nsid}: {blocks} blocks of {len} bytes: {why}");
            continue;
        }
        println!("namespace {nsid}: {blocks} blocks of {len} bytes");
        let mut queue = controller.queue_ticket(nsid, DEPTH_MAX)?.open(&pool)?;
        block_on(controller.until(|_| queue.is_ready()), std::hint::spin_loop)?;
        for depth in [1, 32, DEPTH_MAX] {
            println!("  {}", read_test(&mut controller, &mut queue, &pool, &*clock, &namespace, depth)?);
        }
    }
    let smart = block_on(controller.smart(), std::hint::spin_loop)?;
    println!("temperature {} K, spare {} %", smart.composite_temperature, smart.available_spare);
    let start = Instant::now();
    block_on(controller.shutdown(), std::hint::spin_loop)?;
    println!("shut down in {:.1} ms", ms(start));
    Ok(())
}

/// Reads from random places, `depth` at a time.
fn read_test(
    controller: &mut Controller,
    queue: &mut IoQueue,
    pool: &BufferPool,
    clock: &dyn Clock,
    namespace: &NamespaceInfo,
    depth: u16,
) -> Result<String, Box<dyn Error>> {
    let blocks = u64::from(READ_LEN / namespace.block_len());
    let places = (namespace.blocks / blocks).max(1);
    let (mut random, mut reads, mut sum) = (0x9E37_79B9_7F4A_7C15_u64, 0u64, 0u64);
    let (mut latencies, mut started) = (Vec::new(), vec![Instant::now(); usize::from(depth)]);
    let mut free: Vec<u64> = (0..u64::from(depth)).collect();
    let mut done: Vec<Done> = Vec::with_capacity(usize::from(depth));
    let start = Instant::now();
    loop {
        while start.elapsed() < TEST_FOR
            && let Some(token) = free.pop()
        {
            // Xorshift: good enough to wander over the namespace.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let buf = Some(pool.alloc(READ_LEN).ok_or("the pool is too small")?);
            let lba = random % places * blocks;
            started[usize::try_from(token)?] = Instant::now();
            let op = Op { token, kind: OpKind::Read, lba, blocks, buf };
            queue.submit(op).map_err(|refused| format!("refused: {:?}", refused.why))?;
        }
        queue.ring();
        queue.poll(clock.now(), usize::from(depth), &mut done);
        controller.poll();
        for ended in done.drain(..) {
            ended.result?;
            latencies.push(started[usize::try_from(ended.token)?].elapsed());
            let mut bytes = [0; 8];
            ended.buf.as_ref().ok_or("a buffer is missing")?.read_into(0, &mut bytes);
            sum = sum.wrapping_add(u64::from_le_bytes(bytes));
            free.push(ended.token);
            reads += 1;
        }
        if queue.outstanding() == 0 && start.elapsed() >= TEST_FOR {
            break;
        }
        std::hint::spin_loop();
    }
    let took = start.elapsed();
    latencies.sort();
    let at = |percent: usize| latencies.get(latencies.len() * percent / 100).map_or(0, Duration::as_micros);
    let rate = u128::from(reads) * 1_000_000 / took.as_micros().max(1);
    Ok(format!(
        "{READ_LEN} bytes at random, depth {depth:3}: {rate} reads/s, p50 {} us, p99 {} us (sum {sum:016x})",
        at(50),
        at(99)
    ))
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
