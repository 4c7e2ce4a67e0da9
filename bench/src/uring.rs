//! 4 KiB random reads by the kernel's driver: `io_uring` on the block device, with everything that makes it fast.
//!
//! ```text
//!   fill   IORING_OP_READ_FIXED into registered buffers, on a registered file, O_DIRECT
//!   reap   one system call submits and polls (IORING_SETUP_IOPOLL), completions from the ring
//! ```
#![expect(unsafe_code, reason = "hands buffers to the kernel")]

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hugepage_alloc::DmaRegion;
use io_uring::{IoUring, opcode, types};
use rustix::fs::OFlags;

use crate::load::{PLACES, READ_LEN, places};

/// A block device with `depth` reads open.
#[derive(Debug)]
pub struct Kernel {
    // Dropped first: the kernel is done with the buffers when the ring is gone.
    ring: Ring,
    region: DmaRegion,
    _file: File,
    places: Box<[u64]>,
    next: usize,
    free: Vec<u16>,
    depth: usize,
}

struct Ring(IoUring);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IoUring")
    }
}

impl Kernel {
    /// Opens the device. `polled` needs a driver with poll queues (`nvme.poll_queues=1`).
    ///
    /// # Errors
    /// When the device cannot be opened, or there is no `io_uring`.
    pub fn start(path: &Path, depth: u16, polled: bool) -> Result<Self> {
        let flags = i32::try_from(OFlags::DIRECT.bits()).context("O_DIRECT")?;
        let open = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let mut file = open.with_context(|| format!("{} cannot be opened", path.display()))?;
        let bytes = file.seek(SeekFrom::End(0))?;
        let places_max = bytes / u64::from(READ_LEN);
        ensure!(places_max > 0, "{} is too small", path.display());
        let region = DmaRegion::map(usize::from(depth) * READ_LEN as usize, true, true)?;
        let mut builder = IoUring::builder();
        builder.setup_single_issuer();
        if polled {
            builder.setup_iopoll();
        }
        let ring: IoUring = builder.build(u32::from(depth)).context("io_uring is not available")?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let iovec = libc::iovec { iov_base: region.as_ptr().cast(), iov_len: region.len() };
        // SAFETY: the region is mapped until after the ring is gone (order of the fields), and no reference into it is
        // ever made.
        unsafe { ring.submitter().register_buffers(&[iovec])? };
        Ok(Self {
            ring: Ring(ring),
            region,
            _file: file,
            places: places(places_max, 1),
            next: 0,
            free: (0..depth).rev().collect(),
            depth: usize::from(depth),
        })
    }

    /// Puts as many reads as fit into the ring.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn fill(&mut self) -> Result<()> {
        let mut queue = self.ring.0.submission();
        while let Some(slot) = self.free.pop() {
            let offset = self.places[self.next] * u64::from(READ_LEN);
            self.next = (self.next + 1) & (PLACES - 1);
            let at = self.region.as_ptr().wrapping_add(usize::from(slot) * READ_LEN as usize);
            let entry = opcode::ReadFixed::new(types::Fixed(0), at, READ_LEN, 0).offset(offset).build();
            // SAFETY: the buffer is one of the region's, `slot` is in no other entry, and the region outlives the ring.
            unsafe { queue.push(&entry.user_data(u64::from(slot))) }.context("the ring is full")?;
        }
        Ok(())
    }

    /// Submits, waits for one completion at least, and takes all there are: how many.
    ///
    /// # Errors
    /// When a read failed, or the kernel does not poll this device.
    pub fn reap(&mut self) -> Result<usize> {
        self.ring.0.submit_and_wait(1)?;
        let mut count = 0;
        let mut failed = None;
        for entry in self.ring.0.completion() {
            self.free.push(u16::try_from(entry.user_data())?);
            count += 1;
            if entry.result() != READ_LEN.cast_signed() {
                failed = Some(entry.result());
            }
        }
        match failed {
            None => Ok(count),
            Some(short) if short >= 0 => bail!("a read gave {short} bytes"),
            Some(errno) => Err(std::io::Error::from_raw_os_error(-errno))
                .context("a read failed (polling needs a driver with poll queues: nvme.poll_queues=1)"),
        }
    }

    /// Waits for all reads.
    ///
    /// # Errors
    /// When one failed.
    pub fn finish(mut self) -> Result<()> {
        while self.free.len() < self.depth {
            self.reap()?;
        }
        Ok(())
    }
}

impl Drop for Kernel {
    /// However it ended: the kernel is asked for all reads before their buffers go.
    fn drop(&mut self) {
        while self.free.len() < self.depth {
            if self.reap().is_err() {
                // The kernel may still write: leave it the memory.
                std::mem::forget(self.region.clone());
                return;
            }
        }
    }
}
