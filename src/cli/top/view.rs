//! What was between two looks at the targets, as numbers.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Sort;
use crate::control::{
    CoreStatus, ExportStatus, HistogramStatus, HostStatus, Status, ask_all_with_histograms,
};
use crate::stage::{Counts, Stage};

/// What all targets said at one time.
#[derive(Debug)]
pub(super) struct Sample {
    at: Instant,
    pub(super) targets: Vec<Status>,
    /// Of targets that run and do not answer.
    errors: Vec<String>,
}

impl Sample {
    /// Asks all targets; and gives the errors of those that do not answer.
    pub(super) fn take(state: &Path) -> (Self, Vec<io::Error>) {
        let (mut targets, mut silent) = (Vec::new(), Vec::new());
        for answer in ask_all_with_histograms(state) {
            match answer {
                Ok(target) => targets.push(target),
                Err(error) => silent.push(error),
            }
        }
        let errors = silent.iter().map(|error| format!("a target does not answer: {error}")).collect();
        (Self { at: Instant::now(), targets, errors }, silent)
    }

    /// A target that was there before and is not there any more, in words.
    pub(super) fn first_gone(&self, before: &Self) -> Option<String> {
        if !self.errors.is_empty() {
            // It may be the one that does not answer.
            return None;
        }
        let is_there = |pid: u32| self.targets.iter().any(|target| target.pid == pid);
        let gone = before.targets.iter().map(|target| target.pid).find(|pid| !is_there(*pid));
        // Who did not answer before told no process: all that answer now are no fewer if it is one of them.
        let are_fewer = || self.targets.len() < before.targets.len() + before.errors.len();
        gone.map(|pid| format!("the target of process {pid}"))
            .or_else(|| are_fewer().then(|| "a target that did not answer".to_owned()))
    }
}

/// Commands and bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rates {
    pub(super) commands: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
}

/// Percentiles of the commands that ended, in nanoseconds; none when no command did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Percentiles {
    pub(super) p50_ns: Option<u64>,
    pub(super) p99_ns: Option<u64>,
    pub(super) p999_ns: Option<u64>,
}

impl Percentiles {
    fn of(counts: &Counts) -> Self {
        let at = |part| counts.quantile_ns(part);
        Self { p50_ns: at(0.5), p99_ns: at(0.99), p999_ns: at(0.999) }
    }
}

/// A core: parts of its time in thousandths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CoreRow {
    /// The process of its target.
    pub(super) pid: u32,
    pub(super) cpu: usize,
    pub(super) busy: u64,
    pub(super) polling: u64,
    pub(super) asleep: u64,
    /// Sleeps that ended, a second.
    pub(super) sleeps: u64,
    pub(super) connections: usize,
    pub(super) on_devices: usize,
    pub(super) buffer_bytes: usize,
}

/// An export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExportRow {
    pub(super) nsid: u32,
    pub(super) grant: String,
    /// Why it is fenced.
    pub(super) reason: Option<String>,
    /// A second.
    pub(super) commands: u64,
    pub(super) times: Percentiles,
    pub(super) path: String,
    pub(super) subsystem: String,
}

/// A host's controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostRow {
    pub(super) cntlid: u16,
    pub(super) io_queues: usize,
    pub(super) rates: Rates,
    /// Of all commands of this host to this subsystem, by whichever controller.
    pub(super) times: Percentiles,
    pub(super) host: String,
    pub(super) subsystem: String,
}

/// Everything that is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    /// A line a target.
    pub(super) heads: Vec<String>,
    pub(super) errors: Vec<String>,
    /// Between the two looks.
    pub(super) over: Duration,
    /// Of I/O commands, and their bytes.
    pub(super) rates: Rates,
    pub(super) total: Percentiles,
    /// Of each stage of [`Stage::ALL`].
    pub(super) stages: [Percentiles; Stage::ALL.len()],
    pub(super) cores: Vec<CoreRow>,
    pub(super) exports: Vec<ExportRow>,
    pub(super) hosts: Vec<HostRow>,
}

/// Whose commands a histogram counts: subsystem, namespace, host.
type Whose<'a> = (Option<&'a str>, Option<u32>, Option<&'a str>);

fn whose(histogram: &HistogramStatus) -> Whose<'_> {
    (histogram.subsystem.as_deref(), histogram.nsid, histogram.host.as_deref())
}

/// Counts a second.
struct Per(Duration);

