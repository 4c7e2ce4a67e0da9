//! Progress of what takes long: a bar on a terminal, a plain line at start and end elsewhere, nothing with `--json`.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// One task with a known number of steps or bytes.
pub struct Progress {
    bar: Option<ProgressBar>,
    plain: bool,
    what: String,
    started: Instant,
}

/// How progress counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, shown as MiB and MiB/s.
    Bytes,
    /// Seconds of a fixed time.
    Seconds,
}

impl Progress {
    /// Begins `what`, of `total` units. Standard error gets it, so that output stays clean.
    #[must_use]
    pub fn start(what: impl Into<String>, total: u64, unit: Unit, quiet: bool) -> Self {
        let what = what.into();
        let terminal = std::io::stderr().is_terminal();
        let bar = (terminal && !quiet).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
            let template = match unit {
                Unit::Bytes => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
                Unit::Seconds => "{msg} {wide_bar} {pos}/{len} s",
            };
            bar.set_style(
                ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.set_message(what.clone());
            bar
        });
        let plain = !terminal && !quiet;
        if plain {
            say(&format!("{what} …"));
        }
        Self { bar, plain, what, started: Instant::now() }
    }

    /// `done` units are done in all.
    pub fn set(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    /// Ends it, and says how long it took where there is no bar.
    pub fn finish(self) -> Duration {
        let took = self.started.elapsed();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.plain {
            say(&format!("{} done in {:.1} s", self.what, took.as_secs_f64()));
        }
        took
    }
}

/// A line on standard error; who cannot hear it does not mind.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
