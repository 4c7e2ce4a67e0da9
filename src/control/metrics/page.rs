//! The page: the status of the target and its counters, as metrics of `OpenMetrics`. What each means is in `docs/USER.md`.
//!
//! Cores keep plain counters; all this is put together when somebody asks.

mod times;

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeMetric as _, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::control::RecallStatus;
use crate::control::status::{ExportStatus, FENCE_BOUNDS_US, Status, WatchStatus};
use crate::fabrics::TargetStats;
use crate::reactor::{CoreActivity, CoreStats};
use crate::stage::Row;
use crate::tcp::TcpStats;

/// All that is told.
#[derive(Clone, Debug)]
pub(super) struct Numbers {
    pub(super) status: Status,
    pub(super) target: TargetStats,
    pub(super) tcp: TcpStats,
    pub(super) cores: Vec<(CoreStats, CoreActivity)>,
    pub(super) rows: Vec<Row>,
}

/// The page of these numbers.
///
/// # Errors
/// Never: a string takes all that is written to it.
pub(super) fn render(numbers: Numbers) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("fastice");
    registry.register_collector(Box::new(Page(numbers)));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Page(Numbers);

/// Labels of one sample.
type Labels<'a> = Vec<(&'static str, String)>;

/// A number, and which.
type Sample = (Labels<'static>, f64);

struct Writer<'e> {
    encoder: DescriptorEncoder<'e>,
}

impl Writer<'_> {
    /// A gauge with a sample for each set of labels; nothing when there is none.
    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        samples: impl IntoIterator<Item = Sample>,
    ) -> fmt::Result {
        self.family(name, help, unit, MetricType::Gauge, samples, |encoder, value| {
            encoder.encode_gauge(value)
        })
    }

    /// The same of numbers that only grow. The encoder adds `_total`.
    fn counters(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        samples: impl IntoIterator<Item = (Labels<'static>, u64)>,
    ) -> fmt::Result {
        self.family(name, help, unit, MetricType::Counter, samples, |encoder, value| {
            encoder.encode_counter::<NoLabelSet, _, u64>(value, None)
        })
    }

    /// The same of seconds that only grow.
    fn seconds(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = Sample>) -> fmt::Result {
        let kind = MetricType::Counter;
        self.family(name, help, Some(&Unit::Seconds), kind, samples, |encoder, value| {
            encoder.encode_counter::<NoLabelSet, _, u64>(value, None)
        })
    }

    fn family<V: EncodeGaugeOrCounter>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        kind: MetricType,
        samples: impl IntoIterator<Item = (Labels<'static>, V)>,
        write: impl Fn(&mut MetricEncoder<'_>, &V) -> fmt::Result,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let mut family = self.encoder.encode_descriptor(name, help, unit, kind)?;
        for (labels, value) in samples {
            if labels.is_empty() {
                write(&mut family, &value)?;
            } else {
                write(&mut family.encode_family(&labels)?, &value)?;
            }
        }
        Ok(())
    }
}

/// What a sample may be.
trait EncodeGaugeOrCounter {}
impl EncodeGaugeOrCounter for f64 where f64: EncodeGaugeValue + EncodeCounterValue {}
impl EncodeGaugeOrCounter for u64 where u64: EncodeCounterValue {}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Numbers { status, target, tcp, cores, rows } = &self.0;
        let build = Info::new(vec![("version", status.version.clone())]);
        build.encode(encoder.encode_descriptor(
            "build",
            "The fastice that serves",
            None,
            build.metric_type(),
        )?)?;
        let mut writer = Writer { encoder };
        let one = |value: f64| [(Vec::new(), value)];
        writer.gauges(
            "uptime",
            "Since when it serves",
            Some(&Unit::Seconds),
            one(number(status.uptime_s)),
        )?;
        exports(&mut writer, &status.exports)?;
        watches(&mut writer, &status.exports)?;
        fences(&mut writer, status)?;
        hosts(&mut writer, status)?;
        devices(&mut writer, status)?;
        counted(&mut writer, target, tcp)?;
        for (name, help, unit, of) in core_gauges() {
            let samples = cores.iter().enumerate().map(|(core, (stats, _))| (core_label(core), of(stats)));
            writer.gauges(name, help, unit, samples)?;
        }
        times::activity(&mut writer, cores)?;
        times::stages(&mut writer, rows)
    }
}

