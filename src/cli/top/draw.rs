//! A view as a picture of cells: for a terminal, or for lines of text.
//!
//! ```text
//!   heads, rates            a line each
//!   latency                 a section each, as high as it is; when there is no room for all, those further down
//!   cores, exports, hosts   are cut, and say so; and so do those that are too wide
//! ```

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::Widget as _;

use super::section::{Column, Section, TITLE, clip, rows_of, width_of};
use super::view::{CoreRow, ExportRow, HostRow, Percentiles, View};
use crate::cli::status::us;
use crate::config::format_size;

const PLAIN: Style = Style::new();
const GOOD: Style = Style::new().fg(Color::Green);
const BAD: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);

/// What stands above the tables.
fn heads(view: &View) -> Vec<(String, Style)> {
    let mut lines: Vec<_> = view.heads.iter().map(|head| (head.clone(), PLAIN)).collect();
    lines.extend(view.errors.iter().map(|error| (error.clone(), BAD)));
    let rates = &view.rates;
    lines.push((
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
    let columns = vec![
        Column::words("", 0),
        Column::number("total", 1),
        Column::number("receive", 4),
        Column::number("parse", 6),
        Column::number("lookup", 7),
        Column::number("queue", 3),
        Column::number("device", 2),
        Column::number("send", 5),
    ];
    let row = |name: &str, of: fn(&Percentiles) -> Option<u64>| {
        let all = std::iter::once(&view.total).chain(&view.stages);
        std::iter::once(plain(name)).chain(all.map(|it| time(of(it)))).collect()
    };
    let rows = vec![row("p50", |it| it.p50_ns), row("p99", |it| it.p99_ns), row("p99.9", |it| it.p999_ns)];
    Section { title: "latency by stage, us", columns, rows }
}

/// Thousandths as percent, with a digit behind the point.
fn percent(thousandths: u64) -> String {
    format!("{}.{} %", thousandths / 10, thousandths % 10)
}

/// Of several targets, with the process of each: two may have a core on one processor.
fn cores(cores: &[CoreRow]) -> Section {
    let are_of_several = cores.iter().any(|core| core.pid != cores[0].pid);
    let row = |core: &CoreRow| {
        let state = [(core.busy, "busy"), (core.polling, "polling"), (core.asleep, "asleep")];
        let mostly = state.into_iter().max_by_key(|(part, _)| *part).filter(|(part, _)| *part > 0);
        let buffers = u64::try_from(core.buffer_bytes).unwrap_or(u64::MAX);
        let mut cells = vec![
            plain(core.cpu.to_string()),
            plain(percent(core.busy)),
            plain(percent(core.polling)),
            plain(percent(core.asleep)),
            plain(core.sleeps.to_string()),
            plain(core.connections.to_string()),
            plain(core.on_devices.to_string()),
            plain(format_size(buffers)),
            (mostly.map_or("-", |(_, word)| word).to_owned(), GOOD),
        ];
        if are_of_several {
            cells.insert(0, plain(core.pid.to_string()));
        }
        cells
    };
    let mut columns = vec![
        Column::number("core", 0),
        Column::number("busy", 1),
        Column::number("polling", 2),
        Column::number("asleep", 3),
        Column::number("sleeps/s", 4),
        Column::number("connections", 6),
        Column::number("on devices", 5),
        Column::number("buffers", 7),
        // The largest of three numbers that stand there.
        Column::words("mostly", 8),
    ];
    if are_of_several {
        columns.insert(0, Column::number("process", 0));
    }
    Section { title: "cores", columns, rows: cores.iter().map(row).collect() }
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
    let columns = vec![
        Column::number("nsid", 0),
        Column::words("state", 1),
        Column::number("commands/s", 2),
        Column::number("p50 us", 4),
        Column::number("p99 us", 3),
        Column::name("file", 5),
        Column::name("subsystem", 6),
    ];
    Section { title: "exports", columns, rows: exports.iter().map(row).collect() }
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
    let columns = vec![
        Column::number("controller", 6),
        Column::number("queues", 7),
        Column::number("commands/s", 1),
        Column::number("read", 4),
        Column::number("written", 5),
        Column::number("p50 us", 3),
        Column::number("p99 us", 2),
        Column::name("host", 0),
        Column::name("subsystem", 8),
    ];
    Section { title: "hosts", columns, rows: hosts.iter().map(row).collect() }
}

/// Draws a view on `area`, with a line at its foot.
pub(super) fn draw(view: &View, foot: Option<&str>, area: Rect, buffer: &mut Buffer) {
    let foot_height = u16::from(foot.is_some());
    let [mut rest, last] = rows_of(area, [area.height.saturating_sub(foot_height), foot_height]);
    if let Some(foot) = foot {
        Line::styled(clip(foot, last.width), Style::new().add_modifier(Modifier::REVERSED))
            .render(last, buffer);
    }
    for (line, style) in heads(view) {
        let [place, below] = rows_of(rest, [1, rest.height.saturating_sub(1)]);
        if place.height > 0 {
            Line::styled(clip(&line, place.width), style).render(place, buffer);
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
    let widths = heads.iter().map(|(line, _)| width_of(line));
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
    use std::collections::BTreeSet;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::Sort;
    use super::super::view::Rates;
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

    const WIDTHS: [u16; 5] = [200, 120, 80, 60, 40];

    /// A view of long names and of numbers with many digits, of which none ends like another.
    fn busy() -> View {
        let times = |p50, p99| Percentiles { p50_ns: Some(p50), p99_ns: Some(p99), p999_ns: Some(9_437_100) };
        let (fast, slow) = (times(1_048_500, 8_388_600), times(2_097_100, 16_777_200));
        let mut view = view();
        view.rates = Rates { commands: 1_234_567, read_bytes: 5_056_786_432, written_bytes: 1_073_217_536 };
        (view.total, view.stages) = (fast, [slow; Stage::ALL.len()]);
        let core = CoreRow { busy: 997, polling: 2, asleep: 1, sleeps: 54_321, ..view.cores[0].clone() };
        view.cores = vec![core.clone(), CoreRow { cpu: 127, busy: 0, polling: 1000, ..core }];
        let pool = |name: &str| format!("nqn.2026-11.org.example.storage:pool-{name}");
        for (export, name) in view.exports.iter_mut().zip(["first", "second"]) {
            export.commands = 617_283;
            export.times = fast;
            export.path = format!("/srv/images/of/machines/{name}.img");
            export.subsystem = pool(name);
        }
        for (host, name) in view.hosts.iter_mut().zip(["first", "second"]) {
            (host.cntlid, host.io_queues) = (65_519, 128);
            host.rates = view.rates;
            host.times = slow;
            host.host = format!("nqn.2014-08.org.nvmexpress:uuid:6f5cbd0c-90ab-4d3e-{name}");
            host.subsystem = pool(name);
        }
        view
    }

    /// The lines of a terminal of this width, which is high enough.
    fn lines_in(view: &View, width: u16) -> Vec<String> {
        let line = |line: &str| line.trim_matches('"').trim_end().to_owned();
        shown(view, width, 40).lines().map(line).collect()
    }

    #[test]
    fn no_width_shows_a_part_of_a_number_or_of_a_head() {
        let view = busy();
        let sections = sections(&view);
        let texts = sections.iter().flat_map(|section| {
            let titles = section.columns.iter().map(|column| column.title);
            titles.chain(section.rows.iter().flatten().map(|(text, _)| text.as_str()))
        });
        let given: BTreeSet<&str> = texts.collect();
        let heads = heads(&view);
        let words: BTreeSet<_> = heads.iter().flat_map(|(line, _)| line.split(' ')).chain(["…"]).collect();
        for width in 1..=220 {
            let lines = lines_in(&view, width);
            let is_title = |line: &&String| {
                ["latency", "cores", "exports", "hosts"].iter().any(|word| line.starts_with(word))
            };
            let (above, tables) = lines.split_at(heads.len());
            assert!(
                above
                    .iter()
                    .flat_map(|line| line.split(' '))
                    .all(|word| word.is_empty() || words.contains(word)),
                "{width}: {above:#?}"
            );
            let foot = tables.len() - 1;
            // The titles have numbers of their own.
            for line in tables[..foot].iter().filter(|line| !is_title(line)) {
                // No text has two blanks in it, and no fewer are between two columns.
                let cells = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty());
                for cell in cells {
                    let is_cut = |whole: &&str| {
                        let is_text = whole.starts_with(|first: char| first == '/' || first.is_alphabetic());
                        let (end, beginning) = (cell.strip_prefix('…'), cell.strip_suffix('…'));
                        is_text
                            && (end.is_some_and(|end| whole.ends_with(end))
                                || beginning.is_some_and(|beginning| whole.starts_with(beginning)))
                    };
                    assert!(
                        given.contains(cell) || given.iter().any(is_cut),
                        "{width}: {cell} in {lines:#?}"
                    );
                }
            }
        }
    }

    #[test]
    fn narrow_terminals_show_the_columns_of_most_use() {
        for width in WIDTHS {
            let lines = lines_in(&busy(), width);
            let with = |words: &[&str]| lines.iter().any(|line| words.iter().all(|word| line.contains(word)));
            assert!(
                with(&["1234567 commands/s"]) && with(&["core", "busy", "polling", "asleep"]),
                "{lines:#?}"
            );
            assert!(with(&["127", "0.0 %", "100.0 %"]) && with(&["3", "99.7 %", "0.2 %"]), "{lines:#?}");
            assert!(with(&["fenced: map-in-doubt", "617283"]) && with(&["1234567", "16777.2"]), "{lines:#?}");
            if width >= 80 {
                assert!(with(&["nsid", "state", "commands/s", "p50 us", "p99 us", "file"]), "{lines:#?}");
                assert!(with(&["1", "live", "617283", "1048.5", "8388.6", "first.img"]), "{lines:#?}");
                assert!(with(&["commands/s", "read", "written", "p50 us", "p99 us", "host"]), "{lines:#?}");
                let row = ["1234567", "4.7 GiB/s", "1023.5 MiB/s", "2097.1", "16777.2", "-second"];
                assert!(with(&row), "{lines:#?}");
                assert!(with(&["127", "54321", "64 KiB"]), "{lines:#?}");
            }
        }
        for (width, name) in [
            (200, "of_200_columns"),
            (120, "of_120_columns"),
            (80, "of_80_columns"),
            (60, "of_60_columns"),
            (40, "of_40_columns"),
        ] {
            insta::assert_snapshot!(name, shown(&busy(), width, 24));
        }
    }

    #[test]
    fn a_section_says_how_many_columns_need_more_width() {
        let (narrow, wide) = (lines_in(&busy(), 80), lines_in(&busy(), 200));
        let is_there = |lines: &[String], title: &str| lines.iter().any(|line| line == title);
        assert!(is_there(&narrow, "hosts (2 columns need more width)"), "{narrow:#?}");
        assert!(is_there(&narrow, "cores (1 column needs more width)"), "{narrow:#?}");
        assert!(["cores", "exports", "hosts"].iter().all(|title| is_there(&wide, title)), "{wide:#?}");
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
    fn cores_of_several_targets_say_whose_they_are() {
        let mut view = busy();
        assert!(!lines(&view).iter().any(|line| line.starts_with("process  core")));
        view.cores[1] = CoreRow { pid: 4321, ..view.cores[0].clone() };
        let lines = lines(&view);
        let with = |words: &[&str]| lines.iter().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(with(&["process", "core", "busy", "mostly"]) && with(&["4321", "99.7 %"]), "{lines:#?}");
    }

    #[test]
    fn stages_stand_in_their_order() {
        let section = latency(&View::default());
        let words: Vec<_> = section.columns[2..].iter().map(|column| column.title).collect();
        assert_eq!(words, Stage::ALL.map(Stage::word));
    }
}
