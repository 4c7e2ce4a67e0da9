//! Lines of rows that belong together, drawn as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::report::{Report, Row};

const SIZE: (u32, u32) = (760, 420);

/// One line: its name, and its points in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// One picture.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    /// Of its file.
    pub(super) name: String,
    /// Above it.
    pub(super) title: String,
    axes: [&'static str; 2],
    lines: Vec<Line>,
}

/// All that the rows give something for.
pub(super) fn all(report: &Report) -> Vec<Plot> {
    let mut plots = Vec::new();
    for device in ["null", "memory"] {
        for work in ["randread", "randwrite"] {
            let place = format!("target/{device}/{work}");
            let rates = lines(report, &place, "iops", |depth, _, rate| (depth, rate / 1e3));
            let title = format!("{device}, 4 KiB {work}: rate against queue depth, one connection");
            let axes = ["queue depth", "1000 IOPS"];
            plots.push(Plot { name: format!("{device}-{work}-rate"), title, axes, lines: rates });
            let latencies = lines(report, &place, "p50", |_, rate, p50| (rate / 1e3, p50));
            let title = format!("{device}, 4 KiB {work}: median latency against rate");
            let axes = ["1000 IOPS", "us"];
            plots.push(Plot { name: format!("{device}-{work}-latency"), title, axes, lines: latencies });
        }
    }
    let many = connections(report);
    let title = "null, 4 KiB randread: rate against connections, 4 commands in flight on each".to_owned();
    let axes = ["connections", "1000 IOPS"];
    plots.push(Plot { name: "null-randread-connections".to_owned(), title, axes, lines: many });
    plots.retain(|plot| plot.lines.iter().any(|line| line.points.len() > 1));
    plots
}

/// A line for ours and one for each peer: a point a queue depth, of the depth, the rate and the number of rows named so.
fn lines(report: &Report, place: &str, number: &str, point: fn(f64, f64, f64) -> (f64, f64)) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in &report.rows {
        let Some(rest) = row.name.strip_prefix(place).and_then(|rest| rest.strip_prefix("/qd")) else {
            continue;
        };
        let Some(load) = rest.strip_suffix(number).and_then(|rest| rest.strip_suffix('/')) else { continue };
        let (depth, _) = load.split_once('/').unwrap_or((load, ""));
        let Ok(depth) = depth.parse::<f64>() else { continue };
        let rate = find(report, &row.name.replace(&format!("/{number}"), "/iops")).unwrap_or(row);
        // Ours is measured anew beside each peer: the first such row, beside the ceiling, is the one that is drawn.
        if !load.contains('/') {
            push(&mut lines, "fastice", point(depth, rate.ours, row.ours));
        }
        if let (Some(peer), Some(peer_rate), Some(name)) = (row.peer, rate.peer, &row.peer_name) {
            push(&mut lines, name, point(depth, peer_rate, peer));
        }
    }
    for line in &mut lines {
        line.points.sort_by(|one, other| one.0.total_cmp(&other.0));
    }
    lines
}

/// The same over connections.
fn connections(report: &Report) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in &report.rows {
        let Some(rest) = row.name.strip_prefix("target/null/randread/") else { continue };
        let Some((load, number)) = rest.split_once('/') else { continue };
        let Some(count) = load.strip_suffix("x4").and_then(|count| count.parse::<f64>().ok()) else {
            continue;
        };
        if !number.ends_with("iops") {
            continue;
        }
        push(&mut lines, "fastice", (count, row.ours / 1e3));
        if let (Some(peer), Some(name)) = (row.peer, &row.peer_name) {
            push(&mut lines, name, (count, peer / 1e3));
        }
    }
    lines
}

fn find<'r>(report: &'r Report, name: &str) -> Option<&'r Row> {
    report.rows.iter().find(|row| row.name == name)
}

