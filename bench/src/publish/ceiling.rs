//! What a responder that has no work comes to beside SPDK's target, where ours misses a bar there.
//!
//! ```text
//!   ours / SPDK's                a row that misses its bar
//!   ours / the bare responder's  a row of the same work by the same host
//!   --------------------------
//!   the bare responder / SPDK's  where this misses the bar too, it is not the target's work that limits, but how it answers may
//! ```
//!
//! In the guest the targets have a device behind them: there neither the responder nor our driver alone can be outdone, and the slower of both
//! counts. It is a generous ceiling, for whatever the one takes of the processor that they share is not the other's.
//!
//! It answers at once, whatever has come, and ours gathers commands and answers where that pays: so ours may come to more. By SPDK's initiator
//! there may be two such responders: how responses are put together decides its rate, and the better one counts. The quotient is of two
//! medians, and as disturbed as they are; rows of another build or another machine make none. What it does not do: say anything of
//! processor time, which the bare responder does not account for.

use crate::report::{Bar, Report, Row};

/// Behind the work, in names of rows beside SPDK's target, and what stands there beside the bare responder.
const PLACES: [(&str, &[&str]); 2] =
    [("/spdk/", &["/"]), ("/spdk-perf/", &["/spdk-perf/bare/", "/spdk-perf/bare-together/"])];

/// The rows of the guest that are judged, those of the responder beside them, and that of the driver.
const IN_GUEST: &str = "guest/nvme/";
const RESPONDERS: [&str; 2] = ["bare", "bare-sleeps"];
const DRIVER: &str = "driver";

/// What the bare responder comes to.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ceiling {
    /// In parts of what the peer has.
    pub(super) ratio: f64,
    /// What ours has, in parts of the responder's.
    pub(super) ours: f64,
    /// The row that tells, beside the one that it was asked of.
    pub(super) row: String,
    /// Whether that would do.
    pub(super) is_enough: bool,
    /// Whether one of the two rows is.
    pub(super) is_disturbed: bool,
}

impl Ceiling {
    /// That of a row; none where nothing tells of it.
    pub(super) fn of(report: &Report, row: &Row) -> Option<Self> {
        let (bar, ratio) = (Bar::parse(row.bar.as_deref()?)?, row.ratio?);
        // Of ours alone no quotient tells.
        let (wanted, is_least) = match bar {
            Bar::RatioAtLeast(least) => (least, true),
            Bar::RatioAtMost(most) => (most, false),
            Bar::OursAtMost(_) | Bar::OursAtLeast(_) => return None,
        };
        if row.name.starts_with(IN_GUEST) && is_least {
            return Self::in_guest(report, row, ratio, wanted);
        }
        let (work, places, label) = PLACES.iter().find_map(|(place, bare)| {
            let (work, label) = row.name.split_once(place)?;
            Some((work, bare, label))
        })?;
        let found = places.iter().filter_map(|place| {
            let name = format!("{work}{place}{label}");
            let bare = report.rows.iter().find(|bare| bare.name == name && bare.machine == row.machine)?;
            let ours = bare.ratio.filter(|ours| *ours > 0.0)?;
            let ratio = ratio / ours;
            let is_enough = if is_least { ratio >= wanted } else { ratio <= wanted };
            let is_disturbed = row.is_disturbed() || bare.is_disturbed();
            Some(Self { ratio, ours, row: name, is_enough, is_disturbed })
        });
        found.max_by(|one, other| {
            let is_more = one.ratio.total_cmp(&other.ratio);
            if is_least { is_more } else { is_more.reverse() }
        })
    }

