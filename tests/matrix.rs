//! Every operation that could take blocks from a pinned file, tried while a remote host writes it: by another process as root,
//! by an ordinary one, by root who got past the guards, and before the pin.
//!
//! ```text
//!   ops, script    what is tried, in perl, and how it is run
//!   modes          the kinds of pins, what each answers, and what breaks it
//!   disk, thief    a filesystem of which every block is accounted for; whoever is given what a pinned file lost
//!   refused, broken, inside            the operations in their places: without effect, past the guards, by this very process
//!   before, kept                       by descriptors from before the pin: it is refused; or, of swap files, they are
//!   lifted                             after root has lifted a guard of the whole filesystem
//!   soak           the same in random order, from a seed
//!   checker        wrong blocks and lost writes, planted, are found
//! ```
//!
//! Afterwards every sector of the disk is looked at: none outside of the frozen map may hold a remote write, no other file
//! may have changed, and what was acknowledged must be in the file. Where a pin cannot prevent and only notice, what is
//! checked is said in `broken`.
#![expect(clippy::print_stdout, reason = "findings, which the harness shows when a test fails")]

#[path = "serve/daemon.rs"]
#[expect(dead_code, reason = "shared with the tests of the daemon, which need more of it")]
mod daemon;
#[path = "serve/load.rs"]
#[expect(dead_code, reason = "shared with the tests of the daemon, which need more of it")]
mod load;
#[path = "common/loopfs.rs"]
mod loopfs;

#[path = "matrix/before.rs"]
mod before;
#[path = "matrix/broken.rs"]
mod broken;
#[path = "matrix/checker.rs"]
mod checker;
#[path = "matrix/disk.rs"]
mod disk;
#[path = "matrix/inside.rs"]
mod inside;
#[path = "matrix/kept.rs"]
mod kept;
#[path = "matrix/lifted.rs"]
mod lifted;
#[path = "matrix/modes.rs"]
mod modes;
#[path = "matrix/ops.rs"]
mod ops;
#[path = "matrix/refused.rs"]
mod refused;
#[path = "matrix/script.rs"]
mod script;
#[path = "matrix/soak.rs"]
mod soak;
#[path = "matrix/thief.rs"]
mod thief;
