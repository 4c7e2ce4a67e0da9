//! `fastice serve`: the target, in the foreground, until it is told to end.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::exit::{Exit, Failure, Outcome};
use super::files::exit_of;
use super::log::{self, LogArgs, LogHandle};
use super::many::Results;
use super::out::Out;
use super::service::Service;
use super::sys::{Asked, StopSignals, Wake};
use crate::config::{Config, ConfigError};
use crate::control::{self, DiskError, Running, ServeError, check_guards, check_listener};
use crate::extent::Progress;
use crate::fabrics::TargetError;

/// Where the configuration is when nobody says.
pub const DEFAULT_CONFIG: &str = "/etc/fastice/fastice.toml";
/// How the line begins that tells on standard output that hosts can connect; the addresses follow.
pub(super) const READY: &str = "ready: ";
/// How often is looked whether the target has ended by itself.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);

/// Serve the files of a configuration, until SIGTERM or Ctrl-C
///
/// Logs go to standard error; when hosts can connect, a line `ready: ADDRESS...` goes to standard output, and a service
/// manager that wants to know (Type=notify) is told. A file that cannot be served does not keep the others from it: it is
/// told of as an error, and its namespace stays fenced until a reload has more luck. SIGTERM and Ctrl-C drain, tell the hosts and let go of the files; those that `fastice pin` had pinned before stay immutable.
/// SIGHUP reads the configuration again: hosts, subsystems, namespaces and the log level change live, the rest at the
/// next start.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// The configuration
    #[arg(long, short, value_name = "FILE", env = "FASTICE_CONFIG", default_value = DEFAULT_CONFIG)]
    pub config: PathBuf,
    /// Check the configuration and end: also whether its files can have their guards beside each other, as the filesystems are mounted
    /// now. `fastice doctor` looks at the files themselves
    #[arg(long)]
    pub check: bool,
    /// Fail to start when any file cannot be served, instead of serving the others (also `strict = true`)
    #[arg(long)]
    pub strict: bool,
}

impl ServeArgs {
    fn load(&self) -> Result<Config, ConfigError> {
        let config = Config::load(&self.config)?;
        Ok(Config { strict: config.strict || self.strict, ..config })
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let remedy = error.remedy();
        let failure = match error {
            ServeError::Extent(error) => return error.into(),
            error @ ServeError::Target(TargetError::Geometry { .. }) => {
                let remedy = "leave `block_size` out, or pad the file with `prepare = true` (unpin it first)";
                return Self::new(Exit::Refused, error).with_remedy(remedy);
            }
            ServeError::Device { ref source, .. } => Self::new(exit_of_disk(source), error),
            ServeError::Congestion { ref source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Self::new(Exit::Usage, error)
            }
            ServeError::Listen { ref source, .. } | ServeError::Congestion { ref source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Self::new(Exit::Permission, error)
            }
            error => Self::new(Exit::Failed, error),
        };
        Self { remedy, ..failure }
    }
}

/// The exit status that a device ends a start with: what is not forbidden, and no map that differs, is not fit.
fn exit_of_disk(error: &DiskError) -> Exit {
    match error {
        DiskError::MapChanged { .. } => Exit::Differs,
        DiskError::Extent(error) => match exit_of(error) {
            exit @ (Exit::Permission | Exit::Differs) => exit,
            _ => Exit::Refused,
        },
        error if error.is_forbidden() => Exit::Permission,
        _ => Exit::Refused,
    }
}

/// Serves.
///
/// # Errors
/// When the configuration is wrong, or something stands in the way of serving, or the target does not end in order.
pub fn run(args: &ServeArgs, logs: &LogArgs) -> Outcome {
    let config = args.load()?;
    let log =
        log::start(logs, config.log, config.log_format).map_err(|error| Failure::new(Exit::Usage, error))?;
    let mut out = Out::stdout();
    if args.check {
        config.listeners.iter().try_for_each(check_listener)?;
        let refused = check_guards(&config)?;
        if !refused.is_empty() {
            let mut results = Results::<()>::default();
            for error in refused {
                results.add(args.config.display(), false, Err(error.into()));
            }
            return Ok(results.exit());
        }
        out.line(format!("{}: good", args.config.display()))?;
        out.flush()?;
        return Ok(Exit::Ok);
    }
    // Before any thread starts, so that none of them is interrupted.
    let signals = StopSignals::take()?;
    let running = control::start(config, &mut LoggedProgress::default())?;
    let addresses: Vec<String> = running.addresses().iter().map(ToString::to_string).collect();
    out.line(format!("{READY}{}", addresses.join(" ")))?;
    out.flush()?;
    let mut service = Service::default();
    service.ready(running.served());
    wait(args, &log, &signals, &running, &mut service)?;
    service.stopping();
    running.stop(Running::STOP_PATIENCE)?;
    Ok(Exit::Ok)
}

