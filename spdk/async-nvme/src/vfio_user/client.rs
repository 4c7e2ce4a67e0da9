//! Commands and their replies: each is sent, answered by its own reply within its deadline, and checked.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::stream::{Message, Stream, StreamError};
use super::wire::{
    Capabilities, Command, DeviceInfo, DmaMap, DmaUnmap, Header, IrqInfo, IrqSet, RegionAccess, RegionInfo,
    SparseArea, VERSION_MAJOR, VERSION_MINOR, Version, dma_flag, flag, region_flag, sparse_areas,
};

/// The room for a region's capabilities, as a server is told.
const REGION_INFO_ROOM: u32 = 4096;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The server said no. Everything else goes on.
    #[error("the server refused")]
    Refused(#[source] io::Error),
    /// The connection is of no more use.
    #[error(transparent)]
    Lost(#[from] StreamError),
}

/// What a region is, and what of it may be mapped.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) info: RegionInfo,
    pub(crate) areas: Vec<SparseArea>,
    pub(crate) file: Option<OwnedFd>,
}

/// The client's end.
#[derive(Debug)]
pub(crate) struct Client {
    stream: Stream,
    next_id: u16,
    deadline: Duration,
    capabilities: Capabilities,
    lost: bool,
}

impl Client {
    /// Agrees with the server on a version.
    pub(crate) fn negotiate(stream: Stream, deadline: Duration) -> Result<Self, CallError> {
        let capabilities = Capabilities::default();
        let mut client = Self { stream, next_id: 0, deadline, capabilities, lost: false };
        let version = Version { major: VERSION_MAJOR, minor: VERSION_MINOR };
        let message = client.call(Command::VERSION, &[version.as_bytes(), &capabilities.to_json()], &[])?;
        let (theirs, json): (Version, _) = client.split(&message)?;
        if theirs.major != VERSION_MAJOR || theirs.minor > VERSION_MINOR {
            return Err(client.lose(StreamError::Nonsense("a version that was not proposed")));
        }
        match Capabilities::from_json(json) {
            Some(capabilities) => client.capabilities = capabilities,
            None => return Err(client.lose(StreamError::Nonsense("capabilities that are none"))),
        }
        Ok(client)
    }

    pub(crate) const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    pub(crate) fn device_info(&mut self) -> Result<DeviceInfo, CallError> {
        let ask = DeviceInfo { argsz: 16, ..DeviceInfo::default() };
        self.exchange(Command::DEVICE_GET_INFO, &ask)
    }

    pub(crate) fn region_info(&mut self, index: u32) -> Result<Region, CallError> {
        let ask = RegionInfo { argsz: REGION_INFO_ROOM, index, ..RegionInfo::default() };
        let mut message = self.call(Command::DEVICE_GET_REGION_INFO, &[ask.as_bytes()], &[])?;
        let file = message.fds.pop();
        let (info, capabilities): (RegionInfo, _) = self.split(&message)?;
        if info.index != index {
            return Err(self.lose(StreamError::Nonsense("another region than was asked for")));
        }
        let mut areas = Vec::new();
        if info.flags & region_flag::CAPS != 0 {
            match sparse_areas(&info, capabilities) {
                Some(found) => areas = found,
                None => return Err(self.lose(StreamError::Nonsense("a list of capabilities that is none"))),
            }
        }
        Ok(Region { info, areas, file })
    }

    pub(crate) fn irq_info(&mut self, index: u32) -> Result<IrqInfo, CallError> {
        let ask = IrqInfo { argsz: 16, index, ..IrqInfo::default() };
        self.exchange(Command::DEVICE_GET_IRQ_INFO, &ask)
    }

    pub(crate) fn read<const N: usize>(&mut self, region: u32, offset: u64) -> Result<[u8; N], CallError> {
        let count = u32::try_from(N).unwrap_or(0);
        let ask = RegionAccess { offset, region, count };
        let message = self.call(Command::REGION_READ, &[ask.as_bytes()], &[])?;
        let (answer, data): (RegionAccess, _) = self.split(&message)?;
        match <[u8; N]>::try_from(data) {
            Ok(bytes) if answer == ask => Ok(bytes),
            _ => Err(self.lose(StreamError::Nonsense("other data than was asked for"))),
        }
    }

