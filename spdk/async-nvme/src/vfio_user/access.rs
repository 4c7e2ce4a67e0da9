//! The way to a controller behind a socket.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hugepage_alloc::DmaRegion;
use nvme_spec::queue::DOORBELL_BASE;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::client::{CallError, Client, Region};
use super::dma::Table;
use super::peer::Peer;
use super::stream::{Stream, StreamError};
use super::wire::{IrqSet, SparseArea, device_flag, irq_set_flag, pci, region_flag};
use crate::access::{Access, AccessError, DmaMapping};

/// How long a server that has closed the socket is given to end.
const END_WAIT: Duration = Duration::from_millis(250);
/// The largest BAR that is believed.
const BAR_LEN_MAX: u64 = 1 << 30;
/// Command register of PCI: memory space, bus master.
const PCI_COMMAND: u16 = 4;
const PCI_COMMAND_BITS: u16 = 0b110;

/// How to speak with a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfioUserOptions {
    /// How long a message may take, there and back. A server that takes longer counts as gone. Every access to a
    /// register may block as long.
    pub message_deadline: Duration,
}

impl Default for VfioUserOptions {
    /// Two seconds.
    fn default() -> Self {
        Self { message_deadline: Duration::from_secs(2) }
    }
}

/// A controller in another process.
///
/// Registers are messages, so each access is a system call or two and may block up to the deadline; writes to doorbells
/// are sent without waiting for a reply, or go to shared memory where the server offers that. Messages of several
/// threads take turns.
///
/// Memory that is mapped must be shared ([`hugepage_alloc::RegionOptions::share`]).
///
/// When it is dropped the server is told to let go of all memory. One that does not answer may go on writing to it: to
/// the pages of the files it was given, which the kernel gives to nobody else as long as it has them.
#[derive(Debug)]
pub struct VfioUserAccess {
    name: String,
    bar_len: u64,
    /// Parts of the BAR that are shared memory.
    areas: Vec<Area>,
    resettable: bool,
    irq_index: u32,
    irq_count: u16,
    /// The server is gone; never false again.
    gone: AtomicBool,
    peer: Option<Peer>,
    /// The server's process was given time to end, which is done once.
    waited: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    dma: Table,
    masked: BTreeSet<u16>,
}

#[derive(Debug)]
struct Area {
    offset: u32,
    memory: DmaRegion,
}

impl VfioUserAccess {
    /// Connects to the server that listens at `path`, and gets to know its device.
    ///
    /// # Errors
    /// When nobody listens there, when the server does not answer as the protocol has it, or when its device is no PCI
    /// function with registers of an NVMe controller.
    pub fn connect(path: &Path, options: &VfioUserOptions) -> Result<Self, AccessError> {
        let name = format!("vfio-user:{}", path.display());
        let end = Instant::now() + options.message_deadline;
        match connect(path, end) {
            Ok(socket) => Self::over(socket, &name, options),
            Err(errno) => Err(AccessError::Io { what: "the connection", name, source: errno.into() }),
        }
    }

    /// As [`VfioUserAccess::connect`], over a socket that is connected already.
    ///
    /// # Errors
    /// As there.
    pub fn over(socket: UnixStream, name: &str, options: &VfioUserOptions) -> Result<Self, AccessError> {
        let io =
            |what: &'static str, source: io::Error| AccessError::Io { what, name: name.to_owned(), source };
        let lost = |what: &'static str| move |error| to_access_error(error, what, name);
        let second = socket.try_clone().map_err(|error| io("the socket", error))?;
        let stream = Stream::new(socket).map_err(|error| io("the socket", error))?;
        let mut client =
            Client::negotiate(stream, options.message_deadline).map_err(lost("the handshake"))?;
        let peer = Peer::of(&second);
        let info = client.device_info().map_err(lost("device information"))?;
        if info.flags & device_flag::PCI == 0 || info.num_regions <= pci::REGION_CONFIG {
            return Err(io("the device", io::Error::other("it is no PCI function")));
        }
        let bar = client.region_info(pci::REGION_BAR0).map_err(lost("information on BAR 0"))?;
        let needed = region_flag::READ | region_flag::WRITE;
        let fits = (u64::from(DOORBELL_BASE) + 8..=BAR_LEN_MAX).contains(&bar.info.len);
        if bar.info.flags & needed != needed || !fits {
            return Err(io("BAR 0", io::Error::other("it is not that of an NVMe controller")));
        }
        let (irq_index, irq_count) =
            interrupts(&mut client, info.num_irqs).map_err(lost("information on interrupts"))?;
        let access = Self {
            name: name.to_owned(),
            bar_len: bar.info.len,
            areas: map_areas(name, &bar),
            resettable: info.flags & device_flag::RESET != 0,
            irq_index,
            irq_count,
            gone: AtomicBool::new(false),
            peer,
            waited: AtomicBool::new(false),
            inner: Mutex::new(Inner { client, dma: Table::new(), masked: BTreeSet::new() }),
        };
        access.call("turning bus mastering on", |inner| enable_bus_master(&mut inner.client))?;
        Ok(access)
    }

