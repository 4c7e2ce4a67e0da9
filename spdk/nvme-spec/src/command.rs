//! Queue entries, opcodes and SGL descriptors (Base sections 4.1, 4.2, 4.3.2).

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Cid, Nsid, Status};

open_enum! {
    /// Opcode of an admin command (Base section 5, figure "Opcodes for Admin Commands").
    #[derive(zerocopy::Unaligned)]
    pub struct AdminOpcode(u8) {
        /// Delete I/O Submission Queue.
        DELETE_IO_SQ = 0x00,
        /// Create I/O Submission Queue.
        CREATE_IO_SQ = 0x01,
        /// Get Log Page.
        GET_LOG_PAGE = 0x02,
        /// Delete I/O Completion Queue.
        DELETE_IO_CQ = 0x04,
        /// Create I/O Completion Queue.
        CREATE_IO_CQ = 0x05,
        /// Identify.
        IDENTIFY = 0x06,
        /// Abort.
        ABORT = 0x08,
        /// Set Features.
        SET_FEATURES = 0x09,
        /// Get Features.
        GET_FEATURES = 0x0A,
        /// Asynchronous Event Request.
        ASYNC_EVENT_REQUEST = 0x0C,
        /// Namespace Management.
        NAMESPACE_MANAGEMENT = 0x0D,
        /// Firmware Commit.
        FIRMWARE_COMMIT = 0x10,
        /// Firmware Image Download.
        FIRMWARE_DOWNLOAD = 0x11,
        /// Device Self-test.
        DEVICE_SELF_TEST = 0x14,
        /// Namespace Attachment.
        NAMESPACE_ATTACHMENT = 0x15,
        /// Keep Alive.
        KEEP_ALIVE = 0x18,
        /// Directive Send.
        DIRECTIVE_SEND = 0x19,
        /// Directive Receive.
        DIRECTIVE_RECEIVE = 0x1A,
        /// Virtualization Management.
        VIRTUALIZATION_MANAGEMENT = 0x1C,
        /// Doorbell Buffer Config.
        DOORBELL_BUFFER_CONFIG = 0x7C,
        /// A Fabrics command; see [`crate::fabrics::FabricsCommandType`].
        FABRICS = 0x7F,
        /// Format NVM.
        FORMAT_NVM = 0x80,
        /// Security Send.
        SECURITY_SEND = 0x81,
        /// Security Receive.
        SECURITY_RECEIVE = 0x82,
        /// Sanitize.
        SANITIZE = 0x84,
        /// Get LBA Status.
        GET_LBA_STATUS = 0x86,
    }
}

open_enum! {
    /// Opcode of an I/O command of the NVM Command Set (NVM section 3, figure "Opcodes for NVM Commands").
    #[derive(zerocopy::Unaligned)]
    pub struct NvmOpcode(u8) {
        /// Flush.
        FLUSH = 0x00,
        /// Write.
        WRITE = 0x01,
        /// Read.
        READ = 0x02,
        /// Write Uncorrectable.
        WRITE_UNCORRECTABLE = 0x04,
        /// Compare.
        COMPARE = 0x05,
        /// Write Zeroes.
        WRITE_ZEROES = 0x08,
        /// Dataset Management.
        DATASET_MANAGEMENT = 0x09,
        /// Verify.
        VERIFY = 0x0C,
        /// Reservation Register.
        RESERVATION_REGISTER = 0x0D,
        /// Reservation Report.
        RESERVATION_REPORT = 0x0E,
        /// Reservation Acquire.
        RESERVATION_ACQUIRE = 0x11,
        /// Reservation Release.
        RESERVATION_RELEASE = 0x15,
        /// Cancel.
        CANCEL = 0x18,
        /// Copy.
        COPY = 0x19,
        /// A Fabrics command (Connect, Disconnect, authentication).
        FABRICS = 0x7F,
    }
}

/// Which way a command's data goes: opcode bits 1:0 (Base section 4.1, figure "Opcode").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataDirection {
    /// No data.
    None,
    /// Host to controller.
    HostToController,
    /// Controller to host.
    ControllerToHost,
    /// Both ways.
    Bidirectional,
}

