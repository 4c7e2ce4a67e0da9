//! Which pictures the rows give: lines of rows of one window, and what a command costs, by stage.

use crate::report::{Report, Row};
use crate::target::cost::CLOCK;

/// Where curves are, in the names of rows.
const CURVES: &str = "target/curve/";
/// Where costs are.
const COSTS: &str = "target/cost/null/";
const OURS: &str = "fastice";

/// One line: its name, and its points in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// A bar of parts: its name, and the name and length of each part.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) parts: Vec<(String, f64)>,
}

/// What is drawn.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Shape {
    /// Lines, and what the axes are.
    Lines([&'static str; 2], Vec<Line>),
    /// Bars, and what their length is.
    Bars(&'static str, Vec<Bar>),
}

/// One picture.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    /// Of its file.
    pub(super) name: String,
    /// Above it.
    pub(super) title: String,
    pub(super) shape: Shape,
}

/// All that the rows give something for.
pub(super) fn all(report: &Report) -> Vec<Plot> {
    const RATE: &str = "1000 IOPS";
    let mut plots = Vec::new();
    for work in ["randread", "randwrite"] {
        let points = points(report, &format!("null/{work}"));
        let put = |point: fn(&Point) -> (f64, f64)| lines(&points, point);
        plots.push(Plot {
            name: format!("null-{work}-rate"),
            title: format!("null, 4 KiB {work}: rate against queue depth, one connection"),
            shape: Shape::Lines(["queue depth", RATE], put(|point| (point.load, point.iops / 1e3))),
        });
        plots.push(Plot {
            name: format!("null-{work}-latency"),
            title: format!("null, 4 KiB {work}: median latency against rate"),
            shape: Shape::Lines([RATE, "us"], put(|point| (point.iops / 1e3, point.p50_us))),
        });
    }
    let many = points(report, "null/randread-connections");
    plots.push(Plot {
        name: "null-randread-connections".to_owned(),
        title: "null, 4 KiB randread: rate against connections, 4 commands in flight on each".to_owned(),
        shape: Shape::Lines(["connections", RATE], lines(&many, |point| (point.load, point.iops / 1e3))),
    });
    plots.extend([costs(report, "qd1"), costs(report, "qd32")]);
    plots.retain(|plot| match &plot.shape {
        Shape::Lines(_, lines) => lines.iter().any(|line| line.points.len() > 1),
        Shape::Bars(_, bars) => !bars.is_empty(),
    });
    plots
}

/// One load on one side.
#[derive(Clone, Debug, PartialEq)]
struct Point {
    side: String,
    load: f64,
    iops: f64,
    p50_us: f64,
}

/// The points of a curve, of one window: that of its first row.
fn points(report: &Report, curve: &str) -> Vec<Point> {
    let place = format!("{CURVES}{curve}/");
    let of_it: Vec<&Row> = report.rows.iter().filter(|row| row.name.starts_with(&place)).collect();
    let window = of_it.iter().find_map(|row| row.window.as_deref());
    let mut points: Vec<Point> = Vec::new();
    for row in of_it.iter().filter(|row| row.window.is_some() && row.window.as_deref() == window) {
        let Some(load) = row.name.strip_prefix(&place).and_then(|rest| rest.strip_suffix("/iops")) else {
            continue;
        };
        let Some(load) = load.split('/').next().and_then(number) else { continue };
        let p50_name = format!("{}p50", row.name.trim_end_matches("iops"));
        let Some(p50) = of_it.iter().find(|other| other.name == p50_name && other.window == row.window)
        else {
            continue;
        };
        let mut put = |side: &str, iops, p50_us| {
            // Ours stands beside each peer, with the same numbers.
            if !points.iter().any(|point| point.side == side && point.load == load) {
                points.push(Point { side: side.to_owned(), load, iops, p50_us });
            }
        };
        put(OURS, row.ours, p50.ours);
        if let (Some(iops), Some(p50_us), Some(name)) = (row.peer, p50.peer, &row.peer_name) {
            put(name, iops, p50_us);
        }
    }
    points.sort_by(|one, other| one.load.total_cmp(&other.load));
    points
}

/// Of `qd32` the depth, of `64x4` the connections.
fn number(load: &str) -> Option<f64> {
    match (load.strip_prefix("qd"), load.split_once('x')) {
        (Some(depth), _) => depth.parse().ok(),
        (None, Some((connections, _))) => connections.parse().ok(),
        (None, None) => None,
    }
}

fn lines(points: &[Point], place: fn(&Point) -> (f64, f64)) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for point in points {
        match lines.iter_mut().find(|line| line.name == point.side) {
            Some(line) => line.points.push(place(point)),
            None => lines.push(Line { name: point.side.clone(), points: vec![place(point)] }),
        }
    }
    lines
}

/// What a command costs at this depth: a bar for each kind of work, and for each side that has it.
fn costs(report: &Report, load: &str) -> Plot {
    // Where it is known, cycles: they are the same at any clock.
    let clock_ghz = report.rows.iter().find(|row| row.name == CLOCK).map(|row| row.ours);
    let cost = |us: f64| clock_ghz.map_or(us, |ghz| us * 1e3 * ghz);
    let unit = if clock_ghz.is_some() { "cycles a command" } else { "us a command" };
    let mut bars = Vec::new();
    for work in ["randread", "randwrite"] {
        let place = format!("{COSTS}{work}/{load}/");
        let of_it: Vec<_> =
            report.rows.iter().filter_map(|row| Some((row.name.strip_prefix(&place)?, row))).collect();
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for stage in STAGES {
            let Some((_, row)) = of_it.iter().find(|(name, _)| *name == stage) else { continue };
            if stage != PROCESS {
                ours.push((stage.to_owned(), cost(row.ours)));
            }
            theirs.extend(row.peer.map(|us| (stage.to_owned(), cost(us))));
        }
        let peer = of_it.iter().find_map(|(_, row)| row.peer_name.as_deref());
        bars.extend((!ours.is_empty()).then(|| Bar { name: format!("{OURS}, {work}"), parts: ours }));
        let name = peer.and_then(|peer| peer.split(',').next()).unwrap_or_default();
        bars.extend((!theirs.is_empty()).then(|| Bar { name: format!("{name}, {work}"), parts: theirs }));
    }
    Plot {
        name: format!("cost-{load}"),
        title: format!("null, 4 KiB, {load}: where the time of the target's core goes"),
        shape: Shape::Bars(unit, bars),
    }
}

