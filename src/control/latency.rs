//! How long commands took, and what cores did with their time, as a running target tells of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::reactor::{CoreGauges, Wake};
use crate::stage::{BUCKETS, Book, Counts, Key, Row, Stage, Times};

/// A core.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreStatus {
    /// The CPU that it runs on.
    pub cpu: usize,
    /// Its connections.
    pub connections: usize,
    /// Its commands on devices.
    pub commands: usize,
    /// Bytes of its buffers in use.
    pub buffer_bytes: usize,
    /// Time of turns that had work, in microseconds, since it runs.
    pub busy_us: u64,
    /// Time of turns that found none.
    pub polling_us: u64,
    /// Time asleep.
    pub asleep_us: u64,
    /// How often it was woken, by what: the words of [`Wake`].
    pub wakes: BTreeMap<String, u64>,
}

impl CoreStatus {
    pub(super) fn of(gauges: &CoreGauges) -> Self {
        let (stats, activity) = (gauges.get(), gauges.activity());
        let wakes = Wake::ALL.iter().zip(activity.wakes);
        Self {
            cpu: gauges.cpu(),
            connections: stats.connections,
            commands: stats.commands,
            buffer_bytes: stats.buffer_bytes,
            busy_us: activity.busy_ns / 1000,
            polling_us: activity.polling_ns / 1000,
            asleep_us: activity.asleep_ns / 1000,
            wakes: wakes.map(|(wake, count)| (wake.word().to_owned(), count)).collect(),
        }
    }
}

/// How long the commands of one host to one export took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyStatus {
    /// The NQN of the export's subsystem. These three are missing where commands of several are counted together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// The export's identifier there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nsid: Option<u32>,
    /// The host's NQN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// From the capsule to the sent answer.
    pub total: StageTimes,
    /// Of that, each stage by its word.
    pub stages: BTreeMap<String, StageTimes>,
}

/// How long a stage took: the ends of buckets, so at most a quarter or 32 ns too much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimes {
    /// Of how many commands.
    pub count: u64,
    /// The sum, in nanoseconds.
    pub sum_ns: u64,
    /// Half of them took less.
    pub p50_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// 999 of 1000.
    pub p999_ns: u64,
}

/// The histograms behind a [`LatencyStatus`], for who asks again and wants to know what was in between.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistogramStatus {
    /// The NQN of the export's subsystem. These three are missing where commands of several are counted together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// The export's identifier there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nsid: Option<u32>,
    /// The host's NQN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// From the capsule to the sent answer.
    pub total: BucketCounts,
    /// Of that, each stage of [`Stage::ALL`].
    pub stages: [BucketCounts; Stage::ALL.len()],
}

/// What a histogram counted: the numbers and counts of the buckets that have any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BucketCounts(Vec<(usize, u64)>);

impl BucketCounts {
    pub(crate) fn of(counts: &Counts) -> Self {
        Self(counts.buckets().iter().copied().enumerate().filter(|(_, count)| *count > 0).collect())
    }

    /// As a histogram whose sum nobody knows. Buckets that there are none of are passed over: the document may be of another
    /// version.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut buckets = [0; BUCKETS];
        for (at, count) in &self.0 {
            if let Some(bucket) = buckets.get_mut(*at) {
                *bucket = *count;
            }
        }
        Counts::new(buckets, 0)
    }
}

impl HistogramStatus {
    fn of((key, times): (Option<Key>, Times)) -> Self {
        let stages = times.stages.each_ref().map(BucketCounts::of);
        let total = BucketCounts::of(&times.total);
        let Some(Key { host, subsystem, nsid }) = key else {
            return Self { total, stages, ..Self::default() };
        };
        let (host, subsystem) = (Some(host.into_string()), Some(subsystem.into_string()));
        Self { subsystem, nsid: Some(nsid), host, total, stages }
    }
}

impl StageTimes {
    pub(super) fn of(counts: &Counts) -> Self {
        let quantile = |part| counts.quantile_ns(part).unwrap_or_default();
        Self {
            count: counts.count(),
            sum_ns: counts.sum_ns(),
            p50_ns: quantile(0.5),
            p99_ns: quantile(0.99),
            p999_ns: quantile(0.999),
        }
    }
}

