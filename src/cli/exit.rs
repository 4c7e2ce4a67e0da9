//! How a command ends: the exit status for scripts, and the error, its causes and its remedy for people.

use std::fmt;
use std::io;
use std::process::ExitCode;

use serde::Serialize;

/// The exit statuses of `fastice`. They are part of its interface: numbers are never given a new meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// Done.
    Ok,
    /// Failed for a reason that has no number of its own.
    Failed,
    /// The command line or the configuration file is wrong.
    Usage,
    /// A file is not there, or it, its filesystem or its device is not fit to be pinned or served, or is in use.
    Refused,
    /// A map differs from the living file, or data read differ from data written.
    Differs,
    /// The system forbids it: run as root, or with the capability named.
    Permission,
    /// A target cannot be reached, or refuses the connection.
    Unreachable,
}

impl Exit {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Ok,
        Self::Failed,
        Self::Usage,
        Self::Refused,
        Self::Differs,
        Self::Permission,
        Self::Unreachable,
    ];

    /// The status that the process exits with.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::Differs => 4,
            Self::Permission => 5,
            Self::Unreachable => 6,
        }
    }

    /// What it means, for the help text and the man page.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Ok => "done",
            Self::Failed => "failed",
            Self::Usage => "the command line or the configuration file is wrong",
            Self::Refused => "a file is not there, or it, its filesystem or device is not fit, or is in use",
            Self::Differs => "a map differs from the living file, or data read from data written",
            Self::Permission => "the system forbids it: run as root",
            Self::Unreachable => "a target cannot be reached, or refuses the connection",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// A command that failed: with which status, why, and what to do.
#[derive(Debug)]
pub struct Failure {
    /// The status to exit with.
    pub exit: Exit,
    /// What happened, with its causes.
    pub error: anyhow::Error,
    /// What the operator can do about it.
    pub remedy: Option<String>,
}

/// What commands return.
pub type Outcome = Result<Exit, Failure>;

impl Failure {
    /// A failure of the status given.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), remedy: None }
    }

    /// The same, with what to do about it.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// Whether nobody reads our output any more (`fastice pins | head -1`): no failure of ours.
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        let kind = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<io::Error>().map(io::Error::kind)
        };
        self.error.chain().any(|cause| kind(cause) == Some(io::ErrorKind::BrokenPipe))
    }

    /// With its causes and the remedy on one line, for a log; of an error that shows lines of a file, behind them.
    #[must_use]
    pub fn to_line(&self) -> String {
        let chain: Vec<String> = self.error.chain().map(ToString::to_string).collect();
        let remedy = self.remedy.iter().map(|remedy| format!("; remedy: {remedy}"));
        remedy.fold(chain.join(": "), |line, remedy| line + &remedy)
    }

    /// As one JSON object, for commands that were asked for JSON.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let causes: Vec<String> = self.error.chain().skip(1).map(ToString::to_string).collect();
        serde_json::json!({
            "error": {
                "kind": self.exit,
                "message": self.error.to_string(),
                "causes": causes,
                "remedy": self.remedy,
            }
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.error)?;
        for cause in self.error.chain().skip(1) {
            write!(f, "\n  cause: {cause}")?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "\n  remedy: {remedy}")?;
        }
        Ok(())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let exit = match error.kind() {
            io::ErrorKind::PermissionDenied => Exit::Permission,
            _ => Exit::Failed,
        };
        Self::new(exit, error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Exit::Failed, error)
    }
}

impl From<crate::config::ConfigError> for Failure {
    fn from(error: crate::config::ConfigError) -> Self {
        let unread = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
        match unread.map(io::Error::kind) {
            None => Self::new(Exit::Usage, error),
            Some(io::ErrorKind::PermissionDenied) => {
                Self::new(Exit::Permission, error).with_remedy("run as root, or as who may read the file")
            }
            Some(_) => Self::new(Exit::Usage, error)
                .with_remedy("name the file with --config; deploy/fastice.toml.example is a sample"),
        }
    }
}

/// The table of exit statuses that ends the help text.
#[must_use]
pub fn help_table() -> String {
    let rows = Exit::ALL.map(|exit| format!("  {}  {}", exit.code(), exit.meaning()));
    format!("Exit status:\n{}", rows.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_causes_and_remedy_on_one_line() {
        let error = anyhow::anyhow!("no such file").context("cannot read it");
        let failure = Failure::new(Exit::Usage, error);
        assert_eq!(failure.to_line(), "cannot read it: no such file");
        assert_eq!(failure.with_remedy("name it").to_line(), "cannot read it: no such file; remedy: name it");
    }

    #[test]
    fn numbers_are_distinct_and_in_order() {
        let codes = Exit::ALL.map(Exit::code);
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_failure_tells_its_causes_and_its_remedy_once() {
        let source = io::Error::other("the disk is on fire");
        let error = anyhow::Error::new(source).context("cannot pin /srv/a");
        let failure = Failure::new(Exit::Refused, error).with_remedy("put it out");
        let text = "error: cannot pin /srv/a\n  cause: the disk is on fire\n  remedy: put it out";
        assert_eq!(failure.to_string(), text);
        assert_eq!(
            failure.to_json(),
            serde_json::json!({"error": {
                "kind": "refused",
                "message": "cannot pin /srv/a",
                "causes": ["the disk is on fire"],
                "remedy": "put it out",
            }})
        );
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let left = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(Failure::from(left).is_broken_pipe());
        assert!(!Failure::from(io::Error::from(io::ErrorKind::NotFound)).is_broken_pipe());
    }
}
