//! A host that does next to nothing, so that the target is what is measured: commands are made before, responses are counted.
//!
//! ```text
//!   join      ICReq, Connect, CC.EN, Number of Queues; ICReq, Connect on a second connection: one I/O queue
//!   measure   depth capsules out | whole responses in, each with its CID | as many capsules out again
//! ```
//!
//! All responses of a run have one length: C2HData with the SUCCESS flag for reads, a response capsule for writes whose data
//! is in the capsule. Anything else that comes ends the run with an error. Against the [bare responder](super::bare) the
//! handshake is left out.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fastice::initiator::command;
use fastice::initiator::controller::Host;
use fastice::initiator::raw::{RawConnection, RawEvent};
use fastice::tcp::pdu::{Digests, PduHeader, PduType};
use fastice::units::Lba;
use nvme_spec::command::psdt;
use nvme_spec::fabrics::{ConnectData, cattr, nqn_field};
use nvme_spec::feature::FeatureId;
use nvme_spec::register::{Cc, Csts, Property};
use nvme_spec::{
    AdminOpcode, Cntlid, CompletionQueueEntry, Nsid, NvmOpcode, Qid, SglDescriptor, SubmissionQueueEntry,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::NQN;

/// Bytes of a read or write.
pub const UNIT_LEN: u32 = 4096;
/// Common header and command (NVMe/TCP Transport specification 1.1, section 3.6.2.6).
pub const CAPSULE_LEN: usize = 72;
/// Common header and what follows in a C2HData PDU or a response capsule.
pub const RESPONSE_HEADER_LEN: usize = 24;
/// Where CCCID is in a C2HData PDU.
pub const C2H_CCCID_AT: usize = 8;
/// Where the CID is in a response capsule: behind the common header, in dword 3 of the completion queue entry.
const RESPONSE_CID_AT: usize = 20;
/// Where the status is there.
const RESPONSE_STATUS_AT: usize = 22;
/// What is read at a time.
const PIECE_LEN: usize = 1 << 20;
/// For anything that is no measurement.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the host does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Random reads.
    Read,
    /// Random writes, their data in the capsule.
    Write,
}

impl Work {
    /// Its name in rows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "randread",
            Self::Write => "randwrite",
        }
    }

    /// How long each response is.
    pub const fn response_len(self) -> usize {
        match self {
            Self::Read => RESPONSE_HEADER_LEN + UNIT_LEN as usize,
            Self::Write => RESPONSE_HEADER_LEN,
        }
    }

    /// How long each capsule is.
    pub const fn capsule_len(self) -> usize {
        match self {
            Self::Read => CAPSULE_LEN,
            Self::Write => CAPSULE_LEN + UNIT_LEN as usize,
        }
    }
}

/// What a run gave.
#[derive(Clone, Debug)]
pub struct Run {
    /// Commands a second.
    pub iops: f64,
    /// Of each command at depth 1, in nanoseconds, sorted; empty at other depths.
    pub latencies_ns: Vec<f64>,
}

impl Run {
    /// The latency that this part of the commands does not exceed, in microseconds.
    pub fn percentile_us(&self, part: f64) -> Option<f64> {
        let last = self.latencies_ns.len().checked_sub(1)?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let at = (last as f64 * part).round() as usize;
        Some(self.latencies_ns.get(at)? / 1e3)
    }
}

/// A connection with commands in flight.
pub struct LightHost {
    stream: TcpStream,
    /// The association ends with its admin queue.
    _admin: Option<RawConnection>,
    work: Work,
    /// One capsule a CID.
    capsules: Vec<Vec<u8>>,
}

