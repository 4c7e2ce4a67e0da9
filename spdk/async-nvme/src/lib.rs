//! A polled NVMe driver in user space, for any way to reach a controller.
//!
//! ```text
//!   control core                                    each I/O core
//!   Controller --- poll() ---- admin queue           IoQueue --- submit / ring / poll
//!      |  state machine, identify, resets               |  operations cut into commands, slots, rings
//!      |  creates and deletes queues, aborts            |
//!      `----------------- Link: one word a queue -------'
//!                                |
//!      Access: registers, DMA mappings, reset     (vfio, a model, or whatever else implements it)
//! ```
//!
//! * Nothing sleeps, blocks or starts threads; time comes from a [`Clock`], every wait has a deadline.
//! * On the I/O path there is no lock, no system call and no allocation; one doorbell a batch.
//! * Buffers are [`hugepage_alloc::DmaBuf`]s, owned by the queue from `submit` until the device is done with them,
//!   resets and failures included.
//! * What a device says is checked: an unknown, stale or repeated identifier, an impossible queue head, a fatal
//!   status, registers of all ones, or silence end in a reset or in giving the device up, never in a panic.
//!
//! ```
//! use std::sync::Arc;
//! use async_nvme::{Controller, Options, SystemClock, block_on};
//! use nvme_model::{ControllerOptions, NamespaceOptions, Subsystem};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let subsystem = Subsystem::new("DOC1");
//! subsystem.add_namespace(NamespaceOptions::memory(1, 12, 256))?;
//! let model = subsystem.controller(ControllerOptions::default());
//! let clock = Arc::new(SystemClock::default());
//! let mut controller = Controller::new(model.clone(), Options::default(), clock)?;
//! block_on(controller.ready(), || { model.step(); })?;
//! assert_eq!(controller.namespaces()[0].blocks, 256);
//! # Ok(())
//! # }
//! ```
//!
//! `vfio` reaches a PCI function that the kernel gives to user space (Linux on `x86_64` and `aarch64`); its examples
//! need such a controller, the others run on the model.
//!
//! What it does not do yet: a run on hardware (VFIO has met emulated controllers only); interrupts are in the trait but queues are created without them (polling only); shadow doorbells (DBBUF), Copy,
//! metadata formats, zoned and key-value command sets, controller memory buffers, firmware download; resubmission of
//! operations after a reset (their owner is told whether they reached the device). A queue pair serves one namespace.

#![deny(unsafe_code)]

pub mod access;
mod admin;
mod bell;
mod clock;
mod control;
mod controller;
mod data;
mod error;
mod events;
mod exec;
mod idle;
mod info;
mod jobs;
mod kind;
mod limits;
mod link;
mod op;
mod options;
mod prp;
mod queue;
mod quirks;
mod requeue;
mod reset;
mod ring;
mod shadow;
mod slots;
mod start;
mod ticket;
#[cfg(all(feature = "vfio", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod vfio;
#[cfg(all(feature = "vfio-user", target_os = "linux"))]
pub mod vfio_user;

pub use access::{Access, AccessError, DmaMapping, Iova};
pub use admin::{AdminCommand, AdminReply, AdminToken};
pub use bell::Arm;
pub use clock::{Clock, ManualClock, Moment, SystemClock};
pub use controller::Controller;
pub use error::{Error, IoError};
pub use exec::block_on;
pub use info::{ControllerInfo, NamespaceInfo};
pub use op::{Done, Op, OpKind, RawCommand};
pub use options::{Event, Options, State};
pub use queue::{IoQueue, QueueStats, Refused, RefusedWhy};
pub use quirks::Quirks;
pub use requeue::Requeue;
pub use ticket::QueueTicket;
#[cfg(all(feature = "vfio-user", target_os = "linux"))]
pub use vfio_user::{VfioUserAccess, VfioUserOptions};
