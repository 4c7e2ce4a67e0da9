//! Another configuration, while hosts are connected.

use std::time::Instant;

use super::Server;
use super::device::fence_lost;
use super::set_up::publish;
use crate::config::Config;
use crate::control::error::ServeError;
use crate::control::event::ReloadReport;
use crate::extent::{NoProgress, lease_break_time};

/// Part of /proc/sys/fs/lease-break-time that the exports which a reload removes may take to drain before they are left to
/// themselves.
const RETIRE_SHARE: f64 = 0.25;

impl Server {
    /// Carries out what can be changed while hosts are connected.
    pub(super) fn reload(&mut self, new: Config) -> Result<ReloadReport, ServeError> {
        let changes = Config::changes(&self.config, &new);
        let config = Config {
            state_dir: self.config.state_dir.clone(),
            watch: self.config.watch,
            cores: self.config.cores.clone(),
            buffer_memory: self.config.buffer_memory,
            poll: self.config.poll,
            listeners: self.config.listeners.clone(),
            ..new
        };
        let cores = self.cores.as_ref().ok_or(ServeError::CoreLost)?;
        let published = self.provider.back(&config, &self.backings, &mut NoProgress).and_then(|backings| {
            let published = publish(&self.target, cores, &backings, &config, &self.ports)?;
            Ok((backings, published))
        });
        let (backings, published) = match published {
            Ok(done) => done,
            Err(error) => {
                // Nothing has changed for the hosts; what was pinned for nothing goes.
                self.provider.release_unnamed(&self.backings);
                return Err(error);
            }
        };
        self.provider.arm(&published.added);
        fence_lost(&self.target, &mut self.provider);
        // From here on the new configuration is served, whatever becomes of the old exports: were it forgotten, the
        // next reload that fails would let go of files that hosts use.
        (self.config, self.backings) = (config, backings);
        // One deadline for all: a recall that comes meanwhile is fenced, but waits here to be let go.
        let deadline = Instant::now() + lease_break_time().mul_f64(RETIRE_SHARE);
        for export in &published.removed {
            if !cores.retire(export.slot, deadline) {
                tracing::error!(nsid = %export.nsid, "removed export did not drain; its file stays pinned");
                self.provider.hold(export);
            }
        }
        self.provider.release_unnamed(&self.backings);
        // What only removed exports stood on is let go of by now.
        self.provider.disks().settle();
        Ok(ReloadReport {
            added: published.added.len(),
            removed: published.removed.len(),
            kept: published.kept.len(),
            needs_restart: changes.restart,
        })
    }
}