    /// Whether doorbells are shared memory, written without a system call.
    #[must_use]
    pub fn has_mapped_doorbells(&self) -> bool {
        self.area(DOORBELL_BASE).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    fn gone(&self) -> AccessError {
        AccessError::Gone { name: self.name.clone() }
    }

    /// Speaks with the server, and notes when it is lost.
    fn call<T>(
        &self,
        what: &'static str,
        f: impl FnOnce(&mut Inner) -> Result<T, CallError>,
    ) -> Result<T, AccessError> {
        if self.is_gone() {
            return Err(self.gone());
        }
        f(&mut self.lock()).map_err(|error| self.failed(error, what))
    }

    fn failed(&self, error: CallError, what: &'static str) -> AccessError {
        if let CallError::Lost(why) = &error
            && !self.gone.swap(true, Ordering::AcqRel)
        {
            tracing::warn!(device = self.name, %why, "the server of a device is lost while {what}");
        }
        to_access_error(error, what, &self.name)
    }

    /// The shared memory behind four bytes of the BAR, and the position in it.
    fn area(&self, offset: u32) -> Option<(&DmaRegion, usize)> {
        self.areas.iter().find_map(|area| {
            let at = offset.checked_sub(area.offset)? as usize;
            (at + 4 <= area.memory.len()).then_some((&area.memory, at))
        })
    }

    fn in_bar(&self, offset: u32) -> bool {
        offset.is_multiple_of(4) && u64::from(offset) + 4 <= self.bar_len
    }

    fn vector(&self, vector: u16) -> Result<u32, AccessError> {
        if vector < self.irq_count {
            return Ok(vector.into());
        }
        Err(AccessError::NoSuch { what: format!("interrupt vector {vector}"), name: self.name.clone() })
    }

    /// Whether it is certain that the server's process has ended, and with it all that it mapped.
    fn server_has_ended(&self) -> bool {
        let Some(peer) = self.peer.as_ref().filter(|_| self.is_gone()) else { return false };
        let wait = if self.waited.swap(true, Ordering::Relaxed) { Duration::ZERO } else { END_WAIT };
        peer.has_ended_within(wait)
    }

    /// A server that says no more, but whose process may still write.
    fn may_still_write(&self, what: &'static str) -> AccessError {
        let source =
            io::Error::other("the server does not answer and its process has not ended: it may still write");
        AccessError::Io { what, name: self.name.clone(), source }
    }
}

impl Access for VfioUserAccess {
    fn name(&self) -> &str {
        &self.name
    }

    fn bar_len(&self) -> u64 {
        self.bar_len
    }

    fn read32(&self, offset: u32) -> u32 {
        if self.is_gone() || !self.in_bar(offset) {
            return u32::MAX;
        }
        if let Some((memory, at)) = self.area(offset) {
            return memory.load_u32(at).unwrap_or(u32::MAX);
        }
        let read = |inner: &mut Inner| inner.client.read(pci::REGION_BAR0, offset.into());
        self.call("reading a register", read).map_or(u32::MAX, u32::from_le_bytes)
    }

    fn write32(&self, offset: u32, value: u32) {
        if self.is_gone() || !self.in_bar(offset) {
            return;
        }
        if let Some((memory, at)) = self.area(offset) {
            // The position is in the memory and aligned.
            let _ = memory.store_u32(at, value);
            return;
        }
        let posted = offset >= DOORBELL_BASE;
        let write = |inner: &mut Inner| {
            inner.client.write(pci::REGION_BAR0, offset.into(), &value.to_le_bytes(), posted)
        };
        if let Err(error) = self.call("writing a register", write) {
            tracing::debug!(device = self.name, offset, %error, "a register was not written");
        }
    }

