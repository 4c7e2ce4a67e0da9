//! Where the data of a command is (NVM Express Base Specification 2.1, section 4.3.2; NVM Express TCP Transport
//! Specification 1.1, section 3.3.2): in the capsule behind the command, or in PDUs of its own.

use nvme_spec::command::{DataDirection, sgl_sub_type, sgl_type};
use nvme_spec::{AdminOpcode, Status, SubmissionQueueEntry};

use super::command::{CommandError, at};

/// Where the data of a command is, or goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataLocation {
    /// There is none.
    None,
    /// Host to controller, in the capsule.
    InCapsule {
        /// Bytes from the start of the capsule's data.
        offset: u32,
        /// Length in bytes; not zero.
        len: u32,
    },
    /// In PDUs of its own: R2T and H2CData, or C2HData.
    Transport {
        /// Length in bytes; not zero.
        len: u32,
    },
}

impl DataLocation {
    /// The length in bytes.
    #[must_use]
    #[inline]
    pub const fn len(self) -> u32 {
        match self {
            Self::None => 0,
            Self::InCapsule { len, .. } | Self::Transport { len } => len,
        }
    }

    /// Whether there is no data.
    #[must_use]
    #[inline]
    pub const fn is_empty(self) -> bool {
        matches!(self, Self::None)
    }

    /// The part of the capsule's data that this names, or Data SGL Length Invalid when the capsule that came has less.
    /// Empty for data that does not travel in the capsule.
    ///
    /// # Errors
    /// The status to end the command with.
    pub fn in_capsule(self, capsule_data: &[u8]) -> Result<&[u8], Status> {
        let Self::InCapsule { offset, len } = self else { return Ok(&[]) };
        let end = offset.checked_add(len).ok_or(Status::SGL_OFFSET_INVALID.with_dnr())?;
        capsule_data.get(offset as usize..end as usize).ok_or(Status::DATA_SGL_LENGTH_INVALID.with_dnr())
    }
}

/// Which way the data of a command goes: by the opcode, or by FCTYPE for a Fabrics command.
#[inline]
pub(super) fn direction(sqe: &SubmissionQueueEntry) -> DataDirection {
    if sqe.opcode == AdminOpcode::FABRICS.0 {
        DataDirection::of(fctype(sqe))
    } else {
        DataDirection::of(sqe.opcode)
    }
}

/// FCTYPE of a Fabrics command.
pub(super) fn fctype(sqe: &SubmissionQueueEntry) -> u8 {
    sqe.nsid.get().to_le_bytes()[0]
}

/// Where the data of a command is, for a queue whose capsules carry up to `in_capsule_len_max` bytes of data.
///
/// # Errors
/// The status to end the command with, for a descriptor that this transport does not allow there.
pub fn data_location(sqe: &SubmissionQueueEntry, in_capsule_len_max: u32) -> Result<DataLocation, Status> {
    locate(sqe, in_capsule_len_max).map_err(|error| error.status)
}

/// As [`data_location`], with the byte at fault.
#[inline]
pub(super) fn locate(
    sqe: &SubmissionQueueEntry,
    in_capsule_len_max: u32,
) -> Result<DataLocation, CommandError> {
    let len = sqe.dptr.length.get();
    match direction(sqe) {
        DataDirection::None => return Ok(DataLocation::None),
        DataDirection::Bidirectional => return Err(CommandError::opcode()),
        DataDirection::HostToController | DataDirection::ControllerToHost => {}
    }
    match (sqe.dptr.sgl_type(), sqe.dptr.sub_type()) {
        (sgl_type::TRANSPORT_DATA_BLOCK, sgl_sub_type::TRANSPORT) if len == 0 => Ok(DataLocation::None),
        (sgl_type::TRANSPORT_DATA_BLOCK, sgl_sub_type::TRANSPORT) => Ok(DataLocation::Transport { len }),
        (sgl_type::DATA_BLOCK, sgl_sub_type::OFFSET) if direction(sqe) == DataDirection::HostToController => {
            in_capsule(sqe.dptr.address.get(), len, in_capsule_len_max)
        }
        _ => Err(CommandError::at(Status::SGL_TYPE_INVALID, at::SGL_ID)),
    }
}

