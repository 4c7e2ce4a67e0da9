//! Goal: no client can stop the server, make it reach memory it was not given, or leave anything to the next client.
//! Method: clients that speak the protocol by hand, right and wrong; after each the server serves a good one.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nvme::Access;
use async_nvme::vfio_user::wire::{
    Capabilities, Command, DeviceInfo, DmaMap, DmaUnmap, Header, IrqInfo, IrqSet, RegionAccess, RegionInfo,
    Version, flag, pci, region_flag, sparse_areas,
};
use async_nvme::vfio_user::{Message, Stream, StreamError};
use hugepage_alloc::{DmaRegion, RegionOptions};
use nvme_model::vfio_user::{Server, ServerOptions, ServerThread};
use nvme_model::{ControllerOptions, Model, NamespaceOptions, Subsystem};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

const CC: u64 = 0x14;
const CSTS: u64 = 0x1C;
const IOVA: u64 = 0x4000_0000;

struct Rig {
    model: Arc<Model>,
    path: PathBuf,
    _server: ServerThread,
    _directory: TempDir,
}

impl Rig {
    fn new() -> Self {
        let subsystem = Subsystem::new("HOSTILE1");
        subsystem.add_namespace(NamespaceOptions::memory(1, 9, 64)).unwrap();
        let model =
            subsystem.controller(ControllerOptions { io_queues_max: 2, ..ControllerOptions::default() });
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nvme.sock");
        let options =
            ServerOptions { message_deadline: Duration::from_millis(200), ..ServerOptions::default() };
        let server = Server::bind(&path, model.clone(), options).unwrap().spawn().unwrap();
        Self { model, path, _server: server, _directory: directory }
    }

    fn client(&self) -> Client {
        Client { stream: Stream::new(UnixStream::connect(&self.path).unwrap()).unwrap(), id: 0 }
    }

    /// A client that has agreed on the version.
    fn greeted(&self) -> Client {
        let mut client = self.client();
        let version = Version { major: 0, minor: 1 };
        let message = client.call(Command::VERSION, &[version.as_bytes()], &[]).unwrap();
        assert_eq!(Version::read_from_prefix(&message.body).unwrap().0, version);
        assert!(Capabilities::from_json(&message.body[4..]).is_some_and(|all| all.max_dma_maps == 1024));
        client
    }

    /// The server is alive, and nothing of an earlier client is left.
    fn still_serves(&self) {
        let mut client = self.greeted();
        let cap = client.read(pci::REGION_BAR0, 0, 8).unwrap();
        assert_eq!(cap, self.model.read64(0).to_le_bytes());
        assert_eq!(client.read(pci::REGION_BAR0, CC, 4).unwrap(), [0; 4]);
        assert_eq!(client.read(pci::REGION_CONFIG, 4, 2).unwrap(), [0; 2], "no bus master");
    }
}

/// One end of the protocol, by hand.
struct Client {
    stream: Stream,
    id: u16,
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

impl Client {
    fn send(&mut self, command: Command, flags: u32, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) {
        self.id = self.id.wrapping_add(1);
        self.stream.send(Header::command(self.id, command, flags), parts, fds, soon()).unwrap();
    }

    /// The reply, or its errno.
    fn call(&mut self, command: Command, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<Message, u32> {
        self.send(command, 0, parts, fds);
        let message = self.stream.receive(soon()).unwrap();
        let header = message.header;
        assert!(header.is_reply());
        assert_eq!((header.message_id, header.command), (self.id, command));
        if header.flags & flag::ERROR == 0 { Ok(message) } else { Err(header.error) }
    }

    fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let ask = RegionAccess { offset, region, count };
        let message = self.call(Command::REGION_READ, &[ask.as_bytes()], &[])?;
        assert_eq!(&message.body[..16], ask.as_bytes());
        Ok(message.body[16..].to_vec())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), u32> {
        let ask = RegionAccess { offset, region, count: u32::try_from(data.len()).unwrap() };
        self.call(Command::REGION_WRITE, &[ask.as_bytes(), data], &[]).map(|_| ())
    }

