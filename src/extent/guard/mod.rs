//! The guards of pinned files that need this process: opens are denied, lease breaks are heard, maps are watched.
//!
//! ```text
//!    open(2) of anyone --> fanotify group --+                   +--> FAN_DENY; FAN_ALLOW for this process
//!    lease break -------> signalfd ---------+--> guard thread --+--> recall: eventfd, callback
//!    a file that nobody has looked at ------+                   |
//!    statx, lease, FIEMAP of each file -----> watch thread -----+        (see `watch`)
//! ```
//!
//! One [`Warden`] has both threads, for as many files as there are; a [`Guard`] is one file in its care. Lease breaks
//! arrive as a signal that is directed to the guard thread, which has it blocked, so no other thread of the process can
//! be hit by it. A guard that fails recalls too, and so does a watch that falls behind: a pin without its guards must
//! not be served.

mod incident;
mod opens;
mod oversight;
pub(super) mod post;
pub(super) mod warden;

pub use incident::{Doubt, Incident, OnRecall, RecallReason, RecallWatch};
pub(in crate::extent) use oversight::lease_break_limit;
pub use oversight::{Oversight, lease_break_time};
pub use post::{Baseline, WatchReport};
pub(super) use post::{Guard, Post};
pub use warden::Warden;
