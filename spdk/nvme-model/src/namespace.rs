//! Namespaces, and the subsystem that controllers share.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::mem;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Model;
use crate::controller::ControllerOptions;
use crate::store::{Backing, Store};

/// What a namespace shall be.
#[derive(Debug)]
pub struct NamespaceOptions {
    /// Its identifier, not 0.
    pub nsid: u32,
    /// Its block size as a power of two, 9 to 16.
    pub block_shift: u8,
    /// Its size in blocks.
    pub blocks: u64,
    /// Metadata bytes a block; the model moves none, it only says so (for drivers that must refuse).
    pub metadata_bytes: u16,
    /// NOIOB, in blocks; 0 for none.
    pub noiob: u16,
    /// MSSRL, most blocks of a source range of a Copy; MCL, most blocks of a Copy; MSRC, most ranges, zero-based.
    pub copy_limits: (u16, u32, u8),
    /// Whether it is write protected.
    pub read_only: bool,
    /// NGUID.
    pub nguid: [u8; 16],
    /// EUI64.
    pub eui64: [u8; 8],
    /// UUID, in the descriptor list when given.
    pub uuid: Option<[u8; 16]>,
    /// Where the blocks are.
    pub backing: Backing,
}

impl NamespaceOptions {
    /// Namespace `nsid` in memory, with blocks of 2^`block_shift` bytes.
    #[must_use]
    pub const fn memory(nsid: u32, block_shift: u8, blocks: u64) -> Self {
        let [a, b, c, d] = nsid.to_be_bytes();
        Self {
            nsid,
            block_shift,
            blocks,
            metadata_bytes: 0,
            noiob: 0,
            copy_limits: (128, 1024, 127),
            read_only: false,
            nguid: [0xFA, 0x57, 0x1C, 0xE0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d],
            eui64: [0xFA, 0x57, 0x1C, 0xE0, a, b, c, d],
            uuid: None,
            backing: Backing::Memory,
        }
    }

    /// Namespace `nsid` over all of an image or block device, with blocks of 2^`block_shift` bytes. What is left over at
    /// the end is not used.
    ///
    /// # Errors
    /// When the file does not tell its length.
    pub fn file(nsid: u32, block_shift: u8, mut file: File) -> io::Result<Self> {
        let len = file.seek(SeekFrom::End(0))?;
        let blocks = len.checked_shr(block_shift.into()).unwrap_or(0);
        Ok(Self { backing: Backing::File(file), ..Self::memory(nsid, block_shift, blocks) })
    }
}

/// Why a namespace cannot be added.
#[derive(Debug, thiserror::Error)]
#[error("namespace {nsid} cannot be added: {why}")]
pub struct NamespaceError {
    nsid: u32,
    why: &'static str,
}

/// A namespace with its blocks.
#[derive(Debug)]
pub(crate) struct Namespace {
    /// Without the backing.
    pub(crate) options: NamespaceOptions,
    store: Store,
}

impl Namespace {
    fn new(mut options: NamespaceOptions) -> Result<Self, NamespaceError> {
        let nsid = options.nsid;
        let refuse = |why| NamespaceError { nsid, why };
        if options.nsid == 0 || options.nsid > 1024 {
            return Err(refuse("its identifier is not in 1 to 1024"));
        }
        if !(9..=16).contains(&options.block_shift) {
            return Err(refuse("its block size is not in 512 to 65536"));
        }
        let bytes =
            options.blocks.checked_mul(1 << options.block_shift).and_then(|b| usize::try_from(b).ok());
        let Some(bytes) = bytes.filter(|&bytes| bytes > 0) else {
            return Err(refuse("its size is 0 or too large"));
        };
        let backing = mem::replace(&mut options.backing, Backing::Memory);
        let store = Store::new(backing, bytes, 1 << options.block_shift).map_err(refuse)?;
        Ok(Self { options, store })
    }

    pub(crate) const fn bytes(&self, blocks: u64) -> u64 {
        blocks << self.options.block_shift
    }

