//! Another configuration, while hosts are connected.
//!
//! ```text
//!   Reload --(files that are being let go)--> pin, open, publish --> exports that go: drain --all, or a deadline--> report
//! ```
//!
//! What is drained is let go; what is not, when the deadline passes, later: its file stays pinned until then.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::Server;
use super::device::fence_lost;
use super::set_up::publish;
use crate::config::{Config, RestartReason};
use crate::control::error::ServeError;
use crate::control::event::ReloadReport;
use crate::control::provider::Unfit;
use crate::extent::{NoProgress, lease_break_time};
use crate::fabrics::{Export, ExportSlot};

/// Part of /proc/sys/fs/lease-break-time that the exports which a reload removes may take to drain before it is reported
/// without them.
const RETIRE_SHARE: f64 = 0.25;
/// How long a reload waits for files that are being let go, which it is to pin anew.
const LEAVING_PATIENCE: Duration = Duration::from_secs(5);

/// Where the answer to a reload goes.
pub(super) type Reply = Sender<Result<ReloadReport, ServeError>>;

/// A reload that was asked for.
pub(super) struct Asked {
    config: Box<Config>,
    reply: Reply,
    /// Not before this time, while files are being let go.
    patience: Instant,
}

/// A reload that is carried out, but for the exports that go.
pub(super) struct Reloaded {
    report: ReloadReport,
    reply: Reply,
    going: Vec<ExportSlot>,
    deadline: Instant,
}

impl Server {
    /// A reload is asked for.
    pub(super) fn reload_asked(&mut self, config: Box<Config>, reply: Reply) {
        self.asked.push_back(Asked { config, reply, patience: Instant::now() + LEAVING_PATIENCE });
        self.go_on_with_reloads();
    }

    /// Carries out what was asked for, and reports what is done.
    pub(super) fn go_on_with_reloads(&mut self) {
        while let Some(first) = self.asked.front() {
            if self.provider.is_letting_go() && Instant::now() < first.patience {
                break;
            }
            let Some(Asked { config, reply, .. }) = self.asked.pop_front() else { break };
            match self.reload(*config) {
                Ok((report, going)) => {
                    let deadline = Instant::now() + lease_break_time().mul_f64(RETIRE_SHARE);
                    self.reloaded.push(Reloaded { report, reply, going, deadline });
                }
                // Whoever asked may have lost patience; here, and below.
                Err(error) => drop(reply.send(Err(error))),
            }
        }
        let now = Instant::now();
        let drains = &self.drains;
        let is_done =
            |it: &mut Reloaded| it.deadline <= now || !it.going.iter().any(|slot| drains.is_under_way(*slot));
        let done: Vec<_> = self.reloaded.extract_if(.., is_done).collect();
        for Reloaded { report, reply, going, .. } in done {
            let left = going.iter().filter(|slot| self.drains.is_under_way(**slot)).count();
            if left > 0 {
                tracing::error!(
                    exports = left,
                    "removed exports did not drain; their files stay pinned until they do"
                );
            }
            let _ = reply.send(Ok(report));
        }
    }

    /// When there is something to go on with, though nothing happens.
    pub(super) fn reloads_due(&self) -> Option<Instant> {
        let asked = self.asked.iter().map(|it| it.patience);
        asked.chain(self.reloaded.iter().map(|it| it.deadline)).min()
    }

    /// Lets go of what only exports stood on that are gone and drained.
    pub(super) fn retire_drained(&mut self) {
        let Some(cores) = &self.cores else { return };
        let drains = &self.drains;
        let is_drained = |export: &mut Arc<Export>| !drains.is_under_way(export.slot);
        let drained: Vec<_> = self.retiring.extract_if(.., is_drained).collect();
        if drained.is_empty() {
            return;
        }
        for export in &drained {
            cores.close(export.slot);
            self.provider.disarm(export);
        }
        self.provider.release_unnamed(&self.backings, self.retiring.iter());
        // What only removed exports stood on is let go of by now.
        self.provider.disks().settle();
    }

    /// Carries out what can be changed while hosts are connected: with it come the exports that are to be drained.
    fn reload(&mut self, new: Config) -> Result<(ReloadReport, Vec<ExportSlot>), ServeError> {
        let mut needs_restart = Config::changes(&self.config, &new).restart;
        // Controllers come and go with reloads, but what the buffers are was settled at the start.
        needs_restart.retain(|reason| *reason != RestartReason::SharedBuffers);
        if new.shares_buffers() && !self.shares_buffers {
            needs_restart.push(RestartReason::SharedBuffers);
        }
        let config = new.keeping(&self.config);
        let cores = self.cores.as_ref().ok_or(ServeError::CoreLost)?;
        let published =
            self.provider.back(&config, &self.backings, Unfit::Fails, &mut NoProgress).and_then(|backings| {
                let published =
                    publish(&self.target, cores, &self.provider, &backings, &config, &self.ports)?;
                Ok((backings, published))
            });
        let (backings, published) = match published {
            Ok(done) => done,
            Err(error) => {
                // Nothing has changed for the hosts; what was pinned for nothing goes.
                self.provider.release_unnamed(&self.backings, self.retiring.iter());
                return Err(error);
            }
        };
        fence_lost(&self.target, &mut self.provider);
        // From here on the new configuration is served, whatever becomes of the old exports: were it forgotten, the
        // next reload that fails would let go of files that hosts use.
        (self.config, self.backings) = (config, backings);
        self.tell_hidden();
        let report = ReloadReport {
            added: published.added.len(),
            removed: published.removed.len(),
            kept: published.kept.len(),
            needs_restart,
        };
        let going: Vec<_> = published.removed.iter().map(|export| export.slot).collect();
        going.iter().for_each(|slot| self.drains.begin(cores, *slot));
        self.retiring.extend(published.removed);
        if going.is_empty() {
            // A file that was let go, and is named no more, had no exports to wait for.
            self.provider.release_unnamed(&self.backings, self.retiring.iter());
            self.provider.disks().settle();
        }
        Ok((report, going))
    }
}
