//! Messages that a peer can provoke: one a second goes into the log. Whoever floods us fills the counters, not the log.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Between two messages.
const QUIET: Duration = Duration::from_secs(1);

/// Messages of one kind, of all threads.
#[derive(Debug)]
pub(crate) struct LogPace {
    started: Instant,
    quiet_until_ms: AtomicU64,
}

impl Default for LogPace {
    fn default() -> Self {
        Self { started: Instant::now(), quiet_until_ms: AtomicU64::new(0) }
    }
}

impl LogPace {
    /// Whether a message may be logged now: then the next one has to wait.
    pub(crate) fn may_log(&self) -> bool {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let until = self.quiet_until_ms.load(Ordering::Relaxed);
        let next = now_ms.saturating_add(u64::try_from(QUIET.as_millis()).unwrap_or(1000));
        now_ms >= until
            && self.quiet_until_ms.compare_exchange(until, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_flood_one_message_is_logged() {
        let pace = LogPace::default();
        assert_eq!((0..1000).filter(|_| pace.may_log()).count(), 1);
        pace.quiet_until_ms.store(0, Ordering::Relaxed);
        assert!(pace.may_log(), "the second is over");
    }
}
