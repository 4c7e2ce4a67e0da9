//! Operations, as a caller makes them and gets them back.

use hugepage_alloc::DmaBuf;

use crate::error::IoError;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Fill the buffer from the namespace.
    Read,
    /// Write the buffer to the namespace; with `fua` it is durable when complete.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Succeed when the namespace holds what the buffer holds.
    Compare,
    /// Have the controller read a range without moving it.
    Verify,
    /// Make durable what was complete before.
    Flush,
    /// Make a range read as zeros.
    WriteZeroes {
        /// Whether the blocks may be given up.
        deallocate: bool,
        /// Force unit access.
        fua: bool,
    },
    /// Tell that the contents of a range are no longer needed.
    Deallocate,
    /// Have the controller copy the range to other blocks of the namespace, which do not overlap it.
    Copy {
        /// The first of the other blocks.
        to: u64,
        /// Force unit access.
        fua: bool,
    },
    /// Dataset Management for several ranges at once. The buffer holds them, 1 to 256, as
    /// [`nvme_spec::nvm::DatasetManagementRange`]s; `lba` and `blocks` are not looked at. Never split: what is more than the
    /// controller takes in one command is refused.
    DatasetManagement {
        /// What it says of them: bits of [`nvme_spec::nvm::dsm`].
        attributes: u32,
    },
    /// A command as it is. Never split; its buffer, if any, is all of its data.
    Raw(RawCommand),
}

/// Fields of a raw command. Identifier, namespace and data pointer are filled in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawCommand {
    /// OPC.
    pub opcode: u8,
    /// CDW10 to CDW15.
    pub cdw10_15: [u32; 6],
}

/// One operation.
#[derive(Debug)]
pub struct Op {
    /// Comes back in [`Done`].
    pub token: u64,
    /// What to do.
    pub kind: OpKind,
    /// The first block. Flush and raw commands do not look at it.
    pub lba: u64,
    /// How many blocks, above 0. Flush and raw commands do not look at it.
    pub blocks: u64,
    /// For Read, Write and Compare exactly `blocks` long; for raw commands of at most the largest transfer. At an
    /// address that is a multiple of 4, or at any where the controller takes SGLs at any
    /// ([`crate::ControllerInfo::sgl_any_address`]). Other operations do not use it, but give it back.
    pub buf: Option<DmaBuf>,
}

/// One operation's end.
#[derive(Debug)]
pub struct Done {
    /// From [`Op`].
    pub token: u64,
    /// DW0 of the (last) completion, or how it failed.
    pub result: Result<u32, IoError>,
    /// The buffer; absent after [`IoError::Stranded`].
    pub buf: Option<DmaBuf>,
}
