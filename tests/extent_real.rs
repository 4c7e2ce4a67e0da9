//! The extent module on real XFS and ext4 filesystems over loop devices.

#[path = "common/loopfs.rs"]
mod loopfs;

#[path = "extent_real/accept.rs"]
mod accept;
#[path = "extent_real/claim.rs"]
mod claim;
#[path = "extent_real/files.rs"]
mod files;
#[path = "extent_real/frozen.rs"]
mod frozen;
#[path = "extent_real/handover.rs"]
mod handover;
#[path = "extent_real/layout.rs"]
mod layout;
#[path = "extent_real/pin.rs"]
mod pin;
#[path = "extent_real/prepare.rs"]
mod prepare;
#[path = "extent_real/read_only.rs"]
mod read_only;
#[path = "extent_real/readers.rs"]
mod readers;
#[path = "extent_real/swap_file.rs"]
mod swap_file;
#[path = "extent_real/unpin.rs"]
mod unpin;
#[path = "extent_real/watch.rs"]
mod watch;
