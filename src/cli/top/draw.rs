//! A view as a picture of cells: for a terminal, or for lines of text.
//!
//! ```text
//!   heads, rates            a line each
//!   latency                 a table each, as high as it is; when there is no room for all, those further down
//!   cores, exports, hosts   are cut, and say so
//! ```

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Row, Table, Widget as _};

use super::view::{CoreRow, ExportRow, HostRow, Percentiles, View};
use crate::cli::status::us;
use crate::config::format_size;

/// Between columns.
const GAP: u16 = 2;
/// The title, the head, one row, and an empty line before.
const SECTION_MIN: u16 = 4;

/// A table with its title.
struct Section {
    title: &'static str,
    /// Columns whose name ends in a blank are numbers, and go to the right.
    head: Vec<&'static str>,
    rows: Vec<Vec<(String, Style)>>,
}

const PLAIN: Style = Style::new();
const TITLE: Style = Style::new().add_modifier(Modifier::BOLD);
const HEAD: Style = Style::new().fg(Color::Cyan);
const GOOD: Style = Style::new().fg(Color::Green);
const BAD: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);

impl Section {
    fn is_number(name: &str) -> bool {
        name.ends_with(' ')
    }

    fn widths(&self) -> Vec<u16> {
        let column = |(at, name): (usize, &&str)| {
            let cells = self.rows.iter().filter_map(|row| row.get(at)).map(|(text, _)| text.as_str());
            let widths = cells.chain([name.trim_end()]).map(|text| Line::raw(text).width());
            widths.max().and_then(|width| u16::try_from(width).ok()).unwrap_or(u16::MAX)
        };
        self.head.iter().enumerate().map(column).collect()
    }

    fn width(&self) -> u16 {
        self.widths().into_iter().fold(0_u16, |sum, width| sum.saturating_add(width).saturating_add(GAP))
    }

    /// With its title, its head and an empty line before.
    fn height(&self) -> u16 {
        u16::try_from(self.rows.len()).unwrap_or(u16::MAX).saturating_add(3)
    }

    /// The height below which it shows nothing of what it could show.
    fn height_min(&self) -> u16 {
        self.height().min(SECTION_MIN)
    }

    fn draw(&self, area: Rect, buffer: &mut Buffer) {
        let [_, title, table] = rows_of(area, [1, 1, area.height.saturating_sub(2)]);
        let room = usize::from(table.height.saturating_sub(1));
        let text = if room < self.rows.len() {
            format!("{} (first {room} of {})", self.title, self.rows.len())
        } else {
            self.title.to_owned()
        };
        Line::styled(text, TITLE).render(title, buffer);
        let cell = |name: &str, text: &str, style: Style| {
            let text = Text::styled(text.to_owned(), style);
            Cell::new(if Self::is_number(name) { text.right_aligned() } else { text })
        };
        let head = Row::new(self.head.iter().map(|name| cell(name, name.trim_end(), HEAD)));
        let rows = self.rows.iter().map(|row| {
            Row::new(self.head.iter().zip(row).map(|(name, (text, style))| cell(name, text, *style)))
        });
        let widths = self.widths().into_iter().map(Constraint::Length);
        let widget = Table::new(rows, widths).header(head).column_spacing(GAP);
        ratatui::widgets::Widget::render(widget, table, buffer);
    }
}

/// Areas of these heights, one below the other; those that have no room are empty.
fn rows_of<const N: usize>(area: Rect, heights: [u16; N]) -> [Rect; N] {
    let mut y = area.y;
    heights.map(|height| {
        let room = area.bottom().saturating_sub(y);
        let it = Rect { y, height: height.min(room), ..area };
        y = y.saturating_add(it.height);
        it
    })
}

/// What stands above the tables.
fn heads(view: &View) -> Vec<Line<'static>> {
    let mut lines: Vec<_> = view.heads.iter().map(|head| Line::raw(head.clone())).collect();
    lines.extend(view.errors.iter().map(|error| Line::styled(error.clone(), BAD)));
    let rates = &view.rates;
    lines.push(Line::styled(
        format!(
            "{} commands/s, read {}/s, written {}/s, over {:.1} s",
            rates.commands,
            format_size(rates.read_bytes),
            format_size(rates.written_bytes),
            view.over.as_secs_f64()
        ),
        TITLE,
    ));
    lines
}

fn sections(view: &View) -> Vec<Section> {
    [latency(view), cores(&view.cores), exports(&view.exports), hosts(&view.hosts)].into()
}

fn plain(text: impl Into<String>) -> (String, Style) {
    (text.into(), PLAIN)
}