/// Numbers of this size are exact as long as they are below 2^53.
#[expect(clippy::cast_precision_loss, reason = "metrics are doubles")]
fn number(value: u64) -> f64 {
    value as f64
}

fn count(value: usize) -> f64 {
    number(u64::try_from(value).unwrap_or(u64::MAX))
}

fn labels_of(export: &ExportStatus) -> Labels<'static> {
    let path = export.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    vec![("subsystem", export.subsystem.clone()), ("nsid", export.nsid.to_string()), ("path", path)]
}

/// The same labels and one more.
fn and(mut labels: Labels<'static>, name: &'static str, value: &str) -> Labels<'static> {
    labels.push((name, value.to_owned()));
    labels
}

fn exports(writer: &mut Writer<'_>, exports: &[ExportStatus]) -> fmt::Result {
    let grants = exports.iter().flat_map(|export| {
        ["live", "fenced", "removed", "hidden"]
            .map(|grant| (and(labels_of(export), "grant", grant), f64::from(u8::from(export.grant == grant))))
    });
    writer.gauges("export_grant", "1 for the state in which the export is", None, grants)?;
    let generations =
        exports.iter().filter_map(|export| Some((labels_of(export), number(export.generation?))));
    writer.gauges("pin_generation", "Which freeze of the file is served", None, generations)?;
    let extents = exports.iter().filter_map(|export| Some((labels_of(export), count(export.extents?))));
    writer.gauges("pin_extents", "Extents of the frozen map", None, extents)?;
    let guards = exports.iter().flat_map(|export| {
        export.guards.iter().map(|guard| (and(labels_of(export), "guard", guard), 1.0)).collect::<Vec<_>>()
    });
    writer.gauges("pin_guard", "1 for each guard that the pin holds", None, guards)?;
    recalls(writer, exports)
}

/// What each file was recalled for, since the target runs.
fn recalls(writer: &mut Writer<'_>, exports: &[ExportStatus]) -> fmt::Result {
    type Of = fn(&RecallStatus) -> u64;
    let rows: [(_, _, Of); 4] = [
        ("pin_recalls", "Lease breaks on the file, and failures of its guard", |it| it.recalls),
        ("pin_doubts", "Differences that the watch over the file found or feared", |it| it.doubts),
        ("pin_doubts_cleared", "Doubts about the file that a second look cleared", |it| it.cleared),
        ("pin_not_drained", "Fences of the file whose commands did not come back in time", |it| {
            it.not_drained
        }),
    ];
    for (name, help, of) in rows {
        let samples =
            exports.iter().filter_map(|export| Some((labels_of(export), of(export.recalls.as_ref()?))));
        writer.counters(name, help, None, samples)?;
    }
    Ok(())
}

fn watches(writer: &mut Writer<'_>, exports: &[ExportStatus]) -> fmt::Result {
    let of = |value: fn(&WatchStatus) -> f64| {
        let watched =
            exports.iter().filter_map(move |export| Some((labels_of(export), value(&export.watch?))));
        watched.collect::<Vec<Sample>>()
    };
    let checks = exports.iter().filter_map(|export| Some((labels_of(export), export.watch.as_ref()?.checks)));
    writer.counters("watch_checks", "Looks at the map of the file that found nothing", None, checks)?;
    let seconds = Some(&Unit::Seconds);
    let (age, interval) =
        (of(|watch| number(watch.last_check_ago_ms) / 1e3), of(|watch| number(watch.interval_ms) / 1e3));
    writer.gauges(
        "watch_last_check_age",
        "How long ago the map was last found to be the frozen one",
        seconds,
        age,
    )?;
    writer.gauges("watch_interval", "Between two looks at the map", seconds, interval)?;
    let (bound, cost) = (of(|watch| number(watch.bound_ms) / 1e3), of(|watch| number(watch.cost_us) / 1e6));
    writer.gauges(
        "watch_bound",
        "After so long without a look the file counts as changed",
        seconds,
        bound,
    )?;
    writer.gauges("watch_look_cost", "Processor time of a look at the map", seconds, cost)
}

