//! What a running target says of itself: the document of its socket.

use std::path::PathBuf;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::latency::{CoreStatus, HistogramStatus, LatencyStatus};
use super::recalls::RecallStatus;
use crate::config::DeviceWay;
use crate::extent::{GuardMode, LocalReaders, WatchReport};
use crate::fabrics::FencePolicy;

/// A running target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of fastice that serves.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since when it serves, in seconds.
    pub uptime_s: u64,
    /// Where hosts connect.
    pub addresses: Vec<String>,
    /// Its namespaces.
    pub exports: Vec<ExportStatus>,
    /// Controllers of hosts that are connected.
    pub hosts: Vec<HostStatus>,
    /// How long the ends of grants took.
    pub fences: FenceStatus,
    /// The devices that our own driver drives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceStatus>,
    /// Its cores.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cores: Vec<CoreStatus>,
    /// How long commands took, by host and export.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latencies: Vec<LatencyStatus>,
    /// The histograms behind them, for who asks for these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub histograms: Vec<HistogramStatus>,
    /// Where metrics are told, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
}

/// A device that our own driver drives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// The way to its controller.
    pub device: String,
    /// The namespace.
    pub nsid: u32,
    /// `proven`, `unproven` or `lost`.
    pub state: String,
}

/// A namespace that is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// The NQN of its subsystem.
    pub subsystem: String,
    /// Its identifier.
    pub nsid: u32,
    /// The file under it, if one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// How the device under the file is reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceWay>,
    /// `live`, `fenced`, `removed`, or `hidden`: a start could not serve its file, and hosts do not see it.
    pub grant: String,
    /// Why it is fenced: the word of a [`FenceReason`](crate::fabrics::FenceReason).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why its file is not held: it was let go, or a start could not serve it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Since when it is fenced, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced_since_ms: Option<u64>,
    /// What hosts see of a fence.
    #[serde(default)]
    pub on_fence: FencePolicy,
    /// How often the file was recalled since the target runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recalls: Option<RecallStatus>,
    /// Which freeze of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Its extents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extents: Option<usize>,
    /// Which guards hold the file; none when its filesystem is not mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<GuardMode>,
    /// Whether local processes may read the file; none when its filesystem is not mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_readers: Option<LocalReaders>,
    /// The guards that this process holds on the file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guards: Vec<String>,
    /// How the watch over the file is doing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watch: Option<WatchStatus>,
}

/// The watch over a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchStatus {
    /// How often its map was read.
    pub checks: u64,
    /// How long ago it was last found to be the frozen one, in milliseconds.
    pub last_check_ago_ms: u64,
    /// How long it may be until the next look.
    pub interval_ms: u64,
    /// After how long without a look the file is fenced: what a change that only the map shows may take to be noticed.
    pub bound_ms: u64,
    /// What one look costs in processor time, in microseconds.
    pub cost_us: u64,
}

impl From<WatchReport> for WatchStatus {
    fn from(report: WatchReport) -> Self {
        Self {
            checks: report.checks,
            last_check_ago_ms: ms(report.last_check_ago),
            interval_ms: ms(report.interval),
            bound_ms: ms(report.bound),
            cost_us: us(report.cost),
        }
    }
}

/// A host's controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The host's NQN.
    pub host: String,
    /// The subsystem's NQN.
    pub subsystem: String,
    /// The controller's identifier.
    pub cntlid: u16,
    /// Its I/O queues.
    pub io_queues: usize,
    /// Commands so far.
    pub commands: u64,
    /// Bytes that its reads asked for.
    pub read_bytes: u64,
    /// Bytes that its writes brought.
    pub written_bytes: u64,
}

/// How long the ends of grants took, in microseconds from when the reason was noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceStatus {
    /// How many there were.
    pub count: u64,
    /// How many of them were cleared again.
    pub cleared: u64,
    /// Until no command was on the device any more: the last possible submission was before that. Half of them, at most.
    pub drained_p50_us: u64,
    /// The same, 99 of 100.
    pub drained_p99_us: u64,
    /// The same, all.
    pub drained_max_us: u64,
    /// How many did not drain in time.
    pub not_drained: u64,
    /// How many drained within 100, 250 and 500 us, 1, 2.5, 10, 50 and 250 ms, 1, 5, 20 and 45 s.
    #[serde(default)]
    pub drained_up_to: [u64; FENCE_BOUNDS_US.len()],
    /// The sum of all.
    #[serde(default)]
    pub drained_sum_us: u64,
    /// The same from the change itself on, where the change time of the inode tells of it.
    #[serde(default)]
    pub since_change: SinceChange,
}