impl Per {
    fn second(&self, count: u64) -> u64 {
        let ms = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX).max(1);
        let rate = u128::from(count) * 1000 / u128::from(ms);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

impl View {
    /// What was between two looks. Of a target that only the second one found, nothing was.
    pub(super) fn between(before: &Sample, now: &Sample) -> Self {
        let over = now.at.saturating_duration_since(before.at);
        let per = Per(over);
        let mut view = Self { over, errors: now.errors.clone(), ..Self::default() };
        let mut ended = Ended::default();
        for target in &now.targets {
            view.heads.push(format!(
                "process {}, fastice {}, up {} s, at {}",
                target.pid,
                target.version,
                target.uptime_s,
                target.addresses.join(", ")
            ));
            let was =
                before.targets.iter().find(|was| was.pid == target.pid && was.uptime_s <= target.uptime_s);
            let was = was.unwrap_or(target);
            let mine = Ended::between(was, target);
            view.cores.extend(target.cores.iter().map(|core| core_row(target.pid, core, &was.cores, &per)));
            view.exports.extend(target.exports.iter().map(|export| export_row(export, &mine, &per)));
            view.hosts.extend(target.hosts.iter().map(|host| host_row(host, &was.hosts, &mine, &per)));
            ended.total.add(&mine.total);
            ended.stages.iter_mut().zip(&mine.stages).for_each(|(all, mine)| all.add(mine));
        }
        let sum = |of: fn(&Rates) -> u64| {
            view.hosts.iter().fold(0_u64, |sum, host| sum.saturating_add(of(&host.rates)))
        };
        view.rates = Rates {
            commands: per.second(ended.total.count()),
            read_bytes: sum(|rates| rates.read_bytes),
            written_bytes: sum(|rates| rates.written_bytes),
        };
        view.total = Percentiles::of(&ended.total);
        view.stages = ended.stages.each_ref().map(Percentiles::of);
        view
    }

    /// Whether there is no target.
    pub(super) const fn is_empty(&self) -> bool {
        self.heads.is_empty() && self.errors.is_empty()
    }

    /// Puts exports and hosts into an order.
    pub(super) fn sort(&mut self, by: Sort) {
        let name = |row: &ExportRow| (row.subsystem.clone(), row.nsid);
        let host = |row: &HostRow| (row.host.clone(), row.subsystem.clone(), row.cntlid);
        // The order by name first: what is equal otherwise does not jump about.
        self.exports.sort_by_key(name);
        self.hosts.sort_by_key(host);
        match by {
            Sort::Name => {}
            Sort::Rate => {
                self.exports.sort_by_key(|row| Reverse(row.commands));
                self.hosts.sort_by_key(|row| Reverse(row.rates.commands));
            }
            Sort::Latency => {
                self.exports.sort_by_key(|row| Reverse(row.times.p99_ns));
                self.hosts.sort_by_key(|row| Reverse(row.times.p99_ns));
            }
        }
    }
}

/// Commands of one target that ended between two looks.
#[derive(Debug, Default)]
struct Ended<'a> {
    total: Counts,
    stages: [Counts; Stage::ALL.len()],
    /// From the capsule to the sent answer; not those that nobody is named for.
    named: BTreeMap<Whose<'a>, Counts>,
}

impl<'a> Ended<'a> {
    fn between(was: &Status, now: &'a Status) -> Self {
        let before: BTreeMap<_, _> = was.histograms.iter().map(|it| (whose(it), &it.total)).collect();
        let mut named = BTreeMap::new();
        for histogram in now.histograms.iter().filter(|it| it.host.is_some()) {
            let total = histogram.total.counts();
            let since = before.get(&whose(histogram)).map(|before| total.since(&before.counts()));
            named.insert(whose(histogram), since.unwrap_or(total));
        }
        // Pairs that are gone are counted with the others: only the sums of all never shrink.
        let (total, stages) = sums(now);
        let (total_before, stages_before) = sums(was);
        let stages = std::array::from_fn(|at| stages[at].since(&stages_before[at]));
        Self { total: total.since(&total_before), stages, named }
    }

