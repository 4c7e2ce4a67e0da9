//! The configuration of `fastice serve`: one TOML file, read strictly.
//!
//! ```text
//!   text --toml--> raw (every value with its place) --check--> Config (typed, complete)
//!                     |                                  |
//!                     +---- ConfigError: file:line:column, reason, the line, a caret
//! ```
//!
//! A key that is not known is refused, and so is a key that would have no effect where it stands: a misspelt
//! `hosts` must never open an export to everybody. What `toml` refuses (bad syntax, a key or a word that is not
//! known) ends the reading and is reported alone; all that is found after it is reported at once. What the module
//! does not do: it opens no file but the configuration itself, so whether a file can be pinned is found by
//! `extent`, and whether an address can be bound, by the listener.
//!
//! The keys are described for operators in `docs/USER.md`.

mod changes;
mod check;
mod controllers;
mod error;
mod listeners;
mod nqn;
mod raw;
mod size;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use changes::{Changes, LiveChange, RestartReason};
pub use check::HostFacts;
pub use error::{ConfigError, Problem};
pub use nqn::{DISCOVERY_NQN, Nqn, NqnError};
use serde::{Deserialize, Serialize};
pub use size::{SizeError, format_size, parse_size};

use crate::block::nvme::NvmeWay;
use crate::extent::NamespaceIdentity;
use crate::extent::{GuardMode, LocalReaders};
use crate::fabrics::FencePolicy;
use crate::units::{BlockSize, ByteLen};

/// Where `fastice` keeps its records when the configuration does not say.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/fastice";
/// The I/O buffers of one core when the configuration does not say: 64 MiB.
pub const DEFAULT_BUFFER_MEMORY: ByteLen = ByteLen(64 << 20);
/// How long an adaptive core spins without work before it sleeps, when the configuration does not say.
pub const DEFAULT_IDLE_AFTER: Duration = Duration::from_micros(50);
/// How far apart commands may be for an adaptive core to poll on between them, when the configuration does not say.
pub const DEFAULT_LINGER: Duration = Duration::from_millis(60);
/// How long commands of a host that is slower than its core are gathered at the most, when the configuration does not say.
pub const DEFAULT_GATHER: Duration = Duration::from_micros(32);
/// The model number that hosts see when the configuration does not say.
pub const DEFAULT_MODEL: &str = "fastice";
/// The highest namespace identifier that may be configured.
pub const NSID_MAX: u32 = 1024;
/// The largest configuration file that is read, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// A part of one processor, in hundredths of a per cent: from 1 to 10000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchShare(u32);

impl Default for WatchShare {
    /// One per cent.
    fn default() -> Self {
        Self(100)
    }
}

impl WatchShare {
    /// `None` when it is below 0.01 or above 100.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just before")]
    pub fn of_percent(percent: f64) -> Option<Self> {
        (0.01..=100.0).contains(&percent).then(|| Self((percent * 100.0).round() as u32))
    }

    /// As a part of 1.
    #[must_use]
    pub fn part(self) -> f64 {
        f64::from(self.0) / 10_000.0
    }
}

/// A checked configuration. Every default is filled in, so that two files that mean the same compare equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The directory of the pin records and stored maps; absolute.
    pub state_dir: PathBuf,
    /// The CPUs that run a reactor, ascending, each allowed to this process; at least one.
    pub cores: Vec<u32>,
    /// I/O buffer memory of each core: a multiple of 2 MiB.
    pub buffer_memory: ByteLen,
    /// What a core does when it has no work.
    pub poll: PollMode,
    /// For how long the socket of a host that is slower than its core is left alone at the most, so that commands come together.
    pub gather: Duration,
    /// How much of one processor watching pinned files may take.
    pub watch: WatchShare,
    /// Whether a start fails when any file cannot be served, instead of leaving that one aside.
    pub strict: bool,
    /// How much is logged.
    pub log: LogLevel,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Where metrics are told, over HTTP; `None` for nowhere. No listener's address.
    pub metrics: Option<SocketAddr>,
    /// The addresses to listen on, in file order; at least one.
    pub listeners: Vec<Listener>,
    /// The NVMe controllers that fastice may drive itself, in file order; the ways to them are distinct. At least one when
    /// a namespace says `device = "nvme"`.
    pub nvme: Vec<NvmeChoice>,
    /// The subsystems, in file order; NQNs are distinct.
    pub subsystems: Vec<Subsystem>,
}

