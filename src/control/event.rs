//! The messages that reach the control thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::disks::NvmeKey;
use super::error::{DiskError, ServeError};
use super::status::Status;
use super::trace::Copies;
use super::tripwire::Tripwire;
use crate::block::nvme::{Epoch, NvmeChange};
use crate::config::{Config, RestartReason};
use crate::extent::{Baseline, Incident};
use crate::fabrics::ExportSlot;

/// What the control thread is asked for, or told.
pub(super) enum Event {
    /// Somebody wants a pinned file back; its export is fenced already.
    Recalled {
        /// The pin.
        wire: Arc<Tripwire>,
        /// Why.
        incident: Incident,
    },
    /// A file that was in doubt was looked at again, with its export fenced and drained.
    Looked {
        /// The pin.
        wire: Arc<Tripwire>,
        /// The doubt.
        incident: Incident,
        /// What it is like, or what is not as it was.
        looked: Result<Baseline, String>,
    },
    /// A core has no command of a fenced export in flight any more.
    Drained {
        /// Which export.
        slot: ExportSlot,
    },
    /// A file that was recalled is let go.
    LetGo {
        /// Which.
        path: PathBuf,
    },
    /// A device of our driver is lost, and its exports are fenced already; or it is back.
    Device {
        /// Which.
        key: NvmeKey,
        /// What became of it.
        change: NvmeChange,
    },
    /// Whether a device that is back is the one that was lost.
    Verdict {
        /// Which.
        key: NvmeKey,
        /// Of which appearance.
        epoch: Epoch,
        /// What was found.
        verdict: Result<(), DiskError>,
    },
    /// What it is doing.
    Status {
        /// Whether histograms are wanted too.
        histograms: bool,
        /// Where the answer goes.
        reply: Sender<Box<Status>>,
    },
    /// Its last commands.
    Trace {
        /// Where the cores' answers come.
        reply: Sender<Copies>,
    },
    /// Serve another configuration.
    Reload {
        /// The new one.
        config: Box<Config>,
        /// Where the answer goes.
        reply: Sender<Result<ReloadReport, ServeError>>,
    },
    /// End everything.
    Stop {
        /// How long commands under way may take.
        patience: Duration,
        /// Where the answer goes.
        reply: Sender<Result<(), ServeError>>,
    },
}

/// What a reload did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReloadReport {
    /// Exports that are new.
    pub added: usize,
    /// Exports that are gone.
    pub removed: usize,
    /// Exports that hosts use on without noticing.
    pub kept: usize,
    /// What stays as it was until the next start.
    pub needs_restart: Vec<RestartReason>,
}
