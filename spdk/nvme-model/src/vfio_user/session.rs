//! One client: its messages, what it mapped, and the end of both.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use async_nvme::access::Access;
use async_nvme::vfio_user::wire::{
    CAPABILITY_SPARSE_MMAP, Capabilities, CapabilityHeader, Command, DeviceInfo, DmaMap, DmaUnmap, Header,
    IrqInfo, MESSAGE_FDS_MAX, RegionAccess, RegionInfo, SparseMmap, VERSION_MAJOR, VERSION_MINOR, Version,
    device_flag, dma_flag, irq_flag, pci, region_flag, unmap_flag,
};
use async_nvme::vfio_user::{Message, Stream, StreamError};
use hugepage_alloc::{DmaRegion, PeerFileError};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::ServerOptions;
use super::doorbells::Doorbells;
use super::function::{CONFIG_LEN, Function, TABLE_REGION};
use super::interrupts::Interrupts;
use crate::Model;

/// Messages taken in one turn, so that the model gets its step.
const MESSAGES_PER_TURN: usize = 32;
/// Mappings that a client may have at a time.
const DMA_MAPS_MAX: usize = 1024;
/// Data of a region access, in bytes.
const DATA_LEN_MAX: u32 = 4096;

/// The data of a reply.
pub(crate) type Reply = Result<Vec<u8>, Errno>;

/// A client that is connected.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) model: Arc<Model>,
    stream: Stream,
    options: ServerOptions,
    negotiated: bool,
    function: Function,
    doorbells: Option<Doorbells>,
    /// Address and length of each mapping.
    mapped: Vec<(u64, u64)>,
    interrupts: Interrupts,
}

impl Session {
    pub(crate) fn new(model: Arc<Model>, socket: UnixStream, options: ServerOptions) -> io::Result<Self> {
        let stream = Stream::new(socket)?;
        let function = Function::new(&model);
        let doorbells =
            if options.mapped_doorbells { Doorbells::new(&model).map_err(io::Error::other)? } else { None };
        model.lock().iommu.set_revoked(true);
        Ok(Self {
            model,
            stream,
            options,
            negotiated: false,
            function,
            doorbells,
            mapped: Vec::new(),
            interrupts: Interrupts::default(),
        })
    }

    pub(crate) const fn has_doorbells(&self) -> bool {
        self.doorbells.is_some()
    }

    /// Takes doorbells and messages, and lets the model work. Returns whether there was anything to do.
    ///
    /// # Errors
    /// When the client is gone or cannot be understood.
    pub(crate) fn turn(&mut self) -> Result<bool, StreamError> {
        let mut worked = self.ring();
        for _ in 0..MESSAGES_PER_TURN {
            let Some(message) = self.stream.try_receive()? else { break };
            // What was rung before the message was sent is in memory by now.
            self.ring();
            self.handle(message)?;
            worked = true;
        }
        if self.stream.partial_for().is_some_and(|time| time > self.options.message_deadline) {
            return Err(StreamError::Deadline);
        }
        Ok(self.model.step() | worked)
    }

    fn ring(&self) -> bool {
        self.doorbells.as_ref().is_some_and(|doorbells| doorbells.ring(&self.model))
    }

    fn handle(&mut self, message: Message) -> Result<(), StreamError> {
        let header = message.header;
        if header.is_reply() {
            return Err(StreamError::Nonsense("a reply to nothing"));
        }
        if header.command != Command::VERSION && !self.negotiated {
            self.refuse(header, Errno::INVAL)?;
            return Err(StreamError::Nonsense("a command before the version"));
        }
        let body = message.body.as_slice();
        let reply = match header.command {
            Command::VERSION => self.version(body),
            Command::DMA_MAP => self.dma_map(message),
            Command::DMA_UNMAP => self.dma_unmap(body),
            Command::DEVICE_GET_INFO => device_info(body),
            Command::DEVICE_GET_REGION_INFO => return self.region_info(header, body),
            Command::DEVICE_GET_IRQ_INFO => self.irq_info(body),
            Command::DEVICE_SET_IRQS => self.interrupts.set(&self.model, message),
            Command::REGION_READ => self.region_read(body),
            Command::REGION_WRITE => self.region_write(body),
            Command::DEVICE_RESET => self.reset(),
            _ => Err(Errno::OPNOTSUPP),
        };
        match reply {
            Ok(data) => self.reply(header, &data, &[]),
            Err(errno) => self.refuse(header, errno),
        }
    }

    fn reply(&mut self, asked: Header, data: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), StreamError> {
        if !asked.wants_reply() {
            return Ok(());
        }
        let end = Instant::now() + self.options.message_deadline;
        self.stream.send(asked.reply(), &[data], fds, end)
    }

