//! Proving that a device is the one under pinned files: before the first grant, and whenever it is back.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use super::disks::NvmeKey;
use super::error::DiskError;
use super::event::Event;
use crate::block::BlockDevice as _;
use crate::block::nvme::{Epoch, NvmeDevice, Standing};
use crate::extent::ondisk::ReadAt;
use crate::extent::{FrozenMap, SampleOf, Witness, verify_on_device};
use crate::units::{ByteLen, ByteOffset};

/// How long blocks are picked at random; those that must be looked at are, however long it takes.
const SAMPLING: Duration = Duration::from_secs(3);
/// How long the device may take for all that was picked.
const READING: Duration = Duration::from_secs(20);
/// Samples that must be looked at: the superblock, the first and the last block.
const SAMPLES_MIN: usize = 3;
/// How long a device that is back, and does not answer yet, is tried again.
const RETURN_PATIENCE: Duration = Duration::from_secs(120);
const RETURN_PAUSE: Duration = Duration::from_secs(2);

/// Who says what a device must hold.
#[derive(Debug)]
pub(super) enum Voucher {
    /// The filesystem that is mounted over it.
    Filesystem(Witness),
    /// The device itself, of a file that was handed over: its filesystem is not mounted.
    Device(Arc<FrozenMap>),
}

/// A filesystem on a device, read by our driver. For metadata: a read at a time, waited for.
pub(super) struct FilesystemOn<'a> {
    device: &'a NvmeDevice,
    /// Where it begins on the whole disk.
    start: ByteOffset,
    deadline: Instant,
}

impl<'a> FilesystemOn<'a> {
    pub(super) fn new(device: &'a NvmeDevice, start: ByteOffset) -> Self {
        Self { device, start, deadline: Instant::now() + READING }
    }
}

impl ReadAt for FilesystemOn<'_> {
    fn read_at(&mut self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let block = u64::from(self.device.info().logical_block_size.bytes());
        let at = self.start.get().checked_add(offset).ok_or_else(outside)?;
        let end = at.checked_add(target.len() as u64).and_then(|end| end.checked_next_multiple_of(block));
        // Whole blocks around what is wanted.
        let skip = at % block;
        let (first, len) = (at - skip, end.ok_or_else(outside)?.saturating_sub(at - skip));
        let bytes =
            self.device.read(ByteOffset(first), ByteLen(len), self.deadline).map_err(io::Error::other)?;
        let wanted = usize::try_from(skip).ok().and_then(|skip| bytes.get(skip..)?.get(..target.len()));
        target.copy_from_slice(wanted.ok_or_else(outside)?);
        Ok(())
    }
}

/// What was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Proof {
    blocks: usize,
    /// Blocks of the file that are not all one byte.
    telling: usize,
}

impl Proof {
    pub(super) fn log(self, device: &str, path: &Path) {
        let (path, blocks, telling) = (path.display(), self.blocks, self.telling);
        if telling == 0 {
            tracing::warn!(
                %path, device, blocks,
                "the device has the filesystem; the blocks of the file say no more, for each of them is one byte over and over"
            );
        } else {
            tracing::info!(%path, device, blocks, telling, "the device is the one under the file");
        }
    }
}

/// Compares what the driver reads with what the filesystem reads.
///
/// # Errors
/// [`DiskError::Mismatch`] when they differ; anything else is no verdict.
pub(super) fn prove(device: &NvmeDevice, witness: &Witness) -> Result<Proof, DiskError> {
    let name = || device.info().name.clone();
    let started = Instant::now();
    let samples = witness.samples(started + SAMPLING)?;
    let mut proof = Proof { blocks: 0, telling: 0 };
    for sample in &samples {
        if proof.blocks >= SAMPLES_MIN && started.elapsed() > READING / 2 {
            break;
        }
        let bytes = device
            .read(sample.device_offset, sample.len, started + READING)
            .map_err(|source| DiskError::Read { device: name(), source })?;
        sample.check(&bytes).map_err(|source| DiskError::Mismatch {
            device: name(),
            path: witness.map().identity().path.clone(),
            source,
        })?;
        proof.blocks += 1;
        proof.telling += usize::from(sample.of != SampleOf::Superblock && sample.is_telling());
    }
    Ok(proof)
}

/// Proves a device that is back on a thread of its own, because a filesystem whose device comes and goes may not answer:
/// the control thread has recalls to hear. The verdict arrives as [`Event::Verdict`].
pub(super) fn prove_again(
    key: NvmeKey,
    device: Arc<NvmeDevice>,
    epoch: Epoch,
    vouchers: Vec<Voucher>,
    events: Sender<Event>,
) {
    let body = move || {
        let deadline = Instant::now() + RETURN_PATIENCE;
        let verdict = loop {
            match look(&device, &vouchers) {
                Err(error) if !error.is_verdict() && Instant::now() < deadline => {
                    if device.standing() != Standing::Unproven(epoch) {
                        return;
                    }
                    tracing::warn!(device = device.info().name, %error, "cannot be proven yet; trying again");
                    thread::sleep(RETURN_PAUSE);
                }
                verdict => break verdict,
            }
        };
        // Nobody listens any more only when everything is being let go.
        let _ = events.send(Event::Verdict { key, epoch, verdict });
    };
    if let Err(error) = thread::Builder::new().name("nvme-proof".to_owned()).spawn(body) {
        tracing::error!(%error, "a device that is back stays fenced: no thread to prove it on");
    }
}

fn look(device: &NvmeDevice, vouchers: &[Voucher]) -> Result<(), DiskError> {
    for voucher in vouchers {
        match voucher {
            Voucher::Filesystem(witness) => {
                let report = witness.verify()?;
                if !report.map_is_true() {
                    return Err(DiskError::MapChanged { path: witness.map().identity().path.clone() });
                }
                prove(device, witness)?.log(&device.info().name, &witness.map().identity().path);
            }
            Voucher::Device(map) => {
                let start = map.identity().disk.partition_start;
                verify_on_device(map, &mut FilesystemOn::new(device, start))?;
            }
        }
    }
    Ok(())
}