impl LightHost {
    /// Joins a subsystem, as a host with one I/O queue of this depth.
    ///
    /// # Errors
    /// When the target does not let it.
    pub fn join(address: SocketAddr, work: Work, depth: u16, blocks: u64) -> Result<Self> {
        let host = Host::random();
        let mut admin = RawConnection::connect(address)?;
        let result = begin(&mut admin, &host, (Qid::ADMIN, 32), Cntlid::DYNAMIC)?;
        let [low, high, ..] = result.to_le_bytes();
        let cc = Cc::new().with_iosqes(6).with_iocqes(4).with_en(true).into_bits();
        ask(&mut admin, &command::property_set(Property::CC, cc), &[])?;
        let begun = Instant::now();
        let csts = command::property_get(Property::CSTS, false);
        while !Csts::from_bits(ask(&mut admin, &csts, &[])?).rdy() {
            ensure!(begun.elapsed() < PATIENCE, "the controller does not become ready");
        }
        let mut queues = command::command(AdminOpcode::SET_FEATURES.0, Nsid::NONE);
        queues.cdw10 = u32::from(FeatureId::NUMBER_OF_QUEUES.0).into();
        ask(&mut admin, &queues, &[])?;
        let mut queue = RawConnection::connect(address)?;
        begin(&mut queue, &host, (Qid(1), depth + 1), Cntlid(u16::from_le_bytes([low, high])))?;
        let stream = queue.into_stream().context("the target speaks before it is asked")?;
        Self::of(stream, Some(admin), work, depth, blocks)
    }

    /// Connects to the bare responder.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect_bare(address: SocketAddr, work: Work, depth: u16, blocks: u64) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Self::of(stream, None, work, depth, blocks)
    }

    fn of(
        stream: TcpStream,
        admin: Option<RawConnection>,
        work: Work,
        depth: u16,
        blocks: u64,
    ) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let capsules = (0..depth).map(|cid| capsule(work, cid, blocks)).collect();
        Ok(Self { stream, _admin: admin, work, capsules })
    }

    /// Keeps all commands in flight for so long.
    ///
    /// # Errors
    /// When the target answers otherwise than well, or not at all.
    pub fn measure(&mut self, time: Duration) -> Result<Run> {
        let (mut space, mut filled, mut count) = (vec![0; PIECE_LEN], 0, 0_u64);
        let (mut latencies, single) = (Vec::with_capacity(1 << 20), self.capsules.len() == 1);
        let mut out = self.capsules.concat();
        let (begun, mut sent_at, mut heard_at) = (Instant::now(), Instant::now(), Instant::now());
        let mut in_flight = self.capsules.len();
        send_all(&mut self.stream, &out)?;
        while in_flight > 0 {
            let len = match self.stream.read(space.get_mut(filled..).unwrap_or_default()) {
                Ok(0) => bail!("the target closed the connection"),
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ensure!(heard_at.elapsed() < PATIENCE, "the target does not answer");
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let now = Instant::now();
            heard_at = now;
            filled += len;
            out.clear();
            let goes_on = now.duration_since(begun) < time;
            let whole = filled - filled % self.work.response_len();
            for response in space.get(..whole).unwrap_or_default().chunks_exact(self.work.response_len()) {
                let cid = cid_of(self.work, response)?;
                count += 1;
                if goes_on {
                    out.extend_from_slice(
                        self.capsules.get(usize::from(cid)).context("a CID that was not sent")?,
                    );
                } else {
                    in_flight -= 1;
                }
            }
            space.copy_within(whole..filled, 0);
            filled -= whole;
            if single && whole > 0 {
                latencies.push(now.duration_since(sent_at).as_nanos() as f64);
                sent_at = Instant::now();
            }
            send_all(&mut self.stream, &out)?;
        }
        latencies.sort_by(f64::total_cmp);
        Ok(Run { iops: count as f64 / begun.elapsed().as_secs_f64(), latencies_ns: latencies })
    }
}