    fn refuse(&mut self, asked: Header, errno: Errno) -> Result<(), StreamError> {
        if !asked.wants_reply() {
            return Ok(());
        }
        let end = Instant::now() + self.options.message_deadline;
        self.stream.send(asked.error_reply(errno.raw_os_error().unsigned_abs()), &[], &[], end)
    }

    fn version(&mut self, body: &[u8]) -> Reply {
        let (theirs, json): (Version, _) = split(body)?;
        if self.negotiated || theirs.major != VERSION_MAJOR || Capabilities::from_json(json).is_none() {
            return Err(Errno::INVAL);
        }
        self.negotiated = true;
        let ours = Version { major: VERSION_MAJOR, minor: theirs.minor.min(VERSION_MINOR) };
        let capabilities = Capabilities {
            max_msg_fds: MESSAGE_FDS_MAX as u64,
            max_data_xfer_bytes: DATA_LEN_MAX.into(),
            max_dma_maps: DMA_MAPS_MAX as u64,
        };
        Ok([ours.as_bytes(), &capabilities.to_json()].concat())
    }

    fn dma_map(&mut self, message: Message) -> Reply {
        let (ask, _): (DmaMap, _) = split(&message.body)?;
        let known = dma_flag::READ | dma_flag::WRITE | dma_flag::MMAP;
        if ask.flags & !known != 0 || ask.flags & dma_flag::READ == 0 || message.fds.len() > 1 {
            return Err(Errno::INVAL);
        }
        if self.mapped.len() >= DMA_MAPS_MAX {
            return Err(Errno::NOSPC);
        }
        let Some(file) = message.fds.into_iter().next() else { return Err(Errno::OPNOTSUPP) };
        let len = usize::try_from(ask.len).map_err(|_| Errno::INVAL)?;
        let region = DmaRegion::from_file(file, ask.offset, len, ask.flags & dma_flag::WRITE != 0).map_err(
            |error| match error {
                PeerFileError::NotSealed => Errno::PERM,
                PeerFileError::Range { .. } => Errno::INVAL,
                PeerFileError::Map(errno) => errno,
            },
        )?;
        if !self.model.lock().iommu.map_at(ask.address, &region) {
            return Err(Errno::EXIST);
        }
        self.mapped.push((ask.address, ask.len));
        Ok(Vec::new())
    }

    fn dma_unmap(&mut self, body: &[u8]) -> Reply {
        let (ask, _): (DmaUnmap, _) = split(body)?;
        match ask.flags {
            0 => {
                let range = (ask.address, ask.len);
                let index = self.mapped.iter().position(|mapped| *mapped == range).ok_or(Errno::NOENT)?;
                self.mapped.swap_remove(index);
                let _ = self.model.lock().iommu.unmap_at(ask.address, ask.len);
            }
            unmap_flag::ALL => self.unmap_all(),
            _ => return Err(Errno::OPNOTSUPP),
        }
        Ok(ask.as_bytes().to_vec())
    }

    fn unmap_all(&mut self) {
        let mut controller = self.model.lock();
        for (address, len) in self.mapped.drain(..) {
            let _ = controller.iommu.unmap_at(address, len);
        }
    }

    /// The length and flags of a region, both 0 when there is none of that index.
    fn region(&self, index: u32) -> (u64, u32) {
        let both = region_flag::READ | region_flag::WRITE;
        match index {
            pci::REGION_BAR0 => (self.model.bar_len(), both),
            TABLE_REGION if self.function.table_len() > 0 => (self.function.table_len(), both),
            pci::REGION_CONFIG => (CONFIG_LEN as u64, both),
            _ => (0, 0),
        }
    }

    fn region_info(&mut self, header: Header, body: &[u8]) -> Result<(), StreamError> {
        let ask = match split::<RegionInfo>(body) {
            Ok((ask, _)) if ask.index < pci::REGIONS && ask.argsz >= 32 => ask,
            _ => return self.refuse(header, Errno::INVAL),
        };
        let (len, flags) = self.region(ask.index);
        let mut info = RegionInfo { argsz: 32, flags, index: ask.index, len, ..RegionInfo::default() };
        let doorbells = self.doorbells.as_ref().filter(|_| ask.index == pci::REGION_BAR0);
        let Some((doorbells, file)) = doorbells.and_then(|bells| Some((bells, bells.file()?))) else {
            return self.reply(header, info.as_bytes(), &[]);
        };
        let capability = CapabilityHeader { id: CAPABILITY_SPARSE_MMAP, version: 1, next: 0 };
        let list = SparseMmap { areas: 1, reserved: 0 };
        let area = doorbells.area();
        info.argsz = 32 + 8 + 8 + 16;
        info.flags |= region_flag::MMAP | region_flag::CAPS;
        info.cap_offset = 32;
        if ask.argsz < info.argsz {
            // The client learns how much room is needed, and asks again.
            info.cap_offset = 0;
            return self.reply(header, info.as_bytes(), &[]);
        }
        let data = [info.as_bytes(), capability.as_bytes(), list.as_bytes(), area.as_bytes()].concat();
        let Ok(file) = file.try_clone_to_owned() else { return self.refuse(header, Errno::MFILE) };
        self.reply(header, &data, &[file.as_fd()])
    }