    fn of(&self, is_it: impl Fn(&Whose<'_>) -> bool) -> Counts {
        let mut sum = Counts::default();
        self.named.iter().filter(|(whose, _)| is_it(whose)).for_each(|(_, counts)| sum.add(counts));
        sum
    }
}

fn sums(target: &Status) -> (Counts, [Counts; Stage::ALL.len()]) {
    let (mut total, mut stages) = (Counts::default(), <[Counts; Stage::ALL.len()]>::default());
    for histogram in &target.histograms {
        total.add(&histogram.total.counts());
        stages.iter_mut().zip(&histogram.stages).for_each(|(sum, stage)| sum.add(&stage.counts()));
    }
    (total, stages)
}

fn core_row(pid: u32, core: &CoreStatus, before: &[CoreStatus], per: &Per) -> CoreRow {
    let was = before.iter().find(|was| was.cpu == core.cpu).unwrap_or(core);
    let [busy, polling, asleep] = [
        core.busy_us.saturating_sub(was.busy_us),
        core.polling_us.saturating_sub(was.polling_us),
        core.asleep_us.saturating_sub(was.asleep_us),
    ];
    let all = busy.saturating_add(polling).saturating_add(asleep).max(1);
    let part = |us: u64| us.saturating_mul(1000) / all;
    let sleeps = |core: &CoreStatus| core.wakes.values().fold(0_u64, |sum, wakes| sum.saturating_add(*wakes));
    CoreRow {
        pid,
        cpu: core.cpu,
        busy: part(busy),
        polling: part(polling),
        asleep: part(asleep),
        sleeps: per.second(sleeps(core).saturating_sub(sleeps(was))),
        connections: core.connections,
        on_devices: core.commands,
        buffer_bytes: core.buffer_bytes,
    }
}

fn export_row(export: &ExportStatus, ended: &Ended<'_>, per: &Per) -> ExportRow {
    let counts = ended.of(|(subsystem, nsid, _)| {
        *subsystem == Some(export.subsystem.as_str()) && *nsid == Some(export.nsid)
    });
    ExportRow {
        nsid: export.nsid,
        grant: export.grant.clone(),
        reason: export.reason.clone(),
        commands: per.second(counts.count()),
        times: Percentiles::of(&counts),
        path: export.path.as_ref().map_or_else(|| "-".to_owned(), |path| path.display().to_string()),
        subsystem: export.subsystem.clone(),
    }
}

fn host_row(host: &HostStatus, before: &[HostStatus], ended: &Ended<'_>, per: &Per) -> HostRow {
    let is_it = |was: &&HostStatus| was.cntlid == host.cntlid && was.host == host.host;
    let was = before.iter().find(is_it);
    // One that has come meanwhile did meanwhile all that it did.
    let since = |of: fn(&HostStatus) -> u64| per.second(of(host).saturating_sub(was.map_or(0, of)));
    let counts = ended.of(|(subsystem, _, name)| {
        *subsystem == Some(host.subsystem.as_str()) && *name == Some(host.host.as_str())
    });
    HostRow {
        cntlid: host.cntlid,
        io_queues: host.io_queues,
        rates: Rates {
            commands: since(|host| host.commands),
            read_bytes: since(|host| host.read_bytes),
            written_bytes: since(|host| host.written_bytes),
        },
        times: Percentiles::of(&counts),
        host: host.host.clone(),
        subsystem: host.subsystem.clone(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn histogram(nsid: u32, host: &str, bucket: usize, count: u64) -> Value {
        let stages = vec![json!([[bucket, count]]); Stage::ALL.len()];
        let total = json!([[bucket, count]]);
        json!({ "subsystem": "nqn.a", "nsid": nsid, "host": host, "total": total, "stages": stages })
    }

    fn host(cntlid: u16, name: &str, commands: u64) -> Value {
        json!({
            "host": name, "subsystem": "nqn.a", "cntlid": cntlid, "io_queues": 2, "commands": commands,
            "read_bytes": commands * 4096, "written_bytes": commands * 512
        })
    }

    /// A target with two exports and a core; `hosts` and `histograms` are what it has counted.
    fn target(uptime_s: u64, busy_us: u64, hosts: &[Value], histograms: &[Value]) -> Status {
        let export = |nsid: u32, grant: &str, reason: Option<&str>| json!({ "subsystem": "nqn.a", "nsid": nsid, "grant": grant, "reason": reason, "path": format!("/srv/{nsid}") });
        let fences = json!({
            "count": 0, "cleared": 0, "drained_p50_us": 0, "drained_p99_us": 0, "drained_max_us": 0, "not_drained": 0
        });
        let core = json!({
            "cpu": 3, "connections": 4, "commands": 5, "buffer_bytes": 65536, "busy_us": busy_us,
            "polling_us": busy_us / 2, "asleep_us": busy_us / 2, "wakes": { "socket": busy_us / 1000, "timer": 1 }
        });
        serde_json::from_value(json!({
            "version": "1.2.3", "pid": 42, "uptime_s": uptime_s, "addresses": ["127.0.0.1:4420"],
            "exports": [export(1, "live", None), export(2, "fenced", Some("map-in-doubt"))],
            "hosts": hosts, "fences": fences, "cores": [core], "histograms": histograms
        }))
        .expect("a status")
    }

    pub(in crate::cli::top) fn samples() -> (Sample, Sample) {
        let at = Instant::now();
        let first = target(10, 1000, &[host(1, "nqn.h", 100)], &[histogram(1, "nqn.h", 40, 100)]);
        let second = target(
            12,
            1_001_000,
            &[host(1, "nqn.h", 2100), host(2, "nqn.new", 10)],
            &[
                histogram(1, "nqn.h", 60, 2000),
                histogram(2, "nqn.new", 20, 10),
                histogram(1, "nqn.h2", 10, 4000),
            ],
        );
        let errors = Vec::new();
        (
            Sample { at, targets: vec![first], errors: errors.clone() },
            Sample { at: at + Duration::from_secs(2), targets: vec![second], errors },
        )
    }

    #[test]
    fn rates_and_percentiles_are_of_what_was_between_the_looks() {
        let (before, now) = samples();
        let view = View::between(&before, &now);
        // The histogram of the pair that was there before began anew: all of it counts, and so does what is new.
        assert_eq!(view.exports.iter().map(|row| row.commands).collect::<Vec<_>>(), [3000, 5]);
        let [first, second] = &view.hosts[..] else { panic!("two hosts: {view:?}") };
        assert_eq!(first.rates, Rates { commands: 1000, read_bytes: 1000 * 4096, written_bytes: 1000 * 512 });
        assert_eq!((second.rates.commands, second.rates.read_bytes), (5, 5 * 4096));
        assert!(first.times.p50_ns > second.times.p50_ns, "{view:?}");
        assert_eq!(view.rates.read_bytes, 1005 * 4096);
        assert!(view.total.p50_ns < view.total.p99_ns && view.stages[0] == view.total, "{view:?}");
        let core = &view.cores[0];
        assert_eq!((core.cpu, core.busy, core.polling, core.asleep, core.sleeps), (3, 500, 250, 250, 500));
    }

    #[test]
    fn a_pair_that_counts_on_is_told_without_what_it_counted_before() {
        let counted = |count| target(10, 1000, &[], &[histogram(1, "nqn.h", 40, count)]);
        let at = Instant::now();
        let sample = |at, count| Sample { at, targets: vec![counted(count)], errors: Vec::new() };
        let view = View::between(&sample(at, 100), &sample(at + Duration::from_millis(500), 150));
        assert_eq!((view.rates.commands, view.exports[0].commands), (100, 100));
        let idle = View::between(&sample(at, 100), &sample(at, 100));
        assert_eq!(
            (idle.rates.commands, idle.exports[0].times.p99_ns),
            (0, None),
            "and nothing divides by nothing"
        );
    }

    #[test]
    fn of_a_target_that_was_not_there_before_nothing_was_between() {
        let (first, now) = samples();
        let nobody = Sample { at: first.at, targets: Vec::new(), errors: Vec::new() };
        let view = View::between(&nobody, &now);
        assert_eq!((view.rates, view.exports[0].commands), (Rates::default(), 0));
        assert!(View::between(&now, &nobody).is_empty());
    }

    #[test]
    fn who_has_ended_between_two_looks_is_missed_whether_it_answered_or_not() {
        let (_, now) = samples();
        let sample = |targets: &[&Status], silent: usize| {
            let targets = targets.iter().copied().cloned().collect();
            Sample { at: now.at, targets, errors: vec!["timed out".to_owned(); silent] }
        };
        let one = &now.targets[0];
        let other = &Status { pid: 43, ..one.clone() };
        let gone = |before: &Sample, now: &Sample| now.first_gone(before);
        let both = sample(&[one, other], 0);
        assert_eq!(gone(&both, &both), None);
        assert_eq!(gone(&sample(&[], 0), &both), None, "new ones are no loss");
        assert_eq!(gone(&both, &sample(&[other], 0)).as_deref(), Some("the target of process 42"));
        assert_eq!(gone(&both, &sample(&[other], 1)), None, "it is the one that does not answer");
        let silent = sample(&[one], 1);
        assert_eq!(gone(&silent, &both), None, "it answers now");
        assert_eq!(gone(&silent, &sample(&[one], 0)).as_deref(), Some("a target that did not answer"));
        assert!(gone(&sample(&[], 1), &sample(&[], 0)).is_some());
    }

    #[test]
    fn rows_are_sorted_as_asked_for() {
        let (before, now) = samples();
        let mut view = View::between(&before, &now);
        let mut order = |by| {
            view.sort(by);
            (view.exports[0].nsid, view.hosts[0].cntlid)
        };
        assert_eq!(order(Sort::Rate), (1, 1));
        assert_eq!(order(Sort::Latency), (1, 1));
        assert_eq!(order(Sort::Name), (1, 1));
        view.exports[1].commands = 9999;
        view.hosts[1].times.p99_ns = Some(u64::MAX);
        view.sort(Sort::Rate);
        assert_eq!(view.exports[0].nsid, 2);
        view.sort(Sort::Latency);
        assert_eq!(view.hosts[0].cntlid, 2);
    }
}
