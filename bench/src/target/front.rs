//! The bare responder for a host that joins by the book, as SPDK's does: its admin queue is a real target's, and only the I/O queue
//! is answered by nobody.
//!
//! ```text
//!   admin queue ---- ICReq, Connect: looked at ---- passed on, byte by byte ----> fastice, which sleeps until it is asked
//!   I/O queue   ---- ICReq, Connect: answered ----- each command: a header with its CID, and data that is nobody's
//! ```
//!
//! It does what [`super::bare`] does, and what a whole driver needs beyond that: reads beside writes, R2T for data that is not in the
//! capsule, response capsules behind read data for a host that has flow control of its submission queue, as SPDK's has. How many of
//! these go together decides how many commands that host submits together, and with it the rate: so there are two of it
//! ([`Together`]). One I/O queue at a time. Digests are in [`super::sealed`]. What it does not do: more than one connection, SQHD (which is zero always: the hosts that it
//! is for do not look at it), HPDA, or to wait so that more comes together, as fastice may: a target that does can come to more than it.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use fastice::tcp::digest::Digest;
use fastice::tcp::pdu::{self, Digests, HEADER_MAX, IcReq, IcResp, PduType};
use nvme_spec::fabrics::{ConnectCommand, ConnectData, cattr};
use nvme_spec::{CompletionQueueEntry, NvmOpcode, Qid};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};

use super::bare::{self, PARTS_MAX, PIECE_LEN, is_end, write_all};
use super::inbound::HEADER_LEN;
use super::sealed::{self, OfZeroes, Sealed};
use super::work::CAPSULE_LEN;

/// ICReq and ICResp (NVMe/TCP Transport specification 1.1, section 3.6.2.2).
const IC_LEN: usize = 128;
/// MAXH2CDATA, bytes: as fastice states it.
const H2C_DATA_MAX: u32 = 1 << 20;

/// How many response capsules of a batch go together, behind the data of as many reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Together {
    /// Each behind its own data.
    One,
    /// All of it.
    All,
}

/// Answers connections until the process ends, and polls, or sleeps until something comes. `admin` is a target whose subsystem has the
/// same name.
///
/// # Errors
/// When a connection breaks otherwise than by its end, or says what no host says.
pub(super) fn answer(
    listener: &TcpListener,
    admin: SocketAddr,
    together: Together,
    sleeps: bool,
) -> Result<()> {
    for stream in listener.incoming() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        match serve(stream, admin, together, sleeps) {
            Err(error) if is_end(&error) => {}
            result => result?,
        }
    }
    Ok(())
}

/// One connection: an I/O queue until it ends, an admin queue until it is passed on.
fn serve(mut stream: TcpStream, admin: SocketAddr, together: Together, sleeps: bool) -> Result<()> {
    match joined(&mut stream, admin)? {
        Joined::Admin(target) => pass_on(stream, target),
        Joined::Queue { responds, digests } => {
            stream.set_nonblocking(!sleeps)?;
            converse(&mut stream, responds.then_some(together), digests)
        }
    }
}

/// What a connection turned out to be.
enum Joined {
    /// An admin queue, and that of the target behind.
    Admin(TcpStream),
    /// An I/O queue.
    Queue {
        /// Whether reads have response capsules.
        responds: bool,
        /// What both sides have agreed to.
        digests: Digests,
    },
}