fn fences(writer: &mut Writer<'_>, status: &Status) -> fmt::Result {
    let fences = &status.fences;
    let one = |value: u64| [(Vec::new(), value)];
    writer.counters("fences", "Grants that were ended: recalls and doubts", None, one(fences.count))?;
    writer.counters("fences_cleared", "Doubts that a second look cleared", None, one(fences.cleared))?;
    let help = "Fences whose commands did not come back in time";
    writer.counters("fences_not_drained", help, None, one(fences.not_drained))?;
    let drained = fences.count.saturating_sub(fences.not_drained);
    let help =
        "From a fence's cause being noticed (not from when it came about) to no command being on the device";
    histogram(writer, "fence_drained", help, drained, &fences.drained_up_to, fences.drained_sum_us)?;
    let since = &fences.since_change;
    let help = "From the last change of the inode, for fences of which its change time tells the cause, to no command \
                being on the device";
    histogram(writer, "fence_since_change", help, since.count, &since.up_to, since.sum_us)
}

/// A histogram of seconds by [`FENCE_BOUNDS_US`].
fn histogram(
    writer: &mut Writer<'_>,
    name: &str,
    help: &str,
    count: u64,
    up_to: &[u64; FENCE_BOUNDS_US.len()],
    sum_us: u64,
) -> fmt::Result {
    // Each of ours holds also what the smaller ones hold, and theirs do not.
    let mut before = 0;
    let mut buckets = Vec::with_capacity(FENCE_BOUNDS_US.len() + 1);
    for (bound_us, up_to) in FENCE_BOUNDS_US.iter().zip(up_to) {
        buckets.push((number(*bound_us) / 1e6, up_to.saturating_sub(before)));
        before = before.max(*up_to);
    }
    buckets.push((f64::INFINITY, count.saturating_sub(before)));
    let kind = MetricType::Histogram;
    let mut encoder = writer.encoder.encode_descriptor(name, help, Some(&Unit::Seconds), kind)?;
    encoder.encode_histogram::<NoLabelSet>(number(sum_us) / 1e6, count, &buckets, None)
}

fn hosts(writer: &mut Writer<'_>, status: &Status) -> fmt::Result {
    let connected = [(Vec::new(), count(status.hosts.len()))];
    writer.gauges("host_controllers", "Controllers of hosts that are connected", None, connected)?;
    let labels = |host: &crate::control::HostStatus| {
        vec![
            ("host", host.host.clone()),
            ("subsystem", host.subsystem.clone()),
            ("cntlid", host.cntlid.to_string()),
        ]
    };
    let hosts = || status.hosts.iter();
    let queues = hosts().map(|host| (labels(host), count(host.io_queues)));
    writer.gauges("host_io_queues", "I/O queues of the controller", None, queues)?;
    let commands = hosts().map(|host| (labels(host), host.commands));
    writer.counters("host_commands", "Commands of the controller", None, commands)?;
    let bytes = Some(&Unit::Bytes);
    let read = hosts().map(|host| (labels(host), host.read_bytes));
    writer.counters("host_read", "Bytes that its reads asked for", bytes, read)?;
    let written = hosts().map(|host| (labels(host), host.written_bytes));
    writer.counters("host_written", "Bytes that its writes brought", bytes, written)
}

fn devices(writer: &mut Writer<'_>, status: &Status) -> fmt::Result {
    let states = status.devices.iter().flat_map(|device| {
        ["proven", "unproven", "lost"].map(|state| {
            let labels = vec![
                ("device", device.device.clone()),
                ("nsid", device.nsid.to_string()),
                ("state", state.to_owned()),
            ];
            (labels, f64::from(u8::from(device.state == state)))
        })
    });
    writer.gauges("device_state", "1 for the state of a device that our own driver drives", None, states)
}

