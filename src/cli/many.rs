//! Commands that take several files or devices: every one is tried, every failure told, the first decides the exit
//! status.

use std::fmt::Display;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::exit::{Exit, Failure};

/// What came of several things.
pub(super) struct Results<T> {
    pub(super) done: Vec<T>,
    failed: Vec<(String, Failure)>,
}

impl<T> Default for Results<T> {
    fn default() -> Self {
        Self { done: Vec::new(), failed: Vec::new() }
    }
}

/// Does `work` for each of `files`. Failures are told at once on standard error, unless `json` will tell them.
pub(super) fn each<T>(
    files: &[PathBuf],
    json: bool,
    mut work: impl FnMut(&Path) -> Result<T, Failure>,
) -> Results<T> {
    let mut results = Results::default();
    for file in files {
        results.add(file.display(), json, work(file));
    }
    results
}

impl<T> Results<T> {
    /// Books what came of one thing. A failure is told at once on standard error, unless `json` will tell it.
    pub(super) fn add(&mut self, key: impl Display, json: bool, result: Result<T, Failure>) {
        match result {
            Ok(value) => self.done.push(value),
            Err(failure) => {
                if !json {
                    // Nothing is left to do when standard error is closed.
                    let _ = writeln!(std::io::stderr(), "{failure}");
                }
                self.failed.push((key.to_string(), failure));
            }
        }
    }

    /// The status of the first failure.
    pub(super) fn exit(&self) -> Exit {
        self.failed.first().map_or(Exit::Ok, |(_, failure)| failure.exit)
    }

    /// The failures, for JSON: each with what it is of, under the name `key`.
    pub(super) fn errors(&self, key: &str) -> Vec<serde_json::Value> {
        let one = |(of, failure): &(String, Failure)| {
            let mut error = failure.to_json();
            error[key] = of.as_str().into();
            error
        };
        self.failed.iter().map(one).collect()
    }
}