fn in_capsule(offset: u64, len: u32, len_max: u32) -> Result<DataLocation, CommandError> {
    let offset = u32::try_from(offset)
        .ok()
        .filter(|&offset| offset <= len_max)
        .ok_or(CommandError::at(Status::SGL_OFFSET_INVALID, at::SGL_OFFSET))?;
    if len > len_max - offset {
        return Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
    }
    Ok(if len == 0 { DataLocation::None } else { DataLocation::InCapsule { offset, len } })
}

#[cfg(test)]
mod tests {
    use nvme_spec::{NvmOpcode, SglDescriptor};

    use super::*;

    fn locate_of(opcode: u8, dptr: SglDescriptor) -> Result<DataLocation, CommandError> {
        locate(&SubmissionQueueEntry { opcode, flags: 0x40, dptr, ..Default::default() }, 8192)
    }

    #[test]
    fn the_two_descriptors_of_the_transport_are_taken() {
        let write = NvmOpcode::WRITE.0;
        let read = NvmOpcode::READ.0;
        let in_capsule = locate_of(write, SglDescriptor::in_capsule(16, 4096));
        assert_eq!(in_capsule, Ok(DataLocation::InCapsule { offset: 16, len: 4096 }));
        let transport = Ok(DataLocation::Transport { len: 4096 });
        assert_eq!(locate_of(write, SglDescriptor::transport(4096)), transport);
        assert_eq!(locate_of(read, SglDescriptor::transport(4096)), transport);
        assert_eq!(locate_of(read, SglDescriptor::transport(0)), Ok(DataLocation::None));
        assert_eq!(locate_of(NvmOpcode::FLUSH.0, SglDescriptor::transport(9)), Ok(DataLocation::None));
    }

    #[test]
    fn every_other_descriptor_is_refused_and_its_byte_named() {
        for id in 0..=255u8 {
            let dptr = SglDescriptor::of(id >> 4, id & 15, 0, 512);
            let write = locate_of(NvmOpcode::WRITE.0, dptr);
            let read = locate_of(NvmOpcode::READ.0, dptr);
            let refused = Err(CommandError::at(Status::SGL_TYPE_INVALID, at::SGL_ID));
            match id {
                0x5A => assert!(write.is_ok() && read.is_ok()),
                0x01 => assert!(write.is_ok() && read == refused),
                _ => assert!(write == refused && read == refused, "{id:#x}"),
            }
        }
    }

    #[test]
    fn data_beyond_the_capsule_is_refused() {
        let length = Err(CommandError::at(Status::DATA_SGL_LENGTH_INVALID, at::SGL_LENGTH));
        let offset = Err(CommandError::at(Status::SGL_OFFSET_INVALID, at::SGL_OFFSET));
        let write = |address, len| locate_of(NvmOpcode::WRITE.0, SglDescriptor::in_capsule(address, len));
        assert_eq!(write(0, 8193), length);
        assert_eq!(write(8192, 1), length);
        assert_eq!(write(8193, 0), offset);
        assert_eq!(write(u64::MAX, 1), offset);
        assert_eq!(write(1 << 32, u32::MAX), offset);
        assert!(write(8191, 1).is_ok());
    }

    #[test]
    fn a_short_capsule_gives_no_data() {
        let location = DataLocation::InCapsule { offset: 2, len: 3 };
        assert_eq!(location.in_capsule(b"abcde"), Ok(&b"cde"[..]));
        assert_eq!(location.in_capsule(b"abcd"), Err(Status::DATA_SGL_LENGTH_INVALID.with_dnr()));
        let beyond = DataLocation::InCapsule { offset: u32::MAX, len: u32::MAX };
        assert_eq!(beyond.in_capsule(b"a"), Err(Status::SGL_OFFSET_INVALID.with_dnr()));
        assert_eq!(DataLocation::Transport { len: 1 }.in_capsule(b"a"), Ok(&b""[..]));
    }
}
