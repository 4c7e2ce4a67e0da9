//! Commands that take several files: every file is tried, every failure told, the first decides the exit status.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::exit::{Exit, Failure};

/// What came of several files.
pub(super) struct Results<T> {
    pub(super) done: Vec<T>,
    failed: Vec<(PathBuf, Failure)>,
}

/// The JSON form: `done` under its own name, and the errors.
#[derive(Serialize)]
pub(super) struct Errors {
    path: String,
    #[serde(flatten)]
    error: serde_json::Value,
}

/// Does `work` for each of `files`. Failures are told at once on standard error, unless `json` will tell them.
pub(super) fn each<T>(
    files: &[PathBuf],
    json: bool,
    mut work: impl FnMut(&Path) -> Result<T, Failure>,
) -> Results<T> {
    let mut results = Results { done: Vec::new(), failed: Vec::new() };
    for file in files {
        match work(file) {
            Ok(value) => results.done.push(value),
            Err(failure) => {
                if !json {
                    // Nothing is left to do when standard error is closed.
                    let _ = writeln!(std::io::stderr(), "{failure}");
                }
                results.failed.push((file.clone(), failure));
            }
        }
    }
    results
}

impl<T> Results<T> {
    /// The status of the first failure.
    pub(super) fn exit(&self) -> Exit {
        self.failed.first().map_or(Exit::Ok, |(_, failure)| failure.exit)
    }

    /// The failures, for JSON.
    pub(super) fn errors(&self) -> Vec<Errors> {
        let one = |(path, failure): &(PathBuf, Failure)| Errors {
            path: path.display().to_string(),
            // The object under "error" is flattened into ours.
            error: failure.to_json(),
        };
        self.failed.iter().map(one).collect()
    }
}