fn counted(writer: &mut Writer<'_>, target: &TargetStats, tcp: &TcpStats) -> fmt::Result {
    let rows = [
        ("admin_connects", "Admin queues connected to I/O controllers", target.admin_connects),
        ("discovery_connects", "Admin queues connected to discovery controllers", target.discovery_connects),
        ("io_connects", "I/O queues connected", target.io_connects),
        ("connects_rejected", "Connects refused for their parameters or a limit", target.connects_rejected),
        ("hosts_refused", "Connects refused because the host is not on the list", target.hosts_refused),
        (
            "keep_alive_expired",
            "Controllers ended because their keep alive timer expired",
            target.keep_alive_expired,
        ),
        ("idle_expired", "Controllers ended because they were not enabled, or idle", target.idle_expired),
        ("controllers_revoked", "Controllers ended by a reload", target.controllers_revoked),
        ("aborts", "Abort commands", target.aborts),
        ("events_sent", "Asynchronous events sent to hosts", target.events_sent),
        ("command_errors", "Commands that failed by a fault of their own", target.command_errors),
        ("transport_errors", "Failures that the transport reported", target.transport_errors),
        ("tcp_connections", "Connections that a core took", tcp.connections),
        ("tcp_connections_ended", "Connections that ended", tcp.connections_ended),
        ("tcp_protocol_errors", "PDUs that broke the protocol", tcp.protocol_errors),
        ("tcp_header_digest_errors", "Header digests that did not fit", tcp.header_digest_errors),
        ("tcp_data_digest_errors", "Data digests that did not fit", tcp.data_digest_errors),
        ("tcp_duplicate_cids", "Commands whose CID was in use", tcp.duplicate_cids),
        ("tcp_term_reqs_sent", "C2HTermReq sent", tcp.term_reqs_sent),
        ("tcp_term_reqs_received", "H2CTermReq received", tcp.term_reqs_received),
        (
            "tcp_handshake_timeouts",
            "Connections that did not introduce themselves in time",
            tcp.handshake_timeouts,
        ),
        ("tcp_transfer_timeouts", "Connections whose host let a transfer hang", tcp.transfer_timeouts),
        ("tcp_broken", "Connections that the peer or the network broke off", tcp.broken),
        ("tcp_gathers", "Times a socket was left alone so that commands come together", tcp.gathers),
        ("tcp_shrunk", "Times an idle connection gave its large receive buffer back", tcp.shrunk),
    ];
    rows.into_iter()
        .try_for_each(|(name, help, value)| writer.counters(name, help, None, [(Vec::new(), value)]))
}

/// The label of a core.
fn core_label(core: usize) -> Labels<'static> {
    vec![("core", core.to_string())]
}

