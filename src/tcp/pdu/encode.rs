//! Writing PDU headers.
//!
//! Each function writes a whole header, with its digest and the padding up to the data where there is data, and
//! returns how many bytes that is; the `plain_` ones return the header itself, which has neither. Data and data digest are the caller's to send after it.

use super::{Digests, FatalErrorStatus, IcReq, IcResp, PDA_MAX, PduType, R2t, TermReq, flags};
use crate::tcp::digest::{self, Digest};

/// Bytes that any header needs, digest and padding included; a TermReq has [`TERM_REQ_MAX`]. The longest is a command
/// capsule whose data is aligned to 72 bytes: the first multiple after 76 bytes of header and digest.
pub const HEADER_MAX: usize = 144;
/// The most bytes of the offending PDU that a TermReq repeats (section 3.6.2.4).
pub const TERM_REQ_DATA_MAX: usize = 128;
/// Bytes of the longest TermReq.
pub const TERM_REQ_MAX: usize = 24 + TERM_REQ_DATA_MAX;

/// The longest data that fits beside the longest header and the data digest in PLEN.
const PLEN_DATA_MAX: u32 = u32::MAX - 148;

/// The fields of a data PDU to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataPdu {
    /// CCCID: the CID of the command.
    pub cccid: u16,
    /// TTAG: from the R2T; zero in C2HData.
    pub ttag: u16,
    /// DATAO, bytes.
    pub data_offset: u32,
    /// DATAL, bytes.
    pub data_len: u32,
    /// LAST_PDU.
    pub last: bool,
    /// SUCCESS; C2HData only, and only with `last`.
    pub success: bool,
}

/// Writes type, flags, HLEN, PDO and PLEN.
#[expect(clippy::cast_possible_truncation, reason = "headers and data offsets are at most 144")]
fn common(out: &mut [u8; HEADER_MAX], pdu_type: PduType, flags: u8, hlen: usize, pdo: usize, plen: u32) {
    let [b0, b1, b2, b3, b4, b5, b6, b7, ..] = out;
    [*b0, *b1, *b2, *b3] = [pdu_type.0, flags, hlen as u8, pdo as u8];
    [*b4, *b5, *b6, *b7] = plen.to_le_bytes();
}

/// Appends the header digest when there is one; the length with it.
fn seal(out: &mut [u8; HEADER_MAX], hlen: usize, digests: Digests) -> usize {
    if !digests.header {
        return hlen;
    }
    let crc = digest::crc32c(0, &out[..hlen]);
    out[hlen..hlen + Digest::LEN].copy_from_slice(&crc.to_le_bytes());
    hlen + Digest::LEN
}

/// Zeros between a header and its data: nearly always there is nothing between them.
fn pad(out: &mut [u8; HEADER_MAX], end: usize, pdo: usize) {
    if end < pdo {
        out[end..pdo].fill(0);
    }
}

/// PDO: the first multiple of `(pda + 1) * 4` after a header of `hlen` bytes and its digest.
const fn data_offset(hlen: usize, digests: Digests, pda: u8) -> usize {
    let pda = if pda > PDA_MAX { PDA_MAX } else { pda };
    (hlen + digests.header_len()).next_multiple_of((pda as usize + 1) * 4)
}

/// PDO of H2CData and C2HData: how many bytes go over the wire before the data.
#[must_use]
pub const fn data_pdu_offset(digests: Digests, pda: u8) -> usize {
    data_offset(24, digests, pda)
}

const fn digest_flags(digests: Digests, has_data: bool) -> u8 {
    (if digests.header { flags::HDGST } else { 0 })
        | (if digests.data && has_data { flags::DDGST } else { 0 })
}

/// PLEN of a PDU with data.
#[expect(clippy::cast_possible_truncation, reason = "PDO is at most 144")]
fn plen_with_data(pdo: usize, data_len: u32, digests: Digests) -> u32 {
    assert!(data_len <= PLEN_DATA_MAX, "a PDU cannot hold {data_len} bytes of data");
    pdo as u32 + data_len + if digests.data { Digest::LEN as u32 } else { 0 }
}

