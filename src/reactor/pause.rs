//! A core that was away: nothing goes to a device before all files were looked at again.
//!
//! ```text
//!   turn:  look | submit, sleep, harvest | look | begin commands ...
//!          ^ what the last turn queued     ^ what came into the sockets meanwhile
//! ```
//!
//! A core looks at the clock before it submits and after. Was it away for longer than a busy machine explains, then so was
//! the guard perhaps, and the kernel may have let somebody in: see [`Oversight`]. A core that finds a file recalled when it
//! comes back, with commands of it under way, cannot tell which of them the kernel has already: it ends, and submits none.
//! The target ends with it, and leaves its pins behind as after a kill.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::engine::IoEngine;
use crate::extent::Oversight;
use crate::ring::RingError;

/// A core that had no turn for so long was stopped. Far below `/proc/sys/fs/lease-break-time`, whose least is a second, and
/// which is 45 by default; far above what a turn takes.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// How long the files may take to be looked at.
const PROOF_PATIENCE: Duration = Duration::from_secs(30);

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
    seen: Instant,
}

impl PauseWatch {
    pub(super) fn new(oversight: Option<Arc<Oversight>>) -> Self {
        Self { oversight, seen: Instant::now() }
    }

    /// Looks at the clock, and makes sure of the files when much time has passed. Returns the time.
    pub(super) fn look(&mut self, engine: &IoEngine) -> Result<Instant, CoreFailure> {
        let now = Instant::now();
        let away = now.duration_since(self.seen);
        self.seen = now;
        if away <= PAUSE_MIN {
            return Ok(now);
        }
        self.make_sure(now, away, engine)
    }

    #[cold]
    fn make_sure(&mut self, now: Instant, away: Duration, engine: &IoEngine) -> Result<Instant, CoreFailure> {
        let away_ms = away.as_millis();
        let Some(oversight) = &self.oversight else { return Ok(now) };
        if !oversight.prove_since(now, now + PROOF_PATIENCE) {
            return Err(CoreFailure::Unproven { away_ms });
        }
        if engine.is_in_doubt() {
            return Err(CoreFailure::RecalledMeanwhile { away_ms });
        }
        tracing::warn!(away_ms, "a core was away; the files are what they were");
        self.seen = Instant::now();
        Ok(self.seen)
    }
}