type CoreGauge = (&'static str, &'static str, Option<&'static Unit>, fn(&CoreStats) -> f64);

fn core_gauges() -> [CoreGauge; 3] {
    [
        ("core_connections", "Connections on the core", None, |stats| count(stats.connections)),
        ("core_commands", "Commands of the core on devices", None, |stats| count(stats.commands)),
        ("core_buffer", "Buffers of the core in use", Some(&Unit::Bytes), |stats| count(stats.buffer_bytes)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::status::{DeviceStatus, FenceStatus, HostStatus};
    use crate::stage::{Cell, Key, Stamp, Stamps};

    fn fences() -> FenceStatus {
        FenceStatus {
            count: 4,
            cleared: 1,
            not_drained: 1,
            drained_up_to: [0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2],
            drained_sum_us: 60_000_900,
            ..FenceStatus::default()
        }
    }

    fn cores() -> Vec<(CoreStats, CoreActivity)> {
        let stats = CoreStats { connections: 2, commands: 1, buffer_bytes: 4096 };
        let activity = CoreActivity {
            busy_ns: 1_500_000_000,
            polling_ns: 250_000_000,
            asleep_ns: 3_000_000_000,
            begins_of_work: 700,
            begins_of_polling: 801,
            wakes: [9, 4, 3, 2, 150],
        };
        vec![(stats, activity), Default::default()]
    }

    /// Commands of one host, and one of a host without a name.
    fn rows() -> Vec<Row> {
        let at = |us: u64| Stamp::from_ns(1 + us * 1000);
        let stamps = Stamps {
            arrived: at(0),
            begun: at(1),
            parsed: at(2),
            looked_up: at(4),
            handed: at(6),
            done: at(96),
        };
        let row = |key, sent, count| {
            let cell = Cell::default();
            cell.record(&stamps, sent, count);
            Row { core: 0, key, times: cell.times() }
        };
        let key = Key {
            host: "nqn.2014-08.org.nvmexpress:uuid:1".into(),
            subsystem: "nqn.2026-11.io.fastice:vm1".into(),
            nsid: 1,
        };
        vec![row(None, at(100), 1), row(Some(key), at(2_000_096), 3)]
    }

    /// A target with one of everything, and a path that needs escaping.
    fn numbers() -> Numbers {
        let watch = WatchStatus {
            checks: 12,
            last_check_ago_ms: 1500,
            interval_ms: 4000,
            bound_ms: 10_000,
            cost_us: 2500,
        };
        let file = ExportStatus {
            subsystem: "nqn.2026-11.io.fastice:vm1".to_owned(),
            nsid: 1,
            path: Some("/srv/a \"quoted\\name\"\n.img".into()),
            device: Some(crate::config::DeviceWay::Uring),
            grant: "fenced".to_owned(),
            reason: Some("map-in-doubt".to_owned()),
            fenced_since_ms: Some(1),
            on_fence: crate::fabrics::FencePolicy::Ana,
            problem: Some("the extent map changed".to_owned()),
            recalls: Some(RecallStatus { recalls: 2, doubts: 3, cleared: 1, not_drained: 1, last: None }),
            generation: Some(3),
            extents: Some(1_000_000),
            guard: Some(crate::extent::GuardMode::Default),
            local_readers: Some(crate::extent::LocalReaders::Refuse),
            guards: vec!["open-permission mark".to_owned(), "immutable flag".to_owned()],
            watch: Some(watch),
        };
        let memory = ExportStatus {
            nsid: 2,
            path: None,
            device: None,
            grant: "live".to_owned(),
            reason: None,
            problem: None,
            fenced_since_ms: None,
            recalls: None,
            generation: None,
            extents: None,
            guard: None,
            local_readers: None,
            guards: Vec::new(),
            watch: None,
            ..file.clone()
        };
        let host = HostStatus {
            host: "nqn.2014-08.org.nvmexpress:uuid:1".to_owned(),
            subsystem: file.subsystem.clone(),
            cntlid: 7,
            io_queues: 4,
            commands: 1001,
            read_bytes: 1 << 40,
            written_bytes: 4096,
        };
        let device =
            DeviceStatus { device: "pci 0000:02:00.0".to_owned(), nsid: 1, state: "lost".to_owned() };
        let status = Status {
            version: "1.2.3".to_owned(),
            pid: 4711,
            uptime_s: 60,
            addresses: Vec::new(),
            exports: vec![file, memory],
            hosts: vec![host],
            fences: fences(),
            devices: vec![device],
            cores: Vec::new(),
            latencies: Vec::new(),
            histograms: Vec::new(),
            metrics: None,
        };
        let target = TargetStats { io_connects: 5, command_errors: 2, ..TargetStats::default() };
        let tcp = TcpStats { connections: 6, broken: 1, ..TcpStats::default() };
        Numbers { status, target, tcp, cores: cores(), rows: rows() }
    }

    #[test]
    fn the_page_tells_all_that_is_known() {
        insta::assert_snapshot!(render(numbers()).expect("a string takes it all"));
    }

    #[test]
    fn a_target_that_serves_nothing_has_a_page_too() {
        let mut numbers = numbers();
        numbers.status.exports.clear();
        numbers.status.hosts.clear();
        numbers.status.devices.clear();
        numbers.rows.clear();
        let page = render(numbers).expect("a string takes it all");
        assert!(page.ends_with("# EOF\n") && !page.contains("fastice_pin_"), "{page}");
        assert!(page.contains("\nfastice_host_controllers 0"), "{page}");
    }
}
