//! Joining a subsystem as a host with some I/O queues, in order and by the book: nothing of it is measured.
//!
//! ```text
//!   ICReq, Connect, CC.EN, CSTS.RDY, Number of Queues      the admin queue, which holds the association
//!   ICReq, Connect                                         one connection an I/O queue
//! ```

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fastice::initiator::command;
use fastice::initiator::controller::Host;
use fastice::initiator::raw::{RawConnection, RawEvent};
use fastice::tcp::pdu::{Digests, PduHeader};
use nvme_spec::command::psdt;
use nvme_spec::fabrics::{ConnectData, cattr, nqn_field};
use nvme_spec::feature::FeatureId;
use nvme_spec::register::{Cc, Csts, Property};
use nvme_spec::{AdminOpcode, Cntlid, CompletionQueueEntry, Nsid, Qid, SglDescriptor, SubmissionQueueEntry};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::NQN;

/// For each step.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Entries of the admin queue.
const ADMIN_ENTRIES: u16 = 32;
/// Of the Asynchronous Event Request; all other admin commands have CID 0.
const EVENT_CID: u16 = 1;
/// I/O queues of one association: what every target gives.
pub(crate) const QUEUES_MAX: u16 = 32;

/// An association: it ends with this.
pub(crate) struct Association {
    admin: RawConnection,
    /// One socket an I/O queue, with the most data that an H2CData may have.
    pub(crate) queues: Vec<(TcpStream, u32)>,
}

impl Association {
    /// Sends a Keep Alive, and waits for its answer.
    ///
    /// # Errors
    /// When the target does not answer it well.
    pub(crate) fn keep_alive(&mut self) -> Result<()> {
        ask(&mut self.admin, &command::command(AdminOpcode::KEEP_ALIVE.0, Nsid::NONE), &[]).map(drop)
    }

    /// Leaves an Asynchronous Event Request with the target, as every host does.
    ///
    /// # Errors
    /// When the connection broke.
    pub(crate) fn await_event(&mut self) -> Result<()> {
        let mut sqe = command::command(AdminOpcode::ASYNC_EVENT_REQUEST.0, Nsid::NONE);
        (sqe.flags, sqe.cid) = (psdt::SGL << 6, EVENT_CID.into());
        let bytes = <[u8; 64]>::read_from_bytes(sqe.as_bytes()).map_err(|_| anyhow::anyhow!("64 bytes"))?;
        Ok(self.admin.send_capsule(&bytes, &[])?)
    }
}

/// Joins, as a host with `count` I/O queues of this depth and no keep alive timer.
///
/// # Errors
/// When the target does not let it.
pub(crate) fn join(address: SocketAddr, count: u16, depth: u16, wanted: Digests) -> Result<Association> {
    join_alive(address, count, depth, wanted, Duration::ZERO)
}

/// The same, with a keep alive timer; zero is none.
///
/// # Errors
/// When the target does not let it.
pub(crate) fn join_alive(
    address: SocketAddr,
    count: u16,
    depth: u16,
    wanted: Digests,
    keep_alive: Duration,
) -> Result<Association> {
    ensure!((1..=QUEUES_MAX).contains(&count), "{count} queues of one association");
    let host = Host::random();
    let mut admin = RawConnection::connect(address)?;
    let queue = (Qid::ADMIN, ADMIN_ENTRIES);
    let (result, _) = begin(&mut admin, &host, queue, Cntlid::DYNAMIC, Digests::NONE, keep_alive)?;
    let [low, high, ..] = result.to_le_bytes();
    let cntlid = Cntlid(u16::from_le_bytes([low, high]));
    let cc = Cc::new().with_iosqes(6).with_iocqes(4).with_en(true).into_bits();
    ask(&mut admin, &command::property_set(Property::CC, cc), &[])?;
    let begun = Instant::now();
    let csts = command::property_get(Property::CSTS, false);
    while !Csts::from_bits(ask(&mut admin, &csts, &[])?).rdy() {
        ensure!(begun.elapsed() < PATIENCE, "the controller does not become ready");
    }
    let mut number = command::command(AdminOpcode::SET_FEATURES.0, Nsid::NONE);
    number.cdw10 = u32::from(FeatureId::NUMBER_OF_QUEUES.0).into();
    let count_z = u32::from(count - 1);
    number.cdw11 = (count_z << 16 | count_z).into();
    let given_z = ask(&mut admin, &number, &[])? & 0xFFFF;
    ensure!(given_z >= count_z, "the target gives {} of {count} queues", given_z + 1);
    let queues = (1..=count).map(|qid| {
        let mut queue = RawConnection::connect(address)?;
        let (_, h2c_data_max) =
            begin(&mut queue, &host, (Qid(qid), depth + 1), cntlid, wanted, Duration::ZERO)?;
        ensure!(queue.digests() == wanted, "the target does not agree to the digests");
        let stream = queue.into_stream().context("the target speaks before it is asked")?;
        Ok((stream, h2c_data_max))
    });
    let queues = queues.collect::<Result<_>>()?;
    Ok(Association { admin, queues })
}

/// ICReq and Connect; gives dword 0 of the completion, and MAXH2CDATA.
fn begin(
    connection: &mut RawConnection,
    host: &Host,
    (qid, entries): (Qid, u16),
    cntlid: Cntlid,
    wanted: Digests,
    keep_alive: Duration,
) -> Result<(u32, u32)> {
    let h2c_data_max = connection.initialize(wanted)?.maxh2cdata;
    let mut data = ConnectData::new_zeroed();
    data.hostid = host.id;
    data.cntlid = cntlid.get().into();
    data.subnqn = nqn_field(NQN).context("a bad NQN")?;
    data.hostnqn = nqn_field(&host.nqn).context("a bad NQN")?;
    let sqe = command::connect(
        qid,
        entries,
        cattr::DISABLE_SQ_FLOW_CONTROL,
        u32::try_from(keep_alive.as_millis())?,
    );
    Ok((ask(connection, &sqe, data.as_bytes())?, h2c_data_max))
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