fn push(lines: &mut Vec<Line>, name: &str, point: (f64, f64)) {
    match lines.iter_mut().find(|line| line.name == name) {
        Some(line) => line.points.push(point),
        None => lines.push(Line { name: name.to_owned(), points: vec![point] }),
    }
}

impl Plot {
    /// As SVG.
    ///
    /// # Errors
    /// When it cannot be drawn.
    pub(super) fn draw(&self) -> Result<String> {
        let mut text = String::new();
        let failed = |error: &dyn std::fmt::Display| anyhow!("{} cannot be drawn: {error}", self.name);
        {
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            area.fill(&WHITE).map_err(|error| failed(&error))?;
            let most = |of: fn(&(f64, f64)) -> f64| {
                let points = self.lines.iter().flat_map(|line| &line.points);
                points.map(of).fold(0.0, f64::max) * 1.05
            };
            let (right, top) = (most(|point| point.0), most(|point| point.1));
            let mut chart = ChartBuilder::on(&area)
                .caption(&self.title, ("sans-serif", 16))
                .margin(10)
                .x_label_area_size(36)
                .y_label_area_size(56)
                .build_cartesian_2d(0.0..right.max(f64::MIN_POSITIVE), 0.0..top.max(f64::MIN_POSITIVE))
                .map_err(|error| failed(&error))?;
            let [x, y] = self.axes;
            chart.configure_mesh().x_desc(x).y_desc(y).draw().map_err(|error| failed(&error))?;
            for (number, line) in self.lines.iter().enumerate() {
                let color = Palette99::pick(number).to_rgba();
                let drawn = chart
                    .draw_series(
                        LineSeries::new(line.points.iter().copied(), color.stroke_width(2)).point_size(3),
                    )
                    .map_err(|error| failed(&error))?;
                drawn.label(&line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
            }
            let mut labels = chart.configure_series_labels();
            labels
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK)
                .position(SeriesLabelPosition::LowerRight);
            labels.draw().map_err(|error| failed(&error))?;
            area.present().map_err(|error| failed(&error))?;
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Measurement;

    fn row(name: &str, peer_name: &str, ours: f64, peer: f64) -> Row {
        let (ours, peer) = ([ours], [peer]);
        let name = format!("target/null/{name}");
        let peer = Some((peer_name, &peer[..]));
        let measured = Measurement { name, unit: "IOPS", ours: &ours, peer, bar: None, method: "made up" };
        Row::new(&measured, "here").unwrap()
    }

    #[test]
    fn ours_and_each_peer_have_a_line_with_a_point_for_each_depth() {
        let rows = vec![
            row("randread/qd1/iops", "bare", 80e3, 100e3),
            row("randread/qd1/p50", "bare", 11.0, 9.0),
            row("randread/qd32/iops", "bare", 600e3, 900e3),
            row("randread/qd32/p50", "bare", 50.0, 40.0),
            row("randread/qd32/spdk/iops", "spdk", 650e3, 500e3),
            row("randread/64x4/spdk/iops", "spdk", 500e3, 400e3),
            row("randread/256x4/spdk/iops", "spdk", 450e3, 350e3),
        ];
        let plots = all(&Report { rows, absent: Vec::new() });
        let names: Vec<_> = plots.iter().map(|plot| plot.name.as_str()).collect();
        assert_eq!(names, ["null-randread-rate", "null-randread-latency", "null-randread-connections"]);
        let ours = &plots[0].lines[0];
        assert_eq!((ours.name.as_str(), &ours.points[..]), ("fastice", &[(1.0, 80.0), (32.0, 600.0)][..]));
        assert_eq!(plots[1].lines[1].points, [(100.0, 9.0), (900.0, 40.0)]);
        assert_eq!(plots[2].lines[0].points, [(64.0, 500.0), (256.0, 450.0)]);
        let svg = plots[0].draw().unwrap();
        assert!(svg.contains("<svg") && svg.contains("fastice") && svg.contains("queue depth"), "{svg}");
    }
}