    /// Whether `blocks` from `lba` lie in the namespace.
    pub(crate) const fn holds(&self, lba: u64, blocks: u64) -> bool {
        lba <= self.options.blocks && blocks <= self.options.blocks - lba
    }

    /// Reads whole blocks; the caller has checked the range.
    pub(crate) fn read(&self, lba: u64, data: &mut [u8]) -> io::Result<()> {
        self.store.read(self.bytes(lba), data)
    }

    /// Writes whole blocks; the caller has checked the range.
    pub(crate) fn write(&self, lba: u64, data: &[u8]) -> io::Result<()> {
        self.store.write(self.bytes(lba), data)
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        self.store.flush()
    }

    /// Whether its blocks are behind system calls.
    pub(crate) const fn is_file(&self) -> bool {
        matches!(self.store, Store::File { .. })
    }
}

/// What the controllers of a subsystem share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) serial: String,
    pub(crate) nqn: String,
    namespaces: Mutex<BTreeMap<u32, Arc<Namespace>>>,
    /// Rises with each change of the namespaces.
    generation: AtomicU64,
    /// The generation in which each namespace changed last.
    changes: Mutex<BTreeMap<u32, u64>>,
    next_cntlid: AtomicU16,
}

impl Shared {
    pub(crate) fn namespace(&self, nsid: u32) -> Option<Arc<Namespace>> {
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner).get(&nsid).cloned()
    }

    pub(crate) fn nsids(&self) -> Vec<u32> {
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn note_change(&self, nsid: u32) {
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = self.generation.fetch_add(1, Ordering::AcqRel) + 1;
        changes.insert(nsid, generation);
    }

    /// The namespaces that changed after `generation`, in rising order.
    pub(crate) fn changed_since(&self, generation: u64) -> Vec<u32> {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.iter().filter(|(_, at)| **at > generation).map(|(nsid, _)| *nsid).collect()
    }

    /// The identifiers of all controllers.
    pub(crate) fn cntlids(&self) -> std::ops::Range<u16> {
        1..self.next_cntlid.load(Ordering::Relaxed)
    }
}

/// An NVM subsystem: namespaces, and controllers that all see them.
#[derive(Clone, Debug)]
pub struct Subsystem {
    shared: Arc<Shared>,
}

impl Subsystem {
    /// A subsystem without namespaces and controllers. The serial number is cut to 20 characters of ASCII.
    #[must_use]
    pub fn new(serial: &str) -> Self {
        Self {
            shared: Arc::new(Shared {
                serial: serial.to_owned(),
                nqn: format!("nqn.2026-01.fastice:model:{serial}"),
                namespaces: Mutex::new(BTreeMap::new()),
                generation: AtomicU64::new(0),
                changes: Mutex::new(BTreeMap::new()),
                next_cntlid: AtomicU16::new(1),
            }),
        }
    }

    /// Adds a namespace, or replaces the one with its identifier. Controllers report the change as an event.
    ///
    /// # Errors
    /// When the options make no namespace.
    pub fn add_namespace(&self, options: NamespaceOptions) -> Result<(), NamespaceError> {
        let namespace = Arc::new(Namespace::new(options)?);
        let nsid = namespace.options.nsid;
        self.shared.namespaces.lock().unwrap_or_else(PoisonError::into_inner).insert(nsid, namespace);
        self.shared.note_change(nsid);
        Ok(())
    }

    /// Removes a namespace; returns whether there was one.
    #[must_use]
    pub fn remove_namespace(&self, nsid: u32) -> bool {
        let gone =
            self.shared.namespaces.lock().unwrap_or_else(PoisonError::into_inner).remove(&nsid).is_some();
        if gone {
            self.shared.note_change(nsid);
        }
        gone
    }

    /// One more controller over these namespaces.
    #[must_use]
    pub fn controller(&self, options: ControllerOptions) -> Arc<Model> {
        let cntlid = self.shared.next_cntlid.fetch_add(1, Ordering::Relaxed);
        Arc::new(Model::new(self.shared.clone(), cntlid, options))
    }
}
