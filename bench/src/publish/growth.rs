//! How costs grow: pictures of the `growth/SUBJECT/N/NUMBER` rows, and the models by which more than this machine can carry is told.
//!
//! ```text
//!   linear        a + b N
//!   logarithmic   a + b log2 N       whichever leaves the smaller residuals
//!   no growth     a                  where the line would fall
//! ```
//!
//! A model is a statement, not a measurement: its text says how far it is off where there are measurements.

use std::fmt::Write as _;

use super::plot::{Line, Plot, Shape};
use crate::report::Report;

/// Fewer points than this say nothing of a form.
const POINTS_MIN: usize = 3;
/// A point counts as if it were at least this part of the largest one.
const LEAST_PART: f64 = 1e-9;
/// How far a model is told beyond the largest point.
const BEYOND: f64 = 10.0;

/// Rows that are drawn together.
struct Series {
    subject: &'static str,
    number: &'static str,
    what: &'static str,
    unit: &'static str,
    /// What is across. A picture of powers of ten has their logarithms.
    across: &'static str,
}

const POWERS: &str = "extents, as powers of ten";

const fn series(
    subject: &'static str,
    number: &'static str,
    what: &'static str,
    unit: &'static str,
) -> Series {
    Series { subject, number, what, unit, across: subject }
}

/// What grows.
const ALL: [Series; 10] = [
    series("connections", "cpu", "processor time a command, busy connections", "us a command"),
    series("connections", "memory", "memory of a target beside its buffers, busy connections", "MiB"),
    series("connections", "idle-cpu", "part of a core that idle connections take", "% of a core"),
    series("namespaces", "cpu", "processor time a command", "us a command"),
    series("namespaces", "memory", "memory of a target beside its buffers", "MiB"),
    series("namespaces", "start", "from the start to the first answer", "ms"),
    Series { across: POWERS, ..series("extents", "lookup", "a lookup in a turn of the data path", "ns") },
    Series { across: POWERS, ..series("extents", "memory", "memory of a map", "KiB") },
    series("cores", "cpu", "processor time a command", "us a command"),
    series("cores", "memory", "memory of a target beside its buffers", "MiB"),
];

/// The points of one series, in order.
fn points(report: &Report, subject: &str, number: &str) -> Vec<(f64, f64)> {
    let mut points = Vec::new();
    for row in &report.rows {
        let place = row.name.strip_prefix("growth/").and_then(|rest| rest.strip_prefix(subject));
        let count = place.and_then(|rest| rest.strip_prefix('/')?.strip_suffix(number)?.strip_suffix('/'));
        if let Some(Ok(count)) = count.map(str::parse::<f64>) {
            points.push((count, row.ours));
        }
    }
    points.sort_by(|one, other| one.0.total_cmp(&other.0));
    points
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Linear,
    Logarithmic,
}

impl Form {
    fn of(self, count: f64) -> f64 {
        match self {
            Self::Linear => count,
            Self::Logarithmic => count.max(1.0).log2(),
        }
    }
}

/// A line through points, by least squares of relative distances.
#[derive(Clone, Copy, Debug)]
struct Model {
    form: Form,
    a: f64,
    b: f64,
    /// The largest distance of a point, and the same in parts of the point.
    residual: f64,
    residual_part: f64,
    squares: f64,
}

impl Model {
    /// The better one of both; none of too few points.
    fn best(points: &[(f64, f64)]) -> Option<Self> {
        let both = [Form::Linear, Form::Logarithmic].map(|form| Self::fit(form, points));
        both.into_iter().flatten().min_by(|one, other| one.squares.total_cmp(&other.squares))
    }

