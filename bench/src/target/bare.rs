//! The bare responder: what the kernel's TCP gives when the target has no work at all.
//!
//! It receives, answers every whole capsule with a response of the right length that has its CID, and does nothing else: no
//! state, no checks, no device. Nothing that answers at once can be faster on this machine by this way to the kernel, so
//! it is the ceiling to close in on. Never use it for more. For hosts that join as hosts do there is [`super::front`].

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};

use anyhow::{Context, Result};
use fastice::tcp::pdu::{PduType, flags};

use super::inbound::HEADER_LEN;
use super::work::{CAPSULE_LEN, Kind, Work};

/// Where the CID is in a command capsule: behind the common header, in dword 0.
const CID_AT: usize = 10;
pub(super) const PIECE_LEN: usize = 1 << 20;
/// Parts of a `writev` (`UIO_MAXIOV`).
pub(super) const PARTS_MAX: usize = 1024;

/// Answers one connection after the other until the process ends. It polls, or sleeps until something comes.
///
/// # Errors
/// When a connection breaks otherwise than by its end.
pub fn answer(listener: &TcpListener, work: Work, sleeps: bool) -> Result<()> {
    for stream in listener.incoming() {
        let mut stream = stream?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(!sleeps)?;
        match converse(&mut stream, work) {
            Err(error) if is_end(&error) => {}
            result => result?,
        }
    }
    Ok(())
}

pub(super) fn is_end(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    matches!(kind, Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof))
}

fn converse(stream: &mut TcpStream, work: Work) -> Result<()> {
    let payload = vec![0; response_len(work) - HEADER_LEN];
    let (mut space, mut filled) = (vec![0; PIECE_LEN], 0);
    let mut headers: Vec<[u8; HEADER_LEN]> = Vec::new();
    loop {
        let len = match stream.read(space.get_mut(filled..).unwrap_or_default()) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error.into()),
        };
        filled += len;
        let whole = filled - filled % capsule_len(work);
        headers.clear();
        for capsule in space.get(..whole).unwrap_or_default().chunks_exact(capsule_len(work)) {
            let cid = capsule.get(CID_AT..CID_AT + 2).context("a capsule that is too short")?;
            headers.push(response(work, [cid[0], cid[1]]));
        }
        space.copy_within(whole..filled, 0);
        filled -= whole;
        for headers in headers.chunks(PARTS_MAX / 2) {
            let parts = headers.iter().flat_map(|header| [IoSlice::new(header), IoSlice::new(&payload)]);
            write_all(stream, &mut parts.filter(|part| !part.is_empty()).collect::<Vec<_>>())?;
        }
    }
}

/// How long each capsule is: writes have their data with them.
const fn capsule_len(work: Work) -> usize {
    if matches!(work.kind, Kind::Read) { CAPSULE_LEN } else { CAPSULE_LEN + work.len as usize }
}

/// How long each response is.
const fn response_len(work: Work) -> usize {
    if matches!(work.kind, Kind::Read) { HEADER_LEN + work.len as usize } else { HEADER_LEN }
}

fn response(work: Work, cid: [u8; 2]) -> [u8; HEADER_LEN] {
    match work.kind {
        Kind::Read => read_data(cid, work.len, true),
        // It knows no mix.
        Kind::Write | Kind::Mixed => capsule_resp(cid),
    }
}

/// In front of all data of a read; with `success`, nothing follows it.
pub(super) fn read_data(cid: [u8; 2], len: u32, success: bool) -> [u8; HEADER_LEN] {
    let mut header = common(PduType::C2H_DATA, HEADER_LEN + len as usize);
    header[1] = flags::LAST | if success { flags::SUCCESS } else { 0 };
    header[3] = header[2];
    header[8..10].copy_from_slice(&cid);
    header[16..20].copy_from_slice(&len.to_le_bytes());
    header
}

/// A command went well.
pub(super) fn capsule_resp(cid: [u8; 2]) -> [u8; HEADER_LEN] {
    let mut header = common(PduType::CAPSULE_RESP, HEADER_LEN);
    header[20..22].copy_from_slice(&cid);
    header
}

/// Type, HLEN and PLEN.
pub(super) fn common(kind: PduType, plen: usize) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[0] = kind.0;
    header[2] = u8::try_from(HEADER_LEN).unwrap_or_default();
    header[4..8].copy_from_slice(&u32::try_from(plen).unwrap_or_default().to_le_bytes());
    header
}

pub(super) fn write_all(stream: &mut TcpStream, mut parts: &mut [IoSlice<'_>]) -> Result<()> {
    while !parts.is_empty() {
        match stream.write_vectored(parts) {
            Ok(len) => IoSlice::advance_slices(&mut parts, len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