/// Nanoseconds as microseconds.
fn time(ns: Option<u64>) -> (String, Style) {
    plain(ns.map_or_else(|| "-".to_owned(), us))
}

fn latency(view: &View) -> Section {
    let head = vec!["", "total ", "receive ", "parse ", "lookup ", "queue ", "device ", "send "];
    let row = |name: &str, of: fn(&Percentiles) -> Option<u64>| {
        let all = std::iter::once(&view.total).chain(&view.stages);
        std::iter::once(plain(name)).chain(all.map(|it| time(of(it)))).collect()
    };
    let rows = vec![row("p50", |it| it.p50_ns), row("p99", |it| it.p99_ns), row("p99.9", |it| it.p999_ns)];
    Section { title: "latency by stage, us", head, rows }
}

/// Thousandths as percent, with a digit behind the point.
fn percent(thousandths: u64) -> String {
    format!("{}.{} %", thousandths / 10, thousandths % 10)
}

fn cores(cores: &[CoreRow]) -> Section {
    let row = |core: &CoreRow| {
        let state = [(core.busy, "busy"), (core.polling, "polling"), (core.asleep, "asleep")];
        let mostly = state.into_iter().max_by_key(|(part, _)| *part).filter(|(part, _)| *part > 0);
        let buffers = u64::try_from(core.buffer_bytes).unwrap_or(u64::MAX);
        vec![
            plain(core.cpu.to_string()),
            plain(percent(core.busy)),
            plain(percent(core.polling)),
            plain(percent(core.asleep)),
            plain(core.sleeps.to_string()),
            plain(core.connections.to_string()),
            plain(core.on_devices.to_string()),
            plain(format_size(buffers)),
            (mostly.map_or("-", |(_, word)| word).to_owned(), GOOD),
        ]
    };
    let head = vec![
        "core ",
        "busy ",
        "polling ",
        "asleep ",
        "sleeps/s ",
        "connections ",
        "on devices ",
        "buffers ",
        "mostly",
    ];
    Section { title: "cores", head, rows: cores.iter().map(row).collect() }
}

fn exports(exports: &[ExportRow]) -> Section {
    let row = |export: &ExportRow| {
        let state = export
            .reason
            .as_ref()
            .map_or_else(|| export.grant.clone(), |reason| format!("{}: {reason}", export.grant));
        vec![
            plain(export.nsid.to_string()),
            (state, if export.grant == "live" { GOOD } else { BAD }),
            plain(export.commands.to_string()),
            time(export.times.p50_ns),
            time(export.times.p99_ns),
            plain(export.path.clone()),
            plain(export.subsystem.clone()),
        ]
    };
    let head = vec!["nsid ", "state", "commands/s ", "p50 us ", "p99 us ", "file", "subsystem"];
    Section { title: "exports", head, rows: exports.iter().map(row).collect() }
}

fn hosts(hosts: &[HostRow]) -> Section {
    let row = |host: &HostRow| {
        vec![
            plain(host.cntlid.to_string()),
            plain(host.io_queues.to_string()),
            plain(host.rates.commands.to_string()),
            plain(format!("{}/s", format_size(host.rates.read_bytes))),
            plain(format!("{}/s", format_size(host.rates.written_bytes))),
            time(host.times.p50_ns),
            time(host.times.p99_ns),
            plain(host.host.clone()),
            plain(host.subsystem.clone()),
        ]
    };
    let head = vec![
        "controller ",
        "queues ",
        "commands/s ",
        "read ",
        "written ",
        "p50 us ",
        "p99 us ",
        "host",
        "subsystem",
    ];
    Section { title: "hosts", head, rows: hosts.iter().map(row).collect() }
}

/// Draws a view on `area`, with a line at its foot.
pub(super) fn draw(view: &View, foot: Option<&str>, area: Rect, buffer: &mut Buffer) {
    let foot_height = u16::from(foot.is_some());
    let [mut rest, last] = rows_of(area, [area.height.saturating_sub(foot_height), foot_height]);
    if let Some(foot) = foot {
        Line::styled(foot.to_owned(), Style::new().add_modifier(Modifier::REVERSED)).render(last, buffer);
    }
    for line in heads(view) {
        let [place, below] = rows_of(rest, [1, rest.height.saturating_sub(1)]);
        if place.height > 0 {
            line.render(place, buffer);
        }
        rest = below;
    }
    let sections = sections(view);
    for (at, section) in sections.iter().enumerate() {
        // Each that follows gets a row, where there is room for one; but not if it has none to show.
        let kept = sections[at + 1..].iter().fold(0_u16, |sum, next| sum.saturating_add(next.height_min()));
        let room = rest.height.saturating_sub(kept).max(section.height_min()).min(rest.height);
        let height = section.height().min(room);
        let [place, below] = rows_of(rest, [height, rest.height.saturating_sub(height)]);
        if place.height >= section.height_min() {
            section.draw(place, buffer);
        }
        rest = below;
    }
}