/// Spins until all is sent: what is waited for is the target.
fn send_all(stream: &mut TcpStream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn cid_of(work: Work, response: &[u8]) -> Result<u16> {
    let field = |at: usize| response.get(at..).and_then(<[u8]>::first_chunk).copied().map(u16::from_le_bytes);
    let (kind, cid_at) = match work {
        Work::Read => (PduType::C2H_DATA, C2H_CCCID_AT),
        Work::Write => (PduType::CAPSULE_RESP, RESPONSE_CID_AT),
    };
    ensure!(response.first() == Some(&kind.0), "another PDU than is measured came");
    // The lowest bit is the phase tag, which is 0 on fabrics.
    ensure!(work == Work::Read || field(RESPONSE_STATUS_AT) == Some(0), "a write failed");
    field(cid_at).context("a response that is too short")
}

/// A command of 4 KiB somewhere on the namespace, with a CID of its own.
fn capsule(work: Work, cid: u16, blocks: u64) -> Vec<u8> {
    let (opcode, dptr) = match work {
        Work::Read => (NvmOpcode::READ, SglDescriptor::transport(UNIT_LEN)),
        Work::Write => (NvmOpcode::WRITE, SglDescriptor::in_capsule(0, UNIT_LEN)),
    };
    // Any odd number spreads them; each command keeps its place.
    let lba = u64::from(cid).wrapping_mul(0x9E37_79B9_7F4A_7C15) % blocks.max(1);
    let sqe = SubmissionQueueEntry {
        flags: psdt::SGL << 6,
        cid: cid.into(),
        dptr,
        ..command::io(opcode, Nsid(1), Lba(lba), 0, false)
    };
    let mut bytes = header(work.capsule_len());
    bytes.extend_from_slice(sqe.as_bytes());
    bytes.resize(work.capsule_len(), 0x5A);
    bytes
}

/// The common header of a command capsule that is so long: PDO is where its data begins.
fn header(len: usize) -> Vec<u8> {
    let data_at = if len > CAPSULE_LEN { CAPSULE_LEN } else { 0 };
    let small = |value: usize| u8::try_from(value).unwrap_or_default();
    let mut bytes = vec![PduType::CAPSULE_CMD.0, 0, small(CAPSULE_LEN), small(data_at)];
    bytes.extend_from_slice(&u32::try_from(len).unwrap_or_default().to_le_bytes());
    bytes
}

/// ICReq and Connect; gives dword 0 of the completion.
fn begin(
    connection: &mut RawConnection,
    host: &Host,
    (qid, entries): (Qid, u16),
    cntlid: Cntlid,
) -> Result<u32> {
    connection.initialize(Digests::NONE)?;
    let mut data = ConnectData::new_zeroed();
    data.hostid = host.id;
    data.cntlid = cntlid.get().into();
    data.subnqn = nqn_field(NQN).context("a bad NQN")?;
    data.hostnqn = nqn_field(&host.nqn).context("a bad NQN")?;
    let sqe = command::connect(qid, entries, cattr::DISABLE_SQ_FLOW_CONTROL, 0);
    ask(connection, &sqe, data.as_bytes())
}

/// One command and its good response; gives dword 0.
fn ask(connection: &mut RawConnection, sqe: &SubmissionQueueEntry, data: &[u8]) -> Result<u32> {
    let dptr = SglDescriptor::in_capsule(0, u32::try_from(data.len())?);
    let mut sqe = SubmissionQueueEntry { flags: psdt::SGL << 6, ..*sqe };
    if !data.is_empty() {
        sqe.dptr = dptr;
    }
    let bytes = <[u8; 64]>::read_from_bytes(sqe.as_bytes()).map_err(|_| anyhow::anyhow!("64 bytes"))?;
    connection.send_capsule(&bytes, data)?;
    match connection.read_pdu(PATIENCE)? {
        RawEvent::Pdu(pdu) => match pdu.header {
            PduHeader::CapsuleResp(resp) => {
                let cqe =
                    CompletionQueueEntry::read_from_bytes(&resp).map_err(|_| anyhow::anyhow!("16 bytes"))?;
                ensure!(cqe.status().is_success(), "the target refuses: {:?}", cqe.status());
                Ok(cqe.dw0.get())
            }
            other => bail!("in place of a response came {other:?}"),
        },
        other => bail!("in place of a response came {other:?}"),
    }
}