/// Writes an ICReq; 128 bytes.
pub fn ic_req(out: &mut [u8; HEADER_MAX], pdu: &IcReq) -> usize {
    *out = [0; HEADER_MAX];
    common(out, PduType::IC_REQ, 0, 128, 0, 128);
    out[10] = pdu.hpda;
    out[11] = pdu.digests.to_wire();
    out[12..16].copy_from_slice(&pdu.maxr2t_z.to_le_bytes());
    128
}

/// Writes an ICResp; 128 bytes.
pub fn ic_resp(out: &mut [u8; HEADER_MAX], pdu: &IcResp) -> usize {
    *out = [0; HEADER_MAX];
    common(out, PduType::IC_RESP, 0, 128, 0, 128);
    out[10] = pdu.cpda;
    out[11] = pdu.digests.to_wire();
    out[12..16].copy_from_slice(&pdu.maxh2cdata.to_le_bytes());
    128
}

/// Writes a CapsuleCmd header in front of `data_len` bytes of in-capsule data, which may be none; `cpda` is the
/// controller's.
///
/// # Panics
/// When `data_len` does not fit PLEN beside the header.
pub fn capsule_cmd(
    out: &mut [u8; HEADER_MAX],
    digests: Digests,
    cpda: u8,
    sqe: &[u8; 64],
    data_len: u32,
) -> usize {
    const HLEN: usize = 72;
    out[8..HLEN].copy_from_slice(sqe);
    if data_len == 0 {
        let len = HLEN + digests.header_len();
        #[expect(clippy::cast_possible_truncation, reason = "76 at most")]
        common(out, PduType::CAPSULE_CMD, digest_flags(digests, false), HLEN, 0, len as u32);
        return seal(out, HLEN, digests);
    }
    let pdo = data_offset(HLEN, digests, cpda);
    let plen = plen_with_data(pdo, data_len, digests);
    common(out, PduType::CAPSULE_CMD, digest_flags(digests, true), HLEN, pdo, plen);
    let end = seal(out, HLEN, digests);
    pad(out, end, pdo);
    pdo
}

/// Writes a CapsuleResp.
pub fn capsule_resp(out: &mut [u8; HEADER_MAX], digests: Digests, cqe: &[u8; 16]) -> usize {
    out[8..24].copy_from_slice(cqe);
    #[expect(clippy::cast_possible_truncation, reason = "28 at most")]
    common(
        out,
        PduType::CAPSULE_RESP,
        digest_flags(digests, false),
        24,
        0,
        (24 + digests.header_len()) as u32,
    );
    seal(out, 24, digests)
}

/// A header of 24 bytes without digest. As words: they go from registers to where the header is sent from.
#[inline(always)]
fn plain(pdu_type: PduType, flags: u8, pdo: u8, plen: u32, [low, high]: [u64; 2]) -> [u8; 24] {
    const HLEN: u8 = 24;
    let common = u64::from(u32::from_le_bytes([pdu_type.0, flags, HLEN, pdo])) | u64::from(plen) << 32;
    let mut out = [0; 24];
    let (words, _) = out.as_chunks_mut();
    for (place, word) in words.iter_mut().zip([common, low, high]) {
        *place = word.to_le_bytes();
    }
    out
}

/// What [`capsule_resp`] writes where no header digest is agreed to, of a completion queue entry as two words.
#[must_use]
#[inline]
pub fn plain_capsule_resp(cqe: [u64; 2]) -> [u8; 24] {
    plain(PduType::CAPSULE_RESP, 0, 0, 24, cqe)
}

/// What [`c2h_data`] writes for all data of a command, where no digests are agreed to and data follows the header.
///
/// # Panics
/// When `data_len` does not fit PLEN beside the header.
#[must_use]
#[inline]
pub fn plain_c2h_data(cccid: u16, data_len: u32, success: bool) -> [u8; 24] {
    let flags = flags::LAST | if success { flags::SUCCESS } else { 0 };
    let plen = plen_with_data(24, data_len, Digests::NONE);
    plain(PduType::C2H_DATA, flags, 24, plen, [u64::from(cccid), u64::from(data_len)])
}

