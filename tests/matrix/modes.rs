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
