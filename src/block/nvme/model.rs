//! An NVMe controller in software over a block device or an image: the whole design on any machine.
//!
//! The controller works in a thread of its own, which sleeps while no doorbell rings. Its namespace 1 is the device from
//! its first byte to its last, with the device's logical blocks.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_nvme::access::{Access, AccessError, DmaMapping};
use hugepage_alloc::DmaRegion;
use nvme_model::{Backing, ControllerOptions, Model, NamespaceOptions, Subsystem};
use sha2::{Digest as _, Sha256};

use super::reach::Reached;

/// The longest sleep: what the model counts in steps goes on meanwhile.
const SLEEP_MAX: Duration = Duration::from_millis(1);
/// Commands that are at the disk at a time.
const DISK_THREADS: u16 = 16;
const IO_QUEUES_MAX: u16 = 1024;
/// Writes to registers that are queued without an allocation.
const POSTED_ROOM: usize = 1024;
/// Block size of an image, which has none of its own.
const IMAGE_BLOCK_LEN: u64 = 512;

/// A controller over the block device or image at `path`.
pub(super) fn over(path: &Path) -> io::Result<Reached> {
    let path = fs::canonicalize(path)?;
    let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
    let meta = file.metadata()?;
    let stands_on = meta
        .file_type()
        .is_block_device()
        .then(|| (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())));
    let block_len = match stands_on {
        Some((major, minor)) => logical_block_len(major, minor)?,
        None => IMAGE_BLOCK_LEN,
    };
    let blocks = file.seek(SeekFrom::End(0))? / block_len;
    let subsystem = Subsystem::new("FASTICE-MODEL");
    subsystem.add_namespace(namespace(&path, file, block_len, blocks)).map_err(io::Error::other)?;
    let options = ControllerOptions {
        name: format!("model of {}", path.display()),
        // The thread sleeps, and only a register wakes it.
        shadow_doorbells: false,
        disk_threads: DISK_THREADS,
        // One a core and namespace, whatever the host.
        io_queues_max: IO_QUEUES_MAX,
        ..Default::default()
    };
    let access: Arc<dyn Access> = Arc::new(Stepped::start(subsystem.controller(options))?);
    Ok(Reached { access, stands_on })
}

/// Namespace 1, whose unique identifiers derive from the path, so that two models are never taken for each other.
fn namespace(path: &Path, file: File, block_len: u64, blocks: u64) -> NamespaceOptions {
    let digest: [u8; 32] = Sha256::digest(path.as_os_str().as_encoded_bytes()).into();
    let [nguid @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = digest;
    let [.., a, b, c, d, e, f, g, h] = digest;
    let block_shift = u8::try_from(block_len.trailing_zeros()).unwrap_or_default();
    NamespaceOptions {
        nguid,
        eui64: [a, b, c, d, e, f, g, h],
        backing: Backing::File(file),
        ..NamespaceOptions::memory(1, block_shift, blocks)
    }
}

fn logical_block_len(major: u32, minor: u32) -> io::Result<u64> {
    let device = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    // A partition has the queue of its disk.
    let queue =
        if device.join("partition").exists() { device.join("../queue") } else { device.join("queue") };
    let text = fs::read_to_string(queue.join("logical_block_size"))?;
    let len = text.trim().parse().ok().filter(|len: &u64| len.is_power_of_two());
    len.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its logical block size is no power of two"))
}

/// A model with a thread of its own, which sleeps while nothing is written to a register.
///
/// Writes to registers are posted, as on PCI Express: they are queued, and carried out in their order before the model's
/// next step, and before anything is read. So a core never waits at a doorbell for the model.
#[derive(Debug)]
struct Stepped {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    model: Arc<Model>,
    posted: Mutex<VecDeque<Posted>>,
    /// Whoever wants to reach the model between two steps waits here; the thread passes by before each.
    turn: Mutex<()>,
    stop: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
enum Posted {
    Four(u32, u32),
    Eight(u32, u64),
}

impl Shared {
    /// Carries out what was posted. Under the lock of `turn`, so that the order stays.
    fn deliver(&self) {
        loop {
            let Some(posted) = lock(&self.posted).pop_front() else { return };
            match posted {
                Posted::Four(offset, value) => self.model.write32(offset, value),
                Posted::Eight(offset, value) => self.model.write64(offset, value),
            }
        }
    }

    fn work(&self) {
        while !self.stop.load(Ordering::Acquire) {
            {
                let _turn = lock(&self.turn);
                self.deliver();
            }
            if !self.model.step() {
                std::thread::park_timeout(SLEEP_MAX);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stepped {
    fn start(model: Arc<Model>) -> io::Result<Self> {
        let posted = Mutex::new(VecDeque::with_capacity(POSTED_ROOM));
        let shared = Arc::new(Shared { model, posted, turn: Mutex::default(), stop: AtomicBool::new(false) });
        let worker = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("nvme-model".to_owned()).spawn(move || worker.work())?;
        shared.model.set_sleeper(Some(thread.thread().clone()));
        Ok(Self { shared, thread: Some(thread) })
    }

    fn post(&self, posted: Posted) {
        lock(&self.shared.posted).push_back(posted);
        self.wake();
    }

    /// What was posted is done, and then this.
    fn after_posted<T>(&self, access: impl FnOnce(&Model) -> T) -> T {
        let _turn = lock(&self.shared.turn);
        self.shared.deliver();
        access(&self.shared.model)
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Stepped {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(name = self.shared.model.name(), "the thread of a model panicked");
        }
    }
}

impl Access for Stepped {
    fn name(&self) -> &str {
        self.shared.model.name()
    }

    fn bar_len(&self) -> u64 {
        self.shared.model.bar_len()
    }

    fn read32(&self, offset: u32) -> u32 {
        self.after_posted(|model| model.read32(offset))
    }

    fn write32(&self, offset: u32, value: u32) {
        self.post(Posted::Four(offset, value));
    }

    fn read64(&self, offset: u32) -> u64 {
        self.after_posted(|model| model.read64(offset))
    }

    fn write64(&self, offset: u32, value: u64) {
        self.post(Posted::Eight(offset, value));
    }

    fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError> {
        self.after_posted(|model| model.dma_map(region))
    }

    fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError> {
        self.after_posted(|model| model.dma_unmap(mapping))
    }

    fn dma_revoke(&self) -> Result<(), AccessError> {
        self.after_posted(Model::dma_revoke)
    }

    fn dma_restore(&self) -> Result<(), AccessError> {
        self.after_posted(Model::dma_restore)
    }

    fn function_reset(&self) -> Result<(), AccessError> {
        self.after_posted(Model::function_reset)
    }

    fn config_read32(&self, offset: u16) -> Result<u32, AccessError> {
        self.after_posted(|model| model.config_read32(offset))
    }

    fn interrupts_max(&self) -> u16 {
        self.shared.model.interrupts_max()
    }

    /// Masking it again would wait for the model, each time a core wakes; an eventfd too often signalled costs less.
    fn interrupt_attach(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), AccessError> {
        self.after_posted(|model| model.interrupt_attach(vector, eventfd))
    }
}