fn data_pdu(
    out: &mut [u8; HEADER_MAX],
    pdu_type: PduType,
    digests: Digests,
    pda: u8,
    pdu: &DataPdu,
) -> usize {
    let pdo = data_offset(24, digests, pda);
    let plen = plen_with_data(pdo, pdu.data_len, digests);
    let mut flags = digest_flags(digests, true);
    if pdu.last {
        flags |= flags::LAST;
    }
    if pdu.success {
        flags |= flags::SUCCESS;
    }
    common(out, pdu_type, flags, 24, pdo, plen);
    out[8..10].copy_from_slice(&pdu.cccid.to_le_bytes());
    out[10..12].copy_from_slice(&pdu.ttag.to_le_bytes());
    out[12..16].copy_from_slice(&pdu.data_offset.to_le_bytes());
    out[16..20].copy_from_slice(&pdu.data_len.to_le_bytes());
    out[20..24].fill(0);
    let end = seal(out, 24, digests);
    pad(out, end, pdo);
    pdo
}

/// Writes a C2HData header, padding included; `hpda` is the host's, from its ICReq.
///
/// # Panics
/// When `data_len` does not fit PLEN beside the header.
pub fn c2h_data(out: &mut [u8; HEADER_MAX], digests: Digests, hpda: u8, pdu: &DataPdu) -> usize {
    data_pdu(out, PduType::C2H_DATA, digests, hpda, pdu)
}

/// Writes an H2CData header, padding included; `cpda` is the controller's, from its ICResp.
///
/// # Panics
/// When `data_len` does not fit PLEN beside the header.
pub fn h2c_data(out: &mut [u8; HEADER_MAX], digests: Digests, cpda: u8, pdu: &DataPdu) -> usize {
    data_pdu(out, PduType::H2C_DATA, digests, cpda, &DataPdu { success: false, ..*pdu })
}

/// Writes an R2T.
pub fn r2t(out: &mut [u8; HEADER_MAX], digests: Digests, pdu: &R2t) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "28 at most")]
    common(out, PduType::R2T, digest_flags(digests, false), 24, 0, (24 + digests.header_len()) as u32);
    out[8..10].copy_from_slice(&pdu.cccid.to_le_bytes());
    out[10..12].copy_from_slice(&pdu.ttag.to_le_bytes());
    out[12..16].copy_from_slice(&pdu.offset.to_le_bytes());
    out[16..20].copy_from_slice(&pdu.len.to_le_bytes());
    out[20..24].fill(0);
    seal(out, 24, digests)
}

/// Writes a whole TermReq; of `offending`, the PDU that was found wrong, the first 128 bytes go along.
#[expect(clippy::cast_possible_truncation, reason = "152 at most")]
fn term_req(out: &mut [u8; TERM_REQ_MAX], pdu_type: PduType, pdu: TermReq, offending: &[u8]) -> usize {
    let TermReq { fes: FatalErrorStatus(fes), fei } = pdu;
    let data = &offending[..offending.len().min(TERM_REQ_DATA_MAX)];
    let len = 24 + data.len();
    *out = [0; TERM_REQ_MAX];
    out[0] = pdu_type.0;
    out[2] = 24;
    out[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    out[8..10].copy_from_slice(&fes.to_le_bytes());
    out[10..14].copy_from_slice(&fei.to_le_bytes());
    out[24..len].copy_from_slice(data);
    len
}

/// Writes a whole C2HTermReq, the start of the `offending` PDU included.
pub fn c2h_term_req(out: &mut [u8; TERM_REQ_MAX], pdu: TermReq, offending: &[u8]) -> usize {
    term_req(out, PduType::C2H_TERM_REQ, pdu, offending)
}

/// Writes a whole H2CTermReq, the start of the `offending` PDU included.
pub fn h2c_term_req(out: &mut [u8; TERM_REQ_MAX], pdu: TermReq, offending: &[u8]) -> usize {
    term_req(out, PduType::H2C_TERM_REQ, pdu, offending)
}