impl DataDirection {
    /// The direction that the low bits of an opcode, or of FCTYPE for a Fabrics command, say.
    #[must_use]
    pub const fn of(opcode: u8) -> Self {
        match opcode & 0b11 {
            0b00 => Self::None,
            0b01 => Self::HostToController,
            0b10 => Self::ControllerToHost,
            _ => Self::Bidirectional,
        }
    }
}

/// SGL descriptor types (Base section 4.3.2, figure "SGL Descriptor Types"), the high nibble of byte 15.
pub mod sgl_type {
    /// Data Block.
    pub const DATA_BLOCK: u8 = 0x0;
    /// Bit Bucket.
    pub const BIT_BUCKET: u8 = 0x1;
    /// Segment.
    pub const SEGMENT: u8 = 0x2;
    /// Last Segment.
    pub const LAST_SEGMENT: u8 = 0x3;
    /// Keyed Data Block.
    pub const KEYED_DATA_BLOCK: u8 = 0x4;
    /// Transport Data Block.
    pub const TRANSPORT_DATA_BLOCK: u8 = 0x5;
    /// Vendor specific.
    pub const VENDOR: u8 = 0xF;
}

/// SGL descriptor sub types (Base section 4.3.2), the low nibble of byte 15.
pub mod sgl_sub_type {
    /// The address field is an address.
    pub const ADDRESS: u8 = 0x0;
    /// The address field is an offset: into the capsule's data.
    pub const OFFSET: u8 = 0x1;
    /// NVMe transport specific; with [`super::sgl_type::TRANSPORT_DATA_BLOCK`]: data by transport PDUs (TCP 3.3.2).
    pub const TRANSPORT: u8 = 0xA;
}

/// An SGL descriptor: Data Block and Transport Data Block share this layout (Base section 4.3.2).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SglDescriptor {
    /// Address, or offset into the capsule's data; reserved in a Transport Data Block.
    pub address: U64,
    /// Length in bytes.
    pub length: U32,
    /// Reserved.
    pub reserved: [u8; 3],
    /// Type in the high, sub type in the low nibble.
    pub id: u8,
}
const _: () = assert!(size_of::<SglDescriptor>() == 16);

impl SglDescriptor {
    /// A Data Block for data in the capsule, `offset` bytes behind the submission queue entry.
    #[must_use]
    pub const fn in_capsule(offset: u64, length: u32) -> Self {
        Self::of(sgl_type::DATA_BLOCK, sgl_sub_type::OFFSET, offset, length)
    }

    /// A Transport Data Block: data travels in PDUs of its own.
    #[must_use]
    pub const fn transport(length: u32) -> Self {
        Self::of(sgl_type::TRANSPORT_DATA_BLOCK, sgl_sub_type::TRANSPORT, 0, length)
    }

    /// A descriptor of any type.
    #[must_use]
    pub const fn of(sgl_type: u8, sub_type: u8, address: u64, length: u32) -> Self {
        Self {
            address: U64::new(address),
            length: U32::new(length),
            reserved: [0; 3],
            id: sgl_type << 4 | sub_type & 0xF,
        }
    }

    /// The descriptor type; see [`sgl_type`].
    #[must_use]
    pub const fn sgl_type(&self) -> u8 {
        self.id >> 4
    }

    /// The sub type; see [`sgl_sub_type`].
    #[must_use]
    pub const fn sub_type(&self) -> u8 {
        self.id & 0xF
    }
}

/// Values of PSDT, bits 7:6 of the flags byte (Base section 4.1).
pub mod psdt {
    /// PRPs; not over fabrics.
    pub const PRP: u8 = 0b00;
    /// SGLs; the metadata pointer is an address.
    pub const SGL: u8 = 0b01;
    /// SGLs; the metadata pointer is an SGL segment.
    pub const SGL_METADATA_SGL: u8 = 0b10;
}

