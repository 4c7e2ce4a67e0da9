//! The beginning of each connection: ICReq, Connect, and what becomes of it then.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

use anyhow::{Context, Result};
use fastice::tcp::digest::Digest;
use fastice::tcp::pdu::{self, Digests, HEADER_MAX, IcReq, IcResp};
use nvme_spec::fabrics::{ConnectCommand, ConnectData, cattr};
use nvme_spec::{CompletionQueueEntry, Qid};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};

use super::super::sealed;
use super::super::work::CAPSULE_LEN;
use super::commands::plen_of;

/// ICReq and ICResp (NVMe/TCP Transport specification 1.1, section 3.6.2.2).
pub(super) const IC_LEN: usize = 128;
/// MAXH2CDATA, bytes: as fastice states it.
const H2C_DATA_MAX: u32 = 1 << 20;

/// What a connection turned out to be.
pub(super) enum Joined {
    /// An admin queue, and that of the target behind.
    Admin(TcpStream),
    /// An I/O queue.
    Queue(Agreed),
}

/// What both sides have agreed to for an I/O queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreed {
    /// Whether reads have response capsules.
    pub(super) responds: bool,
    /// Of each PDU.
    pub(super) digests: Digests,
}

/// ICReq and Connect: waits for both.
pub(super) fn joined(stream: &mut TcpStream, admin: SocketAddr) -> Result<Joined> {
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
    let responds = command.cattr & cattr::DISABLE_SQ_FLOW_CONTROL == 0;
    Ok(Joined::Queue(Agreed { responds, digests }))
}

/// Both ways, in threads of their own, until one side has had enough.
pub(super) fn pass_on(host: TcpStream, target: TcpStream) -> Result<()> {
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