    fn fit(form: Form, points: &[(f64, f64)]) -> Option<Self> {
        if points.len() < POINTS_MIN {
            return None;
        }
        // Points are far apart, and each is to be met by as small a part of it: a weight of one over its square. One at zero would outweigh
        // all others.
        let most = points.iter().map(|point| point.1.abs()).fold(0.0, f64::max).max(1.0);
        let weight = |point: &(f64, f64)| point.1.abs().max(most * LEAST_PART).powi(2).recip();
        let weights = points.iter().map(weight).sum::<f64>();
        let mean = |of: &dyn Fn(&(f64, f64)) -> f64| {
            points.iter().map(|point| weight(point) * of(point)).sum::<f64>() / weights
        };
        let (x, y) = (mean(&|point| form.of(point.0)), mean(&|point| point.1));
        let spread = mean(&|point| (form.of(point.0) - x).powi(2));
        if spread == 0.0 {
            return None;
        }
        let b = mean(&|point| (form.of(point.0) - x) * (point.1 - y)) / spread;
        // What falls is not told to fall on: it would be nothing, and less, somewhere.
        let (a, b) = if b > 0.0 {
            (y - b * x, b)
        } else {
            (points.iter().map(|point| point.1).sum::<f64>() / points.len() as f64, 0.0)
        };
        let mut model = Self { form, a, b, residual: 0.0, residual_part: 0.0, squares: 0.0 };
        for (count, value) in points {
            let distance = (value - model.at(*count)).abs();
            let part = distance / value.abs().max(most * LEAST_PART);
            model.residual = model.residual.max(distance);
            model.residual_part = model.residual_part.max(part);
            model.squares += part * part;
        }
        Some(model)
    }

    fn at(&self, count: f64) -> f64 {
        self.a + self.b * self.form.of(count)
    }

    fn formula(&self) -> String {
        if self.b == 0.0 {
            return format!("{}, no growth", short(self.a));
        }
        let of = if self.form == Form::Linear { "N" } else { "log2 N" };
        format!("{} + {} {of}", short(self.a), short(self.b))
    }
}

/// Three digits that count.
fn short(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 310")]
    let digits_of = |value: f64| (2.0 - value.abs().log10().floor()).max(0.0) as usize;
    // What is rounded up to a power of ten has one digit less behind the point.
    let digits = digits_of(value);
    let digits = format!("{value:.digits$}").parse().map_or(digits, digits_of);
    format!("{value:.digits$}")
}

/// A picture of each series that has points: those that were measured, and the model.
pub(super) fn plots(report: &Report) -> Vec<Plot> {
    let mut plots = Vec::new();
    for Series { subject, number, what, unit, across } in ALL {
        let points = points(report, subject, number);
        if points.len() < 2 {
            continue;
        }
        let place = |count: f64| if across == POWERS { count.log10() } else { count };
        let drawn = |value: &dyn Fn(&(f64, f64)) -> f64| {
            points.iter().map(|point| (place(point.0), value(point))).collect::<Vec<_>>()
        };
        let mut lines = vec![Line { name: "measured".to_owned(), points: drawn(&|point| point.1) }];
        if let Some(model) = Model::best(&points) {
            let name = format!("model: {}", model.formula());
            lines.push(Line { name, points: drawn(&|point| model.at(point.0).max(0.0)) });
        }
        plots.push(Plot {
            name: format!("growth-{subject}-{number}"),
            title: format!("{what}, against {subject}"),
            shape: Shape::Lines([across, unit], lines),
        });
    }
    plots
}

/// The models in words; empty where nothing of growth was measured.
pub(super) fn text(report: &Report) -> String {
    let mut text = String::new();
    for Series { subject, number, what, unit, .. } in ALL {
        let points = points(report, subject, number);
        let (Some(model), Some((most, _))) = (Model::best(&points), points.last()) else { continue };
        let beyond = most * BEYOND;
        // A string takes everything.
        let _ = writeln!(
            text,
            "| `growth/{subject}/N/{number}`: {what} | {unit} | {} | {} | {} ({:.0} %) | {} at {beyond} |",
            points.len(),
            model.formula(),
            short(model.residual),
            model.residual_part * 100.0,
            short(model.at(beyond)),
        );
    }
    if text.is_empty() {
        return text;
    }
    format!("{HEAD}{text}{CORES}{}\n", cores(report))
}

/// What two cores cost beside one.
fn cores(report: &Report) -> String {
    let points = points(report, "cores", "cpu");
    let at = |wanted: f64| points.iter().find(|(count, _)| (count - wanted).abs() < 0.5).map(|point| point.1);
    match (at(1.0), at(2.0)) {
        (Some(one), Some(two)) => {
            format!(
                "Measured with two, of which one had to share its processor with the host: {} times the processor time a command of one. That is \
                 no proof of it.",
                short(two / one)
            )
        }
        _ => "This machine has no two cores to measure that on.".to_owned(),
    }
}

const HEAD: &str = "
## Growth, and what lies beyond this machine

