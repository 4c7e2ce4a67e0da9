//! The PDUs of NVMe/TCP (NVMe/TCP Transport specification 1.1, section 3.6), for the target and for the initiator.
//!
//! ```text
//!   0      8               hlen    +hdgst   pdo                    plen
//!   | CH   | type specific | HDGST | pad    | data        | DDGST |
//!   |<-- header_len_needed  ------>|
//!   |      decode_header           |        |<- data_len ->|
//! ```
//!
//! A receiver reads the 8 bytes of the common header, asks [`header_len_needed`] how much more to wait for and
//! where the data will lie, then gives the whole header to [`decode_header`]. Whatever breaks a rule becomes a
//! [`PduError`], which knows what a TermReq has to say about it. Nothing here allocates, keeps state, or looks at
//! the commands and completions that capsules carry; whether a PDU fits what went before it is for the connection.

mod decode;
mod encode;
mod error;
#[cfg(test)]
mod tests;

pub use decode::{decode_header, decode_planned, plain_command};
pub use encode::{
    DataPdu, HEADER_MAX, TERM_REQ_DATA_MAX, TERM_REQ_MAX, c2h_data, c2h_term_req, capsule_cmd, capsule_resp,
    data_pdu_offset, h2c_data, h2c_term_req, ic_req, ic_resp, plain_c2h_data, plain_capsule_resp, r2t,
};
pub use error::PduError;
pub use nvme_spec::tcp::{FatalErrorStatus, PduType};

use super::digest;

/// Bytes of the common header, `CH`, that every PDU starts with.
pub const COMMON_HEADER_LEN: usize = 8;
/// The default of [`PduRules::data_len_max`] and the largest MAXH2CDATA that the initiator makes use of.
pub const DATA_LEN_MAX: u32 = 16 << 20;
/// The smallest MAXH2CDATA that a controller may state (section 3.6.2.3).
pub const MAXH2CDATA_MIN: u32 = 4096;
/// The largest HPDA or CPDA: data aligned to 128 bytes (section 3.6.2.2).
pub const PDA_MAX: u8 = 31;
/// PLEN of the longest TermReq (section 3.6.2.4).
const TERM_REQ_PLEN_MAX: u32 = 152;
const _: () = assert!(TERM_REQ_PLEN_MAX as usize == TERM_REQ_MAX);

/// FLAGS of the common header (section 3.6.1 and the figures of each PDU).
pub mod flags {
    /// HDGSTF: a header digest follows the header.
    pub const HDGST: u8 = 1 << 0;
    /// DDGSTF: a data digest follows the data.
    pub const DDGST: u8 = 1 << 1;
    /// LAST_PDU: the last data PDU of this transfer.
    pub const LAST: u8 = 1 << 2;
    /// SUCCESS: the command completed without error and no response capsule will follow.
    pub const SUCCESS: u8 = 1 << 3;
}

/// Byte offsets of header fields, as the FEI of a TermReq names them.
pub(crate) mod field {
    pub(crate) const TYPE: u8 = 0;
    pub(crate) const FLAGS: u8 = 1;
    pub(crate) const HLEN: u8 = 2;
    pub(crate) const PDO: u8 = 3;
    pub(crate) const PLEN: u8 = 4;
    pub(crate) const PFV: u8 = 8;
    pub(crate) const PDA: u8 = 10;
    pub(crate) const DGST: u8 = 11;
    pub(crate) const MAXH2CDATA: u8 = 12;
    pub(crate) const DATAO: u8 = 12;
    pub(crate) const DATAL: u8 = 16;
}

/// The side that receives a PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Receiver {
    /// The target's end.
    Controller,
    /// The initiator's end.
    Host,
}

/// Where a connection stands in its initialisation (section 3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Only the peer's ICReq or ICResp, or a TermReq, may come.
    Initializing,
    /// Anything but ICReq and ICResp may come.
    Running,
}

