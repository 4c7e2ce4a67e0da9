//! What fio is told of an error: an errno, as the kernel's host would give for the same status where it has one for it.

use fastice::initiator::error::{ErrorKind, InitiatorError};
use libc::c_int;
use nvme_spec::Status;

/// The errno of a status that is none of success.
#[must_use]
pub fn of_status(status: Status) -> c_int {
    match status.code() {
        Status::INVALID_OPCODE
        | Status::INVALID_FIELD
        | Status::DATA_SGL_LENGTH_INVALID
        | Status::SGL_TYPE_INVALID
        | Status::SGL_OFFSET_INVALID => libc::EOPNOTSUPP,
        Status::INVALID_NAMESPACE => libc::ENODEV,
        Status::NAMESPACE_WRITE_PROTECTED => libc::EROFS,
        Status::LBA_OUT_OF_RANGE | Status::CAPACITY_EXCEEDED => libc::ENOSPC,
        Status::RESERVATION_CONFLICT => libc::EBADE,
        Status::ACCESS_DENIED => libc::EACCES,
        Status::UNRECOVERED_READ_ERROR | Status::DEALLOCATED_OR_UNWRITTEN | Status::COMPARE_FAILURE => {
            libc::ENODATA
        }
        Status::NAMESPACE_NOT_READY | Status::COMMAND_INTERRUPTED | Status::ANA_TRANSITION => libc::EAGAIN,
        Status::COMMAND_ABORT_REQUESTED | Status::ABORTED_SQ_DELETION | Status::HOST_ABORTED => {
            libc::ECANCELED
        }
        Status::CONNECT_INVALID_HOST => libc::EACCES,
        Status::CONNECT_INVALID_PARAMETERS => libc::ENXIO,
        Status::CONNECT_CONTROLLER_BUSY => libc::EBUSY,
        status if status.sct() == nvme_spec::status::sct::PATH => libc::ENOLINK,
        _ => libc::EIO,
    }
}

/// The errno of an error of the initiator.
#[must_use]
pub fn of_error(error: &InitiatorError) -> c_int {
    match error.kind() {
        ErrorKind::Connect => {
            let system = std::error::Error::source(error)
                .and_then(|source| source.downcast_ref::<std::io::Error>())
                .and_then(std::io::Error::raw_os_error);
            system.unwrap_or(libc::EHOSTUNREACH)
        }
        ErrorKind::Timeout => libc::ETIMEDOUT,
        ErrorKind::Closed | ErrorKind::Terminated => libc::ECONNRESET,
        ErrorKind::Status => error.status().map_or(libc::EIO, of_status),
        ErrorKind::DataDigest => libc::EBADMSG,
        ErrorKind::Protocol | ErrorKind::Incompatible => libc::EPROTO,
        ErrorKind::InvalidArgument => libc::EINVAL,
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_that_is_no_success_is_an_errno() {
        for bits in 1..0x800 {
            assert!(of_status(Status(bits)) > 0, "{bits:#x}");
        }
        assert_eq!(of_status(Status::LBA_OUT_OF_RANGE.with_dnr()), libc::ENOSPC, "whatever else is set");
        assert_eq!(of_status(Status::ANA_INACCESSIBLE), libc::ENOLINK);
        assert_eq!(of_status(Status::new(7, 1)), libc::EIO);
    }
}
