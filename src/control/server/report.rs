//! What the server says of itself when it is asked.

use std::sync::mpsc::channel;

use super::Server;
use crate::block::nvme::Standing;
use crate::control::backings::Backed;
use crate::control::latency::{CoreStatus, histograms_of_book, of_book};
use crate::control::status::{DeviceStatus, ExportStatus, HostStatus, Status, WatchStatus};
use crate::control::trace::Copies;
use crate::fabrics::{Export, Grant};

impl Server {
    pub(super) fn status(&self, histograms: bool) -> Status {
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
            exports: exports.iter().map(|export| self.export_status(export)).chain(self.hidden()).collect(),
            hosts: hosts.collect(),
            fences: self.fences.status(),
            devices: self.devices(),
            cores: self.gauges().iter().map(|gauges| CoreStatus::of(gauges)).collect(),
            latencies: of_book(&self.stages()),
            histograms: if histograms { histograms_of_book(&self.stages()) } else { Vec::new() },
            metrics: self.metrics.as_ref().map(|metrics| metrics.address().to_string()),
        }
    }

    /// Asks the cores for their last commands; they answer whoever asked.
    pub(super) fn trace(&self) -> Copies {
        let (reply, copies) = channel();
        let asked = self.cores.as_ref().map_or(0, |cores| cores.trace(&reply));
        Copies { copies, asked }
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
            Grant::Fenced(reason) => ("fenced", Some(reason.word().to_owned())),
            Grant::Removed => ("removed", None),
        };
        let map = export.map.as_ref();
        let backed = self.backings.of(export);
        ExportStatus {
            subsystem: export.subsystem.to_string(),
            nsid: export.nsid.0,
            path: map.map(|map| map.identity().path.clone()).or_else(|| backed?.path().map(Into::into)),
            device: backed.and_then(Backed::way),
            grant: grant.to_owned(),
            reason,
            problem: backed.and_then(|backed| backed.fault.clone()),
            fenced_since_ms: export.fenced_since_ms(),
            on_fence: export.on_fence,
            recalls: backed.and_then(Backed::path).map(|path| self.recalls.of(path)),
            generation: map.map(|map| map.generation()),
            extents: map.map(|map| map.extent_count()),
            guard: map.and_then(|map| self.provider.guard_mode(map)),
            local_readers: map.and_then(|map| self.provider.local_readers(map)),
            guards: map.map(|map| self.provider.guards(map)).unwrap_or_default(),
            watch: map.and_then(|map| self.provider.watched(map)).map(WatchStatus::from),
        }
    }

    /// Namespaces that hosts do not see, as nobody knows how large their files are.
    fn hidden(&self) -> impl Iterator<Item = ExportStatus> {
        self.backings.hidden().map(|(subsystem, backed)| ExportStatus {
            subsystem: subsystem.to_owned(),
            nsid: backed.namespace.nsid,
            path: backed.path().map(Into::into),
            device: backed.way(),
            grant: "hidden".to_owned(),
            reason: None,
            problem: backed.fault.clone(),
            fenced_since_ms: None,
            on_fence: backed.namespace.on_fence,
            recalls: None,
            generation: None,
            extents: None,
            guard: None,
            local_readers: None,
            guards: Vec::new(),
            watch: None,
        })
    }
}