/// Which digests the two sides agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Digests {
    /// HDGST_ENABLE: every PDU but ICReq, ICResp and TermReq carries a header digest.
    pub header: bool,
    /// DDGST_ENABLE: every PDU with data carries a data digest.
    pub data: bool,
}

impl Digests {
    /// No digest at all.
    pub const NONE: Self = Self { header: false, data: false };

    const fn from_wire(dgst: u8) -> Self {
        Self { header: dgst & 1 != 0, data: dgst & 2 != 0 }
    }

    const fn to_wire(self) -> u8 {
        self.header as u8 | (self.data as u8) << 1
    }

    const fn header_len(self) -> usize {
        if self.header { digest::Digest::LEN } else { 0 }
    }
}

/// What a receiver accepts at this moment of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PduRules {
    /// Who receives.
    pub receiver: Receiver,
    /// Before or after ICReq and ICResp.
    pub phase: Phase,
    /// The digests in force.
    pub digests: Digests,
    /// The receiver's own HPDA or CPDA, as sent in ICReq or ICResp: PDU data starts at a multiple of `(pda + 1) * 4`.
    pub pda: u8,
    /// The most in-capsule data of a command, in bytes.
    pub in_capsule_len_max: u32,
    /// The most data of one H2CData (the MAXH2CDATA that was sent) or C2HData, in bytes.
    pub data_len_max: u32,
}

impl PduRules {
    /// The rules before ICReq and ICResp: no digests yet.
    #[must_use]
    pub const fn initializing(receiver: Receiver) -> Self {
        Self {
            receiver,
            phase: Phase::Initializing,
            digests: Digests::NONE,
            pda: 0,
            in_capsule_len_max: 0,
            data_len_max: DATA_LEN_MAX,
        }
    }
}

/// What the common header says about the rest of the PDU; every number is checked against the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderPlan {
    /// The type, known and allowed here.
    pub pdu_type: PduType,
    /// FLAGS, without reserved bits.
    pub flags: u8,
    /// Bytes of the header, without its digest.
    pub hlen: usize,
    /// Bytes of the header digest: 0 or 4.
    pub hdgst_len: usize,
    /// Where the data starts, from the start of the PDU; equal to [`HeaderPlan::header_len`] when there is none.
    pub data_offset: usize,
    /// Bytes of data, 0 when there is none.
    pub data_len: usize,
    /// Whether 4 bytes of data digest follow the data.
    pub ddgst: bool,
}

impl HeaderPlan {
    /// Bytes that [`decode_header`] needs: header and header digest.
    #[must_use]
    pub const fn header_len(&self) -> usize {
        self.hlen + self.hdgst_len
    }

    /// Bytes of the padding between header digest and data, of any content.
    #[must_use]
    pub const fn pad_len(&self) -> usize {
        self.data_offset - self.header_len()
    }

    /// Bytes of the whole PDU, equal to its PLEN.
    #[must_use]
    pub const fn total_len(&self) -> usize {
        self.data_offset + self.data_len + if self.ddgst { digest::Digest::LEN } else { 0 }
    }
}

/// ICReq (section 3.6.2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IcReq {
    /// HPDA: the host's wish for the alignment of C2HData, `(hpda + 1) * 4` bytes.
    pub hpda: u8,
    /// The digests that the host asks for.
    pub digests: Digests,
    /// MAXR2T, zero-based: outstanding R2Ts that the host allows for one command.
    pub maxr2t_z: u32,
}

/// ICResp (section 3.6.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcResp {
    /// CPDA: the controller's wish for the alignment of in-capsule data and H2CData.
    pub cpda: u8,
    /// The digests that will be used.
    pub digests: Digests,
    /// MAXH2CDATA: the most data of one H2CData, in bytes.
    pub maxh2cdata: u32,
}

/// The header of H2CData and C2HData (sections 3.6.2.8 and 3.6.2.9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataHeader {
    /// CCCID: the CID of the command.
    pub cccid: u16,
    /// TTAG of the R2T that this answers; of no meaning in C2HData.
    pub ttag: u16,
    /// DATAO: where in the command's data this PDU's data belongs, in bytes.
    pub data_offset: u32,
    /// DATAL: bytes of data.
    pub data_len: u32,
    /// LAST_PDU.
    pub last: bool,
    /// SUCCESS; C2HData only.
    pub success: bool,
}

