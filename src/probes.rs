//! Probe points for tracers that attach from outside: bpftrace, perf, SystemTap, gdb (USDT).
//!
//! | probe of provider `fastice` | when | arguments |
//! |---|---|---|
//! | `command_begin` | a command has a place in its queue | CID, OPC, NSID, CDW11:CDW10, CDW12 |
//! | `device_submit` | one operation of it is given to its device's queue | token, first byte on the device, length in bytes, whether it writes |
//! | `device_done` | this operation was found complete | token, whether it failed |
//! | `command_answered` | its answer is put into a batch | CID, OPC, NSID, status, when it arrived |
//! | `answers_sent` | the kernel took the last byte of the answers of commands that went together | how many, when they arrived |
//! | `pin_recalled` | a pinned file is recalled | path, its length, reason, its length |
//! | `export_fenced` | an export that was live is fenced | slot, NSID |
//!
//! A token belongs to its core: whoever pairs the two probes of a device does so by thread and token. That of an operation which its device
//! does at once is all ones, and `device_done` the next probe of that thread.
//!
//! "When it arrived" is in nanoseconds of `CLOCK_MONOTONIC`, bpftrace's `nsecs`. Texts are not ended by a NUL.
//!
//! A probe is a NOP and a note in the binary (`readelf -n`), which says where it is and in which registers its arguments are. While
//! nobody has attached it is a load and a branch: whoever attaches counts up a semaphore, and only then are arguments made.
//!
//! The macro of the `probe` crate expands to `asm!` of that NOP and to a volatile read of the semaphore. That is `unsafe` of that crate's
//! own, which the lint does not count as ours; so it is expanded here and nowhere else, and this is why it is sound: the assembly is one
//! NOP and data in sections that are not executed, and changes neither memory nor registers nor flags; the semaphore is an aligned static of the
//! macro, which nobody but the kernel writes, for a tracer; and what is read from it only decides whether the NOP is passed.

use nvme_spec::{Nsid, Status, SubmissionQueueEntry};
use probe::probe_lazy;

/// See the table of the module.
#[inline]
pub(crate) fn command_begin(sqe: &SubmissionQueueEntry) {
    probe_lazy!(
        fastice,
        command_begin,
        sqe.cid.get(),
        sqe.opcode,
        sqe.nsid.get(),
        sqe.cdw10_11(),
        sqe.cdw12.get()
    );
}

/// See the table of the module.
#[inline]
pub(crate) fn device_submit(token: u64, device_offset: u64, len: u64, is_write: bool) {
    probe_lazy!(fastice, device_submit, token, device_offset, len, is_write);
}

/// See the table of the module.
#[inline]
pub(crate) fn device_done(token: u64, has_failed: bool) {
    probe_lazy!(fastice, device_done, token, has_failed);
}

/// See the table of the module.
#[inline]
pub(crate) fn command_answered(sqe: &SubmissionQueueEntry, status: Status, arrived_ns: u64) {
    probe_lazy!(fastice, command_answered, sqe.cid.get(), sqe.opcode, sqe.nsid.get(), status.0, arrived_ns);
}

/// See the table of the module. Not inlined: the linker may take out one of several copies, and leaves its note, with an address that is
/// none.
#[inline(never)]
pub(crate) fn answers_sent(count: u64, arrived_ns: u64) {
    probe_lazy!(fastice, answers_sent, count, arrived_ns);
}

/// See the table of the module.
#[inline(never)]
pub(crate) fn pin_recalled(path: &[u8], reason: &str) {
    probe_lazy!(fastice, pin_recalled, path.as_ptr(), path.len(), reason.as_ptr(), reason.len());
}

/// See the table of the module.
#[inline(never)]
pub(crate) fn export_fenced(slot: u32, nsid: Nsid) {
    probe_lazy!(fastice, export_fenced, slot, nsid.0);
}