    /// That of a row of the guest: the quicker responder, or the driver where it is slower than that.
    fn in_guest(report: &Report, row: &Row, ratio: f64, wanted: f64) -> Option<Self> {
        let (work, label) = row.name.strip_prefix(IN_GUEST)?.rsplit_once('/')?;
        let peer = |name: String| {
            let mut all = report.rows.iter();
            let other = all.find(|other| other.name == name && other.machine == row.machine)?;
            other.peer.filter(|rate| *rate > 0.0).map(|rate| (rate, name))
        };
        let responders =
            RESPONDERS.iter().filter_map(|place| peer(format!("guest/null/{work}/{place}/{label}")));
        let responder = responders.max_by(|one, other| one.0.total_cmp(&other.0))?;
        let driver = peer(format!("{IN_GUEST}{work}/{DRIVER}/{label}"))?;
        let (most, name) = if driver.0 < responder.0 { driver } else { responder };
        let most = most / row.peer.filter(|rate| *rate > 0.0)?;
        let is_enough = most >= wanted;
        Some(Self { ratio: most, ours: ratio / most, row: name, is_enough, is_disturbed: false })
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
            row("target/null/randread-128k/qd16/spdk-perf/rate", 1.0, Some(Bar::RatioAtLeast(1.05))),
            row("target/null/randread-128k/qd16/spdk-perf/bare/rate", 1.1, None),
            row("target/null/randread/qd32/spdk-perf/cpu", 0.9, Some(Bar::RatioAtMost(0.8))),
            row("target/null/randread-digests/qd32/spdk/iops", 1.2, at_least),
            row("target/null/randread/64x4/spdk-perf/iops", 1.2, at_least),
            row("target/null/randread/64x4/spdk-perf/bare/iops", 0.96, None),
            row("target/null/randread/256x4/spdk/iops", 1.2, at_least),
            row("target/null/randread/256x4/iops", 0.8, None),
            row("target/null/randread/256x4/spdk-perf/iops", 1.1, at_least),
        ];
        let report = Report { rows, absent: Vec::new() };
        let told = |name: &str| {
            let row = report.rows.iter().find(|row| row.name == name).unwrap();
            Ceiling::of(&report, row).map(|ceiling| {
                let rounded = [ceiling.ratio, ceiling.ours].map(|part| (part * 1000.0).round() / 1000.0);
                assert!(!ceiling.is_disturbed);
                (rounded, ceiling.is_enough, ceiling.row.replace("target/null/", ""))
            })
        };
        let of = |ratio, ours, is_enough, row: &str| Some(([ratio, ours], is_enough, row.to_owned()));
        assert_eq!(
            told("target/null/randwrite/qd32/spdk-perf/iops"),
            of(1.25, 0.8, false, "randwrite/qd32/spdk-perf/bare/iops")
        );
        assert_eq!(
            told("target/null/randread/qd32/spdk-perf/iops"),
            of(1.6, 0.75, true, "randread/qd32/spdk-perf/bare-together/iops"),
            "the better one"
        );
        assert_eq!(told("target/null/randread/qd1/spdk/p50"), of(0.864, 1.1, false, "randread/qd1/p50"));
        assert_eq!(
            told("target/null/randread-128k/qd16/spdk-perf/rate"),
            of(0.909, 1.1, false, "randread-128k/qd16/spdk-perf/bare/rate"),
            "ours may come to more"
        );
        assert_eq!(
            told("target/null/randread/64x4/spdk-perf/iops"),
            of(1.25, 0.96, false, "randread/64x4/spdk-perf/bare/iops"),
            "many connections have one"
        );
        assert_eq!(told("target/null/randread/256x4/spdk/iops"), of(1.5, 0.8, true, "randread/256x4/iops"));
        for unknown in [
            "target/null/randread/qd32/spdk-perf/cpu",
            "target/null/randread-digests/qd32/spdk/iops",
            "target/null/randread/256x4/spdk-perf/iops",
        ] {
            assert_eq!(told(unknown), None);
        }
        assert_eq!(told("target/null/randwrite/qd32/iops"), None, "it is beside no other");
    }

    #[test]
    fn in_the_guest_the_slower_of_responder_and_driver_counts() {
        let of = |name: &str, ours: f64, peer: f64, bar| {
            let peer = [peer];
            let measured = Measurement {
                name: format!("guest/{name}"),
                unit: "IOPS",
                ours: &[ours],
                peer: Some(("peer", &peer)),
                bar,
                method: "made up",
            };
            Row::new(&measured, "here").unwrap()
        };
        let mut rows = vec![
            of("nvme/randread/qd32/iops", 12e3, 10e3, Some(Bar::RatioAtLeast(1.5))),
            of("null/randread/qd32/bare/iops", 20e3, 12e3, None),
            of("null/randread/qd32/bare-sleeps/iops", 20e3, 20e3, None),
            of("nvme/randread/qd32/driver/iops", 12e3, 60e3, None),
        ];
        let told = |rows: &[Row]| Ceiling::of(&Report { rows: rows.to_vec(), absent: Vec::new() }, &rows[0]);
        let ceiling = told(&rows).unwrap();
        assert!((ceiling.ratio - 2.0).abs() < 1e-9 && (ceiling.ours - 0.6).abs() < 1e-9, "{ceiling:?}");
        assert!(ceiling.row.contains("bare-sleeps") && ceiling.is_enough, "the quicker of both");
        rows[3].peer = Some(14e3);
        let ceiling = told(&rows).unwrap();
        assert!(ceiling.row.contains("driver") && !ceiling.is_enough, "{ceiling:?}");
        rows.remove(3);
        assert_eq!(told(&rows), None, "without the driver nothing is known");
    }

    #[test]
    fn rows_of_another_build_tell_nothing_and_what_is_disturbed_is_told_so() {
        let mut rows = vec![
            row("target/null/randwrite/qd32/spdk/iops", 1.0, Some(Bar::RatioAtLeast(1.3))),
            row("target/null/randwrite/qd32/iops", 0.8, None),
        ];
        let told = |rows: &[Row]| {
            let report = Report { rows: rows.to_vec(), absent: Vec::new() };
            Ceiling::of(&report, &report.rows[0]).map(|ceiling| ceiling.is_disturbed)
        };
        assert_eq!(told(&rows), Some(false));
        rows[1].method = crate::target::calm::DISTURBED.to_owned();
        assert_eq!(told(&rows), Some(true));
        rows[1].machine = "another build".to_owned();
        assert_eq!(told(&rows), None);
    }
}