/// Returns when somebody asks the target to end, or when it has ended by itself.
fn wait(
    args: &ServeArgs,
    log: &LogHandle,
    signals: &StopSignals,
    running: &Running,
    service: &mut Service,
) -> Result<(), Failure> {
    loop {
        service.serves(running.served());
        match signals.wait(&[], Some(HEALTH_INTERVAL))? {
            Wake::Asked(Asked::Stop) => return Ok(()),
            Wake::Asked(Asked::Reload) => reload(args, log, running),
            // Why it has ended is what stopping it returns.
            Wake::Timeout | Wake::Readable(_) if running.has_ended() => return Ok(()),
            Wake::Timeout | Wake::Readable(_) => {}
        }
    }
}

/// Reads the configuration again. Whatever is wrong with it, what was served is served on.
fn reload(args: &ServeArgs, log: &LogHandle, running: &Running) {
    let config = match args.load() {
        Ok(config) => config,
        Err(error) => {
            // Mistakes in it are shown with their lines, and no other remedy is needed.
            let told = match Failure::from(error) {
                failure if failure.exit == Exit::Usage && failure.remedy.is_none() => {
                    format!("\n{}", failure.error)
                }
                failure => format!(" {}", Failure { remedy: None, ..failure }.to_line()),
            };
            tracing::error!("the configuration stays as it was:{told}");
            return;
        }
    };
    if let Err(error) = config.listeners.iter().try_for_each(check_listener) {
        tracing::error!("the configuration stays as it was: {}", Failure::from(error).to_line());
        return;
    }
    let level = config.log;
    match running.reload(config) {
        Ok(report) => {
            if let Err(error) = log.set_level(level) {
                tracing::error!("{error:#}");
            }
            let (added, removed, kept) = (report.added, report.removed, report.kept);
            tracing::info!(added, removed, kept, "configuration reloaded");
            for reason in report.needs_restart {
                tracing::warn!("{reason} changed in the configuration, which takes effect at the next start");
            }
        }
        Err(error) => {
            tracing::error!("the configuration stays as it was: {}", Failure::from(error).to_line());
        }
    }
}

/// The stages of pinning, as log lines.
#[derive(Default)]
struct LoggedProgress {
    stage: String,
    told_tenths: u64,
}

impl Progress for LoggedProgress {
    fn stage(&mut self, name: &str) {
        name.clone_into(&mut self.stage);
        self.told_tenths = 0;
        tracing::debug!("{name}");
    }

    /// Every tenth of what takes long.
    fn advance(&mut self, done: u64, total: u64) {
        let tenths = done.saturating_mul(10).checked_div(total).unwrap_or_default();
        if tenths > self.told_tenths {
            self.told_tenths = tenths;
            tracing::info!("{}: {} %", self.stage, tenths.saturating_mul(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::ExtentError;

    #[test]
    fn what_is_forbidden_and_what_differs_have_their_own_exit_statuses() {
        let listen = |kind: io::ErrorKind| ServeError::Listen {
            address: "127.0.0.1:420".parse().expect("an address"),
            source: kind.into(),
        };
        let congestion = |kind: io::ErrorKind| ServeError::Congestion {
            address: "127.0.0.1:420".parse().expect("an address"),
            name: "vegas".into(),
            source: kind.into(),
        };
        for (kind, status, remedy) in [
            (io::ErrorKind::NotFound, Exit::Usage, "modprobe tcp_vegas"),
            (io::ErrorKind::PermissionDenied, Exit::Permission, "CAP_NET_ADMIN"),
        ] {
            let failure = Failure::from(congestion(kind));
            assert_eq!(failure.exit, status);
            assert!(failure.remedy.is_some_and(|told| told.contains(remedy)), "{remedy}");
        }
        let device = |source| ServeError::Device { nqn: "nqn".into(), nsid: 1, source: Box::new(source) };
        let exit = |error: ServeError| Failure::from(error).exit;
        assert_eq!(exit(listen(io::ErrorKind::PermissionDenied)), Exit::Permission);
        assert_eq!(exit(listen(io::ErrorKind::AddrInUse)), Exit::Failed);
        assert_eq!(exit(device(DiskError::MapChanged { path: "/x".into() })), Exit::Differs);
        let few = DiskError::QueuePairs { way: "vfio".into(), grants: 1, needs: 2, namespaces: 1 };
        assert_eq!(exit(device(few)), Exit::Refused);
        let lost = |is_forbidden| DiskError::NotFound {
            disk: "nvme0n1".into(),
            told: "S1".into(),
            tried: "nothing".into(),
            unbound: Vec::new(),
            is_forbidden,
        };
        assert_eq!(exit(device(lost(true))), Exit::Permission);
        assert_eq!(exit(device(lost(false))), Exit::Refused);
        let io = |kind: io::ErrorKind| {
            DiskError::Extent(ExtentError::Io { action: "open", path: "/x".into(), source: kind.into() })
        };
        assert_eq!(exit(device(io(io::ErrorKind::PermissionDenied))), Exit::Permission);
        assert_eq!(exit(device(io(io::ErrorKind::InvalidInput))), Exit::Refused);
    }
}
