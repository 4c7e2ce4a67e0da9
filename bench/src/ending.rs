//! A run that is told to end, by SIGINT, SIGTERM or SIGHUP, ends after the round that it is at: what it made is taken away.
//!
//! ```text
//!   signal --> noted .. the round ends --> look: Told --> files, loop devices, targets go --> rows are kept --> dies of the signal
//! ```
//!
//! It dies of the signal in the end, so that a shell that runs it ends as well and does not go on with what comes next. Programs that it
//! started are in process groups of their own: Ctrl-C is not for them, they end with what started them. SIGQUIT ends it at once, and
//! leaves all of that behind.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

/// Signals that tell it to end.
const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

/// Whether a run was told to end.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    /// The signal; zero before there was one.
    told: Arc<AtomicUsize>,
}

/// It was told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("told to end, by signal {signal}")]
pub struct Told {
    signal: i32,
}

impl Ending {
    /// Hears signals from now on, as long as the process runs.
    ///
    /// # Errors
    /// When the kernel has no handler set.
    pub fn by_signals() -> io::Result<Self> {
        let this = Self::default();
        for signal in SIGNALS {
            flag::register_usize(signal, Arc::clone(&this.told), signal.unsigned_abs() as usize)?;
        }
        Ok(this)
    }

    /// One that has been told already.
    #[cfg(test)]
    pub(crate) fn told() -> Self {
        Self { told: Arc::new(AtomicUsize::new(SIGTERM.unsigned_abs() as usize)) }
    }

    /// # Errors
    /// When it was told to end.
    pub fn look(&self) -> Result<(), Told> {
        match i32::try_from(self.told.load(Ordering::Relaxed)) {
            Ok(0) | Err(_) => Ok(()),
            Ok(signal) => Err(Told { signal }),
        }
    }
}

impl Told {
    /// Ends the process as the signal would have without [`Ending`]. Returns when that cannot be done.
    pub fn die(self) {
        // What it cannot do is to be told by the exit status, which is one of failure anyway.
        let _ = low_level::emulate_default_handler(self.signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signal_is_heard_and_ends_nothing_by_itself() {
        for signal in SIGNALS {
            let ending = Ending::by_signals().unwrap();
            ending.look().unwrap();
            low_level::raise(signal).unwrap();
            assert_eq!(ending.look(), Err(Told { signal }));
            assert_eq!(ending.look(), Err(Told { signal }), "it stays told");
        }
        Ending::default().look().unwrap();
    }
}