/// R2T (section 3.6.2.10).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct R2t {
    /// CCCID: the CID of the command.
    pub cccid: u16,
    /// TTAG: to be repeated in the H2CData PDUs.
    pub ttag: u16,
    /// R2TO: where in the command's data the wanted bytes start.
    pub offset: u32,
    /// R2TL: bytes wanted.
    pub len: u32,
}

/// H2CTermReq or C2HTermReq (sections 3.6.2.4 and 3.6.2.5). Its data is the start of the PDU that was found wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TermReq {
    /// FES: why.
    pub fes: FatalErrorStatus,
    /// FEI: where, see [`FatalErrorStatus`].
    pub fei: u32,
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PduHeader {
    /// ICReq.
    IcReq(IcReq),
    /// ICResp.
    IcResp(IcResp),
    /// H2CTermReq or C2HTermReq, whichever this side may get.
    TermReq(TermReq),
    /// CapsuleCmd: the submission queue entry, uninterpreted.
    CapsuleCmd([u8; 64]),
    /// CapsuleResp: the completion queue entry, uninterpreted.
    CapsuleResp([u8; 16]),
    /// H2CData.
    H2cData(DataHeader),
    /// C2HData.
    C2hData(DataHeader),
    /// R2T.
    R2t(R2t),
}

/// A header and where its data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Lengths and positions.
    pub plan: HeaderPlan,
    /// The fields.
    pub header: PduHeader,
}