    fn dma_map(&self, region: &DmaRegion) -> Result<DmaMapping, AccessError> {
        let what = "mapping memory that is not shared (RegionOptions::share)";
        let Some((file, offset)) = region.file() else {
            return Err(AccessError::Unsupported { what, name: self.name.clone() });
        };
        if self.is_gone() {
            return Err(self.gone());
        }
        let mut inner = self.lock();
        let Inner { client, dma, .. } = &mut *inner;
        let none =
            || AccessError::NoSuch { what: "room for more mappings".to_owned(), name: self.name.clone() };
        if dma.entries.len() as u64 >= client.capabilities().max_dma_maps {
            return Err(none());
        }
        let (index, mapping) = dma.add(region).ok_or_else(none)?;
        let entry = &mut dma.entries[index];
        if dma.revoked {
            return Ok(mapping);
        }
        entry.live = true;
        match client.dma_map(entry.iova, entry.len(), file, offset) {
            Ok(()) => Ok(mapping),
            Err(error) => {
                // A server that is lost may have mapped it: it stays in the table, and so in memory.
                if matches!(error, CallError::Refused(_)) {
                    dma.remove(index);
                }
                Err(self.failed(error, "mapping memory"))
            }
        }
    }

    fn dma_unmap(&self, mapping: &DmaMapping) -> Result<(), AccessError> {
        let mut inner = self.lock();
        let Inner { client, dma, .. } = &mut *inner;
        let Some(index) = dma.find(mapping) else {
            return Err(AccessError::NoSuch { what: "such mapping".to_owned(), name: self.name.clone() });
        };
        let entry = &dma.entries[index];
        if entry.live
            && let Err(error) = client.dma_unmap(entry.iova, entry.len())
        {
            let error = self.failed(error, "unmapping memory");
            if !self.server_has_ended() {
                return Err(error);
            }
        }
        dma.remove(index);
        Ok(())
    }

    fn dma_revoke(&self) -> Result<(), AccessError> {
        let what = "revoking DMA";
        let mut inner = self.lock();
        let Inner { client, dma, .. } = &mut *inner;
        dma.revoked = true;
        let mut refused = None;
        for entry in dma.entries.iter_mut().filter(|entry| entry.live) {
            match client.dma_unmap(entry.iova, entry.len()) {
                Ok(()) => entry.live = false,
                Err(error) => refused = Some(self.failed(error, what)),
            }
        }
        if refused.is_some() && self.server_has_ended() {
            dma.all_dead();
            return Ok(());
        }
        match refused {
            None => Ok(()),
            Some(_) if self.is_gone() => Err(self.may_still_write(what)),
            Some(error) => Err(error),
        }
    }

    fn dma_restore(&self) -> Result<(), AccessError> {
        if self.is_gone() {
            return Err(self.gone());
        }
        let mut inner = self.lock();
        let Inner { client, dma, .. } = &mut *inner;
        for entry in dma.entries.iter_mut().filter(|entry| !entry.live) {
            let Some((file, offset)) = entry.region.file() else { continue };
            entry.live = true;
            client
                .dma_map(entry.iova, entry.region.len() as u64, file, offset)
                .inspect_err(|error| entry.live = matches!(error, CallError::Lost(_)))
                .map_err(|error| self.failed(error, "restoring DMA"))?;
        }
        dma.revoked = false;
        Ok(())
    }

    fn function_reset(&self) -> Result<(), AccessError> {
        if !self.resettable {
            return Err(AccessError::Unsupported { what: "a function reset", name: self.name.clone() });
        }
        self.call("resetting the device", |inner| {
            inner.client.reset()?;
            enable_bus_master(&mut inner.client)
        })
    }

    fn config_read32(&self, offset: u16) -> Result<u32, AccessError> {
        if !offset.is_multiple_of(4) {
            return Err(AccessError::NoSuch {
                what: format!("dword at {offset:#x}"),
                name: self.name.clone(),
            });
        }
        let read = |inner: &mut Inner| inner.client.read(pci::REGION_CONFIG, offset.into());
        self.call("reading configuration space", read).map(u32::from_le_bytes)
    }

    fn interrupts_max(&self) -> u16 {
        self.irq_count
    }

