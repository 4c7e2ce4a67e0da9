//! What a run gave.

use super::{BenchOptions, Pattern, Verify};
use hdrhistogram::Histogram;
use std::time::Duration;

/// Latencies beyond this many nanoseconds count as this: a minute, more than any deadline here.
const LATENCY_NS_MAX: u64 = 60_000_000_000;
/// Faults told in words.
const FAULTS_TOLD_MAX: usize = 16;

/// Latencies in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct LatencyReport {
    /// The shortest.
    pub min_ns: u64,
    /// The average.
    pub mean_ns: f64,
    /// The 50th percentile.
    pub p50_ns: u64,
    /// The 90th percentile.
    pub p90_ns: u64,
    /// The 99th percentile.
    pub p99_ns: u64,
    /// The 99.9th percentile.
    pub p999_ns: u64,
    /// The 99.99th percentile.
    pub p9999_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// All reads, or all writes.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct DirectionReport {
    /// Commands that succeeded.
    pub commands: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Commands a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// From submission to completion.
    pub latency: LatencyReport,
}

/// What verification found.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct VerifyReport {
    /// Logical blocks that were read and checked.
    pub blocks_checked: u64,
    /// Reads with at least one wrong block.
    pub faults: u64,
    /// Units left in doubt by a broken connection or a failed write: checked against several generations.
    pub units_in_doubt: u64,
    /// The first faults in words.
    pub first_faults: Vec<String>,
}

/// The result of a run.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct BenchReport {
    /// The order of the units.
    pub pattern: Pattern,
    /// Bytes of a read or write.
    pub unit_len: u32,
    /// Commands in flight on each queue.
    pub depth: u16,
    /// Queues.
    pub queues: u16,
    /// Reads in percent.
    pub read_percent: u8,
    /// Verification.
    pub verify_mode: Verify,
    /// How long the workload ran, without the verification at its end.
    pub elapsed_s: f64,
    /// Reads of the workload.
    pub reads: DirectionReport,
    /// Writes of the workload.
    pub writes: DirectionReport,
    /// Flush commands that succeeded.
    pub flushes: u64,
    /// Commands that failed although the connection lived.
    pub errors: u64,
    /// The first of these in words.
    pub first_error: Option<String>,
    /// Times that a queue was connected anew.
    pub reconnects: u64,
    /// Verification.
    pub verify: VerifyReport,
}

impl BenchReport {
    /// Whether every command succeeded and every block checked was right.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.errors == 0 && self.verify.faults == 0
    }

    pub(super) fn merge(options: &BenchOptions, workers: Vec<WorkerReport>) -> Self {
        let mut all = WorkerReport::new();
        for worker in workers {
            all.add(worker);
        }
        let elapsed = all.elapsed.as_secs_f64();
        let direction = |histogram: &Histogram<u64>| {
            let commands = histogram.len();
            let bytes = commands * u64::from(options.unit_len);
            DirectionReport {
                commands,
                bytes,
                iops: rate(commands, elapsed),
                bytes_per_s: rate(bytes, elapsed),
                latency: latency(histogram),
            }
        };
        Self {
            pattern: options.pattern,
            unit_len: options.unit_len,
            depth: options.depth,
            queues: options.queues,
            read_percent: options.read_percent,
            verify_mode: options.verify,
            elapsed_s: elapsed,
            reads: direction(&all.reads),
            writes: direction(&all.writes),
            flushes: all.flushes,
            errors: all.errors,
            first_error: all.first_error,
            reconnects: all.reconnects,
            verify: all.verify,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
/// A rate by the second.
pub(crate) fn rate(count: u64, elapsed_s: f64) -> f64 {
    if elapsed_s > 0.0 { count as f64 / elapsed_s } else { 0.0 }
}

/// The figures of a histogram of nanoseconds.
pub(crate) fn latency(histogram: &Histogram<u64>) -> LatencyReport {
    if histogram.is_empty() {
        return LatencyReport::default();
    }
    LatencyReport {
        min_ns: histogram.min(),
        mean_ns: histogram.mean(),
        p50_ns: histogram.value_at_quantile(0.5),
        p90_ns: histogram.value_at_quantile(0.9),
        p99_ns: histogram.value_at_quantile(0.99),
        p999_ns: histogram.value_at_quantile(0.999),
        p9999_ns: histogram.value_at_quantile(0.9999),
        max_ns: histogram.max(),
    }
}

/// What one worker measured.
pub(super) struct WorkerReport {
    pub(super) elapsed: Duration,
    pub(super) reads: Histogram<u64>,
    pub(super) writes: Histogram<u64>,
    pub(super) flushes: u64,
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
    pub(super) reconnects: u64,
    pub(super) verify: VerifyReport,
}

impl WorkerReport {
    pub(super) fn new() -> Self {
        let histogram = || {
            // The bounds are constants for which this cannot fail.
            Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)
                .expect("1 to a minute in three digits is possible")
        };
        Self {
            elapsed: Duration::ZERO,
            reads: histogram(),
            writes: histogram(),
            flushes: 0,
            errors: 0,
            first_error: None,
            reconnects: 0,
            verify: VerifyReport::default(),
        }
    }

    /// Counts a command that failed.
    pub(super) fn error(&mut self, error: &impl std::fmt::Display) {
        self.errors += 1;
        if self.first_error.is_none() {
            self.first_error = Some(error.to_string());
        }
    }

    /// Counts a read with a wrong block.
    pub(super) fn fault(&mut self, told: impl FnOnce() -> String) {
        self.verify.faults += 1;
        if self.verify.first_faults.len() < FAULTS_TOLD_MAX {
            self.verify.first_faults.push(told());
        }
    }

    fn add(&mut self, other: Self) {
        self.elapsed = self.elapsed.max(other.elapsed);
        // Both have the same bounds, so adding cannot fail.
        let _ = self.reads.add(&other.reads);
        let _ = self.writes.add(&other.writes);
        self.flushes += other.flushes;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
        self.reconnects += other.reconnects;
        self.verify.blocks_checked += other.verify.blocks_checked;
        self.verify.faults += other.verify.faults;
        self.verify.units_in_doubt += other.verify.units_in_doubt;
        self.verify.first_faults.extend(other.verify.first_faults);
        self.verify.first_faults.truncate(FAULTS_TOLD_MAX);
    }
}
