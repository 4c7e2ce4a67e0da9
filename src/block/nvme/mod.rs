//! An NVMe namespace driven from user space by our own driver, underneath whatever the kernel does with it.
//!
//! ```text
//!   NvmeController    a thread of its own: resets, events, loss and return            (the control core, no I/O)
//!      | tickets for queue pairs
//!   NvmeDevice        a namespace: what it is, whether somebody has vouched for it
//!      | open_queue, on each core
//!   NvmeQueue         a queue pair: no lock, no system call, no allocation, one doorbell a commit
//! ```
//!
//! | operation | command | notes |
//! |---|---|---|
//! | Read, Write | Read, Write | cut by the driver at MDTS and NOIOB; FUA as asked |
//! | Flush | Flush | |
//! | Write Zeroes | Write Zeroes, DEAC as asked | not supported where ONCS says so |
//! | Deallocate | Dataset Management, one range | advisory: nothing is done where ONCS has none |
//!
//! The buffers of a core are mapped for the device when its queue is opened; data moves between them and the device
//! without a copy. A controller reset shows only in latency. A device that is lost ends all operations with `Gone`, and
//! gives no queue again before somebody has vouched that the one that is back is the same.
//!
//! A core that has nothing to do but wait sleeps on its ring until the interrupt of a queue pair, where the controller
//! has one for it; while it polls, the interrupt is masked.
//!
//! What it does not do: move a core from one controller to another of the same namespace.

mod controller;
mod device;
mod keeper;
mod model;
mod queue;
mod reach;
mod sleeper;
mod still;
#[cfg(test)]
mod tests;

pub use async_nvme::vfio::PciAddress;

pub use controller::{NvmeController, NvmeDescription};
pub use device::{Epoch, NvmeChange, NvmeDevice, OnChange, Standing};
pub use queue::NvmeQueue;
pub use reach::{NvmeWay, Reach, ReachError, Reached, SystemReach};
pub use still::{StillError, still};
