//! The body of the command fuzzer.
//!
//! How it works: 1. a target with a writable and a read-only namespace, and four connections: a fresh one, an admin, an
//! I/O and a discovery queue. 2. The input is read as actions: a byte that chooses connection and kind, then a command
//! of 64 bytes, which is mostly made plausible (opcode of a known command, SGL, namespace) so that it gets past the
//! first check. 3. What the sessions answer is held against what the transport relies on.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nvme_spec::fabrics::{ConnectCommand, ConnectData, nqn_field};
use nvme_spec::{Cntlid, Nsid, SglDescriptor, Status, SubmissionQueueEntry};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::io::dsm_ranges;
use super::options::TRANSFER_BYTES_MAX;
use super::provision::DISCOVERY_NQN;
use super::{
    Arrival, Begin, Export, FencePolicy, HostPolicy, Identity, IoCommand, IoKind, NamespaceSpec, PortId,
    PortSpec, QueueSession, SessionEvent, SubsystemSpec, Target, TargetOptions, Waker, data_location,
};
use crate::block::{BlockDevice, NullDevice};
use crate::units::{BlockSize, ByteLen};

const NQN: &str = "nqn.2026-11.com.example:fuzz";
const LEN: ByteLen = ByteLen(1 << 20);
const ADMIN_OPCODES: [u8; 8] = [0x02, 0x06, 0x08, 0x09, 0x0A, 0x0C, 0x18, 0x7F];
const IO_OPCODES: [u8; 8] = [0x00, 0x01, 0x02, 0x08, 0x09, 0x7F, 0x01, 0x02];

struct NoWaker;

impl Waker for NoWaker {
    fn wake(&self) {}
}

/// Feeds arbitrary commands to sessions of every kind.
///
/// # Panics
/// When a session breaks a promise of its documentation: that is what a fuzzer looks for.
pub fn fuzz_commands(data: &[u8]) {
    let Some(mut world) = World::new() else { return };
    let mut input = Input(data);
    while let Some(action) = input.byte() {
        world.act(action, &mut input);
    }
    world.end();
}

struct World {
    target: Arc<Target>,
    sessions: [QueueSession; 4],
    now: Instant,
}

impl World {
    fn new() -> Option<Self> {
        let target = Target::new(TargetOptions::default());
        target.publish(subsystems()?, vec![port(1), port(2)]).ok()?;
        let session = || QueueSession::new(Arc::clone(&target), arrival(), Arc::new(NoWaker));
        let sessions = [session(), session(), session(), session()];
        let mut world = Self { target, sessions, now: Instant::now() };
        world.connect(1, NQN, 0, Cntlid::DYNAMIC.0);
        world.enable(1);
        world.connect(2, NQN, 1, 1);
        world.connect(3, DISCOVERY_NQN, 0, Cntlid::DYNAMIC.0);
        world.enable(3);
        Some(world)
    }

    fn connect(&mut self, index: usize, subnqn: &str, qid: u16, cntlid: u16) {
        let mut data = ConnectData::new_zeroed();
        data.hostid = [1; 16];
        data.cntlid = U16::new(cntlid);
        data.subnqn = nqn_field(subnqn).unwrap_or([0; 256]);
        data.hostnqn = nqn_field("nqn.2026-11.com.example:host").unwrap_or([0; 256]);
        let command = ConnectCommand {
            opcode: 0x7F,
            flags: 0x40,
            fctype: 1,
            sgl1: SglDescriptor::in_capsule(0, 1024),
            qid: U16::new(qid),
            sqsize_z: U16::new(31),
            kato_ms: U32::new(5000),
            ..Default::default()
        };
        let sqe = SubmissionQueueEntry::read_from_bytes(command.as_bytes()).unwrap_or_default();
        if let Some(session) = self.sessions.get_mut(index) {
            assert_eq!(session.begin(&sqe, self.now), Begin::NeedData { len: 1024 });
            let begin = session.finish(&sqe, data.as_bytes(), self.now);
            assert!(matches!(begin, Begin::Respond(completion) if completion.status == Status::SUCCESS));
        }
    }

