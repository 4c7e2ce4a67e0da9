//! A pin is recalled, or in doubt: fence, drain, let go; or look again, and let hosts in again.

use std::path::Path;
use std::time::Instant;

use super::Server;
use crate::extent::{Baseline, Incident, PinStep, RecallReason, lease_break_time};
use crate::fabrics::FenceReason;

/// Part of /proc/sys/fs/lease-break-time that draining may take; the rest is for letting go.
const RECALL_SHARE: f64 = 0.5;

impl Server {
    /// The fence is down already. Drains, then lets the file go, before the kernel loses its patience; or looks again.
    pub(super) fn recalled(&mut self, path: &Path, incident: &Incident) {
        let shown = path.display();
        let (reason, detail) = (incident.reason, incident.detail.as_str());
        tracing::error!(path = %shown, %reason, detail, "pin recalled: its export is fenced");
        self.provider.note(path, PinStep::Recalled, text_of(incident));
        let deadline = Instant::now() + lease_break_time().mul_f64(RECALL_SHARE);
        let drained = match self.provider.export_of(path) {
            Some(export) => {
                // Down already, unless the file was pinned anew since: then letting it go unfenced would be worse.
                self.target.fence(&export, FenceReason::MapInDoubt);
                self.provider.note(path, PinStep::Fenced, since(incident));
                self.cores.as_ref().is_none_or(|cores| cores.drain(export.slot, deadline))
            }
            None => true,
        };
        // An export that a reload removed may have left commands behind, though that of now has none.
        if !drained || self.provider.is_undrained(path) {
            self.fences.not_drained();
            self.provider.note(path, PinStep::NotDrained, since(incident));
            // Better an opener that the kernel lets in late than one that we let in on blocks being written.
            tracing::error!(path = %shown, "commands are still on the device; the file is held until the kernel breaks in");
            return;
        }
        self.fences.drained(incident.noticed.elapsed());
        self.provider.note(path, PinStep::Drained, since(incident));
        match reason {
            RecallReason::Doubt(doubt) if doubt.may_be_cleared() => self.provider.look_again(path, incident),
            _ => self.abandon(path, incident),
        }
    }

    /// What a second look at a file in doubt has found.
    pub(super) fn looked(&mut self, path: &Path, incident: &Incident, looked: Result<Baseline, String>) {
        let shown = path.display();
        match looked {
            Ok(baseline) => {
                if self.provider.clear(path, incident.number, baseline) {
                    tracing::warn!(path = %shown, "the file is as it was: served again");
                    self.fences.cleared();
                    self.provider.note(path, PinStep::Cleared, since(incident));
                }
            }
            Err(differs) => {
                tracing::error!(path = %shown, differs, "the doubt stands");
                let detail = format!("{}; then: {differs}", incident.detail);
                self.abandon(path, &Incident { detail, ..incident.clone() });
            }
        }
    }

    /// Lets go of a file that somebody wants, or that is not what it was. Its export is fenced and drained. The record stays:
    /// whoever serves the file next has its map to compare, and nobody serves another one unasked.
    fn abandon(&mut self, path: &Path, incident: &Incident) {
        self.provider.abandon(path, incident);
        // A reload that names the file is to pin it anew, not to find this fenced one still good.
        self.backings.let_go(path);
        tracing::error!(
            path = %path.display(),
            "drained and let go: `fastice pins` shows what is wrong. If its map is the recorded one, a reload serves it again; \
             else mend it, then `fastice pin --resume` and reload"
        );
    }
}

/// Why, for the events of a pin.
fn text_of(incident: &Incident) -> String {
    match incident.detail.as_str() {
        "" => incident.reason.to_string(),
        detail => format!("{}: {detail}", incident.reason),
    }
}

/// How long after it was noticed.
fn since(incident: &Incident) -> String {
    format!("{} us after it was noticed", incident.noticed.elapsed().as_micros())
}
