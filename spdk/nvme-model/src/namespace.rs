//! Namespaces, and the subsystem that controllers share.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Model;
use crate::controller::ControllerOptions;

/// What holds the blocks of a namespace.
#[derive(Debug)]
pub enum Backing {
    /// Memory, zeros at first; lost with the namespace.
    Memory,
    /// A file or a block device of at least the namespace's size.
    File(File),
}

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
            read_only: false,
            nguid: [0xFA, 0x57, 0x1C, 0xE0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d],
            eui64: [0xFA, 0x57, 0x1C, 0xE0, a, b, c, d],
            uuid: None,
            backing: Backing::Memory,
        }
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
    pub(crate) options: NamespaceOptions,
    memory: Option<Mutex<Vec<u8>>>,
}

impl Namespace {
    fn new(options: NamespaceOptions) -> Result<Self, NamespaceError> {
        let refuse = |why| NamespaceError { nsid: options.nsid, why };
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
        let memory = match options.backing {
            Backing::Memory => Some(Mutex::new(vec![0; bytes])),
            Backing::File(_) => None,
        };
        Ok(Self { options, memory })
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
        let at = self.bytes(lba);
        match (&self.options.backing, &self.memory) {
            (Backing::File(file), _) => file.read_exact_at(data, at),
            (Backing::Memory, Some(memory)) => {
                let memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                let source = range(at, data.len())
                    .and_then(|range| memory.get(range))
                    .ok_or(io::ErrorKind::InvalidInput)?;
                data.copy_from_slice(source);
                Ok(())
            }
            (Backing::Memory, None) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Writes whole blocks; the caller has checked the range.
    pub(crate) fn write(&self, lba: u64, data: &[u8]) -> io::Result<()> {
        let at = self.bytes(lba);
        match (&self.options.backing, &self.memory) {
            (Backing::File(file), _) => file.write_all_at(data, at),
            (Backing::Memory, Some(memory)) => {
                let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                let target = range(at, data.len())
                    .and_then(|range| memory.get_mut(range))
                    .ok_or(io::ErrorKind::InvalidInput)?;
                target.copy_from_slice(data);
                Ok(())
            }
            (Backing::Memory, None) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        match &self.options.backing {
            Backing::File(file) => file.sync_data(),
            Backing::Memory => Ok(()),
        }
    }
}

fn range(at: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let at = usize::try_from(at).ok()?;
    Some(at..at.checked_add(len)?)
}

/// What the controllers of a subsystem share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) serial: String,
    pub(crate) nqn: String,
    namespaces: Mutex<BTreeMap<u32, Arc<Namespace>>>,
    /// Rises with each change of the namespaces.
    generation: AtomicU64,
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
        self.shared.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Removes a namespace; returns whether there was one.
    #[must_use]
    pub fn remove_namespace(&self, nsid: u32) -> bool {
        let gone =
            self.shared.namespaces.lock().unwrap_or_else(PoisonError::into_inner).remove(&nsid).is_some();
        self.shared.generation.fetch_add(1, Ordering::Release);
        gone
    }

    /// One more controller over these namespaces.
    #[must_use]
    pub fn controller(&self, options: ControllerOptions) -> Arc<Model> {
        let cntlid = self.shared.next_cntlid.fetch_add(1, Ordering::Relaxed);
        Arc::new(Model::new(self.shared.clone(), cntlid, options))
    }
}
