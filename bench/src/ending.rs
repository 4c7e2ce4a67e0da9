//! A run that is told to end, by SIGINT or SIGTERM, ends after what it is at: what it made is taken away and what it measured is kept.
//! A second signal ends it at once.
//!
//! What it does not do: end programs that were started. Each ends with what started it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// As a shell tells of a program that SIGINT has ended.
const ENDED_AT_ONCE: i32 = 130;

/// Whether a run was told to end.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    told: Arc<AtomicBool>,
}

/// It was told to.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("told to end; what was measured until then is kept")]
pub struct Told;

impl Ending {
    /// Hears signals from now on, as long as the process runs.
    ///
    /// # Errors
    /// When the kernel has no handler set.
    pub fn by_signals() -> io::Result<Self> {
        let this = Self::default();
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds that none was told of before.
            flag::register_conditional_shutdown(signal, ENDED_AT_ONCE, Arc::clone(&this.told))?;
            flag::register(signal, Arc::clone(&this.told))?;
        }
        Ok(this)
    }

    /// One that has been told already.
    #[cfg(test)]
    pub(crate) fn told() -> Self {
        Self { told: Arc::new(AtomicBool::new(true)) }
    }

    /// # Errors
    /// When it was told to end.
    pub fn look(&self) -> Result<(), Told> {
        if self.told.load(Ordering::Relaxed) { Err(Told) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[test]
    fn a_signal_is_heard_and_ends_nothing_by_itself() {
        let ending = Ending::by_signals().unwrap();
        ending.look().unwrap();
        kill_process(getpid(), Signal::TERM).unwrap();
        ending.look().unwrap_err();
        Ending::default().look().unwrap();
    }
}
