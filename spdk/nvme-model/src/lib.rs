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
//! namespaces, lists and descriptors; creation and deletion of I/O queues, with an interrupt each; shadow doorbells;
//! features; Error Information, SMART, Firmware Slot and Changed Namespace logs; Abort; asynchronous events, each
//! masked until its log page is read; Read, Write, Flush, Write Zeroes, Dataset Management, Compare, Verify, Copy; PRP
//! lists and SGLs; several controllers over the same namespaces, in memory, an image or a block device, the latter past
//! the page cache so that a filesystem mounted on it sees the same.
//!
//! What goes wrong on demand ([`Fault`], [`RandomFaults`], [`RegisterFaults`], [`Model::set_fault_hook`]): commands
//! delayed, dropped, failed, reordered, completed twice or under another identifier, completions torn, queue heads
//! that cannot be, data that are nonsense; CSTS.CFS, CSTS.RDY or SHST stuck, the device removed and put back, its reset
//! or its cut from memory failing, interrupts lost, EventIdx wrong; by command, by count, or at random by seed.
//!
//! What it does not do: metadata (a namespace may claim some, to be refused by a driver), reservations, fused commands,
//! namespace management, format, firmware, sanitize, a controller memory buffer; interrupt masks of its own (INTMS and
//! INTMC are kept and not looked at, as with MSI-X) and interrupt coalescing. Copy moves within a namespace, by
//! descriptor format 0h.

mod admin;
mod controller;
mod disk;
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
