//! What the server says of itself when it is asked.

use super::Server;
use crate::block::nvme::Standing;
use crate::control::status::{DeviceStatus, ExportStatus, HostStatus, Status, WatchStatus};
use crate::fabrics::{Export, Grant};

impl Server {
    pub(super) fn status(&self) -> Status {
        let exports = self.target.exports();
        let hosts = self.target.controllers().into_iter().map(|it| HostStatus {
            host: it.host,
            subsystem: it.subsystem,
            cntlid: it.cntlid,
            io_queues: it.io_queues,
            commands: it.commands,
            read_bytes: it.read_bytes,
            written_bytes: it.written_bytes,
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            exports: exports.iter().map(|export| self.export_status(export)).collect(),
            hosts: hosts.collect(),
            fences: self.fences.status(),
            devices: self.devices(),
            metrics: self.metrics.as_ref().map(|metrics| metrics.address().to_string()),
        }
    }

    fn devices(&self) -> Vec<DeviceStatus> {
        let state = |standing| match standing {
            Standing::Proven(_) => "proven",
            Standing::Unproven(_) => "unproven",
            Standing::Lost => "lost",
        };
        let all = self.provider.nvme_standings().into_iter();
        all.map(|(device, nsid, standing)| DeviceStatus { device, nsid, state: state(standing).to_owned() })
            .collect()
    }

    fn export_status(&self, export: &Export) -> ExportStatus {
        let (grant, reason) = match export.grant() {
            Grant::Live => ("live", None),
            Grant::Fenced(reason) => ("fenced", Some(format!("{reason:?}"))),
            Grant::Removed => ("removed", None),
        };
        let map = export.map.as_ref();
        ExportStatus {
            subsystem: export.subsystem.to_string(),
            nsid: export.nsid.0,
            path: map.map(|map| map.identity().path.clone()),
            grant: grant.to_owned(),
            reason,
            generation: map.map(|map| map.generation()),
            extents: map.map(|map| map.extent_count()),
            guard: map.and_then(|map| self.provider.guard_mode(map)),
            guards: map.map(|map| self.provider.guards(map)).unwrap_or_default(),
            watch: map.and_then(|map| self.provider.watched(map)).map(WatchStatus::from),
        }
    }
}