/// All that a peer has outside of the kernel.
const PROCESS: &str = "process";
/// In the order in which a command meets them.
const STAGES: [&str; 12] = [
    "kernel-receive",
    "receive",
    "parse",
    "command",
    "lookup",
    "queue",
    "device",
    "send",
    "else",
    PROCESS,
    "kernel-send",
    "kernel-else",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Measurement;

    fn row(name: &str, peer_name: &str, ours: f64, peer: f64, window: Option<&str>) -> Row {
        let (ours, peer) = ([ours], [peer]);
        let name = format!("target/{name}");
        let peer = Some((peer_name, &peer[..]));
        let measured = Measurement { name, unit: "IOPS", ours: &ours, peer, bar: None, method: "made up" };
        Row { window: window.map(str::to_owned), ..Row::new(&measured, "here").unwrap() }
    }

    fn found(shape: &Shape) -> &[Line] {
        match shape {
            Shape::Lines(_, lines) => lines,
            Shape::Bars(..) => panic!("bars"),
        }
    }

    #[test]
    fn ours_and_each_peer_have_a_line_with_a_point_for_each_load_of_one_window() {
        let now = Some("now");
        let rows = vec![
            row("curve/null/randread/qd1/iops", "bare", 80e3, 100e3, now),
            row("curve/null/randread/qd1/p50", "bare", 11.0, 9.0, now),
            row("curve/null/randread/qd1/spdk/iops", "spdk", 80e3, 70e3, now),
            row("curve/null/randread/qd1/spdk/p50", "spdk", 11.0, 12.0, now),
            row("curve/null/randread/qd32/iops", "bare", 600e3, 900e3, now),
            row("curve/null/randread/qd32/p50", "bare", 50.0, 40.0, now),
            row("curve/null/randread/qd128/iops", "bare", 1.0, 1.0, Some("another time")),
            row("curve/null/randread/qd128/p50", "bare", 1.0, 1.0, Some("another time")),
            row("curve/null/randread-connections/1x4/iops", "bare", 300e3, 1.0, now),
            row("curve/null/randread-connections/1x4/p50", "bare", 3.0, 1.0, now),
            row("curve/null/randread-connections/64x4/iops", "bare", 500e3, 1.0, now),
            row("curve/null/randread-connections/64x4/p50", "bare", 5.0, 1.0, now),
            row("null/randread/qd64/iops", "bare", 1.0, 1.0, None),
        ];
        let plots = all(&Report { rows, absent: Vec::new() });
        let names: Vec<_> = plots.iter().map(|plot| plot.name.as_str()).collect();
        assert_eq!(names, ["null-randread-rate", "null-randread-latency", "null-randread-connections"]);
        let rates = found(&plots[0].shape);
        assert_eq!((rates[0].name.as_str(), &rates[0].points[..]), (OURS, &[(1.0, 80.0), (32.0, 600.0)][..]));
        assert_eq!(rates.iter().map(|line| line.name.as_str()).collect::<Vec<_>>(), [OURS, "bare", "spdk"]);
        assert_eq!(found(&plots[1].shape)[1].points, [(100.0, 9.0), (900.0, 40.0)]);
        assert_eq!(found(&plots[2].shape)[0].points, [(1.0, 300.0), (64.0, 500.0)]);
        let svg = plots[0].draw().unwrap();
        assert!(svg.contains("<svg") && svg.contains(OURS) && svg.contains("queue depth"), "{svg}");
    }

    #[test]
    fn a_cost_is_a_bar_of_its_stages_and_a_peers_process_is_one() {
        let rows = vec![
            row("cost/null/randread/qd32/kernel-send", "SPDK's, v1", 0.6, 0.7, None),
            row("cost/null/randread/qd32/parse", "SPDK's, v1", 0.2, 1.0, None),
            row("cost/null/randread/qd32/process", "SPDK's, v1", 0.2, 0.5, None),
        ];
        let mut rows = rows;
        (rows[1].peer, rows[1].ratio) = (None, None);
        let plots = all(&Report { rows: rows.clone(), absent: Vec::new() });
        let Shape::Bars(_, bars) = &plots[0].shape else { panic!("{plots:?}") };
        let part = |name: &str, us| (name.to_owned(), us);
        assert_eq!(bars[0].parts, [part("parse", 0.2), part("kernel-send", 0.6)]);
        assert_eq!(
            bars[1],
            Bar {
                name: "SPDK's, randread".to_owned(),
                parts: vec![part("process", 0.5), part("kernel-send", 0.7)]
            }
        );
        let svg = plots[0].draw().unwrap();
        assert!(svg.contains("kernel-send") && svg.contains("us a command"), "{svg}");
        // Where the core's clock is known.
        rows.push(row("cost/clock", "nobody", 2.5, 2.5, None));
        let plots = all(&Report { rows, absent: Vec::new() });
        let Shape::Bars("cycles a command", bars) = &plots[0].shape else { panic!("{plots:?}") };
        assert_eq!(bars[0].parts, [part("parse", 500.0), part("kernel-send", 1500.0)]);
    }
}
