//! Headers from bytes: the fields of each PDU, and the rules that the specification has for them.

use super::{
    COMMON_HEADER_LEN, DataHeader, Decoded, Digests, FatalErrorStatus, HeaderPlan, IcReq, IcResp,
    MAXH2CDATA_MIN, PDA_MAX, PduError, PduHeader, PduRules, PduType, Phase, R2t, Receiver, TermReq, field,
    flags, header_len_needed,
};
use crate::tcp::digest;

/// Decodes a header. `bytes` starts at the PDU and holds at least [`HeaderPlan::header_len`] bytes; data is not
/// looked at.
///
/// # Errors
/// The rule that the header breaks, the header digest included; [`PduError::Incomplete`] when `bytes` is shorter
/// than the header.
pub fn decode_header(rules: &PduRules, bytes: &[u8]) -> Result<Decoded, PduError> {
    let Some((first8, _)) = bytes.split_first_chunk::<COMMON_HEADER_LEN>() else {
        return Err(PduError::Incomplete { needed: COMMON_HEADER_LEN });
    };
    let plan = header_len_needed(rules, first8)?;
    let header = decode_planned(&plan, bytes)?;
    Ok(Decoded { plan, header })
}

/// A command capsule of the kind that nearly all are: no digests, and either no data or data right behind its header. Its
/// plan and its submission queue entry, as [`header_len_needed`] and [`decode_header`] give them. `None` when `bytes` begins
/// with anything else, right or wrong, or does not hold the whole header: those tell what it is.
#[must_use]
#[inline]
pub fn plain_command<'b>(rules: &PduRules, bytes: &'b [u8]) -> Option<(HeaderPlan, &'b [u8; 64])> {
    const HLEN: usize = 72;
    let (first8, rest) = bytes.split_first_chunk::<COMMON_HEADER_LEN>()?;
    let sqe = rest.first_chunk()?;
    let [pdu_type, flags, hlen, pdo, plen @ ..] = *first8;
    let is_plain = [pdu_type, flags, hlen] == [PduType::CAPSULE_CMD.0, 0, 72]
        && !rules.digests.header
        && rules.phase == Phase::Running
        && rules.receiver == Receiver::Controller;
    let data_len = (u32::from_le_bytes(plen) as usize).checked_sub(HLEN).filter(|_| is_plain)?;
    // Without data PDO has no meaning.
    let has_plain_data = usize::from(pdo) == HLEN && rules.pda == 0 && !rules.digests.data;
    if data_len > 0 && !(has_plain_data && data_len <= rules.in_capsule_len_max as usize) {
        return None;
    }
    let pdu_type = PduType::CAPSULE_CMD;
    let plan =
        HeaderPlan { pdu_type, flags, hlen: HLEN, hdgst_len: 0, data_offset: HLEN, data_len, ddgst: false };
    Some((plan, sqe))
}

/// Decodes a header that [`header_len_needed`] has planned with.
///
/// # Errors
/// As [`decode_header`].
pub fn decode_planned(plan: &HeaderPlan, bytes: &[u8]) -> Result<PduHeader, PduError> {
    let incomplete = PduError::Incomplete { needed: plan.header_len() };
    let (header, rest) = bytes.split_at_checked(plan.hlen).ok_or(incomplete)?;
    if plan.hdgst_len != 0 {
        let (received, _) = rest.split_first_chunk::<{ digest::Digest::LEN }>().ok_or(incomplete)?;
        let received = u32::from_le_bytes(*received);
        let computed = digest::crc32c(0, header);
        if received != computed {
            return Err(PduError::HeaderDigest { received, computed });
        }
    }
    Ok(match plan.pdu_type {
        PduType::IC_REQ => PduHeader::IcReq(decode_ic_req(header)?),
        PduType::IC_RESP => PduHeader::IcResp(decode_ic_resp(header)?),
        PduType::CAPSULE_CMD => PduHeader::CapsuleCmd(tail(header).ok_or(incomplete)?),
        PduType::CAPSULE_RESP => PduHeader::CapsuleResp(tail(header).ok_or(incomplete)?),
        PduType::H2C_DATA => PduHeader::H2cData(decode_data(plan, header)?),
        PduType::C2H_DATA => PduHeader::C2hData(decode_data(plan, header)?),
        PduType::R2T => PduHeader::R2t(decode_r2t(header)?),
        _ => PduHeader::TermReq(TermReq {
            fes: FatalErrorStatus(le16(header, 8)),
            // FEI is no multiple of four bytes away from the start: bytes 10 to 13.
            fei: le32(header, 10),
        }),
    })
}