/// The fixed facts of a PDU type.
struct Shape {
    hlen: u8,
    receiver: Receiver,
    flags_allowed: u8,
    /// Digests apply to it.
    digests: bool,
    data: DataShape,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum DataShape {
    None,
    InCapsule,
    Required,
    TermReq,
}

const fn shape_of(pdu_type: PduType) -> Option<Shape> {
    use flags::{DDGST, HDGST, LAST, SUCCESS};
    let (hlen, receiver, flags_allowed, digests, data) = match pdu_type {
        PduType::IC_REQ => (128, Receiver::Controller, 0, false, DataShape::None),
        PduType::IC_RESP => (128, Receiver::Host, 0, false, DataShape::None),
        PduType::H2C_TERM_REQ => (24, Receiver::Controller, 0, false, DataShape::TermReq),
        PduType::C2H_TERM_REQ => (24, Receiver::Host, 0, false, DataShape::TermReq),
        PduType::CAPSULE_CMD => (72, Receiver::Controller, HDGST | DDGST, true, DataShape::InCapsule),
        PduType::CAPSULE_RESP => (24, Receiver::Host, HDGST, true, DataShape::None),
        PduType::H2C_DATA => (24, Receiver::Controller, HDGST | DDGST | LAST, true, DataShape::Required),
        PduType::C2H_DATA => (24, Receiver::Host, HDGST | DDGST | LAST | SUCCESS, true, DataShape::Required),
        PduType::R2T => (24, Receiver::Host, HDGST, true, DataShape::None),
        _ => return None,
    };
    Some(Shape { hlen, receiver, flags_allowed, digests, data })
}

/// Reads a common header: how many bytes the header has, and where the data will be.
///
/// # Errors
/// The rule of `rules` or of the specification that the header breaks.
pub fn header_len_needed(rules: &PduRules, first8: &[u8; COMMON_HEADER_LEN]) -> Result<HeaderPlan, PduError> {
    let [pdu_type, flags, hlen, pdo, plen @ ..] = *first8;
    let pdu_type = PduType(pdu_type);
    let plen = u32::from_le_bytes(plen);
    let shape = shape_of(pdu_type).ok_or(PduError::InvalidField { offset: field::TYPE })?;
    if shape.receiver != rules.receiver {
        return Err(PduError::InvalidField { offset: field::TYPE });
    }
    let initializes = matches!(pdu_type, PduType::IC_REQ | PduType::IC_RESP);
    let terminates = matches!(pdu_type, PduType::H2C_TERM_REQ | PduType::C2H_TERM_REQ);
    if !terminates && initializes != (rules.phase == Phase::Initializing) {
        return Err(PduError::Sequence { pdu_type });
    }
    if shape.data == DataShape::TermReq {
        return plan_term_req(pdu_type, hlen, plen);
    }
    if hlen != shape.hlen {
        return Err(PduError::InvalidField { offset: field::HLEN });
    }
    let digests = if shape.digests { rules.digests } else { Digests::NONE };
    if flags & !shape.flags_allowed != 0
        || (flags & flags::HDGST != 0) != digests.header
        || flags & (flags::SUCCESS | flags::LAST) == flags::SUCCESS
    {
        return Err(PduError::InvalidField { offset: field::FLAGS });
    }
    let mut plan = HeaderPlan {
        pdu_type,
        flags,
        hlen: usize::from(hlen),
        hdgst_len: digests.header_len(),
        data_offset: usize::from(hlen) + digests.header_len(),
        data_len: 0,
        ddgst: false,
    };
    let plen = usize::try_from(plen).map_err(|_| PduError::InvalidField { offset: field::PLEN })?;
    let has_data = match shape.data {
        DataShape::Required => true,
        DataShape::InCapsule => plen != plan.header_len(),
        DataShape::None | DataShape::TermReq => false,
    };
    if has_data {
        plan_data(rules, &mut plan, pdo, plen)?;
    } else if plen != plan.header_len() {
        return Err(PduError::InvalidField { offset: field::PLEN });
    } else if flags & flags::DDGST != 0 {
        return Err(PduError::InvalidField { offset: field::FLAGS });
    }
    Ok(plan)
}

/// The part of the plan that concerns data: PDO, DDGSTF and the length left for data in PLEN.
fn plan_data(rules: &PduRules, plan: &mut HeaderPlan, pdo: u8, plen: usize) -> Result<(), PduError> {
    if (plan.flags & flags::DDGST != 0) != rules.digests.data {
        return Err(PduError::InvalidField { offset: field::FLAGS });
    }
    let data_offset = usize::from(pdo);
    let alignment = (usize::from(rules.pda.min(PDA_MAX)) + 1) * 4;
    if data_offset < plan.header_len() || !data_offset.is_multiple_of(alignment) {
        return Err(PduError::InvalidField { offset: field::PDO });
    }
    let ddgst_len = if rules.digests.data { digest::Digest::LEN } else { 0 };
    let data_len = plen
        .checked_sub(data_offset + ddgst_len)
        .filter(|&len| len > 0)
        .ok_or(PduError::InvalidField { offset: field::PLEN })?;
    if plan.pdu_type == PduType::CAPSULE_CMD {
        if data_len > rules.in_capsule_len_max as usize {
            return Err(PduError::InvalidField { offset: field::PLEN });
        }
    } else if data_len > rules.data_len_max as usize {
        return Err(PduError::DataLimitExceeded { len: data_len, max: rules.data_len_max });
    }
    plan.data_offset = data_offset;
    plan.data_len = data_len;
    plan.ddgst = rules.digests.data;
    Ok(())
}

/// A TermReq: never digested, PDO and FLAGS reserved, at most 128 bytes of data. A wrong one is not answered.
fn plan_term_req(pdu_type: PduType, hlen: u8, plen: u32) -> Result<HeaderPlan, PduError> {
    if hlen != 24 || !(24..=TERM_REQ_PLEN_MAX).contains(&plen) {
        return Err(PduError::MalformedTermReq { hlen, plen });
    }
    Ok(HeaderPlan {
        pdu_type,
        flags: 0,
        hlen: 24,
        hdgst_len: 0,
        data_offset: 24,
        data_len: plen as usize - 24,
        ddgst: false,
    })
}