/// What a core does when it has no work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollMode {
    /// Spin for `idle_after`, then sleep until something happens; but not between commands that come often.
    Adaptive {
        /// The time without work after which the core sleeps.
        idle_after: Duration,
        /// Commands come often when they are no further apart than this.
        linger: Duration,
    },
    /// Never sleep: lowest latency, a whole CPU.
    Always,
}

/// How much is logged. There is no `trace`: release builds compile it out.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Only what failed.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what an operator wants to see: starts, stops, hosts coming and going.
    #[default]
    Info,
    /// And what helps to find a fault.
    Debug,
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        })
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// One listening address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where to listen; port 0 asks the kernel for a free one.
    pub address: SocketAddr,
    /// Only the discovery subsystem answers here.
    pub discovery_only: bool,
    /// The address that the discovery log names instead of the one listened on.
    pub advertise: Option<IpAddr>,
    /// The kernel's name of the congestion control that its connections are to have; without one as
    /// [`Congestion::choose`](crate::tcp::congestion::Congestion::choose) chooses.
    pub congestion_control: Option<String>,
}

/// An NVMe controller that fastice may take and drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeChoice {
    /// How it is reached; `None` when any controller will do that user space has and whose namespace says this.
    pub way: Option<NvmeWay>,
    /// What its namespace must say of itself. Where the kernel's disk tells no identifiers to compare with, the operator
    /// vouches by them that the namespace is that disk.
    pub identity: NamespaceIdentity,
}

/// One NVM subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subsystem {
    /// Its name.
    pub nqn: Nqn,
    /// Serial number: 1 to 20 printable ASCII characters.
    pub serial: String,
    /// Model number: 1 to 40 printable ASCII characters.
    pub model: String,
    /// Who may connect.
    pub hosts: Hosts,
    /// The namespaces, by ascending identifier, which are distinct.
    pub namespaces: Vec<Namespace>,
}

/// Who may connect to a subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hosts {
    /// Every host that reaches a listener.
    Any,
    /// The hosts of these NQNs; at least one, distinct, in file order.
    List(Vec<Nqn>),
}

/// One namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its identifier: 1 to [`NSID_MAX`].
    pub nsid: u32,
    /// What stores its blocks.
    pub backing: Backing,
    /// Hosts may not write.
    pub read_only: bool,
    /// What hosts see of a fence.
    pub on_fence: FencePolicy,
    /// The logical block size; `None` means that of the device (4096 for `memory` and `null`).
    pub block_size: Option<BlockSize>,
}

impl Namespace {
    /// Whether a file stores its blocks.
    #[must_use]
    pub const fn is_of_a_file(&self) -> bool {
        matches!(self.backing, Backing::File { .. })
    }
}

/// What stores the blocks of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// The blocks of a pinned file.
    File {
        /// The file; absolute.
        path: PathBuf,
        /// How its device is reached.
        device: DeviceWay,
        /// Fill holes, unshare and pad the file before it is pinned.
        prepare: bool,
        /// Set the file's modification time when it is let go: what hosts wrote does not change it.
        update_mtime: bool,
        /// Which guards hold the file; `None` leaves it to its record, if there is one.
        guard: Option<GuardMode>,
        /// Whether local processes may read the file; `None` leaves it to its record, if there is one.
        local_readers: Option<LocalReaders>,
    },
    /// Memory, lost when the target ends: for benches.
    Memory {
        /// Its length: a multiple of the block size.
        len: ByteLen,
    },
    /// Nothing: writes vanish, reads give zeros. For benches.
    Null {
        /// Its length: a multiple of the block size.
        len: ByteLen,
    },
}

