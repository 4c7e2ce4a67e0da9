//! `fastice top`: what the targets of this host are doing right now.
//!
//! ```text
//!   control sockets --ask--> Sample, Sample --between--> View --draw--> Buffer --> a terminal, or lines of text
//! ```
//!
//! Everything is asked for as `fastice status` does it; what is shown is what was between two answers: rates, and percentiles
//! of the commands that ended meanwhile.

mod draw;
mod screen;
mod section;
mod view;

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::time::Duration;

use clap::{Args, ValueEnum};

use self::view::{Sample, View};
use super::StateDirArg;
use super::exit::{Exit, Failure, Outcome};
use super::files::named_state;
use super::out::Out;
use super::status::silence;

/// The shortest time between two looks: a few ticks of a core.
const INTERVAL_MIN_S: f64 = 0.1;
const INTERVAL_MAX_S: f64 = 3600.0;

/// Watch the running targets: rates, latencies by stage, cores, exports, hosts
///
/// Keys: q quits, s sorts exports and hosts by another column, p pauses. When standard input or output is no terminal, one
/// picture is printed as text.
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub state: StateDirArg,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
    /// How exports and hosts are sorted
    #[arg(long, value_enum, default_value_t = Sort::Rate)]
    pub sort: Sort,
    /// Print one picture, of one interval, as text
    #[arg(long)]
    pub once: bool,
}

/// How exports and hosts are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// The busiest first
    Rate,
    /// The slowest first, by the 99th percentile
    Latency,
    /// By name
    Name,
}

impl Sort {
    const fn word(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Latency => "latency",
            Self::Name => "name",
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::Rate => Self::Latency,
            Self::Latency => Self::Name,
            Self::Name => Self::Rate,
        }
    }
}

/// Seconds, with decimals.
fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "no number of seconds".to_owned())?;
    if !(INTERVAL_MIN_S..=INTERVAL_MAX_S).contains(&seconds) {
        return Err(format!("from {INTERVAL_MIN_S} to {INTERVAL_MAX_S} seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Watches.
///
/// # Errors
/// When the state directory does not exist or may not be read, or the terminal fails; with one picture also when a target that
/// runs does not answer, or ends meanwhile.
pub fn run(args: &TopArgs) -> Outcome {
    // A directory that may not be read is no sign that nothing runs.
    if let Some(state) = named_state(&args.state.state_dir)? {
        state.records_are_readable()?;
    }
    if args.once || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return once(args);
    }
    screen::run(&args.state.state_dir, args.interval, args.sort)?;
    Ok(Exit::Ok)
}

/// One picture, as wide and as high as it has to be.
fn once(args: &TopArgs) -> Outcome {
    let state = &args.state.state_dir;
    let (before, _) = Sample::take(state);
    if !before.targets.is_empty() {
        std::thread::sleep(args.interval);
    }
    let (now, silent) = Sample::take(state);
    let mut view = View::between(&before, &now);
    view.sort(args.sort);
    let mut out = Out::stdout();
    if view.is_empty() {
        out.line(nobody(state))?;
    } else {
        draw::lines(&view).iter().try_for_each(|line| out.line(line))?;
    }
    out.flush()?;
    match (silent.first(), now.first_gone(&before)) {
        (Some(first), _) => Err(silence(first)),
        (None, Some(gone)) => {
            let error = anyhow::anyhow!("{gone} ended while it was looked at");
            let remedy = "its log says why; `fastice pins` shows what became of its files";
            Err(Failure::new(Exit::Unreachable, error).with_remedy(remedy))
        }
        (None, None) => Ok(Exit::Ok),
    }
}

fn nobody(state: &Path) -> String {
    format!("no target runs with the state directory {}", state.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_seconds_within_reason() {
        assert_eq!(interval("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(interval("2"), Ok(Duration::from_secs(2)));
        for text in ["0", "0.01", "-1", "inf", "NaN", "1e9", "a second", ""] {
            assert!(interval(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_key_goes_through_all_orders() {
        let seen: Vec<_> =
            std::iter::successors(Some(Sort::Rate), |sort| Some(sort.next())).take(4).collect();
        assert_eq!(seen, [Sort::Rate, Sort::Latency, Sort::Name, Sort::Rate]);
        assert_eq!(seen[1].word(), "latency");
    }
}
