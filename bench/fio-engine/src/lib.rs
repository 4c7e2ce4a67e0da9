//! An external I/O engine for fio on fastice's own NVMe/TCP host: fio drives a target, ours or another, with no kernel module
//! and no privilege.
//!
//! ```text
//!   fio --+-- shim/engine.c     fio's side: options, io_u, file sizes; compiled against the headers of this very fio
//!         |       |
//!         |     ffi             the C interface between both (shim/fastice_fio.h); all that is unsafe; no panic leaves it
//!         |       |
//!         +---- session         one job: a controller, one I/O queue, what is in flight
//!                 |
//!               errno           NVMe status -> errno
//!                 |
//!               fastice::initiator
//! ```
//!
//! A job of fio has a controller of its own, with an admin queue that is kept alive and one I/O queue whose commands are in
//! flight at once. Data is copied once between fio's buffers and those of the queue.
//!
//! Not here: several namespaces in a job, blocks larger than a command may carry, metadata, zones, TLS, reconnecting.

pub mod errno;
pub mod ffi;
pub mod session;