/// How the device under a file is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceWay {
    /// `io_uring` and direct I/O on the block device under the mounted filesystem.
    #[default]
    Uring,
    /// Our own driver, on a controller of `[[nvme]]` that has the namespace under the filesystem.
    Nvme,
    /// `io_uring` and direct I/O for a file that was pinned before its filesystem was unmounted: its device is held exclusively,
    /// so that nobody mounts it, and the recorded map is served when the device itself holds it.
    Unmounted,
    /// By our own driver, for a file that was pinned before its filesystem was unmounted and its controller taken from the
    /// kernel: the recorded map is served when the device itself holds it.
    HandedOver,
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be read, is not UTF-8 or TOML, or says what cannot be done; the error names the place.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let bytes = error::read(path).map_err(|source| ConfigError::read(&name, source))?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Self::parse(text, &name),
            Err(bad) => Err(ConfigError::not_utf8(&name, &bytes, bad.valid_up_to())),
        }
    }

    /// Checks `text`; `name` is what errors call it. Core numbers are held against those this process may use.
    ///
    /// # Errors
    /// As [`Config::load`], but for the reading.
    pub fn parse(text: &str, name: &str) -> Result<Self, ConfigError> {
        Self::parse_for(text, name, &HostFacts::of_this_process())
    }

    /// As [`Config::parse`], for a host with the facts given: the same text then always gives the same result.
    ///
    /// # Errors
    /// As [`Config::parse`].
    pub fn parse_for(text: &str, name: &str, host: &HostFacts) -> Result<Self, ConfigError> {
        let raw: raw::RawConfig =
            toml::from_str(text).map_err(|error| ConfigError::syntax(name, text, &error))?;
        check::check(raw, host).map_err(|findings| ConfigError::invalid(name, text, findings))
    }

    /// What a reload from `old` to `new` changes, and what of it needs a restart.
    #[must_use]
    pub fn changes(old: &Self, new: &Self) -> Changes {
        changes::changes(old, new)
    }

    /// This configuration with all that takes effect at a start as `running` has it: what is served once it was reloaded, and what the next
    /// reload is to be compared with.
    #[must_use]
    pub fn keeping(self, running: &Self) -> Self {
        changes::kept(running, self)
    }

    /// Whether a controller in another process must be able to reach the buffers.
    #[must_use]
    pub fn shares_buffers(&self) -> bool {
        self.nvme.iter().any(|choice| matches!(choice.way, Some(NvmeWay::VfioUser(_))))
    }

    /// Every file that is served, with whether it is to be prepared, in file order.
    pub fn files(&self) -> impl Iterator<Item = (&Path, bool)> {
        self.subsystems.iter().flat_map(|subsystem| &subsystem.namespaces).filter_map(|namespace| {
            match &namespace.backing {
                Backing::File { path, prepare, .. } => Some((path.as_path(), *prepare)),
                Backing::Memory { .. } | Backing::Null { .. } => None,
            }
        })
    }
}

/// Feeds arbitrary bytes to the parser: neither parsing nor printing the outcome may panic, and what passes keeps
/// the promises of [`Config`]. The body of the fuzz target, and of the test that replays its corpus.
///
/// # Panics
/// When a promise is broken: that is what a fuzzer looks for.
pub fn fuzz_config(data: &[u8]) {
    let host = HostFacts { allowed_cores: vec![0, 1, 2, 3] };
    let Ok(text) = std::str::from_utf8(data) else {
        let bad = std::str::from_utf8(data).map_or_else(|error| error.valid_up_to(), str::len);
        assert!(!ConfigError::not_utf8("fuzz", data, bad).to_string().is_empty());
        return;
    };
    match Config::parse_for(text, "fuzz", &host) {
        Err(error) => {
            assert!(!error.problems().is_empty());
            assert!(error.to_string().starts_with("fuzz"));
        }
        Ok(config) => {
            assert!(Config::changes(&config, &config).is_empty());
            assert!(!config.cores.is_empty() && !config.listeners.is_empty());
            for (at, choice) in config.nvme.iter().enumerate() {
                let mut later = config.nvme.iter().skip(at + 1);
                assert!(choice.way.is_none() || later.all(|other| other.way != choice.way));
            }
            for subsystem in &config.subsystems {
                assert!(subsystem.namespaces.is_sorted_by(|a, b| a.nsid < b.nsid));
                assert!(subsystem.namespaces.iter().all(|ns| (1..=NSID_MAX).contains(&ns.nsid)));
                assert!(!matches!(&subsystem.hosts, Hosts::List(list) if list.is_empty()));
            }
        }
    }
}

#[cfg(test)]
mod tests;
