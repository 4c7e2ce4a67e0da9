//! The system calls that no safe crate offers. All unsafe code of `extent` is here, by what it is about; each function is safe to
//! call and returns errno.
//!
//! ```text
//!   inode        FIEMAP and the other ioctls by descriptor      path      the same by path, without an open
//!   guard        leases, their signals, fanotify                memory    sealed memory
//!   filesystem   freezes, swap areas
//! ```

mod filesystem;
mod guard;
mod inode;
mod memory;
mod path;

use std::io;

pub(super) use filesystem::{freeze, swap_off, swap_off_by_path, swap_on, thaw};
pub(super) use guard::{
    Lease, ThreadId, direct_signals, event_descriptor, fanotify_group, get_lease, mark_opens, set_lease,
    take_signals, unmark_opens,
};
pub(super) use inode::{
    cached_pages, extended_flags, fiemap, filesystem_uuid, inode_generation, xfs_has_reflink,
};
pub(super) use memory::SealedMemory;
pub(super) use path::{clear_immutable_by_path, has_file_setattr, inode_by_path, truncate};

/// What a call of libc returned.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
