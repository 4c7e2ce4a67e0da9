//! An earlier fastice as a peer: a copy of its executable, as it was, told to serve the same namespace with the same options.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::daemon::{Daemon, Place, version_of};
use super::process::configuration;
use super::{Served, process};

/// What rows call it, without its version.
pub(super) const NAME: &str = "fastice's previous release";
/// Where the executable is, when it is not the one that `bench/run.sh` keeps.
const PROGRAM: &str = "FASTICE_BENCH_PREVIOUS";
/// Where `bench/run.sh` keeps it, beside the directory of this program; a file beside it says of which commit it is.
const KEPT: &str = "bench/previous/fastice";

/// An executable that was found.
#[derive(Clone, Debug)]
pub(super) struct Previous {
    program: PathBuf,
    pub(super) name: String,
}

impl Previous {
    /// Finds it; the error says why not.
    pub(super) fn find() -> Result<Self> {
        let program = match env::var_os(PROGRAM) {
            Some(program) => PathBuf::from(program),
            None => {
                let this = env::current_exe().context("which program this is")?;
                let kept = this.ancestors().nth(2).map(|target| target.join(KEPT));
                kept.filter(|kept| kept.is_file()).with_context(|| {
                    format!("no run before this one has left it, and {PROGRAM} names none")
                })?
            }
        };
        let commit = fs::read_to_string(program.with_extension("commit")).ok();
        let name = name(&version_of(&program)?, commit.as_deref());
        Ok(Self { program, name })
    }

    /// Starts it on the first processor; this thread then has the last.
    pub(super) fn start(&self, served: Served) -> Result<PreviousProcess> {
        let Some(namespace) = process::namespace_of(served) else {
            bail!("it is not asked for this namespace")
        };
        let place = Place::new()?;
        let (config, state) = (place.path("fastice.toml"), place.path("state"));
        fs::create_dir(&state)?;
        let text = configuration(&namespace, &state, place.processors[0], place.address);
        fs::write(&config, format!("log = \"warn\"\n{text}"))?;
        let mut command = Command::new(&self.program);
        let daemon = place.start(command.args(["serve", "--config"]).arg(&config))?;
        Ok(PreviousProcess { daemon, program: self.program.clone() })
    }
}

/// `fastice 0.1.0, abc1234`.
fn name(version: &str, commit: Option<&str>) -> String {
    let commit = commit.map(str::trim).filter(|commit| !commit.is_empty());
    format!("{}{}", version.trim(), commit.map_or(String::new(), |commit| format!(", {commit}")))
}

/// One that runs as long as this lives.
#[derive(Debug)]
pub(super) struct PreviousProcess {
    pub(super) daemon: Daemon,
    program: PathBuf,
}

impl PreviousProcess {
    /// Microseconds for which its cores were busy so far; `None` when it is too old to tell.
    pub(super) fn busy_us(&self) -> Result<Option<f64>> {
        status(&self.program, &self.daemon.path("state")).map(|status| busy_us(&status))
    }
}

fn status(program: &Path, state: &Path) -> Result<Value> {
    let told = Command::new(program).args(["status", "--json", "--state-dir"]).arg(state).output()?;
    Ok(serde_json::from_slice(&told.stdout).unwrap_or(Value::Null))
}

fn busy_us(status: &Value) -> Option<f64> {
    let cores = status.get("targets")?.get(0)?.get("cores")?.as_array()?;
    let each = cores.iter().map(|core| core.get("busy_us")?.as_f64());
    each.sum::<Option<f64>>().filter(|_| !cores.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn it_is_called_by_its_version_and_its_commit_where_that_is_known() {
        assert_eq!(name("fastice 0.1.0\n", Some("abc1234\n")), "fastice 0.1.0, abc1234");
        assert_eq!(name("fastice 0.1.0\n", None), "fastice 0.1.0");
    }

    #[test]
    fn how_busy_it_was_is_the_sum_of_its_cores_or_not_known() {
        let told = json!({"targets": [{"cores": [{"busy_us": 3}, {"busy_us": 4}]}]});
        assert_eq!(busy_us(&told), Some(7.0));
        for old in [json!({"targets": [{"cores": [{"cpu": 0}]}]}), json!({"targets": []}), Value::Null] {
            assert_eq!(busy_us(&old), None, "{old}");
        }
    }
}