    fn enable(&mut self, index: usize) {
        let sqe = SubmissionQueueEntry {
            opcode: 0x7F,
            flags: 0x40,
            cdw11: U32::new(0x14),
            cdw12: U32::new(0x0046_0001),
            ..Default::default()
        };
        if let Some(session) = self.sessions.get_mut(index) {
            let begin = session.begin(&sqe, self.now);
            assert!(matches!(begin, Begin::Respond(completion) if completion.status == Status::SUCCESS));
        }
    }

    fn act(&mut self, action: u8, input: &mut Input<'_>) {
        let index = usize::from(action & 3);
        match action >> 2 & 7 {
            0 => self.now += Duration::from_secs(input.byte().unwrap_or(0).into()),
            1 => self.poll(index),
            2 => self.replace(index, input),
            _ => self.command(index, action, input),
        }
    }

    fn poll(&mut self, index: usize) {
        let Some(session) = self.sessions.get_mut(index) else { return };
        let mut count = 0;
        while let Some(event) = session.poll(self.now) {
            count += 1;
            assert!(count < 1000, "poll has to end");
            if let SessionEvent::Close(_) = event {
                session.closed();
            }
        }
        assert!(session.next_deadline().is_none_or(|deadline| deadline > self.now));
    }

    /// Reloads, fences, or ends a connection and starts a fresh one.
    fn replace(&mut self, index: usize, input: &mut Input<'_>) {
        let exports = self.target.exports();
        match (input.byte().unwrap_or(0) % 4, exports.first()) {
            (0, Some(export)) => self.target.fence(export, super::FenceReason::Operator),
            (1, Some(export)) => self.target.unfence(export, super::FenceReason::Operator),
            (2, _) => {
                if let Some(specs) = subsystems() {
                    let _ = self.target.publish(specs, vec![port(1)]);
                }
            }
            _ => {
                let fresh = QueueSession::new(Arc::clone(&self.target), arrival(), Arc::new(NoWaker));
                if let Some(session) = self.sessions.get_mut(index) {
                    *session = fresh;
                }
            }
        }
    }

    fn command(&mut self, index: usize, action: u8, input: &mut Input<'_>) {
        let sqe = input.command(index, action);
        let Some(session) = self.sessions.get_mut(index) else { return };
        let sqhd = session.sqhd();
        let mut begin = match session.begin_transfer(&sqe) {
            Some(command) => Begin::Io(command),
            None => {
                assert_eq!(session.sqhd(), sqhd);
                session.begin(&sqe, self.now)
            }
        };
        if let Begin::NeedData { len } = begin {
            assert!((1..=8192).contains(&len));
            assert_eq!(data_location(&sqe, session.in_capsule_len_max()).map(|it| it.len()), Ok(len));
            let data = input.bytes(len as usize);
            begin = session.finish(&sqe, &data, self.now);
            assert!(!matches!(begin, Begin::NeedData { .. }));
            if let Begin::Io(IoCommand { kind: IoKind::DatasetManagement { ranges }, slot, .. }) = begin {
                let exports = self.target.exports();
                let export = exports.iter().find(|export| export.slot == slot);
                check_ranges(export, &data, ranges);
            }
        }
        check(session, &self.target, &sqe, &begin);
    }

    /// After every connection ended, nothing is left of them.
    fn end(mut self) {
        self.sessions.iter_mut().for_each(QueueSession::closed);
        assert_eq!(self.target.controllers(), vec![]);
    }
}

/// What the transport relies on.
fn check(session: &QueueSession, target: &Target, sqe: &SubmissionQueueEntry, begin: &Begin) {
    assert!(session.sqhd() == 0xFFFF || session.sqhd() < session.sq_size());
    let location = data_location(sqe, session.in_capsule_len_max());
    match begin {
        Begin::SendData { data, completion } => {
            assert_eq!(completion.status, Status::SUCCESS);
            let room = location.map_or(0, |location| location.len());
            assert!(data.len() <= room as usize && room != 0);
            assert!(data.len() <= TRANSFER_BYTES_MAX as usize);
        }
        Begin::Io(command) => {
            assert!(session.is_io());
            let exports = target.exports();
            let export = exports.iter().find(|export| export.slot == command.slot);
            let export = export.filter(|export| export.nsid == sqe.nsid());
            assert!(export.is_some_and(|export| fits(export, command)), "{command:?}");
            if matches!(command.kind, IoKind::Read | IoKind::Write) {
                assert_eq!(location.map(|it| u64::from(it.len())), Ok(command.len.0));
                assert!(command.len.0 <= u64::from(TRANSFER_BYTES_MAX));
            }
        }
        Begin::Park => assert!(!session.is_io() && sqe.opcode == 0x0C),
        Begin::Respond(_) | Begin::RespondThenClose(_) | Begin::NeedData { .. } => {}
    }
}

