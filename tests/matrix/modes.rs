//! The kinds of pins: how each is asked for, what it answers to whom, and how it can be broken.
//!
//! A new kind is one more [`Mode`]: every test of the matrix takes one.

use crate::broken::{BREAKS, Break};
use crate::ops::Who;
use crate::script::Outcome;

/// A kind of pin.
#[derive(Debug)]
pub(crate) struct Mode {
    pub(crate) name: &'static str,
    /// Lines of `[[subsystem.namespace]]` that ask for it.
    pub(crate) namespace: &'static str,
    /// What an attempt of this name gets.
    pub(crate) answer: fn(&str, Who) -> Outcome,
    /// What breaks it, beside the changes that are possible once it is let go.
    pub(crate) breaks: &'static [Break],
}

/// The mark, the immutable flag and the lease.
pub(crate) const DEFAULT: Mode =
    Mode { name: "the default pin", namespace: "", answer: default_answer, breaks: BREAKS };

/// Everything is refused with EPERM, but for what was no more than a name or a descriptor to read.
fn default_answer(attempt: &str, who: Who) -> Outcome {
    Outcome::Errno(match (attempt, who) {
        ("fallocate by the server's descriptor", _) => libc::EBADF,
        ("truncate by the server's descriptor", _) => libc::EINVAL,
        ("the server's descriptors" | "the device", Who::Ordinary) => libc::EACCES,
        _ => libc::EPERM,
    })
}
