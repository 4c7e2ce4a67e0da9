//! What a responder that has no work comes to beside SPDK's target: nobody by this host and this kernel can do more.
//!
//! ```text
//!   ours / SPDK's                a row that misses its bar
//!   ours / the bare responder's  a row of the same work by the same host
//!   --------------------------
//!   the bare responder / SPDK's  where this misses the bar too, host and kernel are what limits, and not the target
//! ```
//!
//! By SPDK's initiator there may be two such responders: how responses are put together decides its rate, and the better one counts.
//! What it does not do: say anything of processor time, which the bare responder does not account for.

use crate::report::{Bar, Report, Row};

/// Behind the work, in names of rows beside SPDK's target, and what stands there beside the bare responder.
const PLACES: [(&str, &[&str]); 2] =
    [("/spdk/", &["/"]), ("/spdk-perf/", &["/spdk-perf/bare/", "/spdk-perf/bare-together/"])];

/// The most that can be had.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ceiling {
    /// In parts of what SPDK's target has.
    pub(super) ratio: f64,
    /// The row that tells, beside the one that it was asked of.
    pub(super) row: String,
    /// Whether it would do.
    pub(super) is_enough: bool,
}

impl Ceiling {
    /// That of a row; none where nothing tells of it.
    pub(super) fn of(report: &Report, row: &Row) -> Option<Self> {
        let (bar, ours) = (Bar::parse(row.bar.as_deref()?)?, row.ratio?);
        let (work, bare, label) = PLACES.iter().find_map(|(place, bare)| {
            let (work, label) = row.name.split_once(place)?;
            Some((work, bare, label))
        })?;
        let found = bare.iter().filter_map(|bare| {
            let name = format!("{work}{bare}{label}");
            let row = report.rows.iter().find(|row| row.name == name)?;
            Some((ours / row.ratio.filter(|ratio| *ratio > 0.0)?, name))
        });
        let is_better = |one: &f64, other: &f64| match bar {
            Bar::RatioAtMost(_) | Bar::OursAtMost(_) => other.total_cmp(one),
            Bar::RatioAtLeast(_) | Bar::OursAtLeast(_) => one.total_cmp(other),
        };
        let (ratio, row) = found.max_by(|(one, _), (other, _)| is_better(one, other))?;
        let is_enough = match bar {
            Bar::RatioAtMost(most) => ratio <= most,
            Bar::RatioAtLeast(least) => ratio >= least,
            // Of these no ratio tells.
            Bar::OursAtMost(_) | Bar::OursAtLeast(_) => return None,
        };
        Some(Self { ratio, row, is_enough })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Measurement;

    fn row(name: &str, ours: f64, bar: Option<Bar>) -> Row {
        let peer = Some(("peer", &[1.0][..]));
        let measured =
            Measurement { name: name.to_owned(), unit: "x", ours: &[ours], peer, bar, method: "made up" };
        Row::new(&measured, "here").unwrap()
    }

    #[test]
    fn where_a_responder_without_work_misses_the_bar_too_it_says_so() {
        let at_least = Some(Bar::RatioAtLeast(1.3));
        let rows = vec![
            row("target/null/randwrite/qd32/spdk-perf/iops", 1.0, at_least),
            row("target/null/randwrite/qd32/spdk-perf/bare/iops", 0.8, None),
            row("target/null/randwrite/qd32/iops", 0.5, None),
            row("target/null/randread/qd32/spdk-perf/iops", 1.2, at_least),
            row("target/null/randread/qd32/spdk-perf/bare/iops", 1.0, None),
            row("target/null/randread/qd32/spdk-perf/bare-together/iops", 0.75, None),
            row("target/null/randread/qd1/spdk/p50", 0.95, Some(Bar::RatioAtMost(0.85))),
            row("target/null/randread/qd1/p50", 1.1, None),
            row("target/null/randread/qd32/spdk-perf/cpu", 0.9, Some(Bar::RatioAtMost(0.8))),
            row("target/null/randread-digests/qd32/spdk/iops", 1.2, at_least),
        ];
        let report = Report { rows, absent: Vec::new() };
        let told = |name: &str| {
            let row = report.rows.iter().find(|row| row.name == name).unwrap();
            Ceiling::of(&report, row).map(|ceiling| {
                let rounded = (ceiling.ratio * 1000.0).round() / 1000.0;
                (rounded, ceiling.is_enough, ceiling.row.replace("target/null/", ""))
            })
        };
        let of = |ratio, is_enough, row: &str| Some((ratio, is_enough, row.to_owned()));
        assert_eq!(
            told("target/null/randwrite/qd32/spdk-perf/iops"),
            of(1.25, false, "randwrite/qd32/spdk-perf/bare/iops")
        );
        assert_eq!(
            told("target/null/randread/qd32/spdk-perf/iops"),
            of(1.6, true, "randread/qd32/spdk-perf/bare-together/iops"),
            "the better one"
        );
        assert_eq!(told("target/null/randread/qd1/spdk/p50"), of(0.864, false, "randread/qd1/p50"));
        for unknown in
            ["target/null/randread/qd32/spdk-perf/cpu", "target/null/randread-digests/qd32/spdk/iops"]
        {
            assert_eq!(told(unknown), None);
        }
        assert_eq!(told("target/null/randwrite/qd32/iops"), None, "it is beside no other");
    }
}
