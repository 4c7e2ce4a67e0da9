//! An NVMe controller in software over a block device or an image: the whole design on any machine.
//!
//! The controller works in a thread of its own, which sleeps while no doorbell rings. Its namespace 1 is the device from
//! its first byte to its last, with the device's logical blocks.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use async_nvme::access::{Access, AccessError, DmaMapping};
use hugepage_alloc::DmaRegion;
use nvme_model::{Backing, ControllerOptions, Model, NamespaceOptions, Subsystem};
use sha2::{Digest as _, Sha256};

use super::reach::Reached;

/// The longest sleep: what the model counts in steps goes on meanwhile.
const SLEEP_MAX: Duration = Duration::from_millis(1);
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
    let options = ControllerOptions { name: format!("model of {}", path.display()), ..Default::default() };
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

/// A model whose thread wakes when a register is written.
#[derive(Debug)]
struct Stepped {
    model: Arc<Model>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stepped {
    fn start(model: Arc<Model>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (worker, stopped) = (Arc::clone(&model), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("nvme-model".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                if !worker.step() {
                    std::thread::park_timeout(SLEEP_MAX);
                }
            }
        })?;
        Ok(Self { model, stop, thread: Some(thread) })
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Stepped {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(name = self.model.name(), "the thread of a model panicked");
        }
    }
}

impl Access for Stepped {
    fn name(&self) -> &str {
        self.model.name()
    }

    fn bar_len(&self) -> u64 {
        self.model.bar_len()
    }

    fn read32(&self, offset: u32) -> u32 {
        self.model.read32(offset)
    }

    fn write32(&self, offset: u32, value: u32) {
        self.model.write32(offset, value);
        self.wake();
    }

    fn read64(&self, offset: u32) -> u64 {
        self.model.read64(offset)
    }

    fn write64(&self, offset: u32, value: u64) {
        self.model.write64(offset, value);
        self.wake();
    }

    fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError> {
        self.model.dma_map(region)
    }

    fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError> {
        self.model.dma_unmap(mapping)
    }

    fn dma_revoke(&self) -> Result<(), AccessError> {
        self.model.dma_revoke()
    }

    fn dma_restore(&self) -> Result<(), AccessError> {
        self.model.dma_restore()
    }

    fn function_reset(&self) -> Result<(), AccessError> {
        self.model.function_reset()
    }

    fn config_read32(&self, offset: u16) -> Result<u32, AccessError> {
        self.model.config_read32(offset)
    }

    fn interrupts_max(&self) -> u16 {
        self.model.interrupts_max()
    }

    fn interrupt_attach(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), AccessError> {
        self.model.interrupt_attach(vector, eventfd)
    }

    fn interrupt_detach(&self, vector: u16) -> Result<(), AccessError> {
        self.model.interrupt_detach(vector)
    }
}
