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
//! * On the I/O path there is no lock, no system call and no allocation; one doorbell a batch, or none where the
//!   controller looks at shadow doorbells (Doorbell Buffer Config).
//! * Buffers are [`hugepage_alloc::DmaBuf`]s, owned by the queue from `submit` until the device is done with them,
//!   resets and failures included.
//! * What a device says is checked: an unknown, stale or repeated identifier, an impossible queue head, a fatal
//!   status, registers that do not answer, or silence end in a reset or in giving the device up, never in a panic.
//!
//! What one asks for, and where it is:
//!
//! | | |
//! |---|---|
//! | commands | [`OpKind`]: Read, Write, Flush, Write Zeroes, Deallocate and Dataset Management, Compare, Verify, Copy, raw; split by MDTS, NOIOB and each command's own limits; PRPs at multiples of 4, SGLs where they are offered |
//! | time-outs | [`Options::io_timeout`]: Abort, then a reset of the controller, then giving it up |
//! | resets | [`Requeue`]: which operations are given to the controller anew |
//! | removal and return | [`State::Removed`], [`Controller::restart`]; namespaces that come and go: [`Event::NamespacesChanged`] |
//! | sleeping | [`QueueTicket::with_interrupt`], [`IoQueue::arm`], [`Controller::arm`]: an eventfd, and no completion missed |
//! | operating | [`Controller::smart`], [`Controller::error_log`], [`Controller::firmware_slots`], [`Controller::write_cache`], [`Controller::admin`] |
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
//! need such a controller. `vfio_user` reaches a controller in another process through a UNIX socket (Linux); the
//! program `nvme-model-server` of the crate `nvme-model` is one. All other examples run on the model.
//!
//! What it does not do: it has not run on hardware yet, only on emulated controllers. No metadata and no blocks other
//! than 512 and 4096 bytes, no zoned or key-value command sets (such namespaces are listed with the reason), no fused
//! commands, reservations, directives, streams or in-band security, no controller or host memory buffer, no power
//! states, no firmware download, no subsystem reset. An operation has one buffer; a queue pair serves one namespace
//! and has a completion queue of its own; all queues have the same priority. A status that could be retried is the
//! owner's to retry.

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
mod quiesce;
mod quirks;
mod recovery;
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
pub use quiesce::quiesce;
pub use quirks::Quirks;
pub use requeue::Requeue;
pub use ticket::QueueTicket;
#[cfg(all(feature = "vfio-user", target_os = "linux"))]
pub use vfio_user::{VfioUserAccess, VfioUserOptions};
