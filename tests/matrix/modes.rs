//! The kinds of pins: how each is asked for, what it answers to whom, and how it can be broken.
//!
//! A new kind is one more [`Mode`]: every test of the matrix takes one.

use crate::broken::{BREAKS, Break, READER_BREAKS, SWAP_BREAKS};
use crate::ops::{
    Attempt, FROZEN_ATTEMPTS, ONE_OF_EACH_KIND, On, READER_ATTEMPTS, READER_COMMANDS, SWAP_ATTEMPTS, Who,
};
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
    /// Attempts of root that are among the breaks of this one.
    pub(crate) broken_by: &'static [&'static str],
    /// More commands without effect.
    pub(crate) commands: &'static [(&'static str, On, &'static str)],
    /// Whether changes wait, and cannot be killed meanwhile.
    pub(crate) holds_off: bool,
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
    broken_by: &[],
    commands: &[],
    holds_off: false,
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
    broken_by: &[],
    commands: &[],
    holds_off: false,
    // The kernel tells swap areas by their paths, and what is not found there counts as gone.
    minds: &["bind mount over it"],
    breaks: SWAP_BREAKS,
    broken_in: "cleared(); swapped_off(); $h = broken_in($f, O_RDWR);",
    // The kernel has 28 areas for all of this machine.
    changes: ONE_OF_EACH_KIND,
};

/// The immutable flag and the lease; local readers are let in. On ext4, which refuses to write to an immutable file.
pub(crate) const READERS: Mode = Mode {
    name: "the default pin beside local readers",
    namespace: "local_readers = \"allow\"\n",
    answer: readers_answer,
    attempts: READER_ATTEMPTS,
    broken_by: &["chattr_-i", "chattr_+a", "chattr_+j", "chattr_-e", "fssetx_extsize"],
    commands: READER_COMMANDS,
    // These expect to be kept from reading; `commands` has the same of readers.
    minds: &["chattr_-i by chattr", "cp", "filefrag", "copy up of an overlay", "bind mount over it"],
    breaks: READER_BREAKS,
    // The open waits for the lease.
    broken_in: "clear_flag(opened($f, O_RDONLY)); $h = broken_in($f, O_RDWR);",
    changes: ONE_OF_EACH_KIND,
    ..DEFAULT
};

/// The same for a swap file, which lets nothing be shared where all else could.
pub(crate) const READERS_OF_SWAP: Mode = Mode {
    name: "the swap-file pin beside local readers",
    namespace: "guard = \"swap-file\"\nlocal_readers = \"allow\"\n",
    answer: readers_of_swap_answer,
    attempts: READER_ATTEMPTS,
    broken_by: READERS.broken_by,
    commands: READER_COMMANDS,
    minds: &[
        "chattr_-i by chattr",
        "cp",
        "filefrag",
        "copy up of an overlay",
        "bind mount over it",
        "bind mount over what a reader has",
    ],
    breaks: &[],
    ..SWAP_FILE
};

/// The default pin, and all changes of the filesystem wait until it ends. What breaks it is in `lifted`.
pub(crate) const FROZEN: Mode = Mode {
    name: "the frozen-filesystem pin",
    namespace: "guard = \"frozen-filesystem\"\n",
    answer: frozen_answer,
    attempts: FROZEN_ATTEMPTS,
    holds_off: true,
    // These write, and would hold up this very test.
    minds: &["xfs_free_eofblocks", "rename of the directory", "copy up of an overlay", "remount_ro"],
    commands: &[("remount_ro of what is frozen", On::All, "! mount -o remount,ro {m}")],
    breaks: &[],
    ..DEFAULT
};

/// The mark, the lease, and a filesystem that takes no writes. What breaks it is in `lifted`.
pub(crate) const READ_ONLY: Mode = Mode {
    name: "the read-only-mount pin",
    remount: Some("ro"),
    namespace: "guard = \"read-only-mount\"\n",
    reserved: 0,
    is_shared: true,
    answer: read_only_answer,
    attempts: &[],
    broken_by: &[],
    commands: &[],
    holds_off: false,
    // These write, or end with a filesystem that can be written.
    minds: &["xfs_free_eofblocks", "remount_ro", "rename of the directory", "copy up of an overlay"],
    breaks: &[],
    broken_in: "",
    changes: &[],
};

/// Who only reads gets in, and nothing can be shared through such a descriptor, nor written.
fn readers_answer(attempt: &str, who: Who) -> Outcome {
    match (attempt, who) {
        ("open_rdonly" | "odirect_read" | "reopen_proc" | "open_by_handle_at", _)
        | ("read by a reader" | "copyrange_from a reader", _) => Outcome::Done,
        ("ficlone_from a reader" | "ficlonerange_from a reader" | "dedupe_from a reader", _) => {
            Outcome::Errno(libc::EOPNOTSUPP)
        }
        ("dedupe_into a reader", _) => Outcome::Errno(libc::EOPNOTSUPP),
        ("ftruncate by a reader", _) => Outcome::Errno(libc::EINVAL),
        ("mmap_inplace by a reader", _) => Outcome::Errno(libc::EACCES),
        (name, _) if name.ends_with("by a reader") => Outcome::Errno(libc::EBADF),
        _ => answer(attempt, who),
    }
}

/// The same, where sharing is a matter of the swap area.
fn readers_of_swap_answer(attempt: &str, who: Who) -> Outcome {
    match attempt {
        "ficlone_from" | "dedupe_from" | "ficlone_from a reader" | "ficlonerange_from a reader" => {
            Outcome::Errno(libc::ETXTBSY)
        }
        // The kernel would copy by sharing.
        "dedupe_from a reader" | "copyrange_from a reader" => Outcome::Errno(libc::ETXTBSY),
        "dedupe_into a reader" => Outcome::Errno(libc::EPERM),
        _ => readers_answer(attempt, who),
    }
}

/// What is no matter of the mark waits for the filesystem, before anything else is looked at. A truncation by path looks at the
/// flag first.
fn frozen_answer(attempt: &str, who: Who) -> Outcome {
    let waits = [
        "open_trunc",
        "unlink",
        "rename",
        "rename_over",
        "hardlink",
        "setxattr",
        "setxattr_big",
        "chmod",
        "chown",
        "utimes",
    ];
    if waits.contains(&attempt)
        || attempt == "file_setattr"
        || FROZEN_ATTEMPTS.iter().any(|it| it.name == attempt)
    {
        return Outcome::HeldOff;
    }
    answer(attempt, who)
}

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
