//! A vfio-user server played by hand: right but for one answer.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_nvme::vfio_user::wire::{
    CAPABILITY_SPARSE_MMAP, Capabilities, CapabilityHeader, Command, DeviceInfo, Header, IrqInfo,
    RegionAccess, RegionInfo, SparseArea, SparseMmap, Version, flag, pci, region_flag,
};
use async_nvme::vfio_user::{Message, Stream};
use async_nvme::{AccessError, VfioUserAccess, VfioUserOptions};
use zerocopy::{FromBytes, IntoBytes};

/// Long enough for a machine that is busy with other tests.
pub(crate) const DEADLINE: Duration = Duration::from_secs(1);
pub(crate) const BAR_LEN: u64 = 8192;

/// What is wrong with one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Close,
    Silence,
    Refusal,
    RefusalWithoutReason,
    OtherId,
    OtherCommand,
    OtherType,
    NoData,
    HalfAnHeader,
    HalfTheData,
    LengthTooLarge,
    LengthTooSmall,
    TooManyFiles,
    GarbageData,
    EndlessCommands,
}

pub(crate) const FAULTS: [Fault; 15] = [
    Fault::Close,
    Fault::Silence,
    Fault::Refusal,
    Fault::RefusalWithoutReason,
    Fault::OtherId,
    Fault::OtherCommand,
    Fault::OtherType,
    Fault::NoData,
    Fault::HalfAnHeader,
    Fault::HalfTheData,
    Fault::LengthTooLarge,
    Fault::LengthTooSmall,
    Fault::TooManyFiles,
    Fault::GarbageData,
    Fault::EndlessCommands,
];

/// Commands, their data, and how many files came with them.
pub(crate) type Seen = Arc<Mutex<Vec<(Command, Vec<u8>, usize)>>>;

/// A server that does as it should, but for one answer.
#[derive(Default)]
pub(crate) struct Script {
    /// The answer to the `skip + 1`-th command of this kind is faulty.
    pub(crate) fault: Option<(Command, usize, Fault)>,
    /// What BAR 0 offers for mapping, and the file.
    pub(crate) mappable: Option<(Vec<SparseArea>, OwnedFd)>,
    pub(crate) vectors: u32,
    pub(crate) max_dma_maps: u64,
    pub(crate) device_flags: u32,
    pub(crate) bar_len: u64,
    /// What came, for a test to look at.
    pub(crate) seen: Seen,
}

impl Script {
    pub(crate) fn good() -> Self {
        Self { max_dma_maps: 65535, device_flags: 3, bar_len: BAR_LEN, ..Self::default() }
    }

    pub(crate) fn fault(command: Command, skip: usize, fault: Fault) -> Self {
        Self { fault: Some((command, skip, fault)), ..Self::good() }
    }

    pub(crate) fn start(self) -> (UnixStream, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, std::thread::spawn(move || self.serve(theirs)))
    }

    pub(crate) fn connect(self) -> (Result<VfioUserAccess, AccessError>, JoinHandle<()>) {
        let (socket, server) = self.start();
        let options = VfioUserOptions { message_deadline: DEADLINE };
        (VfioUserAccess::over(socket, "scripted", &options), server)
    }

    pub(crate) fn serve(mut self, socket: UnixStream) {
        let raw = socket.try_clone().unwrap();
        let mut stream = Stream::new(socket).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while let Ok(message) = stream.receive(end) {
            let header = message.header;
            self.seen.lock().unwrap().push((header.command, message.body.clone(), message.fds.len()));
            if header.is_reply() || !header.wants_reply() {
                continue;
            }
            let data = self.answer(&message);
            if let Some((command, skip, fault)) = self.fault
                && command == header.command
            {
                self.fault = skip.checked_sub(1).map(|skip| (command, skip, fault));
                if skip == 0 {
                    if !misbehave(&raw, &mut stream, header, &data, fault, end) {
                        return;
                    }
                    continue;
                }
            }
            let file = self.mappable.as_ref().filter(|_| header.command == Command::DEVICE_GET_REGION_INFO);
            let fds: Vec<BorrowedFd<'_>> = file.iter().map(|(_, file)| file.as_fd()).collect();
            if stream.send(header.reply(), &[&data], &fds, end).is_err() {
                return;
            }
        }
    }

    pub(crate) fn answer(&self, message: &Message) -> Vec<u8> {
        let body = message.body.as_slice();
        match message.header.command {
            Command::VERSION => {
                let all = Capabilities { max_dma_maps: self.max_dma_maps, ..Capabilities::default() };
                [Version { major: 0, minor: 1 }.as_bytes(), &all.to_json()].concat()
            }
            Command::DEVICE_GET_INFO => {
                let flags = self.device_flags;
                DeviceInfo { argsz: 16, flags, num_regions: 9, num_irqs: 5 }.as_bytes().to_vec()
            }
            Command::DEVICE_GET_REGION_INFO => self.region_info(body),
            Command::DEVICE_GET_IRQ_INFO => {
                let (ask, _) = IrqInfo::read_from_prefix(body).unwrap();
                let count = if ask.index == pci::IRQ_MSIX { self.vectors } else { 0 };
                IrqInfo { count, flags: 1, ..ask }.as_bytes().to_vec()
            }
            Command::REGION_READ => {
                let (ask, _) = RegionAccess::read_from_prefix(body).unwrap();
                [ask.as_bytes(), &vec![0x42; ask.count as usize]].concat()
            }
            Command::REGION_WRITE => body[..16].to_vec(),
            Command::DMA_UNMAP => body.to_vec(),
            _ => Vec::new(),
        }
    }

    fn region_info(&self, body: &[u8]) -> Vec<u8> {
        let (ask, _) = RegionInfo::read_from_prefix(body).unwrap();
        let info = RegionInfo { argsz: 32, flags: 3, len: self.bar_len, ..ask };
        let Some((areas, _)) = &self.mappable else { return info.as_bytes().to_vec() };
        let flags = 3 | region_flag::MMAP | region_flag::CAPS;
        let info = RegionInfo { flags, cap_offset: 32, ..info };
        let header = CapabilityHeader { id: CAPABILITY_SPARSE_MMAP, version: 1, next: 0 };
        let list = SparseMmap { areas: u32::try_from(areas.len()).unwrap(), reserved: 0 };
        [info.as_bytes(), header.as_bytes(), list.as_bytes(), areas.as_slice().as_bytes()].concat()
    }
}

