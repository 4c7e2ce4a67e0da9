//! Pictures as SVG.

use std::fmt::Display;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::plot::{Bar, Line, Plot, Shape};

const SIZE: (u32, u32) = (760, 420);
/// Of a bar, in parts of the room that it has.
const BAR_HEIGHT: f64 = 0.7;
/// Room for the names of bars, in pixels.
const NAMES_WIDTH: u32 = 190;

type Area<'t> = DrawingArea<SVGBackend<'t>, Shift>;

impl Plot {
    /// As SVG.
    ///
    /// # Errors
    /// When it cannot be drawn.
    pub(super) fn draw(&self) -> Result<String> {
        let mut text = String::new();
        {
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            let drawn = match &self.shape {
                Shape::Lines(axes, lines) => self.lines(&area, *axes, lines),
                Shape::Bars(axis, bars) => self.bars(&area, axis, bars),
            };
            drawn?;
            area.present().map_err(|error| self.failed(&error))?;
        }
        Ok(text)
    }

    fn failed(&self, error: &dyn Display) -> anyhow::Error {
        anyhow!("{} cannot be drawn: {error}", self.name)
    }

    fn lines(&self, area: &Area<'_>, [x, y]: [&str; 2], lines: &[Line]) -> Result<()> {
        let failed = |error: &dyn Display| self.failed(error);
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let most = |of: fn(&(f64, f64)) -> f64| {
            let points = lines.iter().flat_map(|line| &line.points);
            (points.map(of).fold(0.0, f64::max) * 1.05).max(f64::MIN_POSITIVE)
        };
        let (right, top) = (most(|point| point.0), most(|point| point.1));
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 16))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..right, 0.0..top)
            .map_err(|error| failed(&error))?;
        chart.configure_mesh().x_desc(x).y_desc(y).draw().map_err(|error| failed(&error))?;
        for (number, line) in lines.iter().enumerate() {
            let color = color_of(number, &line.name);
            let series = LineSeries::new(line.points.iter().copied(), color.stroke_width(2)).point_size(3);
            let drawn = chart.draw_series(series).map_err(|error| failed(&error))?;
            drawn.label(&line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
        }
        // What rises leaves that corner free.
        let mut labels = chart.configure_series_labels();
        labels.background_style(WHITE.mix(0.8)).border_style(BLACK).position(SeriesLabelPosition::UpperLeft);
        labels.draw().map_err(|error| failed(&error))?;
        Ok(())
    }

    /// From the top down, each bar's parts from the left.
    fn bars(&self, area: &Area<'_>, axis: &str, bars: &[Bar]) -> Result<()> {
        let failed = |error: &dyn Display| self.failed(error);
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let of_all = |bar: &Bar| bar.parts.iter().map(|(_, len)| len).sum::<f64>();
        // Beside the longest is room for the names of the parts.
        let right = (bars.iter().map(of_all).fold(0.0, f64::max) * 1.4).max(f64::MIN_POSITIVE);
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 16))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(NAMES_WIDTH)
            .build_cartesian_2d(0.0..right, 0.0..bars.len() as f64)
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .x_desc(axis)
            .disable_y_mesh()
            .y_labels(2 * bars.len() + 1)
            .y_label_formatter(&|at| name_at(bars, *at))
            .draw()
            .map_err(|error| failed(&error))?;
        let mut parts: Vec<&str> = Vec::new();
        for (name, _) in bars.iter().flat_map(|bar| &bar.parts) {
            if !parts.contains(&name.as_str()) {
                parts.push(name);
            }
        }
        for (number, part) in parts.iter().enumerate() {
            let color = Palette99::pick(number).filled();
            let boxes = bars.iter().enumerate().filter_map(|(at, bar)| {
                let (from, to) = span(bar, part)?;
                let middle = bars.len() as f64 - at as f64 - 0.5;
                let half = BAR_HEIGHT / 2.0;
                Some(Rectangle::new([(from, middle - half), (to, middle + half)], color))
            });
            let drawn = chart.draw_series(boxes).map_err(|error| failed(&error))?;
            drawn.label(*part).legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color));
        }
        let mut labels = chart.configure_series_labels();
        labels
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .position(SeriesLabelPosition::MiddleRight);
        labels.draw().map_err(|error| failed(&error))?;
        Ok(())
    }
}

/// A peer has the same color in every plot, whoever else is in it. The colors are of a set that those who see few of them tell apart
/// (Okabe and Ito), but for its yellow, which white paper hides.
fn color_of(number: usize, name: &str) -> RGBAColor {
    const COLORS: [RGBColor; 6] = [
        RGBColor(0, 114, 178),
        RGBColor(213, 94, 0),
        RGBColor(0, 158, 115),
        RGBColor(204, 121, 167),
        RGBColor(0, 0, 0),
        RGBColor(86, 180, 233),
    ];
    let fixed = ["fastice", "SPDK", "bare"].iter().position(|part| name.contains(part));
    COLORS.get(fixed.unwrap_or(number % COLORS.len())).copied().unwrap_or(BLACK).to_rgba()
}

/// The bar in whose middle this height is.
fn name_at(bars: &[Bar], height: f64) -> String {
    let at = bars.len() as f64 - 0.5 - height;
    let named = bars.iter().enumerate().find(|(number, _)| (*number as f64 - at).abs() < 0.01);
    named.map_or_else(String::new, |(_, bar)| bar.name.clone())
}

/// Where a part of a bar begins and ends.
fn span(bar: &Bar, part: &str) -> Option<(f64, f64)> {
    let at = bar.parts.iter().position(|(name, _)| name == part)?;
    let from: f64 = bar.parts.iter().take(at).map(|(_, len)| len).sum();
    Some((from, from + bar.parts.get(at)?.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_its_color_wherever_it_stands() {
        assert_eq!(color_of(1, "a bare responder"), color_of(2, "a bare responder"));
        let all: Vec<_> = (0..6).map(|number| color_of(number, "memory")).collect();
        assert!((1..6).all(|number| !all[..number].contains(&all[number])), "{all:?}");
        assert_eq!(color_of(1, "SPDK's target"), all[1]);
        assert_eq!(color_of(6, "memory"), all[0]);
    }

    #[test]
    fn bars_are_named_at_their_middles_and_their_parts_follow_one_another() {
        let bar = |name: &str| Bar {
            name: name.to_owned(),
            parts: vec![("a".to_owned(), 1.0), ("b".to_owned(), 2.0)],
        };
        let bars = [bar("top"), bar("below")];
        assert_eq!(
            ["top", "", "below"].map(str::to_owned),
            [1.5, 1.0, 0.5].map(|height| name_at(&bars, height))
        );
        assert_eq!((span(&bars[0], "b"), span(&bars[0], "c")), (Some((1.0, 3.0)), None));
    }
}