/// How long after a change that only the watch noticed the last possible submission to the device was, in microseconds: from the
/// change time of the inode, which is the last change before it was noticed, to no command being on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SinceChange {
    /// How many there were.
    pub count: u64,
    /// Half of them took so long, at most.
    pub p50_us: u64,
    /// 99 of 100.
    pub p99_us: u64,
    /// All.
    pub max_us: u64,
    /// How many took up to each of the bounds of `drained_up_to`.
    pub up_to: [u64; FENCE_BOUNDS_US.len()],
    /// The sum of all.
    pub sum_us: u64,
}

/// The bounds of a histogram of drain times: 100 us to the 45 s for which the kernel waits for a lease.
pub(super) const FENCE_BOUNDS_US: [u64; 12] =
    [100, 250, 500, 1_000, 2_500, 10_000, 50_000, 250_000, 1_000_000, 5_000_000, 20_000_000, 45_000_000];

/// An hour: what takes longer counts as that.
const DRAINED_US_MAX: u64 = 3_600_000_000;

/// Times, as a histogram.
#[derive(Debug)]
struct Times {
    us: Histogram<u64>,
    up_to: [u64; FENCE_BOUNDS_US.len()],
    sum_us: u64,
}

impl Times {
    fn new() -> Self {
        // Bounds and digits are constants for which this cannot fail.
        let us = Histogram::new_with_bounds(1, DRAINED_US_MAX, 2)
            .expect("1 us to an hour in two digits is possible");
        Self { us, up_to: [0; FENCE_BOUNDS_US.len()], sum_us: 0 }
    }

    fn record(&mut self, time: Duration) {
        let us = us(time);
        self.us.saturating_record(us.max(1));
        self.sum_us = self.sum_us.saturating_add(us);
        for (bound_us, up_to) in FENCE_BOUNDS_US.iter().zip(&mut self.up_to) {
            *up_to += u64::from(us <= *bound_us);
        }
    }

    fn max_us(&self) -> u64 {
        if self.us.is_empty() { 0 } else { self.us.max() }
    }
}

/// Counts the ends of grants.
#[derive(Debug)]
pub(super) struct Fences {
    drained: Times,
    since_change: Times,
    cleared: u64,
    not_drained: u64,
}

impl Fences {
    pub(super) fn new() -> Self {
        Self { drained: Times::new(), since_change: Times::new(), cleared: 0, not_drained: 0 }
    }

    /// No command was on the device any more so long after the reason was noticed; and so long after the change that was the
    /// reason, where that is known.
    pub(super) fn drained(&mut self, after_notice: Duration, after_change: Option<Duration>) {
        self.drained.record(after_notice);
        if let Some(after) = after_change {
            self.since_change.record(after);
        }
    }

    pub(super) const fn cleared(&mut self) {
        self.cleared += 1;
    }

    pub(super) const fn not_drained(&mut self) {
        self.not_drained += 1;
    }

    pub(super) fn status(&self) -> FenceStatus {
        let (drained, changed) = (&self.drained, &self.since_change);
        FenceStatus {
            count: drained.us.len() + self.not_drained,
            cleared: self.cleared,
            drained_p50_us: drained.us.value_at_quantile(0.5),
            drained_p99_us: drained.us.value_at_quantile(0.99),
            drained_max_us: drained.max_us(),
            not_drained: self.not_drained,
            drained_up_to: drained.up_to,
            drained_sum_us: drained.sum_us,
            since_change: SinceChange {
                count: changed.us.len(),
                p50_us: changed.us.value_at_quantile(0.5),
                p99_us: changed.us.value_at_quantile(0.99),
                max_us: changed.max_us(),
                up_to: changed.up_to,
                sum_us: changed.sum_us,
            },
        }
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_grants_are_counted() {
        let mut fences = Fences::new();
        assert_eq!(fences.status(), FenceStatus::default());
        for us in 1..=100 {
            let changed = (us <= 4).then(|| Duration::from_millis(us * 30));
            fences.drained(Duration::from_micros(us * 10), changed);
        }
        fences.cleared();
        fences.not_drained();
        let status = fences.status();
        assert_eq!((status.count, status.cleared, status.not_drained), (101, 1, 1));
        assert!((490..=510).contains(&status.drained_p50_us), "{status:?}");
        assert_eq!(status.drained_up_to[..5], [10, 25, 50, 100, 100], "{status:?}");
        assert_eq!(status.drained_sum_us, 50_500);
        let since = status.since_change;
        assert_eq!((since.count, since.sum_us, since.up_to[6]), (4, 300_000, 1), "{since:?}");
        assert_eq!((since.up_to[5], since.up_to[7]), (0, 4), "{since:?}");
        assert!((59_000..=61_000).contains(&since.p50_us) && since.max_us >= 120_000, "{since:?}");
        assert!(
            status.drained_p99_us <= status.drained_max_us && status.drained_max_us >= 1000,
            "{status:?}"
        );
    }
}