/// Gives the faulty answer. False when the connection is to be closed after it.
fn misbehave(
    raw: &UnixStream,
    stream: &mut Stream,
    asked: Header,
    data: &[u8],
    fault: Fault,
    end: Instant,
) -> bool {
    let reply = asked.reply();
    let len = u32::try_from(16 + data.len()).unwrap();
    let bytes = |header: Header, data: &[u8]| [header.as_bytes(), data].concat();
    let full = Header { message_len: len, ..reply };
    let mut socket = raw;
    let null = File::open("/dev/null").unwrap();
    let result = match fault {
        Fault::Close => return false,
        Fault::Silence => Ok(()),
        Fault::Refusal => stream.send(asked.error_reply(12), &[], &[], end).map_err(drop),
        Fault::RefusalWithoutReason => stream.send(asked.error_reply(u32::MAX), &[], &[], end).map_err(drop),
        Fault::OtherId => {
            let header = Header { message_id: asked.message_id.wrapping_add(1), ..reply };
            stream.send(header, &[data], &[], end).map_err(drop)
        }
        Fault::OtherCommand => {
            stream.send(Header { command: Command(77), ..reply }, &[data], &[], end).map_err(drop)
        }
        Fault::OtherType => stream.send(Header { flags: 7, ..reply }, &[data], &[], end).map_err(drop),
        Fault::NoData => stream.send(reply, &[], &[], end).map_err(drop),
        Fault::HalfAnHeader => socket.write_all(&bytes(full, data)[..7]).map_err(drop),
        Fault::HalfTheData => {
            socket.write_all(&bytes(Header { message_len: len + 9, ..full }, data)).map_err(drop)
        }
        Fault::LengthTooLarge => {
            socket.write_all(&bytes(Header { message_len: u32::MAX, ..full }, data)).map_err(drop)
        }
        Fault::LengthTooSmall => {
            socket.write_all(&bytes(Header { message_len: 9, ..full }, data)).map_err(drop)
        }
        Fault::TooManyFiles => {
            // In the first of two halves sixteen files, in the second one more.
            let fds = [null.as_fd(); 16];
            let header = Header::command(9, Command::DMA_READ, flag::NO_REPLY);
            stream
                .send(header, &[], &fds, end)
                .map_err(drop)
                .and_then(|()| stream.send(reply, &[data], &fds, end).map_err(drop))
        }
        Fault::GarbageData => {
            let garbage: Vec<u8> = data.iter().map(|byte| byte ^ 0xFF).collect();
            stream.send(reply, &[&garbage], &[], end).map_err(drop)
        }
        Fault::EndlessCommands => {
            let header = Header::command(9, Command::DMA_READ, 0);
            while stream.send(header, &[&[0; 16]], &[], end).is_ok() {}
            Ok(())
        }
    };
    result.is_ok()
}