/// What follows the common header, when it has exactly `N` bytes.
fn tail<const N: usize>(header: &[u8]) -> Option<[u8; N]> {
    header.get(COMMON_HEADER_LEN..)?.try_into().ok()
}

/// Two bytes at `at`; headers are longer than any `at` used here, so the zero is never taken.
fn le16(header: &[u8], at: usize) -> u16 {
    header.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |&bytes| u16::from_le_bytes(bytes))
}

/// Four bytes at `at`; see [`le16`].
fn le32(header: &[u8], at: usize) -> u32 {
    header.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |&bytes| u32::from_le_bytes(bytes))
}

/// PFV, the alignment and the digests, which ICReq and ICResp have in the same place.
fn decode_ic_common(header: &[u8]) -> Result<(u8, Digests), PduError> {
    let [pda, dgst] = le16(header, usize::from(field::PDA)).to_le_bytes();
    if le16(header, usize::from(field::PFV)) != 0 {
        return Err(PduError::UnsupportedParameter { offset: field::PFV });
    }
    if pda > PDA_MAX {
        return Err(PduError::InvalidField { offset: field::PDA });
    }
    if dgst & !3 != 0 {
        return Err(PduError::InvalidField { offset: field::DGST });
    }
    Ok((pda, Digests::from_wire(dgst)))
}

fn decode_ic_req(header: &[u8]) -> Result<IcReq, PduError> {
    let (hpda, digests) = decode_ic_common(header)?;
    Ok(IcReq { hpda, digests, maxr2t_z: le32(header, 12) })
}

fn decode_ic_resp(header: &[u8]) -> Result<IcResp, PduError> {
    let (cpda, digests) = decode_ic_common(header)?;
    let maxh2cdata = le32(header, usize::from(field::MAXH2CDATA));
    if maxh2cdata < MAXH2CDATA_MIN || !maxh2cdata.is_multiple_of(4) {
        return Err(PduError::InvalidField { offset: field::MAXH2CDATA });
    }
    Ok(IcResp { cpda, digests, maxh2cdata })
}

fn decode_data(plan: &HeaderPlan, header: &[u8]) -> Result<DataHeader, PduError> {
    let data = DataHeader {
        cccid: le16(header, 8),
        ttag: le16(header, 10),
        data_offset: le32(header, usize::from(field::DATAO)),
        data_len: le32(header, usize::from(field::DATAL)),
        last: plan.flags & flags::LAST != 0,
        success: plan.flags & flags::SUCCESS != 0,
    };
    if data.data_len as usize != plan.data_len {
        return Err(PduError::InvalidField { offset: field::DATAL });
    }
    check_range(data.data_offset, data.data_len)?;
    Ok(data)
}

fn decode_r2t(header: &[u8]) -> Result<R2t, PduError> {
    let r2t = R2t {
        cccid: le16(header, 8),
        ttag: le16(header, 10),
        offset: le32(header, usize::from(field::DATAO)),
        len: le32(header, usize::from(field::DATAL)),
    };
    if r2t.len == 0 {
        return Err(PduError::InvalidField { offset: field::DATAL });
    }
    check_range(r2t.offset, r2t.len)?;
    Ok(r2t)
}

/// DATAO and R2TO are dword-aligned, and the range ends within what a 32-bit length can state.
fn check_range(offset: u32, len: u32) -> Result<(), PduError> {
    if !offset.is_multiple_of(4) {
        return Err(PduError::InvalidField { offset: field::DATAO });
    }
    match offset.checked_add(len) {
        Some(_) => Ok(()),
        None => Err(PduError::DataOutOfRange { offset, len }),
    }
}