/// Submission Queue Entry, the common command format (Base section 4.1).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SubmissionQueueEntry {
    /// OPC.
    pub opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6.
    pub flags: u8,
    /// CID.
    pub cid: U16,
    /// NSID; FCTYPE in its first byte for Fabrics commands.
    pub nsid: U32,
    /// CDW2.
    pub cdw2: U32,
    /// CDW3.
    pub cdw3: U32,
    /// MPTR, metadata pointer.
    pub mptr: U64,
    /// DPTR as SGL1.
    pub dptr: SglDescriptor,
    /// CDW10.
    pub cdw10: U32,
    /// CDW11.
    pub cdw11: U32,
    /// CDW12.
    pub cdw12: U32,
    /// CDW13.
    pub cdw13: U32,
    /// CDW14.
    pub cdw14: U32,
    /// CDW15.
    pub cdw15: U32,
}
const _: () = assert!(size_of::<SubmissionQueueEntry>() == 64);
const _: () = assert!(offset_of!(SubmissionQueueEntry, dptr) == 24);
const _: () = assert!(offset_of!(SubmissionQueueEntry, cdw10) == 40);

impl SubmissionQueueEntry {
    /// CID.
    #[must_use]
    pub const fn cid(&self) -> Cid {
        Cid(self.cid.get())
    }

    /// NSID.
    #[must_use]
    pub const fn nsid(&self) -> Nsid {
        Nsid(self.nsid.get())
    }

    /// FUSE.
    #[must_use]
    pub const fn fuse(&self) -> u8 {
        self.flags & 0b11
    }

    /// PSDT; see [`psdt`].
    #[must_use]
    pub const fn psdt(&self) -> u8 {
        self.flags >> 6
    }

    /// CDW11:CDW10 as one number: SLBA of I/O commands.
    #[must_use]
    pub const fn cdw10_11(&self) -> u64 {
        (self.cdw11.get() as u64) << 32 | self.cdw10.get() as u64
    }
}

/// Completion Queue Entry (Base section 4.2.1).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct CompletionQueueEntry {
    /// DW0, command specific.
    pub dw0: U32,
    /// DW1, command specific.
    pub dw1: U32,
    /// SQHD: submission queue head.
    pub sqhd: U16,
    /// SQID; reserved over fabrics.
    pub sqid: U16,
    /// CID.
    pub cid: U16,
    /// Status in bits 15:1; the phase tag (reserved over fabrics) in bit 0.
    pub status: U16,
}
const _: () = assert!(size_of::<CompletionQueueEntry>() == 16);

impl CompletionQueueEntry {
    /// The status field without the phase tag.
    #[must_use]
    pub const fn status(&self) -> Status {
        Status(self.status.get() >> 1)
    }

    /// DW1:DW0 as one number: the value of an 8-byte property.
    #[must_use]
    pub const fn dw0_1(&self) -> u64 {
        (self.dw1.get() as u64) << 32 | self.dw0.get() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_as_linux_sends_it_is_understood() {
        let mut bytes = [0u8; 64];
        bytes[0] = 0x02;
        bytes[1] = 0x40;
        bytes[2..4].copy_from_slice(&[0x05, 0x10]);
        bytes[4] = 1;
        bytes[32..36].copy_from_slice(&4096u32.to_le_bytes());
        bytes[39] = 0x5A;
        bytes[40] = 0x08;
        bytes[44] = 0x01;
        bytes[48] = 7;
        let Ok(sqe) = SubmissionQueueEntry::read_from_bytes(&bytes) else { panic!("64 bytes") };
        assert_eq!(NvmOpcode(sqe.opcode), NvmOpcode::READ);
        assert_eq!(sqe.cid(), Cid(0x1005));
        assert_eq!(sqe.psdt(), psdt::SGL);
        assert_eq!(sqe.dptr, SglDescriptor::transport(4096));
        assert_eq!(sqe.cdw10_11(), 0x1_0000_0008);
        assert_eq!(DataDirection::of(sqe.opcode), DataDirection::ControllerToHost);
        assert_eq!(sqe.as_bytes(), bytes);
    }

    #[test]
    fn a_completion_shows_its_status_without_the_phase() {
        let cqe = CompletionQueueEntry { status: U16::new(0x4004 << 1 | 1), ..Default::default() };
        assert_eq!(cqe.status(), Status(0x4004));
        assert!(cqe.status().dnr());
    }
}
