//! The kinds of pins: how each is asked for, what it answers to whom, and how it can be broken.
//!
//! A new kind is one more [`Mode`]: every test of the matrix takes one.

use crate::broken::{BREAKS, Break, SWAP_BREAKS};
use crate::ops::{Attempt, ONE_OF_EACH_KIND, SWAP_ATTEMPTS, Who};
use crate::script::Outcome;

/// A kind of pin.
#[derive(Debug)]
pub(crate) struct Mode {
    pub(crate) name: &'static str,
    /// The options that the filesystem is remounted with before the file is pinned, if any.
    pub(crate) remount: Option<&'static str>,
    /// Lines of `[[subsystem.namespace]]` that ask for it.
    pub(crate) namespace: &'static str,
    /// Bytes at the beginning of the file that are not served.
    pub(crate) reserved: u64,
    /// Whether the file may be somebody else's to read and write.
    pub(crate) is_shared: bool,
    /// What an attempt of this name gets.
    pub(crate) answer: fn(&str, Who) -> Outcome,
    /// What else is tried.
    pub(crate) attempts: &'static [Attempt],
    /// Commands without effect on other kinds, which are among the breaks of this one.
    pub(crate) minds: &'static [&'static str],
    /// What breaks it.
    pub(crate) breaks: &'static [Break],
    /// What root does to get a descriptor once it is let go.
    pub(crate) broken_in: &'static str,
    /// The changes that are then tried; all of them where there are none.
    pub(crate) changes: &'static [&'static str],
}

/// The mark, the immutable flag and the lease.
pub(crate) const DEFAULT: Mode = Mode {
    name: "the default pin",
    remount: None,
    namespace: "",
    reserved: 0,
    is_shared: true,
    answer,
    attempts: &[],
    minds: &[],
    breaks: BREAKS,
    broken_in: "cleared(); $h = broken_in($f, O_RDWR);",
    changes: &[],
};

/// The mark, the immutable flag and a swap area.
pub(crate) const SWAP_FILE: Mode = Mode {
    name: "the swap-file pin",
    remount: None,
    namespace: "guard = \"swap-file\"\n",
    reserved: 8192,
    is_shared: false,
    answer,
    attempts: SWAP_ATTEMPTS,
    // The kernel tells swap areas by their paths, and what is not found there counts as gone.
    minds: &["bind mount over it"],
    breaks: SWAP_BREAKS,
    broken_in: "cleared(); swapped_off(); $h = broken_in($f, O_RDWR);",
    // The kernel has 28 areas for all of this machine.
    changes: ONE_OF_EACH_KIND,
};

/// The mark, the lease, and a filesystem that takes no writes. What breaks it is tried in the tests of the daemon: here nobody
/// could take what is freed.
pub(crate) const READ_ONLY: Mode = Mode {
    name: "the read-only-mount pin",
    remount: Some("ro"),
    namespace: "guard = \"read-only-mount\"\n",
    reserved: 0,
    is_shared: true,
    answer: read_only_answer,
    attempts: &[],
    // These write, or end with a filesystem that can be written.
    minds: &["xfs_free_eofblocks", "remount_ro", "rename of the directory", "copy up of an overlay"],
    breaks: &[],
    broken_in: "",
    changes: &[],
};

/// Whatever begins with a write is refused with EROFS.
fn read_only_answer(attempt: &str, who: Who) -> Outcome {
    match (attempt, who) {
        ("open_rdonly" | "odirect_read" | "reopen_proc" | "open_by_handle_at" | "fssetx_extsize", _)
        | ("chattr_-i" | "chattr_+a" | "chattr_+j" | "chattr_-e" | "ficlone_from" | "dedupe_from", _)
        | ("fallocate by the server's descriptor" | "truncate by the server's descriptor", _)
        | ("the server's descriptors" | "a descriptor of the server by its number", _)
        | ("the end of the server" | "the device" | "fifreeze" | "umount", _)
        | ("swapon", Who::Ordinary) => answer(attempt, who),
        _ => Outcome::Errno(libc::EROFS),
    }
}

/// Everything is refused with EPERM, but for what was no more than a name or a descriptor to read; a swap area answers for
/// itself where the mark is got past.
fn answer(attempt: &str, who: Who) -> Outcome {
    Outcome::Errno(match (attempt, who) {
        ("fallocate by the server's descriptor", _) => libc::EBADF,
        ("truncate by the server's descriptor", _) => libc::EINVAL,
        ("the server's descriptors" | "the device", Who::Ordinary) => libc::EACCES,
        ("ficlone_from by the server's descriptor", _) => libc::ETXTBSY,
        _ => libc::EPERM,
    })
}