/// ICReq and Connect: the beginning of each connection.
fn joined(stream: &mut TcpStream, admin: SocketAddr) -> Result<Joined> {
    let mut ic_req = [0; IC_LEN];
    stream.read_exact(&mut ic_req)?;
    let digests = sealed::asked(&ic_req);
    let mut header = [0; HEADER_MAX];
    let ic_resp = IcResp { cpda: 0, digests, maxh2cdata: H2C_DATA_MAX };
    let len = pdu::ic_resp(&mut header, &ic_resp);
    stream.write_all(header.get(..len).unwrap_or_default())?;
    let mut capsule = vec![0; CAPSULE_LEN];
    stream.read_exact(&mut capsule)?;
    let plen = plen_of(&capsule).filter(|plen| (CAPSULE_LEN..=4096).contains(plen));
    capsule.resize(plen.context("no Connect")?, 0);
    stream.read_exact(capsule.get_mut(CAPSULE_LEN..).unwrap_or_default())?;
    let (command, _) = ConnectCommand::read_from_prefix(capsule.get(8..).unwrap_or_default())
        .map_err(|_| anyhow::anyhow!("no Connect"))?;
    if command.qid.get() == Qid::ADMIN.get() {
        let mut target = TcpStream::connect(admin)?;
        target.set_nodelay(true)?;
        let len = pdu::ic_req(&mut header, &IcReq { digests, ..IcReq::default() });
        target.write_all(header.get(..len).unwrap_or_default())?;
        target.read_exact(&mut [0; IC_LEN])?;
        target.write_all(&capsule)?;
        return Ok(Joined::Admin(target));
    }
    // The data is the last in it, but for its digest.
    let end = capsule.len() - if digests.data { Digest::LEN } else { 0 };
    let data = end.checked_sub(size_of::<ConnectData>());
    let data = data.and_then(|at| ConnectData::read_from_bytes(capsule.get(at..end)?).ok());
    let mut cqe = CompletionQueueEntry::new_zeroed();
    cqe.dw0 = u32::from(data.context("a Connect without data")?.cntlid.get()).into();
    cqe.cid = command.cid;
    let bytes = <[u8; 16]>::read_from_bytes(cqe.as_bytes()).map_err(|_| anyhow::anyhow!("16 bytes"))?;
    let len = pdu::capsule_resp(&mut header, digests, &bytes);
    stream.write_all(header.get(..len).unwrap_or_default())?;
    Ok(Joined::Queue { responds: command.cattr & cattr::DISABLE_SQ_FLOW_CONTROL == 0, digests })
}

/// Both ways, in threads of their own, until one side has had enough.
fn pass_on(host: TcpStream, target: TcpStream) -> Result<()> {
    for (mut from, mut to) in [(host.try_clone()?, target.try_clone()?), (target, host)] {
        let pass = move || {
            // However it ends, the other side is to learn of it.
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        };
        thread::Builder::new().name("admin".to_owned()).spawn(pass)?;
    }
    Ok(())
}

/// A header, and how many bytes of data come behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reply {
    header: [u8; HEADER_LEN],
    data_len: usize,
    /// The CID of a read.
    read: Option<[u8; 2]>,
}

impl Reply {
    /// Without data.
    const fn alone(header: [u8; HEADER_LEN]) -> Self {
        Self { header, data_len: 0, read: None }
    }
}

/// The bytes of one connection: commands, and data that nobody looks at.
#[derive(Debug, Default)]
struct Commands {
    /// Whether reads have response capsules.
    responds: bool,
    /// The length of a capsule without data.
    alone_len: usize,
    /// Bytes to pass over, and what is due when they are gone.
    skip: usize,
    due: Option<Reply>,
}

impl Commands {
    fn new(responds: bool, digests: Digests) -> Self {
        let alone_len = CAPSULE_LEN + sealed::header_digest_len(digests);
        Self { responds, alone_len, ..Self::default() }
    }