The points are the `growth/` rows; each formula is a line fitted to them, in N or in log2 N, whichever misses them by less: by least squares of
relative distances, for the points are powers of ten. What falls within the points is told as their mean. The residual is the largest
distance of a point from the line, and the largest relative one. **What is told beyond the largest point is the formula, not a measurement.**

| rows | unit | points | model | largest residual | beyond |
|---|---|---|---|---|---|
";

const CORES: &str = "
Cores share nothing that is written on the I/O path: C cores are taken to do C times what one does, and to have C times its buffers and
its ring, up to what memory and network carry. ";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Measurement, Row};

    fn report(number: fn(f64) -> f64) -> Report {
        let row = |count: f64| {
            let name = format!("growth/connections/{count}/memory");
            let ours = [number(count)];
            let measured =
                Measurement { name, unit: "MiB", ours: &ours, peer: None, bar: None, method: "made up" };
            Row::new(&measured, "here").unwrap()
        };
        Report { rows: [1.0, 10.0, 100.0, 1000.0].map(row).into(), absent: Vec::new() }
    }

    #[test]
    fn a_line_is_found_with_its_residuals_and_told_beyond_its_points() {
        let seen = points(&report(|count| 10.0 + count / 20.0), "connections", "memory");
        let model = Model::best(&seen).unwrap();
        assert_eq!(model.form, Form::Linear);
        assert!((model.a - 10.0).abs() < 0.01 && (model.b - 0.05).abs() < 1e-4, "{model:?}");
        assert!(model.residual < 0.01, "{model:?}");
        let text = text(&report(|count| 10.0 + count / 20.0));
        assert!(text.contains("| 4 | 10.0 + 0.0500 N |") && text.contains("510 at 10000 |"), "{text}");
    }

    #[test]
    fn what_grows_with_the_logarithm_is_told_so() {
        let seen = points(&report(|count| 5.0 + 2.0 * count.log2()), "connections", "memory");
        let model = Model::best(&seen).unwrap();
        assert_eq!(model.form, Form::Logarithmic);
        assert!((model.b - 2.0).abs() < 0.01 && model.residual < 0.01, "{model:?}");
        assert_eq!(model.formula(), "5.00 + 2.00 log2 N");
    }

    #[test]
    fn small_points_count_as_much_as_large_ones() {
        // A header, and 24 bytes for each, measured a thousandth too large at the far end.
        let seen: Vec<_> =
            (0..=6).map(|power| 10_f64.powi(power)).map(|count| (count, 0.1 + count * 0.024)).collect();
        let mut off = seen.clone();
        off[6].1 *= 1.001;
        let model = Model::best(&off).unwrap();
        assert!(model.residual_part < 0.002, "{model:?}");
    }

    #[test]
    fn a_point_at_zero_spoils_nothing() {
        let model = Model::best(&[(1.0, 0.0), (10.0, 9.0), (100.0, 99.0), (1000.0, 999.0)]).unwrap();
        assert!((model.b - 1.0).abs() < 1e-3 && (model.a + 1.0).abs() < 1e-3, "{model:?}");
        let flat = Model::best(&[(1.0, 0.0), (10.0, 0.0), (100.0, 0.0)]).unwrap();
        assert_eq!((flat.a, flat.b), (0.0, 0.0));
    }

    #[test]
    fn what_falls_is_not_told_to_fall_on() {
        let text = text(&report(|count| 20.0 - count / 100.0));
        assert!(text.contains(", no growth |") && text.contains("17.2 at 10000 |"), "{text}");
    }

    #[test]
    fn few_points_have_no_model_and_nothing_has_no_text() {
        assert!(Model::best(&[(1.0, 2.0), (2.0, 3.0)]).is_none());
        assert!(Model::best(&[(1.0, 2.0); 3]).is_none(), "no spread");
        assert_eq!(text(&Report::default()), "");
        assert!(plots(&Report::default()).is_empty());
    }

    #[test]
    fn the_points_and_the_model_are_drawn() {
        let plots = plots(&report(|count| 10.0 + count / 20.0));
        assert_eq!(plots.len(), 1);
        assert_eq!(plots[0].name, "growth-connections-memory");
        let svg = plots[0].draw().unwrap();
        assert!(svg.contains("measured") && svg.contains("model: 10.0 + 0.0500 N"), "{svg}");
    }
}