    fn irq_info(&self, body: &[u8]) -> Reply {
        let (ask, _): (IrqInfo, _) = split(body)?;
        if ask.index >= pci::IRQS {
            return Err(Errno::INVAL);
        }
        let count = if ask.index == pci::IRQ_MSIX { u32::from(self.model.interrupts_max()) } else { 0 };
        let flags = if count > 0 { irq_flag::EVENTFD | irq_flag::MASKABLE } else { 0 };
        Ok(IrqInfo { argsz: 16, flags, index: ask.index, count }.as_bytes().to_vec())
    }

    fn region_read(&self, body: &[u8]) -> Reply {
        let (ask, rest): (RegionAccess, _) = split(body)?;
        if !rest.is_empty() || ask.count > DATA_LEN_MAX {
            return Err(Errno::INVAL);
        }
        let mut data = vec![0; ask.count as usize];
        let fits = match ask.region {
            pci::REGION_BAR0 => self.read_bar(ask.offset, &mut data),
            TABLE_REGION => self.function.read_table(ask.offset, &mut data),
            pci::REGION_CONFIG => self.function.read_config(ask.offset, &mut data),
            _ => false,
        };
        if !fits {
            return Err(Errno::INVAL);
        }
        if ask.region == pci::REGION_CONFIG && self.model.lock().gone {
            data.fill(0xFF);
        }
        Ok([ask.as_bytes(), &data].concat())
    }

    fn region_write(&mut self, body: &[u8]) -> Reply {
        let (ask, data): (RegionAccess, _) = split(body)?;
        if data.len() != ask.count as usize || ask.count > DATA_LEN_MAX {
            return Err(Errno::INVAL);
        }
        let fits = match ask.region {
            pci::REGION_BAR0 => self.write_bar(ask.offset, data),
            TABLE_REGION => self.function.write_table(ask.offset, data),
            pci::REGION_CONFIG => {
                let fits = self.function.write_config(ask.offset, data);
                self.model.lock().iommu.set_revoked(!self.function.is_bus_master());
                fits
            }
            _ => false,
        };
        if fits { Ok(ask.as_bytes().to_vec()) } else { Err(Errno::INVAL) }
    }

    /// The registers take aligned accesses of four and eight bytes, as the specification has it.
    fn bar_offset(&self, offset: u64, count: usize) -> Option<u32> {
        let offset = u32::try_from(offset).ok()?;
        let end = u64::from(offset) + count as u64;
        let fits = matches!(count, 4 | 8) && offset.is_multiple_of(4) && end <= self.model.bar_len();
        fits.then_some(offset)
    }

    fn read_bar(&self, offset: u64, target: &mut [u8]) -> bool {
        let Some(offset) = self.bar_offset(offset, target.len()) else { return false };
        if target.len() == 4 {
            target.copy_from_slice(&self.model.read32(offset).to_le_bytes());
        } else {
            target.copy_from_slice(&self.model.read64(offset).to_le_bytes());
        }
        true
    }

    fn write_bar(&self, offset: u64, source: &[u8]) -> bool {
        let Some(offset) = self.bar_offset(offset, source.len()) else { return false };
        if let Ok(bytes) = <[u8; 4]>::try_from(source) {
            self.model.write32(offset, u32::from_le_bytes(bytes));
        } else if let Ok(bytes) = <[u8; 8]>::try_from(source) {
            self.model.write64(offset, u64::from_le_bytes(bytes));
        }
        true
    }

    fn reset(&mut self) -> Reply {
        self.model.function_reset().map_err(|_| Errno::IO)?;
        if let Some(doorbells) = &self.doorbells {
            doorbells.clear();
        }
        Ok(Vec::new())
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Drop for Session {
    /// What the client had is taken from the model: memory first, then all that it was doing.
    fn drop(&mut self) {
        self.unmap_all();
        self.interrupts.end(&self.model);
        let mut controller = self.model.lock();
        controller.function_reset();
        controller.iommu.set_revoked(false);
    }
}

fn device_info(body: &[u8]) -> Reply {
    let (_, _): (DeviceInfo, _) = split(body)?;
    let flags = device_flag::PCI | device_flag::RESET;
    let info = DeviceInfo { argsz: 16, flags, num_regions: pci::REGIONS, num_irqs: pci::IRQS };
    Ok(info.as_bytes().to_vec())
}

/// The fixed part of a message, and what follows it.
pub(crate) fn split<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(body).map_err(|_| Errno::INVAL)
}