    /// A write is posted when nobody waits for its reply: the next reply to something else is behind it.
    pub(crate) fn write(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
        posted: bool,
    ) -> Result<(), CallError> {
        let count = u32::try_from(data.len()).unwrap_or(0);
        let ask = RegionAccess { offset, region, count };
        if posted {
            let header = self.header(Command::REGION_WRITE, flag::NO_REPLY);
            let end = Instant::now() + self.deadline;
            return self.guarded(|client| client.stream.send(header, &[ask.as_bytes(), data], &[], end));
        }
        let message = self.call(Command::REGION_WRITE, &[ask.as_bytes(), data], &[])?;
        let (answer, _): (RegionAccess, _) = self.split(&message)?;
        if answer != ask {
            return Err(self.lose(StreamError::Nonsense("an answer to another write")));
        }
        Ok(())
    }

    pub(crate) fn dma_map(
        &mut self,
        address: u64,
        len: u64,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<(), CallError> {
        let ask = DmaMap { argsz: 32, flags: dma_flag::READ | dma_flag::WRITE, offset, address, len };
        self.call(Command::DMA_MAP, &[ask.as_bytes()], &[file])?;
        Ok(())
    }

    pub(crate) fn dma_unmap(&mut self, address: u64, len: u64) -> Result<(), CallError> {
        let ask = DmaUnmap { argsz: 24, flags: 0, address, len };
        let answer: DmaUnmap = self.exchange(Command::DMA_UNMAP, &ask)?;
        if (answer.address, answer.len) != (address, len) {
            return Err(self.lose(StreamError::Nonsense("the end of another mapping")));
        }
        Ok(())
    }

    pub(crate) fn set_irqs(&mut self, set: IrqSet, fds: &[BorrowedFd<'_>]) -> Result<(), CallError> {
        let set = IrqSet { argsz: 20, ..set };
        self.call(Command::DEVICE_SET_IRQS, &[set.as_bytes()], fds)?;
        Ok(())
    }

    pub(crate) fn reset(&mut self) -> Result<(), CallError> {
        self.call(Command::DEVICE_RESET, &[], &[])?;
        Ok(())
    }

    fn exchange<T>(&mut self, command: Command, ask: &T) -> Result<T, CallError>
    where
        T: IntoBytes + FromBytes + Immutable + KnownLayout,
    {
        let message = self.call(command, &[ask.as_bytes()], &[])?;
        let (answer, _) = self.split(&message)?;
        Ok(answer)
    }

    /// The fixed part of a reply, and what follows it.
    fn split<'m, T>(&mut self, message: &'m Message) -> Result<(T, &'m [u8]), CallError>
    where
        T: FromBytes + KnownLayout + Immutable,
    {
        T::read_from_prefix(&message.body)
            .map_err(|_| self.lose(StreamError::Nonsense("a reply that is too short")))
    }

    fn header(&mut self, command: Command, flags: u32) -> Header {
        self.next_id = self.next_id.wrapping_add(1);
        Header::command(self.next_id, command, flags)
    }

    fn call(
        &mut self,
        command: Command,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, CallError> {
        let end = Instant::now() + self.deadline;
        let header = self.header(command, 0);
        let message = self.guarded(|client| {
            client.stream.send(header, parts, fds, end)?;
            client.reply_to(header, end)
        })?;
        if message.header.flags & flag::ERROR == 0 {
            return Ok(message);
        }
        let errno = i32::try_from(message.header.error).unwrap_or(0);
        let unnamed = || io::Error::other("without a reason");
        Err(CallError::Refused(if errno > 0 { io::Error::from_raw_os_error(errno) } else { unnamed() }))
    }

    fn reply_to(&mut self, asked: Header, end: Instant) -> Result<Message, StreamError> {
        loop {
            let message = self.stream.receive(end)?;
            let header = message.header;
            if header.is_reply() {
                if (header.message_id, header.command) != (asked.message_id, asked.command) {
                    return Err(StreamError::Nonsense("a reply to what was not asked"));
                }
                return Ok(message);
            }
            if header.flags & flag::TYPE_MASK != flag::COMMAND {
                return Err(StreamError::Nonsense("neither a command nor a reply"));
            }
            // Memory by messages, which we never leave a server to.
            if header.wants_reply() {
                let errno = Errno::OPNOTSUPP.raw_os_error().unsigned_abs();
                self.stream.send(header.error_reply(errno), &[], &[], end)?;
            }
        }
    }

    fn guarded<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T, StreamError>) -> Result<T, CallError> {
        if self.lost {
            return Err(CallError::Lost(StreamError::Closed));
        }
        f(self).map_err(|error| self.lose(error))
    }

    /// Ends the connection: what the two ends think of each other no longer fits.
    fn lose(&mut self, error: StreamError) -> CallError {
        self.lost = true;
        self.stream.shut_down();
        CallError::Lost(error)
    }
}
