//! What cores did with their time, and how long commands took.
//!
//! Bounded: [`SERIES_MAX`] pairs of a host and an export have series of their own, first come, first served; the others go
//! together.

use std::fmt;

use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use super::{Labels, Writer, and, core_label, number};
use crate::control::latency::merged;
use crate::reactor::{CoreActivity, CoreStats, Wake};
use crate::stage::{BUCKETS, Counts, Key, Row, Stage, Times, bucket_end_ns};

/// Pairs of a host and an export on the page.
const SERIES_MAX: usize = 64;
/// The bucket that ends at 1.024 us: the shortest that is told.
const FIRST_BUCKET: usize = 15;
/// Octaves from there on, to 1.07 s. The buckets within them are told together.
const OCTAVES: usize = 20;
/// Buckets of an octave.
const STEP: usize = 4;

const _: () = assert!(FIRST_BUCKET + OCTAVES * STEP < BUCKETS);

/// Seconds in each state, how often it was entered, and sleeps by what ended them.
pub(super) fn activity(writer: &mut Writer<'_>, cores: &[(CoreStats, CoreActivity)]) -> fmt::Result {
    let states = cores.iter().enumerate().flat_map(|(core, (_, activity))| {
        let CoreActivity { busy_ns, polling_ns, asleep_ns, .. } = activity;
        [("busy", busy_ns), ("polling", polling_ns), ("asleep", asleep_ns)]
            .map(|(state, ns)| (and(core_label(core), "state", state), number(*ns) / 1e9))
    });
    let help = "Time of the core with work, polling without any, and asleep in the kernel";
    writer.seconds("core_state", help, states)?;
    let entered = cores.iter().enumerate().flat_map(|(core, (_, activity))| {
        let CoreActivity { begins_of_work, begins_of_polling, .. } = *activity;
        [("busy", begins_of_work), ("polling", begins_of_polling), ("asleep", activity.sleeps())]
            .map(|(state, count)| (and(core_label(core), "state", state), count))
    });
    writer.counters("core_state_entries", "How often the core entered each state", None, entered)?;
    let wakes = cores.iter().enumerate().flat_map(|(core, (_, activity))| {
        let told = Wake::ALL.iter().zip(activity.wakes);
        told.map(|(wake, count)| (and(core_label(core), "cause", wake.word()), count)).collect::<Vec<_>>()
    });
    writer.counters("core_wakes", "Sleeps of the core, by what ended them", None, wakes)
}

/// How long commands took: by host and export, and by core.
pub(super) fn stages(writer: &mut Writer<'_>, rows: &[Row]) -> fmt::Result {
    let pairs = merged(rows, SERIES_MAX);
    let pairs = pairs.iter().map(|(key, times)| (labels_of(key.as_ref()), times));
    let pairs: Vec<_> = pairs.collect();
    told(writer, "command", "Commands, from the capsule to the sent answer", &whole(&pairs))?;
    told(writer, "command_stage", "The stages of commands", &by_stage(&pairs))?;
    let mut cores: Vec<Times> = Vec::new();
    for row in rows {
        if cores.len() <= row.core {
            cores.resize_with(row.core + 1, Times::default);
        }
        cores[row.core].add(&row.times);
    }
    let cores: Vec<_> = cores.iter().enumerate().map(|(core, times)| (core_label(core), times)).collect();
    told(
        writer,
        "core_command",
        "Commands of the core, from the capsule to the sent answer",
        &whole(&cores),
    )?;
    told(writer, "core_command_stage", "The stages of the core's commands", &by_stage(&cores))
}

/// All others have labels that no NQN can have.
fn labels_of(key: Option<&Key>) -> Labels<'static> {
    let Some(Key { host, subsystem, nsid }) = key else {
        return ["subsystem", "nsid", "host"].map(|label| (label, "others".to_owned())).into();
    };
    vec![("subsystem", subsystem.to_string()), ("nsid", nsid.to_string()), ("host", host.to_string())]
}

type Series<'a> = Vec<(Labels<'static>, &'a Counts)>;

fn whole<'a>(all: &[(Labels<'static>, &'a Times)]) -> Series<'a> {
    all.iter().map(|(labels, times)| (labels.clone(), &times.total)).collect()
}

fn by_stage<'a>(all: &[(Labels<'static>, &'a Times)]) -> Series<'a> {
    let of = |(labels, times): &(Labels<'static>, &'a Times)| {
        let stages = Stage::ALL.iter().zip(&times.stages);
        stages.map(|(stage, counts)| (and(labels.clone(), "stage", stage.word()), counts)).collect::<Vec<_>>()
    };
    all.iter().flat_map(of).collect()
}

fn told(writer: &mut Writer<'_>, name: &str, help: &str, series: &Series<'_>) -> fmt::Result {
    if series.is_empty() {
        return Ok(());
    }
    let kind = MetricType::Histogram;
    let mut family = writer.encoder.encode_descriptor(name, help, Some(&Unit::Seconds), kind)?;
    for (labels, counts) in series {
        let count = counts.count();
        let mut before = 0;
        let mut buckets = Vec::with_capacity(OCTAVES + 2);
        for octave in 0..=OCTAVES {
            let bucket = FIRST_BUCKET + octave * STEP;
            let within = counts.within(bucket);
            buckets.push((number(bucket_end_ns(bucket)) / 1e9, within - before));
            before = within;
        }
        buckets.push((f64::INFINITY, count - before));
        let sum = number(counts.sum_ns()) / 1e9;
        family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_are_those_of_buckets() {
        assert_eq!(bucket_end_ns(FIRST_BUCKET), 1024);
        assert_eq!(bucket_end_ns(FIRST_BUCKET + STEP), 2048);
        assert_eq!(bucket_end_ns(FIRST_BUCKET + OCTAVES * STEP), 1024 << OCTAVES);
    }
}
