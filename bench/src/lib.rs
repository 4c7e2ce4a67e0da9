//! Sets fastice beside its peers.
//!
//! ```text
//!   suite     which measurements there are, and the rows they make
//!     |- run      one round of a side: started, kept busy, stopped
//!     |    |- load     ours: the driver, as a caller on one core uses it
//!     |    |- bare     the device alone: the least that any software must do
//!     |    `- device   model, replay, or one that works by itself
//!     |- clock    time, and the core's clock
//!     `- report   bench/report.json, merged by the names of the rows
//!   scale     a million extents, a thousand files
//!   profiles  where the time goes in rows that are not met
//!   publish   bench/REPORT.md and its plots, made of the rows
//!   rest      waits until the machine does nothing else
//!   guard     what an I/O costs in instructions: no more than was recorded
//!   target    the whole target over TCP, beside the ceiling of the kernel's TCP; idle, and as it grows
//!   guest     the target beside the kernel's own, with the kernel's initiator and fio
//! ```
//!
//! Sides take turns, round by round, and a row's ratio is that of neighbouring rounds: what slows the machine slows both.
//! Nothing here is a test of speed; tests only see that the bench runs.

#![deny(unsafe_code)]

pub mod bare;
pub mod chosen;
pub mod clock;
pub mod count;
pub mod device;
pub mod ending;
pub mod guard;
pub mod guest;
pub mod load;
pub mod machine;
pub mod paced;
pub mod profiles;
pub mod publish;
pub mod replay;
pub mod report;
pub mod rest;
pub mod run;
pub mod scale;
pub mod server;
pub mod spread;
pub mod suite;
pub mod target;
mod threads;
pub mod uring;
