//! Goal: killed at any system call that changes something, pin, serve and unpin leave the old state or the new one, and a
//! second try by the operator always ends with a file that is his own, with every block where it was.
//!
//! A tracer kills the program at the entry of its n-th call of a kind, for every n until it gets through: between two
//! such calls nothing outside of the process changes.
//!
//! The same with the power cut at that moment: what was not flushed is gone, of the filesystem of the file and of that
//! of the state directory.

#[path = "common/loopfs.rs"]
mod loopfs;

#[path = "crash_points/killed.rs"]
mod killed;
#[path = "crash_points/lab.rs"]
mod lab;
#[path = "crash_points/power.rs"]
mod power;
