//! What can be wrong with a PDU, and what a TermReq says of it.

use super::{FatalErrorStatus, PduType};

/// A PDU that breaks the protocol.
///
/// The decoder gives all but [`PduError::R2tLimitExceeded`], which only a connection can tell; a connection gives
/// [`PduError::Sequence`] and [`PduError::DataOutOfRange`] too, for what does not fit its commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PduError {
    /// A header field has a value that it may not have.
    #[error("invalid PDU header field at byte {offset}")]
    InvalidField {
        /// Byte offset of the field in the header.
        offset: u8,
    },
    /// A PDU of this type may not come now.
    #[error("PDU of type {pdu_type:?} out of sequence")]
    Sequence {
        /// What came.
        pdu_type: PduType,
    },
    /// The header digest does not fit the header.
    #[error("header digest {received:#010x} where {computed:#010x} was computed")]
    HeaderDigest {
        /// HDGST as it came.
        received: u32,
        /// The digest of the header as it came.
        computed: u32,
    },
    /// Data lies outside of what was asked for.
    #[error("data at offset {offset} of {len} bytes lies out of range")]
    DataOutOfRange {
        /// DATAO or R2TO.
        offset: u32,
        /// DATAL or R2TL.
        len: u32,
    },
    /// A data PDU holds more than MAXH2CDATA, or than this receiver takes.
    #[error("{len} bytes of data in one PDU, {max} allowed")]
    DataLimitExceeded {
        /// Bytes of data.
        len: usize,
        /// The limit.
        max: u32,
    },
    /// More R2Ts than MAXR2T allows are outstanding for a command.
    #[error("more R2Ts for command {cccid:#06x} than allowed")]
    R2tLimitExceeded {
        /// The command.
        cccid: u16,
    },
    /// A parameter of ICReq or ICResp that this side does not support.
    #[error("unsupported parameter at byte {offset}")]
    UnsupportedParameter {
        /// Byte offset of the field in the header.
        offset: u8,
    },
    /// A TermReq with impossible lengths. It ends the connection all the same, and is never answered.
    #[error("malformed termination request (HLEN {hlen}, PLEN {plen})")]
    MalformedTermReq {
        /// HLEN.
        hlen: u8,
        /// PLEN.
        plen: u32,
    },
    /// Not the peer's doing: fewer bytes than a header has were given to the decoder.
    #[error("{needed} bytes of header needed")]
    Incomplete {
        /// Bytes needed, from the start of the PDU.
        needed: usize,
    },
}

impl PduError {
    /// FES of the TermReq that answers this, or `None` where no TermReq may be sent.
    #[must_use]
    pub const fn fes(&self) -> Option<FatalErrorStatus> {
        Some(match self {
            Self::InvalidField { .. } => FatalErrorStatus::INVALID_PDU_HEADER_FIELD,
            Self::Sequence { .. } => FatalErrorStatus::PDU_SEQUENCE_ERROR,
            Self::HeaderDigest { .. } => FatalErrorStatus::HEADER_DIGEST_ERROR,
            Self::DataOutOfRange { .. } => FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE,
            Self::DataLimitExceeded { .. } | Self::R2tLimitExceeded { .. } => {
                FatalErrorStatus::LIMIT_EXCEEDED
            }
            Self::UnsupportedParameter { .. } => FatalErrorStatus::UNSUPPORTED_PARAMETER,
            Self::MalformedTermReq { .. } | Self::Incomplete { .. } => return None,
        })
    }

    /// FEI of the TermReq: the field's offset, the digest that came, DATAO, or zero.
    #[must_use]
    pub const fn fei(&self) -> u32 {
        match self {
            Self::InvalidField { offset } | Self::UnsupportedParameter { offset } => *offset as u32,
            Self::HeaderDigest { received, .. } => *received,
            Self::DataOutOfRange { offset, .. } => *offset,
            _ => 0,
        }
    }
}
