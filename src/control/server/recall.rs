//! A pin is recalled, or in doubt: fence, drain, let go; or look again, and let hosts in again.
//!
//! ```text
//!   Recalled --> Draining --all cores answered--> let go                           a lease break, or a difference
//!                   |                        '--> Looking --it differs--> let go   a doubt that may be about nothing
//!                   deadline: told, counted         '--it is as it was--> served again
//! ```
//!
//! Every file goes its own way: nothing here waits, and what one device keeps holds up no other file. Commands that come back
//! after the deadline are as good as in time to the file, if not to the opener, whom the kernel has let in by then: it is let
//! go, or looked at again, when the last one is back. A recall that comes on top of one that stands joins it: the grant ends once.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::Server;
use crate::control::tripwire::{PinId, Tripwire};
use crate::extent::{Baseline, Incident, PinStep, RecallReason, lease_break_time};
use crate::fabrics::ExportSlot;

/// Part of /proc/sys/fs/lease-break-time that draining may take; the rest is for letting go.
const RECALL_SHARE: f64 = 0.5;
/// What draining may take at the least, when the recall was heard late.
const DRAIN_MIN: Duration = Duration::from_secs(1);

/// The grants that are being ended.
pub(super) type Endings = BTreeMap<PinId, Ending>;

/// The end of the grant of one pin.
pub(super) struct Ending {
    wire: Arc<Tripwire>,
    /// The gravest recall, which is the one that stands.
    incident: Incident,
    /// When the first one was noticed.
    noticed: Instant,
    /// When the inode was changed that the first one was about, if that is known.
    changed: Option<SystemTime>,
    /// What has to be drained.
    slots: Vec<ExportSlot>,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// At most until then, or, when that has passed and was told, for as long as it takes.
    Draining(Option<Instant>),
    Looking,
}

impl Ending {
    fn is_draining(&self) -> bool {
        matches!(self.phase, Phase::Draining(_))
    }

    fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Draining(deadline) => deadline,
            Phase::Looking => None,
        }
    }
}

impl Server {
    /// The fence is down already. Begins to drain, unless an earlier recall has done so.
    pub(super) fn recalled(&mut self, wire: &Arc<Tripwire>, incident: Incident) {
        let shown = wire.path().display();
        let (reason, detail) = (incident.reason, incident.detail.as_str());
        self.provider.note(wire, PinStep::Recalled, text_of(&incident));
        if !self.provider.holds(wire) {
            tracing::warn!(path = %shown, %reason, detail, "a pin that is let go already was recalled once more");
            return;
        }
        tracing::error!(path = %shown, %reason, detail, "pin recalled: its export is fenced");
        self.recalls.recalled(wire.path(), &incident);
        if let Some(ending) = self.endings.get_mut(&wire.pin()) {
            // Two threads that recall may tell of it the other way round.
            if incident.number < ending.incident.number {
                return;
            }
            ending.incident = incident;
            if ending.phase == Phase::Looking {
                // Fenced and drained since, and nobody has let hosts in: the recall stood before that could be.
                self.drained(wire.pin());
            }
            return;
        }
        let exports = self.provider.fence(wire);
        if !exports.is_empty() {
            self.provider.note(wire, PinStep::Fenced, since(incident.noticed));
        }
        let slots: Vec<_> = exports.iter().map(|export| export.slot).collect();
        if let Some(cores) = &self.cores {
            slots.iter().for_each(|slot| self.drains.begin(cores, *slot));
        }
        let deadline =
            (incident.noticed + lease_break_time().mul_f64(RECALL_SHARE)).max(Instant::now() + DRAIN_MIN);
        let (noticed, changed) = (incident.noticed, incident.changed);
        let phase = Phase::Draining(Some(deadline));
        let ending = Ending { wire: Arc::clone(wire), incident, noticed, changed, slots, phase };
        self.endings.insert(wire.pin(), ending);
        self.go_on_with_endings();
    }

