//! Making a ring on kernels of different age.

use std::io;

use io_uring::{IoUring, Probe, opcode};

use super::{RingError, RingOptions};

/// The most slots: half of the largest completion queue (`IORING_MAX_CQ_ENTRIES`, kernel `io_uring/io_uring.h`).
const SLOTS_MAX: u32 = 32768;

/// A ring, how many registered files it has room for, and what it lacks.
pub(super) struct Made {
    pub(super) uring: IoUring,
    pub(super) files: u32,
    pub(super) notices: Vec<String>,
}

pub(super) fn make(options: &RingOptions) -> Result<Made, RingError> {
    if options.slots == 0 || options.slots > SLOTS_MAX {
        return Err(RingError::BadOptions { what: "slots must be from 1 to 32768" });
    }
    if options.sq_entries == 0 || options.sq_entries > SLOTS_MAX {
        return Err(RingError::BadOptions { what: "sq_entries must be from 1 to 32768" });
    }
    let mut notices = Vec::new();
    let uring = build(options, &mut notices).map_err(|source| explain(options, source))?;
    check_features(&uring)?;
    let files = match uring.submitter().register_files_sparse(options.files) {
        _ if options.files == 0 => 0,
        Ok(()) => options.files,
        Err(error) => {
            notices.push(format!(
                "files cannot be registered with io_uring ({error}): each operation costs a little more; raise \
                 RLIMIT_NOFILE, or use Linux 5.19 or newer"
            ));
            0
        }
    };
    Ok(Made { uring, files, notices })
}

/// Tries the best set of flags first, then what Linux 5.19 and 5.15 know.
fn build(options: &RingOptions, notices: &mut Vec<String>) -> io::Result<IoUring> {
    // Twice the slots: a cancellation completes on its own besides what it cancels.
    let cq_entries = options.slots.saturating_mul(2).max(options.sq_entries.saturating_mul(2));
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_cqsize(cq_entries);
    let mut best = builder.clone();
    best.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    let mut newest = best.clone();
    newest.setup_single_issuer().setup_defer_taskrun();
    let refused = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    match newest.build(options.sq_entries) {
        Err(error) if refused(&error) => {}
        other => return other,
    }
    notices.push("io_uring without deferred task work: Linux 6.1 or newer is faster".to_owned());
    match best.build(options.sq_entries) {
        Err(error) if refused(&error) => builder.build(options.sq_entries),
        other => other,
    }
}

fn explain(options: &RingOptions, source: io::Error) -> RingError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::ENOSYS | libc::EACCES) => RingError::Disabled { source },
        _ => RingError::Setup { slots: options.slots, source },
    }
}

fn check_features(uring: &IoUring) -> Result<(), RingError> {
    let params = uring.params();
    if !params.is_feature_nodrop() {
        return Err(RingError::TooOld { what: "completions that are never dropped (IORING_FEAT_NODROP)" });
    }
    if !params.is_feature_ext_arg() {
        return Err(RingError::TooOld { what: "waiting with a timeout (IORING_FEAT_EXT_ARG)" });
    }
    let mut probe = Probe::new();
    if uring.submitter().register_probe(&mut probe).is_err() {
        return Err(RingError::TooOld { what: "asking for its operations (IORING_REGISTER_PROBE)" });
    }
    let needed = [
        (opcode::RecvMsg::CODE, "IORING_OP_RECVMSG"),
        (opcode::Recv::CODE, "IORING_OP_RECV"),
        (opcode::SendMsg::CODE, "IORING_OP_SENDMSG"),
        (opcode::Accept::CODE, "IORING_OP_ACCEPT"),
        (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD"),
        (opcode::Read::CODE, "IORING_OP_READ"),
        (opcode::Write::CODE, "IORING_OP_WRITE"),
        (opcode::ReadFixed::CODE, "IORING_OP_READ_FIXED"),
        (opcode::WriteFixed::CODE, "IORING_OP_WRITE_FIXED"),
        (opcode::Fsync::CODE, "IORING_OP_FSYNC"),
        (opcode::Fallocate::CODE, "IORING_OP_FALLOCATE"),
        (opcode::AsyncCancel::CODE, "IORING_OP_ASYNC_CANCEL"),
    ];
    match needed.into_iter().find(|(code, _)| !probe.is_supported(*code)) {
        Some((_, what)) => Err(RingError::TooOld { what }),
        None => Ok(()),
    }
}
