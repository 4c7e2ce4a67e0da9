//! `fastice doctor`: is this host fit, and if not, what to do.
//!
//! Every check looks at one fact and says it in one line, with the command that mends it. A check that cannot find
//! out says so (`unknown`); it never guesses. `warn` is what works but not as well or as safely as it could.

mod choices;
mod device;
mod host;
mod kernel;
mod limits;
mod places;

use std::path::PathBuf;

use serde::Serialize;

use super::device::host::Host;
use super::exit::{Exit, Outcome};
use super::out::{JsonFlag, Out};
use crate::config::{Config, ConfigError, DEFAULT_STATE_DIR};

/// Check this host, and say how to mend what is wrong
///
/// Exits with 1 when a check fails. Warnings and unknowns do not fail it.
#[derive(Clone, Debug, clap::Args)]
pub struct DoctorArgs {
    /// Also check what this configuration of `fastice serve` needs
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where pin records and stored maps are kept [default: what the configuration says, else /var/lib/fastice]
    #[arg(long, value_name = "DIR", env = "FASTICE_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it")]
    pub json: JsonFlag,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// As it should be.
    Ok,
    /// Works, but not as well or as safely as it could.
    Warn,
    /// Will not work.
    Fail,
    /// A fact, neither good nor bad.
    Info,
    /// Could not be found out.
    Unknown,
}

/// One check and its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// What was checked: a stable word for scripts.
    pub(super) id: &'static str,
    /// The result.
    pub(super) status: Status,
    /// The fact found.
    pub(super) detail: String,
    /// What mends it: a command where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remedy: Option<String>,
}

impl Check {
    fn new(id: &'static str, status: Status, detail: impl Into<String>) -> Self {
        Self { id, status, detail: detail.into(), remedy: None }
    }

    pub(super) fn ok(id: &'static str, detail: impl Into<String>) -> Self {
        Self::new(id, Status::Ok, detail)
    }

    pub(super) fn info(id: &'static str, detail: impl Into<String>) -> Self {
        Self::new(id, Status::Info, detail)
    }

    pub(super) fn unknown(id: &'static str, detail: impl Into<String>) -> Self {
        Self::new(id, Status::Unknown, detail)
    }

    pub(super) fn warn(id: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(id, Status::Warn, detail) }
    }

    pub(super) fn fail(id: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(id, Status::Fail, detail) }
    }
}

/// All results, as `--json` prints them.
#[derive(Serialize)]
struct Report {
    /// Whether no check failed.
    healthy: bool,
    checks: Vec<Check>,
}

/// Runs every check and prints the results.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(args: &DoctorArgs) -> Outcome {
    let config = args.config.as_ref().map(|path| Config::load(path));
    let report = report(args, config.as_ref());
    let healthy = report.healthy;
    let mut out = Out::stdout();
    if args.json.json {
        out.json(&report)?;
    } else {
        print(&mut out, &report.checks)?;
    }
    out.flush()?;
    Ok(if healthy { Exit::Ok } else { Exit::Failed })
}

fn report(args: &DoctorArgs, config: Option<&Result<Config, ConfigError>>) -> Report {
    let good = config.and_then(|config| config.as_ref().ok());
    let state_dir = args
        .state_dir
        .clone()
        .or_else(|| good.map(|config| config.state_dir.clone()))
        .unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIR));
    let mut checks = Vec::new();
    let root = Host::system();
    kernel::check(&mut checks, good);
    limits::check(&mut checks, &root, good);
    host::check(&mut checks);
    device::check(&mut checks, &root, &state_dir);
    places::check(&mut checks, &state_dir);
    match config {
        None => {}
        Some(Err(error)) => {
            let check = match std::error::Error::source(error) {
                None => Check::fail("config", error.to_string(), "correct the file"),
                Some(unread) => {
                    let remedy = "name the file with --config, or run as who may read it";
                    Check::fail("config", format!("{error}: {unread}"), remedy)
                }
            };
            checks.push(check);
        }
        Some(Ok(config)) => {
            places::check_config(&mut checks, config, args.config.as_deref());
            choices::check(&mut checks, &root, config);
        }
    }
    Report { healthy: checks.iter().all(|check| check.status != Status::Fail), checks }
}

fn print(out: &mut Out, checks: &[Check]) -> std::io::Result<()> {
    let width = checks.iter().map(|check| check.id.len()).max().unwrap_or_default();
    for check in checks {
        let (word, colour) = match check.status {
            Status::Ok => ("ok", "32"),
            Status::Warn => ("warn", "33"),
            Status::Fail => ("FAIL", "31"),
            Status::Info => ("info", "36"),
            Status::Unknown => ("?", "35"),
        };
        let word = format!("{word:<4}");
        let word = if out.colour() { format!("\u{1b}[{colour}m{word}\u{1b}[0m") } else { word };
        let detail = check.detail.replace('\n', "\n      ");
        out.line(format!("{word}  {:<width$}  {detail}", check.id))?;
        if let Some(remedy) = &check.remedy {
            out.line(format!("      {:<width$}  -> {remedy}", ""))?;
        }
    }
    let count = |status: Status| checks.iter().filter(|check| check.status == status).count();
    let (failed, warned, unknown) = (count(Status::Fail), count(Status::Warn), count(Status::Unknown));
    out.line(format!("{} checks: {failed} failed, {warned} warnings, {unknown} unknown", checks.len()))
}

/// The trimmed text of a small file of /proc or /sys.
pub(super) fn read_trimmed(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_a_stable_shape() {
        let checks = vec![
            Check::ok("kernel", "6.12"),
            Check::fail("io-uring", "disabled", "sysctl -w kernel.io_uring_disabled=0"),
        ];
        let report = serde_json::to_value(Report { healthy: false, checks }).expect("serializable");
        assert_eq!(
            report,
            serde_json::json!({"healthy": false, "checks": [
                {"id": "kernel", "status": "ok", "detail": "6.12"},
                {"id": "io-uring", "status": "fail", "detail": "disabled",
                 "remedy": "sysctl -w kernel.io_uring_disabled=0"},
            ]})
        );
    }

    #[test]
    fn every_check_of_this_host_says_something() {
        let args = DoctorArgs { config: None, state_dir: None, json: JsonFlag::default() };
        let report = report(&args, None);
        assert!(report.checks.len() > 12);
        for check in &report.checks {
            assert!(!check.detail.is_empty(), "{}", check.id);
            let needs_remedy = matches!(check.status, Status::Fail | Status::Warn);
            assert_eq!(check.remedy.is_some(), needs_remedy, "{}", check.id);
        }
    }

    #[test]
    fn a_broken_configuration_fails_with_its_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "cores = 0\n").expect("a file");
        let args = DoctorArgs { config: Some(path.clone()), state_dir: None, json: JsonFlag::default() };
        let report = report(&args, Some(&Config::load(&path)));
        let check = report.checks.iter().find(|check| check.id == "config").expect("a check");
        assert_eq!(check.status, Status::Fail);
        assert!(check.detail.contains("c.toml:1:9: cores = 0"), "{}", check.detail);
        assert!(!report.healthy);
    }
}
