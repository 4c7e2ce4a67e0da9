//! A core that was away: nothing goes to a device before all files were looked at again.
//!
//! ```text
//!   turn:  look | submit, sleep, harvest | look | begin commands ...
//!          ^ what the last turn queued     ^ what came into the sockets meanwhile
//! ```
//!
//! A core looks at the clock before it submits and after. Was it away for longer than a busy machine explains, then so was
//! the guard perhaps: see [`Oversight`]. Was it so long that the kernel may have let somebody in, and it finds a file
//! recalled, with commands of it under way, it cannot tell which of them the kernel has already: it ends, and submits none.
//! The target ends with it, and leaves its pins behind as after a kill. After less, what is under way is drained as ever:
//! the guard has not let go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::engine::IoEngine;
use crate::extent::{Oversight, lease_break_time};
use crate::ring::RingError;
use crate::stage::Stamp;

/// A core that had no turn for so long was stopped, or the machine is overwhelmed: far above what a turn takes.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// The part of the kernel's patience with holders of leases (45 s by default) that a core may be away for and still be
/// sure that nobody was let in.
const PATIENCE_SHARE: f64 = 0.25;
/// How long the files may take to be looked at, after a long pause and after a short one. A look that takes longer than
/// the second is the business of the guard, which fences what is not looked at in time.
const PROOF_PATIENCE: Duration = Duration::from_secs(30);
const PROOF_PATIENCE_SHORT: Duration = Duration::from_secs(2);

/// Why a core ends before it is told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoreFailure {
    /// Its ring failed.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A file was recalled while the process was stopped.
    #[error(
        "it was away for {away_ms} ms, a file was recalled meanwhile, and commands of it are under way: none of them is \
         submitted any more; start the target again"
    )]
    RecalledMeanwhile {
        /// For how long it was away.
        away_ms: u128,
    },
    /// After a stop, nobody could say whether the files are what they were.
    #[error(
        "it was away for {away_ms} ms, and the files were not looked at again within 30 s; start the target again"
    )]
    Unproven {
        /// For how long it was away.
        away_ms: u128,
    },
}

impl CoreFailure {
    /// Whether what is queued must not be submitted, not even to be cancelled.
    pub(super) const fn forbids_submission(&self) -> bool {
        matches!(self, Self::RecalledMeanwhile { .. } | Self::Unproven { .. })
    }
}

/// Notices that its core was away.
pub(super) struct PauseWatch {
    oversight: Option<Arc<Oversight>>,
    seen: Stamp,
}

impl PauseWatch {
    pub(super) fn new(oversight: Option<Arc<Oversight>>) -> Self {
        Self { oversight, seen: Stamp::now() }
    }

    /// Looks at the clock, and makes sure of the files when much time has passed. Returns the time.
    pub(super) fn look(&mut self, engine: &IoEngine) -> Result<Stamp, CoreFailure> {
        let now = Stamp::now();
        let away = Duration::from_nanos(now.ns_since(self.seen));
        self.seen = now;
        if away <= PAUSE_MIN {
            return Ok(now);
        }
        self.make_sure(now, away, engine)
    }

    #[cold]
    fn make_sure(&mut self, now: Stamp, away: Duration, engine: &IoEngine) -> Result<Stamp, CoreFailure> {
        let away_ms = away.as_millis();
        let Some(oversight) = &self.oversight else { return Ok(now) };
        let is_long = away >= lease_break_time().mul_f64(PATIENCE_SHARE);
        let patience = if is_long { PROOF_PATIENCE } else { PROOF_PATIENCE_SHORT };
        let since = Instant::now();
        let is_proven = oversight.prove_since(since, since + patience);
        if is_long && !is_proven {
            return Err(CoreFailure::Unproven { away_ms });
        }
        if is_long && engine.is_in_doubt() {
            return Err(CoreFailure::RecalledMeanwhile { away_ms });
        }
        tracing::warn!(away_ms, is_proven, "a core was away, and has the files looked at before it goes on");
        let now = Stamp::now();
        self.seen = now;
        Ok(now)
    }
}