    fn interrupt_attach(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), AccessError> {
        let start = self.vector(vector)?;
        let set = |flags| IrqSet { flags, index: self.irq_index, start, count: 1, ..IrqSet::default() };
        self.call("attaching an interrupt", |inner| {
            let trigger = irq_set_flag::DATA_EVENTFD | irq_set_flag::ACTION_TRIGGER;
            inner.client.set_irqs(set(trigger), &[eventfd])?;
            if inner.masked.remove(&vector) {
                let unmask = irq_set_flag::DATA_NONE | irq_set_flag::ACTION_UNMASK;
                inner.client.set_irqs(set(unmask), &[])?;
            }
            Ok(())
        })
    }

    fn interrupt_detach(&self, vector: u16) -> Result<(), AccessError> {
        let start = self.vector(vector)?;
        let flags = irq_set_flag::DATA_NONE | irq_set_flag::ACTION_MASK;
        let set = IrqSet { flags, index: self.irq_index, start, count: 1, ..IrqSet::default() };
        self.call("masking an interrupt", |inner| {
            inner.client.set_irqs(set, &[])?;
            inner.masked.insert(vector);
            Ok(())
        })
    }
}

impl Drop for VfioUserAccess {
    fn drop(&mut self) {
        if let Err(error) = self.dma_revoke() {
            tracing::warn!(device = self.name, %error, "memory is left with the server of a device");
        }
    }
}

fn to_access_error(error: CallError, what: &'static str, name: &str) -> AccessError {
    let name = name.to_owned();
    match error {
        CallError::Lost(StreamError::Closed) => AccessError::Gone { name },
        CallError::Lost(error @ StreamError::Deadline) => {
            AccessError::Io { what, name, source: io::Error::new(io::ErrorKind::TimedOut, error) }
        }
        CallError::Lost(error) => {
            AccessError::Io { what, name, source: io::Error::new(io::ErrorKind::InvalidData, error) }
        }
        CallError::Refused(source) => AccessError::Io { what, name, source },
    }
}

/// Connects without blocking longer than until `end`, also when the listener's queue is full.
fn connect(path: &Path, end: Instant) -> Result<UnixStream, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket.into()),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(errno) => return Err(errno),
        }
    }
}

/// The device may write to memory only as a bus master.
fn enable_bus_master(client: &mut Client) -> Result<(), CallError> {
    let command = u16::from_le_bytes(client.read(pci::REGION_CONFIG, PCI_COMMAND.into())?);
    let command = (command | PCI_COMMAND_BITS).to_le_bytes();
    client.write(pci::REGION_CONFIG, PCI_COMMAND.into(), &command, false)
}

/// MSI-X, else MSI, and how many vectors.
fn interrupts(client: &mut Client, indexes: u32) -> Result<(u32, u16), CallError> {
    for index in [pci::IRQ_MSIX, pci::IRQ_MSI] {
        if index < indexes {
            let count = client.irq_info(index)?.count;
            if count > 0 {
                return Ok((index, u16::try_from(count).unwrap_or(u16::MAX)));
            }
        }
    }
    Ok((pci::IRQ_MSIX, 0))
}

/// Maps what of the BAR the server offers; what cannot be mapped is reached by messages, as all of it can be.
fn map_areas(name: &str, bar: &Region) -> Vec<Area> {
    let Some(file) = bar.file.as_ref().filter(|_| bar.info.flags & region_flag::MMAP != 0) else {
        return Vec::new();
    };
    let whole = [SparseArea { offset: 0, len: bar.info.len }];
    let areas = if bar.info.flags & region_flag::CAPS == 0 { &whole[..] } else { &bar.areas };
    areas.iter().filter_map(|area| map_area(name, bar, *area, file.as_fd())).collect()
}

fn map_area(name: &str, bar: &Region, area: SparseArea, file: BorrowedFd<'_>) -> Option<Area> {
    let inside = area.offset.checked_add(area.len).is_some_and(|end| end <= bar.info.len);
    let offset = u32::try_from(area.offset).ok().filter(|_| inside && area.offset.is_multiple_of(4096))?;
    let in_file = bar.info.offset.checked_add(area.offset)?;
    let file = file.try_clone_to_owned().ok()?;
    match DmaRegion::from_file(file, in_file, usize::try_from(area.len).ok()?, true) {
        Ok(memory) => Some(Area { offset, memory }),
        Err(error) => {
            tracing::debug!(device = name, offset, %error, "a part of the BAR is reached by messages");
            None
        }
    }
}