impl LatencyStatus {
    pub(super) fn of((key, times): (Option<Key>, Times)) -> Self {
        let stages = Stage::ALL.iter().zip(&times.stages);
        let stages =
            stages.map(|(stage, counts)| (stage.word().to_owned(), StageTimes::of(counts))).collect();
        let total = StageTimes::of(&times.total);
        let key =
            key.map(|Key { host, subsystem, nsid }| (host.into_string(), subsystem.into_string(), nsid));
        let (host, subsystem, nsid) = key
            .map_or((None, None, None), |(host, subsystem, nsid)| (Some(host), Some(subsystem), Some(nsid)));
        Self { subsystem, nsid, host, total, stages }
    }
}

/// All that is counted.
pub(super) fn of_book(book: &Book) -> Vec<LatencyStatus> {
    merged(&book.rows(), usize::MAX).into_iter().map(LatencyStatus::of).collect()
}

/// The same as histograms.
pub(super) fn histograms_of_book(book: &Book) -> Vec<HistogramStatus> {
    merged(&book.rows(), usize::MAX).into_iter().map(HistogramStatus::of).collect()
}

/// The rows of all cores by whose commands they count, in the order of the first; those beyond `most`, and those that nobody
/// is named for, together at the end, when there are any.
pub(super) fn merged(rows: &[Row], most: usize) -> Vec<(Option<Key>, Times)> {
    let mut named: Vec<(Option<Key>, Times)> = Vec::new();
    let mut places: BTreeMap<&Key, usize> = BTreeMap::new();
    let mut others = Times::default();
    for row in rows {
        let times = match &row.key {
            Some(key) if places.contains_key(key) || named.len() < most => {
                let at = *places.entry(key).or_insert_with(|| {
                    named.push((Some(key.clone()), Times::default()));
                    named.len() - 1
                });
                &mut named[at].1
            }
            _ => &mut others,
        };
        times.add(&row.times);
    }
    if others.total.count() > 0 {
        named.push((None, others));
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::{Cell, Stamp, Stamps};

    fn row(core: usize, nsid: Option<u32>, commands: u64) -> Row {
        let key = nsid.map(|nsid| Key { host: "host".into(), subsystem: "subsystem".into(), nsid });
        let cell = Cell::default();
        cell.record(&Stamps::NONE, Stamp::from_ns(1000), commands);
        Row { core, key, times: cell.times() }
    }

    fn told(rows: &[Row], most: usize) -> Vec<(Option<u32>, u64)> {
        let merged = merged(rows, most).into_iter().map(LatencyStatus::of);
        merged.map(|it| (it.nsid, it.total.count)).collect()
    }

    #[test]
    fn cores_add_up_and_what_is_too_much_goes_together() {
        let rows = [
            row(0, None, 0),
            row(0, Some(1), 10),
            row(0, Some(2), 5),
            row(1, None, 3),
            row(1, Some(1), 7),
            row(1, Some(3), 2),
        ];
        assert_eq!(told(&rows, 9), [(Some(1), 17), (Some(2), 5), (Some(3), 2), (None, 3)]);
        assert_eq!(told(&rows, 1), [(Some(1), 17), (None, 10)]);
        assert_eq!(told(&rows[..3], 9), [(Some(1), 10), (Some(2), 5)], "no row for others that are none");
    }

    #[test]
    fn histograms_go_through_a_document_and_back() {
        let [(key, times)] = &merged(&[row(0, Some(1), 4)], 1)[..] else { panic!("one") };
        let told = HistogramStatus::of((key.clone(), times.clone()));
        let text = serde_json::to_string(&told).expect("a document");
        let read: HistogramStatus = serde_json::from_str(&text).expect("the same document");
        assert_eq!(read, told);
        assert_eq!(read.total.counts().buckets(), times.total.buckets());
        assert_eq!(read.stages[5].counts().quantile_ns(0.5), times.stages[5].quantile_ns(0.5));
        assert_eq!(BucketCounts(vec![(BUCKETS, 7)]).counts().count(), 0, "no bucket of ours");
    }

    #[test]
    fn times_are_told_with_their_stages() {
        let [(key, times)] = &merged(&[row(0, Some(1), 4)], 1)[..] else { panic!("one") };
        let told = LatencyStatus::of((key.clone(), times.clone()));
        assert_eq!(
            told.total,
            StageTimes { count: 4, sum_ns: 4000, p50_ns: 1024, p99_ns: 1024, p999_ns: 1024 }
        );
        assert_eq!(told.stages.len(), Stage::ALL.len());
        assert_eq!(told.stages["send"], told.total, "all stamps but the last are none");
    }
}