fn fits(export: &Export, command: &IoCommand) -> bool {
    let writes = !matches!(command.kind, IoKind::Read | IoKind::Flush);
    let end = command.start.0.checked_add(command.len.0);
    !(writes && export.read_only)
        && end.is_some_and(|end| end <= export.len.0)
        && export.block_size.is_aligned(command.start)
        && export.block_size.blocks_in(command.len).is_some()
}

fn check_ranges(export: Option<&Arc<Export>>, data: &[u8], ranges: u16) {
    let Some(export) = export else { panic!("an export that is not served") };
    for (start, len) in dsm_ranges(data, ranges, export.block_size) {
        assert!(start.0.checked_add(len.0).is_some_and(|end| end <= export.len.0));
    }
}

/// The bytes that are left.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    /// `len` bytes, the last of them zero where the input ends.
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let taken = len.min(self.0.len()).min(64);
        let (bytes, rest) = self.0.split_at(taken);
        self.0 = rest;
        let mut bytes = bytes.to_vec();
        bytes.resize(len, 0);
        bytes
    }

    /// A command; three of four times with a plausible opcode, flags and SGL.
    fn command(&mut self, index: usize, action: u8) -> SubmissionQueueEntry {
        let mut sqe = SubmissionQueueEntry::read_from_bytes(self.bytes(64).as_slice()).unwrap_or_default();
        if action & 0x60 == 0x60 {
            return sqe;
        }
        let opcodes = if index == 2 { IO_OPCODES } else { ADMIN_OPCODES };
        sqe.opcode = opcodes.get(usize::from(sqe.opcode & 7)).copied().unwrap_or(0x7F);
        sqe.flags = 0x40;
        sqe.nsid = U32::new(sqe.nsid.get() % 4);
        (sqe.cdw11, sqe.cdw13) = (U32::new(sqe.cdw11.get() % 8), U32::new(0));
        sqe.cdw10 = U32::new(sqe.cdw10.get() % 0x2000);
        sqe.cdw12 = U32::new(sqe.cdw12.get() & 0xC200_001F);
        let len = match sqe.opcode {
            0x01 | 0x02 if index == 2 => 512 * ((sqe.cdw12.get() & 0x1F) + 1),
            0x02 => ((sqe.cdw10.get() >> 16) + 1) * 4,
            0x06 => 4096,
            0x09 if index != 2 => 512,
            0x7F => 1024,
            _ => 4096,
        };
        sqe.dptr = SglDescriptor::transport(len);
        sqe
    }
}

fn subsystems() -> Option<Vec<SubsystemSpec>> {
    static DEVICE: OnceLock<Option<Arc<dyn BlockDevice>>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let device = NullDevice::new(LEN, BlockSize::B512).ok()?;
        Some(Arc::new(device) as Arc<dyn BlockDevice>)
    });
    let device = device.clone()?;
    let namespace = |nsid: u32, read_only: bool| NamespaceSpec {
        nsid: Nsid(nsid),
        map: None,
        device: Arc::clone(&device),
        read_only,
        on_fence: if read_only { FencePolicy::WriteProtect } else { FencePolicy::Ana },
        block_size: BlockSize::B512,
        len: LEN,
        identity: Identity::named("null"),
    };
    Some(vec![SubsystemSpec {
        nqn: NQN.to_owned(),
        serial: "1".to_owned(),
        model: "fuzz".to_owned(),
        hosts: HostPolicy::Any,
        namespaces: vec![namespace(1, false), namespace(2, true)],
    }])
}

fn port(id: u16) -> PortSpec {
    let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 4420));
    PortSpec { id: PortId(id), listen, advertise: None, discovery_only: false }
}

fn arrival() -> Arrival {
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 4420));
    Arrival { port: PortId(1), peer: local, local }
}
