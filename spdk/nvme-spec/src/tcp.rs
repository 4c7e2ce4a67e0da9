//! NVMe/TCP header types that more than the PDU codec needs (TCP section 3.6).
//!
//! The codec itself, with its checks, is where PDUs are sent and received; here are only the numbers.

open_enum! {
    /// PDU-Type (TCP section 3.6.1).
    #[derive(zerocopy::Unaligned)]
    pub struct PduType(u8) {
        /// Initialize Connection Request.
        IC_REQ = 0x00,
        /// Initialize Connection Response.
        IC_RESP = 0x01,
        /// Host to Controller Terminate Connection Request.
        H2C_TERM_REQ = 0x02,
        /// Controller to Host Terminate Connection Request.
        C2H_TERM_REQ = 0x03,
        /// Command Capsule.
        CAPSULE_CMD = 0x04,
        /// Response Capsule.
        CAPSULE_RESP = 0x05,
        /// Host to Controller Data.
        H2C_DATA = 0x06,
        /// Controller to Host Data.
        C2H_DATA = 0x07,
        /// Ready to Transfer.
        R2T = 0x09,
    }
}

open_enum! {
    /// Fatal Error Status of a Terminate Connection Request (TCP sections 3.6.2.4, 3.6.2.5).
    pub struct FatalErrorStatus(u16) {
        /// Invalid PDU Header Field; FEI is its byte offset.
        INVALID_PDU_HEADER_FIELD = 0x01,
        /// PDU Sequence Error.
        PDU_SEQUENCE_ERROR = 0x02,
        /// Header Digest Error; FEI is the digest that was received.
        HEADER_DIGEST_ERROR = 0x03,
        /// Data Transfer Out of Range; FEI is DATAO.
        DATA_TRANSFER_OUT_OF_RANGE = 0x04,
        /// R2T Limit Exceeded (to the controller) or Data Transfer Limit Exceeded (to the host).
        LIMIT_EXCEEDED = 0x05,
        /// Unsupported Parameter; FEI is its byte offset.
        UNSUPPORTED_PARAMETER = 0x06,
    }
}

/// The default TCP ports (TCP section 3.1.1; assigned by IANA).
pub mod port {
    /// NVMe I/O controllers.
    pub const IO: u16 = 4420;
    /// The discovery service.
    pub const DISCOVERY: u16 = 8009;
}
