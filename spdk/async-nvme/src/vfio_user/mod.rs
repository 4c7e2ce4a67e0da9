//! A controller in another process, behind a UNIX socket: the vfio-user protocol, client side.
//!
//! ```text
//!   driver                                            server (a controller in software)
//!     | read32 ----- REGION_READ ---- reply --------->|
//!     | write32 ---- REGION_WRITE (doorbells: posted) >|     or, where the server offers it,
//!     | write32 ---- shared memory ------------------->|     doorbells without a system call
//!     | dma_map ---- DMA_MAP + memfd ----------------->| maps the same pages
//!     | dma_revoke - DMA_UNMAP of everything --------->| answers when it can no longer reach them
//!     | interrupts - SET_IRQS + eventfds ------------->|
//!     `------------- the same memory ------------------'
//! ```
//!
//! [`VfioUserAccess`] is an [`crate::Access`]. [`wire`] and [`Stream`] are what both ends of the protocol need, so that a
//! server can be built on them (the crate `nvme-model` has one).
//!
//! The protocol was written down with libvfio-user and now lives in QEMU's documentation
//! (`docs/interop/vfio-user.rst`); numbers here follow both. Version 0.1 is spoken.
//!
//! **What the server is trusted with.** It is the device, and the IOMMU before it: it maps the memory it is given, and
//! whether it lets go is its word. So [`crate::Access::dma_revoke`] believes a server that answers; of one that does not, it
//! only believes that it cannot write any more once its process has ended (seen by a pidfd). Memory is handed over as
//! sealed files, so a server cannot cut it off under us, see [`hugepage_alloc::Region::file`] for what it still can. A
//! server is not trusted with anything else: what it says is checked, each message has a deadline, and after nonsense
//! or silence the device counts as gone: registers read as ones.
//!
//! **Why not the crate `vfio_user`** (0.1.7, read in full): its client has no deadlines, does not look at the error of a
//! reply, at its identifier or its length, subtracts lengths that the server names (a panic, with overflow checks on),
//! takes a short write for a whole one, and keeps its socket to itself, so none of that can be mended from outside; its
//! server allocates what a client's count says, panics on a version without a NUL, and ends the connection where an
//! error reply is due.
//!
//! What it does not do: memory that is not shared (messages DMA_READ and DMA_WRITE are refused), migration, dirty page
//! tracking, ioeventfds, reconnecting (a server that comes back is a new device).

mod access;
mod client;
mod dma;
mod peer;
mod stream;
pub mod wire;

pub use access::{VfioUserAccess, VfioUserOptions};
pub use stream::{Message, Stream, StreamError};
