//! An NVMe controller in software, behind the trait by which a driver reaches any controller.
//!
//! ```text
//!   driver ----- Access: registers, doorbells -----> Model --- step() ---> commands fetched, run, completed
//!      \                                               |  \
//!       `--- queues, buffers: the same memory ---------'   `-- faults (data): what goes wrong, for which command
//!                                                      |
//!                          Subsystem: namespaces in memory, a file or a block device, shared by its controllers
//! ```
//!
//! Nothing happens by itself: [`Model::step`] lets the controller work, so that a test is the same in each run.
//! [`Model::spawn`] steps in a thread. Time is counted in steps.
//!
//! The model reads and writes memory only where the driver mapped it, by copies checked against the mapping, and
//! takes nothing a driver says on trust: it is the other end of a fuzzer too ([`fuzz_model_actions`]).
//!
//! A [`vfio_user::Server`] offers a model to other processes; the program `nvme-model-server` is one.
//!
//! What it does: registers and the enable, ready and shutdown state machine; admin queue; Identify of controller,
//! namespaces, lists and descriptors; creation and deletion of I/O queues; features; Error Information, SMART,
//! Firmware Slot and Changed Namespace logs; Abort; asynchronous events; Read, Write, Flush, Write Zeroes, Dataset
//! Management, Compare, Verify; PRP lists and SGLs; several controllers over the same namespaces; faults.
//!
//! What it does not do: interrupts (it has no vectors), metadata (a namespace may claim some, to be refused by a
//! driver), reservations, Copy, fused commands, namespace management, shadow doorbells, a controller memory buffer.

mod admin;
mod controller;
mod fault;
mod fuzz;
mod identify;
mod interrupts;
mod io;
mod logs;
mod memory;
mod model;
mod namespace;
mod queues;
mod store;
pub mod vfio_user;
mod work;

pub use controller::ControllerOptions;
pub use fault::{CommandMatch, Fault, FaultAction, FaultHook, RandomFaults, RegisterFaults};
pub use fuzz::fuzz_model_actions;
pub use model::{Model, ModelThread};
pub use namespace::{NamespaceError, NamespaceOptions, Subsystem};
pub use store::Backing;