    /// Takes what it can of `bytes`, and says how many these were.
    fn take(&mut self, bytes: &[u8], replies: &mut Vec<Reply>) -> Result<usize> {
        let mut at = 0;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            let passed = self.skip.min(rest.len());
            (self.skip, at) = (self.skip - passed, at + passed);
            if self.skip > 0 {
                return Ok(at);
            }
            replies.extend(self.due.take());
            let rest = rest.get(passed..).unwrap_or_default();
            let Some(plen) = plen_of(rest) else { return Ok(at) };
            let (reply, header_len) = if rest.first() == Some(&PduType::H2C_DATA.0) {
                let Some(header) = rest.first_chunk() else { return Ok(at) };
                (after_data(header), HEADER_LEN)
            } else {
                let Some(capsule) = rest.first_chunk() else { return Ok(at) };
                (Some(to_command(capsule, plen == self.alone_len, self.responds)?), CAPSULE_LEN)
            };
            self.skip = plen.checked_sub(header_len).context("a PDU shorter than its header")?;
            (self.due, at) = (reply, at + header_len);
        }
    }
}

/// PLEN, once the common header is there.
fn plen_of(bytes: &[u8]) -> Option<usize> {
    let plen = bytes.get(4..8)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(plen)).ok()
}

/// What the last data of a write calls for.
fn after_data(header: &[u8; HEADER_LEN]) -> Option<Reply> {
    let is_last = header[1] & pdu::flags::LAST != 0;
    is_last.then(|| Reply::alone(bare::capsule_resp([header[8], header[9]])))
}

/// What a capsule calls for, once its data is here, if it is not `alone`.
fn to_command(capsule: &[u8; CAPSULE_LEN], alone: bool, responds: bool) -> Result<Reply> {
    let kind = PduType(capsule[0]);
    ensure!(kind == PduType::CAPSULE_CMD, "a PDU that no host sends: {kind:?}");
    // Dword 0 of the command, and the length in its SGL descriptor.
    let cid = [capsule[10], capsule[11]];
    let len = [capsule[40], capsule[41], capsule[42], capsule[43]];
    Ok(match NvmOpcode(capsule[8]) {
        NvmOpcode::READ => {
            let len = u32::from_le_bytes(len);
            let data_len = len as usize;
            ensure!(data_len <= PIECE_LEN, "a read of {len} bytes");
            Reply { header: bare::read_data(cid, len, !responds), data_len, read: Some(cid) }
        }
        NvmOpcode::WRITE if alone => {
            let mut header = bare::common(PduType::R2T, HEADER_LEN);
            header[8..10].copy_from_slice(&cid);
            header[10..12].copy_from_slice(&cid);
            header[16..20].copy_from_slice(&len);
            Reply::alone(header)
        }
        // Linux flushes what says that it has a write cache, as the admin queue's target does.
        NvmOpcode::WRITE | NvmOpcode::FLUSH => Reply::alone(bare::capsule_resp(cid)),
        other => bail!("a command that it has no answer for: {other:?}"),
    })
}

/// Answers until the connection ends. `responds` when reads have response capsules.
fn converse(stream: &mut TcpStream, responds: Option<Together>, digests: Digests) -> Result<()> {
    let nothing = vec![0; PIECE_LEN];
    let (mut space, mut filled) = (vec![0; PIECE_LEN], 0);
    let mut commands = Commands::new(responds.is_some(), digests);
    let (mut replies, mut headers) = (Vec::new(), Vec::new());
    let mut trailer = OfZeroes::default();
    loop {
        let len = match stream.read(space.get_mut(filled..).unwrap_or_default()) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error.into()),
        };
        filled += len;
        let taken = commands.take(space.get(..filled).unwrap_or_default(), &mut replies)?;
        space.copy_within(taken..filled, 0);
        filled -= taken;
        arrange(&mut replies, (responds, digests), &mut headers);
        if digests.data {
            headers.iter().for_each(|header| trailer.take_note(&nothing, header.data_len));
        }
        for headers in headers.chunks(PARTS_MAX / 3) {
            let data = |len: usize| nothing.get(..len).unwrap_or_default();
            let parts = headers.iter().flat_map(|header| {
                [header.bytes(), data(header.data_len), trailer.behind(header.data_len)].map(IoSlice::new)
            });
            write_all(stream, &mut parts.filter(|part| !part.is_empty()).collect::<Vec<_>>())?;
        }
    }
}