    /// Some export is drained: whoever waited for just that goes on.
    pub(super) fn go_on_with_endings(&mut self) {
        let is_done = |slot: &ExportSlot| !self.drains.is_under_way(*slot);
        let done = self.endings.iter().filter(|(_, it)| it.is_draining() && it.slots.iter().all(is_done));
        for pin in done.map(|(pin, _)| *pin).collect::<Vec<_>>() {
            if let Some(ending) = self.endings.get(&pin) {
                match ending.deadline() {
                    // A clock that was set back meanwhile tells nothing.
                    Some(_) => self.fences.drained(
                        ending.noticed.elapsed(),
                        ending.changed.and_then(|changed| changed.elapsed().ok()),
                    ),
                    None => {
                        tracing::warn!(path = %ending.wire.path().display(), "the last command is back, too late")
                    }
                }
                self.provider.note(&ending.wire, PinStep::Drained, since(ending.noticed));
            }
            self.drained(pin);
        }
    }

    /// No command of the file is on a device any more, and none can start.
    fn drained(&mut self, pin: PinId) {
        let Some(ending) = self.endings.get_mut(&pin) else { return };
        match ending.incident.reason {
            RecallReason::Doubt(doubt) if doubt.may_be_cleared() => {
                ending.phase = Phase::Looking;
                self.provider.look_again(&ending.wire, &ending.incident);
            }
            _ => self.abandon(pin),
        }
    }

    /// Tells of what did not drain in time.
    pub(super) fn look_after_endings(&mut self, now: Instant) {
        for ending in self.endings.values_mut() {
            if ending.deadline().is_some_and(|deadline| deadline <= now) {
                ending.phase = Phase::Draining(None);
                self.fences.not_drained();
                self.recalls.not_drained(ending.wire.path());
                self.provider.note(&ending.wire, PinStep::NotDrained, since(ending.noticed));
                // Better an opener that the kernel lets in late than one that we let in on blocks being written.
                tracing::error!(
                    path = %ending.wire.path().display(),
                    "commands are still on the device; the file is held until they are back, or the kernel breaks in"
                );
            }
        }
    }

    /// When something is to be told of next.
    pub(super) fn endings_due(&self) -> Option<Instant> {
        self.endings.values().filter_map(Ending::deadline).min()
    }

    /// What a second look at a file in doubt has found.
    pub(super) fn looked(
        &mut self,
        wire: &Arc<Tripwire>,
        incident: &Incident,
        looked: Result<Baseline, String>,
    ) {
        let shown = wire.path().display();
        let Some(ending) = self.endings.get_mut(&wire.pin()) else { return };
        match looked {
            Ok(baseline) => {
                if self.provider.clear(wire, incident.number, baseline) {
                    tracing::warn!(path = %shown, "the file is as it was: served again");
                    self.fences.cleared();
                    self.recalls.cleared(wire.path());
                    self.provider.note(wire, PinStep::Cleared, since(ending.noticed));
                    self.endings.remove(&wire.pin());
                } else if !self.provider.holds(wire) {
                    // A reload has let go of it meanwhile.
                    self.endings.remove(&wire.pin());
                }
            }
            Err(differs) => {
                tracing::error!(path = %shown, differs, "the doubt stands");
                ending.incident.detail = format!("{}; then: {differs}", ending.incident.detail);
                self.recalls.stands(wire.path(), &ending.incident);
                self.abandon(wire.pin());
            }
        }
    }

    /// Lets go of a file that somebody wants, or that is not what it was. Its exports are fenced and drained. The record stays:
    /// whoever serves the file next has its map to compare, and nobody serves another one unasked.
    fn abandon(&mut self, pin: PinId) {
        let Some(Ending { wire, incident, .. }) = self.endings.remove(&pin) else { return };
        // A reload may have let go of it meanwhile, and pinned it anew.
        if self.provider.holds(&wire) {
            // A reload that names the file is to pin it anew, not to find this fenced one still good.
            self.backings.let_go(wire.path(), &text_of(&incident));
            self.provider.let_go(&wire, &incident);
        }
    }

    /// A file is let go: its guards are gone, and its record tells why.
    pub(super) fn let_go(&mut self, path: &Path) {
        self.provider.left(path);
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
fn since(noticed: Instant) -> String {
    format!("{} us after it was noticed", noticed.elapsed().as_micros())
}