/// A view as lines of text, as wide and as many as it takes.
pub(super) fn lines(view: &View) -> Vec<String> {
    let (heads, sections) = (heads(view), sections(view));
    let widths = heads.iter().map(|line| u16::try_from(line.width()).unwrap_or(u16::MAX));
    let width = widths.chain(sections.iter().map(Section::width)).max().unwrap_or_default();
    let head_height = u16::try_from(heads.len()).unwrap_or(u16::MAX);
    let height = sections.iter().fold(head_height, |sum, section| sum.saturating_add(section.height()));
    let area = Rect::new(0, 0, width, height);
    let mut buffer = Buffer::empty(area);
    draw(view, None, area, &mut buffer);
    area.rows()
        .map(|row| {
            let text: String =
                row.positions().filter_map(|at| buffer.cell(at)).map(ratatui::buffer::Cell::symbol).collect();
            text.trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::Sort;
    use super::super::view::tests::samples;
    use super::*;
    use crate::stage::Stage;

    fn view() -> View {
        let (before, now) = samples();
        let mut view = View::between(&before, &now);
        view.sort(Sort::Rate);
        view
    }

    /// What a terminal of this size shows.
    fn shown(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal in memory");
        let foot = Some("q quit");
        terminal.draw(|frame| draw(view, foot, frame.area(), frame.buffer_mut())).expect("it draws");
        terminal.backend().to_string()
    }

    #[test]
    fn a_terminal_shows_everything_that_it_has_room_for() {
        insta::assert_snapshot!(shown(&view(), 110, 26));
    }

    #[test]
    fn a_low_terminal_shows_the_first_of_each_and_says_so() {
        let text = shown(&view(), 110, 21);
        assert!(text.contains("exports (first 1 of 2)") && text.contains("hosts (first 1 of 2)"), "{text}");
        assert!(text.contains("q quit"), "{text}");
    }

    #[test]
    fn no_size_of_a_terminal_is_too_small() {
        for (width, height) in [(0, 0), (0, 9), (1, 1), (5, 3), (200, 2), (3, 60)] {
            let area = Rect::new(0, 0, width, height);
            draw(&view(), Some("q quit"), area, &mut Buffer::empty(area));
            draw(&View::default(), None, area, &mut Buffer::empty(area));
        }
    }

    #[test]
    fn lines_of_text_have_everything_whole() {
        let mut view = view();
        let long = "nqn.2026-11.".to_owned() + &"x".repeat(200);
        view.hosts[0].host.clone_from(&long);
        view.errors.push("a target does not answer".to_owned());
        let lines = lines(&view);
        assert!(lines.iter().any(|line| line.contains(&long) && line.ends_with("nqn.a")), "{lines:#?}");
        let with = |words: &[&str]| lines.iter().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(with(&["2", "fenced: map-in-doubt", "/srv/2", "nqn.a"]), "{lines:#?}");
        assert!(with(&["3", "50.0 %", "25.0 %", "500", "64 KiB", "busy"]), "{lines:#?}");
        assert!(
            with(&["3005 commands/s", "over 2.0 s"]) && with(&["a target does not answer"]),
            "{lines:#?}"
        );
        assert!(lines.iter().all(|line| line.trim_end() == line));
    }

    #[test]
    fn lines_of_text_have_every_export_where_no_host_is() {
        for count in [2, 6] {
            let mut view = view();
            view.hosts.clear();
            let first = view.exports[0].clone();
            view.exports = (1..=count)
                .map(|nsid| ExportRow { nsid, path: format!("/srv/{nsid}"), ..first.clone() })
                .collect();
            let lines = lines(&view);
            let is_there = |path: &String| lines.iter().any(|line| line.split(' ').any(|word| word == path));
            assert!(view.exports.iter().all(|export| is_there(&export.path)), "{lines:#?}");
            assert!(lines.iter().any(|line| line == "exports"), "nothing was left out: {lines:#?}");
        }
    }

    #[test]
    fn stages_stand_in_their_order() {
        let section = latency(&View::default());
        let words: Vec<_> = section.head[2..].iter().map(|name| name.trim_end()).collect();
        assert_eq!(words, Stage::ALL.map(Stage::word));
    }
}