/// Headers in their order, each with the length of its data: the response capsules of reads, where there are any, behind the data of
/// so many.
fn arrange(
    replies: &mut Vec<Reply>,
    (responds, digests): (Option<Together>, Digests),
    headers: &mut Vec<Sealed>,
) {
    headers.clear();
    let group = match responds {
        None | Some(Together::One) => 1,
        Some(Together::All) => replies.len(),
    };
    for group in replies.chunks(group.max(1)) {
        headers.extend(group.iter().map(|reply| Sealed::new(reply.header, reply.data_len, digests)));
        if responds.is_some() {
            let reads = group.iter().filter_map(|reply| reply.read);
            headers.extend(reads.map(|cid| Sealed::new(bare::capsule_resp(cid), 0, digests)));
        }
    }
    replies.clear();
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use fastice::initiator::command;
    use fastice::initiator::raw::{RawConnection, RawEvent, RawPdu};
    use fastice::tcp::pdu::PduHeader;
    use nvme_spec::command::psdt;
    use nvme_spec::{Nsid, SglDescriptor, SubmissionQueueEntry};

    use super::*;

    /// A capsule of one block, with its data if it is in the capsule.
    fn capsule(opcode: NvmOpcode, cid: u16, data: Option<&[u8]>) -> Vec<u8> {
        capsule_with(Digests::NONE, opcode, cid, data)
    }

    fn capsule_with(digests: Digests, opcode: NvmOpcode, cid: u16, data: Option<&[u8]>) -> Vec<u8> {
        let dptr = match data {
            Some(data) => SglDescriptor::in_capsule(0, u32::try_from(data.len()).unwrap()),
            None => SglDescriptor::transport(4096),
        };
        let sqe = command::command(opcode.0, Nsid(1));
        let sqe = SubmissionQueueEntry { flags: psdt::SGL << 6, cid: cid.into(), dptr, ..sqe };
        let mut header = [0; HEADER_MAX];
        let bytes = <[u8; 64]>::read_from_bytes(sqe.as_bytes()).unwrap();
        let data = data.unwrap_or_default();
        let len = pdu::capsule_cmd(&mut header, digests, 0, &bytes, u32::try_from(data.len()).unwrap());
        // Nobody looks at the digest of data.
        let trailer: &[u8] = if digests.data && !data.is_empty() { &[0; Digest::LEN] } else { &[] };
        [&header[..len], data, trailer].concat()
    }

    fn last_data(cid: u16, data: &[u8]) -> Vec<u8> {
        let mut header = [0; HEADER_MAX];
        let data_len = u32::try_from(data.len()).unwrap();
        let pdu = pdu::DataPdu { cccid: cid, ttag: cid, data_len, last: true, ..pdu::DataPdu::default() };
        let len = pdu::h2c_data(&mut header, Digests::NONE, 0, &pdu);
        [&header[..len], data].concat()
    }

    /// What is answered when the bytes come in pieces of so many: type, CID and data of each header.
    fn answered(bytes: &[u8], piece: usize, responds: Option<Together>) -> Vec<(PduType, u16, usize)> {
        answered_with(Digests::NONE, bytes, piece, responds)
    }

    fn answered_with(
        digests: Digests,
        bytes: &[u8],
        piece: usize,
        responds: Option<Together>,
    ) -> Vec<(PduType, u16, usize)> {
        let mut commands = Commands::new(responds.is_some(), digests);
        let (mut replies, mut left, mut headers) = (Vec::new(), Vec::<u8>::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            left.extend_from_slice(piece);
            let taken = commands.take(&left, &mut replies).unwrap();
            left.drain(..taken);
        }
        assert!(left.is_empty(), "all of it was taken");
        arrange(&mut replies, (responds, digests), &mut headers);
        let told = headers.iter().map(|sealed| {
            let (header, data_len) = (sealed.bytes(), sealed.data_len);
            let kind = PduType(header[0]);
            let at = if kind == PduType::CAPSULE_RESP { 20 } else { 8 };
            let trailer_len = if digests.data && data_len > 0 { Digest::LEN } else { 0 };
            assert_eq!(plen_of(header), Some(header.len() + data_len + trailer_len));
            (kind, u16::from_le_bytes([header[at], header[at + 1]]), data_len)
        });
        told.collect()
    }

    #[test]
    fn each_command_has_its_answer_however_its_bytes_are_cut() {
        let bytes = [
            capsule(NvmOpcode::READ, 7, None),
            capsule(NvmOpcode::WRITE, 300, Some(&[1; 4096])),
            capsule(NvmOpcode::WRITE, 9, None),
            last_data(9, &[2; 4096]),
        ]
        .concat();
        let expected = [
            (PduType::C2H_DATA, 7, 4096),
            (PduType::CAPSULE_RESP, 300, 0),
            (PduType::R2T, 9, 0),
            (PduType::CAPSULE_RESP, 9, 0),
        ];
        for piece in [1, 7, 72, 4096, bytes.len()] {
            assert_eq!(answered(&bytes, piece, None), expected, "{piece}");
        }
    }

    #[test]
    fn digests_are_passed_over_and_make_no_write_longer() {
        let digests = Digests { header: true, data: true };
        let bytes = [
            capsule_with(digests, NvmOpcode::READ, 7, None),
            capsule_with(digests, NvmOpcode::WRITE, 8, Some(&[1; 4096])),
            capsule_with(digests, NvmOpcode::WRITE, 9, None),
        ]
        .concat();
        let expected = [(PduType::C2H_DATA, 7, 4096), (PduType::CAPSULE_RESP, 8, 0), (PduType::R2T, 9, 0)];
        for piece in [1, 76, bytes.len()] {
            assert_eq!(answered_with(digests, &bytes, piece, None), expected, "{piece}");
        }
    }

    /// An I/O queue at a responder with such digests.
    fn queue(digests: Digests) -> RawConnection {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        thread::spawn(move || answer(&listener, admin, Together::One, true));
        let mut queue = RawConnection::connect(address).unwrap();
        assert_eq!(queue.initialize(digests).unwrap().digests, digests);
        let connect = command::connect(Qid(1), 32, cattr::DISABLE_SQ_FLOW_CONTROL, 0);
        let data = ConnectData { cntlid: 7.into(), ..ConnectData::new_zeroed() };
        send(&mut queue, connect, data.as_bytes());
        match read(&mut queue).header {
            PduHeader::CapsuleResp(cqe) => {
                assert_eq!(cqe[..2], 7_u16.to_le_bytes(), "the controller's number")
            }
            other => panic!("{other:?}"),
        }
        queue
    }

    fn send(queue: &mut RawConnection, sqe: SubmissionQueueEntry, data: &[u8]) {
        let bytes = <[u8; 64]>::read_from_bytes(sqe.as_bytes()).unwrap();
        queue.send_capsule(&bytes, data).unwrap();
    }

    fn read(queue: &mut RawConnection) -> RawPdu {
        match queue.read_pdu(Duration::from_secs(10)).unwrap() {
            RawEvent::Pdu(pdu) => pdu,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_host_that_asks_for_digests_gets_them_and_they_fit() {
        for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
            let digests = Digests { header, data };
            let mut queue = queue(digests);
            // Of two lengths at once.
            for (cid, len) in [(1, 4096), (2, 512), (3, 4096)] {
                let sqe = command::command(NvmOpcode::READ.0, Nsid(1));
                let dptr = SglDescriptor::transport(len);
                send(&mut queue, SubmissionQueueEntry { cid: cid.into(), dptr, ..sqe }, &[]);
            }
            for (cid, len) in [(1, 4096), (2, 512), (3, 4096)] {
                let pdu = read(&mut queue);
                let PduHeader::C2hData(told) = pdu.header else { panic!("{pdu:?}") };
                assert_eq!((told.cccid, pdu.data.len(), told.last), (cid, len, true), "{digests:?}");
                assert!(pdu.data_digest_good && pdu.plan.ddgst == data, "{digests:?}");
            }
            let sqe = command::command(NvmOpcode::WRITE.0, Nsid(1));
            let dptr = SglDescriptor::transport(4096);
            send(&mut queue, SubmissionQueueEntry { cid: 9.into(), dptr, ..sqe }, &[]);
            let PduHeader::R2t(r2t) = read(&mut queue).header else { panic!("no R2T") };
            assert_eq!((r2t.cccid, r2t.len), (9, 4096));
            let told =
                pdu::DataPdu { cccid: 9, ttag: r2t.ttag, data_len: 4096, last: true, ..Default::default() };
            let mut h2c_data = [0; HEADER_MAX];
            let len = pdu::h2c_data(&mut h2c_data, digests, 0, &told);
            let trailer: &[u8] = if data { &[0; Digest::LEN] } else { &[] };
            queue.send(&[&h2c_data[..len], &[3; 4096], trailer].concat()).unwrap();
            let PduHeader::CapsuleResp(cqe) = read(&mut queue).header else { panic!("no response") };
            assert_eq!(cqe[12..14], 9_u16.to_le_bytes());
        }
    }

    #[test]
    fn response_capsules_of_reads_go_behind_their_data_or_behind_that_of_all() {
        let bytes = [1, 2].map(|cid| capsule(NvmOpcode::READ, cid, None)).concat();
        let (data, response) = (PduType::C2H_DATA, PduType::CAPSULE_RESP);
        let told = |responds| answered(&bytes, bytes.len(), responds);
        let one = [(data, 1, 4096), (response, 1, 0), (data, 2, 4096), (response, 2, 0)];
        assert_eq!(told(Some(Together::One)), one);
        let all = [(data, 1, 4096), (data, 2, 4096), (response, 1, 0), (response, 2, 0)];
        assert_eq!(told(Some(Together::All)), all);
        assert_eq!(told(None), [(data, 1, 4096), (data, 2, 4096)]);
    }

    #[test]
    fn data_that_is_not_the_last_calls_for_nothing() {
        let mut first = last_data(3, &[0; 512]);
        first[1] &= !pdu::flags::LAST;
        assert!(answered(&first, 100, None).is_empty());
        let both = [first, last_data(3, &[0; 512])].concat();
        assert_eq!(answered(&both, 100, None), [(PduType::CAPSULE_RESP, 3, 0)]);
    }

    #[test]
    fn a_host_that_leaves_while_it_joins_is_no_end_for_others() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let admin = TcpListener::bind("127.0.0.1:0").unwrap();
        let behind = admin.local_addr().unwrap();
        thread::spawn(move || answer(&listener, behind, Together::One, false));
        let mut early = TcpStream::connect(address).unwrap();
        early.write_all(&[0; 10]).unwrap();
        drop(early);
        // The next one is answered.
        let mut host = TcpStream::connect(address).unwrap();
        let mut header = [0; HEADER_MAX];
        let len = pdu::ic_req(&mut header, &IcReq::default());
        host.write_all(&header[..len]).unwrap();
        let mut ic_resp = [0; IC_LEN];
        host.read_exact(&mut ic_resp).unwrap();
        assert_eq!(PduType(ic_resp[0]), PduType::IC_RESP);
    }

    #[test]
    fn what_no_host_sends_is_no_command() {
        let mut commands = Commands::new(false, Digests::NONE);
        assert!(commands.take(&[0xFF; 128], &mut Vec::new()).is_err());
        let other = capsule(NvmOpcode::COMPARE, 1, None);
        assert!(commands.take(&other, &mut Vec::new()).is_err(), "it has no answer for it");
    }
}