    fn map(&mut self, map: DmaMap, fds: &[BorrowedFd<'_>]) -> Result<(), u32> {
        self.call(Command::DMA_MAP, &[map.as_bytes()], fds).map(|_| ())
    }

    fn unmap(&mut self, address: u64, len: u64, flags: u32) -> Result<(), u32> {
        let ask = DmaUnmap { argsz: 24, flags, address, len };
        self.call(Command::DMA_UNMAP, &[ask.as_bytes()], &[]).map(|_| ())
    }

    /// The server ends the connection, sooner or later.
    fn wait_until_dropped(mut self) {
        loop {
            match self.stream.receive(soon()) {
                Ok(_) => {}
                Err(StreamError::Closed | StreamError::Io(_)) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn errno(errno: Errno) -> u32 {
    errno.raw_os_error().unsigned_abs()
}

fn whole(len: u64) -> DmaMap {
    DmaMap { argsz: 32, flags: 3, offset: 0, address: IOVA, len }
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(c"test", flags).unwrap();
    rustix::fs::ftruncate(&file, len).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

#[test]
fn what_the_device_is_can_be_asked() {
    let rig = Rig::new();
    let mut client = rig.greeted();
    let ask = DeviceInfo { argsz: 16, ..DeviceInfo::default() };
    let message = client.call(Command::DEVICE_GET_INFO, &[ask.as_bytes()], &[]).unwrap();
    let info = DeviceInfo::read_from_bytes(&message.body).unwrap();
    assert_eq!((info.flags, info.num_regions, info.num_irqs), (3, 9, 5));
    let region = |client: &mut Client, index, argsz| {
        let ask = RegionInfo { argsz, index, ..RegionInfo::default() };
        let message = client.call(Command::DEVICE_GET_REGION_INFO, &[ask.as_bytes()], &[])?;
        let (info, rest) = RegionInfo::read_from_prefix(&message.body).unwrap();
        Ok::<_, u32>((info, rest.to_vec(), message.fds))
    };
    // Without room for capabilities: how much is needed. With it: the doorbells, and their file.
    let (info, rest, fds) = region(&mut client, 0, 32).unwrap();
    assert_eq!((info.argsz, info.cap_offset, rest.len(), fds.len()), (64, 0, 0, 0));
    let (info, rest, fds) = region(&mut client, 0, 64).unwrap();
    assert_eq!((info.len, fds.len()), (rig.model.bar_len(), 1));
    assert_eq!(info.flags, region_flag::READ | region_flag::WRITE | region_flag::MMAP | region_flag::CAPS);
    let areas = sparse_areas(&info, &rest).unwrap();
    assert_eq!((areas.len(), areas[0].offset, areas[0].len), (1, 4096, 4096));
    let file = fds.into_iter().next().unwrap();
    assert!(DmaRegion::from_file(file, 4096, 4096, true).is_ok(), "sealed, so a client can map it");
    let (info, ..) = region(&mut client, pci::REGION_CONFIG, 32).unwrap();
    assert_eq!(info.len, 256);
    let (info, ..) = region(&mut client, 1, 32).unwrap();
    assert_eq!((info.len, info.flags), (0, 0));
    assert_eq!(region(&mut client, 9, 32).unwrap_err(), errno(Errno::INVAL));
    assert_eq!(region(&mut client, 0, 31).unwrap_err(), errno(Errno::INVAL));
    let irq = |client: &mut Client, index| {
        let ask = IrqInfo { argsz: 16, index, ..IrqInfo::default() };
        let message = client.call(Command::DEVICE_GET_IRQ_INFO, &[ask.as_bytes()], &[])?;
        Ok::<_, u32>(IrqInfo::read_from_bytes(&message.body).unwrap().count)
    };
    assert_eq!(irq(&mut client, pci::IRQ_MSIX), Ok(u32::from(rig.model.interrupts_max())));
    assert_eq!((irq(&mut client, 0), irq(&mut client, 5)), (Ok(0), Err(errno(Errno::INVAL))));
}

#[test]
fn memory_is_taken_only_as_it_should_be() {
    let rig = Rig::new();
    let mut client = rig.greeted();
    let good = memfd(16384, SealFlags::SHRINK);
    let fds = [good.as_fd()];
    let invalid = Err(errno(Errno::INVAL));
    assert_eq!(client.map(whole(16384), &[]), Err(errno(Errno::OPNOTSUPP)), "without a file");
    assert_eq!(client.map(whole(16384), &[fds[0], fds[0]]), invalid, "with two");
    assert_eq!(client.map(DmaMap { flags: 8, ..whole(16384) }, &fds), invalid);
    assert_eq!(client.map(DmaMap { flags: 0, ..whole(16384) }, &fds), invalid);
    for len in [0, 1, 4095, 20480, 1 << 40, u64::MAX, u64::MAX - 4095] {
        assert_eq!(client.map(whole(len), &fds), invalid, "{len}");
    }
    assert_eq!(client.map(DmaMap { offset: 4096, ..whole(16384) }, &fds), invalid, "behind the file's end");
    assert_eq!(client.map(DmaMap { offset: u64::MAX - 4095, ..whole(4096) }, &fds), invalid);
    let end = DmaMap { address: u64::MAX - 4095, ..whole(8192) };
    assert_eq!(client.map(end, &fds), Err(errno(Errno::EXIST)), "behind the last address");
    let loose = memfd(16384, SealFlags::GROW);
    assert_eq!(client.map(whole(16384), &[loose.as_fd()]), Err(errno(Errno::PERM)), "it could shrink");
    let image = std::fs::File::open("/proc/self/exe").unwrap();
    assert_eq!(client.map(whole(4096), &[image.as_fd()]), Err(errno(Errno::PERM)), "no memory");

    assert_eq!(client.map(whole(16384), &fds), Ok(()));
    assert_eq!(client.map(DmaMap { address: IOVA + 12288, ..whole(16384) }, &fds), Err(errno(Errno::EXIST)));
    assert_eq!(client.unmap(IOVA, 8192, 0), Err(errno(Errno::NOENT)), "not a part");
    assert_eq!(client.unmap(IOVA, 16384, 1), Err(errno(Errno::OPNOTSUPP)));
    assert_eq!(client.unmap(IOVA, 16384, 0), Ok(()));
    assert_eq!(client.unmap(IOVA, 16384, 0), Err(errno(Errno::NOENT)), "twice");
    for index in 0..1024 {
        assert_eq!(client.map(DmaMap { address: IOVA + index * 16384, ..whole(16384) }, &fds), Ok(()));
    }
    let one_more = DmaMap { address: 1 << 44, ..whole(16384) };
    assert_eq!(client.map(one_more, &fds), Err(errno(Errno::NOSPC)));
    assert_eq!(client.unmap(0, 0, 2), Ok(()), "all of it");
    assert_eq!(client.map(one_more, &fds), Ok(()));
    drop(client);
    rig.still_serves();
}

#[test]
fn accesses_that_leave_their_region_are_refused() {
    let rig = Rig::new();
    let mut client = rig.greeted();
    let invalid = Some(errno(Errno::INVAL));
    let bar = rig.model.bar_len();
    let reads = [
        (pci::REGION_BAR0, 0, 2),
        (pci::REGION_BAR0, 2, 4),
        (pci::REGION_BAR0, bar, 4),
        (pci::REGION_BAR0, bar - 4, 8),
        (pci::REGION_BAR0, u64::MAX, 4),
        (pci::REGION_BAR0, 1 << 32, 4),
        (pci::REGION_BAR0, 0, 0),
        (pci::REGION_BAR0, 0, 4096),
        (pci::REGION_CONFIG, 256, 1),
        (pci::REGION_CONFIG, 0, 4097),
        (pci::REGION_CONFIG, 0, u32::MAX),
        (1, 0, 4),
        (4, 1 << 20, 4),
        (5, 0, 4),
        (u32::MAX, 0, 4),
    ];
    for (region, offset, count) in reads {
        assert_eq!(client.read(region, offset, count).err(), invalid, "{region} {offset:#x} {count}");
        let data = vec![0; count.min(4096) as usize];
        if count <= 4096 {
            assert_eq!(client.write(region, offset, &data).err(), invalid, "{region} {offset:#x} {count}");
        }
    }
    let lying = RegionAccess { offset: 0x14, region: 0, count: 8 };
    let short = client.call(Command::REGION_WRITE, &[lying.as_bytes(), &[1, 0, 0, 0]], &[]);
    assert_eq!(short.err(), invalid, "fewer bytes than are named");
    assert_eq!(client.read(0, CC, 4).unwrap(), [0; 4]);
    assert_eq!(client.call(Command::REGION_READ, &[&[0; 15]], &[]).err(), invalid);
    for command in [Command(0), Command::DEVICE_GET_REGION_IO_FDS, Command::DMA_READ, Command(999)] {
        assert_eq!(client.call(command, &[&[0; 64]], &[]).err(), Some(errno(Errno::OPNOTSUPP)));
    }
    let irqs = IrqSet { argsz: 20, flags: 0x24, index: 2, start: u32::MAX, count: 2 };
    assert_eq!(client.call(Command::DEVICE_SET_IRQS, &[irqs.as_bytes()], &[]).err(), invalid);
    let version = Version { major: 0, minor: 1 };
    assert_eq!(client.call(Command::VERSION, &[version.as_bytes()], &[]).err(), invalid, "a second time");
    drop(client);
    rig.still_serves();
}

#[test]
fn a_posted_write_is_not_answered_and_comes_before_what_follows() {
    let rig = Rig::new();
    let mut client = rig.greeted();
    let aqa = RegionAccess { offset: 0x24, region: 0, count: 4 };
    client.send(Command::REGION_WRITE, flag::NO_REPLY, &[aqa.as_bytes(), &[7, 0, 7, 0]], &[]);
    // A refusal of one is not answered either.
    let outside = RegionAccess { offset: u64::MAX, region: 0, count: 4 };
    client.send(Command::REGION_WRITE, flag::NO_REPLY, &[outside.as_bytes(), &[0; 4]], &[]);
    assert_eq!(client.read(0, 0x24, 4).unwrap(), [7, 0, 7, 0]);
}

#[test]
fn versions_that_do_not_fit_are_refused() {
    let rig = Rig::new();
    let mut client = rig.client();
    let mut refused = |parts: &[&[u8]]| client.call(Command::VERSION, parts, &[]).err();
    let invalid = Some(errno(Errno::INVAL));
    assert_eq!(refused(&[&[0]]), invalid);
    assert_eq!(refused(&[Version { major: 1, minor: 0 }.as_bytes()]), invalid);
    let version = Version { major: 0, minor: 9 };
    assert_eq!(refused(&[version.as_bytes(), b"{}"]), invalid, "without its NUL");
    assert_eq!(refused(&[version.as_bytes(), b"no json\0"]), invalid);
    let message = client.call(Command::VERSION, &[version.as_bytes(), b"{}\0"], &[]).unwrap();
    assert_eq!(Version::read_from_prefix(&message.body).unwrap().0.minor, 1, "at most ours");
    drop(client);

    let mut client = rig.client();
    assert!(client.call(Command::DEVICE_RESET, &[], &[]).is_err(), "before the version");
    client.wait_until_dropped();
    rig.still_serves();
}

#[test]
fn clients_that_cannot_be_understood_are_dropped() {
    let rig = Rig::new();
    let reply = Header { flags: flag::REPLY, ..Header::command(1, Command::DMA_MAP, 0) };
    let short = Header { message_len: 3, ..Header::command(1, Command::VERSION, 0) };
    let huge = Header { message_len: u32::MAX, ..Header::command(1, Command::VERSION, 0) };
    for header in [reply, short, huge] {
        let mut socket = UnixStream::connect(&rig.path).unwrap();
        socket.write_all(header.as_bytes()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert!(matches!(socket.read(&mut [0; 64]), Ok(0) | Err(_)));
        rig.still_serves();
    }
}

#[test]
fn clients_that_stall_are_dropped() {
    let rig = Rig::new();
    // Half a header; a header without its data; nobody who reads the replies.
    let mut half = UnixStream::connect(&rig.path).unwrap();
    half.write_all(&[1, 0, 1]).unwrap();
    half.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(half.read(&mut [0; 64]).unwrap(), 0);
    let mut tail = UnixStream::connect(&rig.path).unwrap();
    let header = Header { message_len: 48, ..Header::command(1, Command::DMA_MAP, 0) };
    tail.write_all(header.as_bytes()).unwrap();
    tail.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(tail.read(&mut [0; 64]).unwrap(), 0);
    let mut deaf = rig.greeted();
    let ask = RegionAccess { offset: 0, region: pci::REGION_CONFIG, count: 256 };
    let end = Instant::now() + Duration::from_secs(10);
    let header = Header::command(1, Command::REGION_READ, 0);
    while deaf.stream.send(header, &[ask.as_bytes()], &[], soon()).is_ok() {
        assert!(Instant::now() < end, "the server waits for ever");
    }
    rig.still_serves();
}

#[test]
fn a_client_that_dies_in_the_middle_takes_its_memory_along() {
    let rig = Rig::new();
    let region =
        DmaRegion::with_options(2 << 20, &RegionOptions { share: true, ..RegionOptions::ordinary() })
            .unwrap();
    let mut client = rig.greeted();
    let (file, _) = region.file().unwrap();
    client.map(whole(2 << 20), &[file]).unwrap();
    client.write(pci::REGION_CONFIG, 4, &[6, 0]).unwrap();
    client.write(0, 0x24, &0x0007_0007u32.to_le_bytes()).unwrap();
    client.write(0, 0x28, &IOVA.to_le_bytes()).unwrap();
    client.write(0, 0x30, &(IOVA + 4096).to_le_bytes()).unwrap();
    client.write(0, CC, &0x0046_0001u32.to_le_bytes()).unwrap();
    let end = soon();
    while client.read(0, CSTS, 4).unwrap() != [1, 0, 0, 0] {
        assert!(Instant::now() < end, "the controller does not become ready");
    }
    // An Identify into the region's third page, and its doorbell; then nothing more.
    let mut command = [0; 64];
    command[0] = 0x06;
    command[24..32].copy_from_slice(&(IOVA + 8192).to_le_bytes());
    command[40] = 1;
    assert!(region.write(0, &command));
    client.write(0, 0x1000, &1u32.to_le_bytes()).unwrap();
    drop(client);
    rig.still_serves();
    let mut page = [0; 4096];
    assert!(region.zero(8192, 4096));
    std::thread::sleep(Duration::from_millis(20));
    assert!(region.read(8192, &mut page));
    assert_eq!(page, [0; 4096], "nobody writes there any more");
}

#[test]
fn without_bus_mastering_no_memory_is_reached() {
    let rig = Rig::new();
    let region =
        DmaRegion::with_options(2 << 20, &RegionOptions { share: true, ..RegionOptions::ordinary() })
            .unwrap();
    let mut client = rig.greeted();
    client.map(whole(2 << 20), &[region.file().unwrap().0]).unwrap();
    client.write(0, 0x24, &0x0007_0007u32.to_le_bytes()).unwrap();
    client.write(0, 0x28, &IOVA.to_le_bytes()).unwrap();
    client.write(0, 0x30, &(IOVA + 4096).to_le_bytes()).unwrap();
    client.write(0, CC, &0x0046_0001u32.to_le_bytes()).unwrap();
    let end = soon();
    while client.read(0, CSTS, 4).unwrap() != [1, 0, 0, 0] {
        assert!(Instant::now() < end, "the controller does not become ready");
    }
    client.write(0, 0x1000, &1u32.to_le_bytes()).unwrap();
    while client.read(0, CSTS, 4).unwrap()[0] & 2 == 0 {
        assert!(Instant::now() < end, "the controller fetched a command all the same");
    }
}

/// What a client sends, mostly of a right form.
#[derive(Clone, Debug)]
enum Act {
    Raw(Vec<u8>),
    Command { command: u16, flags: u32, body: Vec<u8>, files: usize },
    Map { address: u64, len: u64, offset: u64, flags: u32 },
    Access { write: bool, region: u32, offset: u64, data: Vec<u8> },
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let bytes = |len| prop::collection::vec(any::<u8>(), 0..len);
    let near = || prop_oneof![0u64..0x2000, any::<u64>(), Just(u64::MAX), Just(1 << 32)];
    let pages = || (0u64..5).prop_map(|pages| pages * 4096);
    let act = prop_oneof![
        1 => bytes(40).prop_map(Act::Raw),
        4 => (0u16..20, prop_oneof![Just(0u32), Just(flag::NO_REPLY), any::<u32>()], bytes(80), 0usize..3)
            .prop_map(|(command, flags, body, files)| Act::Command { command, flags, body, files }),
        4 => (pages(), prop_oneof![pages(), any::<u64>()], pages(), 0u32..8)
            .prop_map(|(address, len, offset, flags)| Act::Map { address, len, offset, flags }),
        8 => (any::<bool>(), 0u32..10, near(), bytes(12))
            .prop_map(|(write, region, offset, data)| Act::Access { write, region, offset, data }),
    ];
    prop::collection::vec(act, 1..40)
}

fn perform(rig: &Rig, acts: &[Act], file: &OwnedFd) {
    let mut client = rig.greeted();
    let now = || Instant::now() + Duration::from_millis(500);
    for act in acts {
        let (command, flags, parts, files) = match act {
            Act::Raw(bytes) => {
                let mut socket = UnixStream::from(client.stream.as_fd().try_clone_to_owned().unwrap());
                if socket.write_all(bytes).is_err() {
                    return;
                }
                continue;
            }
            Act::Command { command, flags, body, files } => {
                (Command(*command), *flags, vec![body.clone()], *files)
            }
            Act::Map { address, len, offset, flags } => {
                let map = DmaMap { argsz: 32, flags: *flags, offset: *offset, address: *address, len: *len };
                (Command::DMA_MAP, 0, vec![map.as_bytes().to_vec()], 1)
            }
            Act::Access { write, region, offset, data } => {
                let count = u32::try_from(data.len()).unwrap();
                let access = RegionAccess { offset: *offset, region: *region, count };
                let command = if *write { Command::REGION_WRITE } else { Command::REGION_READ };
                let data = if *write { data.clone() } else { Vec::new() };
                (command, flag::NO_REPLY * u32::from(*write), vec![access.as_bytes().to_vec(), data], 0)
            }
        };
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let fds = vec![file.as_fd(); files];
        if client.stream.send(Header::command(1, command, flags), &parts, &fds, now()).is_err() {
            return;
        }
        while let Ok(Some(_)) = client.stream.try_receive() {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_messages_stops_the_server(sequences in prop::collection::vec(acts(), 1..4)) {
        let rig = Rig::new();
        let file = memfd(16384, SealFlags::SHRINK);
        for acts in &sequences {
            perform(&rig, acts, &file);
            rig.still_serves();
        }
    }
}
