//! Logs: to standard error, by `tracing`, for people or as JSON; the level can change while the target runs.

use std::io::{self, IsTerminal as _};

use anyhow::Context as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt, reload};

use crate::config::{LogFormat, LogLevel};

/// The options on logging, known to every command.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct LogArgs {
    /// How much to log on standard error [default: what the configuration says, else warn, for serve info]
    #[arg(long, global = true, help_heading = "Logging", value_enum, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// How log lines look [default: what the configuration says, else human]
    #[arg(long, global = true, help_heading = "Logging", value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// What a running target uses to follow a changed `log` key.
#[derive(Clone, Debug)]
pub struct LogHandle {
    /// `None` when the command line or `RUST_LOG` decided: they win over the configuration.
    filter: Option<reload::Handle<EnvFilter, Registry>>,
}

impl LogHandle {
    /// Logs at `level` from now on, unless the command line or `RUST_LOG` said how much; says whether it does.
    ///
    /// # Errors
    /// When logging has been torn down.
    pub fn set_level(&self, level: LogLevel) -> anyhow::Result<bool> {
        let Some(filter) = &self.filter else { return Ok(false) };
        filter.reload(EnvFilter::new(level.to_string())).context("cannot change the log level")?;
        Ok(true)
    }
}

/// Starts logging. The command line wins over `RUST_LOG`, that over `level` and `format` (of the configuration).
///
/// # Errors
/// When `RUST_LOG` is no filter, or logging was started before.
pub fn start(args: &LogArgs, level: LogLevel, format: LogFormat) -> anyhow::Result<LogHandle> {
    let from_env = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let (text, decided) = match (args.log_level, from_env) {
        (Some(level), _) => (level.to_string(), true),
        (None, Some(text)) => (text, true),
        (None, None) => (level.to_string(), false),
    };
    let filter =
        EnvFilter::try_new(&text).with_context(|| format!("RUST_LOG={text} is no filter for logs"))?;
    let (filter, handle) = reload::Layer::new(filter);
    // Colours are for people at a terminal, not for files and journals.
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(colour);
    let lines = match args.log_format.unwrap_or(format) {
        LogFormat::Human => lines.with_target(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    Registry::default().with(filter).with(lines).try_init().context("cannot start logging")?;
    Ok(LogHandle { filter: (!decided).then_some(handle) })
}
